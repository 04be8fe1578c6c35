"""One training step: forward, losses, gradient, update; on several ranks, in several passes.

A step whose loss or gradient is not finite is skipped and counted.
"""

from __future__ import annotations

import contextlib
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from protoclip.config import OptimConfig
from protoclip.data import Batch
from protoclip.data.types import mix
from protoclip.distributed import GlobalBatchNorm1d, broadcast, is_distributed, rank
from protoclip.losses import Losses, ProtoLoss, caption_ids
from protoclip.model import Encoded, ProtoModel, autocast_for
from protoclip.prototypes import Episode


class Phases:
    """Seconds spent in each named phase.

    On a GPU, work is timed by events on the stream, so measuring never waits for the device.
    Phases that run on the host alone (reading data) use the clock. The time of an inner phase does
    not count for the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}  # the most bytes in use at the end of a phase
        self._pending: list[tuple[str, float, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[str] = []

    @contextlib.contextmanager
    def measure(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Add the time of the block to phase ``name``."""
        signs = [(name, 1.0), *((outer, -1.0) for outer in self._open[-1:])]
        self._open.append(name)
        try:
            if self._device.type == "cuda" and not on_host:
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                yield
                end.record()
                self._pending += [(phase, sign, start, end) for phase, sign in signs]
            else:
                began = time.perf_counter()
                yield
                elapsed = time.perf_counter() - began
                for phase, sign in signs:
                    self.add({phase: sign * elapsed})
        finally:
            self._open.pop()
        self.memory[name] = max(memory_in_use(self._device), self.memory.get(name, 0))

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add time by phase, such as the time that a run spent before an interruption."""
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self) -> dict[str, float]:
        """Totals so far, in the order in which the phases first ended; waits for the device."""
        if self._pending:
            torch.cuda.synchronize(self._device)
            for name, sign, start, end in self._pending:
                self.add({name: sign * start.elapsed_time(end) / 1000})
            self._pending.clear()
        return dict(self._seconds)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: on the card for a GPU, else of the process; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def seed_everything(*stream: int) -> None:
    """Seed the global generators of torch (every device), NumPy and Python for one purpose."""
    seed = int(mix(*stream)) >> 1 if len(stream) > 1 else stream[0]
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def depends_on_passes(model: nn.Module) -> bool:
    """Whether dropout or batch norm makes a step depend on how its batch is split."""
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        chances = [getattr(module, name, 0) for name in ("p", "prob", "drop_prob", "dropout")]
        dropout = any(isinstance(chance, float) and chance > 0 for chance in chances)
        if dropout or (norm and not isinstance(module, GlobalBatchNorm1d)):
            return True
    return False


def parameter_groups(model: ProtoModel, weight_decay: float) -> list[dict]:
    """Weights decay; vectors, scalars and the projection heads do not (docs/algorithm.md §4).

    The image tower has its own groups because it has its own schedule.
    """
    heads = [head for head in (model.image_head, model.text_head) if head is not None]
    in_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    in_image = {id(parameter) for parameter in model.clip.visual.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in in_heads
            groups.setdefault((id(p) in in_image, decays), []).append(p)
    return [
        {"params": own, "weight_decay": weight_decay if decays else 0.0, "image": image}
        for (image, decays), own in groups.items()
    ]


class Replica(nn.Module):
    """What DistributedDataParallel wraps: a model, whose forward calls any function given to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function and return its result."""
        return function(*args)


@dataclass(frozen=True)
class Step:
    """The outcome of a step; tensors on the device, for which the host has not waited."""

    losses: Losses
    projected: Encoded | None  # [B, Dh] of all batches
    norm: Tensor  # of the gradient before clipping
    finite: Tensor  # bool: whether the step was taken
    same_caption: Tensor  # number of pairs in this rank's batch that share their caption


class Stepper:
    """Takes gradient steps that depend on the global batch alone.

    With several batches per step, the towers encode each one separately, as ``grad_cache`` does;
    heads and losses see all of them at once (OpenCLIP's --accum-freq forms one loss per batch).

    Args:
        precision: "fp32", "amp_bf16", or "amp", which scales fp16's gradients.
        seed: the run's seed; dropout follows from it, the step and the rank.
    Attributes:
        bad: skipped steps, in total and in a row until now: int64 [2], on the device.
    """

    def __init__(
        self,
        model: ProtoModel,
        loss: ProtoLoss,
        config: OptimConfig,
        precision: str = "fp32",
        phases: Phases | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.loss, self.seed = model, loss, seed
        self.device = next(model.parameters()).device
        self.phases = phases or Phases(self.device)
        self.autocast = autocast_for(precision, self.device)
        self.clip_norm = config.grad_clip_norm
        betas = config.beta1, config.beta2
        # Fused: one pass over the weights; on a GPU only the fused form can skip a step itself.
        self.adamw = torch.optim.AdamW(
            parameter_groups(model, config.wd), config.lr, betas, config.eps, fused=True
        )
        self.scaler = torch.amp.GradScaler(enabled=precision == "amp")
        self.bad = torch.zeros(2, dtype=torch.int64, device=self.device)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        of_rank = [norm for norm in norms if not isinstance(norm, GlobalBatchNorm1d)]
        self._of_rank = [buffer for norm in of_rank for buffer in norm.buffers()]
        self.replica: nn.Module = Replica(model)
        self._phase: tuple[bool, bool] | None = None

    def step(
        self,
        number: int,
        batches: Sequence[Batch],
        episode: Episode | None,
        *,
        project: bool,
        lr: float,
        image_lr: float | None = None,
    ) -> Step:
        """One update from this rank's batches.

        Args:
            number: the step's number, from 0.
            batches: batches of equal size, on the host.
            project: whether the heads run.
            image_lr: the image tower's learning rate, if it differs.
        """
        self.adamw.zero_grad(set_to_none=True)  # before the forward pass needs the memory
        for group in self.adamw.param_groups:
            group["lr"] = image_lr if group["image"] and image_lr is not None else lr
        statistics = [buffer.clone() for buffer in self._statistics]
        moved = [batch.to(self.device, non_blocking=True) for batch in batches]
        heads = episode is not None or self.loss.config.w_distill > 0
        changed = is_distributed() and self._replicate(heads, self.model.image_locked)
        forward = partial(self.replica, self._forward, number, moved, episode, project)
        if changed:
            # DDP orders its buckets once, after the first backward pass. This extra pass makes a
            # resumed run sum in the same order as the original run.
            forward()[0].total.backward()
            self.adamw.zero_grad(set_to_none=True)
            for buffer, old in zip(self._statistics, statistics, strict=True):
                buffer.copy_(old)
        with self.phases.measure("forward"):
            losses, projected = forward()
        with self.phases.measure("backward"):
            self.scaler.scale(losses.total).backward()
            norm, finite = self._update(losses)
        for buffer, old in zip(self._statistics, statistics, strict=True):
            torch.where(finite, buffer, old, out=buffer)
        broadcast(*self._of_rank)  # evaluation then reads the same values on all ranks
        skipped = (~finite).long()
        self.bad = torch.stack([self.bad[0] + skipped, (self.bad[1] + 1) * skipped])
        return Step(losses, projected, norm, finite, repeated(_captions(moved)))

    def _replicate(self, heads: bool, locked: bool) -> bool:
        """Let DDP average the gradients of what trains now; returns whether that has changed."""
        if changed := (heads, locked) != self._phase:
            self._phase = heads, locked
            self.replica = DistributedDataParallel(
                Replica(self.model if heads else self.model.clip),
                gradient_as_bucket_view=True,
                find_unused_parameters=self.loss.config.w_clip == 0,
            )
            self.replica.broadcast_buffers = False
        return changed

    def _forward(
        self, number: int, batches: Sequence[Batch], episode: Episode | None, project: bool
    ) -> tuple[Losses, Encoded | None]:
        """The losses, and projections without a graph."""
        if len(batches) == 1:
            encoded = Encoded(*self._encode(number, 0, batches[0]))
        else:  # GradCache: backward encodes each batch again
            parts = [
                checkpoint(self._encode, number, *part, use_reentrant=False)
                for part in enumerate(batches)
            ]
            encoded = Encoded(*map(torch.cat, zip(*parts, strict=True)))
        with self.autocast():
            projected = self.model.project(encoded) if project else None
        losses = self._losses(encoded, projected, batches, episode)
        if projected is not None:
            projected = Encoded(projected.image.detach(), projected.text.detach())
        return losses, projected

    def _encode(self, number: int, part: int, batch: Batch) -> tuple[Tensor, Tensor]:
        seed_everything(self.seed, number, rank(), part)
        with self.autocast():
            encoded = self.model.encode(batch.image, batch.tokens)
        return encoded.image, encoded.text

    def _losses(
        self,
        encoded: Encoded,
        projected: Encoded | None,
        batches: Sequence[Batch],
        episode: Episode | None,
    ) -> Losses:
        model = self.model
        index, dedup = torch.cat([batch.index for batch in batches]), self.loss.config.dedup
        ids = {"id": index, "caption": _captions(batches)}.get(dedup)
        scales = model.logit_scale, model.proto_scale
        return self.loss(encoded, projected, index, *scales, episode, ids, model.logit_bias)

    def _update(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """Clip, and take the step if loss and gradient are finite. Returns the norm and whether
        the step was taken; on a GPU the host does not wait for them."""
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.clip_norm if self.clip_norm > 0 else float("inf")
        )
        finite = norm.isfinite()
        if not is_distributed():  # ranks share the gradient, not the loss
            finite = finite & losses.total.detach().isfinite()
        if self.device.type == "cuda":
            if not self.scaler.is_enabled():  # else the scaler sets it
                self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.scaler.step(self.adamw)
        elif finite:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.model.clamp_scales()
        return norm, finite

    def load_state(self, optimiser: Mapping, scaler: Mapping) -> None:
        """Load an optimiser's state; learning rate, betas and decay stay as they are.

        Raises:
            ValueError: the state belongs to other parameters.
        """
        own = [p for group in self.adamw.param_groups for p in group["params"]]
        groups = self.adamw.state_dict()["param_groups"]  # with this run's settings
        saved = [group["params"] for group in optimiser["param_groups"]]
        if saved != [group["params"] for group in groups]:
            raise ValueError(
                f"checkpoint: expected the optimiser state of {len(own)} parameters, got that of "
                f"{sum(map(len, saved))}; resume with the settings of the run"
            )
        self.adamw.load_state_dict({"state": optimiser["state"], "param_groups": groups})
        if scaler:
            self.scaler.load_state_dict(dict(scaler))


def _captions(batches: Sequence[Batch]) -> Tensor:
    return torch.cat([caption_ids(batch.tokens) for batch in batches])


def repeated(ids: Tensor) -> Tensor:
    """How many of the ids [B] occur more than once."""
    ordered = ids.sort().values
    same = F.pad(ordered[1:] == ordered[:-1], (1, 1))
    return (same[1:] | same[:-1]).sum()
