"""What turns the sums of ``waves.py`` into gradients: what rounding lost goes to the partners, the
scale and one rounding come last."""

from __future__ import annotations

import triton
import triton.language as tl

FINISH_SIZES = ["blocks_x", "rows", "blocks_y", "cols", "tiles", "n", "first", "offset"]


@triton.jit
def _sum_blocks(part_ptr, position, blocks, length, total):
    """-> total and the sums over blocks of part [blocks, length]; 0 past its end."""
    for first in range(0, blocks, 32):
        block = first + tl.arange(0, 32)
        at = block[:, None].to(tl.int64) * length + position[None, :]
        mask = (block[:, None] < blocks) & (position < length)[None, :]
        total += tl.sum(tl.load(part_ptr + at, mask=mask, other=0.0), 0)
    return total


@triton.jit
def _add_blocks(part_ptr, out_ptr, program, blocks, length, ADD: tl.constexpr, BLOCK: tl.constexpr):
    position = program * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    total = tl.zeros((BLOCK,), tl.float32)
    if ADD:
        total = tl.load(out_ptr + position, mask=inside, other=0.0)
    total = _sum_blocks(part_ptr, position, blocks, length, total)
    tl.store(out_ptr + position, total, mask=inside)


@triton.jit(do_not_specialize=["blocks_m", "n", "blocks_n", "m"])
def lost_kernel(
    row_part_ptr, row_out_ptr, blocks_m, n,  # [blocks_m, n], [n]
    column_part_ptr, column_out_ptr, blocks_n, m,  # [blocks_n, m], [m]
    ADD_ROWS: tl.constexpr, ADD_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a chunk's ``lost`` over blocks, onto those of the chunks before."""
    program = tl.program_id(0)
    row_programs = tl.cdiv(n, BLOCK)
    if program < row_programs:
        _add_blocks(row_part_ptr, row_out_ptr, program, blocks_m, n, ADD_ROWS, BLOCK)
    else:
        program -= row_programs
        _add_blocks(column_part_ptr, column_out_ptr, program, blocks_n, m, ADD_COLUMNS, BLOCK)


@triton.jit
def _finish_side(
    program, sum_ptr, lost_ptr, blocks, other_ptr, factor, grad_ptr,
    n, m, d, offset,
    stride_other_m, stride_other_d,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows of one gradient: [N, D] of sum and grad, [blocks, N], and [M, D] of the other."""
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < n) & (depth[None, :] < d)
    at = rows.to(tl.int64)[:, None] * d + depth[None, :]
    value = tl.load(sum_ptr + at, mask=mask, other=0.0)
    if HALF:
        lost = _sum_blocks(lost_ptr, rows, blocks, n, tl.zeros((BLOCK_N,), tl.float32))
        partner = rows.to(tl.int64) + offset
        paired = (rows < n) & (partner >= 0) & (partner < m)
        other_at = partner[:, None] * stride_other_m + depth[None, :].to(tl.int64) * stride_other_d
        other = tl.load(other_ptr + other_at, mask=paired[:, None] & mask, other=0.0)
        value += lost[:, None] * other.to(tl.float32)
    tl.store(grad_ptr + at, (value * factor).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_shares(share_ptr, total_ptr, tiles):
    if tl.program_id(1) == 0:
        total = tl.zeros((1024,), tl.float32)
        for start in range(0, tiles, 1024):
            at = start + tl.arange(0, 1024)
            total += tl.load(share_ptr + at, mask=at < tiles, other=0.0)
        tl.store(total_ptr, tl.sum(total))


@triton.jit(do_not_specialize=FINISH_SIZES)
def finish_kernel(
    sum_x_ptr, lost_x_ptr, blocks_x, dx_ptr, rows,  # [rows, D], [blocks_x, rows], [rows, D]
    sum_y_ptr, lost_y_ptr, blocks_y, dy_ptr, cols,  # [M, D], [blocks_y, M], [M, D]
    x_ptr, y_ptr, factor_ptr,  # [N, D], [M, D], []
    share_ptr, total_ptr, tiles,  # [tiles], [] or None
    n, d, first, offset,  # row i of dx is row first + i of x
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad = factor (sum + lost * the partner's features), rounded once; total = sum of shares.

    The grid says how much of it: rows of dx, then of dy, then the total, by tiles of D.
    """
    program = tl.program_id(0)
    programs_x, programs_y = tl.cdiv(rows, BLOCK_N), tl.cdiv(cols, BLOCK_N)
    factor = tl.load(factor_ptr).to(tl.float32)
    if program < programs_x:
        _finish_side(
            program, sum_x_ptr, lost_x_ptr, blocks_x, y_ptr, factor, dx_ptr,
            rows, cols, d, offset + first, stride_y_m, stride_y_d, HALF, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif program < programs_x + programs_y:
        _finish_side(
            program - programs_x, sum_y_ptr, lost_y_ptr, blocks_y, x_ptr, factor, dy_ptr,
            cols, n, d, -offset, stride_x_n, stride_x_d, HALF, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif share_ptr is not None:
        _sum_shares(share_ptr, total_ptr, tiles)
