"""Data for evaluation: built-in pairs, folders of class folders, tables and shards."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from protoclip import data as sources
from protoclip.data import DataError, Labels, PairDataset, open_dataset
from protoclip.data.files import lines_of, plural, printable
from protoclip.data.images import decode
from protoclip.data.tables import read_table

SPLITS = ("test", "val", "validation")  # the first one present is evaluated
LABEL = "class"
EMOJI_TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "{} symbol")
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")
ABBREVIATIONS = {"alphanum": "letters and numbers", "av-symbol": "audio and video symbol"}


@dataclass(frozen=True)
class Layout:
    """Opened data: the test set, the training set of probes, and the prompts of its classes."""

    test: PairDataset
    train: PairDataset | None = None
    templates: Sequence[str] = TEMPLATES  # with "{}" for the class
    captions: int | None = None  # most captions per picture; None: all
    key: str = "ALL"  # the set's name in the results
    title: str = ""
    emoji: Callable[..., PairDataset] | None = None  # opens the other splits of built-in emoji


def open_layout(
    data: str,
    *,
    split: str = "",
    templates: str = "openai",
    csv_label_key: str = "",
    **open_kwargs: Any,
) -> Layout:
    """Open data of any kind, on all ranks; see ``protoclip evaluate --help``.

    Args:
        data: built-in data, whose held-out part is evaluated with one caption per picture; a folder
            of class folders, or of split folders with class folders, with an optional
            classnames.txt, one name per line in the order of the class folders; a table; shards.
        split: the folder to evaluate; "": test, val or validation if present, else all.
        csv_label_key: column of the class in a table.
    """
    if data.startswith("builtin:"):

        def opened(split: str, data: str = data) -> PairDataset:
            return open_dataset(data, split, **open_kwargs)

        emoji = opened if data == "builtin:emoji" else None
        words: Sequence[str] = EMOJI_TEMPLATES if data.startswith("builtin:emoji") else TEMPLATES
        test, train = opened("heldout"), opened("train")
        return Layout(test, train, words, 1, "HO", "Held-out pairs", emoji)
    words, root = read_templates(templates), Path(data)
    if root.is_dir() and not any(root.glob("*.tar")):
        return _image_folder(root, split, words)
    if sources.is_sharded(data):
        sources.index_together(data)
    dataset: Any = open_dataset(data, **open_kwargs)
    if csv_label_key and data.lower().endswith((".csv", ".tsv")):
        form = open_kwargs.get("csv_separator", "\t"), open_kwargs.get("csv_encoding", "utf-8")
        values = []
        for line, row, fault in read_table(data, (csv_label_key,), *form):
            if fault:
                raise DataError(f"{data}, line {line}: {fault}")
            values.append(row[0].strip())
        names, ids = np.unique(values, return_inverse=True)
        dataset.labels = {LABEL: Labels(torch.from_numpy(ids), tuple(names.tolist()))}
    return Layout(dataset, templates=words)


def _image_folder(root: Path, split: str, words: Sequence[str]) -> Layout:
    train = root / "train"
    chosen = root / split
    if not split:
        chosen = next((root / name for name in SPLITS if (root / name).is_dir()), root)
        if chosen == root and train.is_dir() and any(path.is_dir() for path in train.iterdir()):
            raise DataError(f"{root}: expected {' or '.join(SPLITS)} beside train; give --split")
    if not chosen.is_dir():
        raise DataError(f"--split {split}: no folder {chosen}; name one that holds class folders")
    with_train = chosen not in (root, train) and train.is_dir()
    folders = sorted({*_class_folders(chosen), *(_class_folders(train) if with_train else ())})
    names, path = [printable(name) for name in folders], root / "classnames.txt"
    if path.is_file():
        names = [name.strip() for name in lines_of(path.read_text(encoding="utf-8").rstrip())]
    elif len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        # ImageNet's WordNet ids sort in the order of OpenCLIP's names.
        names = open_clip.IMAGENET_CLASSNAMES
    if len(names) != len(folders) or not all(names):
        raise DataError(
            f"{path}: expected a line for each of the {len(folders)} class folders in {chosen}, in "
            f"the order of their names, got {len(names)} lines"
        )
    test = ImageFolder(chosen, folders, names)
    rest = ImageFolder(train, folders, names) if with_train else None
    return Layout(test, rest, words, captions=0)


def _class_folders(root: Path) -> list[str]:
    """Names of the class folders, sorted: ids follow their order."""
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no class folders; expected {root}/CLASS/picture.png")
    return found


class ImageFolder:
    """``root/CLASS/.../picture``, torchvision's layout; the class serves as the caption.

    ``folders`` are the class folders by id, ``names`` the names of the classes; (): no classes,
    and the path serves as the caption.
    """

    def __init__(self, root: Path, folders: Sequence[str], names: Sequence[str]) -> None:
        self.name = str(root)
        self.others: Counter[str] = Counter()  # regular files that are not pictures, by ending
        self.odd: Counter[str] = Counter()  # what else was left out, by reason
        kinds = Image.registered_extensions()
        self._found: list[tuple[str, int]] = []  # path and class
        for label, folder in enumerate(folders):
            for path in _regular_files(os.path.join(root, folder), self.odd):
                ending = Path(path).suffix.lower()
                # Pillow also lists documents, videos and tables, which it cannot open by itself.
                if Image.MIME.get(kinds.get(ending, ""), "").startswith("image/"):
                    self._found.append((path, label))
                elif not Path(path).name.startswith("."):
                    self.others[ending or "without an ending"] += 1
        if not self._found:
            where = "as CLASS/picture.png" if names else "in it, or in folders in it"
            got = f"among {plural(self.others.total(), 'file')}"
            raise DataError(f"{root}: expected pictures {where}, found none {got}")
        self.keys: Sequence[str] = [os.path.relpath(path, root) for path, _ in self._found]
        labels = Labels(torch.tensor([label for _, label in self._found]), tuple(names))
        self.labels: Mapping[str, Labels] = {LABEL: labels} if names else {}

    def __len__(self) -> int:
        return len(self._found)

    def captions(self, i: int) -> tuple[str, ...]:
        known = self.labels.get(LABEL)
        return (known.names[self._found[i][1]] if known else printable(self.keys[i]),)

    def path(self, i: int) -> str:
        """The path of picture ``i``."""
        return self._found[i][0]

    def image(self, i: int) -> Image.Image:
        try:
            return decode(Path(self.path(i)).read_bytes(), self.path(i))
        except OSError as error:
            raise DataError(f"{self.path(i)}: {error.strerror}; fix the file") from error


def _regular_files(root: str, odd: Counter[str]) -> list[str]:
    """Paths of the regular files in a folder and in all folders below it, by folder, then name.

    Links are followed, but a file or folder that has several paths is listed once, by a path
    without links if it has one. ``odd`` counts what is left out, by reason.
    """
    if not os.path.isdir(root):  # a class of another split
        return []
    files: list[tuple[str, str]] = []  # folder and name
    waiting = [(root, os.path.realpath(root))]  # folders to read, each with its real path
    seen = {waiting[0][1]}  # real paths
    links: list[os.DirEntry[str]] = []

    def take(entry: os.DirEntry[str], real: str) -> None:
        is_folder = entry.is_dir()
        if not is_folder and not entry.is_file():  # opening a pipe would wait for ever
            odd["broken link" if entry.is_symlink() else "special file"] += 1
        elif real in seen:
            odd["repeated path"] += 1
        else:
            seen.add(real)
            if is_folder:
                waiting.append((entry.path, real))
            else:
                files.append((os.path.dirname(entry.path), entry.name))

    while waiting or links:
        if not waiting:  # links come last, so that they give way to what they point to
            later, links = sorted(links, key=lambda entry: entry.path), []
            for entry in later:
                try:
                    take(entry, os.path.realpath(entry.path))
                except OSError:  # it leads to itself, or through a folder that is closed to us
                    odd["broken link"] += 1
            continue
        folder, real = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            odd["unreadable folder"] += 1
            continue
        for entry in entries:
            if entry.is_symlink():
                links.append(entry)
            else:
                take(entry, os.path.join(real, entry.name))
    return [os.path.join(*place) for place in sorted(files)]


def read_templates(given: str) -> tuple[str, ...]:
    """Prompts with "{}" for the class: "openai" (OpenCLIP's 80 for ImageNet), "simple" (its 7), or
    those of a file, one per line, with "{}" or CLIP_benchmark's "{c}"."""
    if given in ("openai", "simple"):
        many, few = open_clip.OPENAI_IMAGENET_TEMPLATES, open_clip.SIMPLE_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in (few if given == "simple" else many))
    if not os.path.isfile(given):
        raise DataError(f"--templates: expected openai, simple or a file, found no file {given!r}")
    lines = lines_of(Path(given).read_text(encoding="utf-8"))
    words = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    bad = [word for word in words if word.count("{}") != 1]
    if bad or not words:
        raise DataError(f"{given}: expected one template a line with {{c}}, got {bad[:1]}")
    return tuple(words)


def class_prompts(
    label: str, names: Sequence[str], templates: Sequence[str] = EMOJI_TEMPLATES
) -> list[list[str]]:
    """Readable prompts per class: group "smileys-emotion" -> "an emoji of smileys and emotion".

    Groups name two things ("food-drink"); other labels go from wide to narrow ("animal-bird").
    """
    joint = " and " if label == "group" else " "
    if label != LABEL:  # identifiers, not readable names
        names = [ABBREVIATIONS.get(name, name.replace("-", joint)) for name in names]
    return [[template.format(name) for template in templates] for name in names]
