"""The pairs that a selected.csv of ``protoclip curate`` names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protoclip.common.files import DataError, plural, printable
from protoclip.data.feature_pairs import feature_pairs
from protoclip.data.types import PairDataset, Subset
from protoclip.features.table import read_csv


def read_selection(path: Path, dataset: PairDataset) -> np.ndarray:
    """Which pairs are selected, with others of the same pictures, bool [N]. A row of the table is
    found by its key, and one without a key by its position.

    Raises:
        DataError: the table cannot be read, or the data set has not all of its pairs.
    """
    shown = printable(str(path))
    try:
        cells = zip(read_csv(path, "key"), read_csv(path, "position"), strict=True)
        selected = [(key, int(position)) for key, position in cells]
    except (OSError, ValueError) as error:
        raise DataError(
            f"--rows: expected a selected.csv of protoclip curate, got {shown} ({error})"
        ) from error
    keys = list(dict.fromkeys(key for key, _ in selected if key))
    positions = np.array([position for key, position in selected if not key], np.int64)
    pairs = feature_pairs(dataset)
    count = len(dataset) if pairs is None else len(pairs.images)
    if positions.max(initial=0) >= count:
        raise DataError(
            f"--rows: expected positions below {count:,}, the size of {dataset.name}, "
            f"got {positions.max():,} in {shown}; train on the data whose features were curated"
        )
    if pairs is None:
        place_of = {key: i for i, key in enumerate(dataset.keys)}
        found = np.array([place_of.get(key, -1) for key in keys], np.int64)
    else:
        found = pairs.identity.find(keys)
    if len(missing := np.flatnonzero(found < 0)):
        others = min(keys[i] for i in missing.tolist())
        raise DataError(
            f"--rows: expected keys of {dataset.name}, got {plural(len(missing), 'other key')} in "
            f"{shown}, such as {printable(others)}; train on the data whose features were curated"
        )
    found = np.concatenate([found, positions])
    pictures = dataset.picture_numbers()
    chosen = pictures[found] if pairs is None else pairs.identity.picture[found]
    return np.isin(pictures, chosen)


def selected_pairs(dataset: PairDataset, is_selected: np.ndarray) -> PairDataset:
    """The pairs that ``is_selected``, bool [N], has."""
    if not is_selected.any():
        raise DataError(f"--rows: no selected pair of {dataset.name} is left to train on")
    return Subset(dataset, np.flatnonzero(is_selected))
