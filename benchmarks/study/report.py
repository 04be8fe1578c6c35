"""Write the study's results to docs/evidence.md and its answer to README.md, and list missing
runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks.report import table, write_between

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- study: begin, written by make study -->", "<!-- study: end -->"
CLIP, PROTO, EQUAL_TIME = "CLIP", "ProtoCLIP", "CLIP, time of ProtoCLIP"
EXTERNAL_ONLY, INTERNAL_ONLY = "external only", "internal only"
PRIMARY = ("zero-shot", "probe", "AMI")
SECONDARY = ("zero-shot top 5", "k-NN", "R@5", "k-NN, new", "AMI, new")
NO_ANSWER = "**No answer yet**: too few of the runs that are compared are finished."
TOWERS = {"mlp": "MLP over HOG and pixels", "cnn": "default CNN"}
Run = Mapping[str, Any]
Runs = Mapping[str, Mapping[int, Run]]  # row -> seed -> run
Wanted = Mapping[str, Mapping[str, int]]  # tower -> row -> seeds
Comparison = tuple[str, str, str, str]  # tower, row, the row beside it, metric


@dataclass(frozen=True)
class Difference:
    """A mean difference over paired seeds, half its 95 % t interval, p of the two-sided test."""

    mean: float
    half: float
    p: float
    seeds: int

    def text(self, p: float | None = None) -> str:
        """With p as corrected; bold where it is below 5 %, or without p where zero is outside."""
        words = f"{self.mean:+.3f} ± {self.half:.3f}"
        sure = self.half < abs(self.mean) if p is None else p < 0.05
        words += "" if p is None else f" (p {p:.2g})"
        return f"**{words}**" if sure else words


def values(runs: Runs, row: str, metric: str) -> dict[int, float]:
    """A metric by seed."""
    return {
        seed: run["metrics"][metric]
        for seed, run in runs.get(row, {}).items()
        if metric in run["metrics"]
    }


def difference(runs: Runs, row: str, other: str, metric: str) -> Difference | None:
    """``row`` minus ``other`` over the seeds that both have; None below two."""
    if row == other:
        return None
    return paired(values(runs, row, metric), values(runs, other, metric))


def paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The difference over the seeds that both have; None below two."""
    seeds = sorted(mine.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    if all(mine[seed] == theirs[seed] for seed in seeds):  # a test of it would have no p
        return Difference(0.0, 0.0, 1.0, len(seeds))
    test = stats.ttest_rel([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    low, high = test.confidence_interval(0.95)
    return Difference((low + high) / 2, (high - low) / 2, float(test.pvalue), len(seeds))


def holm(differences: Mapping[Any, Difference], planned: int = 0) -> dict[Any, float]:
    """p of each test, corrected for there being several; of ``planned`` some may be missing, which
    then count as the largest p."""
    corrected, least = {}, 0.0
    count = max(planned, len(differences))
    for rank, key in enumerate(sorted(differences, key=lambda key: differences[key].p)):
        least = max(least, min(1.0, (count - rank) * differences[key].p))
        corrected[key] = least
    return corrected


def tests(by_tower: Mapping[str, Runs]) -> dict[Comparison, tuple[Difference, float]]:
    """Difference and corrected p: ProtoCLIP at equal time over both towers, then every row against
    CLIP at equal samples, by tower."""
    families = [[(tower, PROTO, EQUAL_TIME) for tower in by_tower]]
    families += [
        [(tower, row, CLIP) for row in runs if row not in (CLIP, EQUAL_TIME)]
        for tower, runs in by_tower.items()
    ]
    out: dict[Comparison, tuple[Difference, float]] = {}
    for family in families:
        differences = {
            (tower, row, other, metric): of_metric
            for tower, row, other in family
            for metric in PRIMARY
            if (of_metric := difference(by_tower[tower], row, other, metric)) is not None
        }
        out |= {key: (differences[key], p) for key, p in holm(differences).items()}
    return out


def score(run: Run) -> float:
    """What tuning goes by; -1 for a run that diverged."""
    numbers = [run["metrics"][name] for name in PRIMARY if name in run["metrics"]]
    return statistics.fmean(numbers) if len(numbers) == len(PRIMARY) else -1.0


def mean(numbers: Iterable[float], form: str = ".3f") -> str:
    present = list(numbers)
    return format(statistics.fmean(present), form) if present else "–"


def time_beside_clip(runs: Runs, row: str) -> str:
    """CPU time of training as a multiple of CLIP's of the same seed."""
    mine, plain = runs.get(row, {}), runs.get(CLIP, {})
    seeds = mine.keys() & plain.keys()
    return mean((mine[s]["cpu_seconds"] / plain[s]["cpu_seconds"] for s in seeds), ".2f")


def by_row(finished: Sequence[Run], tower: str, order: Iterable[str]) -> Runs:
    """The finished main runs of a tower."""
    runs: dict[str, dict[int, Run]] = {row: {} for row in order}
    for run in finished:
        if run["stage"] == "main" and run["tower"] == tower and run["row"] in runs:
            runs[run["row"]][run["seed"]] = run
    return {row: seeds for row, seeds in runs.items() if seeds}


def metrics_table(runs: Runs, metrics: Sequence[str], words: Mapping[tuple[str, str], str]) -> str:
    """CLIP's values, and the others' differences to it where ``words`` has them."""
    lines = []
    for row, by_seed in runs.items():
        first = next(iter(by_seed.values()))
        line = [row, str(len(by_seed)), f"{first['lr']:g}, {first['epochs']:g}"]
        line.append(time_beside_clip(runs, row))
        for metric in metrics:
            plain = mean(values(runs, row, metric).values())
            line.append(words.get((row, metric), plain))
        lines.append(line)
    return table(["", "seeds", "lr, epochs", "CPU time ×", *metrics], lines)


def tables_of(tower: str, by_tower: Mapping[str, Runs]) -> list[str]:
    """Against CLIP at equal samples, then at equal time."""
    runs = by_tower[tower]
    comparisons = tests(by_tower)
    primary = {
        (row, metric): delta.text(p)
        for (where, row, other, metric), (delta, p) in comparisons.items()
        if where == tower and other == CLIP
    }
    equal = {
        (EQUAL_TIME, metric): delta.text()
        for metric in PRIMARY
        if (delta := difference(runs, EQUAL_TIME, CLIP, metric)) is not None
    }
    secondary = {
        (row, metric): delta.text()
        for row in runs
        for metric in SECONDARY
        if (delta := difference(runs, row, CLIP, metric)) is not None
    }
    parts = [
        "CLIP's values, and differences to CLIP at equal samples; p after Holm:",
        metrics_table(runs, PRIMARY, primary | equal),
        "Secondary, not corrected:",
        metrics_table(runs, SECONDARY, secondary),
    ]
    lines = [
        [row, *(text_of(difference(runs, row, EQUAL_TIME, metric)) for metric in shown)]
        for row in runs
        for shown in [(*PRIMARY, *SECONDARY)]
        if row not in (CLIP, EQUAL_TIME)
    ]
    if EQUAL_TIME in runs:
        parts += [
            "Differences to CLIP with ProtoCLIP's time, not corrected:",
            table(["", *PRIMARY, *SECONDARY], lines),
        ]
    return parts


def text_of(delta: Difference | None) -> str:
    return "–" if delta is None else delta.text()


def floors_table(finished: Sequence[Run], floors: Sequence[str]) -> str:
    """What needs no training."""
    runs = {run["row"]: run["metrics"] for run in finished if run["stage"] == "floor"}
    names = (*PRIMARY, *SECONDARY)
    lines = [
        [row, *(f"{runs[row][name]:.3f}" if name in runs[row] else "–" for name in names)]
        for row in floors
        if row in runs
    ]
    return table(["floor", *names], lines) if lines else ""


def tuning_table(finished: Sequence[Run]) -> str:
    """What was tried on the sets for tuning, and how it scored."""
    tried = {
        (run["row"], f"{run['lr']:g}, {run['epochs']:g}"): score(run)
        for run in finished
        if run["stage"] == "tune"
    }
    rows, settings = (list(dict.fromkeys(key[i] for key in tried)) for i in (0, 1))
    lines = []
    for row in rows:
        scores = [tried.get((row, setting)) for setting in settings]
        best = max((value for value in scores if value is not None), default=None)
        cells = ["–" if value is None else f"{value:.3f}" for value in scores]
        cells = [
            f"**{cell}**" if value == best else cell
            for cell, value in zip(cells, scores, strict=True)
        ]
        lines.append([row, *cells])
    head = ["tuning: mean of the primary metrics at lr, epochs", *settings]
    return table(head, lines) if lines else ""


def clusters_table(runs: Runs) -> str:
    """What the prototypes were in the last episode, means over the seeds."""
    names = {
        "image_inertia": "inertia, images",
        "text_inertia": "texts",
        "external_inertia": "teacher",
        "image_size_max": "largest image cluster",
        "text_size_max": "text cluster",
    }
    lines = []
    for row, by_seed in runs.items():
        last_episodes = [run["episodes"][-1] for run in by_seed.values() if run["episodes"]]
        accuracy = [
            statistics.fmean(value for name, value in episode.items() if "accuracy" in name)
            for episode in last_episodes
            if any("accuracy" in name for name in episode)
        ]
        entropies = [run["entropies"][-1] for run in by_seed.values() if run["entropies"]]
        if not any(name in episode for episode in last_episodes for name in names):
            continue
        line = [row, mean(accuracy)]
        for name in names:
            line.append(mean((each[name] for each in last_episodes if name in each), ".3g"))
        for source in ("image", "text", "most"):
            line.append(mean((each[source] for each in entropies if source in each), ".2f"))
        lines.append(line)
    head = ["last episode", "prototype accuracy", *names.values()]
    head += ["entropy of targets, nats: images", "texts", "at most"]
    return table(head, lines) if lines else ""


def verdict(delta: Difference, p: float) -> str:
    return "undecided" if p >= 0.05 else "better" if delta.mean > 0 else "worse"


def answer(by_tower: Mapping[str, Runs], ratios: Mapping[str, float]) -> list[str]:
    """The answer in at most ten lines, from what is there."""
    comparisons = tests(by_tower)
    lines = []
    for tower in by_tower:
        parts = [
            f"{metric} {delta.text(p)}: {verdict(delta, p)}"
            for (where, _, other, metric), (delta, p) in comparisons.items()
            if where == tower and other == EQUAL_TIME
        ]
        if parts:
            lines.append(
                f"**At equal CPU time** ({TOWERS[tower]}; a sample costs ProtoCLIP "
                f"{ratios[tower]:.2f} times CLIP's): {'; '.join(parts)}."
            )
    for tower in by_tower:
        parts = [
            f"{metric} {delta.text(p)}"
            for (where, row, other, metric), (delta, p) in comparisons.items()
            if (where, row, other) == (tower, PROTO, CLIP)
        ]
        if parts:
            lines.append(f"At equal samples ({TOWERS[tower]}): {'; '.join(parts)}.")
    runs = by_tower.get("mlp", {})
    for row in (INTERNAL_ONLY, EXTERNAL_ONLY):
        parts = [
            f"{metric} {delta.text()}"
            for metric in PRIMARY
            if (delta := difference(runs, row, EQUAL_TIME, metric)) is not None
        ]
        if parts:
            lines.append(
                f"{row.capitalize()}, against CLIP with ProtoCLIP's time: {'; '.join(parts)}."
            )
    for metric in PRIMARY:
        ranked = sorted(
            (mean(values(runs, row, metric).values()), row)
            for row in runs
            if row not in (CLIP, EQUAL_TIME, PROTO) and values(runs, row, metric)
        )
        if len(ranked) > 1:
            (low, worst), (high, best) = ranked[0], ranked[-1]
            lines.append(f"Other rows in {metric}: from {low} ({worst}) to {high} ({best}).")
    return lines[:10]


def progress(by_tower: Mapping[str, Runs], wanted: Wanted, finished: Sequence[Run]) -> str:
    """How much of the comparison is finished."""
    total = done = 0
    for tower, rows in wanted.items():
        for row, seeds in rows.items():
            total += seeds
            done += min(seeds, len(by_tower.get(tower, {}).get(row, {})))
    tuned = sum(run["stage"] == "tune" for run in finished)
    return f"Finished are {done} of the {total} runs that are compared, and {tuned} of tuning."


def missing(by_tower: Mapping[str, Runs], wanted: Wanted) -> str:
    parts = [
        f"{row} ({tower}) {count - len(by_tower.get(tower, {}).get(row, {}))}"
        for tower, rows in wanted.items()
        for row, count in rows.items()
        if count > len(by_tower.get(tower, {}).get(row, {}))
    ]
    return f"Unfinished, seeds missing: {'; '.join(parts)}." if parts else ""


def origin(finished: Sequence[Run]) -> str:
    """Where and on what the runs were made."""
    count = Counter(f"on {run['machine']}, commit {run['commit']}" for run in finished)
    places = "; ".join(f"{number} {place}" for place, number in count.items())
    torch = ", ".join(sorted({str(run["torch"]) for run in finished}))
    diverged = sum("error" in run for run in finished)
    hours = sum(run.get("cpu_seconds", 0) for run in finished) / 3600
    return (
        f"{len(finished)} runs ({diverged} diverged), {hours:.1f} CPU hours of training: {places}; "
        f"torch {torch}."
    )


def data_words(facts: Mapping[str, Any]) -> str:
    """What the split holds."""
    if not facts:
        return ""
    numbers = "; ".join(
        f"{value:,} {name}"
        for name, value in facts.items()
        if isinstance(value, int) and name not in ("seen", "judged", "teacher_texts")
    )
    words = f"Data: {numbers}. Judged are {facts['judged']:,} drawings of {facts['seen']} concepts"
    words += f"; new concepts: {', '.join(facts['new'])}."
    if "teacher_seconds" in facts:
        words += (
            f" The teacher's features of all {facts['teacher_texts']:,} names took "
            f"{facts['teacher_seconds']:.0f} CPU seconds, once, and are not counted in a run's "
            "time."
        )
    return words


def main_runs(finished: Sequence[Run], wanted: Wanted) -> dict[str, Runs]:
    """The finished main runs by tower."""
    by_tower = {tower: by_row(finished, tower, rows) for tower, rows in wanted.items()}
    return {tower: runs for tower, runs in by_tower.items() if runs}


def section(
    finished: Sequence[Run], wanted: Wanted, floors: Sequence[str], facts: Mapping[str, Any]
) -> str:
    """What the page shows."""
    if not finished:
        return "No run is finished yet."
    by_tower = main_runs(finished, wanted)
    ratios = {run["tower"]: run["ratio"] for run in finished if run["stage"] == "pairs"}
    answers = [f"{number}. {line}" for number, line in enumerate(answer(by_tower, ratios), 1)]
    parts = ["\n".join(answers) or NO_ANSWER, progress(by_tower, wanted, finished)]
    for tower, runs in by_tower.items():
        tables = [*tables_of(tower, by_tower), clusters_table(runs)]
        parts.append(details(f"Every comparison: {TOWERS[tower]}", tables))
    parts.append(details("What needs no training", [floors_table(finished, floors)]))
    parts.append(details("Tuning", [tuning_table(finished)]))
    words = [missing(by_tower, wanted), origin(finished), data_words(facts)]
    parts.append(details("Runs and data", words))
    return "\n\n".join(filter(None, parts))


def details(title: str, parts: Iterable[str]) -> str:
    """What a reader of the answer may open; "" if there is nothing."""
    body = "\n\n".join(filter(None, parts))
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>" if body else ""


def write_report(
    finished: Sequence[Run],
    wanted: Wanted,
    floors: Sequence[str],
    facts: Mapping[str, Any],
    page: Path | None = None,
) -> None:
    """Print the section and put it into ``page``."""
    text = section(finished, wanted, floors, facts)
    print(text)
    if page is not None:
        write_between(page, BEGIN, END, text)
