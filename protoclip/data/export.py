"""Any data set as webdataset shards that protoclip, OpenCLIP and img2dataset's users read."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protoclip.data.cache import write_atomic
from protoclip.data.types import DataError, PairDataset

FORMATS = {"png": {"format": "PNG"}, "jpg": {"format": "JPEG", "quality": 95}}
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,100}")  # safe as a file name of a tar, without a dot


def export_shards(
    dataset: PairDataset,
    out: str | os.PathLike[str],
    *,
    per_shard: int = 1000,
    image_format: str = "png",
    progress: Callable[[int], Any] | None = None,
) -> list[Path]:
    """Write 00000.tar, 00001.tar, ... and sizes.json into a new or empty folder.

    Each pair is KEY.png (or .jpg), KEY.txt with the canonical caption (what OpenCLIP reads) and
    KEY.json with "caption", "captions", "key" and the labels by name. The same data gives the same
    bytes. A key that would not be a safe file name is replaced by the pair's number.

    Args:
        dataset: what to write.
        out: folder for the shards.
        per_shard: pairs in each tar but the last.
        image_format: "png" (lossless) or "jpg" (quality 95).
        progress: told the number of pairs written, after each.
    Raises:
        DataError: the folder holds something, or a pair cannot be read.
        ValueError: per_shard or image_format make no sense.
    """
    if per_shard < 1 or image_format not in FORMATS:
        raise ValueError(
            f"export: expected at least 1 pair per shard and a format of {', '.join(FORMATS)}, got "
            f"{per_shard} and {image_format!r}"
        )
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise DataError(f"--out {folder}: {error.strerror}; choose another folder") from error
    if occupied:
        raise DataError(f"--out {folder}: the folder is not empty; choose a new one")
    sizes: dict[str, int] = {}
    for start in range(0, len(dataset), per_shard):
        path = folder / f"{start // per_shard:05d}.tar"
        stop = min(start + per_shard, len(dataset))
        temporary = path.with_suffix(".tmp")
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            for i in range(start, stop):
                _add(tar, dataset, i, image_format)
                if progress is not None:
                    progress(1)
        os.replace(temporary, path)
        sizes[path.name] = stop - start
    write_atomic(folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
    return [folder / name for name in sizes]


def _add(tar: tarfile.TarFile, dataset: PairDataset, i: int, image_format: str) -> None:
    captions = dataset.captions(i)
    key = dataset.keys[i]
    picture = io.BytesIO()
    dataset.image(i).save(picture, **FORMATS[image_format])  # type: ignore[arg-type]
    about: dict[str, Any] = {"caption": captions[0], "captions": list(captions), "key": key}
    about |= {
        name: labels.names[int(labels.ids[i])]
        for name, labels in dataset.labels.items()
        if labels.ids[i] >= 0
    }
    name = key if PLAIN_KEY.fullmatch(key) else f"{i:09d}"
    for extension, data in (
        (image_format, picture.getvalue()),
        ("txt", captions[0].encode("utf-8", "surrogateescape")),
        ("json", json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogateescape")),
    ):
        member = tarfile.TarInfo(f"{name}.{extension}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
