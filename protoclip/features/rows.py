"""Rows of features that stay on disk until somebody reads them."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from protoclip.common.digest import Digest, digest_of
from protoclip.common.files import DataError, printable
from protoclip.common.strings import StringTable
from protoclip.common.waits import Wait
from protoclip.features.identity import Identity, as_positions
from protoclip.features.parts import Part

BLOCK_BYTES = 32 << 20  # read at once where all rows are looked at


class FeatureRows(ABC):
    """Rows [N, D] of numbers on disk. Nothing is kept in memory but what a method returns."""

    name: str  # for messages and tables
    shape: tuple[int, int]
    dtype: np.dtype  # in native byte order
    are_images: bool = False  # whether rows with one key are of one picture, so nearly equal
    state: str = ""  # changes with the size or time of a file that holds rows
    _bad: np.ndarray | None = None
    _digests: Mapping[int, str] = {}

    def __len__(self) -> int:
        return self.shape[0]

    @functools.cached_property
    def identity(self) -> Identity:
        """What each row is of."""
        return Identity(self.name, len(self))

    @property
    def keys(self) -> StringTable | None:
        """A key for each row, "" where it has none, read at first use; None if no row has one."""
        return self.identity.keys

    @abstractmethod
    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, D]. ``out``: a contiguous buffer of this dtype
        whose first rows are filled and returned."""

    @abstractmethod
    def take(self, positions: np.ndarray | Sequence[int] | Sequence[bool]) -> np.ndarray:
        """The rows at ``positions``, as of ``as_positions``, in that order, [M, D]."""

    def select(self, positions: np.ndarray | Sequence[int] | Sequence[bool]) -> FeatureRows:
        """The rows at ``positions``, as of ``as_positions``, as rows on disk, in that order."""
        positions = as_positions(positions, len(self), self.name)
        if np.array_equal(positions, np.arange(len(self))):
            return self
        return SelectedRows(self, positions)

    def look_over(self, count: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The first ``count`` rows in the order of the file, or all of them: the position of each
        block's first row and the block, which is valid until the next one.

        At the end ``digest`` of these rows, and ``not_finite`` of all, are known without reading.

        Raises:
            DataError: image rows with one key are of different pictures.
        """
        count = len(self) if count is None else count
        row_bytes = self.shape[1] * self.dtype.itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        buffer = np.empty((min(step, count), self.shape[1]), self.dtype)
        digest = Digest()
        bad = [np.zeros(0, np.int64)]
        with Wait("reading the rows", count, "rows") as wait:
            for start in range(0, count, step):
                block = self.rows(start, min(count, start + step), buffer)
                digest.update(block)
                if self.dtype.kind == "f":
                    bad.append(start + np.flatnonzero(~np.isfinite(block).all(axis=1)))
                if self.are_images:
                    self.identity.check_block(start, block, self.take)
                yield start, block
                wait.update(len(block))
        self._digests = {**self._digests, count: digest.hexdigest()}
        if count == len(self):
            self._bad = np.concatenate(bad)

    def not_finite(self) -> np.ndarray:
        """Positions of the rows with NaN or infinity, int64; reads all rows, block by block, unless
        ``look_over`` has."""
        if self.dtype.kind != "f" and not self.are_images:
            return np.zeros(0, np.int64)
        if self._bad is None:
            for _ in self.look_over():
                pass
        assert self._bad is not None
        return self._bad

    def digest(self, count: int | None = None) -> str:
        """The checksum of the bytes of the first ``count`` rows, or of all; reads them, unless
        ``look_over`` has."""
        count = len(self) if count is None else count
        if count not in self._digests:
            for _ in self.look_over(count):
                pass
        return self._digests[count]

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


class StoredRows(FeatureRows):
    """The rows of files, one file after the other; ``identity``: what they are of, if known."""

    def __init__(self, name: str, parts: Sequence[Part], identity: Identity | None = None) -> None:
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
        states = [part.state for part in parts]
        self.state = hashlib.sha256(repr(states).encode()).hexdigest()[:16]
        if identity is not None:
            self.identity = identity

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

    def take(self, positions: np.ndarray | Sequence[int] | Sequence[bool]) -> np.ndarray:
        positions = as_positions(positions, len(self), self.name)
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
        self.source = source
        self.positions = positions  # int64 [M]
        self.name = source.name
        self.shape = (len(positions), source.shape[1])
        self.dtype = source.dtype
        self.state = source.state

    @functools.cached_property
    def identity(self) -> Identity:
        return self.source.identity.select(self.positions)

    def not_finite(self) -> np.ndarray:
        return np.flatnonzero(np.isin(self.positions, self.source.not_finite()))

    def digest(self, count: int | None = None) -> str:
        chosen = digest_of(self.positions[:count])
        return f"{self.source.digest()} at {chosen}"

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

    def take(self, positions: np.ndarray | Sequence[int] | Sequence[bool]) -> np.ndarray:
        positions = as_positions(positions, len(self), self.name)
        return self.source.take(self.positions[positions])


class UnitRows(FeatureRows):
    """The rows of others at length 1, float32, or float64 where that may lose digits; rows of zeros
    stay zeros."""

    def __init__(self, source: FeatureRows) -> None:
        self.source = source
        self.name = source.name
        self.shape = source.shape
        self.dtype = np.dtype(np.float32 if np.can_cast(source.dtype, np.float32) else np.float64)
        self.identity = source.identity
        self.state = source.state

    def digest(self, count: int | None = None) -> str:
        return f"unit {self.source.digest(count)}"

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        block = self._buffer(stop - start, out)
        block[:] = self._unit(self.source.rows(start, stop))
        return block

    def take(self, positions: np.ndarray | Sequence[int] | Sequence[bool]) -> np.ndarray:
        return self._unit(self.source.take(positions))

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        rows = rows.astype(self.dtype)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(lengths == 0, 1, lengths)
