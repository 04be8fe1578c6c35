"""The contrastive loss, whose positives and negatives follow from ids and positions (ops/pairs.py).

A tile first compares its ids and positions. Most tiles contain no positive and no hidden pair:
they run as in ``info_nce.py`` and need no masks. The others go slice by slice, and mask each logit
by a row and a column of ids, positions and biases. For the rows and the columns of each tile, the
forward pass writes the maximum and the sum of the visible logits, and the sum and count of the
positives' logits; a second, small kernel merges them. The backward pass recomputes the logits and
writes G, with the positives, in chunks that ``waves.py`` multiplies. Sums are fp32 in a fixed
order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.info_nce import exact, exponential, join
from protoclip.kernels.launch import cdiv
from protoclip.kernels.results import (
    ContrastiveGradients,
    ContrastiveStatistics,
    PairStatistics,
)
from protoclip.kernels.scratch import PARTIAL_BYTES
from protoclip.kernels.tiles import (
    LOG2E,
    SPREAD,
    equal_ids,
    gradient_chunk,
    id_arguments,
    id_pointers,
    operands,
    pinned,
    products,
    tile_origin,
    with_ids,
)
from protoclip.kernels.waves import store_gradient


class Pairs(NamedTuple):
    """``Pairs`` of ops/pairs.py as the kernels take them; None: not used."""

    own_ptr: Tensor  # [N], position of each row's own column
    exclude_ptr: Tensor | None  # [N], position of its excluded column
    key_bias_ptr: Tensor | None  # [M]


@triton.jit
def _holds_pairs(
    pairs, ids, row0, col0, n, m, first_row, first_col,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Whether a tile crosses the edge, or holds a positive or a pair that is not seen."""
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, BLOCK_M)
    row = first_row + tl.minimum(rows, n - 1)
    col = first_col + tl.minimum(cols, m - 1)
    column0 = first_col + col0
    place = tl.load(pairs.own_ptr + row) - column0
    inside = (place >= 0) & (place < BLOCK_M)
    if pairs.exclude_ptr is not None:
        place = tl.load(pairs.exclude_ptr + row) - column0
        inside = inside | ((place >= 0) & (place < BLOCK_M))
    holds = tl.max(inside.to(tl.int32), 0)
    if pairs.key_bias_ptr is not None:
        absent = tl.load(pairs.key_bias_ptr + col) == -float("inf")
        holds = tl.maximum(holds, tl.max(absent.to(tl.int32), 0))
    if ids is not None:
        holds = tl.maximum(holds, tl.max(equal_ids(ids, row, col).to(tl.int32)))
    edge = (row0 + BLOCK_N > n) | (col0 + BLOCK_M > m)
    return edge | (holds > 0)


@triton.jit
def _column_slice(
    x, y, base2_scale, pairs, ids, row0, col0, n, m, d, first_row, first_col, strides,
    BLOCK_N: tl.constexpr, SLICE_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SAME_POSITIVE: tl.constexpr,
):  # fmt: skip
    """-> of some columns of a tile: products, base-2 logits, the keys seen, and the positives."""
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, SLICE_M)
    row = first_row + tl.minimum(rows, n - 1)
    col = first_col + tl.minimum(cols, m - 1)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    is_own = pinned(tl.load(pairs.own_ptr + row))[:, None] == col[None, :]
    positive, seen = with_ids(is_own, inside, ids, row, col, SAME_POSITIVE, PINNED=True)
    if pairs.exclude_ptr is not None:
        seen = seen & (pinned(tl.load(pairs.exclude_ptr + row))[:, None] != col[None, :])
    if pairs.key_bias_ptr is not None:
        key_bias = pinned(tl.load(pairs.key_bias_ptr + col))
        seen = seen & (key_bias != -float("inf"))[None, :]
    acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D)
    s = acc * base2_scale
    if pairs.key_bias_ptr is not None:
        s += (key_bias * LOG2E)[None, :]
    return acc, s, seen, positive & seen


@triton.jit
def _statistics(s, seen, positive, AXIS: tl.constexpr):
    """-> PairStatistics of a tile along an axis."""
    visible = tl.where(seen, s, -float("inf"))
    top = tl.max(visible, AXIS)
    zero = tl.where(top == -float("inf"), 0.0, top)
    return PairStatistics(
        reference=top,
        sum=tl.sum(exponential(visible, tl.expand_dims(zero, AXIS), positive), AXIS),
        positive_sum=tl.sum(tl.where(positive, s, 0.0), AXIS),
        num_positives=tl.sum(tl.where(positive, 1.0, 0.0), AXIS),
    )


@triton.jit
def _store_statistics(ptr, at, mask, length, statistics):
    """Write PairStatistics of the rows or columns of a tile, ``length`` apart."""
    for i in tl.static_range(len(statistics)):
        tl.store(ptr + i * length + at, statistics[i], mask=mask)


ID_STRIDES = ["stride_query_ids", "stride_key_ids"]


@triton.jit(do_not_specialize=["n", "m", "first_row", *ID_STRIDES])
def contrastive_forward_kernel(
    x, y, x_ptr, y_ptr, logit_scale_ptr,  # [N, D], [M, D] for tiles, the same for slices, []
    row_ptr, column_ptr,  # [4, column blocks, N], [4, row blocks, M]
    pairs, query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, first_row, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
    NUM_IDS: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile."""
    ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    base2_scale = tl.load(logit_scale_ptr).to(tl.float32) * LOG2E
    rows = row0 + tl.arange(0, BLOCK_N)
    blocks_n = tl.cdiv(n, BLOCK_N).to(tl.int64)
    blocks_m = tl.cdiv(m, BLOCK_M).to(tl.int64)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    at_column = (row0 // BLOCK_N).to(tl.int64) * m + col0
    zeros = tl.zeros((BLOCK_N,), tl.float32)
    if not _holds_pairs(pairs, ids, row0, col0, n, m, first_row, 0, BLOCK_N, BLOCK_M):
        s = base2_scale * products(
            x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D
        )
        cols = tl.arange(0, BLOCK_M)
        if pairs.key_bias_ptr is not None:
            s += (tl.load(pairs.key_bias_ptr + col0 + cols) * LOG2E)[None, :]
        top, e = exact(s, 1)
        row_statistics = PairStatistics(top, tl.sum(e, 1), positive_sum=zeros, num_positives=zeros)
        _store_statistics(row_ptr, at_row, None, blocks_m * n, row_statistics)
        if BOTH_DIRECTIONS:
            top, e = exact(s, 0)
            none = tl.zeros((BLOCK_M,), tl.float32)
            column_statistics = PairStatistics(
                top, tl.sum(e, 0), positive_sum=none, num_positives=none
            )
            _store_statistics(column_ptr, at_column + cols, None, blocks_n * m, column_statistics)
    else:
        row_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        row_sum = zeros
        row_positive_sum = zeros
        row_num_positives = zeros
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            _, s, seen, positive = _column_slice(
                x_ptr, y_ptr, base2_scale, pairs, ids, row0, first, n, m, d, first_row, 0, strides,
                BLOCK_N, SLICE_M, BLOCK_D, EVEN_D, SAME_POSITIVE,
            )  # fmt: skip
            of_rows = _statistics(s, seen, positive, 1)
            row_max, row_sum = join(row_max, row_sum, of_rows.reference, of_rows.sum)
            row_positive_sum += of_rows.positive_sum
            row_num_positives += of_rows.num_positives
            if BOTH_DIRECTIONS:
                cols = column_slice + tl.arange(0, SLICE_M)
                of_columns = _statistics(s, seen, positive, 0)
                _store_statistics(
                    column_ptr, at_column + cols, col0 + cols < m, blocks_n * m, of_columns
                )
        of_rows = PairStatistics(row_max, row_sum, row_positive_sum, row_num_positives)
        _store_statistics(row_ptr, at_row, rows < n, blocks_m * n, of_rows)


@triton.jit
def _merge_side(
    part_ptr, blocks, length, out_ptr, stride, program,  # [4, blocks, length], [4, stride]
    HAS_BEFORE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge the partials of some rows or columns."""
    position = program * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    size = tl.cast(blocks, tl.int64) * length
    reference = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    positive_sum = tl.zeros((BLOCK,), tl.float32)
    num_positives = tl.zeros((BLOCK,), tl.float32)
    if HAS_BEFORE:
        reference = tl.load(out_ptr + position, mask=inside, other=0.0)
        total = tl.load(out_ptr + stride + position, mask=inside, other=0.0)
        positive_sum = tl.load(out_ptr + 2 * stride + position, mask=inside, other=0.0)
        num_positives = tl.load(out_ptr + 3 * stride + position, mask=inside, other=0.0)
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        at = part_ptr + block[:, None].to(tl.int64) * length + position[None, :]
        mask = (block[:, None] < blocks) & inside[None, :]
        r = tl.load(at, mask=mask, other=-float("inf"))
        t = tl.load(at + size, mask=mask, other=0.0)
        top = tl.max(r, 0)
        zero = tl.where(top == -float("inf"), 0.0, top)
        t = tl.sum(t * tl.exp2(r - zero[None, :]), 0)
        reference, total = join(reference, total, top, t)
        positive_sum += tl.sum(tl.load(at + 2 * size, mask=mask, other=0.0), 0)
        num_positives += tl.sum(tl.load(at + 3 * size, mask=mask, other=0.0), 0)
    statistics = PairStatistics(reference, total, positive_sum, num_positives)
    _store_statistics(out_ptr, position, inside, stride, statistics)


@triton.jit(
    do_not_specialize=["blocks_m", "height", "n", "blocks_n", "m"],
    do_not_specialize_on_alignment=["row_ptr"],
)
def contrastive_merge_kernel(
    row_part_ptr, blocks_m, height, row_ptr, n,  # [4, blocks_m, height], of [4, N] from there on
    column_part_ptr, blocks_n, m, column_ptr,  # [4, blocks_n, M], [4, M]
    HAS_BEFORE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Statistics of the rows of a wave, and of all columns, with those of earlier waves."""
    program = tl.program_id(0)
    programs = tl.cdiv(height, BLOCK)
    if program < programs:
        _merge_side(row_part_ptr, blocks_m, height, row_ptr, n, program, False, BLOCK, DEPTH)
    else:
        _merge_side(
            column_part_ptr, blocks_n, m, column_ptr, m, program - programs,
            HAS_BEFORE, BLOCK, DEPTH,
        )  # fmt: skip


class PairSide(NamedTuple):
    """What the rows or the columns bring into G."""

    statistics_ptr: Tensor  # [4, length], in the rows of ``PairStatistics``
    weights_ptr: Tensor  # [2, length], of the LSE and of the mean positive


@triton.jit
def _load_side(side, length, position, lift):
    """-> reference, weight of a probability and weight of a positive."""
    at = side.statistics_ptr + position
    reference = tl.load(at)
    total = tl.load(at + length)
    num_positives = tl.load(at + 3 * length)
    lse_weight = tl.load(side.weights_ptr + position)
    mean_weight = tl.load(side.weights_ptr + length + position)
    used = total != 0  # NaN too
    probability_weight = tl.where(used, lse_weight / total, 0.0) * lift
    positive_weight = mean_weight / tl.maximum(num_positives, 1.0) * lift
    return tl.where(used, reference, 0.0), probability_weight, positive_weight


SIZES = ["n", "m", "first_row", "first_col", "first_tile", "num_rows", "num_columns", *ID_STRIDES]
SLICED = ["partial_sum_ptr", "dkey_bias_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def contrastive_gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for slices
    logit_scale_ptr, lift_ptr, factor_ptr,  # [], [] or None: 1, [] for the finish: scale / lift
    row_side, column_side,  # PairSide of all rows and, with BOTH_DIRECTIONS, of all columns
    num_rows, num_columns,
    partial_sum_ptr, dkey_bias_ptr, first_tile,  # [tiles], [row blocks, M] or None
    pairs, query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, first_row, first_col, stride_g, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
    NUM_IDS: tl.constexpr,
):  # fmt: skip
    """G of one tile times the lift, its part of sum G x.y, and its column sums."""
    ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    base2_scale = logit_scale * LOG2E
    lift = 1.0
    if lift_ptr is not None:
        lift = tl.load(lift_ptr)
    row = first_row + tl.minimum(row0 + tl.arange(0, BLOCK_N), n - 1)
    col = first_col + tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    # All loads come before any use of one: their latencies pass together.
    row_reference, row_probability_weight, row_positive_weight = _load_side(
        row_side, num_rows, row, lift
    )
    low = tl.min(row_reference)
    high = tl.max(row_reference)
    if BOTH_DIRECTIONS:
        column_reference, column_probability_weight, _ = _load_side(
            column_side, num_columns, col, lift
        )
        low = tl.minimum(low, tl.min(column_reference))
        high = tl.maximum(high, tl.max(column_reference))
    masked = _holds_pairs(pairs, ids, row0, col0, n, m, first_row, first_col, BLOCK_N, BLOCK_M)
    sums_ptr = dkey_bias_ptr
    if dkey_bias_ptr is not None:
        sums_ptr += (row0 // BLOCK_N) * m + col0
    if (masked == 0) & (high - low < SPREAD):
        factor = (row_probability_weight * tl.exp2(high - row_reference))[:, None]
        if BOTH_DIRECTIONS:
            column_factor = column_probability_weight * tl.exp2(high - column_reference)
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        if BOTH_DIRECTIONS:
            factor += pinned(column_factor)[None, :]
        shift = acc * base2_scale - high
        if pairs.key_bias_ptr is not None:
            shift += (tl.load(pairs.key_bias_ptr + col) * LOG2E)[None, :]
        p = tl.exp2(shift) * factor
        tl.store(partial_sum_ptr + first_tile + tl.program_id(0), tl.sum(p * acc) / lift)
        if dkey_bias_ptr is not None:
            tl.store(sums_ptr + tl.arange(0, BLOCK_M), tl.sum(p, 0))
        store_gradient(p, row0, col0, g, stride_g)
    else:
        partial_sum = 0.0
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            if BOTH_DIRECTIONS:
                slice_col = first_col + tl.minimum(first + tl.arange(0, SLICE_M), m - 1)
                reference, probability_weight, positive_weight = _load_side(
                    column_side, num_columns, slice_col, lift
                )
            acc, s, seen, positive = _column_slice(
                x_ptr, y_ptr, base2_scale, pairs, ids, row0, first, n, m, d,
                first_row, first_col, strides,
                BLOCK_N, SLICE_M, BLOCK_D, EVEN_D, SAME_POSITIVE,
            )  # fmt: skip
            p = exponential(s, row_reference[:, None], positive) * row_probability_weight[:, None]
            at_positive = tl.broadcast_to(row_positive_weight[:, None], p.shape)
            if BOTH_DIRECTIONS:
                e = exponential(s, pinned(reference)[None, :], positive)
                p += e * pinned(probability_weight)[None, :]
                at_positive += pinned(positive_weight)[None, :]
            p = tl.where(seen, tl.where(positive, p + at_positive, p), 0.0)
            partial_sum += tl.sum(p * acc)
            if dkey_bias_ptr is not None:
                cols = column_slice + tl.arange(0, SLICE_M)
                tl.store(sums_ptr + cols, tl.sum(p, 0), mask=col0 + cols < m)
            store_gradient(p, row0, first, g_ptr, stride_g)
        tl.store(partial_sum_ptr + first_tile + tl.program_id(0), partial_sum / lift)
    if tl.program_id(0) == 0:  # not earlier: the store waits for the scale
        tl.store(factor_ptr, logit_scale / lift)


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
    both_directions: bool,
) -> ContrastiveStatistics:
    """Statistics of a strip; own to same_positive as in ops/pairs.py."""
    n = x.shape[0]
    m = y.shape[0]
    if not min(n, m):
        return ContrastiveStatistics(
            rows=_without_keys(x, n), columns=_without_keys(x, m if both_directions else 0)
        )
    config = launch.choose("contrastive_forward", x, y)
    blocks_m = cdiv(m, config.block_m)
    wave = max(1, PARTIAL_BYTES // (16 * (blocks_m * config.block_n + m))) * config.block_n
    pairs = Pairs(own, exclude, key_bias)
    num_columns = m if both_directions else 0
    row_statistics = x.new_empty((4, n), dtype=torch.float32)
    column_statistics = x.new_empty((4, num_columns), dtype=torch.float32)
    merge = launch.MERGE
    with torch.cuda.device_of(x):
        for first in range(0, n, wave):
            part = x[first : first + wave]
            height = part.shape[0]
            blocks_n = cdiv(height, config.block_n)
            row_part = x.new_empty((4, blocks_m, height), dtype=torch.float32)
            column_part = x.new_empty((4, blocks_n, num_columns), dtype=torch.float32)
            contrastive_forward_kernel[(blocks_n * blocks_m,)](
                **operands(part, y, config), logit_scale_ptr=logit_scale,
                row_ptr=row_part, column_ptr=column_part, pairs=pairs, first_row=first,
                **id_arguments(query_ids, key_ids),
                BOTH_DIRECTIONS=both_directions, SAME_POSITIVE=same_positive,
            )  # fmt: skip
            programs = cdiv(height, merge.block_n) + cdiv(num_columns, merge.block_n)
            contrastive_merge_kernel[(programs,)](
                row_part_ptr=row_part, blocks_m=blocks_m, height=height,
                row_ptr=row_statistics[:, first:], n=n,
                column_part_ptr=column_part, blocks_n=blocks_n, m=m, column_ptr=column_statistics,
                HAS_BEFORE=first > 0, BLOCK=merge.block_n, DEPTH=merge.block_m, **merge.options,
            )  # fmt: skip
    return ContrastiveStatistics(rows=row_statistics, columns=column_statistics)


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
    dkey_bias = x.new_zeros(y.shape[0], dtype=torch.float32)
    if min(x.shape[0], y.shape[0]) == 0:
        zero = x.new_zeros((), dtype=torch.float32)
        return ContrastiveGradients(torch.zeros_like(x), torch.zeros_like(y), zero, dkey_bias)
    kernel = "contrastive_gradient" if key_bias is None else "contrastive_gradient_with_biases"
    config = launch.choose(kernel, x, y)
    factor = x.new_empty((), dtype=torch.float32)
    lift = None
    if x.dtype == torch.float16:  # weights are about 1/N: let G fill its range
        peak = sum(w.abs().amax(1).sum() for w in (row_weights, column_weights) if w.numel())
        power = (14 - torch.as_tensor(peak).log2().ceil()).clamp(-80, 80).exp2()
        lift = power.where(power.isfinite(), 1.0).float()
    num_columns = column_statistics.shape[1]
    row_side = PairSide(row_statistics.contiguous(), row_weights.contiguous())
    column_side = PairSide(column_statistics.contiguous(), column_weights.contiguous())
    plan = waves.chunks(x, y, config)
    partial_sums = x.new_empty(sum(chunk.tiles for chunk in plan), dtype=torch.float32)
    pairs = Pairs(own, exclude, key_bias)

    def fill(chunk: waves.Chunk, g: Tensor) -> None:
        part_x = x[chunk.rows]
        part_y = y[chunk.cols]
        sums = None
        if key_bias is not None:
            blocks = chunk.shape[0] // config.block_n
            sums = x.new_empty((blocks, part_y.shape[0]), dtype=torch.float32)
        contrastive_gradient_kernel[(chunk.tiles,)](
            **operands(part_x, part_y, config), **gradient_chunk(g, config),
            logit_scale_ptr=logit_scale, lift_ptr=lift, factor_ptr=factor,
            row_side=row_side, column_side=column_side,
            num_rows=x.shape[0], num_columns=num_columns,
            partial_sum_ptr=partial_sums, dkey_bias_ptr=sums, first_tile=chunk.first_tile,
            pairs=pairs, first_row=chunk.rows.start, first_col=chunk.cols.start,
            **id_arguments(query_ids, key_ids),
            BOTH_DIRECTIONS=num_columns > 0, SAME_POSITIVE=same_positive,
        )  # fmt: skip
        if sums is not None:
            dkey_bias[chunk.cols] += sums.sum(dim=0)

    # The positives are in G: there are no entries.
    dx, dy, (dlogit_scale,) = waves.gradients_by_chunks(
        x, y, factor, 0, plan, fill, partial_sums[None], entries=None
    )
    return ContrastiveGradients(
        dx=dx,
        dy=dy,
        dlogit_scale=dlogit_scale,
        dkey_bias=dkey_bias if lift is None else dkey_bias / lift,
    )


def _without_keys(x: Tensor, length: int) -> Tensor:
    """The statistics [4, length] of rows or columns that see no keys."""
    zeros = x.new_zeros(length, dtype=torch.float32)
    statistics = PairStatistics(
        reference=zeros - torch.inf, sum=zeros, positive_sum=zeros, num_positives=zeros
    )
    return torch.stack(statistics)
