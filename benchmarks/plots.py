"""Two plots of a record: InfoNCE against N (time, memory), k-means assignment against K (time)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tables import OURS, plot_names, sweeps

COLOURS = ("#0b62a4", "#c8501e", "#3c8d40", "#7b5aa6", "#8a6d1d")
MARKERS = ("o", "s", "^", "D", "v")


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots the record has rows for as SVG; the same record gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    style = {"svg.hashsalt": "protoclip", "svg.fonttype": "none", "font.size": 9}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    written = []
    with matplotlib.rc_context(style | {"grid.color": "#dddddd", "legend.frameon": False}):
        for name in plot_names(record):
            if name.endswith("info-nce.svg"):
                panels = [("median_ms", "time, ms"), ("peak_mib", "extra memory, MiB")]
                figure = _figure(record, "info_nce", "N", panels)
            else:
                figure = _figure(record, "kmeans_assign", "K", [("median_ms", "time, ms")])
            figure.savefig(folder / name, format="svg", metadata={"Date": None})
            written.append(folder / name)
    return written


def _figure(record: dict[str, Any], op: str, letter: str, panels: list[tuple[str, str]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.1), layout="constrained")
    found = sweeps(record["rows"])
    lines = {key[2]: points for key, points in found.items() if key[:2] == (op, letter)}
    order = sorted(lines, key=lambda variant: (not variant.startswith(OURS), variant))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (field, title) in zip(axes, panels, strict=True):
        for index, variant in enumerate(order):
            points = [r for r in lines[variant] if r[field]]
            axis.plot(
                [r["shape"][letter] for r in points], [r[field] for r in points], label=variant,
                color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                markersize=4, linewidth=2 if variant.startswith(OURS) else 1.2,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=letter, ylabel=title)
        axis.legend()
    first = next(iter(lines.values()))[0]
    fixed = " ".join(f"{k}={v}" for k, v in first["shape"].items() if k != letter)
    machine = record["runs"][-1]["machine"]
    figure.suptitle(f"{op} against {letter} ({fixed}, {first['dtype']}), {machine}", fontsize=9)
    return figure
