"""From a model and data to numbers: encode pictures, captions and prompts, then score them."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.waits import Wait
from protoclip.data import Batch, Draws, Faults, Labels, PairDataset, batches
from protoclip.data.feature_pairs import ClassRows, FeaturePairs, feature_pairs, origin
from protoclip.data.images import hog
from protoclip.data.types import heldout_mask, labels_of
from protoclip.distributed import gather_objects, is_main, own_slice
from protoclip.evaluate import metrics
from protoclip.evaluate.datasets import Layout, class_prompts
from protoclip.evaluate.results import Results, SetResults
from protoclip.model import ProtoModel
from protoclip.runs import checkpoint
from protoclip.settings.commands import TASKS

PROBES = frozenset(("linear_probe", "knn"))
PROBE_TASKS = {"lp_": "linear_probe", "knn_": "knn", "nn_": "knn"}  # by their metrics' prefix
HELDOUT_PERCENT = 20  # test share for probes on a data set without a train split
# A fitted probe: features [N, D] and labels [N] -> its scores, and its settings.
Probe = Callable[[Tensor, Tensor], tuple[dict[str, Tensor], dict[str, float]]]


@dataclass(frozen=True)
class EvalSet:
    """Features of one evaluation set; rows need not be normalised."""

    image: Tensor  # [N, D]
    text: Tensor  # [M, D], row j of image owner[j]; M = 0: no retrieval
    owner: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    labels: Mapping[str, Labels] = field(default_factory=dict)
    # Label -> [C, D], and which classes they are, int64 [C]; without ``choices`` they are all.
    class_vectors: Mapping[str, Tensor] = field(default_factory=dict)
    choices: Mapping[str, Tensor] = field(default_factory=dict)
    skip: frozenset[tuple[str, str]] = frozenset()  # (label, task) to leave out
    title: str = ""
    probe_rows: Tensor | None = None  # int64, the test images of probes; None: all
    caption_ids: Tensor | None = None  # int64 [M], the same for equal captions; None: all differ
    fingerprint: str = ""  # of its keys and captions

    def among(self, label: str) -> tuple[Tensor, Labels]:
        """The images that have one of the zero-shot classes, int64 [n], and their classes among
        the rows of ``class_vectors``."""
        labels = self.labels[label]
        if label not in self.choices:
            rows = torch.nonzero(labels.ids >= 0)[:, 0]
            return rows, Labels(labels.ids[rows], labels.names)
        choices = self.choices[label].to(labels.ids.device)
        rows = torch.nonzero(torch.isin(labels.ids, choices))[:, 0]
        names = tuple(labels.names[i] for i in choices.tolist())
        return rows, Labels(torch.searchsorted(choices, labels.ids[rows]), names)


class Captions(NamedTuple):
    """The encoded captions of an evaluation set."""

    rows: Tensor | None  # u, [M, D]; None: there are none
    owner: Tensor  # picture of each, int64 [M]
    ids: Tensor | None  # int64 [M], from 0, the same for equal captions; None: not known


@dataclass(frozen=True)
class Encoder:
    """Encodes pictures and captions for evaluation, in eval mode and without augmentation. Each
    rank encodes a slice, and every rank gets all rows."""

    model: ProtoModel
    device: torch.device
    batch_size: int = 256
    workers: int = 0
    autocast: Callable[[], AbstractContextManager] = nullcontext
    wait: Wait = field(default_factory=partial(Wait, "encoding", unit="rows"))  # counts them

    @torch.no_grad()
    def images(self, dataset: PairDataset) -> Tensor:
        """u of every picture, float32 [N, D] on the device; a picture that cannot be read raises a
        DataError."""

        def encode(rows: slice) -> Tensor:
            pictures = self.batches(dataset, torch.arange(len(dataset))[rows])
            return self._rows(self.model.clip.encode_image, (batch.image for batch in pictures))

        return self._shared(len(dataset), "pictures", encode)

    def batches(
        self, dataset: PairDataset, positions: Tensor, faults: Faults | None = None
    ) -> Iterator[Batch]:
        """The samples at some positions. ``faults`` notes those that cannot be read, in whose
        place another comes."""
        return batches(
            dataset,
            Draws(positions, seed=0),
            self.batch_size,
            eval_transform(self.model),
            self.model.short_tokenizer,
            workers=self.workers,
            captions="first",
            faults=faults,
        )

    @torch.no_grad()
    def captions(self, dataset: PairDataset, most: int | None) -> Captions:
        """u of the first ``most`` captions of every picture, or of all of them."""
        if feature_pairs(dataset) is not None:
            return self._stored_captions(dataset, most)
        captions = [dataset.captions(i)[:most] for i in range(len(dataset))]
        texts = [text for of_image in captions for text in of_image]
        owner = [i for i, of_image in enumerate(captions) for _ in of_image]
        return Captions(
            rows=self.texts(texts) if texts else None,
            owner=torch.tensor(owner, dtype=torch.int64, device=self.device),
            ids=labels_of(texts).ids.to(self.device),
        )

    def _stored_captions(self, dataset: PairDataset, most: int | None) -> Captions:
        pairs, positions = origin(dataset, np.arange(len(dataset)))
        assert isinstance(pairs, FeaturePairs)
        count = pairs.num_captions(positions)
        if most is not None:
            count = count.clip(max=most)
        owner = np.repeat(np.arange(len(positions)), count)
        captions = np.arange(len(owner)) - np.repeat(count.cumsum() - count, count)
        asked = positions[owner]

        def encode(rows: slice) -> Tensor:
            starts = range(rows.start, rows.stop, self.batch_size)
            parts = (slice(i, min(i + self.batch_size, rows.stop)) for i in starts)
            stored = (pairs.text_rows(asked[part], captions[part]) for part in parts)
            return self._rows(self.model.encode_text, stored)

        ids = pairs.caption_ids(asked, captions)
        if ids is not None:
            ids = ids.unique(return_inverse=True)[1].to(self.device)
        return Captions(
            rows=self._shared(len(owner), "texts", encode) if len(owner) else None,
            owner=torch.from_numpy(owner).to(self.device),
            ids=ids,
        )

    @torch.no_grad()
    def class_rows(self, classes: ClassRows, names: Sequence[str]) -> Tensor:
        """Class vectors, unit rows [C, D], from stored rows of class names."""
        vectors = []
        with self._evaluating():
            for name in names:
                stored = torch.from_numpy(classes.rows.take(classes.names[name]))
                rows = self._encode(self.model.encode_text, stored)
                vectors.append(metrics.class_vectors(rows[None]))
        return torch.cat(vectors)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """u of every text, float32 [M, D] on the device; equal texts are encoded once."""
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = list(position)
        tokenizer = self.model.short_tokenizer
        assert tokenizer is not None

        def encode(rows: slice) -> Tensor:
            starts = range(rows.start, rows.stop, self.batch_size)
            parts = (unique[i : min(i + self.batch_size, rows.stop)] for i in starts)
            return self._rows(self.model.encode_text, map(tokenizer, parts))

        encoded = self._shared(len(unique), "texts", encode)
        return encoded[torch.tensor([position[text] for text in texts], device=encoded.device)]

    def _shared(self, count: int, what: str, encode: Callable[[slice], Tensor]) -> Tensor:
        """Encode ``count`` rows, each rank a slice, and return all of them. The wait counts
        them from the start, next to what they are."""
        self.wait.restart(count, what)
        share = own_slice(count)
        rows = encode(share) if share.start < share.stop else torch.empty(0)
        parts = [part for part in gather_objects(rows.cpu()) if len(part)]
        self.wait.update(count - (share.stop - share.start))
        return torch.cat(parts).to(self.device)

    def _rows(self, encode: Callable[[Tensor], Tensor], parts: Iterable[Tensor]) -> Tensor:
        with self._evaluating():
            return torch.cat([self._encode(encode, part) for part in parts])

    def _encode(self, encode: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        with self.autocast():
            rows = encode(part.to(self.device, non_blocking=True)).float()
        self.wait.update(len(part))
        return rows

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The model in eval mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


@dataclass(frozen=True)
class FixedEncoder(Encoder):
    """Uses no model: a picture's features are computed from its pixels; all texts are equal."""

    features: Callable[[Image.Image], np.ndarray] = np.asarray

    def images(self, dataset: PairDataset) -> Tensor:
        rows = [self.features(dataset.image(i)) for i in range(len(dataset))]
        return torch.from_numpy(np.stack(rows)).flatten(1).float().to(self.device)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.zeros(len(texts), 1, device=self.device)


def pixels(image: Image.Image) -> np.ndarray:
    """A picture's 12 x 12 pixels, float32 [12, 12, 3] in -0.5 ... 0.5."""
    return np.asarray(image.resize((12, 12)), dtype=np.float32) / 255 - 0.5


FEATURES: Mapping[str, Callable[[Image.Image], np.ndarray]] = {"pixels": pixels, "HOG": hog}


def floors(encoder: Encoder, layout: Layout) -> dict[str, Results]:
    """What needs no training: k-NN and clusters of fixed features, guesses ("chance"), and always
    saying the most frequent class ("frequent")."""
    fixed_features: dict[str, Results] = {}
    for name, features in FEATURES.items():
        fixed = FixedEncoder(encoder.model, encoder.device, features=features)
        sets, train = encode_sets(fixed, layout, ("knn", "grouping"))
        scores = evaluate_features(sets, train, tasks=("knn", "grouping"))
        fixed_features[name] = {
            key: dataclasses.replace(results, intervals={}) for key, results in scores.items()
        }
    return guesses(sets, train) | fixed_features


def guesses(sets: Mapping[str, EvalSet], train: EvalSet | None) -> dict[str, Results]:
    """The scores of guesses ("chance"), and of always saying the most frequent class ("frequent"),
    if the data has classes."""
    chance: dict[str, SetResults] = {}
    frequent: dict[str, SetResults] = {}
    for key, eval_set in sets.items():
        share, most = _guesses(eval_set, train)
        blind = SetResults(eval_set.title, len(eval_set.image), len(eval_set.text), share)
        chance[key] = blind
        frequent[key] = dataclasses.replace(blind, metrics=most)
    has_classes = any(results.metrics for results in frequent.values())
    return {"chance": chance, "frequent": frequent} if has_classes else {"chance": chance}


def _guesses(eval_set: EvalSet, train: EvalSet | None) -> tuple[dict[str, float], dict[str, float]]:
    """The accuracies of guessing any class, and of always saying the most frequent one."""
    share: dict[str, float] = {}
    most: dict[str, float] = {}
    for label, labels in eval_set.labels.items():
        rows, classes = eval_set.among(label)
        if not len(rows):
            continue
        largest = float(classes.ids.bincount().max()) / len(rows)
        present = len(eval_set.choices.get(label, labels.names))
        share[f"{label}/acc1"] = 1 / present
        most[f"{label}/acc1"] = largest
        if train is None or (label, "knn") in eval_set.skip:
            continue
        counts = train.labels[label].ids
        counts = counts[counts >= 0].bincount(minlength=len(labels.names))
        tested = labels.ids if eval_set.probe_rows is None else labels.ids[eval_set.probe_rows]
        usual = float((tested[tested >= 0] == counts.argmax()).float().mean())
        for name in ("lp_acc1", "knn_acc1", "nn_acc1"):
            share[f"{label}/{name}"] = 1 / int((counts > 0).sum())
            most[f"{label}/{name}"] = usual
    if len(eval_set.text):
        # Every order of the answers is as likely where all features are equal.
        blind = metrics.retrieval(
            torch.ones_like(eval_set.image[:, :1]),
            torch.ones_like(eval_set.text[:, :1]),
            eval_set.owner,
            eval_set.caption_ids,
        )
        share |= {name: float(hits.mean()) for name, hits in metrics.recalls(blind).items()}
    return share, most


def eval_transform(model: ProtoModel) -> Callable[[Any], Tensor] | None:
    """OpenCLIP's transform for the model without augmentation: resize, centre crop, normalise;
    None: the model takes rows of features."""
    if not model.image_size:
        return None
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(model.image_size, **model.preprocess()), is_train=False)


def encode_sets(
    encoder: Encoder, layout: Layout, tasks: Collection[str] = TASKS
) -> tuple[dict[str, EvalSet], EvalSet | None]:
    """Encode, on all ranks, the evaluation sets of a layout by name, and the probes' training set.

    builtin:icons has NEW and HO (see ``open_layout``), other built-in data HO (its held-out part),
    files ALL. Probes train on the train split, or on 80 % of the set if there is none.
    """
    prompts = "zeroshot" in tasks
    of_parts = bool(layout.parts)
    sets = {
        key: encode_set(encoder, of_set, prompts=prompts, only_present=of_parts)
        for key, of_set in layout.sets.items()
    }
    eval_set = next(iter(sets.values()))
    if not eval_set.labels or PROBES.isdisjoint(tasks):
        return sets, None
    if layout.train is not None:
        image = encoder.images(layout.train)
        return sets, EvalSet(image, image[:0], labels=layout.train.labels)
    # A fifth of each class tests the probes; they train on the rest.
    classes = next(iter(eval_set.labels.values())).ids.cpu().numpy()
    mask = torch.from_numpy(heldout_mask(len(classes), classes, seed=0, percent=HELDOUT_PERCENT))
    test_rows = mask.nonzero()[:, 0].to(eval_set.image.device)
    train_rows = (~mask).nonzero()[:, 0].to(eval_set.image.device)
    tested = dataclasses.replace(eval_set, probe_rows=test_rows)
    return {layout.key: tested}, take(eval_set, train_rows)


def encode_set(
    encoder: Encoder, layout: Layout, *, prompts: bool = True, only_present: bool = False
) -> EvalSet:
    """Features of the test pictures, of their captions and, with ``prompts``, of their classes;
    with ``only_present`` zero-shot chooses only among classes that the set has."""
    dataset = layout.test
    image = encoder.images(dataset)
    captions = encoder.captions(dataset, layout.captions)
    labels = {
        label: Labels(classes.ids.to(encoder.device), classes.names)
        for label, classes in dataset.labels.items()
        if bool((classes.ids >= 0).any())
    }
    choices: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    class_rows = layout.class_rows
    for label, classes in labels.items():
        if not layout.names_classes(label):
            continue
        names = classes.names
        if only_present:
            choices[label] = classes.ids[classes.ids >= 0].unique()
        elif class_rows is not None:
            known = [i for i, name in enumerate(names) if name in class_rows.names]
            choices[label] = torch.tensor(known, device=encoder.device)
        if label in choices:
            names = tuple(classes.names[i] for i in choices[label].tolist())
        if prompts and class_rows is not None:
            vectors[label] = encoder.class_rows(class_rows, names)
        elif prompts and names:
            prompts_by_class = class_prompts(label, names, layout.templates)
            vectors[label] = class_features(encoder, prompts_by_class)
    return EvalSet(
        image=image,
        text=image[:0] if captions.rows is None else captions.rows,
        owner=captions.owner,
        caption_ids=captions.ids,
        labels=labels,
        class_vectors=vectors,
        choices=choices,
        skip=layout.skip,
        title=layout.title or dataset.name,
        # Not by a collective call: rank 0 alone encodes for ``floors``, and alone has results.
        fingerprint=fingerprint(dataset, layout.captions) if is_main() else "",
    )


def fingerprint(dataset: PairDataset, most: int | None) -> str:
    """A digest of an evaluation set: the same for the same stored rows, or for the same pictures
    with the same captions, of which the first ``most`` count."""
    if feature_pairs(dataset) is not None:
        return checkpoint.fingerprint(dataset).rpartition(":")[0]
    digest = hashlib.sha256()
    for i, key in enumerate(dataset.keys):
        words = "\0".join([key, *dataset.captions(i)[:most], ""])
        digest.update(words.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def is_same_set(before: SetResults | None, samples: int, fingerprint: str) -> bool:
    """Whether earlier results are of a set with this fingerprint; where theirs is missing, or from
    before version 0.2, of one with as many pictures."""
    if before is None or before.samples != samples:
        return False
    is_known = before.fingerprint and not checkpoint.is_of_before(before.fingerprint)
    return not is_known or before.fingerprint == fingerprint


def class_features(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Class vectors, unit rows [C, D], from the prompts of each class."""
    rows = encoder.texts([prompt for of_class in prompts for prompt in of_class])
    return metrics.class_vectors(rows.unflatten(0, (len(prompts), -1)))


def take(eval_set: EvalSet, rows: Sequence[int] | Tensor) -> EvalSet:
    """The set restricted to some of its images, with their captions."""
    images = torch.as_tensor(rows, dtype=torch.int64, device=eval_set.image.device)
    place = torch.full((len(eval_set.image),), -1, device=eval_set.image.device)
    place[images] = torch.arange(len(images), device=eval_set.image.device)
    captions = torch.nonzero(place[eval_set.owner] >= 0)[:, 0]
    return dataclasses.replace(
        eval_set,
        image=eval_set.image[images],
        text=eval_set.text[captions],
        owner=place[eval_set.owner[captions]],
        caption_ids=None if eval_set.caption_ids is None else eval_set.caption_ids[captions],
        labels={
            label: Labels(classes.ids[images], classes.names)
            for label, classes in eval_set.labels.items()
        },
    )


def impossible(tasks: Collection[str], layout: Layout) -> dict[str, str]:
    """The tasks that the data does not allow, each with the reason."""
    reasons = {"retrieval": "the data has no captions"} if layout.captions == 0 else {}
    if not layout.test.labels:
        needs_classes = ("zeroshot", "linear_probe", "knn", "grouping")
        reasons |= dict.fromkeys(needs_classes, "the data has no classes")
    elif not any(map(layout.names_classes, layout.test.labels)):
        reasons["zeroshot"] = "there are no rows of the names of classes (--class-features)"
    return {task: reasons[task] for task in tasks if task in reasons}


def evaluate_features(
    sets: Mapping[str, EvalSet],
    probe_train: EvalSet | None = None,
    *,
    tasks: Collection[str] = TASKS,
    protocol: str = "heldout",
) -> Results:
    """The metrics of all sets; {} on ranks other than 0, which only help to encode.

    Args:
        probe_train: training set of linear probe and nearest neighbours; None: no probes.
        tasks: some of ``TASKS``; tasks that a set does not allow are left out.
        protocol: the linear probe's: "heldout" (L-BFGS, lambda chosen on a held-out part of the
            training samples) or "paper" (the authors': SGD, best test epoch).
    """
    if not is_main():
        return {}
    learned: dict[str, dict[str, Probe]] = {}
    if probe_train is not None:
        for label, classes in probe_train.labels.items():
            wanted = [
                task
                for task in tasks
                if any((label, task) not in eval_set.skip for eval_set in sets.values())
            ]
            rows = torch.nonzero(classes.ids >= 0)[:, 0]
            image = probe_train.image[rows.to(probe_train.image.device)]
            labelled = Labels(classes.ids[rows], classes.names)
            learned[label] = _learn(image, labelled, wanted, protocol)
    return {key: _score(eval_set, learned, tasks) for key, eval_set in sets.items()}


def _learn(
    image: Tensor, labels: Labels, tasks: Collection[str], protocol: str
) -> dict[str, Probe]:
    """The probes of one label, fitted to the training images, by metric prefix."""
    count = len(labels.names)
    probes: dict[str, Probe] = {}

    def paper(rows: Tensor, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        scores, epoch = metrics.paper_linear_probe((image, labels.ids), (rows, ids), count)
        return scores, {"weight_decay": 1e-6, "epochs": 100.0, "best_epoch": float(epoch)}

    if "linear_probe" in tasks and protocol == "paper":
        probes["lp_"] = paper
    elif "linear_probe" in tasks and len(labels.ids) >= 2:
        logits, penalty = metrics.fit_linear_probe(image, labels.ids, count)
        settings = {"weight_decay": penalty, "epochs": float(metrics.PROBE_ITERATIONS)}
        probes["lp_"] = lambda rows, ids: (metrics.classify(rows, ids, count, logits), settings)
    if "knn" in tasks:
        probes["knn_"] = _neighbours(image, labels, metrics.NEIGHBOURS)
        probes["nn_"] = _neighbours(image, labels, 1)
    return probes


def _neighbours(image: Tensor, labels: Labels, k: int) -> Probe:
    count = len(labels.names)
    votes = metrics.fit_knn(image, labels.ids, count, k=k)
    return lambda rows, ids: (metrics.classify(rows, ids, count, votes), {})


def _score(
    eval_set: EvalSet, learned: Mapping[str, Mapping[str, Probe]], tasks: Collection[str]
) -> SetResults:
    """The metrics of one set, with their intervals."""
    values: dict[str, float] = {}
    sampled: dict[str, Tensor] = {}  # values whose means are metrics
    if len(eval_set.text) and "retrieval" in tasks:
        places = metrics.retrieval(
            eval_set.image, eval_set.text, eval_set.owner, eval_set.caption_ids
        )
        sampled |= metrics.recalls(places)
        values["text_retrieval_median_rank"] = float(places[0].rank.quantile(0.5))
    for label, classes in eval_set.labels.items():
        scores_of_label: dict[str, Tensor] = {}
        if "zeroshot" in tasks and label in eval_set.class_vectors:
            rows, chosen = eval_set.among(label)
            score = partial(metrics.zero_shot_logits, vectors=eval_set.class_vectors[label])
            scores_of_label = metrics.classify(
                eval_set.image[rows], chosen.ids, len(chosen.names), score
            )
        everything = torch.arange(len(classes.ids), device=classes.ids.device)
        rows = everything if eval_set.probe_rows is None else eval_set.probe_rows
        rows = rows[classes.ids[rows] >= 0]
        for prefix, probe in learned.get(label, {}).items():
            if (label, PROBE_TASKS[prefix]) in eval_set.skip or not len(rows):
                continue
            scores, settings = probe(eval_set.image[rows], classes.ids[rows])
            scores_of_label |= {prefix + name: score for name, score in scores.items()}
            values |= {f"{label}/{prefix}{name}": value for name, value in settings.items()}
        sampled |= {f"{label}/{name}": score for name, score in scores_of_label.items()}
        grouped = everything[classes.ids >= 0]
        # One class, or a class for each picture, is found by any clusters.
        tells = 1 < len(classes.ids[grouped].unique()) < len(grouped)
        if "grouping" in tasks and tells and (label, "grouping") not in eval_set.skip:
            groups = metrics.group_scores(eval_set.image[grouped], classes.ids[grouped])
            values |= {f"{label}/{name}": value for name, value in groups.items()}
    if "geometry" in tasks:
        if len(eval_set.text):
            values["modality_gap"] = metrics.modality_gap(eval_set.image, eval_set.text)
            values["alignment"] = metrics.alignment(eval_set.image[eval_set.owner], eval_set.text)
            values["text_uniformity"] = metrics.uniformity(eval_set.text)
        values["image_uniformity"] = metrics.uniformity(eval_set.image)
    means = {name: float(score.double().mean()) for name, score in sampled.items()}
    caption_ids = eval_set.caption_ids
    unweighted = {
        name: score for name, score in sampled.items() if not name.endswith(metrics.MEAN_PER_CLASS)
    }
    for name in unweighted:
        if name.startswith("image_retrieval"):
            unweighted[name] = by_picture(unweighted[name], eval_set.owner)
    return SetResults(
        title=eval_set.title,
        samples=len(eval_set.image),
        captions=len(eval_set.text),
        metrics=means | values,
        intervals=metrics.bootstrap_intervals(unweighted),
        different_captions=None if caption_ids is None else len(caption_ids.unique()),
        fingerprint=eval_set.fingerprint,
    )


def by_picture(scores: Tensor, owner: Tensor) -> Tensor:
    """A value for each picture with captions, [P], of scores of captions [T]: the same mean.

    Captions of one picture are alike, so an interval has to draw pictures. For as many captions
    each it is their mean; else what a picture adds to the mean, to first order.
    """
    _, picture, counts = owner.unique(return_inverse=True, return_counts=True)
    scores = scores.double()
    mean = scores.mean()
    sums = torch.zeros_like(counts, dtype=scores.dtype).index_add_(0, picture, scores)
    return mean + (sums - mean * counts) * (len(counts) / len(scores))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: on the card for a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
