"""``python -m protoclip.data``: look at pairs, and write them as webdataset shards."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from protoclip.config import Parser
from protoclip.data.files import whole_file, write_atomic
from protoclip.data.sources import open_dataset
from protoclip.data.types import DataError, PairDataset

PROG = "python -m protoclip.data"
FORMATS = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95}}
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,95}")  # safe as a file name of a tar, without a dot


def build_parser() -> Parser:
    parser = Parser(PROG, description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", metavar="DATA", help="data to write as shards, as --train-data")
    what.add_argument("--check", metavar="DATA", help="read everything once; list what is wrong")
    parser.add_argument("--out", metavar="DIR", help="an empty or new folder for the shards")
    parser.add_argument(
        "--image-format", default="png", choices=FORMATS, help="of the pictures (default: png)"
    )
    for flag, default, text in (
        ("--split", "all", "all, train, heldout; noto for builtin:emoji"),
        ("--seed", 0, "which pairs are held out"),
        ("--workers", 1, "threads of --check"),
        ("--per-shard", 1000, "pairs a shard"),
        ("--csv-separator", "\t", "of a table"),
        ("--csv-img-key", "filepath", "column of the pictures' paths"),
        ("--csv-caption-key", "title", "column of the captions"),
        ("--encoding", "utf-8", "of a table"),
    ):
        dest = "csv_encoding" if flag == "--encoding" else None
        text += f" (default: {str(default).replace(chr(9), 'tab')})"
        parser.add_argument(flag, dest=dest, type=type(default), default=default, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 where --check finds faults, or 2 for a user's mistake
    (one message on stderr)."""
    arguments = build_parser().parse_args(argv)
    try:
        dataset = open_dataset(
            arguments.check or arguments.export,
            arguments.split,
            seed=arguments.seed,
            keep_going=bool(arguments.check),
            **{name: value for name, value in vars(arguments).items() if name.startswith("csv_")},
        )
        if arguments.check:
            return int(check_data(dataset, arguments.workers) > 0)
        if not arguments.out:
            raise ValueError("--export: expected a folder for the shards; add --out DIR")
        form = {"per_shard": arguments.per_shard, "image_format": arguments.image_format}
        shards = export_shards(dataset, arguments.out, **form)
        names = f"{shards[0].stem}..{shards[-1].stem}"
        print(f"{len(dataset):,} pairs: --train-data '{arguments.out}/{{{names}}}.tar'")
        return 0
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2


def check_data(dataset: PairDataset, workers: int = 1) -> int:
    """Read every sample once and print what is wrong with each bad one; returns their number."""
    skipped = getattr(dataset, "skipped", [])
    for shard, key, reason in skipped:
        print(f"{shard}: {key!r}: {reason}" if key else f"{shard}: {reason}")
    count, total = len(skipped), len(skipped) + len(dataset)

    def judge(i: int) -> str:
        try:
            dataset.image(i)
            dataset.captions(i)
            return ""
        except DataError as error:
            return str(error)

    block = 256 * max(1, workers)  # samples in flight
    # Threads, as Pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in tqdm(range(0, len(dataset), block), "checking", leave=False, disable=None):
            for fault in pool.map(judge, range(start, min(start + block, len(dataset)))):
                if fault:
                    tqdm.write(fault)
                    count += 1
    print(f"{dataset.name}: {total - count:,} of {total:,} samples are good, {count:,} are not")
    return count


def export_shards(
    dataset: PairDataset,
    out: str | os.PathLike[str],
    *,
    per_shard: int = 1000,
    image_format: str = "png",
) -> list[Path]:
    """Write 00000.tar, 00001.tar, ... and sizes.json into a new or empty folder.

    Each pair is KEY.png (or .jpg), KEY.txt with the canonical caption (what OpenCLIP reads) and
    KEY.json with "caption", "captions", "key" and the labels by name. The same data gives the same
    bytes. A key that would not be a safe file name is replaced by the pair's number.

    Args:
        dataset: what to write.
        out: folder for the shards.
        per_shard: pairs in each tar but the last.
        image_format: "png" (lossless) or "jpg" (quality 95).
    Raises:
        DataError: the folder holds something, or a pair cannot be read.
        ValueError: per_shard or image_format make no sense.
    """
    from webdataset import TarWriter

    if per_shard < 1 or image_format not in FORMATS:
        raise ValueError(
            f"export: expected at least 1 pair per shard and a format of {', '.join(FORMATS)}, got "
            f"{per_shard} and {image_format!r}"
        )
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise DataError(f"--out {folder}: {error.strerror}; choose another folder") from error
    if occupied:
        raise DataError(f"--out {folder}: the folder is not empty; choose a new one")
    sizes: dict[str, int] = {}
    for start in tqdm(range(0, len(dataset), per_shard), "writing", unit="shard", disable=None):
        path = folder / f"{start // per_shard:05d}.tar"
        part = range(start, min(start + per_shard, len(dataset)))
        # An open file: webdataset would take some names for commands to run.
        with (
            whole_file(path) as temporary,
            open(temporary, "wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for i in part:
                tar.write(_members_of(dataset, i, image_format))
        sizes[path.name] = len(part)
    write_atomic(folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
    return [folder / name for name in sizes]


def _members_of(dataset: PairDataset, i: int, image_format: str) -> dict[str, str | bytes]:
    """A pair as webdataset's writer takes it."""
    captions, key = dataset.captions(i), dataset.keys[i]
    picture = io.BytesIO()
    dataset.image(i).save(picture, **FORMATS[image_format])  # type: ignore[arg-type]
    about: dict[str, Any] = {"caption": captions[0], "captions": list(captions), "key": key}
    about |= {
        name: labels.names[int(labels.ids[i])]
        for name, labels in dataset.labels.items()
        if labels.ids[i] >= 0
    }
    return {
        "__key__": key if PLAIN_KEY.fullmatch(key) else f"{i:09d}",
        image_format: picture.getvalue(),
        "txt": captions[0].encode("utf-8", "surrogateescape"),
        "json": json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogateescape"),
    }


if __name__ == "__main__":
    sys.exit(main())
