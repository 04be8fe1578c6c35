"""Folders of pictures: class folders as pairs, in torchvision's ImageFolder layout, or pictures
alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from protoclip.common.files import DataError, UnavailableError, lines_of, plural, printable
from protoclip.common.strings import StringTable
from protoclip.data.images import NEEDS_HEIF, decode, no_picture
from protoclip.data.types import Labels, PairDataset

LABEL = "class"
CLASS_TEMPLATE = "--class-template"
NAMED = 10  # empty class folders that are listed


def open_class_folders(root: Path, template: str) -> ImageFolder:
    """The pairs in the class folders of ``root/train`` if it has some, or else of ``root``."""
    train = root / "train"
    has_train = train.is_dir() and any(path.is_dir() for path in train.iterdir())
    part = train if has_train else root
    (pairs,) = open_parts(root, [part], read_templates(template, CLASS_TEMPLATE))
    return pairs


def open_parts(
    root: Path, parts: Sequence[Path], templates: Sequence[str] = ("{}",)
) -> list[ImageFolder]:
    """The pairs of each part of ``root``, such as root/train, with the same classes in all of them.

    A class folder that has no pictures in any part is no class, unless its class was named.
    """
    folders = sorted({name for part in parts for name in class_folders(part)})
    given_names = class_names(root, folders)
    names = given_names or [printable(name) for name in folders]
    datasets = [ImageFolder(part, folders, names, templates) for part in parts]
    if not given_names:
        filled = torch.cat([dataset.labels[LABEL].ids for dataset in datasets]).unique()
        for dataset in datasets:
            dataset.keep_classes(filled)
        ids = set(filled.tolist())
        empty = [name for number, name in enumerate(names) if number not in ids]
        if empty:
            where = printable(str(parts[0] if len(parts) == 1 else root))
            count = plural(len(empty), "class folder")
            shown = ", ".join(empty[:NAMED]) + (", ..." if len(empty) > NAMED else "")
            datasets[0].leave_out(f"{where}: left out {count} without pictures: {shown}")
    return datasets


def class_folders(root: Path) -> list[str]:
    """Names of the class folders, sorted: ids follow their order."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names and any(root.glob("*.npy")):
        raise DataError(
            f"{root}: no class folders, but .npy files; give stored features of pairs as "
            "--image-features FILE and --text-features FILE"
        )
    if not names:
        raise DataError(
            f"{root}: no class folders; expected {root}/CLASS/picture.png, or .tar or .parquet "
            "files (pictures without captions can be grouped with protoclip cluster)"
        )
    return names


def class_names(root: Path, folders: Sequence[str]) -> Sequence[str]:
    """The names that classes were given: the lines of ``root/classnames.txt``, or OpenCLIP's names
    for ImageNet's thousand folders; () if they have only their folders' names."""
    names: Sequence[str] = ()
    path = root / "classnames.txt"
    if path.is_file():
        names = [name.strip() for name in lines_of(path.read_text(encoding="utf-8-sig").rstrip())]
    elif len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        import open_clip

        # ImageNet's WordNet ids sort in the order of OpenCLIP's names.
        names = open_clip.IMAGENET_CLASSNAMES
    else:
        return ()
    if len(names) != len(folders) or not all(names):
        raise DataError(
            f"{path}: expected a line for each of the {len(folders)} class folders, in the order "
            f"of their names, got {len(names)} lines"
        )
    return names


class ImageFolder(PairDataset):
    """``root/CLASS/.../picture``; captions are the class in each of the templates.

    ``folders`` are the class folders by id, ``names`` the names of the classes. Without them, all
    pictures in ``root`` and below, and the path serves as the caption.

    ``facts.left_out`` says what is not among the pairs and why.
    """

    def __init__(
        self,
        root: Path,
        folders: Sequence[str] = (),
        names: Sequence[str] = (),
        templates: Sequence[str] = ("{}",),
    ) -> None:
        self.name = str(root)
        self.root = str(root)
        self.templates = templates
        # Regular files of which Pillow opens no picture, by ending or reason.
        self.others: Counter[str] = Counter()
        self.odd: Counter[str] = Counter()  # everything else that was left out, by reason
        keys: list[str] = []
        for path in _regular_files(self.root, folders, self.odd):
            if reason := no_picture(path):
                self.others[reason] += 1
            else:
                keys.append(os.path.relpath(path, root))
        if not keys:
            where = "as CLASS/picture.png" if names else "in it, or in folders in it"
            got = f"among {plural(self.others.total(), 'file')}"
            if heic := self.others[NEEDS_HEIF]:
                got += f", {heic:,} of them {NEEDS_HEIF}"
            raise DataError(f"{root}: expected pictures {where}, found none {got}")
        if folders:
            numbers = {folder: number for number, folder in enumerate(folders)}
            ids = torch.tensor([numbers[key.partition(os.sep)[0]] for key in keys])
            ids, order = ids.sort(stable=True)
            keys = [keys[i] for i in order.tolist()]
            self.labels: Mapping[str, Labels] = {LABEL: Labels(ids, tuple(names))}
        self.keys: Sequence[str] = StringTable(keys)
        shown = printable(self.name)
        if others := ", ".join(f"{n:,} {reason}" for reason, n in self.others.most_common()):
            self.leave_out(f"{shown}: left out files that Pillow cannot open: {others}")
        if odd := ", ".join(plural(n, reason) for reason, n in self.odd.most_common()):
            self.leave_out(f"{shown}: left out {odd}: regular files are read, each once")

    def __len__(self) -> int:
        return len(self.keys)

    def leave_out(self, line: str) -> None:
        self.facts = replace(self.facts, left_out=[*self.facts.left_out, line])

    def keep_classes(self, ids: Tensor) -> None:
        """Drop the classes, all without pictures, that are not among these sorted ids."""
        classes = self.labels[LABEL]
        names = tuple(classes.names[i] for i in ids.tolist())
        self.labels = {LABEL: Labels(torch.searchsorted(ids, classes.ids), names)}

    def captions(self, i: int) -> tuple[str, ...]:
        if not self.labels:
            return (printable(self.keys[i]),)
        classes = self.labels[LABEL]
        name = classes.names[int(classes.ids[i])]
        return tuple(template.replace("{}", name) for template in self.templates)

    def path(self, i: int) -> str:
        """The path of picture ``i``."""
        return os.path.join(self.root, self.keys[i])

    def image(self, i: int) -> Image.Image:
        shown = printable(self.path(i))
        try:
            return decode(Path(self.path(i)).read_bytes(), shown)
        except OSError as error:
            raise UnavailableError(f"{shown}: {error.strerror}; fix the file") from error
        except UnicodeEncodeError as error:
            raise DataError(
                f"{shown}: a name that this locale ({error.encoding}) does not have; set "
                "PYTHONUTF8=1, or a locale with UTF-8"
            ) from error


def _regular_files(root: str, folders: Sequence[str], odd: Counter[str]) -> list[str]:
    """Paths of the regular files in a folder and in all folders below it, by folder, then name;
    with ``folders`` only of those in these folders of ``root`` and below.

    Links are followed, but a file or folder that has several paths is listed once, by a path
    without links if it has one. ``odd`` counts what is left out, by reason.
    """
    files: list[tuple[str, str]] = []  # folder and name
    waiting = [(root, os.path.realpath(root))]  # folders to read, each with its real path
    seen = {waiting[0][1]}  # real paths
    links: list[os.DirEntry[str]] = []
    chosen = set(folders)

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
        if folders and folder == root:
            entries = [x for x in entries if x.name in chosen and os.path.isdir(x.path)]
        for entry in entries:
            if entry.is_symlink():
                links.append(entry)
            else:
                take(entry, os.path.join(real, entry.name))
    return [os.path.join(folder, name) for folder, name in sorted(files)]


def read_templates(source: str, flag: str = "--templates") -> tuple[str, ...]:
    """Texts with "{}" for the class: "openai" (OpenCLIP's 80 for ImageNet), "simple" (its 7), those
    of a file, one per line, or one that is given itself; "{c}" as in CLIP_benchmark will do."""
    if source in ("openai", "simple"):
        import open_clip

        named_templates = {
            "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
            "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        }
        return tuple(template("{}") for template in named_templates[source])
    is_template = "{}" in source or "{c}" in source
    if not is_template and not os.path.isfile(source):
        raise DataError(
            f"{flag}: expected openai, simple or a file, or a text with {{}} for the class, found "
            f"no file {source!r}"
        )
    lines = [source] if is_template else lines_of(Path(source).read_text(encoding="utf-8-sig"))
    templates = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    faulty = [template for template in templates if template.count("{}") != 1]
    if faulty or not templates:
        raise DataError(f"{source}: expected one template a line with {{c}}, got {faulty[:1]}")
    return tuple(templates)
