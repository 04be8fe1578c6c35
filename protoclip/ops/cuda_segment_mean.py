"""segment_mean on a CUDA GPU: csrc/segment_mean.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native

native.load("cuda")


def segment_mean(values: Tensor, labels: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N], K -> means fp32 [K, D], counts int64 [K]; labels >= K are left out too."""
    return torch.ops.protoclip_native.segment_mean_cuda(values, labels, num_segments)
