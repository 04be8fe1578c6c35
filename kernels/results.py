"""What the kernels' launchers return, by name. The C++ backend returns the same values in the same
order, so ``protoclip.ops`` wraps every backend's results in these classes. No Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PairStatistics(NamedTuple):
    """The rows of a tensor of the contrastive loss's statistics, in their order (C++:
    StatisticsRow), [4, N] or [4, M] with N and M rounded up to a multiple of 8. Logits are base-2.
    """

    reference: Tensor  # near the largest of the logits seen
    sum: Tensor  # of 2^(logit - reference) over the logits seen
    positive_sum: Tensor  # of the positives' logits
    num_positives: Tensor


def empty_statistics(x: Tensor, length: int) -> Tensor:
    """Room for ``PairStatistics`` of so many rows or columns, fp32. Each of the four begins at a
    sector of a GPU's memory; kernels would otherwise read more sectors."""
    # In this form torch.export sees without a guard that it is not shorter.
    return x.new_empty((4, length + -length % 8), dtype=torch.float32)


class IdCodes(NamedTuple):
    """Ids as small numbers, equal for equal ids of a column; a query's id that no key has is -1."""

    query: Tensor  # int32 [R, N]
    key: Tensor  # int32 [R, M], in [0, M)


class ContrastiveForward(NamedTuple):
    """Losses in nats, LSE - mean positive, and statistics."""

    # [N]: of each row, or of both directions the weighted sum of a row's and its column's (for the
    # caller to compute where N != M); or [], the weighted sum of all.
    loss: Tensor
    positive_mean: Tensor  # [N], or [0] of both directions, and of a sum
    row_statistics: Tensor  # [4, N rounded up], ``PairStatistics``
    column_statistics: Tensor  # [4, M rounded up], or [4, 0] of one direction


class ContrastiveGradients(NamedTuple):
    dx: Tensor  # [N, D], in x's dtype
    dy: Tensor  # [M, D], in y's dtype
    dlogit_scale: Tensor  # fp32 []
    dkey_bias: Tensor  # fp32 [M], or [0] without biases


class SigmoidLoss(NamedTuple):
    """Without gradients dx and dy are [0, D]."""

    loss: Tensor  # fp32 [], the sum over the pairs
    dx: Tensor  # [N, D], in x's dtype
    dy: Tensor  # [M, D], in y's dtype
    dlogit_scale: Tensor  # fp32 []
    dlogit_bias: Tensor  # fp32 []


class SigmoidGradients(NamedTuple):
    """Gradients of the sigmoid loss."""

    dx: Tensor  # [N, D]
    dy: Tensor  # [M, D]
    dlogit_scale: Tensor  # []
    dlogit_bias: Tensor  # []


class SampleLosses(NamedTuple):
    """Losses of samples against prototypes; what is not wanted is [0], or [0, D]."""

    loss: Tensor  # [N], 0 where ignored; or [], their mean or sum
    divisor: Tensor  # that a mean or (1) a sum is divided by [], or [0] where losses are [N]
    gradient: Tensor  # of the features, sum_k p_k C_k - m_y: [N, D], 0 where ignored
    nearest: Tensor  # int64 [N], the prototype with the largest logit
    row_max: Tensor  # [N], in the units of the backend's own backward
    row_sum: Tensor  # [N]
    scale_gradient: Tensor  # of logit_scale, features . gradient: [N]


class ScaledGradients(NamedTuple):
    """Gradients of samples' losses for upstream ones."""

    dfeatures: Tensor  # [N, D] in the features' dtype, or [0, D]
    dlogit_scale: Tensor  # fp32 []
