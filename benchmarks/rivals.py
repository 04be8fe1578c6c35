"""Ideas of others as short experiments: each takes the place of the trainer's own loss.

Those with clusters keep K, heads, temperature, teacher and weights of the default; a pair is judged
against the same centroids as there. What wins in the study enters the product.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.losses import Losses, ProtoLoss
from protoclip.prototypes import INTERNAL
from protoclip.train import Trainer

POSITIVES = 8  # clusters of a pair


def add(losses: Losses, name: str, term: Tensor, weight: float = 1.0) -> Losses:
    """The losses with one more term."""
    return Losses(losses.total + weight * term, losses.terms | {name: term}, losses.accuracy)


class TokenClassification(ProtoLoss):
    """CLIP, and the image names its caption's tokens through a linear layer.

    Cross-entropy with the tokens' shares by inverse document frequency (SuperCLIP, arXiv
    2512.14480). It is linear in the target, so the mean target over a pair's captions, each as
    often as it is drawn (--captions canonical), stands for the one drawn.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.config.loss)
        dataset, tokenize = trainer.dataset, trainer.model.tokenizer
        tokens = [tokenize(list(dataset.captions(i))) for i in range(len(dataset))]
        used = torch.cat([own.flatten() for own in tokens]).unique()
        used = used[(used > 0) & (used < tokenize.sot_token_id)]  # no padding, no marks
        size = tokenize.vocab_size
        rows = [  # [captions, V] each
            torch.zeros(len(x), size, dtype=torch.bool).scatter_(1, x, True)[:, used]
            for x in tokens
        ]
        known = torch.stack([own.any(0) for own in rows])  # [N, V]
        weight = torch.log(len(rows) / (1.0 + known.sum(0))).clamp_min(0)
        targets = [F.normalize(own * weight, p=1, dim=1) for own in rows]
        self.targets = torch.stack([(own[0] + own.mean(0)) / 2 for own in targets])
        self.head = nn.Linear(trainer.model.clip.visual.output_dim, len(used))
        group = {"params": list(self.head.parameters()), "weight_decay": 0.0, "image": False}
        trainer.stepper.adamw.add_param_group(group)

    def forward(self, encoded: Any, projected: Any, index: Tensor, *rest: Any) -> Losses:
        losses = super().forward(encoded, projected, index, *rest)
        logs = self.head(encoded.image).log_softmax(1)
        return add(losses, "token_loss", -(self.targets[index] * logs).sum(1).mean())


class MultiplePositives(ProtoLoss):
    """ProtoCLIP whose pairs belong to several clusters: the nearest ``POSITIVES`` centroids.

    log(1 + sum over the others exp(s)) + log(1 + sum over its own exp(-s)), s the scaled cosine
    (MLCD, arXiv 2407.17331, without margin and sampling of negatives).
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.config.loss, trainer.setup.teacher)

    def forward(
        self, encoded: Any, projected: Any, index: Tensor, scale: Any, proto_scale: Any,
        episode: Any, *rest: Any,
    ) -> Losses:  # fmt: skip
        losses = super().forward(encoded, projected, index, scale, proto_scale, None, *rest)
        if episode is None:
            return losses
        for name, weight, internal in (
            ("proto_loss", self.config.w_proto, True),
            ("external_loss", self.config.w_proto_external, False),
        ):
            sets, parts = [one for one in episode.sets if (one.source in INTERNAL) == internal], []
            for one in sets:
                rows = getattr(projected, one.source).detach() if internal else self.teacher[index]
                distance = torch.cdist(rows, one.clustering.centroids)
                own = distance.topk(min(POSITIVES, distance.shape[1] - 1), largest=False).indices
                s = proto_scale * getattr(projected, one.student) @ one.prototypes.T
                mine = torch.zeros_like(s, dtype=torch.bool).scatter(1, own, True)
                parts += [F.softplus(s.masked_fill(mine, -torch.inf).logsumexp(1)).mean()]
                parts += [F.softplus((-s).masked_fill(~mine, -torch.inf).logsumexp(1)).mean()]
            if parts and weight > 0:
                losses = add(losses, name, sum(parts) / len(sets), weight)
        return losses


class OnlineEM(ProtoLoss):
    """ProtoCLIP whose internal clusters are a Gaussian mixture that moves at every step.

    Online EM, apart from the encoders' loss (arXiv 2510.20108): each batch moves the mixture's
    sums by its share of the data, and the source's responsibilities are the student's soft targets.
    It starts from the first episode's k-means; its variance is --target-temperature.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer.config.loss, trainer.setup.teacher)
        self.share = trainer.plan.batch_size / len(trainer.dataset)
        self.variance = trainer.config.episode.target_temperature
        self.sums: dict[str, list[Tensor]] = {}  # source -> mass [K], its rows', the student's

    def forward(
        self, encoded: Any, projected: Any, index: Tensor, scale: Any, proto_scale: Any,
        episode: Any, *rest: Any,
    ) -> Losses:  # fmt: skip
        sets = episode.sets if episode else ()
        others = tuple(one for one in sets if one.source not in INTERNAL)
        outer = episode and dataclasses.replace(episode, sets=others)
        losses = super().forward(encoded, projected, index, scale, proto_scale, outer, *rest)
        for one in (one for one in sets if one.source in INTERNAL):
            source, student = getattr(projected, one.source).detach(), one.student
            rows, start = getattr(projected, student), one.clustering
            if one.source not in self.sums:
                mass = start.counts / start.counts.sum()
                first = [mass, mass[:, None] * start.centroids, mass[:, None] * one.prototypes]
                self.sums[one.source] = first
            mass, own, other = self.sums[one.source]
            distance = torch.cdist(source, own / mass[:, None]).square() / (2 * self.variance)
            belongs = (mass.log() - distance).softmax(1)  # [B, K]
            logits = proto_scale * rows @ (other / mass[:, None]).T
            term = -(belongs * logits.log_softmax(1)).sum(1).mean()
            losses = add(losses, f"{one.source}_em_loss", term, self.config.w_proto / 2)
            fresh = [belongs.mean(0), belongs.T @ source, belongs.T @ rows.detach()]
            fresh[1:] = [x / len(rows) for x in fresh[1:]]
            for old, new in zip(self.sums[one.source], fresh, strict=True):
                old.lerp_(new, self.share)
        return losses


RIVALS = {
    "token classification": TokenClassification,
    "several positives": MultiplePositives,
    "online EM": OnlineEM,
}
