"""The report: one HTML file with everything inside, from any number of runs."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from protoclip.config import output_file
from protoclip.data.cache import write_atomic
from protoclip.report import sections
from protoclip.report.runs import Run, datasets, find_baseline, read_run
from protoclip.report.thumbs import Thumbs

NAME = "report.html"
MAX_BYTES = 10 * 2**20


def write_report(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of some runs; several stand side by side.

    Args:
        folders: run folders of ``protoclip.train``; the last one is compared with the first whose
            method is clip, else with such a run beside it, else with the recorded one.
        output: the file; None: report.html in the last folder (of several: report-NAMES.html
            beside the last folder).
    Returns:
        The path of the file.
    Raises:
        ValueError: a folder is no run, or ``output`` cannot be a file.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ValueError("report: expected at least one run folder")
    path = output_file(output or _default(runs), "--output")
    write_atomic(path, render(runs))
    return path


def _default(runs: Sequence[Run]) -> Path:
    last = runs[-1].path
    assert last is not None
    if len(runs) == 1:
        return last / NAME
    names = "-vs-".join(run.name for run in runs)[:120]
    return last.resolve().parent / f"report-{names}.html"


def render(runs: Sequence[Run], baseline: Run | None = None) -> str:
    """The page as text."""
    baseline = baseline or find_baseline(runs)
    opened = [datasets(run) for run in runs]
    pictures = [(Thumbs(train), Thumbs(judged)) for train, judged, _ in opened]
    missing = " ".join(dict.fromkeys(text for *_, text in opened if text))
    parts = [
        ("summary", "What was learnt", sections.summary(runs, baseline)),
        ("curves", "Curves", sections.curves(runs)),
        ("prototypes", "Prototypes", sections.prototypes(runs, pictures)),
        ("map", "Map of images and captions", sections.plane(runs, pictures)),
        ("gap", "Modality gap", sections.geometry(runs)),
        ("zeroshot", "Zero-shot: what is taken for what", sections.zero_shot(runs)),
        ("retrieval", "Retrieval, right and wrong", sections.retrieval(runs, pictures)),
        ("churn", "Clusters from episode to episode", sections.churn(runs)),
        ("cost", "Time and memory", sections.cost(runs)),
        ("settings", "Settings, and how to reproduce it", sections.settings(runs)),
    ]
    title = "protoclip: " + " and ".join(run.name for run in runs)
    links = "".join(f'<a href="#{key}">{html.escape(head)}</a>' for key, head, _ in parts)
    body = "".join(
        f'<section id="{key}"><h2>{html.escape(head)}</h2>{content}</section>'
        for key, head, content in parts
    )
    about = time.strftime("written %Y-%m-%d %H:%M")
    note = f"<p class=note>{html.escape(missing)}</p>" if missing else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_asset('page.css')}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p class=note>{about}</p>{note}<nav>{links}</nav>{body}"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("protoclip.report").joinpath(name).read_text(encoding="utf-8")
