"""Methods over seeds: which runs belong together, what differs, and what can be claimed.

``compare_rows`` makes a ``Comparison`` of the finished runs of some rows; the terminal, the page
and comparison.json show its values.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protoclip.common.files import plural
from protoclip.evaluate.results import ROWS, Outcome, number, rows_of
from protoclip.report.statistics import LEVEL, MOST_SEEDS, holm, paired, seeds_needed
from protoclip.settings.comparison import FILE, Record, read_record, settings_of

WITH_CLASSES = ("acc1", "nn_acc1", "ami")  # the primary scores; without classes R@1:
RECALLS = ("text_retrieval_recall@1", "image_retrieval_recall@1")
TOLERANCE = 0.05  # of the training time of rows that are called equally long
LEAST_SEEDS = 3  # for a claim
Run = Mapping[int, Outcome]  # by seed


class Score(NamedTuple):
    """A row of the table."""

    key: str  # of the evaluation set
    metric: str
    title: str = ""  # of the set

    @property
    def words(self) -> str:
        label, _, metric = self.metric.rpartition("/")
        return ROWS[metric].format(label)


class Row(NamedTuple):
    """The finished runs of one method, by seed."""

    name: str
    runs: Run
    settings: Mapping[str, Any]
    folders: Mapping[int, Path] = {}


class Pair(NamedTuple):
    """A row and the one that it is compared with."""

    row: str
    baseline: str
    equal_time: bool  # whether the baseline was to train for as long


class Cell(NamedTuple):
    """A row minus its baseline in one score, over the seeds."""

    baseline_mean: float
    mean: float
    differences: tuple[float, ...]  # by seed
    difference: float
    half: float  # of the 95 % interval; infinite below three seeds
    p: float  # after Holm for a primary score of a claim, else as it is
    significant: bool
    seeds_needed: int | None  # to show a difference of this size; None: more than 50


@dataclass(frozen=True)
class Contrast:
    """Everything about one pair of rows."""

    pair: Pair
    time_ratio: float  # training time of the baseline over the row's; NaN: not known
    cells: Mapping[Score, Cell]
    other_pictures: str = ""  # a sentence if they were judged on different pictures

    @property
    def claims(self) -> bool:
        """Whether its primary scores are tested."""
        return self.pair.equal_time


@dataclass(frozen=True)
class Comparison:
    """What a comparison says."""

    rows: Sequence[Row]
    primary: Sequence[Score]
    seeds: tuple[int, ...]  # those that all rows have finished
    contrasts: Sequence[Contrast]
    added: tuple[int, ...] = ()  # seeds that came after a result was shown
    failed: Mapping[str, str] = field(default_factory=dict)  # run -> why
    count_teacher: bool = False

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


def training_seconds(outcome: Outcome, count_teacher: bool = False) -> float:
    """The work of a run's training; NaN for a run that did not note it."""
    work = outcome.work_seconds
    if not work.get("training"):
        return math.nan
    return work["training"] + (work.get("teacher", 0.0) if count_teacher else 0.0)


def compare_rows(
    rows: Sequence[Row],
    pairs: Iterable[Pair],
    primary: Sequence[tuple[str, str]],
    *,
    added: Sequence[int] = (),
    failed: Mapping[str, str] | None = None,
    count_teacher: bool = False,
) -> Comparison:
    """Compare the seeds that all rows have finished."""
    by_name = {row.name: row for row in rows}
    seeds = sorted(set.intersection(*(set(row.runs) for row in rows)))
    raw = [_contrast(by_name, pair, seeds, count_teacher) for pair in pairs]
    may_claim = len(seeds) >= LEAST_SEEDS and not added
    tested = [
        (number_of_contrast, score)
        for number_of_contrast, contrast in enumerate(raw)
        if contrast.claims
        for score in contrast.cells
        if (score.key, score.metric) in primary
    ]
    corrected = holm(np.array([raw[i].cells[score].p for i, score in tested] or [1.0]))
    p_of = dict(zip(tested, corrected.tolist(), strict=False))
    contrasts = []
    for i, contrast in enumerate(raw):
        cells = {}
        for score, cell in contrast.cells.items():
            p = p_of.get((i, score), cell.p)
            needed = None
            if (i, score) in p_of:
                needed = seeds_needed(np.array(cell.differences), LEVEL / len(tested))
            significant = may_claim and (i, score) in p_of and p < LEVEL
            cells[score] = cell._replace(p=p, significant=significant, seeds_needed=needed)
        contrasts.append(
            Contrast(contrast.pair, contrast.time_ratio, cells, contrast.other_pictures)
        )
    scores = dict.fromkeys(score for contrast in contrasts for score in contrast.cells)
    by_place = {(score.key, score.metric): score for score in scores}
    return Comparison(
        rows=rows,
        primary=[by_place[place] for place in primary if place in by_place],
        seeds=tuple(seeds),
        contrasts=contrasts,
        added=tuple(added),
        failed=failed or {},
        count_teacher=count_teacher,
    )


def _contrast(
    rows: Mapping[str, Row], pair: Pair, seeds: Sequence[int], count_teacher: bool
) -> Contrast:
    ours = [rows[pair.row].runs[seed] for seed in seeds]
    theirs = [rows[pair.baseline].runs[seed] for seed in seeds]
    times = [
        training_seconds(baseline, count_teacher=False) / training_seconds(run, count_teacher)
        for run, baseline in zip(ours, theirs, strict=True)
    ]
    ratio = float(np.mean(times)) if times else math.nan
    cells: dict[Score, Cell] = {}
    sentence = ""
    for key in dict.fromkeys(key for outcome in ours for key in outcome.trained):
        if not all(key in outcome.trained for outcome in [*ours, *theirs]):
            continue
        if different := other_pictures(pair.row, pair.baseline, ours, theirs, key):
            sentence = different
            continue
        title = ours[0].trained[key].title
        for metric, _ in rows_of(ours[0].trained[key].metrics):
            values = [
                np.array([outcome.trained[key].metrics.get(metric, math.nan) for outcome in side])
                for side in (ours, theirs)
            ]
            if np.isfinite(values).all():
                cells[Score(key, metric, title)] = _cell(*values)
    return Contrast(pair, ratio, cells, sentence)


def _cell(ours: np.ndarray, theirs: np.ndarray) -> Cell:
    differences = ours - theirs
    test = paired(differences)
    enough = len(differences) >= LEAST_SEEDS
    return Cell(
        baseline_mean=float(theirs.mean()),
        mean=float(ours.mean()),
        differences=tuple(differences.tolist()),
        difference=float(test.mean),
        half=float(test.half) if enough else math.inf,
        p=float(test.p) if enough else 1.0,
        significant=False,
        seeds_needed=None,
    )


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


def of_plan(record: Record, outcomes: Mapping[str, Run]) -> tuple[list[Row], list[Pair]]:
    """The rows of a comparison's folder, and the pairs that it is about."""
    plan = record.plan
    rows = []
    for name in plan.all_rows:
        settings = settings_of(record.config(name) or plan.rows[plan.baseline])
        folders = {seed: plan.folder(name, seed) for seed in outcomes.get(name, {})}
        rows.append(Row(name, outcomes.get(name, {}), settings, folders))
    pairs = [Pair(name, other, True) for name, other in plan.equal_time_rows.items()]
    return rows, pairs + [Pair(name, plan.baseline, False) for name in plan.others]


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


def group_runs(runs: Sequence[Listed]) -> tuple[list[Row], list[Pair]]:
    """Rows of runs that differ only in the seed. Each row is compared with the row of plain CLIP
    trained for about the same time, or if there is none with the first row."""
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
        names = [row.name for row in rows]
        name = first.row_name
        if name in names:
            name = f"{name} ({len(names) + 1})"
        outcomes = {seed: run.outcome for seed, run in by_seed.items() if run.outcome.trained}
        folders = {seed: run.path for seed, run in by_seed.items()}
        rows.append(Row(name, outcomes, settings_of(first.config), folders))
    baselines = [row for row in rows if row.settings.get("method") == "clip"]
    if len(baselines) in (0, len(rows)):
        baselines = rows[:1]
    pairs = []
    for row in rows:
        if row in baselines:
            continue
        nearest = min(baselines, key=lambda other: _time_distance(row, other))
        is_equal = _time_distance(row, nearest) <= math.log1p(TOLERANCE)
        pairs.append(Pair(row.name, nearest.name, is_equal))
    return rows, pairs


def _time_distance(row: Row, other: Row) -> float:
    """How far apart the training times of two rows are; infinite if one is not known."""
    times = [[training_seconds(outcome) for outcome in side.runs.values()] for side in (row, other)]
    if not all(times) or not np.isfinite(sum(times, [])).all():
        return math.inf
    return abs(math.log(np.mean(times[0]) / np.mean(times[1])))


def compare_runs(runs: Sequence[Listed]) -> Comparison | None:
    """The comparison of some run folders: that of ``protoclip compare`` if they are all of one,
    else of the groups that differ only in the seed; None without two groups."""
    roots = {run.path.resolve().parent.parent for run in runs}
    root = roots.pop()
    if not roots and (root / FILE).is_file():
        return _of_folder(read_record(root), runs)
    rows, pairs = group_runs(runs)
    if len(rows) < 2:
        return None
    metrics: dict[str, dict[str, float]] = {}
    for row in rows:
        for outcome in row.runs.values():
            for key, scores in outcome.trained.items():
                metrics.setdefault(key, dict(scores.metrics))
    return compare_rows(rows, pairs, primary_of(metrics))


def _of_folder(record: Record, runs: Sequence[Listed]) -> Comparison | None:
    """The comparison of some of the runs in a comparison's folder."""
    plan = record.plan
    outcomes = {run.path.resolve(): run.outcome for run in runs if run.outcome.trained}
    by_row: dict[str, dict[int, Outcome]] = {name: {} for name in plan.all_rows}
    for name, by_seed in by_row.items():
        for seed in plan.seeds:
            folder = plan.folder(name, seed).resolve()
            if folder in outcomes:
                by_seed[seed] = outcomes[folder]
    rows, pairs = of_plan(record, by_row)
    rows = [row for row in rows if row.runs]
    names = {row.name for row in rows}
    pairs = [pair for pair in pairs if {pair.row, pair.baseline} <= names]
    if not pairs:
        return None
    return compare_rows(
        rows,
        pairs,
        record.primary,
        added=record.added,
        failed=record.result.get("failed", {}),
        count_teacher=plan.count_teacher,
    )


# What it says, in words.


def paragraph(comparison: Comparison) -> str:
    """What can be claimed, to be quoted."""
    tested = [contrast for contrast in comparison.contrasts if contrast.claims]
    seeds = comparison.seeds
    if not seeds:
        return "No seed has finished in all rows, so nothing can be compared."
    sentences = []
    if not tested:
        sentences.append(
            "No row has a baseline trained for the same time, so the differences are at equal "
            "steps or of other lengths and are not tested for significance."
        )
    elif len(seeds) < LEAST_SEEDS:
        sentences.append(
            f"With {plural(len(seeds), 'seed')} the differences are not tested for significance, "
            "which needs at least three seeds."
        )
    elif comparison.added:
        which = ", ".join(map(str, comparison.added))
        sentences.append(
            f"Seeds added after a result was shown: {which}. Nothing is significant then, because "
            "adding seeds until a difference appears would find one."
        )
    for contrast in tested:
        sentences.append(_verdict(contrast, comparison))
    tests = sum(score in contrast.cells for contrast in tested for score in comparison.primary)
    if tests and len(seeds) >= LEAST_SEEDS:
        holm_words = f", Holm over {plural(tests, 'test')}" if tests > 1 else ""
        sentences.append(
            f"The 95 % intervals (t, paired by seed{holm_words}) cover the randomness of training "
            "on these held-out pictures, and nothing else."
        )
    return " ".join(sentences)


def _verdict(contrast: Contrast, comparison: Comparison) -> str:
    better: list[str] = []
    worse: list[str] = []
    undecided: list[str] = []
    needed: list[str] = []
    for score in comparison.primary:
        if score not in contrast.cells:
            continue
        cell = contrast.cells[score]
        half = "" if math.isinf(cell.half) else f" ± {cell.half:.3f}"
        words = f"{score.words} ({cell.difference:+.3f}{half})"
        if cell.significant:
            (better if cell.difference > 0 else worse).append(words)
            continue
        undecided.append(words)
        count = str(cell.seeds_needed) if cell.seeds_needed else f"more than {MOST_SEEDS}"
        needed.append(count)
    parts = []
    if better:
        parts.append(f"{_list(better)} improved")
    if worse:
        parts.append(f"{_list(worse)} got worse")
    if undecided:
        claims = len(comparison.seeds) >= LEAST_SEEDS and not comparison.added
        verb = "no significant difference in" if claims else "difference in"
        parts.append(f"{verb} {_list(undecided)}")
    if not parts:
        return contrast.other_pictures or f"{contrast.pair.row} has no primary score."
    text = (
        f"Against {comparison.rows[0].name} trained for the same time, {contrast.pair.row} over "
        f"{plural(len(comparison.seeds), 'seed')}: {'; '.join(parts)}."
    )
    if undecided and len(comparison.seeds) >= LEAST_SEEDS:
        text += f" With 80 % power, differences of these sizes would need {_list(needed)} seeds."
    return text


def _list(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def notes(comparison: Comparison) -> list[str]:
    """Sentences that qualify the table."""
    lines = [f"{run} failed: {why}" for run, why in comparison.failed.items()]
    if comparison.failed:
        lines.append("The seeds of failed runs are left out of all rows.")
    for contrast in comparison.contrasts:
        if contrast.other_pictures and not contrast.claims:  # else the paragraph says it
            lines.append(contrast.other_pictures)
        if contrast.claims and abs(contrast.time_ratio - 1) > TOLERANCE:
            lines.append(
                f"warning: {contrast.pair.baseline} trained {contrast.time_ratio:.2f} times as "
                f"long as {contrast.pair.row}, not equally long within 5 %."
            )
    return lines


def time_words(comparison: Comparison, contrast: Contrast) -> str:
    """The training time of a row and of its baseline, and the teacher's."""
    by_name = {row.name: row for row in comparison.rows}

    def mean(row: Row, phase: str) -> float:
        return float(np.mean([row.runs[s].work_seconds.get(phase, 0.0) for s in comparison.seeds]))

    ours = by_name[contrast.pair.row]
    theirs = by_name[contrast.pair.baseline]
    if not comparison.seeds or math.isnan(contrast.time_ratio):
        return ""
    text = (
        f"training {mean(ours, 'training'):,.1f} s, baseline {mean(theirs, 'training'):,.1f} s "
        f"({contrast.time_ratio:.2f} times)"
    )
    if teacher := mean(ours, "teacher"):
        counted = "included" if comparison.count_teacher else "not included"
        text += f"; teacher {teacher:,.1f} s, {counted}"
    return text


def format_comparison(comparison: Comparison) -> str:
    """The table in the terminal: a block for each pair of rows."""
    blocks = []
    for contrast in comparison.contrasts:
        claim = "for as long" if contrast.pair.equal_time else "without a claim"
        head = f"{contrast.pair.row} against {contrast.pair.baseline} ({claim})"
        if times := time_words(comparison, contrast):
            head += f": {times}"
        lines = [head, f"  {'':<34}{'baseline':>10}{'row':>9}   difference (95 %)"]
        title = ""
        for score in comparison.scores:
            if score not in contrast.cells:
                continue
            if (section := "primary" if score in comparison.primary else score.title) != title:
                title = section
                lines.append(f"  {title}")
            cell = contrast.cells[score]
            words = f"  {score.words}"
            if score in comparison.primary and len({s.key for s in comparison.scores}) > 1:
                words += f" ({score.key})"
            line = f"  {words:<34}{number(cell.baseline_mean):>10}{number(cell.mean):>9}   "
            lines.append(line + interval_words(cell))
        blocks.append("\n".join(lines))
    stars = any(c.significant for contrast in comparison.contrasts for c in contrast.cells.values())
    footer = textwrap.wrap(paragraph(comparison), 98) + notes(comparison)
    if stars:
        footer.insert(0, "* significant after Holm's correction over all primary scores")
    return "\n\n".join([*blocks, "\n".join(footer)])


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
        "text": paragraph(comparison),
        "contrasts": [
            {
                **contrast.pair._asdict(),
                "time_ratio": None if math.isnan(contrast.time_ratio) else contrast.time_ratio,
                "scores": [
                    {
                        "set": score.key,
                        "metric": score.metric,
                        "primary": score in comparison.primary,
                        **cell._asdict(),
                        "half": None if math.isinf(cell.half) else cell.half,
                    }
                    for score, cell in contrast.cells.items()
                ],
            }
            for contrast in comparison.contrasts
        ],
    }
