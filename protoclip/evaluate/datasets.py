"""What can be evaluated: built-in pairs, folders of class folders, tables and shards."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from protoclip.data import (
    DataError,
    Labels,
    PairDataset,
    index_together,
    is_sharded,
    open_dataset,
)
from protoclip.data.images import decode
from protoclip.data.tables import read_table

SPLITS = ("test", "val", "validation")  # the first that is there is evaluated
LABEL = "class"
EMOJI_TEMPLATES = ("{}", "an emoji of {}", "a picture of {}", "{} symbol")
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")
ABBREVIATIONS = {"alphanum": "letters and numbers", "av-symbol": "audio and video symbol"}


@dataclass(frozen=True)
class Layout:
    """Opened data: what is judged, what probes learn from, and the words for its classes."""

    test: PairDataset
    train: PairDataset | None = None
    captioned: bool = True  # False: pictures with classes only, no retrieval
    templates: Sequence[str] = TEMPLATES  # with "{}" for the class
    key: str = "ALL"  # the set's name in the results
    title: str = ""


def open_layout(
    data: str,
    *,
    split: str = "auto",
    train_split: str = "train",
    classnames: str = "",
    templates: str = "auto",
    csv_label_key: str = "",
    **open_kwargs: Any,
) -> Layout:
    """Open data of any kind, on all ranks; see ``python -m protoclip.evaluate --help``.

    Args:
        data: built-in data; a folder of class folders, or of split folders with class folders in
            them; a table; shards with captions.
        split: the part to judge; "auto": the held-out one of built-in data, else the folder test,
            val or validation, else all.
        train_split: folder that probes learn from, used where it is there.
        classnames: file with one class name a line, in the order of the sorted class folders, or
            "imagenet"; "": classnames.txt in the folder, else the folder names.
        templates: see ``read_templates``.
        csv_label_key: column of the class in a table.
        open_kwargs: of ``protoclip.data.open_dataset``.
    Raises:
        DataError: what is missing or does not fit together, and what to do.
    """
    if data.startswith("builtin:"):
        return _builtin(data, "heldout" if split == "auto" else split, open_kwargs)
    root = Path(data)
    words = read_templates(templates)
    names = _class_names(classnames, root)
    if data.lower().endswith((".csv", ".tsv")) and csv_label_key:
        return _labelled_table(data, names, words, csv_label_key, open_kwargs)
    if not root.is_dir() or any(root.glob("*.tar")):
        if is_sharded(data):
            index_together(data)
        return Layout(open_dataset(data, **open_kwargs), templates=words)
    return _image_folder(root, _split_folder(root, split), root / train_split, names, words)


def _builtin(data: str, split: str, open_kwargs: Mapping[str, Any]) -> Layout:
    test = open_dataset(data, split, **open_kwargs)
    words = EMOJI_TEMPLATES if data == "builtin:emoji" else TEMPLATES
    if split != "heldout":
        return Layout(test, templates=words)
    train = open_dataset(data, "train", **open_kwargs)
    return Layout(test, train, templates=words, key="HO", title="Held-out pairs")


def _split_folder(root: Path, split: str) -> Path:
    if split == "auto":
        return next((root / name for name in SPLITS if (root / name).is_dir()), root)
    if not (root / split).is_dir():
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or "none"
        raise DataError(f"--split {split}: no folder {root / split}; folders there: {have}")
    return root / split


def _image_folder(
    root: Path, chosen: Path, train: Path, names: Sequence[str] | None, words: Sequence[str]
) -> Layout:
    with_train = chosen not in (root, train) and train.is_dir()
    if chosen == root and train.is_dir() and any(path.is_dir() for path in train.iterdir()):
        raise DataError(
            f"{root}: {train.name} has class folders, but there is no {' or '.join(SPLITS)} beside "
            f"it; name the folder to judge with --split (--split {train.name}: that one)"
        )
    folders = sorted({*_class_folders(chosen), *(_class_folders(train) if with_train else ())})
    # ImageNet's WordNet ids sort in the order of OpenCLIP's names.
    if names is None and len(folders) == 1000 and all(re.fullmatch(r"n\d{8}", f) for f in folders):
        names = _class_names("imagenet", root)
    names = folders if names is None else names
    if len(names) != len(folders):
        raise DataError(
            f"{chosen}: {len(names)} class names for {len(folders)} class folders; give one name "
            "per folder, in the order of the sorted folder names"
        )
    test = ImageFolder(chosen, folders, names)
    rest = ImageFolder(train, folders, names) if with_train else None
    return Layout(test, rest, captioned=False, templates=words)


class ImageFolder:
    """``root/CLASS/.../picture``, torchvision's layout.

    Args:
        root: the folder of class folders.
        folders: class folders by id, where another split may have more.
        names: what each class is called, by id.
    Raises:
        DataError: no picture in any class folder.
    """

    def __init__(self, root: Path, folders: Sequence[str], names: Sequence[str]) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        self.name = str(root)
        ids = {folder: i for i, folder in enumerate(folders)}
        found = make_dataset(self.name, ids, IMG_EXTENSIONS, allow_empty=True)
        if not found:
            raise DataError(
                f"{root}: no pictures in its {len(folders)} class folders; expected "
                f"{root}/CLASS/picture.png (or another of {', '.join(IMG_EXTENSIONS)})"
            )
        self.files = [path for path, _ in found]
        self.keys: Sequence[str] = [os.path.relpath(path, root) for path in self.files]
        labels = Labels(torch.tensor([label for _, label in found]), tuple(names))
        self.labels: Mapping[str, Labels] = {LABEL: labels}

    def __len__(self) -> int:
        return len(self.files)

    def captions(self, i: int) -> tuple[str, ...]:
        """The class; such pictures have no captions of their own."""
        known = self.labels[LABEL]
        return (known.names[int(known.ids[i])],)

    def path(self, i: int) -> str:
        """Where picture ``i`` is."""
        return self.files[i]

    def image(self, i: int) -> Image.Image:
        path = self.files[i]
        try:
            return decode(Path(path).read_bytes(), path)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; fix the file") from error


def _class_folders(root: Path) -> list[str]:
    """Names of the class folders, sorted: ids follow their order."""
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no class folders; expected {root}/CLASS/picture.png")
    return found


def _labelled_table(
    data: str,
    names: Sequence[str] | None,
    words: Sequence[str],
    label_key: str,
    open_kwargs: Mapping[str, Any],
) -> Layout:
    dataset: Any = open_dataset(data, **open_kwargs)
    values = []
    form = open_kwargs.get("csv_separator", "\t"), open_kwargs.get("csv_encoding", "utf-8")
    for number, row, fault in read_table(data, (label_key,), *form):
        if fault:
            raise DataError(f"{data}, line {number}: {fault}")
        values.append(row[0].strip())
    known = tuple(sorted(set(values))) if names is None else tuple(names)
    strange = sorted(set(values) - set(known))
    if strange:
        raise DataError(
            f"{data}: column {label_key!r} holds {strange[0]!r}, which is none of the "
            f"{len(known)} class names; fix one of the two"
        )
    position = {name: i for i, name in enumerate(known)}
    dataset.labels = {LABEL: Labels(torch.tensor([position[value] for value in values]), known)}
    return Layout(dataset, templates=words)


def _class_names(given: str, root: Path) -> list[str] | None:
    """Class names by id; None where they are not given."""
    if given == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    path = Path(given) if given else root / "classnames.txt"
    if not path.is_file():
        if given:
            raise DataError(f"--classnames: no file {given}; expected one class name a line")
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    if not names or not all(names):
        raise DataError(f"{path}: expected one class name a line, found an empty one or none")
    return names


def read_templates(given: str) -> tuple[str, ...]:
    """Prompt templates, each with "{}" for the class.

    Args:
        given: "openai" or "auto" (OpenCLIP's 80 for ImageNet), "simple" (its 7), or a file with
            one template a line ("{}" or CLIP_benchmark's "{c}").
    """
    if given in ("auto", "openai", "simple"):
        import open_clip

        many, few = open_clip.OPENAI_IMAGENET_TEMPLATES, open_clip.SIMPLE_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in (few if given == "simple" else many))
    if not os.path.isfile(given):
        raise DataError(f"--templates: expected openai, simple or a file, found no file {given!r}")
    lines = Path(given).read_text(encoding="utf-8").splitlines()
    words = [line.strip().replace("{c}", "{}") for line in lines if line.strip()]
    bad = next((word for word in words if word.count("{}") != 1), None)
    if bad is not None or not words:
        raise DataError(
            f"{given}: expected one template a line with {{c}} for the class, got {bad or 'none'!r}"
        )
    return tuple(words)


def class_prompts(
    label: str, names: Sequence[str], templates: Sequence[str] = EMOJI_TEMPLATES
) -> list[list[str]]:
    """Readable prompts per class: group "smileys-emotion" -> "an emoji of smileys and emotion".

    Groups name two things ("food-drink"); other labels go from wide to narrow ("animal-bird").
    """
    joint = " and " if label == "group" else " "
    words = [ABBREVIATIONS.get(name, name.replace("-", joint)) for name in names]
    if label == LABEL:  # names that somebody chose, not identifiers
        words = list(names)
    return [[template.format(word) for template in templates] for word in words]
