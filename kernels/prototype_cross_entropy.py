"""Prototype cross-entropy on a GPU: launchers (contract: protoclip/ops/prototypes.py).

16-bit rows of D <= 256: one attention pass with key = value = C gives loss and gradient, 2 products
of [N, K, D] and O(slices N D) memory. Wider or fp32 rows (one-pass fp32 tiles spill): a pass for
the statistics, then weights W_ik = 2^(step (s_ik - max_i)), recomputed for one wave of rows after
the other into a bounded scratch, and a GEMM W V for each: 3 products. The gradient of the keys is
G^T q by waves of keys, G_ik = w_i (W_ik / sum_i - [y_i = k]). No sum crosses waves: no atomics.
Logits are exact to fp32. Weights are rounded to the inputs' dtype before they are multiplied with
the values; for fp32 ``torch.backends.cuda.matmul`` decides. The scale is read
on the device.

The finish joins the slices of attention.py:
    loss_i = ln 2 (log2 sum_i + step (max_i - s_iy)),   gradient_i = acc_i / sum_i - t_y,
    dscale_i = sign (expected_i / sum_i - s_iy), or, of fp32 rows and at scale 0, which
leaves no s, q_i . gradient_i,
with t = m (soft targets: s_iy is a dot product with m_y) or t = C (hard labels: s_iy comes from
attention.py). Label -100 gives zeros, any other label outside [0, K) a NaN loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoclip.kernels import launch
from protoclip.kernels.attention import attention_kernel, load_tile, split_scale
from protoclip.kernels.launch import cdiv
from protoclip.kernels.results import SampleLosses, ScaledGradients
from protoclip.kernels.scratch import PROTOTYPE_BYTES
from protoclip.kernels.tiles import LEFT_OUT, LN2, products, tile_options, tile_origin
from protoclip.kernels.waves import multiply

# G is at most 1 after dividing by the largest weight; this keeps small entries normal in fp16.
G_UNIT = 4096.0


# Rows of [S, N] begin anywhere; another alignment would compile the kernel again.
ROW_VECTORS = ["labels_ptr", "loss_ptr", "nearest_ptr", "row_max_ptr", "row_sum_ptr", "dscale_ptr"]


@triton.jit(do_not_specialize=["n", "slices"], do_not_specialize_on_alignment=ROW_VECTORS)
def join_slices_kernel(
    q_ptr, logit_scale_ptr, target_ptr, labels_ptr,  # [N, D], [], [K, D], [N]
    max_ptr, sum_ptr, best_ptr, expected_ptr,  # [slices, N]
    positive_ptr, acc_ptr,  # [N], [slices, N, D]; joined, acc may be the gradient
    partial_ptr,  # [2, programs] or None: sum of the losses, number of labels
    loss_ptr, gradient_ptr, nearest_ptr, row_max_ptr, row_sum_ptr, dscale_ptr,  # [N], [N, D], ...
    n, d, slices, k,
    stride_q_n, stride_q_d, stride_t_k, stride_t_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HARD: tl.constexpr,
    BEST: tl.constexpr, EXPECT: tl.constexpr, GRADIENT: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Join the slices of a tile of rows; where JOINED acc is [N, D] and joined already."""
    sign, step = split_scale(logit_scale_ptr)
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
        if EXPECT:
            expected += tl.load(expected_ptr + part, mask=used, other=0.0) * factor
    if BEST:
        tl.store(nearest_ptr + rows, best, mask=used)
    tl.store(row_max_ptr + rows, row_max, mask=used)
    tl.store(row_sum_ptr + rows, row_sum, mask=used)
    label = tl.load(labels_ptr + rows, mask=used, other=LEFT_OUT)
    labelled = (label >= 0) & (label < k)
    if HARD:
        positive = tl.load(positive_ptr + rows, mask=used, other=0.0)
    else:
        positive = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            q = load_tile(q_ptr, rows, used, columns, d, stride_q_n, stride_q_d, False)
            m = load_tile(target_ptr, label, labelled, columns, d, stride_t_k, stride_t_d, False)
            positive += tl.sum(q.to(tl.float32) * m.to(tl.float32), 1)
        positive *= sign
    loss = LN2 * (tl.log2(row_sum) + step * (row_max - positive))
    absent = tl.where(label == LEFT_OUT, 0.0, float("nan"))
    loss = tl.where(labelled, loss, absent)
    if partial_ptr is None:
        tl.store(loss_ptr + rows, loss, mask=used)
    else:
        at = partial_ptr + tl.program_id(0)
        tl.store(at, tl.sum(loss))
        tl.store(at + tl.num_programs(0), tl.sum(tl.where(label == LEFT_OUT, 0.0, 1.0)))
    if GRADIENT:
        dscale = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_D):
            columns = tl.max_contiguous(start + tl.arange(0, BLOCK_D), [4])  # as in waves.py
            mask = used[:, None] & (columns < d)[None, :]
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for j in range(1 if JOINED else slices):
                part = tl.cast(j, tl.int64) * n + rows
                more = tl.load(acc_ptr + part[:, None] * d + columns[None, :], mask=mask, other=0.0)
                if not JOINED:
                    part_max = tl.load(max_ptr + part, mask=used, other=0.0)
                    more *= tl.exp2((part_max - row_max) * step)[:, None]
                acc += more
            acc /= row_sum[:, None]
            t = load_tile(target_ptr, label, labelled, columns, d, stride_t_k, stride_t_d, False)
            acc = tl.where(labelled[:, None], acc - t.to(tl.float32), 0.0)
            if dscale_ptr is not None:
                q = load_tile(q_ptr, rows, used, columns, d, stride_q_n, stride_q_d, False)
                dscale += tl.sum(q.to(tl.float32) * acc, 1)
            tl.store(gradient_ptr + rows[:, None] * d + columns[None, :], acc, mask=mask)
        if EXPECT:
            difference = tl.where(labelled, sign * (expected / row_sum - positive), 0.0)
            dscale = tl.where(sign == 0, dscale, difference)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + rows, dscale, mask=used)


@triton.jit(do_not_specialize=["parts"])
def reduce_kernel(
    partial_ptr, parts, loss_ptr, divisor_ptr,  # [2, parts], [], []
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the losses over a count: with MEAN the number of labels, else 1."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < parts, other=0.0)
        count += tl.load(partial_ptr + parts + at, mask=at < parts, other=0.0)
    divisor = 1.0
    if MEAN:
        divisor = tl.maximum(tl.sum(count), 1.0)
    tl.store(loss_ptr, tl.sum(total) / divisor)
    tl.store(divisor_ptr, divisor)


@triton.jit(
    do_not_specialize=["n", "stride_grad"],
    do_not_specialize_on_alignment=["grad_ptr", "scale_gradient_ptr"],
)
def scale_samples_kernel(
    grad_ptr, divisor_ptr, stride_grad,  # [N] or [], [] or None
    logit_scale_ptr, gradient_ptr, scale_gradient_ptr,  # [], [N, D] or None, [N] or None
    dfeatures_ptr, dlogit_scale_ptr,  # [N, D], []
    n, d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Saved gradients times the upstream one: rows of the features', then the scale's."""
    divisor = 1.0
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr)
    program = tl.program_id(0)
    if program < tl.cdiv(n, BLOCK_N):
        if gradient_ptr is not None:
            rows = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
            columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            columns = tl.max_contiguous(columns, [4])  # a thread, as in waves.py
            mask = (rows < n)[:, None] & (columns < d)[None, :]
            weight = tl.load(grad_ptr + rows * stride_grad, mask=rows < n, other=0.0)
            weight = weight.to(tl.float32) * (tl.load(logit_scale_ptr).to(tl.float32) / divisor)
            at = rows[:, None] * d + columns[None, :]
            value = weight[:, None] * tl.load(gradient_ptr + at, mask=mask, other=0.0)
            tl.store(dfeatures_ptr + at, value.to(dfeatures_ptr.dtype.element_ty), mask=mask)
    elif tl.program_id(1) == 0:
        total = tl.zeros((1024,), tl.float32)
        if scale_gradient_ptr is not None:
            for start in range(0, n, 1024):
                at = start + tl.arange(0, 1024)
                grad = tl.load(grad_ptr + at.to(tl.int64) * stride_grad, mask=at < n, other=0.0)
                scale_gradient = tl.load(scale_gradient_ptr + at, mask=at < n, other=0.0)
                total += grad.to(tl.float32) * scale_gradient
        tl.store(dlogit_scale_ptr, tl.sum(total) / divisor)


@triton.jit(
    do_not_specialize=["n", "k", "first_key"],
    do_not_specialize_on_alignment=["labels_ptr", "max_ptr", "sum_ptr", "weight_ptr"],
)
def weights_kernel(
    q_ptr, logit_scale_ptr, key_ptr,  # [N, D], [], [K, D]
    labels_ptr, max_ptr, sum_ptr, weight_ptr,  # [N]; without GRADIENT only max
    out_ptr,  # [N, K], contiguous
    n, k, d, first_key, strides,
    UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, GRADIENT: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """W, or UNIT * G where GRADIENT. first_key: of this wave. All tiles are on the grid's first
    axis: the second ends at 65,535, which 4.2 million keys would exceed."""
    row0, col0 = tile_origin(tl.program_id(0), n, k, BLOCK_N, BLOCK_M, 8)
    rows = row0 + tl.arange(0, BLOCK_N)
    cols = col0 + tl.arange(0, BLOCK_M)
    used = rows < n
    sign, step = split_scale(logit_scale_ptr)
    s = sign * products(
        q_ptr, key_ptr, row0, col0, n, k, d, strides, BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D
    )
    w = tl.exp2((s - tl.load(max_ptr + rows, mask=used, other=0.0)[:, None]) * step)
    if GRADIENT:
        label = tl.load(labels_ptr + rows, mask=used, other=LEFT_OUT)
        w = w / tl.load(sum_ptr + rows, mask=used, other=1.0)[:, None]
        if HARD:
            w = tl.where(label[:, None] == (first_key + cols)[None, :], w - 1.0, w)
        weight = tl.load(weight_ptr + rows, mask=used, other=0.0)
        w = tl.where((label >= 0)[:, None], w * (weight * UNIT)[:, None], 0.0)
    pointers = out_ptr + rows.to(tl.int64)[:, None] * k + cols[None, :]
    mask = used[:, None] & (cols < k)[None, :]
    tl.store(pointers, w.to(out_ptr.dtype.element_ty), mask=mask)


class Slices(NamedTuple):
    """Softmax statistics by slices of the keys, not yet joined (attention.py)."""

    row_max: Tensor  # [slices, N]
    row_sum: Tensor  # [slices, N]
    best: Tensor  # int64 [slices, N], or [slices, 0] where not asked for
    expected: Tensor  # [slices, N], or [slices, 0] where not asked for
    positive: Tensor  # [N], the label's product where labels are hard
    acc: Tensor  # [slices, N, D], or [slices, N, 0] without values


class KeyGradient(NamedTuple):
    """What turns weights W into the gradient G of the logits."""

    labels: Tensor  # int64 [N]
    row_sum: Tensor  # [N]
    weight: Tensor  # [N]
    hard: bool


def attend(
    q: Tensor,
    keys: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    *,
    values: bool = False,
    hard: bool = False,
    best: bool = False,
    expect: bool = False,
) -> Slices:
    """One pass over the keys, which are the values too; labels are read where they are hard."""
    n, d = q.shape
    k = len(keys)
    config = launch.prototype_config(q, full=best and expect, values=values)
    row_tiles = cdiv(n, config.block_n)
    # A separate tail takes registers, which only Hopper's one-pass configurations can spare.
    peel = values and launch.architecture(q.device) in (None, 90)
    # The interpreter's are few, so that keys are cut into slices.
    cores = launch.num_sms(q.device) if q.is_cuda else 8
    slices = key_slices(row_tiles, cdiv(k, config.block_m), cores * config.ctas_per_sm)
    row_max = q.new_empty((slices, n), dtype=torch.float32)
    parts = Slices(
        row_max=row_max,
        row_sum=torch.empty_like(row_max),
        best=row_max.new_empty((slices, n if best else 0), dtype=torch.int64),
        expected=row_max.new_empty((slices, n if expect else 0)),
        positive=row_max.new_empty(n),
        acc=row_max.new_empty((slices, n, d if values else 0)),
    )
    with torch.cuda.device_of(q):
        attention_kernel[(row_tiles, slices)](
            q_ptr=q, logit_scale_ptr=logit_scale, key_ptr=keys, labels_ptr=labels,
            max_ptr=parts.row_max, sum_ptr=parts.row_sum,
            best_ptr=parts.best, expected_ptr=parts.expected,
            positive_ptr=parts.positive, acc_ptr=parts.acc,
            n=n, k=k, d=d, slices=slices, strides=(*q.stride(), *keys.stride()),
            VALUES=values, BEST=best, EXPECT=expect, HARD=hard, PEEL=int(peel),
            **tile_options(d, config),
        )  # fmt: skip
    return parts


def finish(
    q: Tensor,
    logit_scale: Tensor,
    targets: Tensor,
    labels: Tensor,
    parts: Slices,
    out: SampleLosses,
    *,
    hard: bool,
    partial: Tensor | None,
    gradient: bool = False,
    joined: bool = False,
) -> None:
    """Join the parts, whose acc may be ``joined`` already, into the results; the
    gradients with ``gradient`` only. Losses go to ``partial`` sums if there are such."""
    slices, n = parts.row_max.shape
    config = launch.JOIN_SLICES
    with torch.cuda.device_of(q):
        join_slices_kernel[(cdiv(n, config.block_n),)](
            q_ptr=q, logit_scale_ptr=logit_scale, target_ptr=targets, labels_ptr=labels,
            max_ptr=parts.row_max, sum_ptr=parts.row_sum,
            best_ptr=parts.best, expected_ptr=parts.expected,
            positive_ptr=parts.positive, acc_ptr=parts.acc, partial_ptr=partial,
            loss_ptr=out.loss, gradient_ptr=out.gradient, nearest_ptr=out.nearest,
            row_max_ptr=out.row_max, row_sum_ptr=out.row_sum,
            dscale_ptr=out.scale_gradient if out.scale_gradient.numel() else None,
            n=n, d=targets.shape[1], slices=slices, k=len(targets),
            stride_q_n=q.stride(0), stride_q_d=q.stride(1),
            stride_t_k=targets.stride(0), stride_t_d=targets.stride(1),
            HARD=hard, BEST=parts.best.numel() > 0, EXPECT=parts.expected.numel() > 0,
            GRADIENT=gradient, JOINED=joined,
            BLOCK_N=config.block_n, BLOCK_D=config.block_d, **config.options,
        )  # fmt: skip


def key_slices(row_tiles: int, key_tiles: int, cores: int) -> int:
    """How many slices of the keys make the programs fill the card.

    A slice has at least four tiles of keys; the first count whose last wave is nearly full wins.
    """
    longest = max(1, min(key_tiles // 4, max(8, cores // max(1, row_tiles))))
    waves = {slices: row_tiles * slices / cores for slices in range(1, longest + 1)}
    fullness = {slices: count / math.ceil(count) for slices, count in waves.items()}
    fullest = max(fullness, key=lambda slices: fullness[slices])
    return next((slices for slices in fullness if fullness[slices] >= 0.85), fullest)


def weights(
    q: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    row_max: Tensor,
    *,
    first_key: int = 0,
    gradient: KeyGradient | None = None,
) -> Tensor:
    """W [N, K] in q's dtype, or G_UNIT * G with ``gradient``."""
    n, d = q.shape
    k = len(keys)
    out = q.new_empty((n, k))
    config = launch.prototype_config(q)
    with torch.cuda.device_of(q):
        weights_kernel[(cdiv(n, config.block_n) * cdiv(k, config.block_m),)](
            q_ptr=q, logit_scale_ptr=logit_scale, key_ptr=keys, max_ptr=row_max,
            labels_ptr=None if gradient is None else gradient.labels,
            sum_ptr=None if gradient is None else gradient.row_sum,
            weight_ptr=None if gradient is None else gradient.weight,
            out_ptr=out, n=n, k=k, d=d, first_key=first_key,
            strides=(*q.stride(), *keys.stride()), UNIT=G_UNIT, GRADIENT=gradient is not None,
            HARD=gradient is not None and gradient.hard, **tile_options(d, config),
        )  # fmt: skip
    return out


def _wave(other: int, itemsize: int) -> int:
    """Rows of a wave whose other side is ``other`` keys (or the reverse): at least 16."""
    return max(16, PROTOTYPE_BYTES // (max(1, other) * itemsize) // 16 * 16)


def weighted_values(
    q: Tensor, keys: Tensor, values: Tensor, logit_scale: Tensor, row_max: Tensor, out: Tensor
) -> None:
    """out [N, DV] fp32 = sum_k W_ik v_k."""
    rows = _wave(len(keys), q.element_size())
    for first in range(0, len(q), rows):
        wave = slice(first, first + rows)
        multiply(weights(q[wave], keys, logit_scale, row_max[wave]), values, out[wave])


def prototype_cross_entropy_fwd(
    features: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    need_grad: bool,
    need_nearest: bool,
    need_scale_gradient: bool,
    reduction: str,
) -> SampleLosses:
    """The losses, as in ops/prototypes.py."""
    n, d = features.shape
    row_max = features.new_empty(n, dtype=torch.float32)
    graded = n if need_grad else 0
    by_row = reduction == "none"
    out = SampleLosses(
        loss=row_max.new_empty((n,) if by_row else ()),
        divisor=row_max.new_empty((0,) if by_row else ()),
        gradient=row_max.new_empty((graded, d)),
        nearest=row_max.new_empty(n if need_nearest else 0, dtype=torch.int64),
        row_max=row_max,
        row_sum=torch.empty_like(row_max),
        scale_gradient=row_max.new_empty(graded if need_scale_gradient else 0),
    )
    if not n:
        return out._replace(loss=torch.zeros_like(out.loss), divisor=torch.ones_like(out.divisor))
    partial = None
    if not by_row:
        partial = row_max.new_empty((2, cdiv(n, launch.JOIN_SLICES.block_n)))
    logit_scale = logit_scale.reshape(()).float()
    half = features.dtype != torch.float32
    one_pass = need_grad and half and d <= launch.WIDEST_ATTENTION
    # fp32 weights are not rounded, so the features' gradient gives that of the scale.
    expect = need_grad and need_scale_gradient and half
    features = features.contiguous()
    keys = prototypes.contiguous()
    labels = labels.contiguous()
    hard = len(targets) == 0
    targets = keys if hard else targets
    parts = attend(
        features,
        keys,
        labels,
        logit_scale,
        values=one_pass,
        hard=hard,
        best=need_nearest,
        expect=expect,
    )
    finish(
        features,
        logit_scale,
        targets,
        labels,
        parts,
        out,
        hard=hard,
        partial=partial,
        gradient=one_pass,
    )
    if partial is not None:
        config = launch.REDUCE
        with torch.cuda.device_of(features):
            reduce_kernel[(1,)](
                partial_ptr=partial, parts=partial.shape[1],
                loss_ptr=out.loss, divisor_ptr=out.divisor,
                MEAN=reduction == "mean", BLOCK=config.block_n, **config.options,
            )  # fmt: skip
    if need_grad and not one_pass:
        weighted_values(features, keys, keys, logit_scale, out.row_max, out.gradient)
        finish(
            features,
            logit_scale,
            targets,
            labels,
            parts._replace(acc=out.gradient),
            out,
            hard=hard,
            partial=partial,
            gradient=True,
            joined=True,
        )
    return out


def prototype_cross_entropy_scale(
    grad: Tensor,
    divisor: Tensor,
    logit_scale: Tensor,
    gradient: Tensor,
    scale_gradient: Tensor,
    features: Tensor,
) -> ScaledGradients:
    """The saved gradients times the upstream one, as in ops/prototypes.py."""
    n, d = features.shape
    scaled = ScaledGradients(
        dfeatures=features.new_empty(gradient.shape),
        dlogit_scale=features.new_empty((), dtype=torch.float32),
    )
    config = launch.FINISH
    grid = (cdiv(n, config.block_n) + 1, max(1, cdiv(d, config.block_d)))
    with torch.cuda.device_of(features):
        scale_samples_kernel[grid](
            grad_ptr=grad, divisor_ptr=divisor if divisor.numel() else None,
            stride_grad=grad.stride(0) if grad.ndim else 0,
            logit_scale_ptr=logit_scale,
            gradient_ptr=gradient.contiguous() if gradient.numel() else None,
            scale_gradient_ptr=scale_gradient.contiguous() if scale_gradient.numel() else None,
            dfeatures_ptr=scaled.dfeatures, dlogit_scale_ptr=scaled.dlogit_scale,
            n=n, d=d, BLOCK_N=config.block_n, BLOCK_D=config.block_d, **config.options,
        )  # fmt: skip
    return scaled


def prototype_cross_entropy_bwd(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    weight: Tensor,
    hard: bool,
) -> Tensor:
    """logit_scale * sum_i w_i (p_ik - [hard and y_i = k]) h_i, [K, D] in the prototypes' dtype."""
    out = torch.zeros_like(prototypes, memory_format=torch.contiguous_format)
    if not len(features) or not out.numel():
        return out
    logit_scale = logit_scale.reshape(()).float()
    largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    factor = logit_scale * largest / G_UNIT
    gradient = KeyGradient(
        labels=labels.contiguous(),
        row_sum=row_sum.contiguous(),
        weight=(weight / largest).contiguous(),
        hard=hard,
    )
    row_max = row_max.contiguous()
    columns = _wave(len(features), features.element_size())
    for first in range(0, len(prototypes), columns):
        wave = slice(first, first + columns)
        g = weights(
            features, prototypes[wave], logit_scale, row_max, first_key=first, gradient=gradient
        )
        out[wave] = factor * multiply(g.T, features)
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
    source = source_centroids.float().contiguous()
    values = prototypes.float().contiguous()
    logit_scale = torch.full((), 1 / temperature, dtype=torch.float32, device=out.device)
    no_labels = torch.empty(0, dtype=torch.int64, device=out.device)
    parts = attend(source, source, no_labels, logit_scale)
    row_max = parts.row_max.amax(dim=0)
    factors = ((parts.row_max - row_max) / temperature).exp()
    row_sum = (parts.row_sum * factors).sum(dim=0)
    weighted_values(source, source, values, logit_scale, row_max, out)
    return out.div_(row_sum[:, None])
