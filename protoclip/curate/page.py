"""The page about a selection: what each top cluster had and gave, with typical pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from protoclip.cluster.groups import BLOCK
from protoclip.cluster.page import SHEET, THUMB
from protoclip.cluster.points import short
from protoclip.common.files import in_percent, plural
from protoclip.curate.hierarchy import Hierarchy, open_points
from protoclip.curate.source import RowPictures, Source
from protoclip.evaluate.results import Outcome
from protoclip.report import page, snapshot


def make_page(
    source: Source,
    hierarchy: Hierarchy,
    chosen: Tensor,
    notes: Sequence[str],
    seconds: Mapping[str, float],
) -> str:
    """The page's HTML; ``chosen``: rows, int64, increasing; ``notes``: further sentences."""
    top = len(hierarchy.levels)
    all_clusters = hierarchy.labels(top)
    labels = all_clusters[chosen]
    num_clusters = len(hierarchy.levels[-1].sizes)
    had = torch.bincount(all_clusters, minlength=num_clusters)
    gave = torch.bincount(labels, minlength=num_clusters)
    name = short(source.all_rows.name)
    text = [
        f"{len(chosen):,} of {plural(len(all_clusters), 'row')} of {name}, with equal shares of "
        f"{plural(int((had > 0).sum()), 'cluster')}.",
        f"{share_sentence(had, 'All rows')} {share_sentence(gave, 'The chosen rows')}",
        *notes,
    ]
    shown, near = typical_rows(source, hierarchy, chosen, labels)
    dataset = RowPictures(source, chosen[shown].numpy())
    near_by_kind = {dataset.shown: near}
    with_picture = [i for i in range(len(dataset)) if dataset.has_picture(i)]
    if with_picture:
        shown, near = shown[with_picture], near[with_picture]
        dataset = RowPictures(source, chosen[shown].numpy())
        near_by_kind = {dataset.shown: near, "images": near}
    thumbs = snapshot.Thumbnails(THUMB)
    block = snapshot.cluster_block(
        dataset,
        labels[shown],
        near_by_kind,
        thumbs,
        all_clusters=all_clusters,
        all_labels={},
        images=SHEET,
    )
    for card in block["cards"]:
        card["class"] = f"{int(gave[card['cluster']]):,} chosen"
    content = snapshot.Snapshot(
        pictures=thumbs.made,
        clusters=[{"name": "k-means", "of": f"the rows of {name}", **block}],
        facts={**snapshot.environment(), "command": shlex.join(["protoclip", *sys.argv[1:]])},
    )
    outcome = Outcome(source.all_rows.name, "", "", {}, seconds=seconds)
    runs = [page.Run(name, None, {}, outcome, snapshot=content)]
    return page.render(runs, text, command="curate")


def share_sentence(counts: Tensor, subject: str) -> str:
    """How evenly rows lie in the clusters."""
    shares = counts.double() / counts.sum()
    effective = float(torch.special.entr(shares).sum().exp())
    return (
        f"{subject} are spread like equal shares of {effective:,.1f} clusters (the exponential of "
        f"the entropy), and the largest cluster has {in_percent(float(shares.max()), 1)} of them."
    )


def typical_rows(
    source: Source, hierarchy: Hierarchy, chosen: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each top cluster the chosen rows that are nearest to its centroid, as positions in
    ``chosen``, int64 [M], and how near they are, fp32 [M]."""
    centroids = hierarchy.levels[-1].centroids
    near = torch.empty(len(chosen))
    points = open_points(source.rows)
    for part in torch.arange(len(chosen)).split(BLOCK):
        differences = points.take(chosen[part]) - centroids[labels[part]]
        near[part] = -differences.square().sum(1).float()
    order = np.lexsort((-near.numpy(), labels.numpy()))
    counts = torch.bincount(labels)
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    shown = torch.from_numpy(order)[rank < SHEET].sort().values
    return shown, near[shown]
