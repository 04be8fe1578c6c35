"""The data of a run's report page: ``report.json`` in the run folder.

Everything that the page shows of the data (thumbnails, captions, examples, the map) is computed
here at the end of training, so that ``protoclip.report`` never opens the data itself.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import platform
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from protoclip.common.files import in_percent, plural, printable, write_atomic
from protoclip.common.seeds import evenly_spaced
from protoclip.data import Labels, PairDataset, Subset
from protoclip.episodes.prototypes import purity
from protoclip.evaluate.metrics import right_answers
from protoclip.evaluate.tasks import EvalSet
from protoclip.model import Encoded
from protoclip.ops import segment_mean
from protoclip.report.layout import map_layout
from protoclip.settings.config import parse_json

NAME = "report.json"
FORMAT = 6
SIDE = 64  # pixels of a thumbnail
LARGE = 128  # pixels of a picture shown alone
CARDS = 20_000  # clusters per source
IMAGES = 8  # images nearest to a cluster's mean
ROW = 4  # pictures side by side on a card (page.css): more than a row are whole rows
CAPTIONS = 5  # captions nearest to it
PICTURES = 4000  # pictures on the cards of a source, which keeps the page small enough to mail
SHEET = 16  # clusters on the contact sheet
WORDS = 5  # per cluster
VOCABULARY = 20_000  # words in all captions
COMMON = 0.1  # of a cluster's captions have each of its words; rarer ones do not describe it
MOSTLY = 0.25  # of a cluster: rarer classes and words of file names do not describe it
WORD = re.compile(r"[^\W\d_]{2,}")
NAME_WORDS = 3  # of file names, per cluster
CAMERA = {  # words that cameras and programs put into the names of files
    "copy", "dsc", "dscf", "dscn", "edit", "edited", "final", "image", "images", "img", "mvimg",
    "photo", "photos", "pic", "picture", "pictures", "pxl", "untitled",
}  # fmt: skip
TINY = 24  # pixels across, at which near-duplicates are compared
VISIBLE = 24  # of 255: a smaller difference of two pixels is compression or scaling
ALIKE = 0.01  # of the values of two near-duplicates differ visibly, at most
ASKED = 400  # queries that are evaluated
AT_ONCE = 16  # of them, with all answers: there may be millions
SHOWN = 4  # queries of each kind that are shown
CELLS = 14  # classes of a full confusion table, at most
WORST = 12  # largest entries that stand in for a larger table
NAMES = 5  # nearest names of an image
# Lucide's icons of the page's first screen, chosen before any model saw them.
UNSEEN = (
    "anchor", "bug", "dog", "guitar", "hammer", "key", "moon", "rocket", "scissors", "umbrella",
)  # fmt: skip
SOURCES = {
    "image": "the image features",
    "text": "the caption features",
    "external": "the teacher's features",
}
SHOWN_AS = {"external": "teacher"}  # the name of a source on the page


@dataclass(frozen=True)
class Samples:
    """N samples that a page shows, with their features and clusters; a missing modality has no
    rows."""

    dataset: PairDataset  # of length N
    encoded: Encoded  # u, [N, D] each, for the map
    projected: Encoded  # h, [N, Dh] each, the space of the prototypes
    clusters: Mapping[str, Tensor]  # source -> int64 [N], negative: no prototype
    # Of all of the data, where the N samples are a part of it: source -> int64 [all], and classes.
    all_clusters: Mapping[str, Tensor] = field(default_factory=dict)
    all_labels: Mapping[str, Labels] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A page's content for JSON; ``pictures`` are WebP in base64, and items refer to their number.

    An item is ``{"picture": number, "caption": text, "hit": bool}``; captions have no picture.
    """

    pictures: Sequence[str] = ()
    clusters: Sequence[Mapping[str, Any]] = ()  # per source: numbers, a card per cluster
    map_data: Mapping[str, Any] = field(default_factory=dict)  # the map, arrays packed in base64
    geometry: Mapping[str, Any] = field(default_factory=dict)  # histograms: edges and shares
    confusions: Sequence[Mapping[str, Any]] = ()
    retrieval: Sequence[Mapping[str, Any]] = ()
    named: Mapping[str, Any] = field(default_factory=dict)  # images with their nearest class names
    facts: Mapping[str, Any] = field(default_factory=dict)  # environment, memory, ...


def take_snapshot(
    samples: Samples | None,
    evaluated: tuple[PairDataset, EvalSet] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Snapshot:
    """The content of a page about training samples (None: stored features, without pictures to
    show), an evaluation set with its features (``evaluated``), and ``facts`` that JSON can hold."""
    thumbs = Thumbnails()
    captioned = evaluated if evaluated and len(evaluated[1].text) > 1 else None
    return Snapshot(
        pictures=thumbs.made,  # the calls below fill it
        clusters=gallery(samples, thumbs) if samples else (),
        map_data=map_data(samples, thumbs) if samples else {},
        geometry=geometry(captioned[1]) if captioned else {},
        confusions=confusions(evaluated[1]) if evaluated else (),
        retrieval=retrieval(*captioned, thumbs) if captioned and samples else (),
        named=named(*evaluated, thumbs) if evaluated and samples else {},
        facts={**environment(), **(facts or {})},
    )


def save_snapshot(folder: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Write ``report.json`` to a run folder, completely or not at all."""
    content = {"format": FORMAT, **asdict(snapshot)}
    write_atomic(Path(folder) / NAME, json.dumps(content, ensure_ascii=False, allow_nan=False))


def load_snapshot(folder: str | os.PathLike[str]) -> Snapshot:
    """The snapshot of a run folder; an empty one if it is missing or of another format."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = parse_json((Path(folder) / NAME).read_text(encoding="utf-8"))
        if content.pop("format") == FORMAT:
            return Snapshot(**content)
    return Snapshot()


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")


def _unit(rows: Tensor) -> Tensor:
    """Unit rows on the CPU; a model that diverged gives zeros."""
    return F.normalize(rows.detach().float().cpu().nan_to_num(0, 0, 0), dim=1)


def every(values: Tensor, count: int) -> Tensor:
    """At most ``count`` of the values, evenly spaced."""
    return values[evenly_spaced(len(values), count)]


def _origin(dataset: PairDataset, i: int) -> tuple[PairDataset, int]:
    """The data set, and the place in it, that a subset takes its sample ``i`` from."""
    if isinstance(dataset, Subset):
        return _origin(dataset.dataset, int(dataset.indices[i]))
    return dataset, i


class Thumbnails:
    """Small square pictures, each read and encoded once."""

    def __init__(self, side: int = SIDE) -> None:
        self.side = side
        self.made: list[str] = []
        self.tiny: list[np.ndarray] = []  # the same in TINY x TINY pixels: uint8 [T, T, 3]
        self._numbers: dict[tuple[int, int, int], int] = {}  # data set, place, side -> number

    def item(
        self, dataset: PairDataset, i: int, hit: bool = False, side: int = 0
    ) -> dict[str, Any]:
        side = side or self.side
        source, place = _origin(dataset, i)
        key = (id(source), place, side)
        if key not in self._numbers:
            image = square(dataset.image(i).convert("RGB"), side)
            stream = io.BytesIO()
            image.save(stream, "webp", quality=78)
            self._numbers[key] = len(self.made)
            self.tiny.append(np.asarray(image.resize((TINY, TINY), Image.Resampling.BOX)))
            self.made.append(base64.b64encode(stream.getvalue()).decode("ascii"))
        return {"picture": self._numbers[key], "caption": caption_of(dataset, i), "hit": hit}

    def number(self, dataset: PairDataset, i: int) -> int:
        """The number of sample ``i``'s picture among those made so far; -1: it is not there."""
        source, place = _origin(dataset, i)
        return self._numbers.get((id(source), place, self.side), -1)


def square(image: Image.Image, side: int) -> Image.Image:
    """The middle of a picture, which is also what CLIP sees of it, at most ``side`` pixels wide."""
    side = min(side, *image.size)
    width, height = (math.ceil(x * side / min(image.size)) for x in image.size)
    image.thumbnail((width, height), Image.Resampling.LANCZOS)
    return ImageOps.fit(image, (side, side))


def caption_of(dataset: PairDataset, i: int, k: int = 0) -> str:
    """Caption ``k`` of sample ``i``, at most 90 characters."""
    caption = " ".join(dataset.captions(i)[k].split())
    whole_words = textwrap.shorten(caption, 90, placeholder="…")
    # Chinese and web addresses have no blanks to cut at.
    return whole_words if len(caption) <= 90 or len(whole_words) > 45 else f"{caption[:89]}…"


def gallery(samples: Samples, thumbs: Thumbnails) -> list[dict[str, Any]]:
    """The clusters of each source, the teacher's first, with the samples nearest to their means."""
    blocks = []
    rows = {"images": samples.projected.image, "captions": samples.projected.text}
    for name in sorted(samples.clusters, key=lambda name: (name != "external", name)):
        labels = samples.clusters[name].cpu()
        if bool((labels >= 0).any()):
            near = {shown: nearness(features, labels) for shown, features in rows.items()}
            block = cluster_block(
                samples.dataset,
                labels,
                near,
                thumbs,
                all_clusters=samples.all_clusters.get(name, labels),
                all_labels=samples.all_labels or samples.dataset.labels,
            )
            blocks.append({"name": name, "of": SOURCES[name], **block})
    return blocks


def nearness(features: Tensor, labels: Tensor) -> Tensor:
    """Cosine of each sample with the mean of its cluster's unit rows: [N]."""
    unit = _unit(features)
    means, _ = segment_mean(unit, labels, int(labels.max()) + 1)
    return (F.normalize(means, dim=1)[labels.clamp_min(0)] * unit).sum(1)


def cluster_block(
    dataset: PairDataset,
    labels: Tensor,
    near: Mapping[str, Tensor],
    thumbs: Thumbnails,
    *,
    all_clusters: Tensor,
    all_labels: Mapping[str, Labels],
    images: int = IMAGES,
) -> dict[str, Any]:
    """Numbers of a clustering, and a card for each cluster, from the largest to the smallest.

    Args:
        dataset: N samples, from which the page's pictures and words are chosen.
        labels: int64 [N], negative: in no cluster.
        near: what to show ("images", "captions", "names") -> [N], larger is nearer.
        thumbs: collects the pictures.
        all_clusters: as ``labels``, of all of the data, which the numbers are of.
        all_labels: classifications of all of the data.
        images: pictures of a cluster, at most.
    """
    clustered = all_clusters >= 0
    clusters = all_clusters[clustered]
    sizes = torch.bincount(clusters)
    counts = torch.bincount(labels[labels >= 0], minlength=len(sizes))  # those that can be shown
    order = sizes.argsort(descending=True, stable=True)[: int((sizes > 0).sum())]
    before = len(labels) - int(counts.sum())  # rows without a cluster are sorted to the front
    first = before + counts.cumsum(0) - counts
    ranked = {shown: np.lexsort((-x.numpy(), labels.numpy())) for shown, x in near.items()}
    if "captions" in near:
        words = words_of_clusters(lambda i: dataset.captions(i)[0], labels)
    else:
        words = words_of_clusters(
            lambda i: words_of_path(dataset.keys[i]),
            labels,
            most=NAME_WORDS,
            common=MOSTLY,
        )
    images = min(images, max(1, PICTURES // len(order)))
    if ROW < images < len(labels):  # else all of a group's are shown
        images -= images % ROW
    most = {"images": images, "captions": CAPTIONS, "names": CAPTIONS}
    show: dict[str, Callable[[int], Any]] = {
        "images": partial(thumbs.item, dataset),
        "captions": partial(caption_of, dataset),
        "names": lambda i: printable(dataset.keys[i]),
    }
    classes = next(iter(all_labels.values()), None)
    classes_of: Sequence[Tensor] = ()
    if classes is not None:
        by_cluster = classes.ids[clustered][clusters.argsort(stable=True)]
        classes_of = by_cluster.split(sizes.tolist())
    cards = []
    for number, cluster in enumerate(order[:CARDS].tolist()):
        if (number + 1) * images > PICTURES:
            most["images"] = 0
        members = slice(int(first[cluster]), int(first[cluster] + counts[cluster]))
        card: dict[str, Any] = {"cluster": cluster, "samples": int(sizes[cluster])}
        card["words"] = words.get(cluster, "")
        if classes is not None:
            ids = classes_of[cluster]
            times = torch.bincount(ids[ids >= 0], minlength=1)
            if (share := int(times.max()) / len(ids)) >= MOSTLY:
                card["class"] = f"{in_percent(share)} are {classes.names[int(times.argmax())]}"
        for shown, rows in ranked.items():
            card[shown] = [show[shown](i) for i in rows[members][: most[shown]].tolist()]
        if not card["words"] and counts[cluster]:
            rows = ranked.get("captions", next(iter(ranked.values())))
            nearest = int(rows[members][0])
            # A file without its folders, or "row 1,234".
            name = printable(os.path.basename(dataset.keys[nearest]))
            if "captions" in near:
                name = caption_of(dataset, nearest) or name
            card["like"] = f"like {name}"
        cards.append(card)
    purity_by_label: dict[str, float] = {}
    for name, labels_of_name in all_labels.items():
        ids = labels_of_name.ids[clustered]
        known = ids >= 0
        if bool(known.any()):
            purity_by_label[name] = purity(clusters[known], ids[known])
    return {
        "clusters": len(order),
        "smallest": int(sizes[order[-1]]),
        "largest": int(sizes[order[0]]),
        "purity": purity_by_label,
        "cards": cards,
    }


def contact_sheet(snapshot: Snapshot) -> np.ndarray | None:
    """The largest clusters of the first source, one row each: uint8 [H, W, 3]; None: none."""
    rows = [card["images"] for block in snapshot.clusters[:1] for card in block["cards"][:SHEET]]
    if not rows:
        return None
    sheet = Image.new("RGB", (IMAGES * SIDE, len(rows) * SIDE), "white")
    for row, items in enumerate(rows):
        for column, item in enumerate(items):
            webp = io.BytesIO(base64.b64decode(snapshot.pictures[item["picture"]]))
            sheet.paste(Image.open(webp), (column * SIDE, row * SIDE))
    return np.asarray(sheet)


def near_duplicates(pictures: Sequence[np.ndarray]) -> dict[int, int]:
    """Tiny pictures that look like an earlier one: place -> the earliest such place.

    They are compared as they are shown, small, so that another size or compression, or a light
    edit, hides no copy; another crop does.
    """
    duplicates: dict[int, int] = {}
    values = np.array(pictures, dtype=np.int16).reshape(len(pictures), TINY * TINY * 3)
    for i in range(1, len(values)):
        differ = (np.abs(values[:i] - values[i]) > VISIBLE).mean(1)
        if (alike := np.flatnonzero(differ <= ALIKE)).size:
            duplicates[i] = int(alike[0])
    return duplicates


def words_of_path(path: str) -> str:
    """The words in the names of a file and its folders: "trips/BeachDay_012.jpg" has 3."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", os.path.splitext(path)[0])
    words = re.findall(r"[^\W\d_]{2,}", apart)
    return " ".join(word for word in words if word.lower() not in CAMERA)


def words_of_clusters(
    text_of: Callable[[int], str], labels: Tensor, *, most: int = WORDS, common: float = COMMON
) -> dict[int, str]:
    """The words that set each cluster apart, by tf-idf over the clusters: in many of its texts and
    in few other clusters.

    A cluster has a word if the share of its texts with the word is at least half the share in any
    other. A word that most clusters have is in no name. Clusters of the same words get one more
    that tells them apart. A cluster without words that set it apart has no entry.

    Args:
        text_of: the text of sample i.
        labels: int64 [N], negative: in no cluster.
        most: words of a cluster.
        common: share of a cluster's texts that have each of its words; there are two such texts,
            unless the cluster has but one.
    """
    clustered = (labels >= 0).nonzero().flatten().numpy()
    words_of_texts = (WORD.findall(text_of(i)) for i in clustered.tolist())
    first = next(words_of_texts, [])
    if all(words_of_text == first for words_of_text in words_of_texts):
        return {}  # such as numbered rows: scikit-learn's import takes a second
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(
        stop_words="english",
        token_pattern=WORD.pattern,
        max_features=VOCABULARY,
        binary=True,
    )
    try:
        times = counter.fit_transform(map(text_of, clustered.tolist()))
    except ValueError:  # no words that count
        return {}
    count = len(clustered)
    member = csr_matrix((np.ones(count), (labels.numpy()[clustered], np.arange(count))))
    sizes = np.asarray(member.sum(axis=1)).ravel()
    texts = (member @ times).tocsr()  # [K, words]: texts of the cluster with the word
    texts.sort_indices()
    shares = texts.copy()
    shares.data = texts.data / np.repeat(sizes, np.diff(texts.indptr))
    largest_shares = shares.max(axis=0).toarray().ravel()
    has_word = shares.data >= 0.5 * largest_shares[shares.indices]
    clusters_with = np.bincount(shares.indices[has_word], minlength=shares.shape[1])
    num_clusters = int((sizes > 0).sum())
    names = counter.get_feature_names_out()
    words: dict[int, str] = {}
    clusters_of: dict[str, list[int]] = {}  # by the words that they have in common
    for cluster in np.flatnonzero(np.diff(shares.indptr)).tolist():
        row = slice(shares.indptr[cluster], shares.indptr[cluster + 1])
        word_ids = shares.indices[row]
        is_common = texts.data[row] >= max(min(2, sizes[cluster]), common * sizes[cluster])
        is_apart = has_word[row] & (clusters_with[word_ids] <= num_clusters / 2)
        chosen = is_common & is_apart
        idf = np.log(num_clusters / clusters_with[word_ids[chosen]])
        score = shares.data[row][chosen] * idf
        best = word_ids[chosen][np.argsort(-score, kind="stable")[:most]]
        if len(best):
            words[cluster] = ", ".join(names[best])
            clusters_of.setdefault(words[cluster], []).append(cluster)
    for same, clusters in clusters_of.items():
        if len(clusters) > 1:
            among_them = labels.where(torch.isin(labels, torch.tensor(clusters)), -1)
            further = words_of_clusters(text_of, among_them, most=1, common=common)
            words |= {cluster: f"{same}, {word}" for cluster, word in further.items()}
    return words


def map_data(
    samples: Samples, thumbs: Thumbnails | None = None, *, reads: bool = True
) -> dict[str, Any]:
    """The map: positions of images, then captions, in 16 bits, and the classes that colour them;
    with ``thumbs`` also their pictures, and unless it ``reads`` them, those made already."""
    n = len(samples.dataset)
    # Without centring, a map would show little but the modality gap.
    parts = [_unit(rows) for rows in (samples.encoded.image, samples.encoded.text) if len(rows)]
    if sum(map(len, parts)) < 15:
        return {}
    places = map_layout(torch.cat([part - part.mean(0) for part in parts]))  # [N or 2N, 2]
    colours = {
        name: _colours(classes.ids, classes.names)
        for name, classes in samples.dataset.labels.items()
    }
    colours |= {
        f"cluster ({SHOWN_AS.get(name, name)})": _colours(ids)
        for name, ids in samples.clusters.items()
    }
    words = [caption_of(samples.dataset, i)[:60] for i in range(n)]
    pictures: list[int] = []
    if thumbs and reads:
        pictures = [thumbs.item(samples.dataset, i)["picture"] for i in range(n)]
    elif thumbs:
        pictures = [thumbs.number(samples.dataset, i) for i in range(n)]
    xy = _base64((places * 65535).round().numpy().astype("<u2"))
    return {"n": n, "xy": xy, "by": colours, "words": words, "pictures": pictures}


def _colours(ids: Tensor, names: Sequence[str] = ()) -> dict[str, Any]:
    """What the dots of the map are coloured by."""
    return {"ids": _base64(ids.cpu().numpy().astype("<i4")), "names": list(names)}


def geometry(eval_set: EvalSet) -> dict[str, Any]:
    """The modality gap and two histograms: cosines, and features along the gap."""
    image = _unit(eval_set.image)
    text = _unit(eval_set.text)
    matching = image[eval_set.owner.cpu()]
    other_captions = text.roll(max(1, len(text) // 3), 0)
    gap = image.mean(0) - text.mean(0)
    direction = F.normalize(gap, dim=0)
    return {
        "gap": float(gap.norm()),
        "cosines": _histogram((matching * text).sum(1), (matching * other_captions).sum(1)),
        "along": _histogram(image @ direction, text @ direction),
    }


def _histogram(*parts: Tensor) -> dict[str, Any]:
    """Histograms over the same bins, each as shares of its own total."""
    # In fp64: nearly equal values have no 48 bins between them in fp32.
    values = [part.double().numpy() for part in parts]
    edges = np.histogram_bin_edges(np.concatenate(values), 48)
    shares = [(np.histogram(part, edges)[0] / len(part)).tolist() for part in values]
    return {"edges": edges.tolist(), "shares": shares}


def confusions(eval_set: EvalSet) -> list[dict[str, Any]]:
    """Zero-shot confusions of the classes, for every label with class vectors."""
    entries = []
    for label, vectors in eval_set.class_vectors.items():
        rows, classes = eval_set.among(label)
        ids = classes.ids.cpu()
        names = list(classes.names)
        count = len(names)
        images = _unit(eval_set.image[rows])
        guesses = torch.cat([(x @ _unit(vectors).T).argmax(1) for x in images.split(4096)])
        places = ids * count + guesses  # of a table, for which there may be too many classes
        entry = {"label": label, "right": float((ids == guesses).float().mean()), "names": names}
        if count <= CELLS:
            table = torch.bincount(places, minlength=count**2).view(count, count)
            entry["table"] = table.tolist()
        else:
            wrong, times = places[ids != guesses].unique(return_counts=True)
            order = times.argsort(descending=True, stable=True)[:WORST]
            pairs = zip(wrong[order].tolist(), times[order].tolist(), strict=True)
            entry["worst"] = [(*divmod(place, count), n) for place, n in pairs]
        entries.append(entry)
    return entries


def named(dataset: PairDataset, eval_set: EvalSet, thumbs: Thumbnails) -> dict[str, Any]:
    """Ten images of an evaluation set, each with the nearest names of its first label's classes;
    {} without at least as many classes. Built-in icons have a fixed list, other data every n-th."""
    for label, vectors in eval_set.class_vectors.items():
        if len(vectors) < NAMES:
            continue
        rows, classes = eval_set.among(label)
        ids = dict(zip(rows.tolist(), classes.ids.tolist(), strict=True))
        unseen = {f"lucide/{name}" for name in UNSEEN}
        chosen = [i for i, key in enumerate(dataset.keys) if key in unseen and i in ids]
        if not chosen:
            chosen = every(rows, len(UNSEEN)).tolist()
        scores = _unit(eval_set.image[chosen]) @ _unit(vectors).T
        shown = []
        for i, best in zip(chosen, scores.topk(NAMES, dim=1).indices.tolist(), strict=True):
            answers = [{"caption": classes.names[k], "hit": k == ids[i]} for k in best]
            query = thumbs.item(dataset, i, side=LARGE)
            shown.append({"query": query, "answers": answers, "own": classes.names[ids[i]]})
        return {"label": label, "classes": len(vectors), "shown": shown}
    return {}


def retrieval(dataset: PairDataset, eval_set: EvalSet, thumbs: Thumbnails) -> list[dict[str, Any]]:
    """Right and wrong answers in both directions, spread evenly over the evaluation set."""
    texts = eval_set.caption_ids
    texts = torch.arange(len(eval_set.text)) if texts is None else texts.cpu()
    to_captions = _captions_of_images(dataset, eval_set, texts, thumbs)
    return to_captions + _images_of_captions(dataset, eval_set, texts, thumbs)


def _captions_of_images(
    dataset: PairDataset, eval_set: EvalSet, texts: Tensor, thumbs: Thumbnails
) -> list[dict[str, Any]]:
    """Images as queries; of captions with the same text the first one answers."""
    owner = eval_set.owner.cpu()
    asked = every(torch.arange(len(eval_set.image)), ASKED)
    first_of_text = np.unique(texts.numpy(), return_index=True)[1]
    captions = torch.from_numpy(np.sort(first_of_text))
    is_right = partial(right_answers, owner, texts, columns=texts)
    best, hits = _nearest(eval_set.image[asked], eval_set.text, captions, asked, is_right)

    def example(row: int) -> dict[str, Any]:
        query = thumbs.item(dataset, int(asked[row]), True)
        ranking = zip(best[row].tolist(), hits[row].tolist(), strict=True)
        answers = [_caption(dataset, owner, j, hit) for j, hit in ranking]
        return {"query": query, "answers": answers, "right": None if hits[row].any() else query}

    return [_examples("caption", correct, hits, example) for correct in (True, False)]


def _images_of_captions(
    dataset: PairDataset, eval_set: EvalSet, texts: Tensor, thumbs: Thumbnails
) -> list[dict[str, Any]]:
    """Captions as queries."""
    owner = eval_set.owner.cpu()
    asked = every(torch.arange(len(eval_set.text)), ASKED)
    images = torch.arange(len(eval_set.image))
    is_right = partial(right_answers, texts, owner, columns=images)
    best, hits = _nearest(eval_set.text[asked], eval_set.image, images, texts[asked], is_right)

    def example(row: int) -> dict[str, Any]:
        query = _caption(dataset, owner, int(asked[row]), True)
        ranking = zip(best[row].tolist(), hits[row].tolist(), strict=True)
        answers = [thumbs.item(dataset, j, hit) for j, hit in ranking]
        missed = not hits[row].any()
        right = thumbs.item(dataset, int(owner[asked[row]]), True) if missed else None
        return {"query": query, "answers": answers, "right": right}

    return [_examples("image", correct, hits, example) for correct in (True, False)]


def _nearest(
    queries: Tensor,
    answers: Tensor,
    candidates: Tensor,
    numbers: Tensor,
    is_right: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """The five nearest of the answers in the rows ``candidates``, and which of them are right to
    queries of these ``numbers``: rows of answers and bool, [Q, 5]."""
    among = _unit(answers)[candidates]
    best, hits = [], []
    for rows, ids in zip(_unit(queries).split(AT_ONCE), numbers.split(AT_ONCE), strict=True):
        places = (rows @ among.T).topk(min(5, len(candidates)), dim=1).indices
        best.append(candidates[places])
        hits.append(is_right(rows=ids).gather(1, best[-1]))
    return torch.cat(best), torch.cat(hits)


def _caption(dataset: PairDataset, owner: Tensor, row: int, hit: bool) -> dict[str, Any]:
    """The k-th text row of a picture is its k-th caption."""
    i = int(owner[row])
    k = int((owner[:row] == i).sum())
    return {"caption": caption_of(dataset, i, k), "hit": hit}


def _examples(
    to: str, correct: bool, hits: Tensor, example: Callable[[int], dict[str, Any]]
) -> dict[str, Any]:
    """Some queries whose nearest answer is right, or wrong."""
    rows = (hits[:, 0] == correct).nonzero().flatten()
    return {
        "to": to,
        "correct": correct,
        "share": len(rows) / len(hits),
        "asked": len(hits),
        "queries": [example(row) for row in every(rows, SHOWN).tolist()],
    }


def environment() -> dict[str, Any]:
    """Machine and versions, to reproduce the numbers."""
    import protoclip

    cpu = platform.machine()
    with contextlib.suppress(OSError):
        named_model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = named_model[1] if named_model else cpu
    return {
        "protoclip": protoclip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{cpu}, {plural(torch.get_num_threads(), 'thread')}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
