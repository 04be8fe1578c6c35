"""How features lie on disk: one file, numbered parts, or clip-retrieval's folder.

    DIR/img_emb/img_emb_0.npy  DIR/text_emb/text_emb_0.npy  DIR/metadata/metadata_0.csv or .parquet

Rows of the same place in parts of the same number belong together.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common.files import DataError, plural, printable
from protoclip.common.json_text import parse_json
from protoclip.common.strings import StringTable
from protoclip.features.identity import KEY, Identity
from protoclip.features.parts import SUFFIXES, in_order, open_part, part_numbers
from protoclip.features.rows import FeatureRows, StoredRows
from protoclip.features.table import FeatureTable

IMAGES = "img_emb"
TEXTS = "text_emb"
SIDES = {IMAGES: "images", TEXTS: "texts"}  # what flags, functions and the record call them
TABLES = "metadata"
RECORD = "encode.json"  # of protoclip encode: what the folder holds, and whether it is finished


@dataclass(frozen=True)
class FeatureFolder:
    """Features in clip-retrieval's layout. Row i of both sides and of the table is of one pair."""

    path: Path
    images: FeatureRows | None
    texts: FeatureRows | None
    table: FeatureTable | None  # what each row is of; None if the folder has no metadata


def open_features(spec: str | os.PathLike[str], side: str = "") -> FeatureRows:
    """Rows of features on disk, of any number. Opening reads headers only.

    The result has ``shape``, ``dtype``, ``len()``, ``keys`` (None, or a key for each row, read at
    first use), ``rows(start, stop)`` and ``take(positions)``, which return NumPy arrays [M, D],
    ``select(positions)``, which are rows on disk again, ``not_finite()``, the positions of rows
    with NaN or infinity, and ``digest()``, the checksum of all rows. Positions are integers or a
    mask.

    Args:
        spec: a .npy, .npz or .safetensors file; numbered .npy parts, as a folder or a pattern such
            as "d/part_*.npy", in natural order; or a folder that ``protoclip encode`` or
            clip-retrieval wrote. Numbers of any type and byte order.
        side: "images" or "texts" of such a folder; "": the images, if it has some.
    Raises:
        DataError: there are no such files, one is cut off, parts differ in columns or dtype, a
            number is missing, or the folder is unfinished. It is a ValueError.

    Example:
        >>> import numpy, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.npy"
        >>> numpy.save(path, numpy.arange(6, dtype=numpy.float16).reshape(3, 2))
        >>> rows = protoclip.open_features(path)
        >>> rows.shape, rows.dtype.name, rows.take([2, 0]).tolist()
        ((3, 2), 'float16', [[4.0, 5.0], [0.0, 1.0]])
    """
    text = os.fspath(spec)
    path = Path(text)
    if side not in ("", "images", "texts"):
        raise ValueError(f"side: expected images or texts, got {side!r}")
    if is_feature_folder(path):
        folder = open_folder(path)
        sides = {"images": folder.images, "texts": folder.texts}
        rows = sides[side or ("texts" if folder.images is None else "images")]
        if rows is None:
            raise DataError(f"{printable(text)}: the folder has no features of {side}")
        return rows
    if side:
        raise DataError(
            f"{printable(text)}: expected a folder with {IMAGES} and {TEXTS}, of which {side} are "
            "read; name a file or folder of rows itself"
        )
    if path.is_dir():
        if path.name in (IMAGES, TEXTS) and is_feature_folder(path.parent):
            return open_features(path.parent, SIDES[path.name])
        files = parts_in(path)
        problem = "expected numbered .npy files in it, found none"
    elif path.is_file():
        files = [path] if path.suffix in SUFFIXES else []
        problem = f"expected features in {', '.join(SUFFIXES)}; save them with numpy.save"
    else:
        files = in_order([Path(name) for name in glob.glob(text)], is_pattern=True)
        problem = "no such file or folder of features; check the path"
    if not files:
        raise DataError(f"{printable(text)}: {problem}")
    rows = StoredRows(text, [open_part(file) for file in files])
    if path.is_file() and path.suffix == ".npz":
        rows.identity = Identity(text, len(rows), partial(_column_of, path))
    return rows


def is_feature_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has clip-retrieval's layout, or will have it."""
    return any(os.path.exists(os.path.join(path, name)) for name in (IMAGES, TEXTS, RECORD))


def holds_features(spec: str) -> bool:
    """Whether ``open_features`` reads what a command line names, not pictures: a file of features,
    a folder of them, or a pattern."""
    path = Path(spec)
    if path.suffix in SUFFIXES:
        return True
    return path.is_dir() and (is_feature_folder(path) or next(path.glob("*.npy"), None) is not None)


def open_folder(path: str | os.PathLike[str]) -> FeatureFolder:
    """Open a folder that ``protoclip encode`` or clip-retrieval wrote.

    Raises:
        DataError: it is unfinished, or its parts do not fit together.
    """
    path = Path(path)
    shown = printable(str(path))
    record = read_record(path)
    if record and not record["finished"]:
        raise DataError(
            f"{shown}: the features are unfinished; this continues them: "
            f"{printable(str(record['command']))}"
        )
    sides = {side: files for side in SIDES if (files := parts_in(path / side))}
    if not sides:
        raise DataError(f"{shown}: expected .npy files in {IMAGES} or {TEXTS}, found none")
    tables = parts_in(path / TABLES, "*.csv") or parts_in(path / TABLES, "*.parquet")
    parts = {side: [open_part(file) for file in files] for side, files in sides.items()}
    first_files = next(iter(sides.values()))
    for side, files in sides.items():
        _check_numbers(shown, side, files, first_files)
    if len(parts) == 2:
        for image_part, text_part in zip(parts[IMAGES], parts[TEXTS], strict=True):
            if image_part.shape[0] != text_part.shape[0]:
                raise DataError(
                    f"{printable(str(text_part.path))}: expected "
                    f"{plural(image_part.shape[0], 'row')}, as in {image_part.path.name}, got "
                    f"{text_part.shape[0]:,}; rows of the same number must belong together"
                )
    counts = [part.shape[0] for part in next(iter(parts.values()))]
    table = None
    identity = Identity(shown, sum(counts))
    if tables:
        _check_numbers(shown, TABLES, tables, first_files)
        table = FeatureTable(tables, counts)
        identity = Identity(shown, sum(counts), table.column, partial(table.called, KEY))
    rows = {
        side: StoredRows(str(path / side), side_parts, identity)
        for side, side_parts in parts.items()
    }
    if IMAGES in rows:
        rows[IMAGES].are_images = True
    return FeatureFolder(path, rows.get(IMAGES), rows.get(TEXTS), table)


def parts_in(folder: Path, pattern: str = "*.npy") -> list[Path]:
    """The parts in a folder, in order; files of other programs that begin with a dot are none."""
    return in_order([file for file in folder.glob(pattern) if not file.name.startswith(".")])


def read_record(path: Path) -> dict[str, Any]:
    """What ``protoclip encode`` has written to a folder; {} if it wrote nothing there."""
    try:
        record = dict(parse_json((path / RECORD).read_text(encoding="utf-8")))
        if missing := {"finished", "command"} - record.keys():
            raise ValueError(f"it does not say {' and '.join(sorted(missing))}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        shown = printable(str(path / RECORD))
        raise DataError(f"{shown}: cannot be read ({error}); encode into a new folder") from error
    return record


def _check_numbers(shown: str, name: str, files: Sequence[Path], expected: Sequence[Path]) -> None:
    """DataError unless the files in the folder ``name`` have the numbers of those expected."""
    if part_numbers(files) != part_numbers(expected):
        raise DataError(
            f"{shown}: expected parts of the same numbers in {name} as in "
            f"{expected[0].parent.name}, got {plural(len(files), 'part')} ({files[0].name} to "
            f"{files[-1].name}) and {len(expected):,} ({expected[0].name} to {expected[-1].name}); "
            "copy or write the folder again"
        )


def _column_of(path: Path, name: str) -> StringTable | None:
    """The array ``keys`` of a .npz; None if there is none."""
    if name != KEY:
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "keys" not in arrays.files:
                return None
            keys = arrays["keys"]
    except Exception as error:
        raise DataError(f"{printable(str(path))}: its keys cannot be read ({error})") from error
    return StringTable(os.fsdecode(k) if isinstance(k, bytes) else str(k) for k in keys.tolist())
