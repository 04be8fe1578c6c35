"""k-means of one source's features, and what can be said about the clusters it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.config import EpisodeConfig
from protoclip.distributed import all_ranks, max_over_ranks
from protoclip.kmeans import Ranks, kmeans

IGNORE = -100  # cross-entropy's word for: this sample has no label
ENTROPY_ROWS = 1024  # clusters whose targets are held at once


@dataclass(frozen=True)
class Clustering:
    """Who belongs together, by one source; empty clusters are gone unless they are to be kept."""

    centroids: Tensor  # [K, Ds]
    labels: Tensor  # int64 [dataset], IGNORE where the sample is not known
    counts: Tensor  # int64 [K]


def check_clusters(
    config: EpisodeConfig, samples: int, episode: str = "an episode"
) -> tuple[int, ...]:
    """Each K of an episode of ``samples``.

    Raises:
        ValueError: more clusters than samples.
    """
    numbers = tuple(dict.fromkeys(k or max(1, samples // 10) for k in config.clusters))
    if max(numbers) > samples:
        raise ValueError(
            f"--k: expected at most one cluster per sample, got k={max(numbers)} for the {samples} "
            f"samples of {episode}; use --k {max(1, samples // 10)}, a larger --episode-size, or "
            "more data"
        )
    return numbers


def check_finite(sources: Mapping[str, Tensor], index: Tensor, keys: Sequence[str]) -> None:
    """Refuse NaN and infinity, by the key of the first sample that has them."""
    for name, points in sources.items():
        bad = ~torch.isfinite(points).all(dim=1)
        if bad.any():
            key = keys[int(index[bad][0])]
            raise ValueError(
                f"episode: expected finite {name} features, got NaN or infinity in "
                f"{int(bad.sum())} of {len(points)} samples, first in {key!r}; if it is the "
                "model's: lower --lr or use --precision fp32; if the teacher's: mend its file"
            )


def cluster(
    points: Tensor,
    index: Tensor,
    dataset_size: int,
    num_clusters: int,
    config: EpisodeConfig,
    generator: torch.Generator,
    last: Clustering | None,
) -> tuple[Clustering, dict[str, float]]:
    """k-means on the [N, Ds] points of one source -> its clusters, and inertia and empties.

    Each rank holds a slice of the points; all get the same clusters, with the labels of all.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    ranks = Ranks(len(points), all_ranks(), points.device)
    warm = config.kmeans_init == "warm" and last is not None
    init: str | Tensor = "random" if config.kmeans_init == "warm" else config.kmeans_init
    if warm and last is not None:
        init = _refill(last.centroids, points, num_clusters, generator, ranks)
    clusters = kmeans(
        points,
        num_clusters,
        num_iters=config.kmeans_max_iter,
        num_restarts=1 if warm else config.kmeans_nredo,
        init=init,
        seed=seed,
        spherical=config.normalize_centroids,
        group=ranks.group,
        backend=config.kmeans_backend,
    )
    filled = clusters.counts > 0
    metrics = {
        "inertia": clusters.inertia / ranks.total,
        "empty": float(num_clusters - filled.sum()),
    }
    kept = torch.ones_like(filled) if config.keep_empty else filled
    # An empty cluster that is kept is a vector at the origin, as in the authors' code.
    centroids = clusters.centroids.where(filled[:, None], 0.0)[kept]
    labels = torch.full((dataset_size,), IGNORE, device=points.device)
    labels[index] = (kept.cumsum(0) - 1)[clusters.labels]
    max_over_ranks(labels)  # each rank knows those of its own samples
    return Clustering(centroids, labels, clusters.counts[kept]), metrics


def _refill(
    centroids: Tensor,
    points: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    ranks: Ranks,
) -> Tensor:
    """The last centroids, with points drawn at random in the places of dropped ones: [K, Ds]."""
    missing = num_clusters - len(centroids)
    if missing <= 0:
        return centroids[:num_clusters]
    drawn = torch.randperm(ranks.total, generator=generator)[:missing]
    return torch.cat([centroids, ranks.rows(points, drawn).to(centroids)])


def health(
    clustering: Clustering, last: Clustering | None, classes: Mapping[str, Tensor]
) -> dict[str, float]:
    """Sizes of the clusters, churn since the last episode, purity by known classes [dataset]."""
    sizes = clustering.counts.double()
    values = {
        "clusters": float(len(sizes)),
        "size_min": float(sizes.min()),
        "size_median": float(sizes.median()),
        "size_max": float(sizes.max()),
        "imbalance": float(sizes.max() / sizes.mean()),
    }
    known = clustering.labels != IGNORE
    if last is not None:
        both = known & (last.labels != IGNORE)
        if both.any():
            values["churn"] = 1 - purity(clustering.labels[both], last.labels[both])
    for name, ids in classes.items():
        values[f"purity_{name}"] = purity(clustering.labels[known], ids[known])
    return values


def purity(labels: Tensor, classes: Tensor) -> float:
    """Share of samples in the commonest class of their cluster; int64 [N] each, N > 0."""
    pairs, sizes = torch.unique(torch.stack([labels, classes]), dim=1, return_counts=True)
    largest = torch.zeros(int(labels.max()) + 1, dtype=sizes.dtype, device=sizes.device)
    largest.scatter_reduce_(0, pairs[0], sizes, "amax")
    return float(largest.sum()) / len(labels)


def target_entropy(clustering: Clustering, temperature: float) -> float:
    """Mean entropy in nats of the samples' soft targets; 0: all mass on one prototype."""
    centroids, total = clustering.centroids.float(), 0.0
    for rows, counts in zip(
        centroids.split(ENTROPY_ROWS), clustering.counts.split(ENTROPY_ROWS), strict=True
    ):
        log_p = F.log_softmax(rows @ centroids.T / temperature, dim=1)
        total += float((-(log_p.exp() * log_p).sum(dim=1) * counts).sum())
    return total / max(1, int(clustering.counts.sum()))
