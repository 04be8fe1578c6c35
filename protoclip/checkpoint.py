"""Checkpoints: tensors in a dict, written so that a crash leaves the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LATEST = "epoch_latest.pt"


def save(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write ``payload`` (tensors, numbers, strings, dicts of them) to ``path``, atomically.

    The bytes go to a temporary file of the same folder, reach the disk, and then take the name.

    Raises:
        OSError: the folder is missing, read-only or full; an older file at ``path`` is untouched.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(payload), file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files only their owner can read; a checkpoint is like any other output.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code from it.

    Raises:
        ValueError: no such file, or its bytes are no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a file, found none at {path}")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint: {path} cannot be read ({reason}); it is torn or no checkpoint, "
            "use an older one"
        ) from error
    if not isinstance(payload, dict):
        raise ValueError(f"checkpoint: expected a dict in {path}, got {type(payload).__name__}")
    return payload


def find(run: str | os.PathLike[str]) -> Path:
    """The newest checkpoint of a run folder, or ``run`` itself when it is a file."""
    run = Path(run)
    if run.is_file():
        return run
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if not folder.is_dir():
        raise ValueError(
            f"checkpoint: expected a run folder or a checkpoint, found nothing at {run}"
        )
    if (folder / LATEST).is_file():
        return folder / LATEST
    numbered = {
        int(number): path
        for path in folder.glob("epoch_*.pt")
        if (number := path.stem.removeprefix("epoch_")).isdigit()
    }
    if not numbered:
        raise ValueError(
            f"checkpoint: {run} holds no epoch_N.pt; the run ended before its first checkpoint"
        )
    return numbered[max(numbered)]


def load_run(run: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and payload of a run folder or of one of its checkpoints.

    Raises:
        ValueError: nothing there, or a checkpoint that protoclip did not write.
    """
    path = find(run)
    payload = load(path)
    if "protoclip" not in payload or "config" not in payload["protoclip"]:
        raise ValueError(
            f"checkpoint: {path} was not written by protoclip.train (no 'protoclip' entry); "
            "give it to --pretrained, together with --model"
        )
    return payload["protoclip"]["config"], payload
