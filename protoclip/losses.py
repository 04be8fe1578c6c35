"""The objective: InfoNCE and the prototype terms of an episode, from a batch's embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.clustering import IGNORE
from protoclip.config import LossConfig
from protoclip.distributed import gathered_rows, is_distributed, mean_over_ranks, rank
from protoclip.episode import Episode, PrototypeSet
from protoclip.global_losses import global_info_nce
from protoclip.model import Encoded
from protoclip.ops import Bank, prototype_losses

Measure = Callable[[str], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Losses:
    """Scalars of one batch, on its device, fp32."""

    total: Tensor  # weighted sum; the one to differentiate
    terms: dict[str, Tensor]  # unweighted, by name, in nats; only those with a weight
    accuracy: dict[str, Tensor]  # share of samples whose nearest prototype is their own


class ProtoLoss(nn.Module):
    """w_clip * InfoNCE + w_proto * internal prototypes + w_proto_external * external ones, and
    w_distill * the teachers' similarities, the control that does without prototypes.

    A term of weight 0, or without prototypes (warm-up, no teacher), is not computed.

    Args:
        config: the weights.
        teachers: name -> [dataset, d] on the features' device; only distillation reads them.
    """

    def __init__(self, config: LossConfig, teachers: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.teachers = dict(teachers or {})

    def forward(
        self,
        encoded: Encoded,
        projected: Encoded | None,
        index: Tensor,
        logit_scale: Tensor,
        proto_scale: Tensor,
        episode: Episode | None,
        measure: Measure = contextlib.nullcontext,
    ) -> Losses:
        """The losses of a batch of B pairs; with several ranks, of each one's share.

        The mean over ranks of ``total`` and of its gradients are those of the whole batch.

        Args:
            encoded: [B, D] each, not normalised; float32, bfloat16 or float16.
            projected: [B, Dh] each, unit rows, float32; None where no prototype term is due.
            index: int64 [B], positions in the dataset, to look up the cluster labels.
            logit_scale, proto_scale: scalars, the multipliers (not their logarithms).
            episode: prototypes; None: InfoNCE only.
            measure: times the block of a phase, here "prototypes".
        """
        terms: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        accuracy: dict[str, Tensor] = {}
        if self.config.w_clip > 0:
            weights["contrastive_loss"] = self.config.w_clip
            terms["contrastive_loss"] = global_info_nce(
                _normalise(encoded.image), _normalise(encoded.text), logit_scale
            )
        if episode is not None and projected is not None:
            with measure("prototypes"):
                for name, weight, sets in (
                    ("proto", self.config.w_proto, episode.internal),
                    ("external", self.config.w_proto_external, episode.external),
                ):
                    if weight > 0 and sets:
                        weights[f"{name}_loss"] = weight
                        terms[f"{name}_loss"], accuracy[f"{name}_accuracy"] = prototype_term(
                            projected, index, sets, proto_scale
                        )
        if self.config.w_distill > 0 and projected is not None and self.teachers:
            weights["distill_loss"] = self.config.w_distill
            terms["distill_loss"] = torch.stack(
                [
                    similarity_distillation(
                        projected, rows[index], proto_scale, self.config.distill_temperature
                    )
                    for rows in self.teachers.values()
                ]
            ).mean()
        total = sum(weights[name] * term for name, term in terms.items())
        if not isinstance(total, Tensor):
            raise ValueError(
                "ProtoLoss: expected a term with a weight, got none; with --w-clip 0 there must be "
                "prototypes from the first step: --infonce-warmup-epoch 0"
            )
        return Losses(total, terms, accuracy)


def prototype_term(
    projected: Encoded, index: Tensor, sets: Sequence[PrototypeSet], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss over the sets, and the mean prototype accuracy: two scalars.

    The sets of a student share one call of the op, and so one pass over its features.
    """
    losses, hits = [], []
    for student, features in (("image", projected.image), ("text", projected.text)):
        banks = [item.bank(index, projected) for item in sets if item.student == student]
        if banks:
            reduction = "none" if is_distributed() else "mean"
            result = prototype_losses(features, banks, scale, reduction=reduction)
            losses += list(_over_ranks(result.loss, banks) if is_distributed() else result.loss)
            hits += [
                (nearest == bank.labels).float().mean()
                for nearest, bank in zip(result.nearest, banks, strict=True)
            ]
    return sum(losses[1:], losses[0]) / len(losses), sum(hits[1:], hits[0]) / len(hits)


def _over_ranks(losses: Tensor, banks: Sequence[Bank]) -> Tensor:
    """[S, B] -> [S], whose means over the ranks are the means over all samples with a label."""
    counts = torch.stack([(bank.labels != IGNORE).sum() for bank in banks]).to(losses.dtype)
    mean_over_ranks(counts)
    return losses.sum(dim=1) / counts.where(counts > 0, 1.0)


def similarity_distillation(
    projected: Encoded, teacher: Tensor, scale: Tensor, temperature: float
) -> Tensor:
    """KL of each student's similarities within the global batch from the teacher's; in nats.

    Row i compares sample i with the G - 1 others: teacher softmax_j(t_i . t_j / temperature),
    student softmax_j(scale h_i . h_j); the mean over this rank's rows and over the two students, a
    scalar. Memory O(B G), unlike the other losses': it is a control.

    Args:
        projected: [B, Dh] each, unit rows, G = W B >= 3.
        teacher: [B, d], any length.
        scale: the multiplier of the prototype terms.
        temperature: of the teacher, > 0.
    """
    t = F.normalize(teacher.float(), dim=1)
    target = F.log_softmax(_to_others(t) / temperature, dim=1)
    losses = [
        F.kl_div(
            F.log_softmax(scale * _to_others(h), dim=1),
            target.to(h),
            reduction="batchmean",
            log_target=True,
        )
        for h in (projected.image, projected.text)
    ]
    return (losses[0] + losses[1]) / 2


def _to_others(rows: Tensor) -> Tensor:
    """This rank's [B, d] -> their products with the rows of all ranks but themselves, [B, G - 1],
    the next one first."""
    products = rows @ gathered_rows(rows).T
    b, g = products.shape
    others = rank() * b + 1 + torch.arange(b, device=rows.device)[:, None]
    return products.gather(1, (others + torch.arange(g - 1, device=rows.device)) % g)


def _normalise(features: Tensor) -> Tensor:
    """Unit rows in the features' dtype, the norm taken in fp32."""
    return F.normalize(features.float(), dim=-1).to(features.dtype)
