"""The losses: OpenCLIP's with OpenCLIP's signatures, ProtoCLIP's, and their forms over ranks.

``ClipLoss``, ``SigLipLoss`` and ``ProtoClipLoss`` work in OpenCLIP's loop or your own;
``ProtoLoss`` is the objective of ``protoclip.train``. None of them forms a matrix of logits; the
computation on one process is in ``protoclip.ops``.

With several ranks, each rank holds its own rows. InfoNCE: a rank owns the rows of its images in
the [G, G] matrix of logits. It gathers the texts, sums its strip's rows and its share of every
column, and all-reduces the 2 G column sums; backward recomputes the strip and reduce-scatters the
gradient of the texts. SigLIP needs no column sums, so the texts and their gradient travel round a
ring of ranks. Neither holds a [B, G] matrix. Gradients are those of the sum of all ranks' losses;
DDP's mean over ranks turns them into those of the mean loss over the global batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from protoclip.config import EpisodeConfig, LossConfig, ProtoConfig
from protoclip.distributed import (
    check_equal_rows,
    gather_rows,
    gathered_rows,
    is_distributed,
    mean_over_ranks,
    rank,
    scatter_sums,
    world_size,
)
from protoclip.ops import Bank, checks, prototype_losses
from protoclip.ops.backends import resolve
from protoclip.ops.checks import LEFT_OUT
from protoclip.ops.contrastive import info_nce, one_way, one_way_parts, sigmoid_loss
from protoclip.ops.operators import ANY_FLOAT, gradient_like, wants_gradient
from protoclip.ops.pairs import SAME_ID, Matching, Pairs, SameId, check_ids, pairs_of
from protoclip.ops.strips import (
    gap_and_mean,
    matched_gradients,
    matched_statistics,
    side_weights,
    sigmoid_strip,
    strip_gradients,
    strip_statistics,
)
from protoclip.prototypes import (
    EXTERNAL,
    Episode,
    OnlinePrototypes,
    PrototypeBuilder,
    PrototypeSet,
)
from protoclip.seeds import mix

if TYPE_CHECKING:  # loads open_clip, which a loss alone does not need
    from protoclip.model import Encoded

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")  # OpenCLIP's ways to exchange texts
Measure = Callable[[str], contextlib.AbstractContextManager]


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
    op, first = "global_info_nce", rank() * len(image_features)
    x, y, logit_scale = checks.pairs(op, image_features, text_features, logit_scale)
    checks.one_of(op, "same_id", same_id, SAME_ID)
    all_ids = _all_ids(op, ids, x)
    table_row = "info_nce" if ids is None else "contrastive"
    name = resolve(table_row, backend, x.device.type, x.dtype)
    matching = Matching(query_ids=ids, key_ids=all_ids, same_id=same_id, first=first)
    if name == "reference":
        images = one_way(op, x, gathered_rows(y), logit_scale, matching, backend=name)
        texts = one_way(op, y, gathered_rows(x), logit_scale, matching, backend=name)
        return (images + texts) / 2
    pairs = None if all_ids is None else pairs_of(op, x, len(all_ids), matching)
    rows, columns = _Strip.apply(x, y, logit_scale, pairs, name)
    return (rows + columns).mean() / 2


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
    """``contrastive_parts`` of this rank's queries; arguments as in ``global_contrastive``."""
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


def _keys_of_all_ranks(op: str, keys: Tensor, matching: Matching) -> tuple[Tensor, Matching]:
    """The keys of all ranks with their ids and biases; checked before any rank waits."""
    if not is_distributed():
        return keys, matching
    checks.matrix(op, "keys", keys, "[M, D]")
    bias = matching.key_bias
    if bias is not None:
        checks.vector(op, "key_bias", bias, ANY_FLOAT, [(len(keys),)], keys.device)
        bias = gathered_rows(bias)
    ids = _all_ids(op, matching.key_ids, keys, "key_ids")
    matching = replace(matching, key_ids=ids, key_bias=bias, first=rank() * len(keys))
    return gathered_rows(keys), matching


def _all_ids(op: str, ids: Tensor | None, rows: Tensor, name: str = "ids") -> Tensor | None:
    """The ids of all ranks' rows, int64 [W * B] or [W * B, R]."""
    if ids is None:
        return None
    check_ids(op, name, ids, len(rows), rows.device)
    return gather_rows(ids)


def global_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "positive",
    backend: str = "auto",
) -> Tensor:
    """SigLIP's loss of this rank's B images against the texts of all ranks, summed.

    Memory is O(B D): the texts pass from rank to rank; only the reference gathers them.

    Args: those of ``sigmoid_loss``, for this rank's pairs; B is the same on every rank.
    """
    if not is_distributed():
        return sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            ids=ids,
            same_id=same_id,
            backend=backend,
        )
    op, first = "global_sigmoid_loss", rank() * len(image_features)
    x, y, logit_scale = checks.pairs(op, image_features, text_features, logit_scale)
    logit_bias = checks.scalar(op, "logit_bias", logit_bias, x.device)
    all_ids = _all_ids(op, ids, x)
    name = resolve("siglip", backend, x.device.type, x.dtype)
    if name == "reference":
        return sigmoid_loss(
            x,
            gathered_rows(y),
            logit_scale,
            logit_bias,
            ids=all_ids,
            same_id=same_id,
            offset=first,
            backend=name,
        )
    matching = Matching(query_ids=ids, key_ids=all_ids, same_id=same_id, first=first)
    pairs = pairs_of(op, x, len(x) * world_size(), matching)
    gradients = wants_gradient(x, y, logit_scale, logit_bias)
    return _Ring.apply(x, y, logit_scale, logit_bias, pairs, gradients, name)


class _Strip(torch.autograd.Function):
    """x, y [B, D] -> the losses of this rank's images against all texts, and of its texts against
    all images: [B], [B]. ``pairs`` says how those with the same id count; None: all differ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, logit_scale: Tensor, pairs: Pairs | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        all_y, offset = gather_rows(y), rank() * len(x)
        if pairs is None:
            strip = strip_statistics(
                x, all_y, logit_scale, offset=offset, columns=True, backend=backend
            )
            positives, count = strip.positive, torch.ones_like(strip.positive)
            rows = torch.stack([strip.row_max, strip.row_sum, positives, count])
            columns = torch.stack([strip.column_max, strip.column_sum])
        else:
            matched = matched_statistics(
                x, all_y, logit_scale, pairs, columns=True, backend=backend, keep_stash=False
            )
            rows, columns = matched.row_statistics, matched.column_statistics
        # The columns' statistics, [2, G] or [4, G]: their maximum, then sums, over the ranks.
        column_max = columns[0].clone()
        dist.all_reduce(column_max, dist.ReduceOp.MAX)
        sums = torch.cat([columns[1:2] * torch.exp2(columns[0] - column_max), columns[2:]])
        dist.all_reduce(sums)
        columns = torch.cat([column_max[None], sums])
        ctx.save_for_backward(x, all_y, logit_scale, rows, columns)
        ctx.pairs, ctx.offset, ctx.backend = pairs, offset, backend
        own_columns = columns[:, offset : offset + len(x)]
        if pairs is None:
            own_columns = torch.cat([own_columns, torch.stack([positives, count])])
        return gap_and_mean(rows).gap, gap_and_mean(own_columns).gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, column_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, all_y, logit_scale, rows, columns = ctx.saved_tensors
        all_column_grads = gather_rows(column_grad)
        if ctx.pairs is None:
            dx, dy, dlogit_scale = strip_gradients(
                x,
                all_y,
                logit_scale,
                row_max=rows[0],
                row_sum=rows[1],
                column_max=columns[0],
                column_sum=columns[1],
                row_weight=row_grad,
                column_weight=all_column_grads,
                offset=ctx.offset,
                direction_weight=1.0,
                mean=False,
                backend=ctx.backend,
                stash=None,
            )
        else:
            dx, dy, dlogit_scale, _ = matched_gradients(
                x,
                all_y,
                logit_scale,
                ctx.pairs,
                row_statistics=rows,
                column_statistics=columns,
                row_weights=side_weights(row_grad, None, rows),
                column_weights=side_weights(all_column_grads, None, columns),
                backend=ctx.backend,
                stash=None,
            )
        return dx, scatter_sums(dy), gradient_like(dlogit_scale, logit_scale), None, None


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
        texts, text_gradient = y, torch.zeros_like(y)
        for hop in range(world_size()):
            receive = _pass_on(texts) if hop + 1 < world_size() else None
            key_ids = pairs.key_ids
            if key_ids is not None:
                start = (rank() + hop) % world_size() * len(y)
                key_ids = key_ids[:, start : start + len(y)]
            strip = sigmoid_strip(
                x,
                texts,
                logit_scale,
                logit_bias,
                # The first chunk holds the own texts of all rows; the others hold negatives only.
                offset=0 if hop == 0 else len(y),
                gradients=gradients,
                backend=backend,
                query_ids=pairs.query_ids,
                key_ids=key_ids,
                same_positive=pairs.same_positive,
            )
            wide = strip.loss.dtype
            if hop == 0:
                loss, dx = strip.loss, strip.dx.to(wide)
                dlogit_scale, dlogit_bias = strip.dlogit_scale.to(wide), strip.dlogit_bias.to(wide)
            else:
                loss, dx = loss + strip.loss, dx + strip.dx.to(wide)
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
    previous, following = (rank() - 1) % world_size(), (rank() + 1) % world_size()
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


class _EqualBatches(nn.Module):
    """A loss over ranks that looks at their batches' sizes once, before its first exchange."""

    world_size: int
    _looked = False

    def _look_once(self, rows: Tensor) -> None:
        if self.world_size > 1 and not self._looked and not torch.compiler.is_compiling():
            check_equal_rows(type(self).__name__, rows)
            self._looked = True


class ClipLoss(_EqualBatches):
    """OpenCLIP's ``ClipLoss`` without its [N, N] logits.

    Args:
        local_loss: each rank's rows against all ranks' columns, instead of all against all.
        gather_with_grad: gradients also flow to the rows of other ranks. With ``local_loss`` the
            loss is then exact and only the texts are gathered. (A rank's gradient of the scale is
            its strip's; the mean over the ranks is OpenCLIP's.)
        cache_labels: accepted because OpenCLIP has it, unused: there are no labels to cache.
        rank, world_size: those of this process.
        use_horovod: must be false.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: expected use_horovod=False, got True; run with torchrun")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Mean InfoNCE of both directions.

        Args:
            image_features, text_features: [N, D], unit rows; float dtypes, mixed ones are promoted.
            logit_scale: [] or [1], the multiplier (not its logarithm).
            logit_bias: [] or [1]; softmax ignores it, so its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.
            ids: int64 [N] or [N, R], R <= 2: pairs with an equal id, on any rank, are not
                negatives of each other. OpenCLIP does not have this argument.
        Returns:
            float32 [], nats.
        """
        self._look_once(image_features)
        loss = self._loss(image_features, text_features, logit_scale, ids)
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # keeps the bias in the graph, as OpenCLIP's does
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, x: Tensor, y: Tensor, scale: Tensor | float, ids: Tensor | None) -> Tensor:
        if self.world_size == 1:
            return info_nce(x, y, scale, ids=ids)
        if self.local_loss and self.gather_with_grad:
            return global_info_nce(x, y, scale, ids=ids)
        all_x, all_y = self._of_all_ranks(x), self._of_all_ranks(y)
        all_ids = _all_ids("ClipLoss", ids, x)
        if not self.local_loss:
            return info_nce(all_x, all_y, scale, ids=all_ids)
        matching = Matching(key_ids=all_ids, first=self.rank * len(x))
        images = one_way("ClipLoss", x, all_y, scale, matching)
        texts = one_way("ClipLoss", y, all_x, scale, matching)
        return (images + texts) / 2

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """All rows in rank order. Without ``gather_with_grad`` only this rank's rows have a
        gradient, and with ``local_loss`` none has."""
        if self.world_size == 1:
            return x
        if self.gather_with_grad:
            return gathered_rows(x)
        every = gather_rows(x)
        if self.local_loss:
            return every
        start = self.rank * len(x)
        return torch.cat([every[:start], x, every[start + len(x) :]])

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The full logits of both directions, for subclasses written for OpenCLIP's class: [N, M]
        each, with the M pairs of all ranks (N = M without ``local_loss``)."""
        x, y = checks.promoted(image_features, text_features)
        all_x, all_y = self._of_all_ranks(x), self._of_all_ranks(y)
        if not self.local_loss:
            x, y = all_x, all_y
        images, texts = logit_scale * x @ all_y.T, logit_scale * y @ all_x.T
        return (images, texts) if logit_bias is None else (images + logit_bias, texts + logit_bias)

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """int64 [num_logits]: the column of each row's positive in ``get_logits``."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)


class SigLipLoss(_EqualBatches):
    """OpenCLIP's ``SigLipLoss`` without its [N, N] logits.

    Args:
        cache_labels, chunk_size: accepted because OpenCLIP has them, unused.
        rank, world_size: those of this process.
        dist_impl: "bidir", "shift", "reduce" or "gather"; they give the same value and gradient,
            and here all use one ring exchange of the texts.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: expected dist_impl in {DIST_IMPLS}, got {dist_impl!r}")
        self.rank, self.world_size = rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        ids: Tensor | None = None,
        same_id: SameId = "positive",
    ) -> Tensor | dict[str, Tensor]:
        """Sum over pairs of the sigmoid loss, divided by the local batch: float32 [], nats.

        Args: those of ``ClipLoss.forward``, except that a ``logit_bias`` of None is zero, and pairs
        of the same id are positives too, or are left out if ``same_id`` is "exclude".
        """
        x, y, scale = checks.pairs("SigLipLoss", image_features, text_features, logit_scale)
        bias = 0.0 if logit_bias is None else logit_bias
        self._look_once(x)
        total = global_sigmoid_loss if self.world_size > 1 else sigmoid_loss
        loss = total(x, y, scale, bias, ids=ids, same_id=same_id) / max(x.shape[0], 1)
        return {"contrastive_loss": loss} if output_dict else loss


class ProtoClipLoss(ClipLoss):
    """``ClipLoss`` and the prototype loss, for OpenCLIP's loop or your own.

    Until the first clustering (see ``steps_to_prototypes``) it is ``ClipLoss``. The state advances
    once per optimiser step, in training mode with gradients on, and lives on the features' device.
    Each rank holds its own slice of the queue; k-means sums over ranks, so all ranks have the same
    prototypes. Without ``gather_with_grad`` OpenCLIP scales InfoNCE's feature gradient by
    1 / world_size. The prototype loss does the same, so their balance does not depend on the flags.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: ``ClipLoss``'s.
        proto: settings of the prototypes.
        accum_freq: calls per optimiser step, each with all features of the step, as with OpenCLIP's
            ``--accum-freq``.
    """

    def __init__(
        self, *args: Any, proto: ProtoConfig | None = None, accum_freq: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.proto = proto or ProtoConfig()
        names = "kmeans_max_iter", "pbt", "target_temperature"
        of_online = EpisodeConfig(**{name: getattr(self.proto, name) for name in names})
        self.online = OnlinePrototypes(
            PrototypeBuilder(of_online, dist.group.WORLD if self.world_size > 1 else None),
            queue=-(-self.proto.queue // self.world_size),
            num_clusters=self.proto.num_clusters,
            capacity=-(-self.proto.capacity // self.world_size),
            every=self.proto.every,
            warmup=self.proto.warmup,
            seed=self.proto.seed,
            calls_per_step=accum_freq,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The last step's prototype accuracy, cluster sizes and step count. Reads the device."""
        return self.online.metrics()

    def steps_to_prototypes(self, batch_size: int) -> int:
        """Optimiser steps before prototypes exist, from the start or after a resume, with
        ``batch_size`` pairs per rank."""
        return self.online.first_step(batch_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        ids: Tensor | None = None,
        *,
        image_projection: Tensor | None = None,
        text_projection: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """InfoNCE plus the weighted prototype loss.

        Args:
            image_features, text_features, logit_scale, logit_bias, ids: as in ``ClipLoss``.
            output_dict: return the terms, ``contrastive_loss`` and (once there are prototypes)
                ``proto_loss``, weighted: their sum is the loss.
            image_projection, text_projection: [N, Dh], unit rows from projection heads in the
                model, to cluster instead of the features. None: cluster the features.
            index: int64 [N], the samples' positions in the data set or 64-bit hashes of their keys.
                A sample's labels are then those of its features when it was last seen, among the
                newest ``proto.capacity`` pairs; a sample not seen before has InfoNCE alone. None:
                labels come from a balanced assignment of the batch.
        Returns:
            float32 [], nats.
        """
        plain = image_features, text_features, logit_scale, logit_bias
        if index is not None:
            # A data loader leaves it on the host.
            shape, place = (len(image_features),), getattr(index, "device", image_features.device)
            checks.vector("ProtoClipLoss", "index", index, checks.INTEGERS, [shape], place)
        losses: dict[str, Any] = {"contrastive_loss": super().forward(*plain, ids=ids)}
        image = image_features if image_projection is None else image_projection
        text = text_features if text_projection is None else text_projection
        features = {"image": self._balanced(image), "text": self._balanced(text)}
        sets, labels = self.online.sets, self.online.labels_of(features, index)
        if sets is not None and labels is not None and self.proto.weight > 0:
            scale = self.proto.logit_scale or logit_scale
            # With an index the ranks may know different numbers of their samples.
            over_ranks = self.world_size > 1 and index is not None
            term = prototype_term(features, labels, sets, scale, over_ranks=over_ranks)
            losses["proto_loss"] = self.proto.weight * term.loss
            self.online.note(term.accuracy())
        if self.training and torch.is_grad_enabled():
            self.online.observe(image.detach(), text.detach(), index)
        return losses if output_dict else torch.stack(list(losses.values())).sum()

    def _balanced(self, x: Tensor) -> Tensor:
        """x with its gradient divided by world_size, if OpenCLIP's InfoNCE does the same."""
        if self.world_size == 1 or self.gather_with_grad:
            return x
        return x.detach() + (x - x.detach()) / self.world_size


@dataclass(frozen=True)
class Losses:
    """Scalars of one batch, on its device, fp32."""

    total: Tensor  # weighted sum, to differentiate
    terms: dict[str, Tensor]  # unweighted, by name, in nats; only those with a weight
    hits: dict[str, Tensor]  # source -> [2], as in ``PrototypeTerm``

    @property
    def accuracy(self) -> dict[str, Tensor]:
        """Share of samples whose nearest prototype is their own: mean over the internal sources,
        and of the teacher."""
        internal = [share(counts) for source, counts in self.hits.items() if source != EXTERNAL]
        shares = {"proto_accuracy": torch.stack(internal).mean()} if internal else {}
        if EXTERNAL in self.hits:
            shares["external_accuracy"] = share(self.hits[EXTERNAL])
        return shares


class ProtoLoss(nn.Module):
    """The training objective: w_clip * InfoNCE (or SigLIP's loss) + w_proto * internal prototypes
    + w_proto_external * external ones + w_distill * the teacher's similarities (a control).

    A term is not computed if its weight is 0 or its prototypes are missing (warm-up, no teacher).

    Args:
        config: the weights.
        teacher: [dataset, d] on the features' device; only distillation reads it.
        measure: times a named phase, here "prototypes".
    """

    def __init__(
        self,
        config: LossConfig,
        teacher: Tensor | None = None,
        measure: Measure = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        self.config, self.teacher, self.measure = config, teacher, measure

    def forward(
        self,
        encoded: Encoded,
        projected: Encoded | None,
        index: Tensor,
        logit_scale: Tensor,
        proto_scale: Tensor,
        episode: Episode | None,
        ids: Tensor | None = None,
        logit_bias: Tensor | None = None,
    ) -> Losses:
        """The losses of a batch of B pairs; with several ranks, of this rank's share.

        The means over ranks of ``total`` and of its gradients are those of the whole batch.

        Args:
            encoded: [B, D] each, not normalised; float32, bfloat16 or float16.
            projected: [B, Dh] each, unit rows, float32; None if there is no prototype term.
            index: int64 [B], positions in the dataset, to look up the cluster labels.
            logit_scale, proto_scale: scalars, the multipliers (not their logarithms).
            episode: prototypes; None: InfoNCE only.
            ids: int64 [B]; pairs with equal ids are not negatives of each other (with SigLIP's
                loss they are positives); None: all differ.
            logit_bias: scalar, for SigLIP's loss instead of InfoNCE; None: InfoNCE.
        """
        config, terms = self.config, dict[str, Tensor]()
        weights = {
            "contrastive_loss": config.w_clip,
            "proto_loss": config.w_proto,
            "external_loss": config.w_proto_external,
            "distill_loss": config.w_distill,
        }
        hits: dict[str, Tensor] = {}
        if config.w_clip > 0:
            pairs = _normalise(encoded.image), _normalise(encoded.text), logit_scale
            if logit_bias is None:
                terms["contrastive_loss"] = global_info_nce(*pairs, ids=ids)
            else:
                loss = global_sigmoid_loss(*pairs, logit_bias, ids=ids)
                terms["contrastive_loss"] = loss / len(index)
        if episode is not None and projected is not None:
            features = {"image": projected.image, "text": projected.text}
            labels = episode.labels_of(index)
            with self.measure("prototypes"):
                for name, external in (("proto_loss", False), ("external_loss", True)):
                    sets = [item for item in episode.sets if (item.source == EXTERNAL) == external]
                    if weights[name] > 0 and sets:
                        term = prototype_term(
                            features, labels, sets, proto_scale, over_ranks=is_distributed()
                        )
                        terms[name] = term.loss
                        hits |= term.hits
        if config.w_distill > 0 and projected is not None and self.teacher is not None:
            terms["distill_loss"] = similarity_distillation(
                projected, self.teacher[index], proto_scale, config.distill_temperature
            )
        total: Any = sum(weights[name] * term for name, term in terms.items())
        return Losses(total, terms, hits)


def caption_ids(tokens: Tensor) -> Tensor:
    """int64 [B], equal for equal caption tokens [B, L]; others collide once in 2^47 pairs."""
    factors = torch.from_numpy(mix(0, np.arange(tokens.shape[1])).view(np.int64))
    return (tokens.long() * factors.to(tokens.device)).sum(dim=1)


@dataclass(frozen=True)
class PrototypeTerm:
    """The prototype loss of a batch, and how often the nearest prototype is the sample's own."""

    loss: Tensor  # [], mean over the sets
    hits: dict[str, Tensor]  # source -> [2]: samples whose nearest prototype is theirs, samples

    def accuracy(self) -> dict[str, Tensor]:
        """Share of the labelled samples whose nearest prototype is their own, by source."""
        return {source: share(counts) for source, counts in self.hits.items()}


def share(counts: Tensor) -> Tensor:
    """hits / samples of [2]; NaN without samples."""
    return counts[0] / counts[1]


def prototype_term(
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    sets: Sequence[PrototypeSet],
    scale: Tensor | float,
    *,
    over_ranks: bool = False,
) -> PrototypeTerm:
    """The mean loss over the sets.

    The sets of a student share one call of the op, hence one pass over its features.

    Args:
        features: modality -> [B, Dh], unit rows.
        labels: source -> int64 [B]; LEFT_OUT leaves a sample out.
        sets: at least one.
        scale: the multiplier.
        over_ranks: scale so that the mean over ranks is the mean over all samples with a label.
    """
    losses: list[Tensor] = []
    hits: dict[str, Tensor] = {}
    for student, rows in features.items():
        of_student = [item for item in sets if item.student == student]
        banks = [item.bank(labels[item.source], rows.dtype) for item in of_student]
        if not banks:
            continue
        reduction = "none" if over_ranks else "mean"
        result = prototype_losses(rows, banks, scale, reduction=reduction)
        losses += list(_over_ranks(result.loss, banks) if over_ranks else result.loss)
        for item, bank, nearest in zip(of_student, banks, result.nearest, strict=True):
            counts = torch.stack([(nearest == bank.labels).sum(), (bank.labels != LEFT_OUT).sum()])
            hits[item.source] = hits.get(item.source, 0) + counts.float()
    return PrototypeTerm(torch.stack(losses).mean(), hits)


def _over_ranks(losses: Tensor, banks: Sequence[Bank]) -> Tensor:
    """[S, B] -> [S], scaled so that the mean over ranks is the mean over all labelled samples."""
    counts = torch.stack([(bank.labels != LEFT_OUT).sum() for bank in banks])
    counts = mean_over_ranks(counts.to(losses.dtype))
    return losses.sum(dim=1) / counts.where(counts > 0, 1.0)


def similarity_distillation(
    projected: Encoded, teacher: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """KL divergence of each student's similarities within the global batch from the teacher's.

    Row i compares sample i with the G - 1 others: teacher softmax_j(t_i . t_j / temperature),
    student softmax_j(scale h_i . h_j). The result is the mean over this rank's rows and the two
    students, in nats. ``projected``: [B, Dh] each, unit rows, G = W B >= 3; ``teacher``: [B, d],
    any row length. Memory is O(B G), unlike the other losses: it is a control.
    """
    t = F.normalize(teacher.float(), dim=1)
    target = F.log_softmax(_to_others(t) / temperature, dim=1)
    losses = []
    for h in (projected.image, projected.text):
        student = F.log_softmax(scale * _to_others(h), dim=1)
        losses.append(F.kl_div(student, target.to(h), reduction="batchmean", log_target=True))
    return (losses[0] + losses[1]) / 2


def _to_others(rows: Tensor) -> Tensor:
    """This rank's [B, d] -> products of each row with all other rows of all ranks, [B, G - 1],
    starting with the next row."""
    products = rows @ gathered_rows(rows).T
    b, g = products.shape
    others = rank() * b + 1 + torch.arange(b, device=rows.device)[:, None]
    return products.gather(1, (others + torch.arange(g - 1, device=rows.device)) % g)


def _normalise(features: Tensor) -> Tensor:
    """Unit rows in the features' dtype; the norm is computed in fp32."""
    return F.normalize(features.float(), dim=-1).to(features.dtype)
