"""The table beside stored features: what each row is of. A column is read when it is asked for."""

from __future__ import annotations

import csv
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common.files import DataError, plural, printable, write_csv
from protoclip.common.strings import StringTable
from protoclip.features.identity import CAPTION, FILE, KEY

STATE = "state"  # of that file when the row was encoded
LABEL = "label:"  # before the name of a classification; its column has the row's class or ""
# What clip-retrieval's tables call them; the first that a table has.
CLIP_RETRIEVAL = {KEY: ("key", "image_path"), FILE: ("image_path",), CAPTION: ("caption",)}
FORMULA = "=+-@'"  # a cell that begins so gets a ' before it, or spreadsheets would compute it
NO_RETURN, NO_NUL = "\ud800", "\ud801"  # which no decoded text contains


class FeatureTable:
    """The columns of numbered tables, .csv of our own or .parquet of clip-retrieval, as one.

    Args:
        paths: the tables, one for each part of the features.
        counts: the number of rows of each part.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]) -> None:
        self.paths = paths
        self.counts = counts

    @functools.cached_property
    def names(self) -> Mapping[str, str]:
        """What the tables call each of their columns, by its name here."""
        if self.paths[0].suffix == ".parquet":
            theirs = _parquet().read_schema(self.paths[0]).names
            known = {
                name: next((column for column in columns if column in theirs), "")
                for name, columns in CLIP_RETRIEVAL.items()
            }
            return {name: name for name in theirs} | {n: c for n, c in known.items() if c}
        with open(self.paths[0], encoding="utf-8", errors="surrogateescape", newline="") as file:
            return {name: name for name in next(csv.reader(file), ())}

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classifications: each has the column "label:NAME"."""
        return tuple(n.removeprefix(LABEL) for n in self.names if n.startswith(LABEL))

    def called(self, name: str) -> str:
        """What the tables call a column."""
        return self.names.get(name, name)

    def column(self, name: str) -> StringTable | None:
        """A column of texts, one for each row; None if the table has no such column.

        Raises:
            DataError: a table cannot be read, or has another number of rows than its features.
        """
        if name not in self.names:
            return None
        read = read_parquet if self.paths[0].suffix == ".parquet" else read_csv
        texts = []
        for path, count in zip(self.paths, self.counts, strict=True):
            shown = printable(str(path))
            try:
                column = read(path, self.names[name])
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
    cells = [[_safe(text) for text in texts] for texts in columns.values()]
    write_csv(path, list(columns), zip(*cells, strict=True), line_end="\n")


def _safe(text: str) -> str:
    return f"'{text}" if text.startswith(tuple(FORMULA)) else text


def read_csv(path: Path, name: str) -> StringTable:
    """A column of a table that ``write_csv_table`` wrote.

    Raises:
        DataError: the table is damaged. A ValueError without this type: it has no such column.
    """
    shown = printable(str(path))
    limit = csv.field_size_limit(sys.maxsize)  # by default 131,072 characters
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            rows = csv.reader(_lines(file), strict=True)
            header = next(rows, [])
            number = header.index(name)

            def cells() -> Iterator[str]:
                for row in rows:
                    if len(row) != len(header):
                        raise csv.Error(f"expected {plural(len(header), 'cell')} in each line")
                    cell = row[number].removeprefix("'")
                    yield cell.replace(NO_RETURN, "\r").replace(NO_NUL, "\0")

            return StringTable(cells())
    except csv.Error as error:
        raise DataError(f"{shown}: {error}; has another program changed the table?") from error
    finally:
        csv.field_size_limit(limit)


def _lines(file: Iterable[str]) -> Iterator[str]:
    """The lines of a table, without the characters that the csv module does not read in a cell
    without quotes, although Python 3.11 and older write them there."""
    for line in file:
        if not line.endswith("\n"):
            raise csv.Error("expected a line break at the end")
        yield line.replace("\r", NO_RETURN).replace("\0", NO_NUL)


def read_parquet(path: Path, name: str) -> StringTable:
    """A column of a parquet file as texts; what is missing is ""."""
    import pyarrow

    column = _parquet().read_table(path, columns=[name]).column(0)
    texts = column.cast(pyarrow.large_string()).fill_null("").combine_chunks()
    if isinstance(texts, pyarrow.ChunkedArray):
        texts = pyarrow.concat_arrays(texts.chunks or [pyarrow.array([], pyarrow.large_string())])
    if not len(texts):
        return StringTable(())
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return StringTable.of_arrays(np.frombuffer(data or b"", np.uint8), ends)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "the tables of clip-retrieval are read by pyarrow, which is missing: "
            "pip install -e '.[parquet]'"
        ) from error
    return pyarrow.parquet
