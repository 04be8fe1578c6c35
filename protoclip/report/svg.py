"""Charts as inline SVG: colours are CSS variables, so that one picture serves light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
POINTS = 240  # a longer series is drawn as means of that many pieces
COLOURS = 8


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def colour(i: int) -> str:
    return f"var(--c{i % COLOURS})"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    zero: bool = False,
    least: float = 0.0,
    note: str = "",
) -> str:
    """A chart with a legend, as a figure; values that are not finite are left out.

    Args:
        title: above it.
        series: the lines; those without a value are left out.
        zero: whether the y axis starts at 0.
        least: span of the y axis at least.
        note: a sentence under the title.
    Returns:
        HTML; "" without a single value.
    """
    lines = [(one, _thin(one.x, one.y)) for one in series]
    lines = [(one, points) for one, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points] + ([0.0] if zero else [])
    spare = max(0.0, least - (max(ys) - min(ys))) / 2
    ticks = _ticks(min(ys) - spare, max(ys) + spare)
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)

    def px(x: float) -> float:
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    across = _ticks(left, right, 5) if max(xs) > left else [left]
    parts = [_axes(ticks, py, across, px)]
    for one, points in lines:
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        stroke = colour(one.colour)
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{stroke}"/>')
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2"'
            f' stroke-linejoin="round"{dash}><title>{html.escape(one.name)}: '
            f"{number(points[-1][1])} at the end</title></polyline>"
        )
    keys = [(one.name, one.colour, one.dashed) for one, _ in lines]
    return figure(title, _svg("".join(parts), title), legend(keys), note)


def _axes(
    y_ticks: Sequence[float],
    py: Callable[[float], float],
    x_ticks: Sequence[float],
    px: Callable[[float], float],
) -> str:
    parts = []
    for y, label in zip(y_ticks, tick_labels(y_ticks), strict=True):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}"'
            f' y2="{py(y):.1f}"/><text class="tick" x="{LEFT - 6}" y="{py(y) + 4:.1f}"'
            f' text-anchor="end">{label}</text>'
        )
    for x, label in zip(x_ticks, tick_labels(x_ticks), strict=True):
        if LEFT - 1 <= px(x) <= WIDTH - RIGHT + 1:
            parts.append(
                f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
                f"{label}</text>"
            )
    return "".join(parts)


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with as many decimals as tell neighbours apart."""
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
    decimals = next((d for d in range(4) if abs(round(step, d) - step) < 1e-6 * step), 4)
    if decimals > 3:
        return [f"{t:.1e}".replace("e-0", "e-").replace("-", "−") if t else "0" for t in ticks]
    return [f"{t:,.{decimals}f}".replace("-", "−") for t in ticks]


def histogram(
    title: str, groups: Sequence[tuple[str, torch.Tensor, int]], *, bins: int = 48, note: str = ""
) -> str:
    """Overlaid histograms of values, each as shares of its own total; (name, values, colour)."""
    groups = [(name, values[values.isfinite()], c) for name, values, c in groups]
    groups = [(name, values, c) for name, values, c in groups if len(values)]
    if not groups:
        return ""
    low = min(float(values.min()) for _, values, _ in groups)
    high = max(float(values.max()) for _, values, _ in groups)
    high = high if high > low else low + 1
    series = []
    for name, values, c in groups:
        share = torch.histc(values.float(), bins, low, high) / len(values)
        edges = torch.linspace(low, high, bins + 1)
        series.append((name, ((edges[1:] + edges[:-1]) / 2).tolist(), share.tolist(), c))
    top = max(max(share) for _, _, share, _ in series) or 1.0
    step = (WIDTH - LEFT - RIGHT) / bins
    parts = [
        _axes(
            [],
            lambda y: y,
            _ticks(low, high, 5),
            lambda x: LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT),
        )
    ]
    for _, _, heights, c in series:
        for i, value in enumerate(heights):
            if value > 0:
                tall = value / top * (HEIGHT - TOP - BOTTOM)
                parts.append(
                    f'<rect x="{LEFT + i * step:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}"'
                    f' width="{step:.1f}" height="{tall:.1f}" fill="{colour(c)}"'
                    ' fill-opacity="0.55"/>'
                )
    keys = [(name, c, False) for name, _, _, c in series]
    return figure(title, _svg("".join(parts), title), legend(keys), note)


def bars(title: str, rows: Sequence[tuple[str, float, str]], *, note: str = "") -> str:
    """Horizontal bars: (name, value, words at its end), as HTML, longest value full width."""
    top = max((value for _, value, _ in rows), default=0) or 1.0
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        f'<td><span class="bar" style="width:{100 * value / top:.1f}%"></span></td>'
        f"<td class=num>{html.escape(words)}</td></tr>"
        for name, value, words in rows
    )
    return figure(title, f"<table class=bars>{body}</table>", "", note)


def figure(title: str, body: str, key: str = "", note: str = "") -> str:
    words = f"<p class=note>{html.escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{words}{body}{key}</figure>"


def legend(keys: Sequence[tuple[str, int, bool]]) -> str:
    return (
        "<div class=legend>"
        + "".join(
            f'<span><i style="background:{colour(c)}"{" class=dash" if dashed else ""}></i>'
            f"{html.escape(name)}</span>"
            for name, c, dashed in keys
        )
        + "</div>"
    )


def number(value: float) -> str:
    """A tick's or table's number: three digits that matter."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return text.replace("-", "−")
    digits, _, exponent = f"{value:.2g}".partition("e")
    return (f"{digits}e{int(exponent)}" if exponent else f"{value:.1e}").replace("-", "−")


def _svg(body: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{body}</svg>"
    )


def _thin(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = math.ceil(len(points) / POINTS)
    if size <= 1:
        return points
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(v) / len(p) for v in zip(*p, strict=True)) for p in pieces]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values from below ``low`` to above ``high``."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]
