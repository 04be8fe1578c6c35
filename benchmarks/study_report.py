"""From finished runs of the study to summary.json, plot.png and docs/evidence.md."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import write_between
from benchmarks.report import table

PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
BEGIN, END = "<!-- study: begin, written by make study -->", "<!-- study: end -->"
BASELINE = "CLIP"
EQUAL_TIME = "CLIP, time of ProtoCLIP"
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1, 2, ... degrees
SHOWN = {  # in the page and the plot: set and metric -> heading
    "HO group/lp_acc1": "probe, held out",
    "HO subgroup/lp_acc1": "probe 98, held out",
    "NOTO group/lp_acc1": "probe, Noto",
    "NOTO subgroup/lp_acc1": "probe 98, Noto",
    "HO group/ami": "AMI, held out",
    "NOTO group/ami": "AMI, Noto",
    "HO text_retrieval_recall@5": "R@5, held out",
    "NOTO text_retrieval_recall@5": "R@5, Noto",
}
Run = Mapping[str, Any]
Values = Mapping[int, float]  # by seed


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half width of its 95 % t interval; None for a single value."""
    mean, half = statistics.fmean(values), None
    if len(values) > 1:
        t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
        half = t * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "half_width": half}


def difference(values: Values, others: Values) -> dict[str, float | None] | None:
    """The mean difference over the seeds that both have, paired."""
    both = sorted(values.keys() & others.keys())
    return interval([values[seed] - others[seed] for seed in both]) if both else None


def summarise(runs: Sequence[Run], rows: Sequence[str]) -> dict[str, Any]:
    """Row -> seeds, epochs, CPU seconds, and by set and metric: mean, and differences."""
    by_row = {row: {run["seed"]: run for run in runs if run["row"] == row} for row in rows}

    def values(row: str, key: str) -> Values:
        chosen, _, metric = key.partition(" ")
        own = by_row.get(row, {})
        return {seed: run["metrics"][chosen][metric] for seed, run in own.items()}

    summary: dict[str, Any] = {}
    for row, own in by_row.items():
        if not own:
            continue
        scores: dict[str, Any] = {}
        known = next(iter(own.values()))["metrics"]
        for key in (f"{chosen} {metric}" for chosen in known for metric in known[chosen]):
            mine = values(row, key)
            scores[key] = interval(list(mine.values()))
            for other in (BASELINE, EQUAL_TIME):
                if other != row:
                    found = difference(mine, values(other, key))
                    scores[key][f"minus {other}"] = found
        both = own.keys() & by_row.get(BASELINE, {}).keys()
        plain = sum(by_row[BASELINE][seed]["cpu_seconds"] for seed in both) if both else None
        summary[row] = {
            "seeds": sorted(own),
            "epochs": next(iter(own.values()))["epochs"],
            "cpu_seconds": statistics.fmean(run["cpu_seconds"] for run in own.values()),
            "cpu_ratio": sum(own[seed]["cpu_seconds"] for seed in both) / plain if plain else None,
            "scores": scores,
        }
    return summary


def cell(found: Mapping[str, float] | None) -> str:
    """A difference with its interval; bold where the interval leaves out zero."""
    if found is None:
        return "–"
    mean, half = found["mean"], found["half_width"]
    if half is None:
        return f"{mean:+.3f}"
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def short_table(summary: Mapping[str, Any]) -> str:
    """Differences to CLIP in the metrics of ``SHOWN``; CLIP's own values in its row."""
    rows = []
    for row, record in summary.items():
        cost = record["cpu_ratio"]
        line = [row, str(len(record["seeds"])), "–" if cost is None else f"{cost:.2f}×"]
        for key in SHOWN:
            score = record["scores"][key]
            plain = row == BASELINE
            line.append(f"{score['mean']:.3f}" if plain else cell(score[f"minus {BASELINE}"]))
        rows.append(line)
    return table(["", "seeds", "CPU time", *SHOWN.values()], rows)


def section(summary: Mapping[str, Any], out: Path) -> str:
    """What the page shows."""
    selection = json.loads((out / "selection.json").read_text())
    counts = sorted({len(record["seeds"]) for record in summary.values()}) or [0]
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    seeds += "" if counts[0] >= 5 else " so far, of five: unfinished, no conclusion yet"
    intro = (
        f"Seeds a row: {seeds}. Differences to CLIP of the same seed, samples, augmentation "
        "and optimiser, with their paired 95 % intervals, bold where zero lies outside. "
        f"Settings were chosen on other concepts ({len(selection['seeds'])} seeds): ProtoCLIP "
        f"'{selection['ProtoCLIP']['chosen']}', distillation "
        f"'{selection['distillation']['chosen']}'. CPU time is that of the whole command, beside "
        "CLIP's."
    )
    return f"{intro}\n\n{short_table(summary)}"


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Differences to CLIP with their intervals, one panel a metric."""
    from matplotlib.figure import Figure

    rows = [row for row in summary if row != BASELINE]
    figure = Figure(figsize=(2.2 * len(SHOWN) + 2, 5), layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    for axis, (key, words) in zip(axes, SHOWN.items(), strict=True):
        axis.axvline(0, color="0.6", linewidth=1)
        axis.set_title(words, fontsize=10)
        for place, row in enumerate(rows):
            found = summary[row]["scores"][key][f"minus {BASELINE}"]
            if found is not None:
                axis.errorbar(
                    found["mean"], place, xerr=found["half_width"] or 0, fmt="o", color="C0"
                )
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.supxlabel("difference to CLIP, mean and paired 95 % interval")
    figure.savefig(path, dpi=110)


def write_report(runs: Sequence[Run], rows: Sequence[str], out: Path, quick: bool) -> None:
    """Write the files, print the section, and put it into the page unless ``quick``."""
    summary = summarise(runs, rows)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = section(summary, out)
    if len(summary) > 1:
        plot(summary, out / "plot.png")
    print(text)
    if not quick:
        write_between(PAGE, BEGIN, END, text)
