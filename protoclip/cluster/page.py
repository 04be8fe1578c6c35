"""The report page of the groups: a summary, every group, and a map."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip.cluster.groups import Groups, NumGroups
from protoclip.cluster.points import Points, blocks_of, short
from protoclip.common.files import in_percent, plural, printable
from protoclip.data import Subset
from protoclip.evaluate.results import Outcome
from protoclip.lloyd.points import on_disk
from protoclip.model import Encoded
from protoclip.report import page, snapshot

MAPPED = 2000  # samples on the page's map
FACES = 400  # samples of which the map shows pictures at once (page.js); of more it shows dots
SHEET = 24  # pictures of a group on the page, where the map does not show all of them anyway
THUMB = 96  # pixels of a picture on the page
SHARP = 1500  # pictures of that size, at most; more are smaller, so that the page can be mailed
NAMED_GROUPS = 40  # groups whose names stand below the map
ROUNDING = 32  # relative deviations of the features of equal pictures, in units of the dtype's eps


def explained(points: Points, squared: Tensor) -> str:
    """A sentence about the share of the variance that lies between the groups."""
    weights = torch.ones(len(squared)) if points.weights is None else points.weights.cpu()
    shares = (weights.double() / weights.sum())[:, None]

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted mean of a function of the rows, block by block: fp64 of all is large."""
        blocks = blocks_of(points.rows)
        sums = [(shares[part] * function(rows.double())).sum(0) for part, rows in blocks]
        return torch.stack(sums).sum(0)

    mean = mean_of(lambda rows: rows)
    total = float(mean_of(lambda rows: (rows - mean).square()).sum())
    rounding = ROUNDING * torch.finfo(on_disk(points.rows, squared.device).dtype).eps
    assert points.stored is not None
    if points.stored.dtype.kind == "f":
        rounding = max(rounding, 2 * float(np.finfo(points.stored.dtype).eps))
    if total <= rounding**2 * float(mean_of(Tensor.square).sum()):
        return "The rows are equal up to rounding, so there is no variance to account for."
    within = float((shares[:, 0] * squared.double()).sum())
    share = max(0.0, 1 - within / total)
    return f"The groups account for {in_percent(share)} of the variance."


def make_page(
    points: Points,
    groups: Groups,
    chosen: NumGroups,
    seconds: Mapping[str, float],
    notes: Sequence[str],
) -> tuple[str, dict[int, int]]:
    """The page's HTML, and the near-duplicates that it marks: row -> the row that it looks like."""
    labels = groups.labels
    counts = labels.bincount()
    counts = counts[counts > 0]
    noun = "picture" if "images" in points.shown else "row"
    text = [
        f"{plural(len(labels), noun)} of {short(points.dataset.name)} in "
        f"{plural(len(counts), 'group')}{chosen.why}; "
        f"the smallest has {int(counts.min()):,}, the largest {int(counts.max()):,}, the median "
        f"{float(counts.double().quantile(0.5)):,.10g}.",
        f"Grouped by k-means on {points.of}. {explained(points, groups.squared)}",
    ]
    text += notes
    if chosen.scores:
        text.append(f"{chosen.scores_in_words}.")
    dataset = points.dataset
    images = len(labels) if len(labels) <= FACES else SHEET
    shown = min(len(labels), images * len(counts))
    thumbs = snapshot.Thumbnails(THUMB if shown <= SHARP else snapshot.SIDE)
    nearness = dict.fromkeys(points.shown, -groups.squared)
    block = snapshot.cluster_block(
        dataset,
        labels,
        nearness,
        thumbs,
        all_clusters=labels,
        all_labels=dataset.labels,
        images=images,
    )
    times = Counter(card["words"] for card in block["cards"])
    duplicates: dict[int, int] = {}
    for card in block["cards"]:
        if card["words"] and times[card["words"]] > 1:
            card["words"] += f" #{card['cluster']}"
        members = groups.members(card["cluster"])
        card["members"] = [printable(dataset.keys[i]) for i in members]
        tiny = [thumbs.tiny[item["picture"]] for item in card.get("images", ())]
        card["duplicates"] = snapshot.near_duplicates(tiny)
        for place, first in card["duplicates"].items():
            duplicates[members[place]] = members[first]
    if number := len(duplicates):
        text.append(
            f"{plural(number, 'picture')} marked ≈ {'looks' if number == 1 else 'look'} nearly the "
            "same as another of the group."
        )
    mapped = snapshot.every(torch.arange(len(labels)), MAPPED)
    mapped_rows = on_disk(points.rows, mapped.device).take(mapped)
    encoded = Encoded(image=mapped_rows, text=mapped_rows[:0])
    samples = snapshot.Samples(
        dataset=Subset(dataset, mapped),
        encoded=encoded,
        projected=encoded,
        clusters={"k-means": labels[mapped]},
    )
    map_data = snapshot.map_data(
        samples, thumbs if "images" in points.shown else None, reads=len(mapped) <= FACES
    )
    if map_data and len(groups.ends) <= NAMED_GROUPS:
        titles = {card["cluster"]: card["words"] or card.get("like") for card in block["cards"]}
        names = [titles.get(group) or f"group {group}" for group in range(len(groups.ends))]
        map_data["by"]["cluster (k-means)"]["names"] = names
    html = render("cluster", dataset.name, points.of, text, block, thumbs, seconds, map_data)
    return html, duplicates


def render(
    command: str,
    name: str,
    of: str,
    text: Sequence[str],
    block: Mapping[str, Any],
    thumbs: snapshot.Thumbnails,
    seconds: Mapping[str, float],
    map_data: Mapping[str, Any] | None = None,
) -> str:
    """The HTML of a command's clusters.

    Args:
        command: its name.
        name: of the data.
        of: what was clustered.
        block: of ``cluster_block``.
    """
    content = snapshot.Snapshot(
        pictures=thumbs.made,
        clusters=[{"name": "k-means", "of": of, **block}],
        map_data=map_data or {},
        facts={**snapshot.environment(), "command": shlex.join(["protoclip", *sys.argv[1:]])},
    )
    outcome = Outcome(name, "", "", {}, seconds=seconds)
    run = page.Run(short(name), None, {}, outcome, snapshot=content)
    return page.render([run], text, command=command)
