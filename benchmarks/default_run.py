"""The default run over seeds: ``python -m benchmarks.default_run RUN ...`` records it.

RUN are the folders of ``protoclip train --seed N`` and of ``--method clip --seed N``. Without RUN
only the tables of docs/evidence.md and README.md are written again, from the record.
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

BEGIN = "<!-- seeds: begin (python -m benchmarks.default_run writes this) -->"
END = "<!-- seeds: end -->"

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "default_run" / "seeds.json"
METHODS = ("protoclip", "clip")
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
README_ROWS = {
    "NEW: zero-shot, 430 names": "names it at once, of 430 names",
    "NEW: zero-shot, top 5": "the right name among five",
    "NEW: 1-NN, 2,429 concepts": "nearest trained drawing shows the same",
    "HO: k-means AMI of 71 new concepts": "groups of 71 concepts it never saw, AMI",
}
FLOOR_WORDS = {
    "chance": "chance",
    "frequent": "the most frequent",
    "pixels": "pixels",
    "HOG": "HOG, no training",
    "untrained": "untrained",
}


class Difference(NamedTuple):
    """ProtoCLIP minus CLIP, with half of the 95 % interval (Welch)."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}"


def record(runs: Sequence[Path], commit: str) -> dict[str, Any]:
    """What the tables need of finished runs; "untrained" is the mean over them.

    Raises:
        ValueError: a run is of another method.
    """
    seeds: dict[str, dict[str, dict[str, float]]] = {method: {} for method in METHODS}
    floors: dict[str, dict[str, float]] = {}
    untrained: list[dict[str, float]] = []
    for run in sorted(runs):
        config = json.loads((run / "config.json").read_text())
        results = json.loads((run / "results.json").read_text())
        if config["method"] not in METHODS:
            raise ValueError(f"{run}: expected --method protoclip or clip, got {config['method']}")
        seeds[config["method"]][str(config["run"]["seed"])] = {
            metric.title: value_of(results["trained"], metric) for metric in METRICS
        }
        floors = {name: values_of(results["floors"][name]) for name in FLOORS}
        untrained.append(values_of(results["untrained"]))
    floors["untrained"] = {
        title: statistics.fmean(values[title] for values in untrained) for title in untrained[0]
    }
    chance = floors["chance"]
    names = round(1 / chance["NEW: zero-shot, 430 names"])
    chance["NEW: zero-shot, top 5"] = 5 / names
    return {"commit": commit, "floors": floors, "seeds": seeds}


def value_of(parts: dict[str, Any], metric: Metric) -> float:
    return parts[metric.part]["metrics"][metric.name]


def values_of(parts: dict[str, Any]) -> dict[str, float]:
    return {
        metric.title: parts[metric.part]["metrics"][metric.name]
        for metric in METRICS
        if metric.part in parts and metric.name in parts[metric.part]["metrics"]
    }


def of_seeds(recorded: dict[str, Any], method: str, title: str) -> list[float]:
    return [values[title] for values in recorded["seeds"][method].values()]


def difference(recorded: dict[str, Any], title: str) -> Difference:
    ours, clip = (of_seeds(recorded, method, title) for method in METHODS)
    interval = stats.ttest_ind(ours, clip, equal_var=False).confidence_interval(0.95)
    middle = (interval.low + interval.high) / 2
    return Difference(middle, interval.high - middle)


def evidence_table(recorded: dict[str, Any]) -> str:
    """Floors, both methods with their lowest and highest seed, and the difference."""
    lines = []
    for metric in METRICS:
        floors = [
            recorded["floors"][name].get(metric.title, math.nan) for name in (*FLOORS, "untrained")
        ]
        cells = ["–" if math.isnan(floor) or not floor else f"{floor:.3f}" for floor in floors]
        for method in METHODS:
            values = of_seeds(recorded, method, metric.title)
            cells.append(f"{statistics.fmean(values):.3f} ({min(values):.3f} … {max(values):.3f})")
        lines.append([metric.title, *cells, str(difference(recorded, metric.title))])
    head = ["", "chance", "frequent", "pixels", "HOG", "untrained", "ProtoCLIP", "CLIP"]
    return table([*head, "difference"], lines)


def readme_table(recorded: dict[str, Any]) -> str:
    """The means of four rows, the best of a row in bold, and two differences."""
    lines = []
    for title, words in README_ROWS.items():
        means = [statistics.fmean(of_seeds(recorded, method, title)) for method in METHODS]
        floors = {name: values.get(title, 0.0) for name, values in recorded["floors"].items()}
        name = max(floors, key=lambda floor: floors[floor])
        best = max(*means, floors[name])
        cells = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in (*means, floors[name])]
        cells[-1] += f" ({FLOOR_WORDS[name]})"
        lines.append([words, *cells])
    first, third = (
        difference(recorded, f"NEW: {title}")
        for title in ("zero-shot, 430 names", "1-NN, 2,429 concepts")
    )
    sides = [f"{abs(d.mean):.3f} ± {d.half_width:.3f}" for d in (first, third)]
    where = ["behind" if d.mean < 0 else "ahead of" for d in (first, third)]
    text = (
        f"After the same number of samples ProtoCLIP is {sides[0]} {where[0]} CLIP in the first row"
        f" and {sides[1]} {where[1]} it\nin the third ([evidence](docs/evidence.md#the-default-run)"
        "); equal time, which costs it 5 to 9 % of its samples, is not\nmeasured here."
    )
    return table(["", "ProtoCLIP", "CLIP", "best floor"], lines) + "\n\n" + text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.default_run", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders to record")
    parser.add_argument("--commit", default="", help="that made the runs")
    args = parser.parse_args(argv)
    if args.runs:
        text = json.dumps(record(args.runs, args.commit), indent=1)
        RECORD.write_text(text + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    write_between(ROOT / "docs" / "evidence.md", BEGIN, END, evidence_table(recorded))
    write_between(ROOT / "README.md", BEGIN, END, readme_table(recorded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
