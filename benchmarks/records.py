"""The record of a run: one JSON file, rewritten whole after each case, so a cut-off loses nothing.

``runs`` holds machine, versions, commit, date and ceilings of each run; ``rows`` one measured
case each, with the index of its run; ``skipped`` and ``failed`` the reasons. A run into an existing
file replaces the rows it measures again and keeps the others, so a record can be taken in pieces.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]
IDENTITY = ("op", "phase", "variant", "shape", "dtype", "sweep")


def load(path: str | Path) -> dict[str, Any]:
    """The record in ``path``.

    Raises:
        ValueError: the file is not a record of these benchmarks.
    """
    try:
        record = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: expected a record written by --record, got broken JSON ({error})"
        ) from None
    if not isinstance(record, dict) or not {"runs", "rows"} <= set(record):
        raise ValueError(f"{path}: expected a record written by --record, got other JSON")
    return record


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
        empty: dict[str, Any] = {"runs": [], "rows": [], "skipped": {}, "failed": {}}
        self.path = path
        self.data = load(path) if path is not None and path.exists() else empty
        self.data["runs"].append(run)
        self.run = len(self.data["runs"]) - 1

    def add(self, row: Row) -> None:
        row = row | {"run": self.run}
        kept = [old for old in self.data["rows"] if identity(old) != identity(row)]
        self.data["rows"] = [*kept, row]
        self._write()

    def refuse(self, kind: str, case: str, reason: str) -> None:
        """``kind``: "skipped" or "failed"."""
        self.data[kind][case] = reason
        self._write()

    def done(self, case: str) -> None:
        """``case`` passed: what an earlier run said of it no longer holds."""
        for kind in ("skipped", "failed"):
            self.data[kind].pop(case, None)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self._pruned(), indent=1) + "\n")
        os.replace(partial, self.path)

    def _pruned(self) -> dict[str, Any]:
        """Without runs none of whose rows are left; the present one stays."""
        used = sorted({row["run"] for row in self.data["rows"]} | {self.run})
        index = {old: new for new, old in enumerate(used)}
        rows = [row | {"run": index[row["run"]]} for row in self.data["rows"]]
        return self.data | {"runs": [self.data["runs"][old] for old in used], "rows": rows}
