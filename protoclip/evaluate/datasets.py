"""Data for evaluation: built-in pairs, folders of class folders, tables and shards."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from protoclip import data as sources
from protoclip.common.files import lines_of, plural, printable
from protoclip.data import DataError, Labels, PairDataset, Subset, open_dataset
from protoclip.data.icons import builtin_icons, heldout_concepts, in_heldout_family
from protoclip.data.images import decode
from protoclip.data.tables import read_table

SPLITS = ("test", "val", "validation")  # the first one present is evaluated
LABEL = "class"
NAMES = ("{}",)  # the prompts of built-in icons: their captions are names
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")


@dataclass(frozen=True)
class Layout:
    """Opened data: the test set, the training set of probes, and the prompts of its classes."""

    test: PairDataset
    train: PairDataset | None = None
    templates: Sequence[str] = TEMPLATES  # with "{}" for the class
    captions: int | None = None  # most captions per picture; None: all
    key: str = "ALL"  # the set's name in the results
    title: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)  # by key; {}: ``test`` is one set


@dataclass(frozen=True)
class Part:
    """One of several evaluation sets."""

    test: PairDataset
    title: str
    captions: int = 1  # of each picture; 0: no retrieval
    skip: frozenset[tuple[str, str]] = frozenset()  # (label, task) without meaning in this set


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
        test = open_dataset(data, "heldout", **open_kwargs)
        train = open_dataset(data, "train", **open_kwargs)
        if data == "builtin:icons":
            return Layout(test, train, NAMES, captions=1, parts=_icon_parts())
        return Layout(test, train, TEMPLATES, captions=1, key="HO", title="Held-out pairs")
    words: Sequence[str] = read_templates(templates)
    root = Path(data)
    if root.is_dir() and not any(root.glob("*.tar")):
        return _image_folder(root, split, words)
    if sources.is_sharded(data):
        sources.index_together(data)
    dataset: Any = open_dataset(data, **open_kwargs)
    if csv_label_key and data.lower().endswith((".csv", ".tsv")):
        rows = read_table(
            data,
            (csv_label_key,),
            separator=open_kwargs.get("csv_separator", "\t"),
            encoding=open_kwargs.get("csv_encoding", "utf-8"),
        )
        values = []
        for line, row, fault in rows:
            if fault:
                raise DataError(f"{data}, line {line}: {fault}")
            values.append(row[0].strip())
        names, ids = np.unique(values, return_inverse=True)
        dataset.labels = {LABEL: Labels(torch.from_numpy(ids), tuple(names.tolist()))}
    return Layout(dataset, templates=words)


def held_out_layout(pairs: PairDataset) -> Layout:
    """The pairs that a run held out of its own data, as an evaluation set."""
    return Layout(pairs, key="HO", title="Held-out pairs")


def _icon_parts() -> dict[str, Part]:
    """The sets on which icons are judged; together they are a part of the held-out icons.

    NEW has the drawings of the family that is never trained on, of concepts that other families
    train. HO has the held-out concepts that several families draw. Linear probes are left out:
    thousands of concepts have a handful of drawings each.
    """
    icons = builtin_icons()
    concepts = icons.labels["concept"].ids
    new_family = in_heldout_family(icons)
    new_concept = heldout_concepts(icons)
    trained = np.isin(concepts.numpy(), concepts[torch.from_numpy(~new_family & ~new_concept)])
    pairs = torch.stack([concepts, icons.families.ids], dim=1).unique(dim=0)
    drawn_by = torch.bincount(pairs[:, 0], minlength=len(icons.labels["concept"].names))
    several = (drawn_by[concepts] > 1).numpy()
    probes = {("concept", "linear_probe"), ("category", "linear_probe")}
    return {
        "NEW": Part(
            Subset(icons, np.flatnonzero(new_family & ~new_concept & trained)),
            "Known concepts, drawn by an unseen family",
            skip=frozenset({*probes, ("concept", "grouping")}),  # one drawing of each
        ),
        "HO": Part(
            Subset(icons, np.flatnonzero(new_concept & several)),
            "New concepts, drawn by several families",
            captions=0,  # drawings share them, so that no caption has one right picture
            skip=frozenset({*probes, ("concept", "knn")}),  # none of them was trained on
        ),
    }


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
    names = [printable(name) for name in folders]
    path = root / "classnames.txt"
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
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{root}: no class folders; expected {root}/CLASS/picture.png")
    return names


class ImageFolder:
    """``root/CLASS/.../picture``, torchvision's layout; the class serves as the caption.

    ``folders`` are the class folders by id, ``names`` the names of the classes; (): no classes,
    and the path serves as the caption.
    """

    def __init__(self, root: Path, folders: Sequence[str], names: Sequence[str]) -> None:
        self.name = str(root)
        self.others: Counter[str] = Counter()  # regular files that are not pictures, by ending
        self.odd: Counter[str] = Counter()  # everything else that was left out, by reason
        formats = Image.registered_extensions()
        self._paths: list[str] = []
        classes: list[int] = []
        for label, folder in enumerate(folders):
            for path in _regular_files(os.path.join(root, folder), self.odd):
                ending = Path(path).suffix.lower()
                # Pillow also lists documents, videos and tables, which it cannot open by itself.
                if Image.MIME.get(formats.get(ending, ""), "").startswith("image/"):
                    self._paths.append(path)
                    classes.append(label)
                elif not Path(path).name.startswith("."):
                    self.others[ending or "without an ending"] += 1
        if not self._paths:
            where = "as CLASS/picture.png" if names else "in it, or in folders in it"
            got = f"among {plural(self.others.total(), 'file')}"
            raise DataError(f"{root}: expected pictures {where}, found none {got}")
        self.keys: Sequence[str] = [os.path.relpath(path, root) for path in self._paths]
        self._classes = Labels(torch.tensor(classes), tuple(names))
        self.labels: Mapping[str, Labels] = {LABEL: self._classes} if names else {}

    def __len__(self) -> int:
        return len(self._paths)

    def captions(self, i: int) -> tuple[str, ...]:
        if self._classes.names:
            return (self._classes.names[int(self._classes.ids[i])],)
        return (printable(self.keys[i]),)

    def path(self, i: int) -> str:
        """The path of picture ``i``."""
        return self._paths[i]

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
        if not is_folder and not entry.is_file():  # opening a pipe would wait forever
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
            pending = sorted(links, key=lambda entry: entry.path)
            links = []
            for entry in pending:
                try:
                    take(entry, os.path.realpath(entry.path))
                except OSError:  # it leads to itself, or through a folder that we cannot read
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
    return [os.path.join(folder, name) for folder, name in sorted(files)]


def read_templates(source: str) -> tuple[str, ...]:
    """Prompts with "{}" for the class: "openai" (OpenCLIP's 80 for ImageNet), "simple" (its 7), or
    those of a file, one per line, with "{}" or CLIP_benchmark's "{c}"."""
    if source == "openai":
        return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    if source == "simple":
        return tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)
    if not os.path.isfile(source):
        raise DataError(f"--templates: expected openai, simple or a file, found no file {source!r}")
    lines = lines_of(Path(source).read_text(encoding="utf-8"))
    templates = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    faulty = [template for template in templates if template.count("{}") != 1]
    if faulty or not templates:
        raise DataError(f"{source}: expected one template a line with {{c}}, got {faulty[:1]}")
    return tuple(templates)


def class_prompts(
    label: str, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> list[list[str]]:
    """The prompts of each class; of labels other than "class", "red-star" becomes "red star"."""
    if label != LABEL:  # identifiers, not readable names
        names = [name.replace("-", " ") for name in names]
    return [[template.format(name) for template in templates] for name in names]
