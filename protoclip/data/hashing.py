"""Random numbers by position: the same on every machine, for any order of asking."""

from __future__ import annotations

from typing import Any

import numpy as np


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """Hash integers to uint64; arrays broadcast, so ``mix(seed, np.arange(n))`` is n numbers.

    Each part goes through the finaliser of SplitMix64 (Steele et al. 2014).
    """
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            if not isinstance(part, np.ndarray):
                part = np.array(int(part) & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64)
            value = part.astype(np.uint64)
            state = _finalise(state ^ (value + np.uint64(0x9E37_79B9_7F4A_7C15)))
    return np.asarray(state)


def _finalise(state: Any) -> Any:
    state = state + np.uint64(0x9E37_79B9_7F4A_7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return state ^ (state >> np.uint64(31))


def mix_seed(*parts: int) -> int:
    """One seed in [0, 2**63) out of several integers, such as (seed, episode)."""
    return int(mix(*parts)) >> 1


def heldout_mask(count: int, groups: np.ndarray | None, seed: int, percent: int = 10) -> np.ndarray:
    """Choose ``percent`` % of the positions, of each group alike.

    Args:
        count: number of positions.
        groups: group of each, int64 [count]; None: all in one.
        seed: another seed, another choice.
        percent: share in whole percents; every group of two or more gives at least one.
    Returns:
        bool [count].
    """
    groups = np.zeros(count, dtype=np.int64) if groups is None else groups
    mask = np.zeros(count, dtype=bool)
    order = np.lexsort((mix(seed, np.arange(count)), groups))
    _, starts = np.unique(groups[order], return_index=True)
    for members in np.split(order, starts[1:]):
        if len(members) >= 2:
            mask[members[: max(1, (len(members) * percent + 50) // 100)]] = True
    return mask
