"""The outcome of an evaluation: its values, the table people read and the JSON programs read."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from protoclip.data.files import write_atomic
from protoclip.evaluate.records import finite, finite_number, records, write_records

PER_LABEL = (  # key after "LABEL/", words in the table
    ("acc1", "zero-shot {}"),
    ("lp_acc1", "linear probe {}"),
    ("knn_acc1", "nearest neighbours {}"),
    ("mean_average_precision", "zero-shot mAP {}"),
    ("ari", "k-means ARI {}"),
    ("ami", "k-means AMI {}"),
    ("nmi", "k-means NMI {}"),
)
PLAIN = (
    ("text_retrieval_recall@1", "image -> text R@1"),
    ("text_retrieval_recall@5", "image -> text R@5"),
    ("text_retrieval_recall@10", "image -> text R@10"),
    ("image_retrieval_recall@1", "text -> image R@1"),
    ("image_retrieval_recall@5", "text -> image R@5"),
    ("image_retrieval_recall@10", "text -> image R@10"),
    ("text_retrieval_median_rank", "image -> text median rank"),
)
GEOMETRY = (
    ("modality_gap", "modality gap"),
    ("alignment", "alignment (pairs' distance²)"),
    ("image_uniformity", "uniformity of the images"),
    ("text_uniformity", "uniformity of the texts"),
)


@dataclass(frozen=True)
class SetResults:
    """One evaluation set. Metric names are CLIP_benchmark's, after "LABEL/" where there are
    labels: ``text_retrieval_recall@5``, ``group/acc1``, ``group/lp_acc1``, ``group/ami``, ..."""

    title: str
    samples: int  # images
    captions: int
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # 95 %
    hits: Mapping[str, Tensor] = field(default_factory=dict)  # per sample; not kept on disk


@dataclass(frozen=True)
class Results:
    """One model on all evaluation sets."""

    sets: Mapping[str, SetResults]
    seconds: float = math.nan

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Set -> metric -> value."""
        return {name: dict(one.metrics) for name, one in self.sets.items()}


def format_table(
    before: Results | None,
    after: Results,
    timing: Mapping[str, float] | None = None,
    *,
    peak_memory_bytes: int | None = None,
) -> str:
    """The table at the end of a run, at most 100 columns: one block per set, one row per metric.

    Args:
        before: the untrained model; None: those columns stay out.
        after: the trained model.
        timing: phase -> seconds, in the order to be shown.
        peak_memory_bytes: of the process.
    """
    blocks = []
    for key, one in after.sets.items():
        head = f"{one.title} ({key}): {one.samples:,} images, {one.captions:,} captions"
        columns = f"{'untrained':>11}" if before else ""
        columns += f"{'trained':>11}{'95 % interval':>20}" + (f"{'change':>11}" if before else "")
        lines = [head, " " * 34 + columns]
        old = before.sets[key].metrics if before and key in before.sets else {}
        for name, words in rows_of(one.metrics):
            line = f"  {words:<32}"
            if before:
                line += f"{_number(old.get(name)):>11}"
            line += f"{_number(one.metrics[name]):>11}{_bounds(one.intervals.get(name)):>20}"
            if before:
                line += f"{_change(old.get(name), one.metrics[name]):>11}"
            lines.append(line.rstrip())
        blocks.append("\n".join(lines))
    footer = _footer(timing, peak_memory_bytes)
    return "\n\n".join(blocks + ([footer] if footer else []))


def rows_of(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(metric, words) of each row of a table, in its order."""
    labels = list(dict.fromkeys(name.split("/")[0] for name in metrics if "/" in name))
    rows = list(PLAIN)
    for key, words in PER_LABEL:
        rows += [(f"{label}/{key}", words.format(label)) for label in labels]
    return [(name, words) for name, words in (*rows, *GEOMETRY) if name in metrics]


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _bounds(bounds: tuple[float, float] | None) -> str:
    if bounds is None or math.isnan(bounds[0]):
        return ""
    return f"{_number(bounds[0])} .. {_number(bounds[1])}"


def _change(old: float | None, new: float) -> str:
    if old is None or math.isnan(old) or math.isnan(new):
        return "-"
    change = new - old
    return f"{change:+.3f}" if max(abs(old), abs(new)) < 10 else f"{change:+,.1f}"


def _footer(timing: Mapping[str, float] | None, peak_memory_bytes: int | None) -> str:
    lines = []
    if timing:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in timing.items())
        text = f"Time: {phases}; together {sum(timing.values()):.1f} s"
        lines += textwrap.wrap(text, 98, subsequent_indent=" " * 6, break_on_hyphens=False)
    if peak_memory_bytes is not None:
        lines.append(f"Peak memory: {peak_memory_bytes / 2**20:,.0f} MiB")
    return "\n".join(lines)


def write_results(
    path: str | os.PathLike[str],
    after: Results,
    before: Results | None = None,
    *,
    data: str,
    model: str,
    pretrained: str,
    timing: Mapping[str, float] | None = None,
    peak_memory_bytes: int | None = None,
    record_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Write ``results.json``, whole or not at all; values that are not finite become null.

    Args:
        path: the file; an older one is replaced.
        after, before, timing, peak_memory_bytes: as in ``format_table``.
        data: the evaluated data, e.g. "builtin:emoji".
        model: OpenCLIP's model name.
        pretrained: the checkpoint.
        record_folder: where CLIP_benchmark's own files go; None: nowhere.
    """
    own = records(after, data, model, pretrained)
    content = {
        "data": data,
        "model": model,
        "pretrained": pretrained,
        "trained": results_to_plain(after),
        "untrained": None if before is None else results_to_plain(before),
        "seconds": dict(timing or {}),
        "peak_memory_bytes": peak_memory_bytes,
        "clip_benchmark": [finite(one) for one in own],
    }
    write_atomic(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")
    if record_folder is not None:
        write_records(record_folder, own)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``results.json`` as written, "trained" and "untrained" as ``Results`` (or None).

    Raises:
        ValueError: the file is no results.json.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("trained", "untrained"):
            content[name] = None if content[name] is None else results_from_plain(content[name])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results: {path} is no results.json of protoclip ({type(error).__name__}: {error}); "
            "move it away or choose another --output"
        ) from error
    return content


def results_to_plain(results: Results) -> dict[str, Any]:
    """Results as JSON can hold them, without the hits."""
    return {
        "seconds": finite_number(results.seconds),
        "sets": {
            key: {
                "title": one.title,
                "samples": one.samples,
                "captions": one.captions,
                "metrics": {name: finite_number(value) for name, value in one.metrics.items()},
                "intervals": {
                    name: list(map(finite_number, b)) for name, b in one.intervals.items()
                },
            }
            for key, one in results.sets.items()
        },
    }


def results_from_plain(content: Mapping[str, Any]) -> Results:
    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    return Results(
        {
            key: SetResults(
                one["title"],
                one["samples"],
                one["captions"],
                {name: number(value) for name, value in one["metrics"].items()},
                {name: (number(b[0]), number(b[1])) for name, b in one["intervals"].items()},
            )
            for key, one in content["sets"].items()
        },
        number(content["seconds"]),
    )
