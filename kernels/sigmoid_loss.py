"""The sigmoid loss over tiles of the logits: what ops/siglip_loss.py calls.

z_ij = logit_scale x_i.y_j + logit_bias. A pair's loss is softplus(z), or softplus(-z) if it is
positive (j = i + offset); its gradient is G = sigmoid(z), minus 1 if it is positive. No statistics
of whole rows are needed, so one pass over the tiles gives the loss and, chunk by chunk, G for the
products of ``waves.py``, which adds the entries of the row's own pair separately. With ids, pairs
of the same id are either further positives, whose entries stay in G, or left out: a tile compares
its ids first, and goes slice by slice, with masks, only where it holds such a pair.

With u = e^-|z|: sigmoid is 1 / (1 + u) or u / (1 + u), and log(1 + u) = 2 artanh(u / (2 + u)), a
short series, because the card's logarithm has an absolute error of 2^-22 and softplus(-10) is
4.5e-5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.launch import cdiv
from protoclip.kernels.results import SigmoidGradients, SigmoidLoss
from protoclip.kernels.tiles import (
    ID_STRIDES,
    IDS,
    LOG2E,
    equal_ids,
    gradient_chunk,
    id_arguments,
    id_pointers,
    needs_mask,
    operands,
    products,
    tile_origin,
    with_ids,
)
from protoclip.kernels.waves import rows_of, store_entries, store_gradient

LIFT = 16384.0  # of G in fp16, whose normal numbers end at 6e-5


@triton.jit
def _softplus_sigmoid(z):
    u = tl.exp2(-tl.abs(z) * LOG2E)
    s = u / (2.0 + u)  # in [0, 1/3]
    s2 = s * s
    series = 1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 * (1 / 13)))
    series = 1.0 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * series))
    # z - z: an infinite logit gives NaN even where its loss would be 0.
    softplus = tl.maximum(z, 0.0) + 2.0 * s * series + (z - z)
    return softplus, tl.where(z >= 0, 1.0, u) / (1.0 + u)


@triton.jit
def _losses(z, positive, seen):
    """-> each pair's loss, and its G."""
    # Not softplus(z) - z, which would cancel.
    loss, p = _softplus_sigmoid(tl.where(positive, -z, z))
    p = tl.where(seen, tl.where(positive, -p, p), 0.0)
    return tl.where(seen, loss, 0.0), p


@triton.jit
def _holds_equal_ids(ids, row0, col0, n, m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether a pair of a tile shares an id: most tiles hold none, and need no masks."""
    row = tl.minimum(row0 + tl.arange(0, BLOCK_N), n - 1)
    col = tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    return tl.max(equal_ids(ids, row, col).to(tl.int32)) > 0


@triton.jit(
    do_not_specialize=["n", "m", "offset", "tiles", "first_tile", *ID_STRIDES],
    do_not_specialize_on_alignment=["entry_ptr", *IDS],
)
def sigmoid_loss_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for slices
    logit_scale_ptr, logit_bias_ptr,  # [], []
    entry_ptr,  # [N]
    partial_sum_ptr, tiles, first_tile,  # [3, tiles]: dlogit_scale, loss, dlogit_bias
    query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, offset, stride_g, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, GRADIENTS: tl.constexpr, LIFTED: tl.constexpr,
    SAME_POSITIVE: tl.constexpr, NUM_IDS: tl.constexpr,
):  # fmt: skip
    """Loss and, with GRADIENTS, lifted G and entries of one tile."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    logit_bias = tl.load(logit_bias_ptr).to(tl.float32)
    rows = row0 + tl.arange(0, BLOCK_N)
    ids = None
    if NUM_IDS > 0:
        ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    masked = needs_mask(row0, col0, n, m, offset, BLOCK_N, BLOCK_M)
    if ids is not None:
        masked = masked | _holds_equal_ids(ids, row0, col0, n, m, BLOCK_N, BLOCK_M)
    if not masked:
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        pair_loss, p = _softplus_sigmoid(acc * logit_scale + logit_bias)
        loss = tl.sum(pair_loss)
        dlogit_scale = tl.sum(p * acc)
        dlogit_bias = tl.sum(p)
        if GRADIENTS:
            store_gradient(p * LIFTED, row0, col0, g, stride_g)
    else:
        loss = 0.0
        dlogit_scale = 0.0
        dlogit_bias = 0.0
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            cols = first + tl.arange(0, SLICE_M)
            acc = products(
                x_ptr, y_ptr, row0, first, n, m, d, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D
            )
            is_own = cols[None, :] == rows[:, None] + offset
            inside = (rows[:, None] < n) & (cols[None, :] < m)
            row = tl.minimum(rows, n - 1)
            col = tl.minimum(cols, m - 1)
            positive, seen = with_ids(is_own, inside, ids, row, col, SAME_POSITIVE)
            pair_loss, p = _losses(acc * logit_scale + logit_bias, positive, seen)
            loss += tl.sum(pair_loss)
            dlogit_scale += tl.sum(p * acc)
            dlogit_bias += tl.sum(p)
            if GRADIENTS:
                g_part = p * LIFTED
                store_entries(g_part, rows, is_own, offset - first, n, m - first, entry_ptr)
                g_part = tl.where(is_own, 0.0, g_part)
                store_gradient(g_part, row0, first, g_ptr, stride_g)
    at = partial_sum_ptr + first_tile + tl.program_id(0)
    tl.store(at, dlogit_scale)
    tl.store(at + tiles, loss)
    tl.store(at + 2 * tl.cast(tiles, tl.int64), dlogit_bias)


@triton.jit(do_not_specialize=["size_x", "size_y"])
def scale_gradients_kernel(
    grad_ptr,  # []
    dx_ptr, scaled_dx_ptr, size_x, dy_ptr, scaled_dy_ptr, size_y,  # contiguous
    total_ptrs, scaled_total_ptrs,  # [] each
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients times one number: blocks of dx, then of dy."""
    program = tl.program_id(0)
    blocks_x = tl.cdiv(size_x, BLOCK)
    grad = tl.load(grad_ptr).to(tl.float32)
    if program < blocks_x:
        _scale_block(program, grad, dx_ptr, scaled_dx_ptr, size_x, BLOCK)
    else:
        _scale_block(program - blocks_x, grad, dy_ptr, scaled_dy_ptr, size_y, BLOCK)
    if program == 0:
        for i in tl.static_range(len(total_ptrs)):
            tl.store(scaled_total_ptrs[i], grad * tl.load(total_ptrs[i]))


@triton.jit
def _scale_block(block, grad, from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if (tl.cast(block, tl.int64) + 1) * BLOCK <= size:  # a mask would split loads and stores
        value = grad * tl.load(from_ptr + at).to(tl.float32)
        tl.store(to_ptr + at, value.to(to_ptr.dtype.element_ty))
    else:
        value = grad * tl.load(from_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(to_ptr + at, value.to(to_ptr.dtype.element_ty), mask=at < size)


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
    gradients: bool,
) -> SigmoidLoss:
    """The strip x [N, D] against y [M, D], as in ops/siglip_loss.py; ids as in ops/pairs.py."""
    config = launch.choose("sigmoid_loss", x, y)
    writes_g = gradients and min(x.numel(), y.numel()) > 0
    plan = waves.chunks(x, y, config, bounded=writes_g)  # without G: one chunk
    tiles = sum(chunk.tiles for chunk in plan)
    partial_sums = x.new_empty((3, tiles), dtype=torch.float32)
    lift = LIFT if x.dtype == torch.float16 else 1.0

    entries = x.new_empty(x.shape[0], dtype=torch.float32)

    def fill(chunk: waves.Chunk, g: Tensor | None) -> None:
        part_x = rows_of(x, chunk.rows)
        part_y = rows_of(y, chunk.cols)
        ids = id_arguments(None, None)
        if query_ids is not None and key_ids is not None:
            ids = id_arguments(query_ids[:, chunk.rows], key_ids[:, chunk.cols])
        sigmoid_loss_kernel[(chunk.tiles,)](
            **operands(part_x, part_y, config), **gradient_chunk(g, config),
            logit_scale_ptr=logit_scale, logit_bias_ptr=logit_bias,
            offset=offset + chunk.rows.start - chunk.cols.start,
            entry_ptr=rows_of(entries, chunk.rows), partial_sum_ptr=partial_sums, tiles=tiles,
            first_tile=chunk.first_tile, **ids,
            GRADIENTS=writes_g, LIFTED=lift, SAME_POSITIVE=same_positive,
        )  # fmt: skip

    if writes_g:
        factor = logit_scale.reshape(())
        if lift != 1.0:
            factor = factor.float() / lift
        dx, dy, totals = waves.gradients_by_chunks(
            x, y, factor, offset, plan, fill, partial_sums, entries
        )
    else:
        dx = x.new_zeros(x.shape if gradients else (0, x.shape[1]))
        dy = y.new_zeros(y.shape if gradients else (0, y.shape[1]))
        with torch.cuda.device_of(x):
            for chunk in plan:
                fill(chunk, None)
        totals = tuple(sums.sum() for sums in partial_sums)
    dlogit_scale, loss, dlogit_bias = totals
    return SigmoidLoss(loss, dx, dy, dlogit_scale, dlogit_bias)


def sigmoid_loss_bwd(
    grad: Tensor, dx: Tensor, dy: Tensor, dlogit_scale: Tensor, dlogit_bias: Tensor
) -> SigmoidGradients:
    """The gradients of ``sigmoid_loss`` times the upstream one []."""
    scaled = SigmoidGradients(
        dx=dx.new_empty(dx.shape),
        dy=dy.new_empty(dy.shape),
        dlogit_scale=torch.empty_like(dlogit_scale),
        dlogit_bias=torch.empty_like(dlogit_bias),
    )
    config = launch.SCALE
    programs = cdiv(dx.numel(), config.block_n) + cdiv(dy.numel(), config.block_n)
    with torch.cuda.device_of(dx):
        scale_gradients_kernel[(max(programs, 1),)](
            grad_ptr=grad,
            dx_ptr=dx.contiguous(), scaled_dx_ptr=scaled.dx, size_x=dx.numel(),
            dy_ptr=dy.contiguous(), scaled_dy_ptr=scaled.dy, size_y=dy.numel(),
            total_ptrs=(dlogit_scale, dlogit_bias),
            scaled_total_ptrs=(scaled.dlogit_scale, scaled.dlogit_bias),
            BLOCK=config.block_n, **config.options,
        )  # fmt: skip
    return scaled
