"""The pairs that a selected.csv of ``protoclip curate`` names."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import numpy as np

from protoclip.common.files import DataError, plural, printable
from protoclip.data.types import PairDataset, Subset
from protoclip.features.table import KEY, read_csv

POSITION = "position"


def read_selection(path: Path, dataset: PairDataset) -> Set[str]:
    """The keys of the selected pairs; their positions count only where the table has no keys.

    Raises:
        DataError: the table cannot be read, or the data set has not all of its pairs.
    """
    shown = printable(str(path))
    try:
        keys = {key for key in read_csv(path, KEY) if key}
        positions = [int(position) for position in read_csv(path, POSITION)]
    except (OSError, ValueError) as error:
        raise DataError(
            f"--rows: expected a selected.csv of protoclip curate, got {shown} ({error})"
        ) from error
    if not keys:
        if max(positions, default=0) >= len(dataset):
            raise DataError(
                f"--rows: expected positions below {len(dataset):,}, the size of {dataset.name}, "
                f"got {max(positions):,} in {shown}; train on the data whose features were curated"
            )
        return {dataset.keys[position] for position in positions}
    if missing := keys.difference(dataset.keys):
        raise DataError(
            f"--rows: expected keys of {dataset.name}, got {plural(len(missing), 'other key')} in "
            f"{shown}, such as {printable(min(missing))}; train on the data whose features were "
            "curated"
        )
    return keys


def selected_pairs(dataset: PairDataset, keys: Set[str]) -> PairDataset:
    """The pairs with these keys, and others of the same pictures."""
    pictures = dataset.picture_numbers()
    has_key = np.fromiter((key in keys for key in dataset.keys), bool, len(dataset))
    chosen = np.flatnonzero(np.isin(pictures, pictures[has_key]))
    if not len(chosen):
        raise DataError(f"--rows: no selected pair of {dataset.name} is left to train on")
    return Subset(dataset, chosen)
