"""What a training step copies to a GPU, counted on the meta device, where nothing can be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from steps import trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip.data import Batch
from protoclip.model import build_model, put_channels_last
from protoclip.settings.config import ModelConfig, OptimConfig
from protoclip.training import update


class Copies(TorchDispatchMode):
    """Adds up the bytes that come from another device."""

    bytes = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = op(*arguments, **(options or {}))
        is_copy = op._schema.name == "aten::_to_copy"
        if is_copy and arguments[0].device.type != result.device.type:
            self.bytes += result.nbytes
        return result


class Update(torch.optim.AdamW):
    """In place of the fused update, which the meta device does not have."""

    def step(self, closure: Any = None) -> Any:
        del self.found_inf


def plain_update(
    model: torch.nn.Module, config: OptimConfig, others: Iterable[torch.nn.Parameter]
) -> Update:
    weights = [*model.parameters(), *others]
    return Update([{"params": weights, "image": False}], lr=config.lr)


@pytest.mark.parametrize("passes", [1, 2])
def test_only_the_batch_is_copied_to_the_card(nano: Path, passes: int) -> None:
    pairs = 24 // passes
    with torch.device("meta"):
        model = build_model(ModelConfig(model=str(nano)), "meta")
    put_channels_last(model, torch.device("cuda"))
    with mock.patch.object(update, "build_optimiser", plain_update):
        trainer = trainer_of(model)
    pixels = torch.zeros(pairs, 3, model.image_size, model.image_size)
    tokens = torch.zeros(pairs, model.clip.context_length, dtype=torch.int64)
    batch = Batch(torch.arange(pairs), pixels, tokens)
    trainer.autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # meta has none
    with Copies() as copies:
        trainer.take_step(0, [batch] * passes)
    assert copies.bytes == 24 * (4 * 3 * 16**2 + 8 * 12 + 8)
