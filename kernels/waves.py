"""Gradients of a loss over logits, dx = f (G y + e y_partner) and dy = f (G^T x + e x_partner), in
bounded chunks of G.

A kernel fills a chunk of G, [rows, cols] in the features' dtype, and two ordinary matrix products
with fp32 output consume it. The entry e of a positive pair is the difference of nearly equal
numbers where the loss is small, so it stays out of G, is kept in fp32 and added at the end:
rounding the others costs less than the last rounding of dx. Chunks are as square as they can be:
each product then has thousands of output rows, enough tiles to fill a card, and 512-deep features
read G about as long as they multiply it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels.launch import FINISH, Launch, cdiv
from protoclip.kernels.scratch import GRADIENT_BYTES

SIDE = 8192  # rows of a chunk of that size, more where there are fewer columns


class Chunk(NamedTuple):
    """A rectangle of the logits and the whole tiles that cover it."""

    rows: slice
    cols: slice
    shape: tuple[int, int]  # of its tiles together
    first_tile: int
    tiles: int

    @property
    def places(self) -> slice:
        """Of its tiles among all."""
        return slice(self.first_tile, self.first_tile + self.tiles)


def chunks(x: Tensor, y: Tensor, config: Launch, *, bounded: bool = True) -> list[Chunk]:
    """Row by row, chunks whose G fits ``GRADIENT_BYTES`` (but one tile always may); one chunk where
    no G is kept."""
    n = x.shape[0]
    m = y.shape[0]
    block_n = config.block_n
    block_m = config.block_m
    # in tiles
    rows = cdiv(n, block_n)
    cols = cdiv(m, block_m)
    if bounded:
        budget = GRADIENT_BYTES // x.element_size() // (block_n * block_m)  # tiles
        cols = min(cols, max(1, budget * block_n // SIDE))
        rows = min(rows, max(1, budget // max(1, cols)))
    plan: list[Chunk] = []
    tile = 0
    for i in range(0, n, max(1, rows) * block_n):
        for j in range(0, m, max(1, cols) * block_m):
            height = min(rows * block_n, n - i)
            width = min(cols * block_m, m - j)
            tile_rows = cdiv(height, block_n)
            tile_cols = cdiv(width, block_m)
            chunk = Chunk(
                rows=slice(i, i + height),
                cols=slice(j, j + width),
                shape=(tile_rows * block_n, tile_cols * block_m),
                first_tile=tile,
                tiles=tile_rows * tile_cols,
            )
            plan.append(chunk)
            tile += chunk.tiles
    return plan


def rows_of(x: Tensor, rows: slice) -> Tensor:
    """x[rows]; all of it is x itself, which saves a call of 2 us."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


@triton.jit
def store_gradient(g, row0, col0, g_ptr, stride_g):
    """Write a part of G. The scratch holds whole tiles: no mask, which would split the stores."""
    if isinstance(g_ptr, tl.tensor_descriptor):
        g_ptr.store([row0, col0], g.to(g_ptr.dtype))
    else:
        rows = row0 + tl.arange(0, g.shape[0])
        cols = col0 + tl.arange(0, g.shape[1])
        at = rows.to(tl.int64)[:, None] * stride_g + cols[None, :]
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty))


@triton.jit
def store_entries(g, rows, positive, shift, n, width, entry_ptr):
    """Write the entries of the positives that a part of G holds, one a row: row i's is in column
    i + shift, if that is one of the part's and below ``width``."""
    partner = rows + shift
    has_partner = (rows < n) & (partner >= 0) & (partner < tl.minimum(g.shape[1], width))
    tl.store(entry_ptr + rows, tl.sum(tl.where(positive, g, 0.0), 1), mask=has_partner)


class ChunkedGradients(NamedTuple):
    dx: Tensor  # [N, D], in the features' dtype
    dy: Tensor  # [M, D], the same
    totals: tuple[Tensor, ...]  # fp32 [] each


def gradients_by_chunks(
    x: Tensor,
    y: Tensor,
    factor: Tensor,
    offset: int,
    plan: list[Chunk],
    fill: Callable[[Chunk, Tensor], None],
    partial_sums: Tensor,
    entries: Tensor | None,
) -> ChunkedGradients:
    """The gradients, neither of them empty, and the totals of the rows of ``partial_sums``.

    ``fill(chunk, g)`` launches a kernel that writes a chunk of G (whole tiles), ``partial_sums``
    [sums, tiles], and the positives' ``entries`` [N], row i's at column i + offset, if they are not
    in G. ``factor`` [] is applied to the fp32 sums of the products. Where one chunk holds all of G
    this is four launches: ``fill``, two products, the finish.
    """
    (n, d), m = x.shape, y.shape[0]
    dx = x.new_empty(x.shape)  # contiguous, whatever the strides of x
    dy = y.new_empty(y.shape)
    # Tensors of their own: the outputs of an op must not alias.
    totals = tuple(x.new_empty((), dtype=torch.float32) for _ in partial_sums)
    scratch = x.new_empty(plan[0].shape)  # no later one is larger
    sum_x = x.new_empty((plan[0].rows.stop, d), dtype=torch.float32)
    sum_y = x.new_empty((m, d), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for chunk in plan:
            rows = chunk.rows
            cols = chunk.cols
            height = rows.stop - rows.start
            width = cols.stop - cols.start
            g = scratch
            if chunk.shape != scratch.shape:
                g = scratch.view(-1)[: chunk.shape[0] * chunk.shape[1]].view(chunk.shape)
            fill(chunk, g)
            if chunk.shape != (height, width):
                g = g[:height, :width]
            sums = rows_of(sum_x, slice(0, height))
            multiply(g, rows_of(y, cols), sums, accumulate=cols.start > 0)
            multiply(g.T, rows_of(x, rows), rows_of(sum_y, cols), accumulate=rows.start > 0)
            if cols.stop < m:
                continue
            programs = cdiv(height, FINISH.block_n)
            if rows.stop == n:  # dy and the total too
                programs += cdiv(m, FINISH.block_n) + 1
            finish_kernel[(programs, max(1, cdiv(d, FINISH.block_d)))](
                sum_x_ptr=sum_x, dx_ptr=rows_of(dx, rows), rows=height,
                sum_y_ptr=sum_y, dy_ptr=dy, cols=m,
                x_ptr=x, y_ptr=y, factor_ptr=factor, entry_ptr=entries,
                partial_sum_ptr=partial_sums, tiles=partial_sums.shape[1], total_ptrs=totals,
                n=n, d=d, first=rows.start, offset=offset,
                stride_x_n=x.stride(0), stride_x_d=x.stride(1),
                stride_y_m=y.stride(0), stride_y_d=y.stride(1),
                BLOCK_N=FINISH.block_n, BLOCK_D=FINISH.block_d, **FINISH.options,
            )  # fmt: skip
    return ChunkedGradients(dx, dy, totals)


def multiply(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """out (+)= a b, fp32; fp32 operands as ``torch.backends.cuda.matmul`` says."""
    if out is None:
        out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    # Where a caller runs the backward pass under autocast, fp32 products must stay fp32.
    with torch.autocast(a.device.type, enabled=False):
        if out.dtype == a.dtype or not a.is_cuda:  # the CPU has no mixed form
            return torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(accumulate), out=out)
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(accumulate), out=out)


@triton.jit
def _finish_side(
    program, sum_ptr, other_ptr, entry_ptr, factor, grad_ptr,
    n, m, d, first, offset, shift,
    stride_other_m, stride_other_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first + [0, n) of one gradient; the partner of row i is row i + offset of [M, D], their
    entry is at i + shift."""
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    # Four a thread: eight, for 16-bit gradients, would load half of each sector of fp32 at once.
    depth = tl.max_contiguous(tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), [4])
    mask = (rows[:, None] < n) & (depth[None, :] < d)
    at = rows.to(tl.int64)[:, None] * d + depth[None, :]
    value = tl.load(sum_ptr + at, mask=mask, other=0.0)
    if entry_ptr is not None:
        partner = rows.to(tl.int64) + first + offset
        paired = (rows < n) & (partner >= 0) & (partner < m)
        other_at = partner[:, None] * stride_other_m + depth[None, :].to(tl.int64) * stride_other_d
        other = tl.load(other_ptr + other_at, mask=paired[:, None] & mask, other=0.0)
        entry = tl.load(entry_ptr + rows + first + shift, mask=paired, other=0.0)
        value += entry[:, None] * other.to(tl.float32)
    tl.store(grad_ptr + at, (value * factor).to(grad_ptr.dtype.element_ty), mask=mask)


FINISH_SIZES = ["rows", "cols", "tiles", "n", "first", "offset"]


@triton.jit(do_not_specialize=FINISH_SIZES, do_not_specialize_on_alignment=["dx_ptr"])
def finish_kernel(
    sum_x_ptr, dx_ptr, rows,  # [rows, D]
    sum_y_ptr, dy_ptr, cols,  # [M, D]
    x_ptr, y_ptr, factor_ptr, entry_ptr,  # [N, D], [M, D], [], [N] or None
    partial_sum_ptr, tiles, total_ptrs,  # [sums, tiles], [] each
    n, d, first, offset,  # row i of dx is row first + i of x
    stride_x_n, stride_x_d, stride_y_m, stride_y_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad = factor (sum + entry * the partner's features), rounded once; totals = the sums of the
    partial sums.

    The grid says how much of it: rows of dx, then of dy, then the totals, by tiles of D.
    """
    program = tl.program_id(0)
    programs_x = tl.cdiv(rows, BLOCK_N)
    programs_y = tl.cdiv(cols, BLOCK_N)
    factor = tl.load(factor_ptr).to(tl.float32)
    if program < programs_x:
        _finish_side(
            program, sum_x_ptr, y_ptr, entry_ptr, factor, dx_ptr,
            rows, cols, d, first, offset, 0, stride_y_m, stride_y_d, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif program < programs_x + programs_y:
        _finish_side(
            program - programs_x, sum_y_ptr, x_ptr, entry_ptr, factor, dy_ptr,
            cols, n, d, 0, -offset, -offset, stride_x_n, stride_x_d, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif tl.program_id(1) == 0:
        for i in tl.static_range(len(total_ptrs)):
            total = tl.zeros((1024,), tl.float32)
            for start in range(0, tiles, 1024):
                at = start + tl.arange(0, 1024)
                total += tl.load(partial_sum_ptr + at, mask=at < tiles, other=0.0)
            tl.store(total_ptrs[i], tl.sum(total))
            partial_sum_ptr += tiles
