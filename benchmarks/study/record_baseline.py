"""Record plain CLIP for the report: ``python -m benchmarks.study.record_baseline RUN ...``.

The runs are of ``protoclip train --method clip --seed N``, one a seed, five or more. Of each metric
the mean over them is kept, and where 95 % of further runs fall (a t prediction interval). CLIP at
equal time is trained with more ``--epochs`` than the runs that it stands beside; their number is
``--beside-epochs``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks import machine
from protoclip.evaluate.results import Outcome, SetResults, write_results
from protoclip.report.page import BESIDE_EPOCHS, RECORDED, Run, comparable, read_run


def mean_of(sets: Sequence[SetResults]) -> SetResults:
    """One evaluation set over several seeds."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    factor = stats.t.ppf(0.975, len(sets) - 1) * math.sqrt(1 + 1 / len(sets))
    for name in sets[0].metrics:
        values = [of_seed.metrics.get(name, math.nan) for of_seed in sets]
        if not all(math.isfinite(value) for value in values):  # too few classes: no acc5
            continue
        mean = statistics.fmean(values)
        half_width = factor * statistics.stdev(values)
        metrics[name] = mean
        intervals[name] = (mean - half_width, mean + half_width)
    return dataclasses.replace(sets[0], metrics=metrics, intervals=intervals)


def record(
    runs: Sequence[Run], folder: Path, commit: str, beside_epochs: float | None = None
) -> Outcome:
    """Write config.json and results.json of the mean of runs of a commit.

    Args:
        beside_epochs: length of the runs to compare with; None: as long as these.

    Raises:
        ValueError: the runs are not of plain CLIP, of one setting, of one seed each.
    """
    seeds = [run.config["run"]["seed"] for run in runs]
    first = runs[0].config | {"run": {"seeds": seeds}}
    for run in runs:
        if run.method != "clip" or not run.outcome.trained or not comparable(run.config, first):
            raise ValueError(f"{run.path}: expected a finished run of CLIP, all of one setting")
    if len(set(seeds)) < max(2, len(seeds)):
        raise ValueError(f"expected two runs or more, one a seed, got seeds {seeds}")
    outcome = runs[0].outcome
    sets = {name: mean_of([run.outcome.trained[name] for run in runs]) for name in outcome.trained}
    # A mean has no checkpoint.
    outcome = dataclasses.replace(
        outcome, trained=sets, seeds=len(runs), pretrained="", untrained=None
    )
    date = time.strftime("%Y-%m-%d")
    about = f"{len(runs)} seeds, {date}, {machine.name()}, commit {commit}"
    run_config: dict[str, Any] = {"name": f"plain CLIP, {about}", "seeds": seeds}
    if beside_epochs not in (None, first["optim"]["epochs"]):
        run_config[BESIDE_EPOCHS] = beside_epochs
    config = first | {"run": run_config}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_results(folder / "results.json", outcome)
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study.record_baseline", description=__doc__
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of --method clip")
    parser.add_argument("--out", type=Path, default=RECORDED, help="default: %(default)s")
    words = "epochs of the run that takes as long; default: those of RUN"
    parser.add_argument("--beside-epochs", type=float, help=words)
    words = "that made the runs; default: this tree's (%(default)s)"
    parser.add_argument("--commit", default=machine.describe()["commit"], help=words)
    args = parser.parse_args(argv)
    try:
        record([read_run(path) for path in args.runs], args.out, args.commit, args.beside_epochs)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.out}: {len(args.runs)} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
