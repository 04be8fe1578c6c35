"""G, the gradient of a softmax loss over logits, in chunks that ``waves.py`` multiplies: of InfoNCE
and of the contrastive loss.

The logits are recomputed tile by tile. With the weights of each probability and each positive,
G = w_row P_row + w_column P_column + (weights at the positives). Where all references of a tile are
within fp32's range of the largest one, h, one exponential serves both probabilities,
2^(s - h) (a_row + a_column), and nothing is loaded or divided after the product. Large batches of
InfoNCE compute the extremes of the references beforehand, once per block. Other tiles take two
exponentials, slice by slice.

**Positives.** A tile that holds pairs to tell apart goes slice by slice, and its G has the
positives. InfoNCE's only positive of a row is at row + offset (``DIAGONAL``): a tile that holds
some, or crosses the edge, puts logits of -HIDDEN in their place and goes on as all others do. The
positives' products leave the tile as one number a row, from which their entries of G follow, to be
added in fp32 at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.launch import Launch, cdiv
from protoclip.kernels.results import ContrastiveGradients
from protoclip.kernels.tiles import (
    ID_STRIDES,
    IDS,
    LOG2E,
    SPREAD,
    can_hide,
    equal_ids,
    gradient_chunk,
    hide,
    id_arguments,
    id_pointers,
    needs_mask,
    operands,
    pinned,
    products,
    tile_origin,
    with_ids,
)
from protoclip.kernels.waves import rows_of, store_gradient

# Up to so many, looking for extremes beforehand would cost more than what it saves.
FEW = 1024


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


class Side(NamedTuple):
    """What the rows or the columns bring into G, [length] each. Tensors only: a number in a tuple
    compiles the kernel again where its divisibility by 16 changes."""

    reference_ptr: Tensor  # or [4, length], ``PairStatistics``
    sum_ptr: Tensor | None  # None: it is in the statistics
    weight_ptr: Tensor  # of any stride
    mean_weight_ptr: Tensor | None  # of a mean positive; None: 0
    peak_ptr: Tensor | None  # [], the largest |weight|; None: G is not lifted
    mean_peak_ptr: Tensor | None


@triton.jit
def _load_side(side, position, length, stride_weight, unit):
    """-> reference, sum, weight of a probability and weight of a positive."""
    # Loads under a mask stay where they are: others would move behind the branch that uses them.
    used = position >= 0
    weight = tl.load(side.weight_ptr + position * stride_weight, mask=used, other=0.0) * unit
    positive_weight = -weight  # a gap is LSE - mean
    if side.sum_ptr is not None:
        total = tl.load(side.sum_ptr + position, mask=used, other=1.0)
        reference = tl.load(side.reference_ptr + position, mask=used, other=0.0)
        probability_weight = weight / total
    else:
        total = tl.load(side.reference_ptr + length + position, mask=used, other=1.0)
        num_positives = tl.load(side.reference_ptr + 3 * length + position, mask=used, other=1.0)
        reference = tl.load(side.reference_ptr + position, mask=used, other=0.0)
        if side.mean_weight_ptr is not None:
            mean_weight = tl.load(side.mean_weight_ptr + position, mask=used, other=0.0)
            positive_weight += mean_weight * unit
        positive_weight /= tl.maximum(num_positives, 1.0)
        sees = total != 0  # NaN too
        probability_weight = tl.where(sees, weight / total, 0.0)
        reference = tl.where(sees, reference, 0.0)
    return reference, total, probability_weight, positive_weight


@triton.jit
def _peak(side):
    """-> the largest weight that a side may bring."""
    peak = tl.abs(tl.load(side.peak_ptr))
    if side.sum_ptr is None:  # positives are in G
        peak *= 2
    if side.mean_peak_ptr is not None:
        peak += tl.abs(tl.load(side.mean_peak_ptr))
    return peak


@triton.jit
def _entries(s, side, position, length, stride_weight, unit):
    """-> one direction's part of the entries of positives, whose logits are s, in G."""
    at = tl.maximum(tl.minimum(position, length - 1), 0)
    reference, total, weight, _positive = _load_side(side, at, length, stride_weight, unit)
    return (exponential(s, reference, True) - total) * weight


@triton.jit
def _extremes(reference_ptr, position, length):
    """-> the smallest and the largest reference of a block."""
    reference = tl.load(reference_ptr + tl.minimum(position, length - 1))
    return tl.min(reference), tl.max(reference)


@triton.jit(do_not_specialize=["n", "m"])
def reference_extremes_kernel(
    row_reference_ptr, column_reference_ptr, n, m, out_ptr,  # [N], [M], [row and column blocks, 2]
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The extremes of the references of each block of rows and of columns of G."""
    program = tl.program_id(0)
    blocks_n = tl.cdiv(n, BLOCK_N)
    if program < blocks_n:
        rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
        low, high = _extremes(row_reference_ptr, rows, n)
    else:
        cols = (program - blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        low, high = _extremes(column_reference_ptr, cols, m)
    tl.store(out_ptr + 2 * program, low)
    tl.store(out_ptr + 2 * program + 1, high)


# What differs from chunk to chunk, or between one weight for all and one for each.
CHANGING = ["n", "m", "first_row", "first_col", "first_tile", "num_rows", "num_columns"]
CHANGING += ["offset", "stride_row_weight", "stride_column_weight", "first_column_block"]
CHANGING += ID_STRIDES
# Slices begin anywhere; another alignment would compile the kernel again.
SLICED = ["entry_ptr", "partial_sum_ptr", "dkey_bias_ptr", *IDS]


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=SLICED)
def softmax_gradient_kernel(
    x, y, x_ptr, y_ptr, g, g_ptr,  # [N, D], [M, D], [N, M] for tiles, the same for slices
    logit_scale_ptr, pair_weight, factor_ptr,  # [], number, [] for the finish: scale / lift
    row_side, column_side,  # Side of all rows and, with BOTH_DIRECTIONS, of all columns
    num_rows, num_columns, stride_row_weight, stride_column_weight,  # 0: one weight for all
    extremes_ptr, first_column_block,  # [row and column blocks, 2] or None
    entry_ptr, partial_sum_ptr, dkey_bias_ptr, first_tile,  # [N], [tiles], [blocks, M]
    pairs, offset,
    query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, first_row, first_col, stride_g, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
    NUM_IDS: tl.constexpr, LIFT: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """G of one tile times the lift, its part of sum G x.y, and its column sums."""
    ids = None
    if NUM_IDS > 0:
        ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    base2_scale = logit_scale * LOG2E
    lift = tl.full((), 1.0, tl.float32)
    if LIFT:  # weights are about 1/N: let G fill fp16's range
        peak = _peak(row_side)
        if BOTH_DIRECTIONS:
            peak += _peak(column_side)
        lift = _lift_to(peak, pair_weight)
    unit = pair_weight * lift
    chunk_rows = row0 + tl.arange(0, BLOCK_N)
    strip_rows = first_row + tl.minimum(chunk_rows, n - 1)
    strip_cols = first_col + tl.minimum(col0 + tl.arange(0, BLOCK_M), m - 1)
    # All loads come before any use of one: their latencies pass together.
    row_reference, _row_sum, row_probability_weight, row_positive_weight = _load_side(
        row_side, strip_rows, num_rows, stride_row_weight, unit
    )
    if BOTH_DIRECTIONS:
        column_reference, _column_sum, column_probability_weight, _column_positive = _load_side(
            column_side, strip_cols, num_columns, stride_column_weight, unit
        )
    if extremes_ptr is None:
        low = tl.min(row_reference)
        high = tl.max(row_reference)
        if BOTH_DIRECTIONS:
            low = tl.minimum(low, tl.min(column_reference))
            high = tl.maximum(high, tl.max(column_reference))
    else:
        block_ptr = extremes_ptr + 2 * (first_row // BLOCK_N + row0 // BLOCK_N)
        low = tl.load(block_ptr)
        high = tl.load(block_ptr + 1)
        if BOTH_DIRECTIONS:
            block = first_column_block + first_col // BLOCK_M + col0 // BLOCK_M
            block_ptr = extremes_ptr + 2 * block
            low = tl.minimum(low, tl.load(block_ptr))
            high = tl.maximum(high, tl.load(block_ptr + 1))
    chunk_offset = first_row + offset - first_col
    if DIAGONAL:
        masked = needs_mask(row0, col0, n, m, chunk_offset, BLOCK_N, BLOCK_M)
    else:
        masked = holds_pairs(
            pairs, offset, ids, row0, col0, n, m, first_row, first_col, BLOCK_N, BLOCK_M
        )
    sums_ptr = dkey_bias_ptr
    if dkey_bias_ptr is not None:
        sums_ptr += (row0 // BLOCK_N) * m + col0
    near = high - low < SPREAD
    if near & (masked == 0):  # a path of its own: a branch after the products costs all tiles 4 %
        factor = row_probability_weight * tl.exp2(high - row_reference)
        if BOTH_DIRECTIONS:
            factor = factor[:, None]
            column_factor = column_probability_weight * tl.exp2(high - column_reference)
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        if BOTH_DIRECTIONS:
            factor += pinned(column_factor)[None, :]
        else:
            factor = factor[:, None]  # before the products nine registers would spill
        shift = acc * base2_scale - high
        if pairs.key_bias_ptr is not None:
            shift += (tl.load(pairs.key_bias_ptr + strip_cols) * LOG2E)[None, :]
        p = tl.exp2(shift) * factor
        tl.store(partial_sum_ptr + first_tile + tl.program_id(0), tl.sum(p * acc) / lift)
        if dkey_bias_ptr is not None:
            tl.store(sums_ptr + tl.arange(0, BLOCK_M), tl.sum(p, 0) / lift)
        store_gradient(p, row0, col0, g, stride_g)
    else:
        partial_sum = 0.0
        positive_product = tl.zeros((BLOCK_N,), tl.float32)
        hides = near & can_hide(base2_scale) if DIAGONAL else False
        if hides:
            row_factor = row_probability_weight * tl.exp2(high - row_reference)
            if BOTH_DIRECTIONS:
                column_factor = column_probability_weight * tl.exp2(high - column_reference)
            acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
            acc, positive_product = hide(acc, base2_scale, row0, col0, n, m, chunk_offset)
            factor = row_factor[:, None]
            if BOTH_DIRECTIONS:
                factor += pinned(column_factor)[None, :]
            p = tl.exp2(acc * base2_scale - high) * factor
            partial_sum = tl.sum(p * acc)
            store_gradient(p, row0, col0, g, stride_g)
        else:
            for column_slice in range(0, BLOCK_M, SLICE_M):
                first = col0 + column_slice
                if BOTH_DIRECTIONS:
                    slice_cols = first_col + tl.minimum(first + tl.arange(0, SLICE_M), m - 1)
                    reference, _slice_sum, probability_weight, positive_weight = _load_side(
                        column_side, slice_cols, num_columns, stride_column_weight, unit
                    )
                acc, s, seen, positive = column_slice_of(
                    x_ptr, y_ptr, base2_scale, pairs, offset, ids, row0, first, n, m, d,
                    first_row, first_col, strides,
                    BLOCK_N, SLICE_M, BLOCK_D, EVEN_D, SAME_POSITIVE,
                )  # fmt: skip
                in_g = positive & (not DIAGONAL)
                p = exponential(s, row_reference[:, None], in_g) * row_probability_weight[:, None]
                if BOTH_DIRECTIONS:
                    e = exponential(s, pinned(reference)[None, :], in_g)
                    p += e * pinned(probability_weight)[None, :]
                if DIAGONAL:
                    positive_product += tl.sum(tl.where(positive, acc, 0.0), 1)
                    p = tl.where(seen & (positive == 0), p, 0.0)
                else:
                    at_positive = tl.broadcast_to(row_positive_weight[:, None], p.shape)
                    if BOTH_DIRECTIONS:
                        at_positive += pinned(positive_weight)[None, :]
                    p = tl.where(seen, tl.where(positive, p + at_positive, p), 0.0)
                partial_sum += tl.sum(p * acc)
                if dkey_bias_ptr is not None:
                    tile_cols = column_slice + tl.arange(0, SLICE_M)
                    tl.store(sums_ptr + tile_cols, tl.sum(p, 0) / lift, mask=col0 + tile_cols < m)
                store_gradient(p, row0, first, g_ptr, stride_g)
        if DIAGONAL:
            partner = chunk_rows + chunk_offset
            has_partner = (
                (chunk_rows < n) & (partner >= col0) & (partner < tl.minimum(col0 + BLOCK_M, m))
            )
            if masked:
                s = positive_product * base2_scale
                entry = _entries(s, row_side, strip_rows, num_rows, stride_row_weight, unit)
                if BOTH_DIRECTIONS:
                    entry += _entries(
                        s, column_side, first_col + partner, num_columns, stride_column_weight, unit
                    )
                tl.store(entry_ptr + first_row + chunk_rows, entry, mask=has_partner)
                partial_sum += tl.sum(tl.where(has_partner, entry * positive_product, 0.0))
        tl.store(partial_sum_ptr + first_tile + tl.program_id(0), partial_sum / lift)
    if tl.program_id(0) == 0:  # not earlier: the store waits for the scale
        tl.store(factor_ptr, logit_scale / lift)


def softmax_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_side: Side,
    column_side: Side,
    pairs: PairPointers,
    offset: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
    num_columns: int,
    pair_weight: float,
    config: Launch,
    diagonal: bool,
) -> ContrastiveGradients:
    """Gradients of a strip, neither side of it empty. Of one direction ``num_columns`` is 0."""
    factor = x.new_empty((), dtype=torch.float32)
    n = x.shape[0]
    blocks_n = cdiv(n, config.block_n)
    extremes = None
    if diagonal and max(n, y.shape[0]) > FEW:
        blocks = blocks_n + cdiv(num_columns, config.block_m)
        extremes = x.new_empty((blocks, 2), dtype=torch.float32)
        with torch.cuda.device_of(x):
            reference_extremes_kernel[(blocks,)](
                row_reference_ptr=row_side.reference_ptr,
                column_reference_ptr=column_side.reference_ptr,
                n=n, m=num_columns, out_ptr=extremes,
                BLOCK_N=config.block_n, BLOCK_M=config.block_m, **launch.EXTREMES.options,
            )  # fmt: skip
    plan = waves.chunks(x, y, config)
    partial_sums = x.new_empty(sum(chunk.tiles for chunk in plan), dtype=torch.float32)
    entries = factor.new_empty(n) if diagonal else None
    num_biases = 0 if pairs.key_bias_ptr is None else y.shape[0]
    dkey_bias = factor.new_zeros(num_biases) if num_biases else factor.new_empty(0)

    def fill(chunk: waves.Chunk, g: Tensor) -> None:
        part_x = rows_of(x, chunk.rows)
        part_y = rows_of(y, chunk.cols)
        sums = None
        if num_biases:
            blocks = chunk.shape[0] // config.block_n
            sums = factor.new_empty((blocks, part_y.shape[0]))
        softmax_gradient_kernel[(chunk.tiles,)](
            **operands(part_x, part_y, config), **gradient_chunk(g, config),
            logit_scale_ptr=logit_scale, pair_weight=pair_weight, factor_ptr=factor,
            row_side=row_side, column_side=column_side, num_rows=n, num_columns=num_columns,
            stride_row_weight=row_side.weight_ptr.stride(0),
            stride_column_weight=column_side.weight_ptr.stride(0),
            extremes_ptr=extremes, first_column_block=blocks_n,
            entry_ptr=entries, partial_sum_ptr=partial_sums, dkey_bias_ptr=sums,
            first_tile=chunk.first_tile, pairs=pairs, offset=offset,
            first_row=chunk.rows.start, first_col=chunk.cols.start,
            **id_arguments(query_ids, key_ids),
            BOTH_DIRECTIONS=num_columns > 0, SAME_POSITIVE=same_positive,
            LIFT=x.dtype == torch.float16, DIAGONAL=diagonal,
        )  # fmt: skip
        if sums is not None:
            dkey_bias[chunk.cols] += sums.sum(dim=0)

    dx, dy, (dlogit_scale,) = waves.gradients_by_chunks(
        x, y, factor, offset, plan, fill, partial_sums[None], entries
    )
    return ContrastiveGradients(dx=dx, dy=dy, dlogit_scale=dlogit_scale, dkey_bias=dkey_bias)


def side_of(
    *,
    reference: Tensor,
    total: Tensor | None,
    weight: Tensor,
    mean_weight: Tensor | None,
    lifted: bool,
) -> Side:
    """The arguments of rows or columns, with peaks where G is ``lifted``."""
    peak = peak_of(weight) if lifted else None
    mean_peak = None
    if mean_weight is not None:
        mean_weight = mean_weight.contiguous()
        if lifted:
            mean_peak = peak_of(mean_weight)
    return Side(
        reference_ptr=reference,
        sum_ptr=total,
        weight_ptr=weight,
        mean_weight_ptr=mean_weight,
        peak_ptr=peak,
        mean_peak_ptr=mean_peak,
    )


def peak_of(weight: Tensor) -> Tensor:
    """The largest |weight|; one number expanded, as of a mean, is its own."""
    if len(weight) == 0 or weight.stride(0) == 0:
        return weight
    return torch.linalg.vector_norm(weight, torch.inf)
