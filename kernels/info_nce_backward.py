"""Backward of InfoNCE: G = P_row w_row + P_column w_column - (weights at the positives), by chunks.

A chunk's logits are formed again and G is written in the features' dtype; ``waves.py`` multiplies
it. One exponential an element serves both probabilities, 2^(s - h) (a_row + a_column), unless a
tile's references lie too far apart; edges and the diagonal take two.

The gradient of the scale is sum G x.y = sum G (x.y - center) for any center, because G sums to
zero over all pairs; with the center near the logits, a common part of the features cannot magnify
the rounding of G. Each program finds the center, and the lift of fp16, from a few numbers: that is
cheaper than a launch. Where all pairs weigh the same, as in a mean, their weight is one number with
stride 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, stash, waves
from protoclip.kernels.stash import Stash, kept
from protoclip.kernels.tiles import LOG2E, SPREAD, is_general, operands, products, tile_origin
from protoclip.kernels.waves import store_gradient

# What differs from chunk to chunk, or between one weight for all and one for each.
GRADIENT_SIZES = ["n", "m", "offset", "count", "stride_row_weight", "stride_column_weight"]


@triton.jit
def _center(max_ptr, sum_ptr, count, log2_m, c):
    """-> a product near the others: the mean, over the first 16 rows, of the log of the mean
    exponential; 0 where the scale is so small that it would be the logarithm's rounding."""
    some = tl.arange(0, 16)
    level = tl.load(max_ptr + some, mask=some < count, other=0.0) - log2_m
    level += tl.log2(tl.load(sum_ptr + some, mask=some < count, other=1.0))
    center = tl.sum(tl.where(some < count, level, 0.0)) / (tl.minimum(count, 16) * c)
    return tl.where((tl.abs(c) > 0.01) & (tl.abs(center) < float("inf")), center, 0.0)


@triton.jit
def _lift(peak):
    """-> a power of two that lets |G| <= peak fill fp16's range; weights are about 1/N."""
    exponent = tl.minimum(tl.maximum(14.0 - tl.ceil(tl.log2(peak)), -80.0), 80.0)
    return tl.where((peak > 0) & (peak < float("inf")), tl.exp2(exponent), 1.0)


@triton.jit
def _probabilities(s, reference, coefficient, positive):
    """2^(s - reference) * coefficient, the positive's exponent snapped to 0 where the forward used
    it as the reference: an fma rounds c x.y otherwise than the product stored then."""
    exponent = s - reference
    snap = positive & (tl.abs(exponent) <= tl.abs(reference) * 2.4e-7)  # 4 units in the last place
    return tl.exp2(tl.where(snap, 0.0, exponent)) * coefficient


@triton.jit
def _side(max_ptr, sum_ptr, weight_ptr, stride_weight, position, length, unit):
    """-> reference, weight, weight / sum of rows or columns; 0 past the end."""
    inside = position < length
    weight = tl.load(weight_ptr + position * stride_weight, mask=inside, other=0.0) * unit
    coefficient = weight / tl.load(sum_ptr + position, mask=inside, other=1.0)
    return tl.load(max_ptr + position, mask=inside, other=0.0), weight, coefficient


@triton.jit(do_not_specialize=GRADIENT_SIZES)
def gradient_kernel(
    x, y, x_ptr, y_ptr,  # [N, D], [M, D] for tiles, the same for strips
    scale_ptr, prepared_ptr,  # [], [2] for later kernels: center, scale / lift
    first_max_ptr, first_sum_ptr, count, log2_m,  # [count] rows of all; log2 of all columns
    row_peak_ptr, column_peak_ptr, pair_weight,  # the largest |weight|, read with LIFT
    row_max_ptr, row_sum_ptr, row_weight_ptr, stride_row_weight,  # [N]
    column_max_ptr, column_sum_ptr, column_weight_ptr, stride_column_weight,  # [M] with COLUMNS
    g_ptr, row_lost_ptr, column_lost_ptr, share_ptr,  # as in waves.Target, [tiles]
    n, m, d, offset, stride_g,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    codes_ptr, anchors_ptr, stash_tiles_m,  # of stash.py, read with STASH
    COLUMNS: tl.constexpr, HALF: tl.constexpr, LIFT: tl.constexpr, STASH: tl.constexpr,
):  # fmt: skip
    """G of one tile, and its share of sum G (x.y - center) before G is rounded."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    scale = tl.load(scale_ptr).to(tl.float32)
    c = scale * LOG2E
    lift = tl.full((), 1.0, tl.float32)
    if LIFT:
        peak = tl.abs(tl.load(row_peak_ptr))
        if COLUMNS:
            peak += tl.abs(tl.load(column_peak_ptr))
        lift = _lift(peak * pair_weight)
    unit = pair_weight * lift
    if tl.program_id(0) == 0:
        tl.store(prepared_ptr, _center(first_max_ptr, first_sum_ptr, count, log2_m, c))
        tl.store(prepared_ptr + 1, scale / lift)
    rows = row0 + tl.arange(0, BLOCK_N)
    row_max, row_weight, row_coef = _side(
        row_max_ptr, row_sum_ptr, row_weight_ptr, stride_row_weight, rows, n, unit
    )
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
                    column_max_ptr, column_sum_ptr, column_weight_ptr, stride_column_weight,
                    cols, m, unit,
                )  # fmt: skip
                factor += (column_coef * tl.exp2(high - column_max))[None, :]
            g = tl.exp2(acc * c - high) * factor
            center = _center(first_max_ptr, first_sum_ptr, count, log2_m, c)
            tl.store(share_ptr + tl.program_id(0), tl.sum(g * (acc - center)) / lift)
            row_lost = store_gradient(
                g, rows, cols, m, g_ptr, column_lost_ptr + columns_at, stride_g, HALF
            )
            if HALF:
                tl.store(row_lost_ptr + at_row, row_lost)
    if general:
        share = 0.0
        center = _center(first_max_ptr, first_sum_ptr, count, log2_m, c)
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
                    column_max_ptr, column_sum_ptr, column_weight_ptr, stride_column_weight,
                    cols, m, unit,
                )  # fmt: skip
                p = _probabilities(acc * c, column_max[None, :], column_coef[None, :], positive)
                g += p - tl.where(positive, column_weight[None, :], 0.0)
            g = tl.where((rows[:, None] < n) & (cols[None, :] < m), g, 0.0)
            share += tl.sum(g * (acc - center))
            row_lost += store_gradient(
                g, rows, cols, m, g_ptr, column_lost_ptr + columns_at, stride_g, HALF
            )
        tl.store(share_ptr + tl.program_id(0), share / lift)
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
    pair_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy, dscale, as ``contrastive_bwd``; ``columns`` are [0] where there are none."""
    if min(x.numel(), y.numel()) == 0:
        return torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=torch.float32)
    n, m, d, has_columns = len(x), len(y), x.shape[1], len(columns[0]) > 0
    row = launch.choose("gradient" if stashed is None else "stashed", x, y)
    plan = waves.plan(x, y, row)
    shares = x.new_empty(plan.tiles, dtype=torch.float32)
    prepared = x.new_empty(2, dtype=torch.float32)
    lifted = x.dtype == torch.float16
    peaks = [_peak(weight) if lifted else weight for *_, weight in (rows, columns)]

    def fill(chunk: waves.Chunk, to: waves.Target) -> None:
        part_x, part_y = x[chunk.rows], y[chunk.cols]
        features, options = operands(part_x, part_y, row)
        kept_tiles = stash.arguments(stashed, chunk.rows.start, chunk.cols.start, row)
        gradient_kernel[(chunk.tiles,)](
            *features, scale, prepared, *rows[:2], n, math.log2(m), *peaks, pair_weight,
            *(t[chunk.rows] for t in rows), rows[2].stride(0),
            *(t[chunk.cols] for t in columns), columns[2].stride(0),
            to.g, to.row_lost, to.column_lost, shares[chunk.first_tile :],
            len(part_x), len(part_y), d, offset + chunk.rows.start - chunk.cols.start,
            to.g.stride(0), *x.stride(), *y.stride(),
            COLUMNS=has_columns, HALF=x.dtype != torch.float32, LIFT=lifted,
            **kept_tiles, **options,
        )  # fmt: skip

    dscale = x.new_empty((), dtype=torch.float32)
    dx, dy = waves.products(x, y, prepared[1], offset, plan, fill, (shares, dscale))
    if has_columns and m > n:  # columns without a positive: their G sums to their weight
        unpaired = columns[2].sum() - columns[2][offset : offset + n].sum()
        dscale = dscale + prepared[0] * (pair_weight * unpaired)
    return dx, dy, dscale


def _peak(weight: Tensor) -> Tensor:
    """The largest |weight|; one number expanded, as of a mean, is its own."""
    if len(weight) == 0 or weight.stride(0) == 0:
        return weight
    return torch.linalg.vector_norm(weight, torch.inf)
