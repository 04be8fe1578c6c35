"""Folders of pictures: class folders as pairs, in torchvision's ImageFolder layout, or pictures
alone."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from protoclip.common.files import DataError, lines_of, plural, printable
from protoclip.data.images import NEEDS_HEIF, decode, no_picture
from protoclip.data.types import Labels, StringTable

LABEL = "class"
CLASS_TEMPLATE = "--class-template"


def open_class_folders(root: Path, template: str) -> ImageFolder:
    """The pairs in the class folders of ``root/train`` if it has some, or else of ``root``."""
    train = root / "train"
    has_train = train.is_dir() and any(path.is_dir() for path in train.iterdir())
    chosen = train if has_train else root
    folders = class_folders(chosen)
    return ImageFolder(
        chosen, folders, class_names(root, folders), read_templates(template, CLASS_TEMPLATE)
    )


def class_folders(root: Path) -> list[str]:
    """Names of the class folders, sorted: ids follow their order."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(
            f"{root}: no class folders; expected {root}/CLASS/picture.png, or .tar or .parquet "
            "files (pictures without captions can be grouped with protoclip cluster)"
        )
    return names


def class_names(root: Path, folders: Sequence[str]) -> Sequence[str]:
    """The names of classes: the lines of ``root/classnames.txt``, OpenCLIP's names for ImageNet's
    thousand folders, or else the folders'."""
    names: Sequence[str] = [printable(name) for name in folders]
    path = root / "classnames.txt"
    if path.is_file():
        names = [name.strip() for name in lines_of(path.read_text(encoding="utf-8").rstrip())]
    elif len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in folders):
        import open_clip

        # ImageNet's WordNet ids sort in the order of OpenCLIP's names.
        names = open_clip.IMAGENET_CLASSNAMES
    if len(names) != len(folders) or not all(names):
        raise DataError(
            f"{path}: expected a line for each of the {len(folders)} class folders, in the order "
            f"of their names, got {len(names)} lines"
        )
    return names


class ImageFolder:
    """``root/CLASS/.../picture``; captions are the class in each of the templates.

    ``folders`` are the class folders by id, ``names`` the names of the classes; (): no classes,
    and the path serves as the caption.
    """

    def __init__(
        self,
        root: Path,
        folders: Sequence[str],
        names: Sequence[str],
        templates: Sequence[str] = ("{}",),
    ) -> None:
        self.name = str(root)
        self.root = str(root)
        self.templates = templates
        # Regular files of which Pillow opens no picture, by ending or reason.
        self.others: Counter[str] = Counter()
        self.odd: Counter[str] = Counter()  # everything else that was left out, by reason
        keys: list[str] = []
        classes: list[int] = []
        for label, folder in enumerate(folders):
            for path in _regular_files(os.path.join(root, folder), self.odd):
                is_hidden = Path(path).name.startswith(".")
                if is_hidden and not Path(path).suffix:
                    continue
                reason = no_picture(path)
                if not reason:
                    keys.append(os.path.relpath(path, root))
                    classes.append(label)
                elif not is_hidden:
                    self.others[reason] += 1
        if not keys:
            where = "as CLASS/picture.png" if names else "in it, or in folders in it"
            got = f"among {plural(self.others.total(), 'file')}"
            if heic := self.others[NEEDS_HEIF]:
                got += f", {heic:,} of them {NEEDS_HEIF}"
            raise DataError(f"{root}: expected pictures {where}, found none {got}")
        self.keys: Sequence[str] = StringTable(keys)
        self._classes = Labels(torch.tensor(classes), tuple(names))
        self.labels: Mapping[str, Labels] = {LABEL: self._classes} if names else {}

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        if not self._classes.names:
            return (printable(self.keys[i]),)
        name = self._classes.names[int(self._classes.ids[i])]
        return tuple(template.replace("{}", name) for template in self.templates)

    def path(self, i: int) -> str:
        """The path of picture ``i``."""
        return os.path.join(self.root, self.keys[i])

    def image(self, i: int) -> Image.Image:
        try:
            return decode(Path(self.path(i)).read_bytes(), printable(self.path(i)))
        except OSError as error:
            shown = printable(self.path(i))
            raise DataError(f"{shown}: {error.strerror}; fix the file") from error


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
    lines = [source] if is_template else lines_of(Path(source).read_text(encoding="utf-8"))
    templates = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    faulty = [template for template in templates if template.count("{}") != 1]
    if faulty or not templates:
        raise DataError(f"{source}: expected one template a line with {{c}}, got {faulty[:1]}")
    return tuple(templates)
