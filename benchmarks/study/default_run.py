"""The default run over seeds: ``python -m benchmarks.study.default_run RUN ...`` records it.

RUN are the folders of ``protoclip train --seed N``, of ``--method clip --seed N`` and of that with
as many more ``--epochs`` as a step with prototypes takes longer: CLIP at equal time. Without RUN
only the table of docs/evidence.md is written again, from the record.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.report import table, write_between

BEGIN = "<!-- seeds: begin (python -m benchmarks.study.default_run writes this) -->"
END = "<!-- seeds: end -->"

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "default_run" / "seeds.json"
PROTO = "protoclip"
CLIP = "clip"
EQUAL_TIME = "clip at equal time"
ROWS = (PROTO, CLIP, EQUAL_TIME)
FLOORS = ("chance", "frequent", "pixels", "HOG")


class Metric(NamedTuple):
    """A row of the table."""

    title: str
    part: str  # of the evaluation: NEW or HO
    name: str


METRICS = (
    Metric("NEW: zero-shot, 430 names", "NEW", "concept/acc1"),
    Metric("NEW: zero-shot, top 5", "NEW", "concept/acc5"),
    Metric("NEW: image → text R@5", "NEW", "text_retrieval_recall@5"),
    Metric("NEW: 1-NN, 2,429 concepts", "NEW", "concept/nn_acc1"),
    Metric("NEW: 1-NN, 17 categories", "NEW", "category/nn_acc1"),
    Metric("HO: zero-shot, 71 new names", "HO", "concept/acc1"),
    Metric("HO: k-means AMI of 71 new concepts", "HO", "concept/ami"),
    Metric("HO: k-means AMI of categories", "HO", "category/ami"),
)


class Difference(NamedTuple):
    """ProtoCLIP minus a row of CLIP, with half of the 95 % interval (Welch)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def record(runs: Sequence[Path], commit: str) -> dict[str, Any]:
    """What the tables need of finished runs; "untrained" is the mean over them.

    Raises:
        ValueError: a run is of another method or of CLIP with fewer epochs than ProtoCLIP's, the
            runs of a row differ in length, or a row has fewer than two seeds.
    """
    configs = {run: json.loads((run / "config.json").read_text()) for run in sorted(runs)}
    epochs_of_proto = {
        config["optim"]["epochs"] for config in configs.values() if config["method"] == PROTO
    }
    if len(epochs_of_proto) != 1:
        raise ValueError(f"expected runs of ProtoCLIP of one length, got {epochs_of_proto} epochs")
    (same_samples,) = epochs_of_proto
    seeds: dict[str, dict[str, dict[str, float]]] = {row: {} for row in ROWS}
    epochs: dict[str, float] = {}
    floors: dict[str, dict[str, float]] = {}
    untrained: list[dict[str, float]] = []
    for run, config in configs.items():
        row = config["method"]
        if row not in (PROTO, CLIP):
            raise ValueError(f"{run}: expected --method protoclip or clip, got {row}")
        length = config["optim"]["epochs"]
        if length < same_samples:
            raise ValueError(f"{run}: expected {same_samples:g} epochs or more, got {length:g}")
        if length > same_samples:
            row = EQUAL_TIME
        if epochs.setdefault(row, length) != length:
            raise ValueError(f"{run}: expected {epochs[row]:g} epochs ({row}), got {length:g}")
        results = json.loads((run / "results.json").read_text())
        seeds[row][str(config["run"]["seed"])] = {
            metric.title: value_of(results["trained"], metric) for metric in METRICS
        }
        floors = {name: values_of(results["floors"][name]) for name in FLOORS}
        untrained.append(values_of(results["untrained"]))
    for row, of_row in seeds.items():
        if len(of_row) < 2:
            raise ValueError(f"expected two seeds or more of {row}, got {len(of_row)}")
    floors["untrained"] = {
        title: statistics.fmean(values[title] for values in untrained) for title in untrained[0]
    }
    chance = floors["chance"]
    names = round(1 / chance["NEW: zero-shot, 430 names"])
    chance["NEW: zero-shot, top 5"] = 5 / names
    return {"commit": commit, "epochs": epochs, "floors": floors, "seeds": seeds}


def value_of(parts: dict[str, Any], metric: Metric) -> float:
    return parts[metric.part]["metrics"][metric.name]


def values_of(parts: dict[str, Any]) -> dict[str, float]:
    return {
        metric.title: parts[metric.part]["metrics"][metric.name]
        for metric in METRICS
        if metric.part in parts and metric.name in parts[metric.part]["metrics"]
    }


def of_seeds(recorded: dict[str, Any], row: str, title: str) -> list[float]:
    return [values[title] for values in recorded["seeds"][row].values()]


def difference(recorded: dict[str, Any], title: str, row: str = EQUAL_TIME) -> Difference:
    """ProtoCLIP minus a row of CLIP."""
    ours, clip = (of_seeds(recorded, which, title) for which in (PROTO, row))
    interval = stats.ttest_ind(ours, clip, equal_var=False).confidence_interval(0.95)
    middle = (interval.low + interval.high) / 2
    return Difference(middle, interval.high - middle)


def evidence_table(recorded: dict[str, Any]) -> str:
    """Floors, each row's mean with its lowest and highest seed, and the differences."""
    epochs = {row: f"{number:g} epochs" for row, number in recorded["epochs"].items()}
    lines = []
    for metric in METRICS:
        floors = [
            recorded["floors"][name].get(metric.title, math.nan) for name in (*FLOORS, "untrained")
        ]
        cells = ["–" if math.isnan(floor) or not floor else f"{floor:.3f}" for floor in floors]
        for row in (PROTO, EQUAL_TIME, CLIP):
            values = of_seeds(recorded, row, metric.title)
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} … {max(values):.3f})")
        cells += [str(difference(recorded, metric.title, row)) for row in (EQUAL_TIME, CLIP)]
        lines.append([metric.title, *cells])
    head = ["", "chance", "frequent", "pixels", "HOG", "untrained"]
    head += [f"ProtoCLIP, {epochs[PROTO]}", f"CLIP for as long, {epochs[EQUAL_TIME]}"]
    head += [f"CLIP, {epochs[CLIP]}", "difference at equal time", "at equal samples"]
    return table(head, lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.study.default_run", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to record")
    parser.add_argument("--commit", default="", help="that made the runs")
    args = parser.parse_args(argv)
    if args.runs:
        try:
            text = json.dumps(record(args.runs, args.commit), indent=1)
        except ValueError as error:
            parser.error(str(error))
        RECORD.write_text(text + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    write_between(ROOT / "docs" / "evidence.md", BEGIN, END, evidence_table(recorded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
