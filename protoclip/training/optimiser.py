"""The trainer's AdamW: which weights decay, and its state in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from protoclip.model import ProtoModel, match_layout
from protoclip.settings.config import OptimConfig


def build_optimiser(
    model: ProtoModel, config: OptimConfig, others: Iterable[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW over the model's and other weights, in the groups of ``parameter_groups``."""
    # Fused: one pass over the weights; on a GPU only the fused form can skip a step itself.
    return torch.optim.AdamW(
        parameter_groups(model, config.wd, others),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def parameter_groups(
    model: ProtoModel, weight_decay: float, others: Iterable[nn.Parameter] = ()
) -> list[dict]:
    """Weights decay; vectors, scalars and the projection heads do not (docs/algorithm.md §4).

    The image tower has its own groups because it has its own schedule. ``others`` come last and
    are trained like the text tower's weights.
    """
    heads = [head for head in (model.image_head, model.text_head) if head is not None]
    in_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    in_image = {id(parameter) for parameter in model.clip.visual.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in in_heads
            groups.setdefault((id(p) in in_image, decays), []).append(p)
    trained = [parameter for parameter in others if parameter.requires_grad]
    parts = [(image, decays, parameters) for (image, decays), parameters in groups.items()]
    for decays in (True, False):
        parts.append((False, decays, [p for p in trained if (p.ndim >= 2) == decays]))
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "image": image}
        for image, decays, parameters in parts
        if parameters
    ]


def load_optimiser(adamw: torch.optim.AdamW, saved: Mapping[str, Any]) -> None:
    """Load an optimiser's state; learning rate, betas and decay stay as they are.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    groups = adamw.state_dict()["param_groups"]  # with this run's settings
    expected = [group["params"] for group in groups]
    got = [group["params"] for group in saved["param_groups"]]
    if got != expected:
        raise ValueError(
            "checkpoint: expected the optimiser state of "
            f"{sum(map(len, expected))} parameters, got that of {sum(map(len, got))}; resume "
            "with the settings of the run"
        )
    adamw.load_state_dict({"state": saved["state"], "param_groups": groups})
    match_layout(adamw)
