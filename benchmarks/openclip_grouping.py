"""Does ``--proto-*`` in OpenCLIP's trainer group images better? Plain and with prototypes, equal
steps, several seeds, on shards of builtin:emoji:

    python benchmarks/openclip_grouping.py --out benchmarks/results/openclip/grouping.json

Every run is the real command, ``python -m protoclip.openclip``. Scores: AMI of k-means on image
features against groups and subgroups, for all concepts in the style trained on (TW, 10 % of them
never trained on) and in one never seen (NOTO).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch

from protoclip.config import ModelConfig
from protoclip.data import open_dataset
from protoclip.evaluate import Encoder
from protoclip.evaluate.metrics import group_scores
from protoclip.model import build_model

MODEL = {  # small enough for one core
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 48, "layers": 4, "width": 128, "head_width": 32, "patch_size": 12
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2
    },
}  # fmt: skip
SHARDS = 4
BATCH = 128
PROTO = [
    "--proto-queue",
    "1664",
    "--proto-k",
    "166",
    "--proto-warmup",
    "45",
    "--proto-logit-scale",
    "14.3",
]


def write_shards(folder: Path) -> str:
    size = -(-len(open_dataset("builtin:emoji", "train")) // SHARDS)
    command = [sys.executable, "-m", "protoclip.data", "--export", "builtin:emoji"]
    command += ["--split", "train", "--out", str(folder), "--per-shard", str(size)]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder / f"{{00000..{SHARDS - 1:05d}}}.tar")


def train(shards: str, logs: Path, name: str, seed: int, epochs: int, flags: list[str]) -> float:
    """One run of the command; seconds of wall-clock time."""
    config = logs / "emoji-small.json"
    config.write_text(json.dumps(MODEL))
    command = [sys.executable, "-m", "protoclip.openclip", "--train-data", shards]
    command += ["--model", str(config), "--device", "cpu", "--precision", "fp32"]
    command += ["--batch-size", str(BATCH), "--epochs", str(epochs), "--workers", "0"]
    command += ["--lr", "1e-3", "--beta2", "0.98", "--eps", "1e-6", "--warmup", "30"]
    command += ["--grad-clip-norm", "10", "--aug-cfg", "scale=(0.5, 1.0)", "--seed", str(seed)]
    command += ["--logs", str(logs), "--name", name, "--log-every-n-steps", "10", *flags]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def score(checkpoint: Path, config: Path) -> dict[str, float]:
    """AMI of the image features of a checkpoint, by set and label."""
    model = build_model(
        ModelConfig(model=str(config), pretrained=str(checkpoint), add_projection_head=False)
    )
    encoder = Encoder(model, torch.device("cpu"))
    out = {}
    for name, split in (("TW", "all"), ("NOTO", "noto")):
        dataset = open_dataset("builtin:emoji", split)
        features = encoder.images(dataset)
        for label, known in dataset.labels.items():
            got = group_scores(features, known.ids)
            out[f"{name} {label} AMI"] = got["ami"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--proto", nargs=argparse.REMAINDER, default=PROTO)
    parser.add_argument("--arms", nargs="+", default=["plain", "prototypes"])
    args = parser.parse_args()
    flags_of = {"plain": [], "prototypes": args.proto}
    out = Path(args.out)
    rows = json.loads(out.read_text())["runs"] if out.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch)
        shards = write_shards(logs / "shards")
        for seed in args.seeds:
            for arm in args.arms:
                if (arm, seed) in done:
                    continue
                name = f"{arm}-{seed}"
                seconds = train(shards, logs, name, seed, args.epochs, flags_of[arm])
                last = logs / name / "checkpoints" / f"epoch_{args.epochs}.pt"
                scores = score(last, logs / "emoji-small.json")
                rows.append({"arm": arm, "seed": seed, "seconds": seconds, **scores})
                print(json.dumps(rows[-1]), flush=True)
                write(out, rows, args)


def write(out: Path, rows: list[dict], args: argparse.Namespace) -> None:
    """The runs so far, with means; a second call of the script goes on from here."""
    metrics = [key for key in rows[0] if key.endswith("AMI")]
    means = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        means[arm] = {m: statistics.mean(row[m] for row in own) for m in metrics}
    content = {
        "question": " ".join((__doc__ or "").split("\n\n")[0].split()),
        "machine": f"one core, {cpu()}, torch {torch.__version__}",
        "open_clip": open_clip.__version__,
        "pairs": len(open_dataset("builtin:emoji", "train")),
        "epochs": args.epochs,
        "steps": args.epochs * -(-len(open_dataset("builtin:emoji", "train")) // BATCH),
        "batch": BATCH,
        "flags": args.proto,
        "model": MODEL,
        "mean": means,
        "runs": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")


def cpu() -> str:
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0].split(":")[1].strip() if names else platform.machine()


if __name__ == "__main__":
    main()
