"""The output folder: which of its files are ours, and that one process at a time writes there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from protoclip.common.files import locked_folder, printable, state_of, whole_files, write_atomic
from protoclip.common.json_text import parse_json
from protoclip.common.paths import check_above

PROG = "protoclip cluster"
CSV = "clusters.csv"
LEFT_OUT = "left_out.csv"
CENTROIDS = "centroids.safetensors"
STATE = "kmeans.state"  # of a run that has not ended


@contextlib.contextmanager
def open_output(out: Path, names: list[str], overwrite: bool, prog: str = PROG) -> Iterator[None]:
    """Make the folder in which files of these names will be written by the command ``prog``, and
    hold its lock.

    Raises:
        ValueError: files of these names would replace some of others, or, without ``overwrite``,
            those of an earlier run, which has the first of them; or another process writes there.
    """
    check_above(out / names[0], "--out")
    with locked_folder(out, "--out"):
        present = [name for name in names if (out / name).exists()]
        shown = printable(str(out))
        written = read_mark(out, prog)
        if others := [name for name in present if written.get(name) != state_of(out / name)]:
            raise ValueError(
                f"--out: {shown} holds {', '.join(others)}, which {prog} did not write there, or "
                "which changed since; choose a new folder"
            )
        if names[0] in present and not overwrite:
            raise ValueError(
                f"--out: {shown} holds an earlier run of {prog}; choose another folder, or replace "
                "it with --overwrite"
            )
        yield


@contextlib.contextmanager
def write_files(out: Path, prog: str = PROG) -> Iterator[Path]:
    """``whole_files`` that are marked as ours."""
    with whole_files(out) as temporary:
        yield temporary
        written = read_mark(out, prog) | {file.name: state_of(file) for file in temporary.iterdir()}
        write_atomic(temporary / mark_of(prog), json.dumps(written))


def mark_of(prog: str) -> str:
    """The file that says which files of a folder a command wrote."""
    return f".{prog.replace(' ', '-')}"


def read_mark(out: Path, prog: str) -> dict[str, tuple[int, ...]]:
    """The files that a command wrote in a folder, by name, with their state then."""
    try:
        written = parse_json((out / mark_of(prog)).read_text(encoding="utf-8"))
        return {name: tuple(state) for name, state in written.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
