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

PLAIN = {
    "text_retrieval_recall@1": "image -> text R@1",
    "text_retrieval_recall@5": "image -> text R@5",
    "text_retrieval_recall@10": "image -> text R@10",
    "image_retrieval_recall@1": "text -> image R@1",
    "image_retrieval_recall@5": "text -> image R@5",
    "image_retrieval_recall@10": "text -> image R@10",
    "text_retrieval_median_rank": "image -> text median rank",
}
PER_LABEL = {  # key after "LABEL/"
    "acc1": "zero-shot {}",
    "lp_acc1": "linear probe {}",
    "knn_acc1": "nearest neighbours {}",
    "ari": "k-means ARI {}",
    "ami": "k-means AMI {}",
    "nmi": "k-means NMI {}",
}
GEOMETRY = {
    "modality_gap": "modality gap",
    "alignment": "alignment (pairs' distance²)",
    "image_uniformity": "uniformity of the images",
    "text_uniformity": "uniformity of the texts",
}
CLASSIFIERS = {  # CLIP_benchmark's task -> the names of its metrics
    "zeroshot_classification": ("acc1", "acc5", "mean_per_class_recall"),
    "linear_probe": ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
}


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
        columns = f"{'untrained':>11}" if before else ""
        columns += f"{'trained':>11}{'95 % interval':>20}" + (f"{'change':>11}" if before else "")
        lines = [
            f"{one.title} ({key}): {one.samples:,} images, {one.captions:,} captions",
            " " * 34 + columns,
        ]
        old = before.sets[key].metrics if before and key in before.sets else {}
        for name, words in rows_of(one.metrics):
            first, last = old.get(name, math.nan), one.metrics[name]
            low, high = one.intervals.get(name, (math.nan, math.nan))
            line = f"  {words:<32}" + (f"{_number(first):>11}" if before else "")
            bounds = "" if math.isnan(low) else f"{_number(low)} .. {_number(high)}"
            line += f"{_number(last):>11}{bounds:>20}"
            if before:
                line += f"{_number(last - first, '+', max(abs(first), abs(last))):>11}"
            lines.append(line.rstrip())
        blocks.append("\n".join(lines))
    footer = []
    if timing:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in timing.items())
        text = f"Time: {phases}; together {sum(timing.values()):.1f} s"
        footer += textwrap.wrap(text, 98, subsequent_indent=" " * 6, break_on_hyphens=False)
    if peak_memory_bytes is not None:
        footer.append(f"Peak memory: {peak_memory_bytes / 2**20:,.0f} MiB")
    return "\n\n".join([*blocks, *(["\n".join(footer)] if footer else [])])


def rows_of(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(metric, words) of each row of a table, in its order."""
    labels = dict.fromkeys(name.split("/")[0] for name in metrics if "/" in name)
    of_labels = {
        f"{label}/{key}": words.format(label)
        for key, words in PER_LABEL.items()
        for label in labels
    }
    rows = PLAIN | of_labels | GEOMETRY
    return [(name, words) for name, words in rows.items() if name in metrics]


def _number(value: float, sign: str = "", size: float | None = None) -> str:
    """A value as a table shows it: three digits below 10, one above (of ``size`` if given)."""
    if math.isnan(value):
        return "-"
    small = abs(value if size is None else size) < 10
    return f"{value:{sign}.3f}" if small else f"{value:{sign},.1f}"


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
) -> None:
    """Write ``results.json``, whole or not at all; values that are not finite become null.

    Args:
        path: the file; an older one is replaced.
        after, before, timing, peak_memory_bytes: as in ``format_table``.
        data: the evaluated data, e.g. "builtin:emoji".
        model: OpenCLIP's model name.
        pretrained: the checkpoint.
    """
    content = {
        "data": data,
        "model": model,
        "pretrained": pretrained,
        "trained": results_to_plain(after),
        "untrained": None if before is None else results_to_plain(before),
        "seconds": timing or {},
        "peak_memory_bytes": peak_memory_bytes,
        "clip_benchmark": _finite(records(after, data, model, pretrained)),
    }
    write_atomic(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")


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
            f"results: expected a results.json of protoclip, got {path} ({type(error).__name__}: "
            f"{error}); move it away or choose another --output"
        ) from error
    return content


def results_to_plain(results: Results) -> dict[str, Any]:
    """Results as JSON can hold them, without the hits."""
    kept = ("title", "samples", "captions", "metrics", "intervals")
    sets = {key: {name: getattr(one, name) for name in kept} for key, one in results.sets.items()}
    return _finite({"seconds": results.seconds, "sets": sets})


def results_from_plain(content: Mapping[str, Any]) -> Results:
    """The inverse of ``results_to_plain``."""

    def number(value: float | None) -> float:
        return math.nan if value is None else float(value)

    sets = {}
    for key, one in content["sets"].items():
        metrics = {name: number(value) for name, value in one["metrics"].items()}
        bounds = {
            name: (number(low), number(high)) for name, (low, high) in one["intervals"].items()
        }
        sets[key] = SetResults(one["title"], one["samples"], one["captions"], metrics, bounds)
    return Results(sets, number(content["seconds"]))


def _finite(value: Any) -> Any:
    """The same with None for the numbers that strict JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def records(results: Results, data: str, model: str, pretrained: str) -> list[dict[str, Any]]:
    """One record per set, label and task, as ``clip_benchmark eval --output`` writes it.

    The data set is "DATA/SET/LABEL", without the parts that tell nothing (ALL, class).
    """
    out: list[dict[str, Any]] = []
    for key, one in results.sets.items():
        recalls = {name: v for name, v in one.metrics.items() if "_retrieval_recall@" in name}
        found = [("zeroshot_retrieval", "", recalls)]
        for label in dict.fromkeys(name.split("/")[0] for name in one.metrics if "/" in name):
            own = {name.removeprefix(f"{label}/"): v for name, v in one.metrics.items()}
            for task, names in CLASSIFIERS.items():
                found.append((task, label, {name: own[name] for name in names if name in own}))
        for task, label, values in filter(lambda item: item[2], found):
            if task == "linear_probe":  # ours uses all samples, as they are
                values |= {
                    "weight_decay": one.metrics.get(f"{label}/lp_weight_decay", math.nan),
                    "epochs": int(one.metrics.get(f"{label}/lp_epochs", 0)),
                    "seed": 0,
                    "fewshot_k": -1,
                    "normalized": False,
                }
            parts = [data, "" if key == "ALL" else key, "" if label == "class" else label]
            out.append(
                {
                    "dataset": "/".join(part for part in parts if part),
                    "model": model,
                    "pretrained": pretrained,
                    "task": task,
                    "metrics": values,
                    "language": "en",
                }
            )
    return out


def write_records(folder: str | os.PathLike[str], content: list[dict[str, Any]]) -> None:
    """One file per record, named as CLIP_benchmark names them; ``clip_benchmark build`` reads them.

    Like CLIP_benchmark, values that do not exist (top-5 of four classes) are written as NaN.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for record in content:
        weights = record["pretrained"]
        weights = os.path.basename(weights) if os.path.isfile(weights) else weights
        parts = (record["dataset"], weights, record["model"], record["language"], record["task"])
        name = "_".join(parts).replace("/", "_").strip("_")
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
