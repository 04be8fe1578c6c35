"""The page about a selection: what each top cluster had and gave, with typical pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from protoclip.cluster.groups import Groups
from protoclip.cluster.page import SHEET, THUMB, render
from protoclip.cluster.points import short, squared_distances
from protoclip.common.files import in_percent, plural
from protoclip.curate.hierarchy import Hierarchy
from protoclip.data.feature_pairs import FeaturePairs
from protoclip.data.images import no_picture
from protoclip.features import FeatureRows
from protoclip.features.identity import CAPTION, FILE
from protoclip.report import snapshot


def make_page(
    data: str,
    rows: FeatureRows,
    hierarchy: Hierarchy,
    chosen: Tensor,
    notes: Sequence[str],
    seconds: Mapping[str, float],
) -> str:
    """The page's HTML; ``data``: what was curated, of whose ``rows`` were chosen ``chosen``, int64,
    increasing; ``notes``: further sentences."""
    top = len(hierarchy.levels)
    all_clusters = hierarchy.labels(top)
    labels = all_clusters[chosen]
    num_clusters = len(hierarchy.levels[-1].sizes)
    had = torch.bincount(all_clusters, minlength=num_clusters)
    gave = torch.bincount(labels, minlength=num_clusters)
    name = short(data)
    text = [
        f"{len(chosen):,} of {plural(len(all_clusters), 'row')} of {name}, with equal shares of "
        f"{plural(int((had > 0).sum()), 'cluster')}.",
        f"{share_sentence(had, 'All rows')} {share_sentence(gave, 'The chosen rows')}",
        *notes,
    ]
    centroids = hierarchy.levels[-1].centroids
    squared = squared_distances(rows.select(chosen.numpy()), labels, centroids)
    shown = torch.from_numpy(Groups(labels, squared).ranks() <= SHEET).nonzero()[:, 0]
    kinds = ["captions" if rows.identity.knows(CAPTION) else "names"]
    files = rows.identity.column(FILE, chosen[shown].numpy())
    is_picture = torch.tensor([os.path.isfile(f) and not no_picture(f) for f in files])
    if is_picture.any():
        kinds.append("images")
        shown = shown[is_picture]
    rows_shown = rows.select(chosen[shown].numpy())
    each_row = rows_shown.identity.separate()
    thumbs = snapshot.Thumbnails(THUMB)
    block = snapshot.cluster_block(
        FeaturePairs(rows.name, rows_shown, identity=each_row),
        labels[shown],
        dict.fromkeys(kinds, -squared[shown]),
        thumbs,
        all_clusters=all_clusters,
        all_labels={},
        images=SHEET,
    )
    for card in block["cards"]:
        card["class"] = f"{int(gave[card['cluster']]):,} chosen"
    of = f"the rows of {name}"
    return render("curate", data, of, text, block, thumbs, seconds)


def share_sentence(counts: Tensor, subject: str) -> str:
    """How evenly rows lie in the clusters."""
    shares = counts.double() / counts.sum()
    effective = float(torch.special.entr(shares).sum().exp())
    return (
        f"{subject} are spread like equal shares of {effective:,.1f} clusters (the exponential of "
        f"the entropy), and the largest cluster has {in_percent(float(shares.max()), 1)} of them."
    )
