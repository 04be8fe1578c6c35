"""What the kernels' launchers return, by name. The C++ backend returns the same values in the same
order, so ``protoclip.ops`` names those of every backend by these classes. No Triton here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class InfoNceStatistics(NamedTuple):
    """Of the rows and columns of a strip, and the base-2 logits of its positives."""

    row_max: Tensor  # [N]
    row_sum: Tensor  # [N]
    column_max: Tensor  # [M], or [0] without columns
    column_sum: Tensor  # [M], or [0] without columns
    positive: Tensor  # [N]


class LossAndStatistics(NamedTuple):
    """The loss, and the statistics that its gradient needs."""

    loss: Tensor  # [N], or the sum []
    statistics: InfoNceStatistics


class Gradients(NamedTuple):
    dx: Tensor  # [N, D], in x's dtype
    dy: Tensor  # [M, D], in y's dtype
    dlogit_scale: Tensor  # fp32 []


class ContrastiveStatistics(NamedTuple):
    """Maximum and sum of the logits seen, sum and count of the positives'."""

    rows: Tensor  # [4, N]
    columns: Tensor  # [4, M], or [4, 0] without columns


class ContrastiveGradients(NamedTuple):
    dx: Tensor  # [N, D], in x's dtype
    dy: Tensor  # [M, D], in y's dtype
    dlogit_scale: Tensor  # fp32 []
    dkey_bias: Tensor  # fp32 [M]


class SigmoidLoss(NamedTuple):
    """Without gradients dx and dy are [0, D]."""

    loss: Tensor  # fp32 [], the sum over the pairs
    dx: Tensor  # [N, D], in x's dtype
    dy: Tensor  # [M, D], in y's dtype
    dlogit_scale: Tensor  # fp32 []
    dlogit_bias: Tensor  # fp32 []


class SampleLosses(NamedTuple):
    """Of every sample against prototypes; what is not wanted is [0], or [0, D]."""

    loss: Tensor  # [N], 0 where ignored
    gradient: Tensor  # of the features, sum_k p_k C_k - m_y: [N, D], 0 where ignored
    nearest: Tensor  # int64 [N], the prototype with the largest logit
    row_max: Tensor  # [N], in the units of the backend's own backward
    row_sum: Tensor  # [N]
    scale_gradient: Tensor  # of logit_scale, features . gradient: [N]
