"""Places on disk: the cache folder, a run's folder, and whether a command can read or write where
it is told to.

What is written there, and how, is not decided here.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


def cache_dir() -> Path:
    """``$PROTOCLIP_CACHE``, else ``$XDG_CACHE_HOME/protoclip``, else ``~/.cache/protoclip``; an
    absolute path.

    Raises:
        OSError: the user has no home folder, as in a container with another user's number.
    """
    chosen = os.environ.get("PROTOCLIP_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(chosen or caches).expanduser().absolute()
    except RuntimeError as error:
        words = "no home folder for a cache; set PROTOCLIP_CACHE to a folder"
        raise OSError(errno.ENOENT, words, chosen or caches) from error
    return folder if chosen else folder / "protoclip"


def run_of(path: Path) -> Path:
    """The run folder that is named by itself, its folder of checkpoints, or one of these."""
    folder = path if path.is_dir() else path.parent
    if (folder / "checkpoints").is_dir():
        return folder
    folder = folder.absolute()
    return folder.parent if folder.name == "checkpoints" else folder


def output_file(path: str | os.PathLike[str], flag: str) -> Path:
    """Return the path if a file can be written there, else raise ValueError; folders may be new."""
    if os.path.isdir(path) or str(path).endswith(os.sep):
        raise ValueError(f"{flag}: expected a file, got the folder {path}; add a name to it")
    check_above(Path(path), flag)
    return Path(path)


def check_above(path: Path, flag: str) -> None:
    """Raise ValueError if no file or folder can be created at ``path``."""
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise ValueError(f"{flag}: expected a path in a folder, got {path}, but {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {above} is not writable; choose another folder")


def check_exists(name: str, flag: str, remedy: str) -> None:
    """Raise ValueError if ``name`` can only be a path and nothing is there. Names of built-in data,
    URLs, lists and patterns, which contain one of ``:*?[{``, are not looked up."""
    if set(name).isdisjoint(":*?[{") and not os.path.exists(name):
        kind = "the folder " if name.endswith(os.sep) else "the file " if Path(name).suffix else ""
        raise ValueError(f"{flag}: {kind}{name} does not exist; {remedy}")
