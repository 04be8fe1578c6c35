"""``builtin:shapes``: any number of generated pictures of one shape each, for scale tests."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw

from protoclip.common.files import DataError
from protoclip.common.seeds import mix
from protoclip.common.strings import StringTable
from protoclip.data.types import Labels, PairDataset

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("white", "black", "grey", "beige")
SIZES = {"small": 0.11, "medium": 0.16, "large": 0.22}  # radius / side of the picture
POSITIONS = {
    f"{row} {column}".replace("middle centre", "centre"): (x, y)
    for row, y in (("top", 0.25), ("middle", 0.5), ("bottom", 0.75))
    for column, x in (("left", 0.25), ("centre", 0.5), ("right", 0.75))
}
# Number of corners on the outer circle, and radius of the notches between them (0: straight sides).
SHAPES = {
    "triangle": (3, 0.0), "diamond": (4, 0.0), "pentagon": (5, 0.0), "hexagon": (6, 0.0),
    "octagon": (8, 0.0), "circle": (24, 0.0), "tripod": (3, 0.25), "sparkle": (4, 0.3),
    "star": (5, 0.4), "hexagram": (6, 0.55), "burst": (8, 0.4), "sun": (16, 0.7),
}  # fmt: skip
# The properties of a picture; the first two are its labels.
FIELDS = tuple(map(tuple, (SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS)))


class ShapesDataset(PairDataset):
    """``count`` pictures of one shape each; a picture is drawn when it is read.

    Args:
        count: number of pairs, at least 1.
        image_size: side of the pictures in pixels.
    Labels:
        "group" the shape (12), "subgroup" colour and shape (96).
    """

    def __init__(self, count: int = 2_000, image_size: int = 72) -> None:
        if count < 1:
            raise DataError(f"builtin:shapes:N: expected N of at least 1, got {count}")
        self.name = f"builtin:shapes:{count}"
        self.keys: Sequence[str] = StringTable(f"shape-{i}" for i in range(count))
        self.image_size = image_size
        shape = self._field(FIELDS.index(tuple(SHAPES)), np.arange(count))
        colour = self._field(FIELDS.index(COLOURS), np.arange(count))
        pairs = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
        self.labels: Mapping[str, Labels] = {
            "group": Labels(torch.from_numpy(shape), tuple(SHAPES)),
            "subgroup": Labels(torch.from_numpy(shape * len(COLOURS) + colour), pairs),
        }

    def __len__(self) -> int:
        return len(self.keys)

    @staticmethod
    def _field(field: int, i: np.ndarray) -> np.ndarray:
        return (mix(field, i) % np.uint64(len(FIELDS[field]))).astype(np.int64)

    def _words(self, i: int) -> tuple[str, ...]:
        at = np.array(range(len(self))[i])
        return tuple(values[int(self._field(f, at))] for f, values in enumerate(FIELDS))

    def captions(self, i: int) -> tuple[str, ...]:
        shape, colour, size, place, ground = self._words(i)
        article = "an" if colour[0] in "aeiou" else "a"
        return (
            f"a {size} {colour} {shape}, {place}, on {ground}",
            f"a {size} {colour} {shape}",
            f"{article} {colour} {shape} on a {ground} background",
            f"{colour} {shape}, {place}",
            f"{shape}, {colour}, {size}, {place}, {ground}",
        )

    def image(self, i: int) -> Image.Image:
        shape, colour, size, place, ground = self._words(i)
        dice = random.Random(int(mix(len(FIELDS), np.array(i))))
        scale = 2 * self.image_size  # drawn at twice the size and reduced, for smooth edges
        radius = scale * SIZES[size] * dice.uniform(0.9, 1.1)
        x, y = (scale * (c + dice.uniform(-0.03, 0.03)) for c in POSITIONS[place])
        start = dice.uniform(-0.2, 0.2)
        points, inner = SHAPES[shape]
        radii = (radius, radius * (inner or math.cos(math.pi / points)))
        corners = [
            (x + radii[k % 2] * math.sin(turn), y - radii[k % 2] * math.cos(turn))
            for k in range(2 * points)
            for turn in [start + math.pi * k / points]
        ]
        canvas = Image.new("RGB", (scale, scale), _jitter(ground, dice))
        ImageDraw.Draw(canvas).polygon(corners, fill=_jitter(colour, dice))
        return canvas.reduce(2)


def _jitter(colour: str, dice: random.Random) -> tuple[int, ...]:
    """A colour close to the named one."""
    values = ImageColor.getrgb(colour)
    return tuple(min(255, max(0, value + dice.randint(-12, 12))) for value in values)
