"""The stash: dot products that the forward pass of the C++ backend leaves to its backward pass,
which else forms them again. The bits are the same either way.

It is bytes, an integer dtype, so that autograd takes it for no result with a gradient. An op
returns tensors only: where nothing is stashed it is [0].
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from protoclip.ops import native
from protoclip.ops.dispatch import TABLE, function
from protoclip.ops.operators import wants_gradient

STASH_BYTES = 64 << 20  # the most: N = 4,096
CACHED_BYTES = 8 << 20  # stays in the caches, and so always pays

# A stash saves one product of four, whose time grows with D, and costs writing and reading 4
# bytes a logit. In the table of tests/ops/test_stash.py (two Zen 4 cores) it wins 11 D - 430
# picoseconds a logit in fp32 and 5.5 D - 480 in bf16, by least squares over N = 4,096. AMX
# multiplies bf16 at 2.17 TFLOP/s, and 2 / 2.17 = 0.92. So it pays beyond D = 43, 87 and 521
# (there, D = 512 takes 0.96 and 1.18 times as long with a stash, on one and two threads).
TRAFFIC_PS = 480
FP32_PRODUCT_PS = 11.0
BF16_PRODUCT_PS = 5.5
AMX_PRODUCT_PS = 0.92


def keeps_stash(stash: bool | None, *inputs: Tensor) -> bool:
    """Whether a call leaves its dot products to its backward pass.

    An exported graph does not: it would hold only for batches whose products fit."""
    wanted = stash is not False and wants_gradient(*inputs)
    return wanted and not torch.compiler.is_exporting()


@cache
def has_amx() -> bool:
    """Whether this processor has AMX, with which a product of bf16 rows is short."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # torch has no public name


def stash_bytes(n: int, m: int, d: int, dtype: torch.dtype, tile: tuple[int, int] = (1, 1)) -> int:
    """Bytes of the stash for rows [N, D] against [M, D], in whole tiles; 0: it does not pay."""
    rows = (n + tile[0] - 1) // tile[0] * tile[0]
    columns = (m + tile[1] - 1) // tile[1] * tile[1]
    num_bytes = 4 * rows * columns
    if num_bytes > STASH_BYTES:
        return 0
    product = FP32_PRODUCT_PS
    if dtype == torch.bfloat16:
        product = AMX_PRODUCT_PS if has_amx() else BF16_PRODUCT_PS
    return num_bytes if num_bytes <= CACHED_BYTES or product * d > TRAFFIC_PS else 0


def _bytes_for(op: str, backend: str, x: Tensor, y: Tensor, keep_stash: bool) -> int:
    if not keep_stash or not TABLE[op][backend].keeps_stash:
        return 0
    n, d = x.shape
    return stash_bytes(n, y.shape[0], d, x.dtype, native.stash_tile())


def empty_stash(op: str, backend: str, x: Tensor, y: Tensor, keep_stash: bool) -> Tensor:
    """A stash for the products of x and y, if they are to go there, in memory that the next step
    gets again."""
    num_bytes = _bytes_for(op, backend, x, y, keep_stash)
    if not num_bytes:
        return x.new_empty(0, dtype=torch.uint8)
    return function(op, backend, "empty_stash")(num_bytes)


def fake_stash(op: str, backend: str, x: Tensor, y: Tensor, keep_stash: bool) -> Tensor:
    """``empty_stash`` as ``torch.compile`` sees it."""
    return x.new_empty(_bytes_for(op, backend, x, y, keep_stash), dtype=torch.uint8)


def filled(stash: Tensor) -> Tensor | None:
    """A stash as backends take it: None if nothing goes there."""
    return stash if stash.numel() else None
