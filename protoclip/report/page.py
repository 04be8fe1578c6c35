"""The report: one self-contained HTML file about any number of run folders.

This module reads run folders and fills the template.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from protoclip.common.files import in_percent, plural, short_name, write_atomic
from protoclip.common.paths import output_file
from protoclip.episodes.prototypes import Watch
from protoclip.evaluate import results
from protoclip.evaluate.results import Outcome, Score, SetResults, number, scores_of
from protoclip.report import figures
from protoclip.report.comparison import (
    Comparison,
    Row,
    claims_of,
    compare_rows,
    difference_words,
    format_comparison,
    other_pictures,
    primary_of,
    rows_of,
)
from protoclip.report.figures import Series, read_series
from protoclip.report.snapshot import SHOWN_AS, Snapshot, load_snapshot
from protoclip.runs.run_folder import OWN_TERMS
from protoclip.settings.comparison import FILE, read_record, settings_of
from protoclip.settings.config import TrainConfig, flat, parse_json, to_dict

NAME = "report.html"
ASSETS = Path(__file__).parent
# Settings that belong to the method or to the machine: `differences` does not name them.
FREE = (
    "workers",
    "prefetch_factor",
    "add_projection_head",
    "projection_hidden_dim",
    "projection_dim",
)
HEADLINE = ("recall@1", "recall@5", "acc1", "ami")  # the scores that have a floor
TOP = ("/acc1", "recall@5")  # of the headline numbers, those that the page shows unfolded
RETRIEVAL = "text_retrieval_recall@1"  # what a run without classes is summed up by
MEANINGS = {  # the words of a table's rows -> what they mean
    "R@1": "share of queries whose first answer is right",
    "R@5": "share of queries with a right answer among the first 5",
    "R@10": "share of queries with a right answer among the first 10",
    "median rank": "place of the right caption in half of the queries, or better; 1 is best",
    "zero-shot": "share of images whose nearest class name is their own",
    "linear probe": "accuracy of a linear classifier on the frozen image features",
    "nearest neighbours": "accuracy when the most similar training images vote for the class",
    "1-NN": "accuracy when the most similar training image names the class",
    "k-means AMI": "agreement of clusters of image features with the classes; 0: chance, 1: equal",
    "k-means ARI": "share of image pairs on which clusters and classes agree, corrected for chance",
    "k-means NMI": "the same, not corrected for chance: many clusters look good",
    "modality gap": "distance between the means of image and caption features",
    "alignment": "mean squared distance of an image to its caption",
    "uniformity": "how evenly the features cover the sphere; lower is more even",
}
LABELS = {  # the classifications of built-in data
    "concept": "what is drawn, such as an anchor",
    "category": "what kind of thing it is, such as transport",
    "group": "colour and shape, such as a red star",
}


DEFAULT_NAME = re.compile(r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d-(\w+)-seed_(\d+)")  # of a run's folder


@dataclass(frozen=True)
class Run:
    """The content of one run folder; missing parts are empty."""

    name: str
    path: Path | None
    config: Mapping[str, Any]
    outcome: Outcome = Outcome("", "", "", {})
    series: Series = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)
    own_terms: Mapping[str, float] = field(default_factory=dict)  # name -> weight

    @property
    def method(self) -> str:
        return str(self.config.get("method", ""))

    @property
    def method_in_words(self) -> str:
        """The method, and whether it came to its prototypes."""
        return f"{self.method} without prototypes" if self.no_prototypes else self.method

    @property
    def no_prototypes(self) -> str:
        """A sentence if a run of ProtoCLIP trained without prototypes to its end, else ""."""
        clustered = self.snapshot.clusters or any(
            name.endswith("_clusters") for name in self.series
        )
        if self.method != "protoclip" or not self.outcome.trained or not self.series or clustered:
            return ""
        reason = ""
        if first := self.outcome.first_prototype_step:
            steps = self.outcome.steps
            reason = f": they train from step {first} on, which its {steps} steps do not reach"
        return f"{self.name} has trained no prototypes{reason}. So far it is plain CLIP."


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the files of a run folder, but no files they refer to; ValueError if one is damaged."""
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        folders = sorted(str(config.parent) for config in path.glob("*/config.json"))
        hint = f"; did you mean {' '.join(folders[:3])}?" if folders else ""
        raise ValueError(f"report: expected a run folder of protoclip train, found no {file}{hint}")
    config: Any = None
    with contextlib.suppress(ValueError):
        config = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"report: expected settings as JSON in {file}; train again")
    run = Run(path.resolve().name, path, config, snapshot=load_snapshot(path))
    if (path / "results.json").is_file():
        run = replace(run, outcome=results.read_results(path / "results.json"))
    if (path / "metrics.jsonl").is_file():
        run = replace(run, series=read_series(path / "metrics.jsonl"))
    if (path / OWN_TERMS).is_file():
        run = replace(run, own_terms=parse_json((path / OWN_TERMS).read_text(encoding="utf-8")))
    return run


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs of some folders, each with a name of its own, as short as may be."""
    runs = [read_run(folder) for folder in folders]
    short = [DEFAULT_NAME.sub(r"\1, seed \2", run.name) for run in runs]
    names = [run.name for run in runs]
    paths = [str(run.path) for run in runs]
    choices = (choice for choice in (short, names) if len(set(choice)) == len(choice))
    chosen = next(choices, paths)
    return [replace(run, name=name) for run, name in zip(runs, chosen, strict=True)]


def common_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that runs which differ only in the method have in common."""
    defaults = to_dict(TrainConfig())
    settings: dict[str, Any] = {}
    for section in ("data", "model", "optim"):
        settings |= defaults[section] | config.get(section, {})
    return {name: value for name, value in settings.items() if name not in FREE}


def differences(run: Run, baseline: Run) -> str:
    """A sentence about what differs between two runs besides the method, "" if nothing does."""
    seeds = tuple(side.config.get("run", {}).get("seed") for side in (run, baseline))
    values = {"seed": seeds}  # of the run and of the baseline, by what they are of
    steps_known = run.outcome.steps and baseline.outcome.steps  # not before a run's end
    if steps_known:
        values["number of steps"] = (run.outcome.steps, baseline.outcome.steps)
    other_settings = common_settings(baseline.config)
    for name, value in common_settings(run.config).items():
        if not (steps_known and name in ("epochs", "max_steps")):
            values[f"--{name.replace('_', '-')}"] = (value, other_settings.get(name))
    parts = [
        f"{name} ({ours} and {theirs})" for name, (ours, theirs) in values.items() if ours != theirs
    ]
    return f"{run.name} and {baseline.name} differ in {', '.join(parts)}." if parts else ""


def find_baseline(runs: Sequence[Run]) -> Run | None:
    """The run to compare with: the first plain CLIP, else the first of several."""
    for run in runs:
        if run.method == "clip":
            return run
    return runs[0] if len(runs) > 1 else None


def percent(share: float) -> str:
    """A share in per cent, in whole ones from 1 % on."""
    digits = ".1g" if share < 0.095 else ".0f"  # 9.5 rounds to 10, which .1g writes as 1e+01
    return f"{100 * share:{digits}} %"


def answer(run: Run) -> str:
    """The run in one sentence: the share that it gets right, and that of guessing; "" if it was not
    evaluated."""
    for key, scores in run.outcome.trained.items():
        names = [name for name in scores.metrics if name.endswith("/acc1")]
        metric = next(iter(names), RETRIEVAL if RETRIEVAL in scores.metrics else "")
        if not metric or math.isnan(scores.metrics[metric]):
            continue
        chance = math.nan
        if "chance" in run.outcome.floors:
            chance = results.value_of(run.outcome.floors["chance"], key, metric)
        elif metric == RETRIEVAL:
            chance = 1 / min(scores.samples, scores.different_captions or scores.captions)
        guessing = "" if math.isnan(chance) else f" (guessing: {percent(chance)})"
        right = f"{percent(scores.metrics[metric])} of"
        builtin = run.outcome.data.startswith("builtin:")
        subject = "drawings" if builtin else "pictures"
        if key == results.TRAIN:
            subject += " it was trained on"
        elif builtin or key == "HO":
            subject += " it has never seen"
        else:
            subject += f" of {run.outcome.data}"
        if metric == RETRIEVAL:
            return (
                f"It finds the caption of {right} {subject} among {scores.number_of_captions}"
                f"{guessing}."
            )
        return f"It correctly names {right} {subject}{guessing}."
    return ""


class Floor(NamedTuple):
    """The best score that needs no training."""

    value: float
    name: str
    every: str  # all of them, in words


def best_floor(runs: Sequence[Run], key: str, metric: str) -> Floor | None:
    """The floor of a score, from the runs that have any; None where there is none."""
    if not metric.endswith(HEADLINE):
        return None
    floors: dict[str, float] = {}
    for run in reversed(runs):  # the baseline, which may have fewer, is the first
        for name, sets in run.outcome.beside.items():
            value = results.value_of(sets, key, metric)
            if not math.isnan(value):
                floors.setdefault(name, value)
    if not floors:
        return None
    best = max(floors, key=lambda name: floors[name])
    every = ", ".join(f"{name} {number(value)}" for name, value in floors.items())
    return Floor(floors[best], best, every)


def below_majority(runs: Sequence[Run], key: str, metric: str) -> bool:
    """Whether every run names fewer images right than the most frequent class alone would."""
    floors = [
        run.outcome.floors.get("frequent", {}).get(key, results.NOTHING).metrics for run in runs
    ]
    frequent = max((floor[metric] for floor in floors if metric in floor), default=-math.inf)
    scores = [run.outcome.trained.get(key, results.NOTHING).metrics for run in runs]
    return all(score.get(metric, -math.inf) < frequent for score in scores)


def top_scores(key: str, of_set: SetResults) -> list[Score]:
    """The scores of a set that the page shows unfolded."""
    scores = [score for score in scores_of({key: of_set}) if score.metric.endswith(HEADLINE)]
    return [score for score in scores if score.metric.endswith(TOP)] or scores[:2]


def meaning(words: str) -> str:
    """What a row of a table says, from its words; "" if they are unknown."""
    terms = [text for term, text in MEANINGS.items() if re.search(rf"{re.escape(term)}\b", words)]
    terms += [f"{label}: {text}" for label, text in LABELS.items() if words.endswith(f" {label}")]
    return "; ".join(terms)


def as_html(words: str) -> Markup:
    """The words of a terminal as a page shows them: with arrows, and commands in their own type."""
    text = str(escape(words.replace("->", "→")))
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", text))


def unit_of(run: Run) -> str:
    """What a cluster has many of."""
    if run.config:
        return "sample"
    return "picture" if run.snapshot.map_data.get("pictures") or run.snapshot.pictures else "row"


def collapse_of(run: Run) -> str:
    """A sentence if the image prototypes of some episode had collapsed, else ""."""
    steps, inertias = run.series.get("image_inertia", ([], []))
    records = {step: {"image_inertia": value} for step, value in zip(steps, inertias, strict=True)}
    for name in ("image_clusters", "image_largest_share", "image_proto_accuracy", "image_labelled"):
        for step, value in zip(*run.series.get(name, ([], [])), strict=True):
            if step in records:
                records[step][name] = value
    watch = Watch()
    for step, metrics in records.items():
        complete = {"image_clusters", "image_largest_share"} <= metrics.keys()
        if complete and (sentence := watch.collapse(metrics)):
            return f"{run.name}, step {step:g}: {sentence}."
    return ""


def write_report(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write a report that shows some runs side by side; opens only files of their folders.

    Args:
        folders: run folders of ``protoclip.train``; see ``find_baseline`` for what they are
            compared with.
        output: None: in the last folder, report.html for one run; a comparison has the names of
            the others, as in report-with-A.html, and leaves the run's own page alone.
    Returns:
        The path of the file.
    Raises:
        ValueError: a folder holds no run, or the file exists and is no report.
    """
    runs = read_runs(folders)
    path = output_file(output or Path(folders[-1]) / default_name(folders), "--out")
    if path.exists() and not is_report(path):
        raise ValueError(
            f"--out: {path} exists and is not a page of protoclip report; choose another name "
            "or remove it"
        )
    if comparison := over_seeds(runs):
        write_comparison(comparison, path)
        return path
    # Bytes of a file's name that are not UTF-8 become escapes, which JSON in the page can hold.
    text = render(runs).encode("utf-8", "backslashreplace").decode("utf-8")
    write_atomic(path, text)
    return path


def over_seeds(runs: Sequence[Run]) -> Comparison | None:
    """The comparison of runs of which some differ only in the seed: that of ``protoclip compare``
    if they are all in its folder; None: they are shown next to each other."""
    by_folder = {run.path.resolve(): run for run in runs if run.path}
    root, *others = {folder.parent.parent for folder in by_folder}
    record = None
    if not others and (root / FILE).is_file():
        record = read_record(root)
        outcomes: dict[str, dict[int, Outcome]] = {}
        for name, seed in record.runs:
            run = by_folder.get(record.folder(name, seed).resolve())
            if run and run.outcome.trained:
                outcomes.setdefault(name, {})[seed] = run.outcome
        if record.baseline not in outcomes:
            return None
        rows = rows_of(record, outcomes)
    else:
        rows = group_runs(runs)
    if len(rows) < 2 or all(len(row.folders) < 2 for row in rows):
        return None
    if record:
        return compare_rows(rows, record.primary, record, record.result.get("failed"))
    sets = [sets for row in rows for run in row.runs.values() for sets in run.trained.items()]
    return compare_rows(rows, primary_of({key: of_set.metrics for key, of_set in sets}))


def group_runs(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs that differ only in the seed; those of plain CLIP come first."""
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        seed = run.config.get("run", {}).get("seed", 0)
        settings = repr(sorted(settings_of(run.config).items()))
        while seed in groups.setdefault(settings, {}):
            settings += " again"
        groups[settings][seed] = run
    rows: list[Row] = []
    for by_seed in groups.values():
        first = next(iter(by_seed.values()))
        name = Path(re.sub(r"[-_, /]*seed[-_ ]?\d+$", "", first.name)).name
        if not name and first.path:
            name = first.path.resolve().parent.name
        if name in {row.name for row in rows}:
            name = f"{name} ({len(rows) + 1})"
        outcomes = {seed: run.outcome for seed, run in by_seed.items() if run.outcome.trained}
        folders = {seed: run.path for seed, run in by_seed.items() if run.path}
        rows.append(Row(name, outcomes, settings_of(first.config), folders))
    return sorted(rows, key=lambda row: row.settings.get("method") != "clip")


def default_name(folders: Sequence[str | os.PathLike[str]]) -> str:
    """The name of the page in the last folder: of a comparison with the names of the other runs,
    and with the folders that lead to those that are not next to the last one."""
    if len(folders) == 1:
        return NAME
    beside = Path(folders[-1]).resolve().parent
    paths = [os.path.relpath(Path(folder).resolve(), beside) for folder in folders[:-1]]
    words = "-".join(part for path in paths for part in Path(path).parts if part != os.pardir)
    return f"report-with-{short_name(words, 100)}.html"


def is_report(path: Path) -> bool:
    """Whether a file is a page that ``write_report`` wrote; those of ``protoclip cluster`` are made
    of the same template."""
    if not path.is_file():  # reading a pipe would wait
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return b'content="protoclip report"' in head


def summary(folders: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Each run in a sentence, and the settings that differ: what the page says first."""
    runs = read_runs(folders)
    if comparison := over_seeds(runs):
        return [format_comparison(comparison)]
    answers = [f"{run.name}: {sentence}" for run in runs if (sentence := answer(run))]
    answers += [run.no_prototypes for run in runs if run.no_prototypes]
    return answers + all_differences(runs)


def all_differences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run with other settings or other pictures than the baseline."""
    baseline = find_baseline(runs)
    if baseline is None:
        return []
    others = [run for run in runs if run is not baseline]
    sentences = [differences(run, baseline) for run in others]
    of_baseline = scores_of(baseline.outcome.trained)
    for run in others:
        for score in scores_of(run.outcome.trained):
            same = [theirs for theirs in of_baseline if theirs == score]
            if same:
                sentences.append(other_pictures(run.name, baseline.name, [score], same))
    return list(dict.fromkeys(filter(None, sentences)))


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison over seeds."""
    defaults = flat(to_dict(TrainConfig()))
    settings = [{**defaults, **row.settings} for row in comparison.rows]
    names = dict.fromkeys(name for of_row in settings for name in of_row)
    text = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            css=figures.CSS,
            written=time.strftime("%Y-%m-%d %H:%M"),
            comparison=comparison,
            claims=claims_of(comparison),
            meaning=meaning,
            differing={
                name: [of_row.get(name) for of_row in settings]
                for name in names
                if len({repr(of_row.get(name)) for of_row in settings}) > 1
            },
            page_of=lambda folder: os.path.relpath(Path(folder) / NAME, path.parent),
        )
    )
    write_atomic(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))


@cache
def environment() -> jinja2.Environment:
    """The templates, each compiled once a process, and their filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=lambda value, sign="": number(value, sign).replace("-", "−"),
        plural=plural,
        percent=in_percent,
        as_html=as_html,
        source=lambda name: SHOWN_AS.get(name, name),
        chart=figures.chart_svg,
        differences=figures.differences_svg,
        histogram=figures.histogram_svg,
        colour=lambda i: f"var(--c{i % len(figures.CYCLE)})",
        pretty=lambda value: json.dumps(value, indent=2),
        interval=lambda cell: difference_words(cell).replace("-", "−"),
    )
    return environment


def render(runs: Sequence[Run], opening: Sequence[str] = (), command: str = "report") -> str:
    """Render the page.

    Args:
        opening: its first paragraphs if no run was trained.
        command: of protoclip, which makes the page.
    """
    baseline = find_baseline(runs)
    columns = sorted(runs, key=lambda run: run is not baseline)  # the baseline is the first
    # Without prototypes nothing uses their scale.
    unused = {run.name: "proto_logit_scale" if run.method == "clip" else "" for run in runs}
    series = {
        run.name: {name: points for name, points in run.series.items() if name != unused[run.name]}
        for run in runs
    }
    floors = next((run.outcome.floors for run in runs if run.outcome.floors), {})
    warnings = [sentence for run in runs if (sentence := collapse_of(run))]
    warnings += [f"{run.name}: {run.outcome.skipped}." for run in runs if run.outcome.skipped]
    sets: dict[str, SetResults] = {}
    for run in columns:
        sets = {**run.outcome.trained, **sets}
    rows = [score.words for score in scores_of(sets)]
    ends = {key: top_scores(key, sets[key]) for key in [*list(sets)[:1], *list(sets)[-1:]]}
    top = {
        key: [score for score in scores if not below_majority(columns, key, score.metric)]
        for key, scores in ends.items()
    }
    left_out = {
        f"{score.words} ({score.title})" if len(ends) > 1 else score.words
        for key, scores in ends.items()
        for score in set(scores).difference(top[key])
    }
    terms = {
        term: text
        for term, text in (MEANINGS | LABELS).items()
        if any(re.search(rf"\b{re.escape(term)}\b", words) for words in rows)
    }
    # A chart each: their units differ. One with "loss" in its name is among the others already.
    own_charts = [
        figures.Chart(name, re.escape(name), zero=False)
        for name in dict.fromkeys(name for run in runs for name in run.own_terms)
        if not re.fullmatch(figures.CURVES[0].pattern, name)
    ]
    answers = {run.name: sentence for run in runs if (sentence := answer(run))}
    title = " and ".join(run.name for run in runs)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            command=command,
            title=title if title.startswith("protoclip") else f"protoclip: {title}",
            answers=answers,
            terms=terms,
            meaning=meaning,
            floor=partial(best_floor, columns),
            css=figures.CSS,
            js=(ASSETS / "page.js").read_text(encoding="utf-8"),
            written=time.strftime("%Y-%m-%d %H:%M"),
            runs=runs,
            baseline=baseline,
            same_pictures=lambda run, key: bool(
                baseline
                and {run.outcome.trained.get(key, results.NOTHING).fingerprint}
                == {baseline.outcome.trained.get(key, results.NOTHING).fingerprint}
            ),
            columns=columns,
            opening=opening or all_differences(runs) + warnings,
            unit=unit_of(runs[0]),
            sets=sets,
            scores_of=scores_of,
            beside=runs[0].outcome.beside if len(runs) == 1 else floors,
            floors={**results.FLOORS, "untrained": "the model before its first step"},
            top=top,
            left_out=sorted(left_out),
            curves=figures.charts([*figures.CURVES, *own_charts], series),
            churn=figures.charts(figures.CHURN, series),
        )
    )
