"""``builtin:shapes``: generated pictures of one shape, as many as asked for, for scale tests."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw

from protoclip.data.types import DataError, Labels, StringTable, mix

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("white", "black", "grey", "beige")
SIZES = {"small": 0.11, "medium": 0.16, "large": 0.22}  # radius, in sides of the picture
POSITIONS = {
    f"{row} {column}".replace("middle centre", "centre"): (x, y)
    for row, y in (("top", 0.25), ("middle", 0.5), ("bottom", 0.75))
    for column, x in (("left", 0.25), ("centre", 0.5), ("right", 0.75))
}


def _star(points: int, inner: float = 0.0) -> list[tuple[float, float]]:
    """Corners on the unit circle, first one on top; ``inner`` is the radius of the notches,
    without which it is a polygon."""
    radii, steps = (1.0, inner or math.cos(math.pi / points)), range(2 * points)
    turns = [(radii[k % 2], math.pi * k / points) for k in steps]
    return [(radius * math.sin(turn), -radius * math.cos(turn)) for radius, turn in turns]


def _mirrored(*right: tuple[float, float]) -> list[tuple[float, float]]:
    """The corners of the right half from the top down, and their mirror images."""
    return [*right, *((-x, y) for x, y in reversed(right))]


SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _star(20),
    "triangle": _star(3),
    "square": _mirrored((0.8, -0.8), (0.8, 0.8)),
    "diamond": _mirrored((0, -1), (0.62, 0), (0, 1)),
    "pentagon": _star(5),
    "hexagon": _star(6),
    "star": _star(5, 0.4),
    "cross": _mirrored((0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1)),
    "heart": _mirrored((0, -0.4), (0.5, -0.8), (0.9, -0.6), (1, -0.2), (0.7, 0.3), (0, 0.9)),
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    "crescent": [
        (0.9, -0.8), (0.2, -1), (-0.5, -0.8), (-0.9, 0), (-0.5, 0.8), (0.2, 1), (0.9, 0.8),
        (0.3, 0.6), (0, 0), (0.3, -0.6),
    ],
    "hourglass": _mirrored((0.75, -0.9), (0.12, 0), (0.75, 0.9)),
}  # fmt: skip
# What a picture varies in; the first two are its labels.
FIELDS = tuple(map(tuple, (SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS)))


class ShapesDataset:
    """``count`` pictures of one shape each; picture i is drawn when it is asked for.

    Args:
        count: number of pairs, at least 1.
        image_size: side of the pictures in pixels.
    Labels:
        "group" the shape (12), "subgroup" colour and shape (96).
    """

    def __init__(self, count: int = 2_000, image_size: int = 72) -> None:
        if count < 1:
            raise DataError(f"builtin:shapes:N needs N of at least 1, got {count}")
        self.name = f"builtin:shapes:{count}"
        self.keys: Sequence[str] = StringTable(f"shape-{i}" for i in range(count))
        self.image_size = image_size
        shape, colour = (self._field(f, np.arange(count)) for f in (0, 1))
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
        scale = 2 * self.image_size  # drawn at twice the size and reduced: smooth edges
        radius = scale * SIZES[size] * dice.uniform(0.9, 1.1)
        x, y = (scale * (c + dice.uniform(-0.03, 0.03)) for c in POSITIONS[place])
        turn = dice.uniform(-0.2, 0.2)
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in SHAPES[shape]]
        canvas = Image.new("RGB", (scale, scale), _jitter(ground, dice))
        ImageDraw.Draw(canvas).polygon(corners, fill=_jitter(colour, dice))
        return canvas.reduce(2)


def _jitter(colour: str, dice: random.Random) -> tuple[int, ...]:
    """About the colour of that name."""
    values = ImageColor.getrgb(colour)
    return tuple(min(255, max(0, value + dice.randint(-12, 12))) for value in values)
