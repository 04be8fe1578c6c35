"""Join the slices of attention.py and finish rows: loss, gradient, nearest key.

    loss_i = ln 2 (log2 sum_i + step (max_i - s_iy)),   gradient_i = acc_i / sum_i - t_y,
    dscale_i = sign (expected_i / sum_i - s_iy), or, without ``expected`` and at scale 0, which
leaves no s, q_i . gradient_i,
with t = m (soft targets: s_iy is a dot product with m_y) or t = C (hard labels: s_iy comes from
attention.py). Label -100 gives zeros, any other label outside [0, K) a NaN loss.
"""

import triton
import triton.language as tl

from protoclip.kernels.attention import load_tile, split_scale

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finish(
    q_ptr, target_ptr, labels_ptr,  # [N, D], [K, D], [N]
    max_ptr, sum_ptr, best_ptr, expected_ptr, positive_ptr, acc_ptr,  # this bank's [slices, N], ...
    loss_ptr, gradient_ptr, nearest_ptr, row_max_ptr, row_sum_ptr, dscale_ptr,  # this bank's rows
    row_block, n, d, slices, k_count, sign, step,
    stride_q_n, stride_q_d, stride_t_k, stride_t_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HARD: tl.constexpr,
    STATISTICS: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr,
    TARGET: tl.constexpr, BEST: tl.constexpr, EXPECT: tl.constexpr, DSCALE: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one bank."""
    rows = row_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = rows < n
    row_max = tl.full([BLOCK_N], -float("inf"), tl.float32)
    best = tl.zeros([BLOCK_N], tl.int64)
    for j in range(slices):
        part_max = tl.load(max_ptr + tl.cast(j, tl.int64) * n + rows, mask=used, other=0.0)
        if BEST:
            part_best = tl.load(best_ptr + tl.cast(j, tl.int64) * n + rows, mask=used, other=0)
            best = tl.where(part_max > row_max, part_best, best)
        row_max = tl.maximum(row_max, part_max)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    for j in range(slices):
        part = tl.cast(j, tl.int64) * n + rows
        difference = tl.load(max_ptr + part, mask=used, other=0.0) - row_max
        row_sum += tl.load(sum_ptr + part, mask=used, other=1.0) * tl.exp2(difference * step)
    if BEST:
        tl.store(nearest_ptr + rows, best, mask=used)

    label = tl.zeros([BLOCK_N], tl.int64)
    known = used
    if TARGET:
        label = tl.load(labels_ptr + rows, mask=used, other=-100)
        known = (label >= 0) & (label < k_count)
    if STATISTICS:
        tl.store(row_max_ptr + rows, row_max, mask=used)
        tl.store(row_sum_ptr + rows, row_sum, mask=used)
    if LOSS:
        if HARD:
            positive = tl.load(positive_ptr + rows, mask=used, other=0.0)
        else:
            positive = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, d, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                q = load_tile(q_ptr, rows, used, columns, d, stride_q_n, stride_q_d, False)
                m = load_tile(target_ptr, label, known, columns, d, stride_t_k, stride_t_d, False)
                positive += tl.sum(q.to(tl.float32) * m.to(tl.float32), 1)
            positive *= sign
        loss = LN2 * (tl.log2(row_sum) + step * (row_max - positive))
        absent = tl.where(label == -100, 0.0, float("nan"))
        tl.store(loss_ptr + rows, tl.where(known, loss, absent), mask=used)
    dscale = tl.zeros([BLOCK_N], tl.float32)
    if LOSS and EXPECT:
        expected = tl.zeros([BLOCK_N], tl.float32)
        for j in range(slices):
            part = tl.cast(j, tl.int64) * n + rows
            difference = tl.load(max_ptr + part, mask=used, other=0.0) - row_max
            expected += tl.load(expected_ptr + part, mask=used, other=0.0) * tl.exp2(
                difference * step
            )
        dscale = tl.where(known, sign * (expected / row_sum - positive), 0.0)
    if GRADIENT:
        product = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            mask = used[:, None] & (columns < d)[None, :]
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for j in range(slices):
                part = tl.cast(j, tl.int64) * n + rows
                difference = tl.load(max_ptr + part, mask=used, other=0.0) - row_max
                pointers = acc_ptr + part[:, None] * d + columns[None, :]
                acc += tl.load(pointers, mask=mask, other=0.0) * tl.exp2(difference * step)[:, None]
            acc /= row_sum[:, None]
            if TARGET:
                t = load_tile(target_ptr, label, known, columns, d, stride_t_k, stride_t_d, False)
                acc = tl.where(known[:, None], acc - t.to(tl.float32), 0.0)
                q = load_tile(q_ptr, rows, used, columns, d, stride_q_n, stride_q_d, False)
                product += tl.sum(q.to(tl.float32) * acc, 1)
            tl.store(gradient_ptr + rows[:, None] * d + columns[None, :], acc, mask=mask)
        dscale = tl.where(sign == 0, product, dscale) if EXPECT else product
    if DSCALE:
        if LOSS or not EXPECT:
            tl.store(dscale_ptr + rows, dscale, mask=used)
        else:
            tl.store(dscale_ptr + rows, dscale, mask=rows < tl.where(sign == 0, n, 0))


@triton.jit
def finish_kernel(
    q_ptr, scale_ptr,
    target_ptrs, labels_ptrs,  # per bank
    max_ptr, sum_ptr, best_ptr, expected_ptr, positive_ptr, acc_ptr,  # [S, slices, N], ..., [S, N]
    loss_ptr, gradient_ptr, nearest_ptr, row_max_ptr, row_sum_ptr, dscale_ptr,  # [S, N], ...
    n, d, slices, counts,
    stride_q_n, stride_q_d, strides_t_k, strides_t_d,
    BANKS: tl.constexpr, HARD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STATISTICS: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr,
    TARGET: tl.constexpr, BEST: tl.constexpr, EXPECT: tl.constexpr, DSCALE: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, banks). ``gradient_ptr`` may be ``acc_ptr`` when there is one slice."""
    bank = tl.program_id(1)
    sign, step = split_scale(scale_ptr)
    row = bank.to(tl.int64) * n
    part = row * slices
    for b in tl.static_range(BANKS):
        if bank == b:
            finish(
                q_ptr, target_ptrs[b], labels_ptrs[b],
                max_ptr + part, sum_ptr + part, best_ptr + part, expected_ptr + part,
                positive_ptr + row, acc_ptr + part * d,
                loss_ptr + row, gradient_ptr + row * d, nearest_ptr + row,
                row_max_ptr + row, row_sum_ptr + row, dscale_ptr + row,
                tl.program_id(0), n, d, slices, counts[b], sign, step,
                stride_q_n, stride_q_d, strides_t_k[b], strides_t_d[b],
                BLOCK_N, BLOCK_D, (HARD >> b) & 1, STATISTICS, LOSS, GRADIENT, TARGET, BEST,
                EXPECT, DSCALE,
            )  # fmt: skip
