"""Prototype cross-entropy on the CPU: csrc/prototype_cross_entropy_cpu.cpp behind the contract of
ops/prototype_cross_entropy.py. Statistics are in base-2 logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoclip.ops import native

native.load()

# "auto" follows the dtype and the CPU. Tests force "float", "bf16" or "split": see gemm_tile.h.
ARITHMETIC = "auto"


def prototype_ce_fwd_banks(
    h: Tensor,
    prototypes: Sequence[Tensor],
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    scale: Tensor,
    need_grad: bool,
    need_nearest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [S, N], gradient [S, N or 0, D], nearest [S, N or 0], row_max, row_sum [S, N],
    gradient of the scale [S, N or 0]."""
    return torch.ops.protoclip_native.prototype_ce_fwd(
        h, prototypes, targets, labels, scale, need_grad, need_nearest, ARITHMETIC
    )


def prototype_ce_bwd_prototypes(
    h: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    hard: bool,
) -> Tensor:
    """-> scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    return torch.ops.protoclip_native.prototype_ce_bwd_prototypes(
        h, prototypes, labels, scale, row_max, row_sum, weight, hard, ARITHMETIC
    )
