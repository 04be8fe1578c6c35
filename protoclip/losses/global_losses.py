"""Contrastive losses over the pairs of all ranks; each rank holds its own rows.

InfoNCE: a rank owns the rows of its images in the [G, G] matrix of logits. It gathers the texts,
sums its strip's rows and its share of every column, and all-reduces the column sums; backward
recomputes the strip and reduce-scatters the gradient of the texts. SigLIP needs no column sums, so
the texts and their gradient travel round a ring of ranks. Neither holds a [B, G] matrix.

Gradients are those of the sum of all ranks' losses; DDP's mean over ranks turns them into those of
the mean loss over the global batch. What runs on one process is in ``protoclip.ops``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoclip.distributed import (
    gather_rows,
    gathered_rows,
    is_distributed,
    mean_over_ranks,
    rank,
    scatter_sums,
    world_size,
)
from protoclip.ops import checks
from protoclip.ops.contrastive_losses import (
    against_each_other,
    labelled_views,
    one_way,
    two_views,
)
from protoclip.ops.dispatch import resolve
from protoclip.ops.id_codes import coder_of
from protoclip.ops.info_nce_loss import info_nce, info_nce_gradients, info_nce_strip
from protoclip.ops.operators import ANY_FLOAT, accumulator, gradient_like, wants_gradient
from protoclip.ops.pairs import SAME_ID, Matching, Pairs, SameId, check_ids, pairs_of
from protoclip.ops.query_losses import (
    contrastive_gaps,
    contrastive_gradients,
    gaps_of,
    one_way_parts,
)
from protoclip.ops.siglip_loss import fused_sigmoid_loss, sigmoid_losses
from protoclip.ops.stash import no_stash
from protoclip.ops.sums import LN2


def global_info_nce(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE over the pairs of all ranks: the mean loss of this rank's B pairs.

    Its mean over the ranks is ``info_nce`` of the W * B pairs. Memory is O(W B D), traffic one
    gather and one reduce-scatter of [W B, D]. The reference gathers the images too.

    Args: those of ``info_nce``, for this rank's pairs; B is the same on every rank.
    """
    if not is_distributed():
        return info_nce(
            image_features, text_features, logit_scale, ids=ids, same_id=same_id, backend=backend
        )
    op = "global_info_nce"
    offset = rank() * len(image_features)
    x, y, logit_scale = checks.equal_rows(op, image_features, text_features, logit_scale)
    checks.one_of(op, "same_id", same_id, SAME_ID)
    all_ids = ids_of_all_ranks(op, ids, x)
    table_row = "info_nce" if ids is None else "contrastive"
    backend_name = resolve(table_row, backend, x.device.type, x.dtype)
    matching = Matching(query_ids=ids, key_ids=all_ids, same_id=same_id, offset=offset)
    if backend_name == "reference":
        images = one_way(op, x, gathered_rows(y), logit_scale, matching, backend=backend_name)
        texts = one_way(op, y, gathered_rows(x), logit_scale, matching, backend=backend_name)
        return (images + texts) / 2
    if all_ids is None:
        image_losses, text_losses = _GlobalInfoNce.apply(x, y, logit_scale, backend_name)
    else:
        pairs = pairs_of(op, x, len(all_ids), matching, coder_of(backend_name))
        image_losses, text_losses = _GlobalContrastive.apply(x, y, logit_scale, pairs, backend_name)
    losses = image_losses + text_losses
    return losses.mean() / 2 if len(losses) else losses.sum()  # as one process has it


def global_contrastive(
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
) -> Tensor:
    """``contrastive`` of this rank's N queries against the keys of all W ranks.

    The mean over the ranks, of the loss and of its gradients, is that of one process with all
    queries and keys. Memory is O(W M D), traffic one gather and one reduce-scatter of the keys.

    Args:
        queries, keys: [N, D] and [M, D], the same M on every rank.
        positives, exclude: int64 [N] ([N, P]: several positives), positions among the keys of all
            ranks: key j of rank r is r M + j. Without positives, query i's own key is key i of its
            rank.
        query_ids, key_ids, key_bias, negatives, weights: for this rank's queries and keys; a query
            is compared with the ids and biases of all ranks' keys, and with its own negatives only.
        reduction: "mean": the average over ranks is the mean over all ranks' queries, however many
            count on each; "sum" and "none": over this rank's queries.
        logit_scale, same_id, label_smoothing, backend: as in ``contrastive``, as are the result
            and errors.

    Example:
        >>> queries, keys = torch.randn(2, 4, 16)  # on one rank, the same as contrastive
        >>> protoclip.global_contrastive(queries, keys, 1.0).shape
        torch.Size([])
    """
    op = "global_contrastive"
    matching = Matching(
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        same_id=same_id,
        exclude=exclude,
        key_bias=key_bias,
    )
    all_keys, matching = _keys_of_all_ranks(op, keys, matching)
    return one_way(
        op,
        queries,
        all_keys,
        logit_scale,
        matching,
        negatives=negatives,
        weights=weights,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
        average=mean_over_ranks if is_distributed() else None,
    )


def global_contrastive_parts(
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
) -> tuple[Tensor, Tensor]:
    """``contrastive_parts`` of this rank's queries; arguments as in ``global_contrastive``.

    Example:
        >>> level, positive = protoclip.global_contrastive_parts(*torch.randn(2, 4, 16), 1.0)
        >>> level.shape
        torch.Size([4])
    """
    op = "global_contrastive_parts"
    matching = Matching(
        positives=positives,
        query_ids=query_ids,
        key_ids=key_ids,
        same_id=same_id,
        exclude=exclude,
        key_bias=key_bias,
    )
    all_keys, matching = _keys_of_all_ranks(op, keys, matching)
    return one_way_parts(op, queries, all_keys, logit_scale, matching, backend=backend)


def global_nt_xent(
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
    """``nt_xent`` of this rank's views against the views of all ranks.

    Mean and reduction are as in ``global_contrastive``, the arguments as in ``nt_xent``, for this
    rank's samples; N is the same on every rank.

    Example:
        >>> views = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> protoclip.global_nt_xent(views[0], views[1], 2.0).shape
        torch.Size([])
    """
    op = "global_nt_xent"
    first = 2 * len(views_a) * rank()
    views = two_views(op, views_a, views_b, logit_scale, ids, same_id, decoupled, weights, first)
    keys, matching = _keys_of_all_ranks(op, views.features, views.matching)
    return against_each_other(
        op,
        views,
        keys=keys,
        matching=matching,
        decoupled=decoupled,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
        average=mean_over_ranks if is_distributed() else None,
    )


def global_sup_con(
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """``sup_con`` of this rank's rows against the rows of all ranks.

    Mean and reduction are as in ``global_contrastive``, the arguments as in ``sup_con``, for this
    rank's rows; their number is the same on every rank.

    Example:
        >>> features = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
        >>> protoclip.global_sup_con(features, torch.tensor([0, 0, 1, 1]), 10.0).shape
        torch.Size([])
    """
    op = "global_sup_con"
    first = features.shape[:-1].numel() * rank()
    views = labelled_views(op, features, labels, logit_scale, weights, first)
    keys, matching = _keys_of_all_ranks(op, views.features, views.matching)
    losses = against_each_other(
        op,
        views,
        keys=keys,
        matching=matching,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
        average=mean_over_ranks if is_distributed() else None,
    )
    return losses.reshape(features.shape[:-1]) if reduction == "none" else losses


def _keys_of_all_ranks(op: str, keys: Tensor, matching: Matching) -> tuple[Tensor, Matching]:
    """The keys of all ranks with their ids and biases; checked before any rank waits."""
    if not is_distributed():
        return keys, matching
    checks.matrix(op, "keys", keys, "[M, D]")
    bias = matching.key_bias
    if bias is not None:
        checks.tensor(
            op, "key_bias", bias, dtypes=ANY_FLOAT, shapes=[(len(keys),)], device=keys.device
        )
        bias = gathered_rows(bias)
    ids = ids_of_all_ranks(op, matching.key_ids, keys, "key_ids")
    matching = replace(matching, key_ids=ids, key_bias=bias, offset=rank() * len(keys))
    return gathered_rows(keys), matching


def ids_of_all_ranks(op: str, ids: Tensor | None, rows: Tensor, name: str = "ids") -> Tensor | None:
    """The ids of all ranks' rows, int64 [W * B] or [W * B, R]."""
    if ids is None:
        return None
    ids = check_ids(op, name, ids, len(rows), rows.device)
    return gather_rows(ids) if is_distributed() else ids


def global_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "positive",
    weights: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: str = "sum",
    backend: str = "auto",
) -> Tensor:
    """SigLIP's loss of this rank's B images against the texts of all ranks.

    Memory is O(B D): the texts pass from rank to rank. Only the reference, ``weights``,
    ``label_smoothing`` and "none" gather them, O(W B D).

    Args: those of ``sigmoid_loss``, for this rank's pairs; B is the same on every rank. With
    ``weights`` a "mean" divides by the ranks' mean total weight.
    """
    op = "global_sigmoid_loss"
    offset = rank() * len(image_features)
    x, y, logit_scale = checks.equal_rows(op, image_features, text_features, logit_scale)
    checks.one_of(op, "reduction", reduction, checks.REDUCTIONS)
    if x.dtype == torch.float16:  # as in sigmoid_losses
        x, y = x.float(), y.float()
    logit_bias = checks.scalar(op, "logit_bias", logit_bias, x.device, accumulator(x))
    all_ids = ids_of_all_ranks(op, ids, x)
    backend_name = resolve("sigmoid_loss", backend, x.device.type, x.dtype)
    on_ring = weights is None and not label_smoothing and reduction != "none"
    if not (is_distributed() and on_ring and backend_name != "reference"):
        return sigmoid_losses(
            op,
            x,
            gathered_rows(y) if is_distributed() else y,
            logit_scale,
            logit_bias,
            ids=all_ids,
            same_id=same_id,
            offset=offset,
            weights=weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            backend=backend_name,
            average=mean_over_ranks if is_distributed() else None,
        )
    matching = Matching(query_ids=ids, key_ids=all_ids, same_id=same_id, offset=offset)
    pairs = pairs_of(op, x, len(x) * world_size(), matching, coder_of(backend_name))
    gradients = wants_gradient(x, y, logit_scale, logit_bias)
    total = _Ring.apply(x, y, logit_scale, logit_bias, pairs, gradients, backend_name)
    return total / max(len(x), 1) if reduction == "mean" else total


class _GlobalInfoNce(torch.autograd.Function):
    """x, y [B, D] -> the losses of this rank's images against all texts, and of its texts against
    all images: [B], [B]. Every pair differs from all others."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, logit_scale: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        all_y = gather_rows(y)
        offset = rank() * len(x)
        strip = info_nce_strip(
            x, all_y, logit_scale, offset=offset, both_directions=True, backend=backend
        )
        column_reference, column_sum = _columns_of_all_ranks(
            torch.stack([strip.column_reference, strip.column_sum])
        )
        ctx.save_for_backward(
            x, all_y, logit_scale, strip.row_reference, strip.row_sum, column_reference, column_sum
        )
        ctx.offset = offset
        ctx.backend = backend
        of_this_rank = slice(offset, offset + len(x))
        row_gap = strip.row_sum.log2() + (strip.row_reference - strip.positive)
        column_gap = column_sum[of_this_rank].log2() + (
            column_reference[of_this_rank] - strip.positive
        )
        return LN2 * row_gap, LN2 * column_gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, all_y, logit_scale, row_reference, row_sum, column_reference, column_sum = (
            ctx.saved_tensors
        )
        gradients = info_nce_gradients(
            x=x,
            y=all_y,
            logit_scale=logit_scale,
            row_reference=row_reference,
            row_sum=row_sum,
            column_reference=column_reference,
            column_sum=column_sum,
            row_weight=row_grad,
            column_weight=gather_rows(column_grad),
            offset=ctx.offset,
            half_sum=False,
            reduction="none",
            backend=ctx.backend,
            stash=no_stash(x),
        )
        dlogit_scale = gradient_like(gradients.dlogit_scale, logit_scale)
        return gradients.dx, scatter_sums(gradients.dy), dlogit_scale, None


class _GlobalContrastive(torch.autograd.Function):
    """``_GlobalInfoNce`` where ``pairs`` says which pairs are the same thing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, logit_scale: Tensor, pairs: Pairs, backend: str
    ) -> tuple[Tensor, Tensor]:
        all_y = gather_rows(y)
        offset = rank() * len(x)
        strip = contrastive_gaps(
            x=x,
            y=all_y,
            logit_scale=logit_scale,
            **pairs.tensors(),
            both_directions=True,
            reduction="none",
            backend=backend,
            keep_stash=False,
        )
        column_statistics = _columns_of_all_ranks(strip.column_statistics)
        ctx.save_for_backward(x, all_y, logit_scale, strip.row_statistics, column_statistics)
        ctx.pairs = pairs
        ctx.backend = backend
        columns_of_this_rank = column_statistics[:, offset : offset + len(x)]
        return strip.gap, gaps_of(columns_of_this_rank).gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, all_y, logit_scale, row_statistics, column_statistics = ctx.saved_tensors
        gradients = contrastive_gradients(
            x=x,
            y=all_y,
            logit_scale=logit_scale,
            **ctx.pairs.tensors(),
            row_statistics=row_statistics,
            column_statistics=column_statistics,
            row_gap_weight=row_grad,
            row_positive_mean_weight=None,
            column_gap_weight=gather_rows(column_grad),
            column_positive_mean_weight=None,
            reduction="none",
            backend=ctx.backend,
            stash=no_stash(x),
        )
        dlogit_scale = gradient_like(gradients.dlogit_scale, logit_scale)
        return gradients.dx, scatter_sums(gradients.dy), dlogit_scale, None, None


def _columns_of_all_ranks(columns: Tensor) -> Tensor:
    """The columns' statistics over all ranks' rows, from those over this rank's rows: [2, G] or
    [4, G], the reference or maximum, then sums."""
    column_reference = columns[0].clone()
    dist.all_reduce(column_reference, dist.ReduceOp.MAX)
    sums = torch.cat([columns[1:2] * torch.exp2(columns[0] - column_reference), columns[2:]])
    dist.all_reduce(sums)
    return torch.cat([column_reference[None], sums])


class _Ring(torch.autograd.Function):
    """The sum of the sigmoid losses of x [B, D] against the texts of every rank in turn.

    Loss and gradients come in one pass, as in ``sigmoid_loss``; the backward pass scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        pairs: Pairs,
        gradients: bool,
        backend: str,
    ) -> Tensor:
        texts = y
        text_gradient = torch.zeros_like(y)
        for hop in range(world_size()):
            receive = _pass_on(texts) if hop + 1 < world_size() else None
            pairs_of_hop = pairs
            if pairs.key_ids is not None:
                start = (rank() + hop) % world_size() * len(y)
                key_ids = pairs.key_ids[:, start : start + len(y)]
                pairs_of_hop = replace(pairs, key_ids=key_ids)
            strip = fused_sigmoid_loss(
                x=x,
                y=texts,
                logit_scale=logit_scale,
                logit_bias=logit_bias,
                # The first chunk holds this rank's texts; the others hold negatives only.
                offset=0 if hop == 0 else len(y),
                gradients=gradients,
                backend=backend,
                **pairs_of_hop.ids(),
            )
            wide = strip.loss.dtype
            if hop == 0:
                loss = strip.loss
                dx = strip.dx.to(wide)
                dlogit_scale = strip.dlogit_scale.to(wide)
                dlogit_bias = strip.dlogit_bias.to(wide)
            else:
                loss = loss + strip.loss
                dx = dx + strip.dx.to(wide)
                dlogit_scale = dlogit_scale + strip.dlogit_scale.to(wide)
                dlogit_bias = dlogit_bias + strip.dlogit_bias.to(wide)
            if gradients:  # a chunk's gradient travels with it and is back after the last hop
                dy = strip.dy.to(wide)
                text_gradient = _pass_on(dy if hop == 0 else text_gradient + dy)()
            if receive is not None:
                texts = receive()
        if gradients:
            ctx.save_for_backward(dx, text_gradient, dlogit_scale, dlogit_bias)
        ctx.like = [(t.dtype, t.shape) for t in (x, y, logit_scale, logit_bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, dlogit_scale, dlogit_bias = (
            (grad * saved).to(dtype).reshape(shape)
            for saved, (dtype, shape) in zip(ctx.saved_tensors, ctx.like, strict=True)
        )
        return dx, dy, dlogit_scale, dlogit_bias, None, None, None


def _pass_on(tensor: Tensor) -> Callable[[], Tensor]:
    """Start sending a tensor to the previous rank; call the result to wait for the next rank's."""
    previous = (rank() - 1) % world_size()
    following = (rank() + 1) % world_size()
    sent = tensor.contiguous()
    received = torch.empty_like(sent)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, previous), dist.P2POp(dist.irecv, received, following)]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait
