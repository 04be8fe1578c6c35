"""InfoNCE, the general contrastive loss, and SigLIP's: contract, autograd and dispatch.

All fused backends share one strip: rows x [N, D] against columns y [M, D], where row i belongs to
column i + offset. Statistics are in base-2 logits (s2 = scale * log2(e) * x.y): a reference value
``max`` and the ``sum`` of 2^(s2 - max), so that a loss near zero does not cancel. The backward pass
of any loss built on the strip is G = row_weight * P_row + column_weight * P_column - (weights at
the positives), dx = scale * G y, dy = scale * G^T x, dscale = sum G * (x.y).

In a matched strip, ``Pairs`` gives the positives and negatives, not the diagonal. Its statistics,
[4, N] and [4, M], are max and sum over the keys seen, then sum and count of the positives' logits.
It returns ``gap`` = LSE - mean positive, and ``mean``; with weights w_l of the LSE and w_m of the
mean, G = w_l P [seen] + w_m [positive] / count and dbias_j = sum_i G_ij.
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


def _contrastive(x, y, scale, offset, columns, reduction, backend, stash):
    """-> the loss, then what backward needs: row_max, row_sum [N], column_max, column_sum [M]
    ([0] without columns), and the stash (or [0]).

    The loss is that of each row or, with ``columns`` (N = M), half the sum of both directions:
    [N], or [] for "mean" and "sum"."""
    kept = _kept(x, y, backend, stash)
    weight, summed = _direction_weight(reduction, len(x), columns), reduction != "none"
    if backend == "triton":  # its kernels also compute the loss and weight its gradient
        fused = implementation("info_nce", backend, "contrastive")
        return *fused(x, y, scale, offset, columns, weight, summed), kept
    run = implementation("info_nce", backend, "contrastive_fwd")
    *statistics, positive = run(x, y, scale, offset, columns, **_kept_option(kept))
    row_max, row_sum, column_max, column_sum = statistics
    loss = row_sum.log2() + (row_max - positive)
    if columns:
        loss = loss + (column_sum.log2() + (column_max - positive))
    return (loss.sum() if summed else loss) * (LN2 * weight), *statistics, kept


def _bwd(x, y, scale, *rest):
    """-> dx, dy in the inputs' dtypes, dscale fp32 []. ``column_*`` are [0] without columns.

    The positive's weight is row_weight[i] + column_weight[i + offset] (if given). The weights may
    have any stride, even 0, and are multiplied by ``pair_weight``."""
    *statistics, row_weight, column_weight, offset, backend, stash, pair_weight = rest
    options = _kept_option(stash)
    if backend == "triton":
        options["pair_weight"] = pair_weight
    else:
        row_weight, column_weight = row_weight * pair_weight, column_weight * pair_weight
    run = implementation("info_nce", backend, "contrastive_bwd")
    return run(x, y, scale, *statistics, row_weight, column_weight, offset, **options)


def _direction_weight(reduction: str, n: int, columns: bool) -> float:
    """The factor of the loss of a pair in one direction."""
    weight = 0.5 if columns else 1.0
    return weight / max(n, 1) if reduction == "mean" else weight


def _stash_size(x: Tensor, y: Tensor, backend: str, stash: bool) -> int:
    """Number of int16 elements in which a backend keeps logits, if asked to."""
    asked = stash and backend == "cpu"
    return implementation("info_nce", backend, "stash_size")(len(x), len(y)) if asked else 0


def _kept(x: Tensor, y: Tensor, backend: str, stash: bool) -> Tensor:
    """A buffer for the logits that the forward pass may leave to the backward pass."""
    if size := _stash_size(x, y, backend, stash):
        return implementation("info_nce", backend, "pooled")(size)
    return x.new_empty(0, dtype=torch.int16)


def _kept_option(stash: Tensor | None) -> dict[str, Any]:
    return {} if stash is None or not stash.numel() else {"kept": stash}


def _empty(x, *shapes):
    return tuple(x.new_empty(shape, dtype=accumulator(x)) for shape in shapes)


def _fake_contrastive(x, y, scale, offset, columns, reduction, backend, stash):
    n, m = len(x), len(y) if columns else 0
    kept = x.new_empty(_stash_size(x, y, backend, stash), dtype=torch.int16)
    return *_empty(x, n if reduction == "none" else (), n, n, m, m), kept


def _fake_bwd(x, y, *_):
    return x.new_empty(x.shape), y.new_empty(y.shape), *_empty(x, ())


def _setup(ctx, inputs, output) -> None:
    x, y, scale, ctx.offset, ctx.columns, ctx.reduction, ctx.backend, _ = inputs
    ctx.save_for_backward(x, y, scale, *output[1:])
    ctx.set_materialize_grads(False)  # the statistics have none


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, y, scale, *statistics, stash = ctx.saved_tensors
    grad = grad.expand(len(x))
    told = *statistics, grad, grad if ctx.columns else grad[:0], ctx.offset, ctx.backend, stash
    weight = _direction_weight(ctx.reduction, len(x), ctx.columns)
    dx, dy, dscale = torch.ops.protoclip.contrastive_bwd(x, y, scale, *told, weight)
    return dx, dy, dscale.to(scale.dtype).reshape(scale.shape), *(None,) * 5


def _matched(x, y, scale, *rest):
    """-> gap and mean of the rows, gap and mean of the columns ([0] without), then what backward
    needs: the statistics of both and the stash."""
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


def _matched_bwd(x, y, scale, *rest):
    """-> dx, dy in the inputs' dtypes, dscale [] and dbias [M] in fp32."""
    *arguments, backend, stash = rest
    run = implementation("contrastive", backend, "matched_bwd")
    return run(x, y, scale, *arguments, **_kept_option(stash))


def _fake_matched(x, y, scale, *rest):
    *_, columns, backend, stash = rest
    n, m = len(x), len(y) if columns else 0
    kept = x.new_empty(_stash_size(x, y, backend, stash), dtype=torch.int16)
    return *_empty(x, n, n, m, m, (4, n), (4, m)), kept


def _matched_setup(ctx, inputs, output) -> None:
    *tensors, ctx.same_positive, _, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[4:])
    ctx.set_materialize_grads(False)


def _matched_autograd(ctx, *grads):
    x, y, scale, *relation, bias, rows, columns, stash = ctx.saved_tensors
    if all(grad is None for grad in grads[:4]):
        return (None,) * 12
    gap, mean, column_gap, column_mean, *_ = grads
    weights = side_weights(gap, mean, rows), side_weights(column_gap, column_mean, columns)
    dx, dy, dscale, dbias = torch.ops.protoclip.matched_bwd(
        x, y, scale, *relation, bias, ctx.same_positive, rows, columns, *weights, ctx.backend, stash
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dx, dy, dscale, *(None,) * 4, dbias, *(None,) * 4


def side_weights(gap: Tensor | None, mean: Tensor | None, statistics: Tensor) -> Tensor:
    """Gradients of gap and mean -> gradients of the LSE and of the mean positive, [2, N]."""
    zero = statistics.new_zeros(statistics.shape[1])
    gap, mean = (zero if grad is None else grad for grad in (gap, mean))
    return torch.stack([gap, mean - gap])


_RELATION = (
    "Tensor own, Tensor? exclude, Tensor? query_ids, Tensor? key_ids, Tensor? key_bias,"
    " bool same_positive"
)
define(
    "contrastive(Tensor x, Tensor y, Tensor scale, int offset, bool columns, str reduction,"
    " str backend, bool stash) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _contrastive,
    _fake_contrastive,
)
define(
    "contrastive_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_max, Tensor row_sum,"
    " Tensor column_max, Tensor column_sum, Tensor row_weight, Tensor column_weight, int offset,"
    " str backend, Tensor? stash, float pair_weight) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _fake_bwd,
)
define(
    f"matched(Tensor x, Tensor y, Tensor scale, {_RELATION}, bool columns, str backend,"
    " bool stash) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _matched,
    _fake_matched,
)
define(
    f"matched_bwd(Tensor x, Tensor y, Tensor scale, {_RELATION}, Tensor rows, Tensor columns,"
    " Tensor row_weights, Tensor column_weights, str backend, Tensor? stash)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _matched_bwd,
    lambda x, y, *_: (*_fake_bwd(x, y), *_empty(x, len(y))),
)
define_gradient("contrastive", "info_nce", _autograd, _setup)
define_gradient("contrastive_bwd", "info_nce")
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
        reduction: "mean", "sum", or "none" for one value per pair.
        backend: "auto", or one of ``protoclip.backends("info_nce")`` (with ids, of
            ``protoclip.backends("contrastive")``); a named one never falls back.
        stash: False: keep no logits for the backward pass. Otherwise "cpu" keeps them within 64 MiB
            (up to N = 4,096): 3 matrix products in all instead of 4, and the same bits.
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
    x, y, scale = checks.pairs(op, image_features, text_features, logit_scale)
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.one_of(op, "same_id", same_id, pairs.SAME_ID)
    inputs = x, y, scale
    if ids is not None:
        pairs.check_ids(op, "ids", ids, len(x), x.device)
        given = Given(None, ids, ids, same_id)
        row, _, _, column = _match(op, inputs, given, backend, stash, columns=True)
        return reduce((row + column) / 2, reduction, len(x))
    name = resolve(op, backend, x.device.type, x.dtype)
    if name == "reference":
        with without_autocast(x.device.type):
            losses = reference.info_nce(*inputs)
        return reduce(losses, reduction, len(losses))
    keep = stash is not False and wants_gradient(*inputs)
    return torch.ops.protoclip.contrastive(*inputs, 0, True, reduction, name, keep)[0]


def _match(op: str, inputs, given: Given, backend: str, stash: bool | None, columns=False):
    """-> gap, mean positive and whether it counts, per row; then the gap of each column."""
    x, y, scale = inputs
    relation = pairs.pairs_of(op, x, len(y), given)
    name = resolve("contrastive", backend, x.device.type, x.dtype)
    if name == "reference" or x.device.type == "cpu":
        pairs.refuse_wrong(op, relation, len(y))
    if name == "reference":
        with without_autocast(x.device.type):
            gap, mean, count, *by_column = reference.matched(x, y, scale, relation, columns)
    else:
        bias = [relation.key_bias] if relation.key_bias is not None else []
        keep = stash is not False and wants_gradient(*inputs, *bias)
        told = *relation.arguments, columns, name, keep
        gap, mean, *by_column, rows, _, _ = torch.ops.protoclip.matched(*inputs, *told)
        count = rows[3]
    counted = count > 0
    if relation.left_out is not None:
        counted = counted & ~relation.left_out
    if relation.wrong is not None:  # multiply, so that the gradient is NaN too
        gap = gap * torch.ones_like(gap).masked_fill(relation.wrong, torch.nan)
        counted = counted | relation.wrong
    return gap, mean, counted, *by_column[: int(columns)]


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
    the keys that it sees minus the mean logit of its positives. It sees every key except those of
    its own id (unless they are positives) and the one that it excludes. Sums are fp32, and
    O(N + M) values are saved.

    Args:
        queries, keys: [N, D] and [M, D], in ``info_nce``'s dtypes. Extra keys, such as hard
            negatives or a queue, are negatives.
        positives: int64 [N], the position of each query's own key; -100: the query is left out.
            None: query i's own key is key i; with ids and same_id="positive" there is none.
        query_ids, key_ids: int64 [N] or [N, R] and [M] or [M, R], R <= 2: equal in any column is
            the same thing. query_ids=None: ids of the own keys. Unknown ids: give unique ones.
        same_id: "exclude": keys of the same id are not negatives; "positive": they are positives.
        exclude: int64 [N], one key that a query never sees, such as itself; negative: none.
        key_bias: float32 [M], added to each key's logits, with a gradient; -inf removes the key.
        weights: float32 [N] >= 0, one per query, without a gradient.
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
    """``contrastive`` of queries, keys and scale; ``average`` averages a divisor over ranks."""
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    checks.one_of(op, "same_id", given.same_id, pairs.SAME_ID)
    x, y, scale = checks.strip(op, ("queries", "keys"), *inputs)
    backend = resolve("contrastive", backend, x.device.type, x.dtype)
    if weights is not None:
        checks.vector(op, "weights", weights, ANY_FLOAT, [(len(x),)], x.device)
        if weights.requires_grad:
            raise ValueError(f"{op}: expected weights without a gradient, got some; detach them")
        looks = backend == "reference" or x.device.type == "cpu"
        if looks and checks.readable(weights) and (weights < 0).any():
            raise ValueError(f"{op}: expected weights >= 0, got {weights.min().item():g}")
    # Each query's share of the mean.
    size = torch.ones((), dtype=accumulator(x), device=x.device).expand(len(x))
    if backend != "reference" and given.plain and given.first + len(x) <= len(y):
        fused = weights is None and average is None
        keep = stash is not False and wants_gradient(x, y, scale)
        form = given.first, False, reduction if fused else "none", backend, keep
        loss = torch.ops.protoclip.contrastive(x, y, scale, *form)[0]
        if fused:
            return loss
    else:
        loss, _, counted = _match(op, (x, y, scale), given, backend, stash)
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
    given = Given(positives, query_ids, key_ids, same_id, exclude, key_bias)
    return one_way_parts("contrastive_parts", (queries, keys, logit_scale), given, backend, stash)


def one_way_parts(op: str, inputs: tuple, given: Given, backend: str, stash: bool | None = None):
    """``contrastive_parts`` of queries, keys and scale."""
    checked = checks.strip(op, ("queries", "keys"), *inputs)
    gap, mean, _ = _match(op, checked, given, backend, stash)
    return gap + mean, mean


def nt_xent(
    views_a: Tensor,
    views_b: Tensor,
    logit_scale: Tensor | float,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """SimCLR's loss: each view against the other 2N - 1; its sample's other view is the positive.

    Args:
        views_a, views_b: [N, D], unit rows; row i of each is a view of sample i.
        logit_scale, reduction, backend: as in ``contrastive``; "none" gives [2N], views_a first.
    Returns:
        float32 [], nats per view.
    Source:
        Chen et al. 2020 (SimCLR), equation 1.
    """
    x, y, scale = checks.pairs("nt_xent", views_a, views_b, logit_scale)
    both, own = torch.cat([x, y]), torch.arange(2 * len(x), device=x.device)
    given = Given(own.roll(len(x)), exclude=own)
    return one_way("nt_xent", (both, both, scale), given, None, reduction, backend)


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
    checks.matrix("sup_con", "features", features, "[N, D]")
    checks.labels("sup_con", labels, features)
    itself = torch.arange(len(features), device=features.device)
    given = Given(None, labels, labels, "positive", itself)
    return one_way("sup_con", (features, features, logit_scale), given, None, reduction, backend)


# The sigmoid loss. Its gradient needs no statistics of whole rows, so the fused backends compute it
# in the forward pass, if it is wanted: three products instead of four. The backward pass only
# scales it.
def _sigmoid_fwd(x, y, scale, bias, offset, gradients, backend, *ids):
    """-> loss (sum) fp32 [], dx, dy in the inputs' dtypes ([0, D] without gradients), dscale and
    dbias fp32 []."""
    run = implementation("siglip", backend, "sigmoid_loss")
    return run(x, y, scale, bias, offset, gradients, *ids)


def _sigmoid_fake(x, y, scale, bias, offset, gradients, *_):
    n, m = (len(x), len(y)) if gradients else (0, 0)
    loss, *scalars = _empty(x, (), (), ())
    return loss, x.new_empty((n, x.shape[1])), y.new_empty((m, y.shape[1])), *scalars


def _sigmoid_setup(ctx, inputs, output) -> None:
    _, _, scale, bias, *_ = inputs
    ctx.save_for_backward(scale, bias, *output[1:])
    ctx.set_materialize_grads(False)


def _sigmoid_autograd(ctx, grad, *_):
    scale, bias, dx, dy, dscale, dbias = ctx.saved_tensors
    if grad is None:
        return (None,) * 10
    scaled = [torch.ops.protoclip.scaled(grad, g) for g in (dx, dy, dscale, dbias)]
    scalars = zip(scaled[2:], (scale, bias), strict=True)
    return *scaled[:2], *(g.to(t.dtype).reshape(t.shape) for g, t in scalars), *(None,) * 6


define(
    "sigmoid_loss(Tensor x, Tensor y, Tensor scale, Tensor bias, int offset, bool gradients,"
    " str backend, Tensor? query_ids, Tensor? key_ids, bool same_positive)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_fwd,
    _sigmoid_fake,
)
define_gradient("sigmoid_loss", "sigmoid_loss", _sigmoid_autograd, _sigmoid_setup)


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
        backend: "auto", or one of ``protoclip.backends("siglip")``.
    Returns:
        float32 [] (float64 for float64 input), nats, the sum (SigLIP divides it by N).
    Raises:
        ValueError, TypeError: as in ``info_nce``.
    Source:
        Zhai et al. 2023 (SigLIP), equation 1.
    """
    op = "sigmoid_loss"
    x, y, scale = checks.strip(op, checks.PAIR, image_features, text_features, logit_scale)
    if offset < 0 or offset + len(x) > len(y):
        raise ValueError(
            f"{op}: expected image i's text at row i + offset, got {len(x)} images, {len(y)} texts "
            f"and offset {offset}"
        )
    inputs = x, y, scale, checks.scalar(op, "logit_bias", logit_bias, x.device, accumulator(x))
    given = Given(same_id=same_id, first=offset)
    if ids is not None:
        pairs.check_ids(op, "ids", ids, len(y), x.device)
        given = Given(None, ids[offset : offset + len(x)], ids, same_id, first=offset)
    relation = pairs.pairs_of(op, x, len(y), given)
    name = resolve("siglip", backend, x.device.type, x.dtype)
    if name == "reference":
        with without_autocast(x.device.type):
            return reference.sigmoid_loss(*inputs, relation)
    told = offset, wants_gradient(*inputs), name, relation.query_ids, relation.key_ids
    return torch.ops.protoclip.sigmoid_loss(*inputs, *told, relation.same_positive)[0]
