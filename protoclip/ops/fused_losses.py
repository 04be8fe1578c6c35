"""The fused forms of InfoNCE, the contrastive loss and SigLIP's: ops of torch.ops.protoclip.

All work on a strip: rows x [N, D] against columns y [M, D].

**InfoNCE.** Row i belongs to column i + offset. Statistics are in base-2 logits
(s2 = logit_scale * log2(e) * x.y): a ``reference`` and the ``sum`` of 2^(s2 - reference), so that a
loss near zero does not cancel. The reference is the maximum (C++), or the positive or a whole
number near the log of the sum (Triton). The backward pass of any loss built on the strip is
G = row_weight * P_row + column_weight * P_column - (weights at the positives),
dx = logit_scale * G y, dy = logit_scale * G^T x, dlogit_scale = sum G * (x.y).

**The contrastive loss.** ``Pairs`` gives the positives and negatives, not the diagonal. Statistics,
[4, N] and [4, M], have the rows of ``PairStatistics``.
The results are ``gap`` = LSE - mean positive, and ``mean``; with weights w_l of the LSE and w_m of
the mean, G = w_l P [seen] + w_m [positive] / count and dkey_bias_j = sum_i G_ij.

``info_nce`` runs the first where pairs have no ids, ``contrastive`` where each query has one own
key and sees them all; ids, positions and biases lead to the second, as do ``contrastive_parts``,
``nt_xent`` and ``sup_con``.

**Sigmoid.** The gradient needs no statistics of whole rows, so the backends compute it in the
forward pass, if it is wanted: three products instead of four. The backward pass only scales it.

The functions under ``@operator`` are ops, which return their results by name; call them by keyword.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.kernels.results import (
    ContrastiveGradients,
    Gradients,
    InfoNceStatistics,
    PairStatistics,
    SigmoidLoss,
)
from protoclip.ops.dispatch import CONTRASTIVE, INFO_NCE, SIGMOID_LOSS, StashFunctions
from protoclip.ops.operators import (
    define_gradient,
    empty,
    gradient_like,
    operator,
    refuse_gradient,
    save_tensors,
    saved_tensors,
    scaled,
    wants_gradient,
)
from protoclip.ops.pairs import Pairs
from protoclip.ops.rates import stash_pays

LN2 = math.log(2.0)
NUM_POSITIVES = PairStatistics._fields.index("num_positives")  # a row of the statistics


# ---- the stash: dot products that the forward pass leaves to the backward pass ----
# Bytes, an integer dtype, so that autograd takes it for no result with a gradient. An op returns
# tensors only: where nothing is stashed it is [0].


def keeps_stash(stash: bool | None, *inputs: Tensor) -> bool:
    """Whether a call leaves its dot products to its backward pass.

    An exported graph does not: it would hold only for batches whose products fit."""
    wanted = stash is not False and wants_gradient(*inputs)
    return wanted and not torch.compiler.is_exporting()


def no_stash(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _stash_bytes(x: Tensor, y: Tensor, stashing: StashFunctions | None, keep_stash: bool) -> int:
    if stashing is None or not keep_stash:
        return 0
    return stashing.num_bytes(x.shape[0], y.shape[0])


def _empty_stash(x: Tensor, y: Tensor, stashing: StashFunctions | None, keep_stash: bool) -> Tensor:
    """A stash to fill, if the products of x and y are to go there."""
    num_bytes = _stash_bytes(x, y, stashing, keep_stash)
    if stashing is None or not num_bytes:
        return no_stash(x)
    return stashing.empty(num_bytes)


def _fake_stash(x: Tensor, y: Tensor, stashing: StashFunctions | None, keep_stash: bool) -> Tensor:
    return x.new_empty(_stash_bytes(x, y, stashing, keep_stash), dtype=torch.uint8)


def _with_stash(
    function: Callable[..., Any], stashing: StashFunctions | None, stash: Tensor, x: Tensor
) -> Callable[..., Any]:
    """The function with the stash as an argument, if there is one and using it takes less time."""
    if stashing is None or not stash.numel():
        return function
    if not stash_pays(stashing.timed_forward, x, stash):
        return function
    return partial(function, stash=stash)


# ---- InfoNCE ----


class InfoNceLoss(NamedTuple):
    """Results of the forward pass."""

    loss: Tensor  # of each pair [N], or [] for "mean" and "sum"
    row_reference: Tensor  # [N]
    row_sum: Tensor  # [N]
    column_reference: Tensor  # [M], or [0] of one direction
    column_sum: Tensor  # [M], or [0] of one direction
    stash: Tensor


def info_nce_statistics(
    x: Tensor, y: Tensor, logit_scale: Tensor, *, offset: int, both_directions: bool, backend: str
) -> InfoNceStatistics:
    """The statistics of a strip, for a caller that merges them over ranks; no autograd."""
    run = INFO_NCE[backend].implementation.statistics
    results = run(x=x, y=y, logit_scale=logit_scale, offset=offset, both_directions=both_directions)
    return InfoNceStatistics(*results)


def weight_of_direction(both_directions: bool) -> float:
    """What one direction counts in the loss of a pair."""
    return 0.5 if both_directions else 1.0


def _pair_weight(weight: float, n: int, mean: bool) -> float:
    return weight / max(n, 1) if mean else weight


def _info_nce_loss_shapes(arguments: Any) -> InfoNceLoss:
    x, y = arguments.x, arguments.y
    n, m = x.shape[0], y.shape[0] if arguments.both_directions else 0
    stashing = INFO_NCE[arguments.backend].implementation.stashing
    return InfoNceLoss(
        loss=empty(x, n) if arguments.reduction == "none" else empty(x),
        row_reference=empty(x, n),
        row_sum=empty(x, n),
        column_reference=empty(x, m),
        column_sum=empty(x, m),
        stash=_fake_stash(x, y, stashing, arguments.keep_stash),
    )


@operator("info_nce", _info_nce_loss_shapes, InfoNceLoss)
def info_nce_loss(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    offset: int,
    both_directions: bool,
    reduction: str,
    backend: str,
    keep_stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row or, with ``both_directions`` (N = M), half the sum of both."""
    functions = INFO_NCE[backend].implementation
    stash = _empty_stash(x, y, functions.stashing, keep_stash)
    pair_weight = _pair_weight(
        weight_of_direction(both_directions), x.shape[0], reduction == "mean"
    )
    summed = reduction != "none"
    if functions.loss is not None:
        loss, statistics = functions.loss(
            x=x,
            y=y,
            logit_scale=logit_scale,
            offset=offset,
            both_directions=both_directions,
            pair_weight=pair_weight,
            summed=summed,
        )
    else:
        run = _with_stash(functions.statistics, functions.stashing, stash, x)
        results = run(
            x=x, y=y, logit_scale=logit_scale, offset=offset, both_directions=both_directions
        )
        statistics = InfoNceStatistics._make(results)
        loss = statistics.row_sum.log2() + (statistics.row_reference - statistics.positive)
        if both_directions:
            column_log_sum = statistics.column_sum.log2()
            loss = loss + (column_log_sum + (statistics.column_reference - statistics.positive))
        loss = (loss.sum() if summed else loss) * (LN2 * pair_weight)
    return InfoNceLoss(
        loss=loss,
        row_reference=statistics.row_reference,
        row_sum=statistics.row_sum,
        column_reference=statistics.column_reference,
        column_sum=statistics.column_sum,
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
    direction_weight: float,
    mean: bool,
    backend: str,
    stash: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for upstream gradients ``row_weight`` [N] and ``column_weight`` [M] of any
    stride, even 0, which are multiplied by ``direction_weight`` and, with ``mean``, by 1 / N.

    The positive's weight is row_weight[i] + column_weight[i + offset] (if given). ``column_*`` are
    [0] of one direction."""
    # Not the caller's to compute: traced with symbolic sizes 1 / N would be a constant.
    pair_weight = _pair_weight(direction_weight, x.shape[0], mean)
    functions = INFO_NCE[backend].implementation
    run = _with_stash(functions.gradients, functions.stashing, stash, x)
    if functions.takes_pair_weight:
        run = partial(run, pair_weight=pair_weight)
    else:
        row_weight = row_weight * pair_weight
        column_weight = column_weight * pair_weight
    return run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        row_reference=row_reference,
        row_sum=row_sum,
        column_reference=column_reference,
        column_sum=column_sum,
        row_weight=row_weight,
        column_weight=column_weight,
        offset=offset,
    )


def _save_info_nce_loss(ctx: Any, arguments: Any, results: InfoNceLoss) -> None:
    ctx.offset = arguments.offset
    ctx.both_directions = arguments.both_directions
    ctx.reduction = arguments.reduction
    ctx.backend = arguments.backend
    save_tensors(
        ctx,
        x=arguments.x,
        y=arguments.y,
        logit_scale=arguments.logit_scale,
        row_reference=results.row_reference,
        row_sum=results.row_sum,
        column_reference=results.column_reference,
        column_sum=results.column_sum,
        stash=results.stash,
    )
    ctx.set_materialize_grads(False)  # the statistics have none


def _info_nce_loss_backward(ctx: Any, grads: InfoNceLoss) -> dict[str, Tensor]:
    if grads.loss is None:
        return {}
    saved = saved_tensors(ctx)
    weight = grads.loss.expand(saved.x.shape[0])
    gradients = info_nce_gradients(
        x=saved.x,
        y=saved.y,
        logit_scale=saved.logit_scale,
        row_reference=saved.row_reference,
        row_sum=saved.row_sum,
        column_reference=saved.column_reference,
        column_sum=saved.column_sum,
        row_weight=weight,
        column_weight=weight if ctx.both_directions else weight[:0],
        offset=ctx.offset,
        direction_weight=weight_of_direction(ctx.both_directions),
        mean=ctx.reduction == "mean",
        backend=ctx.backend,
        stash=saved.stash,
    )
    return {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
    }


define_gradient(info_nce_loss, save=_save_info_nce_loss, backward=_info_nce_loss_backward)
refuse_gradient(info_nce_gradients, "info_nce")


# ---- the contrastive loss ----


class ContrastiveGaps(NamedTuple):
    """Results of the forward pass."""

    gap: Tensor  # of each row [N], in nats
    mean: Tensor  # [N]
    column_gap: Tensor  # [M], or [0] of one direction
    column_mean: Tensor
    row_statistics: Tensor  # [4, N], in the rows of PairStatistics
    column_statistics: Tensor  # [4, M], or [4, 0]
    stash: Tensor


class GapAndMean(NamedTuple):
    gap: Tensor  # LSE - mean positive, nats
    mean: Tensor  # mean logit of the positives, nats


def contrastive_gaps(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    *,
    both_directions: bool,
    backend: str,
    keep_stash: bool,
) -> ContrastiveGaps:
    """Gap and mean positive of each row and, with ``both_directions``, of each column."""
    return _contrastive_gaps(
        x=x,
        y=y,
        logit_scale=logit_scale,
        own=pairs.own,
        exclude=pairs.exclude,
        query_ids=pairs.query_ids,
        key_ids=pairs.key_ids,
        key_bias=pairs.key_bias,
        same_positive=pairs.same_positive,
        both_directions=both_directions,
        backend=backend,
        keep_stash=keep_stash,
    )


def contrastive_gradients(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    *,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    backend: str,
    stash: Tensor,
) -> ContrastiveGradients:
    """The gradients for weights [2, N] and [2, M] as ``side_weights`` gives them."""
    return _contrastive_bwd(
        x=x,
        y=y,
        logit_scale=logit_scale,
        own=pairs.own,
        exclude=pairs.exclude,
        query_ids=pairs.query_ids,
        key_ids=pairs.key_ids,
        key_bias=pairs.key_bias,
        same_positive=pairs.same_positive,
        row_statistics=row_statistics,
        column_statistics=column_statistics,
        row_weights=row_weights,
        column_weights=column_weights,
        backend=backend,
        stash=stash,
    )


def gap_and_mean(statistics: Tensor) -> GapAndMean:
    """[4, N] of base-2 logits -> [N] each."""
    rows = PairStatistics._make(statistics.unbind())
    mean = rows.positive_sum / rows.num_positives.clamp_min(1)
    return GapAndMean(gap=LN2 * (rows.sum.log2() + (rows.max - mean)), mean=LN2 * mean)


def side_weights(gap: Tensor | None, mean: Tensor | None, statistics: Tensor) -> Tensor:
    """Gradients of gap and mean -> gradients of the LSE and of the mean positive, [2, N]."""
    zero = statistics.new_zeros(statistics.shape[1])
    gap = zero if gap is None else gap
    mean = zero if mean is None else mean
    return torch.stack([gap, mean - gap])


def _contrastive_gaps_shapes(arguments: Any) -> ContrastiveGaps:
    x, y = arguments.x, arguments.y
    n, m = x.shape[0], y.shape[0] if arguments.both_directions else 0
    stashing = CONTRASTIVE[arguments.backend].implementation.stashing
    return ContrastiveGaps(
        gap=empty(x, n),
        mean=empty(x, n),
        column_gap=empty(x, m),
        column_mean=empty(x, m),
        row_statistics=empty(x, 4, n),
        column_statistics=empty(x, 4, m),
        stash=_fake_stash(x, y, stashing, arguments.keep_stash),
    )


@operator("contrastive", _contrastive_gaps_shapes, ContrastiveGaps)
def _contrastive_gaps(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own: Tensor,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    both_directions: bool,
    backend: str,
    keep_stash: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    functions = CONTRASTIVE[backend].implementation
    stash = _empty_stash(x, y, functions.stashing, keep_stash)
    run = _with_stash(functions.statistics, functions.stashing, stash, x)
    row_statistics, column_statistics = run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        own=own,
        exclude=exclude,
        query_ids=query_ids,
        key_ids=key_ids,
        key_bias=key_bias,
        same_positive=same_positive,
        both_directions=both_directions,
    )
    rows = gap_and_mean(row_statistics)
    by_column = gap_and_mean(column_statistics)
    return ContrastiveGaps(
        gap=rows.gap,
        mean=rows.mean,
        column_gap=by_column.gap,
        column_mean=by_column.mean,
        row_statistics=row_statistics,
        column_statistics=column_statistics,
        stash=stash,
    )


def _contrastive_bwd_shapes(arguments: Any) -> ContrastiveGradients:
    x, y = arguments.x, arguments.y
    return ContrastiveGradients(
        dx=x.new_empty(x.shape),
        dy=y.new_empty(y.shape),
        dlogit_scale=empty(x),
        dkey_bias=empty(x, y.shape[0]),
    )


@operator("contrastive_bwd", _contrastive_bwd_shapes, ContrastiveGradients)
def _contrastive_bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    own: Tensor,
    exclude: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    key_bias: Tensor | None,
    same_positive: bool,
    row_statistics: Tensor,
    column_statistics: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    backend: str,
    stash: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    functions = CONTRASTIVE[backend].implementation
    run = _with_stash(functions.gradients, functions.stashing, stash, x)
    return run(
        x=x,
        y=y,
        logit_scale=logit_scale,
        own=own,
        exclude=exclude,
        query_ids=query_ids,
        key_ids=key_ids,
        key_bias=key_bias,
        same_positive=same_positive,
        row_statistics=row_statistics,
        column_statistics=column_statistics,
        row_weights=row_weights,
        column_weights=column_weights,
    )


def _save_contrastive_gaps(ctx: Any, arguments: Any, results: ContrastiveGaps) -> None:
    ctx.same_positive = arguments.same_positive
    ctx.backend = arguments.backend
    save_tensors(
        ctx,
        x=arguments.x,
        y=arguments.y,
        logit_scale=arguments.logit_scale,
        own=arguments.own,
        exclude=arguments.exclude,
        query_ids=arguments.query_ids,
        key_ids=arguments.key_ids,
        key_bias=arguments.key_bias,
        row_statistics=results.row_statistics,
        column_statistics=results.column_statistics,
        stash=results.stash,
    )
    ctx.set_materialize_grads(False)


def _contrastive_gaps_backward(ctx: Any, grads: ContrastiveGaps) -> dict[str, Tensor]:
    if all(g is None for g in (grads.gap, grads.mean, grads.column_gap, grads.column_mean)):
        return {}
    saved = saved_tensors(ctx)
    gradients = _contrastive_bwd(
        x=saved.x,
        y=saved.y,
        logit_scale=saved.logit_scale,
        own=saved.own,
        exclude=saved.exclude,
        query_ids=saved.query_ids,
        key_ids=saved.key_ids,
        key_bias=saved.key_bias,
        same_positive=ctx.same_positive,
        row_statistics=saved.row_statistics,
        column_statistics=saved.column_statistics,
        row_weights=side_weights(grads.gap, grads.mean, saved.row_statistics),
        column_weights=side_weights(grads.column_gap, grads.column_mean, saved.column_statistics),
        backend=ctx.backend,
        stash=saved.stash,
    )
    by_name = {
        "x": gradients.dx,
        "y": gradients.dy,
        "logit_scale": gradient_like(gradients.dlogit_scale, saved.logit_scale),
    }
    if saved.key_bias is not None:
        by_name["key_bias"] = gradients.dkey_bias.to(saved.key_bias.dtype)
    return by_name


define_gradient(_contrastive_gaps, save=_save_contrastive_gaps, backward=_contrastive_gaps_backward)
refuse_gradient(_contrastive_bwd, "contrastive")


# ---- the sigmoid loss ----


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
    save_tensors(
        ctx,
        logit_scale=arguments.logit_scale,
        logit_bias=arguments.logit_bias,
        dx=results.dx,
        dy=results.dy,
        dlogit_scale=results.dlogit_scale,
        dlogit_bias=results.dlogit_bias,
    )
    ctx.set_materialize_grads(False)


def _sigmoid_backward(ctx: Any, grads: SigmoidLoss) -> dict[str, Tensor]:
    if grads.loss is None:
        return {}
    saved = saved_tensors(ctx)
    dlogit_scale = scaled(grad=grads.loss, saved=saved.dlogit_scale)
    dlogit_bias = scaled(grad=grads.loss, saved=saved.dlogit_bias)
    return {
        "x": scaled(grad=grads.loss, saved=saved.dx),
        "y": scaled(grad=grads.loss, saved=saved.dy),
        "logit_scale": gradient_like(dlogit_scale, saved.logit_scale),
        "logit_bias": gradient_like(dlogit_bias, saved.logit_bias),
    }


define_gradient(fused_sigmoid_loss, save=_save_sigmoid, backward=_sigmoid_backward)
