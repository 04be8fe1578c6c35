"""From finished runs to table.md, summary.json, plot.png and the README's section."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_rows import BASELINE, EQUAL_TIME

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- study: begin, written by make study -->", "<!-- study: end -->"
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of 1, 2, ... degrees

SETS = {"HO": "held-out concepts", "NOTO": "Noto style"}
METRICS = {  # name in the results -> words
    "group/lp_acc1": "linear probe, 9 groups",
    "subgroup/lp_acc1": "linear probe, 98 subgroups",
    "group/knn_acc1": "nearest neighbours, groups",
    "subgroup/knn_acc1": "nearest neighbours, subgroups",
    "group/acc1": "zero-shot, groups",
    "group/ami": "AMI, groups",
    "subgroup/ami": "AMI, subgroups",
    "group/ari": "ARI, groups",
    "subgroup/ari": "ARI, subgroups",
    "text_retrieval_recall@1": "image to text R@1",
    "text_retrieval_recall@5": "image to text R@5",
    "text_retrieval_recall@10": "image to text R@10",
    "image_retrieval_recall@1": "text to image R@1",
    "image_retrieval_recall@5": "text to image R@5",
    "image_retrieval_recall@10": "text to image R@10",
    "modality_gap": "modality gap",
}
SHOWN = (  # in the README and the plot: set, metric, heading
    ("HO", "group/lp_acc1", "probe, held out"),
    ("HO", "subgroup/lp_acc1", "probe 98, held out"),
    ("NOTO", "group/lp_acc1", "probe, Noto"),
    ("NOTO", "subgroup/lp_acc1", "probe 98, Noto"),
    ("HO", "group/ami", "AMI, held out"),
    ("NOTO", "group/ami", "AMI, Noto"),
    ("HO", "text_retrieval_recall@5", "R@5, held out"),
    ("NOTO", "text_retrieval_recall@5", "R@5, Noto"),
)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t interval; infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.inf
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))


def paired(
    runs: Sequence[Mapping[str, Any]], row: str, against: str, chosen: str, metric: str
) -> list[float]:
    """Differences, seed by seed, of the seeds that both rows have."""
    values: dict[str, dict[int, float]] = {row: {}, against: {}}
    for run in runs:
        if run["row"] in values:
            values[run["row"]][run["seed"]] = run["metrics"][chosen][metric]
    both = sorted(values[row].keys() & values[against].keys())
    return [values[row][seed] - values[against][seed] for seed in both]


def summarise(runs: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> dict[str, Any]:
    """Row -> seeds, CPU seconds, seconds by phase, and by set and metric: mean, and differences."""
    summary = {}
    for row in rows:
        own = [run for run in runs if run["row"] == row]
        if not own:
            continue
        scores: dict[str, Any] = {}
        for chosen in SETS:
            for metric in METRICS:
                mean, half = interval([run["metrics"][chosen][metric] for run in own])
                scores[f"{chosen} {metric}"] = {
                    "mean": mean,
                    "half_width": _plain(half),
                    **{
                        f"minus {other}": _difference(runs, row, other, chosen, metric)
                        for other in (BASELINE, EQUAL_TIME)
                        if other != row
                    },
                }
        phases = {name: 0.0 for run in own for name in run["seconds"]}
        for name in phases:
            phases[name] = statistics.fmean(run["seconds"].get(name, 0.0) for run in own)
        summary[row] = {
            "seeds": sorted(run["seed"] for run in own),
            "epochs": own[0]["epochs"],
            "cpu_ratio": cpu_ratio(runs, row),
            "training_cpu_seconds": statistics.fmean(run["training_cpu_seconds"] for run in own),
            "seconds": phases,
            "scores": scores,
        }
    return summary


def cpu_ratio(runs: Sequence[Mapping[str, Any]], row: str) -> float | None:
    """CPU time of training beside CLIP's, over the seeds that both have."""
    seconds: dict[str, dict[int, float]] = {row: {}, BASELINE: {}}
    for run in runs:
        if run["row"] in seconds:
            seconds[run["row"]][run["seed"]] = run["training_cpu_seconds"]
    both = seconds[row].keys() & seconds[BASELINE].keys()
    if not both:
        return None
    return sum(seconds[row][s] for s in both) / sum(seconds[BASELINE][s] for s in both)


def _difference(
    runs: Sequence[Mapping[str, Any]], row: str, other: str, chosen: str, metric: str
) -> dict[str, Any] | None:
    values = paired(runs, row, other, chosen, metric)
    if not values:
        return None
    mean, half = interval(values)
    return {"mean": mean, "half_width": _plain(half), "pairs": len(values)}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cell(difference: Mapping[str, Any] | None) -> str:
    """A difference with its interval; bold where the interval leaves out zero."""
    if difference is None:
        return "–"
    mean, half = difference["mean"], difference["half_width"]
    if half is None:
        return f"{mean:+.3f}"
    text = f"{mean:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(mean) > half else text


def short_table(summary: Mapping[str, Any]) -> str:
    """Differences to CLIP in the metrics of ``SHOWN``; CLIP's own values in its row."""
    lines = [
        "| | seeds | CPU time | " + " | ".join(words for _, _, words in SHOWN) + " |",
        "|" + "---|" * (len(SHOWN) + 3),
    ]
    for row, record in summary.items():
        cells = []
        for chosen, metric, _ in SHOWN:
            score = record["scores"][f"{chosen} {metric}"]
            value = f"{score['mean']:.3f}" if row == BASELINE else cell(score[f"minus {BASELINE}"])
            cells.append(value)
        cost = record["cpu_ratio"]
        cells.insert(0, "–" if cost is None else f"{cost:.2f}×")
        lines.append(f"| {row} | {len(record['seeds'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def full_table(summary: Mapping[str, Any]) -> str:
    """Every metric of every row: mean and half width, and the difference to CLIP."""
    parts = []
    for chosen, title in SETS.items():
        for metric, words in METRICS.items():
            lines = [
                f"### {words}, {title}",
                "",
                "| | mean | minus CLIP | minus CLIP of its time |",
            ]
            lines.append("|---|---|---|---|")
            for row, record in summary.items():
                score = record["scores"][f"{chosen} {metric}"]
                half = score["half_width"]
                value = f"{score['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")
                others = (cell(score.get(f"minus {name}")) for name in (BASELINE, EQUAL_TIME))
                lines.append(f"| {row} | {value} | " + " | ".join(others) + " |")
            parts.append("\n".join(lines))
    lines = ["### cost", "", "| | epochs | CPU seconds | by phase |", "|---|---|---|---|"]
    for row, record in summary.items():
        phases = ", ".join(f"{name} {value:.0f}" for name, value in record["seconds"].items())
        cpu = record["training_cpu_seconds"]
        lines.append(f"| {row} | {record['epochs']} | {cpu:.0f} | {phases} |")
    return "\n\n".join(["\n".join(lines), *parts])


def verdict(summary: Mapping[str, Any]) -> str:
    """One sentence a metric: what ProtoCLIP, as chosen, does to CLIP of equal samples and time."""
    record = summary.get("ProtoCLIP")
    if record is None:
        return "ProtoCLIP: no finished run."
    lines = []
    for other, words in ((BASELINE, "equal samples"), (EQUAL_TIME, "equal time")):
        told = []
        for chosen, metric, heading in SHOWN:
            difference = record["scores"][f"{chosen} {metric}"].get(f"minus {other}")
            if difference is None or difference["half_width"] is None:
                continue
            mean, half = difference["mean"], difference["half_width"]
            word = "unclear" if abs(mean) <= half else "better" if mean > 0 else "worse"
            told.append(f"{heading} {word} ({mean:+.3f} ± {half:.3f})")
        if told:
            lines.append(f"ProtoCLIP against CLIP at {words}: {'; '.join(told)}.")
    return "\n".join(lines)


def overhead_lines(out: Path) -> str:
    """Table of the cost of an epoch with prototypes, measured beside CLIP's in one process."""
    path = out / "overhead.json"
    if not path.is_file():
        return ""
    record = json.loads(path.read_text())
    lines = []
    for model, one in record.items():
        if model == "equal_time":
            continue
        for name in ("extract", "reuse"):
            phases = ", ".join(
                f"{phase} {one['seconds']['CLIP'].get(phase, 0):.2f} → {value:.2f}"
                for phase, value in one["seconds"][name].items()
            )
            machine = f"{one['machine']['cpu']}, {one['threads']} threads"
            lines.append(f"| {model} | {name} | {one['ratio'][name]:.2f}× | {phases} | {machine} |")
    if not lines:
        return ""
    head = "| model | features | of a CLIP epoch | seconds, CLIP → ProtoCLIP | machine |"
    title = "What an epoch with prototypes costs, interleaved with CLIP's in one process:"
    return "\n".join([title, "", head, "|---|---|---|---|---|", *lines])


def section(summary: Mapping[str, Any], out: Path) -> str:
    """What the README shows."""
    selection = json.loads((out / "selection.json").read_text())
    counts = [len(record["seeds"]) for record in summary.values()]
    least, most = (min(counts), max(counts)) if counts else (0, 0)
    seeds = str(least) if least == most else f"{least} to {most}"
    seeds += "" if least >= 5 else " so far, of five: unfinished, no conclusion yet"
    chosen = selection["ProtoCLIP"]
    return "\n".join(
        [
            f"Seeds a row: {seeds}. Differences to CLIP of the same seed, samples, augmentation "
            "and optimiser, with their paired 95 % intervals, bold where zero lies outside. "
            f"Settings were chosen on other concepts ({len(selection['seeds'])} seeds): ProtoCLIP "
            f"'{chosen['chosen']}', distillation '{selection['distillation']['chosen']}'. CPU time "
            "is that of training, beside CLIP's.",
            "",
            short_table(summary),
            "",
            verdict(summary),
            "",
            overhead_lines(out),
        ]
    )


def write_report(
    runs: Sequence[Mapping[str, Any]], rows: Sequence[str], out: Path, quick: bool
) -> None:
    """Write the files, print the section, and put it into the README unless ``quick``."""
    summary = summarise(runs, rows)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    text = section(summary, out)
    (out / "table.md").write_text(f"{text}\n\n{full_table(summary)}\n")
    if len(summary) > 1:
        from benchmarks.study_plot import plot

        plot(summary, SHOWN, out / "plot.png")
    print(text)
    if not quick:
        write_between(README, text)


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the two marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"study: expected the marks '{BEGIN}' and '{END}' in {path}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
