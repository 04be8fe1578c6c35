"""A moving average of the weights, a steadier source of features than the weights themselves."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from protoclip.model import ProtoModel


class MovingAverage:
    """``model`` follows the trained model: average = decay * average + (1 - decay) * weights.

    The decay starts low, min(decay, (1 + step) / (10 + step)), so that the random weights of the
    start are soon forgotten. Buffers (running statistics) are copied.

    Args:
        model: the trained model; the average begins as a copy of it.
        decay: in [0, 1).
    """

    def __init__(self, model: ProtoModel, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: ProtoModel, step: int) -> None:
        """Follow the weights after step 1, 2, ..."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = list(self.model.parameters())
        theirs: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(ours, theirs, weight)
        for own, other in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(other)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, for a checkpoint."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)
