"""The charts of the page, as SVG."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protoclip.common.files import lines_of
from protoclip.settings.config import parse_json

# The page's colours in the light theme; an SVG uses their names as CSS variables.
CSS = resources.files("protoclip.report").joinpath("page.css").read_text(encoding="utf-8")
COLOURS = dict(reversed(re.findall(r"--(ink|muted|line|c\d): (#\w{6})", CSS)))
INK = COLOURS["ink"]
MUTED = COLOURS["muted"]
LINE = COLOURS["line"]
CYCLE = [COLOURS[f"c{i}"] for i in range(8)]
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "protoclip", "text.parse_math": False,
    "font.size": 8, "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.major.size": 0,
    "ytick.major.size": 0, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE,
    "axes.axisbelow": True, "axes.facecolor": "none", "axes.spines.left": False,
    "axes.spines.right": False, "axes.spines.top": False, "axes.formatter.limits": (-5, 5),
    "lines.linewidth": 1.6, "lines.markersize": 3,
}  # fmt: skip
SIZE = (4.6, 2.3)  # inches
PANEL = (0.12, 0.18, 0.86, 0.78)  # the axes: left, bottom, width, height
POINTS = 240  # a longer series is drawn as the means of this many pieces
LEGEND = (
    ("text_retrieval_recall@5", "image → text"),
    ("image_retrieval_recall@5", "text → image"),
    ("val_NEW_", "unseen family, "),
    ("val_HO_", "held out, "),
    ("val_TRAIN_", "trained on, "),
    ("val_ALL_", "--val-data, "),
    ("external_loss", "prototype loss (teacher)"),
    ("external_", "teacher_"),
    ("proto_loss", "prototype loss (own features)"),
    ("proto_logit_scale", "prototype logit scale"),
)
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # scalar -> steps and values


class Line(NamedTuple):
    """One line of a chart; the first run's are solid."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False


class Chart(NamedTuple):
    """Lines that share their axes: the scalars whose names match ``pattern``."""

    title: str
    pattern: str
    note: str = ""
    zero: bool = True  # whether the y axis starts at 0
    least: float = 0.0  # the smallest span of the y axis
    lines: Sequence[Line] = ()

    @property
    def is_flat(self) -> bool:
        """Whether three digits of each line say all that a curve would show."""
        return all(len({f"{value:.3g}" for value in line.values}) == 1 for line in self.lines)


CURVES = (
    Chart("Loss (nats)", "(.+)[Ll]oss", zero=False),  # the total would flatten its terms
    Chart("Recall at 5", ".*recall@5"),
    Chart("Zero-shot accuracy", ".*/acc1"),
    # The least span keeps a drift in the second decimal flat.
    Chart("Logit scale", "(?!.*_raw).*logit_scale.*", zero=False, least=2.0),
    Chart("Learning rate", "lr"),
)
CHURN = tuple(
    Chart(title, f"(?!seconds_).*{ending}.*", note)
    for title, ending, note in (
        ("Churn", "_churn", "Share of samples whose cluster changed since the last episode."),
        ("Prototype accuracy", "_proto_accuracy", "Samples whose nearest prototype is their own."),
        ("Largest cluster", "_largest_share", "Its share of the samples."),
        ("Imbalance", "_imbalance", "Largest cluster over the mean size."),
        ("Clusters in use", "_clusters", "Empty ones are dropped."),
        ("Inertia", "_inertia", "Mean squared distance to the centroid; in total: to the mean."),
        ("Entropy of the targets", "_target_entropy", "In nats; near 0 the targets are hard."),
        ("Purity", "_purity", "Share of samples in their cluster's most common class."),
    )
)


def read_series(path: str | os.PathLike[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Scalar -> its steps and values, from ``metrics.jsonl``; torn lines are skipped."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines_of(Path(path).read_text(encoding="utf-8", errors="replace")):
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            record = parse_json(line)
            step = float(record.pop("step"))
            for name, value in record.items():
                steps, values = series.setdefault(name, ([], []))
                values.append(float(value))
                steps.append(step)
    return series


def charts(empty_charts: Sequence[Chart], runs: Mapping[str, Series]) -> list[Chart]:
    """The charts with the lines of some runs by name: finite points, or means of pieces."""
    # A source has the same colour in all charts.
    names = sorted(dict.fromkeys(name for series in runs.values() for name in series), key=_source)
    filled = []
    for chart in empty_charts:
        lines = []
        matches = [name for name in names if re.fullmatch(chart.pattern, name)]
        for name in matches:
            for number, (run, series) in enumerate(runs.items()):
                points = np.array(series.get(name, ([], []))).T  # [P, 2]
                points = points[np.isfinite(points).all(axis=1)]
                if len(points) > POINTS:
                    pieces = np.array_split(points, POINTS)
                    points = np.array([piece.mean(axis=0) for piece in pieces])
                label = words_of(name)
                if len(runs) > 1:
                    label = run if len(matches) == 1 else f"{label} · {run}"
                if len(points):
                    steps, values = points.T.tolist()
                    lines.append(Line(label, steps, values, number > 0))
        if any(len(line.steps) > 1 for line in lines):  # a single value is no curve
            filled.append(chart._replace(lines=lines))
    return filled


def _source(name: str) -> int:
    """The place of a scalar's line among those of other sources of prototypes."""
    prefixes = ("image_", "text_", "external_")
    return next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), 0)


def words_of(name: str) -> str:
    """A readable legend: val_HO_text_retrieval_recall@5 -> "held out, image → text"."""
    for key, words in LEGEND:
        name = name.replace(key, words)
    return name.removeprefix("val_").removesuffix("/acc1").replace("_", " ")


def chart_svg(chart: Chart) -> str:
    """The chart without title and legend."""
    with _figure() as (figure, axes):
        for number, line in enumerate(chart.lines):
            axes.plot(
                line.steps, line.values, color=CYCLE[number % len(CYCLE)],
                ls="--" if line.dashed else "-", marker="o" if len(line.steps) < 40 else "",
            )  # fmt: skip
        axes.locator_params(axis="y", nbins=5)
        low, high = axes.get_ylim()
        spare = max(0.0, chart.least - (high - low)) / 2
        axes.set_ylim(min(0.0, low) if chart.zero else low - spare, high + spare)
        axes.set_xlabel("training step")
        return _svg(figure)


def differences_svg(rows: Sequence[tuple[Sequence[float], float, float]]) -> str:
    """A line for each row, from the top: a dot per seed, and the mean with its 95 % interval.
    A number counts seeds at one place. ``rows``: differences by seed, their mean, half of the
    interval (infinite: none)."""
    height = 0.67 + 0.42 * len(rows)  # inches
    panel = (0.03, 0.42 / height, 0.94, 1 - 0.47 / height)
    with _figure(size=(SIZE[0], height), panel=panel, yticks=[]) as (figure, axes):
        axes.grid(False)
        axes.axvline(0, color=MUTED, lw=0.8)
        every = [seed for seeds, _, _ in rows for seed in seeds] or [0.0]
        dot = max(0.01 * (max([0.0, *every]) - min([0.0, *every])), 1e-12)  # the width of one
        for place, (seeds, mean, half) in enumerate(rows):
            colour = CYCLE[place % len(CYCLE)]
            if np.isfinite(half):
                axes.plot([mean - half, mean + half], [-place, -place], color=colour, lw=2.5)
            axes.plot([mean], [-place], color=colour, marker="|", ms=11, mew=2.5)
            axes.plot(
                seeds, np.full(len(seeds), 0.25 - place), color=colour, ls="", marker="o", ms=3.5
            )
            for step, count in Counter(round(seed / dot) for seed in seeds).items():
                if count > 1:
                    axes.annotate(
                        f"{count}", (step * dot, 0.25 - place), xytext=(0, 3), ha="center",
                        textcoords="offset points", color=colour, fontsize=7,
                    )  # fmt: skip
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("difference from the baseline")
        return _svg(figure)


def histogram_svg(edges: Sequence[float], shares: Sequence[Sequence[float]]) -> str:
    """Overlaid histograms, coloured in order."""
    with _figure(yticks=[]) as (figure, axes):
        for colour, values in zip(CYCLE, shares, strict=False):
            axes.stairs(values, edges, fill=True, color=colour, alpha=0.55)
        return _svg(figure)


@contextlib.contextmanager
def _figure(
    size: tuple[float, float] = SIZE,
    panel: tuple[float, float, float, float] = PANEL,
    **options: Any,
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, without pyplot and its global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield figure, figure.add_axes(panel, **options)


def _svg(figure: Any) -> str:
    """An ``<svg>`` for the page: named colours, no metadata; same input, same bytes."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->| id="[a-z]+_\d+"', "", text, flags=re.S)
    for name, code in COLOURS.items():
        text = text.replace(code, f"var(--{name})")
    return text
