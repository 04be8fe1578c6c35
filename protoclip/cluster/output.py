"""The output folder: which of its files are ours, and that one process at a time writes there."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from protoclip.common.files import printable, sole_writer, state_of, whole_files, write_atomic
from protoclip.common.json_text import parse_json
from protoclip.common.paths import check_above

PROG = "protoclip cluster"
CSV = "clusters.csv"
LEFT_OUT = "left_out.csv"
CENTROIDS = "centroids.safetensors"
MARK = ".protoclip-cluster"  # says which files of a folder the command wrote
LOCK = ".lock"


@contextlib.contextmanager
def open_output(out: Path, names: list[str], overwrite: bool) -> Iterator[None]:
    """Make the folder in which files of these names will be written, and hold its lock. A new
    folder in which nothing was written goes again.

    Raises:
        ValueError: as ``check_output``, or another process writes there.
    """
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        shown = printable(str(out))
        raise ValueError(f"--out: {shown} cannot be created ({error.strerror})") from error
    with sole_writer(out / LOCK, "--out"):
        check_output(out, names, overwrite)  # another process may have written there
        try:
            yield
        finally:
            if is_new and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()


def check_output(out: Path, names: list[str], overwrite: bool) -> None:
    """ValueError if files of these names would replace some of others, or, without ``overwrite``,
    those of an earlier run."""
    check_above(out / CSV, "--out")
    present = [name for name in names if (out / name).exists()]
    shown = printable(str(out))
    written = read_mark(out)
    if others := [name for name in present if written.get(name) != state_of(out / name)]:
        raise ValueError(
            f"--out: {shown} holds {', '.join(others)}, which {PROG} did not write there, or which "
            "changed since; choose a new folder"
        )
    if CSV in present and not overwrite:
        raise ValueError(
            f"--out: {shown} holds an earlier run of {PROG}; choose another folder, or replace it "
            "with --overwrite"
        )


@contextlib.contextmanager
def write_files(out: Path) -> Iterator[Path]:
    """``whole_files`` that are marked as ours."""
    with whole_files(out) as temporary:
        yield temporary
        written = read_mark(out) | {file.name: state_of(file) for file in temporary.iterdir()}
        write_atomic(temporary / MARK, json.dumps(written))


def read_mark(out: Path) -> dict[str, tuple[int, ...]]:
    """The files that the command wrote in a folder, by name, with their state then."""
    try:
        written = parse_json((out / MARK).read_text(encoding="utf-8"))
        return {name: tuple(state) for name, state in written.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
