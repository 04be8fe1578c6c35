"""InfoNCE: contract, autograd and dispatch.

All fused backends share one strip: rows x [N, D] against columns y [M, D], row i belonging to
column i + offset. Statistics are in base-2 logits (s2 = scale * log2(e) * x.y), as a reference
value ``max`` and ``sum`` of 2^(s2 - max), so that a loss near zero does not cancel. The backward of
any loss built on the strip is G = row_weight * P_row + column_weight * P_column - (weights at the
positives), dx = scale * G y, dy = scale * G^T x, dscale = sum G * (x.y).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protoclip.ops import checks, reference
from protoclip.ops.backends import implementation, resolve

LN2 = math.log(2.0)


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
    " str backend) -> (Tensor, Tensor, Tensor)"
)
_lib.define(
    "contrastive(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
):
    """-> dx, dy in the inputs' dtypes, dscale fp32 []. ``column_*`` are [0] without columns.

    The positive's weight is row_weight[i] + column_weight[i + offset] (the latter where given)."""
    run = implementation("info_nce", backend, "contrastive_bwd")
    return run(
        x,
        y,
        scale,
        row_max,
        row_sum,
        column_max,
        column_sum,
        row_weight,
        column_weight,
        offset,
    )


def _contrastive(x: Tensor, y: Tensor, scale: Tensor, offset: int, columns: bool, backend: str):
    """-> row losses [N], column losses [N] (or [0]), then the four statistics kept for backward."""
    stats = torch.ops.protoclip.contrastive_fwd(x, y, scale, offset, columns, backend)
    row_max, row_sum, column_max, column_sum, positive = stats
    row_loss = LN2 * (row_sum.log2() + (row_max - positive))
    column_loss = LN2 * (column_sum.log2() + (column_max - positive)) if columns else row_loss[:0]
    return row_loss, column_loss.clone(), row_max, row_sum, column_max, column_sum


def _fake_fwd(x, y, scale, offset, columns, backend):
    n, m = x.shape[0], y.shape[0] if columns else 0
    return tuple(x.new_empty(s, dtype=accumulator(x)) for s in (n, n, m, m, n))


def _fake_bwd(x, y, scale, *_):
    dx, dy = (t.new_empty(t.shape) for t in (x, y))
    return dx, dy, x.new_empty((), dtype=accumulator(x))


def _fake_contrastive(x, y, scale, offset, columns, backend):
    n, m = x.shape[0], y.shape[0] if columns else 0
    sizes = (n, n if columns else 0, n, n, m, m)
    return tuple(x.new_empty(s, dtype=accumulator(x)) for s in sizes)


def _setup(ctx, inputs, output) -> None:
    x, y, scale, ctx.offset, ctx.columns, ctx.backend = inputs
    ctx.save_for_backward(x, y, scale, *output[2:])


def _autograd(ctx, row_grad, column_grad, *_):
    x, y, scale, *stats = ctx.saved_tensors
    dx, dy, dscale = torch.ops.protoclip.contrastive_bwd(
        x, y, scale, *stats, row_grad, column_grad, ctx.offset, ctx.backend
    )
    return dx, dy, dscale.to(scale.dtype).reshape(scale.shape), None, None, None


for _name, _impl, _fake in (
    ("contrastive_fwd", _fwd, _fake_fwd),
    ("contrastive_bwd", _bwd, _fake_bwd),
    ("contrastive", _contrastive, _fake_contrastive),
):
    _lib.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"protoclip::{_name}", _fake, lib=_lib)
torch.library.register_autograd("protoclip::contrastive", _autograd, setup_context=_setup, lib=_lib)


def no_second_derivative(op: str):
    """The autograd formula of a backward op: a refusal, where torch would only warn."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op}: its fused backends have no second derivative; use backend='reference' for it"
        )

    return refuse


torch.library.register_autograd(
    "protoclip::contrastive_bwd", no_second_derivative("info_nce"), lib=_lib
)


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over a batch of pairs, both directions, without the [N, N] logits in memory.

    The fused backends save O(N) values and form the logits again, tile by tile, in the backward
    pass; sums are fp32. Under autocast the features keep their dtype, as given.

    Args:
        image_features: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        text_features: [N, D], dtype and device of ``image_features``; row i belongs to image i.
        logit_scale: [] or [1], the multiplier on the dot products (not its logarithm).
        reduction: "mean", "sum", or "none" for one value a pair.
        backend: "auto", or one of ``protoclip.backends("info_nce")``, which never falls back.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N], half the sum of the two
        directions. N = 0 gives 0.
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point or disagree.
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
    scale = checks.scalar(op, "logit_scale", logit_scale, image_features.device)
    losses = _pair_losses(image_features, text_features, scale, backend)
    return reduce(losses, reduction, len(losses))


def _pair_losses(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> Tensor:
    name = resolve("info_nce", backend, x.device.type, x.dtype)
    if name == "reference":
        with torch.autocast(x.device.type, enabled=False):
            return reference.info_nce(x, y, scale)
    rows, columns, *_ = torch.ops.protoclip.contrastive(x, y, scale, 0, True, name)
    return (rows + columns) / 2


def reduce(losses: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    """Mean (0 for no rows), sum, or the rows themselves."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
