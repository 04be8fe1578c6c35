"""Curves of a run's metrics."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from protoclip.report.style import INK, MUTED, cycle, new_figure, save, style_axes


def plot_curves(
    metrics_jsonl_path: str | os.PathLike[str], out_png: str | os.PathLike[str]
) -> None:
    """Draw a run's losses, temperatures, learning rate and recalls over its steps.

    Panels without a value stay out. Broken last lines (a run that was killed) are skipped.

    Args:
        metrics_jsonl_path: one JSON object a line: ``step`` and any scalars by name.
        out_png: the picture; an older one is replaced.
    Raises:
        ValueError: no line with a step and a number.
    """
    series = read_series(metrics_jsonl_path)
    shown = panels(list(series))
    if not shown:
        raise ValueError(
            f"plot_curves: {metrics_jsonl_path} holds no line with 'step' and a loss, scale, lr "
            "or recall; the run stopped before its first log"
        )
    columns = 2 if len(shown) > 1 else 1
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(5.2 * columns, 3.1 * rows)
    for position, (title, names) in enumerate(shown):
        axes = figure.add_subplot(rows, columns, position + 1)
        style_axes(axes, title)
        for colour, name in zip(cycle(len(names)), names, strict=True):
            steps, values = series[name]
            _line(axes, steps, values, colour, words_of(name))
        if title == "Recall at 5" or title == "Learning rate":
            axes.set_ylim(bottom=0)
        if title == "Recall at 5":  # recalls level off at the top: room for the legend above them
            axes.set_ylim(top=1.5 * axes.get_ylim()[1])
        if title == "Logit scale":  # a drift in the second decimal is no curve
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, high - 2), max(high, low + 2))
        axes.set_xlabel("step", color=MUTED, fontsize=9)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.tight_layout(pad=1.2, h_pad=1.6, w_pad=1.6)
    save(figure, out_png)


def read_series(
    metrics_jsonl_path: str | os.PathLike[str],
) -> dict[str, tuple[list[float], list[float]]]:
    """Scalar name -> its steps and values, from ``metrics.jsonl``; non-finite values are kept."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in Path(metrics_jsonl_path).read_text(encoding="utf-8").splitlines():
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


def panels(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(title, scalars) of each panel: which scalars share one, by how they are named."""

    def like(*parts: str) -> list[str]:
        return [name for name in names if any(part in name.lower() for part in parts)]

    def ends(*parts: str) -> list[str]:
        return [name for name in names if name.lower().endswith(parts)]

    losses = ends("loss")
    if len(losses) > 1:  # the total jumps where a term comes in, and flattens the terms
        losses = [name for name in losses if name != "loss"]
    found = [
        ("Loss (nats)", losses),
        ("Recall at 5", like("recall@5", "r@5")),
        ("Zero-shot accuracy", ends("/acc1")),
        ("Logit scale", [n for n in like("logit_scale", "proto_scale") if not n.endswith("_raw")]),
        ("Learning rate", [name for name in names if name in ("lr", "learning_rate")]),
    ]
    return [(title, own) for title, own in found if own]


def words_of(name: str) -> str:
    """A legend a reader understands: "val_HO_text_retrieval_recall@5" -> "HO image → text"."""
    ways = {"text_retrieval_recall@5": "image → text", "image_retrieval_recall@5": "text → image"}
    for key, words in ways.items():
        if name.endswith(key):
            return f"{name.removesuffix(key).removeprefix('val_').strip('_/')} {words}".strip()
    if name.startswith("val_"):  # "val_HO_group/acc1" -> "HO group"
        return name.removeprefix("val_").removesuffix("/acc1").replace("_", " ")
    return name.replace("_", " ")


def _line(axes: Any, steps: list[float], values: list[float], colour: str, label: str) -> None:
    """A series: dots when sparse; when dense, pale raw values under a running mean."""
    if len(steps) <= 40:
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5, lw=1.6, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
    axes.plot(steps, _running_mean(values), color=colour, lw=1.6, label=label)


def _running_mean(values: list[float], share: float = 0.03) -> list[float]:
    """Mean over a centred window of a share of the series, shorter at both ends."""
    x = torch.tensor(values, dtype=torch.float64)
    half = max(1, round(len(values) * share / 2))
    total = F.pad(x.cumsum(0), (1, 0))
    position = torch.arange(len(values))
    low, high = (position - half).clamp_min(0), (position + half + 1).clamp_max(len(values))
    return ((total[high] - total[low]) / (high - low)).tolist()
