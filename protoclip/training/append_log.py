"""A file of lines that only grows, survives a full disk, and can be cut back to a step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from protoclip.data.files import write_atomic

SHOWN = 5  # lines that are said where they cannot be written


class AppendLog:
    """Appends whole lines; lines that do not fit on the disk wait in memory for the next try.

    Args:
        path: of the file, made if missing.
        warn: told once, in words, when the disk refuses, and at the end where it still does.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self._warn = path, warn
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._waiting = b""
        self._warned = False

    def write(self, line: str) -> None:
        """Append one line; the end of line is added."""
        self._waiting += line.encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        left = self._waiting
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(end)  # no part of a line: the file must stay readable
            if not self._warned:
                self._warned = True
                self._warn(
                    f"{self.path}: {error.strerror}; its lines wait in memory, make room on the "
                    "disk"
                )
            return
        self._waiting = b""

    def sync(self) -> None:
        """Put what is written on the disk."""
        self._flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what waits, or say the last of it where there is still no room."""
        if self._file.closed:
            return
        self._flush()
        self._file.close()
        if lines := self._waiting.decode().splitlines():
            self._warn(
                f"{self.path}: no room on the disk to the end, {len(lines)} lines are missing "
                "there; the last:\n" + "\n".join(lines[-SHOWN:])
            )


def cut_back(path: Path, step: int) -> int:
    """Remove the records after ``step``, and torn ones, from a metrics.jsonl; returns how many."""
    if not path.exists():
        return 0
    kept, removed = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            good = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            good = False
        if good:
            kept.append(line)
        else:
            removed += 1
    if removed:
        write_atomic(path, "".join(line + "\n" for line in kept))
    return removed
