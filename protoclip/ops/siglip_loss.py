"""SigLIP's loss: contract, registered op and gradient.

The gradient needs no statistics of whole rows, so the backends compute it in the forward pass, if
it is wanted: three products instead of four. The backward pass only scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from protoclip.kernels.results import SigmoidGradients, SigmoidLoss
from protoclip.ops import checks, pairs, reference
from protoclip.ops.dispatch import function, resolve
from protoclip.ops.id_codes import coder_of
from protoclip.ops.operators import (
    PassTo,
    accumulator,
    backend_operator,
    call_saved,
    define_gradient,
    empty,
    gradient_like,
    operator,
    reduce_weighted,
    refuse_gradient,
    save,
    saved_values,
    saving,
    single,
    wants_gradient,
    without_autocast,
)
from protoclip.ops.pairs import Matching, Pairs, SameId
from protoclip.ops.sums import signed_sums

STRIP_LOGITS = 1 << 20  # logits that torch forms at once where no kernel does: 4 MiB


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


@backend_operator("sigmoid_loss", _sigmoid_shapes, SigmoidLoss)
def fused_sigmoid_loss(
    pass_to: PassTo,
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
    return pass_to(function("sigmoid_loss", backend, "sigmoid_loss"))


def _save_sigmoid(ctx: Any, arguments: Any, results: SigmoidLoss) -> None:
    save(
        ctx,
        logit_scale=arguments.logit_scale,
        logit_bias=arguments.logit_bias,
        dx=results.dx,
        dy=results.dy,
        dlogit_scale=results.dlogit_scale,
        dlogit_bias=results.dlogit_bias,
        backend=arguments.backend,
    )


def _sigmoid_gradients_shapes(arguments: Any) -> SigmoidGradients:
    return SigmoidGradients(
        dx=torch.empty_like(arguments.dx),
        dy=torch.empty_like(arguments.dy),
        dlogit_scale=torch.empty_like(arguments.dlogit_scale),
        dlogit_bias=torch.empty_like(arguments.dlogit_bias),
    )


@backend_operator("sigmoid_loss_bwd", _sigmoid_gradients_shapes, SigmoidGradients)
def sigmoid_gradients(
    pass_to: PassTo,
    grad: Tensor,
    dx: Tensor,
    dy: Tensor,
    dlogit_scale: Tensor,
    dlogit_bias: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The upstream gradient [] times what the forward pass saved."""
    return pass_to(function("sigmoid_loss", backend, "sigmoid_loss_bwd"))


def _sigmoid_backward(ctx: Any, grads: SigmoidLoss) -> dict[str, Tensor]:
    if grads.loss is None:
        return {}
    saved = saved_values(ctx)
    return _by_name(call_saved(sigmoid_gradients, saved, grad=grads.loss), saved)


def _by_name(gradients: SigmoidGradients, saved: Any) -> dict[str, Tensor]:
    return {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
        "logit_bias": gradient_like(gradients.dlogit_bias, saved.logit_bias),
    }


define_gradient(fused_sigmoid_loss, save=_save_sigmoid, backward=_sigmoid_backward)
refuse_gradient(sigmoid_gradients, "sigmoid_loss")


def _rows_gradients_shapes(arguments: Any) -> SigmoidGradients:
    return SigmoidGradients(
        dx=torch.empty_like(arguments.x),
        dy=torch.empty_like(arguments.y),
        dlogit_scale=empty(arguments.x),
        dlogit_bias=empty(arguments.x),
    )


@operator("sigmoid_rows", lambda arguments: empty(arguments.x, arguments.x.shape[0]), single)
def sigmoid_rows(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    own_key: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
) -> Tensor:
    """The loss of each image, [N], from ``STRIP_LOGITS`` logits at a time."""
    pairs = Pairs(query_ids=query_ids, key_ids=key_ids, same_positive=same_positive)
    losses = empty(x, x.shape[0])
    with without_autocast(x.device.type):
        for rows, strip in _strips(pairs, own_key, y.shape[0]):
            losses[rows] = reference.sigmoid_loss(x[rows], y, logit_scale, logit_bias, strip)
    return losses


@operator("sigmoid_rows_bwd", _rows_gradients_shapes, SigmoidGradients)
def sigmoid_rows_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    own_key: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    same_positive: bool,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``sigmoid_rows`` for upstream gradients [N]; recomputes the logits."""
    pairs = Pairs(query_ids=query_ids, key_ids=key_ids, same_positive=same_positive)
    dx = torch.empty_like(x)
    dy = torch.zeros_like(y, dtype=accumulator(y))
    dlogit_scale = torch.zeros((), dtype=accumulator(x), device=x.device)
    dlogit_bias = torch.zeros_like(dlogit_scale)
    for rows, strip in _strips(pairs, own_key, y.shape[0]):
        with without_autocast(x.device.type):
            gradients = reference.sigmoid_gradients(
                x[rows], y, logit_scale, logit_bias, strip, grad[rows]
            )
        dx[rows] = gradients.dx.to(dx.dtype)
        dy += gradients.dy
        dlogit_scale += gradients.dlogit_scale
        dlogit_bias += gradients.dlogit_bias
    return SigmoidGradients(dx, dy.to(y.dtype), dlogit_scale, dlogit_bias)


def _strips(pairs: Pairs, own_key: Tensor, m: int) -> Iterator[tuple[slice, Pairs]]:
    """Rows whose logits against m keys are formed together, and their pairs."""
    step = max(1, STRIP_LOGITS // max(m, 1))
    for start in range(0, own_key.shape[0], step):
        rows = slice(start, start + step)
        query_ids = None if pairs.query_ids is None else pairs.query_ids[:, rows]
        yield rows, replace(pairs, own_key=own_key[rows], query_ids=query_ids)


def _rows_backward(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    saved = saved_values(ctx)
    return _by_name(call_saved(sigmoid_rows_gradients, saved, grad=grad), saved)


define_gradient(sigmoid_rows, save=saving([]), backward=_rows_backward)
refuse_gradient(sigmoid_rows_gradients, "sigmoid_loss")


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "positive",
    offset: int = 0,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """SigLIP's loss of each image, summed: softplus(-z_ij (scale x_i.y_j + bias)) over all texts j,
    without an [N, M] matrix.

    ``weights`` and "none" need a loss for each row, for which no backend has a kernel: torch
    computes them in fp32, some rows at a time, in the same memory.

    Args:
        image_features, text_features: [N, D] and [M, D], M >= offset + N; as in ``info_nce``.
        logit_scale, logit_bias: [] or [1].
        ids: int64 [M] or [M, R], R <= 2, of the texts; image i has the id of its own text.
        same_id: "positive": z_ij is 1 for all texts with the image's id; "exclude": such a pair is
            left out unless the text is the image's own.
        offset: z_ij is 1 if j = i + offset, else -1.
        weights: float32 [N] >= 0, one per image, without a gradient.
        label_smoothing: epsilon in [0, 1], a number: each pair's target is epsilon / 2 and
            1 - epsilon / 2 instead of 0 and 1, as in binary cross-entropy.
        reduction: "sum"; "mean": divided by N, or the total weight; or "none": one weighted value
            per image.
        backend: "auto", or one of ``protoclip.backends("sigmoid_loss")``.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N].
    Raises:
        ValueError, TypeError: as in ``info_nce``.
    Source:
        Zhai et al. 2023 (SigLIP), equation 1.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> protoclip.sigmoid_loss(image, text, logit_scale=10.0, logit_bias=-10.0).shape
        torch.Size([])
    """
    return sigmoid_losses(
        "sigmoid_loss",
        image_features,
        text_features,
        logit_scale,
        logit_bias,
        ids=ids,
        same_id=same_id,
        offset=offset,
        weights=weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
    )


def sigmoid_losses(
    op: str,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None,
    same_id: SameId,
    offset: int,
    weights: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``sigmoid_loss``; ``average`` averages a divisor over ranks."""
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.label_smoothing(op, label_smoothing)
    x, y, logit_scale = checks.strip(op, checks.PAIR, image_features, text_features, logit_scale)
    n, m = x.shape[0], y.shape[0]
    if offset < 0 or offset + n > m:
        raise ValueError(
            f"{op}: expected image i's text at row i + offset, got {n} images, {m} texts "
            f"and offset {offset}"
        )
    logit_bias = checks.scalar(op, "logit_bias", logit_bias, x.device, accumulator(x))
    matching = Matching(same_id=same_id, offset=offset)
    if ids is not None:
        ids = pairs.check_ids(op, "ids", ids, m, x.device)
        own_ids = ids[offset : offset + n]
        matching = Matching(query_ids=own_ids, key_ids=ids, same_id=same_id, offset=offset)
    if x.dtype == torch.float16:  # the fused op stores a sum's gradient, which may pass 65,504
        x, y = x.float(), y.float()
    backend_name = resolve("sigmoid_loss", backend, x.device.type, x.dtype)
    matched = pairs.pairs_of(op, x, m, matching, coder_of(backend_name))
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    tensors: dict[str, Any] = {"x": x, "y": y, "logit_scale": logit_scale, "logit_bias": logit_bias}
    by_row = True
    if backend_name == "reference":
        with without_autocast(x.device.type):
            losses = reference.sigmoid_loss(**tensors, pairs=matched)
    elif weights is not None or reduction == "none":
        losses = sigmoid_rows(**tensors, own_key=matched.own_positions(x), **matched.ids())
    else:
        by_row = False
        losses = fused_sigmoid_loss(
            **tensors,
            offset=offset,
            gradients=wants_gradient(x, y, logit_scale, logit_bias),
            backend=backend_name,
            **matched.ids(),
        ).loss
    if label_smoothing:
        signed = signed_sums(x, y, logit_scale, logit_bias, matched)
        losses = losses + label_smoothing / 2 * (signed if by_row else signed.sum())
    if not by_row:
        return losses / max(n, 1) if reduction == "mean" else losses
    return reduce_weighted(losses, torch.ones_like(losses), weights, reduction, average)
