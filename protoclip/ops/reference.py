"""Every op in plain PyTorch: the specification, the test oracle, and the backend of any device.

Inputs below fp64 are computed in fp32 (k-means and segment means in fp64); autograd is torch's own.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.kernels.results import SigmoidGradients
from protoclip.ops import checks
from protoclip.ops.checks import LEFT_OUT
from protoclip.ops.operators import accumulator, in_transform
from protoclip.ops.pairs import Pairs, QueryParts

_CHUNK_ELEMENTS = 1 << 22  # 32 MB of fp64 scores, or rows, at a time


def _acc(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def relations(pairs: Pairs, queries: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The keys that each of the queries [N, D] sees, and its positives: bool [N, M] each."""
    keys = torch.arange(num_keys, device=queries.device)
    positive = keys == pairs.own_positions(queries)[:, None]
    seen = torch.ones_like(positive)
    if pairs.query_ids is not None and pairs.key_ids is not None:
        equal = pairs.query_ids[:, :, None] == pairs.key_ids[:, None, :]  # [R, N, M]
        same = (equal & (pairs.query_ids >= 0)[:, :, None]).any(dim=0)
        if pairs.same_positive:
            positive = positive | same
        else:
            seen = positive | ~same
    if pairs.exclude is not None:
        seen = seen & (keys != pairs.exclude[:, None])
    if pairs.key_bias is not None:
        seen = seen & (pairs.key_bias != -torch.inf)
    return seen, positive & seen


def contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor, pairs: Pairs, both_directions: bool = False
) -> QueryParts:
    """[N, D], [M, D] -> the losses of the rows, [N]; with ``both_directions`` (N = M, row i and
    column i of one id) half the sum of a row's and its column's."""
    logits = _acc(logit_scale).reshape(()) * _acc(x) @ _acc(y).T  # [N, M]
    if pairs.key_bias is not None:
        logits = logits + pairs.key_bias
    if pairs.plain:
        parts = partial(_parts_of_own_keys, own_key=pairs.own_positions(x).long())
    else:
        seen, positive = relations(pairs, x, y.shape[0])
        parts = partial(_parts_of_sets, seen=seen, positive=positive)
    rows = parts(logits)
    if not both_directions:
        return rows
    return rows._replace(loss_per_query=(rows.loss_per_query + parts(logits.T).loss_per_query) / 2)


def _parts_of_own_keys(logits: Tensor, own_key: Tensor) -> QueryParts:
    losses = F.cross_entropy(logits, own_key, reduction="none")
    means = logits.gather(1, own_key[:, None])[:, 0]
    return QueryParts(losses, means, torch.ones_like(own_key))


def _parts_of_sets(logits: Tensor, seen: Tensor, positive: Tensor) -> QueryParts:
    count = positive.sum(dim=1)
    mean = logits.where(positive, 0).sum(dim=1) / count.clamp_min(1)
    visible = logits.where(seen, -torch.inf)
    if logits.shape[1] == 0:
        return QueryParts(visible.sum(dim=1) - torch.inf, mean, count)
    top = visible.detach().amax(dim=1)
    top = top.where(top != -torch.inf, 0)
    total = (visible - top[:, None]).exp().sum(dim=1)
    losses = total.where(total != 0, 1).log() + (top - mean)
    return QueryParts(losses.where(total != 0, -torch.inf), mean, count)


def sigmoid_loss(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs
) -> Tensor:
    """[N, D], [M, D], scalars -> [N]: sum of softplus(-z (logit_scale x.y + logit_bias)) over the
    keys seen, z = 1 at positives and -1 elsewhere."""
    logits = _acc(logit_scale).reshape(()) * _acc(x) @ _acc(y).T  # [N, M]
    logits = logits + _acc(logit_bias).reshape(())
    seen, positive = relations(pairs, x, y.shape[0])
    # Not softplus, whose exponential overflows in fp32 above a logit of 89.
    losses = -F.logsigmoid(torch.where(positive, logits, -logits))
    return losses.where(seen, 0).sum(dim=1)


def sigmoid_gradients(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs, grad: Tensor
) -> SigmoidGradients:
    """The gradients of sum(grad * sigmoid_loss(...)), grad [N]."""
    x, y = _acc(x), _acc(y)
    scale = _acc(logit_scale).reshape(())
    dots = x @ y.T
    seen, positive = relations(pairs, x, y.shape[0])
    sign = torch.where(positive, 1.0, -1.0).to(dots.dtype)
    logits = scale * dots + _acc(logit_bias).reshape(())
    dlogits = (-sign * torch.sigmoid(-sign * logits) * grad[:, None]).where(seen, 0)
    return SigmoidGradients(
        dx=scale * dlogits @ y,
        dy=scale * dlogits.T @ x,
        dlogit_scale=(dlogits * dots).sum(),
        dlogit_bias=dlogits.sum(),
    )


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    logit_scale: Tensor,
    targets: Tensor | None,
) -> Tensor:
    """[N, D], [K, D], [N], [], [K, D] -> [N]: LSE_k(s h.C_k) - s h.m_y, 0 where y = -100."""
    h, logit_scale = _acc(features), _acc(logit_scale).reshape(())
    logits = logit_scale * h @ _acc(prototypes).T  # [N, K]
    if targets is None:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=LEFT_OUT)
    used = labels != LEFT_OUT
    m = _acc(targets)[labels.where(used, 0)]  # [N, D]
    loss = torch.logsumexp(logits, dim=1) - logit_scale * (h * m).sum(dim=1)
    return loss.where(used, torch.zeros_like(loss))


def soft_targets(source_centroids: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """[K, Ds], [K, D], tau > 0 -> [K, D]: m_y = sum_k softmax_k(S_y.S_k / tau) C_k."""
    source = _acc(source_centroids)
    return torch.softmax(source @ source.T / temperature, dim=1) @ _acc(prototypes)


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D], [K, D] -> labels int64 [N] (-1 for a NaN row), squared distances fp32 [N]."""
    x, c = points.double(), centroids.double()
    if not len(x):
        return x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    # A power of two, as the blocks in which k-means reads points: each has the same products then.
    rows = 1 << max(0, (_CHUNK_ELEMENTS // max(1, *c.shape)).bit_length() - 1)
    parts = [_assign_rows(part, c) for part in x.split(rows)]
    labels, distances = zip(*parts, strict=True)
    return torch.cat(labels), torch.cat(distances).float()


def _assign_rows(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    x_square, c_square = x.square().sum(1)[:, None], c.square().sum(1)
    squared = (x_square - 2 * x @ c.T + c_square).clamp_min(0)
    best = squared.amin(dim=1)
    # BLAS may round equal columns differently, so differences within rounding are ties.
    rounding = torch.finfo(x.dtype).eps * (2 + x.shape[1] ** 0.5) * (x_square + c_square)
    index = torch.arange(len(c), device=x.device).expand_as(squared)
    lowest = index.where(squared <= best[:, None] + rounding, len(c)).amin(dim=1)
    return lowest.where(lowest < len(c), -1), best


def segment_mean(values: Tensor, labels: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N], K -> means [K, D] (0 where empty), counts int64 [K]; labels < 0 are left out."""
    order = labels.argsort(stable=True)
    order = order[(labels < 0).sum() :]
    counts = torch.bincount(labels[order], minlength=num_segments)
    checks.segments("segment_mean", len(counts), num_segments)
    if not num_segments:
        return values.new_empty((0, values.shape[1]), dtype=accumulator(values)), counts
    rows = values[order].double()
    if in_transform():  # segment_reduce has no forward-mode derivative
        sums = rows.new_zeros((num_segments, rows.shape[1]))
        sums = sums.index_put((labels[order],), rows, accumulate=True)
    else:
        sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0)
    means = sums / counts.clamp_min(1)[:, None]
    return (means if values.dtype == torch.float64 else means.float()), counts


def segment_add(values: Tensor, labels: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Add the rows of [N, D] to the sums fp64 [K, D] and counts int64 [K] of their segments."""
    num_segments = len(counts)
    segments = torch.arange(num_segments, device=labels.device)
    # The sum so far is the first row of its segment.
    carried = torch.cat([segments, labels.where(labels >= 0, num_segments)])
    order = carried.argsort(stable=True)
    added = torch.bincount(carried, minlength=num_segments + 1)[:num_segments]
    order = order[: int(added.sum())]
    rows = torch.cat([sums, values.double()])[order]
    sums.copy_(torch.segment_reduce(rows, "sum", lengths=added, axis=0))
    counts += added - 1
