"""What can be evaluated: built-in pairs, an ImageFolder, a table, or CLIP_benchmark's shards."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protoclip.data import DataError, Labels, PairDataset, open_dataset
from protoclip.evaluate.folders import LABEL, ClassShards, ImageFolder, class_folders

SPLITS = ("test", "val", "validation")  # the first that is there is evaluated
TYPE_FILE = "dataset_type.txt"
TYPES = ("classification", "retrieval", "multilabel")


@dataclass(frozen=True)
class Layout:
    """Opened data: what is judged, what probes learn from, and the words for its classes."""

    name: str
    test: PairDataset
    train: PairDataset | None = None
    captioned: bool = True  # False: pictures with classes only, no retrieval
    templates: tuple[str, ...] = ()  # with "{}" for the class; (): the caller's
    targets: Tensor | None = None  # bool [N, C], several classes per picture
    class_names: tuple[str, ...] = ()  # of ``targets``
    problems: Mapping[str, str] = field(default_factory=dict)  # task -> why it cannot be done


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
    """Open data of any layout that is not built in; see ``protoclip.evaluate --help``.

    Args:
        data: a folder of class folders, or of split folders with class folders in them; a
            CLIP_benchmark folder (``SPLIT/0.tar``, classnames.txt, ...); a table; other shards.
        split: folder to judge; "auto": test, val or validation, else the folder itself.
        train_split: folder that probes learn from, used where it is there.
        classnames: file with one class name a line, in the order of the ids, or "imagenet";
            "": classnames.txt in the folder, else the folder names.
        templates: see ``read_templates``.
        csv_label_key: column of the class in a table.
        open_kwargs: of ``protoclip.data.open_dataset``.
    Raises:
        DataError: what is missing or does not fit together, and what to do.
    """
    root = Path(data)
    words = read_templates(templates, root)
    names = _class_names(classnames, root)
    if data.lower().endswith((".csv", ".tsv")):
        return _table(data, names, words, csv_label_key, open_kwargs)
    if not root.is_dir():
        return Layout(data, open_dataset(data, **open_kwargs), templates=words)
    chosen = _split_folder(root, split)
    told = any((root / name).is_file() for name in ("nshards.txt", "classnames.txt", TYPE_FILE))
    if _has_shards(chosen) and (chosen != root or told):
        return _clip_benchmark(root, chosen, root / train_split, names, words)
    if any(root.glob("*.tar")):
        return Layout(data, open_dataset(data, **open_kwargs), templates=words)
    return _image_folder(root, chosen, root / train_split, names, words)


def _split_folder(root: Path, split: str) -> Path:
    if split in ("auto", ""):
        return next((root / name for name in SPLITS if (root / name).is_dir()), root)
    if split == "all":
        return root
    if not (root / split).is_dir():
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or "none"
        raise DataError(f"--split {split}: no folder {root / split}; folders there: {have}")
    return root / split


def _has_shards(folder: Path) -> bool:
    return (folder / "nshards.txt").is_file() or (folder / "0.tar").is_file()


def _image_folder(
    root: Path, chosen: Path, train: Path, names: Sequence[str] | None, words: tuple[str, ...]
) -> Layout:
    with_train = chosen not in (root, train) and train.is_dir()
    if chosen == root and train.is_dir() and any(path.is_dir() for path in train.iterdir()):
        raise DataError(
            f"{root}: {train.name} has class folders, but there is no {' or '.join(SPLITS)} beside "
            f"it; name the folder to judge with --split (--split {train.name}: that one)"
        )
    folders = sorted({*class_folders(chosen), *(class_folders(train) if with_train else ())})
    names = imagenet_names(folders) if names is None else names
    test = ImageFolder(chosen, folders, names)
    rest = ImageFolder(train, folders, names) if with_train else None
    return Layout(str(root), test, rest, captioned=False, templates=words)


def _clip_benchmark(
    root: Path, chosen: Path, train: Path, names: Sequence[str] | None, words: tuple[str, ...]
) -> Layout:
    kind = "classification"
    if (root / TYPE_FILE).is_file():
        kind = (root / TYPE_FILE).read_text(encoding="utf-8").strip().lower()
    if kind not in TYPES:
        raise DataError(f"{root / TYPE_FILE}: expected {' or '.join(TYPES)}, got {kind!r}")
    shards = _shards(chosen)
    if kind == "retrieval":
        return Layout(str(root), open_dataset("::".join(shards)))
    several = kind == "multilabel"
    test = ClassShards(str(chosen), shards, names, several)
    rest = None
    if _has_shards(train) and train != chosen and not several:
        rest = ClassShards(str(train), _shards(train), names)
    problems = {}
    if names is None:
        problems["zeroshot"] = f"no class names: {root / 'classnames.txt'} is missing"
    return Layout(str(root), test, rest, False, words, test.targets, tuple(names or ()), problems)


def _shards(folder: Path) -> list[str]:
    """The tars of a split; nshards.txt, where it is there, says how many."""
    counted = folder / "nshards.txt"
    if counted.is_file():
        text = counted.read_text(encoding="utf-8").strip()
        if not text.isdecimal() or int(text) == 0:
            raise DataError(f"{counted}: expected a number of shards above 0, got {text!r}")
        return [str(folder / f"{i}.tar") for i in range(int(text))]
    found = [p for p in folder.glob("*.tar") if p.stem.isdecimal()]
    return [str(path) for path in sorted(found, key=lambda p: int(p.stem))]


def _table(
    data: str,
    names: Sequence[str] | None,
    words: tuple[str, ...],
    label_key: str,
    open_kwargs: Mapping[str, Any],
) -> Layout:
    dataset: Any = open_dataset(data, **open_kwargs)
    if not label_key:
        return Layout(data, dataset, templates=words)
    values = _column(
        data,
        label_key,
        open_kwargs.get("csv_separator", "\t"),
        open_kwargs.get("csv_encoding", "utf-8"),
    )
    known = tuple(sorted(set(values))) if names is None else tuple(names)
    strange = sorted(set(values) - set(known))
    if strange:
        raise DataError(
            f"{data}: column {label_key!r} holds {strange[0]!r}, which is none of the "
            f"{len(known)} class names; mend one of the two"
        )
    position = {name: i for i, name in enumerate(known)}
    ids = torch.tensor([position[value] for value in values])
    dataset.labels = {LABEL: Labels(ids, known)}
    return Layout(data, dataset, templates=words)


def _column(path: str, key: str, separator: str, encoding: str) -> list[str]:
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    with open(path, encoding=codec, newline="") as lines:
        separator = "\t" if separator == "\\t" else separator
        rows = csv.DictReader(lines, delimiter=separator)
        if key not in (rows.fieldnames or ()):
            raise DataError(
                f"{path}: no column {key!r} (--csv-label-key); the columns are {rows.fieldnames}"
            )
        return [(row[key] or "").strip() for row in rows if any(row.values())]


def _class_names(given: str, root: Path) -> list[str] | None:
    """Class names by id; None: nobody named them."""
    if given == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    path = Path(given) if given else root / "classnames.txt"
    if not path.is_file():
        if given:
            raise DataError(f"--classnames: no file {given}; expected one class name a line")
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise DataError(f"{path}: expected one class name a line, found an empty one or none")
    return names


def imagenet_names(folders: Sequence[str]) -> list[str] | None:
    """OpenCLIP's names where the folders are ImageNet's WordNet ids, whose order is theirs."""
    if len(folders) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return None
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def read_templates(given: str, root: Path | None = None) -> tuple[str, ...]:
    """Prompt templates, each with "{}" for the class.

    Args:
        given: "openai" (OpenCLIP's 80 for ImageNet), "simple" (its 7), a file with one template a
            line ("{}" or CLIP_benchmark's "{c}"), or "auto": zeroshot_classification_templates.txt
            in ``root``, else "openai".
    """
    file = root / "zeroshot_classification_templates.txt" if root is not None else None
    if given == "auto":
        given = str(file) if file is not None and file.is_file() else "openai"
    if given in ("openai", "simple"):
        import open_clip

        made = {
            "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
            "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        }[given]
        return tuple(template("{}") for template in made)
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
