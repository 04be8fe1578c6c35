"""Pairs in webdataset shards: where each lies in its tar, and reading it by position."""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import logging
import math
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from protoclip.data.files import fetch_ahead, is_remote, local_copy, write_atomic
from protoclip.data.images import decode
from protoclip.data.tables import MAX_CAPTION
from protoclip.data.types import DataError, Labels, StringTable
from protoclip.distributed import from_main, gather_objects, is_distributed, rank, world_size
from protoclip.ops.native import cache_dir

IMAGE_KINDS = ("jpg", "png", "jpeg", "webp")
TEXT_KINDS = ("txt", "json")
FORMAT = 5  # of the cached index
MAX_SHARDS = 1_000_000  # that one source may name; LAION-5B has 231,349
MAX_CAPTION_BYTES = 1 << 22  # a larger member is no caption; img2dataset's JSON has about 1 kB
MAX_HEADER_BYTES = 1 << 14  # of an extended header: a name and a few numbers
NAMED = 5  # skipped samples named in the warning; the rest are counted
MAX_MEMBER_BYTES = 1 << 48
EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # headers of pax and GNU that describe the next member
NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
CUT = "the shard is cut off; copy it again"
Members = dict[str, tuple[int, int]]  # of a sample: extension -> offset, size in bytes
Extended = dict[str, str]  # of an extended header: "path", "size", ...
logger = logging.getLogger(__name__)


class ShardDataset:
    """Pictures with captions from tar files in webdataset's layout.

    A pair is jpg | png | jpeg | webp with txt (one caption per line) or json ("caption", or a list
    "captions") under one key; txt goes first unless the json has a list. Other samples are
    skipped with a warning. Shards from urls are copied as they are needed.

    Args:
        spec: path or url of a tar; braces "{000..012}" and globs expand, "::" joins several
            sources.
    Attributes:
        skipped: (shard, key, reason) of each sample left out.
        shard_of, source_of: number of each pair's shard and source, int32 and int16 [N].
        remote: whether a shard comes from a url.
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
        bar = tqdm(self.shards, "reading the shards' indices", unit="shard", delay=1, disable=None)
        indices = [shard_index(shard) for shard in bar]
        shards = list(zip(self.shards, indices, strict=True))
        self.keys: Sequence[str] = StringTable(
            f"{prefix}/{key}"
            for prefix, index in ((_prefix(shard, folder), index) for shard, index in shards)
            for key in index.keys
        )
        self.skipped = [(shard, *fault) for shard, index in shards for fault in index.skipped]
        self._sizes = [index.size for index in indices]
        self._places = np.concatenate([index.places for index in indices])
        counts = [len(index.keys) for index in indices]
        self.shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.source_of = np.asarray(sources, dtype=np.int16)[self.shard_of]
        self._report()

    def _report(self) -> None:
        total = len(self) + len(self.skipped)
        named = [f"\n  {shard}: {key!r}: {reason}" for shard, key, reason in self.skipped[:NAMED]]
        listing = "".join(named) + ("\n  ..." if len(self.skipped) > NAMED else "")
        if not self.keys:
            raise DataError(
                f"{self.name}: none of {total} samples is a pair; a pair needs a picture "
                f"({', '.join(IMAGE_KINDS)}) and a caption (txt, json) with the same key{listing}"
            )
        if self.skipped:
            _warn(f"{self.name}: {len(self.skipped)} of {total} samples skipped:{listing}")

    def __len__(self) -> int:
        return len(self.keys)

    def prefetch(self, positions: np.ndarray) -> None:
        """Begin copies of the remote shards that these pairs, int64 [M], will need."""
        shards = self.shard_of[positions] if self.remote else np.empty(0, dtype=np.int32)
        for number in dict.fromkeys(shards.tolist()):
            if is_remote(self.shards[number]):
                fetch_ahead(self.shards[number])

    def image(self, i: int) -> Image.Image:
        return decode(self._read(i, 0), self._where(i))

    def captions(self, i: int) -> tuple[str, ...]:
        data = self._read(i, 2)
        try:
            return parse_captions(data, bool(self._places[i, 4]))
        except ValueError as error:
            raise DataError(
                f"{self._where(i)}: changed while in use ({error}); start again"
            ) from error

    def _where(self, i: int) -> str:
        return f"{self.shards[self.shard_of[i]]}: {self.keys[i]!r}"

    def _read(self, i: int, column: int) -> bytes:
        """The member whose offset and size are in ``column`` and the next."""
        number = int(self.shard_of[i])
        shard = self.shards[number]
        offset, size = self._places[i, column : column + 2].tolist()
        try:
            file = _open(local_copy(shard) if is_remote(shard) else shard)
            now = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"{shard}: {error.strerror}; check that the disk is there") from error
        if len(data) != size or now != self._sizes[number]:
            copies = f" without its copy in {cache_dir()}" if is_remote(shard) else ""
            raise DataError(f"{shard}: changed while in use; start again{copies}")
        return data


@functools.lru_cache(maxsize=1024)
def _warn(text: str) -> None:
    """Once a process: training, evaluation and report open the same shards."""
    logger.warning("%s", text)


@functools.lru_cache(maxsize=64)
def _open(path: str) -> io.FileIO:
    """Open file of a shard; reads name their offset, so forked workers can share it."""
    return open(path, "rb", buffering=0)


def _prefix(shard: str, folder: str) -> str:
    """What tells the keys of a shard from those of others, the same on every machine."""
    if not is_remote(shard):
        return os.path.relpath(os.path.abspath(shard), folder)
    return f"{PurePosixPath(shard).name.split()[-1]}@{zlib.crc32(shard.encode()):08x}"


def is_sharded(spec: str) -> bool:
    """Whether a name of data means webdataset shards."""
    if spec.startswith("builtin:") or spec.lower().endswith((".csv", ".tsv")):
        return False
    return ".tar" in spec or spec.startswith("pipe:") or "://" in spec or os.path.isdir(spec)


def expand(spec: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The shards that ``spec`` names, in the given order (globs sorted), and the source of each.

    Raises:
        DataError: a path or glob without a file, unbalanced braces, far too many shards, a shell
            command, or a shard named twice.
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
        ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}", source)
        count = math.prod(abs(int(a) - int(b)) // max(1, int(c or 1)) + 1 for a, b, c in ranges)
        if count > MAX_SHARDS:
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


def _files(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*.tar")
    found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
    if not found:
        raise DataError(f"no shard {pattern!r}; check the path and the range")
    return found


@dataclass(frozen=True)
class ShardIndex:
    """The pairs of one shard, in the order of the tar.

    Attributes:
        size: of the tar, bytes.
        keys: of each pair, the name of its members without the extension.
        places: of each pair, offset and size of the picture and of the captions, in bytes, and
            whether the captions are JSON rather than plain lines; int64 [N, 5].
        skipped: (key, reason) of each sample that is not a usable pair.
    """

    size: int
    keys: list[str]
    places: np.ndarray
    skipped: list[tuple[str, str]]


def index_together(spec: str) -> None:
    """Read the new shards of ``spec``, each rank its share, and give all ranks all indices.

    Every rank calls it before it opens the data; without it each would read all shards by itself.

    Raises:
        DataError: on every rank, what one of them found wrong.
    """
    if not is_distributed() or not is_sharded(spec):
        return
    unknown = _on_all(lambda: [shard for shard in expand(spec)[0] if not _cached(shard).exists()])
    share = list(dict.fromkeys(shard for part in unknown for shard in part))[rank() :: world_size()]
    for part in _on_all(lambda: {shard: shard_index(shard) for shard in share}):
        for shard in set(part).intersection(unknown[rank()]):
            # A file of the same name on another machine may be another file.
            if is_remote(shard) or os.path.getsize(shard) == part[shard].size:
                _store(shard, part[shard])


def _on_all(make: Callable[[], Any]) -> list[Any]:
    """What ``make`` returns on each rank, for every rank; the DataError of one is that of all."""
    try:
        own = make(), ""
    except DataError as error:
        own = None, str(error)
    gathered = gather_objects(own)
    parts = from_main(lambda: gathered)
    for _, problem in parts:
        if problem:
            raise DataError(problem)
    return [part for part, _ in parts]


def shard_index(shard: str) -> ShardIndex:
    """Index of a shard: from the cache if the file is unchanged, else read from the tar's headers.

    Args:
        shard: a file or a url; what comes from a url is taken to be the same every time, so that a
            known one is not read again.
    Raises:
        DataError: the file is missing, compressed, or not a tar.
    """
    cached = _cached(shard)
    try:
        size, keys, places, skipped = json.loads(cached.read_text(encoding="utf-8"))
        return ShardIndex(
            size, keys, np.array(places, dtype=np.int64).reshape(len(keys), 5), skipped
        )
    except (OSError, ValueError, TypeError):
        pass  # never written, or damaged
    index = scan(local_copy(shard) if is_remote(shard) else shard, shard)
    _store(shard, index)
    return index


def _cached(shard: str) -> Path:
    """Where the index of a shard is kept, of the file as it is now."""
    state: list[Any] = [FORMAT, shard]
    if not is_remote(shard):
        try:
            status = os.stat(shard)
        except OSError as error:
            raise DataError(f"{shard}: {error.strerror}; check the path") from error
        state = [FORMAT, os.path.abspath(shard), status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "shards" / f"{digest[:32]}.json"


def _store(shard: str, index: ShardIndex) -> None:
    try:
        parts = [index.size, index.keys, index.places.tolist(), index.skipped]
        write_atomic(_cached(shard), json.dumps(parts))
    except OSError as error:
        logger.warning(
            "the index of %s is not kept (%s): the shard is read again at the next start; set "
            "PROTOCLIP_CACHE to a folder that can be written",
            shard,
            error,
        )


def scan(path: str, name: str = "") -> ShardIndex:
    """Read the headers and captions of a tar; pictures are not touched. ``name`` is for errors."""
    pairs: dict[str, tuple[int, ...]] = {}
    skipped: list[tuple[str, str]] = []
    with open(path, "rb") as file:
        for key, members, fault in _samples(path, name or path):
            place = fault or ("the key occurs twice" if key in pairs else _pair(file, members))
            if isinstance(place, str):
                skipped.append((key, place))
            else:
                pairs[key] = place
    places = np.array(list(pairs.values()), dtype=np.int64).reshape(-1, 5)
    return ShardIndex(os.path.getsize(path), list(pairs), places, skipped)


def _pair(file: io.BufferedReader, members: Members) -> tuple[int, ...] | str:
    """Where picture and captions of a sample are, as in ``ShardIndex``; or why it is not a pair."""
    usable = {kind for kind, (_, size) in members.items() if size > 0}
    for what, kinds in (("picture", IMAGE_KINDS), ("caption", TEXT_KINDS)):
        if not usable.intersection(kinds):
            state = "is empty (0 bytes)" if set(kinds) & set(members) else "is missing"
            return f"the {what} {state} ({', '.join(kinds)})"
    image = next(kind for kind in IMAGE_KINDS if kind in usable)

    def read(kind: str) -> bytes:
        offset, size = members[kind]
        if size > MAX_CAPTION_BYTES:
            raise ValueError(f"{size:,} bytes are too many for captions")
        file.seek(offset)
        return file.read(size)

    order = [kind for kind in TEXT_KINDS if kind in usable]
    short = len(order) == 2 and members["json"][1] <= MAX_CAPTION_BYTES
    if short and b'"captions"' in read("json"):
        order.reverse()  # a list of several goes before the one in the txt
    reason = ""
    for kind in order:
        try:
            parse_captions(read(kind), kind == "json")
            return *members[image], *members[kind], int(kind == "json")
        except ValueError as error:
            reason = reason or f"its {kind}: {error}"
    return reason


def parse_captions(data: bytes, is_json: bool) -> tuple[str, ...]:
    """Captions without the empty ones: the lines of a text, or "captions" / "caption" of a JSON;
    each cut to ``MAX_CAPTION`` characters.

    Raises:
        ValueError: no caption, not UTF-8, or not a JSON object with captions as strings.
    """
    text = data.decode("utf-8-sig")
    found: Any = text.splitlines()
    if is_json:
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
        found = content.get("captions") or content.get("caption") or []
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(c, str) for c in found):
            raise ValueError('"captions" must be a list of strings')
    captions = tuple(short for caption in found if (short := caption.strip()[:MAX_CAPTION]))
    if not captions:
        raise ValueError("no caption is there")
    return captions


def _samples(path: str, name: str = "") -> Iterator[tuple[str, Members, str]]:
    """Key, members and fault ("" if none) of each sample: neighbours with the same key."""
    key, members, fault = "", Members(), ""
    for file, place, fault in _headers(path, name or path):
        folder, _, base = file.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        if fault or not stem or not dot:
            continue
        new = f"{folder}/{stem}" if folder else stem
        if new != key:
            if members:
                yield key, members, ""
            key, members = new, Members()
        members[extension.lower()] = place
    if members:
        yield key, members, ""
    if fault:
        yield f"what follows {key}", Members(), fault


def _headers(path: str, name: str) -> Iterator[tuple[str, tuple[int, int], str]]:
    """Name and (offset, size) of each whole file of a tar, then what is wrong with the rest.

    The walk only goes forward and reads 512 bytes a member, whatever the headers say; tarfile's own
    can be sent in circles (CVE-2025-8194), kept busy for hours, and made to seek past any disk.
    """
    size, offset, known = os.path.getsize(path), 0, Extended()
    with open(path, "rb") as file:
        while True:
            file.seek(offset)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) == tarfile.BLOCKSIZE and not any(block):
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                found = _extended(file, header) if header.type in EXTENDED else None
                length = int(known.get("size", header.size)) if found is None else header.size
                if not 0 <= length <= MAX_MEMBER_BYTES or header.size < 0:
                    raise ValueError(f"a header says {length:,} bytes")
            except (tarfile.HeaderError, ValueError) as error:
                if offset == 0:
                    raise DataError(
                        f"{name}: not an uncompressed tar ({error}); unpack .gz files, and check "
                        "that the copy is complete"
                    ) from error
                cut = len(block) < tarfile.BLOCKSIZE
                yield "", (0, 0), CUT if cut else f"the shard is damaged at byte {offset}"
                return
            begin = offset + tarfile.BLOCKSIZE
            length = 0 if header.type in NO_DATA else length
            if begin + length > size:
                yield "", (0, 0), CUT
                return
            offset = begin + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if found is not None:
                known |= found
                continue
            if header.isreg() and not header.issparse() and "GNU.sparse.major" not in known:
                yield known.get("path") or header.name, (begin, length), ""
            known = Extended()


def _extended(file: io.BufferedReader, header: tarfile.TarInfo) -> Extended:
    """What a header of pax or GNU says about the member that follows it."""
    if header.size > MAX_HEADER_BYTES:
        raise ValueError(f"an extended header says {header.size:,} bytes")
    content = file.read(max(0, header.size))
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if header.type != tarfile.XHDTYPE:
        return {}
    records = re.findall(rb"\d+ ([^=\n]+)=([^\n]*)\n", content)
    return {k.decode("latin-1"): v.decode("utf-8", "surrogateescape") for k, v in records}
