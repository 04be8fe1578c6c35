"""What ``python -m protoclip.openclip`` saves in OpenCLIP's trainer: step time and peak memory.

    python -m benchmarks.openclip_speed --out benchmarks/results/openclip/speed.json

Each run is the real command, plain or ours, with the same flags, on OpenCLIP's synthetic data; runs
alternate. A model of one layer a tower leaves the loss a part of the step that can be seen, at an
embedding of OpenCLIP's usual width. Seconds are those of the trainer's log, less loading;
CPU seconds, of the whole command, are less disturbed by other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import run_command
from protoclip.report.snapshot import environment

MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
MODULES = {"OpenCLIP": "open_clip_train.main", "protoclip": "protoclip.openclip"}
STEPS, WARM = 4, 1  # the first step of a run allocates
FLAGS = shlex.split(
    "--dataset-type synthetic --device cpu --model speed-nano --epochs 1 --warmup 1 --lr 1e-4 "
    "--workers 0 --log-every-n-steps 1 --save-frequency 0"
)


def run(module: str, folder: Path, name: str, batch: int, precision: str) -> dict[str, float]:
    """Median seconds of a step without loading, of loading, and the peak memory of one run."""
    register = (  # both commands alike: OpenCLIP's takes no file for a model
        "import runpy, sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", register, str(folder / "speed-nano.json"), *FLAGS]
    command += ["--train-num-samples", str(batch * STEPS), "--batch-size", str(batch)]
    command += ["--precision", precision, "--logs", str(folder), "--name", name]
    usage = run_command(command, folder / f"{name}.log")
    log = (folder / name / "out.log").read_text()
    found = re.findall(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)", log)
    rows = [(float(data), float(whole)) for data, whole in found][WARM:]
    return {
        "step_s": statistics.median(whole - data for data, whole in rows),
        "data_s": statistics.median(data for data, _ in rows),
        "peak_mib": usage.ru_maxrss / 1024,
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "speed-nano.json").write_text(json.dumps(MODEL))
        for number in range(args.rounds):
            for who, module in MODULES.items():
                got = run(module, folder, f"{who}-{number}", args.batch, args.precision)
                rows.append({"who": who, "batch": args.batch, "precision": args.precision, **got})
                print(json.dumps(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": environment(), "model": MODEL, "runs": rows}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
