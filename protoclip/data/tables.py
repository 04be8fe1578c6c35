"""Pairs listed in a CSV or TSV file, with OpenCLIP's three options."""

from __future__ import annotations

import codecs
import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from protoclip.common.files import DataError, kind_of, read_file
from protoclip.common.strings import StringTable
from protoclip.data.images import decode
from protoclip.data.types import BadSample, Facts, PairDataset

CHECKED = 10_000  # files checked at the start; later ones are checked when they are read
MAX_CAPTION = 10_000  # characters kept of one caption; a model sees the first few hundred


class BadRow(NamedTuple):
    """A row that is not a pair, and what it lacks."""

    line: int
    lacks: str  # picture or caption
    fault: str  # with what to do


def counted(bad: Sequence[BadRow], total: int) -> str:
    """How many of the rows of a table are bad, with the first of each kind."""
    parts = []
    for lacks, count in Counter(row.lacks for row in bad).items():
        first = next(row for row in bad if row.lacks == lacks)
        fault = first.fault.partition(";")[0]
        have = "has" if count == 1 else "have"
        where = f"first: line {first.line}, {fault}"
        parts.append(f"{count:,} of {total:,} rows {have} no {lacks} ({where})")
    return " and ".join(parts)


class CsvDataset(PairDataset):
    """One pair per row: the path of a picture and its caption.

    Args:
        path: the table, first row the column names.
        keep_going: collect bad rows in ``facts.skipped`` instead of raising, and check all picture
            paths now.
        skip_bad: the same, but only say in ``facts.left_out`` how many there are.
        csv_separator: between columns, one character. The default, OpenCLIP's, is a tab; a table
            without a tab in its first line is split at commas, semicolons or bars.
        csv_img_key: column of the paths; a relative path starts at the working directory (as in
            OpenCLIP) or, if no file is there, at the table's folder.
        csv_caption_key: column of the captions, each cut to ``MAX_CAPTION`` characters.
        csv_encoding: encoding of the table, any that Python knows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keep_going: bool = False,
        csv_separator: str = "\t",
        csv_img_key: str = "filepath",
        csv_caption_key: str = "title",
        csv_encoding: str = "utf-8",
        skip_bad: bool = False,
    ) -> None:
        self.name = str(path)
        self.folder = os.path.dirname(os.path.abspath(path))
        bad: list[BadRow] = []
        rows: list[list[str]] = []
        columns = (csv_img_key, csv_caption_key)
        for number, row, fault in read_table(self.name, columns, csv_separator, csv_encoding):
            look = keep_going or skip_bad or bad or len(rows) < CHECKED
            lacks = "columns"
            if fault and not keep_going:  # an open quote may hold any number of rows
                raise DataError(f"{self.name}, line {number}: {fault}")
            if not fault and not row[1].strip():
                lacks = "caption"
                fault = "the caption is empty; remove the row or write a caption"
            elif not fault and look and not os.path.isfile(self._find(row[0])):
                lacks = "picture"
                places = " nor from ".join(dict.fromkeys((os.getcwd(), self.folder)))
                fault = f"no picture at {row[0]!r} starting from {places}; correct the path"
            if fault:
                bad.append(BadRow(number, lacks, fault))
            else:
                rows.append(row)
        if not rows and not bad:
            raise DataError(f"{self.name}: the table has no rows below its header; add some")
        if keep_going:
            samples = [BadSample(f"{self.name}, line {row.line}", "", row.fault) for row in bad]
            self.facts = Facts(skipped=samples)
        elif bad:
            counts = counted(bad, len(bad) + len(rows))
            if not skip_bad or not rows:
                raise DataError(
                    f"{self.name}: {counts}; fix them, or leave them out with --skip-bad "
                    "(protoclip data --check lists them)"
                )
            self.facts = Facts(left_out=[f"{self.name}: left out, as {counts}"])
        self._files = StringTable(file for file, _ in rows)
        self._captions = StringTable(text.strip()[:MAX_CAPTION] for _, text in rows)
        self.keys: Sequence[str] = StringTable(_numbered(file for file, _ in rows))

    def __len__(self) -> int:
        return len(self._files)

    def captions(self, i: int) -> tuple[str, ...]:
        return (self._captions[i],)

    def path(self, i: int) -> str:
        """The path of picture ``i``."""
        return self._find(self._files[i])

    def picture_numbers(self) -> np.ndarray:
        """The same number where rows name the same file."""
        numbers: dict[str, int] = {}
        files = map(os.path.normpath, self._files)
        return np.array([numbers.setdefault(file, len(numbers)) for file in files])

    def image(self, i: int) -> Image.Image:
        path = self.path(i)
        where = f"{self.name}, pair {i + 1}, {path}"
        try:
            return decode(read_file(path), where)
        except DataError:
            raise
        except (OSError, ValueError) as error:  # a path with NUL is a ValueError
            message = f"{where}: {error}; correct the path or remove the row"
            raise kind_of(error)(message) from error

    def _find(self, file: str) -> str:
        beside = os.path.join(self.folder, file)  # an absolute path stays as it is
        return file if beside == file or os.path.exists(file) else beside


def _numbered(files: Iterator[str]) -> Iterator[str]:
    """Keys for pictures, all different; if a path occurs several times, its second key is
    "path#2", unless that is taken."""
    seen: dict[str, int] = {}
    for file in files:
        key = file
        while key in seen:
            seen[file] += 1
            key = f"{file}#{seen[file]}"
        seen[key] = 1
        yield key


def _noted(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    """The lines, each of which is added to ``record`` first."""
    for line in lines:
        record.append(line)
        yield line


def _fault(
    row: Sequence[str], record: Sequence[str], separator: str, columns: int, needed: int
) -> str:
    """What is wrong with a row, which was read from the lines of ``record``; "" if nothing is. The
    table has so many columns, of which the first ``needed`` hold all that is wanted."""
    if len(record) > 1:  # only quotes do that
        try:
            list(csv.reader(record, delimiter=separator, strict=True))
        except csv.Error as error:
            return (
                f"a quote that is not closed makes one row of {len(record):,} lines ({error}); "
                "close it, or write it twice"
            )
    if len(row) < needed or any(row[columns:]):
        return (
            f"{len(row)} columns where the header has {columns}; complete the row, or quote values "
            "that contain the separator or a line break"
        )
    if separator == "\t" and any("\t" in cell and "\n" in cell for cell in row):
        return "a value holds tabs and line breaks; close the quote that it begins with"
    return ""


def read_table(
    name: str, columns: Sequence[str], separator: str = "\t", encoding: str = "utf-8"
) -> Iterator[tuple[int, list[str], str]]:
    """Yield line number, values of ``columns``, and the fault or "" of each row but blank ones."""
    separator = "\t" if separator == "\\t" else separator  # a shell passes "\t" like this
    if len(separator) != 1:
        raise DataError(f"--csv-separator: expected one character, got {separator!r}")
    try:
        # With or without a byte order mark.
        codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        with open(name, encoding=codec, newline="") as lines:
            reader = csv.reader(lines, delimiter=separator)
            header = next(reader, [])
            if (
                separator == "\t" and len(header) == 1
            ):  # two columns at least: no tab separates them
                separator = next((c for c in ",;|" if c in header[0]), separator)
            lines.seek(0)
            record: list[str] = []  # the lines of the row that the reader gave last
            reader = csv.reader(_noted(lines, record), delimiter=separator)
            header = next(reader, [])
            if missing := [column for column in columns if column not in header]:
                flags = "--csv-img-key and --csv-caption-key"
                if len(columns) == 1:
                    flags = "--csv-label-key"
                raise DataError(
                    f"{name}: no column {' nor '.join(map(repr, missing))} when split at "
                    f"{separator!r}; the columns are {header}; name them with {flags}, or the "
                    "separator with --csv-separator"
                )
            places = [header.index(column) for column in columns]
            record.clear()
            for row in reader:
                fault = _fault(row, record, separator, len(header), 1 + max(places))
                record.clear()
                if any(row):
                    values = [] if fault else [row[place] for place in places]
                    yield reader.line_num, values, fault
    except LookupError as error:
        raise DataError(
            f"--encoding: expected one that Python knows, such as latin-1 or utf-16, got "
            f"{encoding!r}"
        ) from error
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}; check the path") from error
    except UnicodeError as error:
        remedy = "name its encoding with --encoding, such as latin-1 or utf-16"
        raise DataError(f"{name}: not {encoding.upper()} ({error}); {remedy}") from error
    except csv.Error as error:
        yield reader.line_num, [], f"{error}; look for an unclosed quote there"
