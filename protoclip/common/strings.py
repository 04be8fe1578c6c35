"""Many strings in two arrays instead of one object each."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class StringTable(Sequence[str]):
    """A read-only list of strings, kept as one UTF-8 buffer and int64 offsets.

    With a list of str objects, changing reference counts copy it page by page into every forked
    worker; two arrays are not copied and need about a quarter of the memory.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        data = bytearray()
        ends = array("q", [0])
        for string in strings:
            data += string.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self._data = np.frombuffer(bytes(data), dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    @classmethod
    def of_arrays(cls, data: np.ndarray, ends: np.ndarray) -> StringTable:
        """The strings in ``data``, uint8; string i lies from ``ends[i]`` to ``ends[i + 1]``, int64
        [N + 1]."""
        table = cls.__new__(cls)
        table._data = data
        table._ends = ends
        return table

    @classmethod
    def concatenate(cls, tables: Sequence[StringTable]) -> StringTable:
        lengths = [np.diff(table._ends) for table in tables]
        ends = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        data = [table._data[table._ends[0] : table._ends[-1]] for table in tables]
        return cls.of_arrays(np.concatenate([np.zeros(0, np.uint8), *data]), ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        raw = self._data[self._ends[i] : self._ends[i + 1]].tobytes()
        return raw.decode("utf-8", "surrogateescape")

    def head(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of the first ``count`` strings, uint8, and the length of each, int64."""
        ends = self._ends[: count + 1]
        return self._data[ends[0] : ends[-1]], np.diff(ends)

    @property
    def has_text(self) -> np.ndarray:
        """Whether each string has a character, bool [N]."""
        return np.diff(self._ends) > 0

    def take(self, positions: np.ndarray) -> StringTable:
        """The strings at ``positions``, int64 [M], without an object for each."""
        starts = self._ends[:-1][positions]
        lengths = self._ends[1:][positions] - starts
        ends = np.concatenate([np.zeros(1, np.int64), lengths]).cumsum()
        within = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
        return self.of_arrays(self._data[np.repeat(starts, lengths) + within], ends)

    def numbers(self) -> np.ndarray:
        """A number for each string, int64 [N], the same for equal strings; numbers count from 0 in
        the order in which the strings first occur."""
        lengths = np.diff(self._ends)
        by_length = np.argsort(lengths, kind="stable")
        boundaries = np.flatnonzero(np.diff(lengths[by_length])) + 1
        first = np.zeros(len(self), np.int64)  # position of the first string that is equal
        for same_length in np.split(by_length, boundaries):
            if not len(same_length):
                continue
            length = int(lengths[same_length[0]])
            if length == 0:
                first[same_length] = same_length[0]
                continue
            content = self._data[self._ends[same_length][:, None] + np.arange(length)]
            values = content.view(np.dtype((np.void, length)))[:, 0]
            _, firsts, inverse = np.unique(values, return_index=True, return_inverse=True)
            first[same_length] = same_length[firsts[inverse]]
        return np.unique(first, return_inverse=True)[1].astype(np.int64)
