"""Rows of features that stay on disk until somebody reads them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from protoclip.common.files import DataError, printable
from protoclip.common.strings import StringTable
from protoclip.features.parts import Part

BLOCK_BYTES = 32 << 20  # read at once where all rows are looked at


class FeatureRows(ABC):
    """Rows [N, D] of numbers on disk. Nothing is kept in memory but what a method returns."""

    name: str  # for messages and tables
    shape: tuple[int, int]
    dtype: np.dtype  # in native byte order

    def __len__(self) -> int:
        return self.shape[0]

    @property
    @abstractmethod
    def keys(self) -> StringTable | None:
        """A key for each row, read at first use; None if the rows have no keys."""

    @abstractmethod
    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, D]. ``out``: a contiguous buffer of this dtype
        whose first rows are filled and returned."""

    @abstractmethod
    def take(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        """The rows at ``positions`` [M], in that order, [M, D]."""

    def select(self, positions: np.ndarray | Sequence[int]) -> FeatureRows:
        """The rows at ``positions`` [M] as rows on disk, in that order."""
        return SelectedRows(self, np.asarray(positions, dtype=np.int64))

    def not_finite(self) -> np.ndarray:
        """Positions of the rows with NaN or infinity, int64; reads all rows, block by block."""
        if self.dtype.kind != "f":
            return np.zeros(0, np.int64)
        rows_in_block = max(1, BLOCK_BYTES // (self.shape[1] * self.dtype.itemsize))
        buffer = np.empty((min(rows_in_block, len(self)), self.shape[1]), self.dtype)
        bad = [np.zeros(0, np.int64)]
        for start in range(0, len(self), rows_in_block):
            block = self.rows(start, min(len(self), start + rows_in_block), buffer)
            bad.append(start + np.flatnonzero(~np.isfinite(block).all(axis=1)))
        return np.concatenate(bad)

    def _buffer(self, count: int, out: np.ndarray | None) -> np.ndarray:
        if out is None:
            return np.empty((count, self.shape[1]), self.dtype)
        fits = out.ndim == 2 and out.shape[1] == self.shape[1] and len(out) >= count
        if not fits or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"rows: expected a contiguous buffer [{count} or more, {self.shape[1]}] of "
                f"{self.dtype}, got {out.dtype} {list(out.shape)}"
            )
        return out[:count]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"{printable(self.name)}: expected 0 <= start <= stop <= {len(self):,}, got "
                f"{start:,} and {stop:,}"
            )

    def _check(self, positions: np.ndarray) -> None:
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(
                f"{printable(self.name)}: expected positions from 0 to {len(self) - 1:,}, got "
                f"{positions.min():,} to {positions.max():,}"
            )


class StoredRows(FeatureRows):
    """The rows of files, one file after the other.

    ``read_keys`` returns a key for each row, or None; it is called at the first use of ``keys``.
    """

    def __init__(
        self, name: str, parts: Sequence[Part], read_keys: Callable[[], StringTable | None]
    ) -> None:
        self.name = name
        self.parts = parts
        first = parts[0]
        for part in parts:
            if (part.shape[1], part.dtype) != (first.shape[1], first.dtype):
                raise DataError(
                    f"{printable(str(part.path))}: expected rows of {first.shape[1]:,} numbers of "
                    f"{first.dtype}, as in {printable(first.path.name)}, got "
                    f"{part.shape[1]:,} of {part.dtype}; all parts must be of one encoder"
                )
        self._ends = np.cumsum([part.shape[0] for part in parts])  # where each part's rows end
        self.shape = (int(self._ends[-1]), first.shape[1])
        self.dtype = first.dtype
        self._read_keys = read_keys

    @functools.cached_property
    def keys(self) -> StringTable | None:
        keys = self._read_keys()
        if keys is not None and len(keys) != len(self):
            raise DataError(
                f"{printable(self.name)}: expected a key for each of the {len(self):,} rows, got "
                f"{len(keys):,}; write keys and features again"
            )
        return keys

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        self._check_range(start, stop)
        block = self._buffer(stop - start, out)
        position = start
        while position < stop:
            number = int(np.searchsorted(self._ends, position, side="right"))
            part = self.parts[number]
            end = int(self._ends[number])
            part_start = end - part.shape[0]
            until = min(stop, end)
            part.read(
                position - part_start, until - part_start, block[position - start : until - start]
            )
            position = until
        return block

    def take(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        self._check(positions)
        taken = np.empty((len(positions), self.shape[1]), self.dtype)
        order = np.argsort(positions, kind="stable")
        ordered = positions[order]
        numbers = np.searchsorted(self._ends, ordered, side="right")  # of the parts
        for number in np.unique(numbers).tolist():
            first, last = np.searchsorted(numbers, [number, number + 1])
            part = self.parts[number]
            part_start = int(self._ends[number]) - part.shape[0]
            part.gather(ordered[first:last] - part_start, taken, order[first:last])
        return taken


class SelectedRows(FeatureRows):
    """Some rows of others, by position."""

    def __init__(self, source: FeatureRows, positions: np.ndarray) -> None:
        source._check(positions)
        self.source = source
        self.positions = positions  # int64 [M]
        self.name = source.name
        self.shape = (len(positions), source.shape[1])
        self.dtype = source.dtype

    @functools.cached_property
    def keys(self) -> StringTable | None:
        keys = self.source.keys
        return None if keys is None else keys.take(self.positions)

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        self._check_range(start, stop)
        positions = self.positions[start:stop]
        count = len(positions)
        first = int(positions.min()) if count else 0
        last = int(positions.max()) + 1 if count else 0
        is_slice = last - first == count and bool((np.diff(positions) == 1).all())
        if is_slice:
            return self.source.rows(first, last, out)
        block = self._buffer(count, out)
        if last - first <= 2 * count:  # nearly all rows of a range: one read is fastest
            block[:] = self.source.rows(first, last)[positions - first]
        else:
            block[:] = self.source.take(positions)
        return block

    def take(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        positions = np.asarray(positions, dtype=np.int64)
        self._check(positions)
        return self.source.take(self.positions[positions])


class UnitRows(FeatureRows):
    """The rows of others at length 1, float32, or float64 where that may lose digits; rows of zeros
    stay zeros."""

    def __init__(self, source: FeatureRows) -> None:
        self.source = source
        self.name = source.name
        self.shape = source.shape
        self.dtype = np.dtype(np.float32 if np.can_cast(source.dtype, np.float32) else np.float64)

    @property
    def keys(self) -> StringTable | None:
        return self.source.keys

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        block = self._buffer(stop - start, out)
        block[:] = self._unit(self.source.rows(start, stop))
        return block

    def take(self, positions: np.ndarray | Sequence[int]) -> np.ndarray:
        return self._unit(self.source.take(positions))

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(self.dtype)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(lengths == 0, 1, lengths)
