"""Choosing rows of clusters: the first few of each, in an order that does not depend on ranks.

A key is an int64 >= 0 that no two rows share: 31 bits of a distance, or random ones, then the
row's position.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.seeds import mix

CHOICES = ("random", "closest")
ORDER_BITS = 31
POSITION_BITS = 32


def check_choice(function: str, choose: str) -> None:
    if choose not in CHOICES:
        raise ValueError(f"{function}: expected choose in {CHOICES}, got {choose!r}")


def sum_over(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    """The sum over the ranks of a group, in place."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def positions_of(count: int, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """The positions, over all ranks, of this rank's ``count`` rows: int64 [count]."""
    start = 0
    if group is not None:
        counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        counts[dist.get_rank(group)] = count
        start = int(sum_over(group, counts)[: dist.get_rank(group)].sum())
    return torch.arange(start, start + count, device=device)


def random_keys(positions: Tensor, *stream: int) -> Tensor:
    """Keys in a random order that follows from the numbers of ``stream``."""
    bits = mix(*stream, positions.cpu().numpy()) >> np.uint64(64 - ORDER_BITS)
    return _keys(torch.from_numpy(bits.astype(np.int64)).to(positions.device), positions)


def nearest_keys(squared: Tensor, positions: Tensor) -> Tensor:
    """Keys from the smallest squared distance, fp32 >= 0 [N], to the largest."""
    # As integers, the bits of such numbers have the same order.
    return _keys(squared.abs().view(torch.int32).long(), positions)


def _keys(bits: Tensor, positions: Tensor) -> Tensor:
    return (bits << POSITION_BITS) + positions % 2**POSITION_BITS


def first_of_each(
    keys: Tensor, labels: Tensor, quotas: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Which rows have the ``quotas[k]`` smallest keys of their cluster k, over all ranks.

    Each bit of the clusters' largest accepted keys is one pass over the rows and one sum over the
    ranks, so no rank ever holds the rows of others.

    Args:
        keys: int64 [N], different.
        labels: int64 [N], the cluster of each row.
        quotas: int64 [K], equal on all ranks.
    Returns:
        bool [N].
    """
    cut = torch.zeros_like(quotas)
    for bit in reversed(range(ORDER_BITS + POSITION_BITS)):
        higher = cut + (1 << bit)
        below = labels[keys < higher[labels]]
        counts = sum_over(group, torch.bincount(below, minlength=len(quotas)))
        cut = torch.where(counts <= quotas, higher, cut)
    return keys < cut[labels]
