"""How many clusters there are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from protoclip.common.seeds import evenly_spaced
from protoclip.lloyd.clustering import kmeans
from protoclip.lloyd.clusters import Rows
from protoclip.lloyd.points import open_points


def numbers_to_try(num_points: int, max_clusters: int) -> list[int]:
    """2 to 16, then steps of a fifth, up to ``max_clusters`` and a third of the points."""
    steps = {*range(2, 17), *(int(16 * 1.2**i) for i in range(1, 100))}
    return sorted(k for k in steps if k <= min(max_clusters, num_points // 3))


def choose_num_clusters(
    points: Rows,
    *,
    max_clusters: int = 300,
    max_points: int = 3000,
    seed: int = 0,
    backend: str = "auto",
    progress: Callable[[int, float], None] | None = None,
) -> tuple[int, dict[int, float]]:
    """The number of clusters with the largest mean silhouette, for ``kmeans``.

    Each number that ``numbers_to_try`` lists is clustered (k-means++, three restarts, ten
    iterations) on a sample of the points, and scored there.

    Args:
        points: [N, D] with N >= 6, as for ``kmeans``, in memory or on disk. Only the sample is
            looked at.
        max_clusters: the largest number to try, >= 2.
        max_points: size of the sample, evenly spaced rows; time grows with its square.
        seed, backend: as for ``kmeans``.
        progress: called after each number with the number and its mean silhouette.
    Returns:
        The number, and the mean silhouette, -1 to 1, of each number tried. Numbers that leave one
        cluster, or only clusters of one point, have none and are missing.
    Raises:
        ValueError: fewer than 6 points, a limit is too small, or the points are equal.
    Source:
        Rousseeuw 1987, "Silhouettes".

    Example:
        >>> points = torch.arange(3).repeat_interleave(20)[:, None] * 10.0 + torch.randn(60, 1)
        >>> k, silhouettes = protoclip.choose_num_clusters(points)
        >>> k
        3
    """
    op = "choose_num_clusters"
    rows = open_points(op, "points", points, None)
    if max_clusters < 2 or max_points < 6:
        raise ValueError(
            f"{op}: expected max_clusters >= 2 and max_points >= 6, got {max_clusters} and "
            f"{max_points}"
        )
    if rows.count < 6:
        raise ValueError(f"{op}: expected at least 6 points, got {rows.count}; give a number")
    from sklearn.metrics import silhouette_score

    positions = evenly_spaced(rows.count, max_points)
    sample = rows.take(positions)
    bad = ~torch.isfinite(sample).all(dim=1)
    if bad.any():
        first = int(positions[int(bad.int().argmax())])
        raise ValueError(
            f"{op}: expected finite points, got {int(bad.sum())} rows with NaN or inf in a sample "
            f"of {len(sample)}; the first is row {first}"
        )
    centred = (sample - sample.mean(0)).cpu().numpy()  # far from 0 silhouettes lose their digits
    silhouettes: dict[int, float] = {}
    if not bool((sample == sample[0]).all()):
        for k in numbers_to_try(len(sample), max_clusters):
            clusters = kmeans(
                sample, k, num_iters=10, tol=0, num_restarts=3, seed=seed,
                backend=backend, warn=False,
            )  # fmt: skip
            labels = clusters.labels.cpu().numpy()
            if 2 <= len(np.unique(labels)) < len(labels):
                silhouettes[k] = float(silhouette_score(centred, labels))
                if progress is not None:
                    progress(k, silhouettes[k])
    if not silhouettes:
        raise ValueError(f"{op}: expected points that differ, got equal ones; give a number")
    return max(silhouettes, key=silhouettes.__getitem__), silhouettes
