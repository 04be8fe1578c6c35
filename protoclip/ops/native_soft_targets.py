"""Soft targets on the CPU: csrc/soft_targets_cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native, native_prototype_cross_entropy

native.load()


def soft_targets(source_centroids: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """[K, Ds], [K, D], tau > 0 -> fp32 [K, D]."""
    return torch.ops.protoclip_native.soft_targets(
        source_centroids, prototypes, temperature, native_prototype_cross_entropy.ARITHMETIC
    )
