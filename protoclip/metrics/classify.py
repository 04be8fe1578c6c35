"""Classification scores, and the zero-shot classifier made of prompts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.metrics._common import check_labels, check_matrix, unit


@dataclass(frozen=True)
class Accuracy:
    """Scores of one classifier on one set, as shares of 1."""

    acc1: float
    acc5: float  # NaN with fewer than five classes
    mean_per_class_recall: float  # over the classes that occur
    hits: Tensor  # float32 [N], 1.0 where the first guess is right


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
    n, c = logits.shape
    check_labels("accuracy: labels", labels, n)
    if n == 0:
        return Accuracy(float("nan"), float("nan"), float("nan"), logits.new_zeros(0))
    labels = labels.to(logits.device)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= c:
        raise ValueError(f"accuracy: labels must lie in 0..{c - 1}, found {low}..{high}")
    own = logits.gather(1, labels[:, None])  # [N, 1]
    rank = 1 + (logits > own).sum(1) + 0.5 * ((logits == own).sum(1) - 1)
    rank = torch.where(own[:, 0].isnan(), torch.inf, rank)
    hits = (rank <= 1).double()
    support = torch.bincount(labels, minlength=c)
    right = torch.zeros(c, dtype=torch.float64, device=logits.device).index_add_(0, labels, hits)
    recall = (right / support)[support > 0].mean()
    acc5 = float((rank <= 5).double().mean()) if c >= 5 else float("nan")
    return Accuracy(float(hits.mean()), acc5, float(recall), hits.float())
