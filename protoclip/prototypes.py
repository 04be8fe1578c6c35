"""Prototypes: features -> clusters -> back translation -> targets.

A source (image, text, or an external teacher) says which samples belong together. A student (image
or text) gets one prototype per cluster: the mean of its own features of that cluster's samples
(back translation, PBT; docs/algorithm.md §2-3). ``EpisodeBuilder`` makes prototypes for an episode
of known samples, ``OnlinePrototypes`` from a queue, for loops without sample indices; both use
``PrototypeBuilder``. The losses that read prototypes are in ``protoclip.losses``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from protoclip.config import EpisodeConfig
from protoclip.distributed import (
    Group,
    all_ranks,
    broadcast,
    gather_rows,
    generator,
    is_distributed,
    is_main,
    max_over_ranks,
    own_slice,
    rank,
    sum_over_ranks,
    world_size,
)
from protoclip.kmeans import Clusters, global_segment_mean, kmeans
from protoclip.ops import Bank, kmeans_assign, soft_targets

if TYPE_CHECKING:  # both load open_clip, which a loss alone does not need
    from protoclip.data import Batch
    from protoclip.model import Encoded, ProtoModel

IGNORE = -100  # label of a sample that belongs to no cluster, as in torch's cross-entropy
INTERNAL = {"image": "text", "text": "image"}  # source -> its student
EXTERNAL = "external"  # the source that is a teacher
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Features:
    """Features of N distinct samples, fp32, on the model's device."""

    index: Tensor  # int64 [N], position in the dataset
    image_h: Tensor  # [N, Dh], unit rows
    text_h: Tensor  # [N, Dh], unit rows


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


class FeatureStore:
    """Keeps the projections of one episode for the next, which saves an extra forward pass.

    A rank keeps the rows it computed, 2 x steps x batch_size / ranks x Dh x 4 bytes, for the
    longest episode. The state holds the rows of all ranks in the order of the episode's draws, so
    it does not depend on the number of ranks.
    """

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        self.share = batch_size // world_size()  # rows of a step on each rank
        rows = steps * self.share
        self.index = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.h = torch.empty(0, device=device)  # [rows, 2, Dh] fp32, image and text, after put

    @torch.no_grad()
    def put(self, step: int, index: Tensor, projected: Encoded) -> None:
        """Keep this rank's projections, [B, Dh] each, from one step of the episode. ``index`` holds
        the samples; -1 marks a row that does not count."""
        if not len(self.h):
            self.h = self.h.new_zeros(len(self.index), 2, projected.image.shape[1])
        rows = slice(step * self.share, step * self.share + len(index))
        self.index[rows] = index
        self.h[rows] = torch.stack([projected.image, projected.text], dim=1)

    def features(self) -> Features:
        """The newest row of each sample over all ranks; a collective call.

        Each rank gets a slice in the order of the dataset, as a single rank would have it.
        """
        index, order = self._by_draw(self.index).sort(stable=True)
        last = torch.ones_like(index, dtype=torch.bool)
        last[:-1] = index[1:] != index[:-1]
        last &= index >= 0
        index, order = index[last], order[last]
        own = own_slice(len(order))
        return Features(index[own], *self._by_draw(self.h)[order[own]].unbind(1))

    def _by_draw(self, rows: Tensor) -> Tensor:
        """[rows, ...] of each rank -> [rows * W, ...], step by step."""
        if not is_distributed():
            return rows
        by_rank = gather_rows(rows).view(world_size(), -1, self.share, *rows.shape[1:])
        return by_rank.transpose(0, 1).flatten(0, 2)

    def state_dict(self) -> dict[str, Tensor]:
        """The rows of all ranks in draw order, for a checkpoint; a collective call."""
        rows = {"index": self.index} | ({"h": self.h} if len(self.h) else {})
        return {name: self._by_draw(tensor) for name, tensor in rows.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load this rank's rows of a ``state_dict`` that any number of ranks wrote."""
        for name, rows in state.items():
            own = rows.unflatten(0, (-1, world_size(), self.share))[:, rank()].flatten(0, 1)
            setattr(self, name, own.to(self.index.device).contiguous())


@dataclass(frozen=True)
class PrototypeSet:
    """The clusters of one source in the space of one student; constants."""

    source: str
    student: str  # "image" | "text"
    clustering: Clusters  # labels int64 [dataset], IGNORE if unknown; for a queue: [its rows]
    prototypes: Tensor  # [K, Dh]
    targets: Tensor | None  # [K, Dh], rows m_y; None: hard labels, m = prototypes
    labels_new: bool  # whether samples without a label get that of the nearest centroid

    def bank(self, features: Mapping[str, Tensor], index: Tensor | None) -> Bank:
        """The prototypes with the labels of a batch, in the dtype of the student's features. The
        labels are those of ``index``, positions in the dataset [B], or without it those of the
        nearest centroids. ``features``: modality -> [B, Dh], unit rows."""
        labels = None if index is None else self.clustering.labels[index]
        if labels is None or self.labels_new:
            centroids = self.clustering.centroids
            nearest, _ = kmeans_assign(features[self.source].detach(), centroids)
            nearest = nearest.masked_fill(nearest < 0, IGNORE)  # a row that is not finite
            labels = nearest if labels is None else torch.where(labels == IGNORE, nearest, labels)
        dtype = features[self.student].dtype
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
        last: Clusters | None,
    ) -> Clusters:
        """Run k-means on [N, Ds] points, starting from the centroids of ``last`` if warm; drop
        empty clusters unless the config keeps them."""
        seed, config = int(torch.randint(2**31, (), generator=random)), self.config
        init: str | Tensor = "random"
        if config.kmeans_init == "warm" and last is not None:
            init = last.centroids[:num_clusters]
        try:
            found = kmeans(
                points,
                num_clusters,
                num_iters=config.kmeans_max_iter,
                num_restarts=config.kmeans_nredo,
                init=init,
                seed=seed,
                group=self.group,
                backend=config.kmeans_backend,
            )
        except ValueError as error:
            raise ValueError(
                f"prototypes: cannot cluster the {source} features ({error}); if training has "
                "diverged, lower --lr, lengthen --warmup or use --precision fp32"
            ) from error
        filled = found.counts > 0
        kept = torch.ones_like(filled) if config.keep_empty else filled
        return replace(
            found,
            centroids=found.centroids.where(filled[:, None], 0.0)[kept],
            labels=(kept.cumsum(0) - 1)[found.labels],
            counts=found.counts[kept],
        )

    def translate(
        self,
        source: str,
        clustering: Clusters,
        rows: Tensor,
        students: Mapping[str, Tensor],
        labels_new: bool = False,
    ) -> list[PrototypeSet]:
        """Prototypes and targets of one source in the space of each of its students: images and
        texts teach each other, a teacher teaches both. ``students``: modality -> [N, Dh]; ``rows``,
        int64 [N], are their positions in ``clustering.labels``."""
        centroids, labels = clustering.centroids, clustering.labels[rows]
        internal, temperature = source in INTERNAL, self.config.target_temperature
        sets = []
        for student in [INTERNAL[source]] if internal else list(students):
            prototypes, targets = centroids, None
            if self.config.pbt or not internal:
                values = students[student]
                prototypes, _ = global_segment_mean(values, labels, len(centroids), self.group)
            if internal and temperature > 0:
                targets = soft_targets(centroids.to(prototypes), prototypes, temperature)
            if self.group is not None:
                # Identical bits on all ranks, even if their machines round sums differently.
                broadcast(prototypes, *([] if targets is None else [targets]))
            sets.append(PrototypeSet(source, student, clustering, prototypes, targets, labels_new))
        return sets


@dataclass(frozen=True)
class Episode:
    """The prototypes that training reads until the next episode, and metrics about them."""

    sets: tuple[PrototypeSet, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def clusterings(self) -> dict[str, Clusters]:
        """The clustering of each source."""
        return {one.source: one.clustering for one in self.sets}


@dataclass(frozen=True)
class EpisodeBuilder:
    """Makes the prototypes of every episode of a run."""

    config: EpisodeConfig
    samples: int  # of the dataset
    teacher: Tensor | None = None  # [dataset, d], rows by position in the dataset
    internal: bool = True  # whether to cluster the model's own features too
    classes: Mapping[str, Tensor] = field(default_factory=dict)  # int64 [dataset], for purity

    def build(
        self,
        features: Features,
        random: torch.Generator,
        previous: Episode | None = None,
        coming: Tensor | None = None,
    ) -> Episode:
        """Cluster every source and translate the clusters into each student's space.

        Args:
            features: features of N samples; each rank has a slice, all get the same episode.
            random: CPU generator for the seeds of k-means.
            previous: the last episode, for the warm start.
            coming: int64 [M], positions that will be trained on. Positions without features get
                the label of the nearest centroid: a teacher's now, the model's own during training.
        Raises:
            ValueError: features are not finite.
        """
        config = self.config
        count = torch.tensor(len(features.index), device=features.index.device)
        samples = int(sum_over_ranks(count))
        # The last episode of a run may have fewer samples than the others.
        num_clusters = min(config.num_clusters, samples) or max(1, samples // 10)
        students = {"image": features.image_h, "text": features.text_h}
        sources = dict(students) if self.internal else {}
        teacher = None if self.teacher is None else self.teacher.to(features.image_h)
        if teacher is not None:
            sources[EXTERNAL] = teacher[features.index]
        builder = PrototypeBuilder(config, all_ranks())
        before = previous.clusterings if previous else {}
        sets: list[PrototypeSet] = []
        metrics: dict[str, float] = {}
        for source, points in sources.items():
            last = before.get(source)
            found = builder.cluster(source, points, num_clusters, random, last)
            labels = torch.full((self.samples,), IGNORE, device=points.device)
            labels[features.index] = found.labels
            max_over_ranks(labels)  # each rank knows the labels of its own samples
            found = replace(found, labels=labels)
            new = features.index[:0] if coming is None else coming.to(labels.device)
            new = new[labels[new] == IGNORE].unique()
            if source == EXTERNAL and teacher is not None and len(new):
                labels[new] = kmeans_assign(teacher[new], found.centroids)[0]
            values = health(found, last, self.classes)
            values["empty"] = float(num_clusters - (found.counts > 0).sum())
            metrics |= {f"{source}_{name}": value for name, value in values.items()}
            labels_new = source in INTERNAL and len(new) > 0
            sets += builder.translate(source, found, features.index, students, labels_new)
        return Episode(tuple(sets), metrics)


def check_clusters(config: EpisodeConfig, samples: int) -> int:
    """The number of clusters K for an episode of ``samples``.

    Raises:
        ValueError: there are more clusters than samples.
    """
    num_clusters = config.num_clusters or max(1, samples // 10)
    if num_clusters > samples:
        raise ValueError(
            f"--k: expected at most one cluster per sample, got k={num_clusters} for the {samples} "
            f"samples of an episode; use --k {max(1, samples // 10)}, or a larger --episode-size"
        )
    return num_clusters


def health(
    clustering: Clusters, last: Clusters | None, classes: Mapping[str, Tensor]
) -> dict[str, float]:
    """Sizes of the clusters, churn since the last episode, purity by known classes [dataset]."""
    sizes = clustering.counts.double()
    values = {
        "inertia": clustering.inertia / float(sizes.sum()),
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
    """Share of samples in the most common class of their cluster; int64 [N] each, N > 0."""
    pairs, sizes = torch.unique(torch.stack([labels, classes]), dim=1, return_counts=True)
    largest = torch.zeros(int(labels.max()) + 1, dtype=sizes.dtype, device=sizes.device)
    largest.scatter_reduce_(0, pairs[0], sizes, "amax")
    return float(largest.sum()) / len(labels)


@dataclass(eq=False)
class OnlinePrototypes:
    """The newest features of each rank, and prototypes over all ranks."""

    builder: PrototypeBuilder  # with the group of the ranks
    queue: int  # pairs that this rank keeps
    num_clusters: int  # K of k-means, over all ranks
    every: int = 0  # steps between clusterings; 0: as many as renew the queue
    warmup: int = 0  # minimum number of steps before the first clustering
    seed: int = 0  # for the first centroids; later clusterings start from the last ones
    calls_per_step: int = 1  # calls of ``observe`` with the rows of the same step
    current: list[PrototypeSet] | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._calls = self._clusterings = self._filled = self._next = 0
        self._recent: deque[dict[str, Tensor]] = deque()  # per step: modality -> [N, D]
        self._sizes: dict[str, float] = {}
        self._accuracy: dict[str, Tensor] = {}

    def first_step(self, rows: int) -> int:
        """Steps of ``rows`` pairs on this rank before the first clustering."""
        return max(self.warmup, -(-self.queue // rows))

    @torch._disable_dynamo  # torch.compiler.disable would load dynamo and triton (1.6 s)
    def note(self, accuracy: Mapping[str, Tensor]) -> None:
        """Keep the step's prototype accuracy of each student, scalars on the device."""
        self._accuracy = {student: value.detach() for student, value in accuracy.items()}

    @torch._disable_dynamo
    @torch.no_grad()
    def observe(self, image: Tensor, text: Tensor) -> None:
        """Add the step's features [N, D] to the queue; cluster when it is time. Only the last call
        of a step does so, so that all calls of the step see the same prototypes."""
        self._calls += 1
        if self._calls % self.calls_per_step:
            return
        if not self.steps:
            self._next = self.first_step(len(image))
        self.steps += 1
        self._recent.append({"image": image.clone(), "text": text.clone()})
        self._filled += len(image)
        while self._filled - len(self._recent[0]["image"]) >= self.queue:
            self._filled -= len(self._recent.popleft()["image"])
        if self.steps >= self._next:
            self._build()
            self._next = self.steps + (self.every or -(-self.queue // len(image)))

    def _build(self) -> None:
        started = time.perf_counter()
        points = {
            name: torch.cat([step[name] for step in self._recent])[-self.queue :].float()
            for name in INTERNAL
        }
        before = {one.source: one.clustering for one in self.current or ()}
        random = generator(self.seed, self._clusterings)
        current: list[PrototypeSet] = []
        for source in INTERNAL:
            found = self.builder.cluster(
                source, points[source], self.num_clusters, random, before.get(source)
            )
            rows = torch.arange(len(points[source]), device=found.labels.device)
            current += self.builder.translate(source, found, rows, points)
            self._sizes[f"{source}_clusters"] = float(len(found.counts))
            self._sizes[f"{source}_size_max"] = float(found.counts.max())
        self.current = current
        self._clusterings += 1
        if self.builder.group is None or is_main():
            seconds, sizes = time.perf_counter() - started, self._sizes
            LOGGER.info(
                "protoclip: prototypes of step %d in %.2f s: %s", self.steps, seconds, sizes
            )

    def metrics(self) -> dict[str, float]:
        """The metrics as plain numbers; waits for the device."""
        accuracy = {f"{name}_proto_accuracy": float(hit) for name, hit in self._accuracy.items()}
        counts = {"steps": float(self.steps), "clusterings": float(self._clusterings)}
        return counts | self._sizes | accuracy
