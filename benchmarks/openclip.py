"""``python -m protoclip.openclip`` beside OpenCLIP's own trainer; every run is the real command.

    python -m benchmarks.openclip grouping --out benchmarks/results/openclip/grouping.json
    python -m benchmarks.openclip speed --out benchmarks/results/openclip/speed.json

grouping: does ``--proto-*`` group images better? Plain and with prototypes, equal steps, on shards
of builtin:emoji. Scores: AMI of k-means on image features against groups and subgroups, for all
concepts in the style trained on (TW, 10 % of them never trained on) and in one never seen (NOTO).
speed: step time and peak memory on OpenCLIP's synthetic data, runs alternated. One layer a tower
leaves the loss a part of the step that can be seen, at an embedding of OpenCLIP's usual width.
Seconds are those of the trainer's log, less loading; CPU seconds, of the whole command, are less
disturbed by other work on the machine. A second call adds to the file.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import run_command
from protoclip.config import ModelConfig
from protoclip.data import open_dataset
from protoclip.evaluate.metrics import group_scores
from protoclip.evaluate.tasks import Encoder
from protoclip.model import build_model
from protoclip.report.snapshot import environment

GROUPING_MODEL = {  # small enough for one core
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 48, "layers": 4, "width": 128, "head_width": 32, "patch_size": 12
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2
    },
}  # fmt: skip
SPEED_MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PROTO = "--proto-queue 1664 --proto-k 166 --proto-warmup 45 --proto-logit-scale 14.3"
GROUPING = (
    "--device cpu --precision fp32 --workers 0 --lr 1e-3 --beta2 0.98 --eps 1e-6 --warmup 30 "
    "--grad-clip-norm 10 --log-every-n-steps 10 --batch-size 128 --aug-cfg 'scale=(0.5, 1.0)'"
)
SPEED = (
    "--dataset-type synthetic --device cpu --model nano --epochs 1 --warmup 1 --lr 1e-4 "
    "--workers 0 --log-every-n-steps 1 --save-frequency 0"
)
SHARDS = 4
MODULES = {"OpenCLIP": "open_clip_train.main", "protoclip": "protoclip.openclip"}
STEPS, WARM = 4, 1  # the first step of a run allocates


def grouping(folder: Path, args: argparse.Namespace, done: list[dict]) -> Iterator[dict[str, Any]]:
    """Each run's AMI by set and label; runs that are done are left out."""
    config = folder / "small.json"
    config.write_text(json.dumps(GROUPING_MODEL))
    size = -(-len(open_dataset("builtin:emoji", "train")) // SHARDS)
    export = "-m protoclip.data --export builtin:emoji --split train --out"
    command = [sys.executable, *export.split(), str(folder / "shards"), "--per-shard", str(size)]
    run_command(command, folder / "export.log")
    for seed, arm in ((seed, arm) for seed in range(args.runs) for arm in ("plain", "prototypes")):
        if (arm, seed) in {(row["arm"], row["seed"]) for row in done}:
            continue
        name = f"{arm}-{seed}"
        command = [sys.executable, "-m", "protoclip.openclip", "--model", str(config)]
        command += ["--train-data", f"{folder}/shards/{{00000..{SHARDS - 1:05d}}}.tar"]
        command += ["--epochs", str(args.epochs), "--seed", str(seed), "--logs", str(folder)]
        command += ["--name", name, *shlex.split(GROUPING)]
        command += shlex.split(args.proto) if arm == "prototypes" else []
        run_command(command, folder / f"{name}.log")
        last = folder / name / "checkpoints" / f"epoch_{args.epochs}.pt"
        yield {"arm": arm, "seed": seed, "flags": args.proto, **score(last, config)}


def score(checkpoint: Path, config: Path) -> dict[str, float]:
    """AMI of the image features of a checkpoint, by set and label."""
    settings = ModelConfig(model=str(config), pretrained=str(checkpoint), add_projection_head=False)
    encoder = Encoder(build_model(settings), torch.device("cpu"))
    out = {}
    for name, style in (("TW", "twemoji"), ("NOTO", "noto")):
        dataset = open_dataset(f"builtin:emoji:{style}")
        features = encoder.images(dataset)
        for label, known in dataset.labels.items():
            out[f"{name} {label} AMI"] = group_scores(features, known.ids)["ami"]
    return out


def speed(folder: Path, args: argparse.Namespace, done: list[dict]) -> Iterator[dict[str, Any]]:
    """Each run's median seconds of a step without loading, and its peak memory."""
    (folder / "nano.json").write_text(json.dumps(SPEED_MODEL))
    for number, who in ((number, who) for number in range(args.runs) for who in MODULES):
        register = (  # both commands alike: OpenCLIP's takes no file for a model
            "import runpy, sys, open_clip; open_clip.add_model_config(sys.argv.pop(1)); "
            f"runpy.run_module({MODULES[who]!r}, run_name='__main__', alter_sys=True)"
        )
        name = f"{who}-{number}"
        command = [sys.executable, "-c", register, str(folder / "nano.json"), *SPEED.split()]
        command += ["--train-num-samples", str(args.batch * STEPS), "--batch-size", str(args.batch)]
        command += ["--precision", args.precision, "--logs", str(folder), "--name", name]
        usage = run_command(command, folder / f"{name}.log")
        log = (folder / name / "out.log").read_text()
        found = re.findall(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)", log)[WARM:]
        yield {
            "who": who, "batch": args.batch, "precision": args.precision,
            "step_s": statistics.median(float(whole) - float(data) for data, whole in found),
            "peak_mib": usage.ru_maxrss / 1024, "cpu_s": usage.ru_utime + usage.ru_stime,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    questions: dict[str, Callable] = {"grouping": grouping, "speed": speed}
    parser.add_argument("question", choices=questions)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3, help="of each arm")
    parser.add_argument("--epochs", type=int, default=12, help="grouping")
    parser.add_argument("--proto", default=PROTO, help="grouping: flags of the prototypes")
    parser.add_argument("--batch", type=int, default=4096, help="speed")
    parser.add_argument("--precision", default="fp32", help="speed")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for row in questions[args.question](Path(scratch), args, list(rows)):
            print(json.dumps(row), flush=True)
            rows.append(row)
            content = {"machine": environment(), "runs": rows}
            args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
