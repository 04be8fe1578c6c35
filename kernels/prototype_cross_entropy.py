"""Prototype cross-entropy on a GPU: launchers (contract: protoclip/ops/prototypes.py).

16-bit rows of D <= 256: one attention pass with key = value = C gives loss and gradient, 2 products
of [N, K, D] and O(slices N D) memory. Wider or fp32 rows: a pass for the statistics, then weights
in waves and a GEMM, 3 products (one-pass fp32 tiles spill). Logits are exact to fp32; weights are
rounded to the inputs' dtype before they meet the values, and fp32 ones meet them as
``torch.backends.cuda.matmul`` says. Each bank has its own two launches; the scale is read on the
device.

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
    STATISTICS: tl.constexpr, LOSS: tl.constexpr, GRADIENT: tl.constexpr,
    TARGET: tl.constexpr, BEST: tl.constexpr, EXPECT: tl.constexpr, DSCALE: tl.constexpr,
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
        if LOSS and EXPECT:
            expected += tl.load(expected_ptr + part, mask=used, other=0.0) * factor
    if BEST:
        tl.store(nearest_ptr + rows, best, mask=used)
    if STATISTICS:
        tl.store(row_max_ptr + rows, row_max, mask=used)
        tl.store(row_sum_ptr + rows, row_sum, mask=used)
    label = tl.zeros([BLOCK_N], tl.int64)
    known = used
    if TARGET:
        label = tl.load(labels_ptr + rows, mask=used, other=-100)
        known = (label >= 0) & (label < k_count)
    dscale = tl.zeros([BLOCK_N], tl.float32)
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


@dataclass(frozen=True)
class Parts:
    """Softmax statistics by slices of the keys, not yet joined (attention.py)."""

    row_max: Tensor  # fp32 [slices, N]
    row_sum: Tensor  # fp32 [slices, N]
    best: Tensor  # int64 [slices, N] (empty when not asked)
    expected: Tensor  # fp32 [slices, N] (empty when not asked)
    positive: Tensor  # fp32 [N], the label's product where labels are hard
    acc: Tensor  # fp32 [slices, N, D] (empty without values)


def addressable(x: Tensor) -> Tensor:
    """x, copied where an offset inside a tile (up to 256 rows) would pass int32."""
    reach = 256 * x.stride(0) + x.shape[1] * x.stride(1)
    return x if reach < 2**31 else x.contiguous()


def fits_attention(x: Tensor) -> bool:
    """Whether one pass can hold the values: 16-bit and not too wide."""
    return x.dtype != torch.float32 and x.shape[1] <= launch.WIDEST_ATTENTION


def attend(
    q: Tensor,
    keys: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    values: bool = False,
    hard: bool = False,
    best: bool = False,
    expect: bool = False,
) -> Parts:
    """One pass over the keys, which are the values too; labels are read where they are hard."""
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
    parts = Parts(
        row,
        torch.empty_like(row),
        row.new_empty((slices, n if best else 0), dtype=torch.int64),
        row.new_empty((slices, n if expect else 0)),
        row.new_empty(n),
        row.new_empty((slices, n, d if values else 0)),
    )
    with torch.cuda.device_of(q):
        attention_kernel[(row_tiles, slices)](
            q, scale, keys, labels,
            parts.row_max, parts.row_sum, parts.best, parts.expected, parts.positive, parts.acc,
            n, k, d, slices, *q.stride(), *keys.stride(),
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_m, BLOCK_D=tile.block_d,
            WHOLE_D=values, EVEN_D=values and d == tile.block_d, VALUES=values,
            BEST=best, EXPECT=expect, HARD=hard, PEEL=int(peel),
            **tile.options,
        )  # fmt: skip
    return parts


def finish(
    q: Tensor,
    scale: Tensor,
    targets: Tensor,
    labels: Tensor,
    parts: Parts,
    out: Sequence[Tensor],
    *,
    hard: bool = False,
    statistics: bool = False,
    gradient: bool = False,
    targeted: bool = True,
) -> None:
    """Join the parts into ``out`` = (loss, gradient, nearest, row_max, row_sum, dscale).

    Written are: with ``statistics`` all but the gradient, with ``gradient`` the gradient (at scale
    0 dscale too); without ``targeted`` no loss, and acc / sum with nothing subtracted; dscale only
    where there is one."""
    slices, n = parts.row_max.shape
    with torch.cuda.device_of(q):
        finish_kernel[(triton.cdiv(n, FINISH.block_n),)](
            q, scale, targets, labels,
            parts.row_max, parts.row_sum, parts.best, parts.expected, parts.positive, parts.acc,
            *out, n, targets.shape[1], slices, len(targets), *q.stride(), *targets.stride(),
            BLOCK_N=FINISH.block_n, BLOCK_D=FINISH.block_d, HARD=hard,
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
    h, scale = addressable(h), scale.reshape(()).float()
    one_pass = need_grad and fits_attention(h)
    # fp32 weights are not rounded, so the gradient gives that of the scale.
    expect = need_grad and need_dscale and h.dtype != torch.float32
    for b, (c, m, y) in enumerate(zip(prototypes, targets, labels, strict=True)):
        c, y, hard = addressable(c), y.contiguous(), len(m) == 0
        t = c if hard else addressable(m)
        found = tuple(part[b] for part in out)
        asked = {"hard": hard, "best": need_nearest, "expect": expect}
        parts = attend(h, c, y, scale, values=one_pass, **asked)
        finish(h, scale, t, y, parts, found, hard=hard, statistics=True, gradient=one_pass)
        if need_grad and not one_pass:
            weighted_values(h, c, c, scale, row_max[b], gradient[b])
            expected = dscale[b][None] if expect else dscale[:0]
            statistics = row_max[b][None], row_sum[b][None]
            joined = Parts(*statistics, nearest[b], expected, loss[b], gradient[b][None])
            finish(h, scale, t, y, joined, found, gradient=True)
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
    labels = torch.empty(0, dtype=torch.int64, device=out.device)  # there are none
    row_max, row_sum, none = out.new_empty(k), out.new_empty(k), out.new_empty(0)
    results = (row_max, out, labels, row_max, row_sum, none)
    parts = attend(source, source, labels, scale)
    finish(source, scale, values, labels, parts, results, statistics=True, targeted=False)
    weighted_values(source, source, values, scale, row_max, out)
    parts = Parts(row_max[None], row_sum[None], labels, none, row_max, out[None])
    finish(source, scale, values, labels, parts, results, gradient=True, targeted=False)
    return out
