"""The rows that the command reads, and what each is of: key, caption, picture file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from protoclip.common.files import read_file
from protoclip.common.strings import StringTable
from protoclip.data import PairDataset
from protoclip.data.images import decode, no_picture
from protoclip.features import FeatureRows, FeatureTable, open_features, open_folder
from protoclip.features.layout import is_feature_folder
from protoclip.features.table import CAPTION, FILE


class UnitRows(FeatureRows):
    """Rows of others, scaled to length 1 when they are read: fp32, or fp64 where those are."""

    def __init__(self, source: FeatureRows) -> None:
        self.source = source
        self.name = source.name
        self.shape = source.shape
        self.dtype = np.dtype(np.float64 if source.dtype == np.float64 else np.float32)

    @property
    def keys(self) -> StringTable | None:
        return self.source.keys

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        block = self._buffer(stop - start, out)
        block[:] = self._scaled(self.source.rows(start, stop))
        return block

    def take(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        return self._scaled(self.source.take(positions))

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        numbers = rows.astype(self.dtype)
        lengths = np.linalg.norm(numbers, axis=1, keepdims=True)
        return numbers / np.where(lengths > 0, lengths, 1)


@dataclass(frozen=True)
class Source:
    """Finite rows, and the table that says what they are of."""

    all_rows: FeatureRows
    rows: FeatureRows  # those without NaN and infinity
    positions: np.ndarray  # int64 [N], of ``rows`` in ``all_rows``
    left_out: np.ndarray  # int64, positions of the others
    table: FeatureTable | None

    def column(self, name: str) -> StringTable | None:
        return None if self.table is None else self.table.column(name)


def open_source(data: str, normalize: bool) -> Source:
    """Open the rows of DATA and find those that are not finite, which reads them all."""
    all_rows = open_features(data)
    table = open_folder(data).table if is_feature_folder(data) else None
    left_out = all_rows.not_finite()
    positions = np.setdiff1d(np.arange(len(all_rows)), left_out, assume_unique=True)
    rows = all_rows.select(positions) if len(left_out) else all_rows
    return Source(all_rows, UnitRows(rows) if normalize else rows, positions, left_out, table)


class RowPictures(PairDataset):
    """Some rows of a source as a data set for the page: ``rows``, int64 [M], count from 0 among
    the finite ones."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        positions = source.positions[rows]
        keys, captions, files = (
            None if column is None else column.take(positions)
            for column in (source.all_rows.keys, source.column(CAPTION), source.column(FILE))
        )
        self.name = source.all_rows.name
        self.keys = keys or [f"row {position:,}" for position in positions.tolist()]
        self._captions = captions
        self._files = files

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shown(self) -> str:
        return "names" if self._captions is None else "captions"

    def has_picture(self, i: int) -> bool:
        """Whether a row's file is there and holds one picture."""
        file = self.path(i)
        return bool(file) and not no_picture(file) and os.path.isfile(file)

    def path(self, i: int) -> str:
        return "" if self._files is None else str(self._files[i])

    def image(self, i: int) -> Image.Image:
        return decode(read_file(self.path(i)), self.path(i))

    def captions(self, i: int) -> tuple[str, ...]:
        return (self.keys[i] if self._captions is None else str(self._captions[i]) or self.keys[i],)
