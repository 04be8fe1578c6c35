"""The pairwise sigmoid loss of SigLIP: contract, autograd and dispatch.

Its gradient needs no statistics of whole rows, so the fused backends form it in the forward pass,
where gradients are wanted: three products instead of four. The backward pass scales it.
"""

from __future__ import annotations

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
from protoclip.ops.info_nce import no_second_derivative

_lib = torch.library.Library("protoclip", "FRAGMENT")
_lib.define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, int offset, bool gradients,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fwd(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int, gradients: bool, backend: str
):
    """-> loss (sum) fp32 [], dx, dy in the inputs' dtypes ([0, D] without gradients), dscale and
    dbias fp32 []."""
    run = implementation("siglip", backend, "sigmoid_loss")
    return run(x, y, scale, bias, offset, gradients)


def _fake(x, y, scale, bias, offset, gradients, backend):
    n, m = (len(x), len(y)) if gradients else (0, 0)
    loss, dscale, dbias = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, x.new_empty((n, x.shape[1])), y.new_empty((m, y.shape[1])), dscale, dbias


def _setup(ctx, inputs, output) -> None:
    _, _, scale, bias, *_ = inputs
    ctx.save_for_backward(scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    scale, bias, dx, dy, dscale, dbias = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    dx, dy = (torch.ops.protoclip.sigmoid_loss_bwd(grad, g) for g in (dx, dy))
    dscale, dbias = (
        torch.ops.protoclip.sigmoid_loss_bwd(grad, g).to(like.dtype).reshape(like.shape)
        for g, like in ((dscale, scale), (dbias, bias))
    )
    return dx, dy, dscale, dbias, None, None, None


_lib.impl("sigmoid_loss", _fwd, "CompositeExplicitAutograd")
torch.library.register_fake("protoclip::sigmoid_loss", _fake, lib=_lib)
register_gradient(_lib, "sigmoid_loss", "sigmoid_loss", _autograd, _setup)

# An op of its own, so that a second derivative raises instead of ignoring that ``saved`` depends on
# the inputs.
_lib.define("sigmoid_loss_bwd(Tensor grad, Tensor saved) -> Tensor")
_lib.impl(
    "sigmoid_loss_bwd",
    lambda grad, saved: (grad.float() * saved).to(saved.dtype),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "protoclip::sigmoid_loss_bwd", lambda grad, saved: torch.empty_like(saved), lib=_lib
)
register_gradient(_lib, "sigmoid_loss_bwd", "sigmoid_loss", no_second_derivative("sigmoid_loss"))


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
