"""Forward of InfoNCE: row and column statistics of the logits from one pass over their tiles.

Each tile leaves, for its rows and for its columns, a reference r and sum 2^(s - r) *without the
positives*; a second small kernel merges them, adds the positive, and takes the losses and, up to
``ONE_PROGRAM`` pairs, their sum: two launches in all. A loss near zero is then log2(1 + little),
not a difference of large numbers.

A warp refers all its logits to the largest of a few columns: one exponential an element, and fp32
is as exact far from its reference as near. Where a sum still leaves 2^-SPREAD to 2^SPREAD, and on
the edges and the diagonal, the tile takes the largest of each row and of each column and a second
exponential. Columns are summed over the rows of one warp only: summing over warps costs barriers in
every tile, and the merge does it on the way. Bytes: the features, once a tile row and column; 8 of
partial sums for each row of a tile, and for each column and warp.
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
def _store_pairs(ptr, at, reference, total, mask):
    tl.store(ptr + 2 * at, reference, mask=mask)
    tl.store(ptr + 2 * at + 1, total, mask=mask)


@triton.jit
def _store_columns(ptr, block, col0, m, top, e, PARTS: tl.constexpr, MASK: tl.constexpr):
    """Write the columns of a tile: for each part of its rows the reference and the sum of e, which
    is [repeats, PARTS, rows, columns]."""
    total = tl.sum(tl.sum(e, 0), 1)  # [PARTS, columns]
    cols, first = tl.arange(0, e.shape[3]), block.to(tl.int64) * PARTS * m + col0
    at = 2 * (tl.arange(0, PARTS)[:, None] * m + cols[None, :])
    pointers = (ptr + 2 * first) + (at[:, :, None] + tl.arange(0, 2)[None, None, :])
    both = tl.join(tl.broadcast_to(top, total.shape), total)
    tl.store(pointers, both, mask=(cols < m - col0)[None, :, None] if MASK else None)
    return total


@triton.jit
def _some_columns(acc):
    """-> eight columns of a tile, some in each thread."""
    for _ in tl.static_range(6):
        if acc.shape[1] > 8:
            acc, _others = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
    return acc


@triton.jit(do_not_specialize=["n", "m", "offset"])
def forward_kernel(
    x, y, x_ptr, y_ptr, scale_ptr,  # [N, D], [M, D] for tiles, the same for strips, []
    row_ptr, column_ptr, positive_ptr,  # [column blocks, N, 2], [row blocks * PARTS, M, 2], [N]
    n, m, d, offset,
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STRIP: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    c = tl.load(scale_ptr).to(tl.float32) * LOG2E
    rows = row0 + tl.arange(0, BLOCK_N)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    block = row0 // BLOCK_N
    REPEATS: tl.constexpr = BLOCK_N // PARTS // PART
    general = is_general(row0, col0, n, m, offset, BLOCK_N, BLOCK_M)
    if not general:
        acc = products(
            x, y, row0, col0, n, m, d, stride_x_n, stride_x_d, stride_y_m, stride_y_d,
            BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, DESCRIPTORS, WIDEN,
        )  # fmt: skip
        some = (c * _some_columns(acc)).reshape(REPEATS, PARTS, PART, 8)
        top = tl.max(tl.max(tl.max(some, 3), 2), 0)  # [PARTS]
        row_top = tl.broadcast_to(top[None, :, None], (REPEATS, PARTS, PART)).reshape(BLOCK_N)
        e = tl.exp2(acc * c - row_top[:, None])
        row_sum = tl.sum(e, 1)
        pointers = row_ptr + 2 * at_row[:, None] + tl.arange(0, 2)[None, :]
        tl.store(pointers, tl.join(row_top, row_sum))
        least = tl.where(row_sum <= tl.exp2(SPREAD), row_sum, 0.0)  # 0 for NaN too
        least = tl.min(tl.min(least.reshape(REPEATS, PARTS, PART), 2), 0)
        if COLUMNS:
            e = e.reshape(REPEATS, PARTS, PART, BLOCK_M)
            total = _store_columns(column_ptr, block, col0, m, top[:, None], e, PARTS, False)
            least = tl.minimum(least, tl.min(total, 1))
        general = tl.min(least) < tl.exp2(-SPREAD)
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
                e = e.reshape(REPEATS, PARTS, PART, STRIP)
                _store_columns(column_ptr, block, col0 + strip, m, top[None, :], e, PARTS, True)
        _store_pairs(row_ptr, at_row, row_max, row_sum, rows < n)


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
    part_ptr, position, inside, length, blocks, reference, total, DEPTH: tl.constexpr
):
    """-> the statistics of positions from those given and their partials, [blocks, length, 2]."""
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        at = part_ptr + 2 * (block[:, None].to(tl.int64) * length + position[None, :])
        mask = (block[:, None] < blocks) & inside[None, :]
        r = tl.load(at, mask=mask, other=-float("inf"))
        t = tl.load(at + 1, mask=mask, other=0.0)
        top = tl.max(r, 0)
        zero = tl.where(top == -float("inf"), 0.0, top)
        t = tl.sum(t * tl.exp2(r - zero[None, :]), 0)
        reference, total = _join(reference, total, top, t)
    return reference, total


@triton.jit(do_not_specialize=["blocks_m", "n", "blocks_n", "m", "first", "height", "offset"])
def merge_kernel(
    row_part_ptr, blocks_m, height,  # [blocks_m, height, 2] of this wave's rows
    column_part_ptr, blocks_n, m,  # [blocks_n, M, 2]
    positive_ptr, row_max_ptr, row_sum_ptr,  # [N]
    column_max_ptr, column_sum_ptr,  # [M]
    loss_ptr, share_ptr,  # [N], [programs]
    n, first, offset, pair_weight,
    COLUMNS: tl.constexpr, HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
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
            row_part_ptr, row - first, here, height, blocks_m,
            empty, tl.zeros((BLOCK,), tl.float32), DEPTH,
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
                column_part_ptr, column, inside, m, blocks_n, reference, total, DEPTH
            )
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
    parts = min(row.warps, row.block_n // row.part)
    wave = _wave_rows(n, m, row, parts)
    row_part = x.new_empty(2 * triton.cdiv(m, row.block_m) * wave, dtype=torch.float32)
    blocks_n = triton.cdiv(wave, row.block_n) if columns else 0
    column_part = x.new_empty(2 * blocks_n * parts * m, dtype=torch.float32)
    with torch.cuda.device_of(x):
        for first in range(0, n, wave):
            part, last = x[first : first + wave], min(first + wave, n)
            features, options = operands(part, y, row)
            blocks_n, blocks_m = triton.cdiv(len(part), row.block_n), triton.cdiv(m, row.block_m)
            forward_kernel[(blocks_n * blocks_m,)](
                *features, scale, row_part, column_part, out.positive[first:last],
                len(part), m, x.shape[1], offset + first, *x.stride(), *y.stride(),
                COLUMNS=columns, PARTS=parts, PART=row.part, **options,
            )  # fmt: skip
            merge_kernel[(programs,)](
                row_part, blocks_m, len(part), column_part, blocks_n * parts, m,
                out.positive, out.row_max, out.row_sum, out.column_max, out.column_sum,
                out.loss, out.shares, n, first, offset, pair_weight * LN2,
                COLUMNS=columns, HAS_BEFORE=first > 0, IS_LAST=last == n,
                BLOCK=block, DEPTH=depth, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _wave_rows(n: int, m: int, row: launch.Launch, parts: int) -> int:
    """Rows a wave, in whole tiles where there are several, so that partials stay bounded."""
    rows = 8 * (row.block_n * triton.cdiv(m, row.block_m) + parts * m)
    blocks = max(1, PARTIAL_BYTES // max(1, rows))
    return max(1, min(n, blocks * row.block_n))
