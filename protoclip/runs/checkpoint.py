"""Save and load checkpoints; a crash while saving leaves either the old file or the new one.

A checkpoint is a ``torch.save`` file with its SHA-256 in the zip comment at the end: torch and
OpenCLIP read it as usual, and ``load`` detects a torn or altered file.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protoclip.common.files import torch_reason, whole_file
from protoclip.data import PairDataset

FORMAT = 3  # of the entries under the key "protoclip"
LATEST = "epoch_latest.pt"
PREVIOUS = "epoch_previous.pt"  # the one before, used when the latest is torn
STORED = "features"  # the key of a checkpoint's largest part, the stored features of the data
SEAL = b"protoclip sha256 "
# Of files that may be whole, so that no older one is taken instead.
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
logger = logging.getLogger(__name__)


def save(
    path: str | os.PathLike[str],
    payload: Mapping[str, Any],
    *,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write ``payload`` (tensors, numbers, strings, dicts of them) to ``path``, atomically.

    The bytes go to a temporary file in the same folder, which is synced and then renamed.
    If ``previous`` is given, the old file at ``path`` is kept under that path.

    Raises:
        OSError: the folder is missing, read-only or full; an older file at ``path`` is untouched.
    """
    path = Path(path)
    try:
        with whole_file(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(dict(payload), file)
            _seal(temporary)
            if previous is not None and path.exists():
                os.replace(path, previous)
    except RuntimeError as error:
        # torch's writer hides the OSError behind a RuntimeError of its own.
        cause = error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def link(file: Path, path: Path) -> None:
    """Have the checkpoint ``file`` at ``path`` too; a copy where a disk has no links."""
    with whole_file(path) as temporary:
        _link(file, temporary)


def _link(file: Path, path: Path) -> None:
    try:
        os.link(os.path.realpath(file), path)
    except OSError:
        shutil.copyfile(file, path)


def make_latest(file: Path, folder: Path) -> None:
    """Have a run continue from ``file``, even if it is stopped before its next save. The newest
    checkpoint until now becomes the previous one."""
    latest = folder / LATEST
    if latest.exists() and latest.samefile(file):
        return
    with whole_file(latest) as temporary:
        _link(file, temporary)  # first: it may be the previous one itself
        if latest.exists():
            os.replace(latest, folder / PREVIOUS)


def _seal(path: Path) -> None:
    """Append a zip file's digest as its comment; the two bytes before it hold its length."""
    size = path.stat().st_size - 2
    comment = SEAL + _digest(path, size)
    with open(path, "r+b") as file:
        file.seek(size)
        file.write(len(comment).to_bytes(2, "little") + comment)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: str | os.PathLike[str], size: int) -> bytes:
    """SHA-256 of the first ``size`` bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code from it.

    A file that protoclip wrote must match its checksum.

    Raises:
        ValueError: the file is missing, is not a checkpoint, or does not match its checksum.
        OSError: this user may not read it, or the disk cannot.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint: expected a file, found none at {path}")
    try:
        _check_seal(path)
        can_map = _is_zip(path)  # torch cannot map its older formats
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # torch's readers raise nearly anything on damaged or hostile bytes
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            raise OSError(error.errno, f"cannot read: {error.strerror}", str(path)) from error
        raise ValueError(
            f"checkpoint: {path} cannot be read ({torch_reason(error)}); it is torn or not a "
            "checkpoint, so use an older one"
        ) from error
    if not isinstance(payload, dict):
        raise ValueError(f"checkpoint: expected a dict in {path}, got {type(payload).__name__}")
    written = payload.get("protoclip", {}).get("format", FORMAT)
    if written != FORMAT:
        raise ValueError(
            f"checkpoint: expected format {FORMAT} in {path}, got {written}; use the version of "
            "protoclip that wrote it"
        )
    return _copied(payload)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _copied(value: Any) -> Any:
    """Copy tensors out of the mapped file, which another program may overwrite. The data's stored
    features stay mapped: they are read once, and no process should hold them all."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        for key in value:
            if key != STORED:
                value[key] = _copied(value[key])
    elif type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _check_seal(path: Path) -> None:
    """Check the digest if there is one; files from torch and OpenCLIP have none."""
    length = len(SEAL) + 64
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - length))
        comment = file.read()
    if comment.startswith(SEAL) and comment[len(SEAL) :] != _digest(path, size - length - 2):
        raise ValueError("its checksum is wrong")


def candidates(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a run folder or checkpoint folder, newest first; a file gives itself."""
    if Path(run).is_file():
        return [Path(run)]
    folder = Path(run) / "checkpoints"
    folder = folder if folder.is_dir() else Path(run)
    unnumbered = [folder / LATEST, folder / PREVIOUS]
    return [path for path in unnumbered if path.is_file()] + numbered(folder)


def numbered(folder: Path) -> list[Path]:
    """The epoch_N.pt files in a folder, newest first."""
    files = [path for path in folder.glob("epoch_*.pt") if path.stem[6:].isdigit()]
    return sorted(files, key=lambda path: int(path.stem[6:]), reverse=True)


def load_newest(run: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Load a checkpoint file, or the newest intact one in a run folder; warn of damaged ones.

    Raises:
        ValueError: there is no checkpoint, or none is intact.
    """
    paths = candidates(run)
    for path in paths:
        try:
            return path, load(path)
        except ValueError as error:
            if path == paths[-1]:
                raise
            logger.warning("%s; trying the one before", error)
    remedy = "train again" if (Path(run) / "config.json").is_file() else "check the path"
    raise ValueError(
        f"checkpoint: expected a checkpoint or a run folder with one, found nothing at {run}; "
        f"{remedy}"
    )


def fingerprint(dataset: PairDataset, count: int | None = None) -> str:
    """A short identifier of a data set, or of its first ``count`` pairs: their number, and a digest
    of the marks of up to 1,000 of them."""
    count = len(dataset) if count is None else count
    digest = hashlib.sha256(str(count).encode())
    positions = np.linspace(0, max(0, count - 1), min(1000, count), dtype=np.int64)
    for mark in dataset.marks(positions):
        digest.update(mark + b"\0")
    return f"{count}:{digest.hexdigest()[:16]}"


def is_beginning(saved: str, dataset: PairDataset) -> bool:
    """Whether ``saved`` is the fingerprint of the first pairs or of all: some may be new."""
    count = int(saved.partition(":")[0])
    return count <= len(dataset) and saved == fingerprint(dataset, count)
