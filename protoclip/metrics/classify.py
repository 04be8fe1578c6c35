"""Classification scores, and the zero-shot classifier made of prompts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.metrics._common import check_labels, check_matrix, rows_per_block, unit


@dataclass(frozen=True)
class Accuracy:
    """Scores of one classifier on one set, as shares of 1."""

    acc1: float
    acc5: float  # NaN with fewer than five classes
    mean_per_class_recall: float  # over the classes that occur
    hits: Tensor  # float32 [N], 1.0 where the first guess is right
    guesses: Tensor  # int64 [N], the class with the highest logit
    hits5: Tensor  # float32 [N], 1.0 where the class is among the first five; [0] without top-5


def class_vectors(prompts: Tensor) -> Tensor:
    """Prompt ensemble: the renormalised mean of each class's unit prompt features.

    Args:
        prompts: [C, P, D], P prompts for each of C classes, any length.
    Returns:
        Unit rows [C, D], at least float32.
    """
    if prompts.ndim != 3 or prompts.shape[1] == 0:
        raise ValueError(
            f"class_vectors: expected [C, P, D] with at least one prompt, "
            f"got {tuple(prompts.shape)}"
        )
    c, p, d = prompts.shape
    return unit(unit(prompts.reshape(c * p, d)).reshape(c, p, d).mean(1))


def zero_shot_logits(image: Tensor, vectors: Tensor) -> Tensor:
    """Cosines between images [N, D] and class vectors [C, D] -> [N, C]."""
    check_matrix("zero_shot_logits: image", image)
    check_matrix("zero_shot_logits: vectors", vectors, cols=image.shape[1])
    z, v = unit(image), unit(vectors)
    dtype = torch.promote_types(z.dtype, v.dtype)
    return z.to(dtype) @ v.to(dtype).T


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Top-1, top-5 and mean per class recall of logits [N, C] against labels int64 [N].

    Ties go to the other classes, half a place each. No samples: NaN; fewer than five classes: no
    top-5 (NaN), as in CLIP_benchmark.

    Raises:
        ValueError: shapes disagree, or a label has no column.
    """
    check_matrix("accuracy: logits", logits)
    return classify(logits, labels, logits.shape[1], lambda rows: rows)


def classify(
    features: Tensor, labels: Tensor, num_classes: int, score: Callable[[Tensor], Tensor]
) -> Accuracy:
    """``accuracy`` of ``score(features)``, a block of rows at a time: [N, C] is never held.

    Args:
        features: [N, D].
        labels: int64 [N] in 0 .. C - 1.
        num_classes: C.
        score: features [b, D] -> logits [b, C]; a row's logits depend on that row alone.
    """
    check_matrix("accuracy: features", features)
    n, c = features.shape[0], num_classes
    check_labels("accuracy: labels", labels, n)
    if n == 0:
        nan = float("nan")
        none = features.new_zeros(0)
        return Accuracy(nan, nan, nan, none, labels.new_zeros(0), none)
    labels = labels.to(features.device)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= c:
        raise ValueError(f"accuracy: labels must lie in 0..{c - 1}, found {low}..{high}")
    ranks, guesses = [], []
    for rows in torch.arange(n, device=features.device).split(rows_per_block(c)):
        logits = score(features[rows])  # [b, C]
        own = logits.gather(1, labels[rows, None])  # [b, 1]
        rank = 1 + (logits > own).sum(1) + 0.5 * ((logits == own).sum(1) - 1)
        ranks.append(torch.where(own[:, 0].isnan(), torch.inf, rank))
        guesses.append(logits.argmax(1))
    return _summary(torch.cat(ranks), torch.cat(guesses), labels, c)


def _summary(rank: Tensor, guesses: Tensor, labels: Tensor, c: int) -> Accuracy:
    """Scores from each sample's rank of its own class, [N]."""
    hits = (rank <= 1).double()
    support = torch.bincount(labels, minlength=c)
    right = torch.zeros(c, dtype=torch.float64, device=rank.device).index_add_(0, labels, hits)
    recall = (right / support)[support > 0].mean()
    hits5 = (rank <= 5).float() if c >= 5 else rank.new_zeros(0, dtype=torch.float32)
    acc5 = float(hits5.double().mean())  # of none: NaN
    return Accuracy(float(hits.mean()), acc5, float(recall), hits.float(), guesses, hits5)


def mean_average_precision(
    features: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor]
) -> float:
    """Mean over the classes of the average precision: CLIP_benchmark's multilabel score.

    Args:
        features: [N, D].
        targets: bool [N, C], whether a class is in a sample; a class in none scores 0.
        score: features [b, D] -> logits [b, C].
    """
    check_matrix("mean_average_precision: features", features)
    n, c = targets.shape
    if features.shape[0] != n or n == 0 or c == 0:
        raise ValueError(
            f"mean_average_precision: expected targets [{features.shape[0]}, C] of some samples, "
            f"got {tuple(targets.shape)}"
        )
    logits = torch.cat([score(rows) for rows in features.split(rows_per_block(c))])
    place = torch.arange(1, n + 1, device=logits.device)
    total = 0.0
    for k in range(c):
        truth = targets[logits[:, k].argsort(descending=True, stable=True), k].double()
        precision = truth.cumsum(0) / place
        total += float((precision * truth).sum() / truth.sum().clamp_min(1))
    return total / c
