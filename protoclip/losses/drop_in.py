"""Losses for OpenCLIP's loop or your own, with OpenCLIP's signatures and without its logits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.distributed import group_named, rank, world_size
from protoclip.ops import checks, info_nce, sigmoid_loss
from protoclip.ops.columns import LOCAL, Local, check_group, columns_named, columns_of
from protoclip.ops.dispatch import resolve
from protoclip.ops.id_codes import coder_of
from protoclip.ops.operators import without_autocast
from protoclip.ops.pairs import SameId, check_ids, pairs_of
from protoclip.ops.softmax import Strip, query_loss

if TYPE_CHECKING:
    from protoclip.settings.config import ProtoConfig

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")  # OpenCLIP's ways to exchange texts


class _OverRanks(nn.Module):
    """A loss over the ranks of a process group, and what it checks of them."""

    rank: int
    world_size: int
    _group_name = ""  # of the argument ``group``, as a module with a group cannot be copied
    _looked = False
    _own_logits = False  # a subclass has its own get_logits or get_ground_truth

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = next(base for base in cls.__mro__ if base.__module__ == __name__)
        methods = ("get_logits", "get_ground_truth")
        cls._own_logits = any(getattr(cls, name) != getattr(ours, name) for name in methods)

    def _join(self, rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        """Take the rank and the number of ranks; those of the group, if there is one."""
        if group is not None:
            check_group(type(self).__name__, group)
            in_group = (group.rank(), group.size())
            if (rank, world_size) not in ((0, 1), in_group):
                raise ValueError(
                    f"{type(self).__name__}: expected rank={in_group[0]} and "
                    f"world_size={in_group[1]}, those of the group, got rank={rank} and "
                    f"world_size={world_size}; leave them out"
                )
            rank, world_size = in_group
            self._group_name = group.group_name
        self.rank = rank
        self.world_size = world_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group: all processes where the loss has several ranks and no other group."""
        if self.world_size == 1:
            return None
        return group_named(self._group_name) if self._group_name else dist.group.WORLD

    @property
    def _columns(self) -> Local:
        return columns_named(self.group.group_name) if self.group else LOCAL

    def _look(self) -> None:
        """At the first call: ValueError if the process has another number, and a warning if the
        loss is of one of several ranks."""
        if torch.compiler.is_compiling() or self._looked:  # it would be a second graph
            return
        name = type(self).__name__
        expected = f"{name}: expected rank={rank()} and world_size={world_size()} of this process"
        ranks = (self.rank, self.world_size)
        if self.world_size > 1 and not self._group_name and ranks != (rank(), world_size()):
            raise ValueError(
                f"{expected}, got rank={self.rank} and world_size={self.world_size}; call "
                "torch.distributed.init_process_group first, and pass both"
            )
        self._looked = True
        if self.world_size == 1 < world_size() and not self._group_name:
            warnings.warn(
                f"{expected}, got world_size=1, so each rank compares the pairs of its own batch "
                "alone; pass both for the loss of the global batch",
                stacklevel=4,
            )


class ClipLoss(_OverRanks):
    """OpenCLIP's ``ClipLoss`` without its [N, N] logits.

    Args:
        local_loss: each rank's rows against all ranks' columns, instead of all against all.
        gather_with_grad: gradients also flow to the rows of other ranks. With ``local_loss`` the
            loss is then exact and only the texts are gathered. (Each rank's gradient of the scale
            is that of its own rows; the mean over ranks equals OpenCLIP's.)
        cache_labels: kept because OpenCLIP has it, unused: there are no labels to cache.
        rank, world_size: those of this process; with several ranks the loss is over all processes.
        use_horovod: must be false.
        group: a process group for the loss to be over; rank and world_size are then its own, and
            can be left out. OpenCLIP does not have this argument.

    Example:
        >>> criterion = protoclip.ClipLoss()
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> criterion(image, text, torch.tensor(14.3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: expected use_horovod=False, got True; run with torchrun")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod
        self._join(rank, world_size, group)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Mean InfoNCE of both directions.

        Args:
            image_features, text_features: [N, D], unit rows; float dtypes, mixed ones are promoted.
            logit_scale: [] or [1], the multiplier (not its logarithm); a number is at least 0.
            logit_bias: [] or [1], or a number; softmax ignores it, so its gradient is zero.
            output_dict: return ``{"contrastive_loss": loss}``.
            ids: int64 [N] or [N, R], R <= 2: pairs with an equal id, on any rank, are not
                negatives of each other. OpenCLIP does not have this argument.
        Returns:
            float32 [], nats.
        """
        self._look()
        loss = self._loss(image_features, text_features, logit_scale, ids)
        if logit_bias is not None:
            bias = checks.scalar("ClipLoss", "logit_bias", logit_bias, loss.device)
            # Keeps the bias in the graph, as OpenCLIP's does.
            loss = loss + 0 * bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self, x: Tensor, y: Tensor, logit_scale: Tensor | float, ids: Tensor | None
    ) -> Tensor:
        if self._own_logits:
            return self._loss_of_own_logits(x, y, logit_scale, ids)
        if self.world_size == 1 or (self.local_loss and self.gather_with_grad):
            return info_nce(x, y, logit_scale, ids=ids, group=self.group)
        op = type(self).__name__
        x, y, logit_scale = checks.equal_rows(op, x, y, logit_scale)
        columns = columns_of(op, self.group, x)
        all_x, all_y = self._of_all_ranks(x), self._of_all_ranks(y)
        if not self.local_loss:
            if ids is not None:
                ids = columns.gather(check_ids(op, "ids", ids, len(x), x.device))
            return info_nce(all_x, all_y, logit_scale, ids=ids)
        backend = resolve("contrastive", "auto", x.device.type, x.dtype)
        pairs = pairs_of(op, x, len(x), key_ids=ids, columns=columns, code_ids=coder_of(backend))
        strip = Strip(x, all_y, logit_scale, pairs, LOCAL, backend)
        images = query_loss(op, strip)
        texts = query_loss(op, strip._replace(x=y, y=all_x))
        return (images + texts) / 2

    def _loss_of_own_logits(
        self, x: Tensor, y: Tensor, logit_scale: Tensor | float, ids: Tensor | None
    ) -> Tensor:
        """The loss of a subclass with logits or positives of its own, from the full logits."""
        if ids is not None:
            raise ValueError(
                f"{type(self).__name__}: expected no ids with a get_logits or get_ground_truth of "
                "its own, got some; leave them out, or mask its logits"
            )
        columns_of(type(self).__name__, self.group, x)
        images, texts = self.get_logits(x, y, logit_scale)
        positives = self.get_ground_truth(images.device, len(images))
        return (F.cross_entropy(images, positives) + F.cross_entropy(texts, positives)) / 2

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """All rows in rank order. Without ``gather_with_grad`` only this rank's rows have a
        gradient, and with ``local_loss`` none has."""
        if self.world_size == 1 or self.gather_with_grad:
            return self._columns.gather(x)
        all_rows = self._columns.gather(x.detach())
        if self.local_loss:
            return all_rows
        start = self.rank * len(x)
        return torch.cat([all_rows[:start], x, all_rows[start + len(x) :]])

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The full logits of both directions, for subclasses written for OpenCLIP's class: [N, M]
        each, with the M pairs of all ranks (N = M without ``local_loss``). A subclass that has its
        own, or its own ``get_ground_truth``, gets the loss of those."""
        x, y = checks.promoted(image_features, text_features)
        all_x, all_y = self._of_all_ranks(x), self._of_all_ranks(y)
        images = logit_scale * (x if self.local_loss else all_x) @ all_y.T
        texts = logit_scale * (y if self.local_loss else all_y) @ all_x.T
        if logit_bias is None:
            return images, texts
        return images + logit_bias, texts + logit_bias

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """int64 [num_logits]: the column of each row's positive in ``get_logits``."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)


class CoCaLoss(ClipLoss):
    """OpenCLIP's ``CoCaLoss``: ``ClipLoss`` and the cross-entropy of captions, both weighted.

    Args:
        caption_loss_weight, clip_loss_weight: factors of the two; without the second there is only
            the first.
        pad_id: the token that has no loss.
        args, kwargs: ``ClipLoss``'s.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.caption_loss_weight = caption_loss_weight
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The two terms. ``logits`` [N, L, vocabulary] and ``labels`` int64 [N, L] are those of the
        captions' tokens; the others are ``ClipLoss``'s."""
        contrastive: Any = torch.zeros((), device=logits.device)
        if self.clip_loss_weight:
            contrastive = super().forward(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * contrastive
        captions = self.caption_loss_weight * self.caption_loss(logits.transpose(1, 2), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": captions}
        return contrastive, captions


class DistillClipLoss(ClipLoss):
    """OpenCLIP's ``DistillClipLoss`` without its four matrices of logits.

    The cross-entropy of a row with the teacher's probabilities P is that of its own key plus
    scale q.(own key - sum_j P_j k_j). The sum is an attention of the teacher's query to the
    teacher's keys with the student's keys as values, which torch computes in fp32, on CPUs and GPUs
    by kernels without a matrix of probabilities. The teacher has no gradient.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """InfoNCE, and the cross-entropy with the teacher's probabilities, of both directions.

        Args:
            dist_image_features, dist_text_features, dist_logit_scale: the teacher's [N, Dt], and
                its scale; the others are ``ClipLoss``'s.
        """
        contrastive: Any = super().forward(image_features, text_features, logit_scale)
        by_image = self._teachers_gap(
            image_features, text_features, dist_image_features, dist_text_features, dist_logit_scale
        )
        by_text = self._teachers_gap(
            text_features, image_features, dist_text_features, dist_image_features, dist_logit_scale
        )
        gaps = (by_image + by_text) / 2
        scale = checks.scalar("DistillClipLoss", "logit_scale", logit_scale, gaps.device)
        distill = contrastive + scale.reshape(()) * gaps
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def _teachers_gap(
        self,
        queries: Tensor,
        keys: Tensor,
        teachers_queries: Tensor,
        teachers_keys: Tensor,
        teachers_scale: Tensor | float,
    ) -> Tensor:
        """Mean over the queries of q.(own key - mean key by the teacher's probabilities), []."""
        first = self.rank * len(queries) if self.world_size > 1 and self.local_loss else 0
        all_keys = self._of_all_ranks(keys).float()
        teachers_keys = self._columns.gather(teachers_keys.detach())
        teachers_queries = teachers_queries.detach()
        if not self.local_loss:
            queries = self._of_all_ranks(queries)
            teachers_queries = self._of_all_ranks(teachers_queries)
        x = queries.float()
        if isinstance(teachers_scale, Tensor):
            teachers_scale = teachers_scale.detach()
        attending = teachers_scale * teachers_queries.float()
        # One width for all three, which torch's kernels want.
        width = max(x.shape[1], attending.shape[1])

        def padded(rows: Tensor) -> Tensor:
            return F.pad(rows, (0, width - rows.shape[1]))[None, None]

        with without_autocast(x.device.type):
            attention = F.scaled_dot_product_attention(
                padded(attending),
                padded(teachers_keys.float()),
                padded(all_keys),
                scale=1.0,
            )
        mean_keys = attention[0, 0]
        own_keys = all_keys[first : first + len(x)]
        return (x * (own_keys - mean_keys[:, : x.shape[1]])).sum(dim=1).mean()


class SigLipLoss(_OverRanks):
    """OpenCLIP's ``SigLipLoss`` without its [N, N] logits.

    Args:
        cache_labels, chunk_size: kept because OpenCLIP has them, unused.
        rank, world_size, group: as in ``ClipLoss``.
        dist_impl: "bidir", "shift", "reduce" or "gather"; they give the same value and gradient,
            and here all use one ring exchange of the texts.

    Example:
        >>> criterion = protoclip.SigLipLoss()
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> criterion(image, text, torch.tensor(10.0), torch.tensor(-10.0)).shape
        torch.Size([])
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"SigLipLoss: expected dist_impl in {DIST_IMPLS}, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self._join(rank, world_size, group)
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        ids: Tensor | None = None,
        same_id: SameId = "positive",
        *,
        weights: Tensor | None = None,
        label_smoothing: float = 0,
        reduction: str = "mean",
    ) -> Tensor | dict[str, Tensor]:
        """Sum over pairs of the sigmoid loss, divided by the local batch: float32 [], nats.

        Args: those of ``ClipLoss.forward``, except that a ``logit_bias`` of None is zero, and pairs
        of the same id are positives too, or are left out if ``same_id`` is "exclude"; and
        ``weights``, ``label_smoothing`` and ``reduction`` of ``sigmoid_loss``, for this rank's
        images.
        """
        if self._own_logits:
            raise ValueError(
                f"{type(self).__name__}: expected SigLipLoss's get_logits and get_ground_truth, "
                "which its forward does without, got others; give the class its own forward"
            )
        x, y, logit_scale = checks.equal_rows(
            "SigLipLoss", image_features, text_features, logit_scale
        )
        bias = 0.0 if logit_bias is None else logit_bias
        self._look()
        loss = sigmoid_loss(
            x,
            y,
            logit_scale,
            bias,
            ids=ids,
            same_id=same_id,
            weights=weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
            group=self.group,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """The full logits, [N, M] in memory, for subclasses written for OpenCLIP's class."""
        x, y = checks.promoted(image_features, text_features)
        logits = logit_scale * x @ y.T
        return logits if logit_bias is None else logits + logit_bias

    def get_ground_truth(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """The signs of all pairs, [num_logits, num_logits] in memory: 1 for a pair, else -1."""
        signs = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return signs if negative_only else signs.fill_diagonal_(1)


class ProtoClipLoss(ClipLoss):
    """``ClipLoss`` and the prototype loss, for OpenCLIP's loop or your own.

    Until the first clustering (see ``steps_to_prototypes``) it is ``ClipLoss``. The state advances
    once per optimiser step, in training mode with gradients on, and lives on the features' device.
    Each rank holds its own slice of the queue; k-means sums over ranks, so all ranks have the same
    prototypes. Without ``gather_with_grad`` OpenCLIP scales InfoNCE's feature gradient by
    1 / world_size; with ``local_loss`` and without it, rows have a gradient as queries only, about
    half. The prototype loss does the same, so their balance does not depend on the flags.

    ``state_dict`` holds this rank's slice of the queue, and the prototypes and labels, which are
    those of all ranks. Save it on each rank: with rank 0's alone the others start from its slice.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group:
            ``ClipLoss``'s.
        proto: settings of the prototypes.
        accum_freq: calls per optimiser step, each with all features of the step, as with OpenCLIP's
            ``--accum-freq``.

    Example:
        >>> config = protoclip.ProtoConfig(capacity=64, queue=32, k=4)
        >>> criterion = protoclip.ProtoClipLoss(proto=config)
        >>> image, text = torch.nn.functional.normalize(torch.randn(2, 8, 16), dim=2)
        >>> criterion(image, text, torch.tensor(14.3), index=torch.arange(8)).shape
        torch.Size([])
    """

    def __init__(
        self, *args: Any, proto: ProtoConfig | None = None, accum_freq: int = 1, **kwargs: Any
    ) -> None:
        from protoclip.episodes.prototypes import PrototypeBuilder
        from protoclip.losses.online import OnlinePrototypes
        from protoclip.settings.config import EpisodeConfig, ProtoConfig

        super().__init__(*args, **kwargs)
        self.proto = proto or ProtoConfig()
        clustering = EpisodeConfig(
            kmeans_max_iter=self.proto.kmeans_max_iter,
            pbt=self.proto.pbt,
            target_temperature=self.proto.target_temperature,
        )
        self.online = OnlinePrototypes(
            PrototypeBuilder(clustering),
            queue=-(-self.proto.effective_queue // self.world_size),
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

    def get_extra_state(self) -> dict[str, Tensor]:
        """Queue, prototypes and counters, for ``state_dict``."""
        return self.online.state_dict()

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from ``get_extra_state`` of a loss with the same settings."""
        self.online.load_state_dict(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}_extra_state"
        if name in state_dict:  # a ClipLoss's has none, nor had ours before
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def steps_to_prototypes(self, batch_size: int) -> int:
        """Optimiser steps before prototypes exist, from the start or after a resume, with
        ``batch_size`` pairs per rank."""
        return self.online.first_step(batch_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
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
        if index is not None:
            index = checks.as_int64(index)
            # A data loader leaves it on the host.
            device = getattr(index, "device", image_features.device)
            checks.tensor(
                "ProtoClipLoss",
                "index",
                index,
                dtypes=checks.INTEGERS,
                shapes=[(len(image_features),)],
                device=device,
            )
        contrastive = super().forward(
            image_features, text_features, logit_scale, logit_bias, ids=ids
        )
        losses: dict[str, Any] = {"contrastive_loss": contrastive}
        image = image_features if image_projection is None else image_projection
        text = text_features if text_projection is None else text_projection
        features = {
            "image": self._scaled_like_contrastive(image),
            "text": self._scaled_like_contrastive(text),
        }
        self.online.join(self.group)
        self.online.move_to(image.device)
        sets = self.online.sets
        labels = self.online.labels_of(features, index)
        if sets is not None and labels is not None and self.proto.weight > 0:
            from protoclip.losses.prototypes import prototype_term

            proto_logit_scale = self.proto.logit_scale or logit_scale
            # With an index the ranks may know different numbers of their samples.
            group = None if index is None else self.group
            term = prototype_term(features, labels, sets, proto_logit_scale, group=group)
            losses["proto_loss"] = self.proto.weight * term.loss
            self.online.note(term.accuracy())
        if self.training and torch.is_grad_enabled():
            self.online.observe(image.detach(), text.detach(), index)
        return losses if output_dict else torch.stack(list(losses.values())).sum()

    def _scaled_like_contrastive(self, x: Tensor) -> Tensor:
        """x with the part of its gradient that OpenCLIP's InfoNCE has with these flags."""
        if self.world_size == 1 or self.gather_with_grad:
            return x
        parts = 2 if self.local_loss else self.world_size
        return x.detach() + (x - x.detach()) / parts
