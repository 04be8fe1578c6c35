"""Encoding over several ranks: each takes a contiguous slice, all get all rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.distributed import rank, world_size


def sharded(
    encode: Callable[[range], Tensor],
    count: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """``encode(range(count))``, every rank doing its slice; to be called by all ranks.

    Args:
        encode: positions -> rows [len, D] on this rank's device, at least one of them.
        count: how many rows there are, the same on every rank.
        progress: told the number of rows that the other ranks encoded.
    Returns:
        Rows [count, D], the same on every rank.
    """
    world = world_size()
    if world == 1 or count == 0:
        return encode(range(count))
    step = math.ceil(count / world)
    # A rank past the end does the last row again: collectives want equal shapes.
    begin = min(rank() * step, count - 1)
    own = encode(range(begin, min(begin + step, count)))
    padded = own.new_zeros(step, own.shape[1])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    if progress is not None:
        progress(count - len(own))
    return torch.cat(parts)[:count]


def all_ranks(here: bool, device: torch.device) -> bool:
    """Whether ``here`` holds on every rank; to be called by all ranks."""
    if world_size() == 1:
        return here
    flag = torch.tensor([int(here)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
