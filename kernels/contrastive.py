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
from protoclip.kernels.info_nce import exact, exponential, join, lift_to, peak_of
from protoclip.kernels.launch import cdiv
from protoclip.kernels.results import (
    ContrastiveForward,
    ContrastiveGradients,
    IdCodes,
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
from protoclip.kernels.waves import rows_of, store_gradient

LN2 = tl.constexpr(0.6931471805599453)


class Pairs(NamedTuple):
    """``Pairs`` of ops/pairs.py as the kernels take them; None: not used."""

    own_ptr: Tensor | None  # [N], position of each row's own column; None: row + own_offset
    exclude_ptr: Tensor | None  # [N], position of its excluded column
    key_bias_ptr: Tensor | None  # [M]


@triton.jit
def _own_column(pairs, row, own_offset, PINNED: tl.constexpr):
    """The positions of the rows' own columns."""
    if pairs.own_ptr is None:
        return row + own_offset
    elif PINNED:
        return pinned(tl.load(pairs.own_ptr + row))
    else:
        return tl.load(pairs.own_ptr + row)


@triton.jit
def _holds_pairs(
    pairs, own_offset, ids, row0, col0, n, m, first_row, first_col,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Whether a tile crosses the edge, or holds a positive or a pair that is not seen."""
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, BLOCK_M)
    row = first_row + tl.minimum(rows, n - 1)
    col = first_col + tl.minimum(cols, m - 1)
    column0 = first_col + col0
    place = _own_column(pairs, row, own_offset, False) - column0
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
    x, y, base2_scale, pairs, own_offset, ids, row0, col0, n, m, d, first_row, first_col, strides,
    BLOCK_N: tl.constexpr, SLICE_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SAME_POSITIVE: tl.constexpr,
):  # fmt: skip
    """-> of some columns of a tile: products, base-2 logits, the keys seen, and the positives."""
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, SLICE_M)
    row = first_row + tl.minimum(rows, n - 1)
    col = first_col + tl.minimum(cols, m - 1)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    is_own = _own_column(pairs, row, own_offset, True)[:, None] == col[None, :]
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
IDS = ["query_ids_ptr", "key_ids_ptr"]  # slices, which begin anywhere


@triton.jit(
    do_not_specialize=["n", "m", "first_row", "own_offset", *ID_STRIDES],
    do_not_specialize_on_alignment=IDS,
)
def contrastive_forward_kernel(
    x, y, x_ptr, y_ptr, logit_scale_ptr,  # [N, D], [M, D] for tiles, the same for slices, []
    row_ptr, column_ptr,  # [4, column blocks, N], [4, row blocks, M]
    pairs, own_offset,
    query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
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
    if not _holds_pairs(
        pairs, own_offset, ids, row0, col0, n, m, first_row, 0, BLOCK_N, BLOCK_M
    ):  # fmt: skip
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
                x_ptr, y_ptr, base2_scale, pairs, own_offset, ids, row0, first, n, m, d,
                first_row, 0, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D, SAME_POSITIVE,
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
    gap_ptr, mean_ptr, partial_sum_ptr, pair_weight,  # [length] each and None, or None and []
    HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge the partials of some rows or columns; the last ones complete their losses."""
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
    if IS_LAST:
        count = tl.maximum(num_positives, 1.0)
        mean = positive_sum / count
        mean += (positive_sum - mean * count) / count  # a GPU's quotient may be 2 ulp off
        gap = (tl.log2(total) + (reference - mean)) * LN2
        if partial_sum_ptr is None:
            tl.store(gap_ptr + position, gap, mask=inside)
            tl.store(mean_ptr + position, mean * LN2, mask=inside)
        else:
            tl.store(partial_sum_ptr, pair_weight * tl.sum(tl.where(inside, gap, 0.0)))


@triton.jit(
    do_not_specialize=["blocks_m", "height", "first_row", "n", "blocks_n", "m", "first_program"]
)
def contrastive_merge_kernel(
    row_part_ptr, blocks_m, height,  # [4, blocks_m, height]
    row_ptr, gap_ptr, mean_ptr, first_row, n,  # [4, N], [N], [N]
    column_part_ptr, blocks_n,  # [4, blocks_n, M]
    column_ptr, column_gap_ptr, column_mean_ptr, m,  # [4, M], [M], [M]
    partial_sum_ptr, first_program, pair_weight,  # [programs of all waves], or None: not summed
    HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Statistics of the rows of a wave, and of all columns, with those of earlier waves; and their
    losses, or sums of losses, once they are complete."""
    program = tl.program_id(0)
    programs = tl.cdiv(height, BLOCK)
    if partial_sum_ptr is not None:
        partial_sum_ptr += first_program + program
    if program < programs:
        _merge_side(
            row_part_ptr, blocks_m, height, row_ptr + first_row, n, program,
            gap_ptr + first_row, mean_ptr + first_row, partial_sum_ptr, pair_weight,
            False, True, BLOCK, DEPTH,
        )  # fmt: skip
    else:
        _merge_side(
            column_part_ptr, blocks_n, m, column_ptr, m, program - programs,
            column_gap_ptr, column_mean_ptr, partial_sum_ptr, pair_weight,
            HAS_BEFORE, IS_LAST, BLOCK, DEPTH,
        )  # fmt: skip


@triton.jit
def _first_equal(
    ids_ptr, stride_id, stride_column, key_ids_ptr, stride_key, stride_key_column,
    codes_ptr, length, keys, program, column,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Write the position of the first key that has the id, or -1, of a block of a column."""
    position = program * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    ids_ptr += column * stride_column.to(tl.int64)
    key_ids_ptr += column * stride_key_column.to(tl.int64)
    ids = tl.load(ids_ptr + position * stride_id.to(tl.int64), mask=inside, other=0)
    first = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, keys, KEYS):
        key = start + tl.arange(0, KEYS)
        key_id = tl.load(key_ids_ptr + key * stride_key.to(tl.int64), mask=key < keys, other=0)
        equal = (ids[:, None] == key_id[None, :]) & (key < keys)[None, :]
        first = tl.minimum(first, tl.min(tl.where(equal, key[None, :], 2147483647), 1))
    first = tl.where(first == 2147483647, -1, first)
    tl.store(codes_ptr + column * length + position, first, mask=inside)


@triton.jit(
    do_not_specialize=[
        "n", "m", "stride_n", "stride_n_column", "stride_m", "stride_m_column",
    ],
    do_not_specialize_on_alignment=["query_ids_ptr", "key_ids_ptr"],
)  # fmt: skip
def id_codes_kernel(
    query_ids_ptr, stride_n, stride_n_column, query_codes_ptr, n,  # int64 [N, R], int32 [R, N]
    key_ids_ptr, stride_m, stride_m_column, key_codes_ptr, m,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Small numbers in place of ids. Grid: blocks of the keys, then of the queries; columns."""
    program = tl.program_id(0)
    programs = tl.cdiv(m, BLOCK)
    if program < programs:
        _first_equal(
            key_ids_ptr, stride_m, stride_m_column, key_ids_ptr, stride_m, stride_m_column,
            key_codes_ptr, m, m, program, tl.program_id(1), BLOCK, KEYS,
        )  # fmt: skip
    else:
        _first_equal(
            query_ids_ptr, stride_n, stride_n_column, key_ids_ptr, stride_m, stride_m_column,
            query_codes_ptr, n, m, program - programs, tl.program_id(1), BLOCK, KEYS,
        )  # fmt: skip


class PairSide(NamedTuple):
    """What the rows or the columns bring into G."""

    statistics_ptr: Tensor  # [4, length], in the rows of ``PairStatistics``
    gap_weight_ptr: Tensor  # [length], of any stride
    mean_weight_ptr: Tensor | None  # [length]; None: 0
    gap_peak_ptr: Tensor  # [], the largest |weight|, read with LIFT
    mean_peak_ptr: Tensor | None  # []


@triton.jit
def _load_side(side, length, position, stride_weight, unit):
    """-> reference, weight of a probability and weight of a positive."""
    at = side.statistics_ptr + position
    reference = tl.load(at)
    total = tl.load(at + length)
    num_positives = tl.load(at + 3 * length)
    lse_weight = tl.load(side.gap_weight_ptr + position * stride_weight) * unit
    positive_weight = -lse_weight  # a gap is LSE - mean
    if side.mean_weight_ptr is not None:
        positive_weight += tl.load(side.mean_weight_ptr + position) * unit
    used = total != 0  # NaN too
    probability_weight = tl.where(used, lse_weight / total, 0.0)
    positive_weight = positive_weight / tl.maximum(num_positives, 1.0)
    return tl.where(used, reference, 0.0), probability_weight, positive_weight


@triton.jit
def _peak(side):
    """-> the largest weight that a side may bring."""
    peak = 2 * tl.abs(tl.load(side.gap_peak_ptr))
    if side.mean_peak_ptr is not None:
        peak += tl.abs(tl.load(side.mean_peak_ptr))
    return peak


SIZES = ["n", "m", "first_row", "first_col", "first_tile", "num_rows", "num_columns", "own_offset"]
SIZES += ["stride_row_weight", "stride_column_weight", *ID_STRIDES]
SLICED = ["partial_sum_ptr", "dkey_bias_ptr", *IDS]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def contrastive_gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for slices
    logit_scale_ptr, pair_weight, factor_ptr,  # [], number, [] for the finish: scale / lift
    row_side, column_side,  # PairSide of all rows and, with BOTH_DIRECTIONS, of all columns
    num_rows, num_columns, stride_row_weight, stride_column_weight,  # 0: one weight for all
    partial_sum_ptr, dkey_bias_ptr, first_tile,  # [tiles], [row blocks, M] or None
    pairs, own_offset,
    query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, first_row, first_col, stride_g, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
    NUM_IDS: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """G of one tile times the lift, its part of sum G x.y, and its column sums."""
    ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    base2_scale = logit_scale * LOG2E
    lift = tl.full((), 1.0, tl.float32)
    if LIFT:  # weights are about 1/N: let G fill fp16's range
        peak = _peak(row_side)
        if BOTH_DIRECTIONS:
            peak += _peak(column_side)
        lift = lift_to(peak * pair_weight)
    unit = pair_weight * lift
    row = first_row + tl.minimum(row0 + tl.arange(0, BLOCK_N), n - 1)
    col = first_col + tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    # All loads come before any use of one: their latencies pass together.
    row_reference, row_probability_weight, row_positive_weight = _load_side(
        row_side, num_rows, row, stride_row_weight, unit
    )
    low = tl.min(row_reference)
    high = tl.max(row_reference)
    if BOTH_DIRECTIONS:
        column_reference, column_probability_weight, _ = _load_side(
            column_side, num_columns, col, stride_column_weight, unit
        )
        low = tl.minimum(low, tl.min(column_reference))
        high = tl.maximum(high, tl.max(column_reference))
    masked = _holds_pairs(
        pairs, own_offset, ids, row0, col0, n, m, first_row, first_col, BLOCK_N, BLOCK_M
    )
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
            tl.store(sums_ptr + tl.arange(0, BLOCK_M), tl.sum(p, 0) / lift)
        store_gradient(p, row0, col0, g, stride_g)
    else:
        partial_sum = 0.0
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            if BOTH_DIRECTIONS:
                slice_col = first_col + tl.minimum(first + tl.arange(0, SLICE_M), m - 1)
                reference, probability_weight, positive_weight = _load_side(
                    column_side, num_columns, slice_col, stride_column_weight, unit
                )
            acc, s, seen, positive = _column_slice(
                x_ptr, y_ptr, base2_scale, pairs, own_offset, ids, row0, first, n, m, d,
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
                tl.store(sums_ptr + cols, tl.sum(p, 0) / lift, mask=col0 + cols < m)
            store_gradient(p, row0, first, g_ptr, stride_g)
        tl.store(partial_sum_ptr + first_tile + tl.program_id(0), partial_sum / lift)
    if tl.program_id(0) == 0:  # not earlier: the store waits for the scale
        tl.store(factor_ptr, logit_scale / lift)


def id_codes(query_ids: Tensor | None, key_ids: Tensor) -> IdCodes:
    """Codes of int64 ids, [N] or [N, R] and [M] or [M, R], as in ops/pairs.py; a key's is the
    position of the first key with its id."""
    key_columns = key_ids if key_ids.ndim == 2 else key_ids[:, None]
    query_columns = key_columns[:0]
    if query_ids is not None:
        query_columns = query_ids if query_ids.ndim == 2 else query_ids[:, None]
    n, columns = query_columns.shape
    m = key_columns.shape[0]
    codes = IdCodes(
        query=key_ids.new_empty((columns, n), dtype=torch.int32),
        key=key_ids.new_empty((columns, m), dtype=torch.int32),
    )
    config = launch.ID_CODES
    programs = cdiv(n, config.block_n) + cdiv(m, config.block_n)
    if programs:
        with torch.cuda.device_of(key_ids):
            id_codes_kernel[(programs, columns)](
                query_ids_ptr=query_columns, query_codes_ptr=codes.query, n=n,
                stride_n=query_columns.stride(0), stride_n_column=query_columns.stride(1),
                key_ids_ptr=key_columns, key_codes_ptr=codes.key, m=m,
                stride_m=key_columns.stride(0), stride_m_column=key_columns.stride(1),
                BLOCK=config.block_n, KEYS=config.block_m, **config.options,
            )  # fmt: skip
    return codes


def contrastive_fwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own: Tensor | None,
    first: int,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    both_directions: bool,
    pair_weight: float,
    summed: bool,
) -> ContrastiveForward:
    """Losses and statistics of a strip, or the sum of all losses times ``pair_weight``; own to
    same_positive as in ops/pairs.py."""
    n = x.shape[0]
    m = y.shape[0]
    num_columns = m if both_directions else 0
    if not min(n, m):
        return _without_pairs(x, n, num_columns, summed)
    config = launch.choose("contrastive_forward", x, y)
    blocks_m = cdiv(m, config.block_m)
    wave = max(1, PARTIAL_BYTES // (16 * (blocks_m * config.block_n + m))) * config.block_n
    pairs = Pairs(own, exclude, key_bias)
    row_statistics = x.new_empty((4, n), dtype=torch.float32)
    column_statistics = x.new_empty((4, num_columns), dtype=torch.float32)
    merge = launch.MERGE
    gap = row_statistics.new_empty(0 if summed else n)
    mean = torch.empty_like(gap)
    column_gap = gap.new_empty(0 if summed else num_columns)
    column_mean = torch.empty_like(column_gap)
    heights = [min(wave, n - first_row) for first_row in range(0, n, wave)]
    column_programs = cdiv(num_columns, merge.block_n)
    partial_sums = None
    if summed:
        row_programs = sum(cdiv(height, merge.block_n) for height in heights)
        partial_sums = gap.new_empty(row_programs + column_programs)
    first_row = 0
    first_program = 0
    with torch.cuda.device_of(x):
        for height in heights:
            part = rows_of(x, slice(first_row, first_row + height))
            blocks_n = cdiv(height, config.block_n)
            row_part = x.new_empty((4, blocks_m, height), dtype=torch.float32)
            column_part = x.new_empty((4, blocks_n, num_columns), dtype=torch.float32)
            contrastive_forward_kernel[(blocks_n * blocks_m,)](
                **operands(part, y, config), logit_scale_ptr=logit_scale,
                row_ptr=row_part, column_ptr=column_part, pairs=pairs, own_offset=first,
                first_row=first_row, **id_arguments(query_ids, key_ids),
                BOTH_DIRECTIONS=both_directions, SAME_POSITIVE=same_positive,
            )  # fmt: skip
            programs = cdiv(height, merge.block_n)
            contrastive_merge_kernel[(programs + column_programs,)](
                row_part_ptr=row_part, blocks_m=blocks_m, height=height,
                row_ptr=row_statistics, gap_ptr=gap, mean_ptr=mean, first_row=first_row, n=n,
                column_part_ptr=column_part, blocks_n=blocks_n,
                column_ptr=column_statistics, column_gap_ptr=column_gap,
                column_mean_ptr=column_mean, m=m,
                partial_sum_ptr=partial_sums, first_program=first_program, pair_weight=pair_weight,
                HAS_BEFORE=first_row > 0, IS_LAST=first_row + height == n,
                BLOCK=merge.block_n, DEPTH=merge.block_m, **merge.options,
            )  # fmt: skip
            first_row += height
            first_program += programs
    return ContrastiveForward(
        gap=gap if partial_sums is None else partial_sums.sum(),
        mean=mean,
        column_gap=column_gap,
        column_mean=column_mean,
        row_statistics=row_statistics,
        column_statistics=column_statistics,
    )


def contrastive_bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own: Tensor | None,
    first: int,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_gap_weight: Tensor,
    row_mean_weight: Tensor | None,
    column_gap_weight: Tensor,
    column_mean_weight: Tensor | None,
    pair_weight: float,
) -> ContrastiveGradients:
    """Gradients of a strip, as in ops/query_losses.py, for the weights of gap and mean positive,
    [N] and [M], of any stride, 0 too; they are multiplied by ``pair_weight``."""
    num_biases = 0 if key_bias is None else y.shape[0]
    if min(x.shape[0], y.shape[0]) == 0:
        zero = x.new_zeros((), dtype=torch.float32)
        no_bias = zero.new_zeros(num_biases)
        return ContrastiveGradients(torch.zeros_like(x), torch.zeros_like(y), zero, no_bias)
    kernel = "contrastive_gradient" if key_bias is None else "contrastive_gradient_with_biases"
    config = launch.choose(kernel, x, y)
    factor = x.new_empty((), dtype=torch.float32)
    lifted = x.dtype == torch.float16
    num_columns = column_statistics.shape[1]
    row_side = pair_side(row_statistics, row_gap_weight, row_mean_weight, lifted)
    column_side = pair_side(column_statistics, column_gap_weight, column_mean_weight, lifted)
    plan = waves.chunks(x, y, config)
    partial_sums = x.new_empty(sum(chunk.tiles for chunk in plan), dtype=torch.float32)
    dkey_bias = factor.new_zeros(num_biases) if num_biases else factor.new_empty(0)
    pairs = Pairs(own, exclude, key_bias)

    def fill(chunk: waves.Chunk, g: Tensor) -> None:
        part_x = rows_of(x, chunk.rows)
        part_y = rows_of(y, chunk.cols)
        sums = None
        if key_bias is not None:
            blocks = chunk.shape[0] // config.block_n
            sums = x.new_empty((blocks, part_y.shape[0]), dtype=torch.float32)
        contrastive_gradient_kernel[(chunk.tiles,)](
            **operands(part_x, part_y, config), **gradient_chunk(g, config),
            logit_scale_ptr=logit_scale, pair_weight=pair_weight, factor_ptr=factor,
            row_side=row_side, column_side=column_side,
            num_rows=x.shape[0], num_columns=num_columns,
            stride_row_weight=row_gap_weight.stride(0),
            stride_column_weight=column_gap_weight.stride(0),
            partial_sum_ptr=partial_sums, dkey_bias_ptr=sums, first_tile=chunk.first_tile,
            pairs=pairs, own_offset=first,
            first_row=chunk.rows.start, first_col=chunk.cols.start,
            **id_arguments(query_ids, key_ids),
            BOTH_DIRECTIONS=num_columns > 0, SAME_POSITIVE=same_positive, LIFT=lifted,
        )  # fmt: skip
        if sums is not None:
            dkey_bias[chunk.cols] += sums.sum(dim=0)

    # The positives are in G: there are no entries.
    dx, dy, (dlogit_scale,) = waves.gradients_by_chunks(
        x, y, factor, 0, plan, fill, partial_sums[None], entries=None
    )
    return ContrastiveGradients(dx=dx, dy=dy, dlogit_scale=dlogit_scale, dkey_bias=dkey_bias)


def pair_side(
    statistics: Tensor, gap_weight: Tensor, mean_weight: Tensor | None, lifted: bool
) -> PairSide:
    """The arguments of rows or columns; the peaks only matter where G is ``lifted``."""
    gap_peak = gap_weight
    mean_peak = None
    if mean_weight is not None:
        mean_weight = mean_weight.contiguous()
        mean_peak = mean_weight
    if lifted:
        gap_peak = peak_of(gap_weight)
        mean_peak = None if mean_weight is None else peak_of(mean_weight)
    return PairSide(statistics.contiguous(), gap_weight, mean_weight, gap_peak, mean_peak)


def _without_pairs(x: Tensor, n: int, m: int, summed: bool) -> ContrastiveForward:
    """Rows that see no columns, or columns that no row sees; one of both is empty."""
    rows = x.new_zeros((4, n), dtype=torch.float32)
    columns = x.new_zeros((4, m), dtype=torch.float32)
    rows[0].fill_(-torch.inf)
    columns[0].fill_(-torch.inf)
    none = rows.new_empty(0)
    return ContrastiveForward(
        gap=none.sum() if summed else rows[0].clone(),
        mean=none if summed else torch.zeros_like(rows[0]),
        column_gap=none.clone() if summed else columns[0].clone(),
        column_mean=none.clone() if summed else torch.zeros_like(columns[0]),
        row_statistics=rows,
        column_statistics=columns,
    )
