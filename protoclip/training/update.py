"""What a step does with its gradient: AdamW's update, or none where it is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protoclip.distributed import broadcast
from protoclip.losses.objective import OwnTerms
from protoclip.training import schedule
from protoclip.training.optimiser import build_optimiser
from protoclip.training.run import Run

Flat = dict[torch.dtype, Tensor]  # the values of buffers, one after the other


class Update:
    """Learning rates, fp16's scaled gradients, clipping, and AdamW's update."""

    def __init__(self, run: Run, terms: OwnTerms) -> None:
        self.run = run
        self.on_host = run.device.type == "cpu"
        self.clipped = [*run.model.parameters(), *terms.parameters()]
        clip_norm = run.config.optim.grad_clip_norm
        self.clip_norm = clip_norm if clip_norm > 0 else float("inf")
        self.adamw = build_optimiser(run.model, run.config.optim, terms.parameters())
        self.scaler = torch.amp.GradScaler(enabled=run.precision == "amp")

    def begin(self, step: int) -> float:
        """Drop the last gradient, before the forward pass needs the memory, and set the learning
        rates of a step; returns that of the text tower."""
        self.adamw.zero_grad(set_to_none=True)
        config, plan = self.run.config, self.run.plan
        lr = schedule.learning_rate(config.optim, plan.total_steps, step)
        image_lr = schedule.image_learning_rate(config, plan, step)
        for group in self.adamw.param_groups:
            group["lr"] = image_lr if group["image"] else lr
        return lr

    def clipped_norm(self) -> Tensor:
        """Clip the gradient; returns its norm before."""
        self.scaler.unscale_(self.adamw)
        return nn.utils.clip_grad_norm_(self.clipped, self.clip_norm)

    def take_if(self, finite: Tensor) -> None:
        """Update the weights if ``finite``; except on a CPU, the host does not wait to find out."""
        if not self.on_host:
            if not self.scaler.is_enabled():  # else the scaler sets it
                self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.scaler.step(self.adamw)
        elif finite:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.run.model.clamp_scales()

    def load_scaler(self, saved: Mapping[str, Any]) -> None:
        """Continue with the scaler's state; empty unless the run scales fp16's gradients."""
        if saved:
            self.scaler.load_state_dict(dict(saved))


class Statistics:
    """What a forward pass may change and a skipped step must not: batch norm's statistics and the
    buffers of a user's own losses, copied with few kernels (a ResNet-50 has 159 of them)."""

    def __init__(self, model: nn.Module, terms: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._of_norms = [buffer for norm in norms for buffer in norm.buffers()]
        self._terms = terms

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        # A user's loss may have replaced its own.
        for buffer in (*self._of_norms, *self._terms.buffers()):
            groups.setdefault(buffer.dtype, []).append(buffer)
        return groups

    def copy(self) -> Flat:
        """Their values."""
        return {
            dtype: torch.cat([buffer.flatten() for buffer in of_dtype])
            for dtype, of_dtype in self._by_dtype().items()
        }

    def restore(self, values: Flat) -> None:
        """Write values back into the buffers that they were copied from."""
        for dtype, of_dtype in self._by_dtype().items():
            parts = values[dtype].split([buffer.numel() for buffer in of_dtype])
            shaped = [part.view_as(buffer) for part, buffer in zip(parts, of_dtype, strict=True)]
            torch._foreach_copy_(of_dtype, shaped)

    def restore_unless(self, taken: Tensor, before: Flat, after: Flat) -> None:
        """Put back the values from before a step unless it was ``taken``, a bool scalar for which
        the host does not wait, else those from after its forward pass; then every rank gets those
        of rank 0. Buffers keep their shapes (``OwnTerms`` checks those of a user's losses)."""
        values = {dtype: torch.where(taken, after[dtype], before[dtype]) for dtype in after}
        broadcast(*values.values())
        self.restore(values)
