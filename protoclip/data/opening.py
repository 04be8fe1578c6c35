"""Pairs by name: ``open_dataset``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common.files import DataError
from protoclip.data.feature_pairs import open_feature_pairs
from protoclip.data.folders import open_class_folders
from protoclip.data.icons import builtin_icons, heldout_concepts, in_heldout_family
from protoclip.data.parquet import ParquetDataset
from protoclip.data.shapes import ShapesDataset
from protoclip.data.shards import ShardDataset, data_kind
from protoclip.data.tables import CsvDataset
from protoclip.data.types import PairDataset, Subset, heldout_mask


def open_dataset(
    spec: str,
    split: str = "all",
    *,
    seed: int = 0,
    keep_going: bool = False,
    class_template: str = "a photo of a {}.",
    labels: str = "",
    **table: Any,
) -> PairDataset:
    """Open pairs by name.

    Args:
        spec: "builtin:icons" | "builtin:shapes[:N]" | a .csv or .tsv file | a folder of class
            folders | webdataset shards or parquet files: one, a folder of them, a URL, braces and
            globs, sources joined by "::" | stored features: a folder that ``protoclip encode``
            wrote, or "features:IMAGES::TEXTS", two files or folders of rows.
        split: "all" | "train" | "heldout" (10 %; of each group, if groups are known; of
            builtin:icons one family and a tenth of the concepts, whatever the seed).
        seed: decides which pairs are held out.
        keep_going: collect a table's bad rows in ``facts.skipped`` instead of raising.
        class_template: makes captions from class names; see :func:`folders.read_templates`.
        labels: file with the classes of stored features; see ``read_labels``.
        table: csv_separator, csv_img_key, csv_caption_key, csv_encoding, skip_bad of
            :class:`CsvDataset`; the keys also name columns of parquet files.
    Returns:
        A data set with at least one pair, unless ``keep_going`` finds none.
    Raises:
        DataError: what is wrong, where, and what to do.

    Example:
        >>> pairs = protoclip.open_dataset("builtin:shapes:100", split="train")
        >>> pairs.image(0).size, len(pairs.captions(0)) > 0
        ((72, 72), True)
    """
    if split not in ("all", "train", "heldout"):
        raise DataError(f"{spec}: split must be all, train or heldout, got {split!r}")
    source_type = data_kind(spec)
    if labels and source_type != "features":
        raise DataError(f"--labels: expected stored features, got {spec}; leave the flag out")
    builtin, _, argument = spec.removeprefix("builtin:").partition(":")
    if source_type != "builtin":
        builtin = ""
    heldout: np.ndarray | None = None
    if builtin == "icons":
        if argument:
            raise DataError(f"{spec}: expected builtin:icons without a further part")
        dataset: PairDataset = builtin_icons()
        heldout = heldout_concepts(builtin_icons()) | in_heldout_family(builtin_icons())
    elif builtin == "shapes":
        count = argument or "2000"
        if not count.isdecimal():
            raise DataError(f"{spec}: expected builtin:shapes:N with a whole number N")
        dataset = ShapesDataset(int(count))
    elif source_type == "features":
        dataset = open_feature_pairs(spec, labels)
    elif source_type == "shards":
        dataset = ShardDataset(spec)
    elif source_type == "table":
        dataset = CsvDataset(spec, keep_going=keep_going, **table)
    elif source_type == "folder":
        dataset = open_class_folders(Path(spec), class_template)
    elif source_type == "parquet":
        keys = {name: key for name, key in table.items() if name.endswith("_key")}
        dataset = ParquetDataset(spec, class_template=class_template, **keys)
    else:
        raise DataError(
            f"data {spec!r}: expected one of builtin:icons, builtin:shapes[:N], "
            "a .csv or .tsv file, a folder of class folders or of protoclip encode, or files such "
            'as "d/*.tar" and "d/*.parquet"'
        )
    if split == "all":
        return dataset
    groups = dataset.labels["group"].ids.numpy() if "group" in dataset.labels else None
    if heldout is None:
        pictures = dataset.picture_numbers()  # rows of one picture stay together
        if groups is not None:
            groups = groups[np.unique(pictures, return_index=True)[1]]
        heldout = heldout_mask(int(pictures.max()) + 1, groups, seed)[pictures]
    chosen = np.flatnonzero(heldout if split == "heldout" else ~heldout)
    if not len(chosen):
        raise DataError(f"{spec}: too few pairs for the split {split!r}; use split all")
    return Subset(dataset, chosen, f"{dataset.name}[{split}]")
