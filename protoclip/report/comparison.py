"""Methods over seeds: which runs belong together, what differs, and what can be claimed.

``compare_rows`` makes a ``Comparison`` of the finished runs of some rows; the terminal, the page
and comparison.json show its values.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protoclip.common.files import plural
from protoclip.evaluate.results import ROWS, Outcome, number, rows_of
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
    Cost,
    Record,
    numbers_or_null,
    read_record,
    settings_of,
)

WITH_CLASSES = ("acc1", "nn_acc1", "ami")  # the primary scores; without classes R@1:
RECALLS = ("text_retrieval_recall@1", "image_retrieval_recall@1")
EQUAL = {  # what a row and its baseline have in common if they are tested -> how it is said
    "time": "trained for the same time",
    "steps": "at equal steps",
    "": "not tested",
}
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
    equal: str  # of ``EQUAL``; "": they are not tested


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
    cost: Cost  # of the row, compared with its baseline
    cells: Mapping[Score, Cell]
    other_pictures: str = ""  # a sentence if they were judged on different pictures

    @property
    def claims(self) -> bool:
        """Whether its primary scores are tested."""
        return bool(self.pair.equal)


@dataclass(frozen=True)
class Comparison:
    """What a comparison says."""

    rows: Sequence[Row]
    primary: Sequence[Score]
    seeds: tuple[int, ...]  # those that all rows have finished
    contrasts: Sequence[Contrast]  # those that matter first, one for each row
    timed: tuple[int, ...] = ()  # seeds whose training times count
    added: tuple[int, ...] = ()  # seeds that came after a result was shown
    failed: Mapping[str, str] = field(default_factory=dict)  # run -> why
    count_teacher: bool = False
    rebuilt: bool = False  # from its runs, as its file was damaged

    @property
    def may_claim(self) -> bool:
        """Whether there are seeds enough for a test, all of them planned beforehand."""
        return len(self.seeds) >= LEAST_SEEDS and not self.added

    @property
    def of_rows(self) -> list[Contrast]:
        """The contrast of each row that matters."""
        first: dict[str, Contrast] = {}
        for contrast in self.contrasts:
            first.setdefault(contrast.pair.row, contrast)
        return list(first.values())

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


def cost_of(row: Run, baseline: Run, count_teacher: bool = False) -> Cost:
    """The training time of a row's runs over that of its baseline's, on the seeds of both."""
    ratios = [
        training_seconds(run, count_teacher) / training_seconds(baseline[seed])
        for seed, run in row.items()
        if seed in baseline
    ]
    log_ratios = np.log([ratio for ratio in ratios if math.isfinite(ratio)])
    if not len(log_ratios):
        return Cost()
    times = paired(log_ratios)
    return Cost(float(times.mean), float(times.half))


def compare_rows(
    rows: Sequence[Row],
    pairs: Iterable[Pair],
    primary: Sequence[tuple[str, str]],
    costs: Mapping[tuple[str, str], Cost],
    **more: Any,
) -> Comparison:
    """Compare the seeds that all rows have finished.

    Args:
        pairs: those that matter first.
        costs: of (row, baseline).
        more: further fields of the comparison.
    """
    by_name = {row.name: row for row in rows}
    seeds = sorted(set.intersection(*(set(row.runs) for row in rows)))
    raw = [
        _contrast(by_name, pair, seeds, costs.get((pair.row, pair.baseline), Cost()))
        for pair in pairs
    ]
    tested = [
        (number_of_contrast, score)
        for number_of_contrast, contrast in enumerate(raw)
        if contrast.claims
        for score in contrast.cells
        if (score.key, score.metric) in primary
    ]
    corrected = holm(np.array([raw[i].cells[score].p for i, score in tested] or [1.0]))
    p_of = dict(zip(tested, corrected.tolist(), strict=False))
    scores = dict.fromkeys(score for contrast in raw for score in contrast.cells)
    by_place = {(score.key, score.metric): score for score in scores}
    comparison = Comparison(
        rows=rows,
        primary=[by_place[place] for place in primary if place in by_place],
        seeds=tuple(seeds),
        contrasts=raw,
        **more,
    )
    contrasts = []
    for i, contrast in enumerate(raw):
        cells = {}
        for score, cell in contrast.cells.items():
            p = p_of.get((i, score), cell.p)
            needed = None
            if (i, score) in p_of:
                needed = seeds_needed(np.array(cell.differences), LEVEL / len(tested))
            significant = comparison.may_claim and (i, score) in p_of and p < LEVEL
            cells[score] = cell._replace(p=p, significant=significant, seeds_needed=needed)
        contrasts.append(replace(contrast, cells=cells))
    return replace(comparison, contrasts=contrasts)


def _contrast(rows: Mapping[str, Row], pair: Pair, seeds: Sequence[int], cost: Cost) -> Contrast:
    ours = [rows[pair.row].runs[seed] for seed in seeds]
    theirs = [rows[pair.baseline].runs[seed] for seed in seeds]
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
    return Contrast(pair, cost, cells, sentence)


def _cell(ours: np.ndarray, theirs: np.ndarray) -> Cell:
    differences = ours - theirs
    test = paired(differences)
    return Cell(
        baseline_mean=float(theirs.mean()),
        mean=float(ours.mean()),
        differences=tuple(differences.tolist()),
        difference=float(test.mean),
        half=float(test.half),
        p=float(test.p),
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


def of_record(record: Record, outcomes: Mapping[str, Run], failed: Mapping[str, str]) -> Comparison:
    """The comparison of a folder, of the rows that ``outcomes`` has."""
    plan = record.plan
    rows = [
        Row(
            name,
            outcomes[name],
            settings_of(config),
            {seed: plan.folder(name, seed) for seed in outcomes[name]},
        )
        for name, config in record.rows.items()
        if name in outcomes
    ]
    names = {row.name for row in rows}
    pairs = [pair for pair in _pairs(record) if {pair.row, pair.baseline} <= names]
    return compare_rows(
        rows,
        pairs,
        record.primary,
        record.costs,
        timed=tuple(record.timed),
        added=tuple(record.added),
        failed=failed,
        count_teacher=plan.count_teacher,
        rebuilt=record.rebuilt,
    )


def _pairs(record: Record) -> list[Pair]:
    """The pairs that a comparison is about, and then those that its table shows, too."""
    plan = record.plan
    baseline = plan.baseline
    if plan.equal_steps:
        return [Pair(name, baseline, "steps") for name in plan.others]
    matter = []
    shown = []
    for name, longer in plan.equal_time_rows.items():
        if name in record.ratios:
            is_close = record.costs.get((name, longer), Cost()).is_close
            matter.append(Pair(name, longer, "time" if is_close else ""))
            shown.append(Pair(name, baseline, ""))
        else:
            is_equal = record.costs.get((name, baseline), Cost()).is_equal
            matter.append(Pair(name, baseline, "time" if is_equal else ""))
    return matter + shown


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


def group_runs(runs: Sequence[Listed]) -> tuple[list[Row], dict[tuple[str, str], Cost]]:
    """Rows of runs that differ only in the seed, and the pairs to compare: each row with the row of
    plain CLIP whose training time is nearest, or if there is none with the first row."""
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
    costs = {}
    for row in rows:
        if row not in baselines:
            by_baseline = {other.name: cost_of(row.runs, other.runs) for other in baselines}
            nearest = min(by_baseline, key=lambda name: _distance(by_baseline[name]))
            costs[row.name, nearest] = by_baseline[nearest]
    return rows, costs


def _distance(cost: Cost) -> float:
    return math.inf if math.isnan(cost.log_ratio) else abs(cost.log_ratio)


def compare_runs(runs: Sequence[Listed]) -> Comparison | None:
    """The comparison of some run folders: that of ``protoclip compare`` if they are all of one,
    else of the groups that differ only in the seed; None without two groups."""
    roots = {run.path.resolve().parent.parent for run in runs}
    root = roots.pop()
    if not roots and (root / FILE).is_file():
        return _of_folder(read_record(root), runs)
    rows, costs = group_runs(runs)
    if len(rows) < 2:
        return None
    pairs = [
        Pair(row, baseline, "time" if cost.is_known and cost.is_close else "")
        for (row, baseline), cost in costs.items()
    ]
    metrics: dict[str, dict[str, float]] = {}
    for row in rows:
        for outcome in row.runs.values():
            for key, scores in outcome.trained.items():
                metrics.setdefault(key, dict(scores.metrics))
    timed = tuple(sorted({seed for row in rows for seed in row.runs}))
    return compare_rows(rows, pairs, primary_of(metrics), costs, timed=timed)


def _of_folder(record: Record, runs: Sequence[Listed]) -> Comparison | None:
    """The comparison of some of the runs in a comparison's folder."""
    plan = record.plan
    finished = {run.path.resolve(): run.outcome for run in runs if run.outcome.trained}
    outcomes: dict[str, dict[int, Outcome]] = {}
    for name in record.rows:
        for seed in plan.seeds:
            folder = plan.folder(name, seed).resolve()
            if folder in finished:
                outcomes.setdefault(name, {})[seed] = finished[folder]
    if len(outcomes) < 2:
        return None
    comparison = of_record(record, outcomes, record.result.get("failed", {}))
    return comparison if comparison.contrasts else None


# What it says, in words.


def paragraph(comparison: Comparison) -> str:
    """What can be claimed, to be quoted."""
    return " ".join(claims_of(comparison))


def claims_of(comparison: Comparison) -> list[str]:
    """What can be claimed: a sentence or some for each row."""
    seeds = comparison.seeds
    if not seeds:
        return ["No seed has finished in all rows, so nothing can be compared."]
    sentences = [doubt for contrast in comparison.of_rows if (doubt := _doubt(contrast))]
    if len(seeds) < LEAST_SEEDS:
        sentences = [
            f"With {plural(len(seeds), 'seed')} no difference is tested for significance, which "
            "needs at least three seeds."
        ]
    elif comparison.added:
        verb = "was" if len(comparison.added) == 1 else "were"
        sentences.append(
            f"{_seeds(comparison.added)} {verb} added after a result was shown, so no difference "
            "is called significant."
        )
    sentences += [_verdict(contrast, comparison) for contrast in comparison.of_rows]
    tests = sum(
        score in contrast.cells
        for contrast in comparison.contrasts
        if contrast.claims
        for score in comparison.primary
    )
    if len(seeds) >= LEAST_SEEDS and comparison.primary:
        holm_words = f", Holm over {plural(tests, 'test')}" if tests > 1 else ""
        sentences.append(
            f"The 95 % intervals (t, paired by seed{holm_words}) cover the randomness of training "
            "on these held-out pictures, and nothing else."
        )
    return sentences


def _doubt(contrast: Contrast) -> str:
    """Why the training times allow no test, "" if they do."""
    row, baseline, equal = contrast.pair
    if equal:
        return ""
    if math.isnan(contrast.cost.log_ratio):
        return (
            f"The training times of {row} and {baseline} are not known, so no difference of {row} "
            "is called significant."
        )
    times = f"{row} took {_times(contrast)}"
    if math.isinf(contrast.cost.half):
        times += ", timed on fewer than three seeds"
    reason = "" if contrast.cost.is_known else ": not known within 5 %"
    return (
        f"{times}{reason}, so {row} is not compared at equal time and no difference of it is "
        "called significant; longer runs, `--equal-steps` or more seeds, in a new `--out`, can "
        "change that."
    )


def _verdict(contrast: Contrast, comparison: Comparison) -> str:
    claims = contrast.claims and comparison.may_claim
    better: list[str] = []
    worse: list[str] = []
    undecided: list[str] = []
    needed: list[str] = []
    for score in comparison.primary:
        if score not in contrast.cells:
            continue
        cell = contrast.cells[score]
        half = "" if math.isinf(cell.half) else f" ± {cell.half:.3f}"
        difference = f"{cell.difference:+.3f}{half}"
        if not claims:
            undecided.append(f"{difference} in {score.words}")
        elif cell.significant and cell.difference > 0:
            better.append(f"{score.words} ({difference})")
        elif cell.significant:
            worse.append(f"{score.words} ({difference})")
        else:
            undecided.append(f"{score.words} ({difference})")
            needed.append(str(cell.seeds_needed or f"more than {MOST_SEEDS}"))
    row = contrast.pair.row
    if not (better or worse or undecided):
        return contrast.other_pictures or f"{row} has no primary score."
    over = f"Over {plural(len(comparison.seeds), 'seed')},"
    baseline = _baseline_words(contrast, comparison)
    if not claims:
        return f"{over} the difference of {row} from {baseline} is {_list(undecided)}."
    parts = []
    if better:
        parts.append(f"improves {_list(better)}")
    if worse:
        parts.append(f"worsens {_list(worse)}")
    if undecided:
        parts.append(f"does not differ significantly in {_list(undecided)}")
    text = f"{over} {row}, compared with {baseline}, {_list(parts)}."
    if needed:
        needed = list(dict.fromkeys(needed))
        text += f" With 80 % power, differences of these sizes would need {_list(needed)} seeds."
    if contrast.pair.equal == "steps" and not math.isnan(contrast.cost.log_ratio):
        text += f" It took {_times(contrast)}."
    return text


def _baseline_words(contrast: Contrast, comparison: Comparison) -> str:
    row, baseline, equal = contrast.pair
    if equal == "time":
        return f"{baseline.removesuffix(f', time of {row}')} {EQUAL['time']}"
    if baseline.endswith(f", time of {row}"):
        return baseline
    seed = comparison.seeds[0]
    by_name = {row.name: row for row in comparison.rows}
    ours = by_name[row].runs[seed].steps
    theirs = by_name[baseline].runs[seed].steps
    if ours == theirs:
        return f"{baseline} trained for the same number of steps"
    return f"{baseline} trained for {theirs:,} steps ({row}: {ours:,})"


def _times(contrast: Contrast) -> str:
    return f"{cost_words(contrast.cost)} the training time of {contrast.pair.baseline}"


def cost_words(cost: Cost) -> str:
    """The ratio of two training times with its interval."""
    half = "" if math.isinf(cost.half) else f" (± {100 * math.expm1(cost.half):.2g} %)"
    return f"{math.exp(cost.log_ratio):.2f} times{half}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"Seed{'s' if len(seeds) > 1 else ''} {_list(list(map(str, seeds)))}"


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
    if comparison.rebuilt:
        lines.append(
            f"{FILE} was damaged and has been rebuilt from the runs: seeds that were added after a "
            "result was shown are no longer known as such."
        )
    return lines


def time_words(comparison: Comparison, contrast: Contrast) -> str:
    """The training time of a row and of its baseline, and the teacher's, on the seeds that were
    timed."""
    by_name = {row.name: row for row in comparison.rows}
    ours = by_name[contrast.pair.row].runs
    theirs = by_name[contrast.pair.baseline].runs
    seeds = [seed for seed in comparison.timed if seed in ours and seed in theirs]
    if not seeds or math.isnan(contrast.cost.log_ratio):
        return ""

    def mean(runs: Run, phase: str) -> float:
        return float(np.mean([runs[seed].work_seconds.get(phase, 0.0) for seed in seeds]))

    text = (
        f"training {mean(ours, 'training'):,.1f} s, baseline {mean(theirs, 'training'):,.1f} s: "
        f"{cost_words(contrast.cost)} the baseline's"
    )
    if teacher := mean(ours, "teacher"):
        counted = "included" if comparison.count_teacher else "not included"
        text += f"; teacher {teacher:,.1f} s, {counted}"
    return text


def format_comparison(comparison: Comparison) -> str:
    """The table in the terminal: a block for each pair of rows."""
    blocks = []
    for contrast in comparison.contrasts:
        pair = contrast.pair
        head = f"{pair.row} against {pair.baseline} ({EQUAL[pair.equal]})"
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
    claims = [line for claim in claims_of(comparison) for line in textwrap.wrap(claim, 98)]
    footer = claims + notes(comparison)
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
                "cost": numbers_or_null(asdict(contrast.cost)),
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
