"""Prototype cross-entropy on a GPU: launchers (contract: protoclip/ops/prototypes.py).

16-bit rows of D <= 256: one attention pass with key = value = C gives loss and gradient, 2 products
of [N, K, D] and O(slices N D) memory. Wider or fp32 rows: a pass for the statistics, then weights
in waves and a GEMM, 3 products (one-pass fp32 tiles spill). Products are exact to fp32, but
weights are rounded to the inputs' dtype before they meet the values. Banks share the launches; the
scale is read on the device.

The finish joins the slices of attention.py:
    loss_i = ln 2 (log2 sum_i + step (max_i - s_iy)),   gradient_i = acc_i / sum_i - t_y,
    dscale_i = sign (expected_i / sum_i - s_iy), or, without ``expected`` and at scale 0, which
leaves no s, q_i . gradient_i,
with t = m (soft targets: s_iy is a dot product with m_y) or t = C (hard labels: s_iy comes from
attention.py). Label -100 gives zeros, any other label outside [0, K) a NaN loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch
from protoclip.kernels.attention import attention_kernel, load_tile, split_scale
from protoclip.kernels.probabilities import key_gradient, weighted_values

LN2 = tl.constexpr(0.6931471805599453)
FINISH = launch.Launch(32, 0, 64, warps=4, stages=1)


@triton.jit
def _finish_rows(
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


@triton.jit(do_not_specialize=["slices"])
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
            _finish_rows(
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


@dataclass(frozen=True)
class Parts:
    """Softmax statistics of S banks by slices of the keys, not yet joined (attention.py)."""

    row_max: Tensor  # fp32 [S, slices, N]
    row_sum: Tensor  # fp32 [S, slices, N]
    best: Tensor  # int64 [S, slices, N] (empty when not asked)
    expected: Tensor  # fp32 [S, slices, N] (empty when not asked)
    positive: Tensor  # fp32 [S, N], the label's product where labels are hard
    acc: Tensor  # fp32 [S, slices, N, DV] (empty without values)


def addressable(x: Tensor) -> Tensor:
    """x, copied where an offset inside a tile (up to 256 rows) would pass int32."""
    reach = 256 * x.stride(0) + x.shape[1] * x.stride(1)
    return x if reach < 2**31 else x.contiguous()


def fits_attention(x: Tensor) -> bool:
    """Whether one pass can hold the values: 16-bit and not too wide."""
    return x.dtype != torch.float32 and x.shape[1] <= launch.WIDEST_ATTENTION


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(t.stride(0) for t in tensors), tuple(t.stride(1) for t in tensors)


def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] | None,
    labels: Sequence[Tensor],
    scale: Tensor,
    *,
    hard: int = 0,
    best: bool = False,
    expect: bool = False,
) -> Parts:
    """One pass over all banks. values: None, ``keys`` itself, or as many others of one width.
    hard: bit b set where ``labels[b]`` are hard; without any, labels may be any tensors."""
    (n, d), banks = q.shape, len(keys)
    dv = values[0].shape[1] if values else 0
    widest = max(d, dv)
    if values:
        tile = launch.attention_row(q.device, widest, best and expect)
    else:
        tile = launch.chunked_row(q.device, q.dtype)
    row_tiles = triton.cdiv(n, tile.block_n)
    key_tiles = triton.cdiv(max(len(k) for k in keys), tile.block_m)
    # A tail of its own costs registers, which only Hopper's one-pass rows have to spare.
    peel = bool(values) and launch.architecture(q.device) in (None, 90)
    slots = launch.cores(q.device) * tile.ctas_per_sm
    slices = key_slices(row_tiles * banks, key_tiles, slots)
    row = q.new_empty((banks, slices, n), dtype=torch.float32)
    parts = Parts(
        row,
        torch.empty_like(row),
        row.new_empty((banks, slices, n if best else 0), dtype=torch.int64),
        row.new_empty((banks, slices, n if expect else 0)),
        row.new_empty((banks, n)),
        row.new_empty((banks, slices, n, dv)),
    )
    which = "none" if not values else "keys" if values is keys else "own"
    with torch.cuda.device_of(q):
        attention_kernel[(row_tiles, slices, banks)](
            q, scale, tuple(keys), tuple(values or keys), tuple(labels),
            parts.row_max, parts.row_sum, parts.best, parts.expected, parts.positive, parts.acc,
            n, d, dv, slices, tuple(len(k) for k in keys),
            *q.stride(), *_strides(keys), *_strides(values or keys),
            BANKS=banks, HARD=hard,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_m, BLOCK_D=tile.block_d,
            BLOCK_DV=tile.block_d if values else 16, WHOLE_D=bool(values),
            EVEN_D=bool(values) and d == tile.block_d, VALUES=which,
            BEST=best, EXPECT=expect, PEEL=peel,
            **tile.options,
        )  # fmt: skip
    return parts


def finish(
    q: Tensor,
    scale: Tensor,
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    parts: Parts,
    out: Sequence[Tensor],
    *,
    hard: int = 0,
    statistics: bool = False,
    gradient: bool = False,
    targeted: bool = True,
) -> None:
    """Join the parts into ``out`` = (loss, gradient, nearest, row_max, row_sum, dscale).

    Written are: with ``statistics`` all but the gradient, with ``gradient`` the gradient (at scale
    0 dscale too); without ``targeted`` no loss, and acc / sum with nothing subtracted; dscale only
    where there is one."""
    banks, slices, n = parts.row_max.shape
    d = targets[0].shape[1]
    with torch.cuda.device_of(q):
        finish_kernel[(triton.cdiv(n, FINISH.block_n), banks)](
            q, scale, tuple(targets), tuple(labels),
            parts.row_max, parts.row_sum, parts.best, parts.expected, parts.positive, parts.acc,
            *out, n, d, slices, tuple(len(t) for t in targets), *q.stride(), *_strides(targets),
            BANKS=banks, HARD=hard, BLOCK_N=FINISH.block_n, BLOCK_D=FINISH.block_d,
            STATISTICS=statistics, LOSS=statistics and targeted, GRADIENT=gradient, TARGET=targeted,
            BEST=statistics and parts.best.numel() > 0, EXPECT=parts.expected.numel() > 0,
            DSCALE=out[5].numel() > 0,
            **FINISH.options,
        )  # fmt: skip


def key_slices(row_tiles: int, key_tiles: int, cores: int) -> int:
    """Into how many slices the keys are cut so that the programs fill the card.

    A slice has at least four tiles of keys; the first count whose last wave is nearly full wins.
    """
    longest = max(1, min(key_tiles // 4, max(8, cores // max(1, row_tiles))))
    counts = range(1, longest + 1)

    def fullness(slices: int) -> float:
        programs = row_tiles * slices
        return programs / (-(-programs // cores) * cores)

    return next((c for c in counts if fullness(c) >= 0.85), max(counts, key=fullness))


def prototype_ce_fwd_banks(
    h: Tensor,
    prototypes: Sequence[Tensor],
    targets: Sequence[Tensor],
    labels: Sequence[Tensor],
    scale: Tensor,
    need_grad: bool,
    need_nearest: bool,
    need_dscale: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss [S, N], gradient [S, N or 0, D], nearest [S, N or 0], row_max, row_sum [S, N],
    gradient of the scale [S, N or 0], from rounded weights without ``need_dscale``."""
    (n, d), banks = h.shape, len(prototypes)
    row = h.new_empty((banks, n), dtype=torch.float32)
    loss, row_max, row_sum = row, torch.empty_like(row), torch.empty_like(row)
    gradient = row.new_empty((banks, n if need_grad else 0, d))
    nearest = row.new_empty((banks, n if need_nearest else 0), dtype=torch.int64)
    dscale = row.new_empty(gradient.shape[:2])
    out = (loss, gradient, nearest, row_max, row_sum, dscale)
    if not n:
        return out
    h, keys = addressable(h), [addressable(c) for c in prototypes]
    hard = sum(1 << b for b, m in enumerate(targets) if not len(m))
    t = [addressable(m) if len(m) else c for m, c in zip(targets, keys, strict=True)]
    labels = [y.contiguous() for y in labels]
    scale = scale.reshape(()).float()
    one_pass = need_grad and fits_attention(h)
    values = keys if one_pass else None
    # fp32 weights are not rounded, so the gradient gives that of the scale.
    expect = need_grad and need_dscale and h.dtype != torch.float32
    asked = {"hard": hard, "best": need_nearest, "expect": expect}
    parts = attend(h, keys, values, labels, scale, **asked)
    finish(h, scale, t, labels, parts, out, hard=hard, statistics=True, gradient=one_pass)
    if need_grad and not one_pass:
        for b, c in enumerate(keys):
            weighted_values(h, c, c, scale, row_max[b], gradient[b])
        statistics = row_max[:, None], row_sum[:, None]
        expected = dscale if expect else dscale[:, :0]
        joined = Parts(*statistics, nearest, expected, loss, gradient[:, None])
        finish(h, scale, t, labels, joined, out, gradient=True)
    return out


def prototype_ce_bwd_prototypes(
    h: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    hard: bool,
) -> Tensor:
    """-> scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    return key_gradient(
        addressable(h), addressable(prototypes), labels.contiguous(), scale.reshape(()).float(),
        row_max.contiguous(), row_sum.contiguous(), weight.contiguous(), hard,
    )  # fmt: skip


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
    labels = [torch.empty(0, dtype=torch.int64, device=out.device)]  # there are none
    row_max, row_sum, none = out.new_empty(k), out.new_empty(k), out.new_empty(0)
    results = (row_max, out, labels[0], row_max, row_sum, none)
    parts = attend(source, [source], None, labels, scale)
    finish(source, scale, [values], labels, parts, results, statistics=True, targeted=False)
    weighted_values(source, source, values, scale, row_max, out)
    joined = row_max[None, None], row_sum[None, None]
    parts = Parts(*joined, labels[0], none, row_max, out[None, None])
    finish(source, scale, [values], labels, parts, results, gradient=True, targeted=False)
    return out
