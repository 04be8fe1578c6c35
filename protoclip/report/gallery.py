"""What each prototype holds: its nearest images and captions, its size and purity, as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping

import torch
from torch import Tensor

from protoclip.data import Labels
from protoclip.report.prototypes import nearest_samples, spread_by_size
from protoclip.report.snapshot import Snapshot
from protoclip.report.thumbs import Thumbs

IMAGES, CAPTIONS = 8, 5
WORDS = {"image": "the image features", "text": "the caption features"}


def gallery(snapshot: Snapshot, thumbs: Thumbs, *, sources: int = 4, rows: int = 12) -> str:
    """One block per source of clusters, opened for the last one (the teacher, if there is one)."""
    names = sorted(snapshot.clusters, key=lambda name: name.split("_")[0] not in WORDS)
    shown = names[-sources:][::-1]
    blocks = []
    for name in shown:
        labels = snapshot.clusters[name]
        if not bool((labels >= 0).any()):
            continue
        counts = torch.bincount(labels[labels >= 0])
        chosen = spread_by_size(counts, rows)
        summary = _summary(name, labels, counts, snapshot.labels)
        cards = "".join(_cards(snapshot, thumbs, labels, chosen))
        blocks.append(
            f"<details{' open' if name == shown[0] else ''}><summary>{summary}</summary>"
            f"<div class=protos>{cards}</div></details>"
        )
    if len(names) > len(shown):
        rest = ", ".join(html.escape(name) for name in names[: -len(shown)])
        blocks.append(f"<p class=note>Not shown: {rest}.</p>")
    return "".join(blocks)


def _summary(name: str, labels: Tensor, counts: Tensor, known: Mapping[str, Labels]) -> str:
    sizes = counts[counts > 0].float()
    source = WORDS.get(name.split("_")[0], "the external teacher's features")  # "image_500": K 500
    text = (
        f"<b>{html.escape(name)}</b>: clusters of {source}, "
        f"{len(sizes):,} prototypes of {int(sizes.min()):,} to {int(sizes.max()):,} samples"
    )
    for label, own in known.items():
        share = mean_purity(labels, own)
        text += f"; purity by {html.escape(label)} {share:.0%}"
    return text


def mean_purity(labels: Tensor, known: Labels) -> float:
    """Share of the samples that belong to the commonest class of their prototype."""
    from protoclip.metrics import purity

    kept = labels >= 0
    return purity(labels[kept], known.ids[kept])


def _cards(snapshot: Snapshot, thumbs: Thumbs, labels: Tensor, chosen: list[int]) -> list[str]:
    near_image = nearest_samples(snapshot.image, labels, chosen, IMAGES, members_first=True)
    near_text = nearest_samples(snapshot.text, labels, chosen, CAPTIONS, members_first=True)
    first = next(iter(snapshot.labels.values()), None)
    cards = []
    for row, prototype in enumerate(chosen):
        members = labels == prototype
        words = f"{int(members.sum()):,} samples"
        if first is not None:
            kinds, times = torch.unique(first.ids[members], return_counts=True)
            best = int(times.argmax())
            share = float(times[best] / times.sum())
            words += f" · {share:.0%} {html.escape(first.names[int(kinds[best])])}"
        pictures = "".join(
            thumbs.tag(int(snapshot.index[i]), kind="" if members[i] else "out")
            for i in near_image[row].tolist()
        )
        lines = "".join(
            f"<li{'' if members[i] else ' class=out'}>"
            f"{html.escape(thumbs.caption(int(snapshot.index[i])))}</li>"
            for i in near_text[row].tolist()
        )
        cards.append(
            f"<div class=proto><p><b>#{prototype}</b> {words}</p>"
            f"<div class=thumbs>{pictures}</div><ul>{lines}</ul></div>"
        )
    return cards
