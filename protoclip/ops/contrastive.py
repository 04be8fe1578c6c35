"""InfoNCE and SigLIP's sigmoid loss: contract, autograd and dispatch.

All fused backends share one strip: rows x [N, D] against columns y [M, D], row i belonging to
column i + offset. Statistics are in base-2 logits (s2 = scale * log2(e) * x.y), as a reference
value ``max`` and ``sum`` of 2^(s2 - max), so that a loss near zero does not cancel. The backward of
any loss built on the strip is G = row_weight * P_row + column_weight * P_column - (weights at the
positives), dx = scale * G y, dy = scale * G^T x, dscale = sum G * (x.y).

A matched strip is one whose positives and negatives are not those of the diagonal (``Pairs``). Its
statistics, [4, N] and [4, M], are max and sum over the keys seen, then sum and count of the
positives' logits. It gives ``gap`` = LSE - mean positive, and ``mean``; with weights w_l of the LSE
and w_m of the mean, G = w_l P [seen] + w_m [positive] / count and dbias_j = sum_i G_ij.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from protoclip.ops import checks, pairs, reference
from protoclip.ops.backends import (
    ANY_FLOAT,
    accumulator,
    define,
    define_gradient,
    implementation,
    reduce,
    resolve,
    wants_gradient,
    without_autocast,
)
from protoclip.ops.pairs import Given, SameId

LN2 = math.log(2.0)
FUSED_LOSS = ("triton",)  # backends whose kernels also take the loss, and weigh its gradient


def _fwd(x: Tensor, y: Tensor, scale: Tensor, offset: int, columns: bool, backend: str):
    """-> row_max [N], row_sum [N], column_max [M], column_sum [M] (both [0] without columns),
    positive [N]; fp32, base-2 logits."""
    return implementation("info_nce", backend, "contrastive_fwd")(x, y, scale, offset, columns)


def _bwd(x: Tensor, y: Tensor, scale: Tensor, *rest):
    """-> dx, dy in the inputs' dtypes, dscale fp32 []. ``column_*`` are [0] without columns.

    The positive's weight is row_weight[i] + column_weight[i + offset] (the latter where given).
    ``stash`` is that of ``contrastive``; empty or None: the logits are formed again. With a
    ``reduction`` the weights are upstream gradients of ``contrastive``; they may have stride 0."""
    *statistics, row_weight, column_weight, offset, backend = rest[:8]
    stash, reduction = (*rest[8:], None, None)[:2]
    run = implementation("info_nce", backend, "contrastive_bwd")
    options = _kept_option(stash)
    if reduction is not None:
        weight = _direction_weight(reduction, x.shape[0], len(column_weight) > 0)
        if backend in FUSED_LOSS:
            options["pair_weight"] = weight
        else:
            row_weight, column_weight = row_weight * weight, column_weight * weight
    return run(x, y, scale, *statistics, row_weight, column_weight, offset, **options)


def _direction_weight(reduction: str, n: int, columns: bool) -> float:
    """What the loss of a pair in one direction is multiplied by."""
    weight = 0.5 if columns else 1.0
    return weight / max(n, 1) if reduction == "mean" else weight


def _stash_size(x: Tensor, y: Tensor, backend: str, stash: bool):
    """Elements, int16, of what a backend keeps of the logits where it is asked to."""
    if not stash or backend != "cpu":
        return 0
    return implementation("info_nce", backend, "stash_size")(x.shape[0], y.shape[0])


def _contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: int,
    columns: bool,
    reduction: str,
    backend: str,
    stash: bool = False,
):
    """-> the loss, then what is kept for backward: the four statistics and the stash (or [0]).

    The loss of a row; with columns, which takes as many as rows, half the sum of both directions.
    [N], or [] for "mean" and "sum"."""
    kept = _kept(x, y, backend, stash)
    weight, summed = _direction_weight(reduction, x.shape[0], columns), reduction != "none"
    if backend in FUSED_LOSS:
        fused = implementation("info_nce", backend, "contrastive")
        return *fused(x, y, scale, offset, columns, weight, summed), kept
    run = implementation("info_nce", backend, "contrastive_fwd")
    stats = run(x, y, scale, offset, columns, **_kept_option(kept))
    return _pair_losses(stats, weight, summed), *stats[:4], kept


def _pair_losses(statistics, weight, summed):
    row_max, row_sum, column_max, column_sum, positive = statistics
    loss = row_sum.log2() + (row_max - positive)
    if len(column_max):
        loss = loss + (column_sum.log2() + (column_max - positive))
    return (loss.sum() if summed else loss) * (LN2 * weight)


def _empty(x, *shapes):
    return tuple(x.new_empty(shape, dtype=accumulator(x)) for shape in shapes)


def _fake_fwd(x, y, scale, offset, columns, backend):
    n, m = len(x), len(y) if columns else 0
    return _empty(x, n, n, m, m, n)


def _fake_bwd(x, y, *_):
    return x.new_empty(x.shape), y.new_empty(y.shape), *_empty(x, ())


def _fake_contrastive(x, y, scale, offset, columns, reduction, backend, stash=False):
    n, m = len(x), len(y) if columns else 0
    kept = x.new_empty(_stash_size(x, y, backend, stash), dtype=torch.int16)
    return *_empty(x, n if reduction == "none" else (), n, n, m, m), kept


def _setup(ctx, inputs, output) -> None:
    x, y, scale, ctx.offset, _, ctx.reduction, ctx.backend, _ = inputs
    ctx.save_for_backward(x, y, scale, *output[1:])
    ctx.set_materialize_grads(False)  # the statistics have none


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, y, scale, *statistics, stash = ctx.saved_tensors
    row_max, _, column_max, _ = statistics
    weights = (
        grad.expand(len(row_max)),
        grad.expand(len(column_max)) if len(column_max) else column_max,
    )
    dx, dy, dscale = torch.ops.protoclip.contrastive_bwd(
        x, y, scale, *statistics, *weights, ctx.offset, ctx.backend, stash, ctx.reduction
    )
    dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dx, dy, dscale, None, None, None, None, None


def _kept(x: Tensor, y: Tensor, backend: str, stash: bool) -> Tensor:
    """Room for the logits that the forward pass may leave to the backward pass."""
    size = _stash_size(x, y, backend, stash)
    if not size:
        return x.new_empty(0, dtype=torch.int16)
    return implementation("info_nce", backend, "pooled")(size)


def _kept_option(stash: Tensor | None) -> dict[str, Any]:
    return {} if stash is None or not stash.numel() else {"kept": stash}


def _matched(x: Tensor, y: Tensor, scale: Tensor, *rest):
    """-> gap and mean of the rows, gap and mean of the columns ([0] without), then what is kept for
    backward: the statistics of both and the stash."""
    *arguments, backend, stash = rest
    kept = _kept(x, y, backend, stash)
    run = implementation("contrastive", backend, "matched_fwd")
    rows, columns = run(x, y, scale, *arguments, **_kept_option(kept))
    return *gap_and_mean(rows), *gap_and_mean(columns), rows, columns, kept


def gap_and_mean(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[4, N] of base-2 logits -> LSE - mean positive and mean positive, [N] each, in nats."""
    top, total, positives, count = statistics
    mean = positives / count.clamp_min(1)
    return LN2 * (total.log2() + (top - mean)), LN2 * mean


def _matched_bwd(x: Tensor, y: Tensor, scale: Tensor, *rest):
    """-> dx, dy in the inputs' dtypes, dscale [] and dbias [M] in fp32."""
    *arguments, backend, stash = rest
    run = implementation("contrastive", backend, "matched_bwd")
    return run(x, y, scale, *arguments, **_kept_option(stash))


def _fake_matched(x, y, scale, *rest):
    *_, columns, backend, stash = rest
    n, m = len(x), len(y) if columns else 0
    kept = x.new_empty(_stash_size(x, y, backend, stash), dtype=torch.int16)
    return *_empty(x, n, n, m, m, (4, n), (4, m)), kept


def _fake_matched_bwd(x, y, *_):
    return *_fake_bwd(x, y), *_empty(x, len(y))


def _matched_setup(ctx, inputs, output) -> None:
    *tensors, ctx.same_positive, _, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.set_materialize_grads(False)


def _matched_autograd(ctx, *grads):
    x, y, scale, *relation, bias, rows, columns, stash = ctx.saved_tensors
    if all(grad is None for grad in grads[:4]):
        return (None,) * 12
    gap, mean, column_gap, column_mean = grads[:4]
    weights = side_weights(gap, mean, rows), side_weights(column_gap, column_mean, columns)
    dx, dy, dscale, dbias = torch.ops.protoclip.matched_bwd(
        x, y, scale, *relation, bias, ctx.same_positive, rows, columns, *weights, ctx.backend, stash
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dx, dy, dscale, None, None, None, None, dbias, None, None, None, None


def side_weights(gap: Tensor | None, mean: Tensor | None, statistics: Tensor) -> Tensor:
    """Upstream gradients of gap and mean -> those of the LSE and of the mean positive, [2, N]."""
    zero = statistics.new_zeros(statistics.shape[1])
    gap, mean = (zero if grad is None else grad for grad in (gap, mean))
    return torch.stack([gap, mean - gap])


_RELATION = (
    "Tensor own, Tensor? exclude, Tensor? query_ids, Tensor? key_ids, Tensor? key_bias,"
    " bool same_positive"
)
define(
    "contrastive_fwd(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fake_fwd,
)
define(
    "contrastive_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_max, Tensor row_sum,"
    " Tensor column_max, Tensor column_sum, Tensor row_weight, Tensor column_weight, int offset,"
    " str backend, Tensor? stash=None, str? reduction=None) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
define(
    "contrastive(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str reduction,"
    " str backend, bool stash=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _contrastive,
    _fake_contrastive,
)
define_gradient("contrastive", "info_nce", _autograd, _setup)
define_gradient("contrastive_bwd", "info_nce")
define(
    f"matched_bwd(Tensor x, Tensor y, Tensor scale, {_RELATION}, Tensor rows, Tensor columns,"
    " Tensor row_weights, Tensor column_weights, str backend, Tensor? stash)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _matched_bwd,
    _fake_matched_bwd,
)
define(
    f"matched(Tensor x, Tensor y, Tensor scale, {_RELATION}, bool columns, str backend,"
    " bool stash) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _matched,
    _fake_matched,
)
define_gradient("matched", "contrastive", _matched_autograd, _matched_setup)
define_gradient("matched_bwd", "contrastive")


def info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
) -> Tensor:
    """InfoNCE over a batch of pairs, both directions, without the [N, N] logits in memory.

    The fused backends save O(N) values and form the logits again, tile by tile, in the backward
    pass, but for those that ``stash`` allows to keep. Sums are fp32. Under autocast the features
    keep their dtype, as given.

    Args:
        image_features: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        text_features: [N, D] on the same device; row i belongs to image i. Where the dtypes differ
            both are promoted.
        logit_scale: [] or [1], the multiplier on the dot products (not its logarithm).
        ids: int64 [N] or [N, R], R <= 2: pairs with an equal id in any column are the same thing,
            such as images with one caption. Give those without an id unique ones. None: all differ.
        same_id: "exclude": pairs of the same id are no negatives of one another; "positive": each
            is a positive of the other, and the loss is against the mean of their logits.
        reduction: "mean", "sum", or "none" for one value a pair.
        backend: "auto", or one of ``protoclip.backends("info_nce")``, with ids of
            ``protoclip.backends("contrastive")``; a named one never falls back.
        stash: whether the forward pass may keep logits, so that the backward pass need not form
            them again: 3 matrix products in all, not 4. Only "cpu" does, in fp32 and at most 64 MiB
            (N = 4,096; beyond, nothing is kept), where gradients keep their bits. None or True:
            where that is possible. False: never, the least memory.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N], half the sum of the two
        directions. N = 0 gives 0.
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point.
        NotImplementedError: forward-mode differentiation of a fused backend.
    Source:
        Radford et al. 2021 (CLIP), figure 3.
    """
    op = "info_nce"
    x, y, scale = checks.pairs(op, image_features, text_features, logit_scale)
    checks.reduction(op, reduction)
    inputs = x, y, scale
    if ids is not None:
        relation = pairs.same_pairs(op, ids, same_id, x, len(x))
        row, _, _, column, *_ = _match(op, inputs, relation, True, backend, stash)
        return reduce((row + column) / 2, reduction, len(x))
    name = resolve(op, backend, x.device.type, x.dtype)
    if name == "reference":
        with without_autocast(x.device.type):
            losses = reference.info_nce(*inputs)
        return reduce(losses, reduction, len(losses))
    keep = stash is not False and wants_gradient(*inputs)
    return torch.ops.protoclip.contrastive(*inputs, 0, True, reduction, name, keep)[0]


def _match(op, inputs, relation: pairs.Pairs, columns: bool, backend: str, stash: bool | None):
    """-> gap, mean positive and count of positives of the rows, then those of the columns."""
    x, y, scale = inputs
    name = resolve("contrastive", backend, x.device.type, x.dtype)
    if name == "reference":
        pairs.refuse_wrong(op, relation, len(y))
        with without_autocast(x.device.type):
            return reference.matched(*inputs, *relation.arguments, columns=columns)
    bias = [relation.key_bias] if relation.key_bias is not None else []
    keep = stash is not False and wants_gradient(*inputs, *bias)
    gap, mean, column_gap, column_mean, rows, by_column, _ = torch.ops.protoclip.matched(
        *inputs, *relation.arguments, columns, name, keep
    )
    if relation.wrong is not None:
        gap = gap.masked_fill(relation.wrong, torch.nan)
    return gap, mean, rows[3], column_gap, column_mean, by_column[3]


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
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
) -> Tensor:
    """Cross-entropy of queries against keys, without the [N, M] logits in memory.

    The logits are l_ij = logit_scale q_i.k_j + key_bias_j. A query's loss is the log-sum-exp over
    the keys that it sees minus the mean logit of its positives. It sees every key but those of its
    own id (unless they are positives) and the one that it excludes. Sums are fp32, and O(N + M)
    values are saved.

    Args:
        queries: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        keys: [M, D] on the same device; where the dtypes differ both are promoted. More keys than
            queries, such as hard negatives or a queue, are negatives.
        logit_scale: [] or [1], the multiplier on the dot products (not its logarithm).
        positives: int64 [N], the position of each query's own key; -100: the query is left out.
            None: query i's is key i, but none with ids and same_id="positive".
        query_ids, key_ids: int64 [N] or [N, R] and [M] or [M, R], R <= 2: equal in any column is
            the same thing. query_ids=None: those of the own keys. Unknown ids: give unique ones.
        same_id: "exclude": keys of the same id are no negatives; "positive": they are positives.
        exclude: int64 [N], one key that a query never sees, such as itself; negative: none.
        key_bias: float32 [M], added to the logits of each key, with a gradient. -inf: the key is
            absent.
        weights: float32 [N] >= 0, of the queries, without a gradient.
        reduction: "mean", sum of weighted losses over the sum of the weights of the queries that
            have a positive, 0 if none has; "sum"; or "none": weighted losses, 0 where left out.
        backend: "auto", or one of ``protoclip.backends("contrastive")``, which never falls back.
        stash: as in ``info_nce``.
    Returns:
        float32 (float64 for float64 input), nats: [] or, for "none", [N]. A position out of range
        gives NaN; the reference raises.
    Raises:
        ValueError: shapes or devices disagree, ids or positives are missing, or the named backend
            cannot run.
        TypeError: features are not floating point, ids or positions not int64.
        NotImplementedError: forward-mode differentiation of a fused backend.
    """
    given = Given(positives, query_ids, key_ids, same_id, exclude, key_bias)
    inputs = queries, keys, logit_scale
    return one_way("contrastive", inputs, given, weights, reduction, backend, stash)


def one_way(
    op: str,
    inputs: tuple[Tensor, Tensor, Tensor | float],
    given: Given,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    stash: bool | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``contrastive`` of queries, keys and scale.

    ``average``: over the ranks, of the weights by which a mean is divided."""
    checks.reduction(op, reduction)
    x, y, scale = checks.strip(op, "queries", inputs[0], "keys", inputs[1], inputs[2])
    if weights is not None:
        checks.vector(op, "weights", weights, ANY_FLOAT, [(len(x),)], x.device)
        if weights.requires_grad:
            raise ValueError(f"{op}: expected weights without a gradient, got some; detach them")
    size = torch.ones((), device=x.device).expand(len(x))  # of each query in the mean
    name = "reference"
    if given.plain and given.first + len(x) <= len(y):
        name = resolve("info_nce", backend, x.device.type, x.dtype)
    if name != "reference":
        fused = weights is None and average is None
        keep = stash is not False and wants_gradient(x, y, scale)
        form = given.first, False, reduction if fused else "none", name, keep
        loss = torch.ops.protoclip.contrastive(x, y, scale, *form)[0]
        if fused:
            return loss
    else:
        relation = pairs.pairs_of(op, x, len(y), given)
        loss, _, count, *_ = _match(op, (x, y, scale), relation, False, backend, stash)
        counted = count > 0
        if relation.left_out is not None:
            counted = counted & ~relation.left_out
        if relation.wrong is not None:
            counted = counted | relation.wrong
        loss, size = loss.where(counted, 0), counted.to(loss.dtype)
    if weights is not None:
        loss, size = loss * weights.to(loss.dtype), size * weights.to(loss.dtype)
    if reduction != "mean":
        return reduce(loss, reduction, 0)
    total = size.sum() if average is None else average(size.sum())
    return loss.sum() / total.where(total > 0, 1)


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
    """The two parts of ``contrastive``, to compose a loss of your own.

    Several sets of keys, such as the batch and negatives of each query, are one by ``logaddexp`` of
    their log-sum-exps.

    Args:
        queries, keys, logit_scale, positives, query_ids, key_ids, same_id, exclude, key_bias,
        backend, stash: as in ``contrastive``.
    Returns:
        Log-sum-exp over the keys that each query sees (-inf: none), also where positives is -100,
        and mean logit of its positives (0: none); float32 [N] (float64 for float64 input). Both
        have gradients.
    Raises:
        ValueError, TypeError, NotImplementedError: as in ``contrastive``.
    """
    given = Given(positives, query_ids, key_ids, same_id, exclude, key_bias)
    return parts("contrastive_parts", (queries, keys, logit_scale), given, backend, stash)


def parts(op: str, inputs: tuple, given: Given, backend: str, stash: bool | None):
    """``contrastive_parts`` of queries, keys and scale."""
    x, y, scale = checks.strip(op, "queries", inputs[0], "keys", inputs[1], inputs[2])
    relation = pairs.pairs_of(op, x, len(y), given)
    gap, mean, *_ = _match(op, (x, y, scale), relation, False, backend, stash)
    return gap + mean, mean


def nt_xent(
    views_a: Tensor,
    views_b: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """SimCLR's loss: each view against the other 2N - 1, the other view of its sample is positive.

    Args:
        views_a, views_b: [N, D], unit rows; row i of each is a view of sample i.
        logit_scale, reduction, backend: as in ``contrastive``; "none" gives [2N], a's first.
    Returns:
        float32 [], nats a view.
    Source:
        Chen et al. 2020 (SimCLR), equation 1.
    """
    x, y, scale = checks.pairs("nt_xent", views_a, views_b, logit_scale)
    both, own = torch.cat([x, y]), torch.arange(2 * len(x), device=x.device)
    options: dict[str, Any] = {"positives": own.roll(len(x)), "exclude": own}
    return contrastive(both, both, scale, **options, reduction=reduction, backend=backend)


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
        features: [N, D], unit rows, several views of a sample one below the other.
        labels: int64 [N]; a row whose label no other has is left out.
        logit_scale, reduction, backend: as in ``contrastive``.
    Returns:
        float32 [], nats a row.
    Source:
        Khosla et al. 2020 (SupCon), equation 2, without the factor temperature / base temperature.
    """
    checks.matrix("sup_con", "features", features, "[N, D]")
    itself = torch.arange(len(features), device=features.device)
    options: dict[str, Any] = {"key_ids": labels, "query_ids": labels, "exclude": itself}
    return contrastive(
        features, features, logit_scale, same_id="positive", **options,
        reduction=reduction, backend=backend,
    )  # fmt: skip


# The sigmoid loss. Its gradient needs no statistics of whole rows, so the fused backends form it in
# the forward pass, where gradients are wanted: three products instead of four. The backward pass
# scales it.
def _sigmoid_fwd(
    x: Tensor, y: Tensor, scale, bias, offset, gradients, backend,
    query_ids=None, key_ids=None, same_positive=True,
):  # fmt: skip
    """-> loss (sum) fp32 [], dx, dy in the inputs' dtypes ([0, D] without gradients), dscale and
    dbias fp32 []."""
    ids = () if key_ids is None else (query_ids, key_ids, same_positive)
    run = implementation("siglip", backend, "sigmoid_loss")
    return run(x, y, scale, bias, offset, gradients, *ids)


def _sigmoid_fake(x, y, scale, bias, offset, gradients, *_):
    n, m = (len(x), len(y)) if gradients else (0, 0)
    loss, dscale, dbias = (x.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, x.new_empty((n, x.shape[1])), y.new_empty((m, y.shape[1])), dscale, dbias


def _sigmoid_setup(ctx, inputs, output) -> None:
    _, _, scale, bias, *_ = inputs
    ctx.save_for_backward(scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _sigmoid_autograd(ctx, grad, *_):
    scale, bias, dx, dy, dscale, dbias = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    scaled = [torch.ops.protoclip.sigmoid_loss_bwd(grad, g) for g in (dx, dy, dscale, dbias)]
    scalars = zip(scaled[2:], (scale, bias), strict=True)
    return *scaled[:2], *(g.to(t.dtype).reshape(t.shape) for g, t in scalars), *(None,) * 6


define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, int offset, bool gradients,"
    " str backend, Tensor? query_ids=None, Tensor? key_ids=None, bool same_positive=True)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_fwd,
    _sigmoid_fake,
)
define_gradient("sigmoid_loss", "sigmoid_loss", _sigmoid_autograd, _sigmoid_setup)
# An op of its own, so that a second derivative raises instead of ignoring that ``saved`` depends on
# the inputs.
define(
    "sigmoid_loss_bwd(Tensor grad, Tensor saved) -> Tensor",
    lambda grad, saved: (grad.float() * saved).to(saved.dtype),
    lambda grad, saved: torch.empty_like(saved),
)
define_gradient("sigmoid_loss_bwd", "sigmoid_loss")


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
    """Sum over all pairs (i, j) of softplus(-z_ij (scale x_i.y_j + bias)), never an [N, M] matrix.

    Args:
        image_features: [N, D], usually unit rows; float32, bfloat16, float16 (float64: reference).
        text_features: [M, D], M >= offset + N, on the same device; different dtypes are promoted.
        logit_scale, logit_bias: [] or [1].
        ids: int64 [M] or [M, R], R <= 2, of the texts; image i has that of its own text.
        same_id: "positive": z_ij is 1 for all texts of the image's id; "exclude": the pair is left
            out unless the text is the image's own.
        offset: z_ij is 1 where j = i + offset, else -1.
        backend: "auto", or one of ``protoclip.backends("siglip")``, which never falls back.
    Returns:
        float32 [] (float64 for float64 input), nats, the sum (SigLIP divides it by N).
    Raises:
        ValueError: shapes or devices disagree, or the named backend cannot run.
        TypeError: dtypes are not floating point.
        NotImplementedError: forward-mode differentiation of a fused backend.
    Source:
        Zhai et al. 2023 (SigLIP), equation 1.
    """
    op = "sigmoid_loss"
    names = "image_features", "text_features"
    x, y, scale = checks.strip(op, names[0], image_features, names[1], text_features, logit_scale)
    n, m = len(x), len(y)
    if offset < 0 or offset + n > m:
        raise ValueError(
            f"{op}: expected image i's text at row i + offset, got {n} images, {m} texts and "
            f"offset {offset}"
        )
    inputs = x, y, scale, checks.scalar(op, "logit_bias", logit_bias, x.device)
    of_ids: tuple[Any, ...] = ()
    if ids is not None:
        relation = pairs.same_pairs(op, ids, same_id, x, m, offset)
        of_ids = relation.query_ids, relation.key_ids, relation.same_positive
    name = resolve("siglip", backend, x.device.type, x.dtype)
    if name == "reference":
        with without_autocast(x.device.type):
            return reference.sigmoid_loss(*inputs, offset, *of_ids)
    gradients = wants_gradient(*inputs)
    return torch.ops.protoclip.sigmoid_loss(*inputs, offset, gradients, name, *of_ids)[0]
