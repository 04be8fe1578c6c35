"""The contrastive loss, whose positives and negatives follow from ids and positions (ops/pairs.py).

A tile first compares its ids and positions. Most tiles contain no positive and no hidden pair:
they run as in ``info_nce.py`` and need no masks. The others go slice by slice, and mask each logit
by a row and a column of ids, positions and biases. For the rows of each tile, and for its columns
by parts of the rows, the forward pass writes a reference near the largest visible logit and the sum
of 2^(s - reference), and for both the sum and count of the positives' logits; a second, small
kernel merges them. The backward pass is that of ``softmax_gradient.py``. Sums are fp32 in a fixed
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.info_nce import (
    join,
    load_pairs,
    merge_blocks,
    store_columns,
    store_sums,
)
from protoclip.kernels.launch import cdiv
from protoclip.kernels.results import (
    ContrastiveForward,
    ContrastiveGradients,
    IdCodes,
    PairStatistics,
)
from protoclip.kernels.scratch import PARTIAL_BYTES
from protoclip.kernels.softmax_gradient import (
    PairPointers,
    chunk_operands,
    column_slice_of,
    contrastive_gradient_kernel,
    exponential,
    holds_pairs,
    pair_side,
)
from protoclip.kernels.tiles import (
    ID_STRIDES,
    IDS,
    LN2,
    LOG2E,
    id_arguments,
    id_pointers,
    operands,
    products,
    tile_origin,
)
from protoclip.kernels.waves import rows_of


@triton.jit
def _exponentials(s, seen, positive, AXIS: tl.constexpr):
    """-> the maxima of the visible logits along an axis and 2^(s - maximum); -inf and 0 if none."""
    visible = tl.where(seen, s, -float("inf"))
    top = tl.max(visible, AXIS)
    zero = tl.where(top == -float("inf"), 0.0, top)
    return top, exponential(visible, tl.expand_dims(zero, AXIS), positive)


@triton.jit
def _positives(s, positive, AXIS: tl.constexpr):
    """-> along an axis, the sum of the positives' logits and their number."""
    return tl.sum(tl.where(positive, s, 0.0), AXIS), tl.sum(tl.where(positive, 1.0, 0.0), AXIS)


@triton.jit
def _store_pair(ptr, at, mask, first, second):
    """Store (first, second) at positions ``at``."""
    pointers = ptr + 2 * at[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pointers, tl.join(first, second), mask=mask[:, None])


@triton.jit(
    do_not_specialize=["n", "m", "first_row", "offset", *ID_STRIDES],
    do_not_specialize_on_alignment=IDS,
)
def contrastive_forward_kernel(
    x, y, x_ptr, y_ptr, logit_scale_ptr,  # [N, D], [M, D] for tiles, the same for slices, []
    row_ptr, column_ptr,  # [2, column blocks, N, 2], [row blocks * (PARTS + 1), M, 2]
    pairs, offset,
    query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids,  # [R, N], [R, M] or None
    n, m, d, first_row, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, SAME_POSITIVE: tl.constexpr,
    NUM_IDS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile: references and sums, then those of the positives."""
    ids = None
    if NUM_IDS > 0:
        ids = id_pointers(query_ids_ptr, key_ids_ptr, stride_query_ids, stride_key_ids, NUM_IDS)
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    base2_scale = tl.load(logit_scale_ptr).to(tl.float32) * LOG2E
    REPEATS: tl.constexpr = BLOCK_N // PARTS // PART
    rows = row0 + tl.arange(0, BLOCK_N)
    block = row0 // BLOCK_N
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    at_column = block.to(tl.int64) * m + col0
    row_positive_ptr = row_ptr + 2 * tl.cdiv(m, BLOCK_M).to(tl.int64) * n
    column_positive_ptr = column_ptr + 2 * tl.cdiv(n, BLOCK_N).to(tl.int64) * PARTS * m
    row_positive_sum = tl.zeros((BLOCK_N,), tl.float32)
    row_num_positives = tl.zeros((BLOCK_N,), tl.float32)
    in_slices = holds_pairs(
        pairs, offset, ids, row0, col0, n, m, first_row, 0, BLOCK_N, BLOCK_M
    )  # fmt: skip
    if not in_slices:
        base2_bias = None
        if pairs.key_bias_ptr is not None:
            base2_bias = tl.load(pairs.key_bias_ptr + col0 + tl.arange(0, BLOCK_M)) * LOG2E
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        in_slices = store_sums(
            acc, base2_scale, base2_bias, row_ptr, column_ptr, row0, col0, n, m,
            BOTH_DIRECTIONS, PARTS, PART,
        )  # fmt: skip
        if BOTH_DIRECTIONS:
            none = tl.zeros((BLOCK_M,), tl.float32)
            cols = tl.arange(0, BLOCK_M)
            _store_pair(column_positive_ptr, at_column + cols, col0 + cols < m, none, none)
    if in_slices:
        row_max = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            _, s, seen, positive = column_slice_of(
                x_ptr, y_ptr, base2_scale, pairs, offset, ids, row0, first, n, m, d,
                first_row, 0, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D, SAME_POSITIVE,
            )  # fmt: skip
            top, e = _exponentials(s, seen, positive, 1)
            row_max, row_sum = join(row_max, row_sum, top, tl.sum(e, 1))
            positive_sum, num_positives = _positives(s, positive, 1)
            row_positive_sum += positive_sum
            row_num_positives += num_positives
            if BOTH_DIRECTIONS:
                top, e = _exponentials(s, seen, positive, 0)
                e = e.reshape(REPEATS, PARTS, PART, SLICE_M)
                store_columns(column_ptr, block, first, m, top[None, :], e, PARTS)
                positive_sum, num_positives = _positives(s, positive, 0)
                cols = column_slice + tl.arange(0, SLICE_M)
                _store_pair(
                    column_positive_ptr, at_column + cols, col0 + cols < m,
                    positive_sum, num_positives,
                )  # fmt: skip
        _store_pair(row_ptr, at_row, rows < n, row_max, row_sum)
    _store_pair(row_positive_ptr, at_row, rows < n, row_positive_sum, row_num_positives)


@triton.jit
def _merge_side(
    part_ptr, blocks, length,  # [blocks * (PARTS + 1), length, 2]
    out_ptr, stride, program,  # [4, stride]
    gap_ptr, positive_mean_ptr,  # [length] each
    partial_sum_ptr, pair_weight,  # [], for the weighted sum of the gaps instead, or None
    HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge the partials of some rows or columns; the last ones complete their losses."""
    position = program * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    reference = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    positive_sum = tl.zeros((BLOCK,), tl.float32)
    num_positives = tl.zeros((BLOCK,), tl.float32)
    if HAS_BEFORE:
        reference = tl.load(out_ptr + position, mask=inside, other=0.0)
        total = tl.load(out_ptr + stride + position, mask=inside, other=0.0)
        positive_sum = tl.load(out_ptr + 2 * stride + position, mask=inside, other=0.0)
        num_positives = tl.load(out_ptr + 3 * stride + position, mask=inside, other=0.0)
    reference, total = merge_blocks(
        part_ptr, position, inside, length, blocks * PARTS, reference, total, DEPTH, True
    )
    positive_ptr = part_ptr + 2 * tl.cast(blocks, tl.int64) * PARTS * length
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        sums, counts, _ = load_pairs(positive_ptr, block, blocks, position, inside, length)
        positive_sum += tl.sum(sums, 0)
        num_positives += tl.sum(counts, 0)
    if IS_LAST:
        count = tl.maximum(num_positives, 1.0)
        mean = positive_sum / count
        mean += (positive_sum - mean * count) / count  # a GPU's quotient may be 2 ulp off
        gap = (tl.log2(total) + (reference - mean)) * LN2
        if partial_sum_ptr is None:
            tl.store(gap_ptr + position, gap, mask=inside)
            tl.store(positive_mean_ptr + position, mean * LN2, mask=inside)
        else:
            tl.store(partial_sum_ptr, pair_weight * tl.sum(tl.where(inside, gap, 0.0)))
    statistics = PairStatistics(reference, total, positive_sum, num_positives)
    for i in tl.static_range(len(statistics)):
        tl.store(out_ptr + i * stride + position, statistics[i], mask=inside)


@triton.jit(
    do_not_specialize=["blocks_m", "height", "first_row", "n", "blocks_n", "m", "first_program"]
)
def contrastive_merge_kernel(
    row_part_ptr, blocks_m, height,  # [2 * blocks_m, height, 2]
    row_ptr, gap_ptr, positive_mean_ptr, first_row, n,  # [4, N], [N], [N]
    column_part_ptr, blocks_n,  # [blocks_n * (PARTS + 1), M, 2]
    column_ptr, column_gap_ptr, column_positive_mean_ptr, m,  # [4, M], [M], [M]
    partial_sum_ptr, first_program, pair_weight,  # [programs of all waves], or None: not summed
    HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
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
            gap_ptr + first_row, positive_mean_ptr + first_row, partial_sum_ptr, pair_weight,
            False, True, 1, BLOCK, DEPTH,
        )  # fmt: skip
    else:
        _merge_side(
            column_part_ptr, blocks_n, m, column_ptr, m, program - programs,
            column_gap_ptr, column_positive_mean_ptr, partial_sum_ptr, pair_weight,
            HAS_BEFORE, IS_LAST, PARTS, BLOCK, DEPTH,
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
    own_key: Tensor | None,
    offset: int,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    both_directions: bool,
    pair_weight: float,
    summed: bool,
    stash: None = None,  # no logits are kept
) -> ContrastiveForward:
    """Losses and statistics of a strip, or the sum of all losses times ``pair_weight``; own_key
    to same_positive as in ops/pairs.py."""
    n = x.shape[0]
    m = y.shape[0]
    num_columns = m if both_directions else 0
    if not min(n, m):
        return _without_pairs(x, n, num_columns, summed)
    kernel = "contrastive_forward" if key_bias is None else "contrastive_forward_with_biases"
    config = launch.choose(kernel, x, y)
    parts = min(config.warps, config.block_n // config.part)
    blocks_m = cdiv(m, config.block_m)
    bytes_of_block = 8 * (2 * blocks_m * config.block_n + (parts + 1) * num_columns)
    wave = min(n, max(1, PARTIAL_BYTES // bytes_of_block) * config.block_n)
    row_part = x.new_empty(4 * blocks_m * wave, dtype=torch.float32)
    num_partials = 2 * cdiv(wave, config.block_n) * (parts + 1) * num_columns
    column_part = x.new_empty(num_partials, dtype=torch.float32)
    pairs = PairPointers(own_key_ptr=own_key, exclude_ptr=exclude, key_bias_ptr=key_bias)
    row_statistics = x.new_empty((4, n), dtype=torch.float32)
    column_statistics = x.new_empty((4, num_columns), dtype=torch.float32)
    merge = launch.MERGE
    gap = row_statistics.new_empty(0 if summed else n)
    positive_mean = torch.empty_like(gap)
    column_gap = gap.new_empty(0 if summed else num_columns)
    column_positive_mean = torch.empty_like(column_gap)
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
            contrastive_forward_kernel[(blocks_n * blocks_m,)](
                **operands(part, y, config), logit_scale_ptr=logit_scale,
                row_ptr=row_part, column_ptr=column_part, pairs=pairs, offset=offset,
                first_row=first_row, **id_arguments(query_ids, key_ids),
                BOTH_DIRECTIONS=both_directions, SAME_POSITIVE=same_positive,
                PARTS=parts, PART=config.part,
            )  # fmt: skip
            programs = cdiv(height, merge.block_n)
            contrastive_merge_kernel[(programs + column_programs,)](
                row_part_ptr=row_part, blocks_m=blocks_m, height=height,
                row_ptr=row_statistics, gap_ptr=gap, positive_mean_ptr=positive_mean,
                first_row=first_row, n=n,
                column_part_ptr=column_part, blocks_n=blocks_n,
                column_ptr=column_statistics, column_gap_ptr=column_gap,
                column_positive_mean_ptr=column_positive_mean, m=m,
                partial_sum_ptr=partial_sums, first_program=first_program, pair_weight=pair_weight,
                HAS_BEFORE=first_row > 0, IS_LAST=first_row + height == n, PARTS=parts,
                BLOCK=merge.block_n, DEPTH=merge.block_m, **merge.options,
            )  # fmt: skip
            first_row += height
            first_program += programs
    return ContrastiveForward(
        loss_per_query=gap if partial_sums is None else partial_sums.sum(),
        positive_mean=positive_mean,
        loss_per_key=column_gap,
        column_positive_mean=column_positive_mean,
        row_statistics=row_statistics,
        column_statistics=column_statistics,
    )


def contrastive_bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own_key: Tensor | None,
    offset: int,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_gap_weight: Tensor,
    row_positive_mean_weight: Tensor | None,
    column_gap_weight: Tensor,
    column_positive_mean_weight: Tensor | None,
    pair_weight: float,
    stash: None = None,
) -> ContrastiveGradients:
    """Gradients of a strip, as in ops/softmax.py, for the weights of gap and mean positive,
    [N] and [M], of any stride, 0 too; they are multiplied by ``pair_weight``."""
    num_biases = 0 if key_bias is None else y.shape[0]
    if min(x.shape[0], y.shape[0]) == 0:
        zero = x.new_zeros((), dtype=torch.float32)
        no_bias = zero.new_zeros(num_biases)
        return ContrastiveGradients(torch.zeros_like(x), torch.zeros_like(y), zero, no_bias)
    kernel = "contrastive_gradient" if key_bias is None else "contrastive_gradient_with_biases"
    config = launch.choose(kernel, x, y)
    lifted = x.dtype == torch.float16
    num_columns = column_statistics.shape[1]
    row_side = pair_side(row_statistics, row_gap_weight, row_positive_mean_weight, lifted=lifted)
    column_side = pair_side(
        column_statistics, column_gap_weight, column_positive_mean_weight, lifted=lifted
    )
    pairs = PairPointers(own_key_ptr=own_key, exclude_ptr=exclude, key_bias_ptr=key_bias)
    plan = waves.chunks(x, y, config)
    factor = x.new_empty((), dtype=torch.float32)
    partial_sums = factor.new_empty(sum(chunk.tiles for chunk in plan))
    dkey_bias = factor.new_zeros(num_biases) if num_biases else factor.new_empty(0)

    def fill(chunk: waves.Chunk, g: Tensor) -> None:
        bias_sums = None
        if num_biases:
            bias_sums = factor.new_empty(
                (chunk.shape[0] // config.block_n, chunk.cols.stop - chunk.cols.start)
            )
        contrastive_gradient_kernel[(chunk.tiles,)](
            **chunk_operands(x, y, chunk, g, config),
            logit_scale_ptr=logit_scale, pair_weight=pair_weight, factor_ptr=factor,
            row_side=row_side, column_side=column_side,
            num_rows=x.shape[0], num_columns=num_columns,
            stride_row_weight=row_gap_weight.stride(0),
            stride_column_weight=column_gap_weight.stride(0),
            partial_sum_ptr=rows_of(partial_sums, chunk.places), dkey_bias_ptr=bias_sums,
            pairs=pairs, offset=offset, **id_arguments(query_ids, key_ids),
            BOTH_DIRECTIONS=num_columns > 0, SAME_POSITIVE=same_positive, LIFT=lifted,
        )  # fmt: skip
        if bias_sums is not None:
            dkey_bias[chunk.cols] += bias_sums.sum(dim=0)

    dx, dy, (dlogit_scale,) = waves.gradients_by_chunks(
        x, y, factor, offset, plan, fill, partial_sums[None], None
    )
    return ContrastiveGradients(dx=dx, dy=dy, dlogit_scale=dlogit_scale, dkey_bias=dkey_bias)


def _without_pairs(x: Tensor, n: int, m: int, summed: bool) -> ContrastiveForward:
    """Rows that see no columns, or columns that no row sees; one of both is empty."""
    rows = x.new_zeros((4, n), dtype=torch.float32)
    columns = x.new_zeros((4, m), dtype=torch.float32)
    rows[0].fill_(-torch.inf)
    columns[0].fill_(-torch.inf)
    none = rows.new_empty(0)
    return ContrastiveForward(
        loss_per_query=none.sum() if summed else rows[0].clone(),
        positive_mean=none if summed else torch.zeros_like(rows[0]),
        loss_per_key=none.clone() if summed else columns[0].clone(),
        column_positive_mean=none.clone() if summed else torch.zeros_like(columns[0]),
        row_statistics=rows,
        column_statistics=columns,
    )
