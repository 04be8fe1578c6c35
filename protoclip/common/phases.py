"""Where the time of a run goes, and its memory, by phase."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping

import torch

from protoclip.common.host import memory_in_use


class Phases:
    """Seconds spent in each named phase.

    On a GPU, work is timed by events on the stream, so measuring never waits for the device.
    Phases that run on the host alone (reading data) use the clock. The time of an inner phase does
    not count for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}  # the most bytes in use at the end of a phase
        self._pending: deque[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._open: list[str] = []

    @contextlib.contextmanager
    def measure(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Add the time of the block to phase ``name``."""
        signs = [(name, 1.0), *((outer, -1.0) for outer in self._open[-1:])]
        self._open.append(name)
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
        self.memory[name] = max(memory_in_use(self._device), self.memory.get(name, 0))

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add time by phase, such as the time that a run spent before an interruption."""
        for name, spent in seconds.items():
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
