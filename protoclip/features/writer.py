"""Writing a folder of features part by part, so that a stopped program loses little.

A part's rows come first and its table last, so a part with a table is whole. What is encoded of a
part that is not whole, or of one that is no longer valid, lies in pieces, DIR/.unfinished/*.npz.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common.files import whole_file, write_atomic
from protoclip.common.json_text import parse_json
from protoclip.features.layout import IMAGES, RECORD, TABLES, TEXTS, read_record
from protoclip.features.table import CAPTION, FILE, KEY, STATE, read_csv, write_csv_table

PAIRS_IN_PART = 16_384
UNFINISHED = ".unfinished"
NAMES = (KEY, STATE, CAPTION)  # of the columns that a piece has
REASONS = "left_out"  # in a piece and in the record: key, state and reason of pictures without rows
State = tuple[str, str]  # of a picture: its key, and the state of the file that holds it
Columns = Mapping[str, Sequence[str]]  # of a table: key, file, state, caption, labels
Sides = Mapping[str, np.ndarray]  # of IMAGES, TEXTS or both, the rows [M, D]


class PartFolder:
    """The parts of a folder, ``count`` of them. A part is named by its number in file names."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        digits = len(str(count - 1))  # embedding-reader sorts parts by name
        self.parts = [f"{number:0{digits}}" for number in range(count)]

    def file(self, kind: str, part: str) -> Path:
        """The path of a part's rows (``IMAGES``, ``TEXTS``) or of its table (``TABLES``)."""
        return self.path / kind / f"{kind}_{part}.{'csv' if kind == TABLES else 'npy'}"

    def parts_on_disk(self) -> list[str]:
        """The parts that have any file."""
        files = (
            file for kind in (IMAGES, TEXTS, TABLES) for file in (self.path / kind).glob("*_*")
        )
        return sorted({file.stem.rpartition("_")[2] for file in files})

    def write(self, part: str, columns: Columns, sides: Sides) -> None:
        """Write a part; its table, which says that it is whole, is renamed last."""
        for side, rows in sides.items():
            _write_npy(self.file(side, part), rows)
        table = self.file(TABLES, part)
        table.parent.mkdir(exist_ok=True)
        write_parquet(table.with_suffix(".parquet"), columns)
        write_csv_table(table, columns)

    def set_aside(self, part: str) -> None:
        """Make a piece of a part that is not valid, and remove its files."""
        table = self.file(TABLES, part)
        files = {side: self.file(side, part) for side in (IMAGES, TEXTS)}
        sides = {}
        with contextlib.suppress(FileNotFoundError, EOFError, ValueError):  # not whole, or damaged
            columns = {name: list(read_csv(table, name)) for name in NAMES}
            sides = {side: np.load(file) for side, file in files.items() if file.exists()}
        if sides and all(len(rows) == len(columns[KEY]) for rows in sides.values()):
            self.write_piece(f"before_{part}", columns, sides)
        for file in (table, table.with_suffix(".parquet"), *files.values()):
            file.unlink(missing_ok=True)

    def write_piece(
        self, of: str, columns: Columns, sides: Sides, left_out: Sequence[Sequence[str]] = ()
    ) -> Path:
        """Write a piece, whole or not at all."""
        folder = self.path / UNFINISHED
        folder.mkdir(exist_ok=True)
        paths = (folder / f"{of}-{number:06}.npz" for number in itertools.count())
        path = next(path for path in paths if not path.exists())
        lists = {name: list(columns.get(name, ())) for name in NAMES} | {REASONS: left_out}
        # An array of texts would give each the space of the longest.
        arrays = {name: np.array(json.dumps(values)) for name, values in lists.items()}
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, **sides)  # type: ignore[arg-type]
        return path

    def remove_all(self) -> None:
        """Remove every part and piece."""
        for kind in (TABLES, IMAGES, TEXTS, UNFINISHED):
            if (self.path / kind).exists():
                shutil.rmtree(self.path / kind)

    def write_record(self, record: Mapping[str, Any]) -> None:
        write_atomic(self.path / RECORD, json.dumps(record, indent=1) + "\n")


class Kept:
    """What the pieces of a folder hold, by picture and by caption, and why pictures are left out as
    long as their files stay as they are, by the pieces and the record."""

    def __init__(self, path: Path) -> None:
        left_out = read_record(path)[REASONS]
        self._places: dict[str, dict[Any, tuple[Path, int]]] = {IMAGES: {}, TEXTS: {}}
        for piece in sorted((path / UNFINISHED).glob("*.npz")):
            with np.load(piece, allow_pickle=False) as arrays:
                lists = {name: _list_of(arrays[name]) for name in (*NAMES, REASONS)}
                left_out += lists[REASONS]
                pictures = zip(lists[KEY], lists[STATE], strict=True)
                for side, names in ((IMAGES, pictures), (TEXTS, lists[CAPTION])):
                    if side in arrays.files:
                        self._places[side] |= {name: (piece, i) for i, name in enumerate(names)}
        self.reasons: dict[State, str] = {(key, s): reason for key, s, reason in left_out if s}

    def rows(self, side: str, names: Iterable[Any]) -> dict[Any, np.ndarray]:
        """The rows [D] of those pictures (``IMAGES``) or captions (``TEXTS``) that were encoded as
        they are now."""
        places = self._places[side]
        by_file: dict[Path, list[Any]] = {}
        for name in dict.fromkeys(names):
            if name in places and (side == TEXTS or name[1]):  # without a state it may be another
                by_file.setdefault(places[name][0], []).append(name)
        rows: dict[Any, np.ndarray] = {}
        for path, of_file in by_file.items():
            with np.load(path, allow_pickle=False) as arrays:
                taken = arrays[side][[places[name][1] for name in of_file]]
            rows |= zip(of_file, taken, strict=True)
        return rows


def _list_of(array: np.ndarray) -> list[Any]:
    """A list that ``write_piece`` wrote, now as JSON, before as an array of texts."""
    value = array.tolist()
    return parse_json(value) if isinstance(value, str) else value


def write_parquet(path: Path, columns: Columns) -> None:
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
    header = np.lib.format.header_data_from_array_1_0(rows)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(rows.reshape(-1).view(np.uint8).data)  # np.save does not name a full disk
