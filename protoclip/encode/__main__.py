"""``protoclip encode DATA --out DIR``: features of pictures and captions, in numbered parts.

Writes img_emb, text_emb and metadata in clip-retrieval's layout, left_out.csv and encode.json, a
record that says whether the folder is finished. ``protoclip.open_features`` reads the rows.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("encode", sys.argv[1:])

import argparse
import contextlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from protoclip import distributed
from protoclip.common.files import DataError, lines_of, locked_folder, plural, printable
from protoclip.common.paths import check_above
from protoclip.data import PairDataset, data_kind, each_picture_once, open_dataset
from protoclip.data.folders import ImageFolder, read_templates
from protoclip.data.images import no_picture
from protoclip.encode.encoders import batch_size_of, open_encoders, with_heads
from protoclip.encode.folder import OneText, Settings, encode_folder
from protoclip.features import FeatureFolder, open_folder
from protoclip.model import choose_device
from protoclip.settings.commands import DTYPES, encode_parser
from protoclip.settings.config import TABLE

PROG = "protoclip encode"
TIMEOUT = 24 * 3600.0  # seconds that a rank waits for the one with the slowest part


class ClassNames(PairDataset):
    """The names of classes, a line of a file each; captions are the name in each template."""

    def __init__(self, path: Path, templates: Sequence[str]) -> None:
        self.name = str(path)
        self.templates = templates
        try:
            lines = lines_of(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(f"--classes: expected a text file in UTF-8, got {error}") from error
        self.keys = [line.strip() for line in lines if line.strip()]
        if not self.keys or len(set(self.keys)) < len(self.keys):
            raise DataError(
                f"--classes: expected different names of classes in {printable(str(path))}, one a "
                f"line, got {plural(len(self.keys), 'name')}, {len(set(self.keys)):,} of them "
                "different"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> NoReturn:
        raise DataError(f"{self.name}: names of classes have no pictures; use --only texts")

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(template.replace("{}", self.keys[i]) for template in self.templates)


def open_data(args: argparse.Namespace) -> PairDataset:
    """What the command encodes: the pairs of DATA, or the names of --classes."""
    if bool(args.data) == bool(args.classes):
        got = "both" if args.data else "neither"
        raise ValueError(f"expected DATA or --classes, got {got}; see protoclip encode --help")
    if args.classes:
        return ClassNames(Path(args.classes), read_templates(args.template, "--template"))
    dataset = open_pairs(args)
    if args.one_text:
        return OneText(dataset)
    return each_picture_once(dataset)


def open_pairs(args: argparse.Namespace) -> PairDataset:
    """The pairs of DATA; in a folder that holds pictures itself, their paths are the captions."""
    if data_kind(args.data) == "folder":
        with os.scandir(args.data) as entries:
            if any(entry.is_file() and not no_picture(entry.path) for entry in entries):
                return ImageFolder(Path(args.data))
    options = {name: value for name, value in vars(args).items() if name in TABLE}
    return open_dataset(args.data, **options)


def run(args: argparse.Namespace, command: str) -> FeatureFolder:
    """Run the command, of which ``command`` is the line that continues it."""
    out = Path(args.out)
    check_above(out / "img_emb", "--out")
    dataset = open_data(args)
    if distributed.is_main():
        for line in dataset.facts.left_out:
            print(line, file=sys.stderr)
    only = "texts" if args.classes else args.only
    source = args.data or args.classes
    dtype = args.dtype or ("fp32" if args.one_text else "fp16")
    with locked_folder(out, "--out") if distributed.is_main() else contextlib.nullcontext():
        encoders = open_encoders(args, only)
        if args.heads:
            encoders = with_heads(encoders, args.heads, choose_device(args.device))
        encode_folder(
            dataset,
            encoders,
            Settings(
                out=out,
                command=command,
                data=os.path.abspath(source) if os.path.exists(source) else source,
                rows="a row for each picture" if args.one_text else "a row for each caption",
                dtype=DTYPES[dtype],
                batch_size=batch_size_of(args),
                workers=args.workers,
                overwrite=args.overwrite,
            ),
        )
    return open_folder(out)


def summary(folder: FeatureFolder) -> str:
    """What a finished folder holds."""
    sides = {"images": folder.images, "texts": folder.texts}
    words = [
        f"{name} {len(rows):,} x {rows.shape[1]:,} {rows.dtype}"
        for name, rows in sides.items()
        if rows is not None
    ]
    return f"{printable(str(folder.path))}: {', '.join(words)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives 2, a signal 128 + its number."""

    def work() -> int:
        info = distributed.find_rank()
        words = list(sys.argv[1:] if argv is None else argv)
        with distributed.quiet_beside_main(info):
            args = encode_parser().parse_args(words)
        distributed.start(info, choose_device(args.device), TIMEOUT)
        folder = run(args, shlex.join(["protoclip", "encode", *words]))
        if distributed.is_main():
            print(summary(folder))
        return 0

    return distributed.run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
