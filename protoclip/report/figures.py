"""Every picture of a run, drawn once for two uses: PNG in the run folder, SVG in the page."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from protoclip.data.cache import whole_file
from protoclip.report.snapshot import Snapshot

# The page's colours: a PNG takes the light theme's, an SVG keeps their names as CSS variables.
CSS = resources.files("protoclip.report").joinpath("page.css").read_text(encoding="utf-8")
COLOURS = dict(reversed(re.findall(r"--(ink|muted|line|c\d): (#\w{6})", CSS)))
INK, MUTED, LINE = COLOURS["ink"], COLOURS["muted"], COLOURS["line"]
CYCLE = [COLOURS[f"c{i}"] for i in range(8)]
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Noto Sans")
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "protoclip", "text.parse_math": False,
    "font.size": 8, "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": MUTED,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.major.size": 0,
    "ytick.major.size": 0, "axes.grid": True, "axes.grid.axis": "y", "grid.color": LINE,
    "axes.axisbelow": True, "axes.facecolor": "none", "axes.spines.left": False,
    "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11,
    "axes.formatter.limits": (-3, 5), "legend.frameon": False, "lines.linewidth": 1.6,
    "lines.markersize": 3,
}  # fmt: skip
PANEL = (0.1, 0.12, 0.88, 0.84)  # left, bottom, width, height inside an SVG
POINTS = 240  # a longer series is drawn as means of that many pieces
Series = Mapping[str, tuple[list[float], list[float]]]  # scalar -> steps and values


@dataclass(frozen=True)
class Line:
    """One line of a chart; ``colour`` counts through the page's eight."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines that share their axes; ``least`` is the smallest span of the y axis."""

    title: str
    lines: Sequence[Line]
    zero: bool = True  # whether the y axis starts at 0
    least: float = 0.0
    note: str = ""


def read_series(path: str | os.PathLike[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Scalar -> its steps and values, from ``metrics.jsonl``; torn lines are skipped."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or not _is_number(record.get("step")):
            continue
        for name, value in record.items():
            if name != "step" and _is_number(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(float(record["step"]))
                values.append(float(value))
    return series


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curves(runs: Mapping[str, Series]) -> list[Chart]:
    """Losses, recalls, accuracies, scales and learning rate of runs by name; none is empty."""
    names = list(dict.fromkeys(name for series in runs.values() for name in series))
    losses = [name for name in names if name.lower().endswith("loss")]
    if len(losses) > 1:  # the total jumps where a term comes in, and flattens the terms
        losses.remove("loss") if "loss" in losses else None
    recalls = [name for name in names if "recall@5" in name]
    accuracies = [name for name in names if name.endswith("/acc1")]
    scales = [n for n in names if "logit_scale" in n and not n.endswith("_raw")]
    charts = [
        _chart("Loss (nats)", losses, runs, zero=False),
        _chart("Recall at 5", recalls, runs),
        _chart("Zero-shot accuracy", accuracies, runs),
        # A drift in the second decimal is no curve.
        _chart("Logit scale", scales, runs, zero=False, least=2.0),
        _chart("Learning rate", [name for name in names if name == "lr"], runs),
    ]
    return [chart for chart in charts if chart.lines]


def churn(runs: Mapping[str, Series]) -> list[Chart]:
    """How the clusters change from episode to episode; no chart is empty."""
    names = dict.fromkeys(name for series in runs.values() for name in series)
    charts = []
    for title, ending, note in (
        ("Churn", "_churn", "Share of samples that changed company since the last episode."),
        ("Imbalance", "_imbalance", "Largest cluster over the mean size."),
        ("Clusters in use", "_clusters", "Empty ones are dropped."),
        ("Inertia", "_inertia", "Mean squared distance to the centroid."),
        ("Purity", "_purity", "Share of samples of their cluster's commonest class."),
    ):
        own = [n for n in names if ending in n and not n.startswith("seconds_")]
        charts.append(_chart(title, own, runs, note=note, drop=ending))
    return [chart for chart in charts if chart.lines]


def _chart(
    title: str, names: Sequence[str], runs: Mapping[str, Series], drop: str = "", **settings: Any
) -> Chart:
    """The scalars of all runs in one chart, the runs after the first dashed."""
    lines = []
    for order, name in enumerate(names):
        for number, (run, series) in enumerate(runs.items()):
            steps, values = _thin(*series.get(name, ([], [])))
            if steps:
                label = words_of(name.replace(drop, "")) + (f" · {run}" if len(runs) > 1 else "")
                lines.append(Line(label, steps, values, order * len(runs) + number, number > 0))
    return Chart(title, lines, **settings)


def words_of(name: str) -> str:
    """A legend a reader understands: "val_HO_text_retrieval_recall@5" -> "HO image → text"."""
    ways = {"text_retrieval_recall@5": "image → text", "image_retrieval_recall@5": "text → image"}
    for key, words in ways.items():
        name = name.replace(key, f" {words}")
    return name.removeprefix("val_").removesuffix("/acc1").replace("_", " ").replace("  ", " ")


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The finite points; where there are many, the means of successive pieces."""
    points = [point for point in zip(steps, values, strict=True) if math.isfinite(point[1])]
    size = math.ceil(len(points) / POINTS) or 1
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    means = [[sum(part) / len(piece) for part in zip(*piece, strict=True)] for piece in pieces]
    return [x for x, _ in means], [y for _, y in means]


def plot_curves(metrics: str | os.PathLike[str], out_png: str | os.PathLike[str]) -> None:
    """Draw the curves of one run over its steps.

    Args:
        metrics: ``metrics.jsonl``, one JSON object a line: ``step`` and any scalars by name.
        out_png: the picture; an older one is replaced.
    Raises:
        ValueError: no line has a step and a scalar that is drawn.
    """
    charts = curves({"": read_series(metrics)})
    if not charts:
        raise ValueError(
            f"plot_curves: {metrics} holds no line with 'step' and a loss, scale, lr or recall; "
            "the run stopped before its first log"
        )
    columns = min(2, len(charts))
    rows = math.ceil(len(charts) / columns)
    with _figure(5.2 * columns, 3.1 * rows) as figure:
        for place, chart in enumerate(charts):
            axes = figure.add_subplot(rows, columns, place + 1, title=chart.title, xlabel="step")
            _draw(axes, chart)
            if len(chart.lines) > 1:
                axes.legend()
        _save(figure, out_png)


def chart_svg(chart: Chart) -> str:
    """The chart alone, without title and legend."""
    with _figure(4.6, 2.3, "none") as figure:
        _draw(figure.add_axes(PANEL), chart)
        return _svg(figure)


def histogram_svg(edges: Sequence[float], shares: Sequence[Sequence[float]]) -> str:
    """Overlaid histograms, coloured in order."""
    with _figure(4.6, 2.3, "none") as figure:
        axes = figure.add_axes(PANEL, yticks=[])
        for colour, values in enumerate(shares):
            axes.stairs(values, edges, fill=True, color=CYCLE[colour], alpha=0.55)
        return _svg(figure)


def _draw(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        axes.plot(
            line.steps, line.values, label=line.label, color=CYCLE[line.colour % len(CYCLE)],
            ls="--" if line.dashed else "-", marker="o" if len(line.steps) < 40 else "",
        )  # fmt: skip
    axes.locator_params(axis="y", nbins=5)
    low, high = axes.get_ylim()
    spare = max(0.0, chart.least - (high - low)) / 2
    axes.set_ylim(min(0.0, low) if chart.zero else low - spare, high + spare)


def plot_prototypes(snapshot: Snapshot, out_png: str | os.PathLike[str]) -> None:
    """A contact sheet of the first source's prototypes: nearest images and captions in rows.

    A neighbour that is not a member has an orange frame, or orange text.

    Raises:
        ValueError: the snapshot has no clusters.
    """
    from PIL import Image

    if not snapshot.clusters:
        raise ValueError("plot_prototypes: expected clusters, got a snapshot without prototypes")
    block = snapshot.clusters[0]
    cards = block["cards"]
    columns = max(len(card["images"]) for card in cards)
    height, cell = 0.6 + 0.88 * len(cards), 0.72  # inches
    with _figure(1.55 + cell * columns + 3.5, height, "none") as figure:
        figure.suptitle(
            f"Prototypes of the {block['name']} clusters", x=0.01, ha="left", weight="bold"
        )
        figure.text(
            0.99, 1 - 0.2 / height, "nearest images and captions; orange: not in the prototype",
            color=MUTED, ha="right",
        )  # fmt: skip
        widths = [1.55, *[cell] * columns, 3.5]
        grid = figure.add_gridspec(
            len(cards), columns + 2, width_ratios=widths, left=0.01, right=0.99, wspace=0.06,
            hspace=0.14, bottom=0.04 / height, top=1 - 0.56 / height,
        )  # fmt: skip
        for row, card in enumerate(cards):
            axes = figure.add_subplot(grid[row, 0])
            axes.axis("off")
            axes.text(0, 0.95, f"#{card['prototype']}", fontsize=10, weight="bold", va="top")
            words = f"{card['samples']:,} sample{'s' if card['samples'] != 1 else ''}"
            if "class" in card:
                words += f"\n{card['share']:.0%} {card['class'][:18]}"
            axes.text(0, 0.6, words, color=MUTED, va="top")
            for column, item in enumerate(card["images"]):
                axes = figure.add_subplot(grid[row, 1 + column], xticks=[], yticks=[])
                if item["picture"] is not None:
                    raw = base64.b64decode(snapshot.pictures[item["picture"]])
                    axes.imshow(Image.open(io.BytesIO(raw)))
                for spine in axes.spines.values():
                    spine.set(visible=True, color=LINE if item["hit"] else CYCLE[1])
            axes = figure.add_subplot(grid[row, columns + 1])
            axes.axis("off")
            for number, item in enumerate(card["captions"]):
                axes.text(
                    0, 1 - number / len(card["captions"]), item["caption"][:52], va="top",
                    color=INK if item["hit"] else CYCLE[1],
                )  # fmt: skip
        _save(figure, out_png)


@contextlib.contextmanager
def _figure(width: float, height: float, layout: str = "constrained") -> Iterator[Any]:
    """A figure without pyplot and its global state; sizes in inches."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    have = {font.name for font in font_manager.fontManager.ttflist}
    fonts = {"font.family": [name for name in FONTS if name in have] or ["sans-serif"]}
    with matplotlib.rc_context({**STYLE, **fonts}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that no font here has
        yield Figure(figsize=(width, height), layout=layout)


def _save(figure: Any, out_png: str | os.PathLike[str]) -> None:
    with whole_file(Path(out_png)) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def _svg(figure: Any) -> str:
    """An ``<svg>`` for the page: colours by name, no size, no metadata; same input, same bytes."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->| id=\"[a-z]+_\d+\"",
        "",
        text[text.index("<svg") :],
        flags=re.S,
    )
    for name, code in COLOURS.items():
        text = text.replace(code, f"var(--{name})")
    return text
