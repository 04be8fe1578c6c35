"""One training step: forward, losses, gradient, update; on several ranks, in several passes.

A step whose loss or gradient is not finite is skipped, and ``Step.finite`` tells the log. Read from
``Stepper.step`` down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protoclip.common.phases import Phases
from protoclip.common.seeds import seed_everything
from protoclip.data import Batch
from protoclip.distributed import is_distributed, rank
from protoclip.episodes.prototypes import Episode
from protoclip.losses.objective import Losses, OwnTerms, ProtoLoss, Term, TermInputs, caption_ids
from protoclip.model import Encoded, ProtoModel, autocast_for
from protoclip.settings.config import OptimConfig
from protoclip.training.buffers import Flat, copy_back, flat_copy, restore_unless
from protoclip.training.optimiser import build_optimiser, load_optimiser
from protoclip.training.replicas import Replicas
from protoclip.training.towers import Towers


@dataclass(frozen=True)
class Step:
    """The outcome of a step; tensors on the device, for which the host has not waited."""

    index: Tensor  # int64 [B], positions in the data set, of all batches
    positions: Tensor  # the same on the host
    lr: float
    losses: Losses
    projected: Encoded | None  # [B, Dh] of all batches
    norm: Tensor  # of the gradient before clipping
    finite: Tensor  # bool: whether the step was taken
    # Number of pairs in this rank's batch that share their caption; None without --dedup caption.
    same_caption: Tensor | None


class Stepper:
    """Takes gradient steps that depend on the global batch alone.

    With several batches per step, the towers encode each one separately, as ``grad_cache`` does;
    heads and losses see all of them at once (OpenCLIP's --accum-freq forms one loss per batch).

    Args:
        precision: "fp32", "amp_bf16", or "amp", which scales fp16's gradients.
        seed: the run's seed; dropout follows from it, the step and the rank.
        terms: losses of the user's own, by name.
        compiled: whether ``torch.compile`` makes towers and heads.
    """

    def __init__(
        self,
        model: ProtoModel,
        loss: ProtoLoss,
        config: OptimConfig,
        precision: str = "fp32",
        phases: Phases | None = None,
        seed: int = 0,
        terms: Mapping[str, Term] | None = None,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.loss = loss
        self.seed = seed
        self.device = next(model.parameters()).device
        self.phases = phases or Phases(self.device)
        self.autocast = autocast_for(precision, self.device)
        self.towers = Towers(model, compiled=compiled, tf32=self.device.type == "cuda")
        self.clip_norm = config.grad_clip_norm
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.terms = OwnTerms(terms).to(self.device)
        self.adamw = build_optimiser(model, config, self.terms.parameters())
        self.scaler = torch.amp.GradScaler(enabled=precision == "amp")
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.replicas = Replicas(model, self.terms, clip_trains=loss.config.w_clip > 0)

    def step(
        self,
        step_number: int,
        batches: Sequence[Batch],
        episode: Episode | None,
        *,
        project: bool,
        lr: float,
        image_lr: float | None = None,
    ) -> Step:
        """One update from this rank's batches.

        Args:
            step_number: from 0.
            batches: batches of equal size, on the host.
            project: whether the heads run.
            image_lr: the image tower's learning rate, if it differs.
        """
        self.adamw.zero_grad(set_to_none=True)  # before the forward pass needs the memory
        for group in self.adamw.param_groups:
            group["lr"] = image_lr if group["image"] and image_lr is not None else lr
        positions = torch.cat([batch.index for batch in batches])
        batches = [self._on_device(batch) for batch in batches]
        index = torch.cat([batch.index for batch in batches])
        ids = self._ids(batches, index)
        statistics = flat_copy(self._buffers())

        def forward() -> tuple[Losses, Encoded | None]:
            return self.replicas(
                lambda: self._forward(step_number, batches, index, ids, episode, project)
            )

        if self.replicas.follow(heads=self._trains_heads(episode)):
            self._order_buckets(forward, statistics)
        with self.phases.measure("forward"):
            losses, projected = forward()
            # The backward pass may encode batches again, which batch norm must not count twice.
            counted = flat_copy(self._buffers())
        with self.phases.measure("backward"):
            self.towers.backward(self.scaler.scale(losses.total))
            self.scaler.unscale_(self.adamw)
            norm = nn.utils.clip_grad_norm_(
                [*self.model.parameters(), *self.terms.parameters()],
                self.clip_norm if self.clip_norm > 0 else float("inf"),
            )
            finite = norm.isfinite()
            if not is_distributed():  # ranks share the gradient, not the loss
                finite = finite & losses.total.detach().isfinite()
            self._update(finite)
        # Evaluation and checkpoints then hold the same statistics on all ranks.
        restore_unless(finite, self._buffers(), statistics, counted)
        same_caption = None
        if ids is not None and self.loss.config.dedup == "caption":
            same_caption = repeated(ids)
        return Step(index, positions, lr, losses, projected, norm, finite, same_caption)

    def _on_device(self, batch: Batch) -> Batch:
        """Copy a batch, on a GPU while it still works on the step before."""
        if self._copies is None:
            return batch.to(self.device, non_blocking=True)
        with torch.cuda.stream(self._copies):
            copied = batch.pin_memory().to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        for tensor in copied.tensors:
            tensor.record_stream(computing)  # or the next copy could get its memory too early
        return copied

    def _forward(
        self,
        step_number: int,
        batches: Sequence[Batch],
        index: Tensor,
        ids: Tensor | None,
        episode: Episode | None,
        project: bool,
    ) -> tuple[Losses, Encoded | None]:
        """The losses, and projections without a graph."""
        model = self.model
        if len(batches) == 1:
            image, text = self._encode(step_number, 0, batches[0])
            encoded = Encoded(image, text)
        else:  # GradCache: backward encodes each batch again
            parts = [
                checkpoint(self._encode, step_number, part, batch, use_reentrant=False)
                for part, batch in enumerate(batches)
            ]
            encoded = Encoded(
                image=torch.cat([image for image, _ in parts]),
                text=torch.cat([text for _, text in parts]),
            )
        with self.autocast():
            projected = self.towers.project(encoded) if project else None
        losses = self.loss(
            encoded,
            projected,
            index,
            logit_scale=model.logit_scale,
            proto_logit_scale=model.proto_logit_scale,
            episode=episode,
            ids=ids,
            logit_bias=model.logit_bias,
        )
        if self.terms.weights:
            trained = projected if self._trains_heads(episode) else None
            inputs = TermInputs(
                image_features=F.normalize(encoded.image.float(), dim=-1),
                text_features=F.normalize(encoded.text.float(), dim=-1),
                image_projections=None if trained is None else trained.image,
                text_projections=None if trained is None else trained.text,
                index=index,
                ids=ids,
                step=step_number,
                logit_scale=model.logit_scale,
            )
            losses = self.terms(losses, inputs)
        if projected is not None:
            projected = Encoded(projected.image.detach(), projected.text.detach())
        return losses, projected

    def _encode(self, step_number: int, part: int, batch: Batch) -> tuple[Tensor, Tensor]:
        seed_everything(self.seed, step_number, rank(), part)
        with self.autocast():
            encoded = self.towers.encode(batch.image, batch.tokens)
        return encoded.image, encoded.text

    def _update(self, finite: Tensor) -> None:
        """Take the step if ``finite``; except on a CPU, the host does not wait to find out."""
        if self.device.type != "cpu":
            if not self.scaler.is_enabled():  # else the scaler sets it
                self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.scaler.step(self.adamw)
        elif finite:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.model.clamp_scales()

    def _ids(self, batches: Sequence[Batch], index: Tensor) -> Tensor | None:
        """What tells the pairs apart that are the same thing, int64 [B]; None: all differ."""
        if self.loss.config.dedup == "id":
            return index
        if self.loss.config.dedup == "caption":
            return torch.cat(
                [
                    caption_ids(batch.tokens) if batch.caption_ids is None else batch.caption_ids
                    for batch in batches
                ]
            )
        return None

    def _buffers(self) -> list[Tensor]:
        """What a forward pass may change, and a skipped step must not."""
        return [*self._statistics, *self.terms.buffers()]

    def _trains_heads(self, episode: Episode | None) -> bool:
        return episode is not None or self.loss.config.w_distill > 0

    def _order_buckets(self, forward: Callable[[], tuple[Losses, Any]], statistics: Flat) -> None:
        """An extra pass, which changes nothing else: DDP orders its buckets once, after the first
        backward pass, so a resumed run then sums in the same order as the original run."""
        losses, _ = forward()
        self.towers.backward(losses.total)
        self.adamw.zero_grad(set_to_none=True)
        copy_back(self._buffers(), statistics)

    def load_state(self, optimiser: Mapping[str, Any], scaler: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the optimiser's state belongs to other parameters.
        """
        load_optimiser(self.adamw, optimiser)
        if scaler:
            self.scaler.load_state_dict(dict(scaler))


def repeated(ids: Tensor) -> Tensor:
    """How many of the ids [B] occur more than once."""
    ordered = ids.sort().values
    same = F.pad(ordered[1:] == ordered[:-1], (1, 1))
    return (same[1:] | same[:-1]).sum()
