"""SigLIP's loss: contract, registered op and gradient.

The gradient needs no statistics of whole rows, so the backends compute it in the forward pass, if
it is wanted: three products instead of four. The backward pass only scales it. With a group the
texts and their gradient travel round a ring of its ranks: memory is O(B D), not O(W B D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.distributed import pass_on
from protoclip.kernels.results import SigmoidGradients, SigmoidLoss
from protoclip.ops import checks, reference
from protoclip.ops.columns import LOCAL, Group, columns_named, columns_of
from protoclip.ops.dispatch import function, resolve
from protoclip.ops.id_codes import coder_of
from protoclip.ops.operators import (
    accumulator,
    call_saved,
    define_gradient,
    empty,
    gradient_like,
    operator,
    reduce_weighted,
    refuse_gradient,
    saved_values,
    saving,
    single,
    wants_gradient,
    without_autocast,
)
from protoclip.ops.pairs import Ids, Pairs, SameId, check_ids, pairs_of
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


@operator("sigmoid_loss", _sigmoid_shapes, SigmoidLoss)
def _sigmoid_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Ids,
    gradients: bool,
    backend: str,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sigmoid loss of a strip, with its gradients if they are wanted; with ``group_name`` of x
    against the texts y of every rank in turn, where ``pairs`` has the ids of all ranks' texts."""
    run = function("sigmoid_loss", backend, "sigmoid_loss")

    def against(texts: Tensor, pairs: Ids) -> SigmoidLoss:
        results = run(
            x=x,
            y=texts,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            **vars(pairs),
            gradients=gradients,
        )
        return SigmoidLoss._make(results)

    columns = columns_named(group_name)
    if not isinstance(columns, Group):
        return against(y, pairs)
    return _round_the_ring(against, y, pairs, columns)


def _round_the_ring(
    against: Callable[[Tensor, Ids], SigmoidLoss],
    y: Tensor,
    pairs: Ids,
    columns: Group,
) -> SigmoidLoss:
    """The sums of what the texts of each rank give; a gradient travels with its texts and is back
    after the last hop."""
    texts = y
    total: SigmoidLoss | None = None
    for hop in range(columns.size):
        receive = pass_on(texts, columns.group) if hop + 1 < columns.size else None
        owner = (columns.rank + hop) % columns.size
        ids = pairs.key_ids
        if ids is not None:
            ids = ids.tensor_split(columns.size, dim=1)[owner]
        # The first chunk holds this rank's texts; the others hold negatives only.
        offset = 0 if hop == 0 else y.shape[0]
        part = against(texts, replace(pairs, key_ids=ids, offset=offset))
        if total is None:
            total = SigmoidLoss._make(value.to(part.loss.dtype) for value in part)
        else:
            total = SigmoidLoss._make(sum_ + value for sum_, value in zip(total, part, strict=True))
        if part.dy.numel():
            total = total._replace(dy=pass_on(total.dy, columns.group)())
        if receive is not None:
            texts = receive()
    assert total is not None
    return total._replace(dx=total.dx.to(y.dtype), dy=total.dy.to(y.dtype))


def _sigmoid_gradients_shapes(arguments: Any) -> SigmoidGradients:
    return SigmoidGradients(
        dx=torch.empty_like(arguments.dx),
        dy=torch.empty_like(arguments.dy),
        dlogit_scale=torch.empty_like(arguments.dlogit_scale),
        dlogit_bias=torch.empty_like(arguments.dlogit_bias),
    )


@operator("sigmoid_loss_bwd", _sigmoid_gradients_shapes, SigmoidGradients)
def sigmoid_gradients(
    grad: Tensor,
    dx: Tensor,
    dy: Tensor,
    dlogit_scale: Tensor,
    dlogit_bias: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The upstream gradient [] times what the forward pass saved."""
    run = function("sigmoid_loss", backend, "sigmoid_loss_bwd")
    return run(grad=grad, dx=dx, dy=dy, dlogit_scale=dlogit_scale, dlogit_bias=dlogit_bias)


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


define_gradient(
    _sigmoid_loss,
    save=saving(
        ["dx", "dy", "dlogit_scale", "dlogit_bias"], without=["x", "y", "query_ids", "key_ids"]
    ),
    backward=_sigmoid_backward,
)
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
    pairs: Ids,
) -> Tensor:
    """The loss of each image, [N], from ``STRIP_LOGITS`` logits at a time."""
    losses = empty(x, x.shape[0])
    with without_autocast(x.device.type):
        for rows, strip in _strips(pairs, x.shape[0], y.shape[0]):
            losses[rows] = reference.sigmoid_loss(x[rows], y, logit_scale, logit_bias, strip)
    return losses


@operator("sigmoid_rows_bwd", _rows_gradients_shapes, SigmoidGradients)
def sigmoid_rows_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Ids,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``sigmoid_rows`` for upstream gradients [N]; recomputes the logits."""
    dx = torch.empty_like(x)
    dy = torch.zeros_like(y, dtype=accumulator(y))
    dlogit_scale = torch.zeros((), dtype=accumulator(x), device=x.device)
    dlogit_bias = torch.zeros_like(dlogit_scale)
    for rows, strip in _strips(pairs, x.shape[0], y.shape[0]):
        with without_autocast(x.device.type):
            gradients = reference.sigmoid_gradients(
                x[rows], y, logit_scale, logit_bias, strip, grad[rows]
            )
        dx[rows] = gradients.dx.to(dx.dtype)
        dy += gradients.dy
        dlogit_scale += gradients.dlogit_scale
        dlogit_bias += gradients.dlogit_bias
    return SigmoidGradients(dx, dy.to(y.dtype), dlogit_scale, dlogit_bias)


def _strips(pairs: Ids, n: int, m: int) -> Iterator[tuple[slice, Pairs]]:
    """Rows of n whose logits against m keys are formed together, and their pairs."""
    step = max(1, STRIP_LOGITS // max(m, 1))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        query_ids = None if pairs.query_ids is None else pairs.query_ids[:, rows]
        strip = replace(pairs, offset=pairs.offset + start, query_ids=query_ids)
        yield rows, Pairs(**vars(strip))


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
    reduction: str = "mean",
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's loss of each image: the sum of softplus(-z_ij (scale x_i.y_j + bias)) over all
    texts j, without an [N, M] matrix.

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
        reduction: "mean": the sum over the images divided by N, or the total weight; "sum"; or
            "none": one weighted value per image.
        backend: "auto", or one of ``protoclip.backends("sigmoid_loss")``.
        group: as in ``info_nce``. The texts pass from rank to rank; the reference, ``weights``,
            ``label_smoothing`` and "none" gather them.
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
    op = "sigmoid_loss"
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
    if ids is not None:
        ids = check_ids(op, "ids", ids, m, x.device)
    if x.dtype == torch.float16:  # the fused op stores a sum's gradient, which may pass 65,504
        x, y = x.float(), y.float()
    backend_name = resolve(op, backend, x.device.type, x.dtype)
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    columns = columns_of(op, group, x)
    if columns is not LOCAL and m != n:
        raise ValueError(
            f"{op}: expected as many texts as images with a group, got {n} images and {m} texts"
        )
    pairs = pairs_of(
        op,
        x,
        m,
        query_ids=None if ids is None else ids[offset : offset + n],
        key_ids=ids,
        same_id=same_id,
        offset=offset,
        columns=columns,
        code_ids=coder_of(backend_name),
    )
    # Every image has its own text, also where ids say which texts are positives.
    pairs = replace(pairs, offset=offset + columns.first(n))
    by_row = weights is not None or reduction == "none" or backend_name == "reference"
    gathers = by_row or bool(label_smoothing)
    tensors: dict[str, Any] = {
        "x": x,
        "y": columns.gather(y) if gathers else y,
        "logit_scale": logit_scale,
        "logit_bias": logit_bias,
    }
    if backend_name == "reference":
        with without_autocast(x.device.type):
            losses = reference.sigmoid_loss(**tensors, pairs=pairs)
    elif by_row:
        losses = sigmoid_rows(**tensors, pairs=pairs)
    else:
        losses = _sigmoid_loss(
            **tensors,
            pairs=pairs,
            gradients=wants_gradient(x, y, logit_scale, logit_bias),
            backend=backend_name,
            group_name="" if gathers else columns.name,
        ).loss
    if label_smoothing:
        signed = signed_sums(**tensors, pairs=pairs)
        losses = losses + label_smoothing / 2 * (signed if by_row else signed.sum())
    if not by_row:
        return losses / max(n, 1) if reduction == "mean" else losses
    return reduce_weighted(losses, torch.ones_like(losses), weights, reduction, columns)
