"""InfoNCE: contract, registered op and gradient.

The op works on a strip, rows x [N, D] against columns y [M, D], where row i belongs to column
i + offset. Statistics are in base-2 logits (s2 = logit_scale * log2(e) * x.y): a ``reference`` and
the ``sum`` of 2^(s2 - reference), so that a loss near zero does not cancel. The reference is the
maximum (C++), or the positive or a whole number near the log of the sum (Triton). The backward pass
of any loss built on the strip is
G = row_weight * P_row + column_weight * P_column - (weights at the positives),
dx = logit_scale * G y, dy = logit_scale * G^T x, dlogit_scale = sum G * (x.y).

Pairs with ids are compared by the op of ``query_losses.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.kernels.results import Gradients, InfoNceForward
from protoclip.ops import checks, pairs, reference
from protoclip.ops.dispatch import function, resolve
from protoclip.ops.operators import (
    PassTo,
    backend_operator,
    call_saved,
    define_gradient,
    direction_weight,
    empty,
    gradient_like,
    reduce,
    reduce_weighted,
    refuse_gradient,
    saved_values,
    saving,
    without_autocast,
)
from protoclip.ops.pairs import Matching, SameId
from protoclip.ops.query_losses import pair_loss, query_losses
from protoclip.ops.stash import empty_stash, fake_stash, keeps_stash
from protoclip.ops.sums import plain_smoothing


class InfoNceLoss(NamedTuple):
    """Results of the forward pass: those of ``InfoNceForward``, in order, and the stash."""

    loss: Tensor  # of each pair [N], or [] for "mean" and "sum"
    row_reference: Tensor  # [N]
    row_sum: Tensor  # [N]
    column_reference: Tensor  # [M], or [0] of one direction
    column_sum: Tensor  # [M], or [0] of one direction
    positive: Tensor  # [N]
    stash: Tensor


def info_nce_strip(
    x: Tensor, y: Tensor, logit_scale: Tensor, *, offset: int, both_directions: bool, backend: str
) -> InfoNceForward:
    """The statistics of a strip, for a caller that merges them over ranks; no autograd."""
    run = function("info_nce", backend, "info_nce_fwd")
    results = run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        offset=offset,
        both_directions=both_directions,
        pair_weight=1.0,
        summed=False,
    )
    return InfoNceForward._make(results)


def _info_nce_loss_shapes(arguments: Any) -> InfoNceLoss:
    x, y = arguments.x, arguments.y
    n, m = x.shape[0], y.shape[0] if arguments.both_directions else 0
    return InfoNceLoss(
        loss=empty(x, n) if arguments.reduction == "none" else empty(x),
        row_reference=empty(x, n),
        row_sum=empty(x, n),
        column_reference=empty(x, m),
        column_sum=empty(x, m),
        positive=empty(x, n),
        stash=fake_stash("info_nce", arguments.backend, x, y, arguments.keep_stash),
    )


@backend_operator("info_nce", _info_nce_loss_shapes, InfoNceLoss)
def info_nce_loss(
    pass_to: PassTo,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    offset: int,
    both_directions: bool,
    reduction: str,
    backend: str,
    keep_stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row or, with ``both_directions`` (N = M), half the sum of both."""
    stash = empty_stash("info_nce", backend, x, y, keep_stash)
    results = pass_to(
        function("info_nce", backend, "info_nce_fwd"),
        pair_weight=direction_weight(both_directions, reduction, x.shape[0]),
        summed=reduction != "none",
        stash=stash,
    )
    return (*results, stash)


def _info_nce_gradients_shapes(arguments: Any) -> Gradients:
    x, y = arguments.x, arguments.y
    return Gradients(dx=x.new_empty(x.shape), dy=y.new_empty(y.shape), dlogit_scale=empty(x))


@backend_operator("info_nce_bwd", _info_nce_gradients_shapes, Gradients)
def info_nce_gradients(
    pass_to: PassTo,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_reference: Tensor,
    row_sum: Tensor,
    column_reference: Tensor,
    column_sum: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    offset: int,
    half_sum: bool,
    reduction: str,
    backend: str,
    stash: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for upstream gradients ``row_weight`` [N] and ``column_weight`` [M] of any
    stride, even 0, which are multiplied by ``direction_weight``.

    The positive's weight is row_weight[i] + column_weight[i + offset] (if given). ``column_*`` are
    [0] of one direction."""
    # Not the caller's to compute: traced with symbolic sizes 1 / N would be a constant.
    pair_weight = direction_weight(half_sum, reduction, x.shape[0])
    return pass_to(function("info_nce", backend, "info_nce_bwd"), pair_weight=pair_weight)


def _info_nce_loss_backward(ctx: Any, grads: InfoNceLoss) -> dict[str, Tensor]:
    if grads.loss is None:
        return {}
    saved = saved_values(ctx)
    weight = grads.loss.expand(saved.x.shape[0])
    gradients = call_saved(
        info_nce_gradients,
        saved,
        row_weight=weight,
        column_weight=weight if saved.both_directions else weight[:0],
        half_sum=saved.both_directions,
    )
    return {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
    }


define_gradient(
    info_nce_loss,
    save=saving(["row_reference", "row_sum", "column_reference", "column_sum", "stash"]),
    backward=_info_nce_loss_backward,
)
refuse_gradient(info_nce_gradients, "info_nce")


def diagonal_losses(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    *,
    offset: int,
    both_directions: bool,
    label_smoothing: float,
    reduction: str,
    backend: str,
    stash: bool | None,
) -> Tensor:
    """Losses where row i belongs to column i + offset and every pair differs from all others, by a
    fused backend. The op reduces them itself; with ``label_smoothing`` the reduction is "none"."""
    losses = info_nce_loss(
        x=x,
        y=y,
        logit_scale=logit_scale,
        offset=offset,
        both_directions=both_directions,
        reduction=reduction,
        backend=backend,
        keep_stash=keeps_stash(stash, x, y, logit_scale),
    ).loss
    if not label_smoothing:
        return losses
    spread = plain_smoothing(x, y, logit_scale, offset)
    if both_directions:
        spread = (spread + plain_smoothing(y, x, logit_scale, offset)) / 2
    return losses + label_smoothing * spread


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
) -> Tensor:
    """InfoNCE over a batch of pairs, both directions, without the [N, N] logits in memory.

    The fused backends save O(N) values and, apart from the ``stash``, recompute the logits in the
    backward pass. Sums are fp32; under autocast the features keep their dtype.

    Args:
        image_features, text_features: [N, D], usually unit rows, row i of each a pair; float32,
            bfloat16, float16 (float64: reference), mixed ones are promoted.
        logit_scale: [] or [1], the multiplier on the dot products (not its logarithm).
        ids: int64 [N] or [N, R], R <= 2: pairs with an equal id in any column are the same thing,
            such as images with one caption. Pairs without an id need unique ones. None: all differ.
        same_id: "exclude": pairs of the same id are not negatives of each other; "positive": they
            are positives of each other, and the loss is against the mean of their logits.
        weights: float32 [N] >= 0, one per pair, without a gradient.
        label_smoothing: epsilon in [0, 1], a share of the target spread evenly over the keys that
            a query sees, as in torch's cross-entropy; a number.
        reduction: "mean": the sum of weighted losses over the total weight; "sum"; or "none" for
            one weighted value per pair.
        backend: "auto", or one of ``protoclip.backends("info_nce")`` (with ids, of
            ``protoclip.backends("contrastive")``); a named one never falls back.
        stash: False: keep no logits for the backward pass. True or None: "cpu" keeps them, up to
            64 MiB (N = 4,096), where that is faster (``ops/stash.py``): 3 matrix products instead
            of 4, and the same bits.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N], half the sum of the two
        directions. N = 0 gives 0.
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point.
    Source:
        Radford et al. 2021 (CLIP), figure 3.

    Example:
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> protoclip.info_nce(image, text, logit_scale=14.3).shape
        torch.Size([])
        >>> captions = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])  # the first two are the same
        >>> protoclip.info_nce(image, text, 14.3, ids=captions, reduction="none").shape
        torch.Size([8])
    """
    op = "info_nce"
    x, y, logit_scale = checks.equal_rows(op, image_features, text_features, logit_scale)
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.one_of(op, "same_id", same_id, pairs.SAME_ID)
    checks.label_smoothing(op, label_smoothing)
    n = x.shape[0]
    table_row = op if ids is None else "contrastive"
    backend_name = resolve(table_row, backend, x.device.type, x.dtype)
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    reduces = weights is None and not label_smoothing and reduction != "none"
    if ids is not None:
        ids = pairs.check_ids(op, "ids", ids, n, x.device)
        matching = Matching(query_ids=ids, key_ids=ids, same_id=same_id)
        if reduces and backend_name != "reference":
            return pair_loss(
                op,
                x,
                y,
                logit_scale,
                matching,
                reduction=reduction,
                backend=backend_name,
                stash=stash,
            )
        by_query = query_losses(
            op,
            x,
            y,
            logit_scale,
            matching,
            label_smoothing=label_smoothing,
            backend=backend_name,
            stash=stash,
            both_directions=True,
        )
        assert by_query.column_gap is not None
        losses = (by_query.gap + by_query.column_gap) / 2
    elif backend_name == "reference":
        with without_autocast(x.device.type):
            losses = reference.info_nce(x, y, logit_scale, label_smoothing)
    else:
        losses = diagonal_losses(
            x,
            y,
            logit_scale,
            offset=0,
            both_directions=True,
            label_smoothing=label_smoothing,
            reduction=reduction if reduces else "none",
            backend=backend_name,
            stash=stash,
        )
        if reduces:
            return losses
    if weights is None:
        return reduce(losses, reduction, n)
    return reduce_weighted(losses, torch.ones_like(losses), weights, reduction)
