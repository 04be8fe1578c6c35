"""InfoNCE over tiles of the logits, which never reach memory: what ``contrastive.py`` launches
where there are no ids, positions or biases to compare, and what its own kernels share.

Base-2 logits s_ij = scale log2(e) x_i.y_j; row i is positive at column i + offset. The forward pass
keeps O(N) statistics and the backward pass recomputes the logits: four matrix products in all. Up
to ``ONE_PROGRAM`` pairs a step is six launches: forward, merge (which computes the loss); gradient,
two products, finish (with the scale's gradient); and no torch op around them. More pairs add a
``sum`` of the losses, and many more pairs run in waves and chunks.

**Forward.** Each tile writes, for its rows and for its columns, a reference r and sum 2^(s - r)
*without the positives*. A second, small kernel merges them, adds the positive, and computes the
losses: a loss near zero is then log2(1 + little), not a difference of large numbers. Each warp
subtracts the maximum of eight sampled columns from all its logits: one exponential per element. A
tile where a sum then falls outside 2^-SPREAD to 2^SPREAD takes the maximum of each row and of each
column, and a second exponential. Columns are summed over the rows of one warp only: summing over
warps would cost barriers in every tile, and the merge does it anyway. How wgmma assigns a tile's
rows to warps, for BLOCK_N = 128, PARTS = 4 warps, PART = 16 rows, REPEATS = 2:
    rows 0..15 | 16..31 | 32..47 | 48..63 | 64..79 | 80..95 | 96..111 | 112..127
    warp 0     | 1      | 2      | 3      | 0      | 1      | 2       | 3
So a warp sums its own [REPEATS, PART] rows, and a tile writes PARTS sums of each column.

**Backward.** G = w_row P_row + w_column P_column without the positives is written in chunks in the
features' dtype (``softmax_gradient.py``); ``waves.py`` multiplies it and adds the positives'
entries, w_row (P_row - 1) + w_column (P_column - 1), in fp32.

**Masks.** A tile on the diagonal or the edge puts logits of -HIDDEN in place of the positives and
of what is past the ends, and goes on as all others do. The positives' products leave the tile as
one number a row, from which the entries follow without a matrix.

Sums are fp32 and in a fixed order: no atomics, the same bits each time. Nothing is read back from
the device, so both passes can be captured in a CUDA graph. Extra memory: 64 MiB of partial sums
forward, ``GRADIENT_BYTES`` plus fp32 gradients backward. fp32 features are multiplied as three
products of TF32 here; ``torch.backends.cuda.matmul`` settings hold for the backward's two products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from protoclip.kernels.tiles import (
    HIDDEN,
    LOG2E,
    SPREAD,
    can_hide,
    hide,
    needs_mask,
    products,
    tile_origin,
)
from protoclip.kernels.waves import store_entries


@triton.jit
def join(reference_a, sum_a, reference_b, sum_b):
    """-> the statistics of two sets of logits together."""
    reference = tl.maximum(reference_a, reference_b)
    zero = tl.where(reference == -float("inf"), 0.0, reference)
    return reference, sum_a * tl.exp2(reference_a - zero) + sum_b * tl.exp2(reference_b - zero)


@triton.jit
def exact(s, AXIS: tl.constexpr):
    """-> the maxima along an axis and 2^(s - maximum); -inf and 0 where empty."""
    top = tl.max(s, AXIS)
    zero = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.exp2(s - tl.expand_dims(zero, AXIS))


@triton.jit
def store_columns(ptr, block, col0, m, reference, e, PARTS: tl.constexpr):
    """Write the columns of a tile: for each part of its rows the reference and the sum of e, which
    is [repeats, PARTS, rows, columns]."""
    total = tl.sum(tl.sum(e, 0), 1)  # [PARTS, columns]
    cols = tl.arange(0, e.shape[3])
    first = block.to(tl.int64) * PARTS * m + col0
    at = 2 * (tl.arange(0, PARTS)[:, None] * m + cols[None, :])
    pointers = (ptr + 2 * first) + (at[:, :, None] + tl.arange(0, 2)[None, None, :])
    statistics = tl.join(tl.broadcast_to(reference, total.shape), total)
    tl.store(pointers, statistics, mask=(cols < m - col0)[None, :, None])
    return total


@triton.jit
def _eight_columns(acc):
    """-> eight columns of a tile, chosen so that every thread holds some of them."""
    for _ in tl.static_range(6):
        if acc.shape[1] > 8:
            acc, _others = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
    return acc


@triton.jit
def store_sums(
    acc, base2_scale, base2_bias, row_ptr, column_ptr, row0, col0, n, m,
    BOTH_DIRECTIONS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a tile's products, with one exponential an element: the reference of
    each part of the rows is the maximum of eight columns. -> whether a sum left the safe range."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    REPEATS: tl.constexpr = BLOCK_N // PARTS // PART
    rows = row0 + tl.arange(0, BLOCK_N)
    if base2_bias is None:
        sample = base2_scale * _eight_columns(acc)
    else:
        acc = acc * base2_scale + base2_bias[None, :]
        sample = _eight_columns(acc)
    sample = sample.reshape(REPEATS, PARTS, PART, 8)
    top = tl.max(tl.max(tl.max(sample, 3), 2), 0)  # [PARTS]
    empty = top < -HIDDEN / 2  # no pair was sampled
    top = tl.where(empty, 0.0, top)
    row_top = tl.broadcast_to(top[None, :, None], (REPEATS, PARTS, PART)).reshape(BLOCK_N)
    if base2_bias is None:
        e = tl.exp2(acc * base2_scale - row_top[:, None])
    else:
        e = tl.exp2(acc - row_top[:, None])
    row_sum = tl.sum(e, 1)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    pointers = row_ptr + 2 * at_row[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pointers, tl.join(row_top, row_sum), mask=(rows < n)[:, None])
    least = tl.where(row_sum <= tl.exp2(SPREAD), row_sum, 0.0)  # 0 for NaN too
    least = tl.where(rows < n, least, 1.0)
    least = tl.min(tl.min(least.reshape(REPEATS, PARTS, PART), 2), 0)
    if BOTH_DIRECTIONS:
        e = e.reshape(REPEATS, PARTS, PART, BLOCK_M)
        reference = tl.where(empty, -float("inf"), top)[:, None]
        total = store_columns(column_ptr, row0 // BLOCK_N, col0, m, reference, e, PARTS)
        cols = col0 + tl.arange(0, BLOCK_M)
        used = (row0 + PART * tl.arange(0, PARTS) < n)[:, None] & (cols < m)[None, :]
        least = tl.minimum(least, tl.min(tl.where(used, total, 1.0), 1))
    return tl.min(least) < tl.exp2(-SPREAD)


@triton.jit(do_not_specialize=["n", "m", "offset"], do_not_specialize_on_alignment=["positive_ptr"])
def info_nce_forward_kernel(
    x, y, x_ptr, y_ptr, logit_scale_ptr,  # [N, D], [M, D] for tiles, the same for slices, []
    row_ptr, column_ptr, positive_ptr,  # [column blocks, N, 2], [row blocks * PARTS, M, 2], [N]
    n, m, d, offset, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    SLICE_M: tl.constexpr, BOTH_DIRECTIONS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Partial statistics of one tile."""
    row0, col0 = tile_origin(tl.program_id(0), n, m, BLOCK_N, BLOCK_M, 8)
    base2_scale = tl.load(logit_scale_ptr).to(tl.float32) * LOG2E
    rows = row0 + tl.arange(0, BLOCK_N)
    at_row = (col0 // BLOCK_M).to(tl.int64) * n + rows
    block = row0 // BLOCK_N
    REPEATS: tl.constexpr = BLOCK_N // PARTS // PART
    is_wide = can_hide(base2_scale) == 0
    if not is_wide:
        acc = products(x, y, row0, col0, n, m, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D)
        acc, positive_product = hide(acc, base2_scale, row0, col0, n, m, offset)
        if needs_mask(row0, col0, n, m, offset, BLOCK_N, BLOCK_M):
            partner = rows + offset
            has_partner = (rows < n) & (partner >= col0) & (partner < tl.minimum(col0 + BLOCK_M, m))
            tl.store(positive_ptr + rows, base2_scale * positive_product, mask=has_partner)
        is_wide = store_sums(
            acc, base2_scale, None, row_ptr, column_ptr, row0, col0, n, m,
            BOTH_DIRECTIONS, PARTS, PART,
        )  # fmt: skip
    if is_wide:
        row_reference = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        for column_slice in range(0, BLOCK_M, SLICE_M):
            first = col0 + column_slice
            cols = first + tl.arange(0, SLICE_M)
            s = base2_scale * products(
                x_ptr, y_ptr, row0, first, n, m, d, strides, BLOCK_N, SLICE_M, BLOCK_D, EVEN_D
            )
            positive = cols[None, :] == rows[:, None] + offset
            store_entries(s, rows, positive, offset - first, n, m - first, positive_ptr)
            negative = (rows[:, None] < n) & (cols[None, :] < m) & (positive == 0)
            s = tl.where(negative, s, -float("inf"))
            top, e = exact(s, 1)
            row_reference, row_sum = join(row_reference, row_sum, top, tl.sum(e, 1))
            if BOTH_DIRECTIONS:
                top, e = exact(s, 0)
                e = e.reshape(REPEATS, PARTS, PART, SLICE_M)
                store_columns(column_ptr, block, first, m, top[None, :], e, PARTS)
        tl.store(row_ptr + 2 * at_row, row_reference, mask=rows < n)
        tl.store(row_ptr + 2 * at_row + 1, row_sum, mask=rows < n)


@triton.jit
def add_positive(reference, total, positive):
    """Add the positive to a sum of negatives. The new reference is the positive where that is the
    largest term, so that it counts exactly 1; elsewhere a whole number near the log of the sum."""
    log_sum = reference + tl.log2(total)
    leads = positive >= log_sum
    base = tl.where(leads, positive, tl.floor(log_sum))
    negatives = total * tl.exp2(reference - base)
    negatives = tl.where(total == 0, total, negatives)
    return base, negatives + tl.where(leads, 1.0, tl.exp2(positive - base))


@triton.jit
def load_pairs(ptr, block, blocks, position, inside, length):
    """-> both numbers of [blocks, length, 2] at some blocks and positions, 0 past the ends, and
    where there are any. One load of 8 bytes: two of 4 would read every sector twice."""
    at = 2 * (block[:, None].to(tl.int64) * length + position[None, :])
    mask = (block[:, None] < blocks) & inside[None, :]
    pointers = ptr + (at[:, :, None] + tl.arange(0, 2)[None, None, :])
    first, second = tl.split(tl.load(pointers, mask=mask[:, :, None], other=0.0))
    return first, second, mask


@triton.jit
def merge_blocks(
    part_ptr, position, inside, length, blocks, reference, total,
    DEPTH: tl.constexpr, LOWERED: tl.constexpr,
):  # fmt: skip
    """-> the statistics of positions from those given and their partials, [blocks, length, 2].

    A sampled reference may be far above all logits of a row. ``LOWERED``: sums below 1 get one
    below their logarithm first, so that a positive that leads, in a partial with its own logit as
    the reference, stays the reference and counts exactly 1.
    """
    for first in range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        r, t, mask = load_pairs(part_ptr, block, blocks, position, inside, length)
        r = tl.where(mask, r, -float("inf"))
        if LOWERED:
            low = (t > 0) & (t < 1)
            base = tl.floor(r + tl.log2(tl.where(low, t, 1.0)))
            t = tl.where(low, t * tl.exp2(r - base), t)
            r = tl.where(low, base, r)
        top = tl.max(r, 0)
        zero = tl.where(top == -float("inf"), 0.0, top)
        t = tl.sum(t * tl.exp2(r - zero[None, :]), 0)
        reference, total = join(reference, total, top, t)
    return reference, total
