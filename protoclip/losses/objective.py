"""What ``protoclip.train`` minimises: a weighted sum of losses over the pairs of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoclip.common.seeds import mix
from protoclip.distributed import all_ranks, gathered_rows, rank
from protoclip.episodes.prototypes import EXTERNAL, Episode
from protoclip.losses.prototypes import hit_rate, prototype_term
from protoclip.ops import info_nce, sigmoid_loss
from protoclip.settings.config import LossConfig

if TYPE_CHECKING:  # both load open_clip, which a loss alone does not need
    from protoclip.data import Batch
    from protoclip.model import Encoded

Measure = Callable[[str], contextlib.AbstractContextManager]


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
        internal = [hit_rate(counts) for source, counts in self.hits.items() if source != EXTERNAL]
        accuracy = {"proto_accuracy": torch.stack(internal).mean()} if internal else {}
        if EXTERNAL in self.hits:
            accuracy["external_accuracy"] = hit_rate(self.hits[EXTERNAL])
        return accuracy


@dataclass(frozen=True)
class TermInputs:
    """What a loss of your own may read in a step: this rank's pairs of all passes, fp32."""

    image_features: Tensor  # [B, D], unit rows, with graph; likewise the three below
    text_features: Tensor  # [B, D]
    image_projections: Tensor | None  # [B, Dh]; None before there are prototypes
    text_projections: Tensor | None
    index: Tensor  # int64 [B], positions in the data set
    ids: Tensor | None  # int64 [B], equal where --dedup sees the same pair; None: off
    step: int  # from 0
    logit_scale: Tensor  # scalar, InfoNCE's multiplier, with graph


@dataclass(frozen=True)
class Term:
    """A loss of your own, minimised together with the others."""

    module: nn.Module  # TermInputs -> scalar; the loss is its mean over ranks
    weight: float = 1.0


class OwnTerms(nn.Module):
    """Losses that a user adds, by name."""

    def __init__(self, terms: Mapping[str, Term] | None = None) -> None:
        super().__init__()
        terms = terms or {}
        self.weights = {name: term.weight for name, term in terms.items()}
        self.losses = nn.ModuleList(term.module for term in terms.values())
        self._buffers_before = {name: buffers_of(term.module) for name, term in terms.items()}

    def forward(
        self,
        losses: Losses,
        encoded: Encoded,
        projected: Encoded | None,
        index: Tensor,
        ids: Tensor | None,
        step: int,
        logit_scale: Tensor,
    ) -> Losses:
        """The losses with each term, unweighted, and their weighted sum added to the total.

        Args: as ``TermInputs``; ``encoded`` [B, D], not normalised; ``projected``: where heads
            train.
        """
        if not self.weights:
            return losses
        inputs = TermInputs(
            image_features=F.normalize(encoded.image.float(), dim=-1),
            text_features=F.normalize(encoded.text.float(), dim=-1),
            image_projections=None if projected is None else projected.image,
            text_projections=None if projected is None else projected.text,
            index=index,
            ids=ids,
            step=step,
            logit_scale=logit_scale,
        )
        total = losses.total
        terms = dict(losses.terms)
        for (name, weight), module in zip(self.weights.items(), self.losses, strict=True):
            value = module(inputs)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(f"term {name!r}: expected a scalar tensor, got {got}; take a mean")
            self._check_buffers(name, module)
            terms[name] = value.reshape(())
            total = total + weight * terms[name]
        return replace(losses, total=total, terms=terms)

    def _check_buffers(self, name: str, module: nn.Module) -> None:
        """ValueError if a call has changed what buffers a module has, or how they are shaped."""
        before = self._buffers_before[name]
        after = buffers_of(module)
        for buffer in sorted(before.keys() | after.keys()):
            expected = before.get(buffer, "absent")
            got = after.get(buffer, "absent")
            if got != expected:
                raise ValueError(
                    f"term {name!r}: expected its buffer {buffer!r} to stay as it was made "
                    f"({expected}), got {got} after a step; register it in __init__ with its final "
                    "shape, and fill it in place, as in self.queue[start:end] = rows"
                )

    def state(self) -> dict[str, dict[str, Any]]:
        """For a checkpoint: weight and state of each term, by name."""
        pairs = zip(self.weights.items(), self.losses, strict=True)
        return {
            name: {"weight": weight, "state": module.state_dict()}
            for (name, weight), module in pairs
        }

    def load_state(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Load what ``state`` gave; ValueError if a term's module has changed."""
        for name, module in zip(self.weights, self.losses, strict=True):
            try:
                module.load_state_dict(saved[name]["state"])
            except (RuntimeError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"--resume: term {name!r} has another module ({reason})"
                ) from error


def buffers_of(module: nn.Module) -> dict[str, str]:
    """Shape and dtype of a module's buffers, in words, by name."""
    return {
        name: f"{tuple(buffer.shape)}, {buffer.dtype}" for name, buffer in module.named_buffers()
    }


class ProtoLoss(nn.Module):
    """The training objective: w_clip * InfoNCE (or SigLIP's loss) + w_proto * internal prototypes
    + w_proto_external * external ones + w_distill * the teacher's similarities (a control).

    A term is not computed if its weight is 0 or its prototypes are missing (warm-up, no teacher).

    Args:
        config: the weights, none below 0.
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
        self.config = config
        self.teacher = teacher
        self.measure = measure

    def forward(
        self,
        encoded: Encoded,
        projected: Encoded | None,
        index: Tensor,
        logit_scale: Tensor,
        proto_logit_scale: Tensor,
        episode: Episode | None,
        ids: Tensor | None = None,
        logit_bias: Tensor | None = None,
        weights: LossConfig | None = None,
    ) -> Losses:
        """The losses of a batch of B pairs; with several ranks, of this rank's share.

        The means over ranks of ``total`` and of its gradients are those of the whole batch.

        Args:
            encoded: [B, D] each, not normalised; float32, bfloat16 or float16.
            projected: [B, Dh] each, unit rows, float32; None if there is no prototype term.
            index: int64 [B], positions in the dataset, to look up the cluster labels.
            logit_scale, proto_logit_scale: scalars, the multipliers (not their logarithms).
            episode: prototypes; None: InfoNCE only.
            ids: int64 [B]; pairs with equal ids are not negatives of each other (with SigLIP's
                loss they are positives); None: all differ.
            logit_bias: scalar, for SigLIP's loss instead of InfoNCE; None: InfoNCE.
            weights: of this step; None: the config's.
        """
        config = weights or self.config
        group = all_ranks()
        terms: dict[str, Tensor] = {}
        hits: dict[str, Tensor] = {}
        weight_of = {
            "contrastive_loss": config.w_clip,
            "proto_loss": config.w_proto,
            "external_loss": config.w_proto_external,
            "distill_loss": config.w_distill,
        }
        if config.w_clip > 0:
            images, texts = _normalise(encoded.image), _normalise(encoded.text)
            if logit_bias is None:
                loss = info_nce(images, texts, logit_scale, ids=ids, group=group)
            else:
                loss = sigmoid_loss(images, texts, logit_scale, logit_bias, ids=ids, group=group)
            terms["contrastive_loss"] = loss
        if episode is not None and projected is not None:
            features = {"image": projected.image, "text": projected.text}
            labels = episode.labels_of(index)
            with self.measure("prototypes"):
                sets_of_term = {
                    "proto_loss": [s for s in episode.sets if s.source != EXTERNAL],
                    "external_loss": [s for s in episode.sets if s.source == EXTERNAL],
                }
                for name, sets in sets_of_term.items():
                    if weight_of[name] > 0 and sets:
                        term = prototype_term(
                            features, labels, sets, proto_logit_scale, group=group
                        )
                        terms[name] = term.loss
                        hits |= term.hits
        if config.w_distill > 0 and projected is not None and self.teacher is not None:
            terms["distill_loss"] = similarity_distillation(
                projected, self.teacher[index], proto_logit_scale, config.distill_temperature
            )
        total: Any = sum(weight_of[name] * term for name, term in terms.items())
        return Losses(total, terms, hits)

    def trains_heads(self, episode: Episode | None) -> bool:
        """Whether the projection heads get a gradient."""
        return episode is not None or self.config.w_distill > 0


def pair_ids(dedup: str, batches: Sequence[Batch], index: Tensor) -> Tensor | None:
    """What tells the pairs apart that are the same thing, int64 [B]; None: all differ.

    Args:
        dedup: "off", "id" or "caption".
        batches: of the step.
        index: int64 [B], positions in the data set.
    """
    if dedup == "id":
        return index
    if dedup == "caption":
        return torch.cat(
            [
                caption_ids(batch.tokens) if batch.caption_ids is None else batch.caption_ids
                for batch in batches
            ]
        )
    return None


def repeated(ids: Tensor) -> Tensor:
    """How many of the ids [B] occur more than once."""
    ordered = ids.sort().values
    same = F.pad(ordered[1:] == ordered[:-1], (1, 1))
    return (same[1:] | same[:-1]).sum()


def caption_ids(tokens: Tensor) -> Tensor:
    """int64 [B], equal for equal caption tokens [B, L], or for rows of features [B, L] with the
    same bits; others collide once in 2^47 pairs."""
    if tokens.is_floating_point():
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        tokens = tokens.contiguous().view(integers[tokens.element_size()])
    factors = torch.from_numpy(mix(0, np.arange(tokens.shape[1])).view(np.int64))
    return (tokens.long() * factors.to(tokens.device, non_blocking=True)).sum(dim=1)


def similarity_distillation(
    projected: Encoded, teacher: Tensor, proto_logit_scale: Tensor, temperature: float
) -> Tensor:
    """KL divergence of each student's similarities within the global batch from the teacher's.

    Row i compares sample i with the G - 1 others: teacher softmax_j(t_i . t_j / temperature),
    student softmax_j(proto_logit_scale h_i . h_j). The result is the mean over this rank's rows and
    the two students, in nats. ``projected``: [B, Dh] each, unit rows, G = W B >= 3; ``teacher``:
    [B, d], any row length. Memory is O(B G), unlike the other losses: it is a control.
    """
    t = F.normalize(teacher.float(), dim=1)
    target = F.log_softmax(_to_others(t) / temperature, dim=1)
    losses = []
    for h in (projected.image, projected.text):
        student = F.log_softmax(proto_logit_scale * _to_others(h), dim=1)
        losses.append(F.kl_div(student, target.to(h), reduction="batchmean", log_target=True))
    return (losses[0] + losses[1]) / 2


def _to_others(rows: Tensor) -> Tensor:
    """This rank's [B, d] -> products of each row with all other rows of all ranks, [B, G - 1],
    starting with the next row."""
    products = rows @ gathered_rows(rows).T
    b, g = products.shape
    next_row = rank() * b + 1 + torch.arange(b, device=rows.device)[:, None]
    return products.gather(1, (next_row + torch.arange(g - 1, device=rows.device)) % g)


def _normalise(features: Tensor) -> Tensor:
    """Unit rows in the features' dtype; the norm is computed in fp32."""
    return F.normalize(features.float(), dim=-1).to(features.dtype)
