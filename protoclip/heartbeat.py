"""Which rank is missing, and in which phase: every rank reports, the others look when they wait.

A thread of each rank writes to the store of the processes how many phases it has entered. Rank 0
reads all reports, the others that of rank 0, so the store serves O(ranks) a beat. Whoever finds a
rank missing, or fails itself, leaves a verdict there: the exit code with which all end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from protoclip import distributed
from protoclip.launchers import Place

EXIT_CODE = 70  # of a rank that ends because another is missing
PATIENCE = 60.0  # seconds that a rank may start later than another
NOTHING = "-"  # no verdict yet
ERRORS = (RuntimeError, OSError)  # what a store raises that has lost its host


@dataclass(frozen=True)
class Beat:
    """What a rank last said."""

    number: int = 0  # of the beat
    entered: int = 0  # phases so far: the same order on every rank
    phase: str = "start"
    host: str = ""
    process: int = 0
    ended: bool = False


_active: Heartbeat | None = None


def enter(phase: str) -> None:
    """This rank begins a phase; nothing to do alone."""
    if _active is not None:
        _active.enter(phase)


@contextlib.contextmanager
def watched(place: Place, timeout: float, name: str, remedy: str) -> Iterator[Heartbeat]:
    """Watch the ranks, on a connection of its own, while the block runs."""
    global _active
    store = distributed.open_store(place, "heartbeat", max(timeout, PATIENCE))
    _active = Heartbeat(place, store, timeout, name, remedy)
    try:
        yield _active
    finally:
        _active.stop()
        _active = None


class Heartbeat:
    """Reports this rank and watches the others until ``stop``.

    Args:
        place: of this process.
        store: that all ranks share; used by this thread only.
        timeout: seconds without a sign, or in one phase while others wait in a later one, until a
            rank counts as missing and every rank ends with ``EXIT_CODE``.
        name: of the command, for the message.
        remedy: what the user can do then.
    """

    def __init__(
        self, place: Place, store: dist.Store, timeout: float, name: str, remedy: str
    ) -> None:
        self.place, self.store, self.timeout, self.name = place, store, timeout, name
        self.remedy = remedy
        self.pause = min(1.0, max(0.1, timeout / 20))
        self._own = Beat(host=socket.gethostname(), process=os.getpid())
        self._seen: dict[int, tuple[Beat, float, float]] = {}  # beat, last change of number, phase
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        if place.rank == 0:
            store.set("verdict", NOTHING)
        self._report()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """This rank begins a phase; cheap."""
        own = self._own
        self._own = Beat(own.number, own.entered + 1, phase, own.host, own.process)

    def stop(self) -> None:
        """Say that this rank has ended well, and be silent."""
        self._stopped.set()
        self._thread.join()
        own = self._own
        self._own = Beat(own.number, own.entered, own.phase, own.host, own.process, ended=True)
        with contextlib.suppress(*ERRORS):
            self._report()

    def explain(self) -> str | None:
        """After a collective failed: which rank is missing, or None where all are alive.

        Takes a few beats, for a process on another machine is known to be gone by its silence.
        """
        deadline = time.monotonic() + 6 * self.pause + 1
        silent_for = 4 * self.pause + 0.5
        while time.monotonic() < deadline:
            try:
                with self._lock:
                    self._report()
                    self._look(range(self.place.world_size))
                    gone = self._gone(silent_for) or self._dead()
            except ERRORS:
                return self._hostless()
            if gone:
                return self._message(gone, "is gone")
            time.sleep(self.pause / 2)
        return None

    def _run(self) -> None:
        everyone = self.place.rank == 0
        while not self._stopped.wait(self.pause):
            try:
                with self._lock:
                    self._report()
                    self._look(range(self.place.world_size) if everyone else (0,))
                    verdict = self.store.get("verdict").decode()
                    dead = self._dead()
            except ERRORS:
                self._end(self._hostless(), say=self.place.rank == 1)
            if verdict != NOTHING:
                self._stopped.wait(2 * self.pause)  # it may be about to end by itself
                os._exit(int(verdict))
            gone, behind = self._gone(self.timeout), self._behind()
            if dead:
                self._end(self._message(dead, "is gone"))
            elif gone or behind:
                how = "has given no sign" if gone else "has not moved"
                self._end(self._message(gone or behind, f"{how} for {self.timeout:g} s"))

    def _report(self) -> None:
        own = self._own
        beat = [own.number + 1, own.entered, own.phase, own.host, own.process, own.ended]
        self._own = Beat(own.number + 1, *beat[1:])  # type: ignore[arg-type]
        self.store.set(f"beat{self.place.rank}", json.dumps(beat))

    def _look(self, ranks: Iterable[int]) -> None:
        """Read reports; a rank that has not reported yet is not waited for."""
        now = time.monotonic()
        for number in ranks:
            old, changed, entered = self._seen.get(number, (Beat(), now, now))
            beat = old
            if self.store.check([f"beat{number}"]):
                beat = Beat(*json.loads(self.store.get(f"beat{number}")))
            changed = changed if beat.number == old.number else now
            entered = entered if beat.entered == old.entered else now
            self._seen[number] = beat, changed, entered

    def _gone(self, silent_for: float) -> list[int]:
        """Ranks that have not reported for so long."""
        now = time.monotonic()
        return [
            number
            for number, (beat, changed, _) in self._seen.items()
            if number != self.place.rank and not beat.ended and now - changed > silent_for
        ]

    def _dead(self) -> list[int]:
        """Ranks of this machine whose process is no more, though they had not ended."""

        def found() -> list[int]:
            return [
                number
                for number, (beat, _, _) in self._seen.items()
                if beat.host == self._own.host and not beat.ended and _is_dead(beat.process)
            ]

        dead = found()
        if dead:  # its last report may be newer than what was read before it died
            self._look(dead)
        return found() if dead else dead

    def _behind(self) -> list[int]:
        """Ranks in an earlier phase than another, for longer than the time-out."""
        now = time.monotonic()
        running = {n: seen for n, seen in self._seen.items() if not seen[0].ended}
        furthest = max((beat.entered for beat, _, _ in running.values()), default=0)
        return [
            number
            for number, (beat, _, entered) in running.items()
            if beat.entered < furthest and now - entered > self.timeout
        ]

    def _message(self, ranks: list[int], what: str) -> str:
        now = time.monotonic()
        lines = []
        for number in ranks:
            beat, changed, _ = self._seen[number]
            lines.append(
                f"rank {number} of {self.place.world_size} (process {beat.process} on "
                f"{beat.host or 'an unknown machine'}) {what}: last seen {now - changed:.1f} s "
                f"ago in phase {beat.phase!r}; this is rank {self.place.rank} in phase "
                f"{self._own.phase!r}"
            )
        return "; ".join(lines) + f". All ranks end; {self.remedy}"

    def _hostless(self) -> str:
        return (
            "rank 0, or the launcher on its machine, is gone: the store of the ranks does not "
            f"answer; this is rank {self.place.rank} of {self.place.world_size} in phase "
            f"{self._own.phase!r}. All ranks end; {self.remedy}"
        )

    def say(self, message: str, trace: str = "") -> None:
        """Print a message that all ranks may have, once, below a ``trace``."""
        first = True
        with contextlib.suppress(*ERRORS), self._lock:
            first = self.store.add("said", 1) == 1
        if first:
            print(f"{trace}{self.name}: error: {message}", file=sys.stderr, flush=True)

    def fail(self, message: str, code: int, trace: str = "") -> None:
        """This rank cannot go on: say why, once, and let the others end with the same code."""
        own = self.place
        where = f"rank {own.rank} of {own.world_size}, phase {self._own.phase!r}"
        self.say(f"{message} ({where})", trace)
        self._condemn(code)

    def _end(self, message: str, say: bool = True) -> None:
        if say:
            self.say(message)
        self._condemn(EXIT_CODE)
        os._exit(EXIT_CODE)

    def _condemn(self, code: int) -> None:
        with contextlib.suppress(*ERRORS), self._lock:
            self.store.set("verdict", str(code))
        if distributed.hosts_store(self.place):
            time.sleep(2 * self.pause)  # until the others have read it


def _is_dead(process: int) -> bool:
    """Whether a process of this machine is gone or a zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return Path("/proc/self/stat").exists()
    except (OSError, IndexError):
        return False
    return state in "ZX"
