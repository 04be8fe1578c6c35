"""The loss of each query against keys that ``Pairs`` tells apart: contract, registered op and
gradient of ``contrastive_parts``, which every loss with ids, positions or biases is made of.

The op works on a strip, rows x [N, D] against columns y [M, D]. Statistics, [4, N] and [4, M], have
the rows of ``PairStatistics``. The results are ``positive_mean`` and ``gap`` = LSE -
positive_mean; with weights w_l of the LSE and w_m of the mean, G = w_l P [seen] +
w_m [positive] / count and dkey_bias_j = sum_i G_ij.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.kernels.results import ContrastiveGradients, PairStatistics
from protoclip.ops import checks, pairs, reference
from protoclip.ops.dispatch import function, resolve
from protoclip.ops.id_codes import coder_of
from protoclip.ops.operators import (
    PassTo,
    backend_operator,
    call_saved,
    define_gradient,
    direction_weight,
    empty,
    gradient_like,
    refuse_gradient,
    saved_values,
    saving,
    without_autocast,
)
from protoclip.ops.pairs import Gaps, Matching, SameId
from protoclip.ops.stash import empty_stash, fake_stash, keeps_stash
from protoclip.ops.sums import LN2, log_add, logits_of_negatives, smoothing, with_others

NUM_POSITIVES = PairStatistics._fields.index("num_positives")  # a row of the statistics


class ContrastiveLoss(NamedTuple):
    """Results of the forward pass: those of ``ContrastiveForward``, in order, and the stash."""

    gap: Tensor
    positive_mean: Tensor
    column_gap: Tensor
    column_positive_mean: Tensor
    row_statistics: Tensor
    column_statistics: Tensor
    stash: Tensor


def gaps_of(statistics: Tensor) -> Gaps:
    """[4, N] of base-2 logits -> [N] each."""
    rows = PairStatistics._make(statistics.unbind())
    mean = rows.positive_sum / rows.num_positives.clamp_min(1)
    gap = LN2 * (rows.sum.log2() + (rows.reference - mean))
    return Gaps(gap=gap, positive_mean=LN2 * mean, num_positives=rows.num_positives)


def _contrastive_shapes(arguments: Any) -> ContrastiveLoss:
    x, y = arguments.x, arguments.y
    n, m = x.shape[0], y.shape[0] if arguments.both_directions else 0
    by_row = arguments.reduction == "none"
    return ContrastiveLoss(
        gap=empty(x, n) if by_row else empty(x),
        positive_mean=empty(x, n if by_row else 0),
        column_gap=empty(x, m if by_row else 0),
        column_positive_mean=empty(x, m if by_row else 0),
        row_statistics=empty(x, 4, n),
        column_statistics=empty(x, 4, m),
        stash=fake_stash("contrastive", arguments.backend, x, y, arguments.keep_stash),
    )


@backend_operator("contrastive", _contrastive_shapes, ContrastiveLoss)
def contrastive_gaps(
    pass_to: PassTo,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gap and mean positive of each row and, with ``both_directions``, of each column; or, for
    "mean" and "sum" (N = M, both directions), the loss of the batch of pairs. ``own_key``
    to ``same_positive`` are ``Pairs.tensors()``."""
    stash = empty_stash("contrastive", backend, x, y, keep_stash)
    results = pass_to(
        function("contrastive", backend, "contrastive_fwd"),
        pair_weight=direction_weight(both_directions, reduction, x.shape[0]),
        summed=reduction != "none",
        stash=stash,
    )
    return (*results, stash)


def _contrastive_gradients_shapes(arguments: Any) -> ContrastiveGradients:
    x, y = arguments.x, arguments.y
    return ContrastiveGradients(
        dx=x.new_empty(x.shape),
        dy=y.new_empty(y.shape),
        dlogit_scale=empty(x),
        dkey_bias=empty(x, 0 if arguments.key_bias is None else y.shape[0]),
    )


@backend_operator("contrastive_bwd", _contrastive_gradients_shapes, ContrastiveGradients)
def contrastive_gradients(
    pass_to: PassTo,
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
    row_gap_weight: Tensor,
    row_positive_mean_weight: Tensor | None,
    column_gap_weight: Tensor,
    column_positive_mean_weight: Tensor | None,
    reduction: str,
    backend: str,
    stash: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for upstream gradients of the gaps, [N] and [M] of any stride, even 0, and of
    the means (None: 0). Of one direction the columns' are [0]."""
    # Not the caller's to compute: traced with symbolic sizes 1 / N would be a constant.
    pair_weight = direction_weight(reduction != "none", reduction, x.shape[0])
    run = function("contrastive", backend, "contrastive_bwd")
    return pass_to(run, pair_weight=pair_weight)


def _contrastive_backward(ctx: Any, grads: ContrastiveLoss) -> dict[str, Tensor]:
    upstream = (grads.gap, grads.positive_mean, grads.column_gap, grads.column_positive_mean)
    if all(gradient is None for gradient in upstream):
        return {}
    saved = saved_values(ctx)
    row_gap = grads.gap
    column_gap = grads.column_gap
    if saved.reduction != "none":
        row_gap = grads.gap.expand(saved.row_statistics.shape[1])
        column_gap = grads.gap.expand(saved.column_statistics.shape[1])
    if row_gap is None:
        row_gap = saved.row_statistics.new_zeros(()).expand(saved.row_statistics.shape[1])
    if column_gap is None:
        column_gap = saved.row_statistics.new_zeros(()).expand(saved.column_statistics.shape[1])
    gradients = call_saved(
        contrastive_gradients,
        saved,
        row_gap_weight=row_gap,
        row_positive_mean_weight=grads.positive_mean,
        column_gap_weight=column_gap,
        column_positive_mean_weight=grads.column_positive_mean,
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
    contrastive_gaps,
    save=saving(["row_statistics", "column_statistics", "stash"]),
    backward=_contrastive_backward,
)
refuse_gradient(contrastive_gradients, "contrastive")


def pair_loss(
    op: str,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    matching: Matching,
    *,
    reduction: str,
    backend: str,
    stash: bool | None,
) -> Tensor:
    """The loss, "mean" or "sum", of N pairs in both directions by a fused backend, where each row
    is a query whose own key is the same row of the other."""
    matched = pairs.pairs_of(op, x, y.shape[0], matching, coder_of(backend))
    return contrastive_gaps(
        x=x,
        y=y,
        logit_scale=logit_scale,
        **matched.tensors(),
        both_directions=True,
        reduction=reduction,
        backend=backend,
        keep_stash=keeps_stash(stash, x, y, logit_scale),
    ).gap


class QueryLosses(NamedTuple):
    """The loss of each query, in nats."""

    gap: Tensor  # log-sum-exp - mean positive, [N]
    positive_mean: Tensor  # mean logit of the positives, [N]
    counted: Tensor  # bool [N], whether the query has a loss
    column_gap: Tensor | None = None  # that of each key, [M], if it was asked for


def query_losses(
    op: str,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    matching: Matching,
    *,
    negatives: Tensor | None = None,
    label_smoothing: float = 0,
    backend: str,
    stash: bool | None,
    both_directions: bool = False,
) -> QueryLosses:
    """Queries x against keys y; ``matching`` says which are positives and negatives.
    ``both_directions``: keys are compared with queries too, for which N = M and ids are equal."""
    backend_name = resolve("contrastive", backend, x.device.type, x.dtype)
    matched = pairs.pairs_of(op, x, y.shape[0], matching, coder_of(backend_name))
    if backend_name == "reference" or x.device.type == "cpu":
        pairs.refuse_out_of_range(op, matched, y.shape[0])
    column_gap: Tensor | None = None
    if backend_name == "reference":
        with without_autocast(x.device.type):
            rows, columns = reference.contrastive(x, y, logit_scale, matched, both_directions)
        if columns is not None:
            column_gap = columns.gap
    else:
        differentiable = [x, y, logit_scale]
        if matched.key_bias is not None:
            differentiable.append(matched.key_bias)
        forward = contrastive_gaps(
            x=x,
            y=y,
            logit_scale=logit_scale,
            **matched.tensors(),
            both_directions=both_directions,
            reduction="none",
            backend=backend_name,
            keep_stash=keeps_stash(stash, *differentiable),
        )
        rows = Gaps(forward.gap, forward.positive_mean, forward.row_statistics[NUM_POSITIVES])
        if both_directions:
            column_gap = forward.column_gap
    gap = rows.gap
    positive_mean = rows.positive_mean
    if matched.others is not None:
        gap, positive_mean = with_others(
            x, y, logit_scale, matched, gap=gap, positive_mean=positive_mean
        )
    negative_logits: Tensor | None = None
    if negatives is not None and negatives.shape[1]:
        negative_logits = logits_of_negatives(x, negatives, logit_scale)
        gap = log_add(gap, negative_logits.logsumexp(dim=1) - positive_mean)
    if label_smoothing:
        spread = smoothing(x, y, logit_scale, matched, negative_logits)
        gap = gap + label_smoothing * spread
        if column_gap is not None:
            by_key = smoothing(y, x, logit_scale, matched)
            column_gap = column_gap + label_smoothing * by_key
    counted = rows.num_positives > 0
    if matched.left_out is not None:
        counted = counted & ~matched.left_out
    out_of_range = matched.out_of_range
    if out_of_range is not None:  # multiply, so that the gradient is NaN too
        gap = gap * torch.ones_like(gap).masked_fill(out_of_range, torch.nan)
        counted = counted | out_of_range
    return QueryLosses(gap, positive_mean, counted, column_gap)


def contrastive_parts(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: SameId = "exclude",
    exclude: Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: str = "auto",
    stash: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The two parts of ``contrastive``, to compose your own loss.

    To join several sets of keys, such as the batch and each query's own negatives, take the
    ``logaddexp`` of their log-sum-exps.

    The arguments are those of ``contrastive``.

    Returns:
        Log-sum-exp over the keys that each query sees (-inf: none), even if positives is -100,
        and mean logit of its positives (0: none); float32 [N] (float64 for float64 input). Both
        are as exact as fp32 at the size of the mean: a positive's bias of -1e6 costs 0.1 nats.
    Raises:
        ValueError, TypeError: as in ``contrastive``.

    Example:
        >>> queries, keys = torch.randn(2, 4, 16)
        >>> level, positive = protoclip.contrastive_parts(queries, keys, 1.0)
        >>> (level - positive).shape  # the loss of each query
        torch.Size([4])
    """
    matching = Matching(
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        same_id=same_id,
        exclude=exclude,
        key_bias=key_bias,
    )
    return one_way_parts(
        "contrastive_parts", queries, keys, logit_scale, matching, backend=backend, stash=stash
    )


def one_way_parts(
    op: str,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    matching: Matching,
    *,
    backend: str,
    stash: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """``contrastive_parts``."""
    x, y, logit_scale = checks.strip(op, ("queries", "keys"), queries, keys, logit_scale)
    losses = query_losses(op, x, y, logit_scale, matching, backend=backend, stash=stash)
    return losses.gap + losses.positive_mean, losses.positive_mean
