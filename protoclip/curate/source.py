"""The rows that the command reads, and what each is of: key, caption, picture file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protoclip.cluster.points import StoredPictures, open_rows
from protoclip.common.strings import StringTable
from protoclip.features import FeatureRows
from protoclip.features.rows import UnitRows
from protoclip.features.table import CAPTION, FILE, KEY
from protoclip.lloyd.points import OnDisk, on_disk


@dataclass(frozen=True)
class Source:
    """Finite rows, and what they are of."""

    rows: FeatureRows  # without NaN and infinity
    positions: np.ndarray  # int64 [N], of these rows among all of DATA
    left_out: np.ndarray  # int64, positions of the others
    columns: Mapping[str, StringTable | None]  # KEY, FILE, CAPTION of all rows; None: there is none

    @property
    def points(self) -> OnDisk:
        """The rows as k-means reads them."""
        return on_disk(self.rows, torch.device("cpu"))

    def column(self, name: str, positions: np.ndarray) -> Sequence[str]:
        """A column at positions in DATA; empty texts if there is none."""
        column = self.columns[name]
        return [""] * len(positions) if column is None else column.take(positions)

    def pictures(self, chosen: np.ndarray) -> StoredPictures:
        """Some of the finite rows, by number, as a data set for the page."""
        positions = self.positions[chosen]
        keys = self.column(KEY, positions)
        if self.columns[KEY] is None:
            keys = [f"row {position:,}" for position in positions.tolist()]
        captions = [(caption,) for caption in self.column(CAPTION, positions)]
        return StoredPictures(self.rows.name, keys, captions, self.column(FILE, positions))


def open_source(data: str, normalize: bool) -> Source:
    """Open the rows of DATA and find those that are not finite, which reads them all."""
    rows, table = open_rows(data)
    columns = {name: None if table is None else table.column(name) for name in (FILE, CAPTION)}
    columns[KEY] = rows.keys
    left_out = rows.not_finite()
    positions = np.setdiff1d(np.arange(len(rows)), left_out, assume_unique=True)
    if len(left_out):
        rows = rows.select(positions)
    return Source(UnitRows(rows) if normalize else rows, positions, left_out, columns)
