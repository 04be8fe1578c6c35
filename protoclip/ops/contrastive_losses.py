"""The contrastive losses that are made of ``query_losses.py`` or, where each query has one own key
and sees all others, of ``info_nce_loss.py``: contracts. They have no op of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from protoclip.ops import checks, pairs
from protoclip.ops.dispatch import resolve
from protoclip.ops.info_nce_loss import diagonal_losses
from protoclip.ops.operators import accumulator, reduce_weighted
from protoclip.ops.pairs import Matching, SameId
from protoclip.ops.query_losses import query_losses
from protoclip.ops.sums import positive_means


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
    O(N + M) values are saved, and the ``stash`` where there is one; with several positives and ids
    that are not positives also their keys, N P D in fp64.

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
            Finite ones below -5e29 count as that.
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

    Example:
        >>> queries, passages = torch.randn(4, 16), torch.randn(4, 16)
        >>> hard_negatives = torch.randn(8, 16)
        >>> keys = torch.cat([passages, hard_negatives])
        >>> protoclip.contrastive(queries, keys, logit_scale=1.0).shape
        torch.Size([])
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
    fits = matching.plain and negatives is None and matching.offset + n <= m
    if backend_name != "reference" and fits:
        reduces = weights is None and average is None and not label_smoothing
        losses = diagonal_losses(
            x,
            y,
            logit_scale,
            offset=matching.offset,
            both_directions=False,
            label_smoothing=label_smoothing,
            reduction=reduction if reduces else "none",
            backend=backend_name,
            stash=stash,
        )
        if reduces:
            return losses
    else:
        by_query = query_losses(
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
        losses = by_query.gap.where(by_query.counted, 0)
        counted = by_query.counted.to(losses.dtype)
    return reduce_weighted(losses, counted, weights, reduction, average)


class Views(NamedTuple):
    """Rows that are queries and keys of each other."""

    features: Tensor  # [N, D]
    logit_scale: Tensor
    matching: Matching
    weights: Tensor | None  # [N]


def nt_xent(
    views_a: Tensor,
    views_b: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    decoupled: bool = False,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """SimCLR's loss: each view against the other 2N - 1; its sample's other view is the positive.

    Args:
        views_a, views_b: [N, D], unit rows; row i of each is a view of sample i.
        ids: int64 [N] or [N, R], R <= 2, of the samples: equal in any column is the same thing.
        same_id: "exclude": views of other samples with the same id are not negatives; "positive":
            they are positives.
        decoupled: leave the positives out of the log-sum-exp (DCL); a view without a negative has
            no loss.
        weights: float32 [N] >= 0, one per sample, for both of its views.
        label_smoothing: as in ``contrastive``.
        logit_scale, reduction, backend: as in ``contrastive``; "none" gives [2N], views_a first.
    Returns:
        float32 [], nats per view.
    Source:
        Chen et al. 2020 (SimCLR), equation 1; Yeh et al. 2022 (DCL), equation 5.

    Example:
        >>> views = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> protoclip.nt_xent(views[0], views[1], logit_scale=2.0).shape
        torch.Size([])
    """
    op = "nt_xent"
    views = two_views(op, views_a, views_b, logit_scale, ids, same_id, decoupled, weights)
    return against_each_other(
        op,
        views,
        decoupled=decoupled,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
    )


def sup_con(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The supervised contrastive loss: all other rows with a row's label are its positives.

    Args:
        features: [N, D], unit rows, or [N, V, D], V views of each sample.
        labels: int64 [N]; a row whose label no other row has, or whose label is not known (-100),
            is left out, and is a negative of the others.
        weights: float32 [N] >= 0, one per sample, for all of its views.
        logit_scale, label_smoothing, reduction, backend: as in ``contrastive``; "none" gives one
            value per view, [N] or [N, V].
    Returns:
        float32 [], nats per row.
    Source:
        Khosla et al. 2020 (SupCon), equation 2, without the factor temperature / base temperature.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(6, 16), dim=1)
        >>> protoclip.sup_con(features, torch.tensor([0, 0, 1, 1, 2, 2]), logit_scale=10.0).shape
        torch.Size([])
    """
    op = "sup_con"
    views = labelled_views(op, features, labels, logit_scale, weights)
    losses = against_each_other(
        op,
        views,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
    )
    return losses.reshape(features.shape[:-1]) if reduction == "none" else losses


def two_views(
    op: str,
    views_a: Tensor,
    views_b: Tensor,
    logit_scale: Tensor | float,
    ids: Tensor | None,
    same_id: SameId,
    decoupled: bool,
    weights: Tensor | None,
    first: int = 0,
) -> Views:
    """The arguments of ``nt_xent`` for views that are keys ``first`` and following."""
    x, y, logit_scale = checks.equal_rows(op, views_a, views_b, logit_scale)
    if ids is not None:
        ids = pairs.check_ids(op, "ids", ids, x.shape[0], x.device)
    elif decoupled:  # what is not seen is told by ids
        ids = torch.arange(first, first + x.shape[0], device=x.device)
    if ids is not None:
        ids = torch.cat([ids, ids])
    if weights is not None:
        checks.weights(op, weights, x, "")
        weights = torch.cat([weights, weights])
    features = torch.cat([x, y])
    itself = torch.arange(first, first + features.shape[0], device=x.device)
    matching = Matching(
        positives=itself.roll(x.shape[0]),
        query_ids=ids,
        key_ids=ids,
        same_id=same_id,
        exclude=itself,
    )
    return Views(features, logit_scale, matching, weights)


def labelled_views(
    op: str,
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    weights: Tensor | None,
    first: int = 0,
) -> Views:
    """The arguments of ``sup_con`` for rows that are keys ``first`` and following."""
    if isinstance(features, Tensor) and features.ndim == 3:
        samples = features[:, 0] if features.shape[1] else features.flatten(1)
        labels = checks.labels(op, labels, samples)
        if weights is not None:
            checks.weights(op, weights, samples, "")
            weights = weights.repeat_interleave(features.shape[1])
        labels = labels.repeat_interleave(features.shape[1])
        features = features.flatten(0, 1)
    x, _, logit_scale = checks.strip(op, ("features", "features"), features, features, logit_scale)
    labels = checks.labels(op, labels, x)
    itself = torch.arange(first, first + x.shape[0], device=x.device)
    # Rows of unknown labels have a label each.
    labels = labels.where(labels != checks.LEFT_OUT, itself + torch.iinfo(torch.int64).min)
    matching = Matching(query_ids=labels, key_ids=labels, same_id="positive", exclude=itself)
    return Views(x, logit_scale, matching, weights)


def against_each_other(
    op: str,
    views: Views,
    *,
    keys: Tensor | None = None,
    matching: Matching | None = None,
    decoupled: bool = False,
    label_smoothing: float,
    reduction: str,
    backend: str,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of views against each other; or against ``keys``, with their ``matching``: the views
    of all ranks, over which ``average`` averages a divisor."""
    keys = views.features if keys is None else keys
    matching = views.matching if matching is None else matching
    if not decoupled:
        return one_way(
            op,
            views.features,
            keys,
            views.logit_scale,
            matching,
            weights=views.weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=backend,
            average=average,
        )
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.label_smoothing(op, label_smoothing)
    x = views.features
    scale = views.logit_scale
    backend_name = resolve("contrastive", backend, x.device.type, x.dtype)
    if views.weights is not None:
        checks.weights(op, views.weights, x, backend_name)
    matched = pairs.pairs_of(op, x, keys.shape[0], matching)
    positives = positive_means(x, keys, scale, matched)
    without_own = torch.full((x.shape[0],), checks.LEFT_OUT, device=x.device)
    negatives = replace(matching, positives=without_own, same_id="exclude")
    # A gap without positives is the log-sum-exp.
    log_sum_exp = query_losses(
        op,
        x,
        keys,
        scale,
        negatives,
        label_smoothing=label_smoothing,
        backend=backend_name,
        stash=None,
    ).gap
    counted = (positives.number > 0) & (log_sum_exp != -torch.inf)
    losses = (log_sum_exp - (1 - label_smoothing) * positives.mean).where(counted, 0)
    return reduce_weighted(losses, counted.to(losses.dtype), views.weights, reduction, average)
