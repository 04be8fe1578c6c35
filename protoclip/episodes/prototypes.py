"""Prototypes: features -> clusters -> back translation -> targets.

A source (image, text, or an external teacher) says which samples belong together. A student (image
or text) gets one prototype per cluster: the mean of its own features of that cluster's samples
(back translation, PBT; docs/algorithm.md §2-3). ``EpisodeBuilder`` makes prototypes for an episode
of known samples; ``losses.online`` from a queue, for loops of others. Both use
``PrototypeBuilder``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.files import in_percent
from protoclip.distributed import (
    Group,
    broadcast,
    is_distributed,
    is_main,
    max_over_ranks,
    own_slice,
    sum_over_ranks,
)
from protoclip.episodes.feature_store import Features
from protoclip.lloyd import Clusters, kmeans
from protoclip.lloyd.slices import global_segment_mean
from protoclip.ops import Bank, kmeans_assign, soft_targets
from protoclip.ops.checks import LEFT_OUT
from protoclip.settings.config import EpisodeConfig, default_clusters

if TYPE_CHECKING:  # both load open_clip, which a loss alone does not need
    from protoclip.data import Batch
    from protoclip.model import Encoded, ProtoModel

INTERNAL = {"image": "text", "text": "image"}  # source -> its student
EXTERNAL = "external"  # the source that is a teacher
MORE_LABELLED = 0.1  # a share of samples by which a later episode replaces the first to compare
LARGEST_SHARE = 0.2  # of the samples in one image cluster, more is a collapse


@torch.no_grad()
def extract(
    model: ProtoModel,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Features:
    """One forward pass over batches of distinct samples, in eval mode, without gradient.

    The features stay on the model's ``device``, 2 x N x Dh x 4 bytes.
    """
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, Encoded]] = []
    for batch in batches:
        image = batch.image.to(device, non_blocking=True)
        tokens = batch.tokens.to(device, non_blocking=True)
        with autocast():
            _, projected = model(image, tokens)
        parts.append((batch.index, projected))
    model.train(was_training)
    return Features(
        index=torch.cat([index for index, _ in parts]).to(device),
        image_h=torch.cat([h.image for _, h in parts]),
        text_h=torch.cat([h.text for _, h in parts]),
    )


@dataclass(frozen=True)
class PrototypeSet:
    """The clusters of one source in the space of one student; constants."""

    source: str
    student: str  # "image" | "text"
    prototypes: Tensor  # [K, Dh]
    targets: Tensor | None  # [K, Dh], rows m_y; None: hard labels, m = prototypes

    def bank(self, labels: Tensor, dtype: torch.dtype) -> Bank:
        """The prototypes with the labels of a batch, int64 [B], in the dtype of its features."""
        targets = None if self.targets is None else self.targets.to(dtype)
        return Bank(self.prototypes.to(dtype), labels, targets)


@dataclass(frozen=True)
class PrototypeBuilder:
    """Clusters one source's features and translates the clusters into the students' spaces.

    With a group, each rank holds a slice of the rows; all get the same clusters and prototypes.
    """

    config: EpisodeConfig  # settings of k-means, back translation and the internal targets
    group: Group = None

    def cluster(
        self,
        source: str,
        points: Tensor,
        num_clusters: int,
        random: torch.Generator,
        last_centroids: Tensor | None,
    ) -> Clusters:
        """Run k-means on [N, Ds] points, starting from the last centroids if warm; drop empty
        clusters unless the config keeps them."""
        config = self.config
        seed = int(torch.randint(2**31, (), generator=random, device="cpu"))
        init: str | Tensor = "random"
        if (
            config.kmeans_init == "warm"
            and last_centroids is not None
            and last_centroids.shape[1] == points.shape[1]  # not of another teacher
        ):
            init = last_centroids[:num_clusters]
        try:
            clusters = kmeans(
                points,
                num_clusters,
                num_iters=config.kmeans_max_iter,
                tol=0,
                num_restarts=1 if isinstance(init, Tensor) else config.kmeans_nredo,
                init=init,
                seed=seed,
                empty_clusters="split",  # as in the paper, and in all recorded runs
                group=self.group,
                backend=config.kmeans_backend,
                warn=False,
            )
        except ValueError as error:
            raise ValueError(
                f"prototypes: cannot cluster the {source} features ({error}); if training has "
                "diverged, lower --lr, lengthen --warmup or use --precision fp32"
            ) from error
        filled = clusters.counts > 0
        stays = torch.ones_like(filled) if config.keep_empty else filled
        return replace(
            clusters,
            centroids=clusters.centroids.where(filled[:, None], 0.0)[stays],
            labels=(stays.cumsum(0) - 1)[clusters.labels],
            counts=clusters.counts[stays],
        )

    def translate(
        self, source: str, clusters: Clusters, students: Mapping[str, Tensor]
    ) -> list[PrototypeSet]:
        """Prototypes and targets of one source in the space of each of its students: images and
        texts teach each other, a teacher teaches both. ``students``: modality -> [N, Dh], the
        features of the rows that were clustered."""
        internal = source in INTERNAL
        temperature = self.config.target_temperature
        sets = []
        for student in [INTERNAL[source]] if internal else list(students):
            prototypes = clusters.centroids
            targets = None
            if self.config.pbt or not internal:
                prototypes, _ = global_segment_mean(
                    students[student], clusters.labels, len(clusters.centroids), self.group
                )
            if internal and temperature > 0:
                centroids = clusters.centroids.to(prototypes)
                targets = soft_targets(centroids, prototypes, temperature)
            if self.group is not None:
                # Identical bits on all ranks, even if their machines round sums differently.
                broadcast(prototypes)
                if targets is not None:
                    broadcast(targets)
            sets.append(PrototypeSet(source, student, prototypes=prototypes, targets=targets))
        return sets


@dataclass(frozen=True)
class Episode:
    """The prototypes and labels that training reads until the next episode; the same on all ranks.

    The labels are those of features that were stored before the episode, or of a frozen teacher's:
    never of the features that a step is training, which would let the model choose its labels.
    """

    positions: Tensor  # int64 [M], sorted: the samples that the episode trains on
    labels: Mapping[str, Tensor]  # source -> int32 [M], LEFT_OUT: nothing is stored of the sample
    centroids: Mapping[str, Tensor]  # source -> [K, Ds], for the next warm start
    sets: tuple[PrototypeSet, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    def labels_of(self, index: Tensor) -> dict[str, Tensor]:
        """The labels of a batch from each source, int64 [B]. ``index``: positions, int64 [B]."""
        place = torch.searchsorted(self.positions, index).clamp_max(len(self.positions) - 1)
        in_episode = self.positions[place] == index
        return {
            source: labels[place].long().masked_fill(~in_episode, LEFT_OUT)
            for source, labels in self.labels.items()
        }

    def labels_by_position(self, samples: int) -> dict[str, Tensor]:
        """Source -> the label of every sample of the dataset, int64 [samples] on the CPU;
        LEFT_OUT without one."""
        by_position = {}
        for source, labels in self.labels.items():
            rows = torch.full((samples,), LEFT_OUT)
            rows[self.positions.cpu()] = labels.long().cpu()
            by_position[source] = rows
        return by_position

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and names for a checkpoint."""
        return {
            "positions": self.positions,
            "labels": dict(self.labels),
            "centroids": dict(self.centroids),
            "sets": [vars(item) for item in self.sets],
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> Episode:
        """The inverse of ``state_dict``."""

        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }

        return cls(
            positions=state["positions"].to(device),
            labels=moved(state["labels"]),
            centroids=moved(state["centroids"]),
            sets=tuple(PrototypeSet(**moved(values)) for values in state["sets"]),
            metrics=state["metrics"],
        )


class _Source(NamedTuple):
    """What is clustered."""

    name: str
    points: Tensor  # [N, Ds], of this rank's samples
    rows: Features  # the students' features of these samples
    knows_all: bool  # also the episode's samples that are not among these


class _BuiltSource(NamedTuple):
    """What one source contributes to an episode."""

    sets: list[PrototypeSet]
    labels: Tensor  # int32 [M]
    centroids: Tensor  # [K, Ds]
    metrics: dict[str, float]


@dataclass(frozen=True)
class EpisodeBuilder:
    """Makes the prototypes of every episode of a run."""

    config: EpisodeConfig
    teacher: Tensor | None = None  # [dataset, d], rows by position in the dataset
    internal: bool = True  # whether to cluster the model's own features too
    classes: Mapping[str, Tensor] = field(default_factory=dict)  # int64 [dataset], for purity

    def build(
        self,
        positions: Tensor,
        features: Features,
        random: torch.Generator,
        recent: Features | None = None,
        previous: Episode | None = None,
    ) -> Episode | None:
        """Cluster every source, translate the clusters into each student's space, and label the
        episode's samples. Returns None if no source has features of as many samples as clusters.

        Args:
            positions: int64 [M], sorted: the samples that the episode trains on.
            features: of samples of the episode; each rank has a slice, all get the same episode.
                Samples without features get no label from images and texts.
            random: CPU generator for the seeds of k-means.
            recent: features of any samples, as new as possible; a teacher knows all samples, so its
                clusters are translated by these. None: by ``features``, which are then of all
                samples of the episode.
            previous: the last episode, for the warm start.
        Raises:
            ValueError: features are not finite.
        """
        positions = positions.to(features.index.device)
        sets: list[PrototypeSet] = []
        labels: dict[str, Tensor] = {}
        centroids: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for source in self._sources(features, recent):
            built = self._build_source(source, positions, random, previous)
            if built is not None:
                sets += built.sets
                labels[source.name] = built.labels
                centroids[source.name] = built.centroids
                metrics |= built.metrics
        if not sets:
            return None
        return Episode(
            positions=positions,
            labels=labels,
            centroids=centroids,
            sets=tuple(sets),
            metrics=metrics,
        )

    def _build_source(
        self,
        source: _Source,
        positions: Tensor,
        random: torch.Generator,
        previous: Episode | None,
    ) -> _BuiltSource | None:
        """None if fewer samples than clusters have features: images and texts before the second
        pass over the data."""
        m = len(positions)
        num_clusters = clusters_for(self.config, m)
        samples = int(sum_over_ranks(torch.tensor(len(source.points), device=positions.device)))
        if samples < num_clusters:
            return None
        if not source.knows_all:  # if only some samples have features, clusters of the usual size
            num_clusters = max(1, num_clusters * samples // m)
        builder = PrototypeBuilder(self.config, dist.group.WORLD if is_distributed() else None)
        last = None if previous is None else previous.centroids.get(source.name)
        clusters = builder.cluster(source.name, source.points, num_clusters, random, last)
        students = {"image": source.rows.image_h, "text": source.rows.text_h}
        sets = builder.translate(source.name, clusters, students)
        if source.knows_all:
            index, labels = self._teacher_labels(positions, clusters.centroids)
        else:
            index = source.rows.index
            labels = clusters.labels
        all_labels = _labels_of_all_ranks(positions, index, labels)
        values = health(source.points, clusters, builder.group)
        values["empty"] = float(num_clusters - (clusters.counts > 0).sum())
        values |= self._label_health(source.name, positions, all_labels, previous)
        if source.name in INTERNAL and self.config.target_temperature > 0:
            values["target_entropy"] = target_entropy(clusters, self.config.target_temperature)
        metrics = {f"{source.name}_{name}": value for name, value in values.items()}
        return _BuiltSource(sets, all_labels, clusters.centroids, metrics)

    def _sources(self, features: Features, recent: Features | None) -> list[_Source]:
        sources = []
        if self.internal:
            sources.append(_Source("image", features.image_h, features, knows_all=False))
            sources.append(_Source("text", features.text_h, features, knows_all=False))
        if self.teacher is not None:
            rows = features if recent is None else recent
            points = self.teacher.to(rows.image_h)[rows.index]
            sources.append(_Source(EXTERNAL, points, rows, knows_all=recent is not None))
        return sources

    def _teacher_labels(self, positions: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the positions, and their nearest centroids."""
        assert self.teacher is not None
        index = positions[own_slice(len(positions))]
        labels, _ = kmeans_assign(self.teacher.to(centroids)[index], centroids)
        return index, labels

    def _label_health(
        self, source: str, positions: Tensor, labels: Tensor, previous: Episode | None
    ) -> dict[str, float]:
        """Share of samples with a label, churn since the last episode, purity by known classes."""
        labelled = labels != LEFT_OUT
        values = {"labelled": float(labelled.float().mean())}
        if previous is not None and source in previous.labels:
            before = previous.labels_of(positions)[source]
            twice = labelled & (before != LEFT_OUT)
            if twice.any():
                values["churn"] = 1 - purity(labels[twice].long(), before[twice])
        for name, ids in self.classes.items():
            values[f"purity_{name}"] = purity(labels[labelled].long(), ids[positions[labelled]])
        return values


def _labels_of_all_ranks(positions: Tensor, index: Tensor, labels: Tensor) -> Tensor:
    """int32 [M], the labels of the samples at ``positions``, from each rank's labels [N] of the
    samples at ``index`` [N]; LEFT_OUT where no rank has one."""
    of_all = torch.full((len(positions),), LEFT_OUT, dtype=torch.int32, device=positions.device)
    of_all[torch.searchsorted(positions, index.contiguous())] = labels.int()
    return max_over_ranks(of_all)


def clusters_for(config: EpisodeConfig, samples: int) -> int:
    """The number of clusters K for an episode of ``samples``, at most one per sample."""
    return min(config.num_clusters or default_clusters(samples), samples)


def check_clusters(config: EpisodeConfig, samples: int) -> int:
    """``clusters_for``; ValueError if --k is more than one per sample."""
    if config.num_clusters > samples:
        raise ValueError(
            f"--k: expected at most one cluster per sample, got k={config.num_clusters} for the "
            f"{samples} samples of an episode; use --k {default_clusters(samples)}, or a larger "
            "--episode-size"
        )
    return clusters_for(config, samples)


def health(points: Tensor, clusters: Clusters, group: Group = None) -> dict[str, float]:
    """What k-means reached, cluster sizes, and the inertia of the points [N, Ds] within clusters
    and in total: mean squared distances to their centroid and to their common mean."""
    sizes = clusters.counts.double()
    count = float(sizes.sum())
    sums = torch.cat([points.double().sum(dim=0), points.double().square().sum()[None]])
    if group is not None:
        sum_over_ranks(sums)
    total = float(sums[-1] - sums[:-1].square().sum() / count) / count
    return {
        "inertia": clusters.inertia / count,
        "inertia_total": total,
        "iterations": float(clusters.num_iters),
        "clusters": float(len(sizes)),
        "size_min": float(sizes.min()),
        "size_median": float(sizes.median()),
        "size_max": float(sizes.max()),
        "largest_share": float(sizes.max()) / count,
        "imbalance": float(sizes.max() / sizes.mean()),
    }


def target_entropy(clusters: Clusters, temperature: float) -> float:
    """Mean entropy in nats of the samples' soft targets, of at most ln K."""
    centroids = clusters.centroids.float()
    total = 0.0
    rows_at_once = max(1, 2**22 // len(centroids))  # 16 MiB of logits
    for rows, counts in zip(
        centroids.split(rows_at_once), clusters.counts.split(rows_at_once), strict=True
    ):
        logits = rows @ centroids.T / temperature
        # Two passes over the logits: exp of a tensor is slow where its results underflow.
        entropies = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
        total += float((entropies * counts).sum())
    return total / float(clusters.counts.sum())


@dataclass
class Watch:
    """Counts how often the nearest prototype is a sample's own, and sees a collapse."""

    first_inertia: float = math.nan  # within the image clusters of the first episode
    first_labelled: float = 0.0  # share of its samples that were clustered
    hits: dict[str, Tensor] = field(default_factory=dict)  # source -> [2] of this rank's samples
    device: torch.device = torch.device("cpu")  # of the hits

    def count(self, hits: Mapping[str, Tensor]) -> None:
        """Add a step's hits and labelled samples by source, [2] each; does not wait for the
        device."""
        for source, counts in hits.items():
            self.hits[source] = self.hits[source] + counts if source in self.hits else counts

    def accuracy(self) -> dict[str, float]:
        """Prototype accuracy by source since the last call, over all ranks; a collective call."""
        sums = {source: sum_over_ranks(counts.clone()) for source, counts in self.hits.items()}
        self.hits = {}
        return {f"{name}_proto_accuracy": float(hits / seen) for name, (hits, seen) in sums.items()}

    def begin(self, episode: Episode) -> tuple[Episode, str]:
        """The episode with the prototype accuracy of the one before among its metrics, and one
        sentence if its image prototypes have collapsed, else ""; a collective call."""
        episode = replace(episode, metrics={**episode.metrics, **self.accuracy()})
        return episode, self.collapse(episode.metrics)

    def collapse(self, metrics: Mapping[str, float]) -> str:
        """One sentence if an episode's image prototypes have collapsed, else ""; ``metrics``: of
        the episode, with the prototype accuracy of the episode before."""
        # The first episode may know hardly more samples than it has clusters: its inertia is near
        # zero and nothing to compare with.
        labelled = metrics.get("image_labelled", 0.0)
        if labelled > self.first_labelled + MORE_LABELLED or math.isnan(self.first_inertia):
            self.first_inertia = metrics.get("image_inertia", math.nan)
            self.first_labelled = labelled
        return collapse(metrics, self.first_inertia)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the counts of all ranks; a collective call."""
        hits = {name: sum_over_ranks(counts.clone()) for name, counts in self.hits.items()}
        first = {"first_inertia": self.first_inertia, "first_labelled": self.first_labelled}
        return {**first, "hits": hits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what any number of ranks wrote; rank 0 keeps the counts of all."""
        self.first_inertia = float(state["first_inertia"])
        self.first_labelled = float(state["first_labelled"])
        self.hits = {
            name: counts.to(self.device) * float(is_main())
            for name, counts in state["hits"].items()
        }


def collapse(metrics: Mapping[str, float], first_inertia: float) -> str:
    """One sentence if an episode's image prototypes have collapsed, else "".

    Captions that repeat are alike and fall into one cluster, so only the images count.

    Args:
        metrics: of an episode; ``image_proto_accuracy`` is that of the episode before.
        first_inertia: ``image_inertia`` of the run's first episode with prototypes.
    """
    if "image_inertia" not in metrics:
        return ""
    inertia = metrics["image_inertia"]
    clusters = metrics["image_clusters"]
    accuracy = metrics.get("image_proto_accuracy", math.nan)
    share = metrics["image_largest_share"]
    if share > max(LARGEST_SHARE, 5 / clusters):
        sign = f"one image cluster holds {in_percent(share)} of the samples"
    elif inertia < first_inertia / 10 and (accuracy > 0.9 or accuracy < 2 / clusters):
        sign = (
            f"the inertia within image clusters fell from {first_inertia:.3g} to {inertia:.3g} and "
            f"prototype accuracy is {accuracy:.2f}"
        )
    else:
        return ""
    return (
        f"the image prototypes are collapsing: {sign}; lower --lr or the weight of "
        "--w-proto (1 unless given), add an --external-teacher, or use --episode-features extract"
    )


def purity(labels: Tensor, classes: Tensor) -> float:
    """Share of samples in the most common class of their cluster; int64 [N] each, N > 0."""
    first = int(classes.min())  # -1 where some are unknown
    num_classes = int(classes.max()) - first + 1
    pairs, sizes = torch.unique(labels * num_classes + (classes - first), return_counts=True)
    largest = torch.zeros(int(labels.max()) + 1, dtype=sizes.dtype, device=sizes.device)
    largest.scatter_reduce_(0, pairs // num_classes, sizes, "amax")
    return float(largest.sum()) / len(labels)
