"""Whole, sealed files of tensors: a crash while saving leaves either the old file or the new one.

A file is a ``torch.save`` file with its SHA-256 in the zip comment at the end: torch reads it as
usual, and ``load`` detects a torn or altered one.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from protoclip.common.files import torch_reason, whole_file

SEAL = b"protoclip sha256 "
# Of files that may be whole, so that no older one is taken instead.
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)


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


def _seal(path: Path) -> None:
    """Append a zip file's digest as its comment; the two bytes before it hold its length."""
    size = path.stat().st_size - 2
    comment = SEAL + _digest(path, size)
    with open(path, "r+b") as file:
        file.seek(size)
        file.write(len(comment).to_bytes(2, "little") + comment)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path, size: int) -> bytes:
    """SHA-256 of the first ``size`` bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def load(path: Path, *, must_be_sealed: bool = False, stays_mapped: Collection[str] = ()) -> Any:
    """Read a file onto the CPU without running code from it. It must match its checksum, if it has
    one: files from torch and OpenCLIP do not.

    ``stays_mapped``: keys of dicts whose tensors are not copied out of the mapped file, because no
    process should hold them all; they are read once.

    Raises:
        ValueError: why it cannot be read: it is torn, or not a file of tensors.
        OSError: this user may not read it, or the disk cannot.
    """
    try:
        _check_seal(path, must_be_sealed)
        # torch cannot map its older formats, and reads what is named so as safetensors.
        can_map = _is_zip(path) and path.suffix != ".safetensors"
        with open(path, "rb") as file:
            source = path if can_map else file
            payload = torch.load(source, map_location="cpu", weights_only=True, mmap=can_map)
    except Exception as error:  # torch's readers raise nearly anything on damaged or hostile bytes
        if isinstance(error, OSError) and error.errno in UNREADABLE:
            raise OSError(error.errno, f"cannot read: {error.strerror}", str(path)) from error
        raise ValueError(torch_reason(error)) from error
    return _copied(payload, stays_mapped)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _copied(value: Any, stays_mapped: Collection[str]) -> Any:
    """Copy tensors out of the mapped file, which another program may overwrite."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        for key in value:
            if key not in stays_mapped:
                value[key] = _copied(value[key], stays_mapped)
    elif type(value) in (list, tuple):
        return type(value)(_copied(element, stays_mapped) for element in value)
    return value


def _check_seal(path: Path, must_be_sealed: bool) -> None:
    seal = _seal_of(path)
    if must_be_sealed and not seal:
        raise ValueError("it has no checksum")
    if seal and seal != _digest(path, path.stat().st_size - len(SEAL) - len(seal) - 2):
        raise ValueError("its checksum is wrong")


def _seal_of(path: Path) -> bytes:
    """The digest at the end of a file; b"" if it has none."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(SEAL) - 64))
        comment = file.read()
    return comment[len(SEAL) :] if comment.startswith(SEAL) else b""


def is_sealed(path: Path) -> bool:
    """Whether ``save`` wrote the end of a file."""
    return bool(_seal_of(path))
