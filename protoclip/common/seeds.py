"""Random numbers as a function of (seed, purpose, position), never of what was drawn before.

``generator`` gives draws of torch for one purpose; ``mix`` one number for each of many positions,
the same in every worker. They hash differently for historical reasons: one hash would do, but it
would draw other samples and clusters, and the results on record would have to be measured again.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def generator(*stream: int) -> torch.Generator:
    """A CPU generator for one purpose: equal ``stream`` numbers give equal draws on every rank.

    Streams are (seed, purpose, position), so no draw depends on the number of earlier draws.
    """
    state = 0
    for number in stream:
        # A multiply-and-add over the odd constant of splitmix64 keeps (1, 2) and (2, 1) apart.
        state = (state * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64, the same on every machine and in any order of calls.

    Arrays broadcast, so ``mix(seed, np.arange(n))`` is n numbers. Each part goes through the
    finaliser of SplitMix64 (Steele et al. 2014).
    """
    golden = np.uint64(0x9E37_79B9_7F4A_7C15)
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            if not isinstance(part, np.ndarray):
                part = np.array(int(part) & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64)
            state = (state ^ (part.astype(np.uint64) + golden)) + golden
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def evenly_spaced(length: int, count: int) -> torch.Tensor:
    """At most ``count`` of the positions below ``length``, with the first and the last: int64."""
    # In fp32 the last of more than 2^24 would be one too far.
    most = min(count, length)
    return torch.linspace(0, length - 1, most, dtype=torch.float64, device="cpu").round().long()


def seed_everything(*stream: int) -> None:
    """Seed the global generators of torch (every device), NumPy and Python for one purpose."""
    seed = int(mix(*stream)) >> 1 if len(stream) > 1 else stream[0]
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
