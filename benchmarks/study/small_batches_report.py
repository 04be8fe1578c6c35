"""From finished runs of small_batches.py to docs/small-batches.md; what is missing is said so."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report import table
from benchmarks.study.report import (
    CLIP,
    EQUAL_TIME,
    EXTERNAL_ONLY,
    PRIMARY,
    ROOT,
    SECONDARY,
    TOWERS,
    Difference,
    Run,
    Runs,
    details,
    difference,
    floors_table,
    holm,
    mean,
    origin,
    paired,
    score,
    text_of,
    values,
)

PAGE = ROOT / "docs" / "small-batches.md"
BEGIN = "<!-- small_batches: begin, written by make small-batches-report -->"
END = "<!-- small_batches: end -->"
OURS = EXTERNAL_ONLY  # a teacher's prototypes alone
METRICS = (*PRIMARY, *SECONDARY)
BATCHES = (64, 256)  # of the planned comparisons
SEEDS = 8
ICONS = 60_000
PLANNED = len(TOWERS) * len(PRIMARY) * 2  # tests that Holm's correction counts


def name(row: str, batch: int, icons: int = ICONS) -> str:
    """A row of the tables."""
    return f"{row}, batch {batch}" + ("" if icons == ICONS else f", {icons:,} icons")


def runs_of(found: Iterable[Run], tower: str, stage: str = "main") -> Runs:
    """The finished runs of a tower that are judged, by row, batch and icons."""
    runs: dict[str, dict[int, Run]] = {}
    for run in found:
        if run["stage"] == stage and run["tower"] == tower:
            key = name(run["row"], run["batch"], run["icons"])
            runs.setdefault(key, {})[run["seed"]] = run
    return runs


def gains(runs: Runs, metric: str, batch: int) -> dict[int, float]:
    """By seed, what a teacher's prototypes gain over CLIP at equal time."""
    ours, equal = (values(runs, name(row, batch), metric) for row in (OURS, EQUAL_TIME))
    return {seed: ours[seed] - equal[seed] for seed in ours.keys() & equal.keys()}


def finished_of(runs: Runs) -> int:
    """How many of a tower's planned runs are there."""
    rows = [name(row, batch) for row in (OURS, EQUAL_TIME) for batch in BATCHES]
    return sum(min(SEEDS, len(runs.get(row, {}))) for row in rows)


Test = tuple[str, str, str]  # tower, metric, what is compared
GAIN, MORE = f"gain at {BATCHES[0]}", f"gain at {BATCHES[0]} minus at {BATCHES[1]}"


def planned(by_tower: Mapping[str, Runs]) -> dict[Test, tuple[Difference, float]]:
    """The planned tests of the towers that are finished, and p after Holm over all twelve."""
    tests: dict[Test, Difference] = {}
    for tower, runs in by_tower.items():
        if finished_of(runs) < 2 * len(BATCHES) * SEEDS:
            continue
        for metric in PRIMARY:
            small, large = (gains(runs, metric, batch) for batch in BATCHES)
            of_gain, of_more = paired(small, dict.fromkeys(small, 0.0)), paired(small, large)
            if of_gain is not None and of_more is not None:
                tests |= {(tower, metric, GAIN): of_gain, (tower, metric, MORE): of_more}
    corrected = holm(tests, PLANNED)
    return {test: (delta, corrected[test]) for test, delta in tests.items()}


def planned_table(by_tower: Mapping[str, Runs]) -> str:
    """The planned family, with the gain at the large batch beside it."""
    tests = planned(by_tower)
    lines = []
    for tower, runs in by_tower.items():
        for metric in PRIMARY:
            if (tower, metric, GAIN) in tests:
                large = gains(runs, metric, BATCHES[1])
                line = [f"{TOWERS[tower]}: {metric}"]
                line += [delta.text(p) for delta, p in [tests[tower, metric, GAIN]]]
                line += [text_of(paired(large, dict.fromkeys(large, 0.0)))]
                line += [delta.text(p) for delta, p in [tests[tower, metric, MORE]]]
                lines.append(line)
    head = ["a teacher's prototypes, beside CLIP for their time", GAIN]
    head += [f"at {BATCHES[1]} (not corrected)", MORE]
    return table(head, lines) if lines else ""


def rows_table(runs: Runs) -> str:
    """CLIP's values at equal time, and differences to them at the same batch, not corrected."""
    lines = []
    for row, by_seed in sorted(runs.items(), key=lambda item: order(item[1])):
        run = next(iter(by_seed.values()))
        equal = name(EQUAL_TIME, run["batch"], run["icons"])
        line = [row, str(len(by_seed)), f"{run['lr']:g}, {run['epochs']:g}"]
        for metric in METRICS:
            if row == equal:
                line.append(mean(values(runs, row, metric).values()))
            else:
                line.append(text_of(difference(runs, row, equal, metric)))
        lines.append(line)
    return table(["", "seeds", "lr, epochs", *METRICS], lines) if lines else ""


def order(by_seed: Mapping[int, Run]) -> tuple[int, int, bool]:
    """Tables go by icons and batch; the row that others are beside comes first."""
    run = next(iter(by_seed.values()))
    return run["icons"], run["batch"], run["row"] != EQUAL_TIME


def beside_rivals(runs: Runs) -> str:
    """What a teacher's prototypes gain over each other row at the small batch."""
    batch = BATCHES[0]
    ours = name(OURS, batch)
    lines = []
    for row in runs:
        if row.endswith(f", batch {batch}") and row != ours:
            cells = [text_of(difference(runs, ours, row, metric)) for metric in METRICS]
            if set(cells) != {"–"}:
                lines.append([f"to {row}", *cells])
    return table(["a teacher's prototypes alone", *METRICS], lines) if lines else ""


def best_table(runs: Runs) -> str:
    """Each method at its best batch, for the same time."""
    by_row = {next(iter(by_seed.values()))["row"]: row for row, by_seed in runs.items()}
    lines = [
        [row, str(len(by_seed)), *(mean(values(runs, row, metric).values()) for metric in METRICS)]
        for row, by_seed in runs.items()
    ]
    if by_row.keys() == {OURS, EQUAL_TIME}:
        ours, clip = by_row[OURS], by_row[EQUAL_TIME]
        cells = [text_of(difference(runs, ours, clip, metric)) for metric in METRICS]
        lines.append(["difference", "", *cells])
    return table(["each at its best batch", "seeds", *METRICS], lines) if lines else ""


def ratio_of(pair: Run) -> float:
    """CPU time of a row's timed episodes over CLIP's."""
    seconds = pair["seconds_by_episode"]
    return sum(seconds[pair["row"]]) / sum(seconds[CLIP])


def costs_table(found: Sequence[Run]) -> str:
    """What was timed."""
    pairs: dict[tuple[str, str, int], list[Run]] = {}
    for run in found:
        if run["stage"] == "pairs":
            pairs.setdefault((run["tower"], run["row"], run["batch"]), []).append(run)
    lines = []
    for (tower, row, batch), timed in pairs.items():
        ratios = [ratio_of(pair) for pair in timed]
        clip = [s for pair in timed for s in pair["seconds_by_episode"][CLIP]]
        last = [pair["seconds_by_episode"][row][-1] for pair in timed]
        span = f"{statistics.fmean(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        cells = [TOWERS[tower], name(row, batch), str(len(timed)), mean(clip, ".2f")]
        lines.append([*cells, mean(last, ".2f"), span])
    head = ["CPU seconds, timed alone", "", "pairs", "CLIP's episode", "the row's last episode"]
    parts = [table([*head, "ratio of all episodes (lowest … highest)"], lines) if lines else ""]
    parts += [
        f"The teacher of a run ({TOWERS[run['tower']]}, timed beside its pairs): "
        f"{run['texts']:,} names, {run['cpu_seconds']:.0f} CPU seconds."
        for run in found
        if run["stage"] == "teacher"
    ]
    return "\n\n".join(filter(None, parts))


def tuning_table(found: Iterable[Run]) -> str:
    """What was tried on the sets for tuning: mean score by learning rate, the best in bold."""
    tried: dict[tuple[str, str, float], dict[float, list[float]]] = {}
    for run in sorted(found, key=lambda run: run["lr"]):
        if run["stage"] == "tune":
            row = name(run["row"], run["batch"], run["icons"])
            by_lr = tried.setdefault((run["tower"], row, run["epochs"]), {})
            by_lr.setdefault(run["lr"], []).append(score(run))
    lines = []
    for (tower, row, epochs), by_lr in tried.items():
        means = {lr: statistics.fmean(scores) for lr, scores in by_lr.items()}
        best = max(means, key=lambda lr: means[lr])
        cells = []
        for lr, scores in by_lr.items():
            cell = f"{lr:g}: {means[lr]:.4f}"
            if lr == best and min(means) < lr < max(means):  # at the edge it is not found yet
                cell = f"**{cell}**"
            cells.append(f"{cell} ({len(scores)})")
        lines.append([TOWERS[tower], row, f"{epochs:g}", "; ".join(cells)])
    head = ["tuning", "", "epochs", "learning rate: mean of the primary metrics (seeds)"]
    return table(head, lines) if lines else ""


def by_batch(runs: Runs) -> dict[str, dict[int, Difference]]:
    """For the picture: the gain over CLIP at equal time by primary metric and batch, where there
    are as many seeds as the rules say."""
    batches = {next(iter(by_seed.values()))["batch"] for by_seed in runs.values()}
    gained: dict[str, dict[int, Difference]] = {metric: {} for metric in PRIMARY}
    for batch in sorted(batches):
        for metric in PRIMARY:
            of_seeds = gains(runs, metric, batch)
            delta = paired(of_seeds, dict.fromkeys(of_seeds, 0.0))
            if delta is not None and delta.seeds >= (SEEDS if batch in BATCHES else 3):
                gained[metric][batch] = delta
    return gained


def picture_title(gained: Mapping[str, Mapping[int, Difference]]) -> str:
    """The picture in a sentence: its alt text."""
    parts = [
        f"{metric}: "
        + ", ".join(f"{delta.text().strip('*')} at {batch}" for batch, delta in by_batch.items())
        for metric, by_batch in gained.items()
    ]
    return (
        "What a teacher's prototypes gain over CLIP at equal CPU time by batch size, with 95 % "
        f"intervals ({TOWERS['mlp']}). {'; '.join(parts)}."
    )


def enough_for_picture(gained: Mapping[str, Mapping[int, Any]]) -> bool:
    """Whether there are two batches to compare."""
    return all(len(of_metric) > 1 for of_metric in gained.values())


def section(found: Sequence[Run], floors: Sequence[str]) -> str:
    """What the page shows."""
    by_tower = {tower: runs_of(found, tower) for tower in TOWERS}
    counts = [f"{finished_of(runs)} of 32 ({TOWERS[tower]})" for tower, runs in by_tower.items()]
    tuned = sum(run["stage"] == "tune" for run in found)
    parts = [
        planned_table(by_tower) or "**No answer yet**: no tower's planned runs are all finished.",
        f"Finished of the planned runs are {' and '.join(counts)}; tuning runs: {tuned}; "
        f"records in all: {len(found)}.",
    ]
    gained = by_batch(by_tower["mlp"])
    if enough_for_picture(gained):
        parts.append(f"![{picture_title(gained)}](small-batches.svg)")
    for tower, runs in by_tower.items():
        tables = [rows_table(runs), beside_rivals(runs), best_table(runs_of(found, tower, "best"))]
        if any(tables):
            words = "Exploratory, not corrected: values of CLIP at equal time, differences to them."
            parts.append(details(f"Every row: {TOWERS[tower]}", [words, *tables]))
    parts.append(details("What needs no training", [floors_table(found, floors)]))
    parts.append(details("Time", [costs_table(found)]))
    parts.append(details("Tuning", [tuning_table(found)]))
    if found:
        parts.append(details("Runs", [origin(found)]))
    return "\n\n".join(filter(None, parts))
