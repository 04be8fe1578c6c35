"""Data for evaluation: built-in pairs, class folders, tables, shards and parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protoclip.data import (
    DataError,
    Labels,
    PairDataset,
    Pictures,
    Subset,
    data_kind,
    index_together,
    open_dataset,
)
from protoclip.data.feature_pairs import ClassRows, feature_pairs, open_class_rows
from protoclip.data.folders import LABEL, open_parts, read_templates
from protoclip.data.icons import builtin_icons, heldout_concepts, in_heldout_family
from protoclip.data.tables import read_table

SPLITS = ("test", "val", "validation")  # the first one present is evaluated
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
    parts: Mapping[str, Layout] = field(default_factory=dict)  # by key; {}: ``test`` is one set
    skip: frozenset[tuple[str, str]] = frozenset()  # (label, task) without meaning in this set
    left_out: Sequence[str] = ()  # what is not in the data and why, lines for the log
    class_rows: ClassRows | None = None  # of stored features, in place of prompts

    def names_classes(self, label: str) -> bool:
        """Whether there are prompts, or rows, of the class of a picture, as zero-shot needs."""
        if feature_pairs(self.test) is None:
            return True
        rows = {} if self.class_rows is None else self.class_rows.names
        classes = self.test.labels[label]
        named = [number for number, name in enumerate(classes.names) if name in rows]
        return bool(torch.isin(classes.ids, torch.tensor(named, dtype=torch.int64)).any())

    @property
    def sets(self) -> Mapping[str, Layout]:
        """The evaluation sets, by key: the parts, or this one."""
        return self.parts or {self.key: self}


def open_layout(
    data: str,
    *,
    split: str = "",
    templates: str = "openai",
    csv_label_key: str = "",
    class_features: str = "",
    **open_kwargs: Any,
) -> Layout:
    """Open data of any kind, on all ranks; see ``protoclip evaluate --help``.

    Args:
        data: built-in data, whose held-out part is evaluated with one caption per picture; a folder
            of class folders, or of split folders with class folders, with an optional
            classnames.txt, one name per line in the order of the class folders; a table; shards;
            stored features.
        split: the folder to evaluate; "": test, val or validation if present, else all.
        csv_label_key: column of the class in a table; empty in rows whose class is not known. A
            picture with several rows has the class of the first.
        class_features: the rows of class names, for stored features.
    """
    source_type = data_kind(data)
    if split and source_type != "folder":
        raise DataError(f"--split: expected a folder of pictures, got {data}; leave the flag out")
    if csv_label_key and source_type != "table":
        raise DataError(f"--csv-label-key: expected a table, got {data}; leave the flag out")
    if class_features and source_type != "features":
        raise DataError(f"--class-features: expected stored features, got {data}; leave it out")
    if source_type == "features":
        pairs = open_dataset(data, **open_kwargs)
        class_rows = open_class_rows(class_features, pairs) if class_features else None
        return Layout(pairs, class_rows=class_rows)
    if source_type == "builtin":
        test = open_dataset(data, "heldout", **open_kwargs)
        train = open_dataset(data, "train", **open_kwargs)
        if data == "builtin:icons":
            return Layout(test, train, NAMES, captions=1, parts=_icon_parts())
        return Layout(test, train, TEMPLATES, captions=1, key="HO", title="Held-out pairs")
    words: Sequence[str] = read_templates(templates)
    if source_type == "folder":
        return _image_folder(Path(data), split, words)
    index_together(data)
    dataset = open_dataset(data, **open_kwargs)
    captions = None if dataset.facts.has_captions else 0  # else made from the class
    numbers = dataset.picture_numbers()
    first_rows = np.sort(np.unique(numbers, return_index=True)[1])  # of each picture
    if len(first_rows) < len(dataset):  # a table with a row for each caption
        dataset = Pictures(dataset, numbers)
    if csv_label_key:
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
        names = tuple(sorted(set(values) - {""}))
        if not names:
            raise DataError(
                f"{data}: expected classes in the column {csv_label_key!r}, but it is empty in "
                "every row; leave --csv-label-key out"
            )
        number_of = {name: number for number, name in enumerate(names)} | {"": -1}
        ids = torch.tensor([number_of[values[row]] for row in first_rows])
        dataset.labels = {LABEL: Labels(ids, names)}
    return Layout(dataset, templates=words, captions=captions)


def _icon_parts() -> dict[str, Layout]:
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
        "NEW": Layout(
            Subset(icons, np.flatnonzero(new_family & ~new_concept & trained)),
            templates=NAMES,
            captions=1,
            title="Known concepts, drawn by an unseen family",
            skip=frozenset({*probes, ("concept", "grouping")}),  # one drawing of each
        ),
        "HO": Layout(
            Subset(icons, np.flatnonzero(new_concept & several)),
            templates=NAMES,
            title="New concepts, drawn by several families",
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
            raise DataError(f"{root}: expected {' or '.join(SPLITS)} next to train; give --split")
    if not chosen.is_dir():
        raise DataError(f"--split {split}: no folder {chosen}; name one that holds class folders")
    with_train = chosen not in (root, train) and train.is_dir()
    datasets = open_parts(root, [chosen, train] if with_train else [chosen])
    return Layout(
        test=datasets[0],
        train=datasets[1] if with_train else None,
        templates=words,
        captions=0,
        left_out=tuple(line for dataset in datasets for line in dataset.facts.left_out),
    )


def class_prompts(
    label: str, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> list[list[str]]:
    """The prompts of each class; of labels other than "class", "red-star" becomes "red star"."""
    if label != LABEL:  # identifiers, not readable names
        names = [name.replace("-", " ") for name in names]
    return [[template.replace("{}", name) for template in templates] for name in names]
