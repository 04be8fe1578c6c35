"""Local copies of shards that come from urls and pipes, so that they too are read by position.

A copy is made at the first use, whole or not at all, by one process while others wait. Copies used
longest ago make room for new ones. Where a sample lies thus depends on (shard, position) alone, and
a run resumes exactly from streams as from files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from protoclip.data.types import DataError
from protoclip.ops.native import cache_dir

TRIES = 3
STALL_SECONDS = 60.0  # without a byte, a reader is given up
BLOCK = 1 << 20


def is_remote(shard: str) -> bool:
    """Whether a shard is a url or a pipe rather than a file."""
    return shard.startswith("pipe:") or "://" in shard


class Spool:
    """A folder of copies with an upper limit.

    Args:
        limit_bytes: of all copies together; the newest stays whatever its size.
        folder: default: ``spool`` in the cache.
    """

    def __init__(self, limit_bytes: int, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.folder = folder or cache_dir() / "spool"
        self._coming: set[str] = set()

    def path(self, url: str) -> Path:
        """Where the copy of ``url`` is, if it is there."""
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"

    def fetch(self, url: str) -> Path:
        """A local copy of the shard; made if need be.

        Raises:
            DataError: it cannot be read; after ``TRIES`` tries.
        """
        path = self.path(url)
        if self._touched(path):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not self._touched(path):
                    self._copy(url, path)
                    self._make_room(path)
        except OSError as error:
            raise DataError(
                f"{url}: cannot be copied to {self.folder} ({error.strerror}); set PROTOCLIP_CACHE "
                "to a folder with room"
            ) from error
        return path

    def prefetch(self, url: str) -> None:
        """Begin a copy in the background; faults are left to ``fetch``."""
        if url in self._coming or self.path(url).exists() or len(self._coming) >= 2:
            return
        self._coming.add(url)

        def work() -> None:
            with contextlib.suppress(DataError):
                self.fetch(url)
            self._coming.discard(url)

        threading.Thread(target=work, daemon=True).start()

    def _touched(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _copy(self, url: str, path: Path) -> None:
        for rest in path.parent.glob(f"{path.stem}.*.part"):  # of a process that was killed
            rest.unlink(missing_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        reason = ""
        try:
            for attempt in range(TRIES):
                if attempt:
                    time.sleep(0.5 * 2**attempt)
                reason, usable = _download(url, part)
                if not reason or (usable and attempt == TRIES - 1):
                    os.replace(part, path)
                    return
        finally:
            part.unlink(missing_ok=True)
        raise DataError(
            f"{url}: {reason}, in each of {TRIES} tries; check the address, the command and the "
            "network, or leave the shard out"
        )

    def _make_room(self, newest: Path) -> None:
        copies = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                copies.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, part: Path) -> tuple[str, bool]:
    """Copy once; what went wrong ("" if nothing), and whether the file is a tar all the same."""
    with open(part, "wb") as out:
        fault = _pipe(url.removeprefix("pipe:"), out) if url.startswith("pipe:") else _web(url, out)
    if fault:
        return fault, False
    size = part.stat().st_size
    if size == 0:
        return "nothing came", False
    with open(part, "rb") as copy:
        copy.seek(max(0, size - 512))
        if any(copy.read()):
            return "the end of the tar did not come", True  # some writers leave it out
    return "", True


def _pipe(command: str, out: BinaryIO) -> str:
    """Run a shell command into a file."""
    with subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        fault, words = "interrupted", b""
        try:
            fault, words = _drain(process, out)
        finally:
            if fault:  # a stall, a full disk or a signal: else the end of the command is waited for
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if fault:
        return fault
    if process.returncode:
        said = " ".join(words.decode("utf-8", "replace").split())
        return f"the command ended with code {process.returncode}" + (said and f" ({said})")
    return ""


def _drain(process: subprocess.Popen[bytes], out: BinaryIO) -> tuple[str, bytes]:
    """What went wrong ("" if nothing), and the last words of a command that is copied to a file."""
    assert process.stdout and process.stderr
    streams, words = [process.stdout, process.stderr], b""
    while streams:
        ready, _, _ = select.select(streams, [], [], STALL_SECONDS)
        if not ready:
            return f"no byte in {STALL_SECONDS:g} s", words
        for stream in ready:
            data = os.read(stream.fileno(), BLOCK)
            if not data:
                streams.remove(stream)
            elif stream is process.stdout:
                out.write(data)
            else:
                words = (words + data)[-300:]
    try:
        process.wait(STALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"the command did not end in {STALL_SECONDS:g} s after its output", words
    return "", words


def _web(url: str, out: BinaryIO) -> str:
    """Read a url that urllib knows into a file."""
    if not url.startswith(("http://", "https://", "ftp://", "file://")):
        return f"no reader for such urls; use a command, such as 'pipe:aws s3 cp {url} -'"
    try:
        with urllib.request.urlopen(url, timeout=STALL_SECONDS) as answer:
            expected = answer.headers.get("Content-Length")
            count = 0
            while data := answer.read(BLOCK):
                out.write(data)
                count += len(data)
    except (OSError, ValueError, EOFError) as error:  # urllib's and ssl's errors are OSErrors
        return str(getattr(error, "reason", None) or error)
    except Exception as error:  # http.client's, which have no common base but this
        return f"{type(error).__name__}: {error}"
    if expected and count != int(expected):
        return f"{count} bytes came of {expected}"
    return ""
