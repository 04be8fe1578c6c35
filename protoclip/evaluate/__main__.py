"""``python -m protoclip.evaluate RUN``: the table of a finished run again, from its checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from protoclip import checkpoint
from protoclip.config import TrainConfig, from_dict
from protoclip.evaluate.results import format_table, read_results, write_results
from protoclip.evaluate.scores import evaluate_model, peak_memory_bytes
from protoclip.model import build_model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m protoclip.evaluate",
        description="Evaluate a trained model; prints a table and writes results.json.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run folder or a checkpoint")
    parser.add_argument(
        "--data",
        default="",
        metavar="TEXT",
        help="builtin:emoji, builtin:shapes[:N], a .csv/.tsv file or webdataset shards "
        "(default: what the run was evaluated on)",
    )
    parser.add_argument(
        "--captions",
        default="first",
        choices=("first", "all"),
        help="one caption per image, or all of them (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="PATH",
        help="where the numbers go (default: results.json in the run folder; with --data or "
        "--captions all, or for a single checkpoint, a name of its own)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--workers", type=int, default=0, metavar="N")
    return parser


def run(args: argparse.Namespace) -> str:
    """What the command line asks for; returns the text to print."""
    started = time.perf_counter()
    stored, payload = checkpoint.load_run(args.model)
    config = from_dict(TrainConfig, stored)
    # Its weights come from the checkpoint; what it once started from need not be there any more.
    model = build_model(dataclasses.replace(config.model, pretrained=""))
    model.load_state(payload)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(name)
    data = args.data or _own_data(config)
    loaded = time.perf_counter() - started
    with tqdm(desc="evaluating", unit=" rows", file=sys.stderr, leave=False) as bar:
        after = evaluate_model(
            model,
            data,
            seed=config.run.seed,
            captions=args.captions,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=bar.update,
            open_kwargs=_csv_columns(config),
        )
    output = Path(args.output) if args.output else _output(args, data if args.data else "")
    # What training left there, for the same data, is part of the same table.
    earlier = _earlier(output, data)
    before = earlier.get("untrained")
    timing = earlier.get("seconds") or {"loading": loaded, "evaluation": after.seconds}
    peak = earlier.get("peak_memory_bytes") or peak_memory_bytes(name)
    write_results(
        output,
        after,
        before,
        data=data,
        model=config.model.model,
        pretrained=str(checkpoint.find(args.model)),
        timing=timing,
        peak_memory_bytes=peak,
    )
    table = format_table(before, after, timing, peak_memory_bytes=peak)
    return f"{table}\nEvaluated in {after.seconds:.1f} s, written to {output}"


def _own_data(config: TrainConfig) -> str:
    """What the run was evaluated on when it was trained."""
    data = config.data
    if data.val_data or data.train_data.startswith("builtin:"):
        return data.val_data or data.train_data
    raise ValueError(
        f"the run was trained on all of {data.train_data}, without --val-data; "
        "give --data, the pairs to evaluate on"
    )


def _csv_columns(config: TrainConfig) -> dict[str, str]:
    names = ("csv_separator", "csv_img_key", "csv_caption_key")
    return {name: getattr(config.data, name) for name in names}


def _output(args: argparse.Namespace, other_data: str) -> Path:
    """results.json of the run for its own evaluation, a name that tells for any other."""
    path = Path(args.model)
    parts = [path.stem if path.is_file() else "", "results"]
    parts += [re.sub(r"[^A-Za-z0-9]+", "_", other_data).strip("_")[-60:]]
    parts += ["all_captions" if args.captions == "all" else ""]
    folder = path.parent if path.is_file() else path
    return folder / ("-".join(part for part in parts if part) + ".json")


def _earlier(output: Path, data: str) -> dict[str, Any]:
    """An earlier results.json at the same place, if it is about the same data; else {}."""
    if not output.is_file():
        return {}
    content = read_results(output)
    return content if content.get("data") == data else {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake ends it with one line and status 2."""
    args = build_parser().parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"python -m protoclip.evaluate: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
