"""What ``protoclip encode`` encodes: pairs, each with one text or all of its captions, or names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from protoclip.common.files import DataError, lines_of, plural, printable
from protoclip.data import PairDataset, Subset, data_kind, each_picture_once, open_dataset
from protoclip.data.folders import ImageFolder, read_templates
from protoclip.data.images import no_picture
from protoclip.episodes.teacher import teacher_text
from protoclip.settings.config import TABLE


class OneText(Subset):
    """The pairs of a data set, each with one text: what a text teacher reads."""

    def __init__(self, dataset: PairDataset) -> None:
        super().__init__(dataset, np.arange(len(dataset)))

    def captions(self, i: int) -> tuple[str, ...]:
        return (teacher_text(super().captions(i)),)


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
