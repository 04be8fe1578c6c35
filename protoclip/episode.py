"""An episode: clusters of the features, and from them the constants of the prototype losses.

A source (image, text, or an external teacher) says which samples belong together; a student (image
or text) gets one prototype per cluster, the mean of its own projections there
(back translation, PBT).
algorithm.md §2-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from protoclip.config import EpisodeConfig
from protoclip.features import Features
from protoclip.kmeans import kmeans
from protoclip.ops import Bank, segment_mean, soft_targets

IGNORE = -100  # cross-entropy's word for: this sample has no label
INTERNAL = {"image": "text", "text": "image"}  # source -> its student


@dataclass(frozen=True)
class Clustering:
    """Who belongs together, by one source; empty clusters are gone."""

    centroids: Tensor  # [K, Ds]
    labels: Tensor  # int64 [dataset], IGNORE outside the episode
    counts: Tensor  # int64 [K], all > 0


@dataclass(frozen=True)
class PrototypeSet:
    """One source's clusters as one student sees them; constants."""

    source: str
    student: str  # "image" | "text"
    prototypes: Tensor  # [K, Dh]
    targets: Tensor | None  # [K, Dh], rows m_y; None: hard labels, m = prototypes
    labels: Tensor  # int64 [dataset], IGNORE outside the episode
    counts: Tensor  # int64 [K]

    def bank(self, index: Tensor) -> Bank:
        """The prototypes with the labels of the samples at ``index``, int64 [B]."""
        return Bank(self.prototypes, self.labels[index], self.targets)


@dataclass(frozen=True)
class Episode:
    """What training reads until the next one."""

    internal: tuple[PrototypeSet, ...] = ()
    external: tuple[PrototypeSet, ...] = ()
    clusterings: Mapping[str, Clustering] = field(default_factory=dict)  # by source
    metrics: Mapping[str, float] = field(default_factory=dict)


def build_episode(
    features: Features,
    teachers: Mapping[str, Tensor],
    config: EpisodeConfig,
    generator: torch.Generator,
    previous: Episode | None,
    *,
    keys: Sequence[str],
    internal: bool = True,
) -> Episode:
    """Cluster every source and translate the clusters into each student's space.

    Args:
        features: of the episode's N samples.
        teachers: name -> [dataset, d], rows by position in the dataset.
        config: K, temperatures, k-means' settings.
        generator: CPU generator; k-means' seeds come from it.
        previous: the last episode, for the warm start; None: none yet.
        keys: of the whole dataset, to name a sample whose features are not finite.
        internal: whether to cluster the model's own features; False: teachers only.
    Raises:
        ValueError: features that are not finite, or more clusters than samples.
    """
    num_clusters = check_clusters(config, len(features.index))
    sources: dict[str, Tensor] = {}
    if internal:
        sources |= {"image": features.image_h, "text": features.text_h}
    sources |= {name: rows[features.index].to(features.image_h) for name, rows in teachers.items()}
    check_finite(sources, features.index, keys)

    students = {"image": features.image_h, "text": features.text_h}
    clusterings: dict[str, Clustering] = {}
    metrics: dict[str, float] = {}
    for name, points in sources.items():
        last = previous.clusterings.get(name) if previous else None
        clustering, inertia = _cluster(
            points, features.index, len(keys), num_clusters, config, generator, last
        )
        clusterings[name] = clustering
        metrics[f"{name}_inertia"] = inertia / len(points)
        metrics |= {f"{name}_{key}": value for key, value in _health(clustering, last).items()}
    inner = [
        _translate(name, student, students, features.index, clusterings[name], config)
        for name, student in INTERNAL.items()
        if internal
    ]
    outer = [
        _translate(name, student, students, features.index, clusterings[name], config, True)
        for name in teachers
        for student in students
    ]
    return Episode(tuple(inner), tuple(outer), clusterings, metrics)


def check_clusters(config: EpisodeConfig, samples: int) -> int:
    """K for an episode of ``samples``; more clusters than samples is the user's mistake."""
    num_clusters = config.clusters or max(1, samples // 10)
    if num_clusters > samples:
        raise ValueError(
            f"--k: expected at most one cluster per sample, got k={num_clusters} for an episode of "
            f"{samples} samples; use --k {max(1, samples // 10)}, a larger --episode-size, or more "
            "data"
        )
    return num_clusters


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


def _cluster(
    points: Tensor,
    index: Tensor,
    dataset_size: int,
    num_clusters: int,
    config: EpisodeConfig,
    generator: torch.Generator,
    last: Clustering | None,
) -> tuple[Clustering, float]:
    """k-means on the [N, Ds] points of one source -> its clusters without empty ones, inertia."""
    seed = int(torch.randint(2**31, (), generator=generator))
    warm = config.kmeans_init == "warm" and last is not None
    init: str | Tensor = "random" if config.kmeans_init == "warm" else config.kmeans_init
    if warm and last is not None:
        init = _refill(last.centroids, points, num_clusters, generator)
    clusters = kmeans(
        points,
        num_clusters,
        num_iters=config.kmeans_max_iter,
        num_restarts=1 if warm else config.kmeans_nredo,
        init=init,
        seed=seed,
    )
    kept = clusters.counts > 0
    renumbered = (kept.cumsum(0) - 1)[clusters.labels]
    labels = torch.full((dataset_size,), IGNORE, device=points.device)
    labels[index] = renumbered
    return Clustering(clusters.centroids[kept], labels, clusters.counts[kept]), clusters.inertia


def _refill(
    centroids: Tensor, points: Tensor, num_clusters: int, generator: torch.Generator
) -> Tensor:
    """The last centroids, with points drawn at random in the places of dropped ones: [K, Ds]."""
    missing = num_clusters - len(centroids)
    if missing <= 0:
        return centroids[:num_clusters]
    drawn = torch.randperm(len(points), generator=generator)[:missing].to(points.device)
    return torch.cat([centroids, points[drawn].to(centroids)])


def _translate(
    source: str,
    student: str,
    students: Mapping[str, Tensor],
    index: Tensor,
    clustering: Clustering,
    config: EpisodeConfig,
    external: bool = False,
) -> PrototypeSet:
    """Prototypes and targets of one source in one student's space."""
    temperature = config.external_target_temperature if external else config.target_temperature
    num_clusters = len(clustering.counts)
    if config.pbt or external:
        prototypes, _ = segment_mean(students[student], clustering.labels[index], num_clusters)
    else:
        prototypes = clustering.centroids
    targets = None
    if temperature > 0:
        targets = soft_targets(clustering.centroids.to(prototypes), prototypes, temperature)
    return PrototypeSet(source, student, prototypes, targets, clustering.labels, clustering.counts)


def _health(clustering: Clustering, last: Clustering | None) -> dict[str, float]:
    """Sizes of the clusters, and churn: the share of samples seen twice that changed cluster."""
    sizes = clustering.counts.double()
    health = {
        "clusters": float(len(sizes)),
        "size_min": float(sizes.min()),
        "size_median": float(sizes.median()),
        "size_max": float(sizes.max()),
        "imbalance": float(sizes.max() / sizes.mean()),
    }
    if last is not None:
        both = (clustering.labels != IGNORE) & (last.labels != IGNORE)
        if both.any():
            health["churn"] = _churn(last.labels[both], clustering.labels[both])
    return health


def _churn(before: Tensor, after: Tensor) -> float:
    """Share of samples outside the commonest old cluster of their new one; names do not matter."""
    pairs, sizes = torch.unique(torch.stack([after, before]), dim=1, return_counts=True)
    largest = torch.zeros(int(after.max()) + 1, dtype=sizes.dtype, device=sizes.device)
    largest.scatter_reduce_(0, pairs[0], sizes, "amax")
    return 1 - float(largest.sum()) / len(after)
