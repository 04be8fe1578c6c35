"""The report: one self-contained HTML file about any number of run folders.

This module reads run folders, compares them with a baseline, and fills the template.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from protoclip.config import parse_json
from protoclip.data.files import plural, write_atomic
from protoclip.evaluate import results
from protoclip.evaluate.results import Outcome, SetResults, number, rows_of
from protoclip.paths import output_file
from protoclip.prototypes import collapse
from protoclip.report import figures
from protoclip.report.figures import Series, read_series
from protoclip.report.snapshot import Snapshot, load_snapshot

NAME = "report.html"
ASSETS = Path(__file__).parent
# Plain CLIP with the default settings, the mean over several seeds. After a change of the defaults
# record it again: python -m benchmarks.record_baseline RUN ...
RECORDED = ASSETS / "clip_baseline"
# Settings in which a run and its baseline may differ, besides those of the method.
FREE = ("workers", "add_projection_head", "projection_hidden_dim", "projection_dim")
HEADLINE = ("recall@1", "recall@5", "acc1", "ami")
LOWER_IS_BETTER = ("rank", "modality_gap", "alignment", "uniformity")


@dataclass(frozen=True)
class Run:
    """The content of one run folder; missing parts are empty."""

    name: str
    path: Path | None
    config: Mapping[str, Any]
    outcome: Outcome = Outcome("", "", "", {})
    series: Series = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)

    @property
    def method(self) -> str:
        return str(self.config.get("method", ""))


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the files of a run folder, but no files they refer to; ValueError if one is damaged."""
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"report: expected a run folder of protoclip.train, found no {file}")
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
    return run


def comparable(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs differ only in the method: same data, encoder, steps and seed (any seed if
    the other is a mean over several)."""

    def common(one: Mapping[str, Any]) -> Any:
        parts = [one.get(section, {}).items() for section in ("data", "model", "optim")]
        return [{key: value for key, value in part if key not in FREE} for part in parts]

    seed, run = config.get("run", {}).get("seed"), other.get("run", {})
    return common(config) == common(other) and ("seeds" in run or run.get("seed") == seed)


def recorded_baseline(config: Mapping[str, Any]) -> Run | None:
    """The recorded plain CLIP that ships with protoclip, if its settings match."""
    with contextlib.suppress(ValueError, OSError):
        run = read_run(RECORDED)
        if comparable(config, run.config):
            return replace(run, name="CLIP (recorded)")
    return None


def find_baseline(runs: Sequence[Run]) -> Run | None:
    """The plain CLIP to compare with: one of ``runs``, else the recorded one."""
    given = (run for run in runs if run.method == "clip")
    return next(given, None) or recorded_baseline(runs[-1].config)


class Change(NamedTuple):
    """A metric's difference to the baseline, and half its 95 % interval."""

    value: float
    half: float  # infinite if the metric has no interval
    kind: str  # "up": clearly better, "down": clearly worse, "same"


def change(run: Run, other: Run, key: str, metric: str) -> Change | None:
    """The run's metric minus the other's; None where either lacks it."""
    mine, theirs = (one.outcome.trained.get(key) for one in (run, other))
    if mine is None or theirs is None:
        return None
    value = mine.metrics.get(metric, math.nan) - theirs.metrics.get(metric, math.nan)
    if math.isnan(value):
        return None
    half = results.half_width(mine, theirs, metric, other.outcome)
    kind = "same"
    if abs(value) > half:
        kind = "up" if (value < 0) == metric.endswith(LOWER_IS_BETTER) else "down"
    return Change(value, half, kind)


def verdict(run: Run, baseline: Run | None) -> str:
    """How the run stands beside the baseline, counted over the headline metrics."""
    if baseline is None:
        return (
            f"{run.name}: no plain CLIP run with the same data, encoder, steps and seed was "
            "found, so ProtoCLIP cannot be compared with CLIP. Train one with the same flags and "
            "--method clip, then: protoclip report RUN CLIP_RUN"
        )
    found: dict[str, list[str]] = {"up": [], "down": [], "same": []}
    for key, one in run.outcome.trained.items():
        for metric, words in rows_of(one.metrics):
            got = change(run, baseline, key, metric) if metric.endswith(HEADLINE) else None
            if got is not None and got.half < math.inf:
                found[got.kind].append(f"{words} ({one.title}, {number(got.value, '+')})")
    better, worse, same = found.values()
    if not (better or worse or same):
        return f"{run.name} and {baseline.name} have no metric in common."
    head = "is ahead of" if better else "is behind" if worse else "cannot be told apart from"
    if better and worse:
        head = "is better in some and worse in other numbers than"
    count = len(better + worse + same)
    text = (
        f"{run.name} ({run.method}) {head} {baseline.name} ({baseline.method}): of {count} "
        f"headline numbers {len(better)} are better, {len(worse)} worse, {len(same)} within chance "
        f"(95 % intervals, one seed of the run, {baseline.outcome.seeds} of the baseline); by "
        f"chance {0.025 * count:.1f} are expected each way."
    )
    for word, names in (("Better", better), ("Worse", worse)):
        if names:
            text += f" {word}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}."
    return text


def collapse_of(run: Run) -> str:
    """A sentence if the image prototypes of some episode had collapsed, else ""."""
    steps, inertias = run.series.get("image_inertia", ([], []))
    records = {step: {"image_inertia": value} for step, value in zip(steps, inertias, strict=True)}
    for name in ("image_clusters", "image_largest_share", "image_proto_accuracy"):
        for step, value in zip(*run.series.get(name, ([], [])), strict=True):
            if step in records:
                records[step][name] = value
    for step, metrics in records.items():
        complete = {"image_clusters", "image_largest_share"} <= metrics.keys()
        if complete and (sentence := collapse(metrics, inertias[0])):
            return f"{run.name}, step {step:g}: {sentence}."
    return ""


def write_report(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write a report that shows some runs side by side; opens only files of their folders.

    Args:
        folders: run folders of ``protoclip.train``; the last one is compared with the first whose
            method is clip, else with the recorded one.
        output: None: report.html in the last folder.
    Returns:
        The path of the file.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.path)) for run in runs]
    path = output_file(output or Path(folders[-1]) / NAME, "--output")
    write_atomic(path, render(runs))
    return path


def render(runs: Sequence[Run], said: Sequence[str] = ()) -> str:
    """Render the page; ``said``: its first paragraphs if no run was trained."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=lambda value, sign="": number(value, sign).replace("-", "−"),
        plural=plural,
        chart=figures.chart_svg,
        histogram=figures.histogram_svg,
        colour=lambda i: f"var(--c{i % len(figures.CYCLE)})",
        pretty=lambda value: json.dumps(value, indent=2),
        rows=lambda one: rows_of(one.metrics),
    )
    baseline = find_baseline(runs)
    own, one = [run for run in runs if run is not baseline], runs[0].outcome
    columns = [baseline, *own] if baseline else own
    series = {run.name: run.series for run in runs}
    warnings = [sentence for run in runs if (sentence := collapse_of(run))]
    sets: dict[str, SetResults] = {}
    for run in columns:
        sets = {**run.outcome.trained, **sets}
    return environment.get_template("page.html.j2").render(
        title="protoclip: " + " and ".join(run.name for run in runs),
        css=figures.CSS,
        js=(ASSETS / "page.js").read_text(encoding="utf-8"),
        written=time.strftime("%Y-%m-%d %H:%M"),
        runs=runs,
        baseline=baseline,
        recorded=baseline if baseline and baseline.path == RECORDED else None,
        columns=columns,
        said=said or [verdict(run, baseline) for run in own] + warnings,
        sets=sets,
        beside=one.beside if len(runs) == 1 else {},
        floors=results.FLOORS,
        change=change,
        headline=HEADLINE,
        curves=figures.charts(figures.CURVES, series),
        churn=figures.charts(figures.CHURN, series),
    )
