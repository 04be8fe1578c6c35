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

# Two CTAs on an SM let one's exponentials run under the other's matrix products.
# fp32 runs on FMA units: three-term tf32 would meet the error budget only if tensor cores rounded
# their accumulators, and they truncate (simulated at D = 512: 6 to 10 times the error of sgemm).
HALF: dict[int, Launch] = {
    80: Launch(128, 128, 32, warps=8, stages=3, ctas_per_sm=2),
    89: Launch(128, 128, 32, warps=8, stages=3, ctas_per_sm=2),
    90: Launch(128, 128, 64, warps=8, stages=3, ctas_per_sm=2, descriptors=True),
    100: Launch(128, 128, 64, warps=8, stages=3, ctas_per_sm=2, descriptors=True),
}
HALF_ANY = Launch(64, 64, 32, warps=4, stages=2, ctas_per_sm=2)
FLOAT_ANY = Launch(64, 64, 16, warps=4, stages=2, ctas_per_sm=2)
INTERPRETER = Launch(32, 64, 32, warps=4, stages=1, ctas_per_sm=1, strip=32)


@cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(x: Tensor) -> Launch:
    """The row for a tensor's device and width; a safe small tile on a card not in the table."""
    if x.device.type != "cuda":
        return INTERPRETER
    if x.dtype == torch.float32:
        return FLOAT_ANY
    return HALF.get(_architecture(x.device), HALF_ANY)


def rows() -> list[tuple[int, torch.dtype, Launch]]:
    """Every (architecture, operand dtype, row) that can be chosen, for the compile report."""
    halves = [(arch, torch.bfloat16, row) for arch, row in HALF.items()]
    safe = [(80, torch.float16, HALF_ANY), (90, torch.float16, HALF_ANY)]
    floats = [(arch, torch.float32, FLOAT_ANY) for arch in HALF]
    return halves + safe + floats
