"""How hard each part of the model is pulled: gradient norms by tower."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.model import ProtoModel

PARTS = ("image", "text", "heads", "scales")


def part_of(name: str) -> str:
    """The part of a parameter of ``ProtoModel``, by its name."""
    if name.startswith("clip.visual."):
        return "image"
    if name.startswith(("image_head.", "text_head.")):
        return "heads"
    return "scales" if "logit_" in name else "text"


@torch.no_grad()
def norms_by_part(model: ProtoModel, norm: Tensor, clip_norm: float) -> dict[str, Tensor]:
    """``grad_norm_image``, ``_text``, ``_heads`` and ``_scales``; scalars, on the device.

    Args:
        model: its gradients are as the last step left them: clipped.
        norm: of all gradients before clipping.
        clip_norm: the largest norm that was let through; 0: any.
    """
    grads: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grads[part_of(name)].append(parameter.grad)
    # Clipping multiplied all of them by one factor; undone here.
    factor = (norm / clip_norm).clamp_min(1.0) if clip_norm > 0 else torch.ones_like(norm)
    return {
        f"grad_norm_{part}": torch.stack(torch._foreach_norm(own)).norm() * factor
        for part, own in grads.items()
        if own
    }
