"""One training step: forward, losses, gradient, update; DDP over ranks, several passes a step.

A step whose loss or gradient is not finite is skipped and counted.
"""

from __future__ import annotations

import contextlib
import random
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoclip.config import OptimConfig
from protoclip.data import Batch
from protoclip.data.types import mix
from protoclip.distributed import GlobalBatchNorm1d, is_distributed, rank
from protoclip.grad_cache import grad_cache, reached_leaves
from protoclip.losses import Losses, ProtoLoss
from protoclip.model import Encoded, ProtoModel, autocast_for
from protoclip.prototypes import Episode

PARTS = ("image", "text", "heads", "scales")


class Phases:
    """Seconds by named phase: a stopwatch for each.

    On a GPU, work is timed by events on the stream, so that measuring never waits for the device;
    phases of the host alone (reading data) use the clock. A phase inside another is not counted in
    the outer one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._memory: dict[str, int] = {}
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
        self._memory[name] = max(memory_in_use(self._device), self._memory.get(name, 0))

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add time by phase, such as what a run had spent before it was interrupted."""
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def seconds(self) -> dict[str, float]:
        """Totals so far, in the order in which phases first ended; waits for the device."""
        if self._pending:
            torch.cuda.synchronize(self._device)
            for name, sign, start, end in self._pending:
                self.add({name: sign * start.elapsed_time(end) / 1000})
            self._pending.clear()
        return dict(self._seconds)

    def memory(self) -> dict[str, int]:
        """The most bytes in use at the end of a phase so far, by phase."""
        return dict(self._memory)


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: of the card on a GPU, of the process elsewhere; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def seed_everything(*stream: int) -> None:
    """Seed the global generators of torch (every device), NumPy and Python for one purpose.

    protoclip draws from torch's alone; models and transforms of other packages may use the others.
    """
    seed = int(mix(*stream)) >> 1 if len(stream) > 1 else stream[0]
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def depends_on_passes(model: nn.Module) -> bool:
    """Whether a step depends on how its batch is split: by dropout, or by batch norm of a part."""
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        chances = [getattr(module, name, None) for name in ("p", "prob", "drop_prob", "dropout")]
        if norm and not isinstance(module, GlobalBatchNorm1d):
            return True
        if any(isinstance(chance, float) and chance > 0 for chance in chances):
            return True
    return False


def parameter_groups(model: ProtoModel, weight_decay: float) -> list[dict]:
    """Weights decay; vectors, scalars and the projection heads do not (algorithm.md §4)."""
    heads = [head for head in (model.image_head, model.text_head) if head is not None]
    in_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and id(p) not in in_heads for p in trained]
    return [
        {
            "params": [p for p, own in zip(trained, decays, strict=True) if own is wanted],
            "weight_decay": weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]


@dataclass(frozen=True)
class Step:
    """What a step was; tensors on the device, for which the host has not waited."""

    losses: Losses
    projected: Encoded | None  # [B, Dh] of all batches
    norm: Tensor  # of the gradient before clipping
    finite: Tensor  # bool: whether the step was taken


class Stepper:
    """Takes gradient steps that depend on the global batch alone.

    With several batches a step, the towers encode each without gradients, heads and losses see all
    of them at once, and each is encoded again for its share of the gradient (GradCache, Gao et al.
    2021; OpenCLIP's --accum-freq forms the loss once for every batch instead). Dropout repeats its
    masks; batch norm inside a tower sees one batch at a time.

    Args:
        model: on the device of the run.
        loss: of this rank's share of the global batch.
        config: of AdamW and of clipping.
        precision: "fp32", "amp_bf16", or "amp", which scales fp16's gradients.
        phases: the stopwatch.
        seed: of the run; dropout follows from it, the step and the rank.
    Attributes:
        bad: steps that were skipped, in all and in a row up to now: int64 [2], on the device.
    """

    def __init__(
        self,
        model: ProtoModel,
        loss: ProtoLoss,
        config: OptimConfig,
        *,
        precision: str = "fp32",
        phases: Phases | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.loss, self.seed = model, loss, seed
        self.device = next(model.parameters()).device
        self.phases = phases or Phases(self.device)
        self.autocast = autocast_for(precision, self.device)
        self.clip_norm = config.grad_clip_norm
        self.adamw = torch.optim.AdamW(
            parameter_groups(model, config.wd),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            # One pass over the weights; on a GPU only this one skips a step by itself.
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(enabled=precision == "amp")
        self.bad = torch.zeros(2, dtype=torch.int64, device=self.device)
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        self._replica: nn.Module = model
        self._trained: list[nn.Parameter] = []
        self._unused: dict[frozenset[str], list[nn.Parameter]] = {}

    def step(
        self,
        number: int,
        batches: Sequence[Batch],
        episode: Episode | None,
        *,
        project: bool,
        lr: float,
    ) -> Step:
        """One update from this rank's batches.

        Args:
            number: of the step, from 0.
            batches: of one size, on the host.
            episode: prototypes, or None.
            project: whether the heads run.
            lr: learning rate.
        """
        self.adamw.zero_grad(set_to_none=True)  # before the forward pass needs the memory
        for group in self.adamw.param_groups:
            group["lr"] = lr
        statistics = [buffer.clone() for buffer in self._statistics]
        moved = [batch.to(self.device, non_blocking=True) for batch in batches]
        self._replicate(moved[0])
        if len(moved) == 1:
            losses, projected = self._in_one_pass(number, moved[0], episode, project)
        else:
            losses, projected = self._in_passes(number, moved, episode, project)
        with self.phases.measure("backward"):
            norm, finite = self._update(losses)
        for buffer, old in zip(self._statistics, statistics, strict=True):
            torch.where(finite, buffer, old, out=buffer)
        skipped = (~finite).long()
        self.bad = torch.stack([self.bad[0] + skipped, (self.bad[1] + 1) * skipped])
        return Step(losses, projected, norm, finite)

    def _in_one_pass(
        self, number: int, batch: Batch, episode: Episode | None, project: bool
    ) -> tuple[Losses, Encoded | None]:
        with self.phases.measure("forward"):
            seed_everything(self.seed, number, rank(), 0)
            with self.autocast():
                encoded, projected = self._replica(batch.image, batch.tokens, project=project)
            losses = self._losses(encoded, projected, batch.index, episode)
        with self.phases.measure("backward"):
            zero = _zero(self._without_gradient(losses))
            self.scaler.scale(losses.total + zero).backward()
        return losses, projected

    def _losses(
        self, encoded: Encoded, projected: Encoded | None, index: Tensor, episode: Episode | None
    ) -> Losses:
        scales = self.model.logit_scale, self.model.proto_scale
        return self.loss(encoded, projected, index, *scales, episode, self.phases.measure)

    def _in_passes(
        self, number: int, batches: Sequence[Batch], episode: Episode | None, project: bool
    ) -> tuple[Losses, Encoded | None]:
        def encode(part: int, batch: Batch) -> tuple[Tensor, Tensor]:
            seed_everything(self.seed, number, rank(), part)
            with self.autocast():
                encoded, _ = self._replica(batch.image, batch.tokens, project=False)
            return encoded.image, encoded.text

        ddp = [self._replica] if isinstance(self._replica, DistributedDataParallel) else []
        with self.phases.measure("forward"):
            parts = list(enumerate(batches))
            ((image, text),) = grad_cache([encode], [parts], 1, split=lambda p, _: p, ddp=ddp)
            encoded = Encoded(image, text)
            with self.autocast():
                projected = self.model.project(encoded) if project else None
            index = torch.cat([batch.index for batch in batches])
            losses = self._losses(encoded, projected, index, episode)
        with self.phases.measure("backward"):
            clip = self.model.clip
            towers = (p for p in clip.parameters() if p is not clip.logit_scale)
            self._without_gradient(losses, *towers)
            self.scaler.scale(losses.total).backward()
        return losses, projected

    def _update(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """Clip and take the step unless loss or gradient is not finite: norm, and whether it was
        taken. On a GPU the host waits for neither."""
        # Parameters that have a gradient of zero for DDP's sake are left alone.
        for parameter in self._unused.get(frozenset(losses.terms), ()):
            parameter.grad = None
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.clip_norm if self.clip_norm > 0 else float("inf")
        )
        finite = norm.isfinite()
        if not is_distributed():  # one rank's loss is not known to the others, the gradient is
            finite = finite & losses.total.detach().isfinite()
        if self.device.type == "cuda":
            if not self.scaler.is_enabled():  # else the scaler says so itself
                self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.scaler.step(self.adamw)
        elif finite:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.model.clamp_scales()
        return norm, finite

    def _replicate(self, batch: Batch) -> None:
        """Wrap the model in DDP again where it trains other parameters than before."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not is_distributed() or list(map(id, trained)) == list(map(id, self._trained)):
            return
        self._trained, self._unused = trained, {}
        devices = [self.device] if self.device.type == "cuda" else None
        self._replica = DistributedDataParallel(
            self.model, device_ids=devices, gradient_as_bucket_view=True
        )
        # DDP orders its buckets once, after its first backward pass. An idle pass that is always
        # the same lets a resumed run sum in the order of the run that it resumes.
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with self.autocast():
            encoded, _ = self._replica(batch.image, batch.tokens, project=False)
        reached = reached_leaves([encoded.image, encoded.text])
        rest = _zero([p for p in trained if id(p) not in reached])
        (encoded.image.sum() + encoded.text.sum() + rest).backward()
        self.adamw.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _without_gradient(self, losses: Losses, *reached: nn.Parameter) -> list[nn.Parameter]:
        """Parameters that this loss does not reach: DDP waits for all, the optimiser must not move
        them. The walk over the graph is done once for each set of terms."""
        if not is_distributed():
            return []
        terms = frozenset(losses.terms)
        if terms not in self._unused:
            known = reached_leaves([losses.total]) | {id(p) for p in reached}
            self._unused[terms] = [p for p in self._trained if id(p) not in known]
        return self._unused[terms]

    @torch.no_grad()
    def norms_by_part(self, norm: Tensor) -> dict[str, Tensor]:
        """``grad_norm_image``, ``_text``, ``_heads`` and ``_scales`` of the last step: scalars.

        ``norm`` is that of all gradients before clipping.
        """
        grads: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                grads[_part_of(name)].append(parameter.grad)
        # Clipping multiplied all of them by one factor; undone here.
        factor = (norm / self.clip_norm).clamp_min(1.0) if self.clip_norm > 0 else 1.0
        return {
            f"grad_norm_{part}": torch.stack(torch._foreach_norm(own)).norm() * factor
            for part, own in grads.items()
            if own
        }

    def load_state(self, optimiser: Mapping, scaler: Mapping) -> None:
        """Take an optimiser's state; learning rate, betas and decay stay as they are.

        Raises:
            ValueError: moments of another shape or dtype, which fused AdamW would read beyond.
        """
        self._check_moments(optimiser)
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.adamw.param_groups
        ]
        self.adamw.load_state_dict(dict(optimiser))
        for group, own in zip(self.adamw.param_groups, settings, strict=True):
            group.update(own)
        if scaler:
            self.scaler.load_state_dict(dict(scaler))

    def _check_moments(self, state: Mapping) -> None:
        """Refuse what ``torch.optim`` would load unchecked."""
        own = [p for group in self.adamw.param_groups for p in group["params"]]
        groups = [len(group["params"]) for group in state["param_groups"]]
        if groups != [len(group["params"]) for group in self.adamw.param_groups]:
            raise ValueError(
                f"checkpoint: expected the optimiser state of {len(own)} parameters, got that of "
                f"{sum(groups)}; resume with the settings of the run"
            )
        for number, moments in state["state"].items():
            parameter = own[number]
            step = torch.zeros((), dtype=torch.float32)
            for name, like in (("exp_avg", parameter), ("exp_avg_sq", parameter), ("step", step)):
                if (want := _form(like)) != (got := _form(moments.get(name))):
                    raise ValueError(
                        f"checkpoint: expected {name} of the optimiser's parameter {number} as "
                        f"{want}, got {got}; use an older checkpoint"
                    )


def _form(value: object) -> str:
    """Dtype, shape and layout in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dense = value.layout == torch.strided and value.is_contiguous()
    return f"{value.dtype} {list(value.shape)}" + ("" if dense else ", not contiguous")


def _part_of(name: str) -> str:
    """The part of a parameter of ``ProtoModel``, by its name."""
    if name.startswith("clip.visual."):
        return "image"
    if name.startswith(("image_head.", "text_head.")):
        return "heads"
    return "scales" if "logit_" in name else "text"


def _zero(parameters: Sequence[nn.Parameter]) -> Tensor | float:
    """0, with a gradient of 0 for each parameter."""
    return sum((0.0 * p.sum() for p in parameters), 0.0)
