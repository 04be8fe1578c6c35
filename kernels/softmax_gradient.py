"""G, the gradient of a softmax loss over logits, in chunks that ``waves.py`` multiplies: one kernel
for InfoNCE and one for the contrastive loss.

The logits are recomputed tile by tile. With the weights of each probability and each positive,
G = w_row P_row + w_column P_column + (weights at the positives). Where all references of a tile are
within fp32's range of the largest one, h, one exponential serves both probabilities,
2^(s - h) (a_row + a_column), and nothing is loaded or divided after the product. Large batches of
InfoNCE compute the extremes of the references beforehand, once per block. Other tiles take two
exponentials, slice by slice.

**Positives.** InfoNCE's only positive of a row is at row + offset: a tile that holds some, or
crosses the edge, puts logits of -HIDDEN in their place. The positives'
products leave the tile as one number a row, from which their entries of G follow, to be added in
fp32 at the end. In the contrastive loss a tile that holds pairs to tell apart goes slice by slice,
and its G has the positives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels.launch import Launch
from protoclip.kernels.tiles import (
    ID_STRIDES,
    IDS,
    LOG2E,
    SPREAD,
    can_hide,
    equal_ids,
    gradient_chunk,
    hide,
    id_pointers,
    needs_mask,
    operands,
    pinned,
    products,
    tile_origin,
    with_ids,
)
from protoclip.kernels.waves import Chunk, rows_of, store_gradient

# What differs from chunk to chunk, or between one weight for all and one for each.
CHANGING = ["n", "m", "first_row", "first_col", "offset"]
CHANGING += ["stride_row_weight", "stride_column_weight"]
# Slices begin anywhere; another alignment would compile the kernel again.
SLICED = ["partial_sum_ptr"]


@triton.jit
def _lift_to(peak, pair_weight):
    """-> a power of two that lets |G| <= peak * pair_weight fill fp16's range; weights are about
    1/N."""
    # Not the logarithm of the product: the assembler would wait for peak before other loads.
    exponent = 14.0 - tl.ceil(tl.log2(peak)) - tl.ceil(tl.log2(pair_weight))
    exponent = tl.minimum(tl.maximum(exponent, -80.0), 80.0)
    return tl.where((peak > 0) & (peak < float("inf")), tl.exp2(exponent), 1.0)


@triton.jit
def exponential(s, reference, positive):
    """2^(s - reference), the positive's exponent snapped to 0 where the forward used it as the
    reference: an fma rounds scale x.y otherwise than the product stored then."""
    exponent = s - reference
    snap = positive & (tl.abs(exponent) <= tl.abs(reference) * 2.4e-7)  # 4 units in the last place
    return tl.exp2(tl.where(snap, 0.0, exponent))


@triton.jit
def _extremes_of(row_reference, column_reference):
    """-> the smallest and the largest reference of a tile."""
    low = tl.min(row_reference)
    high = tl.max(row_reference)
    if column_reference is not None:
        low = tl.minimum(low, tl.min(column_reference))
        high = tl.maximum(high, tl.max(column_reference))
    return low, high


@triton.jit
def _with_one_exponential(s, high, row_factor, column_factor):
    """-> G of a whole tile, 2^(s - high) (row_factor + column_factor)."""
    factor = row_factor[:, None]  # before the products nine registers would spill
    if column_factor is not None:
        factor += pinned(column_factor)[None, :]
    return tl.exp2(s - high) * factor


class Side(NamedTuple):
    """What the rows or the columns bring into G. Tensors only: a number in a tuple compiles the
    kernel again where its divisibility by 16 changes."""

    statistics_ptr: Tensor  # ``PairStatistics``
    weight_ptr: Tensor  # [length] of the losses, of any stride
    mean_weight_ptr: Tensor | None  # [length] of the mean positives; None: 0
    peak_ptr: Tensor | None  # [], the largest |weight|; None: G is not lifted
    mean_peak_ptr: Tensor | None  # []


@triton.jit
def _load_side(side, position, used, stride, stride_weight, unit):
    """-> reference, sum and weight of a probability."""
    # Loads under a mask stay where they are: others would move behind the branch that uses them.
    weight = tl.load(side.weight_ptr + position * stride_weight, mask=used, other=0.0) * unit
    total = tl.load(side.statistics_ptr + stride + position, mask=used, other=1.0)
    reference = tl.load(side.statistics_ptr + position, mask=used, other=0.0)
    return reference, total, weight / total


@triton.jit
def _entries(s, side, position, used, stride, stride_weight, unit):
    """-> one direction's part of the entries of positives, whose logits are s, in G."""
    reference, total, weight = _load_side(side, position, used, stride, stride_weight, unit)
    return (exponential(s, reference, True) - total) * weight


@triton.jit
def _store_extremes(out_ptr, reference_ptr, position, length):
    reference = tl.load(reference_ptr + tl.minimum(position, length - 1))
    tl.store(out_ptr, tl.min(reference))
    tl.store(out_ptr + 1, tl.max(reference))


@triton.jit(do_not_specialize=["n", "m"])
def reference_extremes_kernel(
    row_reference_ptr, column_reference_ptr, n, m, out_ptr,  # [N], [M], [row and column blocks, 2]
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The extremes of the references of each block of rows and of columns of G."""
    program = tl.program_id(0)
    blocks_n = tl.cdiv(n, BLOCK_N)
    out_ptr += 2 * program
    if program < blocks_n:
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        _store_extremes(out_ptr, row_reference_ptr, rows, n)
    else:
        cols = (program - blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        _store_extremes(out_ptr, column_reference_ptr, cols, m)


@triton.jit
def _load_extremes(extremes_ptr, block):
    return tl.load(extremes_ptr + 2 * block), tl.load(extremes_ptr + 2 * block + 1)


@triton.jit
def _info_nce_slices(
    x_ptr, y_ptr, g_ptr, base2_scale, row_reference, row_weight,
    column_side, stride_columns, stride_column_weight, unit,
    row0, col0, n, m, d, first_col, offset, stride_g, strides,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Write G of a tile with two exponentials an element, slice by slice. -> its part of
    sum G x.y, and the products of its positives [rows]."""
    BLOCK_N: tl.constexpr = row_reference.shape[0]
    rows = row0 + tl.arange(0, BLOCK_N)
    partial_sum = 0.0
    positive_product = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(col0, col0 + BLOCK_M, SLICE_M):
        cols = first + tl.arange(0, SLICE_M)
        if BOTH_DIRECTIONS:
            strip_cols = first_col + tl.minimum(cols, m - 1)
            column_reference, _total, column_weight = _load_side(
                column_side, strip_cols, strip_cols >= 0, stride_columns, stride_column_weight, unit
            )
        acc = products(
            x_ptr, y_ptr, row0, first, n, m, d, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D
        )
        s = acc * base2_scale
        p = tl.exp2(s - row_reference[:, None]) * row_weight[:, None]
        if BOTH_DIRECTIONS:
            p += tl.exp2(s - pinned(column_reference)[None, :]) * pinned(column_weight)[None, :]
        positive = cols[None, :] == rows[:, None] + offset
        positive_product += tl.sum(tl.where(positive, acc, 0.0), 1)
        negative = (rows[:, None] < n) & (cols[None, :] < m) & (positive == 0)
        p = tl.where(negative, p, 0.0)
        partial_sum += tl.sum(p * acc)
        store_gradient(p, row0, first, g_ptr, stride_g)
    return partial_sum, positive_product


@triton.jit(
    do_not_specialize=[*CHANGING, "stride_rows", "stride_columns", "first_column_block"],
    do_not_specialize_on_alignment=[*SLICED, "entry_ptr"],
)
def info_nce_gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for slices
    logit_scale_ptr, pair_weight, factor_ptr,  # [], number, [] for the finish: scale / lift
    row_side, column_side,  # Side of all rows and, with BOTH_DIRECTIONS, of all columns
    stride_rows, stride_columns,  # of the sides' statistics
    stride_row_weight, stride_column_weight,  # 0: one weight for all
    extremes_ptr, first_column_block,  # [row and column blocks, 2] or None
    entry_ptr, partial_sum_ptr,  # [N], [tiles]
    n, m, d, first_row, first_col, offset, stride_g, strides,  # offset: within the chunk
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """G of one tile without the positives, times the lift; its part of sum G x.y; the positives'
    entries."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    base2_scale = logit_scale * LOG2E
    lift = tl.full((), 1.0, tl.float32)
    if LIFT:
        peak = tl.abs(tl.load(row_side.peak_ptr))
        if BOTH_DIRECTIONS:
            peak += tl.abs(tl.load(column_side.peak_ptr))
        lift = _lift_to(peak, pair_weight)
    unit = pair_weight * lift
    rows = row0 + tl.arange(0, BLOCK_N)
    strip_rows = first_row + tl.minimum(rows, n - 1)
    strip_cols = first_col + tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    # All loads come before any use of one: their latencies pass together.
    row_reference, _row_sum, row_weight = _load_side(
        row_side, strip_rows, strip_rows >= 0, stride_rows, stride_row_weight, unit
    )
    column_reference = None
    if BOTH_DIRECTIONS:
        column_reference, _column_sum, column_weight = _load_side(
            column_side, strip_cols, strip_cols >= 0, stride_columns, stride_column_weight, unit
        )
    if extremes_ptr is None:
        low, high = _extremes_of(row_reference, column_reference)
    else:
        low, high = _load_extremes(extremes_ptr, first_row // BLOCK_N + row0 // BLOCK_N)
        if BOTH_DIRECTIONS:
            block = first_column_block + first_col // BLOCK_M + col0 // BLOCK_M
            column_low, column_high = _load_extremes(extremes_ptr, block)
            low = tl.minimum(low, column_low)
            high = tl.maximum(high, column_high)
    row_factor = row_weight * tl.exp2(high - row_reference)
    column_factor = None
    if BOTH_DIRECTIONS:
        column_factor = column_weight * tl.exp2(high - column_reference)
    near = high - low < SPREAD
    masked = needs_mask(row0, col0, n, m, offset, BLOCK_N, BLOCK_M)
    partial_sum_ptr += tl.program_id(0)
    if near & (masked == 0):  # a path of its own: a branch after the products costs all tiles 4 %
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        p = _with_one_exponential(acc * base2_scale, high, row_factor, column_factor)
        tl.store(partial_sum_ptr, tl.sum(p * acc) / lift)
        store_gradient(p, row0, col0, g, stride_g)
    else:
        partial_sum = 0.0
        positive_product = tl.zeros((BLOCK_N,), tl.float32)
        if near & can_hide(base2_scale):
            acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
            acc, positive_product = hide(acc, base2_scale, row0, col0, n, m, offset)
            p = _with_one_exponential(acc * base2_scale, high, row_factor, column_factor)
            partial_sum = tl.sum(p * acc)
            store_gradient(p, row0, col0, g, stride_g)
        else:
            partial_sum, positive_product = _info_nce_slices(
                x_ptr, y_ptr, g_ptr, base2_scale, row_reference, row_weight,
                column_side, stride_columns, stride_column_weight, unit,
                row0, col0, n, m, d, first_col, offset, stride_g, strides,
                BLOCK_M, BLOCK_D, EVEN_D, SLICE_M, BOTH_DIRECTIONS,
            )  # fmt: skip
        if masked:
            partner = rows + offset
            has_partner = (rows < n) & (partner >= col0) & (partner < tl.minimum(col0 + BLOCK_M, m))
            s = positive_product * base2_scale
            entry = _entries(
                s, row_side, strip_rows, has_partner, stride_rows, stride_row_weight, unit
            )
            if BOTH_DIRECTIONS:
                entry += _entries(
                    s, column_side, first_col + partner, has_partner,
                    stride_columns, stride_column_weight, unit,
                )  # fmt: skip
            tl.store(entry_ptr + rows, entry, mask=has_partner)
            partial_sum += tl.sum(tl.where(has_partner, entry * positive_product, 0.0))
        tl.store(partial_sum_ptr, partial_sum / lift)
    if tl.program_id(0) == 0:  # not earlier: the store waits for the scale
        tl.store(factor_ptr, logit_scale / lift)


class PairPointers(NamedTuple):
    """``Pairs`` of ops/pairs.py as the kernels take them; None: not used."""

    own_key_ptr: Tensor | None  # [N], position of each row's own column; None: row + offset
    exclude_ptr: Tensor | None  # [N], position of its excluded column
    key_bias_ptr: Tensor | None  # [M]


@triton.jit
def _own_column(pairs, strip_rows, offset, PINNED: tl.constexpr):
    """The positions of the rows' own columns."""
    if pairs.own_key_ptr is None:
        return strip_rows + offset
    elif PINNED:
        return pinned(tl.load(pairs.own_key_ptr + strip_rows))
    else:
        return tl.load(pairs.own_key_ptr + strip_rows)


@triton.jit
def holds_pairs(
    pairs, offset, ids, row0, col0, n, m, first_row, first_col,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Whether a tile crosses the edge, or holds a positive or a pair that is not seen."""
    # In the chunk, which may end before the tile, and in the strip, whose arrays they index.
    chunk_rows = row0 + tl.arange(0, BLOCK_N)
    chunk_cols = col0 + tl.arange(0, BLOCK_M)
    strip_rows = first_row + tl.minimum(chunk_rows, n - 1)
    strip_cols = first_col + tl.minimum(chunk_cols, m - 1)
    column0 = first_col + col0
    place = _own_column(pairs, strip_rows, offset, False) - column0
    inside = (place >= 0) & (place < BLOCK_M)
    if pairs.exclude_ptr is not None:
        place = tl.load(pairs.exclude_ptr + strip_rows) - column0
        inside = inside | ((place >= 0) & (place < BLOCK_M))
    holds = tl.max(inside.to(tl.int32), 0)
    if pairs.key_bias_ptr is not None:
        absent = tl.load(pairs.key_bias_ptr + strip_cols) == -float("inf")
        holds = tl.maximum(holds, tl.max(absent.to(tl.int32), 0))
    if ids is not None:
        holds = tl.maximum(holds, tl.max(equal_ids(ids, strip_rows, strip_cols).to(tl.int32)))
    edge = (row0 + BLOCK_N > n) | (col0 + BLOCK_M > m)
    return edge | (holds > 0)


@triton.jit
def column_slice_of(
    x, y, base2_scale, pairs, offset, ids, row0, col0, n, m, d, first_row, first_col, strides,
    BLOCK_N: tl.constexpr, SLICE_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SAME_POSITIVE: tl.constexpr,
):  # fmt: skip
    """-> of some columns of a tile: products, base-2 logits, the keys seen, and the positives."""
    chunk_rows = row0 + tl.arange(0, BLOCK_N)
    chunk_cols = col0 + tl.arange(0, SLICE_M)
    strip_rows = first_row + tl.minimum(chunk_rows, n - 1)
    strip_cols = first_col + tl.minimum(chunk_cols, m - 1)
    inside = (chunk_rows < n)[:, None] & (chunk_cols < m)[None, :]
    is_own = _own_column(pairs, strip_rows, offset, True)[:, None] == strip_cols[None, :]
    positive, seen = with_ids(
        is_own, inside, ids, strip_rows, strip_cols, SAME_POSITIVE, PINNED=True
    )
    if pairs.exclude_ptr is not None:
        seen = seen & (
            pinned(tl.load(pairs.exclude_ptr + strip_rows))[:, None] != strip_cols[None, :]
        )
    if pairs.key_bias_ptr is not None:
        key_bias = pinned(tl.load(pairs.key_bias_ptr + strip_cols))
        seen = seen & (key_bias != -float("inf"))[None, :]
    acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D)
    s = acc * base2_scale
    if pairs.key_bias_ptr is not None:
        s += (key_bias * LOG2E)[None, :]
    return acc, s, seen, positive & seen


@triton.jit
def _load_pair_side(side, position, stride, stride_weight, unit):
    """-> reference, weight of a probability and weight of a positive."""
    used = position >= 0  # as in _load_side
    weight = tl.load(side.weight_ptr + position * stride_weight, mask=used, other=0.0) * unit
    reference = tl.load(side.statistics_ptr + position, mask=used, other=0.0)
    total = tl.load(side.statistics_ptr + stride + position, mask=used, other=1.0)
    num_positives = tl.load(side.statistics_ptr + 3 * stride + position, mask=used, other=1.0)
    positive_weight = -weight  # a gap is LSE - mean
    if side.mean_weight_ptr is not None:
        mean_weight = tl.load(side.mean_weight_ptr + position, mask=used, other=0.0)
        positive_weight += mean_weight * unit
    positive_weight /= tl.maximum(num_positives, 1.0)
    sees = total != 0  # NaN too
    return (
        tl.where(sees, reference, 0.0), tl.where(sees, weight / total, 0.0), positive_weight
    )  # fmt: skip


@triton.jit
def _pair_peak(side):
    """-> the largest |entry| of G from one side: of a probability and of a positive."""
    peak = 2 * tl.abs(tl.load(side.peak_ptr))
    if side.mean_peak_ptr is not None:
        peak += tl.abs(tl.load(side.mean_peak_ptr))
    return peak


@triton.jit(
    do_not_specialize=[*CHANGING, "stride_rows", "stride_columns", *ID_STRIDES],
    do_not_specialize_on_alignment=[*SLICED, "dkey_bias_ptr", *IDS],
)
def contrastive_gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for slices
    logit_scale_ptr, pair_weight, factor_ptr,  # [], number, [] for the finish: scale / lift
    row_side, column_side,  # Side of all rows and, with BOTH_DIRECTIONS, of all columns
    stride_rows, stride_columns,  # of the sides' statistics
    stride_row_weight, stride_column_weight,  # 0: one weight for all
    partial_sum_ptr, dkey_bias_ptr,  # [tiles], [row blocks, M] or None
    pairs, offset,
    query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, first_row, first_col, stride_g, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
    NUM_IDS: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """G of one tile times the lift, its part of sum G x.y, and its column sums."""
    ids = None
    if NUM_IDS > 0:
        ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    base2_scale = logit_scale * LOG2E
    lift = tl.full((), 1.0, tl.float32)
    if LIFT:
        peak = _pair_peak(row_side)
        if BOTH_DIRECTIONS:
            peak += _pair_peak(column_side)
        lift = _lift_to(peak, pair_weight)
    unit = pair_weight * lift
    strip_rows = first_row + tl.minimum(row0 + tl.arange(0, BLOCK_N), n - 1)
    strip_cols = first_col + tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    # All loads come before any use of one: their latencies pass together.
    row_reference, row_weight, row_positive_weight = _load_pair_side(
        row_side, strip_rows, stride_rows, stride_row_weight, unit
    )
    column_reference = None
    if BOTH_DIRECTIONS:
        column_reference, column_weight, _column_positive = _load_pair_side(
            column_side, strip_cols, stride_columns, stride_column_weight, unit
        )
    low, high = _extremes_of(row_reference, column_reference)
    in_slices = holds_pairs(
        pairs, offset, ids, row0, col0, n, m, first_row, first_col, BLOCK_N, BLOCK_M
    )
    partial_sum_ptr += tl.program_id(0)
    if dkey_bias_ptr is not None:
        dkey_bias_ptr += (row0 // BLOCK_N) * m + col0
    if (high - low < SPREAD) & (in_slices == 0):
        row_factor = row_weight * tl.exp2(high - row_reference)
        column_factor = None
        if BOTH_DIRECTIONS:
            column_factor = column_weight * tl.exp2(high - column_reference)
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        s = acc * base2_scale
        if pairs.key_bias_ptr is not None:
            s += (tl.load(pairs.key_bias_ptr + strip_cols) * LOG2E)[None, :]
        p = _with_one_exponential(s, high, row_factor, column_factor)
        if dkey_bias_ptr is not None:
            # Lanes that add one row to another would each fuse their own product into the sum.
            p += 0.0
        tl.store(partial_sum_ptr, tl.sum(p * acc) / lift)
        if dkey_bias_ptr is not None:
            tl.store(dkey_bias_ptr + tl.arange(0, BLOCK_M), tl.sum(p, 0) / lift)
        store_gradient(p, row0, col0, g, stride_g)
    else:
        partial_sum = 0.0
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            if BOTH_DIRECTIONS:
                slice_cols = first_col + tl.minimum(first + tl.arange(0, SLICE_M), m - 1)
                reference, weight, positive_weight = _load_pair_side(
                    column_side, slice_cols, stride_columns, stride_column_weight, unit
                )
            acc, s, seen, positive = column_slice_of(
                x_ptr, y_ptr, base2_scale, pairs, offset, ids, row0, first, n, m, d,
                first_row, first_col, strides,
                BLOCK_N, SLICE_M, BLOCK_D, EVEN_D, SAME_POSITIVE,
            )  # fmt: skip
            p = exponential(s, row_reference[:, None], positive) * row_weight[:, None]
            at_positive = tl.broadcast_to(row_positive_weight[:, None], p.shape)
            if BOTH_DIRECTIONS:
                e = exponential(s, pinned(reference)[None, :], positive)
                p += e * pinned(weight)[None, :]
                at_positive += pinned(positive_weight)[None, :]
            p = tl.where(seen, tl.where(positive, p + at_positive, p), 0.0)
            partial_sum += tl.sum(p * acc)
            if dkey_bias_ptr is not None:
                tile_cols = column_slice + tl.arange(0, SLICE_M)
                sums = tl.sum(p, 0) / lift
                tl.store(dkey_bias_ptr + tile_cols, sums, mask=col0 + tile_cols < m)
            store_gradient(p, row0, first, g_ptr, stride_g)
        tl.store(partial_sum_ptr, partial_sum / lift)
    if tl.program_id(0) == 0:  # not earlier: the store waits for the scale
        tl.store(factor_ptr, logit_scale / lift)


def chunk_operands(x: Tensor, y: Tensor, chunk: Chunk, g: Tensor, config: Launch) -> dict[str, Any]:
    """Arguments of both gradient kernels: the features of a chunk, its G and where it begins."""
    part_x = rows_of(x, chunk.rows)
    part_y = rows_of(y, chunk.cols)
    begin = {"first_row": chunk.rows.start, "first_col": chunk.cols.start}
    return operands(part_x, part_y, config) | gradient_chunk(g, config) | begin


def peak_of(weight: Tensor | None) -> Tensor | None:
    """The largest |weight|; one number expanded, as of a mean, is its own."""
    if weight is None or len(weight) == 0 or weight.stride(0) == 0:
        return weight
    return torch.linalg.vector_norm(weight, torch.inf)


def side_of(
    statistics: Tensor, weight: Tensor, mean_weight: Tensor | None, *, lifted: bool
) -> Side:
    """The rows or the columns of G, with peaks where it is ``lifted``."""
    if mean_weight is not None:
        mean_weight = mean_weight.contiguous()
    return Side(
        statistics_ptr=statistics,
        weight_ptr=weight,
        mean_weight_ptr=mean_weight,
        peak_ptr=peak_of(weight) if lifted else None,
        mean_peak_ptr=peak_of(mean_weight) if lifted else None,
    )
