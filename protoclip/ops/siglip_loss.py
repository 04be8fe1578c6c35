"""SigLIP's loss: contract, registered op and gradient.

The gradient needs no statistics of whole rows, so the backends compute it in the forward pass, if
it is wanted: three products instead of four. The backward pass only scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.kernels.results import SigmoidLoss
from protoclip.ops import checks, pairs, reference
from protoclip.ops.dispatch import SIGMOID_LOSS, resolve
from protoclip.ops.operators import (
    accumulator,
    define_gradient,
    empty,
    gradient_like,
    operator,
    refuse_gradient,
    save,
    saved_values,
    wants_gradient,
    without_autocast,
)
from protoclip.ops.pairs import Matching, SameId


def _sigmoid_shapes(arguments: Any) -> SigmoidLoss:
    x, y = arguments.x, arguments.y
    n, m = (x.shape[0], y.shape[0]) if arguments.gradients else (0, 0)
    return SigmoidLoss(
        loss=empty(x),
        dx=x.new_empty((n, x.shape[1])),
        dy=y.new_empty((m, y.shape[1])),
        dlogit_scale=empty(x),
        dlogit_bias=empty(x),
    )


@operator("sigmoid_loss", _sigmoid_shapes, SigmoidLoss)
def fused_sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    gradients: bool,
    backend: str,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sigmoid loss of a strip, with its gradients if they are wanted."""
    run: Callable[..., Any] = SIGMOID_LOSS[backend].implementation
    return run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        offset=offset,
        gradients=gradients,
        query_ids=query_ids,
        key_ids=key_ids,
        same_positive=same_positive,
    )


def _save_sigmoid(ctx: Any, arguments: Any, results: SigmoidLoss) -> None:
    save(
        ctx,
        logit_scale=arguments.logit_scale,
        logit_bias=arguments.logit_bias,
        dx=results.dx,
        dy=results.dy,
        dlogit_scale=results.dlogit_scale,
        dlogit_bias=results.dlogit_bias,
    )
    ctx.set_materialize_grads(False)


class SigmoidGradients(NamedTuple):
    dx: Tensor
    dy: Tensor
    dlogit_scale: Tensor
    dlogit_bias: Tensor


def _sigmoid_gradients_shapes(arguments: Any) -> SigmoidGradients:
    return SigmoidGradients(*(torch.empty_like(saved) for saved in arguments[1:]))


@operator("sigmoid_loss_bwd", _sigmoid_gradients_shapes, SigmoidGradients)
def sigmoid_gradients(
    grad: Tensor, dx: Tensor, dy: Tensor, dlogit_scale: Tensor, dlogit_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The upstream gradient [] times what the forward pass saved."""
    grad = grad.float()
    return SigmoidGradients(
        dx=(grad * dx).to(dx.dtype),
        dy=(grad * dy).to(dy.dtype),
        dlogit_scale=grad * dlogit_scale,
        dlogit_bias=grad * dlogit_bias,
    )


def _sigmoid_backward(ctx: Any, grads: SigmoidLoss) -> dict[str, Tensor]:
    if grads.loss is None:
        return {}
    saved = saved_values(ctx)
    gradients = sigmoid_gradients(
        grad=grads.loss,
        dx=saved.dx,
        dy=saved.dy,
        dlogit_scale=saved.dlogit_scale,
        dlogit_bias=saved.dlogit_bias,
    )
    return {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
        "logit_bias": gradient_like(gradients.dlogit_bias, saved.logit_bias),
    }


define_gradient(fused_sigmoid_loss, save=_save_sigmoid, backward=_sigmoid_backward)
refuse_gradient(sigmoid_gradients, "sigmoid_loss")


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "positive",
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Sum over pairs (i, j) of softplus(-z_ij (scale x_i.y_j + bias)), without an [N, M] matrix.

    Args:
        image_features, text_features: [N, D] and [M, D], M >= offset + N; as in ``info_nce``.
        logit_scale, logit_bias: [] or [1].
        ids: int64 [M] or [M, R], R <= 2, of the texts; image i has the id of its own text.
        same_id: "positive": z_ij is 1 for all texts with the image's id; "exclude": such a pair is
            left out unless the text is the image's own.
        offset: z_ij is 1 if j = i + offset, else -1.
        backend: "auto", or one of ``protoclip.backends("sigmoid_loss")``.
    Returns:
        float32 [] (float64 for float64 input), nats, the sum (SigLIP divides it by N).
    Raises:
        ValueError, TypeError: as in ``info_nce``.
    Source:
        Zhai et al. 2023 (SigLIP), equation 1.
    """
    op = "sigmoid_loss"
    x, y, logit_scale = checks.strip(op, checks.PAIR, image_features, text_features, logit_scale)
    n, m = x.shape[0], y.shape[0]
    if offset < 0 or offset + n > m:
        raise ValueError(
            f"{op}: expected image i's text at row i + offset, got {n} images, {m} texts "
            f"and offset {offset}"
        )
    logit_bias = checks.scalar(op, "logit_bias", logit_bias, x.device, accumulator(x))
    checks.one_of(op, "same_id", same_id, pairs.SAME_ID)
    matching = Matching(same_id=same_id, first=offset)
    if ids is not None:
        pairs.check_ids(op, "ids", ids, m, x.device)
        own_ids = ids[offset : offset + n]
        matching = Matching(query_ids=own_ids, key_ids=ids, same_id=same_id, first=offset)
    backend_name = resolve(op, backend, x.device.type, x.dtype)
    if backend_name == "reference":
        with without_autocast(x.device.type):
            matched = pairs.pairs_of(op, x, m, matching)
            return reference.sigmoid_loss(x, y, logit_scale, logit_bias, matched)
    id_codes: dict[str, Any] = {"query_ids": None, "key_ids": None, "same_positive": False}
    if ids is not None:
        id_codes = pairs.pairs_of(op, x, m, matching).ids()
    result = fused_sigmoid_loss(
        x=x,
        y=y,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        offset=offset,
        gradients=wants_gradient(x, y, logit_scale, logit_bias),
        backend=backend_name,
        **id_codes,
    )
    return result.loss
