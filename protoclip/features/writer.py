"""Writing a folder of features part by part, so that a stopped program loses little.

A part's rows come first and its table last, so a part with a table is whole. What is encoded of a
part that is not whole, or of one that is no longer valid, lies in pieces, DIR/.unfinished/*.npz.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common.files import DataError, whole_file, write_atomic
from protoclip.common.json_text import parse_json
from protoclip.features.layout import IMAGES, RECORD, TABLES, TEXTS, in_order
from protoclip.features.table import CAPTION, FILE, KEY, STATE, read_csv, write_csv_table

PAIRS_IN_PART = 16_384
UNFINISHED = ".unfinished"
State = tuple[str, str]  # of a picture: its key, and the state of the file that holds it


@dataclass(frozen=True)
class Piece:
    """Some rows of a folder, in order. Rows of one picture have the same key."""

    columns: Mapping[str, Sequence[str]]  # of the table: key, file, state, caption, labels
    images: np.ndarray | None  # [M, D]
    texts: np.ndarray | None  # [M, D]
    reasons: Mapping[State, str] = field(default_factory=dict)  # of pictures without rows


class PartFolder:
    """The parts of a folder, each by its number. ``count``: how many there will be."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.digits = len(str(count - 1))  # embedding-reader sorts parts by name

    def file(self, kind: str, number: int) -> Path:
        """The path of a part's rows (``IMAGES``, ``TEXTS``) or of its table (``TABLES``)."""
        ending = "csv" if kind == TABLES else "npy"
        return self.path / kind / f"{kind}_{number:0{self.digits}}.{ending}"

    def write(self, number: int, piece: Piece) -> None:
        """Write a part; its table, which says that it is whole, is renamed last."""
        for kind, rows in ((IMAGES, piece.images), (TEXTS, piece.texts)):
            if rows is not None:
                _write_npy(self.file(kind, number), rows)
        table = self.file(TABLES, number)
        table.parent.mkdir(exist_ok=True)
        write_parquet(table.with_suffix(".parquet"), piece.columns)
        write_csv_table(table, piece.columns)

    def tables(self) -> list[Path]:
        """The tables of the whole parts, in natural order."""
        with contextlib.suppress(DataError):  # a number may be missing while parts are written
            return in_order(list((self.path / TABLES).glob("*.csv")))
        return sorted((self.path / TABLES).glob("*.csv"))

    def set_aside(self, table: Path) -> None:
        """Make a piece of the part of a table, which is no longer valid as a part."""
        ending = table.stem.removeprefix(TABLES)  # _0
        files = {side: self.path / side / f"{side}{ending}.npy" for side in (IMAGES, TEXTS)}
        with contextlib.suppress(DataError, OSError, ValueError):  # damaged: encoded again
            columns = {name: list(read_csv(table, name)) for name in (KEY, STATE, CAPTION)}
            rows = {side: np.load(file) for side, file in files.items() if file.exists()}
            if all(len(side_rows) == len(columns[KEY]) for side_rows in rows.values()):
                earlier = list((self.path / UNFINISHED).glob("before-*"))
                piece = Piece(columns, rows.get(IMAGES), rows.get(TEXTS))
                self.write_piece(f"before-{len(earlier):06}", piece)
        for file in (table, table.with_suffix(".parquet"), *files.values()):
            file.unlink(missing_ok=True)

    def write_piece(self, name: str, piece: Piece) -> Path:
        """Write a piece, whole or not at all."""
        folder = self.path / UNFINISHED
        folder.mkdir(exist_ok=True)
        left_out = [[*state, reason] for state, reason in piece.reasons.items()]
        arrays = {
            name: np.array(piece.columns.get(name, ()), dtype=np.str_)
            for name in (KEY, STATE, CAPTION)
        }
        sides = {IMAGES: piece.images, TEXTS: piece.texts}
        arrays |= {side: rows for side, rows in sides.items() if rows is not None}
        path = folder / f"{name}.npz"
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, left_out=np.array(json.dumps(left_out)), **arrays)  # type: ignore[arg-type]
        return path

    def remove_pieces(self) -> None:
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove every part and piece."""
        for kind in (TABLES, IMAGES, TEXTS):
            shutil.rmtree(self.path / kind, ignore_errors=True)
        self.remove_pieces()

    def write_record(self, record: Mapping[str, Any]) -> None:
        write_atomic(self.path / RECORD, json.dumps(record, indent=1) + "\n")


class Kept:
    """What the pieces of a folder hold, by picture and by caption.

    ``reasons``: why pictures were left out, beyond those that the pieces name.
    """

    def __init__(self, folder: PartFolder, reasons: Mapping[State, str]) -> None:
        self.reasons = dict(reasons)
        self._image_places: dict[State, tuple[Path, int]] = {}
        self._text_places: dict[str, tuple[Path, int]] = {}
        for path in sorted((folder.path / UNFINISHED).glob("*.npz")):
            with np.load(path, allow_pickle=False) as arrays:
                pictures = list(zip(arrays[KEY].tolist(), arrays[STATE].tolist(), strict=True))
                captions = arrays[CAPTION].tolist()
                left_out = parse_json(str(arrays["left_out"]))
                names = arrays.files
            self.reasons |= {(key, state): reason for key, state, reason in left_out}
            if IMAGES in names:
                self._image_places |= {
                    name: (path, row) for row, name in enumerate(pictures) if name[1]
                }
            if TEXTS in names:
                self._text_places |= {name: (path, row) for row, name in enumerate(captions)}

    def image_rows(self, pictures: Sequence[State]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Positions in ``pictures`` [M] and their rows [M, D], for those that were encoded as they
        are now."""
        return self._rows(IMAGES, self._image_places, pictures)

    def text_rows(self, captions: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Positions in ``captions`` [M] and their rows [M, D], for those that were encoded."""
        return self._rows(TEXTS, self._text_places, captions)

    @staticmethod
    def _rows(
        side: str, places: Mapping[Any, tuple[Path, int]], wanted: Sequence[Any]
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        by_file: dict[Path, tuple[list[int], list[int]]] = {}
        for position, name in enumerate(wanted):
            if name in places:
                path, row = places[name]
                positions, rows_of_file = by_file.setdefault(path, ([], []))
                positions.append(position)
                rows_of_file.append(row)
        for path, (positions, rows_of_file) in by_file.items():
            with np.load(path, allow_pickle=False) as arrays:
                yield positions, arrays[side][rows_of_file]


def write_parquet(path: Path, columns: Mapping[str, Sequence[str]]) -> None:
    """Write a part's table under clip-retrieval's names, if pyarrow is installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    names = {FILE: "image_path"}
    table = {
        names.get(name, name): pyarrow.array([_utf8(text) for text in texts], pyarrow.string())
        for name, texts in columns.items()
        if name != STATE
    }
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(table), temporary)


def _utf8(text: str) -> str:
    """A text without the bytes of names that are not UTF-8, which parquet cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _write_npy(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows)
