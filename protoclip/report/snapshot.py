"""What a run leaves for its page: ``report.json`` in the run folder.

Everything the page shows of the data (thumbnails, captions, examples, the map) is worked out here,
at the end of training, so that ``protoclip.report`` never opens the data itself.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from protoclip.data import DataError, PairDataset
from protoclip.data.cache import write_atomic
from protoclip.evaluate import EvalSet, Results
from protoclip.kmeans import kmeans
from protoclip.metrics import purity
from protoclip.model import Encoded
from protoclip.ops import segment_mean

NAME = "report.json"
FORMAT = 2
SIDE = 64  # pixels of a thumbnail
CARDS, IMAGES, CAPTIONS = 12, 8, 5  # prototypes of each source, and their nearest neighbours
ASKED, SHOWN = 400, 4  # queries that are looked at, and those that are shown of each kind
CELLS, WORST = 14, 12  # classes of a full confusion table; else its largest entries
BINS = 48
LANDMARKS, NEAREST = 300, 4
SOURCES = {"image": "the image features", "text": "the caption features"}


@dataclass(frozen=True)
class Samples:
    """Training samples that a page shows: N of them, and what the model makes of them."""

    dataset: PairDataset  # of length N
    encoded: Encoded  # u, [N, D] each, for the map
    projected: Encoded  # h, [N, Dh] each, where the prototypes live
    clusters: Mapping[str, Tensor]  # source -> int64 [N], negative: no prototype


@dataclass(frozen=True)
class Snapshot:
    """A page's content as JSON holds it; ``pictures`` are base64, other parts name them by number.

    An item is ``{"picture": number or None, "caption": text, "hit": bool}``; some have no picture.
    """

    kind: str = "webp"  # format of the pictures
    pictures: Sequence[str] = ()
    clusters: Sequence[Mapping[str, Any]] = ()  # one block a source: numbers and cards of items
    plane: Mapping[str, Any] = field(default_factory=dict)  # the map, arrays packed in base64
    geometry: Mapping[str, Any] = field(default_factory=dict)  # histograms: edges and shares
    confusions: Sequence[Mapping[str, Any]] = ()
    retrieval: Sequence[Mapping[str, Any]] = ()
    hits: Mapping[str, str] = field(default_factory=dict)  # "SET/metric" -> packed bits
    facts: Mapping[str, Any] = field(default_factory=dict)  # environment, memory, ...

    def hits_of(self, name: str) -> Tensor | None:
        """Hit or miss of each query, float32 [Q]; None where they were not kept."""
        if name not in self.hits:
            return None
        count, _, bits = self.hits[name].partition(":")
        raw = np.frombuffer(base64.b64decode(bits), np.uint8)
        return torch.from_numpy(np.unpackbits(raw, count=int(count))).float()


class Thumbnails:
    """Small pictures, each encoded once, and short captions; bad samples give None and ""."""

    def __init__(self) -> None:
        self.kind = "webp" if features.check("webp") else "jpeg"
        self.made: list[str] = []
        self._known: dict[tuple[int, int], int | None] = {}

    def item(self, dataset: PairDataset, i: int, *, hit: bool = False) -> dict[str, Any]:
        picture = self._number(dataset, i)
        return {"picture": picture, "caption": caption_of(dataset, i), "hit": bool(hit)}

    def _number(self, dataset: PairDataset, i: int) -> int | None:
        key = (id(dataset), i)
        if key not in self._known:
            self._known[key] = None
            with contextlib.suppress(DataError, OSError, IndexError):
                picture = dataset.image(i).convert("RGB")
                picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                stream = io.BytesIO()
                picture.save(stream, self.kind, quality=78)
                self._known[key] = len(self.made)
                self.made.append(base64.b64encode(stream.getvalue()).decode("ascii"))
        return self._known[key]


def caption_of(dataset: PairDataset, i: int, k: int = 0) -> str:
    """Caption ``k`` of sample ``i``, at most 90 characters."""
    with contextlib.suppress(DataError, OSError, IndexError):
        texts = dataset.captions(i)
        text = texts[min(k, len(texts) - 1)]
        return text if len(text) <= 90 else text[:89].rstrip() + "…"
    return f"sample {i}"


def take_snapshot(
    samples: Samples,
    judged: tuple[PairDataset, EvalSet] | None = None,
    *,
    after: Results | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Work out what a page shows.

    Args:
        samples: of the training data.
        judged: the evaluation set that examples come from, and its features.
        after: results of the trained model, for their hits.
        facts: about the run: anything JSON can hold.
    """
    thumbs = Thumbnails()
    clusters = gallery(samples, thumbs)
    captioned = judged and judged[1].captioned and len(judged[1].text) > 1
    return Snapshot(
        thumbs.kind,
        thumbs.made,  # filled by the parts below too
        clusters,
        plane(samples),
        geometry(judged[1]) if judged and captioned else {},
        confusions(judged[1]) if judged else (),
        retrieval(*judged, thumbs) if judged and captioned else (),
        _hits(after),
        {**environment(), **(facts or {})},
    )


def save_snapshot(folder: str | os.PathLike[str], snapshot: Snapshot) -> Path:
    """Write ``report.json`` into a run folder, whole or not at all."""
    path = Path(folder) / NAME
    content = {"format": FORMAT, **asdict(snapshot)}
    write_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def load_snapshot(folder: str | os.PathLike[str]) -> Snapshot | None:
    """The snapshot of a run folder; None where there is none that this version reads."""
    try:
        content = json.loads((Path(folder) / NAME).read_text(encoding="utf-8"))
        return Snapshot(**content) if content.pop("format") == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _hits(results: Results | None) -> dict[str, str]:
    packed = {}
    for key, one in results.sets.items() if results else ():
        for name, hits in one.hits.items():
            bits = np.packbits(hits.cpu().numpy().astype(bool))
            packed[f"{key}/{name}"] = f"{len(hits)}:{_base64(bits)}"
    return packed


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


# Prototypes


def gallery(samples: Samples, thumbs: Thumbnails) -> list[dict[str, Any]]:
    """One block per source of clusters, the teacher's first, with its nearest neighbours."""
    blocks = []
    for name in sorted(samples.clusters, key=lambda name: (name in SOURCES, name)):
        labels = samples.clusters[name].cpu()
        if not bool((labels >= 0).any()):
            continue
        counts = torch.bincount(labels[labels >= 0])
        used = counts[counts > 0]
        known = samples.dataset.labels
        kept = labels >= 0
        blocks.append(
            {
                "name": name,
                "of": SOURCES.get(name, "the external teacher's features"),
                "prototypes": len(used),
                "smallest": int(used.min()),
                "largest": int(used.max()),
                "purity": {key: purity(labels[kept], own.ids[kept]) for key, own in known.items()},
                "cards": _cards(samples, labels, spread_by_size(counts, CARDS), thumbs),
            }
        )
    return blocks


def _cards(
    samples: Samples, labels: Tensor, chosen: Sequence[int], thumbs: Thumbnails
) -> list[dict[str, Any]]:
    near_image = nearest_samples(samples.projected.image, labels, chosen, IMAGES)
    near_text = nearest_samples(samples.projected.text, labels, chosen, CAPTIONS)
    first = next(iter(samples.dataset.labels.values()), None)
    cards = []
    for row, prototype in enumerate(chosen):
        members = labels == prototype
        card: dict[str, Any] = {"prototype": prototype, "samples": int(members.sum())}
        if first is not None:
            kinds, times = torch.unique(first.ids[members], return_counts=True)
            best = int(times.argmax())
            card["class"] = first.names[int(kinds[best])]
            card["share"] = float(times[best] / times.sum())
        card["images"] = [
            thumbs.item(samples.dataset, i, hit=bool(members[i])) for i in near_image[row].tolist()
        ]
        card["captions"] = [
            {"caption": caption_of(samples.dataset, i), "hit": bool(members[i])}
            for i in near_text[row].tolist()
        ]
        cards.append(card)
    return cards


def spread_by_size(counts: Tensor, rows: int) -> list[int]:
    """Prototypes with members, evenly over the order from the largest to the smallest."""
    order = torch.argsort(counts, descending=True, stable=True)
    return every(order[counts[order] > 0], rows).tolist()


def every(values: Tensor, count: int) -> Tensor:
    """At most ``count`` of the values, evenly spaced."""
    return values[torch.linspace(0, len(values) - 1, min(count, len(values))).round().long()]


def nearest_samples(features: Tensor, labels: Tensor, chosen: Sequence[int], count: int) -> Tensor:
    """Rows of the samples nearest to the mean of each chosen prototype, int64 [R, <= count].

    A prototype is the mean of its members' unit features. Members come before all others.
    """
    unit = F.normalize(features.detach().float().cpu(), dim=1)
    renumbered = torch.full((int(labels.max()) + 1,), -1)
    renumbered[torch.tensor(chosen)] = torch.arange(len(chosen))
    own = torch.where(labels >= 0, renumbered[labels.clamp_min(0)], -1)
    kept = own >= 0
    means, _ = segment_mean(unit[kept], own[kept], len(chosen))
    scores = F.normalize(means, dim=1) @ unit.T  # [R, N]
    scores[own[kept], kept.nonzero().flatten()] += 3  # cosines differ by 2 at most
    return scores.topk(min(count, unit.shape[0]), dim=1).indices


# The map


def plane(samples: Samples) -> dict[str, Any]:
    """Places of images, then captions, in 16 bits, and the colourings of the samples."""
    n = len(samples.dataset)
    if n < 2:
        return {}
    both = principal(samples.encoded.image.cpu(), samples.encoded.text.cpu())
    places = (lay_out(both.flatten(0, 1)) * 65535).round()  # [2N, 2]
    colours = {
        name: {"ids": _ids(known.ids), "names": list(known.names)}
        for name, known in samples.dataset.labels.items()
    }
    for name, labels in samples.clusters.items():
        colours[f"prototype ({name})"] = {"ids": _ids(labels), "names": []}
    words = [caption_of(samples.dataset, i)[:60] for i in range(n)] if n <= 5000 else []
    return {"n": n, "xy": _base64(places.numpy().astype("<u2")), "by": colours, "words": words}


def _ids(ids: Tensor) -> str:
    return _base64(ids.cpu().numpy().clip(-1, 32767).astype("<i2"))


def principal(image: Tensor, text: Tensor, dim: int = 24) -> Tensor:
    """Common principal components of unit features, each modality centred: [2, N, <= dim].

    Centring takes out the modality gap, which would otherwise be all that a map shows.
    """
    parts = [F.normalize(x.float(), dim=1) for x in (image, text)]
    both = torch.stack([part - part.mean(0) for part in parts])  # [2, N, D]
    flat = both.flatten(0, 1)
    _, vectors = torch.linalg.eigh((flat.T @ flat).double())  # ascending
    return both @ vectors.flip(1)[:, :dim].float()


def lay_out(points: Tensor, seed: int = 0) -> Tensor:
    """Places in 0 ... 1 of [N, P] points whose first columns vary most, float32 [N, 2].

    t-SNE of k-means centroids costs a second however many points there are; a point lies between
    its nearest centroids.
    """
    count = min(LANDMARKS, max(1, len(points) // 3))
    fitted = points[:: max(1, len(points) // 20_000)]
    landmarks = kmeans(fitted, count, num_iters=8, seed=seed).centroids.float()  # [L, P]
    if len(landmarks) < 5:
        places = F.pad(points[:, :2].float(), (0, max(0, 2 - points.shape[1])))
    else:
        from sklearn.manifold import TSNE

        start = F.pad(landmarks[:, :2], (0, max(0, 2 - points.shape[1])))
        start = 1e-4 * start / start.std().clamp_min(1e-9)
        perplexity = min(12.0, (len(landmarks) - 1) / 3)
        tsne = TSNE(
            perplexity=perplexity,
            init=start.numpy(),
            method="exact",
            random_state=seed,
            max_iter=500,
        )
        fitted_places = torch.from_numpy(tsne.fit_transform(landmarks.numpy())).float()  # [L, 2]
        places = torch.cat(
            [_between(block, landmarks, fitted_places) for block in points.float().split(4096)]
        )
    low, high = places.amin(0), places.amax(0)
    return (places - low) / (high - low).clamp_min(1e-9)


def _between(points: Tensor, landmarks: Tensor, places: Tensor) -> Tensor:
    """Each point at the weighted mean of the places of its nearest landmarks."""
    squared, near = (
        torch.cdist(points, landmarks).square().topk(NEAREST, dim=1, largest=False)
    )  # [B, NEAREST]
    width = squared[:, -1:].clamp_min(1e-12)  # the farthest of them hardly counts
    return (torch.softmax(-3 * squared / width, dim=1)[:, :, None] * places[near]).sum(1)


# The evaluation set


def geometry(one: EvalSet) -> dict[str, Any]:
    """The modality gap and two histograms: cosines, and features along the gap."""
    image, text = F.normalize(one.image.cpu(), dim=1), F.normalize(one.text.cpu(), dim=1)
    matching = image[_owner(one)]
    others = text.roll(max(1, len(text) // 3), 0)
    gap = image.mean(0) - text.mean(0)
    direction = F.normalize(gap, dim=0)
    return {
        "gap": float(gap.norm()),
        "cosines": _histogram((matching * text).sum(1), (matching * others).sum(1)),
        "along": _histogram(image @ direction, text @ direction),
    }


def _owner(one: EvalSet) -> Tensor:
    return torch.arange(len(one.text)) if one.caption_image is None else one.caption_image.cpu()


def _histogram(first: Tensor, second: Tensor) -> dict[str, Any]:
    """Both over the same bins, each as shares of its own total."""
    parts = [values[values.isfinite()] for values in (first, second)]
    together = torch.cat(parts)
    if not len(together):
        return {}
    low, high = float(together.min()), float(together.max())
    high = high if high > low else low + 1
    shares = [torch.histc(part, BINS, low, high) / max(len(part), 1) for part in parts]
    edges = torch.linspace(low, high, BINS + 1)
    return {"edges": edges.tolist(), "shares": [share.tolist() for share in shares]}


def confusions(one: EvalSet) -> list[dict[str, Any]]:
    """Zero-shot: what each class was taken for, for every label with class vectors."""
    found = []
    for label, known in one.labels.items():
        if (vectors := one.class_vectors.get(label)) is None:
            continue
        count, ids = len(known.names), known.ids.cpu()
        vectors = F.normalize(vectors.cpu(), dim=1)
        guesses = torch.cat([(x @ vectors.T).argmax(1) for x in one.image.cpu().split(4096)])
        table = torch.bincount(ids * count + guesses, minlength=count**2).view(count, count)
        entry: dict[str, Any] = {"label": label, "classes": count}
        entry["right"] = float((ids == guesses).float().mean())
        if count <= CELLS:
            entry |= {"names": list(known.names), "table": table.tolist()}
        else:
            times, places = table.clone().fill_diagonal_(0).flatten().topk(WORST)
            entry["worst"] = [
                [known.names[place // count], known.names[place % count], n]
                for n, place in zip(times.tolist(), places.tolist(), strict=True)
                if n
            ]
        found.append(entry)
    return found


def retrieval(dataset: PairDataset, one: EvalSet, thumbs: Thumbnails) -> list[dict[str, Any]]:
    """Right and wrong answers in both directions, spread evenly over the evaluation set."""
    owner = _owner(one)
    image, text = F.normalize(one.image.cpu(), dim=1), F.normalize(one.text.cpu(), dim=1)

    def caption(j: int, asked: int) -> dict[str, Any]:
        """Text row ``j``; the k-th row of a picture is its k-th caption."""
        i = int(owner[j])
        return {"caption": caption_of(dataset, i, int((owner[:j] == i).sum())), "hit": i == asked}

    groups = []
    for to_text, queries, answers in ((True, image, text), (False, text, image)):
        asked = every(torch.arange(len(queries)), ASKED)
        best = (queries[asked] @ answers.T).topk(min(5, len(answers)), dim=1).indices  # [Q, 5]
        wanted = asked if to_text else owner[asked]
        found = owner[best] if to_text else best  # pictures
        right = found[:, 0] == wanted
        for correct, rows in ((True, right.nonzero()), (False, (~right).nonzero())):
            shown = []
            for row in every(rows.flatten(), SHOWN).tolist():
                query, own = int(asked[row]), int(wanted[row])
                hit = bool((found[row] == own).any())
                shown.append(
                    {
                        "query": thumbs.item(dataset, own) if to_text else caption(query, own),
                        "answers": [
                            caption(j, own) if to_text else thumbs.item(dataset, j, hit=j == own)
                            for j in best[row].tolist()
                        ],
                        "right": None if hit else thumbs.item(dataset, own),
                    }
                )
            groups.append(
                {
                    "to": "caption" if to_text else "image",
                    "correct": correct,
                    "share": len(rows) / len(asked),
                    "asked": len(asked),
                    "queries": shown,
                }
            )
    return groups


# The machine


def environment() -> dict[str, Any]:
    """Machine and versions, for those who want the same numbers."""
    import protoclip

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(x for x in lines if x.startswith("model name")).split(":", 1)[1].strip()
    return {
        "protoclip": getattr(protoclip, "__version__", ""),
        "commit": _commit(Path(protoclip.__file__).parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{cpu}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def _commit(root: Path) -> str:
    """Commit of a checkout; "" where there is none."""
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
