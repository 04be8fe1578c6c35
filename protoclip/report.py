"""Pictures of a run: the curves of its metrics, and what its prototypes hold."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.data import Labels, PairDataset
from protoclip.ops import segment_mean

INK, MUTED, GRID = "#1f2933", "#66717d", "#e3e7eb"
COLOURS = ("#1f6fb4", "#d1662b", "#2f8f5b", "#8a5fbf", "#b5477a", "#8a7a1f")
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Noto Sans")


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
    panels = [(title, names) for title, names in _panels(list(series)) if names]
    if not panels:
        raise ValueError(
            f"plot_curves: {metrics_jsonl_path} holds no line with 'step' and a loss, scale, lr "
            "or recall; the run stopped before its first log"
        )
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    figure = _figure(5.2 * columns, 3.1 * rows)
    for position, (title, names) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, position + 1)
        _style(axes, title)
        for colour, name in zip(_cycle(len(names)), names, strict=True):
            steps, values = series[name]
            _line(axes, steps, values, colour, _words(name))
        if title == "Recall at 5" or title == "Learning rate":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=MUTED, fontsize=9)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.tight_layout(pad=1.2, h_pad=1.6, w_pad=1.6)
    _save(figure, out_png)


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


def _panels(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Which scalars share a panel, by how they are named."""

    def like(*parts: str) -> list[str]:
        return [name for name in names if any(part in name.lower() for part in parts)]

    def ends(*parts: str) -> list[str]:
        return [name for name in names if name.lower().endswith(parts)]

    return [
        ("Loss (nats)", ends("loss")),
        ("Recall at 5", like("recall@5", "r@5")),
        ("Logit scale", like("logit_scale", "proto_scale")),
        ("Learning rate", [name for name in names if name in ("lr", "learning_rate")]),
    ]


def _words(name: str) -> str:
    """A legend a reader understands: "val_HO_text_retrieval_recall@5" -> "HO image → text"."""
    ways = {"text_retrieval_recall@5": "image → text", "image_retrieval_recall@5": "text → image"}
    for key, words in ways.items():
        if name.endswith(key):
            return f"{name.removesuffix(key).removeprefix('val_').strip('_/')} {words}".strip()
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


def plot_prototypes(
    out_png: str | os.PathLike[str],
    dataset: PairDataset,
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    *,
    index: Tensor | None = None,
    classes: Labels | None = None,
    num_prototypes: int = 12,
    images_per_row: int = 8,
    captions_per_row: int = 4,
    title: str = "Prototypes",
) -> None:
    """A contact sheet: one row per prototype, its nearest images and nearest captions.

    A prototype is the mean of its members' unit features, once per modality. Nearest means by
    cosine among *all* samples; one that is not a member has an orange frame, or orange text.

    Args:
        out_png: the picture; an older one is replaced.
        dataset: where pictures and captions come from.
        image_features, text_features: [N, D] each, e.g. h; lengths do not matter.
        labels: int64 [N], the prototype of each sample; negative: none.
        index: int64 [N], position of each sample in ``dataset``; None: 0 .. N - 1.
        classes: known classes by position in ``dataset``, for purity; None: not shown.
        num_prototypes: rows, spread over the sizes from the largest to the smallest.
        images_per_row, captions_per_row: how many neighbours are shown.
        title: above the sheet.
    Raises:
        ValueError: lengths disagree, or no sample has a prototype.
    """
    n = labels.shape[0]
    where = torch.arange(n) if index is None else index.cpu()
    if image_features.shape[0] != n or text_features.shape[0] != n or where.shape[0] != n:
        raise ValueError(
            "plot_prototypes: expected as many rows of features and index as labels "
            f"({n}), got {image_features.shape[0]}, {text_features.shape[0]} and {where.shape[0]}"
        )
    labels = labels.cpu()
    if not bool((labels >= 0).any()):
        raise ValueError("plot_prototypes: no sample has a prototype (all labels are negative)")
    chosen = _spread_by_size(torch.bincount(labels[labels >= 0]), num_prototypes)
    near_image = _nearest(image_features, labels, chosen, images_per_row)  # [R, images_per_row]
    near_text = _nearest(text_features, labels, chosen, captions_per_row)
    kinds = None if classes is None else classes.ids.cpu()[where]  # [N]
    cell, side = 0.72, 1.55  # inches: a picture, the words at the left
    width = side + cell * near_image.shape[1] + 4.3
    figure = _figure(width, 0.62 + (cell + 0.16) * len(chosen))
    grid = figure.add_gridspec(
        len(chosen),
        near_image.shape[1] + 2,
        width_ratios=[side, *[cell] * near_image.shape[1], 4.3],
        left=0.01,
        right=0.995,
        top=1 - 0.58 / figure.get_figheight(),
        bottom=0.04 / figure.get_figheight(),
        wspace=0.06,
        hspace=0.14,
    )
    y = 1 - 0.22 / figure.get_figheight()
    figure.text(0.012, y, _plain(title), color=INK, fontsize=12, weight="bold", va="center")
    hint = "nearest images and captions of all; orange: not a member"
    figure.text(0.99, y, hint, color=MUTED, fontsize=8.5, va="center", ha="right")
    for row, prototype in enumerate(chosen):
        members = labels == prototype
        _describe(figure.add_subplot(grid[row, 0]), prototype, members, kinds, classes)
        for column, sample in enumerate(near_image[row].tolist()):
            axes = figure.add_subplot(grid[row, 1 + column])
            _picture(axes, dataset.image(int(where[sample])), bool(members[sample]))
        axes = figure.add_subplot(grid[row, near_image.shape[1] + 1])
        captions = [
            (dataset.captions(int(where[sample]))[0], bool(members[sample]))
            for sample in near_text[row].tolist()
        ]
        _captions(axes, captions)
    _save(figure, out_png)


def _spread_by_size(counts: Tensor, rows: int) -> list[int]:
    """Prototypes with members, evenly over the order from the largest to the smallest."""
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[counts[order] > 0]
    rows = min(rows, len(order))
    picks = torch.linspace(0, len(order) - 1, rows).round().long()
    return order[picks].tolist()


def _nearest(features: Tensor, labels: Tensor, chosen: Sequence[int], count: int) -> Tensor:
    """Rows of the samples nearest to the mean of each chosen prototype, int64 [R, <= count]."""
    unit = F.normalize(features.detach().float().cpu(), dim=1)
    renumbered = torch.full((int(labels.max()) + 1,), -1)
    renumbered[torch.tensor(chosen)] = torch.arange(len(chosen))
    own = torch.where(labels >= 0, renumbered[labels.clamp_min(0)], -1)
    kept = own >= 0
    means, _ = segment_mean(unit[kept], own[kept], len(chosen))
    scores = F.normalize(means, dim=1) @ unit.T  # [R, N]
    return scores.topk(min(count, unit.shape[0]), dim=1).indices


def _describe(
    axes: Any, prototype: int, members: Tensor, kinds: Tensor | None, classes: Labels | None
) -> None:
    """The words at the left: number, size, and the commonest class with its share."""
    axes.axis("off")
    size = int(members.sum())
    lines = [f"{size:,} sample{'s' if size != 1 else ''}"]
    if kinds is not None and classes is not None:
        values, counts = torch.unique(kinds[members], return_counts=True)
        best = int(counts.argmax())
        lines.append(f"{counts[best] / size:.0%} {_shorten(classes.names[int(values[best])], 18)}")
    axes.text(0, 0.93, f"#{prototype}", color=INK, fontsize=10, weight="bold", va="top")
    axes.text(0, 0.58, _plain("\n".join(lines)), color=MUTED, fontsize=8, va="top", **_text())


def _picture(axes: Any, picture: Any, member: bool) -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID if member else COLOURS[1])
        spine.set_linewidth(0.8 if member else 1.8)


def _captions(axes: Any, captions: Sequence[tuple[str, bool]]) -> None:
    axes.axis("off")
    for line, (caption, member) in enumerate(captions):
        axes.text(
            0.015,
            0.97 - line * 0.98 / max(len(captions), 1),
            _plain(_shorten(caption, 58)),
            color=INK if member else COLOURS[1],
            fontsize=8,
            va="top",
            **_text(),
        )


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _figure(width: float, height: float) -> Any:
    """A figure with its own Agg canvas: no display, no pyplot, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, out_png: str | os.PathLike[str]) -> None:
    """Write the picture whole or not at all."""
    path = Path(out_png)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, weight="bold", pad=8)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def _cycle(count: int) -> list[str]:
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


def _text() -> dict[str, Any]:
    """Font fallbacks, and "$" as a dollar sign."""
    return {"family": list(_fonts()) or None, "parse_math": False}


def _plain(text: str) -> str:
    """The text with every character that no font here can draw replaced by a middle dot."""
    known = frozenset().union(*_fonts().values())
    return "".join(c if c == "\n" or ord(c) in known else "·" for c in text)
