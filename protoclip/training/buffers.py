"""Copies of many small buffers, such as batch norm's statistics, with few kernels.

A ResNet-50 has 159 of them; copied one by one, a step would launch hundreds of kernels for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoclip.distributed import broadcast

Flat = dict[torch.dtype, Tensor]  # the values of buffers, one after the other


def flat_copy(buffers: Sequence[Tensor]) -> Flat:
    """A copy of the buffers."""
    return {
        dtype: torch.cat([buffer.flatten() for buffer in of_dtype])
        for dtype, of_dtype in _by_dtype(buffers).items()
    }


def copy_back(buffers: Sequence[Tensor], values: Flat) -> None:
    """Write values into the buffers that they were copied from."""
    for dtype, of_dtype in _by_dtype(buffers).items():
        parts = values[dtype].split([buffer.numel() for buffer in of_dtype])
        shaped = [part.view_as(buffer) for part, buffer in zip(parts, of_dtype, strict=True)]
        torch._foreach_copy_(of_dtype, shaped)


def restore_unless(taken: Tensor, buffers: Sequence[Tensor], before: Flat, after: Flat) -> None:
    """Put back the values from before a step unless it was ``taken``, a bool scalar for which the
    host does not wait, else those from after its forward pass; then every rank gets those of
    rank 0.

    Raises:
        ValueError: a buffer has another shape than before the step.
    """
    sizes_before = {dtype: len(values) for dtype, values in before.items()}
    sizes_after = {dtype: len(values) for dtype, values in after.items()}
    if sizes_after != sizes_before:
        raise ValueError(
            "training: expected buffers of the model that keep their shapes, got "
            f"{sum(sizes_after.values())} numbers after a step and {sum(sizes_before.values())} "
            "before; keep what changes its shape in a plain attribute"
        )
    values = {dtype: torch.where(taken, after[dtype], before[dtype]) for dtype in after}
    broadcast(*values.values())
    copy_back(buffers, values)


def _by_dtype(buffers: Sequence[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        groups.setdefault(buffer.dtype, []).append(buffer)
    return groups
