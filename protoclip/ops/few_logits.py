"""Prototype cross-entropy of few samples against few prototypes, in fp64 for every backend.

The rounding errors of so few terms do not average out, and in fp64 they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protoclip.ops import checks, reference

FEW_LOGITS = 1024


def applies(h: Tensor, prototypes: Sequence[Tensor]) -> bool:
    """Whether each bank has at most FEW_LOGITS logits, but some."""
    return 0 < len(h) * max(len(c) for c in prototypes) <= FEW_LOGITS


def forward(
    h: Tensor,
    prototypes: Sequence[Tensor],
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    scale: Tensor,
    need_grad: bool,
    need_nearest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As a backend's ``prototype_ce_fwd_banks``, but the statistics say nothing:
    ``backward_prototypes`` starts anew. Labels out of range are refused on a CPU, elsewhere they
    give a NaN loss."""
    if not h.is_cuda:
        for c, y in zip(prototypes, labels, strict=True):
            checks.label_values("prototype_cross_entropy", y, len(c))
    banks = [
        reference.prototype_ce_fwd(h.double(), c.double(), m.double(), y, scale.double())
        for c, m, y in zip(prototypes, targets, labels, strict=True)
    ]
    loss, gradient, nearest, dscale = (torch.stack(t) for t in zip(*banks, strict=True))
    with_grad, with_nearest = len(h) if need_grad else 0, len(h) if need_nearest else 0
    loss = loss.float()
    return (
        loss,
        gradient[:, :with_grad].float().contiguous(),
        nearest[:, :with_nearest].contiguous(),
        torch.zeros_like(loss),
        torch.ones_like(loss),
        dscale[:, :with_grad].float().contiguous(),
    )


def backward_prototypes(
    h: Tensor, prototypes: Tensor, labels: Tensor, scale: Tensor, weight: Tensor, hard: bool
) -> Tensor:
    """-> scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    wide = h.double(), prototypes.double()
    grad = reference.prototype_ce_bwd_prototypes(
        *wide, labels, scale.double(), weight.double(), hard
    )
    return grad.to(prototypes.dtype).contiguous()
