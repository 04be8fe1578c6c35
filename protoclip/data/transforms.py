"""From picture to tensor: augmentations by name, made of torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

AUGMENTATIONS = ("paper", "clip", "none")


class Transform:
    """Picture -> float32 [3, H, W], normalised; see :func:`build_transform`.

    The two halves are public so that a batch is normalised at once.

    Attributes:
        pixels: picture -> uint8 [3, H, W], the random part (torch's default generator).
    """

    def __init__(
        self, pixels: Callable[[Image.Image], Tensor], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.pixels = pixels
        # (x / 255 - mean) / std as one multiply and one add.
        self._scale = 1.0 / (255.0 * torch.tensor(std, dtype=torch.float32).reshape(3, 1, 1))
        self._shift = -(torch.tensor(mean) / torch.tensor(std)).float().reshape(3, 1, 1)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, H, W] -> float32 [..., 3, H, W] of mean 0 and deviation 1."""
        return torch.addcmul(self._shift, pixels.float(), self._scale)

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.normalise(self.pixels(picture))


def build_transform(
    image_size: int, mean: Sequence[float], std: Sequence[float], augmentation: str = "none"
) -> Transform:
    """Transform of a model's input.

    Args:
        image_size: side of the result in pixels.
        mean, std: of each channel, for pixels in 0 ... 1.
        augmentation: "paper" (ProtoCLIP's: crop of 50 to 100 % of the area, flip, and each with
            probability 0.2 colour jitter, grey, blur) | "clip" (CLIP's: crop of 90 to 100 %) |
            "none" (resize and centre crop, for evaluation).
    Raises:
        ValueError: unknown name, or sizes that make no sense.
    """
    if augmentation not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        raise ValueError(f"augmentation: expected one of {known}, got {augmentation!r}")
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(
            f"mean and std: expected three values each, std above 0, got {mean} and {std}"
        )
    from torchvision import transforms

    steps = [*_steps(transforms, image_size, augmentation), transforms.PILToTensor()]
    return Transform(transforms.Compose(steps), mean, std)


def _steps(t: Any, side: int, augmentation: str) -> list[Any]:
    """Steps from picture to picture; ``t`` is torchvision.transforms."""
    cubic = t.InterpolationMode.BICUBIC
    if augmentation == "none":
        return [t.Resize(side, interpolation=cubic), t.CenterCrop(side)]
    if augmentation == "clip":
        return [t.RandomResizedCrop(side, scale=(0.9, 1.0), interpolation=cubic)]
    kernel = side // 10 | 1  # SimCLR: a tenth of the side, odd
    return [
        t.RandomResizedCrop(side, scale=(0.5, 1.0), interpolation=cubic),
        t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.2),
        t.RandomGrayscale(p=0.2),
        t.RandomApply([t.GaussianBlur(kernel, sigma=(0.1, 2.0))], p=0.2),
    ]
