"""Where the time goes: seconds by named phase."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Mapping

import torch


class Phases:
    """A stopwatch per phase.

    On a GPU, work is timed by events on the stream, so that measuring never waits for the device;
    phases of the host alone (reading data) use the clock. A phase inside another is not counted in
    the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, int] = {}
        self._pending: list[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = []
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
                    self.add(phase, sign * elapsed)
        finally:
            self._open.pop()
        held = memory_in_use(self._device)
        self._memory[name] = max(held, self._memory.get(name, 0))

    def memory(self) -> dict[str, int]:
        """The most bytes in use at the end of a phase so far, by phase."""
        return dict(self._memory)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def restore(self, seconds: Mapping[str, float]) -> None:
        """Add what a run had spent before it was interrupted."""
        for name, spent in seconds.items():
            self.add(name, spent)

    def seconds(self) -> dict[str, float]:
        """Totals so far, in the order in which phases first ended; waits for the device."""
        if self._pending:
            torch.cuda.synchronize(self._device)
            for name, sign, start, end in self._pending:
                self.add(name, sign * start.elapsed_time(end) / 1000)
            self._pending.clear()
        return dict(self._seconds)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: of the card on a GPU, of the process elsewhere; 0 where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0
