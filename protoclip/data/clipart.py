"""``builtin:openclipart``: drawings of the Open Clip Art Library (public domain), with captions.

They are not shipped but read from Debian's package openclipart-svg. Icons, signs, plain shapes and
series that differ only in a number are left out.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from protoclip.data.emoji import SIDE, captions_of
from protoclip.data.images import draw_svg_files
from protoclip.data.types import DataError, Labels, labels_of

FOLDER = "/usr/share/openclipart/svg"
LEFT_OUT = tuple(f"{folder}/" for folder in (
    "buttons", "computer", "logos", "recreation/games/cards", "shapes", "signs_and_symbols",
    "special", "transportation/aiga-symbols", "transportation/roadsigns", "unsorted",
))  # fmt: skip
COMMON = 3  # a title of more drawings than this names a series, not what they show
NOT_KEYWORDS = frozenset(("", "hash", "unsorted"))


class ClipArtDataset:
    """Clip art by title and keywords, with the labels "group" (folder) and "subgroup" (subfolder).

    ``folder`` holds the package's SVG files; "" is where Debian puts them. DataError: there are no
    files, or the package that draws them is not installed.
    """

    def __init__(self, folder: str = "") -> None:
        self.name = "builtin:openclipart" + (folder and f":{folder}")
        self._folder = Path(folder or FOLDER)
        drawn = _drawn(self._folder)
        self.keys: Sequence[str] = tuple(drawn)
        self._captions = tuple(captions for captions, _ in drawn.values())
        folders = [key.rpartition("/")[0] for key in self.keys]
        self.labels: Mapping[str, Labels] = {
            "group": labels_of([name.partition("/")[0] for name in folders]),
            "subgroup": labels_of(folders),
        }

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(_drawn(self._folder)[self.keys[i]][1])

    def captions(self, i: int) -> tuple[str, ...]:
        return self._captions[i]


@functools.cache
def _drawn(folder: Path) -> Mapping[str, tuple[tuple[str, ...], np.ndarray]]:
    """Captions and picture, uint8 [72, 72, 3], of each drawing, by its path in the folder."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.svg"))}
    names = [name for name in found if not name.startswith(LEFT_OUT)]
    if not names:
        raise DataError(
            f"builtin:openclipart: expected SVG files in {folder}, got none; apt-get install "
            "openclipart-svg (Debian, Ubuntu), or unpack it and give builtin:openclipart:FOLDER"
        )
    # Some drawings are in several folders.
    unique = {hashlib.sha256(found[name].read_bytes()).digest(): name for name in names}
    names = list(unique.values())
    files = [found[name] for name in names]
    about = [_about(file) for file in files]
    titles = Counter(title for title, _ in about)
    drawn = {}
    for name, (title, tags), picture in zip(names, about, draw_svg_files(files, SIDE), strict=True):
        if not title or titles[title] > COMMON:
            title = " ".join(re.findall("[a-z]+", PurePosixPath(name).stem))
        captions = captions_of(title, tags)
        if captions and picture.any():
            drawn[name] = (captions, picture)
    return drawn


def _about(path: Path) -> tuple[str, list[str]]:
    """Title and keywords of a drawing, from its Dublin Core metadata."""
    title, tags = "", []
    with contextlib.suppress(ElementTree.ParseError):  # keep what precedes the fault
        for _, element in ElementTree.iterparse(path):
            tag, text = element.tag.rpartition("}")[2], " ".join((element.text or "").split())
            if tag == "title":
                title = title or text  # the first; later ones name people
            elif tag == "li" and text.lower() not in NOT_KEYWORDS:
                tags.append(text.lower())
            elif tag == "Work":
                break
    return title, list(dict.fromkeys(tags))
