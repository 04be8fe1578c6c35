"""The report: one HTML file with everything inside, from any number of runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from protoclip.config import output_file
from protoclip.data.files import write_atomic
from protoclip.evaluate import SetResults
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
    default = Path(folders[-1]) / NAME
    if len(runs) > 1:
        names = "-vs-".join(Path(run.name).name for run in runs)[:120]
        default = Path(folders[-1]).resolve().parent / f"report-{names}.html"
    path = output_file(output or default, "--output")
    try:
        text = render(runs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        names = ", ".join(str(run.path) for run in runs)
        raise ValueError(
            f"report: expected files that protoclip.train wrote in {names}, got others "
            f"({type(error).__name__}: {error}); train again"
        ) from error
    write_atomic(path, text)
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        number=reading.number,
        chart=figures.chart_svg,
        histogram=figures.histogram_svg,
        colour=lambda i: f"var(--c{i % len(figures.CYCLE)})",
        pretty=lambda value: json.dumps(value, indent=2),
        command=reading.command_of,
        rows=lambda one: rows_of(one.metrics),
    )
    baseline = reading.find_baseline(runs)
    own = [run for run in runs if run is not baseline]
    said = [reading.learnt(run) for run in own or runs]
    said += [reading.verdict(run, baseline) for run in own]
    series = {run.name: run.series for run in runs}
    sets: dict[str, SetResults] = {}
    for run in ([baseline] if baseline else []) + own:
        sets = {**(run.after.sets if run.after else {}), **sets}
    try:
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
            change=reading.change,
            headline=reading.HEADLINE,
            curves=figures.charts(figures.CURVES, series),
            churn=figures.charts(figures.CHURN, series),
        )
    except jinja2.TemplateError as error:
        raise TypeError(str(error)) from error


def _asset(name: str) -> str:
    return resources.files("protoclip.report").joinpath(name).read_text(encoding="utf-8")
