"""Do ``--proto-*`` of ``protoclip openclip`` group images better?

    python -m benchmarks.openclip --out benchmarks/results/openclip/grouping.json

Plain and with prototypes, equal steps, on shards of builtin:emoji; every run is the real command.
Scores: AMI of k-means on image features against groups and subgroups, for all concepts in the style
trained on (TW, 10 % of them never trained on) and in one never seen (NOTO). A second call goes on.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.machine import describe
from protoclip.config import ModelConfig
from protoclip.data import open_dataset
from protoclip.evaluate.metrics import group_scores
from protoclip.evaluate.tasks import Encoder
from protoclip.model import build_model

MODEL = "protoclip-tiny"  # runs recorded before 2026-11-26 had patches of 12 and shorter captions
PROTO = "--proto-queue 1664 --proto-k 166 --proto-warmup 45 --proto-logit-scale 14.3"
FLAGS = (
    "--device cpu --precision fp32 --workers 0 --lr 1e-3 --beta2 0.98 --eps 1e-6 --warmup 30 "
    "--grad-clip-norm 10 --log-every-n-steps 10 --batch-size 128 --aug-cfg 'scale=(0.5, 1.0)'"
)
SHARD, SHARDS = 431, 4  # the train split's 1,722 pairs


def score(checkpoint):
    """AMI of the image features of a checkpoint, by set and label."""
    settings = ModelConfig(model=MODEL, pretrained=str(checkpoint), add_projection_head=False)
    encoder, out = Encoder(build_model(settings), torch.device("cpu")), {}
    for name, style in (("TW", "twemoji"), ("NOTO", "noto")):
        dataset = open_dataset(f"builtin:emoji:{style}")
        features = encoder.images(dataset)
        for label, known in dataset.labels.items():
            out[f"{name} {label} AMI"] = group_scores(features, known.ids)["ami"]
    return out


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3, help="of each arm")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--proto", default=PROTO, help="flags of the prototypes")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    arms = [(seed, arm) for seed in range(args.runs) for arm in ("plain", "prototypes")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export = f"-m protoclip.data --export builtin:emoji --split train --per-shard {SHARD} --out"
        subprocess.run([sys.executable, *export.split(), f"{folder}/shards"], check=True)
        for seed, arm in ((seed, arm) for seed, arm in arms if (arm, seed) not in done):
            name = f"{arm}-{seed}"
            command = [sys.executable, "-m", "protoclip.openclip", "--model", MODEL]
            command += ["--train-data", f"{folder}/shards/{{00000..{SHARDS - 1:05d}}}.tar"]
            command += ["--epochs", str(args.epochs), "--seed", str(seed), "--logs", str(folder)]
            command += ["--name", name, *shlex.split(FLAGS)]
            command += shlex.split(args.proto) if arm == "prototypes" else []
            subprocess.run(command, check=True)
            found = score(folder / name / "checkpoints" / f"epoch_{args.epochs}.pt")
            rows.append({"arm": arm, "seed": seed, "flags": args.proto, **found})
            print(json.dumps(rows[-1]), flush=True)
            args.out.write_text(json.dumps({"machine": describe(), "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
