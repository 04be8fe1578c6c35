"""``protoclip data``: check pairs, or write them as webdataset shards."""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("data", sys.argv[1:])

import io
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from protoclip.common.files import printable_lines, whole_file, write_atomic
from protoclip.common.waits import each
from protoclip.data import DataError, PairDataset, open_dataset, readable
from protoclip.distributed import run_command
from protoclip.settings.commands import data_parser
from protoclip.settings.config import TABLE

PROG = "protoclip data"
FORMATS = {"png": "PNG", "jpg": "JPEG"}
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")  # safe as a file name in a tar, without a dot


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 if --check finds faults, or 2 for a user's mistake
    (one message on stderr)."""
    args = data_parser().parse_args(argv)
    return run_command(lambda: run(args), PROG)


def run(args: Any) -> int:
    """Check or export, depending on the flags; returns the exit code."""
    table = {name: value for name, value in vars(args).items() if name in TABLE}
    data = args.check or args.export
    dataset = open_dataset(
        data, args.split, seed=args.val_seed, keep_going=bool(args.check), **table
    )
    for line in dataset.facts.left_out:
        print(line, file=sys.stderr)
    if args.check:
        return int(check_data(dataset) > 0)
    if not args.out:
        raise ValueError("--export: expected a folder for the shards; add --out DIR")
    shards = export_shards(dataset, args.out, args.per_shard, args.image_format)
    source = f"{args.out}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    if "{" in args.out:  # would be expanded too
        source = args.out
    print(f"{len(dataset):,} pairs: --train-data {shlex.quote(source)}")
    return 0


def check_data(dataset: PairDataset) -> int:
    """Read every sample once and print what is wrong with each bad one; returns their number."""
    skipped = dataset.facts.skipped
    for file, key, reason in skipped:
        print(f"{file}: {key!r}: {reason}" if key else f"{file}: {reason}")
    total = len(skipped) + len(dataset)
    faults = readable(dataset, lambda fault: tqdm.write(printable_lines(fault))).faults
    num_bad = len(skipped) + len(faults)
    num_good = total - num_bad
    print(f"{dataset.name}: {num_good:,} of {total:,} samples are good, {num_bad:,} are not")
    return num_bad


def shard_names(count: int) -> list[str]:
    """00000.tar, 00001.tar, ...: of one length, so that a range in braces names them all."""
    digits = max(5, len(str(count - 1)))
    return [f"{number:0{digits}d}.tar" for number in range(count)]


def export_shards(
    dataset: PairDataset, out: str | os.PathLike[str], per_shard: int = 1000, kind: str = "png"
) -> list[Path]:
    """Write 00000.tar, 00001.tar, ... and sizes.json to a new or empty folder; the same data gives
    the same bytes.

    Each pair is KEY.png (lossless) or KEY.jpg (quality 95), depending on ``kind``, KEY.txt with the
    canonical caption (for OpenCLIP) and KEY.json with "caption", "captions", "key" and the labels
    by name. Where a key is not a safe file name, the pairs' numbers take the place of all keys.

    Raises:
        ValueError: the folder is not empty, a pair cannot be read, or per_shard is below 1.
    """
    from webdataset import TarWriter

    if per_shard < 1:
        raise ValueError(f"--per-shard: expected at least 1, got {per_shard}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"--out {folder}: the folder is not empty; choose a new one")
    own_keys = all(map(PLAIN_KEY.fullmatch, dataset.keys))
    names = shard_names(-(-len(dataset) // per_shard))
    sizes: dict[str, int] = {}
    for start in each(range(0, len(dataset), per_shard), "writing", "shards"):
        path = folder / names[start // per_shard]
        part = range(start, min(start + per_shard, len(dataset)))
        # Pass an open file, because webdataset would run some names as commands.
        with (
            whole_file(path) as temporary,
            open(temporary, "wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for i in part:
                key = dataset.keys[i] if own_keys else f"{i:09d}"
                tar.write({"__key__": key, **_members_of(dataset, i, kind)})
        sizes[path.name] = len(part)
    write_atomic(folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
    return [folder / name for name in sizes]


def _members_of(dataset: PairDataset, i: int, kind: str) -> dict[str, str | bytes]:
    """A pair in the form that webdataset's writer takes, except its key."""
    captions = dataset.captions(i)
    stream = io.BytesIO()
    dataset.image(i).save(stream, FORMATS[kind], quality=95)
    about: dict[str, Any] = {
        "caption": captions[0],
        "captions": list(captions),
        "key": dataset.keys[i],
    }
    for name, labels in dataset.labels.items():
        if labels.ids[i] >= 0:
            about[name] = labels.names[int(labels.ids[i])]
    return {
        kind: stream.getvalue(),
        "txt": captions[0].encode("utf-8", "surrogateescape"),
        "json": json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogateescape"),
    }


if __name__ == "__main__":
    sys.exit(main())
