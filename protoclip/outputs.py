"""Where a command writes, checked before it works for minutes."""

from __future__ import annotations

import os
from pathlib import Path


def output_file(path: str | os.PathLike[str], flag: str) -> Path:
    """The path of a file that can be written; folders on the way to it may be missing yet.

    Raises:
        ValueError: it is a folder, or lies in what is none or may not be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{flag}: expected a file, got the folder {path}; add a name to it")
    check_above(path, flag)
    return path


def check_above(path: Path, flag: str) -> None:
    """Raise ValueError where no file or folder can be made at ``path``."""
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ValueError(
            f"{flag}: expected a path in a folder, got {path}, but {above} is a file; choose "
            "another path"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {above} may not be written to; choose another folder")
