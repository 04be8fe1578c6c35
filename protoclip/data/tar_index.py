"""Where each pair lies in a webdataset shard, so that any pair can be read without the others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protoclip.data.cache import write_atomic
from protoclip.data.remote import is_remote, local_copy
from protoclip.data.types import DataError
from protoclip.ops.native import cache_dir

IMAGE_KINDS = ("jpg", "png", "jpeg", "webp")
TEXT_KINDS = ("txt", "json")
FORMAT = 3  # of the cached index
MAX_CAPTION_BYTES = 1 << 22  # a larger member is no caption; img2dataset's JSON has about 1 kB
MAX_CAPTION = 10_000  # characters kept of one caption; a model sees the first few hundred
MAX_HEADER_BYTES = 1 << 14  # of an extended header; tarfile takes hours over megabytes of one
MAX_MEMBER_BYTES = 1 << 48  # tarfile cannot seek to the end of a larger one
# What tarfile lets through, beside its own errors, where a header is nonsense.
NONSENSE = (ValueError, OverflowError, IndexError, EOFError, RecursionError)
logger = logging.getLogger(__name__)


@dataclass
class ShardIndex:
    """The pairs of one shard, in the order of the tar; one entry of each list per pair.

    Attributes:
        keys: name of the members without the extension.
        image: (offset, size) of the picture in bytes.
        text: (offset, size) of the captions in bytes.
        is_json: whether the captions are JSON rather than plain lines.
        skipped: (key, reason) of each sample that is not a usable pair.
        size: of the tar, bytes.
    """

    keys: list[str]
    image: list[tuple[int, int]]
    text: list[tuple[int, int]]
    is_json: list[bool]
    skipped: list[tuple[str, str]]
    size: int  # of the tar, bytes


def shard_index(path: str) -> ShardIndex:
    """Index of a shard: from the cache if the file is unchanged, else read from the tar's headers.

    Args:
        path: a file or a url; what comes from a url is taken to be the same every time, so that
            a known one is not read again.
    Raises:
        DataError: the file is missing, compressed, or not a tar.
    """
    stamp = [FORMAT] if is_remote(path) else _stamp(path)
    cached = _cached(path)
    if (index := _load(cached, stamp)) is not None:
        return index
    index = scan(local_copy(path) if is_remote(path) else path, path)
    try:
        write_atomic(cached, json.dumps({"stamp": stamp, **asdict(index)}))
    except OSError as error:
        logger.warning(
            "the index of %s is not kept (%s): the shard is read again at the next start; set "
            "PROTOCLIP_CACHE to a folder that can be written",
            path,
            error,
        )
    return index


def is_indexed(path: str) -> bool:
    """Whether the cache knows the shard, perhaps an older state of it."""
    return _cached(path).exists()


def _cached(path: str) -> Path:
    name = path if is_remote(path) else os.path.abspath(path)
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "shards" / f"{digest[:32]}.json"


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from error
    return [FORMAT, status.st_size, status.st_mtime_ns]


def _load(cached: Path, stamp: list[int]) -> ShardIndex | None:
    try:
        content: dict[str, Any] = json.loads(cached.read_text(encoding="utf-8"))
        if content.pop("stamp") != stamp:
            return None
        index = ShardIndex(**content)
        rows = {len(column) for column in (index.keys, index.image, index.text, index.is_json)}
        return index if len(rows) == 1 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # never written, or damaged: read the tar again


def scan(path: str, name: str = "") -> ShardIndex:
    """Read the headers and captions of a tar; pictures are not touched. ``name`` is for errors."""
    index = ShardIndex([], [], [], [], [], os.path.getsize(path))
    seen: set[str] = set()
    for key, members, fault in samples(path, name or path):
        reason = fault or _judge(path, members)
        if not reason and key in seen:
            reason = "the key occurs twice"
        if reason:
            index.skipped.append((key, reason))
            continue
        seen.add(key)
        image, text = _pick(members, IMAGE_KINDS), _text_kind(path, members)
        assert image and text  # _judge found no fault
        index.keys.append(key)
        index.image.append(members[image])
        index.text.append(members[text])
        index.is_json.append(text == "json")
    return index


Members = dict[str, tuple[int, int]]  # extension -> offset, size


def samples(path: str, shard: str = "") -> Iterator[tuple[str, Members, str]]:
    """Key, members and fault ("" if none) of each sample: neighbours with the same key."""
    key, members = "", Members()
    with _open(path, shard or path) as tar:
        for name, extension, place in _members(tar, os.path.getsize(path)):
            if name != key:
                if members:
                    yield key, members, ""
                key, members = name, Members()
            members[extension] = place
        fault = _damage(tar, path)
    if members:
        yield key, members, ""
    if fault:
        yield f"what follows {key}", Members(), fault


class _Header(tarfile.TarInfo):
    """A header that cannot send tarfile in circles (CVE-2025-8194) or keep it busy for hours."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        extended = header.type in (
            tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
        )  # fmt: skip
        if not 0 <= header.size <= (MAX_HEADER_BYTES if extended else MAX_MEMBER_BYTES):
            raise tarfile.HeaderError(f"a header says {header.size:,} bytes")
        return header


def _open(path: str, name: str) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:", tarinfo=_Header)
    except (tarfile.TarError, *NONSENSE) as error:
        raise DataError(
            f"{name}: not an uncompressed tar ({error}); unpack .gz files, and check that the copy "
            "is complete"
        ) from error


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Key, extension, (offset, size) of each whole file, up to the end or the first damage."""
    begin = 0  # of the header to come
    try:
        for member in tar:
            if not 0 <= member.size <= MAX_MEMBER_BYTES:  # by an extended header
                tar.offset = begin
                return
            begin = tar.offset
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
            folder, _, file = member.name.removeprefix("./").rpartition("/")
            stem, dot, extension = file.partition(".")
            if not member.isfile() or member.issparse() or not stem or not dot:
                continue
            if member.offset_data + member.size > size:
                return
            key = f"{folder}/{stem}" if folder else stem
            yield key, extension.lower(), (member.offset_data, member.size)
    # A header of nonsense may pass for a sparse or extended one, which tarfile then trips over.
    except (tarfile.TarError, *NONSENSE):
        tar.offset = begin


def _damage(tar: tarfile.TarFile, path: str) -> str:
    """What is wrong at the place where reading stopped: a whole tar has a block of zeros there.

    tarfile itself takes a torn or overwritten header for the end, in silence.
    """
    with open(path, "rb") as shard:
        shard.seek(tar.offset)
        block = shard.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE:
        return f"the shard is damaged at byte {tar.offset}" if any(block) else ""
    return "the shard is cut off; copy it again"


def _pick(members: Members, kinds: tuple[str, ...]) -> str | None:
    """First kind that is present and not empty."""
    return next((kind for kind in kinds if members.get(kind, (0, 0))[1] > 0), None)


def _judge(path: str, members: Members) -> str:
    """Why the sample is no usable pair; "" if it is one."""
    faults = []
    for what, kinds in (("picture", IMAGE_KINDS), ("caption", TEXT_KINDS)):
        if not _pick(members, kinds):
            state = "is empty (0 bytes)" if set(kinds) & set(members) else "is missing"
            faults.append(f"the {what} {state} ({', '.join(kinds)})")
    if faults:
        return "; ".join(faults)
    kind = _text_kind(path, members)
    assert kind
    if members[kind][1] > MAX_CAPTION_BYTES:
        return f"its {kind} has {members[kind][1]:,} bytes, too many for captions"
    try:
        captions = parse_captions(_bytes(path, members[kind]), kind == "json")
        return "" if captions else f"no caption in its {kind}"
    except ValueError as error:
        return f"its {kind} cannot be read: {error}"


def _text_kind(path: str, members: Members) -> str | None:
    """Where the captions are: txt before json, unless the json has a list of several."""
    kind = _pick(members, TEXT_KINDS)
    if kind == "txt" and members.get("json", (0, 0))[1] > 0:
        place = members["json"]
        data = _bytes(path, place) if place[1] <= MAX_CAPTION_BYTES else b""
        if b'"captions"' in data:
            try:
                return "json" if parse_captions(data, True) else kind
            except ValueError:
                return kind
    return kind


def _bytes(path: str, place: tuple[int, int]) -> bytes:
    with open(path, "rb") as shard:
        shard.seek(place[0])
        return shard.read(place[1])


def parse_captions(data: bytes, is_json: bool) -> tuple[str, ...]:
    """Captions without the empty ones: the lines of a text, or "captions" / "caption" of a JSON;
    each cut to ``MAX_CAPTION`` characters.

    Raises:
        ValueError: not UTF-8, or not a JSON object with captions as strings.
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
    return tuple(stripped[:MAX_CAPTION] for caption in found if (stripped := caption.strip()))
