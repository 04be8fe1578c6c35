"""Methods over seeds: which runs belong together, what differs, and what can be claimed.

``compare_rows`` makes a ``Comparison`` of the finished runs of some rows; the terminal, the page
and comparison.json show its values.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protoclip.common.files import plural
from protoclip.evaluate.results import Outcome, Score, number, scores_of
from protoclip.report.statistics import (
    LEAST_SEEDS,
    LEVEL,
    MOST_SEEDS,
    holm,
    paired,
    seeds_needed,
)
from protoclip.settings.comparison import (
    FILE,
    Longer,
    Record,
    longer_baseline,
    read_record,
    settings_of,
)

WITH_CLASSES = ("acc1", "nn_acc1", "ami")  # the primary scores; without classes R@1:
RECALLS = ("text_retrieval_recall@1", "image_retrieval_recall@1")
TOLERANCE = math.log1p(0.05)  # of the log ratio of training times that are called the same
Run = Mapping[int, Outcome]  # by seed


class Row(NamedTuple):
    """The finished runs of one method, by seed."""

    name: str
    runs: Run
    settings: Mapping[str, Any]
    folders: Mapping[int, Path] = {}


class Cell(NamedTuple):
    """A row minus its baseline in one score, over the seeds."""

    baseline_mean: float
    mean: float
    differences: tuple[float, ...]  # by seed
    difference: float
    half: float  # of the 95 % interval; infinite below three seeds
    p: float  # after Holm for a primary score, else as it is
    tested: bool
    significant: bool
    seeds_needed: int | None  # to show a difference of this size; None: more than 50


class Times(NamedTuple):
    """What a row and its baseline take to train, without evaluation, checkpoints and plots."""

    baseline: float  # seconds, mean over the seeds
    row: float
    teacher: float  # of the row, not included
    log_ratio: float  # over the seeds whose runs had the machine to themselves; NaN: none
    half: float  # of its 95 % interval; infinite below three seeds

    @property
    def differ(self) -> bool:
        return abs(self.log_ratio) > max(self.half, TOLERANCE)

    @property
    def words(self) -> str:
        """The ratio with its interval."""
        if math.isnan(self.log_ratio):
            return "not known"
        half = "" if math.isinf(self.half) else f" (± {100 * math.expm1(self.half):.2g} %)"
        return f"{math.exp(self.log_ratio):.2f} times{half}"


@dataclass(frozen=True)
class Contrast:
    """Everything about a row and the baseline."""

    row: str
    baseline: str
    times: Times
    cells: Mapping[Score, Cell]
    other_pictures: str = ""  # a sentence if they were judged on different pictures
    longer: Longer | None = None  # the baseline that trains for as long as the row


@dataclass(frozen=True)
class Comparison:
    """What a comparison says."""

    rows: Sequence[Row]  # the first is the baseline
    primary: Sequence[Score]
    seeds: tuple[int, ...]  # those that all rows have finished
    contrasts: Sequence[Contrast]  # one for each other row
    tests: int = 0  # primary scores of this table and of those that were shown before
    added: Sequence[int] = ()  # seeds that came after a result was shown
    failed: Mapping[str, str] = field(default_factory=dict)  # run -> why

    @property
    def may_claim(self) -> bool:
        """Whether there are seeds enough for a test, all of them planned beforehand."""
        return len(self.seeds) >= LEAST_SEEDS and not self.added

    @property
    def scores(self) -> list[Score]:
        """The rows of the table, the primary scores first."""
        scores = dict.fromkeys(score for contrast in self.contrasts for score in contrast.cells)
        return sorted(scores, key=lambda score: score not in self.primary)


def primary_of(metrics: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """The scores that are tested, from the names of each evaluation set's: zero-shot, 1-NN and
    k-means AMI of the first label that has them; without classes R@1 in both directions."""
    labels = dict.fromkeys(
        name.rpartition("/")[0] for names in metrics.values() for name in names if "/" in name
    )
    chosen = []
    for wanted in WITH_CLASSES:
        places = [
            (key, f"{label}/{wanted}")
            for label in labels
            for key, names in metrics.items()
            if f"{label}/{wanted}" in names
        ]
        chosen += places[:1]
    recalls = [
        [(key, name) for name in RECALLS] for key, names in metrics.items() if RECALLS[0] in names
    ]
    return chosen or [score for of_set in recalls[:1] for score in of_set]


def compare_rows(
    rows: Sequence[Row],
    primary: Sequence[tuple[str, str]],
    record: Record | None = None,
    failed: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare each of the rows with the first, on the seeds that all have finished.

    Args:
        primary: the scores that are tested: evaluation set, metric.
        record: the folder of these rows, if they are of one.
        failed: run -> why.
    """
    baseline, *others = rows
    seeds = sorted(set.intersection(*(set(row.runs) for row in rows)))
    added = record.added if record else []
    may_claim = len(seeds) >= LEAST_SEEDS and not added
    pairs = {row.name: _values(row, baseline, seeds) for row in others}
    tests = {
        (name, score): paired(ours - theirs)
        for name, (values, _) in pairs.items()
        for score, (theirs, ours) in values.items()
    }
    family = [test for test in tests if test[1].place in primary]
    here = {(row.name, baseline.name) for row in others}
    earlier = sum(pair not in here for pair in record.shown) * len(primary) if record else 0
    corrected_p = holm(np.array([tests[test].p for test in family]), earlier)
    corrected = dict(zip(family, corrected_p.tolist(), strict=True))
    count = len(family) + earlier

    def cell(name: str, score: Score) -> Cell:
        theirs, ours = pairs[name][0][score]
        test = tests[name, score]
        is_primary = (name, score) in corrected
        p = corrected.get((name, score), float(test.p))
        may_star = record is None or may_follow(record, name, score)
        tested = is_primary and may_claim and may_star
        return Cell(
            baseline_mean=float(theirs.mean()),
            mean=float(ours.mean()),
            differences=tuple((ours - theirs).tolist()),
            difference=float(test.mean),
            half=float(test.half),
            p=p,
            tested=tested,
            significant=tested and p < LEVEL,
            seeds_needed=seeds_needed(ours - theirs, LEVEL / count) if is_primary else None,
        )

    contrasts = []
    for row in others:
        times = _times(row.runs, baseline.runs, seeds)
        longer = None
        if record and times.differ:
            longer = longer_baseline(record, row.name, math.exp(times.log_ratio))
        values, sentence = pairs[row.name]
        cells = {score: cell(row.name, score) for score in values}
        contrasts.append(Contrast(row.name, baseline.name, times, cells, sentence, longer))
    scores = {score.place: score for _, score in tests}
    return Comparison(
        rows=rows,
        primary=[scores[place] for place in primary if place in scores],
        seeds=tuple(seeds),
        contrasts=contrasts,
        tests=count,
        added=added,
        failed=failed or {},
    )


def may_follow(record: Record, row: str, score: Score) -> bool:
    """Whether a score of a row can be starred. A first table errs in 5 % of all families, so what
    follows may only err where it did: a further baseline is tested where the first one was starred.
    """
    baselines = [baseline for name, baseline in record.shown if name == row]
    is_first = not baselines or baselines[0] == record.baseline
    return is_first or (row, *score.place) in record.starred


def with_shown(record: Record, comparison: Comparison) -> Record:
    """The record once a comparison is shown."""
    if not comparison.seeds:
        return replace(record, result=values_of(comparison))
    stars = [
        (contrast.row, *score.place)
        for contrast in comparison.contrasts
        for score, cell in contrast.cells.items()
        if cell.significant
    ]
    pairs = [(contrast.row, contrast.baseline) for contrast in comparison.contrasts]
    return replace(
        record,
        shown_seeds=record.shown_seeds or record.seeds,
        shown=list(dict.fromkeys([*record.shown, *pairs])),
        starred=list(dict.fromkeys([*record.starred, *stars])),
        result=values_of(comparison),
    )


def _values(
    row: Row, baseline: Row, seeds: Sequence[int]
) -> tuple[dict[Score, tuple[np.ndarray, np.ndarray]], str]:
    """The values of a baseline and of a row, [seeds] each, in the scores that all runs have on the
    same pictures; and a sentence if some were judged on different pictures."""
    theirs, ours = ([side.runs[seed] for seed in seeds] for side in (baseline, row))
    values: dict[Score, tuple[np.ndarray, np.ndarray]] = {}
    sentence = ""
    for score in scores_of(ours[0].trained) if seeds else ():
        sides = tuple(np.array([run.value(score) for run in side]) for side in (theirs, ours))
        if not np.isfinite(sides).all():
            continue
        if different := other_pictures(row.name, baseline.name, ours, theirs, score.key):
            sentence = different
        else:
            values[score] = (sides[0], sides[1])
    return values, sentence


def _times(row: Run, baseline: Run, seeds: Sequence[int]) -> Times:
    """What a row and its baseline take to train; the ratio is of runs that had the machine to
    themselves."""

    def seconds(runs: Run, phase: str) -> np.ndarray:
        return np.array([runs[seed].work_seconds.get(phase, math.nan) for seed in seeds])

    theirs = seconds(baseline, "training")
    ours = seconds(row, "training")
    alone = [row[seed].shared_machine is baseline[seed].shared_machine is False for seed in seeds]
    ratio = paired(np.log(ours / theirs)[alone] if any(alone) else np.array([math.nan]))
    means = [x.mean() if seeds else math.nan for x in (theirs, ours, seconds(row, "teacher"))]
    return Times(*map(float, (*means, ratio.mean, ratio.half)))


def other_pictures(
    name: str, other: str, ours: Sequence[Outcome], theirs: Sequence[Outcome], key: str
) -> str:
    """A sentence if runs were judged on different pictures, by the fingerprints of a set."""
    judged = [
        {(outcome.trained[key].fingerprint, outcome.trained[key].samples) for outcome in side}
        for side in (ours, theirs)
    ]
    if len(judged[0] | judged[1]) == 1:
        return ""
    counts = [
        " or ".join(f"{samples:,}" for samples in sorted({samples for _, samples in side}))
        for side in judged
    ]
    return (
        f"{name} and {other} were judged on different pictures ({counts[0]} and {counts[1]}), so "
        "no difference is shown."
    )


# Which runs belong together.


def of_record(
    record: Record, outcomes: Mapping[str, Run], failed: Mapping[str, str]
) -> Comparison | None:
    """The comparison of a folder, of the rows that ``outcomes`` has; None without the baseline or
    without another row."""
    rows = [
        Row(
            name,
            outcomes[name],
            settings_of(config),
            {seed: record.folder(name, seed) for seed in outcomes[name]},
        )
        for name, config in record.rows.items()
        if name in outcomes
    ]
    if len(rows) < 2 or rows[0].name != record.baseline:
        return None
    return compare_rows(rows, record.primary, record, failed)


class Listed(NamedTuple):
    """A run folder to be put with others."""

    name: str
    path: Path
    config: Mapping[str, Any]
    outcome: Outcome

    @property
    def row_name(self) -> str:
        """Its name without the seed, else that of the folder in which it lies."""
        name = re.sub(r"[-_, /]*seed[-_ ]?\d+$", "", self.name)
        return Path(name).name or self.path.resolve().parent.name


def group_runs(runs: Sequence[Listed]) -> list[Row]:
    """Rows of runs that differ only in the seed; the first row of plain CLIP comes first."""
    groups: dict[str, dict[int, Listed]] = {}
    for run in runs:
        seed = run.config.get("run", {}).get("seed", 0)
        settings = repr(sorted(settings_of(run.config).items()))
        while seed in groups.setdefault(settings, {}):
            settings += " again"
        groups[settings][seed] = run
    rows: list[Row] = []
    for by_seed in groups.values():
        first = next(iter(by_seed.values()))
        name = first.row_name
        if name in {row.name for row in rows}:
            name = f"{name} ({len(rows) + 1})"
        outcomes = {seed: run.outcome for seed, run in by_seed.items() if run.outcome.trained}
        folders = {seed: run.path for seed, run in by_seed.items()}
        rows.append(Row(name, outcomes, settings_of(first.config), folders))
    baseline = next((row for row in rows if row.settings.get("method") == "clip"), rows[0])
    return [baseline, *(row for row in rows if row is not baseline)]


def compare_runs(runs: Sequence[Listed]) -> Comparison | None:
    """The comparison of some run folders: that of ``protoclip compare`` if they are all in its
    folder, else of the groups that differ only in the seed; None without two groups."""
    roots = {run.path.resolve().parent.parent for run in runs}
    root = roots.pop()
    if not roots and (root / FILE).is_file():
        record = read_record(root)
        finished = {run.path.resolve(): run.outcome for run in runs if run.outcome.trained}
        outcomes: dict[str, dict[int, Outcome]] = {}
        for name, seed in record.runs:
            folder = record.folder(name, seed).resolve()
            if folder in finished:
                outcomes.setdefault(name, {})[seed] = finished[folder]
        return of_record(record, outcomes, record.result.get("failed", {}))
    rows = group_runs(runs)
    if len(rows) < 2:
        return None
    metrics: dict[str, Collection[str]] = {}
    for row in rows:
        for outcome in row.runs.values():
            for key, scores in outcome.trained.items():
                metrics.setdefault(key, scores.metrics)
    return compare_rows(rows, primary_of(metrics))


# What it says, in words.


def claims_of(comparison: Comparison) -> list[str]:
    """What can be claimed, to be quoted: paragraphs, one for each row."""
    seeds = comparison.seeds
    limits = [f"{run} failed: {why}." for run, why in comparison.failed.items()]
    if limits:
        limits.append("The seeds of failed runs are left out of all rows.")
    limits += [contrast.other_pictures for contrast in comparison.contrasts]
    if not seeds:
        limits.append("No seed has finished in all rows, so nothing can be compared.")
    elif len(seeds) < LEAST_SEEDS:
        limits.append(
            f"With {plural(len(seeds), 'seed')} no difference is tested for significance, which "
            "needs at least three seeds."
        )
    elif added := list(map(str, comparison.added)):
        words = f"Seed {added[0]} was" if len(added) == 1 else f"Seeds {', '.join(added)} were"
        limits.append(
            f"{words} added after a result was shown, so no difference is called significant."
        )
    paragraphs = [" ".join(filter(None, limits))]
    for contrast in comparison.contrasts if seeds else ():
        sentences = [
            _difference_words(comparison, contrast, score) for score in comparison.primary
            if score in contrast.cells
        ]  # fmt: skip
        paragraphs.append(" ".join([*sentences, time_words(comparison, contrast)]))
    if comparison.may_claim and comparison.primary:
        corrected = f", Holm over {plural(comparison.tests, 'test')}" * (comparison.tests > 1)
        paragraphs.append(
            f"The 95 % intervals (t, {len(seeds)} seeds, paired{corrected}) cover the randomness "
            "of training on these held-out pictures, and nothing else."
        )
    return list(filter(None, paragraphs))


def _difference_words(comparison: Comparison, contrast: Contrast, score: Score) -> str:
    cell = contrast.cells[score]
    half = "" if math.isinf(cell.half) else f" ± {cell.half:.3f}"
    verdict = ""
    if cell.significant:
        verdict = ", significant"
    elif cell.tested:
        needed = cell.seeds_needed or f"more than {MOST_SEEDS}"
        verdict = f", not significant ({needed} seeds would show it with 80 % power)"
    elif comparison.may_claim:
        verdict = f", not tested, as {contrast.row} was not significant when it was shown first"
    return (
        f"In {score.words}, {contrast.row} minus {contrast.baseline} is "
        f"{cell.difference:+.3f}{half}{verdict}."
    )


def time_words(comparison: Comparison, contrast: Contrast) -> str:
    """What a row takes to train, compared with the baseline."""
    row, baseline = contrast.row, contrast.baseline
    if math.isnan(contrast.times.log_ratio):
        return (
            f"How the training times of {row} and {baseline} compare is not known, as their runs "
            "shared the machine, or do not say whether they did."
        )
    seed = comparison.seeds[0]
    steps = {side.name: f"{side.runs[seed].steps:,} steps" for side in comparison.rows}
    return (
        f"{row} ({steps[row]}) took {contrast.times.words} the training time of {baseline} "
        f"({steps[baseline]})."
    )


def format_comparison(comparison: Comparison) -> str:
    """The table in the terminal, a block for each row, what it says, and the commands that would
    compare at equal time."""
    blocks = []
    sets = {score.key for score in comparison.scores}
    for contrast in comparison.contrasts:
        times = contrast.times
        lines = [
            f"{contrast.row} against {contrast.baseline}",
            f"  {'':<34}{'baseline':>10}{'row':>9}   difference (95 %)",
            f"  {'training time (s)':<34}{number(times.baseline):>10}{number(times.row):>9}   "
            f"{times.words}",
        ]
        if times.teacher > 0:
            lines.append(f"  {'teacher, not in this time (s)':<44}{number(times.teacher):>9}")
        title = ""
        for score in comparison.scores:
            if score not in contrast.cells:
                continue
            is_primary = score in comparison.primary
            if (section := "primary" if is_primary else score.title) != title:
                title = section
                lines.append(f"  {title}")
            cell = contrast.cells[score]
            words = f"  {score.words}"
            if is_primary and len(sets) > 1:
                words += f" ({score.key})"
            line = f"  {words:<34}{number(cell.baseline_mean):>10}{number(cell.mean):>9}   "
            lines.append(line + interval_words(cell))
        blocks.append("\n".join(lines))
    footer = [line for claim in claims_of(comparison) for line in textwrap.wrap(claim, 98)]
    if any(
        cell.significant for contrast in comparison.contrasts for cell in contrast.cells.values()
    ):
        footer.insert(0, "* significant after Holm's correction over all primary scores")
    blocks.append("\n".join(footer))
    blocks += [
        f"To compare {contrast.row} with {contrast.baseline} at equal time:\n{longer.command}"
        for contrast in comparison.contrasts
        if (longer := contrast.longer) and longer.command
    ]
    return "\n\n".join(blocks)


def interval_words(cell: Cell) -> str:
    """A difference with half of its interval; a star where it is significant."""
    half = "" if math.isinf(cell.half) else f" ± {number(cell.half)}"
    return f"{number(cell.difference, '+')}{half}{' *' if cell.significant else ''}"


def values_of(comparison: Comparison) -> dict[str, Any]:
    """The result for programs."""
    return {
        "seeds": list(comparison.seeds),
        "added": list(comparison.added),
        "failed": dict(comparison.failed),
        "text": " ".join(claims_of(comparison)),
        "tests": comparison.tests,
        "contrasts": [
            {
                "row": contrast.row,
                "baseline": contrast.baseline,
                "times": contrast.times._asdict(),
                "command": contrast.longer.command if contrast.longer else "",
                "scores": [
                    {
                        "set": score.key,
                        "metric": score.metric,
                        "primary": score in comparison.primary,
                        **cell._asdict(),
                    }
                    for score, cell in contrast.cells.items()
                ],
            }
            for contrast in comparison.contrasts
        ],
    }
