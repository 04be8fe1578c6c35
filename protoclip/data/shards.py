"""Pairs in webdataset shards, read by position."""

from __future__ import annotations

import functools
import glob
import io
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from protoclip.data.images import decode
from protoclip.data.remote import fetch_ahead, is_remote, local_copy
from protoclip.data.strings import StringTable
from protoclip.data.tar_index import ShardIndex, is_indexed, parse_captions, shard_index
from protoclip.data.types import DataError, Labels
from protoclip.ops.native import cache_dir

MAX_SHARDS = 1_000_000  # that one source may name; LAION-5B has 231,349
NAMED = 5  # skipped samples named in the warning; the rest are counted
logger = logging.getLogger(__name__)


class ShardDataset:
    """Pictures with captions from tar files in webdataset's layout.

    A pair is jpg | png | jpeg | webp with txt (one caption per line) or json ("caption", or a list
    "captions") under one key; txt goes first unless the json has a list. Samples that are no pair
    are skipped with a warning. Shards from urls are copied as they are needed.

    Args:
        spec: path or url of a tar; braces "{000..012}" and globs expand, "::" joins
            several sources.
    Attributes:
        skipped: (shard, key, reason) of each sample left out.
        shard_of, source_of: number of each pair's shard and source, int32 and int16 [N].
    Raises:
        DataError: a shard is missing or no tar, or no shard holds a pair.
    """

    labels: Mapping[str, Labels] = {}

    def __init__(self, spec: str) -> None:
        self.name = spec
        self.shards, sources = expand(spec)
        self.remote = any(map(is_remote, self.shards))
        local = [os.path.abspath(shard) for shard in self.shards if not is_remote(shard)]
        folder = os.path.commonpath(list(map(os.path.dirname, local))) if local else ""
        new = sum(not is_indexed(shard) for shard in self.shards)
        progress = tqdm(
            self.shards,
            f"reading the index of {new} new shards",
            unit="shard",
            disable=True if new == 0 else None,
        )
        keys: list[str] = []
        self.skipped: list[tuple[str, str, str]] = []
        self.sizes: list[int] = []
        columns: list[tuple[np.ndarray, ...]] = []
        for number, shard in enumerate(progress):
            index = shard_index(shard)
            prefix = _prefix(shard, folder)
            keys += [f"{prefix}/{key}" for key in index.keys]
            self.skipped += [(shard, key, reason) for key, reason in index.skipped]
            self.sizes.append(index.size)
            columns.append(_columns(number, index))
        self.keys: Sequence[str] = StringTable(keys)
        self.shard_of, self._image, self._text, self._is_json = (
            np.concatenate(column) for column in zip(*columns, strict=True)
        )
        self.source_of = np.asarray(sources, dtype=np.int16)[self.shard_of]
        self._report()
        self._compare_sizes()

    def _compare_sizes(self) -> None:
        """Warn where sizes.json or __len__ beside the shards promises more than there is."""
        found = np.bincount(self.shard_of, minlength=len(self.shards))
        lost = Counter(shard for shard, _, _ in self.skipped)
        for folder in {os.path.dirname(s) for s in self.shards if not is_remote(s)}:
            inside = [i for i, s in enumerate(self.shards) if os.path.dirname(s) == folder]
            names = [os.path.basename(self.shards[i]) for i in inside]
            file, expected = promised_samples(folder, names)
            there = sum(int(found[i]) + lost[self.shards[i]] for i in inside)
            if expected is not None and there < expected:
                _warn(
                    f"{folder or '.'}: its {file} promises {expected} samples, {there} are there: "
                    "shards may be cut off"
                )

    def prefetch(self, positions: np.ndarray) -> None:
        """Begin copies of the remote shards that these pairs, int64 [M], will need."""
        if not self.remote:
            return
        shards = self.shard_of[positions]
        for number in shards[np.sort(np.unique(shards, return_index=True)[1])]:
            if is_remote(self.shards[number]):
                fetch_ahead(self.shards[number])

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
        listing = "\n  ".join(named)
        _warn(f"{self.name}: {len(self.skipped)} of {total} samples skipped:\n  {listing}")

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        data = self._read(i, self._text)
        reason = "no caption is there"
        try:
            if found := parse_captions(data, bool(self._is_json[i])):
                return found
        except ValueError as error:
            reason = str(error)
        raise DataError(
            f"{self.shards[self.shard_of[i]]}: {self.keys[i]!r}: changed while in use ({reason}); "
            "start again"
        )

    def image(self, i: int) -> Image.Image:
        data = self._read(i, self._image)
        return decode(data, f"{self.shards[self.shard_of[i]]}: {self.keys[i]!r}")

    def _read(self, i: int, place: np.ndarray) -> bytes:
        number = int(self.shard_of[i])
        shard = self.shards[number]
        offset, size = (int(value) for value in place[i])
        try:
            file = self._copy(number) if is_remote(shard) else _open(shard)
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{shard}: {error.strerror}; check that the disk is there") from error
        if len(data) != size:
            raise DataError(f"{shard}: changed while in use; start again")
        return data

    def _copy(self, number: int) -> io.FileIO:
        """Open copy of a remote shard."""
        url = self.shards[number]
        path = local_copy(url)
        file = _open(path)
        size = os.fstat(file.fileno()).st_size
        if size != self.sizes[number]:
            raise DataError(
                f"{url}: {self.sizes[number]:,} bytes when it was indexed, now {size:,}; remove "
                f"{os.path.dirname(path)} and the index in {cache_dir() / 'shards'}, and start "
                "again"
            )
        return file


@functools.lru_cache(maxsize=1024)
def _warn(text: str) -> None:
    """Once a process: training, evaluation and report open the same shards."""
    logger.warning("%s", text)


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


def _prefix(shard: str, folder: str) -> str:
    """What tells the keys of a shard from those of others, the same on every machine."""
    if not is_remote(shard):
        return os.path.relpath(os.path.abspath(shard), folder)
    return f"{PurePosixPath(shard).name.split()[-1]}@{zlib.crc32(shard.encode()):08x}"


def promised_samples(folder: str, names: Sequence[str]) -> tuple[str, int | None]:
    """Samples in some shards of a folder by what was written beside them, and where: the counts of
    sizes.json, or of all shards together in __len__, as OpenCLIP reads them; None: not said."""
    try:
        with open(os.path.join(folder, "sizes.json"), encoding="utf-8") as file:
            sizes = json.load(file)
        return "sizes.json", sum(int(sizes[name]) for name in names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # not there, no counts, or not of these shards
    try:
        others = {name for name in os.listdir(folder or ".") if name.endswith(".tar")}
        with open(os.path.join(folder, "__len__"), encoding="utf-8") as file:
            total = int(file.read(64))
        return "__len__", total if others <= set(names) else None
    except (OSError, ValueError):
        return "", None


def expand(spec: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The shards that ``spec`` names, in the given order (globs sorted), and the source of each.

    Raises:
        DataError: a path or glob without a file, unbalanced braces, or a shard named twice.
    """
    from webdataset.shardlists import expand_urls

    shards: list[str] = []
    sources: list[int] = []
    for number, source in enumerate(spec.split("::")):
        if source.startswith("pipe:"):
            raise DataError(
                f"data {source!r} would run a shell command, which protoclip's readers never do; "
                "give a url or a file, or train with python -m protoclip.openclip, whose pipeline "
                "reads pipes"
            )
        if (count := _alternatives(source)) > MAX_SHARDS:
            raise DataError(
                f"shards {source!r}: expected at most {MAX_SHARDS:,} shards, got {count:,}; check "
                "the range in the braces"
            )
        try:
            patterns = expand_urls(source)
        except ValueError as error:
            raise DataError(f"shards {spec!r}: {error}; balance the braces") from error
        for pattern in patterns:
            found = [pattern] if is_remote(pattern) else _files(pattern)
            shards += found
            sources += [number] * len(found)
    if len(set(shards)) < len(shards):
        twice = next(shard for shard in shards if shards.count(shard) > 1)
        raise DataError(f"shards {spec!r}: {twice} is listed twice; name it once")
    return tuple(shards), tuple(sources)


def _alternatives(source: str) -> int:
    """How many names the braces of ``source`` stand for, at most, without making them."""
    count = 1
    for inside in re.findall(r"\{([^{}]*)\}", source):
        ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", inside)
        if ends:
            first, last, step = (int(end or 1) for end in ends.groups())
            count *= abs(last - first) // max(1, step) + 1
        else:
            count *= inside.count(",") + 1
    return count


def _files(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise DataError(f"no shard {pattern!r}; check the path and the range")
    return found
