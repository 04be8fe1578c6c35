"""The one place that knows about ranks and seeds."""

from __future__ import annotations

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def seed_everything(seed: int) -> None:
    """Seed torch's global generators (weights, dropout) on every device, the same on every rank."""
    torch.manual_seed(seed)


def generator(*stream: int) -> torch.Generator:
    """A CPU generator for one purpose: equal ``stream`` numbers give equal draws on every rank.

    Streams are (seed, purpose, position), so that no draw depends on how many were made before it.
    """
    state = 0
    for number in stream:
        # A multiply-and-add over the odd constant of splitmix64 keeps (1, 2) and (2, 1) apart.
        state = (state * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)
