"""How large the stash of the C++ backend is, and whether this processor gains by it: dot products
that the forward pass leaves to the backward pass, which else forms them again.

A stash saves one product of the backward pass and costs writing and reading 4 bytes a logit.
Which is less depends on the processor: with AMX a product of bf16 rows is short. So both are
measured, once per process, dtype and width, in about a tenth of a second at most. The bits are the
same either way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

# The C++ backend stashes fp32 products by tiles of rows and columns, within this bound.
STASH_TILE_ROWS = 128
STASH_TILE_COLUMNS = 256
STASH_BYTES = 64 << 20  # N = 4,096

ROWS, COLUMNS = 512, 2048  # of the products that are timed
WIDEST = 512  # their width; beyond it a product's time grows with the width
REPEATS = 5
COPIED_BYTES = 32 << 20  # more than most caches
ALWAYS_USED_BYTES = 8 << 20  # a stash that stays in the caches costs little
# Writing among products, then reading, takes longer than a copy: fitted on Zen 4 (docs/speed.md).
TRAFFIC_FACTOR = 1.5

# A backend's forward pass: x, y, logit_scale, offset, both_directions.
Forward = Callable[..., object]

_lock = threading.Lock()
_decisions: dict[tuple[torch.dtype, int], bool] = {}


def stash_bytes(n: int, m: int) -> int:
    """Bytes of the stash for the products of [n, m]; 0: they are not stashed."""
    rows = (n + STASH_TILE_ROWS - 1) // STASH_TILE_ROWS * STASH_TILE_ROWS
    columns = (m + STASH_TILE_COLUMNS - 1) // STASH_TILE_COLUMNS * STASH_TILE_COLUMNS
    num_bytes = 4 * rows * columns
    return num_bytes if num_bytes <= STASH_BYTES else 0


def stash_pays(forward: Forward, x: Tensor, stash: Tensor) -> bool:
    """Whether to fill and read ``stash`` for the logits of x [N, D].

    A process gives one answer for a dtype and width, so the backward pass reads what was written.
    """
    if stash.nbytes <= ALWAYS_USED_BYTES:
        return True
    key = (x.dtype, x.shape[1])
    with _lock:
        if key not in _decisions:
            product = seconds_of_a_product(forward, *key)
            _decisions[key] = product > TRAFFIC_FACTOR * seconds_of_traffic()
        return _decisions[key]


def seconds_of_a_product(forward: Forward, dtype: torch.dtype, width: int) -> float:
    """Seconds for the product of a logit: what ``width`` more columns add to the forward pass."""
    timed_width = min(max(width, 1), WIDEST)

    def seconds(columns: int) -> float:
        x = torch.ones(ROWS, columns, dtype=dtype, device="cpu")
        y = torch.ones(COLUMNS, columns, dtype=dtype, device="cpu")
        logit_scale = torch.ones((), dtype=torch.float32, device="cpu")
        return _fastest(
            lambda: forward(x=x, y=y, logit_scale=logit_scale, offset=0, both_directions=False)
        )

    added = max(seconds(2 * timed_width) - seconds(timed_width), 0.0)
    return added * width / timed_width / (ROWS * COLUMNS)


def seconds_of_traffic() -> float:
    """Seconds for writing and reading a logit of fp32, by the rate of a copy."""
    source = torch.zeros(COPIED_BYTES // 4, dtype=torch.float32, device="cpu")
    target = torch.zeros_like(source)
    return _fastest(lambda: target.copy_(source)) / source.numel()


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first is slow
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
