"""Are the prototypes used, balanced, stable and pure?"""

import math

import torch
from torch import Tensor

from protoclip.metrics._common import check_labels
from protoclip.metrics.grouping import contingency


def prototype_health(
    labels: Tensor,
    num_prototypes: int,
    *,
    previous: Tensor | None = None,
    classes: Tensor | None = None,
) -> dict[str, float]:
    """Health of one clustering.

    Args:
        labels: int64 [N] in 0 .. num_prototypes - 1.
        num_prototypes: K.
        previous: labels of the same samples one episode ago [N], for ``churn``.
        classes: known classes of the samples [N], for ``purity``.
    Returns:
        ``empty``: share of prototypes without a sample; ``imbalance``: K sum (n_k / N)^2, as in
        faiss (1: all of one size, K: one holds all); ``largest``: share of samples in the largest;
        ``churn`` and ``purity`` where asked for. No samples: NaN.
    Raises:
        ValueError: a label outside 0 .. K - 1, or lengths that disagree.
    """
    n = labels.shape[0]
    check_labels("prototype_health: labels", labels, n)
    if n == 0:
        out = dict.fromkeys(("empty", "imbalance", "largest"), math.nan)
    else:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_prototypes:
            raise ValueError(
                f"prototype_health: labels must lie in 0..{num_prototypes - 1}, found {low}..{high}"
            )
        share = torch.bincount(labels, minlength=num_prototypes).double() / n  # [K]
        out = {
            "empty": float((share == 0).double().mean()),
            "imbalance": float(num_prototypes * share.square().sum()),
            "largest": float(share.max()),
        }
    if previous is not None:
        out["churn"] = churn(previous, labels)
    if classes is not None:
        out["purity"] = purity(labels, classes)
    return out


def purity(labels: Tensor, classes: Tensor) -> float:
    """Share of samples that belong to the commonest class of their prototype."""
    table = contingency(labels, classes)
    if table.total == 0:
        return math.nan
    return _largest_cells(table.count, table.row, table.row_sum.numel()) / table.total


def churn(before: Tensor, after: Tensor) -> float:
    """Share of samples that changed company: 0 same partition, whatever the numbering.

    One minus the mean of the purities both ways, so that merging everything is no way to score 0.
    """
    table = contingency(before, after)
    if table.total == 0:
        return math.nan
    kept = _largest_cells(table.count, table.row, table.row_sum.numel())
    kept += _largest_cells(table.count, table.col, table.col_sum.numel())
    return 1.0 - 0.5 * kept / table.total


def _largest_cells(count: Tensor, index: Tensor, size: int) -> float:
    """Sum over ``size`` rows (or columns) of their largest cell."""
    best = count.new_zeros(size).scatter_reduce_(0, index, count, "amax", include_self=True)
    return float(best.sum())
