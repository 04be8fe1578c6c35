"""InfoNCE, the general contrastive loss, and SigLIP's: contract, checks and dispatch.

The fused computation and its gradients are in ``fused_losses.py``, the plain one in
``reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from protoclip.ops import checks, pairs, reference
from protoclip.ops.dispatch import resolve
from protoclip.ops.fused_losses import (
    NUM_POSITIVES,
    contrastive_gaps,
    fused_sigmoid_loss,
    info_nce_loss,
    keeps_stash,
)
from protoclip.ops.operators import (
    accumulator,
    reduce,
    reduce_weighted,
    wants_gradient,
    without_autocast,
)
from protoclip.ops.pairs import Matching, SameId
from protoclip.ops.sums import (
    log_add,
    logits_of_negatives,
    plain_smoothing,
    smoothing,
    with_others,
)


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
            64 MiB (N = 4,096), where this processor gains by it (``ops/rates.py``): 3 matrix
            products instead of 4, and the same bits.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N], half the sum of the two
        directions. N = 0 gives 0.
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point.
    Source:
        Radford et al. 2021 (CLIP), figure 3.
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
    if ids is not None:
        pairs.check_ids(op, "ids", ids, n, x.device)
        matching = Matching(query_ids=ids, key_ids=ids, same_id=same_id)
        query_losses = _query_losses(
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
        assert query_losses.column_gap is not None
        losses = (query_losses.gap + query_losses.column_gap) / 2
    elif backend_name == "reference":
        with without_autocast(x.device.type):
            losses = reference.info_nce(x, y, logit_scale, label_smoothing)
    else:
        reduces = weights is None and not label_smoothing  # then the op reduces the losses itself
        result = info_nce_loss(
            x=x,
            y=y,
            logit_scale=logit_scale,
            offset=0,
            both_directions=True,
            reduction=reduction if reduces else "none",
            backend=backend_name,
            keep_stash=keeps_stash(stash, x, y, logit_scale),
        )
        losses = result.loss
        if reduces:
            return losses
        if label_smoothing:
            images = plain_smoothing(x, y, logit_scale, first=0)
            texts = plain_smoothing(y, x, logit_scale, first=0)
            losses = losses + label_smoothing * ((images + texts) / 2)
    if weights is None:
        return reduce(losses, reduction, n)
    return reduce_weighted(losses, torch.ones_like(losses), weights, reduction)


class QueryLosses(NamedTuple):
    """The loss of each query, in nats."""

    gap: Tensor  # log-sum-exp - mean positive, [N]
    mean: Tensor  # mean logit of the positives, [N]
    counted: Tensor  # bool [N], whether the query has a loss
    column_gap: Tensor | None = None  # that of each key, [M], if it was asked for


def _query_losses(
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
    ``both_directions``: also keys against queries, of which both have the same ids."""
    matched_pairs = pairs.pairs_of(op, x, y.shape[0], matching)
    backend_name = resolve("contrastive", backend, x.device.type, x.dtype)
    if backend_name == "reference" or x.device.type == "cpu":
        pairs.refuse_wrong(op, matched_pairs, y.shape[0])
    if backend_name == "reference":
        with without_autocast(x.device.type):
            rows, by_column = reference.contrastive(
                x, y, logit_scale, matched_pairs, both_directions
            )
        gap = rows.gap
        mean = rows.mean
        num_positives = rows.num_positives
        column_gap = None if by_column is None else by_column.gap
    else:
        differentiable = [x, y, logit_scale]
        if matched_pairs.key_bias is not None:
            differentiable.append(matched_pairs.key_bias)
        gaps = contrastive_gaps(
            x,
            y,
            logit_scale,
            matched_pairs,
            both_directions=both_directions,
            backend=backend_name,
            keep_stash=keeps_stash(stash, *differentiable),
        )
        gap = gaps.gap
        mean = gaps.mean
        num_positives = gaps.row_statistics[NUM_POSITIVES]
        column_gap = gaps.column_gap if both_directions else None
    if matched_pairs.others is not None:
        gap, mean = with_others(x, y, logit_scale, matched_pairs, gap=gap, mean=mean)
    negative_logits: Tensor | None = None
    if negatives is not None and negatives.shape[1]:
        negative_logits = logits_of_negatives(x, negatives, logit_scale)
        gap = log_add(gap, negative_logits.logsumexp(dim=1) - mean)
    if label_smoothing:
        spread = smoothing(x, y, logit_scale, matched_pairs, negative_logits)
        gap = gap + label_smoothing * spread
        if column_gap is not None:
            by_key = smoothing(y, x, logit_scale, matched_pairs)
            column_gap = column_gap + label_smoothing * by_key
    counted = num_positives > 0
    if matched_pairs.left_out is not None:
        counted = counted & ~matched_pairs.left_out
    if matched_pairs.wrong is not None:  # multiply, so that the gradient is NaN too
        gap = gap * torch.ones_like(gap).masked_fill(matched_pairs.wrong, torch.nan)
        counted = counted | matched_pairs.wrong
    return QueryLosses(gap, mean, counted, column_gap)


def contrastive(
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
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
) -> Tensor:
    """Cross-entropy of queries against keys, without the [N, M] logits in memory.

    The logits are l_ij = logit_scale q_i.k_j + key_bias_j. A query's loss is the log-sum-exp over
    the keys that it sees minus the mean logit of its positives. It sees every key except those of
    its own id (unless they are positives) and the one that it excludes. Sums are fp32, and
    O(N + M) values are saved.

    Args:
        queries, keys: [N, D] and [M, D], in ``info_nce``'s dtypes. Extra keys, such as hard
            negatives or a queue, are negatives.
        positives: int64 [N], the position of each query's own key; -100: the query is left out.
            [N, P]: several own keys, padded with -100. All of them are seen: the loss of a query
            with two is at least log 2, as each is in the denominator of the other.
            None: query i's own key is key i; with ids and same_id="positive" there is none.
        query_ids, key_ids: int64 [N] or [N, R] and [M] or [M, R], R <= 2: equal in any column is
            the same thing. query_ids=None: ids of the (first) own keys. Unknown ids: give unique
            ones.
        same_id: "exclude": keys of the same id are not negatives; "positive": they are positives.
        exclude: int64 [N], one key that a query never sees, such as itself; negative: none.
        key_bias: float32 [M], added to each key's logits, with a gradient; -inf removes the key.
        negatives: [N, H, D], H further keys that only query i sees, such as its hard negatives.
            Their N x H logits are computed by torch.
        weights: float32 [N] >= 0, one per query, without a gradient.
        label_smoothing: as in ``info_nce``, over all keys that a query sees.
        reduction: "mean": the sum of weighted losses over the total weight of the queries with a
            positive, 0 if none has one; "sum"; or "none": weighted losses, 0 where left out.
        logit_scale, backend, stash: as in ``info_nce``.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N].
    Raises:
        ValueError, TypeError: as in ``info_nce``; also if ids or positives are missing or not
            int64, and on a CPU or by the reference if a position is out of range or a weight is
            negative. A GPU's values, and those in compiled code, are not read: there a position
            out of range gives NaN.
    """
    matching = Matching(
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        same_id=same_id,
        exclude=exclude,
        key_bias=key_bias,
    )
    return one_way(
        "contrastive",
        queries,
        keys,
        logit_scale,
        matching,
        negatives=negatives,
        weights=weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
        stash=stash,
    )


def one_way(
    op: str,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    matching: Matching,
    *,
    negatives: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``contrastive``; ``average`` averages a divisor over ranks."""
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.one_of(op, "same_id", matching.same_id, pairs.SAME_ID)
    checks.label_smoothing(op, label_smoothing)
    x, y, logit_scale = checks.strip(op, ("queries", "keys"), queries, keys, logit_scale)
    if negatives is not None:
        checks.negatives(op, negatives, x)
        x, y, negatives = checks.promoted(x, y, negatives)
    n, m = x.shape[0], y.shape[0]
    backend_name = resolve("contrastive", backend, x.device.type, x.dtype)
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    counted = torch.ones((), dtype=accumulator(x), device=x.device).expand(n)
    fits = matching.plain and negatives is None and matching.first + n <= m
    if backend_name != "reference" and fits:
        # Without any of these the op reduces the losses itself.
        reduces = weights is None and average is None and not label_smoothing
        result = info_nce_loss(
            x=x,
            y=y,
            logit_scale=logit_scale,
            offset=matching.first,
            both_directions=False,
            reduction=reduction if reduces else "none",
            backend=backend_name,
            keep_stash=keeps_stash(stash, x, y, logit_scale),
        )
        losses = result.loss
        if reduces:
            return losses
        if label_smoothing:
            spread = plain_smoothing(x, y, logit_scale, matching.first)
            losses = losses + label_smoothing * spread
    else:
        query_losses = _query_losses(
            op,
            x,
            y,
            logit_scale,
            matching,
            negatives=negatives,
            label_smoothing=label_smoothing,
            backend=backend_name,
            stash=stash,
        )
        losses = query_losses.gap.where(query_losses.counted, 0)
        counted = query_losses.counted.to(losses.dtype)
    return reduce_weighted(losses, counted, weights, reduction, average)


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

    Args: those of ``contrastive``.

    Returns:
        Log-sum-exp over the keys that each query sees (-inf: none), even if positives is -100,
        and mean logit of its positives (0: none); float32 [N] (float64 for float64 input). Both
        are as exact as fp32 at the size of the mean: a positive's bias of -1e6 costs 0.1 nats.
    Raises:
        ValueError, TypeError: as in ``contrastive``.
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
    query_losses = _query_losses(op, x, y, logit_scale, matching, backend=backend, stash=stash)
    return query_losses.gap + query_losses.mean, query_losses.mean


def nt_xent(
    views_a: Tensor,
    views_b: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """SimCLR's loss: each view against the other 2N - 1; its sample's other view is the positive.

    Args:
        views_a, views_b: [N, D], unit rows; row i of each is a view of sample i.
        ids: int64 [N] or [N, R], R <= 2, of the samples: equal in any column is the same thing.
        same_id: "exclude": views of other samples with the same id are not negatives; "positive":
            they are positives.
        logit_scale, reduction, backend: as in ``contrastive``; "none" gives [2N], views_a first.
    Returns:
        float32 [], nats per view.
    Source:
        Chen et al. 2020 (SimCLR), equation 1.
    """
    op = "nt_xent"
    x, y, logit_scale = checks.equal_rows(op, views_a, views_b, logit_scale)
    if ids is not None:
        pairs.check_ids(op, "ids", ids, x.shape[0], x.device)
        ids = torch.cat([ids, ids])
    views = torch.cat([x, y])
    itself = torch.arange(views.shape[0], device=x.device)
    matching = Matching(
        positives=itself.roll(x.shape[0]),
        query_ids=ids,
        key_ids=ids,
        same_id=same_id,
        exclude=itself,
    )
    return one_way(op, views, views, logit_scale, matching, reduction=reduction, backend=backend)


def sup_con(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The supervised contrastive loss: all other rows with a row's label are its positives.

    Args:
        features: [N, D], unit rows; several views of a sample are several rows.
        labels: int64 [N]; a row whose label no other row has is left out.
        logit_scale, reduction, backend: as in ``contrastive``.
    Returns:
        float32 [], nats per row.
    Source:
        Khosla et al. 2020 (SupCon), equation 2, without the factor temperature / base temperature.
    """
    op = "sup_con"
    checks.matrix(op, "features", features, "[N, D]")
    checks.labels(op, labels, features)
    itself = torch.arange(features.shape[0], device=features.device)
    matching = Matching(query_ids=labels, key_ids=labels, same_id="positive", exclude=itself)
    return one_way(
        op, features, features, logit_scale, matching, reduction=reduction, backend=backend
    )


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
    matching = Matching(same_id=same_id, first=offset)
    if ids is not None:
        pairs.check_ids(op, "ids", ids, m, x.device)
        own_ids = ids[offset : offset + n]
        matching = Matching(query_ids=own_ids, key_ids=ids, same_id=same_id, first=offset)
    matched_pairs = pairs.pairs_of(op, x, m, matching)
    backend_name = resolve(op, backend, x.device.type, x.dtype)
    if backend_name == "reference":
        with without_autocast(x.device.type):
            return reference.sigmoid_loss(x, y, logit_scale, logit_bias, matched_pairs)
    result = fused_sigmoid_loss(
        x=x,
        y=y,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        offset=offset,
        gradients=wants_gradient(x, y, logit_scale, logit_bias),
        backend=backend_name,
        query_ids=matched_pairs.query_ids,
        key_ids=matched_pairs.key_ids,
        same_positive=matched_pairs.same_positive,
    )
    return result.loss
