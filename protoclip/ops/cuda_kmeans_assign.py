"""kmeans_assign on a CUDA GPU: csrc/kmeans_assign.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native

native.load("cuda")


def kmeans_assign(
    points: Tensor, centroids: Tensor, *, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """[N, D], [K, D] -> labels int64 [N], squared distances fp32 [N].

    ``exact=False`` (precision "bf16") leaves each label as the tensor cores scored it: fp32 rows
    rounded to bf16, and no second look at near ties.
    """
    return torch.ops.protoclip_native.kmeans_assign_cuda(points, centroids, exact)
