"""Pairs listed in a CSV or TSV file, with OpenCLIP's three options."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from protoclip.data.images import decode
from protoclip.data.strings import StringTable
from protoclip.data.tar_index import MAX_CAPTION
from protoclip.data.types import DataError, Labels

CHECKED = 10_000  # files looked for at the start; beyond, a missing one is found when it is read


class CsvDataset:
    """One pair per row: the path of a picture and its caption.

    Args:
        path: the table, UTF-8, first row the column names.
        separator: between columns, one character (OpenCLIP's default: a tab).
        img_key: column of the paths; a relative path counts from the working directory (as in
            OpenCLIP) or, if nothing is there, from the table's folder.
        caption_key: column of the captions, each cut to ``MAX_CAPTION`` characters.
    Raises:
        DataError: the file, a column, a caption or a picture is missing; the row is named.
    """

    labels: Mapping[str, Labels] = {}

    def __init__(
        self,
        path: str | Path,
        separator: str = "\t",
        img_key: str = "filepath",
        caption_key: str = "title",
    ) -> None:
        self.name = str(path)
        self.folder = os.path.dirname(os.path.abspath(path))
        captions: list[str] = []
        files: list[str] = []
        for number, file, caption in _rows(self.name, separator, img_key, caption_key):
            if not caption:
                raise DataError(
                    f"{self.name}, line {number}: the caption (column {caption_key!r}) is empty; "
                    "remove the row or write a caption"
                )
            if len(files) < CHECKED and not os.path.isfile(self._find(file)):
                places = " nor from ".join(dict.fromkeys((os.getcwd(), self.folder)))
                raise DataError(
                    f"{self.name}, line {number}: no picture at {file!r} as seen from {places}; "
                    f"correct column {img_key!r} or remove the row"
                )
            files.append(file)
            captions.append(caption)
        if not files:
            raise DataError(f"{self.name}: the table has no rows below its header; add some")
        self._files = StringTable(files)
        self._captions = StringTable(captions)
        self.keys: Sequence[str] = (
            self._files if len(set(files)) == len(files) else StringTable(_numbered(files))
        )

    def __len__(self) -> int:
        return len(self._files)

    def captions(self, i: int) -> tuple[str, ...]:
        return (self._captions[i],)

    def path(self, i: int) -> str:
        """Where picture ``i`` is."""
        return self._find(self._files[i])

    def image(self, i: int) -> Image.Image:
        file = self.path(i)
        where = f"{self.name}, pair {i + 1}, {file}"
        try:
            with open(file, "rb") as stream:
                data = stream.read()
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{where}: {reason}; correct the path or remove the row") from error
        return decode(data, where)

    def _find(self, file: str) -> str:
        beside = os.path.join(self.folder, file)  # an absolute path stays as it is
        return file if beside == file or os.path.exists(file) else beside


def _numbered(files: Sequence[str]) -> Iterator[str]:
    """Keys for pictures that are listed several times: the second is "path#2"."""
    seen: dict[str, int] = {}
    for file in files:
        seen[file] = seen.get(file, 0) + 1
        yield file if seen[file] == 1 else f"{file}#{seen[file]}"


def _rows(
    name: str, separator: str, img_key: str, caption_key: str
) -> Iterator[tuple[int, str, str]]:
    """Line number, path and stripped caption of each row."""
    separator = "\t" if separator == "\\t" else separator  # as a shell passes "\t"
    if len(separator) != 1:
        raise DataError(f"--csv-separator must be one character, got {separator!r}")
    try:
        with open(name, encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=separator)
            header = next(reader, [])
            if not header:
                raise DataError(
                    f"{name}: the file is empty; expected a first row with the column names"
                )
            image, text = (
                _column(name, header, separator, key, flag)
                for key, flag in ((img_key, "img"), (caption_key, "caption"))
            )
            for row in reader:
                if not any(row):
                    continue  # a blank line
                if len(row) <= max(image, text):
                    raise DataError(
                        f"{name}, line {reader.line_num}: {len(row)} columns where the header has "
                        f"{len(header)}; complete the row, or quote values that contain the "
                        "separator or a line break"
                    )
                yield reader.line_num, row[image], row[text].strip()[:MAX_CAPTION]
    except FileNotFoundError as error:
        raise DataError(f"no file {name!r}; check the path") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error}); convert it, e.g. with iconv") from error
    except csv.Error as error:
        raise DataError(
            f"{name}, line {reader.line_num}: {error}; look for an unclosed quote there"
        ) from error


def _column(name: str, header: list[str], separator: str, key: str, flag: str) -> int:
    if key in header:
        return header.index(key)
    other = next((s for s in "\t,;|" if s != separator and any(s in h for h in header)), None)
    hint = f"--csv-separator '{other}'" if other else f"--csv-{flag}-key NAME"
    raise DataError(
        f"{name}: no column {key!r} when split at {separator!r}; the columns are {header}; "
        f"perhaps {hint}"
    )
