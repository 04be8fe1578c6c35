"""Methods over seeds: which runs belong together, what differs, and what can be claimed.

``compare_rows`` makes a ``Comparison`` of the finished runs of some rows; the terminal, the page
and comparison.json show its values.
"""

from __future__ import annotations

import math
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
from protoclip.settings.comparison import Longer, Record, Shown, longer_baseline, settings_of

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
        ratio = f"{math.exp(self.log_ratio):.2f} times"
        if math.isinf(self.half):
            return ratio
        percent = 100 * math.expm1(self.half)
        return f"{ratio} (± {round(percent, 0 if percent >= 10 else 1):g} %)"


@dataclass(frozen=True)
class Contrast:
    """Everything about a row and the baseline."""

    row: str
    baseline: str
    times: Times
    cells: Mapping[Score, Cell]
    other_pictures: str = ""  # a sentence if they were judged on different pictures
    longer: Longer | None = None  # the baseline that trains for as long as the row

    @property
    def starred(self) -> list[tuple[str, str]]:
        """The scores that differ significantly: evaluation set, metric."""
        return [(score.key, score.metric) for score, cell in self.cells.items() if cell.significant]


@dataclass(frozen=True)
class Comparison:
    """What a comparison says."""

    rows: Sequence[Row]  # the first is the baseline
    primary: Sequence[Score]
    seeds: tuple[int, ...]  # those that all rows have finished
    contrasts: Sequence[Contrast]  # one for each other row
    may_claim: bool = False  # there are seeds enough for a test, all of them planned beforehand
    tests: int = 0  # primary scores of this table and of those that were shown before
    added: Sequence[int] = ()  # seeds that came after a result was shown
    failed: Mapping[str, str] = field(default_factory=dict)  # run -> why

    @property
    def scores(self) -> list[Score]:
        """The rows of the table, the primary scores first."""
        scores = dict.fromkeys(score for contrast in self.contrasts for score in contrast.cells)
        return sorted(scores, key=lambda score: score not in self.primary)


def primary_of(metrics: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """The scores that are tested, from the names of each evaluation set's: zero-shot, 1-NN and
    k-means AMI of the first label that has them; without classes R@1 in both directions."""
    places = [(key, *name.rpartition("/")) for key, names in metrics.items() for name in names]
    labels = list(dict.fromkeys(label for _, label, _, _ in places))
    first: dict[str, tuple[str, str]] = {}  # by metric
    for key, label, slash, metric in sorted(places, key=lambda place: labels.index(place[1])):
        first.setdefault(metric, (key, label + slash + metric))
    of_classes = [first[metric] for metric in WITH_CLASSES if metric in first]
    return of_classes or [first[metric] for metric in RECALLS if metric in first]


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
    pairs = {row.name: _pair(row, baseline, seeds) for row in others}
    tests = {
        (name, score): paired(ours - theirs)
        for name, (values, _) in pairs.items()
        for score, (theirs, ours) in values.items()
    }
    of_primary = [Score(*place) for place in primary]
    family = [(name, score) for name, score in tests if score in of_primary]
    here = {(row.name, baseline.name) for row in others}
    shown = record.shown if record else []
    earlier = sum(pair[:2] not in here for pair in shown) * len(primary)
    corrected_p = holm(np.array([tests[test].p for test in family]), earlier)
    corrected = dict(zip(family, corrected_p.tolist(), strict=True))
    count = len(family) + earlier
    contrasts = []
    for row in others:
        values, different = pairs[row.name]
        first = next((pair for pair in shown if pair.row == row.name), None)
        # A first table errs in 5 % of all families, so a further baseline is tested only where the
        # first one was starred.
        is_further = first is not None and first.baseline != baseline.name
        starred = {Score(*place) for place in first.starred} if first else set()
        cells = {}
        for score, (theirs, ours) in values.items():
            test = tests[row.name, score]
            is_primary = score in of_primary
            p = corrected[row.name, score] if is_primary else float(test.p)
            tested = is_primary and may_claim and (not is_further or score in starred)
            cells[score] = Cell(
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
        times = _times(row.runs, baseline.runs, seeds)
        longer = None
        if record and times.differ:
            longer = longer_baseline(record, row.name, math.exp(times.log_ratio))
        contrasts.append(Contrast(row.name, baseline.name, times, cells, different, longer))
    in_tests = {score: score for _, score in tests}
    return Comparison(
        rows=rows,
        primary=[in_tests[score] for score in of_primary if score in in_tests],
        seeds=tuple(seeds),
        contrasts=contrasts,
        may_claim=may_claim,
        tests=count,
        added=added,
        failed=failed or {},
    )


def _pair(row: Row, baseline: Row, seeds: Sequence[int]) -> tuple[dict[Score, np.ndarray], str]:
    """The values of a baseline and of a row, [2, seeds], in the scores that all runs have on the
    same pictures; and a sentence if some were judged on different pictures."""
    theirs, ours = (
        [{score: score for score in scores_of(side.runs[seed].trained)} for seed in seeds]
        for side in (baseline, row)
    )
    values: dict[Score, np.ndarray] = {}
    sentence = ""
    for score in ours[0] if seeds else ():
        if not all(score in run and math.isfinite(run[score].value) for run in [*theirs, *ours]):
            continue
        sides = [[run[score] for run in side] for side in (theirs, ours)]
        if different := other_pictures(row.name, baseline.name, sides[1], sides[0]):
            sentence = different
        else:
            values[score] = np.array([[run.value for run in side] for side in sides])
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

    def mean(measured: np.ndarray) -> float:
        return float(measured.mean()) if seeds else math.nan

    return Times(
        baseline=mean(theirs),
        row=mean(ours),
        teacher=mean(seconds(row, "teacher")),
        log_ratio=float(ratio.mean),
        half=float(ratio.half),
    )


def other_pictures(name: str, other: str, ours: Sequence[Score], theirs: Sequence[Score]) -> str:
    """A sentence if a score of two sides was measured on different pictures."""
    measured = [{(score.fingerprint, score.samples) for score in side} for side in (ours, theirs)]
    if len(measured[0] | measured[1]) == 1:
        return ""
    counts = [
        " or ".join(f"{samples:,}" for samples in sorted({samples for _, samples in side}))
        for side in measured
    ]
    return (
        f"{name} and {other} were judged on different pictures ({counts[0]} and {counts[1]}), so "
        "no difference is shown."
    )


def rows_of(record: Record, outcomes: Mapping[str, Run]) -> list[Row]:
    """The rows of a comparison's folder that ``outcomes`` has."""
    return [
        Row(
            name,
            outcomes[name],
            settings_of(config),
            {seed: record.folder(name, seed) for seed in outcomes[name]},
        )
        for name, config in record.rows.items()
        if name in outcomes
    ]


def with_shown(record: Record, comparison: Comparison) -> Record:
    """The record once a comparison is shown."""
    result = values_of(comparison)
    if not comparison.seeds:
        return replace(record, result=result)
    shown = {pair[:2]: pair for pair in record.shown}
    for contrast in comparison.contrasts:
        pair = Shown(contrast.row, contrast.baseline, contrast.starred)
        shown[pair[:2]] = pair
    shown_seeds = record.shown_seeds or record.seeds
    return replace(record, shown_seeds=shown_seeds, shown=list(shown.values()), result=result)


# What it says, in words.


def claims_of(comparison: Comparison) -> list[str]:
    """What can be claimed, to be quoted: what cannot be said, then a paragraph for each row."""
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
    elif comparison.added:
        added = ", ".join(map(str, comparison.added))
        words = "Seed {} was" if len(comparison.added) == 1 else "Seeds {} were"
        limits.append(
            f"{words.format(added)} added after a result was shown, so no difference is called "
            "significant."
        )
    paragraphs = [" ".join(filter(None, limits))]
    for contrast in comparison.contrasts if seeds else ():
        row = f"{contrast.row} minus {contrast.baseline}"
        sentences = [
            f"In {score.words}, {row} is {difference_words(cell)}{verdict_on(cell, comparison)}."
            for score in comparison.primary
            if (cell := contrast.cells.get(score))
        ]
        paragraphs.append(" ".join([*sentences, time_words(comparison, contrast)]))
    if comparison.may_claim and comparison.primary:
        corrected = f", Holm over {plural(comparison.tests, 'test')}" * (comparison.tests > 1)
        paragraphs.append(
            f"The 95 % intervals (t, {len(seeds)} seeds, paired{corrected}) cover the randomness "
            "of training on these held-out pictures, and nothing else."
        )
    return list(filter(None, paragraphs))


def verdict_on(cell: Cell, comparison: Comparison) -> str:
    """Whether the difference in a primary score is significant, in words."""
    if cell.significant:
        return ", significant"
    if cell.tested:
        needed = cell.seeds_needed or f"more than {MOST_SEEDS}"
        return f", not significant ({needed} seeds would show it with 80 % power)"
    if comparison.may_claim:
        return ", not tested, as it was not significant against the first baseline"
    return ""


def difference_words(cell: Cell) -> str:
    """A difference with half of its interval."""
    half = "" if math.isinf(cell.half) else f" ± {number(cell.half)}"
    return number(cell.difference, "+") + half


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

        def line(words: str, baseline: str, row: str, difference: str) -> str:
            return f"  {words:<34}{baseline:>10}{row:>9}   {difference}".rstrip()

        lines = [
            f"{contrast.row} against {contrast.baseline}",
            line("", "baseline", "row", "difference (95 %)"),
            line("training time (s)", number(times.baseline), number(times.row), times.words),
        ]
        if times.teacher > 0:
            lines.append(line("teacher, not in this time (s)", "", number(times.teacher), ""))
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
            star = " *" if cell.significant else ""
            means = number(cell.baseline_mean), number(cell.mean)
            lines.append(line(words, *means, difference_words(cell) + star))
        blocks.append("\n".join(lines))
    footer = [line for claim in claims_of(comparison) for line in textwrap.wrap(claim, 98)]
    if any(contrast.starred for contrast in comparison.contrasts):
        footer.insert(0, "* significant after Holm's correction over all primary scores")
    blocks.append("\n".join(footer))
    blocks += [
        f"To compare {contrast.row} with {contrast.baseline} at equal time:\n{longer.command}"
        for contrast in comparison.contrasts
        if (longer := contrast.longer) and longer.command
    ]
    return "\n\n".join(blocks)


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
