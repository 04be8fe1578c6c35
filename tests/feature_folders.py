"""Features on disk, in several files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from protoclip.features.table import write_csv_table

PARTS = (4, 0, 1, 11, 7)  # rows


def write_parts(folder: Path, rows: np.ndarray, name: str = "part_", width: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, count in enumerate(PARTS):
        np.save(folder / f"{name}{number:0{width}}.npy", rows[start : start + count])
        start += count
    return folder


def write_folder(folder: Path, rows: np.ndarray, keys: list[str]) -> Path:
    """A folder in clip-retrieval's layout, the text rows being twice the image rows."""
    write_parts(folder / "img_emb", rows, "img_emb_")
    write_parts(folder / "text_emb", 2 * rows, "text_emb_")
    (folder / "metadata").mkdir()
    start = 0
    for number, count in enumerate(PARTS):
        part = keys[start : start + count]
        columns = {
            "key": part,
            "file": [f"{key}.png" for key in part],
            "state": ["1:2"] * count,
            "caption": [f'a "{key}",\nsecond line' for key in part],
            "label:group": ["x" if key < "m" else "" for key in part],
        }
        write_csv_table(folder / "metadata" / f"metadata_{number}.csv", columns)
        start += count
    return folder
