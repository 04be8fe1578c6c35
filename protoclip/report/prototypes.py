"""What the prototypes hold: a contact sheet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.data import Labels, PairDataset
from protoclip.ops import segment_mean
from protoclip.report.style import COLOURS, GRID, INK, MUTED, drawable, new_figure, save, text_style


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
    chosen = spread_by_size(torch.bincount(labels[labels >= 0]), num_prototypes)
    near_image = nearest_samples(
        image_features, labels, chosen, images_per_row
    )  # [R, images_per_row]
    near_text = nearest_samples(text_features, labels, chosen, captions_per_row)
    kinds = None if classes is None else classes.ids.cpu()[where]  # [N]
    cell, side = 0.72, 1.55  # inches: a picture, the words at the left
    width = side + cell * near_image.shape[1] + 3.5
    figure = new_figure(width, 0.62 + (cell + 0.16) * len(chosen))
    grid = figure.add_gridspec(
        len(chosen),
        near_image.shape[1] + 2,
        width_ratios=[side, *[cell] * near_image.shape[1], 3.5],
        left=0.01,
        right=0.995,
        top=1 - 0.58 / figure.get_figheight(),
        bottom=0.04 / figure.get_figheight(),
        wspace=0.06,
        hspace=0.14,
    )
    y = 1 - 0.22 / figure.get_figheight()
    figure.text(0.012, y, drawable(title), color=INK, fontsize=12, weight="bold", va="center")
    hint = "nearest of all images and captions; orange: not in the prototype"
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
    save(figure, out_png)


def spread_by_size(counts: Tensor, rows: int) -> list[int]:
    """Prototypes with members, evenly over the order from the largest to the smallest."""
    order = torch.argsort(counts, descending=True, stable=True)
    order = order[counts[order] > 0]
    rows = min(rows, len(order))
    picks = torch.linspace(0, len(order) - 1, rows).round().long()
    return order[picks].tolist()


def nearest_samples(
    features: Tensor,
    labels: Tensor,
    chosen: Sequence[int],
    count: int,
    *,
    members_first: bool = False,
) -> Tensor:
    """Rows of the samples nearest to the mean of each chosen prototype, int64 [R, <= count]."""
    unit = F.normalize(features.detach().float().cpu(), dim=1)
    renumbered = torch.full((int(labels.max()) + 1,), -1)
    renumbered[torch.tensor(chosen)] = torch.arange(len(chosen))
    own = torch.where(labels >= 0, renumbered[labels.clamp_min(0)], -1)
    kept = own >= 0
    means, _ = segment_mean(unit[kept], own[kept], len(chosen))
    scores = F.normalize(means, dim=1) @ unit.T  # [R, N]
    if members_first:  # cosines differ by 2 at most
        scores[own[kept], kept.nonzero().flatten()] += 3
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
    axes.text(
        0, 0.58, drawable("\n".join(lines)), color=MUTED, fontsize=8, va="top", **text_style()
    )


def _picture(axes: Any, picture: Any, member: bool) -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID if member else COLOURS[1])
        spine.set_linewidth(0.8 if member else 1.3)


def _captions(axes: Any, captions: Sequence[tuple[str, bool]]) -> None:
    axes.axis("off")
    for line, (caption, member) in enumerate(captions):
        axes.text(
            0.015,
            0.97 - line * 0.98 / max(len(captions), 1),
            drawable(_shorten(caption, 52)),
            color=INK if member else COLOURS[1],
            fontsize=8,
            va="top",
            **text_style(),
        )


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
