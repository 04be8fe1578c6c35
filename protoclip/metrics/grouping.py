"""Agreement of two partitions: ARI, AMI, NMI, and k-means of features against known labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from protoclip.metrics._common import check_labels, check_matrix, unit


@dataclass(frozen=True)
class Contingency:
    """Non-zero cells of the table that counts samples by (row class, column class)."""

    count: Tensor  # float64 [nnz]
    row: Tensor  # int64 [nnz]
    col: Tensor  # int64 [nnz]
    row_sum: Tensor  # float64 [R], every entry > 0
    col_sum: Tensor  # float64 [C], every entry > 0
    total: int


def contingency(a: Tensor, b: Tensor) -> Contingency:
    """Counts of the pairs (a_i, b_i); int64 [N] each, any integers, computed on the CPU.

    Memory O(N): the table itself, which may be K x K, is not built.
    """
    check_labels("contingency: first labels", a, a.shape[0] if a.ndim else 0)
    check_labels("contingency: second labels", b, a.shape[0])
    _, row = torch.unique(a.cpu(), return_inverse=True)
    cols, col = torch.unique(b.cpu(), return_inverse=True)
    width = max(cols.numel(), 1)
    cell, count = torch.unique(row * width + col, return_counts=True)
    return Contingency(
        count.double(),
        cell // width,
        cell % width,
        torch.bincount(row).double(),
        torch.bincount(col).double(),
        a.shape[0],
    )


def adjusted_rand_index(table: Contingency) -> float:
    """Rand index corrected for chance: 1 same partition, about 0 unrelated."""
    n = table.total
    together = int(table.count.square().sum()) - n  # ordered pairs joined in both
    rows = int(table.row_sum.square().sum()) - n
    cols = int(table.col_sum.square().sum()) - n
    if together == rows == cols:
        return 1.0
    tp, fn, fp = together, rows - together, cols - together
    tn = n * n - n - tp - fn - fp
    return 2.0 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))


def normalized_mutual_information(table: Contingency) -> float:
    """Mutual information over the mean of the entropies, 0 .. 1."""
    trivial = _trivial(table)
    if trivial is not None:
        return trivial
    return _mutual_information(table) / _mean_entropy(table)


def adjusted_mutual_information(table: Contingency) -> float:
    """Mutual information corrected for chance (Vinh et al. 2010, mean of the entropies)."""
    trivial = _trivial(table)
    if trivial is not None:
        return trivial
    expected = _expected_mutual_information(table)
    eps = torch.finfo(torch.float64).eps

    def away_from_zero(x: float) -> float:
        return min(x, -eps) if x < 0 else max(x, eps)

    # All samples in classes of their own on both sides make this 0 / 0, a perfect match.
    return away_from_zero(_mutual_information(table) - expected) / away_from_zero(
        _mean_entropy(table) - expected
    )


def group_scores(
    features: Tensor,
    labels: Tensor,
    kmeans: Callable[..., Any],
    *,
    num_clusters: int | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, float]:
    """How well the clusters of unit features match known labels; means over the seeds.

    Args:
        features: [N, D], any length; clustered on the unit sphere.
        labels: int64 [N].
        kmeans: called as ``kmeans(points, num_clusters, seed=seed)``, returns something with
            ``.labels`` int64 [N]; ``protoclip.kmeans`` or a partial of it.
        num_clusters: None: the number of different labels.
        seeds: one k-means each; one alone moves by a few hundredths.
    Returns:
        ``{"ari", "ami", "nmi"}``.
    """
    check_matrix("group_scores: features", features)
    check_labels("group_scores: labels", labels, features.shape[0])
    if not seeds:
        raise ValueError("group_scores: expected at least one seed, got none")
    points = unit(features)
    k = num_clusters or int(torch.unique(labels).numel())
    out = {"ari": 0.0, "ami": 0.0, "nmi": 0.0}
    for seed in seeds:
        table = contingency(labels, kmeans(points, k, seed=seed).labels)
        out["ari"] += adjusted_rand_index(table) / len(seeds)
        out["ami"] += adjusted_mutual_information(table) / len(seeds)
        out["nmi"] += normalized_mutual_information(table) / len(seeds)
    return out


def _trivial(table: Contingency) -> float | None:
    """The score where a side has one class or none: 1 if both do, else 0; None otherwise."""
    rows, cols = table.row_sum.numel(), table.col_sum.numel()
    if rows <= 1 and cols <= 1:
        return 1.0
    return 0.0 if rows == 1 or cols == 1 else None


def _mutual_information(table: Contingency) -> float:
    p = table.count / table.total
    outer = table.row_sum[table.row] * table.col_sum[table.col]
    log_ratio = table.count.log() - outer.log() + torch.tensor(table.total).double().log()
    return float((p * log_ratio).sum().clamp_min(0))


def _mean_entropy(table: Contingency) -> float:
    entropy = 0.0
    for sums in (table.row_sum, table.col_sum):
        p = sums / table.total
        entropy -= 0.5 * float((p * p.log()).sum())
    return entropy


def _expected_mutual_information(table: Contingency) -> float:
    """E[MI] of two random partitions with these class sizes, in nats.

    Classes of equal size contribute equally, so it sums over *distinct* sizes (a, b) with their
    multiplicities; the cell count x runs over the support of the hypergeometric law.
    """
    n = table.total
    log_factorial = torch.lgamma(torch.arange(n + 1, dtype=torch.float64) + 1)  # [N + 1]
    rows, row_times = torch.unique(table.row_sum.long(), return_counts=True)
    b, col_times = torch.unique(table.col_sum.long(), return_counts=True)
    total = 0.0
    for a, times in zip(rows.tolist(), row_times.tolist(), strict=True):
        top = min(a, int(b.max()))
        step = max(1, (1 << 22) // b.numel())
        for low in range(1, top + 1, step):
            x = torch.arange(low, min(low + step, top + 1))[:, None]  # [x, 1]
            possible = (x <= b) & (x >= a + b - n)  # [x, B]
            x, bb = torch.where(possible, x, 1), b.expand_as(possible)
            log_p = log_factorial[a] - log_factorial[x] - log_factorial[a - x]
            log_p = log_p + log_factorial[bb] - log_factorial[(bb - x).clamp_min(0)]
            log_p = log_p + log_factorial[n - a] - log_factorial[(n - a - bb + x).clamp_min(0)]
            log_p = log_p + log_factorial[n - bb] - log_factorial[n]
            share = x.double() / n
            log_ratio = torch.log(share * (n / a) * (n / bb.double()))
            term = torch.where(possible, share * log_ratio * log_p.exp(), 0)
            total += times * float((term * col_times).sum())
    return total
