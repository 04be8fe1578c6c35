"""From finished runs of the study to docs/evidence.md and a plot; what is missing is said so."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.report import table, write_between

PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
BEGIN, END = "<!-- study: begin, written by make study -->", "<!-- study: end -->"
CLIP, PROTO, EQUAL_TIME = "CLIP", "ProtoCLIP", "CLIP, time of ProtoCLIP"
PRIMARY = {"new group/knn_acc1": "k-NN", "new group/ami": "AMI"}  # set and metric -> heading
SECONDARY = {
    "new subgroup/knn_acc1": "k-NN, subgroups",
    "new subgroup/ami": "AMI, subgroups",
    "new group/lp_acc1": "probe",
    "new subgroup/lp_acc1": "probe, subgroups",
    "new subgroup/acc1": "zero-shot, subgroups",
    "new text_retrieval_recall@5": "R@5",
    "seen group/knn_acc1": "k-NN, seen styles",
    "seen group/ami": "AMI, seen styles",
}
Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Run]]  # row -> seed -> run
Wanted = Mapping[str, Sequence[Mapping[str, int]]]  # data -> the rows of each table -> seeds


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired seeds, half its 95 % t interval, p of the two-sided test."""

    mean: float
    half: float
    p: float

    def text(self, p: float | None = None) -> str:
        """With p as corrected; bold where it is below 5 %."""
        words = f"{self.mean:+.3f} ± {self.half:.3f}"
        sure = self.half < abs(self.mean) if p is None else p < 0.05
        words += "" if p is None else f" (p {p:.2g})"
        return f"**{words}**" if sure else words


def values(runs: Runs, row: str, key: str) -> dict[int, float]:
    """A metric, "set name", by seed."""
    part, _, name = key.partition(" ")
    own = {seed: run["metrics"].get(part, {}).get(name) for seed, run in runs.get(row, {}).items()}
    return {seed: value for seed, value in own.items() if value is not None}


def difference(runs: Runs, row: str, other: str, key: str) -> Difference | None:
    """``row`` minus ``other`` over the seeds that both have; None below two."""
    mine, theirs = values(runs, row, key), values(runs, other, key)
    both = sorted(mine.keys() & theirs.keys())
    if row == other or len(both) < 2:
        return None
    found = stats.ttest_rel([mine[seed] for seed in both], [theirs[seed] for seed in both])
    low, high = found.confidence_interval(0.95)
    return Difference((low + high) / 2, (high - low) / 2, float(found.pvalue))


def holm(found: Mapping[Any, Difference]) -> dict[Any, float]:
    """p of each test, corrected for there being several."""
    corrected, least = {}, 0.0
    for rank, key in enumerate(sorted(found, key=lambda key: found[key].p)):
        least = max(least, min(1.0, (len(found) - rank) * found[key].p))
        corrected[key] = least
    return corrected


def tests(tables: Sequence[Runs]) -> dict[tuple[int, str, str, str], tuple[Difference, float]]:
    """(table, row, other, primary metric) -> difference and corrected p, in two families."""
    pairs = [(0, PROTO, CLIP), (0, PROTO, EQUAL_TIME)]
    every = [(i, row, CLIP) for i, runs in enumerate(tables) for row in runs]
    out = {}
    for family in (pairs, [one for one in every if one not in pairs]):
        keys = [(*one, key) for one in family for key in PRIMARY]
        found = {key: difference(tables[key[0]], *key[1:]) for key in keys}
        known = {key: one for key, one in found.items() if one is not None}
        out |= {key: (known[key], p) for key, p in holm(known).items()}
    return out


def mean(numbers: Sequence[float], form: str = ".3f") -> str:
    return format(statistics.fmean(numbers), form) if numbers else "–"


def time_beside_clip(runs: Runs, row: str) -> str:
    """CPU time of training as a multiple of CLIP's of the same seed."""
    mine, plain = runs.get(row, {}), runs.get(CLIP, {})
    both = mine.keys() & plain.keys()
    return mean([mine[s]["cpu_seconds"] / plain[s]["cpu_seconds"] for s in both], ".2f")


def scores(runs: Runs, floors: Runs, metrics: Mapping[str, str], words: Mapping) -> str:
    """CLIP's and the floors' values, the others' differences to CLIP: (row, metric) -> words."""
    lines = []
    for row, own in (*runs.items(), *floors.items()):
        trained, first = row in runs, next(iter(own.values()))
        line = [row if trained else f"*{row}*", str(len(own))]
        line += [f"{first['lr']:g}, {first['epochs']:g}" if trained else "–"]
        line += [time_beside_clip(runs, row)]
        for key in metrics:
            plain = mean([*values(runs if trained else floors, row, key).values()])
            line.append(words.get((row, key), plain))
        lines.append(line)
    return lines and table(["", "seeds", "lr, epochs", "CPU time ×", *metrics.values()], lines)


def both_tables(tables: Sequence[Runs], number: int, floors: Runs) -> list[str]:
    """The primary metrics, p corrected; the others, not corrected."""
    runs, found = tables[number], tests(tables)
    primary = {
        (row, key): one.text(p)
        for (table, row, other, key), (one, p) in found.items()
        if (table, other) == (number, CLIP)
    }
    secondary = {
        (row, key): one.text()
        for row in runs
        for key in SECONDARY
        if (one := difference(runs, row, CLIP, key)) is not None
    }
    both = (PRIMARY, primary), (SECONDARY, secondary)
    return [scores(runs, floors, metrics, words) for metrics, words in both]


def tuning(found: Sequence[Run]) -> str:
    """What was tried on the development families, and how it scored."""
    tried: dict[tuple[str, str], list[float]] = {}
    for run in found:
        if run["stage"] == "tune" and run["metrics"]:
            key = run["row"], f"{run['lr']:g}, {run['epochs']:g}"
            tried.setdefault(key, []).append(score(run))
    rows, settings = (list(dict.fromkeys(key[i] for key in tried)) for i in (0, 1))
    lines = [[row, *(mean(tried.get((row, one), [])) for one in settings)] for row in rows]
    head = ["mean score in tuning at lr, epochs:", *settings]
    return lines and table(head, lines)


def score(run: Run) -> float:
    """What tuning goes by; -1 for a run that diverged."""
    names = [key.partition(" ")[2] for key in PRIMARY]
    numbers = [one[name] for one in run["metrics"].values() for name in names]
    return statistics.fmean(numbers) if numbers else -1.0


def mean_curve(own: Mapping[int, Run]) -> list[list[float]]:
    """Points [samples, CPU seconds, k-NN, AMI], means over the seeds."""
    curves = [run["curve"] for run in own.values() if run.get("curve")]
    points = zip(*curves, strict=False)
    return [[statistics.fmean(number) for number in zip(*one, strict=True)] for one in points]


def reached(curve: Sequence[Sequence[float]], metric: int, goal: float, axis: int) -> float | None:
    """Where the curve first gets to ``goal``, between its points in a straight line."""
    points = np.array(curve)
    best = np.maximum.accumulate(points[:, metric])
    return None if best[-1] < goal else float(np.interp(goal, best, points[:, axis]))


def curve_words(runs: Runs) -> str:
    """How much of CLIP's cost CLIP and ProtoCLIP need for its final quality, by the mean curves."""
    curves = {row: mean_curve(runs[row]) for row in (CLIP, PROTO) if row in runs}
    if len(curves) < 2 or not all(curves.values()):
        return ""
    words = []
    for metric, name in ((2, "k-NN"), (3, "AMI")):
        end = curves[CLIP][-1]
        for row, curve in curves.items():
            costs = [
                f"{found / end[axis]:.2f} of CLIP's {unit}"
                for axis, unit in ((0, "samples"), (1, "CPU seconds"))
                if (found := reached(curve, metric, end[metric], axis)) is not None
            ]
            words.append(f"- CLIP's final {name}, {row}: {', '.join(costs) or 'never'}")
    return "\n".join(["The paper claims CLIP's quality in a third of its time.\n", *words])


def cluster_table(runs: Runs) -> str:
    """Entropy of the soft targets and purity of the clusters, at the end of training."""
    names = {
        "target_nats": "entropy of soft targets, nats", "most_nats": "of at most",
        "image_purity_group": "purity of image clusters (groups)",
        "text_purity_group": "of text clusters", "external_purity_group": "of the teacher's",
    }  # fmt: skip
    found = {row: [run.get("clusters", {}) for run in own.values()] for row, own in runs.items()}
    lines = [
        [row, *(mean([one[name] for one in own if name in one], ".2f") for name in names)]
        for row, own in found.items()
        if any(own)
    ]
    return lines and table(["", *names.values()], lines)


def conclusions(tables: Sequence[Runs], wanted: Sequence[Mapping[str, int]]) -> str:
    """What the primary metrics say of ProtoCLIP, and what they do not yet."""
    words = []
    for (number, row, other, key), (found, p) in tests(tables).items():
        if (number, row) == (0, PROTO):
            verdict = "undecided" if p >= 0.05 else "better" if found.mean > 0 else "worse"
            words.append(f"- against {other}, {PRIMARY[key]}: {verdict}, {found.text(p)}")
    less = {name: difference(tables[0], PROTO, EQUAL_TIME, key) for key, name in SECONDARY.items()}
    if texts := [f"{name} {one.text()}" for name, one in less.items() if one]:
        words.append(f"- against {EQUAL_TIME}, secondary, not corrected: {'; '.join(texts)}")
    missing = [
        f"{row} {number}"
        for runs, rows in zip(tables, wanted, strict=True)
        for row, n in rows.items()
        if (number := n - len(runs.get(row, {}))) > 0
    ]
    words += [f"- unfinished, seeds missing: {'; '.join(missing)}"] if missing else []
    return "\n".join(words)


def by_row(
    found: Sequence[Run], stage: str, data: str, order: Iterable[str], partners: Any = ()
) -> Runs:
    """The finished runs of a stage and data set: of a seed those of the processor that has most.

    ``partners`` do not count for that: they are there beside the others.
    """
    runs = [r for r in found if (r["stage"], r["data"]) == (stage, data) and r["row"] in order]
    where = Counter((r["seed"], r["machine"]) for r in runs if r["row"] not in partners)
    best = dict(place for place, _ in reversed(where.most_common()))
    own: dict[str, dict[int, Run]] = {row: {} for row in order}
    for run in runs:
        if run["metrics"] and run["machine"] == best.get(run["seed"]):
            own[run["row"]][run["seed"]] = run
    return {row: seeds for row, seeds in own.items() if seeds}


def origin(found: Sequence[Run]) -> str:
    """Where and on what the runs were made."""
    count = Counter(f"on {run['machine']}, commit {run['commit']}" for run in found)
    places = "; ".join(f"{n} {place}" for place, n in count.items())
    torch = ", ".join(sorted({str(run["torch"]) for run in found}))
    pictures = [
        f"{min(numbers):,} to {max(numbers):,} {words}"
        for name, words in (("train", "trained on"), ("new", "new"), ("seen", "seen"))
        if (numbers := [run[name] for run in found if name in run and run["stage"] != "tune"])
    ]
    return (
        f"{len(found)} runs ({sum('error' in run for run in found)} diverged): {places}; torch "
        f"{torch}. Pictures a seed: {'; '.join(pictures) or 'none yet'}."
    )


def section(found: Sequence[Run], wanted: Wanted, floors: Sequence[str]) -> str:
    """What the page shows."""
    if not found:
        return "No run is finished yet."
    parts = [origin(found)]
    for number, (data, rows) in enumerate(wanted.items()):
        tables = [
            by_row(found, "main", data, one, rows[0] if i else ()) for i, one in enumerate(rows)
        ]
        parts += [f"### `{data}`", f"ProtoCLIP:\n\n{conclusions(tables, rows)}"]
        for i, runs in enumerate(tables):
            same = [run for run in found if any(run["seed"] in own for own in runs.values())]
            parts += both_tables(tables, i, by_row(same, "floor", data, floors))
            parts += [curve_words(runs)] if i == number == 0 else []
        parts += [*map(cluster_table, tables), *([tuning(found)] if number == 0 else [])]
    return "\n\n".join(filter(None, parts))


def plot(runs: Runs, path: Path) -> None:
    """Quality against samples and CPU seconds, means over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    for metric, name in enumerate(PRIMARY.values()):
        for cost, unit in enumerate(("samples", "CPU seconds")):
            for row in runs:
                curve = mean_curve(runs[row])
                x, y = ([point[i] for point in curve] for i in (cost, 2 + metric))
                panels[metric, cost].plot(x, y, marker="o", label=row)
            panels[metric, cost].set(xlabel=unit, ylabel=name)
    panels[0, 0].legend()
    figure.savefig(path, dpi=110)


def write_report(
    found: Sequence[Run], wanted: Wanted, floors: Sequence[str], out: Path, page: Path | None
) -> None:
    """Print the section, draw the curves, and put the section into ``page``."""
    text, picture = section(found, wanted, floors), out / "curves.png"
    if runs := by_row(found, "main", next(iter(wanted)), (CLIP, PROTO)):
        plot(runs, picture)
        text += f"\n\n![quality against cost]({os.path.relpath(picture, (page or out).parent)})"
    print(text)
    if page is not None:
        write_between(page, BEGIN, END, text)
