"""Pictures inside the page: small, as data URIs."""

from __future__ import annotations

import base64
import contextlib
import html
import io

from PIL import Image, features

from protoclip.data import DataError, PairDataset

SIDE = 64


class Thumbs:
    """Thumbnails of a data set, each encoded once; a missing data set gives grey squares."""

    def __init__(self, dataset: PairDataset | None) -> None:
        self.dataset = dataset
        self._made: dict[int, str] = {}

    def tag(self, i: int, words: str = "", kind: str = "") -> str:
        """``<img>`` of picture ``i``; ``words`` for its tooltip, ``kind`` a CSS class."""
        label = html.escape(words or self.caption(i), quote=True)
        own = f' class="{kind}"' if kind else ""
        source = self._source(i)
        if not source:
            return f'<span class="missing {kind}" title="{label}"></span>'
        return f'<img{own} src="{source}" alt="{label}" title="{label}" width=56 height=56>'

    def caption(self, i: int, k: int = 0) -> str:
        """Caption ``k`` of picture ``i``, shortened."""
        if self.dataset is None or i >= len(self.dataset):
            return f"sample {i}"
        own = self.dataset.captions(i)
        return shorten(own[min(k, len(own) - 1)])

    def _source(self, i: int) -> str:
        if i not in self._made:
            self._made[i] = ""
            if self.dataset is not None and i < len(self.dataset):
                # A picture may have gone away since training.
                with contextlib.suppress(DataError, OSError):
                    self._made[i] = data_uri(self.dataset.image(i))
        return self._made[i]


def data_uri(picture: Image.Image) -> str:
    """A thumbnail of at most 64 pixels as "data:image/webp;base64,..."."""
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    kind = "webp" if features.check("webp") else "jpeg"
    small.save(stream, kind, quality=78)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


def shorten(text: str, length: int = 90) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
