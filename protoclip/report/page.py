"""The report: one HTML file with everything inside, from any number of run folders.

Run folders are read here, compared with a baseline, and put into the template.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch

from protoclip.config import TrainConfig, flag_of, output_file
from protoclip.data.files import write_atomic
from protoclip.evaluate import Results, SetResults, read_results
from protoclip.evaluate.metrics import Sampled, bootstrap_intervals
from protoclip.evaluate.results import results_from_plain, results_to_plain, rows_of
from protoclip.report import figures
from protoclip.report.figures import Series, read_series
from protoclip.report.snapshot import Snapshot, load_snapshot

NAME = "report.html"
RECORDED = "clip_baseline.json"  # plain CLIP with the default settings, as once recorded
HEADS = ("add_projection_head", "projection_hidden_dim", "projection_dim")
HEADLINE = ("recall@1", "recall@5", "acc1", "ami")
LOWER_IS_BETTER = ("rank", "modality_gap", "alignment", "uniformity")


@dataclass(frozen=True)
class Run:
    """One run folder, read; what training left out stays empty."""

    name: str
    path: Path | None
    config: Mapping[str, Any]
    after: Results | None = None
    before: Results | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    series: Series = field(default_factory=dict)
    snapshot: Snapshot = field(default_factory=Snapshot)
    remark: str = ""

    @property
    def method(self) -> str:
        return str(self.config.get("method", ""))


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the files of a run folder, and nothing that they name.

    Raises:
        ValueError: it is not a run folder, or one of its files is damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"report: expected a run folder of protoclip.train, found no {path / 'config.json'}"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path / 'config.json'} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"report: expected settings in {path / 'config.json'}, got {config!r:.40}")
    results: dict[str, Any] = {}
    if (path / "results.json").is_file():
        results = read_results(path / "results.json")
    metrics = path / "metrics.jsonl"
    return Run(
        path.resolve().name,
        path,
        config,
        results.get("trained"),
        results.get("untrained"),
        results.get("seconds") or {},
        results.get("peak_memory_bytes"),
        read_series(metrics) if metrics.is_file() else {},
        load_snapshot(path) or Snapshot(),
    )


def comparable(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs differ in nothing but the method: same data, encoder, steps and seed."""

    def common(one: Mapping[str, Any]) -> Any:
        model = {k: v for k, v in one.get("model", {}).items() if k not in HEADS}
        data = {
            k: v for k, v in one.get("data", {}).items() if k not in ("workers", "imagenet_val")
        }
        return data, model, one.get("optim"), one.get("run", {}).get("seed")

    return common(config) == common(other)


def find_baseline(runs: Sequence[Run]) -> Run | None:
    """The plain CLIP to compare with: among ``runs``, beside the last one, or as recorded."""
    given = next((run for run in runs if run.method == "clip"), None)
    if given is not None:
        return given
    run = runs[-1]
    for folder in sorted(run.path.resolve().parent.iterdir()) if run.path else ():
        if (folder / "config.json").is_file() and (folder / "results.json").is_file():
            try:
                other = read_run(folder)
            except (ValueError, OSError):
                continue
            if other.method == "clip" and comparable(run.config, other.config):
                return other
    return recorded_baseline(run)


def recorded_baseline(run: Run) -> Run | None:
    """The baseline that ships with protoclip, for a run with the default settings."""
    file = resources.files("protoclip.report").joinpath(RECORDED)
    content = json.loads(file.read_text(encoding="utf-8"))
    if not comparable(run.config, content["config"]):
        return None
    after = results_from_plain(content["trained"])
    return Run("CLIP (recorded)", None, content["config"], after, remark=content["remark"])


def record_baseline(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Keep a plain run's numbers as the baseline that ships with protoclip.

    After a change of the defaults: train with ``--method clip``, then call this with the run
    folder and ``protoclip/report/clip_baseline.json``.
    """
    run = read_run(folder)
    facts = run.snapshot.facts
    assert run.method == "clip" and run.after is not None
    remark = (
        f"Baseline: plain CLIP, same data, encoder, steps and seed, recorded "
        f"{time.strftime('%Y-%m-%d')} ({facts['cpu']}, torch {facts['torch']}, commit "
        f"{facts['commit']}). For your own: --method clip, then protoclip.report RUN CLIP_RUN."
    )
    config = {**run.config, "run": {"seed": run.config["run"]["seed"]}}
    content = {"remark": remark, "config": config, "trained": results_to_plain(run.after)}
    text = json.dumps(content, indent=1, allow_nan=False)
    Path(output).write_text(text + "\n", encoding="utf-8")


def command_of(config: Mapping[str, Any]) -> str:
    """The command line that trains with this config: its flags that are not the default."""
    words = ["python", "-m", "protoclip.train"]
    default = TrainConfig()
    sections = {name: own for name, own in vars(default).items() if dataclasses.is_dataclass(own)}
    parts = [(default, config), *((own, config.get(key, {})) for key, own in sections.items())]
    for own, values in parts:
        for item in dataclasses.fields(own):
            value = values.get(item.name, getattr(own, item.name))
            value = tuple(value) if isinstance(value, list) else value
            if item.name in (*sections, "name", "logs") or value == getattr(own, item.name):
                continue
            flag = flag_of(item)
            if isinstance(value, bool):
                words.append(flag if value else "--no-" + flag[2:])
            else:
                words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


# Numbers beside the baseline's


@dataclass(frozen=True)
class Change:
    """A metric's difference to the baseline, with the 95 % interval of the difference."""

    value: float
    low: float
    high: float
    kind: str  # "up": clearly better, "down": clearly worse, "same"


def change(run: Run, other: Run, key: str, metric: str) -> Change | None:
    """The run's metric minus the other's; None where either lacks it.

    Paired over the samples where both runs' hits are kept; else the intervals are taken as
    independent, which is wider.
    """
    mine, theirs = (one.after.sets.get(key) if one.after else None for one in (run, other))
    if mine is None or theirs is None:
        return None
    value = mine.metrics.get(metric, math.nan) - theirs.metrics.get(metric, math.nan)
    if math.isnan(value):
        return None
    low, high = -math.inf, math.inf
    hits, others = (one.snapshot.hits.get(f"{key}/{metric}", "") for one in (run, other))
    if hits and len(hits) == len(others):
        pairs = zip(hits, others, strict=True)
        differences = torch.tensor([float(hit) - float(theirs) for hit, theirs in pairs])
        low, high = bootstrap_intervals({"": Sampled(differences)})[""]
    elif metric in mine.intervals and metric in theirs.intervals:
        (a, b), (c, d) = mine.intervals[metric], theirs.intervals[metric]
        half = math.hypot(b - a, d - c) / 2
        low, high = value - half, value + half
    kind = "same"
    if low > 0 or high < 0:
        kind = "up" if (value < 0) == metric.endswith(LOWER_IS_BETTER) else "down"
    return Change(value, low, high, kind)


def number(value: float | None, sign: str = "") -> str:
    """A metric in three decimals, a large one in one; with ``sign="+"`` a difference."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign},.1f}"
    return text.replace("-", "−")


def learnt(run: Run) -> str:
    """What the run learnt, in a sentence or two: first set, before and after."""
    if run.after is None or not run.after.sets:
        return f"{run.name} was not evaluated: it had no evaluation data (--val-data)."
    key, one = next(iter(run.after.sets.items()))
    old = run.before.sets[key].metrics if run.before and key in run.before.sets else {}
    words = {
        "text_retrieval_recall@5": "the right caption is among the first five for",
        "image_retrieval_recall@5": "the right picture is among the first five for",
    }
    for metric in one.metrics:
        if metric.endswith("/acc1") and "lp_" not in metric and "knn_" not in metric:
            words[metric] = f"zero-shot finds the {metric.split('/')[0]} of"
    parts = [
        f"{text} {one.metrics[metric]:.1%}"
        + (f" (untrained: {old[metric]:.1%})" if metric in old else "")
        for metric, text in words.items()
        if metric in one.metrics
    ]
    return f"{one.title} ({one.samples:,} images): {'; '.join(parts)}." if parts else ""


def verdict(run: Run, baseline: Run | None) -> str:
    """Whether the run beat the baseline, counted over the headline metrics."""
    if baseline is None:
        return (
            f"{run.name}: no plain CLIP run with the same data, encoder, steps and seed was "
            "found, so nothing can be said about ProtoCLIP against CLIP. Train one with the "
            "same flags and --method clip, then: python -m protoclip.report RUN CLIP_RUN"
        )
    found: dict[str, list[str]] = {"up": [], "down": [], "same": []}
    for key, one in run.after.sets.items() if run.after else ():
        for metric, words in rows_of(one.metrics):
            got = change(run, baseline, key, metric) if metric.endswith(HEADLINE) else None
            if got is not None and math.isfinite(got.low):
                found[got.kind].append(f"{words} ({one.title}, {number(got.value, '+')})")
    better, worse, same = found.values()
    total = len(better) + len(worse) + len(same)
    if not total:
        return f"{run.name} and {baseline.name} have no metric in common."
    if better and worse:
        head = "is better in some and worse in other numbers than"
    else:
        head = "beat" if better else "lost to" if worse else "cannot be told apart from"
    text = (
        f"{run.name} ({run.method}) {head} {baseline.name} ({baseline.method}): of {total} "
        f"headline numbers {len(better)} are clearly better, {len(worse)} clearly worse, "
        f"{len(same)} within chance (95 % intervals, one seed each)."
    )
    for word, names in (("Better", better), ("Worse", worse)):
        if names:
            text += f" {word}: {', '.join(names[:6])}{' …' if len(names) > 6 else ''}."
    return text


def write_report(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of some runs; several stand side by side.

    Only files of run folders are opened, nothing that they name.

    Args:
        folders: run folders of ``protoclip.train``; the last one is compared with the first whose
            method is clip, else with such a run beside it, else with the recorded one.
        output: the file; None: report.html in the last folder (of several: report-NAMES.html
            beside the last folder).
    Returns:
        The path of the file.
    Raises:
        ValueError: a folder is not a run or is damaged, or ``output`` cannot be a file.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.path)) for run in runs]
    default = Path(folders[-1]) / NAME
    if len(runs) > 1:
        names = "-vs-".join(Path(run.name).name for run in runs)[:120]
        default = Path(folders[-1]).resolve().parent / f"report-{names}.html"
    path = output_file(output or default, "--output")
    try:
        text = render(runs)
    except (
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError
    ) as error:  # fmt: skip
        names = ", ".join(str(run.path) for run in runs)
        raise ValueError(
            f"report: expected files that protoclip.train wrote in {names}, got others "
            f"({type(error).__name__}: {error}); train again"
        ) from error
    write_atomic(path, text)
    return path


def render(runs: Sequence[Run], said: Sequence[str] = ()) -> str:
    """The page as text; ``said``: its first paragraphs, where no run was trained."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        number=number,
        chart=figures.chart_svg,
        histogram=figures.histogram_svg,
        colour=lambda i: f"var(--c{i % len(figures.CYCLE)})",
        pretty=lambda value: json.dumps(value, indent=2),
        command=command_of,
        rows=lambda one: rows_of(one.metrics),
    )
    baseline = find_baseline(runs)
    own = [run for run in runs if run is not baseline]
    if not said:
        said = [learnt(run) for run in own or runs] + [verdict(run, baseline) for run in own]
    series = {run.name: run.series for run in runs}
    sets: dict[str, SetResults] = {}
    for run in ([baseline] if baseline else []) + own:
        sets = {**(run.after.sets if run.after else {}), **sets}
    return environment.from_string(_asset("page.html.j2")).render(
        title="protoclip: " + " and ".join(run.name for run in runs),
        css=figures.CSS,
        js=_asset("page.js"),
        written=time.strftime("%Y-%m-%d %H:%M"),
        runs=runs,
        baseline=baseline,
        columns=[baseline, *own] if baseline else own,
        said=said,
        sets=sets,
        before=runs[0].before if len(runs) == 1 else None,
        change=change,
        headline=HEADLINE,
        curves=figures.charts(figures.CURVES, series),
        churn=figures.charts(figures.CHURN, series),
    )


def _asset(name: str) -> str:
    return resources.files("protoclip.report").joinpath(name).read_text(encoding="utf-8")
