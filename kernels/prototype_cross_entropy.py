"""Prototype cross-entropy on a GPU: launchers (contract: protoclip/ops/prototypes.py).

16-bit rows of D <= 256: one attention pass with key = value = C gives loss and gradient, 2 products
of [N, K, D] and O(slices N D) memory. Wider or fp32 rows (one-pass fp32 tiles spill): a pass for
the statistics, then weights W_ik = 2^(step (s_ik - max_i)) again, wave by wave of rows into a
bounded scratch, and a GEMM W V for each: 3 products. The gradient of the keys is G^T q by waves of
keys, G_ik = w_i (W_ik / sum_i - [y_i = k]). No sum goes across waves: no atomics. Logits are exact
to fp32; weights are rounded to the inputs' dtype before they meet the values, and fp32 ones meet
them as ``torch.backends.cuda.matmul`` says. Each bank has its own two launches; the scale is read
on the device.

The finish joins the slices of attention.py:
    loss_i = ln 2 (log2 sum_i + step (max_i - s_iy)),   gradient_i = acc_i / sum_i - t_y,
    dscale_i = sign (expected_i / sum_i - s_iy), or, without ``expected`` and at scale 0, which
leaves no s, q_i . gradient_i,
with t = m (soft targets: s_iy is a dot product with m_y) or t = C (hard labels: s_iy comes from
attention.py). Label -100 gives zeros, any other label outside [0, K) a NaN loss.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch
from protoclip.kernels.attention import attention_kernel, load_tile, products_tile, split_scale

LN2 = tl.constexpr(0.6931471805599453)
FINISH = launch.Launch(32, 0, 64, warps=4, stages=1)
SCRATCH_BYTES = 256 << 20
# G is at most 1 after dividing by the largest weight; this keeps small entries normal in fp16.
G_UNIT = 4096.0


@triton.jit(
    do_not_specialize=["slices"],
    do_not_specialize_on_alignment=[
        *("labels_ptr", "loss_ptr", "nearest_ptr", "row_max_ptr", "row_sum_ptr", "dscale_ptr")
    ],
)
def finish_kernel(
    q_ptr, scale_ptr, target_ptr, labels_ptr,  # [N, D], [], [K, D], [N]
    max_ptr, sum_ptr, best_ptr, expected_ptr,  # [slices, N]
    positive_ptr, acc_ptr,  # [N], [slices, N, D]; with one slice acc may be the gradient
    loss_ptr, gradient_ptr, nearest_ptr, row_max_ptr, row_sum_ptr, dscale_ptr,  # [N], [N, D], ...
    n, d, slices, k_count,
    stride_q_n, stride_q_d, stride_t_k, stride_t_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HARD: tl.constexpr,
    STATISTICS: tl.constexpr, GRADIENT: tl.constexpr,
    BEST: tl.constexpr, EXPECT: tl.constexpr, DSCALE: tl.constexpr,
):  # fmt: skip
    """Join the slices of a tile of rows."""
    sign, step = split_scale(scale_ptr)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = rows < n
    row_max = tl.full([BLOCK_N], -float("inf"), tl.float32)
    best = tl.zeros([BLOCK_N], tl.int64)
    for j in range(slices):
        part = tl.cast(j, tl.int64) * n + rows
        part_max = tl.load(max_ptr + part, mask=used, other=0.0)
        if BEST:
            part_best = tl.load(best_ptr + part, mask=used, other=0)
            best = tl.where(part_max > row_max, part_best, best)
        row_max = tl.maximum(row_max, part_max)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    expected = tl.zeros([BLOCK_N], tl.float32)
    for j in range(slices):
        part = tl.cast(j, tl.int64) * n + rows
        factor = tl.exp2((tl.load(max_ptr + part, mask=used, other=0.0) - row_max) * step)
        row_sum += tl.load(sum_ptr + part, mask=used, other=1.0) * factor
        if STATISTICS and EXPECT:
            expected += tl.load(expected_ptr + part, mask=used, other=0.0) * factor
    if BEST:
        tl.store(nearest_ptr + rows, best, mask=used)
    if STATISTICS:
        tl.store(row_max_ptr + rows, row_max, mask=used)
        tl.store(row_sum_ptr + rows, row_sum, mask=used)
    label = tl.load(labels_ptr + rows, mask=used, other=-100)
    known = (label >= 0) & (label < k_count)
    dscale = tl.zeros([BLOCK_N], tl.float32)
    if STATISTICS:
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
        if EXPECT:
            dscale = tl.where(known, sign * (expected / row_sum - positive), 0.0)
    if GRADIENT:
        product = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            mask = used[:, None] & (columns < d)[None, :]
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for j in range(slices):
                part = tl.cast(j, tl.int64) * n + rows
                factor = tl.exp2((tl.load(max_ptr + part, mask=used, other=0.0) - row_max) * step)
                pointers = acc_ptr + part[:, None] * d + columns[None, :]
                acc += tl.load(pointers, mask=mask, other=0.0) * factor[:, None]
            acc /= row_sum[:, None]
            t = load_tile(target_ptr, label, known, columns, d, stride_t_k, stride_t_d, False)
            acc = tl.where(known[:, None], acc - t.to(tl.float32), 0.0)
            q = load_tile(q_ptr, rows, used, columns, d, stride_q_n, stride_q_d, False)
            product += tl.sum(q.to(tl.float32) * acc, 1)
            tl.store(gradient_ptr + rows[:, None] * d + columns[None, :], acc, mask=mask)
        dscale = tl.where(sign == 0, product, dscale) if EXPECT else product
    if DSCALE:
        if STATISTICS or not EXPECT:
            tl.store(dscale_ptr + rows, dscale, mask=used)
        else:
            tl.store(dscale_ptr + rows, dscale, mask=rows < tl.where(sign == 0, n, 0))


@triton.jit(
    do_not_specialize=["n", "k_count", "first_key"],
    do_not_specialize_on_alignment=["labels_ptr", "max_ptr", "sum_ptr", "weight_ptr"],
)
def weights_kernel(
    q_ptr, scale_ptr, k_ptr,  # [N, D], [], [K, D]
    labels_ptr, max_ptr, sum_ptr, weight_ptr,  # [N]
    out_ptr,  # [N, K], contiguous
    n, k_count, d, first_key,
    stride_q_n, stride_q_d, stride_k_n, stride_k_d,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    GRADIENT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, key tiles): W, or UNIT * G where GRADIENT. first_key: of this wave."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_K
    i = tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    rows = first_row + i
    used = rows < n
    k_used = j < k_count - first_column
    q_ptr += first_row * stride_q_n
    columns = tl.arange(0, BLOCK_D)
    q = load_tile(q_ptr, i, used, columns, d, stride_q_n, stride_q_d, False)
    sign, step = split_scale(scale_ptr)
    s, _ = products_tile(
        q, q_ptr, i, used, stride_q_n, stride_q_d,
        k_ptr + first_column * stride_k_n, j, k_used, stride_k_n, stride_k_d,
        d, BLOCK_D, False, False, True,
    )  # fmt: skip
    s *= sign
    s = tl.where(k_used[None, :], s, -float("inf"))
    w = tl.exp2((s - tl.load(max_ptr + rows, mask=used, other=0.0)[:, None]) * step)
    if GRADIENT:
        label = tl.load(labels_ptr + rows, mask=used, other=-100)
        w = w / tl.load(sum_ptr + rows, mask=used, other=1.0)[:, None]
        if HARD:
            keys = first_key + first_column + j
            w = tl.where(label[:, None] == keys[None, :], w - 1.0, w)
        weight = tl.load(weight_ptr + rows, mask=used, other=0.0)
        w = tl.where((label >= 0)[:, None], w * (weight * UNIT)[:, None], 0.0)
    pointers = out_ptr + rows[:, None] * k_count + (first_column + j)[None, :]
    tl.store(pointers, w.to(out_ptr.dtype.element_ty), mask=used[:, None] & k_used[None, :])


def attend(
    q, keys, labels, scale, *, values=False, hard=False, best=False, expect=False
) -> tuple[Tensor, ...]:
    """One pass over the keys, which are the values too; labels are read where they are hard.

    -> softmax statistics by slices of the keys, not yet joined (attention.py): row_max, row_sum,
    best, expected [slices, N] (the last two empty where not asked for), positive [N], the label's
    product where labels are hard, and acc [slices, N, D] (empty without values)."""
    (n, d), k = q.shape, len(keys)
    if values:
        tile = launch.attention_row(q.device, d, best and expect)
    else:
        tile = launch.chunked_row(q.device, q.dtype)
    row_tiles = triton.cdiv(n, tile.block_n)
    # A tail of its own costs registers, which only Hopper's one-pass rows have to spare.
    peel = values and launch.architecture(q.device) in (None, 90)
    slots = launch.cores(q.device) * tile.ctas_per_sm
    slices = key_slices(row_tiles, triton.cdiv(k, tile.block_m), slots)
    row = q.new_empty((slices, n), dtype=torch.float32)
    nearest = row.new_empty((slices, n if best else 0), dtype=torch.int64)
    expected = row.new_empty((slices, n if expect else 0))
    acc = row.new_empty((slices, n, d if values else 0))
    parts = row, torch.empty_like(row), nearest, expected, row.new_empty(n), acc
    with torch.cuda.device_of(q):
        attention_kernel[(row_tiles, slices)](
            q, scale, keys, labels, *parts, n, k, d, slices, *q.stride(), *keys.stride(),
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_m, BLOCK_D=tile.block_d,
            WHOLE_D=values, EVEN_D=values and d == tile.block_d, VALUES=values,
            BEST=best, EXPECT=expect, HARD=hard, PEEL=int(peel), **tile.options,
        )  # fmt: skip
    return parts


def finish(
    q, scale, targets, labels, parts, out, *, hard=False, statistics=False, gradient=False
) -> None:
    """Join the parts into ``out`` = (loss, gradient, nearest, row_max, row_sum, dscale).

    Written are: with ``statistics`` all but the gradient, with ``gradient`` the gradient (at scale
    0 dscale too); dscale only where there is one."""
    (slices, n), best, expected = parts[0].shape, *parts[2:4]
    with torch.cuda.device_of(q):
        finish_kernel[(triton.cdiv(n, FINISH.block_n),)](
            q, scale, targets, labels, *parts, *out,
            n, targets.shape[1], slices, len(targets), *q.stride(), *targets.stride(),
            BLOCK_N=FINISH.block_n, BLOCK_D=FINISH.block_d, HARD=hard,
            STATISTICS=statistics, GRADIENT=gradient,
            BEST=statistics and best.numel() > 0, EXPECT=expected.numel() > 0,
            DSCALE=out[5].numel() > 0, **FINISH.options,
        )  # fmt: skip


def key_slices(row_tiles: int, key_tiles: int, cores: int) -> int:
    """Into how many slices the keys are cut so that the programs fill the card.

    A slice has at least four tiles of keys; the first count whose last wave is nearly full wins.
    """
    longest = max(1, min(key_tiles // 4, max(8, cores // max(1, row_tiles))))
    programs = {slices: row_tiles * slices for slices in range(1, longest + 1)}
    fullness = {slices: p / (-(-p // cores) * cores) for slices, p in programs.items()}
    return next((c for c in fullness if fullness[c] >= 0.85), max(fullness, key=fullness.get))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, D] -> fp32 [M, D]; fp32 operands as ``torch.backends.cuda.matmul`` says."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()  # the CPU, under the interpreter, has no mixed form


def weights(q, keys, scale, row_max, *, first_key=0, gradient=None) -> Tensor:
    """W [N, K] in q's dtype, or G_UNIT * G; gradient: (labels, row_sum, weight, hard)."""
    (n, d), k = q.shape, len(keys)
    out = q.new_empty((n, k))
    labels, row_sum, weight, hard = gradient or (row_max, row_max, row_max, False)
    tile = launch.chunked_row(q.device, q.dtype)
    with torch.cuda.device_of(q):
        weights_kernel[(triton.cdiv(n, tile.block_n), triton.cdiv(k, tile.block_m))](
            q, scale, keys, labels, row_max, row_sum, weight, out, n, k, d, first_key,
            *q.stride(), *keys.stride(),
            UNIT=G_UNIT, BLOCK_N=tile.block_n, BLOCK_K=tile.block_m, BLOCK_D=tile.block_d,
            GRADIENT=gradient is not None, HARD=hard, **tile.options,
        )  # fmt: skip
    return out


def _wave(other: int, itemsize: int) -> int:
    """Rows (or keys) of a wave whose other side is given: at least 16."""
    fit = SCRATCH_BYTES // (max(1, other) * itemsize)
    return max(16, fit // 128 * 128 or fit)


def weighted_values(q, keys, values, scale, row_max, out: Tensor) -> None:
    """out [N, DV] fp32 = sum_k W_ik v_k."""
    rows = _wave(len(keys), q.element_size())
    for a in range(0, len(q), rows):
        part = slice(a, a + rows)
        out[part] = product(weights(q[part], keys, scale, row_max[part]), values)


def addressable(x: Tensor) -> Tensor:
    """x, copied where an offset inside a tile (up to 256 rows) would pass int32."""
    reach = 256 * x.stride(0) + x.shape[1] * x.stride(1)
    return x if reach < 2**31 else x.contiguous()


def prototype_ce_fwd_banks(
    h: Tensor, prototypes: Sequence[Tensor], targets: Sequence[Tensor], labels: Sequence[Tensor],
    scale: Tensor, need_grad: bool, need_nearest: bool, need_dscale: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> loss [S, N], gradient [S, N or 0, D], nearest [S, N or 0], row_max, row_sum [S, N],
    gradient of the scale [S, N or 0], from rounded weights without ``need_dscale``."""
    (n, d), banks = h.shape, len(prototypes)
    loss = h.new_empty((banks, n), dtype=torch.float32)
    row_max, row_sum = torch.empty_like(loss), torch.empty_like(loss)
    gradient = loss.new_empty((banks, n if need_grad else 0, d))
    nearest = loss.new_empty((banks, n if need_nearest else 0), dtype=torch.int64)
    dscale = loss.new_empty(gradient.shape[:2])
    out = (loss, gradient, nearest, row_max, row_sum, dscale)
    if not n:
        return out
    scale = scale.reshape(()).float()
    one_pass = need_grad and h.dtype != torch.float32 and d <= launch.WIDEST_ATTENTION
    # fp32 weights are not rounded, so the gradient gives that of the scale.
    expect = need_grad and need_dscale and h.dtype != torch.float32
    h = addressable(h)
    for b, (c, m, y) in enumerate(zip(prototypes, targets, labels, strict=True)):
        hard, c = len(m) == 0, addressable(c)
        y, t = y.contiguous(), c if hard else addressable(m)
        found = tuple(part[b] for part in out)
        parts = attend(h, c, y, scale, values=one_pass, hard=hard, best=need_nearest, expect=expect)
        finish(h, scale, t, y, parts, found, hard=hard, statistics=True, gradient=one_pass)
        if need_grad and not one_pass:
            weighted_values(h, c, c, scale, row_max[b], gradient[b])
            expected = dscale[b][None] if expect else dscale[:0]
            statistics = row_max[b][None], row_sum[b][None]
            joined = *statistics, nearest[b], expected, loss[b], gradient[b][None]
            finish(h, scale, t, y, joined, found, gradient=True)
    return out


def prototype_ce_bwd_prototypes(
    h: Tensor, prototypes: Tensor, labels: Tensor, scale: Tensor,
    row_max: Tensor, row_sum: Tensor, weight: Tensor, hard: bool,
) -> Tensor:  # fmt: skip
    """-> scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    out = torch.zeros_like(prototypes, memory_format=torch.contiguous_format)
    if not len(h) or not out.numel():
        return out
    h, prototypes = addressable(h), addressable(prototypes)
    scale = scale.reshape(()).float()
    largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    weight, factor = (weight / largest).contiguous(), scale * largest / G_UNIT
    row_max, row_sum = row_max.contiguous(), row_sum.contiguous()
    gradient = labels.contiguous(), row_sum, weight, hard
    columns = _wave(len(h), h.element_size())
    for first in range(0, len(prototypes), columns):
        part = slice(first, first + columns)
        g = weights(h, prototypes[part], scale, row_max, first_key=first, gradient=gradient)
        out[part] = factor * product(g.T, h)
    return out


def soft_targets(source_centroids: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """softmax(S S^T / tau) C: [K, Ds], [K, D], tau > 0 -> fp32 [K, D]; never K x K in memory.

    A pass for the statistics, then weights in waves and a GEMM. Once an episode, and what students
    are trained on: all in fp32, whatever the input.
    """
    k, d = prototypes.shape
    out = prototypes.new_empty((k, d), dtype=torch.float32)
    if not out.numel():
        return out
    source, values = (addressable(t.float()) for t in (source_centroids, prototypes))
    scale = torch.full((), 1 / temperature, dtype=torch.float32, device=out.device)
    labels = torch.empty(0, dtype=torch.int64, device=out.device)  # there are none
    tops, sums, *_ = attend(source, source, labels, scale)
    row_max = tops.amax(dim=0)
    row_sum = (sums * ((tops - row_max) / temperature).exp()).sum(dim=0)
    weighted_values(source, source, values, scale, row_max, out)
    return out.div_(row_sum[:, None])
