"""segment_mean on the CPU: csrc/segment_mean_cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native

native.load()


def segment_mean(values: Tensor, labels: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N], K -> means fp32 [K, D] (0 where empty), counts int64 [K]."""
    return torch.ops.protoclip_native.segment_mean(values, labels, num_segments)
