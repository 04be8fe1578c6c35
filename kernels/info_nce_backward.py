"""Backward of InfoNCE: G = P_row w_row + P_column w_column - (weights at the positives), by chunks.

A chunk's logits are formed again and G is written in the features' dtype; ``waves.py`` multiplies
it. One exponential an element serves both probabilities, 2^(s - h) (a_row + a_column), unless a
tile's references lie too far apart; edges and the diagonal take two.

The gradient of the scale is sum G x.y = sum G (x.y - center) for any center, because G sums to
zero over all pairs; with the center near the logits, a common part of the features cannot magnify
the rounding of G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, stash, waves
from protoclip.kernels.stash import Stash, kept
from protoclip.kernels.tiles import LOG2E, SPREAD, is_general, operands, products, tile_origin
from protoclip.kernels.waves import store_gradient


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
    x_ptr, y_ptr, scale_ptr,  # [N, D], [N, D] of the pairs, []
    row_sum_ptr, row_weight_ptr, column_sum_ptr, column_weight_ptr,  # [N], [N], [M], [M]
    out_ptr,  # [3]: center, lift, scale / lift
    n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    LIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Find on the device what would else need a look at values.

    The center is the mean product of the first 16 pairs, or 0 where every positive has all the
    probability: G is then 0 there and no longer sums to zero. The lift is a power of two that lets
    the weights, about 1/N, fill fp16's range; |G| is at most the sum of the two largest weights.
    """
    product = tl.zeros((BLOCK,), tl.float32)
    some = tl.arange(0, 16)[:, None].to(tl.int64)
    for k in range(0, d, BLOCK):
        depth = k + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        mask = (some < n) & (depth < d)
        x = tl.load(x_ptr + some * stride_x_n + depth * stride_x_d, mask=mask, other=0.0)
        y = tl.load(y_ptr + some * stride_y_m + depth * stride_y_d, mask=mask, other=0.0)
        product += tl.sum(x.to(tl.float32), 0) * tl.sum(y.to(tl.float32), 0)
    row_sum, row_weight = _peaks(row_sum_ptr, row_weight_ptr, n, BLOCK)
    column_sum, column_weight = _peaks(column_sum_ptr, column_weight_ptr, m, BLOCK)
    count = tl.minimum(n, 16)
    center = tl.sum(product) / (count * count)
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


@triton.jit
def _side(max_ptr, sum_ptr, weight_ptr, position, length, lift):
    """-> reference, weight, weight / sum of rows or columns; 0 past the end."""
    inside = position < length
    weight = tl.load(weight_ptr + position, mask=inside, other=0.0) * lift
    coefficient = weight / tl.load(sum_ptr + position, mask=inside, other=1.0)
    return tl.load(max_ptr + position, mask=inside, other=0.0), weight, coefficient


@triton.jit(do_not_specialize=["n", "m", "offset"])
def gradient_kernel(
    x, y, x_ptr, y_ptr,  # [N, D], [M, D] for tiles, the same for strips
    scale_ptr, prepared_ptr,  # [], [3] of prepare_kernel
    row_max_ptr, row_sum_ptr, row_weight_ptr,  # [N]
    column_max_ptr, column_sum_ptr, column_weight_ptr,  # [M], not read without COLUMNS
    g_ptr, row_lost_ptr, column_lost_ptr, dscale_ptr,  # as in waves.Target, [tiles]
    n, m, d, offset, stride_g,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    codes_ptr, anchors_ptr, stash_tiles_m,  # of stash.py, read with STASH
    COLUMNS: tl.constexpr, HALF: tl.constexpr, STASH: tl.constexpr,
):  # fmt: skip
    """G of one tile, and its share of sum G (x.y - center) before G is rounded."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    c = tl.load(scale_ptr).to(tl.float32) * LOG2E
    center, lift = tl.load(prepared_ptr), tl.load(prepared_ptr + 1)
    rows = row0 + tl.arange(0, BLOCK_N)
    row_max, row_weight, row_coef = _side(row_max_ptr, row_sum_ptr, row_weight_ptr, rows, n, lift)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    columns_at = (row0 // BLOCK_N).to(tl.int64) * m
    general = is_general(row0, col0, n, m, offset, BLOCK_N, BLOCK_M)
    if not general:
        cols = col0 + tl.arange(0, BLOCK_M)
        high, low = tl.max(row_max), tl.min(row_max)
        if COLUMNS:
            column_max = tl.load(column_max_ptr + cols)
            high = tl.maximum(high, tl.max(column_max))
            low = tl.minimum(low, tl.min(column_max))
        general = (high - low < SPREAD) == 0
        if not general:
            if STASH:
                acc = kept(row0, col0, codes_ptr, anchors_ptr, stash_tiles_m, BLOCK_N, BLOCK_M)
            else:
                acc = products(
                    x, y, row0, col0, n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
                    BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
                )  # fmt: skip
            # One exponential for both probabilities: 2^(s - high) (a_row + a_column).
            factor = (row_coef * tl.exp2(high - row_max))[:, None]
            if COLUMNS:
                column_max, _, column_coef = _side(
                    column_max_ptr, column_sum_ptr, column_weight_ptr, cols, m, lift
                )
                factor += (column_coef * tl.exp2(high - column_max))[None, :]
            g = tl.exp2(acc * c - high) * factor
            tl.store(dscale_ptr + tl.program_id(0), tl.sum(g * (acc - center)) / lift)
            row_lost = store_gradient(
                g, rows, cols, m, g_ptr, column_lost_ptr + columns_at, stride_g, HALF
            )
            if HALF:
                tl.store(row_lost_ptr + at_row, row_lost)
    if general:
        share = 0.0
        row_lost = tl.zeros((BLOCK_N,), tl.float32)
        for strip in range(0, BLOCK_M, STRIP):
            cols = col0 + strip + tl.arange(0, STRIP)
            acc = products(
                x_ptr, y_ptr, row0, col0 + strip, n, m, d,
                stride_x_n, stride_x_d, stride_y_m, stride_y_d,
                BLOCK_N, STRIP, BLOCK_D, EVEN_D, False, WIDEN,
            )  # fmt: skip
            positive = cols[None, :] == rows[:, None] + offset
            g = _probabilities(acc * c, row_max[:, None], row_coef[:, None], positive)
            g -= tl.where(positive, row_weight[:, None], 0.0)
            if COLUMNS:
                column_max, column_weight, column_coef = _side(
                    column_max_ptr, column_sum_ptr, column_weight_ptr, cols, m, lift
                )
                p = _probabilities(acc * c, column_max[None, :], column_coef[None, :], positive)
                g += p - tl.where(positive, column_weight[None, :], 0.0)
            g = tl.where((rows[:, None] < n) & (cols[None, :] < m), g, 0.0)
            share += tl.sum(g * (acc - center))
            row_lost += store_gradient(
                g, rows, cols, m, g_ptr, column_lost_ptr + columns_at, stride_g, HALF
            )
        tl.store(dscale_ptr + tl.program_id(0), share / lift)
        if HALF:
            tl.store(row_lost_ptr + at_row, row_lost, mask=rows < n)


Stats = tuple[Tensor, Tensor, Tensor]  # reference, sum, weight, each [N] or [M]


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rows: Stats,
    columns: Stats,
    offset: int,
    stashed: Stash | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy, dscale, as ``contrastive_bwd``; ``columns`` are [0] where there are none."""
    if min(x.numel(), y.numel()) == 0:
        return torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=torch.float32)
    n, m, d, has_columns = len(x), len(y), x.shape[1], len(columns[0]) > 0
    row = launch.choose("gradient" if stashed is None else "stashed", x, y)
    plan = waves.plan(x, y, row)
    shares = x.new_empty(plan.tiles, dtype=torch.float32)
    prepared = x.new_empty(3, dtype=torch.float32)
    with torch.cuda.device_of(x):
        prepare_kernel[(1,)](
            x, y[offset:], scale, *rows[1:], *columns[1:], prepared,
            n, len(columns[0]), d, *x.stride(), *y.stride(),
            LIFT=x.dtype == torch.float16, BLOCK=256,
        )  # fmt: skip

    def fill(chunk: waves.Chunk, to: waves.Target) -> None:
        part_x, part_y = x[chunk.rows], y[chunk.cols]
        features, options = operands(part_x, part_y, row)
        kept_tiles = stash.arguments(stashed, chunk.rows.start, chunk.cols.start, row)
        gradient_kernel[(chunk.tiles,)](
            *features, scale, prepared,
            *(t[chunk.rows] for t in rows), *(t[chunk.cols] for t in columns),
            to.g, to.row_lost, to.column_lost, shares[chunk.first_tile :],
            len(part_x), len(part_y), d, offset + chunk.rows.start - chunk.cols.start,
            to.g.stride(0), *x.stride(), *y.stride(),
            COLUMNS=has_columns, HALF=x.dtype != torch.float32, **kept_tiles, **options,
        )  # fmt: skip

    dx, dy = waves.products(x, y, prepared[2], offset, plan, fill)
    dscale = shares.sum()
    if has_columns and m > n:  # columns without a positive: their G sums to their weight
        unpaired = columns[2].sum() - columns[2][offset : offset + n].sum()
        dscale = dscale + prepared[0] * unpaired
    return dx, dy, dscale
