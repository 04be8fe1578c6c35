"""Pairs in webdataset shards: an index of their places in the tars, and reads by position."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from protoclip.common.files import (
    DataError,
    UnavailableError,
    fetch_ahead,
    is_remote,
    lines_of,
    local_copy,
    remote_folder,
    state_of,
    write_atomic,
)
from protoclip.common.host import warn_once
from protoclip.common.json_text import parse_json
from protoclip.common.paths import cache_dir
from protoclip.common.strings import StringTable
from protoclip.common.waits import each
from protoclip.data.images import decode
from protoclip.data.tables import MAX_CAPTION
from protoclip.data.types import BadSample, Facts, PairDataset
from protoclip.distributed import gather_objects, is_distributed, rank, world_size
from protoclip.features.layout import is_feature_folder
from protoclip.settings.config import FEATURES

IMAGE_KINDS = ("jpg", "png", "jpeg", "webp")
TEXT_KINDS = ("txt", "json")
FORMAT = 6  # format of the cached index
MAX_CAPTION_BYTES = 1 << 22  # a larger file is not a caption; img2dataset's JSON has about 1 kB
# How files of a data set's splits are called.
SPLIT = re.compile(r"(train|test|validation|valid|val|dev)(?=[-_.])")
NAMED = 5  # skipped samples named in the warning; the rest are counted
logger = logging.getLogger(__name__)


class PairPlaces(NamedTuple):
    """Where a pair's files are in their tar, in bytes; a row of the cached index."""

    image_offset: int
    image_size: int
    captions_offset: int
    captions_size: int
    captions_are_json: int  # 1: JSON, 0: plain lines


PAIR_PLACES = np.dtype([(field, np.int64) for field in PairPlaces._fields])


class Place(NamedTuple):
    """Where a file is in its tar, in bytes."""

    offset: int
    size: int


class ShardDataset(PairDataset):
    """Pictures with captions from tar files in webdataset's layout.

    A pair is jpg | png | jpeg | webp with txt (one caption per line) or json ("caption", or a list
    "captions") under one key; txt is used unless the json has a list. Other samples are skipped
    with a warning. Shards from URLs are copied when they are needed.

    """

    def __init__(self, spec: str) -> None:
        self.name = spec
        self.shards = expand(spec)
        self._states = [None if is_remote(shard) else state_of(shard) for shard in self.shards]
        shards_in_turn = each(self.shards, "reading the shards' indices", "shards")
        indices = [shard_index(shard) for shard in shards_in_turn]
        shards = list(zip(self.shards, indices, strict=True))
        prefixes = key_prefixes(self.shards)
        self.keys: Sequence[str] = StringTable(
            f"{prefix}/{key}"
            for prefix, index in zip(prefixes, indices, strict=True)
            for key in index.keys
        )
        skipped = [
            BadSample(shard, key, reason)
            for shard, index in shards
            for key, reason in index.skipped
        ]
        self._places = np.concatenate([index.places for index in indices])
        counts = [len(index.keys) for index in indices]
        self._shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.facts = Facts(
            remote=any(map(is_remote, self.shards)), skipped=skipped, shard_of=self._shard_of
        )
        total = len(self.keys) + len(skipped)
        listing = "".join(f"\n  {s}: {key!r}: {reason}" for s, key, reason in skipped[:NAMED])
        if not self.keys:
            raise DataError(
                f"{self.name}: none of {total} samples is a pair; each needs a picture "
                f"({', '.join(IMAGE_KINDS)}) and a caption (txt, json) with the same key{listing}"
            )
        if skipped:
            message = f"{self.name}: {len(skipped)} of {total} samples skipped:{listing}"
            warn_once(logger, message)

    def __len__(self) -> int:
        return len(self.keys)

    def prefetch(self, positions: np.ndarray) -> None:
        if self.facts.remote:
            numbers = dict.fromkeys(self._shard_of[positions].tolist())
            for shard in filter(is_remote, (self.shards[number] for number in numbers)):
                fetch_ahead(shard)

    def container(self, i: int) -> str:
        return self.shards[self._shard_of[i]]

    def image(self, i: int) -> Image.Image:
        places = self._places[i]
        data = self._read(i, Place(int(places["image_offset"]), int(places["image_size"])))
        return decode(data, f"{self.shards[self._shard_of[i]]}: {self.keys[i]!r}")

    def captions(self, i: int) -> tuple[str, ...]:
        places = self._places[i]
        data = self._read(i, Place(int(places["captions_offset"]), int(places["captions_size"])))
        return parse_captions(data, bool(places["captions_are_json"]))

    def _read(self, i: int, place: Place) -> bytes:
        """Read a file of pair ``i``."""
        shard = self.shards[self._shard_of[i]]
        try:
            file = _open(local_copy(shard) if is_remote(shard) else shard)
            as_indexed = self._states[self._shard_of[i]] in (None, state_of(file.fileno()))
            data = os.pread(file.fileno(), place.size, place.offset) if as_indexed else b""
        except OSError as error:
            raise UnavailableError(f"{shard}: {error.strerror}; check the disk") from error
        if len(data) != place.size:
            copies = f" without its copy in {cache_dir()}" if is_remote(shard) else ""
            raise UnavailableError(f"{shard}: changed while in use; start again{copies}")
        return data


@functools.lru_cache(maxsize=64)
def _open(path: str) -> io.FileIO:
    """The open file of a shard; reads give their offset, so forked workers can share it."""
    return open(path, "rb", buffering=0)


def key_prefixes(files: Sequence[str]) -> list[str]:
    """A prefix for the keys of each file that differs from other files', equal on every machine."""
    local = [os.path.abspath(file) for file in files if not is_remote(file)]
    folder = os.path.commonpath(list(map(os.path.dirname, local))) if local else ""
    return [
        f"{PurePosixPath(file).name.split()[-1]}@{zlib.crc32(file.encode()):08x}"
        if is_remote(file)
        else os.path.relpath(os.path.abspath(file), folder)
        for file in files
    ]


def data_kind(spec: str) -> str:
    """What a data name refers to: builtin, features, table, parquet, shards, folder (of pictures),
    or ""."""
    if spec.startswith("builtin:"):
        return "builtin"
    if spec.startswith(FEATURES) or is_feature_folder(spec):
        return "features"
    if spec.lower().endswith((".csv", ".tsv")):
        return "table"
    if os.path.isdir(spec):
        types = {".tar": "shards", ".parquet": "parquet"}
        return next((name for ending, name in types.items() if _in_folder(spec, ending)), "folder")
    if ".parquet" in spec:
        return "parquet"
    return "shards" if ".tar" in spec or spec.startswith("pipe:") or "://" in spec else ""


def expand(spec: str, ending: str = ".tar") -> tuple[str, ...]:
    """The shards, or parquet files, that ``spec`` names, in the given order (globs sorted).

    Raises:
        DataError: a part matches no shard, is a shell command, or repeats a shard.
    """
    from webdataset.shardlists import expand_urls

    shards: list[str] = []
    for source in spec.split("::"):
        if source.startswith("pipe:"):
            raise DataError(
                f"data {source!r} would run a shell command; give a URL or a file, or train with "
                "protoclip openclip"
            )
        try:
            patterns = [source] if os.path.exists(source) else expand_urls(source)
        except ValueError as error:
            raise DataError(f"shards {spec!r}: {error}; balance the braces") from error
        for pattern in patterns:
            shards += [pattern] if is_remote(pattern) else _files(pattern, ending)
    names = [shard if is_remote(shard) else os.path.realpath(shard) for shard in shards]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"shards {spec!r}: {twice[0]} is listed twice; name it once")
    return tuple(shards)


def _files(pattern: str, ending: str) -> list[str]:
    if os.path.isdir(pattern):
        files = _in_folder(pattern, ending)
        splits = {match[0] for file in files if (match := SPLIT.match(os.path.basename(file)))}
        if len(splits) > 1:
            raise DataError(
                f"{pattern}: holds files of {' and '.join(sorted(splits))}; name those of one, "
                f"such as '{os.path.join(os.path.dirname(files[0]), min(splits))}*{ending}'"
            )
    else:
        files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not files:
        raise DataError(f"no shard {pattern!r}; check the path and the range")
    return files


def _in_folder(folder: str, ending: str) -> list[str]:
    """The files in a folder, or in its folder "data" as in a copy of a hub's data set."""
    pattern = os.path.join(glob.escape(folder), f"*{ending}")
    beneath = os.path.join(glob.escape(folder), "data", f"*{ending}")
    return sorted(glob.glob(pattern) or glob.glob(beneath))


class ShardIndex(NamedTuple):
    """The pairs of one shard, in the order of the tar."""

    size: int  # bytes of the tar
    keys: list[str]  # for each pair, the name of its files without the extension
    places: np.ndarray  # PAIR_PLACES [N]
    skipped: list[tuple[str, str]]  # (key, reason) of each sample that is not a usable pair


def index_together(spec: str) -> None:
    """Index the new shards of ``spec``, each rank a share, and give all indices to all ranks.

    Every rank calls it before it opens the data. A DataError on one rank is raised on all.
    """
    if not is_distributed() or data_kind(spec) != "shards":
        return
    unknown = _on_all(lambda: [shard for shard in expand(spec) if not _cached(shard).exists()])
    share = list(dict.fromkeys(itertools.chain(*unknown)))[rank() :: world_size()]
    for part in _on_all(lambda: {shard: shard_index(shard) for shard in share}):
        for shard in set(part).intersection(unknown[rank()]):
            # A file with this name on another machine may be a different file.
            if is_remote(shard) or os.path.getsize(shard) == part[shard].size:
                _store(shard, part[shard])


def _on_all(make: Callable[[], Any]) -> list[Any]:
    """The results of ``make`` on all ranks; a DataError on one rank is raised on all."""
    try:
        result = make()
    except DataError as error:
        result = error
    results = gather_objects(result)
    if errors := [result for result in results if isinstance(result, DataError)]:
        raise errors[0]
    return results


def shard_index(shard: str) -> ShardIndex:
    """The index of a shard: from the cache if the file is unchanged, else from the tar's headers.

    The content behind a URL is assumed not to change, so a known URL is not read again.
    """
    with contextlib.suppress(OSError, ValueError, TypeError):  # never written, or damaged
        size, keys, places, skipped = json.loads(_cached(shard).read_text(encoding="utf-8"))
        table = np.array(places, dtype=np.int64).reshape(len(keys), len(PairPlaces._fields))
        return ShardIndex(size, keys, table.view(PAIR_PLACES).reshape(len(keys)), skipped)
    path = local_copy(shard) if is_remote(shard) else shard
    before = _cached(shard)
    index = _scan(path, shard)
    if _cached(shard) == before:  # else somebody is still writing the shard
        _store(shard, index)
    return index


def _cached(shard: str) -> Path:
    """The path of the cached index for the shard in its current state."""
    if is_remote(shard):
        return remote_folder(shard) / f"index-{FORMAT}.json"
    state = (FORMAT, os.path.abspath(shard), state_of(shard))
    digest = hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "shards" / f"{digest[:32]}.json"


def _store(shard: str, index: ShardIndex) -> None:
    try:
        write_atomic(_cached(shard), json.dumps(index._replace(places=index.places.tolist())))
    except OSError as error:
        logger.warning("cannot cache the index of a shard (%s); set PROTOCLIP_CACHE", error)


def _scan(path: str, name: str) -> ShardIndex:
    """Read the headers and captions of a tar, but no pictures. ``name`` is for errors."""
    pairs: dict[str, PairPlaces] = {}
    skipped: list[tuple[str, str]] = []
    last_key = ""
    with open(path, "rb") as file:
        reader = _TarReader(file, name)
        for key, group in itertools.groupby(reader, lambda member: member.key):
            members = list(group)
            places = {member.extension: member.place for member in reversed(members)}
            try:
                if key in pairs:
                    raise NotAPair("the key occurs twice")
                pairs[key] = _find_pair(file, places)
                if len(places) < len(members):  # the first pair stays
                    raise NotAPair("the key occurs twice")
            except NotAPair as reason:
                skipped.append((key, str(reason)))
            last_key = key
    if reader.damage:
        skipped.append((f"everything after {last_key}", reader.damage))
    places_of_pairs = np.array(list(pairs.values()), PAIR_PLACES)
    return ShardIndex(os.path.getsize(path), list(pairs), places_of_pairs, skipped)


class NotAPair(Exception):
    """Why a sample is not a usable pair."""


def _find_pair(file: io.BufferedReader, places: Mapping[str, Place]) -> PairPlaces:
    """The picture and the captions among a sample's files, which ``places`` has by extension.

    Raises:
        NotAPair: one of them is missing or unusable.
    """
    usable = {extension: place for extension, place in places.items() if place.size > 0}
    for what, extensions in (("picture", IMAGE_KINDS), ("caption", TEXT_KINDS)):
        if not set(usable) & set(extensions):
            state = "is empty (0 bytes)" if set(extensions) & set(places) else "is missing"
            raise NotAPair(f"the {what} {state} ({', '.join(extensions)})")
    image = next(usable[extension] for extension in IMAGE_KINDS if extension in usable)
    reason = ""
    chosen = ""
    for extension in filter(usable.get, TEXT_KINDS):
        place = usable[extension]
        file.seek(place.offset)
        data = file.read(min(place.size, MAX_CAPTION_BYTES + 1))
        try:
            parse_captions(data, extension == "json")
            if not chosen or b'"captions"' in data:  # a list is preferred to the txt
                chosen = extension
        except ValueError as error:
            reason = reason or f"its {extension}: {error}"
    if not chosen:
        raise NotAPair(reason)
    return PairPlaces(*image, *usable[chosen], captions_are_json=int(chosen == "json"))


def parse_captions(data: bytes, is_json: bool) -> tuple[str, ...]:
    """The captions that are not empty, each cut to ``MAX_CAPTION`` characters. Halves of a
    character, which JSON can write but no file can hold, are replaced.

    They are the lines of a text, or "captions" or "caption" of a JSON; otherwise ValueError.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"expected at most {MAX_CAPTION_BYTES:,} bytes of captions, got more")
    text = data.decode("utf-8-sig")
    lines = _captions_of_json(text) if is_json else lines_of(text)
    lines = [re.sub("[\ud800-\udfff]", "\ufffd", line) for line in lines]
    captions = tuple(short for line in lines if (short := line.strip()[:MAX_CAPTION]))
    if not captions:
        raise ValueError("all captions are empty")
    return captions


def _captions_of_json(text: str) -> list[str]:
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    name = "captions" if content.get("captions") else "caption"
    captions = content.get(name)
    if captions is None:
        return []
    if isinstance(captions, str):
        return [captions]
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        expected = "a list of strings" if name == "captions" else "a string"
        raise ValueError(f'expected {expected} in "{name}", got {str(captions)[:80]}')
    return captions


class Member(NamedTuple):
    """A file in a tar."""

    key: str  # its name without the extension
    extension: str
    place: Place


class _TarReader:
    """The complete files of a tar, in its order.

    Attributes:
        damage: what ended the reading before the end of the tar, or "".
    """

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        self.file = file
        self.name = name  # for errors
        self.damage = ""

    def __iter__(self) -> Iterator[Member]:
        file = self.file
        size = os.path.getsize(file.name)
        offset = 0
        try:
            tar = tarfile.TarFile(fileobj=file, encoding="utf-8")
            while (member := tar.next()) is not None:
                cut = member.isreg() and member.offset_data + member.size > size
                if cut or not offset < tar.offset < size + tarfile.BLOCKSIZE:  # damaged sizes
                    break
                offset = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # else tarfile keeps all members
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, extension = base.partition(".")
                if stem and dot and member.isreg() and not member.issparse():
                    key = f"{folder}/{stem}" if folder else stem
                    place = Place(member.offset_data, member.size)
                    yield Member(key, extension.lower(), place)
            else:
                file.seek(offset)
                if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                    return
        # Damaged headers make tarfile raise all of these.
        except (
            tarfile.TarError,
            ValueError,
            ArithmeticError,
            MemoryError,
            RecursionError,
        ) as error:
            if offset == 0:
                raise DataError(
                    f"{self.name}: not an uncompressed tar ({error}); unpack .gz files, and check "
                    "that the copy is complete"
                ) from error
        self.damage = f"the shard is cut off or damaged at byte {offset}; copy it again"
