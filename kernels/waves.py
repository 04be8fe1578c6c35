"""Gradients of a loss over logits, dx = f G y and dy = f G^T x, in bounded chunks of G.

A kernel fills a chunk of G, [rows, cols] in the features' dtype, and two ordinary matrix products
with fp32 output consume it. Rounding G to half precision would show where the features share a
large common part, since the gradient is then a small difference of its terms; so the sums of what
rounding lost along each row and column are kept, and given to the partner: what remains is lost
(y_j - y_partner), not lost y_j. Chunks are as square as they can be: each product then has
thousands of output rows, enough tiles to fill a card, and 512-deep features read G about as long as
they multiply it. Adding tiles to dy with atomics instead would be bound by memory traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels.launch import Launch
from protoclip.kernels.wave_finish import finish_kernel, lost_kernel

SCRATCH_BYTES = 128 << 20
SIDE = 8192  # rows of a chunk where there are more columns than this


@dataclass(frozen=True)
class Chunk:
    """A rectangle of the logits and the tiles that cover it."""

    rows: slice
    cols: slice
    first_tile: int
    tiles: int


@dataclass(frozen=True)
class Plan:
    """Chunk sizes for n x m logits, in whole tiles."""

    n: int
    m: int
    rows: int
    cols: int
    block_n: int
    block_m: int

    @property
    def tiles(self) -> int:
        return sum(chunk.tiles for chunk in self.chunks())

    def chunks(self) -> Iterator[Chunk]:
        """Row by row of chunks."""
        tile = 0
        for i in range(0, self.n, self.rows):
            for j in range(0, self.m, self.cols):
                rows = slice(i, min(i + self.rows, self.n))
                cols = slice(j, min(j + self.cols, self.m))
                tiles = triton.cdiv(rows.stop - i, self.block_n)
                tiles *= triton.cdiv(cols.stop - j, self.block_m)
                yield Chunk(rows, cols, tile, tiles)
                tile += tiles


def plan(x: Tensor, y: Tensor, launch: Launch) -> Plan:
    """Chunks whose G fits ``SCRATCH_BYTES`` (but one tile always may)."""
    n, m, budget = len(x), len(y), SCRATCH_BYTES // x.element_size()

    def whole(size: int, block: int) -> int:
        return max(1, size // block) * block

    if m <= SIDE:
        cols = triton.cdiv(max(m, 1), launch.block_m) * launch.block_m
        rows = min(whole(n + launch.block_n - 1, launch.block_n), budget // cols)
    else:
        rows = whole(min(n + launch.block_n - 1, SIDE), launch.block_n)
        cols = min(whole(m + launch.block_m - 1, launch.block_m), budget // rows)
    rows, cols = whole(rows, launch.block_n), whole(cols, launch.block_m)
    return Plan(n, m, rows, cols, launch.block_n, launch.block_m)


@dataclass(frozen=True)
class Target:
    """Where a kernel writes a chunk of G, and what rounding it lost (empty for fp32)."""

    g: Tensor  # [whole tiles of rows, whole tiles of cols]
    row_lost: Tensor  # fp32 [column blocks, rows]
    column_lost: Tensor  # fp32 [row blocks, cols]


@triton.jit
def store_gradient(g, rows, cols, m, g_ptr, column_lost_ptr, stride_g, HALF: tl.constexpr):
    """Write a part of G, 0 past its end, and what rounding lost of each column's sum.

    -> what it lost of each row's sum."""
    # The scratch holds whole tiles: no mask, which would split the stores into elements.
    at = rows.to(tl.int64)[:, None] * stride_g + cols[None, :]
    rounded = g.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + at, rounded)
    lost = g - rounded.to(tl.float32)
    if HALF:
        tl.store(column_lost_ptr + cols, tl.sum(lost, 0), mask=cols < m)
    return tl.sum(lost, 1)


def products(
    x: Tensor,
    y: Tensor,
    factor: Tensor,
    offset: int,
    plan: Plan,
    fill: Callable[[Chunk, Target], None],
    total: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Let ``fill`` write each chunk of G and accumulate both products.

    Where one chunk holds all of G that is four launches: ``fill``, two products, the finish.

    Args:
        x, y: features [N, D], [M, D].
        factor: scalar on their device, applied to the fp32 sums before they are rounded.
        offset: row i's partner is column i + offset.
        plan: from ``plan(x, y, launch)``.
        fill: ``fill(chunk, target)`` launches a kernel that ends in ``store_gradient``.
        total: values [tiles] that ``fill`` writes and a scalar [] that takes their sum, both fp32.
    Returns:
        dx [N, D], dy [M, D] in the features' dtype.
    """
    dx, dy = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, y))
    if dx.numel() == 0 or dy.numel() == 0:
        return dx.zero_(), dy.zero_()
    scratch = _Scratch(x, y, plan)
    # Where a caller runs the backward pass under autocast, fp32 products must stay fp32.
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        for chunk in plan.chunks():
            rows, cols = chunk.rows, chunk.cols
            target = scratch.target(chunk)
            fill(chunk, target)
            scratch.keep_lost(chunk, target)
            height = rows.stop - rows.start
            g = target.g[:height, : cols.stop - cols.start]
            _multiply(scratch.sum_x[:height], g, y[cols], accumulate=cols.start > 0)
            _multiply(scratch.sum_y[cols], g.T, x[rows], accumulate=rows.start > 0)
            if cols.stop == plan.m:
                _finish(scratch, rows, (dx, dy), (x, y), factor, offset, total)
    return dx, dy


class _Scratch:
    """The buffers of one backward pass, used again by each chunk.

    ``lost_x``, ``lost_y`` [blocks, N], [blocks, M]: what rounding lost, still to be summed over
    blocks. Those of a single chunk are as its kernel wrote them.
    """

    def __init__(self, x: Tensor, y: Tensor, plan: Plan) -> None:
        self.plan, self.half = plan, x.dtype != torch.float32
        n, m, d = plan.n, plan.m, x.shape[1]
        tall, wide = plan.rows // plan.block_n, plan.cols // plan.block_m
        self.whole = plan.rows >= n and plan.cols >= m
        lost = (wide * min(plan.rows, n), tall * min(plan.cols, m)) if self.half else (0, 0)
        self.g = x.new_empty(plan.rows * plan.cols)
        self.sum_x, self.sum_y, self.row_lost, self.column_lost = (
            x.new_empty(shape, dtype=torch.float32)
            for shape in ((min(plan.rows, n), d), (m, d), *lost)
        )
        if self.whole and self.half:
            self.lost_x, self.lost_y = self.row_lost.view(wide, n), self.column_lost.view(tall, m)
        else:
            self.lost_x, self.lost_y = (x.new_empty((1, k), dtype=torch.float32) for k in (n, m))

    def target(self, chunk: Chunk) -> Target:
        height = triton.cdiv(chunk.rows.stop - chunk.rows.start, self.plan.block_n)
        width = triton.cdiv(chunk.cols.stop - chunk.cols.start, self.plan.block_m)
        shape = height * self.plan.block_n, width * self.plan.block_m
        g = self.g[: shape[0] * shape[1]].view(shape)
        return Target(g, self.row_lost, self.column_lost)

    def keep_lost(self, chunk: Chunk, target: Target) -> None:
        """Sum a chunk's ``lost`` before the next one overwrites it."""
        if self.whole or not self.half:
            return
        rows, cols, block = chunk.rows, chunk.cols, 64
        height, width = rows.stop - rows.start, cols.stop - cols.start
        lost_kernel[(triton.cdiv(height, block) + triton.cdiv(width, block),)](
            target.row_lost, self.lost_x[0, rows], target.g.shape[1] // self.plan.block_m, height,
            target.column_lost, self.lost_y[0, cols], target.g.shape[0] // self.plan.block_n, width,
            ADD_ROWS=cols.start > 0, ADD_COLUMNS=rows.start > 0, BLOCK=block,
        )  # fmt: skip


def _finish(
    scratch: _Scratch,
    rows: slice,
    grads: tuple[Tensor, Tensor],
    features: tuple[Tensor, Tensor],
    factor: Tensor,
    offset: int,
    total: tuple[Tensor, Tensor] | None,
) -> None:
    """Finish dx of these rows and, where they are the last, dy and the total."""
    (dx, dy), (x, y), block_n, block_d = grads, features, 16, 128
    height, (m, d) = rows.stop - rows.start, dy.shape
    shares, out = total or (None, None)
    programs = triton.cdiv(height, block_n)
    if rows.stop == scratch.plan.n:
        programs += triton.cdiv(m, block_n) + (total is not None)
    finish_kernel[(programs, triton.cdiv(d, block_d))](
        scratch.sum_x, scratch.lost_x[:, rows], len(scratch.lost_x), dx[rows], height,
        scratch.sum_y, scratch.lost_y, len(scratch.lost_y), dy, m,
        x, y, factor, shares, out, 0 if shares is None else len(shares),
        len(x), d, rows.start, offset, *x.stride(), *y.stride(),
        HALF=scratch.half, BLOCK_N=block_n, BLOCK_D=block_d,
    )  # fmt: skip


def _multiply(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out (+)= a b, fp32 out of any operands."""
    beta = int(accumulate)
    if out.dtype == a.dtype or not a.is_cuda:  # the CPU, under the interpreter, has no mixed form
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
