"""Files that appear complete or not at all: local copies of shards from URLs, and safe writes.

fsspec's file cache makes each copy in a folder named by the hash of its URL. One process of a
machine fetches it while the others wait. Copies stay until the user deletes them.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protoclip.common.paths import cache_dir
from protoclip.common.waits import Wait

if TYPE_CHECKING:
    from torch import Tensor

# A part of fsspec's protocols; some of the others start processes.
PROTOCOLS = ("http", "https", "s3", "gs", "hf", "file")
LOCK = ".lock"  # in a folder that one process at a time writes to
STALL = 60.0  # seconds without a byte before a download fails
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_copies: dict[str, str] = {}  # URL -> path of the copies that this process has used
_coming: set[str] = set()
os.register_at_fork(after_in_child=_coming.clear)  # threads do not survive a fork


class DataError(ValueError):
    """A fault of the data: the message names the file, row or key and says what to do."""


class UnavailableError(DataError):
    """What the system refused: a permission, a disk, a network share, memory. The next try may read
    it."""


def kind_of(error: Exception) -> type[DataError]:
    """UnavailableError if the system raised it: errors of decoding are ValueErrors, or OSErrors
    without a number."""
    is_of_system = isinstance(error, MemoryError) or getattr(error, "errno", None)
    return UnavailableError if is_of_system else DataError


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL rather than a path."""
    return "://" in shard


def state_of(file: Path | str | int) -> tuple[int, int]:
    """Size and time of change (ns) of a file, or of an open one: whether it has been changed."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def state_of_url(url: str) -> str:
    """The size and ETag of what a URL names: whether it has been changed; "" if that is unknown."""
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(url)
        info = filesystem.info(path)
    except Exception:  # each file system has its own errors
        return ""
    tag = next((info[name] for name in ("ETag", "etag", "md5Hash", "blob_id") if name in info), "")
    return f"{info.get('size')}:{tag}" if tag else ""


def remote_folder(url: str) -> Path:
    """Where the cache keeps what belongs to a URL: deleted, all of it is fetched again."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "remote" / digest[:32]


def local_copy(url: str) -> str:
    """The path of the local copy of a shard; fetches it if it is missing."""
    if os.path.exists(_copies.get(url, "")):
        return _copies[url]
    import fsspec
    from filelock import FileLock

    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS:
        raise DataError(
            f"{url}: expected a URL of {', '.join(PROTOCOLS)}, got {protocol}; copy the shard to "
            "a disk, or train with protoclip openclip, whose pipeline reads more"
        )
    folder = remote_folder(url)
    options: dict[str, Any] = {"filecache": {"cache_storage": str(folder), "expiry_time": False}}
    try:
        if protocol in ("http", "https"):
            import aiohttp  # by default it ends every download after five minutes

            silence = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
            options[protocol] = {"client_kwargs": {"timeout": silence}}
        folder.mkdir(parents=True, exist_ok=True)
        with Wait(f"copying {printable(url)}"), FileLock(folder / "lock"):
            found = fsspec.open_local(f"filecache::{url}", **options)
            _copies[url] = found if isinstance(found, str) else found[0]  # of a URL with "?"
    except Exception as error:  # each file system has its own errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnavailableError(
            f"{url}: cannot be copied to {folder} ({reason}); check the address, the network, the "
            "disk space (PROTOCLIP_CACHE sets another folder) and pip install -e '.[remote]'"
        ) from error
    return _copies[url]


def fetch_ahead(url: str) -> None:
    """Start a copy in the background; ``local_copy`` reports its errors."""

    def work() -> None:
        with contextlib.suppress(DataError):
            local_copy(url)
        _coming.discard(url)

    if url not in _copies and url not in _coming and len(_coming) < 2:
        _coming.add(url)
        threading.Thread(target=work, daemon=True).start()


def read_file(path: str) -> bytes:
    """The bytes of a file that somebody's table names.

    Raises:
        ValueError: a device or a pipe, which may never end.
        OSError: as of ``open``.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ValueError("expected a file, found a device or a pipe")
    return Path(path).read_bytes()


@contextlib.contextmanager
def sole_writer(lock: Path, flag: str, path: Path | None = None) -> Iterator[None]:
    """Hold the lock of a path, or of the lock's folder; ValueError, for the ``flag`` that names it,
    if another process has it."""
    from filelock import FileLock, Timeout

    try:
        held = FileLock(lock, timeout=0).acquire()
    except Timeout as error:
        shown = printable(str(path or lock.parent))
        raise ValueError(f"{flag}: {shown} is in use by another process; stop it") from error
    with held:
        yield


@contextlib.contextmanager
def locked_folder(folder: Path, flag: str) -> Iterator[None]:
    """Make a folder that ``flag`` names and hold its lock; if it is new and stays empty, it goes
    again.

    Raises:
        ValueError: it cannot be created, or another process writes there.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        shown = printable(str(folder))
        raise ValueError(f"{flag}: {shown} cannot be created ({error.strerror})") from error
    lock = folder / LOCK
    with sole_writer(lock, flag):
        for name in ("*", "*/*", "*/*/*"):  # parts of features in a folder of cluster's lie deepest
            remove_leftovers(folder, name)
        try:
            yield
        finally:
            if is_new and [path.name for path in folder.iterdir()] == [LOCK]:
                lock.unlink()
                folder.rmdir()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` at the end, so a reader sees either the old
    file or the complete new one. An OSError of the block names ``path``."""
    # A name that nobody can foresee, for a file that is new: in a folder that others can write to,
    # a link of theirs under its name would be followed.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder in ``folder``, to which its files and folders move at the end: all
    of them or, after an error, none. An OSError names the file where it would have been."""
    prefix = f".{secrets.token_hex(4)}.{os.getpid()}."
    with tempfile.TemporaryDirectory(prefix=prefix, suffix=".tmp", dir=folder) as temporary:
        try:
            yield Path(temporary)
        except OSError as error:
            if error.filename is not None:
                error.filename = str(error.filename).replace(temporary, str(folder))
            raise
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of files of this name, a pattern, have left in a folder whose lock
    the caller holds."""
    for temporary in folder.glob(f"{name}.{'[0-9a-f]' * 8}.*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def short_name(name: str, most: int = 200) -> str:
    """A name for a file: one of more than ``most`` bytes is cut, and ends with a checksum."""
    content = os.fsencode(name)
    if len(content) <= most:
        return name
    return f"{content[: most - 9].decode('utf-8', 'ignore')}-{zlib.crc32(content):08x}"


def printable(name: str) -> str:
    """A file's name, or a line of text, without characters that a terminal would obey, or a file
    cannot hold: control characters but the tab, and bytes of a name that are not UTF-8, become
    escapes such as \\x1b, \\n and \\xe9, other surrogates the replacement character."""

    def escaped(match: re.Match[str]) -> str:
        number = ord(match[0])
        if number < 0xD800:
            return repr(match[0])[1:-1]
        byte = number - 0xDC00  # Python's surrogateescape
        return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else "\ufffd"

    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]", escaped, name)


def torch_reason(error: BaseException) -> str:
    """Why ``torch.load`` reads no file, in a line; torch advises running its code, we do not."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return "it holds code, or no tensors" if "weights_only" in reason else reason


def printable_lines(text: str) -> str:
    """``printable`` of each line of a text."""
    return "\n".join(map(printable, text.split("\n")))


def lines_of(text: str) -> list[str]:
    """The lines of a text, ended by newlines only (``str.splitlines`` also ends them at form feeds,
    U+0085, U+2028 and others, which captions may contain)."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def plural(number: int, noun: str) -> str:
    """ "1 file", "2,000 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def in_percent(share: float, digits: int = 0) -> str:
    """ "5 %"."""
    return f"{100 * share:.{digits}f} %"


def mebibytes(size: float) -> str:
    """ "1.5 MiB", "2.50 GiB"."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


LEFT_OUT_NAMED = 10  # pictures that were left out, in the terminal; left_out.csv has all


def say_left_out(reasons: Sequence[str], count: int, noun: str = "picture") -> None:
    """Name the first of ``count`` pictures that were left out."""
    if not reasons:
        return
    lines = [
        f"left out {len(reasons):,} of {plural(count, noun)}:",
        *reasons[:LEFT_OUT_NAMED],
    ]
    if (more := len(reasons) - LEFT_OUT_NAMED) > 0:
        lines.append(f"and {more:,} more; left_out.csv lists them all")
    print(printable_lines("\n  ".join(lines)), file=sys.stderr)


def write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], line_end: str = "\r\n"
) -> None:
    """Write a table completely or not at all. File names keep their bytes, UTF-8 or not."""
    with (
        whole_file(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        csv.writer(file, lineterminator=line_end).writerows(itertools.chain([header], rows))


def path_in_table(key: str) -> str:
    """A name, with "./" before it if a spreadsheet would take it for a formula."""
    return f"./{key}" if key.startswith(tuple("=+@-")) else key


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors completely or not at all, with the usual permissions.

    Raises:
        OSError: the folder is missing, the disk is full, ...
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            save_file(
                {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, temporary
            )
        except SafetensorError as error:
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise
        temporary.chmod(mode)  # safetensors creates files that only their owner can read


def write_atomic(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
