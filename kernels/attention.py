"""Attention form of the prototype loss: streaming softmax over keys, values summed as we go.

For each query row q_i: products s_ik = sign(logit_scale) q_i.k_k, step = |logit_scale| log2(e), and
over a slice of the keys
    max_i = max_k s_ik, w_ik = 2^(step (s_ik - max_i)), sum_i = sum_k w_ik, acc_i = sum_k w_ik v_k
Differences are taken before they are scaled: the largest weight is exactly 1, so a loss near zero
does not drown in the rounding of a logit (7e-6 at scale 100), and no compiler can fuse it away.
Where the gradient of the scale is wanted, sum_k w_ik s_ik comes along: weights that were rounded to
meet 16-bit values would cost it five digits.
One program owns a tile of rows and a slice of the keys (so that few rows still fill the card). A
finishing kernel joins the slices in a fixed order: no atomics, same bits every run. The values are
the keys; rows wider than one tile form their logits by chunks of D and take no values here.
"""

import triton
import triton.language as tl

from protoclip.kernels.tiles import LEFT_OUT, LOG2E, dot, products_at

LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def split_scale(logit_scale_ptr):
    """-> sign, step; a logit_scale of 0 makes all products equal, whatever the step."""
    logit_scale = tl.load(logit_scale_ptr).to(tl.float32)
    sign = tl.where(logit_scale > 0, 1.0, tl.where(logit_scale < 0, -1.0, 0.0))
    return sign, tl.where(logit_scale == 0, 1.0, tl.abs(logit_scale)) * LOG2E


@triton.jit
def load_tile(
    ptr, rows, used, columns, d, stride_n, stride_d, EVEN_D: tl.constexpr, MASK: tl.constexpr = True
):
    """[rows, columns] of a matrix; zero past d and, with MASK, where ``used`` [rows] is false."""
    pointers = ptr + rows[:, None] * stride_n + columns[None, :].to(tl.int64) * stride_d
    if EVEN_D and not MASK:
        return tl.load(pointers)
    inside = used[:, None] if MASK else (columns < d)[None, :]
    if MASK and not EVEN_D:
        inside = inside & (columns < d)[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _products(
    q, q_ptr, rows, key_ptr, keys, used, d, strides,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, VALUES: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """-> s [rows, keys], and the keys where they are VALUES too: then rows fit one tile."""
    if VALUES:
        depth = tl.arange(0, BLOCK_D)
        key = load_tile(key_ptr, keys, used, depth, d, strides[2], strides[3], EVEN_D, MASK)
        return dot(q, tl.trans(key)), key
    else:
        keys = tl.where(used, keys, 0)
        return products_at(q_ptr, key_ptr, rows, keys, d, strides, BLOCK_D, EVEN_D), q


@triton.jit(do_not_specialize=["n", "slices"], do_not_specialize_on_alignment=["labels_ptr"])
def attention_kernel(
    q_ptr, logit_scale_ptr, key_ptr, labels_ptr,  # [N, D], [], [K, D], [N]
    max_ptr, sum_ptr, best_ptr, expected_ptr,  # [slices, N]
    positive_ptr, acc_ptr,  # [N], [slices, N, D]
    n, k, d, slices, strides,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    VALUES: tl.constexpr, BEST: tl.constexpr, EXPECT: tl.constexpr, HARD: tl.constexpr,
    PEEL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, slices). VALUES: the keys; PEEL: only the last tile masks keys."""
    slice_index = tl.program_id(1)
    sign, step = split_scale(logit_scale_ptr)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    at = slice_index.to(tl.int64) * n + first_row
    i = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_M)
    used = i < n - first_row
    columns = tl.arange(0, BLOCK_D)
    rows = tl.minimum(first_row + i, n - 1)
    q = i
    if VALUES:
        q_ptr += first_row * strides[0]
        q = load_tile(q_ptr, i, used, columns, d, strides[0], strides[1], EVEN_D)
    row_max = tl.full([BLOCK_N], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    best = tl.zeros([BLOCK_N], tl.int64)
    expected = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D if VALUES else 1], tl.float32)
    per_slice = tl.cdiv(tl.cdiv(k, BLOCK_M), slices) * BLOCK_M
    begin = slice_index * per_slice
    end = tl.minimum(begin + per_slice, k)
    whole = end
    if PEEL:
        whole = tl.maximum(begin, begin + (end - begin) // BLOCK_M * BLOCK_M)
    for part in tl.static_range(1 + PEEL):
        for start in range(begin if part == 0 else whole, whole if part == 0 else end, BLOCK_M):
            first_key = tl.cast(start, tl.int64)
            key_used = j < k - start
            s, key = _products(
                q, q_ptr, rows, key_ptr + first_key * strides[2], j, key_used, d, strides,
                BLOCK_D, EVEN_D, VALUES, part == PEEL,
            )  # fmt: skip
            s *= sign
            if part == PEEL:
                s = tl.where(key_used[None, :], s, -float("inf"))
            tile_max = tl.max(s, 1)
            if BEST:
                first = tl.min(tl.where(s == tile_max[:, None], j[None, :], BLOCK_M), 1)
                # Strictly larger: an equal logit in a later tile has a higher index.
                best = tl.where(tile_max > row_max, first_key + first, best)
            new_max = tl.maximum(row_max, tile_max)
            factor = tl.exp2((row_max - new_max) * step)
            p = tl.exp2((s - new_max[:, None]) * step)
            row_sum = row_sum * factor + tl.sum(p, 1)
            if EXPECT:
                # Choosing by a mask would spill.
                finite = tl.maximum(s, LOWEST) if part == PEEL else s
                expected = expected * factor + tl.sum(p * finite, 1)
            if VALUES:
                acc = acc * factor[:, None] + dot(p.to(key.dtype), key)
            row_max = new_max

    tl.store(max_ptr + at + i, row_max, mask=used)
    tl.store(sum_ptr + at + i, row_sum, mask=used)
    if BEST:
        tl.store(best_ptr + at + i, best, mask=used)
    if EXPECT:
        tl.store(expected_ptr + at + i, expected, mask=used)
    if VALUES:
        pointers = acc_ptr + at * d + i[:, None] * d + columns[None, :]
        tl.store(pointers, acc, mask=used[:, None] & (columns < d)[None, :])
    if HARD:  # noqa: SIM102 (a compile-time and a run-time condition)
        if slice_index == 0:
            # The label's product is the diagonal of one more tile of the same dot: the same bits as
            # in the sum, so that a loss near zero does not cancel.
            label = tl.load(labels_ptr + first_row + i, mask=used, other=LEFT_OUT)
            labelled = (label >= 0) & (label < k)
            s, _ = _products(
                q, q_ptr, rows, key_ptr, label, labelled, d, strides, BLOCK_D, EVEN_D, VALUES, True
            )
            diagonal = sign * tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1)
            tl.store(positive_ptr + first_row + i, diagonal, mask=used)
