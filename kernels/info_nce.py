"""InfoNCE over tiles of the logits, which never reach memory.

Base-2 logits s_ij = c x_i.y_j, c = scale log2(e); row i is positive at column i + offset.

Forward, one pass: each tile leaves, for its rows and for its columns, a reference r and
sum 2^(s - r) *without the positives*; a second small kernel merges them and adds the positive. A
loss near zero is then log2(1 + little), not a difference of large numbers. All rows and columns of
a tile share one reference, the tile's maximum, hence one exponential an element; where that would
underflow for some row or column, and on the edges and the diagonal, the tile takes one reference
for each and a second exponential.

Backward, in chunks of the logits: form a chunk's logits again, write the gradient
G = P_row w_row + P_column w_column - (weights at the positives) in the features' dtype to a bounded
scratch, and leave dx = scale G y, dy = scale G^T x to two real matrix products (``waves.py``).

The gradient of the scale is sum G x.y = sum G (x.y - center) for any center, because G sums to
zero over all pairs; with the center near the logits, a common part of the features cannot magnify
the rounding of G.

Sums are fp32 and in a fixed order: no atomics, the same bits each time. Extra memory: 64 MiB of
partial sums forward, ``waves.SCRATCH_BYTES`` plus fp32 gradients backward. fp32 features are
multiplied in fp32, never tf32, by these kernels; ``torch.backends.cuda.matmul`` settings hold for
the backward's two products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from protoclip.kernels import launch, waves
from protoclip.kernels.tiles import operands, products, tile_origin
from protoclip.kernels.waves import store_gradient
from torch import Tensor

PARTIAL_BYTES = 64 << 20
MERGE_BLOCK = 64  # rows or columns a program merges
MERGE_DEPTH = 32  # partials it reads at a time
LOG2E = tl.constexpr(1.4426950408889634)
SPREAD = tl.constexpr(64.0)  # of 126 binary orders fp32 has below 1


@triton.jit
def _sums_exact(s):
    """-> references and sums of 2^(s - reference) of each row and column; -inf and 0 if empty."""
    row_max, column_max = tl.max(s, 1), tl.max(s, 0)
    row_zero = tl.where(row_max == -float("inf"), 0.0, row_max)
    column_zero = tl.where(column_max == -float("inf"), 0.0, column_max)
    row_sum = tl.sum(tl.exp2(s - row_zero[:, None]), 1)
    column_sum = tl.sum(tl.exp2(s - column_zero[None, :]), 0)
    return row_max, row_sum, column_max, column_sum


@triton.jit(do_not_specialize=["n", "m", "offset"])
def forward_kernel(
    x, y, scale_ptr,  # [N, D], [M, D], []
    row_max_ptr, row_sum_ptr,  # [column blocks, N]
    column_max_ptr, column_sum_ptr,  # [row blocks, M]
    positive_ptr,  # [N]
    n, m, d, offset,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    acc = products(
        x, y, row0, col0, n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
    )  # fmt: skip
    c = tl.load(scale_ptr).to(tl.float32) * LOG2E
    top = c * tl.min(acc) if c < 0 else c * tl.max(acc)
    e = tl.exp2(acc * c - top)
    row_sum, column_sum = tl.sum(e, 1), tl.sum(e, 0)
    row_max = tl.full((BLOCK_N,), 0.0, tl.float32) + top
    column_max = tl.full((BLOCK_M,), 0.0, tl.float32) + top

    rows, cols = row0 + tl.arange(0, BLOCK_N), col0 + tl.arange(0, BLOCK_M)
    edge = (row0 + BLOCK_N > n) | (col0 + BLOCK_M > m)
    diagonal = (row0 + offset < col0 + BLOCK_M) & (row0 + BLOCK_N + offset > col0)
    least = tl.minimum(tl.min(row_sum), tl.min(column_sum))
    if edge | diagonal | (least < tl.exp2(-SPREAD)):
        s = acc * c
        positive = cols[None, :] == rows[:, None] + offset
        held = (
            (rows < n) & (rows + offset >= col0) & (rows + offset < tl.minimum(col0 + BLOCK_M, m))
        )
        tl.store(positive_ptr + rows, tl.sum(tl.where(positive, s, 0.0), 1), mask=held)
        negative = (rows[:, None] < n) & (cols[None, :] < m) & (positive == 0)
        s = tl.where(negative, s, -float("inf"))
        row_max, row_sum, column_max, column_sum = _sums_exact(s)

    at = (col0 // BLOCK_M).to(tl.int64) * n + rows
    tl.store(row_max_ptr + at, row_max, mask=rows < n)
    tl.store(row_sum_ptr + at, row_sum, mask=rows < n)
    if COLUMNS:
        at = (row0 // BLOCK_N).to(tl.int64) * m + cols
        tl.store(column_max_ptr + at, column_max, mask=cols < m)
        tl.store(column_sum_ptr + at, column_sum, mask=cols < m)


@triton.jit
def _join(reference_a, sum_a, reference_b, sum_b):
    """-> the statistics of two sets of logits together."""
    reference = tl.maximum(reference_a, reference_b)
    zero = tl.where(reference == -float("inf"), 0.0, reference)
    return reference, sum_a * tl.exp2(reference_a - zero) + sum_b * tl.exp2(reference_b - zero)


@triton.jit
def _add_positive(reference, total, positive):
    """Refer the sum to the positive where that is the largest term, so that its own is exactly 1;
    elsewhere to a whole number near the log of the sum."""
    level = reference + tl.log2(total)
    leads = positive >= level
    base = tl.where(leads, positive, tl.floor(level))
    others = total * tl.exp2(reference - base)
    others = tl.where(total == 0, total, others)
    return base, others + tl.where(leads, 1.0, tl.exp2(positive - base))


@triton.jit(do_not_specialize=["blocks", "length", "offset", "n"])
def merge_kernel(
    max_ptr, sum_ptr,  # [blocks, length]
    positive_ptr,  # [n], of position + offset where that is in [0, n)
    out_max_ptr, out_sum_ptr,  # [length]
    blocks, length, n, offset,
    HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge partials, and what earlier waves left in the output; the last one adds positives."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    reference = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BEFORE:
        reference = tl.load(out_max_ptr + position, mask=inside, other=0.0)
        total = tl.load(out_sum_ptr + position, mask=inside, other=0.0)
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        at = block[:, None].to(tl.int64) * length + position[None, :]
        mask = (block[:, None] < blocks) & inside[None, :]
        r = tl.load(max_ptr + at, mask=mask, other=-float("inf"))  # [DEPTH, BLOCK]
        t = tl.load(sum_ptr + at, mask=mask, other=0.0)
        top = tl.max(r, 0)
        zero = tl.where(top == -float("inf"), 0.0, top)
        t = tl.sum(t * tl.exp2(r - zero[None, :]), 0)
        reference, total = _join(reference, total, top, t)
    if IS_LAST:
        partner = position.to(tl.int64) + offset
        paired = inside & (partner >= 0) & (partner < n)
        positive = tl.load(positive_ptr + partner, mask=paired, other=-float("inf"))
        reference, total = _add_positive(reference, total, positive)
    tl.store(out_max_ptr + position, reference, mask=inside)
    tl.store(out_sum_ptr + position, total, mask=inside)


@triton.jit
def _peaks(sum_ptr, weight_ptr, length, BLOCK: tl.constexpr):
    """-> the largest sum and the largest absolute weight."""
    total = tl.zeros((BLOCK,), tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, length, BLOCK):
        position = first + tl.arange(0, BLOCK)
        mask = position < length
        total = tl.maximum(total, tl.load(sum_ptr + position, mask=mask, other=0.0))
        w = tl.load(weight_ptr + position, mask=mask, other=0.0)
        weight = tl.maximum(weight, tl.abs(w))
    return tl.max(total), tl.max(weight)


@triton.jit(do_not_specialize=["n", "m"])
def prepare_kernel(
    x_ptr, y_ptr, scale_ptr,  # [D], [D] of the first pair, []
    row_sum_ptr, row_weight_ptr, column_sum_ptr, column_weight_ptr,  # [N], [N], [M], [M]
    out_ptr,  # [3]: center, lift, scale / lift
    n, m, d, stride_x_d, stride_y_d,
    LIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find on the device what would else need a look at values.

    The center is the first pair's product, or 0 where every positive has all the probability: G is
    then 0 there and no longer sums to zero. The lift is a power of two that lets the weights, about
    1/N, fill fp16's range; |G| is at most the sum of the two largest weights.
    """
    product = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d, BLOCK):
        depth = k + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + depth.to(tl.int64) * stride_x_d, mask=depth < d, other=0.0)
        y = tl.load(y_ptr + depth.to(tl.int64) * stride_y_d, mask=depth < d, other=0.0)
        product += x.to(tl.float32) * y.to(tl.float32)
    row_sum, row_weight = _peaks(row_sum_ptr, row_weight_ptr, n, BLOCK)
    column_sum, column_weight = _peaks(column_sum_ptr, column_weight_ptr, m, BLOCK)
    center = tl.sum(product)
    used = (tl.maximum(row_sum, column_sum) != 1.0) & (tl.abs(center) < float("inf"))
    center = tl.where(used, center, 0.0)
    lift = center * 0.0 + 1.0
    if LIFT:
        peak = row_weight + column_weight
        exponent = tl.minimum(tl.maximum(14.0 - tl.ceil(tl.log2(peak)), -80.0), 80.0)
        lift = tl.where((peak > 0) & (peak < float("inf")), tl.exp2(exponent), 1.0)
    tl.store(out_ptr, center)
    tl.store(out_ptr + 1, lift)
    tl.store(out_ptr + 2, tl.load(scale_ptr).to(tl.float32) / lift)


@triton.jit
def _probabilities(s, reference, coefficient, positive):
    """2^(s - reference) * coefficient, the positive's exponent snapped to 0 where the forward used
    it as the reference: an fma rounds c x.y otherwise than the product stored then."""
    exponent = s - reference
    snap = positive & (tl.abs(exponent) <= tl.abs(reference) * 2.4e-7)  # 4 units in the last place
    return tl.exp2(tl.where(snap, 0.0, exponent)) * coefficient


@triton.jit(do_not_specialize=["n", "m", "offset"])
def gradient_kernel(
    x, y, scale_ptr, prepared_ptr,  # [N, D], [M, D], [], [3] of prepare_kernel
    row_max_ptr, row_sum_ptr, row_weight_ptr,  # [N]
    column_max_ptr, column_sum_ptr, column_weight_ptr,  # [M], not read without COLUMNS
    g_ptr, row_lost_ptr, column_lost_ptr, dscale_ptr,  # as in waves.Target, [tiles]
    n, m, d, offset, stride_g,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    COLUMNS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """G of one tile, and its share of sum G (x.y - center) before G is rounded."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    acc = products(
        x, y, row0, col0, n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
    )  # fmt: skip
    c = tl.load(scale_ptr).to(tl.float32) * LOG2E
    rows, cols = row0 + tl.arange(0, BLOCK_N), col0 + tl.arange(0, BLOCK_M)
    row_in, col_in = rows < n, cols < m
    row_max = tl.load(row_max_ptr + rows, mask=row_in, other=0.0)
    center, lift = tl.load(prepared_ptr), tl.load(prepared_ptr + 1)
    row_weight = tl.load(row_weight_ptr + rows, mask=row_in, other=0.0) * lift
    row_coef = row_weight / tl.load(row_sum_ptr + rows, mask=row_in, other=1.0)
    high, low = tl.max(row_max), tl.min(row_max)
    if COLUMNS:
        column_max = tl.load(column_max_ptr + cols, mask=col_in, other=0.0)
        column_weight = tl.load(column_weight_ptr + cols, mask=col_in, other=0.0) * lift
        column_coef = column_weight / tl.load(column_sum_ptr + cols, mask=col_in, other=1.0)
        high = tl.maximum(high, tl.max(column_max))
        low = tl.minimum(low, tl.min(column_max))

    edge = (row0 + BLOCK_N > n) | (col0 + BLOCK_M > m)
    diagonal = (row0 + offset < col0 + BLOCK_M) & (row0 + BLOCK_N + offset > col0)
    if edge | diagonal | ((high - low < SPREAD) == 0):
        s = acc * c
        positive = cols[None, :] == rows[:, None] + offset
        g = _probabilities(s, row_max[:, None], row_coef[:, None], positive)
        g -= tl.where(positive, row_weight[:, None], 0.0)
        if COLUMNS:
            p = _probabilities(s, column_max[None, :], column_coef[None, :], positive)
            g += p - tl.where(positive, column_weight[None, :], 0.0)
        g = tl.where(row_in[:, None] & col_in[None, :], g, 0.0)
    else:
        # One exponential for both: 2^(s - high) (w_row 2^(high - r_row) + w_col 2^(high - r_col)).
        factor = (row_coef * tl.exp2(high - row_max))[:, None]
        if COLUMNS:
            factor += (column_coef * tl.exp2(high - column_max))[None, :]
        g = tl.exp2(acc * c - high) * factor
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(g * (acc - center)) / lift)
    store_gradient(
        g, row0, col0, n, m, g_ptr, row_lost_ptr, column_lost_ptr, stride_g, BLOCK_N, BLOCK_M, HALF
    )


def contrastive_fwd(
    x: Tensor, y: Tensor, scale: Tensor, offset: int, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the strip x [N, D] against y [M, D], as in ops/info_nce.py."""
    n, m = len(x), len(y)
    _check_strip(n, m, offset)
    row_max, row_sum, positive = (x.new_empty(n, dtype=torch.float32) for _ in range(3))
    column_max, column_sum = (
        x.new_full((m if columns else 0,), fill, dtype=torch.float32) for fill in (-torch.inf, 0.0)
    )
    row = launch.choose(x)
    wave = _wave_rows(n, m, row)
    blocks_m = triton.cdiv(m, row.block_m)
    row_part = x.new_empty((2, blocks_m * wave), dtype=torch.float32)
    blocks_n = triton.cdiv(wave, row.block_n) if columns else 0
    column_part = x.new_empty((2, max(1, blocks_n * m)), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for first in range(0, n, wave):
            part, last = x[first : first + wave], min(first + wave, n)
            (x_in, y_in), options = operands(part, y, row)
            blocks_n = triton.cdiv(len(part), row.block_n)
            forward_kernel[(blocks_n * blocks_m,)](
                x_in, y_in, scale, *row_part, *column_part, positive[first:last],
                len(part), m, x.shape[1], offset + first, *x.stride(), *y.stride(),
                COLUMNS=columns, **options,
            )  # fmt: skip
            _merge(
                row_part, positive[first:last], row_max[first:last], row_sum[first:last],
                blocks_m, 0, has_before=False, is_last=True,
            )  # fmt: skip
            if columns:
                _merge(
                    column_part, positive, column_max, column_sum,
                    blocks_n, -offset, has_before=first > 0, is_last=last == n,
                )  # fmt: skip
    return row_max, row_sum, column_max, column_sum, positive


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the strip, as in ops/info_nce.py."""
    _check_strip(len(x), len(y), offset)
    if min(x.numel(), y.numel()) == 0:
        return torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=torch.float32)
    columns = len(column_max) > 0
    row_stats = (row_max, row_sum, row_weight.contiguous())
    column_stats = (column_max, column_sum, column_weight.contiguous())
    row = launch.choose(x)
    plan = waves.plan(x, y, row)
    shares = x.new_empty(plan.tiles, dtype=torch.float32)
    prepared = x.new_empty(3, dtype=torch.float32)
    with torch.cuda.device_of(x):
        prepare_kernel[(1,)](
            x, y[offset:], scale, *row_stats[1:], *column_stats[1:], prepared,
            len(x), len(column_max), x.shape[1], x.stride(1), y.stride(1),
            LIFT=x.dtype == torch.float16, BLOCK=1024,
        )  # fmt: skip

    def fill(chunk: waves.Chunk, to: waves.Target) -> None:
        rows, cols = chunk.rows, chunk.cols
        part_x, part_y = x[rows], y[cols]
        (x_in, y_in), options = operands(part_x, part_y, row)
        gradient_kernel[(chunk.tiles,)](
            x_in, y_in, scale, prepared,
            *(t[rows] for t in row_stats), *(t[cols] if columns else t for t in column_stats),
            to.g, to.row_lost, to.column_lost, shares[chunk.first_tile :],
            len(part_x), len(part_y), x.shape[1], offset + rows.start - cols.start, to.g.stride(0),
            *x.stride(), *y.stride(),
            COLUMNS=columns, HALF=x.dtype != torch.float32, **options,
        )  # fmt: skip

    dx, dy = waves.products(x, y, prepared[2], offset, plan, fill)
    dscale = shares.sum()
    if columns and len(y) > len(x):
        unpaired = column_weight.sum() - column_weight[offset : offset + len(x)].sum()
        dscale = dscale + prepared[0] * unpaired
    return dx, dy, dscale


def _merge(
    part: Tensor,
    positive: Tensor,
    out_max: Tensor,
    out_sum: Tensor,
    blocks: int,
    offset: int,
    *,
    has_before: bool,
    is_last: bool,
) -> None:
    length = len(out_max)
    merge_kernel[(triton.cdiv(length, MERGE_BLOCK),)](
        *part, positive, out_max, out_sum,
        blocks, length, len(positive), offset,
        HAS_BEFORE=has_before, IS_LAST=is_last, BLOCK=MERGE_BLOCK, DEPTH=MERGE_DEPTH,
    )  # fmt: skip


def _wave_rows(n: int, m: int, row: launch.Launch) -> int:
    """Rows a wave, in whole tiles where there are several, so that partials stay bounded."""
    bytes_per_block = 8 * (row.block_n * triton.cdiv(m, row.block_m) + m)
    blocks = max(1, PARTIAL_BYTES // max(1, bytes_per_block))
    return max(1, min(n, blocks * row.block_n))


def _check_strip(n: int, m: int, offset: int) -> None:
    if n and not 0 <= offset <= m - n:
        raise ValueError(
            f"info_nce: expected the positives of {n} rows, columns {offset} to {offset + n - 1}, "
            f"among the {m} columns; pass offset between 0 and M - N"
        )
