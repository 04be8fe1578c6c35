"""ProtoCLIP for loops that know no sample index: InfoNCE and prototypes made while training.

A queue holds the newest features of both modalities. Every so often k-means clusters each modality,
back translation (PBT) turns its clusters into prototypes of the other one, and each batch then gets
its labels from the nearest cluster. Nothing here is learnt, nothing needs saving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoclip.config import check, option
from protoclip.online_prototypes import OnlinePrototypes, PrototypeSet
from protoclip.openclip_losses import ClipLoss
from protoclip.ops import Bank, kmeans_assign, prototype_losses


@dataclass(frozen=True)
class ProtoConfig:
    """Online prototypes (any of these switches them on)"""

    weight: float = option(1.0, "of the prototype loss beside InfoNCE", flag="proto-weight", low=0)
    queue: int = option(
        16384, "newest pairs that are clustered, over all ranks", flag="proto-queue", low=2
    )
    k: int = option(0, "prototypes a modality; 0: a tenth of the queue", flag="proto-k", low=0)
    every: int = option(
        0, "steps between clusterings; 0: when the queue is renewed", flag="proto-every", low=0
    )
    warmup: int = option(
        0,
        "steps of InfoNCE alone before the first clustering, which also waits for a full queue",
        flag="proto-warmup",
        low=0,
    )
    target_temperature: float = option(
        0.01, "of the soft targets; 0: hard labels", flag="proto-target-temperature", low=0
    )
    logit_scale: float = option(
        0.0,
        "multiplier of the prototype logits; 0: the model's own logit scale",
        flag="proto-logit-scale",
        low=0,
    )
    kmeans_max_iter: int = option(20, "iterations of k-means", flag="proto-kmeans-max-iter", low=1)
    pbt: bool = option(
        True, "back translation; off: raw centroids of the other modality", flag="proto-PBT"
    )
    seed: int = option(0, "of k-means' first centroids", flag="proto-seed", low=0, high=2**31)

    def __post_init__(self) -> None:
        check(self)
        if self.k > self.queue:
            raise ValueError(
                f"--proto-k: expected at most --proto-queue = {self.queue}, got {self.k}; "
                f"use --proto-k {max(1, self.queue // 10)} or a longer queue"
            )

    @property
    def clusters(self) -> int:
        return self.k or max(1, self.queue // 10)


class ProtoClipLoss(ClipLoss):
    """``ClipLoss`` and the prototype loss, for OpenCLIP's loop or your own.

    Until the first clustering (see ``steps_to_prototypes``) it is ``ClipLoss``. State advances once
    per optimiser step, in training mode with gradients on, and lives on the features' device. On
    several ranks each holds its own slice of the queue; k-means sums over ranks, so all ranks have
    the same prototypes. Without ``gather_with_grad`` OpenCLIP scales InfoNCE's feature gradient by
    1 / world_size; the prototype loss follows it: their balance does not depend on the flags.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: ``ClipLoss``'s.
        proto: settings of the prototypes.
        accum_freq: calls per optimiser step, each with all features of the step, as OpenCLIP's
            ``--accum-freq`` makes them.
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
        proto: ProtoConfig | None = None,
        accum_freq: int = 1,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.proto = proto or ProtoConfig()
        self.online = OnlinePrototypes(
            queue=-(-self.proto.queue // world_size),
            clusters=self.proto.clusters,
            every=self.proto.every,
            warmup=self.proto.warmup,
            temperature=self.proto.target_temperature,
            num_iters=self.proto.kmeans_max_iter,
            pbt=self.proto.pbt,
            seed=self.proto.seed,
            distributed=world_size > 1,
            calls_per_step=accum_freq,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last step: prototype accuracy, sizes of the clusters, steps. Reads the device."""
        return self.online.metrics()

    def steps_to_prototypes(self, batch_size: int) -> int:
        """Optimiser steps of ``batch_size`` pairs a rank before prototypes exist, from the start or
        after a resume."""
        return self.online.first_step(batch_size)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        image_projection: Tensor | None = None,
        text_projection: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """InfoNCE plus the weighted prototype loss.

        Args:
            image_features, text_features, logit_scale, logit_bias: as in ``ClipLoss``.
            output_dict: return the terms, ``contrastive_loss`` and (once there are prototypes)
                ``proto_loss``, weighted: their sum is the loss.
            image_projection, text_projection: [N, Dh], unit rows: prototypes live there, behind
                heads that are part of the model and of its output. None: in the features.
        Returns:
            float32 [], nats.
        """
        losses: dict[str, Any] = {}
        losses["contrastive_loss"] = super().forward(
            image_features, text_features, logit_scale, logit_bias
        )
        image = image_features if image_projection is None else image_projection
        text = text_features if text_projection is None else text_projection
        sets = self.online.current
        if sets is not None and self.proto.weight > 0:
            losses["proto_loss"] = self.proto.weight * self._prototype_loss(
                {"image": image, "text": text}, sets, logit_scale
            )
        if self.training and torch.is_grad_enabled():
            self.online.observe(image.detach(), text.detach())
        return losses if output_dict else torch.stack(list(losses.values())).sum()

    def _prototype_loss(
        self, features: dict[str, Tensor], sets: tuple[PrototypeSet, ...], scale: Tensor
    ) -> Tensor:
        """Mean over the two directions, each against the clusters of the other modality."""
        if self.proto.logit_scale > 0:
            scale = torch.full((), self.proto.logit_scale, device=features["image"].device)
        total, hits = [], []
        for one in sets:
            x = features[one.student]
            labels, _ = kmeans_assign(features[one.source].detach().float(), one.centroids)
            targets = None if one.targets is None else one.targets.to(x.dtype)
            bank = Bank(one.prototypes.to(x.dtype), labels, targets)
            result = prototype_losses(self._balanced(x), [bank], scale)
            total.append(result.loss[0])
            hits.append((result.nearest[0] == labels).float().mean())
        self.online.note(hits)
        return sum(total[1:], total[0]) / len(total)

    def _balanced(self, x: Tensor) -> Tensor:
        """x with 1 / world_size of its gradient where OpenCLIP's InfoNCE has it so."""
        if self.world_size == 1 or self.gather_with_grad:
            return x
        return x.detach() + (x - x.detach()) / self.world_size
