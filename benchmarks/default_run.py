"""Record the default run over seeds: ``python -m benchmarks.default_run logs/default_run``.

The folder is that of ``protoclip compare --out logs/default_run`` without other flags, and then of
the command that it prints. Writes ``results/default_run/seeds.json`` and prints the table of
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import table
from protoclip.evaluate.results import Outcome, read_results
from protoclip.report.statistics import LEVEL, paired
from protoclip.settings.comparison import read_record, read_settings

RECORD = Path(__file__).parent / "results" / "default_run" / "seeds.json"
ROWS = ("protoclip", "clip", "clip at equal time")  # in the record
SCORES = {  # title: evaluation set, metric
    "NEW: zero-shot, 430 names": ("NEW", "concept/acc1"),
    "NEW: zero-shot, top 5": ("NEW", "concept/acc5"),
    "NEW: image → text R@5": ("NEW", "text_retrieval_recall@5"),
    "NEW: 1-NN, 2,429 concepts": ("NEW", "concept/nn_acc1"),
    "NEW: 1-NN, 17 categories": ("NEW", "category/nn_acc1"),
    "HO: zero-shot, 71 new names": ("HO", "concept/acc1"),
    "HO: k-means AMI of 71 new concepts": ("HO", "concept/ami"),
    "HO: k-means AMI of categories": ("HO", "category/ami"),
}


def scores_of(results: Any) -> dict[str, float]:
    """The scores of one model, by title."""
    return {
        title: results[key].metrics[metric]
        for title, (key, metric) in SCORES.items()
        if key in results and metric in results[key].metrics
    }


def record(folder: Path, commit: str) -> dict[str, Any]:
    """What the table needs of a comparison's runs, in the form of seeds.json."""
    comparison = read_record(folder)
    rows = dict(zip(("ProtoCLIP", "CLIP", comparison.baseline), ROWS, strict=True))
    runs: dict[str, dict[int, Outcome]] = {
        name: {
            seed: read_results(comparison.folder(row, seed) / "results.json")
            for seed in comparison.result["seeds"]
        }
        for row, name in rows.items()
    }
    every = [outcome for by_seed in runs.values() for outcome in by_seed.values()]
    floors = {name: scores_of(results) for name, results in every[0].floors.items()}
    untrained = [scores_of(outcome.untrained or {}) for outcome in every]
    floors["untrained"] = {
        title: float(np.mean([scores[title] for scores in untrained])) for title in untrained[0]
    }
    epochs = {name: read_settings(folder, row).optim.epochs for row, name in rows.items()}
    seeds = {
        name: {str(seed): scores_of(outcome.trained) for seed, outcome in by_seed.items()}
        for name, by_seed in runs.items()
    }
    return {"commit": commit, "paired": True, "epochs": epochs, "floors": floors, "seeds": seeds}


def evidence_table(recorded: dict[str, Any]) -> str:
    """Means of each row and the paired differences, by score; bold where the interval excludes
    zero."""
    lines = []
    for title in SCORES:
        values = {
            name: np.array([scores[title] for scores in by_seed.values()])
            for name, by_seed in recorded["seeds"].items()
        }
        floors = {name: scores.get(title, 0.0) for name, scores in recorded["floors"].items()}
        best = max(floors, key=lambda name: floors[name])
        ours, clip, equal_time = (values[name] for name in ROWS)
        cells = [f"{floors[best]:.3f} {best}"]
        cells += [f"{side.mean():.3f}" for side in (ours, equal_time, clip)]
        for other in (equal_time, clip):
            test = paired(ours - other)
            words = f"{test.mean:+.3f} ± {test.half:.3f}"
            cells.append(f"**{words}**" if test.p < LEVEL else words)
        lines.append([title, *cells])
    epochs = {name: f"{number:.3g} epochs" for name, number in recorded["epochs"].items()}
    head = ["", "best floor", f"ProtoCLIP, {epochs['protoclip']}"]
    head += [f"CLIP for as long, {epochs['clip at equal time']}", f"CLIP, {epochs['clip']}"]
    return table([*head, "difference at equal time", "at equal samples"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.default_run", description=__doc__)
    parser.add_argument("folder", type=Path, help="of protoclip compare")
    args = parser.parse_args(argv)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    recorded = record(args.folder, commit.stdout.strip())
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(evidence_table(recorded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
