"""Features on disk, in several files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from protoclip.features.table import write_csv_table

PARTS = (4, 0, 1, 11, 7)  # rows


def write_parts(
    folder: Path, rows: np.ndarray, name: str = "part_", parts: Sequence[int] = PARTS
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.split(rows, np.cumsum(parts)[:-1])):
        np.save(folder / f"{name}{number}.npy", part)
    return folder


def write_layout(
    folder: Path,
    sides: Mapping[str, np.ndarray],
    columns: Mapping[str, Sequence[str | None]],
    parts: Sequence[int] = (),
    ending: str = "csv",
) -> Path:
    """A folder in clip-retrieval's layout with a table of these columns; one part by default."""
    for side, rows in sides.items():
        write_parts(folder / side, rows, f"{side}_", parts or [len(rows)])
    (folder / "metadata").mkdir()
    starts = np.cumsum(parts)[:-1]
    arrays = {name: np.split(np.array(cells, object), starts) for name, cells in columns.items()}
    for number in range(max(1, len(parts))):
        table = folder / "metadata" / f"metadata_{number}.{ending}"
        part = {name: of_part[number].tolist() for name, of_part in arrays.items()}
        if ending == "csv":
            write_csv_table(table, part)
        else:
            parquet, pyarrow = map(pytest.importorskip, ("pyarrow.parquet", "pyarrow"))
            cells = {name: pyarrow.array(texts, pyarrow.string()) for name, texts in part.items()}
            parquet.write_table(pyarrow.table(cells), table)
    return folder


def write_folder(folder: Path, rows: np.ndarray, keys: Sequence[str]) -> Path:
    """A folder in five parts, the text rows being twice the image rows."""
    columns = {
        "key": keys,
        "file": [f"{key}.png" for key in keys],
        "state": ["1:2"] * len(keys),
        "caption": [f'a "{key}",\nsecond line' for key in keys],
        "label:group": ["x" if key < "m" else "" for key in keys],
    }
    return write_layout(folder, {"img_emb": rows, "text_emb": 2 * rows}, columns, PARTS)
