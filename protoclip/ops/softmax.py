"""The op of the contrastive losses, with its gradient, and the loss of each query: the engine of
``contrastive_losses.py``.

The op works on a strip, rows x [N, D] against columns y [M, D]; ``Pairs`` says which are positives
and negatives. Statistics are in base-2 logits (s2 = logit_scale * log2(e) * x.y): a ``reference``
and the ``sum`` of 2^(s2 - reference), so that a loss near zero does not cancel. The reference is
the maximum (C++), or the positive or a whole number near the log of the sum (Triton). With
``group_name`` the statistics of columns are merged over the ranks of a group, of which y are all
columns, and each rank has the losses of its own. Where row i belongs to column i + offset and sees
all columns (``Pairs.plain``: InfoNCE) backends compare no ids and no positions.

The gradients are dx = logit_scale * G y, dy = logit_scale * G^T x, dlogit_scale = sum G * (x.y) and
dkey_bias_j = sum_i G_ij, where G = row_weight * P_row [seen] + column_weight * P_column [seen] -
(weights at the positives) / (number of positives).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.kernels.results import (
    ContrastiveGradients,
    PairStatistics,
    empty_statistics,
)
from protoclip.ops import pairs as pairs_file
from protoclip.ops import reference
from protoclip.ops.columns import LOCAL, Local, columns_named
from protoclip.ops.dispatch import function
from protoclip.ops.id_codes import coder_of
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
from protoclip.ops.pairs import Compared, Pairs, QueryParts, pairs_of
from protoclip.ops.stash import empty_stash, fake_stash, filled, keeps_stash
from protoclip.ops.sums import (
    LN2,
    add_positives,
    log_add,
    logits_of_negatives,
    smoothing,
)

NUM_POSITIVES = PairStatistics._fields.index("num_positives")  # a row of the statistics


class ContrastiveLoss(NamedTuple):
    """Results of the forward pass: those of ``ContrastiveForward``, in order, and the stash."""

    loss: Tensor  # [N], or [] for "mean" and "sum"
    positive_mean: Tensor  # [N], or [0] of pairs, and for "mean" and "sum"
    row_statistics: Tensor  # [4, N rounded up], ``PairStatistics``
    column_statistics: Tensor  # [4, M rounded up], or [4, 0] of one direction
    stash: Tensor


def _contrastive_shapes(arguments: Any) -> ContrastiveLoss:
    x, y = arguments.x, arguments.y
    n = x.shape[0]
    by_row = arguments.reduction == "none"
    return ContrastiveLoss(
        loss=empty(x, n) if by_row else empty(x),
        positive_mean=empty(x, n if by_row and not arguments.both_directions else 0),
        row_statistics=empty_statistics(x, n),
        column_statistics=empty_statistics(x, y.shape[0] if arguments.both_directions else 0),
        stash=fake_stash("contrastive", arguments.backend, x, y, arguments.keep_stash),
    )


@operator("contrastive", _contrastive_shapes, ContrastiveLoss)
def contrastive_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    pairs: Compared,
    both_directions: bool,
    reduction: str,
    backend: str,
    keep_stash: bool,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each query or, with ``both_directions`` (N = M of each rank), of each pair: half
    the sum of both."""
    stash = empty_stash("contrastive", backend, x, y, keep_stash)
    weight = direction_weight(both_directions, reduction, x.shape[0])
    run = function("contrastive", backend, "contrastive_fwd")
    results = run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        **vars(pairs),
        both_directions=both_directions,
        pair_weight=weight,
        summed=reduction != "none" and not group_name,
        stash=filled(stash),
    )
    if not group_name:
        return (*results, stash)
    rows = results[2]
    columns = columns_named(group_name)
    merged = columns.merged(results[3])
    by_column = columns.own(gaps_of(merged, y.shape[0]))
    losses = weight * LN2 * (gaps_of(rows, x.shape[0]) + by_column)
    loss = losses if reduction == "none" else losses.sum()
    return ContrastiveLoss(loss, losses.new_empty(0), rows, merged, stash)


def gaps_of(statistics: Tensor, length: int) -> Tensor:
    """Log-sum-exp - mean positive of so many rows or columns, in base 2, [length]."""
    rows = PairStatistics._make(statistics[:, :length].unbind())
    mean = rows.positive_sum / rows.num_positives.clamp_min(1)
    return rows.sum.log2() + (rows.reference - mean)


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
    pairs: Compared,
    row_statistics: Tensor,
    column_statistics: Tensor,
    query_weight: Tensor,
    positive_mean_weight: Tensor | None,
    key_weight: Tensor,
    both_directions: bool,
    reduction: str,
    backend: str,
    stash: Tensor,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for upstream gradients of the losses of rows, [N], and of columns, [M] (of one
    direction [0]), of any stride, even 0, which are multiplied by ``direction_weight``; and of the
    positive means (None: 0)."""
    if group_name:
        key_weight = columns_named(group_name).gather(key_weight)
    run = function("contrastive", backend, "contrastive_bwd")
    return run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        **vars(pairs),
        row_statistics=row_statistics,
        column_statistics=column_statistics,
        query_weight=query_weight,
        positive_mean_weight=positive_mean_weight,
        key_weight=key_weight,
        # Not the caller's to compute: traced with symbolic sizes 1 / N would be a constant.
        pair_weight=direction_weight(both_directions, reduction, x.shape[0]),
        stash=filled(stash),
    )


def _contrastive_backward(ctx: Any, grads: ContrastiveLoss) -> dict[str, Tensor]:
    if grads.loss is None and grads.positive_mean is None:
        return {}
    saved = saved_values(ctx)
    has_means = saved.reduction == "none" and not saved.both_directions
    weight = saved.row_statistics.new_zeros(()) if grads.loss is None else grads.loss
    weight = weight.expand(saved.x.shape[0])
    gradients = call_saved(
        contrastive_gradients,
        saved,
        query_weight=weight,
        positive_mean_weight=grads.positive_mean if has_means else None,
        key_weight=weight if saved.both_directions else weight[:0],
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


class Strip(NamedTuple):
    """Queries against keys, as a public function has checked them."""

    x: Tensor  # [N, D], the queries
    y: Tensor  # [M, D], the keys of all ranks
    logit_scale: Tensor
    pairs: Pairs
    columns: Local  # of whose keys y are
    backend: str


def strip_of(
    op: str, x: Tensor, y: Tensor, logit_scale: Tensor, columns: Local, backend: str, **said: Any
) -> Strip:
    """Queries x against the keys y of each rank of ``columns``; what is ``said`` of them are
    arguments of ``pairs_of``."""
    pairs = pairs_of(op, x, y.shape[0], columns=columns, code_ids=coder_of(backend), **said)
    return Strip(x, columns.gather(y), logit_scale, pairs, columns, backend)


def fused_loss(
    strip: Strip,
    *,
    both_directions: bool = False,
    reduction: str = "none",
    stash: bool | None = None,
) -> ContrastiveLoss:
    """The op on a strip."""
    biases = () if strip.pairs.key_bias is None else (strip.pairs.key_bias,)
    return contrastive_loss(
        x=strip.x,
        y=strip.y,
        logit_scale=strip.logit_scale,
        pairs=strip.pairs,
        both_directions=both_directions,
        reduction=reduction,
        backend=strip.backend,
        keep_stash=keeps_stash(stash, strip.x, strip.y, strip.logit_scale, *biases),
        group_name=strip.columns.name if both_directions else "",
    )


class QueryLosses(NamedTuple):
    """The loss of each query, in nats."""

    loss_per_query: Tensor  # log-sum-exp - mean positive, [N]
    positive_mean: Tensor  # mean logit of the positives, [N]
    counted: Tensor  # bool [N], whether the query has a loss


def query_losses(
    op: str,
    strip: Strip,
    *,
    negatives: Tensor | None = None,
    label_smoothing: float = 0,
    stash: bool | None = None,
) -> QueryLosses:
    """The losses of the queries of a strip; ``negatives`` [N, H, D] are keys that only one sees."""
    x, y, logit_scale, pairs, _, backend = strip
    if backend == "reference" or x.device.type == "cpu":
        pairs_file.refuse_out_of_range(op, pairs, y.shape[0])
    if backend == "reference":
        with without_autocast(x.device.type):
            rows = reference.contrastive(x, y, logit_scale, pairs)
    else:
        forward = fused_loss(strip, stash=stash)
        num_positives = forward.row_statistics[NUM_POSITIVES, : x.shape[0]]
        rows = QueryParts(forward.loss, forward.positive_mean, num_positives)
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
    counted = rows.num_positives > 0
    if pairs.left_out is not None:
        counted = counted & ~pairs.left_out
    out_of_range = pairs.out_of_range
    if out_of_range is not None:  # multiply, so that the gradient is NaN too
        loss = loss * torch.ones_like(loss).masked_fill(out_of_range, torch.nan)
        counted = counted | out_of_range
    return QueryLosses(loss, positive_mean, counted)


def query_loss(
    op: str,
    strip: Strip,
    *,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    stash: bool | None = None,
) -> Tensor:
    """``contrastive`` of a strip."""
    pairs = strip.pairs
    all_count = pairs.plain and negatives is None and strip.columns is LOCAL
    weighs = weights is not None or label_smoothing or reduction == "none"
    if all_count and not weighs and strip.backend != "reference":
        return fused_loss(strip, reduction=reduction, stash=stash).loss
    by_query = query_losses(
        op, strip, negatives=negatives, label_smoothing=label_smoothing, stash=stash
    )
    losses = by_query.loss_per_query.where(by_query.counted, 0)
    counted = by_query.counted.to(losses.dtype)
    return reduce_weighted(losses, counted, weights, reduction, strip.columns)
