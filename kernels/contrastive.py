"""The contrastive loss, whose positives and negatives follow from ids and positions (ops/pairs.py).

A tile first compares its ids and positions. Most tiles contain no positive and no hidden pair:
they run as in ``info_nce.py`` and need no masks. The others go strip by strip, and mask each logit
by a row and a column of ids, positions and biases. For the rows and the columns of each tile, the
forward pass writes the maximum and the sum of the visible logits, and the sum and count of the
positives' logits; torch merges them. The backward pass recomputes the logits and writes G, with the
positives, in chunks that ``waves.py`` multiplies. Sums are fp32 in a fixed order.

``relation`` is (position of each row's own column, position of its excluded column or None, ids as
``id_rows`` gives them or None, bias of each column or None).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.info_nce import exact, exponential, join, pinned
from protoclip.kernels.results import ContrastiveGradients, ContrastiveStatistics
from protoclip.kernels.tiles import (
    LOG2E,
    SPREAD,
    equal_ids,
    gradient_chunk,
    id_rows,
    operands,
    products,
    tile_origin,
    with_ids,
)
from protoclip.kernels.waves import store_gradient

PARTIAL_BYTES = 64 << 20


@triton.jit
def _holds_pairs(
    relation, row0, col0, n, m, first_row, first_col,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Whether a tile crosses the edge, or holds a positive or a pair that is not seen."""
    own_ptr, exclude_ptr, ids, key_bias_ptr = relation
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, BLOCK_M)
    row = first_row + tl.minimum(rows, n - 1)
    col = first_col + tl.minimum(cols, m - 1)
    column0 = first_col + col0
    place = tl.load(own_ptr + row) - column0
    inside = (place >= 0) & (place < BLOCK_M)
    if exclude_ptr is not None:
        place = tl.load(exclude_ptr + row) - column0
        inside = inside | ((place >= 0) & (place < BLOCK_M))
    holds = tl.max(inside.to(tl.int32), 0)
    if key_bias_ptr is not None:
        absent = tl.load(key_bias_ptr + col) == -float("inf")
        holds = tl.maximum(holds, tl.max(absent.to(tl.int32), 0))
    if ids is not None:
        holds = tl.maximum(holds, tl.max(equal_ids(ids, row, col).to(tl.int32)))
    edge = (row0 + BLOCK_N > n) | (col0 + BLOCK_M > m)
    return edge | (holds > 0)


@triton.jit
def _strip(
    x, y, base2_scale, relation, row0, col0, n, m, d, first_row, first_col, strides,
    BLOCK_N: tl.constexpr, STRIP: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SAME_POSITIVE: tl.constexpr,
):  # fmt: skip
    """-> of some columns of a tile: their positions, products, base-2 logits, the keys seen, and
    the positives."""
    own_ptr, exclude_ptr, ids, key_bias_ptr = relation
    acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, STRIP, BLOCK_D, EVEN_D)
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, STRIP)
    row = first_row + tl.minimum(rows, n - 1)
    col = first_col + tl.minimum(cols, m - 1)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    s = acc * base2_scale
    is_own = tl.load(own_ptr + row)[:, None] == col[None, :]
    positive, seen = with_ids(is_own, inside, ids, row, col, SAME_POSITIVE)
    if exclude_ptr is not None:
        seen = seen & (tl.load(exclude_ptr + row)[:, None] != col[None, :])
    if key_bias_ptr is not None:
        bias = tl.load(key_bias_ptr + col)
        s += (bias * LOG2E)[None, :]
        seen = seen & (bias != -float("inf"))[None, :]
    return col, acc, s, seen, positive & seen


@triton.jit
def _statistics(s, seen, positive, AXIS: tl.constexpr):
    """-> maximum and sum of the logits seen, sum and count of the positives', along an axis."""
    visible = tl.where(seen, s, -float("inf"))
    top = tl.max(visible, AXIS)
    zero = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(exponential(visible, tl.expand_dims(zero, AXIS), positive), AXIS)
    positives = tl.sum(tl.where(positive, s, 0.0), AXIS)
    return top, total, positives, tl.sum(tl.where(positive, 1.0, 0.0), AXIS)


@triton.jit
def _store_side(ptr, at, mask, length, top, total, positives, count):
    """Write the four statistics of the rows or columns of a tile, ``length`` apart."""
    tl.store(ptr + at, top, mask=mask)
    tl.store(ptr + length + at, total, mask=mask)
    tl.store(ptr + 2 * length + at, positives, mask=mask)
    tl.store(ptr + 3 * length + at, count, mask=mask)


@triton.jit(do_not_specialize=["n", "m", "first_row"])
def contrastive_forward_kernel(
    x, y, x_ptr, y_ptr, logit_scale_ptr,  # [N, D], [M, D] for tiles, the same for strips, []
    row_ptr, column_ptr,  # [4, column blocks, N], [4, row blocks, M]
    relation, n, m, d, first_row, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    STRIP: tl.constexpr, COLUMNS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    base2_scale = tl.load(logit_scale_ptr).to(tl.float32) * LOG2E
    rows = row0 + tl.arange(0, BLOCK_N)
    blocks_n = tl.cdiv(n, BLOCK_N).to(tl.int64)
    blocks_m = tl.cdiv(m, BLOCK_M).to(tl.int64)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    at_column = (row0 // BLOCK_N).to(tl.int64) * m + col0
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    own_ptr, exclude_ptr, ids, key_bias_ptr = relation
    if not _holds_pairs(relation, row0, col0, n, m, first_row, 0, BLOCK_N, BLOCK_M):
        s = base2_scale * products(
            x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D
        )
        cols = tl.arange(0, BLOCK_M)
        if key_bias_ptr is not None:
            s += (tl.load(key_bias_ptr + col0 + cols) * LOG2E)[None, :]
        top, e = exact(s, 1)
        _store_side(row_ptr, at_row, None, blocks_m * n, top, tl.sum(e, 1), zeros, zeros)
        if COLUMNS:
            top, e = exact(s, 0)
            no_positives = tl.zeros((BLOCK_M,), tl.float32)
            _store_side(
                column_ptr, at_column + cols, None, blocks_n * m, top, tl.sum(e, 0),
                no_positives, no_positives,
            )  # fmt: skip
    else:
        row_top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        row_sum = zeros
        row_positives = zeros
        row_count = zeros
        for strip in range(0, BLOCK_M, STRIP):
            first = col0 + strip
            _, _, s, seen, positive = _strip(
                x_ptr, y_ptr, base2_scale, relation, row0, first, n, m, d, first_row, 0, strides,
                BLOCK_N, STRIP, BLOCK_D, EVEN_D, SAME_POSITIVE,
            )  # fmt: skip
            top, total, positives, count = _statistics(s, seen, positive, 1)
            row_top, row_sum = join(row_top, row_sum, top, total)
            row_positives += positives
            row_count += count
            if COLUMNS:
                cols = strip + tl.arange(0, STRIP)
                top, total, positives, count = _statistics(s, seen, positive, 0)
                _store_side(
                    column_ptr, at_column + cols, col0 + cols < m, blocks_n * m,
                    top, total, positives, count,
                )  # fmt: skip
        _store_side(
            row_ptr, at_row, rows < n, blocks_m * n, row_top, row_sum, row_positives, row_count
        )


SIZES = ["n", "m", "first_row", "first_col", "first_tile"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["share_ptr", "dbias_ptr"])
def contrastive_gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for strips
    logit_scale_ptr, lift_ptr,  # [], []
    row_ptr, column_ptr, stride_row, stride_column,  # [3, N], [3, M]: reference and weights
    share_ptr, dbias_ptr, first_tile,  # [tiles], [row blocks, M] or None
    relation, n, m, d, first_row, first_col, stride_g, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    STRIP: tl.constexpr, COLUMNS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
):  # fmt: skip
    """G of one tile times the lift, its share of sum G x.y, and its column sums."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    base2_scale = tl.load(logit_scale_ptr).to(tl.float32) * LOG2E
    lift = tl.load(lift_ptr)
    row = first_row + tl.minimum(row0 + tl.arange(0, BLOCK_N), n - 1)
    col = first_col + tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    # All loads come before any use of one: their latencies pass together.
    row_top = tl.load(row_ptr + row)
    row_level = tl.load(row_ptr + stride_row + row)
    low, high = tl.min(row_top), tl.max(row_top)
    if COLUMNS:
        column_top = tl.load(column_ptr + col)
        column_level = tl.load(column_ptr + stride_column + col)
        low, high = tl.minimum(low, tl.min(column_top)), tl.maximum(high, tl.max(column_top))
    general = _holds_pairs(relation, row0, col0, n, m, first_row, first_col, BLOCK_N, BLOCK_M)
    own_ptr, exclude_ptr, ids, key_bias_ptr = relation
    sums_ptr = dbias_ptr
    if dbias_ptr is not None:
        sums_ptr += (row0 // BLOCK_N) * m + col0
    if (general == 0) & (high - low < SPREAD):
        factor = (row_level * tl.exp2(high - row_top))[:, None]
        if COLUMNS:
            column_factor = column_level * tl.exp2(high - column_top)
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        if COLUMNS:
            factor += pinned(column_factor)[None, :]
        shift = acc * base2_scale - high
        if key_bias_ptr is not None:
            shift += (tl.load(key_bias_ptr + col) * LOG2E)[None, :]
        p = tl.exp2(shift) * factor
        tl.store(share_ptr + first_tile + tl.program_id(0), tl.sum(p * acc) / lift)
        if dbias_ptr is not None:
            tl.store(sums_ptr + tl.arange(0, BLOCK_M), tl.sum(p, 0))
        store_gradient(p, row0, col0, g, stride_g)
    else:
        share = 0.0
        row_mean = tl.load(row_ptr + 2 * stride_row + row)[:, None]
        for strip in range(0, BLOCK_M, STRIP):
            first = col0 + strip
            strip_col, acc, s, seen, positive = _strip(
                x_ptr, y_ptr, base2_scale, relation, row0, first, n, m, d,
                first_row, first_col, strides,
                BLOCK_N, STRIP, BLOCK_D, EVEN_D, SAME_POSITIVE,
            )  # fmt: skip
            p = exponential(s, row_top[:, None], positive) * row_level[:, None]
            at_positive = tl.broadcast_to(row_mean, p.shape)
            if COLUMNS:
                e = exponential(s, tl.load(column_ptr + strip_col)[None, :], positive)
                p += e * tl.load(column_ptr + stride_column + strip_col)[None, :]
                at_positive += tl.load(column_ptr + 2 * stride_column + strip_col)[None, :]
            p = tl.where(seen, tl.where(positive, p + at_positive, p), 0.0)
            share += tl.sum(p * acc)
            if dbias_ptr is not None:
                cols = strip + tl.arange(0, STRIP)
                tl.store(sums_ptr + cols, tl.sum(p, 0), mask=col0 + cols < m)
            store_gradient(p, row0, first, g_ptr, stride_g)
        tl.store(share_ptr + first_tile + tl.program_id(0), share / lift)


def contrastive_fwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own: Tensor,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    columns: bool,
) -> ContrastiveStatistics:
    """Statistics of a strip; own to same_positive as in ops/pairs.py."""
    n, m = len(x), len(y)
    if not min(n, m):
        return ContrastiveStatistics(
            rows=_without_keys(x, n), columns=_without_keys(x, m if columns else 0)
        )
    config = launch.choose("contrastive_forward", x, y)
    blocks_m = triton.cdiv(m, config.block_m)
    wave = max(1, PARTIAL_BYTES // (16 * (blocks_m * config.block_n + m))) * config.block_n
    relation = (own, exclude, id_rows(query_ids, key_ids), key_bias)
    by_row: list[Tensor] = []
    by_column: list[Tensor] = []
    with torch.cuda.device_of(x):
        for first in range(0, n, wave):
            part = x[first : first + wave]
            blocks_n = triton.cdiv(len(part), config.block_n)
            row_part = x.new_empty((4, blocks_m, len(part)), dtype=torch.float32)
            column_part = x.new_empty((4, blocks_n, m if columns else 0), dtype=torch.float32)
            contrastive_forward_kernel[(blocks_n * blocks_m,)](
                **operands(part, y, config), logit_scale_ptr=logit_scale,
                row_ptr=row_part, column_ptr=column_part, relation=relation, first_row=first,
                COLUMNS=columns, SAME_POSITIVE=same_positive,
            )  # fmt: skip
            by_row.append(_merged(row_part))
            by_column.append(_merged(column_part))
    return ContrastiveStatistics(
        rows=torch.cat(by_row, dim=1), columns=_merged(torch.stack(by_column, dim=1))
    )


def contrastive_bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own: Tensor,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
) -> ContrastiveGradients:
    """Gradients of a strip for the weights of LSE and mean positive, [2, N] and [2, M]."""
    dkey_bias = x.new_zeros(len(y), dtype=torch.float32)
    if min(len(x), len(y)) == 0:
        zero = x.new_zeros((), dtype=torch.float32)
        return ContrastiveGradients(torch.zeros_like(x), torch.zeros_like(y), zero, dkey_bias)
    kernel = "contrastive_gradient" if key_bias is None else "contrastive_gradient_with_biases"
    config = launch.choose(kernel, x, y)
    lift = torch.ones((), dtype=torch.float32, device=x.device)
    if x.dtype == torch.float16:  # weights are about 1/N: let G fill its range
        peak = sum(w.abs().amax(1).sum() for w in (row_weights, column_weights) if w.numel())
        power = (14 - torch.as_tensor(peak).log2().ceil()).clamp(-80, 80).exp2()
        lift = power.where(power.isfinite(), 1.0).float()
    row_side = _side(row_statistics, row_weights, lift)
    column_side = _side(column_statistics, column_weights, lift)
    num_columns = column_statistics.shape[1]
    plan = waves.chunks(x, y, config)
    shares = x.new_empty(sum(chunk.tiles for chunk in plan), dtype=torch.float32)
    relation = (own, exclude, id_rows(query_ids, key_ids), key_bias)

    def fill(chunk: waves.Chunk, g: Tensor, entries: Tensor) -> None:
        part_x, part_y = x[chunk.rows], y[chunk.cols]
        entries[chunk.rows].zero_()  # the positives are in G
        sums = None
        if key_bias is not None:
            blocks = chunk.shape[0] // config.block_n
            sums = x.new_empty((blocks, len(part_y)), dtype=torch.float32)
        contrastive_gradient_kernel[(chunk.tiles,)](
            **operands(part_x, part_y, config), **gradient_chunk(g, config),
            logit_scale_ptr=logit_scale, lift_ptr=lift, row_ptr=row_side, column_ptr=column_side,
            stride_row=len(x), stride_column=num_columns,
            share_ptr=shares, dbias_ptr=sums, first_tile=chunk.first_tile,
            relation=relation, first_row=chunk.rows.start, first_col=chunk.cols.start,
            COLUMNS=num_columns > 0, SAME_POSITIVE=same_positive,
        )  # fmt: skip
        if sums is not None:
            dkey_bias[chunk.cols] += sums.sum(dim=0)

    factor = logit_scale.reshape(()).float() / lift
    gradients = waves.products(x, y, factor, 0, plan, fill, shares)
    return ContrastiveGradients(
        dx=gradients.dx,
        dy=gradients.dy,
        dlogit_scale=gradients.dlogit_scale,
        dkey_bias=dkey_bias / lift,
    )


def _without_keys(x: Tensor, length: int) -> Tensor:
    """The statistics [4, length] of rows or columns that see no keys."""
    statistics = x.new_zeros((4, length), dtype=torch.float32)
    statistics[0] = -torch.inf
    return statistics


def _merged(parts: Tensor) -> Tensor:
    """[4, blocks, length] -> [4, length]."""
    top = parts[0].amax(dim=0)
    factor = (parts[0] - top.where(top != -torch.inf, 0)).exp2()
    return torch.stack([top, (parts[1] * factor).sum(0), parts[2].sum(0), parts[3].sum(0)])


def _side(statistics: Tensor, weights: Tensor, lift: Tensor) -> Tensor:
    """-> reference, weight of a probability and weight of a positive, [3, length]."""
    top, total, _, count = statistics
    used = total != 0
    level = (weights[0] / total).where(used, 0) * lift
    mean = weights[1] / count.clamp_min(1) * lift
    return torch.stack([top.where(used, 0), level, mean])
