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
import torch.nn.functional as F
from torch import Tensor

from protoclip.clustering import (
    IGNORE,
    Clustering,
    check_clusters,
    check_finite,
    cluster,
    health,
    target_entropy,
)
from protoclip.config import EpisodeConfig
from protoclip.distributed import all_ranks, broadcast, max_over_ranks, sum_over_ranks
from protoclip.features import Features
from protoclip.kmeans import global_segment_mean
from protoclip.model import Encoded
from protoclip.ops import Bank, kmeans_assign, soft_targets

INTERNAL = {"image": "text", "text": "image"}  # source -> its student


@dataclass(frozen=True)
class PrototypeSet:
    """One source's clusters as one student sees them; constants."""

    source: str
    student: str  # "image" | "text"
    prototypes: Tensor  # [K, Dh]
    targets: Tensor | None  # [K, Dh], rows m_y; None: hard labels, m = prototypes
    labels: Tensor  # int64 [dataset], IGNORE where the sample is not known
    counts: Tensor  # int64 [K]
    online: Tensor | None = None  # [K, Dh], centroids of the source that label unknown samples

    def bank(self, index: Tensor, projected: Encoded) -> Bank:
        """The prototypes with the labels of the samples at ``index``, int64 [B].

        A sample that the clustering has not seen gets the nearest centroid to its own
        projection, [B, Dh], where ``online`` centroids are there.
        """
        labels = self.labels[index]
        if self.online is not None:
            points = getattr(projected, self.source).detach()
            nearest, _ = kmeans_assign(points, self.online)
            nearest = nearest.masked_fill(nearest < 0, IGNORE)  # not finite: the guard's business
            labels = torch.where(labels == IGNORE, nearest, labels)
        return Bank(self.prototypes, labels, self.targets)


@dataclass(frozen=True)
class Episode:
    """What training reads until the next one."""

    internal: tuple[PrototypeSet, ...] = ()
    external: tuple[PrototypeSet, ...] = ()
    clusterings: Mapping[str, Clustering] = field(default_factory=dict)  # by source, or source_K
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
    coming: Tensor | None = None,
    classes: Mapping[str, Tensor] | None = None,
) -> Episode:
    """Cluster every source and translate the clusters into each student's space.

    Args:
        features: of N samples; each rank has its slice of them, all get the same episode.
        teachers: name -> [dataset, d], rows by position in the dataset.
        config: K, temperatures, k-means' settings.
        generator: CPU generator; k-means' seeds come from it.
        previous: the last episode, for the warm start; None: none yet.
        keys: of the whole dataset, to name a sample whose features are not finite.
        internal: whether to cluster the model's own features; False: teachers only.
        coming: int64 [M], positions that will be trained on; None: the N clustered ones. New ones
            are labelled by the nearest centroid: a teacher's here, the model's own as they come.
        classes: name -> int64 [dataset], known classes, for the clusters' purity.
    Raises:
        ValueError: features that are not finite, or more clusters than samples.
    """
    samples = sum_over_ranks(torch.tensor(len(features.index), device=features.index.device))
    numbers = check_clusters(config, int(samples))
    students = {"image": features.image_h, "text": features.text_h}
    rows = {name: all_rows.to(features.image_h) for name, all_rows in teachers.items()}
    sources = dict(students) if internal else {}
    sources |= {name: all_rows[features.index] for name, all_rows in rows.items()}
    check_finite(sources, features.index, keys)

    episode = _Builder(features, students, config, generator, previous, len(keys), coming)
    episode.classes = classes or {}
    inner: list[PrototypeSet] = []
    outer: list[PrototypeSet] = []
    for name, points in sources.items():
        temperature = _temperature(config, name, list(teachers))
        for k in numbers:
            key = name if len(numbers) == 1 else f"{name}_{k}"
            clustering = episode.cluster(key, points, k, temperature, rows.get(name))
            if name in INTERNAL:
                student = INTERNAL[name]
                inner.append(episode.translate(name, student, clustering, temperature))
            else:
                outer += [episode.translate(name, s, clustering, temperature) for s in students]
    return Episode(tuple(inner), tuple(outer), episode.clusterings, episode.metrics)


def _temperature(config: EpisodeConfig, source: str, teachers: list[str]) -> float:
    """Of the source's soft targets: the one for all of its kind, or its own."""
    if source in INTERNAL:
        values, place = config.target_temperature, list(INTERNAL).index(source)
    else:
        values, place = config.external_target_temperature, teachers.index(source)
    return values[0] if len(values) == 1 else values[place]


class _Builder:
    """What all sources of one episode share, and the clusterings so far."""

    def __init__(
        self,
        features: Features,
        students: Mapping[str, Tensor],
        config: EpisodeConfig,
        generator: torch.Generator,
        previous: Episode | None,
        dataset_size: int,
        coming: Tensor | None,
    ) -> None:
        self.index, self.students, self.config = features.index, students, config
        self.generator, self.previous, self.dataset_size = generator, previous, dataset_size
        self.classes: Mapping[str, Tensor] = {}
        self.clusterings: dict[str, Clustering] = {}
        self.metrics: dict[str, float] = {}
        self.new = self._new(coming)

    def _new(self, coming: Tensor | None) -> Tensor:
        """Positions among the coming ones that have no features."""
        if coming is None:
            return self.index[:0]
        known = torch.zeros(self.dataset_size, dtype=torch.bool, device=self.index.device)
        known[self.index] = True
        known = max_over_ranks(known.int()).bool()
        coming = coming.to(self.index.device)
        return coming[~known[coming]].unique()

    def cluster(
        self, key: str, points: Tensor, k: int, temperature: float, teacher: Tensor | None
    ) -> Clustering:
        """Cluster [N, Ds] points; ``teacher`` [dataset, Ds] labels new samples right away."""
        last = self.previous.clusterings.get(key) if self.previous else None
        size = self.dataset_size
        found, metrics = cluster(points, self.index, size, k, self.config, self.generator, last)
        if teacher is not None and len(self.new):
            found.labels[self.new] = kmeans_assign(teacher[self.new], found.centroids)[0]
        metrics |= health(found, last, self.classes)
        metrics["target_entropy"] = target_entropy(found, temperature) if temperature > 0 else 0.0
        self.metrics |= {f"{key}_{name}": value for name, value in metrics.items()}
        self.clusterings[key] = found
        return found

    def translate(
        self, source: str, student: str, clustering: Clustering, temperature: float
    ) -> PrototypeSet:
        """Prototypes and targets of one source in one student's space."""
        centroids, labels, counts = clustering.centroids, clustering.labels, clustering.counts
        internal = source in INTERNAL
        if self.config.pbt or not internal:
            own = labels[self.index]
            students = self.students[student]
            prototypes, _ = global_segment_mean(students, own, len(counts), all_ranks())
            if self.config.normalize_centroids:
                prototypes = F.normalize(prototypes, dim=1)
        else:
            prototypes = centroids
        targets = None
        if temperature > 0:
            targets = soft_targets(centroids.to(prototypes), prototypes, temperature)
        # The same bits everywhere, whatever the ranks' machines make of the same sums.
        broadcast(prototypes, *([] if targets is None else [targets]))
        online = centroids if internal and len(self.new) else None
        return PrototypeSet(source, student, prototypes, targets, labels, counts, online)
