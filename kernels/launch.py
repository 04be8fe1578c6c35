"""Launch configurations as data: one frozen row per kernel, architecture and operand width.

There is no autotuner: a search would time kernels inside the user's first steps, and its choice
would change the bits of a result between runs. ``python -m protoclip.kernels.compile_report``
compiles every row without a GPU and shows what it costs in registers and shared memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Launch:
    """Tile BLOCK_N x BLOCK_M of the logits, the features read BLOCK_D at a time."""

    block_n: int
    block_m: int
    block_d: int
    warps: int
    stages: int
    ctas_per_sm: int  # promised: registers and shared memory must leave room for so many
    strip: int = 64  # columns at a time in tiles on the edge or the diagonal
    descriptors: bool = False  # load by TMA where base and row stride are multiples of 16 bytes


@dataclass(frozen=True)
class Card:
    """What one SM of an architecture has to give."""

    shared_bytes: int  # for all CTAs of an SM, 1 KiB of it reserved for each
    shared_bytes_per_cta: int
    tensor_core: str  # the PTX instruction that half-precision tiles must use
    registers: int = 65536


CARDS: dict[int, Card] = {
    80: Card(164 << 10, 163 << 10, "mma.sync"),
    89: Card(100 << 10, 99 << 10, "mma.sync"),
    90: Card(228 << 10, 227 << 10, "wgmma"),
    100: Card(228 << 10, 227 << 10, "tcgen05.mma"),
}

# Kernel -> architecture -> row, for half precision and rows that are aligned to whole BLOCK_D.
# "forward" keeps two CTAs on an SM, so that the exponentials of one run under the products of the
# other. "gradient" holds too much for that at 128 x 128, and smaller tiles would read L2 too often.
HALF: dict[str, dict[int, Launch]] = {
    "forward": {
        80: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        89: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        90: Launch(128, 128, 64, warps=8, stages=3, ctas_per_sm=2, strip=32, descriptors=True),
        100: Launch(128, 128, 64, warps=4, stages=3, ctas_per_sm=2, strip=32, descriptors=True),
    },
    "gradient": {
        80: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        89: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        90: Launch(128, 128, 64, warps=8, stages=3, ctas_per_sm=1, strip=32, descriptors=True),
        100: Launch(128, 128, 64, warps=8, stages=3, ctas_per_sm=1, strip=32, descriptors=True),
    },
    # With a stash: the forward that writes it and the gradient that reads it cut the same tiles.
    "stashing": {
        80: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        89: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        90: Launch(128, 64, 64, warps=8, stages=3, ctas_per_sm=2, strip=32, descriptors=True),
        100: Launch(128, 64, 64, warps=4, stages=3, ctas_per_sm=2, strip=32, descriptors=True),
    },
    "stashed": {
        80: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        89: Launch(64, 128, 32, warps=4, stages=4, ctas_per_sm=2, strip=32),
        90: Launch(128, 64, 64, warps=4, stages=3, ctas_per_sm=2, strip=16),
        100: Launch(128, 64, 64, warps=8, stages=3, ctas_per_sm=2, strip=16),
    },
    "sigmoid": {  # loss and gradient at once: larger tiles spill
        80: Launch(64, 64, 32, warps=4, stages=4, ctas_per_sm=2),
        89: Launch(64, 64, 32, warps=4, stages=4, ctas_per_sm=2),
        90: Launch(128, 64, 64, warps=8, stages=3, ctas_per_sm=1, strip=32, descriptors=True),
        100: Launch(128, 64, 64, warps=8, stages=3, ctas_per_sm=1, strip=32, descriptors=True),
    },
}
# Any card, any D, any strides.
HALF_ANY: dict[str, Launch] = {
    "forward": Launch(64, 64, 32, warps=4, stages=2, ctas_per_sm=2),
    "gradient": Launch(64, 32, 32, warps=4, stages=2, ctas_per_sm=2, strip=32),
    "stashing": Launch(64, 64, 32, warps=4, stages=2, ctas_per_sm=2),
    "stashed": Launch(64, 64, 32, warps=8, stages=2, ctas_per_sm=2, strip=16),
    "sigmoid": Launch(64, 32, 32, warps=4, stages=2, ctas_per_sm=2, strip=32),
}
# fp32 runs on FMA units: three-term tf32 would meet the error budget only if tensor cores rounded
# their accumulators, and they truncate (simulated at D = 512: 6 to 10 times the error of sgemm).
FLOAT_ANY = Launch(64, 64, 16, warps=8, stages=1, ctas_per_sm=2)
INTERPRETER = Launch(32, 64, 32, warps=4, stages=1, ctas_per_sm=1, strip=32)


@cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, x: Tensor, y: Tensor) -> Launch:
    """The row for a kernel, the features' device, width and alignment."""
    if x.device.type != "cuda":
        return INTERPRETER
    if x.dtype == torch.float32:
        return FLOAT_ANY
    row = HALF[kernel].get(_architecture(x.device))
    if row and x.shape[1] % row.block_d == 0 and aligned(x) and aligned(y):
        return row
    return HALF_ANY[kernel]


def aligned(x: Tensor) -> bool:
    """Whether every row starts on 16 bytes and is contiguous: wide loads, or a TMA descriptor."""
    row_bytes = x.stride(0) * x.element_size()
    return (
        x.stride(1) == 1
        and row_bytes % 16 == 0
        and x.data_ptr() % 16 == 0
        and x.stride(0) >= x.shape[1] > 0
    )


def rows() -> list[tuple[str, int, torch.dtype, str, Launch]]:
    """Every (kernel, architecture, operand dtype, operands, row) that ``choose`` can lead to;
    operands are "pointers", "descriptors" or "ragged" (any alignment)."""
    found = []
    for kernel, table in HALF.items():
        for arch, row in table.items():
            operands = ["descriptors", "pointers"] if row.descriptors else ["pointers"]
            found += [(kernel, arch, torch.bfloat16, how, row) for how in operands]
            found += [(kernel, arch, torch.float16, "ragged", HALF_ANY[kernel])]
            found += [
                (kernel, arch, torch.float32, how, FLOAT_ANY) for how in ("pointers", "ragged")
            ]
    return found
