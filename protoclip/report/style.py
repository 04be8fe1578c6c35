"""How the pictures look: colours, fonts, and figures without global state."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protoclip.data.files import whole_file

INK, MUTED, GRID = "#1f2933", "#66717d", "#e3e7eb"
COLOURS = ("#1f6fb4", "#d1662b", "#2f8f5b", "#8a5fbf", "#b5477a", "#8a7a1f")
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Noto Sans")


def new_figure(width: float, height: float) -> Any:
    """A figure with its own Agg canvas: no display, no pyplot, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, out_png: str | os.PathLike[str]) -> None:
    """Write the picture whole or not at all."""
    with whole_file(Path(out_png)) as temporary:
        figure.savefig(temporary, format="png")


def style_axes(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, weight="bold", pad=8)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


@functools.cache
def _fonts() -> Mapping[str, frozenset[int]]:
    """Installed fonts of ours, in order of preference, with the characters they can draw."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    found = {}
    for family in FONTS:
        try:
            path = font_manager.findfont(family, fallback_to_default=False)
        except ValueError:
            continue
        found[family] = frozenset(FT2Font(path).get_charmap())
    return found


def text_style() -> dict[str, Any]:
    """Font fallbacks, and "$" as a dollar sign."""
    return {"family": list(_fonts()) or None, "parse_math": False}


def drawable(text: str) -> str:
    """The text with every character that no font here can draw replaced by a middle dot."""
    known = frozenset().union(*_fonts().values())
    return "".join(c if c == "\n" or ord(c) in known else "·" for c in text)
