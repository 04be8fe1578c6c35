"""Pairs in webdataset shards, read by position."""

from __future__ import annotations

import functools
import glob
import io
import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from protoclip.data.images import decode
from protoclip.data.strings import StringTable
from protoclip.data.tar_index import ShardIndex, is_indexed, parse_captions, shard_index
from protoclip.data.types import DataError, Labels

NAMED = 5  # skipped samples named in the warning; the rest are counted
logger = logging.getLogger(__name__)


class ShardDataset:
    """Pictures with captions from tar files in webdataset's layout.

    A pair is jpg | png | jpeg | webp with txt (one caption per line) or json ("caption", or a list
    "captions") under one key. Samples that are no pair are skipped with a warning.

    Args:
        spec: path of a tar; braces "{000..012}" and globs expand, "::" joins several.
    Attributes:
        skipped: (shard, key, reason) of each sample left out.
    Raises:
        DataError: a shard is missing or no tar, or no shard holds a pair.
    """

    labels: Mapping[str, Labels] = {}

    def __init__(self, spec: str) -> None:
        self.name = spec
        self.shards = expand(spec)
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(s)) for s in self.shards])
        new = sum(not is_indexed(shard) for shard in self.shards)
        progress = tqdm(
            self.shards, f"reading the index of {new} new shards", unit="shard", disable=new == 0
        )
        keys: list[str] = []
        self.skipped: list[tuple[str, str, str]] = []
        columns: list[tuple[np.ndarray, ...]] = []
        for number, shard in enumerate(progress):
            index = shard_index(shard)
            prefix = os.path.relpath(os.path.abspath(shard), folder)
            keys += [f"{prefix}/{key}" for key in index.keys]
            self.skipped += [(shard, key, reason) for key, reason in index.skipped]
            columns.append(_columns(number, index))
        self.keys: Sequence[str] = StringTable(keys)
        self._shard, self._image, self._text, self._is_json = (
            np.concatenate(column) for column in zip(*columns, strict=True)
        )
        self._report()

    def _report(self) -> None:
        if not self.skipped and self.keys:
            return
        total = len(self) + len(self.skipped)
        named = [f"{shard}: {key!r}: {reason}" for shard, key, reason in self.skipped[:NAMED]]
        if len(self.skipped) > NAMED:
            named.append(f"and {len(self.skipped) - NAMED} more")
        if not self.keys:
            listing = "\n  ".join(["", *named])
            raise DataError(
                f"{self.name}: none of {total} samples is a pair; a pair needs a picture "
                f"(jpg, png, jpeg, webp) and a caption (txt, json) with the same key{listing}"
            )
        logger.warning(
            "%s: %d of %d samples skipped:\n  %s",
            self.name,
            len(self.skipped),
            total,
            "\n  ".join(named),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        return parse_captions(self._read(i, self._text), bool(self._is_json[i]))

    def image(self, i: int) -> Image.Image:
        data = self._read(i, self._image)
        return decode(data, f"{self.shards[self._shard[i]]}: {self.keys[i]!r}")

    def _read(self, i: int, place: np.ndarray) -> bytes:
        shard = self.shards[self._shard[i]]
        offset, size = (int(value) for value in place[i])
        try:
            data = os.pread(_open(shard).fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{shard}: {error.strerror}; check that the disk is there") from error
        if len(data) != size:
            raise DataError(f"{shard}: changed while in use; start again")
        return data


def _columns(number: int, index: ShardIndex) -> tuple[np.ndarray, ...]:
    count = len(index.keys)
    return (
        np.full(count, number, dtype=np.int32),
        np.array(index.image, dtype=np.int64).reshape(count, 2),
        np.array(index.text, dtype=np.int64).reshape(count, 2),
        np.array(index.is_json, dtype=bool),
    )


@functools.lru_cache(maxsize=64)
def _open(shard: str) -> io.FileIO:
    """Open file of a shard; reads name their offset, so forked workers can share it."""
    return open(shard, "rb", buffering=0)


def expand(spec: str) -> tuple[str, ...]:
    """Paths of the shards that ``spec`` names, in the given order (globs sorted).

    Raises:
        DataError: a path or glob without a file, unbalanced braces, or a url.
    """
    from webdataset.shardlists import expand_urls

    try:
        patterns = expand_urls(spec)
    except ValueError as error:
        raise DataError(f"--train-data {spec!r}: {error}; balance the braces") from error
    shards: list[str] = []
    for pattern in patterns:
        if pattern.startswith("pipe:") or "://" in pattern:
            raise DataError(
                f"--train-data {pattern!r}: shards are read by position, which needs local files; "
                "copy or mount them first"
            )
        if os.path.isdir(pattern):
            pattern = os.path.join(glob.escape(pattern), "*.tar")
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        if not found:
            raise DataError(f"--train-data: no shard {pattern!r}; check the path and the range")
        shards += found
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise DataError(f"--train-data {spec!r}: {twice} is listed twice; name it once")
    return tuple(shards)
