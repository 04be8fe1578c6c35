"""The optimiser: how one gradient step is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from protoclip.config import OptimConfig
from protoclip.distributed import is_distributed
from protoclip.model import ProtoModel


def parameter_groups(model: ProtoModel, weight_decay: float) -> list[dict]:
    """Weights decay; vectors, scalars and the projection heads do not (algorithm.md §4)."""
    heads = {
        id(parameter)
        for head in (model.image_head, model.text_head)
        if head is not None
        for parameter in head.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = [p for p in trained if p.ndim < 2 or id(p) in heads]
    kept_out = {id(p) for p in plain}
    return [
        {"params": [p for p in trained if id(p) not in kept_out], "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _form(value: object) -> str:
    """Dtype, shape and layout in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dense = value.layout == torch.strided and value.is_contiguous()
    return f"{value.dtype} {list(value.shape)}" + ("" if dense else ", not contiguous")


class Optimiser:
    """AdamW with gradient clipping, fp16's loss scaling where due, and clamped scales."""

    def __init__(self, model: ProtoModel, config: OptimConfig, precision: str) -> None:
        self.model = model
        self.device = next(model.parameters()).device
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

    def set_lr(self, lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = lr

    def load_state(self, state: dict, scaler: dict) -> None:
        """Take the state of another optimiser; learning rate, betas and decay stay as they are.

        Raises:
            ValueError: moments of another shape or dtype, which fused AdamW would read beyond.
        """
        self._check_moments(state)
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.adamw.param_groups
        ]
        self.adamw.load_state_dict(state)
        for group, own in zip(self.adamw.param_groups, settings, strict=True):
            group.update(own)
        if scaler:
            self.scaler.load_state_dict(scaler)

    def _check_moments(self, state: dict) -> None:
        """Refuse what ``torch.optim`` would load without a look at it."""
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
                want, got = _form(like), _form(moments.get(name))
                if got != want:
                    raise ValueError(
                        f"checkpoint: expected {name} of the optimiser's parameter {number} as "
                        f"{want}, got {got}; use an older checkpoint"
                    )

    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Backward pass and update; returns what ``update`` does."""
        self.zero_grad()
        self.scaled(loss).backward()
        return self.update(loss)

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to differentiate: the loss, times fp16's scale where there is one."""
        return self.scaler.scale(loss)

    def update(self, loss: Tensor, unused: Sequence[nn.Parameter] = ()) -> tuple[Tensor, Tensor]:
        """Take the step, which is skipped where loss or gradient is not finite.

        Args:
            loss: whose gradients are there.
            unused: parameters that have a gradient of zero for technical reasons: left alone.
        Returns:
            The gradient's norm before clipping and whether the step was taken (bool), both scalars
            on the device; on a GPU the host waits for neither.
        """
        for parameter in unused:
            parameter.grad = None
        self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.clip_norm if self.clip_norm > 0 else float("inf")
        )
        finite = norm.isfinite()
        if not is_distributed():  # one rank's loss is not known to the others, the gradient is
            finite = finite & loss.detach().isfinite()
        if self.device.type == "cuda":
            if not self.scaler.is_enabled():  # else the scaler says so itself
                self.adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.scaler.step(self.adamw)
        elif finite:
            self.scaler.step(self.adamw)
        self.scaler.update()
        self.model.clamp_scales()
        return norm, finite
