"""The sigmoid loss on the CPU: csrc/siglip_cpu.cpp behind the contract of ops/siglip.py."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native, native_info_nce

native.load()


def sigmoid_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], then dx, dy, dscale, dbias of the strip x [N, D] against y [M, D]."""
    return torch.ops.protoclip_native.sigmoid_loss(
        x, y, scale, bias, offset, gradients, native_info_nce.ARITHMETIC
    )
