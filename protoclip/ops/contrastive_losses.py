"""The contrastive losses: contracts. ``softmax.py`` computes them.

``group`` says whose keys the queries see: None, those of this process, or those of all ranks of a
process group (``columns.py``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.ops import checks, reference
from protoclip.ops.columns import LOCAL, Local, columns_of
from protoclip.ops.dispatch import resolve
from protoclip.ops.operators import reduce, reduce_weighted, without_autocast
from protoclip.ops.pairs import SameId, check_ids
from protoclip.ops.softmax import fused_loss, query_loss, query_losses, strip_of
from protoclip.ops.sums import positive_means, smoothing


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
    group: dist.ProcessGroup | None = None,
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
        backend: "auto", or one of ``protoclip.backends("info_nce")``; a named one never falls back.
        stash: False: keep no logits for the backward pass. True or None: "cpu" keeps them, up to
            64 MiB (N = 4,096), where that is faster (``ops/stash.py``): 3 matrix products instead
            of 4, and the same bits.
        group: a process group whose ranks each pass their own pairs, as many on every rank: the
            keys are those of all ranks. None: those of this process. On a GPU only ranks whose
            number of pairs has changed compare it, and under ``torch.compile`` none does.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N], half the sum of the two
        directions. N = 0 gives 0. With ``group``: of this rank's pairs, and the mean over ranks of
        a "mean" and of its gradients is that of one process with all pairs.
    Raises:
        ValueError: shapes or devices disagree, the ranks have different numbers of pairs, the named
            backend cannot run, or ``label_smoothing`` is given with ``group``.
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
    checks.label_smoothing(op, label_smoothing)
    backend_name = resolve(op, backend, x.device.type, x.dtype)
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    columns = columns_of(op, group, x)
    if label_smoothing and columns is not LOCAL:
        raise ValueError(
            f"{op}: expected label_smoothing=0 with a group, as a text does not see the images of "
            f"other ranks, got {label_smoothing:g}; call contrastive(..., group=group) for each "
            "direction"
        )
    strip = strip_of(op, x, y, logit_scale, columns, backend_name, ids=ids, same_id=same_id)
    pairs = strip.pairs
    if backend_name != "reference":
        reduces = weights is None and not label_smoothing  # then the op gives a mean or sum
        losses = fused_loss(
            strip, both_directions=True, reduction=reduction if reduces else "none", stash=stash
        ).loss
        if reduces:
            return losses
    elif columns is LOCAL:
        with without_autocast(x.device.type):
            losses = reference.contrastive(
                x, y, logit_scale, pairs, both_directions=True
            ).loss_per_query
    else:
        images = query_losses(op, strip)
        texts = query_losses(op, strip._replace(x=y, y=columns.gather(x)))
        losses = (images.loss_per_query + texts.loss_per_query) / 2
    if label_smoothing:
        by_image = smoothing(x, y, logit_scale, pairs)
        by_text = smoothing(y, x, logit_scale, pairs)
        losses = losses + label_smoothing * (by_image + by_text) / 2
    if weights is None:
        return reduce(losses, reduction, x.shape[0])
    return reduce_weighted(losses, torch.ones_like(losses), weights, reduction, columns)


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
    group: dist.ProcessGroup | None = None,
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
        group: as in ``info_nce``, for queries and keys. M is the same on every rank, and
            ``positives`` and ``exclude`` count all keys: key j of rank r is r M + j. Without
            positives, query i's own key is key i of its rank. A "mean" is over all ranks' queries,
            however many count on each.
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
    op = "contrastive"
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.label_smoothing(op, label_smoothing)
    x, y, logit_scale = checks.strip(op, ("queries", "keys"), queries, keys, logit_scale)
    if negatives is not None:
        checks.negatives(op, negatives, x)
        x, y, negatives = checks.promoted(x, y, negatives)
    backend_name = resolve(op, backend, x.device.type, x.dtype)
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    columns = columns_of(op, group, y)
    strip = strip_of(
        op,
        x,
        y,
        logit_scale,
        columns,
        backend_name,
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        same_id=same_id,
        exclude=exclude,
        key_bias=key_bias,
    )
    return query_loss(
        op,
        strip,
        negatives=negatives,
        weights=weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        stash=stash,
    )


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
    group: dist.ProcessGroup | None = None,
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
    op = "contrastive_parts"
    x, y, logit_scale = checks.strip(op, ("queries", "keys"), queries, keys, logit_scale)
    backend_name = resolve("contrastive", backend, x.device.type, x.dtype)
    columns = columns_of(op, group, y)
    strip = strip_of(
        op,
        x,
        y,
        logit_scale,
        columns,
        backend_name,
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        same_id=same_id,
        exclude=exclude,
        key_bias=key_bias,
    )
    losses = query_losses(op, strip, stash=stash)
    return losses.loss_per_query + losses.positive_mean, losses.positive_mean


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
    group: dist.ProcessGroup | None = None,
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
        logit_scale, reduction, backend, group: as in ``contrastive``; "none" gives [2N], views_a
            first.
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
    x, y, logit_scale = checks.equal_rows(op, views_a, views_b, logit_scale)
    n = x.shape[0]
    columns = columns_of(op, group, x)
    if ids is not None:
        ids = check_ids(op, "ids", ids, n, x.device)
    elif decoupled:  # what is not seen is told by ids
        first_sample = columns.first(n)
        ids = torch.arange(first_sample, first_sample + n, device=x.device)
    if weights is not None:
        checks.weights(op, weights, x, "")
        weights = torch.cat([weights, weights])
    first = columns.first(2 * n)
    itself = torch.arange(first, first + 2 * n, device=x.device)
    return self_contrastive(
        op,
        torch.cat([x, y]),
        logit_scale,
        columns,
        ids=None if ids is None else torch.cat([ids, ids]),
        same_id=same_id,
        itself=itself,
        positives=itself.roll(n),
        decoupled=decoupled,
        weights=weights,
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
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The supervised contrastive loss: all other rows with a row's label are its positives.

    Args:
        features: [N, D], unit rows, or [N, V, D], V views of each sample.
        labels: int64 [N]; a row whose label no other row has, or whose label is not known (-100),
            is left out, and is a negative of the others.
        weights: float32 [N] >= 0, one per sample, for all of its views.
        logit_scale, label_smoothing, reduction, backend, group: as in ``contrastive``; "none"
            gives one value per view, [N] or [N, V].
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
    rows = features
    if isinstance(features, Tensor) and features.ndim == 3:
        samples = features[:, 0] if features.shape[1] else features.flatten(1)
        labels = checks.labels(op, labels, samples)
        if weights is not None:
            checks.weights(op, weights, samples, "")
            weights = weights.repeat_interleave(features.shape[1])
        labels = labels.repeat_interleave(features.shape[1])
        rows = features.flatten(0, 1)
    x, _, logit_scale = checks.strip(op, ("features", "features"), rows, rows, logit_scale)
    labels = checks.labels(op, labels, x)
    columns = columns_of(op, group, x)
    first = columns.first(x.shape[0])
    itself = torch.arange(first, first + x.shape[0], device=x.device)
    # Rows of unknown labels have a label each.
    labels = labels.where(labels != checks.LEFT_OUT, itself + torch.iinfo(torch.int64).min)
    losses = self_contrastive(
        op,
        x,
        logit_scale,
        columns,
        ids=labels,
        same_id="positive",
        itself=itself,
        weights=weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
    )
    return losses.reshape(features.shape[:-1]) if reduction == "none" else losses


def self_contrastive(
    op: str,
    x: Tensor,
    logit_scale: Tensor,
    columns: Local,
    *,
    ids: Tensor | None,
    same_id: str,
    itself: Tensor,
    positives: Tensor | None = None,
    decoupled: bool = False,
    weights: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str,
) -> Tensor:
    """The loss of rows that are queries and keys of each other, at the positions ``itself``."""
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.label_smoothing(op, label_smoothing)
    backend_name = resolve("contrastive", backend, x.device.type, x.dtype)
    if weights is not None:
        checks.weights(op, weights, x, backend_name)
    strip = strip_of(
        op,
        x,
        x,
        logit_scale,
        columns,
        backend_name,
        positives=positives,
        ids=ids,
        same_id=same_id,
        exclude=itself,
    )
    if not decoupled:
        return query_loss(
            op, strip, weights=weights, label_smoothing=label_smoothing, reduction=reduction
        )
    positive = positive_means(x, strip.y, logit_scale, strip.pairs)
    # Without positives, whose ids hide them, a query's loss is the log-sum-exp.
    no_key = torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)
    negatives = strip._replace(pairs=replace(strip.pairs, own_key=no_key, same_positive=False))
    log_sum_exp = query_losses(op, negatives, label_smoothing=label_smoothing).loss_per_query
    counted = (positive.number > 0) & (log_sum_exp != -torch.inf)
    losses = (log_sum_exp - (1 - label_smoothing) * positive.mean).where(counted, 0)
    return reduce_weighted(losses, counted.to(losses.dtype), weights, reduction, columns)
