"""The report: one HTML file with everything inside, from any number of runs."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from protoclip.config import output_file
from protoclip.data.cache import write_atomic
from protoclip.evaluate.results import rows_of
from protoclip.report import figures
from protoclip.report import runs as reading
from protoclip.report.runs import Run

NAME = "report.html"


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
    runs = [reading.read_run(folder) for folder in folders]
    if not runs:
        raise ValueError("report: expected at least one run folder")
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.path)) for run in runs]
    path = output_file(output or _default(runs), "--output")
    try:
        text = render(runs)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        names = ", ".join(str(run.path) for run in runs)
        raise ValueError(
            f"report: expected files that protoclip.train wrote in {names}, got others "
            f"({type(error).__name__}: {error}); train again"
        ) from error
    write_atomic(path, text)
    return path


def _default(runs: Sequence[Run]) -> Path:
    last = runs[-1].path
    assert last is not None
    if len(runs) == 1:
        return last / NAME
    names = "-vs-".join(Path(run.name).name for run in runs)[:120]
    return last.resolve().parent / f"report-{names}.html"


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        share=reading.share,
        signed=reading.signed,
        chart=figures.chart_svg,
        histogram=figures.histogram_svg,
        colour=lambda i: f"var(--c{i % len(figures.CYCLE)})",
        pretty=lambda value: json.dumps(value, indent=2),
    )
    baseline = reading.find_baseline(runs)
    judged = [run for run in runs if run is not baseline or len(runs) == 1]
    said = [reading.learnt(run) for run in judged]
    said += [reading.verdict(run, baseline) for run in runs if run is not baseline]
    keys = list(dict.fromkeys(key for run in runs if run.after for key in run.after.sets))
    titles = {key: one.title for run in runs if run.after for key, one in run.after.sets.items()}
    columns = ([baseline] if baseline else []) + [run for run in runs if run is not baseline]
    series = {run.name: run.series for run in runs}
    try:
        return environment.from_string(_asset("page.html.j2")).render(
            title="protoclip: " + " and ".join(run.name for run in runs),
            css=figures.CSS,
            js=_asset("page.js"),
            written=time.strftime("%Y-%m-%d %H:%M"),
            runs=runs,
            baseline=baseline,
            columns=columns,
            said=said,
            titles=titles,
            untrained=len(runs) == 1 and runs[0].before is not None,
            sets={key: _rows(key, runs, columns, baseline) for key in keys},
            curves=figures.curves(series),
            churn=figures.churn(series),
            commands={run.name: _command(run) for run in runs},
        )
    except jinja2.TemplateError as error:
        raise TypeError(str(error)) from error


def _asset(name: str) -> str:
    return resources.files("protoclip.report").joinpath(name).read_text(encoding="utf-8")


def _command(run: Run) -> str:
    return shlex.join(["python", "-m", "protoclip.train", *reading.defaults_changed(run.config)])


def _rows(
    key: str, runs: Sequence[Run], columns: Sequence[Run], baseline: Run | None
) -> Mapping[str, Any]:
    """One evaluation set as rows of cells, a cell for each column."""
    one = next(run.after.sets[key] for run in columns if run.after and key in run.after.sets)
    old = runs[0].before.sets.get(key) if runs[0].before else None
    rows = [
        {
            "words": words,
            "headline": reading.is_headline(metric),
            "untrained": old.metrics.get(metric) if old else None,
            "cells": [_cell(run, baseline, key, metric) for run in columns],
        }
        for metric, words in rows_of(one.metrics)
    ]
    return {"title": one.title, "samples": one.samples, "rows": rows}


def _cell(run: Run, baseline: Run | None, key: str, metric: str) -> Mapping[str, Any] | None:
    """Value, interval, and difference to the baseline; None without a value."""
    one = run.after.sets.get(key) if run.after else None
    value = one.metrics.get(metric, math.nan) if one else math.nan
    if one is None or math.isnan(value):
        return None
    interval = one.intervals.get(metric, (math.nan, math.nan))
    compared = baseline is not None and run is not baseline
    got = reading.change(run, baseline, key, metric) if baseline and compared else None
    kind = "same"
    if got and got.clear:
        kind = "up" if (got.value < 0) == reading.lower_is_better(metric) else "down"
    return {
        "value": value,
        "interval": None if math.isnan(interval[0]) else interval,
        "change": got.value if got else None,
        "kind": kind,
        "chance": got is None or math.isfinite(got.low),
    }
