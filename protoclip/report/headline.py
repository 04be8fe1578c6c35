"""The numbers of the runs beside the baseline's, and what they say in words."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from protoclip.evaluate import SetResults
from protoclip.evaluate.results import rows_of
from protoclip.metrics import bootstrap_mean
from protoclip.report.runs import Run

HEADLINE = ("recall@1", "recall@5", "acc1", "ami")
LOWER_IS_BETTER = ("rank", "modality_gap", "alignment", "uniformity")


@dataclass(frozen=True)
class Change:
    """A metric's difference to the baseline, with the 95 % interval of the difference."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        return self.low > 0 or self.high < 0


def is_headline(metric: str) -> bool:
    return metric.endswith(HEADLINE)


def change(run: Run, other: Run, key: str, metric: str, *, before: bool = False) -> Change | None:
    """The run's metric minus the other's (or its own before training); None: not comparable.

    Paired over the samples where both runs' hits are kept; else the intervals are taken as
    independent, which is wider.
    """
    mine = run.after.sets.get(key) if run.after else None
    source = run.before if before else other.after
    theirs = source.sets.get(key) if source else None
    if mine is None or theirs is None:
        return None
    a, b = mine.metrics.get(metric, math.nan), theirs.metrics.get(metric, math.nan)
    if math.isnan(a) or math.isnan(b):
        return None
    name = f"{key}/{metric}"
    hits = run.snapshot.hits.get(name) if run.snapshot else None
    base = other.snapshot if other.snapshot else None
    old = None if base is None else (base.hits_before if before else base.hits).get(name)
    if hits is not None and old is not None and hits.shape == old.shape:
        both = bootstrap_mean(hits.float(), old.float())
        return Change(both.mean, both.low, both.high)
    if metric in mine.intervals and metric in theirs.intervals:
        half = math.hypot(_half(mine, metric), _half(theirs, metric))
        return Change(a - b, a - b - half, a - b + half)
    return Change(a - b, -math.inf, math.inf)


def _half(one: SetResults, metric: str) -> float:
    low, high = one.intervals[metric]
    return (high - low) / 2


def keys_of(runs: Sequence[Run]) -> list[str]:
    """Evaluation sets that any run has, in order."""
    found = [key for run in runs if run.after for key in run.after.sets]
    return list(dict.fromkeys(found))


def table(
    runs: Sequence[Run], baseline: Run | None, keys: Sequence[str], *, everything: bool = False
) -> str:
    """One block of rows per evaluation set: untrained (of a single run), baseline, runs."""
    others = [run for run in runs if run is not baseline]
    columns = ([baseline] if baseline else []) + others
    with_before = len(runs) == 1 and runs[0].before is not None
    heads = "<th>untrained</th>" if with_before else ""
    heads += "".join(
        f"<th>{html.escape(run.name)}<br><small>{html.escape(run.method)}</small></th>"
        for run in columns
    )
    rows = []
    for key in keys:
        one = next(run.after.sets[key] for run in columns if run.after and key in run.after.sets)
        span = len(columns) + 1 + with_before
        rows.append(
            f"<tr class=set><th colspan={span}>{html.escape(one.title)} <small>{html.escape(key)}, "
            f"{one.samples:,} images</small></th></tr>"
        )
        for metric, words in rows_of(one.metrics):
            if not everything and not is_headline(metric):
                continue
            cells = ""
            if with_before and runs[0].before:
                old = runs[0].before.sets.get(key)
                cells += f"<td>{_share(old.metrics.get(metric) if old else None)}</td>"
            cells += "".join(_cell(run, baseline, key, metric) for run in columns)
            rows.append(f"<tr><th>{html.escape(words)}</th>{cells}</tr>")
    return (
        f"<div class=scroll><table class=numbers><thead><tr><th></th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(run: Run, baseline: Run | None, key: str, metric: str) -> str:
    one = run.after.sets.get(key) if run.after else None
    value = one.metrics.get(metric) if one else None
    if one is None or value is None or math.isnan(value):
        return "<td>–</td>"
    text = f"<b>{_share(value)}</b>"
    if metric in one.intervals and not math.isnan(one.intervals[metric][0]):
        low, high = one.intervals[metric]
        text += f"<small>{_share(low)} … {_share(high)}</small>"
    if baseline is not None and run is not baseline:
        got = change(run, baseline, key, metric)
        if got is not None:
            better = (got.value < 0) == metric.endswith(LOWER_IS_BETTER)
            kind = ("up" if better else "down") if got.clear else "same"
            text += f"<small class={kind}>{_signed(got.value)}</small>"
            text += "" if math.isfinite(got.low) else "<small>no interval</small>"
    return f"<td>{text}</td>"


def _share(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return text.replace("-", "−")


def _signed(value: float) -> str:
    return (f"{value:+.3f}" if abs(value) < 10 else f"{value:+,.1f}").replace("-", "−")


def learnt(run: Run) -> str:
    """What the run learnt, in a sentence or two: first set, before and after."""
    if run.after is None or not run.after.sets:
        return f"{run.name} was not evaluated: it had no evaluation data (--val-data)."
    key, one = next(iter(run.after.sets.items()))
    parts = []
    for metric, words in (
        ("text_retrieval_recall@5", "the right caption is among the first five for"),
        ("image_retrieval_recall@5", "the right picture is among the first five for"),
    ):
        if metric in one.metrics:
            parts.append(f"{words} {one.metrics[metric]:.1%}{_untrained(run, key, metric)}")
    for metric, value in one.metrics.items():
        if metric.endswith("/acc1") and "lp_" not in metric and "knn_" not in metric:
            text = f"zero-shot finds the {metric.split('/')[0]} of {value:.1%}"
            parts.append(text + _untrained(run, key, metric))
    if not parts:
        return ""
    return f"{one.title} ({one.samples:,} images): {'; '.join(parts)}."


def _untrained(run: Run, key: str, metric: str) -> str:
    old = run.before.sets.get(key) if run.before else None
    return f" (untrained: {old.metrics[metric]:.1%})" if old and metric in old.metrics else ""


def set_names(runs: Sequence[Run]) -> str:
    """What the short names of the evaluation sets stand for."""
    titles = {key: one.title for run in runs if run.after for key, one in run.after.sets.items()}
    return "; ".join(f"{key}: {title}" for key, title in titles.items() if title)


def verdict(runs: Sequence[Run], baseline: Run | None) -> list[str]:
    """Whether each run beat the baseline, counted over the headline metrics."""
    out = []
    for run in runs:
        if run is baseline:
            continue
        if baseline is None:
            out.append(
                f"{run.name}: no plain CLIP run with the same data, encoder, steps and seed was "
                "found, so nothing can be said about ProtoCLIP against CLIP. Train one with the "
                "same flags and --method clip, then: python -m protoclip.report RUN CLIP_RUN"
            )
            continue
        better: list[str] = []
        worse: list[str] = []
        same: list[str] = []
        for key in keys_of([run]):
            for metric, words in rows_of(run.after.sets[key].metrics) if run.after else ():
                got = change(run, baseline, key, metric) if is_headline(metric) else None
                if got is None or math.isinf(got.low):
                    continue
                named = f"{words} ({key}, {_signed(got.value)})"
                if not got.clear:
                    same.append(named)
                else:
                    (better if got.value > 0 else worse).append(named)
        out.append(_sentence(run, baseline, better, worse, same))
    return out


def _sentence(run: Run, baseline: Run, better: list[str], worse: list[str], same: list[str]) -> str:
    total = len(better) + len(worse) + len(same)
    if not total:
        return f"{run.name} and {baseline.name} have no metric in common."
    if better and not worse:
        head = "beat"
    elif worse and not better:
        head = "lost to"
    elif better and worse:
        head = "is better in some and worse in other numbers than"
    else:
        head = "cannot be told apart from"
    text = (
        f"{run.name} ({run.method}) {head} {baseline.name} ({baseline.method}): of {total} "
        f"headline numbers {len(better)} are clearly better, {len(worse)} clearly worse, "
        f"{len(same)} within chance (95 % intervals, one seed each)."
    )
    if better:
        text += f" Better: {', '.join(better[:6])}{' …' if len(better) > 6 else ''}."
    if worse:
        text += f" Worse: {', '.join(worse[:6])}{' …' if len(worse) > 6 else ''}."
    return text
