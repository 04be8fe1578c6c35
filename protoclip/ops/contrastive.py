"""InfoNCE and SigLIP's sigmoid loss: contract, autograd and dispatch.

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
    accumulator,
    define,
    define_gradient,
    implementation,
    reduce,
    resolve,
    wants_gradient,
    without_autocast,
)

LN2 = math.log(2.0)
FUSED_LOSS = ("triton",)  # backends whose kernels also take the loss, and weigh its gradient


def _fwd(x: Tensor, y: Tensor, scale: Tensor, offset: int, columns: bool, backend: str):
    """-> row_max [N], row_sum [N], column_max [M], column_sum [M] (both [0] without columns),
    positive [N]; fp32, base-2 logits."""
    return implementation("info_nce", backend, "contrastive_fwd")(x, y, scale, offset, columns)


def _bwd(x: Tensor, y: Tensor, scale: Tensor, *rest):
    """-> dx, dy in the inputs' dtypes, dscale fp32 []. ``column_*`` are [0] without columns.

    The positive's weight is row_weight[i] + column_weight[i + offset] (the latter where given).
    ``stash`` is that of ``contrastive``; empty or None: the logits are formed again. With a
    ``reduction`` the weights are upstream gradients of ``contrastive``; they may have stride 0."""
    *statistics, row_weight, column_weight, offset, backend = rest[:8]
    stash, reduction = (*rest[8:], None, None)[:2]
    run = implementation("info_nce", backend, "contrastive_bwd")
    kept = stash if stash is not None and stash.numel() else None
    options: dict[str, Any] = {} if kept is None else {"kept": kept}
    if reduction is not None:
        weight = _direction_weight(reduction, x.shape[0], len(column_weight) > 0)
        if backend in FUSED_LOSS:
            options["pair_weight"] = weight
        else:
            row_weight, column_weight = row_weight * weight, column_weight * weight
    return run(x, y, scale, *statistics, row_weight, column_weight, offset, **options)


def _direction_weight(reduction: str, n: int, columns: bool) -> float:
    """What the loss of a pair in one direction is multiplied by."""
    weight = 0.5 if columns else 1.0
    return weight / max(n, 1) if reduction == "mean" else weight


def _stash_size(x: Tensor, y: Tensor, backend: str, stash: bool):
    """Elements, int16, of what a backend keeps of the logits where it is asked to."""
    if not stash or backend != "cpu":
        return 0
    return implementation("info_nce", backend, "stash_size")(x.shape[0], y.shape[0])


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
    kept = x.new_empty(0, dtype=torch.int16)
    if size:
        kept = implementation("info_nce", backend, "pooled")(size)
    options = {"kept": kept} if size else {}
    weight, summed = _direction_weight(reduction, x.shape[0], columns), reduction != "none"
    if backend in FUSED_LOSS:
        fused = implementation("info_nce", backend, "contrastive")
        return *fused(x, y, scale, offset, columns, weight, summed), kept
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
    ctx.set_materialize_grads(False)  # the statistics have none


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, y, scale, *statistics, stash = ctx.saved_tensors
    row_max, _, column_max, _ = statistics
    weights = (
        grad.expand(row_max.shape),
        grad.expand(column_max.shape) if len(column_max) else column_max,
    )
    dx, dy, dscale = torch.ops.protoclip.contrastive_bwd(
        x, y, scale, *statistics, *weights, ctx.offset, ctx.backend, stash, ctx.reduction
    )
    dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dx, dy, dscale, None, None, None, None, None


define(
    "contrastive_fwd(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fake_fwd,
)
define(
    "contrastive_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_max, Tensor row_sum,"
    " Tensor column_max, Tensor column_sum, Tensor row_weight, Tensor column_weight, int offset,"
    " str backend, Tensor? stash=None, str? reduction=None) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
define(
    "contrastive(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str reduction,"
    " str backend, bool stash=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _contrastive,
    _fake_contrastive,
)
define_gradient("contrastive", "info_nce", _autograd, _setup)
define_gradient("contrastive_bwd", "info_nce")


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
    pass, but for those that ``stash`` allows to keep. Sums are fp32. Under autocast the features
    keep their dtype, as given.

    Args:
        image_features: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        text_features: [N, D] on the same device; row i belongs to image i. Where the dtypes differ
            both are promoted.
        logit_scale: [] or [1], the multiplier on the dot products (not its logarithm).
        reduction: "mean", "sum", or "none" for one value a pair.
        backend: "auto", or one of ``protoclip.backends("info_nce")``, which never falls back.
        stash: whether the forward pass may keep logits, so that the backward pass need not form
            them again: 3 matrix products in all, not 4. Only "cpu" does, in fp32 and at most 64 MiB
            (N = 4,096; beyond, nothing is kept), where gradients keep their bits. None or True:
            where that is possible. False: never, the least memory.
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
    x, y, scale = checks.pairs(op, image_features, text_features, logit_scale)
    checks.reduction(op, reduction)
    name = resolve(op, backend, x.device.type, x.dtype)
    inputs = x, y, scale
    if name == "reference":
        with without_autocast(x.device.type):
            losses = reference.info_nce(*inputs)
        return reduce(losses, reduction, len(losses))
    keep = stash is not False and wants_gradient(*inputs)
    return torch.ops.protoclip.contrastive(*inputs, 0, True, reduction, name, keep)[0]


# The sigmoid loss. Its gradient needs no statistics of whole rows, so the fused backends form it in
# the forward pass, where gradients are wanted: three products instead of four. The backward pass
# scales it.
def _sigmoid_fwd(x: Tensor, y: Tensor, *rest):
    """-> loss (sum) fp32 [], dx, dy in the inputs' dtypes ([0, D] without gradients), dscale and
    dbias fp32 []."""
    *arguments, backend = rest
    return implementation("siglip", backend, "sigmoid_loss")(x, y, *arguments)


def _sigmoid_fake(x, y, scale, bias, offset, gradients, backend):
    n, m = (len(x), len(y)) if gradients else (0, 0)
    loss, dscale, dbias = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, x.new_empty((n, x.shape[1])), y.new_empty((m, y.shape[1])), dscale, dbias


def _sigmoid_setup(ctx, inputs, output) -> None:
    _, _, scale, bias, *_ = inputs
    ctx.save_for_backward(scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _sigmoid_autograd(ctx, grad, *_):
    scale, bias, dx, dy, dscale, dbias = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    dx, dy = (torch.ops.protoclip.sigmoid_loss_bwd(grad, g) for g in (dx, dy))
    dscale, dbias = (
        torch.ops.protoclip.sigmoid_loss_bwd(grad, g).to(like.dtype).reshape(like.shape)
        for g, like in ((dscale, scale), (dbias, bias))
    )
    return dx, dy, dscale, dbias, None, None, None


define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, int offset, bool gradients,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_fwd,
    _sigmoid_fake,
)
define_gradient("sigmoid_loss", "sigmoid_loss", _sigmoid_autograd, _sigmoid_setup)
# An op of its own, so that a second derivative raises instead of ignoring that ``saved`` depends on
# the inputs.
define(
    "sigmoid_loss_bwd(Tensor grad, Tensor saved) -> Tensor",
    lambda grad, saved: (grad.float() * saved).to(saved.dtype),
    lambda grad, saved: torch.empty_like(saved),
)
define_gradient("sigmoid_loss_bwd", "sigmoid_loss")


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sum over all pairs (i, j) of softplus(-z_ij (scale x_i.y_j + bias)), never an [N, M] matrix.

    Args:
        image_features: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        text_features: [M, D], M >= offset + N, on the same device; different dtypes are promoted.
        logit_scale, logit_bias: [] or [1].
        offset: z_ij is 1 where j = i + offset, else -1.
        backend: "auto", or one of ``protoclip.backends("siglip")``, which never falls back.
    Returns:
        float32 [] (float64 for float64 input), nats, the sum (SigLIP divides it by N).
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point.
        NotImplementedError: forward-mode differentiation of a fused backend.
    Source:
        Zhai et al. 2023 (SigLIP), equation 1.
    """
    op = "sigmoid_loss"
    checks.matrix(op, "image_features", image_features, "[N, D]")
    checks.matrix(op, "text_features", text_features, "[M, D]")
    checks.like(op, "text_features", text_features, "image_features", image_features)
    n, m = len(image_features), len(text_features)
    if offset < 0 or offset + n > m:
        raise ValueError(
            f"{op}: expected image i's text at row i + offset, got {n} images, {m} texts and "
            f"offset {offset}"
        )
    x, y = checks.promoted(image_features, text_features)
    scale = checks.scalar(op, "logit_scale", logit_scale, x.device)
    bias = checks.scalar(op, "logit_bias", logit_bias, x.device)
    name = resolve("siglip", backend, x.device.type, x.dtype)
    if name == "reference":
        with without_autocast(x.device.type):
            return reference.sigmoid_loss(x, y, scale, bias, offset)
    inputs = x, y, scale, bias
    gradients = wants_gradient(*inputs)
    return torch.ops.protoclip.sigmoid_loss(*inputs, offset, gradients, name)[0]
