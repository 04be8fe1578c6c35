"""Backward of InfoNCE: G = w_row P_row + w_column P_column without the positives, by chunks.

A chunk's logits are formed again and G is written in the features' dtype; ``waves.py`` multiplies
it and adds the positives' entries, w_row (P_row - 1) + w_column (P_column - 1), in fp32. Where the
references of a tile's rows and columns lie within fp32's range of the largest of them, h, one
exponential an element serves both probabilities, 2^(s - h) (a_row + a_column): a vector of factors
for the rows and one for the columns, nothing to load or divide after the product. Large batches
find the extremes of the references before, once for each block. Edges, the diagonal and tiles of
wide range take two exponentials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.info_nce_forward import ONE_PROGRAM
from protoclip.kernels.tiles import LOG2E, SPREAD, is_general, operands, products, tile_origin
from protoclip.kernels.waves import gradient_operands, store_entries, store_gradient

# What differs from chunk to chunk, or between one weight for all and one for each.
GRADIENT_SIZES = [
    *("n", "m", "offset", "first_tile", "first_row_block", "first_column_block"),
    *("stride_row_weight", "stride_column_weight"),
]
# Slices of vectors begin anywhere; another alignment would compile the kernel again.
GRADIENT_VECTORS = [
    *("row_max_ptr", "row_sum_ptr", "row_weight_ptr"),
    *("column_max_ptr", "column_sum_ptr", "column_weight_ptr"),
    *("entry_ptr", "share_ptr", "row_peak_ptr", "column_peak_ptr"),
]


@triton.jit
def _lift(peak):
    """-> a power of two that lets |G| <= peak fill fp16's range; weights are about 1/N."""
    exponent = tl.minimum(tl.maximum(14.0 - tl.ceil(tl.log2(peak)), -80.0), 80.0)
    return tl.where((peak > 0) & (peak < float("inf")), tl.exp2(exponent), 1.0)


@triton.jit
def _exponential(s, reference, positive):
    """2^(s - reference), the positive's exponent snapped to 0 where the forward used it as the
    reference: an fma rounds c x.y otherwise than the product stored then."""
    exponent = s - reference
    snap = positive & (tl.abs(exponent) <= tl.abs(reference) * 2.4e-7)  # 4 units in the last place
    return tl.exp2(tl.where(snap, 0.0, exponent))


@triton.jit
def _side(max_ptr, sum_ptr, weight_ptr, stride_weight, position, length, unit):
    """-> reference, sum, weight / sum of rows or columns; 0 past the end."""
    inside = position < length
    weight = tl.load(weight_ptr + position * stride_weight, mask=inside, other=0.0) * unit
    total = tl.load(sum_ptr + position, mask=inside, other=1.0)
    return tl.load(max_ptr + position, mask=inside, other=0.0), total, weight / total


@triton.jit
def pinned(v):
    """v, computed once for each element: Triton would else repeat a vector's loads and arithmetic
    in every thread that needs an element, after the product; it does not repeat a reduction."""
    return tl.sum(tl.join(v, tl.zeros_like(v)), 1)


@triton.jit
def _extremes(max_ptr, position, length):
    """-> the smallest and the largest reference of a block."""
    reference = tl.load(max_ptr + tl.minimum(position, length - 1))
    return tl.min(reference), tl.max(reference)


@triton.jit(do_not_specialize=["n", "m"])
def extremes_kernel(
    row_max_ptr, column_max_ptr, n, m, out_ptr,  # [N], [M], [row and column blocks, 2]
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The extremes of the references of each block of rows and of columns of G."""
    program, blocks_n = tl.program_id(0), tl.cdiv(n, BLOCK_N)
    if program < blocks_n:
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        low, high = _extremes(row_max_ptr, rows, n)
    else:
        cols = (program - blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        low, high = _extremes(column_max_ptr, cols, m)
    tl.store(out_ptr + 2 * program, low)
    tl.store(out_ptr + 2 * program + 1, high)


@triton.jit(do_not_specialize=GRADIENT_SIZES, do_not_specialize_on_alignment=GRADIENT_VECTORS)
def gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for strips
    scale_ptr, factor_ptr,  # [], [] for the finish: scale / lift
    row_peak_ptr, column_peak_ptr, pair_weight,  # the largest |weight|, read with LIFT
    extremes_ptr, first_row_block, first_column_block,  # [blocks, 2], or None
    row_max_ptr, row_sum_ptr, row_weight_ptr, stride_row_weight,  # [N]
    column_max_ptr, column_sum_ptr, column_weight_ptr, stride_column_weight,  # [M] with COLUMNS
    entry_ptr, share_ptr, first_tile,  # [N], [tiles]
    n, m, d, offset, stride_g,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    COLUMNS: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """G of one tile, and its share of sum G x.y / scale before G is rounded."""
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
    rows = row0 + tl.arange(0, BLOCK_N)
    row_max, row_sum, row_coef = _side(
        row_max_ptr, row_sum_ptr, row_weight_ptr, stride_row_weight, rows, n, unit
    )
    # All loads come before any use of one: their latencies pass together.
    cols = col0 + tl.arange(0, BLOCK_M)
    if COLUMNS:
        column_max, _, column_coef = _side(
            column_max_ptr, column_sum_ptr, column_weight_ptr, stride_column_weight, cols, m, unit
        )
    if extremes_ptr is None:
        low, high = tl.min(row_max), tl.max(row_max)
        if COLUMNS:
            low, high = tl.minimum(low, tl.min(column_max)), tl.maximum(high, tl.max(column_max))
    else:
        at = extremes_ptr + 2 * (first_row_block + row0 // BLOCK_N)
        low, high = tl.load(at), tl.load(at + 1)
        if COLUMNS:
            at = extremes_ptr + 2 * (first_column_block + col0 // BLOCK_M)
            low, high = tl.minimum(low, tl.load(at)), tl.maximum(high, tl.load(at + 1))
    general = is_general(row0, col0, n, m, offset, BLOCK_N, BLOCK_M)
    fast = (general == 0) & (high - low < SPREAD)
    if fast:
        factor = (row_coef * tl.exp2(high - row_max))[:, None]
        if COLUMNS:
            column_factor = column_coef * tl.exp2(high - column_max)
        acc = products(
            x, y, row0, col0, n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
        )  # fmt: skip
        if COLUMNS:
            factor += pinned(column_factor)[None, :]
        p = tl.exp2(acc * c - high) * factor
        tl.store(share_ptr + first_tile + tl.program_id(0), tl.sum(p * acc) / lift)
        store_gradient(p, row0, col0, g, stride_g, DESCRIPTORS)
    else:
        share = 0.0
        for strip in range(0, BLOCK_M, STRIP):
            strip_cols = col0 + strip + tl.arange(0, STRIP)
            acc = products(
                x_ptr, y_ptr, row0, col0 + strip, n, m, d,
                stride_x_n, stride_x_d, stride_y_m, stride_y_d,
                BLOCK_N, STRIP, BLOCK_D, EVEN_D, False, WIDEN,
            )  # fmt: skip
            positive = strip_cols[None, :] == rows[:, None] + offset
            e = _exponential(acc * c, row_max[:, None], positive)
            p = (e - tl.where(positive, row_sum[:, None], 0.0)) * row_coef[:, None]
            if COLUMNS:
                top, total, coef = _side(
                    column_max_ptr, column_sum_ptr, column_weight_ptr, stride_column_weight,
                    strip_cols, m, unit,
                )  # fmt: skip
                e = _exponential(acc * c, top[None, :], positive)
                p += (e - tl.where(positive, total[None, :], 0.0)) * coef[None, :]
            p = tl.where((rows[:, None] < n) & (strip_cols[None, :] < m), p, 0.0)
            share += tl.sum(p * acc)
            store_entries(p, rows, positive, offset - col0 - strip, n, m - col0 - strip, entry_ptr)
            p = tl.where(positive, 0.0, p)
            store_gradient(p, row0, col0 + strip, g_ptr, stride_g, False)
        tl.store(share_ptr + first_tile + tl.program_id(0), share / lift)
    if tl.program_id(0) == 0:  # not earlier: the store waits for the scale
        tl.store(factor_ptr, scale / lift)


Stats = tuple[Tensor, Tensor, Tensor]  # reference, sum, weight, each [N] or [M]


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    rows: Stats,
    columns: Stats,
    offset: int,
    pair_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy, dscale, as ``contrastive_bwd``; ``columns`` are [0] where there are none."""
    if min(x.numel(), y.numel()) == 0:
        return torch.zeros_like(x), torch.zeros_like(y), x.new_zeros((), dtype=torch.float32)
    n, m, has_columns = len(x), len(y), len(columns[0]) > 0
    row = launch.choose("gradient", x, y)
    factor = x.new_empty((), dtype=torch.float32)
    lifted = x.dtype == torch.float16
    peaks = [_peak(weight) if lifted else weight for *_, weight in (rows, columns)]
    extremes, blocks_n = None, triton.cdiv(n, row.block_n)
    if max(n, m) > ONE_PROGRAM:  # below, a launch would cost more than the exponentials
        blocks = blocks_n + triton.cdiv(len(columns[0]), row.block_m)
        extremes = x.new_empty((blocks, 2), dtype=torch.float32)
        with torch.cuda.device_of(x):
            extremes_kernel[(blocks,)](
                rows[0], columns[0], n, len(columns[0]), extremes,
                BLOCK_N=row.block_n, BLOCK_M=row.block_m, num_warps=1,
            )  # fmt: skip

    plan = waves.chunks(x, y, row)
    shares = x.new_empty(waves.tiles(plan), dtype=torch.float32)

    def fill(chunk: waves.Chunk, g: Tensor, entries: Tensor) -> None:
        part_x, part_y = x[chunk.rows], y[chunk.cols]
        features, options = operands(part_x, part_y, row)
        gradient_kernel[(chunk.tiles,)](
            *features, *gradient_operands(g, row, options["DESCRIPTORS"]),
            scale, factor, *peaks, pair_weight,
            extremes, chunk.rows.start // row.block_n, blocks_n + chunk.cols.start // row.block_m,
            *(t[chunk.rows] for t in rows), rows[2].stride(0),
            *(t[chunk.cols] for t in columns), columns[2].stride(0),
            entries[chunk.rows], shares, chunk.first_tile,
            len(part_x), len(part_y), x.shape[1], offset + chunk.rows.start - chunk.cols.start,
            g.stride(0), *x.stride(), *y.stride(),
            COLUMNS=has_columns, LIFT=lifted, **options,
        )  # fmt: skip

    return waves.products(x, y, factor, offset, plan, fill, shares)


def _peak(weight: Tensor) -> Tensor:
    """The largest |weight|; one number expanded, as of a mean, is its own."""
    if len(weight) == 0 or weight.stride(0) == 0:
        return weight
    return torch.linalg.vector_norm(weight, torch.inf)
