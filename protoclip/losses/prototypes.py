"""The prototype loss of a batch, over all its sets of prototypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.distributed import Group, mean_over_ranks
from protoclip.episodes.prototypes import PrototypeSet
from protoclip.ops import Bank, prototype_losses
from protoclip.ops.checks import LEFT_OUT


@dataclass(frozen=True)
class PrototypeTerm:
    """The prototype loss of a batch, and how often the nearest prototype is the sample's own."""

    loss: Tensor  # [], mean over the sets
    hits: dict[str, Tensor]  # source -> [2]: samples whose nearest prototype is theirs, samples

    def accuracy(self) -> dict[str, Tensor]:
        """Share of the labelled samples whose nearest prototype is their own, by source."""
        return {source: hit_rate(counts) for source, counts in self.hits.items()}


def hit_rate(counts: Tensor) -> Tensor:
    """hits / samples of [2]; NaN without samples."""
    return counts[0] / counts[1]


def prototype_term(
    features: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    sets: Sequence[PrototypeSet],
    proto_logit_scale: Tensor | float,
    *,
    group: Group = None,
) -> PrototypeTerm:
    """The mean loss over the sets.

    The sets of a student share one call of the op, so there is one pass over its features.

    Args:
        features: modality -> [B, Dh], unit rows.
        labels: source -> int64 [B]; LEFT_OUT leaves a sample out.
        sets: at least one.
        proto_logit_scale: the multiplier.
        group: scale so that the mean over its ranks is the mean over all samples with a label.
    """
    losses: list[Tensor] = []
    hits: dict[str, Tensor] = {}
    for student, rows in features.items():
        of_student = [item for item in sets if item.student == student]
        banks = [item.bank(labels[item.source], rows.dtype) for item in of_student]
        if not banks:
            continue
        reduction = "mean" if group is None else "none"
        result = prototype_losses(rows, banks, proto_logit_scale, reduction=reduction)
        losses += list(result.loss if group is None else _over_ranks(result.loss, banks, group))
        for item, bank, nearest in zip(of_student, banks, result.nearest, strict=True):
            counts = torch.stack([(nearest == bank.labels).sum(), (bank.labels != LEFT_OUT).sum()])
            hits[item.source] = hits.get(item.source, 0) + counts.float()
    return PrototypeTerm(torch.stack(losses).mean(), hits)


def _over_ranks(losses: Tensor, banks: Sequence[Bank], group: Group) -> Tensor:
    """[S, B] -> [S], scaled so that the mean over ranks is the mean over all labelled samples."""
    counts = torch.stack([(bank.labels != LEFT_OUT).sum() for bank in banks])
    counts = mean_over_ranks(counts.to(losses.dtype), group)
    return losses.sum(dim=1) / counts.where(counts > 0, 1.0)
