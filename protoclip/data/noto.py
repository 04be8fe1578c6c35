"""The emoji once more, drawn from the font Noto Color Emoji: a style no training has seen."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from protoclip.data.concepts import table
from protoclip.data.types import DataError

STRIKE = 109  # the only size of the font's bitmaps, in pixels per em
SIDE = 72  # pictures as large as Twemoji's
VARIABLE = "PROTOCLIP_NOTO_FONT"
FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/opt/homebrew/share/fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)
REMEDY = (
    "install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji) "
    f"or set {VARIABLE} to the path of NotoColorEmoji.ttf"
)


def noto_available() -> bool:
    """Whether the splits "noto" and "noto-heldout" of ``builtin:emoji`` can be opened here."""
    try:
        _font()
    except DataError:
        return False
    return True


@functools.cache
def pictures() -> Mapping[str, Image.Image]:
    """Picture by key of each concept that the font draws as one glyph, RGB, 72 x 72 on white.

    All are drawn at the first call (1,914 in about 1.2 s) and kept (30 MB): only the result tells
    which of them the font knows.
    """
    font = _font()
    width = font.getlength("\N{GRINNING FACE}")
    unknown = _draw(font, "\U0010ffff").tobytes()
    drawn = {}
    for concept in table():
        text = concept.text
        if font.layout_engine == ImageFont.Layout.BASIC:
            text = text.removesuffix("\ufe0f")  # takes a place of its own when nothing shapes text
        if font.getlength(text) > 1.5 * width:
            continue  # several glyphs side by side: not composed
        picture = _draw(font, text)
        if picture.tobytes() != unknown and not _tags_lost(font, text, picture):
            drawn[concept.key] = picture
    return drawn


def _tags_lost(font: ImageFont.FreeTypeFont, text: str, picture: Image.Image) -> bool:
    """Whether a flag spelt in invisible tag characters came out as its bare first character."""
    tagged = any(0xE0020 <= ord(char) <= 0xE007F for char in text)
    return tagged and picture.tobytes() == _draw(font, text[0]).tobytes()


def _draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    width, height = 136, 128  # of a glyph in the strike
    canvas = Image.new("RGB", (width, width), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((0, (width - height) // 2), text, font=font, embedded_color=True)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    tried = []
    for path in _candidates():
        try:
            # The content, as Pillow looks for a namesake elsewhere when a path does not load.
            font = ImageFont.truetype(io.BytesIO(path.read_bytes()), STRIKE)
        except OSError as error:
            tried.append(f"{path}: {error}")
            continue
        # Builds with vector colours (COLRv1) load as well, and draw nothing.
        colours = _draw(font, "\N{GRINNING FACE}").getcolors(SIDE * SIDE)
        if colours and len(colours) > 16:
            return font
        tried.append(f"{path}: has no colour bitmaps (CBDT)")
    reason = f" ({'; '.join(tried)})" if tried else ""
    raise DataError(f"the font Noto Color Emoji was not found{reason}; {REMEDY}")


def _candidates() -> Iterator[Path]:
    if chosen := os.environ.get(VARIABLE):
        yield Path(chosen).expanduser()
        return
    for folder in FOLDERS:
        yield from sorted(Path(folder).expanduser().rglob("NotoColorEmoji*.ttf"))
