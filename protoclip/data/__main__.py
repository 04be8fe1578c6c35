"""``python -m protoclip.data``: look at pairs, and write them as webdataset shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

from protoclip.config import Parser
from protoclip.data.check import check_data
from protoclip.data.export import FORMATS, export_shards
from protoclip.data.sources import open_dataset
from protoclip.data.types import PairDataset

PROG = "python -m protoclip.data"


def build_parser() -> Parser:
    parser = Parser(PROG, description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", metavar="DATA", help="data to write as shards, as --train-data")
    what.add_argument("--check", metavar="DATA", help="read everything once; list what is wrong")
    parser.add_argument("--workers", type=int, default=1, help="threads of --check (default: 1)")
    parser.add_argument("--out", metavar="DIR", help="an empty or new folder for the shards")
    parser.add_argument(
        "--split", default="all", help="all, train, heldout; noto for builtin:emoji (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which pairs are held out (default: 0)")
    parser.add_argument(
        "--per-shard", type=int, default=1000, metavar="N", help="pairs a shard (default: 1000)"
    )
    parser.add_argument(
        "--image-format", default="png", choices=FORMATS, help="of the pictures (default: png)"
    )
    parser.add_argument("--csv-separator", default="\t", help="of a table (default: tab)")
    parser.add_argument("--csv-img-key", default="filepath", help="column (default: filepath)")
    parser.add_argument("--csv-caption-key", default="title", help="column (default: title)")
    parser.add_argument("--encoding", default="utf-8", help="of a table (default: utf-8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 where --check finds faults, or 2 for a user's mistake
    (one message on stderr)."""
    arguments = build_parser().parse_args(argv)
    try:
        return _check(arguments) if arguments.check else _export(arguments)
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2


def _open(spec: str, arguments: argparse.Namespace) -> PairDataset:
    return open_dataset(
        spec,
        arguments.split,
        seed=arguments.seed,
        csv_separator=arguments.csv_separator,
        csv_img_key=arguments.csv_img_key,
        csv_caption_key=arguments.csv_caption_key,
        csv_encoding=arguments.encoding,
        keep_going=bool(arguments.check),
    )


def _check(arguments: argparse.Namespace) -> int:
    dataset = _open(arguments.check, arguments)
    with tqdm(
        total=len(dataset), desc="checking", unit=" samples", leave=False, disable=None
    ) as bar:
        return int(check_data(dataset, tqdm.write, arguments.workers, bar.update) > 0)


def _export(arguments: argparse.Namespace) -> int:
    if not arguments.out:
        raise ValueError("--export: expected a folder for the shards; add --out DIR")
    dataset = _open(arguments.export, arguments)
    with tqdm(total=len(dataset), desc="writing", unit=" pairs", disable=None) as bar:
        shards = export_shards(
            dataset,
            arguments.out,
            per_shard=arguments.per_shard,
            image_format=arguments.image_format,
            progress=bar.update,
        )
    spec = f"{arguments.out}/{shards[0].name}"
    if len(shards) > 1:
        spec = f"{arguments.out}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    print(f"{len(dataset):,} pairs in {len(shards)} shards: --train-data '{spec}'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
