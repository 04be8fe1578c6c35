"""The study's picture: differences to CLIP with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.study_rows import BASELINE

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(summary: Mapping[str, Any], shown: Sequence[tuple[str, str, str]], path: Path) -> None:
    """Differences to CLIP with their intervals, one panel a metric."""
    rows = [row for row in summary if row != BASELINE]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(2.2 * len(shown) + 2, 5), sharey=True)
    for axis, (chosen, metric, words) in zip(axes, shown, strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        for place, row in enumerate(rows):
            got = summary[row]["scores"][f"{chosen} {metric}"][f"minus {BASELINE}"]
            if got is not None:
                axis.errorbar(
                    got["mean"], place, xerr=got["half_width"] or 0, fmt="o", color="#1f5fa8"
                )
        axis.set_title(words, fontsize=10)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.supxlabel("difference to CLIP, mean and paired 95 % interval")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
