"""InfoNCE on the CPU: csrc/info_nce_cpu.cpp behind the contract of ops/info_nce.py."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native

native.load()

# "auto" follows the dtype and the CPU. Tests force "float", "bf16" or "split": see gemm_tile.h.
ARITHMETIC = "auto"

STASH_BYTES = 64 << 20  # of fp32 products: N = 4,096
TILE = 128, 256  # of KeptProducts in csrc/strip_gradient.h


def stash_size(n: int, m: int) -> int:
    """int16 elements that the products of N rows and M columns take, in whole tiles; 0 where they
    are too many to keep."""
    rows, columns = (-(-side // tile) * tile for side, tile in zip((n, m), TILE, strict=True))
    return 2 * rows * columns if 4 * rows * columns <= STASH_BYTES else 0


def new_stash(size: int) -> Tensor:
    """int16 [size], uninitialised, in memory that the next step gets again (csrc/memory_pool.h)."""
    return torch.ops.protoclip_native.pooled(size)


def contrastive_fwd(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, columns: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the strip x [N, D] against y [M, D]; its products are left in ``kept``."""
    return torch.ops.protoclip_native.contrastive_fwd(
        x, y, scale, offset, columns, ARITHMETIC, kept
    )


def contrastive_bwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    column_max: Tensor,
    column_sum: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    offset: int,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dx, dy (inputs' dtype) and dscale (fp32) of the strip."""
    stats = row_max, row_sum, column_max, column_sum
    weights = row_weight, column_weight
    return torch.ops.protoclip_native.contrastive_bwd(
        x, y, scale, *stats, *weights, offset, ARITHMETIC, kept
    )
