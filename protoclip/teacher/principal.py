"""Principal components of more rows than fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def components(stream: Callable[[], Iterable[Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    """Mean float64 [d] and first ``dim`` principal directions float64 [d, dim] of all rows.

    Deterministic: each direction's largest entry is positive.

    Args:
        stream: gives the rows, [n, d] at a time, on the device that is to compute; called twice.
        dim: at most d.
    """
    count, total = 0, torch.zeros(())
    for rows in stream():
        count, total = count + len(rows), total.to(rows.device) + rows.double().sum(dim=0)
    mean = total / count
    scatter = mean.new_zeros(len(mean), len(mean))
    for rows in stream():
        centred = rows.double() - mean
        scatter += centred.T @ centred
    _, vectors = torch.linalg.eigh(scatter)
    directions = vectors[:, -dim:].flip(1)  # largest variance first
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return mean, directions * largest.sign()


def pca(features: Tensor, dim: int) -> Tensor:
    """[N, d] -> [N, min(d, dim)] float32: the rows on their first principal components, centred."""
    if features.shape[1] <= dim:
        return features.float()
    mean, directions = components(lambda: [features], dim)
    return ((features.double() - mean) @ directions).float()
