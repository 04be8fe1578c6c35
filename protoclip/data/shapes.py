"""``builtin:shapes``: generated pictures of one shape, as many as asked for, for scale tests."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from protoclip.data.types import DataError, Labels, StringTable, mix

COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (250, 210, 30),
    "green": (56, 142, 60),
    "cyan": (0, 188, 212),
    "blue": (33, 80, 220),
    "purple": (123, 31, 162),
    "pink": (244, 120, 180),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "grey": (150, 150, 150),
    "beige": (235, 220, 190),
}
SIZES = {"small": 0.11, "medium": 0.16, "large": 0.22}  # radius, in sides of the picture
POSITIONS = {
    f"{row} {column}".replace("middle centre", "centre"): (x, y)
    for row, y in (("top", 0.25), ("middle", 0.5), ("bottom", 0.75))
    for column, x in (("left", 0.25), ("centre", 0.5), ("right", 0.75))
}


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners on the unit circle, first one on top; ``inner`` is the radius of the notches."""
    corners = []
    for k in range(2 * points):
        radius, angle = (inner if k % 2 else 1.0), math.pi * k / points
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def _polygon(sides: int) -> list[tuple[float, float]]:
    return _star(sides, math.cos(math.pi / sides))


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * k / 40 for k in range(40)]
    wave = [(13, 1), (-5, 2), (-2, 3), (-1, 4)]
    return [
        (math.sin(t) ** 3, -sum(a * math.cos(n * t) for a, n in wave) / 16 - 0.1) for t in turns
    ]


_BAR = 0.34
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": _polygon(40),
    "triangle": _polygon(3),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
    "pentagon": _polygon(5),
    "hexagon": _polygon(6),
    "star": _star(5, 0.4),
    "cross": [(x, y) for x, y in zip(
        (-_BAR, _BAR, _BAR, 1, 1, _BAR, _BAR, -_BAR, -_BAR, -1, -1, -_BAR),
        (-1, -1, -_BAR, -_BAR, _BAR, _BAR, 1, 1, _BAR, _BAR, -_BAR, -_BAR), strict=True)],
    "heart": _heart(),
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    "crescent": [(0.3 + math.cos(t), math.sin(t)) for t in np.linspace(0.8, 5.48, 24)]
    + [(0.65 + 0.78 * math.cos(t), 0.92 * math.sin(t)) for t in np.linspace(5.35, 0.93, 20)],
    "hourglass": [(-0.75, -0.9), (0.75, -0.9), (0.12, 0), (0.75, 0.9), (-0.75, 0.9), (-0.12, 0)],
}  # fmt: skip

_FIELDS: tuple[tuple[str, ...], ...] = (
    tuple(SHAPES), tuple(COLOURS), tuple(SIZES), tuple(POSITIONS), tuple(BACKGROUNDS)
)  # fmt: skip


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
        return (mix(field, i) % np.uint64(len(_FIELDS[field]))).astype(np.int64)

    def _words(self, i: int) -> tuple[str, ...]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: position {i} is not in 0 ... {len(self) - 1}")
        at = np.array(i)
        return tuple(values[int(self._field(f, at))] for f, values in enumerate(_FIELDS))

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
        dice = random.Random(int(mix(len(_FIELDS), np.array(i))))
        scale = 2 * self.image_size  # drawn at twice the size and reduced: smooth edges
        radius = scale * SIZES[size] * dice.uniform(0.9, 1.1)
        x, y = (scale * (c + dice.uniform(-0.03, 0.03)) for c in POSITIONS[place])
        turn = dice.uniform(-0.2, 0.2)
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in SHAPES[shape]]
        canvas = Image.new("RGB", (scale, scale), _jitter(BACKGROUNDS[ground], dice))
        ImageDraw.Draw(canvas).polygon(corners, fill=_jitter(COLOURS[colour], dice))
        return canvas.reduce(2)


def _jitter(colour: tuple[int, int, int], dice: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + dice.randint(-12, 12))) for value in colour)
    return red, green, blue
