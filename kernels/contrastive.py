"""The contrastive loss, whose positives and negatives follow from ids and positions (ops/pairs.py).

A tile first compares its ids and positions. Most tiles contain no positive and no hidden pair:
they run as in ``info_nce.py`` and need no masks. The others go slice by slice, and mask each logit
by a row and a column of ids, positions and biases. For the rows of each tile, and for its columns
by parts of the rows, the forward pass writes a reference near the largest visible logit and the sum
of 2^(s - reference), and for both the sum and count of the positives' logits; a second, small
kernel merges them. The backward pass is that of ``softmax_gradient.py``. Sums are fp32 in a fixed
order. Where there is nothing to compare, the launchers take the kernels of InfoNCE.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch, waves
from protoclip.kernels.info_nce import (
    add_positive,
    info_nce_forward_kernel,
    join,
    load_pairs,
    merge_blocks,
    store_columns,
    store_sums,
)
from protoclip.kernels.launch import Launch, cdiv
from protoclip.kernels.results import (
    ContrastiveForward,
    ContrastiveGradients,
    IdCodes,
    PairStatistics,
    empty_statistics,
)
from protoclip.kernels.scratch import PARTIAL_BYTES
from protoclip.kernels.softmax_gradient import (
    PairPointers,
    Side,
    chunk_operands,
    column_slice_of,
    contrastive_gradient_kernel,
    exponential,
    holds_pairs,
    info_nce_gradient_kernel,
    reference_extremes_kernel,
    side_of,
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

# Up to so many rows or columns one program merges all, and its sum of the losses is the whole; one
# for 1,024 would take 20 us by the model.
ONE_PROGRAM = 256
# Up to so many, looking for extremes of the references beforehand costs more than it saves.
FEW = 1024


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
def _load_statistics(ptr, stride, position, mask, HAS_BEFORE: tl.constexpr):
    """-> what earlier waves left of columns, or nothing."""
    empty = tl.zeros(position.shape, tl.float32)
    before = PairStatistics(empty - float("inf"), empty, empty, empty)
    if HAS_BEFORE:
        before = PairStatistics(
            tl.load(ptr + position, mask=mask, other=0.0),
            tl.load(ptr + stride + position, mask=mask, other=0.0),
            tl.load(ptr + 2 * stride + position, mask=mask, other=0.0),
            tl.load(ptr + 3 * stride + position, mask=mask, other=0.0),
        )
    return before


@triton.jit
def _store_statistics(ptr, stride, position, mask, statistics):
    for i in tl.static_range(len(statistics)):
        tl.store(ptr + i * stride + position, statistics[i], mask=mask)


@triton.jit
def _merged(
    part_ptr, position, inside, length, blocks, before,
    PARTS: tl.constexpr, DEPTH: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """-> ``before`` and the partials of some positions: [blocks * PARTS, length, 2] and, of other
    pairs than InfoNCE's, then [blocks, length, 2] of the positives, which those hold too."""
    reference, total = merge_blocks(
        part_ptr, position, inside, length, blocks * PARTS, before.reference, before.sum,
        DEPTH, not PLAIN,
    )  # fmt: skip
    positive_sum = before.positive_sum
    num_positives = before.num_positives
    if not PLAIN:
        part_ptr += 2 * tl.cast(blocks, tl.int64) * PARTS * length
        for first in range(0, blocks, DEPTH):
            block = first + tl.arange(0, DEPTH)
            sums, counts, _ = load_pairs(part_ptr, block, blocks, position, inside, length)
            positive_sum += tl.sum(sums, 0)
            num_positives += tl.sum(counts, 0)
    return PairStatistics(reference, total, positive_sum, num_positives)


@triton.jit
def _gap(statistics, PLAIN: tl.constexpr):
    """-> log-sum-exp - mean positive, and mean positive, in base 2."""
    mean = statistics.positive_sum
    if not PLAIN:
        count = tl.maximum(statistics.num_positives, 1.0)
        mean = statistics.positive_sum / count
        # A GPU's quotient may be 2 ulp off.
        mean += (statistics.positive_sum - mean * count) / count
    return tl.log2(statistics.sum) + (statistics.reference - mean), mean


@triton.jit(
    do_not_specialize=[
        "blocks_m", "n", "blocks_n", "m", "first", "height", "offset",
        "stride_row", "stride_column",
    ]
)  # fmt: skip
def merge_kernel(
    row_part_ptr, blocks_m, height,  # of this wave's rows, as ``_merged`` takes them
    column_part_ptr, blocks_n, m,
    row_ptr, stride_row,  # ``PairStatistics``; InfoNCE's has the rows' positives
    column_ptr, stride_column,
    loss_ptr, positive_mean_ptr, partial_sum_ptr,  # [N], [N] or None, [programs]
    n, first, offset, pair_weight_ln2,  # pair_weight times ln 2: base-2 logits to nats
    BOTH_DIRECTIONS: tl.constexpr, HAS_BEFORE: tl.constexpr, IS_LAST: tl.constexpr,
    PARTS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Merge the partials of a wave, rows ``first`` to ``first + height``, pair by pair.

    Rows are then done; columns are merged with what earlier waves left, and done after the last,
    which completes the pairs' losses and sums those of each program.
    """
    # Positions are columns, or rows where there is one direction only.
    shift = offset if BOTH_DIRECTIONS and PLAIN else 0
    length = m if BOTH_DIRECTIONS else n
    partial_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, length, tl.num_programs(0) * BLOCK):
        column = start + tl.arange(0, BLOCK)
        row = column - shift
        known = (row >= 0) & (row < first + height)
        in_wave = known & (row >= first)
        nothing = _load_statistics(row_ptr, stride_row, row, in_wave, False)
        rows = _merged(
            row_part_ptr, row - first, in_wave, height, blocks_m, nothing, 1, DEPTH, PLAIN
        )
        if PLAIN:
            positive = tl.load(row_ptr + 2 * stride_row + row, mask=known, other=-float("inf"))
            one = tl.where(known, 1.0, 0.0)
            reference, total = add_positive(rows.reference, rows.sum, positive)
            rows = PairStatistics(reference, total, positive, one)
        _store_statistics(row_ptr, stride_row, row, in_wave, rows)
        gap, mean = _gap(rows, PLAIN)
        loss = pair_weight_ln2 * gap
        if positive_mean_ptr is not None:
            tl.store(positive_mean_ptr + row, mean * LN2, mask=in_wave)
        if HAS_BEFORE:
            loss = tl.where(in_wave, loss, tl.load(loss_ptr + row, mask=known & (row < first)))
        if BOTH_DIRECTIONS:
            inside = column < m
            before = _load_statistics(column_ptr, stride_column, column, inside, HAS_BEFORE)
            columns = _merged(
                column_part_ptr, column, inside, m, blocks_n, before, PARTS, DEPTH, PLAIN
            )
            if PLAIN and IS_LAST:
                reference, total = add_positive(columns.reference, columns.sum, positive)
                columns = PairStatistics(reference, total, tl.where(known, positive, 0.0), one)
            if IS_LAST:
                gap, _mean = _gap(columns, PLAIN)
                loss += pair_weight_ln2 * gap
            _store_statistics(column_ptr, stride_column, column, inside, columns)
        tl.store(loss_ptr + row, loss, mask=known)
        partial_sum += tl.where(known, loss, 0.0)
    if IS_LAST:
        tl.store(partial_sum_ptr + tl.program_id(0), tl.sum(partial_sum))


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
    offset: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
    own_key: Tensor | None,
    exclude: Tensor | None,
    key_bias: Tensor | None,
    both_directions: bool,
    pair_weight: float,
    summed: bool,
    stash: None = None,  # no logits are kept
) -> ContrastiveForward:
    """Losses and statistics of a strip, or the sum of all losses times ``pair_weight``; offset to
    key_bias are ``Compared`` of ops/pairs.py."""
    n = x.shape[0]
    m = y.shape[0]
    num_columns = m if both_directions else 0
    if not min(n, m):
        return _without_pairs(x, n, num_columns, summed)
    plain = is_plain(own_key, exclude, key_ids, key_bias)
    config = launch.choose(_kernel("forward", plain, key_bias), x, y)
    parts = min(config.warps, config.block_n // config.part)
    blocks_m = cdiv(m, config.block_m)
    row_partials = 1 if plain else 2
    column_partials = parts if plain else parts + 1
    # Rows per wave: as many tiles as keep the partial sums within their bound.
    bytes_of_block = 8 * (row_partials * blocks_m * config.block_n + column_partials * num_columns)
    wave = min(n, max(1, PARTIAL_BYTES // bytes_of_block) * config.block_n)
    row_part = x.new_empty(2 * row_partials * blocks_m * wave, dtype=torch.float32)
    num_partials = 2 * cdiv(wave, config.block_n) * column_partials * num_columns
    column_part = row_part.new_empty(num_partials)
    row_statistics = empty_statistics(row_part, n)
    column_statistics = empty_statistics(row_part, num_columns)
    losses = row_part.new_empty(n)
    positive_mean = row_part.new_empty(0 if summed or both_directions else n)
    length = m if both_directions else n
    merge = launch.MERGE_ALL if length <= ONE_PROGRAM else launch.MERGE
    programs = 1 if length <= ONE_PROGRAM else cdiv(length, merge.block_n)
    partial_sums = row_part.new_empty(programs)
    pairs = PairPointers(own_key_ptr=own_key, exclude_ptr=exclude, key_bias_ptr=key_bias)
    with torch.cuda.device_of(x):
        for first in range(0, n, wave):
            rows = slice(first, min(first + wave, n))
            part = rows_of(x, rows)
            blocks_n = cdiv(part.shape[0], config.block_n)
            arguments = dict(
                **operands(part, y, config), logit_scale_ptr=logit_scale,
                row_ptr=row_part, column_ptr=column_part,
                BOTH_DIRECTIONS=both_directions, PARTS=parts, PART=config.part,
            )  # fmt: skip
            if plain:
                info_nce_forward_kernel[(blocks_n * blocks_m,)](
                    **arguments, offset=offset + first,
                    positive_ptr=rows_of(row_statistics[2], rows),
                )  # fmt: skip
            else:
                contrastive_forward_kernel[(blocks_n * blocks_m,)](
                    **arguments, pairs=pairs, offset=offset, first_row=first,
                    **id_arguments(query_ids, key_ids), SAME_POSITIVE=same_positive,
                )  # fmt: skip
            merge_kernel[(programs,)](
                row_part_ptr=row_part, blocks_m=blocks_m, height=part.shape[0],
                column_part_ptr=column_part, blocks_n=blocks_n, m=m,
                row_ptr=row_statistics, stride_row=row_statistics.stride(0),
                column_ptr=column_statistics, stride_column=column_statistics.stride(0),
                loss_ptr=losses, positive_mean_ptr=positive_mean if len(positive_mean) else None,
                partial_sum_ptr=partial_sums,
                n=n, first=first, offset=offset, pair_weight_ln2=pair_weight * LN2.value,
                BOTH_DIRECTIONS=both_directions, HAS_BEFORE=first > 0, IS_LAST=rows.stop == n,
                PARTS=parts, PLAIN=plain, BLOCK=merge.block_n, DEPTH=merge.block_m, **merge.options,
            )  # fmt: skip
    if summed:
        losses = partial_sums.sum() if programs > 1 else partial_sums.view(())
    return ContrastiveForward(losses, positive_mean, row_statistics, column_statistics)


def contrastive_bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    offset: int,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
    own_key: Tensor | None,
    exclude: Tensor | None,
    key_bias: Tensor | None,
    row_statistics: Tensor,
    column_statistics: Tensor,
    query_weight: Tensor,
    positive_mean_weight: Tensor | None,
    key_weight: Tensor,
    pair_weight: float,
    stash: None = None,
) -> ContrastiveGradients:
    """Gradients of a strip, as in ops/softmax.py, for the weights of the losses and of the mean
    positives, [N] and [M], of any stride, 0 too; they are multiplied by ``pair_weight``."""
    n = x.shape[0]
    num_biases = 0 if key_bias is None else y.shape[0]
    if min(x.numel(), y.numel()) == 0:
        zero = x.new_zeros((), dtype=torch.float32)
        no_bias = zero.new_zeros(num_biases)
        return ContrastiveGradients(torch.zeros_like(x), torch.zeros_like(y), zero, no_bias)
    plain = positive_mean_weight is None and is_plain(own_key, exclude, key_ids, key_bias)
    config = launch.choose(_kernel("gradient", plain, key_bias), x, y)
    lifted = x.dtype == torch.float16
    num_columns = y.shape[0] if column_statistics.shape[1] else 0
    row_side = side_of(row_statistics, query_weight, positive_mean_weight, lifted=lifted)
    column_side = side_of(column_statistics, key_weight, None, lifted=lifted)
    extremes = None
    if plain and max(n, y.shape[0]) > FEW:
        extremes = _extremes(row_side, n, column_side, num_columns, config)
    pairs = PairPointers(own_key_ptr=own_key, exclude_ptr=exclude, key_bias_ptr=key_bias)
    plan = waves.chunks(x, y, config)
    factor = x.new_empty((), dtype=torch.float32)
    partial_sums = factor.new_empty(sum(chunk.tiles for chunk in plan))
    entries = factor.new_empty(n) if plain else None
    dkey_bias = factor.new_zeros(num_biases) if num_biases else factor.new_empty(0)

    def fill(chunk: waves.Chunk, g: Tensor) -> None:
        arguments = dict(
            **chunk_operands(x, y, chunk, g, config),
            logit_scale_ptr=logit_scale, pair_weight=pair_weight, factor_ptr=factor,
            row_side=row_side, column_side=column_side,
            stride_rows=row_statistics.stride(0), stride_columns=column_statistics.stride(0),
            stride_row_weight=query_weight.stride(0), stride_column_weight=key_weight.stride(0),
            partial_sum_ptr=rows_of(partial_sums, chunk.places),
            BOTH_DIRECTIONS=num_columns > 0, LIFT=lifted,
        )  # fmt: skip
        if entries is not None:
            info_nce_gradient_kernel[(chunk.tiles,)](
                **arguments, offset=offset + chunk.rows.start - chunk.cols.start,
                extremes_ptr=extremes, first_column_block=cdiv(n, config.block_n),
                entry_ptr=rows_of(entries, chunk.rows),
            )  # fmt: skip
            return
        bias_sums = None
        if num_biases:
            bias_sums = factor.new_empty(
                (chunk.shape[0] // config.block_n, chunk.cols.stop - chunk.cols.start)
            )
        contrastive_gradient_kernel[(chunk.tiles,)](
            **arguments, pairs=pairs, offset=offset, dkey_bias_ptr=bias_sums,
            **id_arguments(query_ids, key_ids), SAME_POSITIVE=same_positive,
        )  # fmt: skip
        if bias_sums is not None:
            dkey_bias[chunk.cols] += bias_sums.sum(dim=0)

    dx, dy, (dlogit_scale,) = waves.gradients_by_chunks(
        x, y, factor, offset, plan, fill, partial_sums[None], entries
    )
    return ContrastiveGradients(dx=dx, dy=dy, dlogit_scale=dlogit_scale, dkey_bias=dkey_bias)


def _extremes(row_side: Side, n: int, column_side: Side, m: int, config: Launch) -> Tensor:
    """The extremes of the references of each block of rows, then of columns, [blocks, 2]."""
    blocks = cdiv(n, config.block_n) + cdiv(m, config.block_m)
    extremes = row_side.statistics_ptr.new_empty((blocks, 2))
    with torch.cuda.device_of(extremes):
        reference_extremes_kernel[(blocks,)](
            row_reference_ptr=row_side.statistics_ptr,
            column_reference_ptr=column_side.statistics_ptr,
            n=n, m=m, out_ptr=extremes,
            BLOCK_N=config.block_n, BLOCK_M=config.block_m, **launch.EXTREMES.options,
        )  # fmt: skip
    return extremes


def _kernel(of: str, plain: bool, key_bias: Tensor | None) -> str:
    """The name of a kernel in the launch table."""
    if plain:
        return f"info_nce_{of}"
    return f"contrastive_{of}" if key_bias is None else f"contrastive_{of}_with_biases"


def is_plain(*compared: Tensor | None) -> bool:
    """Whether there is nothing to compare: row i's own column is at the offset, and it sees all."""
    return all(x is None for x in compared)


def _without_pairs(x: Tensor, n: int, m: int, summed: bool) -> ContrastiveForward:
    """Rows that see no columns, or columns that no row sees; one of both is empty."""
    rows = empty_statistics(x, n).zero_()
    columns = empty_statistics(x, m).zero_()
    rows[0].fill_(-torch.inf)
    columns[0].fill_(-torch.inf)
    none = rows.new_empty(0)
    if summed:
        return ContrastiveForward(none.sum(), none, rows, columns)
    positive_mean = none if m else rows.new_zeros(n)
    return ContrastiveForward(rows[0, :n].clone(), positive_mean, rows, columns)
