"""InfoNCE: contract, autograd and dispatch.

All fused backends share one strip: rows x [N, D] against columns y [M, D], row i belonging to
column i + offset. Statistics are in base-2 logits (s2 = scale * log2(e) * x.y), as a reference
value ``max`` and ``sum`` of 2^(s2 - max), so that a loss near zero does not cancel. The backward of
any loss built on the strip is G = row_weight * P_row + column_weight * P_column - (weights at the
positives), dx = scale * G y, dy = scale * G^T x, dscale = sum G * (x.y).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from protoclip.ops import checks, reference
from protoclip.ops.backends import (
    implementation,
    register_gradient,
    resolve,
    wants_gradient,
    without_autocast,
)

LN2 = math.log(2.0)
FUSED_LOSS = ("triton",)  # backends whose kernels also take the loss, and weigh its gradient
# Backends with a stash: True where it costs no bit, so that they keep it unless told not to.
KEEP_LOGITS = {"cpu": True}
# The rounding errors of so few terms do not average out, and in fp64 they cost next to nothing.
FEW_PAIRS = 16


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of sums and losses: fp32, or fp64 for fp64 input (reference only)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


_lib = torch.library.Library("protoclip", "FRAGMENT")
_lib.define(
    "contrastive_fwd(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "contrastive_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_max, Tensor row_sum,"
    " Tensor column_max, Tensor column_sum, Tensor row_weight, Tensor column_weight, int offset,"
    " str backend, Tensor? stash=None, str? reduction=None) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "contrastive(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str reduction,"
    " str backend, bool stash=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fwd(x: Tensor, y: Tensor, scale: Tensor, offset: int, columns: bool, backend: str):
    """-> row_max [N], row_sum [N], column_max [M], column_sum [M] (both [0] without columns),
    positive [N]; fp32, base-2 logits."""
    return implementation("info_nce", backend, "contrastive_fwd")(x, y, scale, offset, columns)


def _bwd(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    column_max: Tensor,
    column_sum: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    offset: int,
    backend: str,
    stash: Tensor | None = None,
    reduction: str | None = None,
):
    """-> dx, dy in the inputs' dtypes, dscale fp32 []. ``column_*`` are [0] without columns.

    The positive's weight is row_weight[i] + column_weight[i + offset] (the latter where given).
    ``stash`` is that of ``contrastive``; empty or None: the logits are formed again. With a
    ``reduction`` the weights are upstream gradients of ``contrastive``; they may have stride 0."""
    if reduction is not None and _few(x, y):
        return _few_bwd(x, y, scale, row_weight, column_weight, offset, reduction)
    run = implementation("info_nce", backend, "contrastive_bwd")
    kept = stash if stash is not None and stash.numel() else None
    options: dict[str, Any] = {} if kept is None else {"kept": kept}
    if reduction is not None:
        weight = _direction_weight(reduction, x.shape[0], len(column_max) > 0)
        if backend in FUSED_LOSS:
            options["pair_weight"] = weight
        else:
            row_weight, column_weight = row_weight * weight, column_weight * weight
    statistics = row_max, row_sum, column_max, column_sum
    return run(x, y, scale, *statistics, row_weight, column_weight, offset, **options)


def _direction_weight(reduction: str, n: int, columns: bool) -> float:
    """What the loss of a pair in one direction is multiplied by."""
    weight = 0.5 if columns else 1.0
    return weight / max(n, 1) if reduction == "mean" else weight


def _few(x: Tensor, y: Tensor) -> bool:
    return x.shape[0] > 0 and y.shape[0] <= FEW_PAIRS


def _few_bwd(x, y, scale, row_weight, column_weight, offset, reduction):
    """Gradients of ``contrastive`` from the start, in fp64: fp32 statistics would round them."""
    columns = len(column_weight) > 0
    weight = _direction_weight(reduction, x.shape[0], columns)
    wide = x.double(), y.double(), scale.double()
    statistics = reference.contrastive_fwd(*wide, offset, columns)[:4]
    weights = row_weight.double() * weight, column_weight.double() * weight
    dx, dy, dscale = reference.contrastive_bwd(*wide, *statistics, *weights, offset)
    return dx.to(x.dtype), dy.to(y.dtype), dscale.to(accumulator(x))


def _stash_size(x: Tensor, y: Tensor, backend: str, stash: bool):
    """Elements, int16, of what a backend keeps of the logits where it is asked to."""
    if not stash or backend not in KEEP_LOGITS or _few(x, y):
        return 0
    return implementation("info_nce", backend, "stash_size")(x.shape[0], y.shape[0])


def _new_stash(x: Tensor, size: int, backend: str) -> Tensor:
    if size and backend == "cpu":
        return implementation("info_nce", backend, "new_stash")(size)
    return x.new_empty(size, dtype=torch.int16)


def _contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: int,
    columns: bool,
    reduction: str,
    backend: str,
    stash: bool = False,
):
    """-> the loss, then what is kept for backward: the four statistics and the stash (or [0]).

    The loss of a row; with columns, which takes as many as rows, half the sum of both directions.
    [N], or [] for "mean" and "sum"."""
    size = _stash_size(x, y, backend, stash)
    kept = _new_stash(x, size, backend)
    options = {"kept": kept} if size else {}
    weight, summed = _direction_weight(reduction, x.shape[0], columns), reduction != "none"
    if _few(x, y):
        wide = x.double(), y.double(), scale.double()
        stats = reference.contrastive_fwd(*wide, offset, columns)
        loss = _pair_losses(stats, weight, summed)
        return *(t.to(accumulator(x)) for t in (loss, *stats[:4])), kept
    if backend in FUSED_LOSS:
        fused = implementation("info_nce", backend, "contrastive")
        return *fused(x, y, scale, offset, columns, weight, summed, **options), kept
    run = implementation("info_nce", backend, "contrastive_fwd")
    stats = run(x, y, scale, offset, columns, **options)
    return _pair_losses(stats, weight, summed), *stats[:4], kept


def _pair_losses(statistics, weight, summed):
    row_max, row_sum, column_max, column_sum, positive = statistics
    loss = row_sum.log2() + (row_max - positive)
    if len(column_max):
        loss = loss + (column_sum.log2() + (column_max - positive))
    return (loss.sum() if summed else loss) * (LN2 * weight)


def _fake_fwd(x, y, scale, offset, columns, backend):
    n, m = x.shape[0], y.shape[0] if columns else 0
    return tuple(x.new_empty(s, dtype=accumulator(x)) for s in (n, n, m, m, n))


def _fake_bwd(x, y, scale, *_):
    dx, dy = (t.new_empty(t.shape) for t in (x, y))
    return dx, dy, x.new_empty((), dtype=accumulator(x))


def _fake_contrastive(x, y, scale, offset, columns, reduction, backend, stash=False):
    n, m = x.shape[0], y.shape[0] if columns else 0
    shapes = (n if reduction == "none" else ()), n, n, m, m
    kept = x.new_empty(_stash_size(x, y, backend, stash), dtype=torch.int16)
    return *(x.new_empty(s, dtype=accumulator(x)) for s in shapes), kept


def _setup(ctx, inputs, output) -> None:
    x, y, scale, ctx.offset, _, ctx.reduction, ctx.backend, _ = inputs
    ctx.save_for_backward(x, y, scale, *output[1:])
    ctx.set_materialize_grads(False)  # those of the statistics: nobody's


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, y, scale, row_max, row_sum, column_max, column_sum, stash = ctx.saved_tensors
    dx, dy, dscale = torch.ops.protoclip.contrastive_bwd(
        x,
        y,
        scale,
        row_max,
        row_sum,
        column_max,
        column_sum,
        grad.expand(row_max.shape),
        grad.expand(column_max.shape) if column_max.shape[0] else column_max,
        ctx.offset,
        ctx.backend,
        stash,
        ctx.reduction,
    )
    dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dx, dy, dscale, None, None, None, None, None


for _name, _impl, _fake in (
    ("contrastive_fwd", _fwd, _fake_fwd),
    ("contrastive_bwd", _bwd, _fake_bwd),
    ("contrastive", _contrastive, _fake_contrastive),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"protoclip::{_name}", _fake, lib=_lib)
register_gradient(_lib, "contrastive", "info_nce", _autograd, _setup)


def no_second_derivative(op: str):
    """The autograd formula of a backward op: a refusal, where torch would only warn."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op}: its fused backends have no second derivative; use backend='reference' for it"
        )

    return refuse


register_gradient(_lib, "contrastive_bwd", "info_nce", no_second_derivative("info_nce"))


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
) -> Tensor:
    """InfoNCE over a batch of pairs, both directions, without the [N, N] logits in memory.

    The fused backends save O(N) values and form the logits again, tile by tile, in the backward
    pass, but for those that ``stash`` allows to keep. Sums are fp32; up to 16 pairs are computed in
    fp64. Under autocast the features keep their dtype, as given.

    Args:
        image_features: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        text_features: [N, D] on the same device; row i belongs to image i. Where the dtypes differ
            both are promoted.
        logit_scale: [] or [1], the multiplier on the dot products (not its logarithm).
        reduction: "mean", "sum", or "none" for one value a pair.
        backend: "auto", or one of ``protoclip.backends("info_nce")``, which never falls back.
        stash: whether the forward pass may keep logits, so that the backward pass need not form
            them again: 3 matrix products in all, not 4. None: only where gradients keep their
            bits, which is "cpu", in fp32 and at most 64 MiB (N = 4,096; beyond, nothing is kept).
            True: "triton" too, in 2 bytes each and at most 2 GiB (N = 32,768); in the gradients
            each negative's probability is off by up to 0.07 % at any scale (its base-2 logit by
            2^-10), a third of what bf16 features round anyway, but far more than float32 features
            do. False: never, the least memory. The loss is the same in all cases.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N], half the sum of the two
        directions. N = 0 gives 0.
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point.
        NotImplementedError: forward-mode differentiation of a fused backend.
    Source:
        Radford et al. 2021 (CLIP), figure 3.
    """
    op = "info_nce"
    checks.matrix(op, "image_features", image_features, "[N, D]")
    checks.matrix(op, "text_features", text_features, "[N, D]")
    checks.like(op, "text_features", text_features, "image_features", image_features)
    if len(image_features) != len(text_features):
        raise ValueError(
            f"{op}: expected one text per image, got image_features {tuple(image_features.shape)} "
            f"and text_features {tuple(text_features.shape)}"
        )
    checks.reduction(op, reduction)
    x, y = checks.promoted(image_features, text_features)
    scale = checks.scalar(op, "logit_scale", logit_scale, x.device)
    name = resolve(op, backend, x.device.type, x.dtype)
    inputs = x, y, scale
    if name == "reference":
        with without_autocast(x.device.type):
            losses = reference.info_nce(*inputs)
        return reduce(losses, reduction, len(losses))
    keep = KEEP_LOGITS.get(name, False) if stash is None else stash
    keep = keep and wants_gradient(*inputs)
    return torch.ops.protoclip.contrastive(*inputs, 0, True, reduction, name, keep)[0]


def reduce(losses: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    """Mean (0 for no rows), sum, or the rows themselves."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
