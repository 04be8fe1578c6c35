"""The sections of the page, each a function from runs to HTML."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.report.curves import panels, words_of
from protoclip.report.examples import confusions, retrieval_examples
from protoclip.report.gallery import gallery
from protoclip.report.headline import keys_of, learnt, set_names, table, verdict
from protoclip.report.plane import lay_out
from protoclip.report.runs import Run, defaults_changed
from protoclip.report.svg import Series, bars, histogram, line_chart
from protoclip.report.thumbs import Thumbs

CAPTIONED = 5000  # points up to which the map knows their captions
ABOUT = (
    "CLIP learns to bring each image near its own caption. ProtoCLIP also draws images and "
    "captions to prototypes, the means of groups of similar "
    "training samples, so that kinds stay together."
)
MEANINGS = (
    ("R@k", "share of queries whose right answer is among the first k"),
    ("zero-shot", "share of images nearest to the name of their own class"),
    ("linear probe", "accuracy of a linear classifier on the frozen image features"),
    ("nearest neighbours", "accuracy when the most similar training images vote for the class"),
    ("k-means AMI", "agreement of clusters of image features with the classes: 0 chance, 1 equal"),
)
Pictures = tuple[Thumbs, Thumbs]  # of the training and of the evaluation data


def side_by_side(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
    """The part of each run, under its name where there are several."""
    blocks = []
    for run in runs:
        head = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        blocks.append(f"<div>{head}{part(run)}</div>")
    return f"<div class=runs>{''.join(blocks)}</div>"


def summary(runs: Sequence[Run], baseline: Run | None) -> str:
    said = [ABOUT]
    said += [learnt(run) for run in runs if run is not baseline or len(runs) == 1]
    said += verdict(runs, baseline)
    lines = "".join(f"<p>{html.escape(text)}</p>" for text in said if text)
    remark = f"<p class=note>{html.escape(baseline.remark)}</p>" if baseline else ""
    key = (
        "<p class=note>Small figures: 95 % bootstrap interval over the samples; then the "
        "difference to the baseline, <span class=up>clearly better</span>, "
        "<span class=down>clearly worse</span> or <span class=same>within chance</span>. "
        f"{html.escape(set_names(runs))}</p>"
    )
    meanings = "".join(f"<li><b>{word}</b>: {text}</li>" for word, text in MEANINGS)
    key += f"<details><summary>What the numbers mean</summary><ul>{meanings}</ul></details>"
    keys = keys_of(runs)
    shown = list(dict.fromkeys((*keys[:1], *keys[-1:])))  # the strictest and the widest
    parts = "".join(f"<div>{table(runs, baseline, [one])}</div>" for one in shown)
    full = f"<details><summary>All numbers ({len(keys)} evaluation sets)</summary>"
    full += f"{table(runs, baseline, keys, everything=True)}</details>"
    return f"{lines}{remark}<div class=runs>{parts}</div>{key}{full if keys else ''}"


def curves(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    charts = []
    for title, wanted in panels(names):
        lines = []
        for name in wanted:
            for number, run in enumerate(runs):
                if name in run.series:
                    label = words_of(name) + (f" · {run.name}" if len(runs) > 1 else "")
                    order = wanted.index(name) * len(runs) + number
                    lines.append(Series(label, *run.series[name], order, dashed=number > 0))
        least = 2.0 if title == "Logit scale" else 0.0  # a drift in decimals is no curve
        zero = not title.startswith(("Loss", "Logit"))
        charts.append(line_chart(title, lines, zero=zero, least=least))
    body = "".join(charts)
    return f"<div class=charts>{body}</div>" if body else "<p class=note>No metrics yet.</p>"


def prototypes(runs: Sequence[Run], pictures: Sequence[Pictures]) -> str:
    by_run = {id(run): own for run, own in zip(runs, pictures, strict=True)}
    several = len(runs) > 1

    def part(run: Run) -> str:
        if run.snapshot is None or not run.snapshot.clusters:
            why = "trained without prototypes" if run.method == "clip" else "no snapshot"
            return f"<p class=note>{html.escape(run.name)}: {why}.</p>"
        limits = {"sources": 2, "rows": 6} if several else {"sources": 4, "rows": 12}
        return gallery(run.snapshot, by_run[id(run)][0], **limits)

    intro = (
        "<p>A prototype is a cluster of training samples: what the model is taught to see as one "
        "kind of thing. Shown are clusters from the largest to the smallest, each with those of "
        "its images and captions that are nearest to its two means; where it has too few, "
        "<span class=out>marked</span>, the nearest of other clusters.</p>"
    )
    return intro + side_by_side(runs, part)


def plane(runs: Sequence[Run], pictures: Sequence[Pictures]) -> str:
    by_run = {id(run): own for run, own in zip(runs, pictures, strict=True)}

    def part(run: Run) -> str:
        if run.snapshot is None or len(run.snapshot.index) < 2:
            return "<p class=note>No features were kept of this run.</p>"
        return _map(run, by_run[id(run)][0])

    intro = (
        "<p>Every dot is an image (round) or a caption (square) of the training data, placed so "
        "that near features are near. Each modality is centred first: the gap between them is in "
        "the next section.</p>"
    )
    return intro + side_by_side(runs, part)


def _map(run: Run, thumbs: Thumbs) -> str:
    snapshot = run.snapshot
    assert snapshot is not None
    places = lay_out(snapshot.plane.flatten(0, 1))  # images, then texts
    colourings: dict[str, Any] = {}
    for name, known in snapshot.labels.items():
        colourings[name] = {"ids": _packed(known.ids, "<i2"), "names": list(known.names)}
    for name, labels in snapshot.clusters.items():
        colourings[f"prototype ({name})"] = {"ids": _packed(labels, "<i2"), "names": []}
    few = len(snapshot.index) <= CAPTIONED
    content = {
        "n": len(snapshot.index),
        "xy": _packed((places * 65535).round().clamp(0, 65535), "<u2"),
        "by": colourings,
        "words": [thumbs.caption(i)[:60] for i in snapshot.index.tolist()] if few else [],
    }
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    return (
        "<div class=map><div class=tools></div><canvas width=900 height=640></canvas>"
        f'<p class=note data-hint></p><script type="application/json">{data}</script></div>'
    )


def _packed(values: Tensor, kind: str) -> str:
    """Base64 of little-endian 16-bit integers."""
    array = values.cpu().numpy().clip(-32768, 65535).astype(kind)
    return base64.b64encode(array.tobytes()).decode("ascii")


def geometry(runs: Sequence[Run]) -> str:
    def part(run: Run) -> str:
        one = run.snapshot.judged if run.snapshot else None
        if one is None or not one.captioned or len(one.text) < 2:
            return "<p class=note>Needs an evaluation set with captions.</p>"
        image, text = F.normalize(one.image, dim=1), F.normalize(one.text, dim=1)
        owner = one.caption_image if one.caption_image is not None else torch.arange(len(text))
        matching = image[owner]
        pairs = (matching * text).sum(1)
        others = (matching * text.roll(max(1, len(text) // 3), 0)).sum(1)
        direction = image.mean(0) - text.mean(0)
        gap = float(direction.norm())
        direction = direction / direction.norm().clamp_min(1e-12)
        first = histogram(
            "Cosine of image and caption",
            [("belong together", pairs, 0), ("drawn at random", others, 1)],
            note="Apart: the model tells pairs from strangers.",
        )
        second = histogram(
            f"Modality gap {gap:.2f}",
            [("images", image @ direction, 0), ("captions", text @ direction, 1)],
            note="Features along the line between the two means; overlapping: no gap.",
        )
        return f"<div class=charts>{first}{second}</div>"

    return side_by_side(runs, part)


def zero_shot(runs: Sequence[Run]) -> str:
    return side_by_side(runs, lambda run: confusions(run.snapshot.judged if run.snapshot else None))


def retrieval(runs: Sequence[Run], pictures: Sequence[Pictures]) -> str:
    by_run = {id(run): own for run, own in zip(runs, pictures, strict=True)}
    return side_by_side(
        runs,
        lambda run: retrieval_examples(
            run.snapshot.judged if run.snapshot else None, by_run[id(run)][1]
        ),
    )


def churn(runs: Sequence[Run]) -> str:
    """How the clusters change from episode to episode."""
    charts = []
    for title, ending, note in (
        ("Churn", "_churn", "Share of samples that changed company since the last episode."),
        ("Imbalance", "_imbalance", "Largest cluster over the mean size."),
        ("Clusters in use", "_clusters", "Empty ones are dropped."),
        ("Inertia", "_inertia", "Mean squared distance to the centroid."),
        ("Purity", "_purity", "Share of samples of their cluster's commonest class."),
    ):
        names = dict.fromkeys(
            n for run in runs for n in run.series if ending in n and not n.startswith("seconds_")
        )
        lines = [
            Series(
                name.replace(ending, "").replace("_", " ")
                + (f" · {run.name}" if len(runs) > 1 else ""),
                *run.series[name],
                colour=order * len(runs) + number,
            )
            for order, name in enumerate(names)
            for number, run in enumerate(runs)
            if name in run.series
        ]
        charts.append(line_chart(title, lines, zero=True, note=note))
    body = "".join(charts)
    return f"<div class=charts>{body}</div>" if body else "<p class=note>No clusters were made.</p>"


def cost(runs: Sequence[Run]) -> str:
    def part(run: Run) -> str:
        memory = run.snapshot.facts.get("memory_bytes", {}) if run.snapshot else {}
        total = sum(run.seconds.values())
        rows = [
            (name, seconds, f"{seconds:.1f} s" + _mebibytes(memory.get(name)))
            for name, seconds in sorted(run.seconds.items(), key=lambda pair: -pair[1])
        ]
        if not rows:
            return "<p class=note>No times were kept.</p>"
        note = f"Together {total:.1f} s"
        if run.peak_memory_bytes:
            note += f"; peak memory {run.peak_memory_bytes / 2**20:,.0f} MiB"
        if memory:
            note += "; beside each time the most memory seen at the end of the phase"
        return bars("Time and memory by phase", rows, note=note + ".")

    return side_by_side(runs, part)


def _mebibytes(value: float | None) -> str:
    return f" · {value / 2**20:,.0f} MiB" if value else ""


def settings(runs: Sequence[Run]) -> str:
    def part(run: Run) -> str:
        flags = " ".join(_quoted(word) for word in defaults_changed(run.config))
        command = f"python -m protoclip.train {flags}".strip()
        facts = run.snapshot.facts if run.snapshot else {}
        known = ("protoclip", "commit", "python", "torch", "cpu", "gpu")
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(str(facts[name]))}</td></tr>"
            for name in known
            if facts.get(name)
        )
        config = html.escape(json.dumps(run.config, indent=2))
        return (
            f"<p>The same run again:</p><pre>{html.escape(command)}</pre>"
            f"<table class=facts>{rows}</table>"
            f"<details><summary>Every setting</summary><pre>{config}</pre></details>"
        )

    return side_by_side(runs, part)


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
