"""From finished runs of small_batches.py to docs/small-batches.md; what is missing is said so."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
SEEDS = {"mlp": 16, "cnn": 8}  # of the planned rows
SHORT_TOWERS = {"mlp": "MLP", "cnn": "CNN"}  # in the picture
ICONS = 60_000
EPISODES = 16  # of a planned run of a teacher's prototypes
# Stages of the runs of each method at its best batch: for the time that the pairs predict, for the
# seconds that the first of these runs took, and at the batch of the other method.
BEST = {
    "best": "",
    "best by own seconds": ", by own seconds",
    "best at the other batch": ", the other's",
}
PLANNED = len(TOWERS) * len(PRIMARY) * 2  # tests that Holm's correction counts


def name(row: str, batch: int, icons: int = ICONS) -> str:
    """A row of the tables."""
    return f"{row}, batch {batch}" + ("" if icons == ICONS else f", {icons:,} icons")


def runs_of(finished: Iterable[Run], tower: str, stage: str = "main") -> Runs:
    """The finished runs of a tower that are judged, by row, batch and icons."""
    runs: dict[str, dict[int, Run]] = {}
    for run in finished:
        if run["stage"] == stage and run["tower"] == tower:
            of_row = runs.setdefault(name(run["row"], run["batch"], run["icons"]), {})
            for other in of_row.values():
                if (run["lr"], run["epochs"]) != (other["lr"], other["epochs"]):
                    raise ValueError(
                        f"{tower}, {run['row']}, batch {run['batch']}: expected runs of one "
                        f"learning rate and length, got {other['lr']:g}, {other['epochs']:g} epochs"
                        f" and {run['lr']:g}, {run['epochs']:g}; take the older runs out"
                    )
            of_row[run["seed"]] = run
    return runs


def gains(runs: Runs, metric: str, batch: int) -> dict[int, float]:
    """By seed, what a teacher's prototypes gain over CLIP at equal time."""
    ours, equal = (values(runs, name(row, batch), metric) for row in (OURS, EQUAL_TIME))
    return {seed: ours[seed] - equal[seed] for seed in ours.keys() & equal.keys()}


PLANNED_ROWS = [name(row, batch) for row in (OURS, EQUAL_TIME) for batch in BATCHES]


def wanted_of(tower: str) -> int:
    """How many planned runs a tower has."""
    return len(PLANNED_ROWS) * SEEDS[tower]


def finished_of(tower: str, runs: Runs) -> int:
    """How many of them are there, diverged ones too."""
    return sum(min(SEEDS[tower], len(runs.get(row, {}))) for row in PLANNED_ROWS)


def is_finished(tower: str, runs: Runs) -> bool:
    return finished_of(tower, runs) == wanted_of(tower)


def enough_seeds(tower: str, pairs: int) -> bool:
    """Whether so many pairs with scores are an answer."""
    return pairs >= 0.75 * SEEDS[tower]


Test = tuple[str, str, str]  # tower, metric, what is compared
GAIN, MORE = f"gain at {BATCHES[0]}", f"gain at {BATCHES[0]} minus at {BATCHES[1]}"


def planned(by_tower: Mapping[str, Runs]) -> dict[Test, tuple[Difference, float]]:
    """The planned tests of the towers that are finished, and p after Holm over all twelve; none
    where too many runs diverged."""
    tests: dict[Test, Difference] = {}
    for tower, runs in by_tower.items():
        if not is_finished(tower, runs):
            continue
        for metric in PRIMARY:
            small, large = (gains(runs, metric, batch) for batch in BATCHES)
            deltas = {GAIN: paired(small, dict.fromkeys(small, 0.0)), MORE: paired(small, large)}
            for test, delta in deltas.items():
                if delta is not None and enough_seeds(tower, delta.seeds):
                    tests[tower, metric, test] = delta
    corrected = holm(tests, PLANNED)
    return {test: (delta, corrected[test]) for test, delta in tests.items()}


def planned_table(by_tower: Mapping[str, Runs]) -> str:
    """The planned family, with the gain at the large batch beside it; by finished tower."""
    tests = planned(by_tower)
    lines = []
    for tower, runs in by_tower.items():
        for metric in PRIMARY if is_finished(tower, runs) else ():
            large = gains(runs, metric, BATCHES[1])
            lines.append(
                [
                    f"{TOWERS[tower]}: {metric}",
                    test_text(tests.get((tower, metric, GAIN))),
                    text_of(paired(large, dict.fromkeys(large, 0.0))),
                    test_text(tests.get((tower, metric, MORE))),
                ]
            )
    head = ["a teacher's prototypes, beside CLIP for their time without the teacher's", GAIN]
    head += [f"at {BATCHES[1]} (not corrected)", MORE]
    return table(head, lines) if lines else ""


def test_text(test: tuple[Difference, float] | None) -> str:
    """A planned test's cell."""
    if test is None:
        return "no answer: too many runs diverged"
    delta, p = test
    return f"{delta.text(p)}, n = {delta.seeds}"


def by_set(runs: Runs, batch: int) -> str:
    """In how many of the judged sets zero-shot names more drawings, over the seeds of both rows."""
    gained: Counter[str] = Counter()
    ours, equal = (runs[name(row, batch)] for row in (OURS, EQUAL_TIME))
    for seed in ours.keys() & equal.keys():
        if not ("named" in ours[seed] and "named" in equal[seed]):
            continue  # one of them diverged
        for run, sign in ((ours[seed], 1), (equal[seed], -1)):
            for of_set, (_, right) in run["named"].items():
                gained[of_set] += sign * right
    more, fewer = (sum(sign * right > 0 for right in gained.values()) for sign in (1, -1))
    return f"at {batch} more drawings in {more} of {len(gained)} sets, fewer in {fewer}"


def rows_table(runs: Runs) -> str:
    """CLIP's values at equal time, and differences to them at the same batch, not corrected."""
    lines = []
    for row, by_seed in sorted(runs.items(), key=lambda item: order(item[1])):
        run = next(iter(by_seed.values()))
        equal = name(EQUAL_TIME, run["batch"], run["icons"])
        line = [row, seeds_of(runs, row), f"{run['lr']:g}, {run['epochs']:g}"]
        for metric in METRICS:
            if row == equal:
                line.append(mean(values(runs, row, metric).values()))
            else:
                line.append(text_of(difference(runs, row, equal, metric)))
        lines.append(line)
    return table(["", "seeds", "lr, epochs", *METRICS], lines) if lines else ""


def seeds_of(runs: Runs, row: str) -> str:
    """How many runs of a row there are, and how many have scores."""
    every, scored = len(runs[row]), len(values(runs, row, PRIMARY[0]))
    return str(every) if scored == every else f"{scored} of {every}"


def order(by_seed: Mapping[int, Run]) -> tuple[int, int, bool]:
    """Tables go by icons and batch; the row that others are beside comes first."""
    run = next(iter(by_seed.values()))
    return run["icons"], run["batch"], run["row"] != EQUAL_TIME


def batches_table(runs: Runs) -> str:
    """The gains at each batch in the seeds that all batches have, once there are more batches than
    the planned ones: which seeds were judged moves a gain as much as the batch does."""
    batches = sorted({next(iter(by_seed.values()))["batch"] for by_seed in runs.values()})
    batches = [batch for batch in batches if gains(runs, PRIMARY[0], batch)]
    if len(batches) <= len(BATCHES):
        return ""
    seeds = set.intersection(*(set(gains(runs, PRIMARY[0], batch)) for batch in batches))
    lines = []
    for batch in batches:
        cells = []
        for metric in METRICS:
            gained = gains(runs, metric, batch)
            kept = {seed: gained[seed] for seed in seeds if seed in gained}
            cells.append(text_of(paired(kept, dict.fromkeys(kept, 0.0))))
        lines.append([str(batch), *cells])
    return table([f"gain by batch, in the same {len(seeds)} seeds", *METRICS], lines)


def beside_rivals(runs: Runs) -> str:
    """What a teacher's prototypes gain over each other row at the two batches."""
    lines = []
    for batch in BATCHES:
        ours = name(OURS, batch)
        for row in runs:
            if row.endswith(f", batch {batch}") and row != ours:
                cells = [text_of(difference(runs, ours, row, metric)) for metric in METRICS]
                if set(cells) != {"–"}:
                    lines.append([f"to {row}", *cells])
    return table(["a teacher's prototypes alone", *METRICS], lines) if lines else ""


def rates_table(finished: Iterable[Run], tower: str) -> str:
    """What a teacher's prototypes gain over CLIP at equal time by the learning rates of the two, in
    the seeds that were judged at more than one."""
    judged: dict[tuple[str, int], dict[float, dict[int, Run]]] = {}
    seeds: dict[int, set[int]] = {}
    for run in finished:
        if run["stage"] not in ("main", "rate") or (run["tower"], run["icons"]) != (tower, ICONS):
            continue
        by_lr = judged.setdefault((run["row"], run["batch"]), {})
        by_lr.setdefault(run["lr"], {})[run["seed"]] = run
        if run["stage"] == "rate":
            seeds.setdefault(run["batch"], set()).add(run["seed"])
    lines = []
    for batch in sorted(seeds):
        of_ours, of_clip = (
            {
                lr: {seed: run for seed, run in by_seed.items() if seed in seeds[batch]}
                for lr, by_seed in sorted(judged.get((row, batch), {}).items())
            }
            for row in (OURS, EQUAL_TIME)
        )
        for lr, ours in of_ours.items():
            for lr_of_clip, clip in of_clip.items():
                pair = {OURS: ours, EQUAL_TIME: clip}
                cells = [text_of(difference(pair, OURS, EQUAL_TIME, metric)) for metric in METRICS]
                rates = f"batch {batch}: {lr:g}, CLIP {lr_of_clip:g}"
                if set(cells) == {"–"}:
                    continue
                lines.append([rates, str(len(ours.keys() & clip.keys())), *cells])
    head = ["a teacher's prototypes to CLIP at equal time, by learning rate", "seeds", *METRICS]
    return table(head, lines) if lines else ""


def best_table(finished: Sequence[Run], tower: str) -> str:
    """Each method at its best batch, for the same time, and two controls of CLIP."""
    runs = {
        f"{row}{control}": by_seed
        for stage, control in BEST.items()
        for row, by_seed in runs_of(finished, tower, stage).items()
    }
    lines = []
    rows: dict[str, list[str]] = {OURS: [], EQUAL_TIME: []}
    for row, by_seed in runs.items():
        run = next(iter(by_seed.values()))
        rows[run["row"]].append(row)
        seconds = [run["cpu_seconds"] for run in by_seed.values() if "cpu_seconds" in run]
        line = [row, seeds_of(runs, row), f"{run['lr']:g}, {run['epochs']:g}", mean(seconds, ".0f")]
        lines.append([*line, *(mean(values(runs, row, metric).values()) for metric in METRICS)])
    for ours in rows[OURS]:
        for clip in rows[EQUAL_TIME]:
            deltas = [difference(runs, ours, clip, metric) for metric in METRICS]
            seeds = deltas[0].seeds if deltas[0] else 0
            lines.append([f"{OURS} minus {clip}", str(seeds), "", "", *map(text_of, deltas)])
    what = (
        "each at the batch that was its best in tuning, for the time of 4 epochs of "
        f"{OURS} at {BATCHES[0]} (not that of the tables above)"
    )
    head = [what, "seeds", "lr, epochs", "own CPU seconds", *METRICS]
    return table(head, lines) if lines else ""


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a run's first episodes; every later one takes as long as the last of them."""

    first: tuple[float, ...]

    def seconds(self, episodes: float) -> float:
        """Of a run of so many episodes."""
        return sum(self.first) + (episodes - len(self.first)) * self.first[-1]

    def episodes(self, seconds: float) -> float:
        """How many can be done in so many seconds."""
        return len(self.first) + (seconds - sum(self.first)) / self.first[-1]


def costs(records: Sequence[Run], row: str) -> tuple[Cost, Cost]:
    """CLIP's and the row's, means over the timed pairs."""
    seconds = [record["seconds_by_episode"] for record in records]
    clip = statistics.fmean(value for by_row in seconds for value in by_row[CLIP])
    columns = zip(*(by_row[row] for by_row in seconds), strict=True)
    return Cost((clip,)), Cost(tuple(map(statistics.fmean, columns)))


def ratio_of(pairs: Sequence[Run], row: str) -> float:
    """CPU time of a row's run over CLIP's run of as many samples."""
    clip, of_row = costs(pairs, row)
    return of_row.seconds(EPISODES) / clip.seconds(EPISODES)


def costs_table(finished: Sequence[Run]) -> str:
    """What was timed."""
    pairs: dict[tuple[str, str, int], list[Run]] = {}
    for run in finished:
        if run["stage"] == "pairs":
            pairs.setdefault((run["tower"], run["row"], run["batch"]), []).append(run)
    lines = []
    for (tower, row, batch), timed in pairs.items():
        ratios = [ratio_of([pair], row) for pair in timed]
        clip = [s for pair in timed for s in pair["seconds_by_episode"][CLIP]]
        last = [pair["seconds_by_episode"][row][-1] for pair in timed]
        span = f"{ratio_of(timed, row):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        cells = [TOWERS[tower], name(row, batch), str(len(timed)), mean(clip, ".2f")]
        lines.append([*cells, mean(last, ".2f"), span])
    head = ["CPU seconds, timed alone", "", "pairs", "CLIP's episode", "the row's last episode"]
    parts = [
        table([*head, f"ratio of {EPISODES} episodes (lowest … highest pair)"], lines)
        if lines
        else ""
    ]
    parts += [
        f"The teacher of a run ({TOWERS[run['tower']]}, timed beside its pairs): "
        f"{run['texts']:,} names, {run['cpu_seconds']:.0f} CPU seconds."
        for run in finished
        if run["stage"] == "teacher"
    ]
    return "\n\n".join(filter(None, parts))


def tuning_table(finished: Iterable[Run]) -> str:
    """What was tried on the sets for tuning: mean score by learning rate, the best in bold."""
    tried: dict[tuple[str, str, float], dict[float, list[float]]] = {}
    towers = list(TOWERS)

    def place(run: Run) -> tuple[Any, ...]:
        """Where the table has a run."""
        of_row = (towers.index(run["tower"]), run["icons"], run["batch"], run["row"])
        return *of_row, run["epochs"], run["lr"]

    for run in sorted((run for run in finished if run["stage"] == "tune"), key=place):
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


Gained = dict[str, dict[str, dict[int, Difference]]]  # by tower, primary metric and batch


def gained_by_batch(by_tower: Mapping[str, Runs]) -> Gained:
    """For the picture: the gains over CLIP at equal time; of no tower before its planned runs are
    finished."""
    gained: Gained = {}
    for tower, runs in by_tower.items():
        if not is_finished(tower, runs):
            continue
        of_tower = gained.setdefault(tower, {metric: {} for metric in PRIMARY})
        batches = {next(iter(by_seed.values()))["batch"] for by_seed in runs.values()}
        for batch in sorted(batches):
            for metric in PRIMARY:
                of_seeds = gains(runs, metric, batch)
                delta = paired(of_seeds, dict.fromkeys(of_seeds, 0.0))
                if delta is not None and delta.seeds >= 3:
                    of_tower[metric][batch] = delta
    return {tower: of_tower for tower, of_tower in gained.items() if all(of_tower.values())}


def gained_at_one_rate(finished: Iterable[Run], by_tower: Mapping[str, Runs]) -> Gained:
    """The gains at the planned batches if CLIP has the learning rate of a teacher's prototypes,
    where tuning gave it another; of the towers that are finished."""
    clip: dict[tuple[str, int, float], dict[int, Run]] = {}
    for run in finished:
        if (run["stage"], run["row"], run["icons"]) == ("rate", EQUAL_TIME, ICONS):
            place = run["tower"], run["batch"], run["lr"]
            clip.setdefault(place, {})[run["seed"]] = run
    gained: Gained = {}
    for tower, runs in by_tower.items():
        for batch in BATCHES if is_finished(tower, runs) else ():
            ours = runs[name(OURS, batch)]
            pair = {OURS: ours}
            pair[EQUAL_TIME] = clip.get((tower, batch, next(iter(ours.values()))["lr"]), {})
            for metric in PRIMARY:
                delta = difference(pair, OURS, EQUAL_TIME, metric)
                if delta is not None and delta.seeds >= 3:
                    gained.setdefault(tower, {}).setdefault(metric, {})[batch] = delta
    return gained


def picture_title(gained: Gained, at_one_rate: Gained) -> str:
    """The picture in a sentence: its alt text."""

    def points(of_tower: Mapping[str, Mapping[int, Difference]]) -> str:
        return "; ".join(
            f"{metric}: "
            + ", ".join(
                f"{delta.text().strip('*')} at {batch}" for batch, delta in by_batch.items()
            )
            for metric, by_batch in of_tower.items()
        )

    sentence = (
        "What a teacher's prototypes gain over CLIP at equal CPU time, the teacher's not counted, "
        "by batch size, with 95 % intervals."
    )
    for tower, of_tower in gained.items():
        sentence += f" {TOWERS[tower]} ({seeds_by_batch(of_tower)}): {points(of_tower)}."
        if tower in at_one_rate:
            sentence += f" If CLIP has their learning rate: {points(at_one_rate[tower])}."
    return sentence


def seeds_by_batch(of_tower: Mapping[str, Mapping[int, Difference]]) -> str:
    """How many seeds a tower's points have: "16 seeds at 64, 256; 3 at 32"."""
    batches: dict[int, list[str]] = {}
    for batch, delta in of_tower[PRIMARY[0]].items():
        batches.setdefault(delta.seeds, []).append(f"{batch:,}")
    most_first = sorted(batches, reverse=True)
    most, *fewer = (f"{seeds} {{}}at {', '.join(batches[seeds])}" for seeds in most_first)
    return "; ".join([most.format("seeds "), *(part.format("") for part in fewer)])


def section(finished: Sequence[Run], floors: Sequence[str]) -> str:
    """What the page shows."""
    by_tower = {tower: runs_of(finished, tower) for tower in TOWERS}
    counts = [
        f"{finished_of(tower, runs)} of {wanted_of(tower)} ({TOWERS[tower]})"
        for tower, runs in by_tower.items()
    ]
    tuned = sum(run["stage"] == "tune" for run in finished)
    parts = [
        planned_table(by_tower) or "**No answer yet**: no tower's planned runs are all finished.",
        f"Finished of the planned runs are {' and '.join(counts)}; tuning runs: {tuned}; "
        f"records in all: {len(finished)}.",
    ]
    if gained := gained_by_batch(by_tower):
        title = picture_title(gained, gained_at_one_rate(finished, by_tower))
        parts.append(f"![{title}](small-batches.svg)")
    for tower, runs in by_tower.items():
        if not is_finished(tower, runs):  # a result in the making is not shown
            continue
        sets = [by_set(runs, batch) for batch in BATCHES]
        parts.append(f"Zero-shot names ({TOWERS[tower]}, all seeds): {'; '.join(sets)}.")
        tables = [
            rows_table(runs),
            batches_table(runs),
            beside_rivals(runs),
            rates_table(finished, tower),
            best_table(finished, tower),
        ]
        words = "Exploratory, not corrected: values of CLIP at equal time, differences to them."
        parts.append(details(f"Every row: {TOWERS[tower]}", [words, *tables]))
    parts.append(details("What needs no training", [floors_table(finished, floors)]))
    parts.append(details("Time", [costs_table(finished)]))
    parts.append(details("Tuning", [tuning_table(finished)]))
    if finished:
        parts.append(details("Runs", [origin(finished)]))
    return "\n\n".join(filter(None, parts))
