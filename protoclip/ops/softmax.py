"""The ops of the contrastive losses, with their gradients, and the loss of each query: the engine
of ``contrastive_losses.py``.

Both ops work on a strip, rows x [N, D] against columns y [M, D]. Where row i belongs to column
i + offset and every pair differs from all others it is ``info_nce``, else ``contrastive``, which
takes ``Pairs``. Statistics are in base-2 logits (s2 = logit_scale * log2(e) * x.y): a ``reference``
and the ``sum`` of 2^(s2 - reference), so that a loss near zero does not cancel. The reference is
the maximum (C++), or the positive or a whole number near the log of the sum (Triton). With
``group_name`` the statistics of columns are merged over the ranks of a group, of which y are all
columns, and each rank has the losses of its own.

The gradients are dx = logit_scale * G y, dy = logit_scale * G^T x, dlogit_scale = sum G * (x.y) and
dkey_bias_j = sum_i G_ij, where G = row_weight * P_row [seen] + column_weight * P_column [seen] -
(weights at the positives) / (number of positives).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.kernels.results import (
    ContrastiveForward,
    ContrastiveGradients,
    Gradients,
    InfoNceForward,
    PairStatistics,
)
from protoclip.ops import pairs as pairs_file
from protoclip.ops import reference
from protoclip.ops.columns import LOCAL, Local, columns_named
from protoclip.ops.dispatch import function
from protoclip.ops.operators import (
    call_saved,
    define_gradient,
    direction_weight,
    empty,
    gradient_like,
    operator,
    reduce_weighted,
    refuse_gradient,
    saved_values,
    saving,
    without_autocast,
)
from protoclip.ops.pairs import Pairs, QueryParts
from protoclip.ops.stash import empty_stash, fake_stash, filled, keeps_stash
from protoclip.ops.sums import (
    LN2,
    add_positives,
    log_add,
    logits_of_negatives,
    plain_smoothing,
    smoothing,
)

NUM_POSITIVES = PairStatistics._fields.index("num_positives")  # a row of the statistics


class InfoNceLoss(NamedTuple):
    """Results of the forward pass: those of ``InfoNceForward``, in order, and the stash."""

    loss: Tensor  # of each pair [N], or [] for "mean" and "sum"
    row_reference: Tensor  # [N]
    row_sum: Tensor  # [N]
    column_reference: Tensor  # [M], or [0] of one direction
    column_sum: Tensor  # [M], or [0] of one direction
    positive: Tensor  # [N]
    stash: Tensor


def _info_nce_shapes(arguments: Any) -> InfoNceLoss:
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


@operator("info_nce", _info_nce_shapes, InfoNceLoss)
def info_nce_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    offset: int,
    both_directions: bool,
    reduction: str,
    backend: str,
    keep_stash: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row or, with ``both_directions`` (N = M of each rank), half the sum of
    both."""
    stash = empty_stash("info_nce", backend, x, y, keep_stash)
    weight = direction_weight(both_directions, reduction, x.shape[0])
    run = function("info_nce", backend, "info_nce_fwd")
    results = run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        offset=offset,
        both_directions=both_directions,
        pair_weight=weight,
        summed=reduction != "none" and not group_name,
        stash=filled(stash),
    )
    if not group_name:
        return (*results, stash)
    part = InfoNceForward._make(results)
    columns = columns_named(group_name)
    statistics = columns.merged(torch.stack([part.column_reference, part.column_sum]))
    column_reference, column_sum = statistics.unbind()
    by_row = part.row_sum.log2() + (part.row_reference - part.positive)
    by_column = columns.own(column_sum).log2() + (columns.own(column_reference) - part.positive)
    losses = weight * LN2 * (by_row + by_column)
    return InfoNceLoss(
        loss=losses if reduction == "none" else losses.sum(),
        row_reference=part.row_reference,
        row_sum=part.row_sum,
        column_reference=column_reference.clone(),
        column_sum=column_sum.clone(),
        positive=part.positive,
        stash=stash,
    )


def _info_nce_gradients_shapes(arguments: Any) -> Gradients:
    x, y = arguments.x, arguments.y
    return Gradients(dx=x.new_empty(x.shape), dy=y.new_empty(y.shape), dlogit_scale=empty(x))


@operator("info_nce_bwd", _info_nce_gradients_shapes, Gradients)
def info_nce_gradients(
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
    both_directions: bool,
    reduction: str,
    backend: str,
    stash: Tensor,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for upstream gradients of each row's loss, [N], and of each column's, [M], of
    any stride, even 0, which are multiplied by ``direction_weight``; of one direction the columns'
    are [0]."""
    run = function("info_nce", backend, "info_nce_bwd")
    return run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        row_reference=row_reference,
        row_sum=row_sum,
        column_reference=column_reference,
        column_sum=column_sum,
        row_weight=row_weight,
        column_weight=columns_named(group_name).gather(column_weight),
        offset=offset,
        # Not the caller's to compute: traced with symbolic sizes 1 / N would be a constant.
        pair_weight=direction_weight(both_directions, reduction, x.shape[0]),
        stash=filled(stash),
    )


def _info_nce_backward(ctx: Any, grads: InfoNceLoss) -> dict[str, Tensor]:
    if grads.loss is None:
        return {}
    saved = saved_values(ctx)
    weight = grads.loss.expand(saved.x.shape[0])
    gradients = call_saved(
        info_nce_gradients,
        saved,
        row_weight=weight,
        column_weight=weight if saved.both_directions else weight[:0],
    )
    return {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
    }


define_gradient(
    info_nce_loss,
    save=saving(["row_reference", "row_sum", "column_reference", "column_sum", "stash"]),
    backward=_info_nce_backward,
)
refuse_gradient(info_nce_gradients, "info_nce")


class ContrastiveLoss(NamedTuple):
    """Results of the forward pass; for "mean" and "sum" ``loss_per_query`` is [], the loss of the
    batch of pairs, and the next two are [0]."""

    loss_per_query: Tensor  # [N]
    positive_mean: Tensor  # [N]
    loss_per_key: Tensor  # [M], or [0] of one direction
    row_statistics: Tensor  # [4, N], in the rows of ``PairStatistics``
    column_statistics: Tensor  # [4, M], or [4, 0] of one direction
    stash: Tensor


def _contrastive_shapes(arguments: Any) -> ContrastiveLoss:
    x, y = arguments.x, arguments.y
    n, m = x.shape[0], y.shape[0] if arguments.both_directions else 0
    keys = n if arguments.group_name else m
    by_row = arguments.reduction == "none"
    return ContrastiveLoss(
        loss_per_query=empty(x, n) if by_row else empty(x),
        positive_mean=empty(x, n if by_row else 0),
        loss_per_key=empty(x, keys if by_row else 0),
        row_statistics=empty(x, 4, n),
        column_statistics=empty(x, 4, m),
        stash=fake_stash("contrastive", arguments.backend, x, y, arguments.keep_stash),
    )


@operator("contrastive", _contrastive_shapes, ContrastiveLoss)
def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own_key: Tensor | None,
    offset: int,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    both_directions: bool,
    reduction: str,
    backend: str,
    keep_stash: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each query and, with ``both_directions``, of each key; or, for "mean" and "sum"
    (N = M of each rank, both directions), the loss of the batch of pairs. ``own_key`` to
    ``same_positive`` are ``Pairs.tensors()``."""
    stash = empty_stash("contrastive", backend, x, y, keep_stash)
    weight = direction_weight(both_directions, reduction, x.shape[0])
    run = function("contrastive", backend, "contrastive_fwd")
    results = run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        own_key=own_key,
        offset=offset,
        exclude=exclude,
        query_ids=query_ids,
        key_ids=key_ids,
        key_bias=key_bias,
        same_positive=same_positive,
        both_directions=both_directions,
        pair_weight=weight,
        summed=reduction != "none" and not group_name,
        stash=filled(stash),
    )
    forward = ContrastiveForward._make(results)
    loss_per_query = forward.loss_per_query
    positive_mean = forward.positive_mean
    loss_per_key = forward.loss_per_key
    column_statistics = forward.column_statistics
    if group_name:
        columns = columns_named(group_name)
        column_statistics = columns.merged(forward.column_statistics)
        loss_per_key = losses_of(columns.own(column_statistics))
        if reduction != "none":
            loss_per_query = weight * (loss_per_query + loss_per_key).sum()
            positive_mean = loss_per_key = positive_mean.new_empty(0)
    return ContrastiveLoss(
        loss_per_query=loss_per_query,
        positive_mean=positive_mean,
        loss_per_key=loss_per_key,
        row_statistics=forward.row_statistics,
        column_statistics=column_statistics,
        stash=stash,
    )


def losses_of(statistics: Tensor) -> Tensor:
    """[4, N] of base-2 logits -> the losses in nats, [N]."""
    rows = PairStatistics._make(statistics.unbind())
    mean = rows.positive_sum / rows.num_positives.clamp_min(1)
    return LN2 * (rows.sum.log2() + (rows.reference - mean))


def _contrastive_gradients_shapes(arguments: Any) -> ContrastiveGradients:
    x, y = arguments.x, arguments.y
    return ContrastiveGradients(
        dx=x.new_empty(x.shape),
        dy=y.new_empty(y.shape),
        dlogit_scale=empty(x),
        dkey_bias=empty(x, 0 if arguments.key_bias is None else y.shape[0]),
    )


@operator("contrastive_bwd", _contrastive_gradients_shapes, ContrastiveGradients)
def contrastive_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own_key: Tensor | None,
    offset: int,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    row_statistics: Tensor,
    column_statistics: Tensor,
    query_weight: Tensor,
    positive_mean_weight: Tensor | None,
    key_weight: Tensor,
    reduction: str,
    backend: str,
    stash: Tensor,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for upstream gradients of the losses per query, [N], and per key, [M], of any
    stride, even 0, and of the positive means (None: 0). Of one direction the keys' are [0]."""
    run = function("contrastive", backend, "contrastive_bwd")
    return run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        own_key=own_key,
        offset=offset,
        exclude=exclude,
        query_ids=query_ids,
        key_ids=key_ids,
        key_bias=key_bias,
        same_positive=same_positive,
        row_statistics=row_statistics,
        column_statistics=column_statistics,
        row_gap_weight=query_weight,
        row_positive_mean_weight=positive_mean_weight,
        column_gap_weight=columns_named(group_name).gather(key_weight),
        column_positive_mean_weight=None,
        # Not the caller's to compute: traced with symbolic sizes 1 / N would be a constant.
        pair_weight=direction_weight(reduction != "none", reduction, x.shape[0]),
        stash=filled(stash),
    )


def _contrastive_backward(ctx: Any, grads: ContrastiveLoss) -> dict[str, Tensor]:
    upstream = (grads.loss_per_query, grads.positive_mean, grads.loss_per_key)
    if all(gradient is None for gradient in upstream):
        return {}
    saved = saved_values(ctx)
    n = saved.x.shape[0]
    keys = 0
    if saved.both_directions:
        keys = n if saved.group_name else saved.y.shape[0]
    query_weight = grads.loss_per_query
    key_weight = grads.loss_per_key if saved.reduction == "none" else query_weight
    if query_weight is None:
        query_weight = saved.row_statistics.new_zeros(())
    if key_weight is None:
        key_weight = saved.row_statistics.new_zeros(())
    gradients = call_saved(
        contrastive_gradients,
        saved,
        query_weight=query_weight.expand(n),
        positive_mean_weight=grads.positive_mean,
        key_weight=key_weight.expand(keys),
    )
    by_name = {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
    }
    if saved.key_bias is not None:
        by_name["key_bias"] = gradients.dkey_bias.to(saved.key_bias.dtype)
    return by_name


define_gradient(
    contrastive_loss,
    save=saving(["row_statistics", "column_statistics", "stash"]),
    backward=_contrastive_backward,
)
refuse_gradient(contrastive_gradients, "contrastive")


class QueryLosses(NamedTuple):
    """The loss of each query, in nats."""

    loss_per_query: Tensor  # log-sum-exp - mean positive, [N]
    positive_mean: Tensor  # mean logit of the positives, [N]
    counted: Tensor  # bool [N], whether the query has a loss
    loss_per_key: Tensor | None = None  # [M], if it was asked for


def query_losses(
    op: str,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    *,
    negatives: Tensor | None = None,
    label_smoothing: float = 0,
    backend: str,
    stash: bool | None = None,
    both_directions: bool = False,
    columns: Local = LOCAL,
) -> QueryLosses:
    """Queries x against keys y, of all ranks; ``pairs`` says which are positives and negatives.
    ``both_directions``: keys are compared with queries too, for which N = M and ids are equal; with
    ``columns`` those of this rank."""
    if backend == "reference" or x.device.type == "cpu":
        pairs_file.refuse_out_of_range(op, pairs, y.shape[0])
    loss_per_key: Tensor | None = None
    if backend == "reference":
        with without_autocast(x.device.type):
            rows, by_key = reference.contrastive(x, y, logit_scale, pairs, both_directions)
        if by_key is not None:
            loss_per_key = by_key.loss_per_query
    else:
        differentiable = [x, y, logit_scale]
        if pairs.key_bias is not None:
            differentiable.append(pairs.key_bias)
        forward = contrastive_loss(
            x=x,
            y=y,
            logit_scale=logit_scale,
            **pairs.tensors(),
            both_directions=both_directions,
            reduction="none",
            backend=backend,
            keep_stash=keeps_stash(stash, *differentiable),
            group_name=columns.name if both_directions else "",
        )
        rows = QueryParts(
            loss_per_query=forward.loss_per_query,
            positive_mean=forward.positive_mean,
            num_positives=forward.row_statistics[NUM_POSITIVES],
        )
        if both_directions:
            loss_per_key = forward.loss_per_key
    loss = rows.loss_per_query
    positive_mean = rows.positive_mean
    if pairs.others is not None:
        loss, positive_mean = add_positives(x, y, logit_scale, pairs, loss, positive_mean)
    negative_logits: Tensor | None = None
    if negatives is not None and negatives.shape[1]:
        negative_logits = logits_of_negatives(x, negatives, logit_scale)
        loss = log_add(loss, negative_logits.logsumexp(dim=1) - positive_mean)
    if label_smoothing:
        loss = loss + label_smoothing * smoothing(x, y, logit_scale, pairs, negative_logits)
        if loss_per_key is not None:
            loss_per_key = loss_per_key + label_smoothing * smoothing(y, x, logit_scale, pairs)
    counted = rows.num_positives > 0
    if pairs.left_out is not None:
        counted = counted & ~pairs.left_out
    out_of_range = pairs.out_of_range
    if out_of_range is not None:  # multiply, so that the gradient is NaN too
        loss = loss * torch.ones_like(loss).masked_fill(out_of_range, torch.nan)
        counted = counted | out_of_range
    return QueryLosses(loss, positive_mean, counted, loss_per_key)


def query_loss(
    op: str,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    columns: Local,
    *,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str,
    stash: bool | None = None,
) -> Tensor:
    """``contrastive`` of queries x against the keys y of all ranks of ``columns``."""
    n = x.shape[0]
    if pairs.plain and negatives is None and backend != "reference":
        reduces = weights is None and columns is LOCAL and not label_smoothing
        losses = info_nce_loss(
            x=x,
            y=y,
            logit_scale=logit_scale,
            offset=pairs.offset,
            both_directions=False,
            reduction=reduction if reduces else "none",
            backend=backend,
            keep_stash=keeps_stash(stash, x, y, logit_scale),
            group_name="",
        ).loss
        if reduces:
            return losses
        if label_smoothing:
            spread = plain_smoothing(x, y, logit_scale, pairs.offset)
            losses = losses + label_smoothing * spread
        counted = torch.ones((), dtype=losses.dtype, device=x.device).expand(n)
    else:
        by_query = query_losses(
            op,
            x,
            y,
            logit_scale,
            pairs,
            negatives=negatives,
            label_smoothing=label_smoothing,
            backend=backend,
            stash=stash,
        )
        losses = by_query.loss_per_query.where(by_query.counted, 0)
        counted = by_query.counted.to(losses.dtype)
    return reduce_weighted(losses, counted, weights, reduction, columns)
