"""From a model and data to numbers: encode pictures, captions and prompts, then score them."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from protoclip.commands import TASKS
from protoclip.data import Draws, Labels, PairDataset, batches
from protoclip.data.images import hog
from protoclip.data.types import heldout_mask
from protoclip.distributed import gather_objects, is_main, own_slice
from protoclip.evaluate import metrics
from protoclip.evaluate.datasets import Layout, class_prompts
from protoclip.evaluate.results import Results, SetResults
from protoclip.model import ProtoModel

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

    def among(self, label: str) -> tuple[Tensor, Labels]:
        """The images that have one of the zero-shot classes, int64 [n], and their classes among
        the rows of ``class_vectors``."""
        known = self.labels[label]
        if label not in self.choices:
            rows = torch.nonzero(known.ids >= 0)[:, 0]
            return rows, Labels(known.ids[rows], known.names)
        choices = self.choices[label].to(known.ids.device)
        rows = torch.nonzero(torch.isin(known.ids, choices))[:, 0]
        names = tuple(known.names[i] for i in choices.tolist())
        return rows, Labels(torch.searchsorted(choices, known.ids[rows]), names)


@dataclass(frozen=True)
class Encoder:
    """Encodes pictures and captions for evaluation, in eval mode and without augmentation. Each
    rank encodes a slice, and every rank gets all rows."""

    model: ProtoModel
    device: torch.device
    batch_size: int = 256
    workers: int = 0
    autocast: Callable[[], AbstractContextManager] = nullcontext
    bar: tqdm = field(default_factory=partial(tqdm, disable=True))  # counts the rows

    @torch.no_grad()
    def images(self, dataset: PairDataset) -> Tensor:
        """u of every picture, float32 [N, D] on the device."""

        def encode(rows: slice) -> Tensor:
            stream = batches(
                dataset,
                Draws(torch.arange(rows.start, rows.stop), seed=0),
                self.batch_size,
                eval_transform(self.model),
                self.model.short_tokenizer,
                workers=self.workers,
                captions="first",
            )
            return self._rows(self.model.clip.encode_image, (batch.image for batch in stream))

        return self._shared(len(dataset), encode)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """u of every text, float32 [M, D] on the device; equal texts are encoded once."""
        position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        unique = list(position)

        def encode(rows: slice) -> Tensor:
            starts = range(rows.start, rows.stop, self.batch_size)
            parts = (unique[i : min(i + self.batch_size, rows.stop)] for i in starts)
            return self._rows(self.model.encode_text, map(self.model.short_tokenizer, parts))

        encoded = self._shared(len(unique), encode)
        return encoded[torch.tensor([position[text] for text in texts], device=encoded.device)]

    def _shared(self, count: int, encode: Callable[[slice], Tensor]) -> Tensor:
        """Encode ``count`` rows, each rank a slice, and return all of them."""
        self.bar.total = (self.bar.total or 0) + count
        own = own_slice(count)
        rows = encode(own) if own.start < own.stop else torch.empty(0)
        parts = [part for part in gather_objects(rows.cpu()) if len(part)]
        self.bar.update(count - (own.stop - own.start))
        return torch.cat(parts).to(self.device)

    def _rows(self, encode: Callable[[Tensor], Tensor], parts: Iterable[Tensor]) -> Tensor:
        rows, was_training = [], self.model.training
        self.model.eval()
        try:
            for part in parts:
                with self.autocast():
                    rows.append(encode(part.to(self.device, non_blocking=True)).float())
                self.bar.update(len(part))
        finally:
            self.model.train(was_training)
        return torch.cat(rows)


@dataclass(frozen=True)
class FixedEncoder(Encoder):
    """Uses no model: a picture's features are computed from its pixels; all texts are equal."""

    features: Callable[[Image.Image], np.ndarray] = np.asarray

    def images(self, dataset: PairDataset) -> Tensor:
        rows = [self.features(dataset.image(i)) for i in range(len(dataset))]
        return torch.from_numpy(np.stack(rows)).flatten(1).float().to(self.device)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.zeros(len(texts), 1, device=self.device)


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture's 12 x 12 pixels, float32 [12, 12, 3] in -0.5 ... 0.5."""
    return np.asarray(picture.resize((12, 12)), dtype=np.float32) / 255 - 0.5


FEATURES: Mapping[str, Callable[[Image.Image], np.ndarray]] = {"pixels": pixels, "HOG": hog}


def floors(encoder: Encoder, layout: Layout) -> dict[str, Results]:
    """What needs no training: k-NN and clusters of fixed features, guesses ("chance"), and always
    saying the most frequent class ("frequent")."""
    found: dict[str, Results] = {}
    for name, features in FEATURES.items():
        fixed = FixedEncoder(encoder.model, encoder.device, features=features)
        sets, train = encode_sets(fixed, layout, ("knn", "grouping"))
        scores = evaluate_features(sets, train, tasks=("knn", "grouping"))
        found[name] = {key: dataclasses.replace(one, intervals={}) for key, one in scores.items()}
    return guesses(sets, train) | found


def guesses(sets: Mapping[str, EvalSet], train: EvalSet | None) -> dict[str, Results]:
    """The scores of guesses ("chance"), and of always saying the most frequent class ("frequent"),
    if the data has classes."""
    chance: dict[str, SetResults] = {}
    frequent: dict[str, SetResults] = {}
    for key, one in sets.items():
        share, most = _guesses(one, train)
        blind = SetResults(one.title, len(one.image), len(one.text), share)
        chance[key] = blind
        frequent[key] = dataclasses.replace(blind, metrics=most)
    known = any(one.metrics for one in frequent.values())
    return {"chance": chance, "frequent": frequent} if known else {"chance": chance}


def _guesses(one: EvalSet, train: EvalSet | None) -> tuple[dict[str, float], dict[str, float]]:
    """The accuracies of guessing any class, and of always saying the most frequent one."""
    share: dict[str, float] = {}
    most: dict[str, float] = {}
    for label, known in one.labels.items():
        rows, judged = one.among(label)
        if not len(rows):
            continue
        largest = float(judged.ids.bincount().max()) / len(rows)
        present = len(one.choices.get(label, known.names))
        share[f"{label}/acc1"], most[f"{label}/acc1"] = 1 / present, largest
        if train is None or (label, "knn") in one.skip:
            continue
        counts = train.labels[label].ids
        counts = counts[counts >= 0].bincount(minlength=len(known.names))
        usual = float((known.ids[known.ids >= 0] == counts.argmax()).float().mean())
        for name in ("lp_acc1", "knn_acc1", "nn_acc1"):
            share[f"{label}/{name}"] = 1 / int((counts > 0).sum())
            most[f"{label}/{name}"] = usual
    images, texts = max(1, len(one.image)), max(1, len(one.text))
    if len(one.text):
        for k in (1, 5, 10):
            share[f"text_retrieval_recall@{k}"] = min(1.0, k / texts)
            share[f"image_retrieval_recall@{k}"] = min(1.0, k / images)
    return share, most


def eval_transform(model: ProtoModel) -> Callable[[Any], Tensor]:
    """OpenCLIP's transform for the model without augmentation: resize, centre crop, normalise."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(model.image_size, **model.preprocess()), is_train=False)


def encode_sets(
    encoder: Encoder, layout: Layout, tasks: Collection[str] = TASKS
) -> tuple[dict[str, EvalSet], EvalSet | None]:
    """Encode, on all ranks, the evaluation sets of a layout by name, and the probes' training set.

    builtin:icons has NEW and HO (see ``open_layout``), other built-in data HO (its held-out part),
    files ALL. Probes train on the train split, or on 80 % of the set if there is none.
    """
    prompts, probed = "zeroshot" in tasks, bool(PROBES & set(tasks))
    if layout.parts:
        sets = {
            key: dataclasses.replace(
                encode_set(
                    encoder,
                    dataclasses.replace(
                        layout, test=part.test, title=part.title, captions=part.captions
                    ),
                    prompts=prompts,
                    only_present=True,
                ),
                skip=part.skip,
            )
            for key, part in layout.parts.items()
        }
        return sets, _probe_train(encoder, layout.train) if probed and layout.train else None
    one = encode_set(encoder, layout, prompts=prompts)
    if not one.labels or not probed:
        return {layout.key: one}, None
    if layout.train is not None:
        return {layout.key: one}, _probe_train(encoder, layout.train)
    # A fifth of each class tests the probes; they train on the rest.
    first = next(iter(one.labels.values())).ids.cpu().numpy()
    mask = torch.from_numpy(heldout_mask(len(first), first, seed=0, percent=HELDOUT_PERCENT))
    judged, rest = (part.nonzero()[:, 0].to(one.image.device) for part in (mask, ~mask))
    return {layout.key: dataclasses.replace(one, probe_rows=judged)}, take(one, rest)


def _probe_train(encoder: Encoder, train: PairDataset) -> EvalSet:
    image = encoder.images(train)
    return EvalSet(image, image[:0], labels=train.labels)


def encode_set(
    encoder: Encoder, layout: Layout, *, prompts: bool = True, only_present: bool = False
) -> EvalSet:
    """Features of the test pictures, of their captions and, with ``prompts``, of their classes;
    with ``only_present`` zero-shot chooses only among classes that the set has."""
    dataset = layout.test
    image = encoder.images(dataset)
    captions = [dataset.captions(i)[: layout.captions] for i in range(len(dataset))]
    texts = [text for own in captions for text in own]
    owner = [i for i, own in enumerate(captions) for _ in own]
    labels = {
        name: Labels(known.ids.to(encoder.device), known.names)
        for name, known in dataset.labels.items()
    }
    choices: dict[str, Tensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, known in labels.items():
        names = known.names
        if only_present:
            choices[name] = known.ids[known.ids >= 0].unique()
            names = tuple(known.names[i] for i in choices[name].tolist())
        if prompts and names:
            words = class_prompts(name, names, layout.templates)
            vectors[name] = class_features(encoder, words)
    return EvalSet(
        image,
        encoder.texts(texts) if texts else image[:0],
        torch.tensor(owner, dtype=torch.int64, device=encoder.device),
        labels,
        vectors,
        choices,
        title=layout.title or dataset.name,
    )


def class_features(encoder: Encoder, prompts: Sequence[Sequence[str]]) -> Tensor:
    """Class vectors, unit rows [C, D], from the prompts of each class."""
    rows = encoder.texts([prompt for own in prompts for prompt in own])
    return metrics.class_vectors(rows.unflatten(0, (len(prompts), -1)))


def take(one: EvalSet, rows: Sequence[int] | Tensor, title: str = "") -> EvalSet:
    """The set restricted to some of its images, with their captions."""
    images = torch.as_tensor(rows, dtype=torch.int64, device=one.image.device)
    place = torch.full((len(one.image),), -1, device=one.image.device)
    place[images] = torch.arange(len(images), device=one.image.device)
    kept = torch.nonzero(place[one.owner] >= 0)[:, 0]
    return dataclasses.replace(
        one,
        image=one.image[images],
        text=one.text[kept],
        owner=place[one.owner[kept]],
        labels={name: Labels(known.ids[images], known.names) for name, known in one.labels.items()},
        title=title or one.title,
    )


def impossible(tasks: Collection[str], layout: Layout) -> dict[str, str]:
    """The tasks that the data does not allow, each with the reason."""
    reasons = {"retrieval": "the data has no captions"} if layout.captions == 0 else {}
    if not layout.test.labels:
        needs_classes = ("zeroshot", "linear_probe", "knn", "grouping")
        reasons |= dict.fromkeys(needs_classes, "the data has no classes")
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
        for label, known in probe_train.labels.items():
            wanted = [t for t in tasks if any((label, t) not in one.skip for one in sets.values())]
            rows = torch.nonzero(known.ids >= 0)[:, 0]
            own = Labels(known.ids[rows], known.names)
            image = probe_train.image[rows.to(probe_train.image.device)]
            learned[label] = _learn(image, own, wanted, protocol)
    return {key: _score(one, learned, tasks) for key, one in sets.items()}


def _learn(image: Tensor, known: Labels, tasks: Collection[str], protocol: str) -> dict[str, Probe]:
    """The probes of one label, fitted to the training images, by metric prefix."""
    count = len(known.names)
    out: dict[str, Probe] = {}

    def paper(rows: Tensor, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        got, epoch = metrics.paper_linear_probe((image, known.ids), (rows, ids), count)
        return got, {"weight_decay": 1e-6, "epochs": 100.0, "best_epoch": float(epoch)}

    if "linear_probe" in tasks and protocol == "paper":
        out["lp_"] = paper
    elif "linear_probe" in tasks and len(known.ids) >= 2:
        logits, penalty = metrics.fit_linear_probe(image, known.ids, count)
        settings = {"weight_decay": penalty, "epochs": float(metrics.PROBE_ITERATIONS)}
        out["lp_"] = lambda rows, ids: (metrics.classify(rows, ids, count, logits), settings)
    if "knn" in tasks:
        out["knn_"] = _neighbours(image, known, metrics.NEIGHBOURS)
        out["nn_"] = _neighbours(image, known, 1)
    return out


def _neighbours(image: Tensor, known: Labels, k: int) -> Probe:
    count = len(known.names)
    votes = metrics.fit_knn(image, known.ids, count, k=k)
    return lambda rows, ids: (metrics.classify(rows, ids, count, votes), {})


def _score(
    one: EvalSet, learned: Mapping[str, Mapping[str, Probe]], tasks: Collection[str]
) -> SetResults:
    """The metrics of one set, with their intervals."""
    values: dict[str, float] = {}
    sampled: dict[str, Tensor] = {}  # values whose means are metrics

    if len(one.text) and "retrieval" in tasks:
        ranks = metrics.retrieval(one.image, one.text, one.owner)
        sampled |= metrics.recalls(ranks)
        values["text_retrieval_median_rank"] = float(ranks[0].double().quantile(0.5))
    for label, known in one.labels.items():
        found: dict[str, Tensor] = {}
        if "zeroshot" in tasks and label in one.class_vectors:
            rows, judged = one.among(label)
            score = partial(metrics.zero_shot_logits, vectors=one.class_vectors[label])
            found = metrics.classify(one.image[rows], judged.ids, len(judged.names), score)
        everything = torch.arange(len(known.ids), device=known.ids.device)
        rows = everything if one.probe_rows is None else one.probe_rows
        rows = rows[known.ids[rows] >= 0]
        for prefix, probe in learned.get(label, {}).items():
            if (label, PROBE_TASKS[prefix]) in one.skip or not len(rows):
                continue
            scores, settings = probe(one.image[rows], known.ids[rows])
            found |= {prefix + name: score for name, score in scores.items()}
            values |= {f"{label}/{prefix}{name}": value for name, value in settings.items()}
        sampled |= {f"{label}/{name}": score for name, score in found.items()}
        grouped = everything[known.ids >= 0]
        if "grouping" in tasks and len(grouped) > 1 and (label, "grouping") not in one.skip:
            groups = metrics.group_scores(one.image[grouped], known.ids[grouped])
            values |= {f"{label}/{name}": value for name, value in groups.items()}
    if "geometry" in tasks:
        if len(one.text):
            values["modality_gap"] = metrics.modality_gap(one.image, one.text)
            values["alignment"] = metrics.alignment(one.image[one.owner], one.text)
            values["text_uniformity"] = metrics.uniformity(one.text)
        values["image_uniformity"] = metrics.uniformity(one.image)
    means = {name: float(score.double().mean()) for name, score in sampled.items()}
    shown = {name: x for name, x in sampled.items() if not name.endswith(metrics.MEAN_PER_CLASS)}
    intervals = metrics.bootstrap_intervals(shown)
    return SetResults(one.title, len(one.image), len(one.text), means | values, intervals)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: on the card for a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
