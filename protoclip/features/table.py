"""The table beside stored features: what each row is of. A column is read when it is asked for."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common.files import DataError, plural, printable, whole_file
from protoclip.common.strings import StringTable
from protoclip.features.identity import CAPTION, FILE, KEY

STATE = "state"  # of that file when the row was encoded
LABEL = "label:"  # before the name of a classification; its column has the row's class or ""
# What clip-retrieval's tables call them; the first that a table has.
CLIP_RETRIEVAL = {KEY: ("key", "image_path"), FILE: ("image_path",), CAPTION: ("caption",)}
FORMULA = "=+-@'"  # a cell that begins so gets a ' before it, or spreadsheets would compute it
QUOTE, COMMA, NEWLINE, APOSTROPHE = b"\",\n'"


class FeatureTable:
    """The columns of numbered tables, .csv of our own or .parquet of clip-retrieval, as one.

    Args:
        paths: the tables, one for each part of the features.
        counts: the number of rows of each part.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self.paths = paths
        self.counts = counts
        self._columns: dict[str, StringTable | None] = {}

    def __len__(self) -> int:
        return sum(self.counts)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        if self.paths[0].suffix == ".parquet":
            names = _parquet().read_schema(self.paths[0]).names
            known = [k for k, theirs in CLIP_RETRIEVAL.items() if not set(names).isdisjoint(theirs)]
            return tuple(dict.fromkeys([*known, *names]))
        with open(self.paths[0], encoding="utf-8", errors="surrogateescape", newline="") as file:
            return tuple(next(csv.reader(file), ()))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classifications: each has the column "label:NAME"."""
        return tuple(n.removeprefix(LABEL) for n in self.names if n.startswith(LABEL))

    def called(self, name: str) -> str:
        """What the tables call a column."""
        if self.paths[0].suffix != ".parquet":
            return name
        return _called(name, _parquet().read_schema(self.paths[0]).names)

    def column(self, name: str) -> StringTable | None:
        """A column of texts, one for each row; None if the table has no such column.

        Raises:
            DataError: a table cannot be read, or has another number of rows than its features.
        """
        if name not in self._columns:
            self._columns[name] = self._read(name) if name in self.names else None
        return self._columns[name]

    def _read(self, name: str) -> StringTable:
        is_parquet = self.paths[0].suffix == ".parquet"
        texts = []
        for path, count in zip(self.paths, self.counts, strict=True):
            shown = printable(str(path))
            try:
                column = read_parquet(path, name) if is_parquet else read_csv(path, name)
            except DataError:
                raise
            except Exception as error:  # pyarrow has many
                raise DataError(f"{shown}: cannot be read ({error}); is it complete?") from error
            if len(column) != count:
                raise DataError(
                    f"{shown}: expected {plural(count, 'row')}, as its part of the features has, "
                    f"got {len(column):,}; write the folder again"
                )
            texts.append(column)
        return StringTable.concatenate(texts)


def write_csv_table(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write a table that ``read_csv`` reads, whole or not at all."""
    with (
        whole_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        cells = [[_safe(text) for text in texts] for texts in columns.values()]
        writer.writerows(zip(*cells, strict=True))


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(tuple(FORMULA)) else text


def read_csv(path: Path, name: str) -> StringTable:
    """A column of a table that ``write_csv_table`` wrote, without a Python object for each cell."""
    data = np.fromfile(path, dtype=np.uint8)
    is_quote = data == QUOTE
    inside = is_quote.cumsum(dtype=np.int32) % 2 == 1  # quotes, from the opening one on
    ends_row = (data == NEWLINE) & ~inside
    ends_cell = (data == COMMA) & ~inside | ends_row
    ends = np.flatnonzero(ends_cell)  # of all cells
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        header = next(csv.reader(file), [])
    columns = len(header)
    is_row_end = ends_row[ends]
    if not columns or len(ends) % columns or not is_row_end[columns - 1 :: columns].all():
        raise DataError(
            f"{printable(str(path))}: expected {plural(columns, 'cell')} in each line; has another "
            "program changed the table?"
        )
    number = header.index(name)
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1] + 1])
    first = starts.reshape(-1, columns)[1:, number]  # without the header
    last = ends.reshape(-1, columns)[1:, number]
    # Of quotes only the second of two inside a cell stands for itself: it opens again.
    after_quote = np.concatenate([np.zeros(1, bool), is_quote[:-1]])
    keep = ~is_quote | (inside & after_quote)
    content = first + is_quote[first]
    keep[content[data[content] == APOSTROPHE]] = False
    kept_before = np.concatenate([np.zeros(1, np.int64), keep.cumsum()])
    within = np.zeros(len(data) + 1, np.int8)
    np.add.at(within, first, 1)
    np.add.at(within, last, -1)
    texts = data[keep & (within[:-1].cumsum(dtype=np.int32) > 0)]
    lengths = kept_before[last] - kept_before[first]
    return StringTable.of_arrays(texts, np.concatenate([np.zeros(1, np.int64), lengths]).cumsum())


def read_parquet(path: Path, name: str) -> StringTable:
    """A column of a parquet file as texts; what is missing is ""."""
    import pyarrow

    column_name = _called(name, _parquet().read_schema(path).names)
    column = _parquet().read_table(path, columns=[column_name]).column(0)
    texts = column.cast(pyarrow.large_string()).fill_null("").combine_chunks()
    if isinstance(texts, pyarrow.ChunkedArray):
        texts = pyarrow.concat_arrays(texts.chunks or [pyarrow.array([], pyarrow.large_string())])
    if not len(texts):
        return StringTable(())
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return StringTable.of_arrays(np.frombuffer(data or b"", np.uint8), ends)


def _called(name: str, columns: Sequence[str]) -> str:
    """The column of a table of clip-retrieval that is called ``name`` here."""
    return next((n for n in CLIP_RETRIEVAL.get(name, (name,)) if n in columns), name)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "the tables of clip-retrieval are read by pyarrow, which is missing: "
            "pip install -e '.[parquet]'"
        ) from error
    return pyarrow.parquet
