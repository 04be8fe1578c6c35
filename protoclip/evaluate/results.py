"""The outcome of an evaluation: its values, a table for people and JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protoclip.common.files import short_name, write_atomic
from protoclip.common.json_text import parse_json

ROWS = {  # metric -> its row in a table; {}: the label before the metric's name
    "text_retrieval_recall@1": "image -> text R@1",
    "text_retrieval_recall@5": "image -> text R@5",
    "text_retrieval_recall@10": "image -> text R@10",
    "image_retrieval_recall@1": "text -> image R@1",
    "image_retrieval_recall@5": "text -> image R@5",
    "image_retrieval_recall@10": "text -> image R@10",
    "text_retrieval_median_rank": "image -> text median rank",
    "acc1": "zero-shot {}",
    "lp_acc1": "linear probe {}",
    "knn_acc1": "nearest neighbours {}",
    "nn_acc1": "1-NN {}",
    "ari": "k-means ARI {}",
    "ami": "k-means AMI {}",
    "nmi": "k-means NMI {}",
    "modality_gap": "modality gap",
    "alignment": "alignment (distance²)",
    "image_uniformity": "uniformity of the images",
    "text_uniformity": "uniformity of the texts",
}
FIRST = ("/acc1", "nn_acc1", "ami")  # the rows at the top of a table
FLOORS = {  # what needs no training -> its meaning, in the order of a table's columns
    "chance": "guessing",
    "frequent": "always the most frequent class",
    "pixels": "12 x 12 pixels as features",
    "HOG": "histograms of oriented gradients as features",
}
RECORDS = {  # CLIP_benchmark's task -> the names of its metrics
    "zeroshot_retrieval": tuple(name for name in ROWS if "recall" in name),
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
    different_captions: int | None = None  # None: not counted, or all differ
    fingerprint: str = ""  # of its keys and captions, or stored features; "": not known

    @property
    def number_of_captions(self) -> str:
        """In words, how many captions a picture is compared with."""
        if self.different_captions is None or self.different_captions == self.captions:
            return f"{self.captions:,} captions"
        return f"{self.different_captions:,} different captions"


TRAIN = "TRAIN"  # the key of a set of pairs that the model was trained on
NOTHING = SetResults("", 0, 0, {})
Results = Mapping[str, SetResults]  # one model on all evaluation sets, by short name


def value_of(results: Results, key: str, metric: str) -> float:
    """A metric on an evaluation set; NaN if the results have none."""
    return results.get(key, NOTHING).metrics.get(metric, math.nan)


@dataclass(frozen=True)
class Outcome:
    """What ``results.json`` holds."""

    data: str  # e.g. "builtin:icons"
    model: str  # OpenCLIP's name
    pretrained: str  # the checkpoint or tag
    trained: Results
    untrained: Results | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase, in the order to show
    # Of training and of phases that are not training: CPU time on a CPU, else by the clock.
    work_seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    floors: Mapping[str, Results] = field(default_factory=dict)  # by ``FLOORS``: without a model
    training_data: str = ""  # fingerprint of what the model trained on; "": not known
    steps: int = 0  # of training
    skipped_steps: int = 0  # those whose loss or gradient was not finite
    first_prototype_step: int = 0  # counted from 1; 0: the method has no prototypes
    shared_machine: bool | None = None  # whether it trained beside other runs; None: not known

    @property
    def beside(self) -> dict[str, Results]:
        """The results to show next to the trained model, as far as they exist."""
        columns = {**self.floors, "untrained": self.untrained}
        return {name: results for name, results in columns.items() if results}

    @property
    def skipped(self) -> str:
        """A sentence about skipped steps, "" without any."""
        if not self.skipped_steps:
            return ""
        return (
            f"{self.skipped_steps:,} of {self.steps:,} steps were skipped, because loss or "
            "gradient was not finite; out.log names them"
        )


def format_table(outcome: Outcome) -> str:
    """The table at the end of a run: one block per set, one row per metric.

    Other columns show the floors and the untrained model, if known.
    """
    columns = outcome.beside
    heads = [*columns, "trained", "95 % interval"]
    widths = [max(len(head) + 1, 7) for head in [*columns, "trained"]] + [16]
    if columns:  # the difference to the last of the other columns
        heads.append("change")
        widths.append(9)

    def line(words: str, cells: Sequence[str]) -> str:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        return f"  {words:<27}{''.join(padded)}"

    blocks = []
    for key, trained in outcome.trained.items():
        size = f"{trained.samples:,} images"
        if trained.captions:
            size += f", {trained.number_of_captions}"
        lines = [f"{trained.title} ({key}): {size}", line("", heads)]
        for score in scores_of({key: trained}):
            values_beside = [value_of(beside, key, score.metric) for beside in columns.values()]
            cells = [number(x) for x in [*values_beside, score.value]]
            cells.append(" .. ".join(map(number, trained.intervals.get(score.metric, ()))))
            if columns:
                cells.append(number(score.value - values_beside[-1], "+"))
            lines.append(line(score.words, cells).rstrip())
        blocks.append("\n".join(lines))
    footer = []
    if outcome.floors:
        meanings = (f"{name}: {FLOORS.get(name, name)}" for name in outcome.floors)
        footer += textwrap.wrap("; ".join(meanings), 98, subsequent_indent="  ")
    if outcome.seconds:
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in outcome.seconds.items())
        text = f"Time: {phases}; together {sum(outcome.seconds.values()):.1f} s"
        footer += textwrap.wrap(text, 98, subsequent_indent=" " * 6, break_on_hyphens=False)
    if outcome.peak_memory_bytes is not None:
        footer.append(f"Peak memory: {outcome.peak_memory_bytes / 2**20:,.0f} MiB")
    if footer:
        blocks.append("\n".join(footer))
    return "\n\n".join(blocks)


@dataclass(frozen=True)
class Score:
    """A metric of a model on an evaluation set; equal to another of the same metric and set."""

    key: str  # of the set
    metric: str
    value: float = field(default=math.nan, compare=False)
    samples: int = field(default=0, compare=False)  # images
    fingerprint: str = field(default="", compare=False)  # of what it was measured on
    title: str = field(default="", compare=False)  # of the set

    @property
    def words(self) -> str:
        label, _, metric = self.metric.rpartition("/")
        return ROWS[metric].format(label)


def scores_of(results: Results) -> list[Score]:
    """The scores of a table's rows, in their order."""
    scores = []
    for key, of_set in results.items():
        names = sorted(of_set.metrics, key=lambda name: not name.endswith(FIRST))  # is stable
        scores += [
            Score(key, name, of_set.metrics[name], of_set.samples, of_set.fingerprint, of_set.title)
            for name in names
            if name.rpartition("/")[2] in ROWS
        ]
    return scores


def number(value: float, sign: str = "") -> str:
    """A metric with three decimals, or one if large; ``sign="+"`` is for differences."""
    if math.isnan(value):
        return "-"
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign},.1f}"


def write_results(path: str | os.PathLike[str], outcome: Outcome) -> None:
    """Write ``results.json`` completely or not at all; non-finite values become null."""
    content = json.dumps(dataclasses.asdict(outcome))
    strict = json.loads(content, parse_constant=lambda name: None)  # NaN and infinity are not JSON
    write_atomic(Path(path), json.dumps(strict, indent=1) + "\n")


def read_results(path: str | os.PathLike[str]) -> Outcome:
    """The outcome as written, except that infinity is read as NaN.

    Raises:
        ValueError: the file is not a results.json.
    """
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
        content["floors"] = {name: _read_sets(sets) for name, sets in content["floors"].items()}
        content["trained"] = _read_sets(content["trained"])
        if content.get("untrained") is not None:
            content["untrained"] = _read_sets(content["untrained"])
        return Outcome(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"results: expected a results.json of protoclip, got {path} ({type(error).__name__}: "
            f"{error}); move it away or choose another --out"
        ) from error


def _read_sets(sets: Mapping[str, Any]) -> Results:
    return {key: _read_set(content) for key, content in sets.items()}


def _read_set(content: Mapping[str, Any]) -> SetResults:
    metrics = {name: math.nan if x is None else float(x) for name, x in content["metrics"].items()}
    return SetResults(**{**content, "metrics": metrics})


def write_records(folder: Path, outcome: Outcome) -> None:
    """Write a file per set, label and task, named and formed as by ``clip_benchmark eval``.

    The data set is "DATA/SET/LABEL", without uninformative parts (ALL, class). As there, values
    that do not exist (top-5 of four classes) are written as NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = outcome.pretrained
    weights = os.path.basename(weights) if os.path.isfile(weights) else weights
    for key, results in outcome.trained.items():
        metrics = results.metrics
        for label in dict.fromkeys(name.rpartition("/")[0] for name in metrics):
            prefix = f"{label}/" if label else ""
            parts = [outcome.data, *(x for x in (key, label) if x not in ("ALL", "class", ""))]
            for task, names in RECORDS.items():
                values: dict[str, Any] = {
                    name: metrics[prefix + name] for name in names if prefix + name in metrics
                }
                if not values:
                    continue
                if task == "linear_probe":  # ours uses all samples, not normalised
                    for name in ("weight_decay", "epochs"):
                        values[name] = metrics[f"{prefix}lp_{name}"]
                    values |= {"seed": 0, "fewshot_k": -1, "normalized": False}
                record = {
                    "dataset": "/".join(parts),
                    "model": outcome.model,
                    "pretrained": outcome.pretrained,
                    "task": task,
                    "metrics": values,
                    "language": "en",
                }
                name = "_".join([*parts, weights, outcome.model, "en", task]).replace("/", "_")
                path = folder / f"{short_name(name.strip('_'))}.json"
                write_atomic(path, json.dumps(record))
