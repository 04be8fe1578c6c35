"""Where the time of a run goes, and its memory, by phase."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from protoclip.common.host import memory_in_use

NOT_TRAINING = ("teacher", "evaluation", "checkpoint", "plots")
TRAINING = "training"
SHARED_MACHINE = "PROTOCLIP_SHARED_MACHINE"  # 1: tells a run that others train beside it
SHARED = "shared machine"  # of the saved state


def work_seconds(device: torch.device) -> float:
    """What training is timed by: on a CPU the CPU time of this process and the processes that it
    started, because other programs make the clock useless there; on a GPU the clock."""
    if device.type != "cpu":
        return time.perf_counter()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    for child in multiprocessing.active_children():  # RUSAGE_CHILDREN has only those that ended
        with contextlib.suppress(OSError):  # no /proc
            stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            user, system = map(int, stat[11:13])
            seconds += (user + system) / os.sysconf("SC_CLK_TCK")
    return seconds


class Phases:
    """Seconds spent in each named phase, and the work of training (see ``work_seconds``).

    On a GPU, work is timed by events on the stream, so measuring never waits for the device.
    Phases that run on the host alone (reading data) use the clock. The time of an inner phase does
    not count for the outer one.

    Training is everything after the first phase that is not one of ``NOT_TRAINING``, except these.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.shared_machine = os.environ.get(SHARED_MACHINE) == "1"  # for a part of the run, too
        self._seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}  # the most bytes in use at the end of a phase
        self._pending: deque[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._open: list[str] = []
        self._work: dict[str, float] = {}
        self._training_since: float | None = None
        self._paused_at: float | None = None  # in a phase that is not training

    @contextlib.contextmanager
    def measure(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Add the time of the block to phase ``name``."""
        signs = [(name, 1.0), *((outer, -1.0) for outer in self._open[-1:])]
        self._open.append(name)
        self._begin_work(name)
        try:
            if self._device.type == "cuda" and not on_host:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._pending += [(phase, sign, start, end) for phase, sign in signs]
            else:
                began = time.perf_counter()
                yield
                elapsed = time.perf_counter() - began
                for phase, sign in signs:
                    self.add({phase: sign * elapsed})
        finally:
            self._open.pop()
            if name in NOT_TRAINING:
                self._end_pause(name)
        self.memory[name] = max(memory_in_use(self._device), self.memory.get(name, 0))

    def _begin_work(self, name: str) -> None:
        if name in NOT_TRAINING:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the steps until here are training
            self._paused_at = work_seconds(self._device)
        elif self._training_since is None:
            self._training_since = work_seconds(self._device)

    def _end_pause(self, name: str) -> None:
        assert self._paused_at is not None, "phases that are not training do not nest"
        work = work_seconds(self._device) - self._paused_at
        self._paused_at = None
        self._work[name] = self._work.get(name, 0.0) + work
        if self._training_since is not None:
            self._training_since += work

    def work(self) -> dict[str, float]:
        """The seconds of work so far: of training, and of each phase of ``NOT_TRAINING``."""
        training = self._work.get(TRAINING, 0.0)
        if self._training_since is not None:
            now = work_seconds(self._device) if self._paused_at is None else self._paused_at
            training += now - self._training_since
        return self._work | {TRAINING: training}

    def saved(self) -> dict[str, float]:
        """The seconds of each phase and the work of training, for ``add`` after a resume."""
        work = {TRAINING: self.work()[TRAINING], SHARED: float(self.shared_machine)}
        return self.seconds() | work

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add time by phase, such as the time that a run spent before an interruption."""
        for name, spent in seconds.items():
            if name == SHARED:
                self.shared_machine |= spent > 0
                continue
            if name == TRAINING:
                self._work[TRAINING] = self._work.get(TRAINING, 0.0) + spent
                continue
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self, *, wait: bool = True) -> dict[str, float]:
        """Totals so far, in the order in which the phases first ended; with ``wait`` False, of what
        the device has finished."""
        if wait and self._pending:
            torch.cuda.synchronize(self._device)
        while self._pending and self._pending[0][-1].query():
            name, sign, start, end = self._pending.popleft()
            self.add({name: sign * start.elapsed_time(end) / 1000})
        return dict(self._seconds)
