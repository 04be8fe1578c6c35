"""From features to numbers: zero-shot, retrieval, probes, grouping, geometry."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protoclip import metrics
from protoclip.distributed import is_distributed, is_main
from protoclip.evaluate.encode import encode_sets
from protoclip.evaluate.results import Results, SetResults
from protoclip.evaluate.sets import Autocast, Encoder, EvalSet, ProbeTrain
from protoclip.evaluate.tasks import TASKS
from protoclip.kmeans import kmeans
from protoclip.metrics import Accuracy
from protoclip.model import ProtoModel

RECALL_AT = (1, 5, 10)
Heads = Mapping[str, metrics.LinearProbe]


def evaluate_features(
    sets: Mapping[str, EvalSet],
    probe_train: ProbeTrain | None = None,
    *,
    tasks: Collection[str] = TASKS,
    protocol: str = "heldout",
    recall_at: Sequence[int] = RECALL_AT,
) -> Results:
    """The metrics of all sets.

    Args:
        sets: by short name.
        probe_train: None: no linear probe and no nearest neighbours.
        tasks: some of ``TASKS``; what a set does not allow is left out.
        protocol: of the linear probe: "heldout" (L-BFGS, lambda chosen on a held-out part of the
            training samples) or "paper" (the authors': SGD, best test epoch).
        recall_at: the K of the recalls.
    Returns:
        ``Results``; ``.metrics`` is set -> metric -> value.
    """
    started = time.perf_counter()
    heads: dict[str, metrics.LinearProbe] = {}
    if probe_train is not None and "linear_probe" in tasks and protocol == "heldout":
        heads = {
            label: metrics.fit_linear_probe(probe_train.image, known.ids, len(known.names))
            for label, known in probe_train.labels.items()
            if len(known.ids) >= 2 and any(one.probes for one in sets.values())
        }
    done = {}
    for key, one in sets.items():
        values: dict[str, float] = {}
        hits: dict[str, Tensor] = {}
        sampled: dict[str, metrics.Sampled] = {}
        if one.captioned and "retrieval" in tasks:
            _retrieval(one, recall_at, values, hits)
        if "geometry" in tasks:
            _geometry(one, values)
        for label, known in one.labels.items():
            scores = _classifiers(one, label, probe_train, heads.get(label), tasks, protocol)
            for prefix, (got, extra) in scores.items():
                values |= {f"{label}/{prefix}{name}": value for name, value in extra.items()}
                values[f"{label}/{prefix}acc1"] = got.acc1
                values[f"{label}/{prefix}acc5"] = got.acc5
                values[f"{label}/{prefix}mean_per_class_recall"] = got.mean_per_class_recall
                hits[f"{label}/{prefix}acc1"] = got.hits.cpu()
                sampled |= _sampled(f"{label}/{prefix}", one, known.ids, got)
            if "grouping" in tasks and len(known.ids) > 1:
                cluster = partial(kmeans, init="k-means++")
                for name, value in metrics.group_scores(one.image, known.ids, cluster).items():
                    values[f"{label}/{name}"] = value
        _multilabel(one, tasks, values)
        sampled |= {name: metrics.Sampled(rows) for name, rows in hits.items()}
        found = metrics.bootstrap_intervals(sampled)
        bounds = {name: (x.low, x.high) for name, x in found.items()}
        done[key] = SetResults(
            one.title or key, len(one.image), len(one.text), values, bounds, hits
        )
    return Results(done, time.perf_counter() - started)


def _retrieval(
    one: EvalSet, recall_at: Sequence[int], values: dict[str, float], hits: dict[str, Tensor]
) -> None:
    """Recalls and ranks, and the hits behind the recalls."""
    ranks = metrics.retrieval(one.image, one.text, one.caption_image)
    values |= ranks.summary(tuple(recall_at))
    for k in recall_at:
        to_text, to_image = ranks.hits(k)
        hits[f"text_retrieval_recall@{k}"] = to_text.cpu()
        hits[f"image_retrieval_recall@{k}"] = to_image.cpu()


def _geometry(one: EvalSet, values: dict[str, float]) -> None:
    """How the modalities lie; without captions the images alone."""
    if one.captioned:
        matching = one.image if one.caption_image is None else one.image[one.caption_image]
        values["modality_gap"] = metrics.modality_gap(one.image, one.text)
        values["alignment"] = metrics.alignment(matching, one.text)
        values["text_uniformity"] = metrics.uniformity(one.text)
    values["image_uniformity"] = metrics.uniformity(one.image)


def _classifiers(
    one: EvalSet,
    label: str,
    train: ProbeTrain | None,
    head: metrics.LinearProbe | None,
    tasks: Collection[str],
    protocol: str,
) -> dict[str, tuple[Accuracy, dict[str, float]]]:
    """Scores and settings of each classifier there is for the label, by metric prefix."""
    ids, count = one.labels[label].ids, len(one.labels[label].names)
    out: dict[str, tuple[Accuracy, dict[str, float]]] = {}
    if "zeroshot" in tasks and label in one.class_vectors:
        vectors = one.class_vectors[label]
        score = partial(metrics.zero_shot_logits, vectors=vectors)
        out[""] = metrics.classify(one.image, ids, count, score), {}
    if not one.probes or train is None or label not in train.labels:
        return out
    image, known = one.image, train.labels[label]
    if one.probe_rows is not None:
        image, ids = image[one.probe_rows], ids[one.probe_rows]
    if head is not None:
        settings = {"weight_decay": head.penalty, "epochs": float(metrics.PROBE_ITERATIONS)}
        out["lp_"] = metrics.classify(image, ids, count, head.logits), settings
    elif "linear_probe" in tasks and protocol == "paper":
        got, epoch = metrics.paper_linear_probe(train.image, known.ids, image, ids, count)
        out["lp_"] = got, {"weight_decay": 1e-6, "epochs": 100.0, "best_epoch": float(epoch)}
    if "knn" in tasks:
        near = partial(metrics.knn_logits, train.image, known.ids, num_classes=count)
        out["knn_"] = metrics.classify(image, ids, count, lambda rows: near(queries=rows)), {}
    return out


def _sampled(prefix: str, one: EvalSet, ids: Tensor, got: Accuracy) -> dict[str, metrics.Sampled]:
    """What the intervals of top-5 and of the mean per class recall are made from."""
    if len(got.hits) != len(ids):  # the probes, judged on a part
        assert one.probe_rows is not None
        ids = ids[one.probe_rows]
    out = {f"{prefix}mean_per_class_recall": metrics.Sampled(got.hits, ids)}
    if len(got.hits5):
        out[f"{prefix}acc5"] = metrics.Sampled(got.hits5)
    return out


def _multilabel(one: EvalSet, tasks: Collection[str], values: dict[str, float]) -> None:
    if one.targets is None or "zeroshot" not in tasks:
        return
    for label, vectors in one.class_vectors.items():
        score = partial(metrics.zero_shot_logits, vectors=vectors)
        value = metrics.mean_average_precision(one.image, one.targets, score)
        values[f"{label}/mean_average_precision"] = value


def evaluate_model(
    model: ProtoModel,
    data: str = "builtin:emoji",
    *,
    split: str = "auto",
    seed: int = 0,
    captions: str = "first",
    tasks: Collection[str] = TASKS,
    protocol: str = "heldout",
    device: torch.device | None = None,
    batch_size: int = 256,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
    open_kwargs: Mapping[str, Any] | None = None,
    keep: dict[str, EvalSet] | None = None,
) -> Results:
    """Encode the evaluation sets of ``data`` and score them; several ranks encode together, and
    rank 0 scores.

    builtin:emoji has HO (held-out concepts), TW (all, in Twemoji style) and, with the font, NHO
    and NOTO (the held-out ones and all in Noto style). Other built-in data has HO (its held-out
    part), files have ALL. Probes learn from the train split.

    Args:
        model: stays as it is, where it is.
        data: built-in data or what ``protoclip.evaluate.layouts.open_layout`` takes.
        split: which part to judge; "auto": the held-out one, for files "test" or "val" if there.
        seed: of the split into train and held out, the one of the training run.
        captions: "first" (one per image, the canonical one) or "all".
        tasks, protocol: as in ``evaluate_features``.
        device: where the model is; None: look.
        batch_size, workers: of encoding.
        autocast: makes the context of each forward pass.
        progress: told the number of rows (images or texts) after each batch.
        open_kwargs: further arguments of ``open_dataset``, such as the CSV columns.
        keep: takes the encoded sets, by name.
    """
    started = time.perf_counter()
    place = device or next(model.parameters()).device
    encoder = Encoder(
        model, place, batch_size, workers, autocast, progress, sharded=is_distributed()
    )
    sets, train = encode_sets(
        encoder,
        data,
        split=split,
        seed=seed,
        captions=captions,
        tasks=tasks,
        open_kwargs=open_kwargs,
    )
    if keep is not None:
        keep.update(sets)
    if not is_main():
        return Results({}, time.perf_counter() - started)
    results = evaluate_features(sets, train, tasks=tasks, protocol=protocol)
    return replace(results, seconds=time.perf_counter() - started)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory in use so far: of the card on a GPU, of the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
