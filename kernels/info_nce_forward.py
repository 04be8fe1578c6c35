"""Forward of InfoNCE: row and column statistics of the logits from one pass over their tiles.

Each tile leaves, for its rows and for its columns, a reference r and sum 2^(s - r) *without the
positives*; a second small kernel merges them, adds the positive, and takes the losses and, up to
``ONE_PROGRAM`` pairs, their sum: two launches in all. A loss near zero is then log2(1 + little),
not a difference of large numbers. All rows and columns of a tile share one reference, the tile's
maximum, hence one exponential an element; where that would underflow for some row or column, and on
the edges and the diagonal, the tile takes one reference for each and a second exponential. Columns
are summed over 16 rows only, those of one warp: summing over warps costs barriers in every tile,
and the merge does it on the way. Bytes: the features, once a tile row and column; 8 of partial sums
for each row of a tile, 4 for each column and 16 rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch
from protoclip.kernels.tiles import LOG2E, SPREAD, is_general, operands, products, tile_origin

LN2 = math.log(2.0)
PARTIAL_BYTES = 64 << 20
PART = 16  # rows of a warp, over which it sums columns by itself
# Up to so many rows or columns one program merges all, and its sum of the losses is the whole.
ONE_PROGRAM = 1024
# (pairs a program merges at a time, partials of each it reads at a time, warps)
MERGE_ALL = (256, 8, 16)  # of 8 warps each thread would spill in the loop
MERGE = (64, 8, 4)


@triton.jit
def _join(reference_a, sum_a, reference_b, sum_b):
    """-> the statistics of two sets of logits together."""
    reference = tl.maximum(reference_a, reference_b)
    zero = tl.where(reference == -float("inf"), 0.0, reference)
    return reference, sum_a * tl.exp2(reference_a - zero) + sum_b * tl.exp2(reference_b - zero)


@triton.jit
def _exact(s, AXIS: tl.constexpr):
    """-> the maxima along an axis and 2^(s - maximum); -inf and 0 where empty."""
    top = tl.max(s, AXIS)
    zero = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.exp2(s - tl.expand_dims(zero, AXIS))


@triton.jit
def _store_columns(max_ptr, sum_ptr, block, cols, m, top, e, PART: tl.constexpr):
    """Write the columns of a tile: their references and the sums of e over PART rows each."""
    inside = cols < m
    parts: tl.constexpr = e.shape[0] // PART
    tl.store(max_ptr + block.to(tl.int64) * m + cols, top, mask=inside)
    part = block.to(tl.int64) * parts + tl.arange(0, parts)
    total = tl.sum(e.reshape(parts, PART, e.shape[1]), 1)
    tl.store(sum_ptr + part[:, None] * m + cols[None, :], total, mask=inside[None, :])
    return total


@triton.jit(do_not_specialize=["n", "m", "offset"])
def forward_kernel(
    x, y, x_ptr, y_ptr, scale_ptr,  # [N, D], [M, D] for tiles, the same for strips, []
    row_max_ptr, row_sum_ptr,  # [column blocks, N]
    column_max_ptr, column_sum_ptr,  # [row blocks, M], [row blocks * BLOCK_N / PART, M]
    positive_ptr,  # [N]
    n, m, d, offset,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    c = tl.load(scale_ptr).to(tl.float32) * LOG2E
    rows = row0 + tl.arange(0, BLOCK_N)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    block = row0 // BLOCK_N
    general = is_general(row0, col0, n, m, offset, BLOCK_N, BLOCK_M)
    if not general:
        acc = products(
            x, y, row0, col0, n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
        )  # fmt: skip
        top = c * tl.min(acc) if c < 0 else c * tl.max(acc)
        e = tl.exp2(acc * c - top)
        row_sum = tl.sum(e, 1)
        tl.store(row_max_ptr + at_row, tl.full((BLOCK_N,), 0.0, tl.float32) + top)
        tl.store(row_sum_ptr + at_row, row_sum)
        smallest = tl.min(row_sum)
        if COLUMNS:
            cols, tops = col0 + tl.arange(0, BLOCK_M), tl.full((BLOCK_M,), 0.0, tl.float32) + top
            total = _store_columns(column_max_ptr, column_sum_ptr, block, cols, m, tops, e, PART)
            smallest = tl.minimum(smallest, tl.min(total))
        general = smallest < tl.exp2(-SPREAD)
    if general:
        row_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        for strip in range(0, BLOCK_M, STRIP):
            cols = col0 + strip + tl.arange(0, STRIP)
            s = c * products(
                x_ptr, y_ptr, row0, col0 + strip, n, m, d,
                stride_x_n, stride_x_d, stride_y_m, stride_y_d,
                BLOCK_N, STRIP, BLOCK_D, EVEN_D, False, WIDEN,
            )  # fmt: skip
            positive = cols[None, :] == rows[:, None] + offset
            partner = rows + offset - col0 - strip
            held = (rows < n) & (partner >= 0) & (partner < tl.minimum(STRIP, m - col0 - strip))
            tl.store(positive_ptr + rows, tl.sum(tl.where(positive, s, 0.0), 1), mask=held)
            negative = (rows[:, None] < n) & (cols[None, :] < m) & (positive == 0)
            s = tl.where(negative, s, -float("inf"))
            top, e = _exact(s, 1)
            row_max, row_sum = _join(row_max, row_sum, top, tl.sum(e, 1))
            if COLUMNS:
                top, e = _exact(s, 0)
                _store_columns(column_max_ptr, column_sum_ptr, block, cols, m, top, e, PART)
        tl.store(row_max_ptr + at_row, row_max, mask=rows < n)
        tl.store(row_sum_ptr + at_row, row_sum, mask=rows < n)


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


@triton.jit
def _merge_blocks(
    max_ptr, sum_ptr,  # [blocks, length], [blocks * PARTS, length]
    position, inside, length, blocks, reference, total,
    DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """-> the statistics of positions from those given and their partials."""
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        at = block[:, None].to(tl.int64) * length
        mask = (block[:, None] < blocks) & inside[None, :]
        r = tl.load(max_ptr + at + position[None, :], mask=mask, other=-float("inf"))
        t = tl.zeros((DEPTH, position.shape[0]), tl.float32)
        for part in tl.static_range(PARTS):
            part_ptr = sum_ptr + at * PARTS + part * length + position[None, :]
            t += tl.load(part_ptr, mask=mask, other=0.0)
        top = tl.max(r, 0)
        zero = tl.where(top == -float("inf"), 0.0, top)
        t = tl.sum(t * tl.exp2(r - zero[None, :]), 0)
        reference, total = _join(reference, total, top, t)
    return reference, total


@triton.jit(do_not_specialize=["blocks_m", "n", "blocks_n", "m", "first", "height", "offset"])
def merge_kernel(
    row_part_max_ptr, row_part_sum_ptr, blocks_m, height,  # [blocks_m, height] of this wave's rows
    column_part_max_ptr, column_part_sum_ptr, blocks_n, m,  # [blocks_n, M], [blocks_n * PARTS, M]
    positive_ptr, row_max_ptr, row_sum_ptr,  # [N]
    column_max_ptr, column_sum_ptr,  # [M]
    loss_ptr, share_ptr,  # [N], [programs]
    n, first, offset, pair_weight,
    COLUMNS: tl.constexpr, HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the partials of a wave, rows ``first`` to ``first + height``, pair by pair.

    Rows are then done; columns are merged with what earlier waves left, and done after the last,
    which completes the pairs' losses and sums those of each program.
    """
    # Without columns the positions are those that rows have their positives at.
    shift = offset if COLUMNS else 0
    length = m if COLUMNS else n
    share = tl.zeros((BLOCK,), tl.float32)
    empty = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        column = start + tl.arange(0, BLOCK)
        row = column - shift
        paired = (row >= 0) & (row < n)
        positive = tl.load(
            positive_ptr + row, mask=paired & (row < first + height), other=-float("inf")
        )
        here = paired & (row >= first) & (row < first + height)
        reference, total = _merge_blocks(
            row_part_max_ptr, row_part_sum_ptr, row - first, here, height, blocks_m,
            empty, tl.zeros((BLOCK,), tl.float32), DEPTH, 1,
        )  # fmt: skip
        reference, total = _add_positive(reference, total, positive)
        tl.store(row_max_ptr + row, reference, mask=here)
        tl.store(row_sum_ptr + row, total, mask=here)
        loss = pair_weight * (tl.log2(total) + (reference - positive))
        if HAS_BEFORE:
            loss = tl.where(here, loss, tl.load(loss_ptr + row, mask=paired & (row < first)))
        if COLUMNS:
            inside = column < m
            reference, total = empty, tl.zeros((BLOCK,), tl.float32)
            if HAS_BEFORE:
                reference = tl.load(column_max_ptr + column, mask=inside, other=0.0)
                total = tl.load(column_sum_ptr + column, mask=inside, other=0.0)
            reference, total = _merge_blocks(
                column_part_max_ptr, column_part_sum_ptr, column, inside, m, blocks_n,
                reference, total, DEPTH, PARTS,
            )  # fmt: skip
            if IS_LAST:
                reference, total = _add_positive(reference, total, positive)
                loss += pair_weight * (tl.log2(total) + (reference - positive))
            tl.store(column_max_ptr + column, reference, mask=inside)
            tl.store(column_sum_ptr + column, total, mask=inside)
        tl.store(loss_ptr + row, loss, mask=paired & (row < first + height))
        share += tl.where(paired, loss, 0.0)
    if IS_LAST:
        tl.store(share_ptr + tl.program_id(0), tl.sum(share))


@dataclass(frozen=True)
class Statistics:
    """What ``contrastive_fwd`` returns, and the pairs' losses."""

    row_max: Tensor  # [N]
    row_sum: Tensor
    column_max: Tensor  # [M], or [0] without columns
    column_sum: Tensor
    positive: Tensor  # [N]
    loss: Tensor  # [N]; of columns too where there are any
    shares: Tensor  # [programs], whose sum is that of the losses


def statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: int,
    columns: bool,
    pair_weight: float = 1.0,
) -> Statistics:
    """Statistics of the strip x [N, D] against y [M, D], as ``contrastive_fwd``.

    The losses, of each direction, are multiplied by ``pair_weight``.
    """
    n, m = len(x), len(y)
    length = m if columns else n
    block, depth, warps = MERGE if length > ONE_PROGRAM else MERGE_ALL
    programs = 1 if length <= ONE_PROGRAM else triton.cdiv(length, block)
    sizes = n, n, *(2 * [m if columns else 0]), n, n, programs
    out = Statistics(*(x.new_empty(size, dtype=torch.float32) for size in sizes))
    if n == 0:
        out.column_max.fill_(-torch.inf)
        out.column_sum.zero_()
        out.shares.zero_()
    row = launch.choose("forward", x, y)
    wave, parts = _wave_rows(n, m, row), row.block_n // PART
    row_part = x.new_empty((2, triton.cdiv(m, row.block_m) * wave), dtype=torch.float32)
    blocks_n = triton.cdiv(wave, row.block_n) if columns else 0
    column_part = [
        x.new_empty(rows * m, dtype=torch.float32) for rows in (blocks_n, blocks_n * parts)
    ]
    with torch.cuda.device_of(x):
        for first in range(0, n, wave):
            part, last = x[first : first + wave], min(first + wave, n)
            features, options = operands(part, y, row)
            blocks_n, blocks_m = triton.cdiv(len(part), row.block_n), triton.cdiv(m, row.block_m)
            forward_kernel[(blocks_n * blocks_m,)](
                *features, scale, *row_part, *column_part, out.positive[first:last],
                len(part), m, x.shape[1], offset + first, *x.stride(), *y.stride(),
                COLUMNS=columns, PART=PART, **options,
            )  # fmt: skip
            merge_kernel[(programs,)](
                *row_part, blocks_m, len(part), *column_part, blocks_n, m,
                out.positive, out.row_max, out.row_sum, out.column_max, out.column_sum,
                out.loss, out.shares, n, first, offset, pair_weight * LN2,
                COLUMNS=columns, HAS_BEFORE=first > 0, IS_LAST=last == n,
                BLOCK=block, DEPTH=depth, PARTS=parts, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _wave_rows(n: int, m: int, row: launch.Launch) -> int:
    """Rows a wave, in whole tiles where there are several, so that partials stay bounded."""
    rows, columns = 8 * row.block_n * triton.cdiv(m, row.block_m), 4 * (1 + row.block_n // PART) * m
    blocks = max(1, PARTIAL_BYTES // max(1, rows + columns))
    return max(1, min(n, blocks * row.block_n))
