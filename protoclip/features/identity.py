"""What stored rows are of, in one place: what row i is of, and which rows are of one picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from protoclip.common.digest import Digest
from protoclip.common.files import DataError, printable
from protoclip.common.strings import StringTable

KEY = "key"  # of the picture; rows of one picture have the same
FILE = "file"  # that holds the picture: a path or URL; "" if there is none
CAPTION = "caption"
LEAST_COSINE = 0.999  # of rows of one picture: an encoder's last bits depend on the batch
COMPARED = 4096  # rows that are compared with those of their pictures at once


def as_positions(positions: Any, count: int, name: str = "rows") -> np.ndarray:
    """Positions among ``count`` rows, int64 [M], from integers, or from a mask that selects rows;
    ``name``: of the rows, for messages.

    Raises:
        IndexError: a mask of another length, or a position outside 0 to ``count`` - 1.
        TypeError: other numbers, such as floats.
    """
    array = np.asarray(positions)
    shown = printable(name)
    if array.dtype == bool:
        if array.shape != (count,):
            raise IndexError(
                f"{shown}: expected a mask [{count}], a value for each row, got {list(array.shape)}"
            )
        return np.flatnonzero(array)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{shown}: expected positions as integers, or a mask, got {array.dtype}")
    if array.size and not 0 <= array.min() <= array.max() < count:
        raise IndexError(
            f"{shown}: expected positions from 0 to {count - 1:,}, got {array.min():,} to "
            f"{array.max():,}"
        )
    return array.astype(np.int64, copy=False)


def alike(texts: StringTable) -> np.ndarray:
    """A number for each row, int64 [N], the same for rows of equal texts; rows without a text
    differ. Numbers count from 0 in the order in which they first occur."""
    numbers = texts.numbers()
    first = np.unique(numbers, return_index=True)[1][numbers]  # the first row of equal texts
    first = np.where(texts.has_text, first, np.arange(len(texts)))
    return np.unique(first, return_inverse=True)[1].astype(np.int64)


class Identity:
    """What each of N stored rows is of.

    A missing column, a null and an empty cell are the same: not known. A row without a key is a
    picture of its own, and what identifies it is its number in DATA, never its name.

    Args:
        name: of the rows, for messages.
        count: N.
        read: gives a column of N texts by its name, or None; it is called once for each column.
        key_column: what the files call the keys, for messages.
    """

    def __init__(
        self,
        name: str,
        count: int,
        read: Callable[[str], StringTable | None] = lambda _: None,
        key_column: Callable[[], str] = lambda: KEY,
    ) -> None:
        self.name = name
        self.count = count
        self.key_column = key_column
        self._read = read
        self._column = functools.cache(self._whole_column)
        self._numbers: np.ndarray | None = None  # of the rows in DATA; None: 0 to N - 1

    def row_numbers(self, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The numbers of rows in DATA, int64 [M]; those of a selection keep theirs."""
        if self._numbers is None:
            return np.arange(self.count)[positions]
        return self._numbers[positions]

    def select(self, positions: np.ndarray) -> Identity:
        """What the rows at ``positions``, int64 [M], are of."""

        return self._like(lambda name: self.column(name, positions), self.row_numbers(positions))

    def _like(self, read: Callable[[str], StringTable | None], numbers: np.ndarray) -> Identity:
        changed = Identity(self.name, len(numbers), read, self.key_column)
        changed._numbers = numbers
        return changed

    def with_captions(self, captions: StringTable) -> Identity:
        """The same rows with other captions, [N]."""

        def read(name: str) -> StringTable:
            return captions if name == CAPTION else self.column(name)

        return self._like(read, self.row_numbers())

    def separate(self) -> Identity:
        """The same rows, each as a picture of its own."""
        changed = self._like(self.column, self.row_numbers())
        changed.picture = np.arange(self.count)
        return changed

    def column(self, name: str, positions: np.ndarray | None = None) -> StringTable:
        """The texts of a column, of all rows or of those at ``positions``, int64 [M]; "" where the
        text is not known."""
        column = self._column(name)
        return column if positions is None else column.take(positions)

    def _whole_column(self, name: str) -> StringTable:
        column = self._read(name)
        if column is None:
            return StringTable.of_arrays(np.zeros(0, np.uint8), np.zeros(self.count + 1, np.int64))
        if len(column) != self.count:
            raise DataError(
                f"{printable(self.name)}: expected a {name} for each of the {self.count:,} rows, "
                f"got {len(column):,}; write keys and features again"
            )
        return column

    def knows(self, name: str) -> bool:
        """Whether any row has a text in a column."""
        return bool(self.column(name).has_text.any())

    @functools.cached_property
    def keys(self) -> StringTable | None:
        """The key of each row, "" where it has none; None if no row has one."""
        return self.column(KEY) if self.knows(KEY) else None

    def names(self, positions: np.ndarray | None = None) -> Sequence[str]:
        """What pages and messages call rows: their keys; "row 12" of those without."""
        keys = self.column(KEY, positions)
        if keys.has_text.all():
            return keys
        return _Names(keys, self.row_numbers(slice(None) if positions is None else positions))

    def cells(self, positions: np.ndarray) -> dict[str, Sequence[str]]:
        """What tables say of the rows at ``positions``, int64 [M]: the position in DATA, which
        identifies a row, key and file."""
        return {
            "position": [str(number) for number in self.row_numbers(positions).tolist()],
            KEY: self.column(KEY, positions),
            FILE: self.column(FILE, positions),
        }

    def digest(self, count: int) -> str:
        """The checksum of the keys and captions of the first ``count`` rows."""
        digest = Digest()
        for name in (KEY, CAPTION):
            for part in self.column(name).head(count):
                digest.update(part)
        return digest.hexdigest()

    @functools.cached_property
    def picture(self) -> np.ndarray:
        """The picture of each row, int64 [N], counted from 0 in the order of their first rows."""
        return np.arange(self.count) if self.keys is None else alike(self.keys)

    @functools.cached_property
    def first_rows(self) -> np.ndarray:
        """The first row of each picture, int64 [P], increasing."""
        return np.unique(self.picture, return_index=True)[1]

    def find(self, keys: Iterable[str]) -> np.ndarray:
        """The first row with each of these keys, int64 [M]; -1 where there is none."""
        own = self.column(KEY, self.first_rows)
        row_of = dict(zip(own, self.first_rows.tolist(), strict=True))
        row_of.pop("", None)
        return np.array([row_of.get(key, -1) for key in keys], np.int64)

    @functools.cached_property
    def rows_by_picture(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows in the order of their pictures, int64 [N], and where those of each picture
        begin, int64 [P + 1]: picture p has the rows ``rows[starts[p] : starts[p + 1]]``."""
        starts = np.bincount(self.picture).cumsum()
        order = np.argsort(self.picture, kind="stable")
        return order, np.concatenate([np.zeros(1, np.int64), starts])

    def check_block(
        self, start: int, block: np.ndarray, take: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Check that image rows from ``start`` on, [M, D], are like those of their pictures' first
        rows, which ``take`` reads.

        Raises:
            DataError: rows with one key are of different pictures.
        """
        if self.keys is None:
            return
        first = self.first_rows[self.picture[start : start + len(block)]]
        repeats = np.flatnonzero(first != np.arange(start, start + len(block)))
        for part in np.split(repeats, range(COMPARED, len(repeats), COMPARED)):
            rows = block[part]
            is_before = first[part] < start
            expected = block[np.where(is_before, 0, first[part] - start)]
            expected[is_before] = take(first[part][is_before])
            differ = np.flatnonzero((rows.view(np.uint8) != expected.view(np.uint8)).any(axis=1))
            wrong = differ[_are_unlike(rows[differ], expected[differ])]
            if len(wrong):
                self._refuse(int(first[part[wrong[0]]]), start + int(part[wrong[0]]))

    def _refuse(self, first: int, other: int) -> None:
        column = self.key_column()
        key = printable(self.column(KEY)[other])
        raise DataError(
            f"{printable(self.name)}: expected one picture for each {column}, got rows {first:,} "
            f"and {other:,} with the {column} {key!r} and different features; write a {column} "
            "into the table that differs between pictures, or leave the column out"
        )


def _are_unlike(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether the cosine of rows [M, D] is too small for them to be of one picture: bool [M]."""
    rows, others = rows.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1), np.linalg.norm(others, axis=1)
    products = np.einsum("nd,nd->n", rows, others)
    is_unlike = products < LEAST_COSINE * lengths[0] * lengths[1]
    return is_unlike | ((lengths[0] == 0) != (lengths[1] == 0))


class _Names(Sequence[str]):
    """The keys of rows, or "row 12" in place of those that are empty."""

    def __init__(self, keys: StringTable, numbers: np.ndarray) -> None:
        self._keys = keys
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._keys[i] or f"row {self._numbers[i]:,}"
