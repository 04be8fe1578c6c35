"""Attention form of the prototype loss: streaming softmax over keys, values summed as we go.

For each query row q_i: products s_ik = sign(scale) q_i.k_k, step = |scale| log2(e), and over a
slice of the keys
    max_i = max_k s_ik, w_ik = 2^(step (s_ik - max_i)), sum_i = sum_k w_ik, acc_i = sum_k w_ik v_k
Differences are taken before they are scaled: the largest weight is exactly 1, so a loss near zero
does not drown in the rounding of a logit (7e-6 at scale 100), and no compiler can fuse it away.
Where the gradient of the scale is wanted, sum_k w_ik s_ik comes along: weights that were rounded to
meet 16-bit values would cost it five digits.
One program owns a tile of rows, a slice of the keys (so that few rows still fill the card) and a
bank (a set of keys). A finishing kernel joins the slices in a fixed order: no atomics, same bits
every run. With values 2 products of [N, K, D] are done and nothing of size N x K exists; rows wider
than one tile form their logits by chunks of D and take no values (probabilities.py does that).
"""

import os

import triton
import triton.language as tl

# The interpreter's dot misreads bf16 operands.
UPCAST = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def dot(a, b):
    """fp32 a @ b. fp32 operands run on FMA units: tensor cores truncate their accumulators, which
    takes three-term TF32 out of the error budget at scale 100."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def split_scale(scale_ptr):
    """-> sign, step; scale 0 makes all products equal, whatever the step."""
    scale = tl.load(scale_ptr).to(tl.float32)
    sign = tl.where(scale > 0, 1.0, tl.where(scale < 0, -1.0, 0.0))
    return sign, tl.where(scale == 0, 1.0, tl.abs(scale)) * LOG2E


@triton.jit
def load_tile(
    ptr, rows, used, columns, d, stride_n, stride_d, EVEN_D: tl.constexpr, MASK: tl.constexpr = True
):
    """[rows, columns] of a matrix; zero past d and, with MASK, where ``used`` [rows] is false."""
    pointers = ptr + rows[:, None] * stride_n + columns[None, :] * stride_d
    if EVEN_D and not MASK:
        return tl.load(pointers)
    if EVEN_D:
        return tl.load(pointers, mask=used[:, None], other=0.0)
    if not MASK:
        return tl.load(pointers, mask=(columns < d)[None, :], other=0.0)
    return tl.load(pointers, mask=used[:, None] & (columns < d)[None, :], other=0.0)


@triton.jit
def products_tile(
    q, q_ptr, q_rows, q_used, stride_q_n, stride_q_d,
    k_ptr, k_rows, k_used, stride_k_n, stride_k_d,
    d,
    BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """-> s [q_rows, k_rows], the keys [k_rows, BLOCK_D] (a chunk when not WHOLE_D)."""
    columns = tl.arange(0, BLOCK_D)
    k = load_tile(k_ptr, k_rows, k_used, columns, d, stride_k_n, stride_k_d, EVEN_D, MASK)
    s = dot(q, tl.trans(k))
    if not WHOLE_D:
        for start in range(BLOCK_D, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            q_chunk = load_tile(q_ptr, q_rows, q_used, columns, d, stride_q_n, stride_q_d, False)
            k_chunk = load_tile(
                k_ptr, k_rows, k_used, columns, d, stride_k_n, stride_k_d, False, MASK
            )
            s += dot(q_chunk, tl.trans(k_chunk))
    return s, k


@triton.jit
def _step(
    q, q_ptr, i, used, stride_q_n, stride_q_d, k_ptr, stride_k_n, stride_k_d,
    v_ptr, v_columns, stride_v_n, stride_v_d, start, k_count, d, dv, sign, step,
    row_max, row_sum, best, expected, acc,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr,
    VALUES: tl.constexpr, BEST: tl.constexpr, EXPECT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add the keys from ``start`` on to the statistics and the sums of the rows."""
    j = tl.arange(0, BLOCK_K)
    first_key = tl.cast(start, tl.int64)
    k_used = j < k_count - start
    s, k = products_tile(
        q, q_ptr, i, used, stride_q_n, stride_q_d,
        k_ptr + first_key * stride_k_n, j, k_used, stride_k_n, stride_k_d,
        d, BLOCK_D, WHOLE_D, EVEN_D, TAIL,
    )  # fmt: skip
    s *= sign
    if TAIL:
        s = tl.where(k_used[None, :], s, -float("inf"))
    tile_max = tl.max(s, 1)
    if BEST:
        first = tl.min(tl.where(s == tile_max[:, None], j[None, :], BLOCK_K), 1)
        # Strictly larger: an equal logit in a later tile has a higher index.
        best = tl.where(tile_max > row_max, first_key + first, best)
    new_max = tl.maximum(row_max, tile_max)
    factor = tl.exp2((row_max - new_max) * step)
    p = tl.exp2((s - new_max[:, None]) * step)
    row_sum = row_sum * factor + tl.sum(p, 1)
    if EXPECT:
        finite = tl.maximum(s, LOWEST) if TAIL else s  # choosing by a mask would spill
        expected = expected * factor + tl.sum(p * finite, 1)
    if VALUES == "keys":
        acc = acc * factor[:, None] + dot(p.to(k.dtype), k)
    if VALUES == "own":
        v = load_tile(
            v_ptr + first_key * stride_v_n, j, k_used, v_columns, dv, stride_v_n, stride_v_d,
            False, TAIL,
        )  # fmt: skip
        acc = acc * factor[:, None] + dot(p.to(v.dtype), v)
    return new_max, row_sum, best, expected, acc


@triton.jit
def attend(
    q_ptr, labels_ptr, k_ptr, v_ptr,
    max_ptr, sum_ptr, best_ptr, expected_ptr,  # [N] at this bank and slice
    positive_ptr, acc_ptr,  # [N] of this bank, [N, DV] at this bank and slice
    row_block, slice_index, slices, n, k_count, d, dv, sign, step,
    stride_q_n, stride_q_d, stride_k_n, stride_k_d, stride_v_n, stride_v_d,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, VALUES: tl.constexpr, BEST: tl.constexpr,
    EXPECT: tl.constexpr, HARD: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """One tile of rows against one slice of one bank. VALUES: "none", "keys" (v = k) or "own"."""
    first_row = row_block.to(tl.int64) * BLOCK_N
    i = tl.arange(0, BLOCK_N)
    used = i < n - first_row
    q_ptr += first_row * stride_q_n
    q = load_tile(q_ptr, i, used, tl.arange(0, BLOCK_D), d, stride_q_n, stride_q_d, EVEN_D)
    v_columns = tl.arange(0, BLOCK_DV)
    row_max = tl.full([BLOCK_N], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    best = tl.zeros([BLOCK_N], tl.int64)
    expected = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    per_slice = tl.cdiv(tl.cdiv(k_count, BLOCK_K), slices) * BLOCK_K
    begin = slice_index * per_slice
    end = tl.minimum(begin + per_slice, k_count)
    whole = end
    if PEEL:
        whole = tl.maximum(begin, begin + (end - begin) // BLOCK_K * BLOCK_K)
    for start in range(begin, whole, BLOCK_K):
        row_max, row_sum, best, expected, acc = _step(
            q, q_ptr, i, used, stride_q_n, stride_q_d, k_ptr, stride_k_n, stride_k_d,
            v_ptr, v_columns, stride_v_n, stride_v_d, start, k_count, d, dv, sign, step,
            row_max, row_sum, best, expected, acc,
            BLOCK_K, BLOCK_D, WHOLE_D, EVEN_D, VALUES, BEST, EXPECT, not PEEL,
        )  # fmt: skip
    if PEEL and whole < end:  # only the last tile has keys to mask
        row_max, row_sum, best, expected, acc = _step(
            q, q_ptr, i, used, stride_q_n, stride_q_d, k_ptr, stride_k_n, stride_k_d,
            v_ptr, v_columns, stride_v_n, stride_v_d, whole, k_count, d, dv, sign, step,
            row_max, row_sum, best, expected, acc,
            BLOCK_K, BLOCK_D, WHOLE_D, EVEN_D, VALUES, BEST, EXPECT, True,
        )  # fmt: skip

    tl.store(max_ptr + first_row + i, row_max, mask=used)
    tl.store(sum_ptr + first_row + i, row_sum, mask=used)
    if BEST:
        tl.store(best_ptr + first_row + i, best, mask=used)
    if EXPECT:
        tl.store(expected_ptr + first_row + i, expected, mask=used)
    if VALUES != "none":
        pointers = acc_ptr + first_row * dv + i[:, None] * dv + v_columns[None, :]
        tl.store(pointers, acc, mask=used[:, None] & (v_columns < dv)[None, :])
    if HARD:  # noqa: SIM102 (a compile-time and a run-time condition)
        if slice_index == 0:
            # The label's product is the diagonal of one more tile of the same dot: the same bits as
            # in the sum below, so that a loss near zero does not cancel.
            label = tl.load(labels_ptr + first_row + i, mask=used, other=-100)
            s, _ = products_tile(
                q, q_ptr, i, used, stride_q_n, stride_q_d,
                k_ptr, label, (label >= 0) & (label < k_count), stride_k_n, stride_k_d,
                d, BLOCK_D, WHOLE_D, EVEN_D, True,
            )  # fmt: skip
            diagonal = sign * tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1)
            tl.store(positive_ptr + first_row + i, diagonal, mask=used)


@triton.jit(do_not_specialize=["slices"])
def attention_kernel(
    q_ptr, scale_ptr,  # [N, D], []
    k_ptrs, v_ptrs, labels_ptrs,  # per bank: [K, D], [K, DV], [N]
    max_ptr, sum_ptr, best_ptr, expected_ptr,  # [S, slices, N]
    positive_ptr, acc_ptr,  # [S, N], [S, slices, N, DV]
    n, d, dv, slices, counts,
    stride_q_n, stride_q_d, strides_k_n, strides_k_d, strides_v_n, strides_v_d,
    BANKS: tl.constexpr, HARD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    WHOLE_D: tl.constexpr, EVEN_D: tl.constexpr, VALUES: tl.constexpr, BEST: tl.constexpr,
    EXPECT: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, slices, banks); HARD: bit b set where bank b has hard labels."""
    slice_index = tl.program_id(1)
    bank = tl.program_id(2)
    sign, step = split_scale(scale_ptr)
    part = (bank.to(tl.int64) * slices + slice_index) * n
    for b in tl.static_range(BANKS):
        if bank == b:
            attend(
                q_ptr, labels_ptrs[b], k_ptrs[b], v_ptrs[b],
                max_ptr + part, sum_ptr + part, best_ptr + part, expected_ptr + part,
                positive_ptr + bank.to(tl.int64) * n, acc_ptr + part * dv,
                tl.program_id(0), slice_index, slices, n, counts[b], d, dv, sign, step,
                stride_q_n, stride_q_d, strides_k_n[b], strides_k_d[b],
                strides_v_n[b], strides_v_d[b],
                BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_DV,
                WHOLE_D, EVEN_D, VALUES, BEST, EXPECT, (HARD >> b) & 1, PEEL,
            )  # fmt: skip
