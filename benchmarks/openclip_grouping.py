"""Does ``--proto-*`` in OpenCLIP's trainer group images better? Plain and with prototypes, equal
steps, several seeds, on shards of builtin:emoji:

    python -m benchmarks.openclip_grouping --out benchmarks/results/openclip/grouping.json

Every run is the real command, ``python -m protoclip.openclip``; a second call goes on. Scores: AMI
of k-means on image features against groups and subgroups, for all concepts in the style trained on
(TW, 10 % of them never trained on) and in one never seen (NOTO).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import run_command
from protoclip.config import ModelConfig
from protoclip.data import open_dataset
from protoclip.evaluate import Encoder
from protoclip.evaluate.metrics import group_scores
from protoclip.model import build_model
from protoclip.report.snapshot import environment

MODEL = {  # small enough for one core
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 48, "layers": 4, "width": 128, "head_width": 32, "patch_size": 12
    },
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2
    },
}  # fmt: skip
SHARDS, BATCH = 4, 128
PROTO = shlex.split("--proto-queue 1664 --proto-k 166 --proto-warmup 45 --proto-logit-scale 14.3")
FLAGS = shlex.split(
    "--device cpu --precision fp32 --workers 0 --lr 1e-3 --beta2 0.98 --eps 1e-6 --warmup 30 "
    "--grad-clip-norm 10 --log-every-n-steps 10"
)


def train(folder: Path, name: str, seed: int, epochs: int, flags: list[str]) -> Path:
    """One run of the command; its last checkpoint."""
    command = [sys.executable, "-m", "protoclip.openclip", "--model", str(folder / "small.json")]
    command += ["--train-data", f"{folder}/shards/{{00000..{SHARDS - 1:05d}}}.tar", *FLAGS]
    command += ["--batch-size", str(BATCH), "--epochs", str(epochs), "--seed", str(seed)]
    command += ["--aug-cfg", "scale=(0.5, 1.0)", "--logs", str(folder), "--name", name, *flags]
    run_command(command, folder / f"{name}.log")
    return folder / name / "checkpoints" / f"epoch_{epochs}.pt"


def score(checkpoint: Path, config: Path) -> dict[str, float]:
    """AMI of the image features of a checkpoint, by set and label."""
    settings = ModelConfig(model=str(config), pretrained=str(checkpoint), add_projection_head=False)
    encoder = Encoder(build_model(settings), torch.device("cpu"))
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
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--arms", nargs="+", default=["plain", "prototypes"])
    parser.add_argument("--proto", nargs=argparse.REMAINDER, default=PROTO)
    args = parser.parse_args()
    pairs = len(open_dataset("builtin:emoji", "train"))
    content = {"machine": environment(), "pairs": pairs, "epochs": args.epochs, "batch": BATCH}
    content |= {"flags": args.proto, "model": MODEL}
    rows = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "small.json").write_text(json.dumps(MODEL))
        export = [sys.executable, "-m", "protoclip.data", "--export", "builtin:emoji"]
        export += ["--split", "train", "--out", str(folder / "shards")]
        run_command([*export, "--per-shard", str(-(-pairs // SHARDS))], folder / "export.log")
        for seed, arm in ((seed, arm) for seed in args.seeds for arm in args.arms):
            if (arm, seed) in {(row["arm"], row["seed"]) for row in rows}:
                continue
            flags = args.proto if arm == "prototypes" else []
            last = train(folder, f"{arm}-{seed}", seed, args.epochs, flags)
            rows.append({"arm": arm, "seed": seed, **score(last, folder / "small.json")})
            print(json.dumps(rows[-1]), flush=True)
            text = json.dumps({**content, "runs": rows}, indent=1)
            args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
