"""One launch of a kernel: its grid, its global memory, and what was counted."""

from __future__ import annotations

import collections
import ctypes
from dataclasses import dataclass

import numpy as np

from tests.ptx.arithmetic import EmulatorError, i8, options
from tests.ptx.machine import Run
from tests.ptx.shadow import Shadow


@dataclass
class Access:
    """Of one instruction: requests of warps; wavefronts or sectors, and the fewest possible."""

    requests: int = 0
    done: int = 0
    least: int = 0

    def add(self, other):
        self.requests += other.requests
        self.done += other.done
        self.least += other.least


class Launch:
    def __init__(self, kernel, grid, threads, params, ranges, dynamic_shared):
        self.kernel, self.grid, self.threads = kernel, tuple(grid), threads
        missing = len(kernel.params) - len(params)  # pointers to Triton's scratch
        self.params = dict(zip(kernel.params, [*params, *[bytes(8)] * missing], strict=True))
        self.shared_bytes = kernel.dynamic_offset + dynamic_shared
        merged = []
        for start, end in sorted({(s, s + n) for s, n in ranges if n}):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        merged = merged or [[4096, 4096]]
        self.starts = np.array([s for s, _ in merged], i8)
        self.ends = np.array([e for _, e in merged], i8)
        self.origin = int(self.starts[0]) // 16 * 16
        bytes_ = -(-(int(self.ends[-1]) - self.origin) // 16) * 16
        window = (ctypes.c_uint8 * bytes_).from_address(self.origin)
        self.views = {s: np.frombuffer(window, f"u{s}") for s in (1, 2, 4, 8)}
        # Where each range lies in the shadow, in bytes.
        starts = self.starts // 16 * 16 - self.origin
        sizes = (self.ends - self.origin + 15) // 16 * 16 - starts
        self.shift = np.concatenate([[0], np.cumsum(sizes)[:-1]]) - starts
        self.shadow_bytes = int(sizes.sum())
        self.shadow = None
        self.block_counts = np.zeros(len(kernel.blocks), i8)
        self.accesses = collections.defaultdict(Access)  # by line of the PTX and space

    def compact(self, at):
        return at + self.shift[np.searchsorted(self.starts - self.origin, at, "right") - 1]

    def shadow_at(self, run):
        if not options.check:
            return None
        if self.shadow is None:
            self.shadow = Shadow(self.shadow_bytes // 2 + 8, 2, run, False)
        self.shadow.run = run
        return self.shadow

    def execute(self):
        total = self.grid[0] * self.grid[1] * self.grid[2]
        batch = max(1, options.lanes_together // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, total, batch):
                run = Run(self, first, min(batch, total - first))
                run.execute()
                if run.bulk or run.copies:
                    text = f"{self.kernel.name}: copies are still under way at the end"
                    raise EmulatorError(text)
        return self
