"""Prototype cross-entropy on a GPU: launchers (contract: protoclip/ops/prototypes.py).

16-bit rows of D <= 256: one attention pass with key = value = C gives loss and gradient, 2 products
of [N, K, D] and O(slices N D) memory. Wider or fp32 rows: a pass for the statistics, then weights
in waves and a GEMM, 3 products (one-pass fp32 tiles spill). Products are exact to fp32, but
weights are rounded to the inputs' dtype before they meet the values. Banks share the launches; the
scale is read on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from protoclip.kernels.attention import attention_kernel
from protoclip.kernels.probabilities import key_gradient, weighted_values
from protoclip.kernels.prototype_finish import finish_kernel
from protoclip.kernels.prototype_tiles import (
    WIDEST_ATTENTION,
    attention_tile,
    chunked_tile,
    cores,
    key_slices,
)


@dataclass(frozen=True)
class Parts:
    """Softmax statistics of S banks by slices of the keys, not yet joined (attention.py)."""

    row_max: Tensor  # fp32 [S, slices, N]
    row_sum: Tensor  # fp32 [S, slices, N]
    best: Tensor  # int64 [S, slices, N] (empty when not asked)
    expected: Tensor  # fp32 [S, slices, N] (empty when not asked)
    positive: Tensor  # fp32 [S, N], the label's product where labels are hard
    acc: Tensor  # fp32 [S, slices, N, DV] (empty without values)


def addressable(x: Tensor) -> Tensor:
    """x, copied where an offset inside a tile (up to 256 rows) would pass int32."""
    reach = 256 * x.stride(0) + x.shape[1] * x.stride(1)
    return x if reach < 2**31 else x.contiguous()


def fits_attention(x: Tensor) -> bool:
    """Whether one pass can hold the values: 16-bit and not too wide."""
    return x.dtype != torch.float32 and x.shape[1] <= WIDEST_ATTENTION


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(t.stride(0) for t in tensors), tuple(t.stride(1) for t in tensors)


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    labels: Sequence[Tensor],
    scale: Tensor,
    *,
    hard: int = 0,
    best: bool = False,
    expect: bool = False,
) -> Parts:
    """One pass over all banks. values: None, ``keys`` itself, or as many others of one width.
    hard: bit b set where ``labels[b]`` are hard; without any, labels may be any tensors."""
    (n, d), banks = q.shape, len(keys)
    dv = values[0].shape[1] if values else 0
    widest = max(d, dv)
    tile = attention_tile(q.device, widest) if values else chunked_tile(q.device, q.dtype)
    row_tiles = triton.cdiv(n, tile.n)
    key_tiles = triton.cdiv(max(len(k) for k in keys), tile.k)
    slices = key_slices(row_tiles * banks, key_tiles, cores(q.device))
    row = q.new_empty((banks, slices, n), dtype=torch.float32)
    parts = Parts(
        row,
        torch.empty_like(row),
        row.new_empty((banks, slices, n if best else 0), dtype=torch.int64),
        row.new_empty((banks, slices, n if expect else 0)),
        row.new_empty((banks, n)),
        row.new_empty((banks, slices, n, dv)),
    )
    which = "none" if not values else "keys" if values is keys else "own"
    attention_kernel[(row_tiles, slices, banks)](
        q, scale, tuple(keys), tuple(values or keys), tuple(labels),
        parts.row_max, parts.row_sum, parts.best, parts.expected, parts.positive, parts.acc,
        n, d, dv, slices, tuple(len(k) for k in keys),
        *q.stride(), *_strides(keys), *_strides(values or keys),
        BANKS=banks, HARD=hard, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_D=tile.d,
        BLOCK_DV=tile.d if values else 16, WHOLE_D=bool(values),
        EVEN_D=bool(values) and d == tile.d, VALUES=which, BEST=best, EXPECT=expect,
        **tile.options,
    )  # fmt: skip
    return parts


def finish(
    q: Tensor,
    scale: Tensor,
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    parts: Parts,
    out: Sequence[Tensor],
    *,
    hard: int = 0,
    statistics: bool = False,
    gradient: bool = False,
    targeted: bool = True,
) -> None:
    """Join the parts into ``out`` = (loss, gradient, nearest, row_max, row_sum, dscale).

    Written are: with ``statistics`` all but the gradient, with ``gradient`` the gradient (at scale
    0 dscale too); without ``targeted`` no loss, and acc / sum with nothing subtracted; dscale only
    where there is one."""
    banks, slices, n = parts.row_max.shape
    d = targets[0].shape[1]
    finish_kernel[(triton.cdiv(n, 32), banks)](
        q, scale, tuple(targets), tuple(labels),
        parts.row_max, parts.row_sum, parts.best, parts.expected, parts.positive, parts.acc, *out,
        n, d, slices, tuple(len(t) for t in targets), *q.stride(), *_strides(targets),
        BANKS=banks, HARD=hard, BLOCK_N=32, BLOCK_D=64,
        STATISTICS=statistics, LOSS=statistics and targeted, GRADIENT=gradient, TARGET=targeted,
        BEST=statistics and parts.best.numel() > 0, EXPECT=parts.expected.numel() > 0,
        DSCALE=out[5].numel() > 0,
        num_warps=4,
    )  # fmt: skip


def prototype_ce_fwd_banks(
    h: Tensor,
    prototypes: Sequence[Tensor],
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    scale: Tensor,
    need_grad: bool,
    need_nearest: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [S, N], gradient [S, N or 0, D], nearest [S, N or 0], row_max, row_sum [S, N],
    gradient of the scale [S, N or 0]."""
    (n, d), banks = h.shape, len(prototypes)
    row = h.new_empty((banks, n), dtype=torch.float32)
    loss, row_max, row_sum = row, torch.empty_like(row), torch.empty_like(row)
    gradient = row.new_empty((banks, n if need_grad else 0, d))
    nearest = row.new_empty((banks, n if need_nearest else 0), dtype=torch.int64)
    dscale = row.new_empty(gradient.shape[:2])
    out = (loss, gradient, nearest, row_max, row_sum, dscale)
    if not n:
        return out
    h, keys = addressable(h), [addressable(c) for c in prototypes]
    hard = sum(1 << b for b, m in enumerate(targets) if not len(m))
    t = [addressable(m) if len(m) else c for m, c in zip(targets, keys, strict=True)]
    labels = [y.contiguous() for y in labels]
    scale = scale.reshape(()).float()
    one_pass = need_grad and fits_attention(h)
    values = keys if one_pass else None
    expect = need_grad and h.dtype != torch.float32  # fp32 weights are not rounded
    asked = {"hard": hard, "best": need_nearest, "expect": expect}
    parts = attend(h, keys, values, labels, scale, **asked)
    finish(h, scale, t, labels, parts, out, hard=hard, statistics=True, gradient=one_pass)
    if need_grad and not one_pass:
        for b, c in enumerate(keys):
            weighted_values(h, c, c, scale, row_max[b], gradient[b])
        statistics = row_max[:, None], row_sum[:, None]
        expected = dscale if expect else dscale[:, :0]
        joined = Parts(*statistics, nearest, expected, loss, gradient[:, None])
        finish(h, scale, t, labels, joined, out, gradient=True)
    return out


def prototype_ce_bwd_prototypes(
    h: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    hard: bool,
) -> Tensor:
    """-> scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    return key_gradient(
        addressable(h), addressable(prototypes), labels.contiguous(), scale.reshape(()).float(),
        row_max.contiguous(), row_sum.contiguous(), weight.contiguous(), hard,
    )  # fmt: skip
