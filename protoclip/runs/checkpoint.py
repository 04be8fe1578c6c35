"""Save and load checkpoints: sealed files, which torch and OpenCLIP read as usual."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from protoclip.common import sealed
from protoclip.common.files import whole_file
from protoclip.data import PairDataset
from protoclip.data.feature_pairs import FeaturePairs, origin

FORMAT = 3  # of the entries under the key "protoclip"
LATEST = "epoch_latest.pt"
PREVIOUS = "epoch_previous.pt"  # the one before, used when the latest is torn
STORED = "features"  # the key of a checkpoint's largest part, the stored features of the data
logger = logging.getLogger(__name__)

save = sealed.save


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
        payload = sealed.load(path, stays_mapped=(STORED,))
    except ValueError as error:
        raise ValueError(
            f"checkpoint: {path} cannot be read ({error}); it is torn or not a checkpoint, so use "
            "an older one"
        ) from error
    if not isinstance(payload, dict):
        raise ValueError(f"checkpoint: expected a dict in {path}, got {type(payload).__name__}")
    written = payload.get("protoclip", {}).get("format", FORMAT)
    if written != FORMAT:
        raise ValueError(
            f"checkpoint: expected format {FORMAT} in {path}, got {written}; use the version of "
            "protoclip that wrote it"
        )
    return payload


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


def fingerprint(dataset: PairDataset, saved: str = "", count: int | None = None) -> str:
    """A short identifier of a data set, or of its first ``count`` pairs.

    Of pictures it is their number and a digest of the marks of up to 1,000 of them; of stored
    features see ``FeaturePairs.fingerprint``.

    Args:
        saved: an earlier fingerprint, with which ``is_same`` will compare this one.
        count: of the first pairs; other rows than those of ``saved`` do not count.
    """
    is_beginning = count is not None
    count = len(dataset) if count is None else count
    pairs, positions = origin(dataset, np.arange(count))
    if isinstance(pairs, FeaturePairs) and not is_of_before(saved):
        return pairs.fingerprint(positions, saved, is_beginning)
    digest = hashlib.sha256(str(count).encode())
    for mark in dataset.marks(np.linspace(0, max(0, count - 1), min(1000, count), dtype=np.int64)):
        digest.update(mark + b"\0")
    return f"{count}:{digest.hexdigest()[:16]}"


def is_of_before(saved: str) -> bool:
    """Whether a fingerprint of stored features is from before version 0.2; those of pictures have
    the same form still."""
    return saved.count(":") == 1


def is_same(saved: str, now: str) -> bool:
    """Whether two fingerprints are of the same data; sizes and times of files do not count."""
    return saved.split(":")[:4] == now.split(":")[:4]


def is_beginning(saved: str, dataset: PairDataset) -> bool:
    """Whether ``saved`` is the fingerprint of the first pairs or of all: some may be new."""
    count = int(saved.partition(":")[0])
    return count <= len(dataset) and is_same(saved, fingerprint(dataset, saved, count))
