"""Millions of strings in two arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class StringTable(Sequence[str]):
    """A read-only list of strings, kept as one UTF-8 buffer and int64 offsets.

    A list of str objects is copied page by page into every forked worker as reference counts
    change; two arrays are not, and cost about a quarter of the memory.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        data, ends = bytearray(), array("q", [0])
        for string in strings:
            data += string.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self._data = np.frombuffer(bytes(data), dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"StringTable: index {i} in a table of {len(self)}")
        i %= len(self)
        raw = self._data[self._ends[i] : self._ends[i + 1]].tobytes()
        return raw.decode("utf-8", "surrogateescape")
