"""From features to numbers: retrieval, zero-shot, probes, grouping, geometry."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from protoclip import metrics
from protoclip.distributed import is_main
from protoclip.evaluate.results import (
    Results,
    SetResults,
    interval,
)
from protoclip.evaluate.sets import Autocast, Encoder, EvalSet, ProbeTrain, encode_sets
from protoclip.kmeans import kmeans
from protoclip.model import ProtoModel

RECALL_AT = (1, 5, 10)


def evaluate_features(
    sets: Mapping[str, EvalSet],
    probe_train: ProbeTrain | None = None,
    *,
    recall_at: Sequence[int] = RECALL_AT,
    grouping: bool = True,
) -> Results:
    """All metrics of all sets.

    Args:
        sets: by short name.
        probe_train: None: no linear probe and no nearest neighbours.
        recall_at: the K of the recalls.
        grouping: whether to cluster the image features and compare with the labels.
    Returns:
        ``Results``; ``.metrics`` is set -> metric -> value.
    """
    started = time.perf_counter()
    heads: dict[str, metrics.LinearProbe] = {}
    if probe_train is not None and any(one.probes for one in sets.values()):
        heads = {
            label: metrics.fit_linear_probe(probe_train.image, known.ids, len(known.names))
            for label, known in probe_train.labels.items()
            if len(known.ids) >= 2
        }
    done = {}
    for key, one in sets.items():
        values, hits = _pairs(one, recall_at)
        for label, known in one.labels.items():
            scores = _classifiers(one, label, probe_train, heads.get(label))
            for prefix, logits in scores.items():
                got = metrics.accuracy(logits, known.ids)
                values[f"{label}/{prefix}acc1"] = got.acc1
                values[f"{label}/{prefix}acc5"] = got.acc5
                values[f"{label}/{prefix}mean_per_class_recall"] = got.mean_per_class_recall
                hits[f"{label}/{prefix}acc1"] = got.hits.cpu()
            if grouping and len(known.ids) > 1:
                cluster = partial(kmeans, init="k-means++")
                for name, value in metrics.group_scores(one.image, known.ids, cluster).items():
                    values[f"{label}/{name}"] = value
        bounds = {name: interval(values) for name, values in hits.items()}
        done[key] = SetResults(
            one.title or key, len(one.image), len(one.text), values, bounds, hits
        )
    return Results(done, time.perf_counter() - started)


def _pairs(one: EvalSet, recall_at: Sequence[int]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Retrieval and geometry: values, and the hits behind the recalls."""
    ranks = metrics.retrieval(one.image, one.text, one.caption_image)
    values = ranks.summary(tuple(recall_at))
    hits = {}
    for k in recall_at:
        to_text, to_image = ranks.hits(k)
        hits[f"text_retrieval_recall@{k}"] = to_text.cpu()
        hits[f"image_retrieval_recall@{k}"] = to_image.cpu()
    matching = one.image if one.caption_image is None else one.image[one.caption_image]
    values["modality_gap"] = metrics.modality_gap(one.image, one.text)
    values["alignment"] = metrics.alignment(matching, one.text)
    values["image_uniformity"] = metrics.uniformity(one.image)
    values["text_uniformity"] = metrics.uniformity(one.text)
    return values, hits


def _classifiers(
    one: EvalSet, label: str, probe_train: ProbeTrain | None, head: metrics.LinearProbe | None
) -> dict[str, Tensor]:
    """Logits [N, C] of each classifier there is for the label, by metric prefix."""
    scores = {}
    if label in one.class_vectors:
        scores[""] = metrics.zero_shot_logits(one.image, one.class_vectors[label])
    if one.probes and probe_train is not None and head is not None:
        scores["lp_"] = head.logits(one.image)
        known = probe_train.labels[label]
        scores["knn_"] = metrics.knn_logits(
            probe_train.image, known.ids, one.image, len(known.names)
        )
    return scores


def evaluate_model(
    model: ProtoModel,
    data: str = "builtin:emoji",
    *,
    split: str = "auto",
    seed: int = 0,
    captions: str = "first",
    device: torch.device | None = None,
    batch_size: int = 256,
    workers: int = 0,
    autocast: Autocast = nullcontext,
    progress: Callable[[int], None] | None = None,
    open_kwargs: Mapping[str, Any] | None = None,
) -> Results:
    """Encode the evaluation sets of ``data`` and score them; with several ranks all of them
    encode and rank 0 scores.

    builtin:emoji has HO (held-out concepts), TW (all, in Twemoji style) and, with the font, NHO
    and NOTO (the held-out ones and all in Noto style). Other data has one set: HO (its held-out
    part) or ALL. Probes learn from the train split, so they need the held-out one.

    Args:
        model: stays as it is, where it is.
        device: where the model is; None: look.
        data: what ``protoclip.data.open_dataset`` takes.
        split: of other data than builtin:emoji: "heldout", "all", or "auto" (built-in: held out,
            files: all).
        seed: of the split into train and held out, the one of the training run.
        captions: "first" (one per image, the canonical one) or "all".
        batch_size, workers: of encoding.
        autocast: makes the context of each forward pass.
        progress: told the number of rows (images or texts) after each batch.
        open_kwargs: further arguments of ``open_dataset``, such as the CSV columns.
    """
    started = time.perf_counter()
    place = device or next(model.parameters()).device
    encoder = Encoder(model, place, batch_size, workers, autocast, progress)
    sets, train = encode_sets(
        encoder, data, split=split, seed=seed, captions=captions, open_kwargs=open_kwargs
    )
    if not is_main():
        return Results({}, time.perf_counter() - started)
    results = evaluate_features(sets, train)
    return Results(results.sets, time.perf_counter() - started)


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory in use so far: of the card on a GPU, of the process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
