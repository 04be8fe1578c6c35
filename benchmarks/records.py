"""The record of a run: one JSON file, rewritten whole after each case, so a cut-off loses nothing.

``runs`` holds machine, versions, commit, date and ceilings of each run; ``rows`` one measured case
each, with the index of its run. A run into an existing file replaces the rows it measures again and
keeps the others, so a record can be taken in pieces.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
IDENTITY = ("op", "phase", "variant", "shape", "dtype", "sweep")  # the last in older records


def load(path: str | Path) -> dict[str, Any]:
    """The record in ``path``."""
    return json.loads(Path(path).read_text())


def between(path: Path, begin: str, end: str) -> tuple[str, str, str]:
    """What stands before, between and after two marks of a page.

    Raises:
        ValueError: the marks are not there once each.
    """
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path}: expected the lines {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    middle, after = rest.split(end)
    return before, middle.strip(), after


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, after = between(path, begin, end)
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def identity(row: Row) -> str:
    """What makes two rows the same case and variant."""
    return json.dumps([row.get(key) for key in IDENTITY])


def case_of(row: Row) -> str:
    """What the variants of one case share."""
    return json.dumps([row.get(key) for key in IDENTITY if key != "variant"])


class Record:
    """A record being written; without a path it is only kept in memory."""

    def __init__(self, path: Path | None, run: dict[str, Any]):
        found = load(path) if path is not None and path.exists() else {"runs": [], "rows": []}
        self.path, self.runs, self.rows = path, [*found["runs"], run], found["rows"]

    def add(self, row: Row) -> None:
        """Take a row in, and drop runs none of whose rows are left."""
        kept = [old for old in self.rows if identity(old) != identity(row)]
        self.rows = [*kept, row | {"run": len(self.runs) - 1}]
        used = sorted({row["run"] for row in self.rows})
        self.runs = [self.runs[old] for old in used]
        self.rows = [row | {"run": used.index(row["run"])} for row in self.rows]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n")
            os.replace(partial, self.path)
