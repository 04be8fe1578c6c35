"""Prototypes from a queue of the newest features, for loops that have no episodes of known samples.

``ProtoClipLoss`` holds an ``OnlinePrototypes``.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from protoclip.common.seeds import generator
from protoclip.distributed import Group, gather_rows, is_main, max_over_ranks, sum_over_ranks
from protoclip.episodes.prototypes import INTERNAL, PrototypeBuilder, PrototypeSet
from protoclip.ops import kmeans_assign
from protoclip.ops.checks import LEFT_OUT
from protoclip.ops.operators import untraced, without_autocast

BALANCED_ROWS = 4096  # newest rows of the queue that share a balanced assignment with a batch
BALANCED_TEMPERATURE = 0.05  # SwAV's
BALANCED_ITERATIONS = 3  # SwAV's
KEYS = "keys"  # of the samples, among the tensors of a state
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredLabels:
    """Labels of stored samples by key, over all ranks."""

    keys: Tensor  # int64 [R], sorted, distinct
    labels: Mapping[str, Tensor]  # source -> int64 [R]

    def labels_of(self, index: Tensor) -> dict[str, Tensor]:
        """The labels of a batch from each source, int64 [B]; LEFT_OUT for keys not stored."""
        place = torch.searchsorted(self.keys, index).clamp_max(len(self.keys) - 1)
        stored = self.keys[place] == index
        return {
            source: labels[place].masked_fill(~stored, LEFT_OUT)
            for source, labels in self.labels.items()
        }


@dataclass(frozen=True)
class StoredStep:
    """The features that this rank kept of one step."""

    number: int
    rows: Mapping[str, Tensor]  # modality -> [N, D]
    keys: Tensor | None  # int64 [N], of the samples; None in a loop that does not know them

    def __len__(self) -> int:
        return len(self.rows["image"])


@dataclass(eq=False)
class OnlinePrototypes:
    """The newest features of each rank, prototypes over all ranks, and the labels of a batch.

    With keys of the samples (``index``), labels are those of features that were stored when the
    sample was last seen. Without keys, a batch is assigned so that all prototypes are used alike:
    the nearest prototype would let the model choose its own labels, and it would choose only one.
    """

    builder: PrototypeBuilder  # with the group of the ranks
    queue: int  # newest pairs of this rank to cluster
    num_clusters: int  # K of k-means, over all ranks
    capacity: int = 0  # pairs of this rank that keep a label, with keys; 0: as the queue
    every: int = 0  # steps between clusterings; 0: as many as renew the queue
    warmup: int = 0  # minimum number of steps before the first clustering
    seed: int = 0  # for the first centroids; later clusterings start from the last ones
    calls_per_step: int = 1  # calls of ``observe`` with the rows of the same step
    sets: list[PrototypeSet] | None = field(default=None, init=False)
    centroids: dict[str, Tensor] = field(default_factory=dict, init=False)
    stored_labels: StoredLabels | None = field(default=None, init=False)
    steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._calls = 0
        self._clusterings = 0
        self._next = 0  # the step of the next clustering
        self._recent: deque[StoredStep] = deque()
        self._filled = 0  # pairs in ``_recent``
        self._clustered: dict[str, Tensor] = {}  # modality -> the rows that were clustered last
        self._sizes: dict[str, float] = {}
        self._accuracy: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training has changed, as tensors: the queue is this rank's, the rest is
        the same on all ranks."""
        counters = [self.steps, self._calls, self._clusterings, self._next]
        state = {"counters": torch.tensor(counters, device="cpu")}
        for step in self._recent:
            state |= {f"queue.{step.number}.{name}": rows for name, rows in step.rows.items()}
            if step.keys is not None:
                state[f"queue.{step.number}.{KEYS}"] = step.keys
        for prototype_set in self.sets or ():
            source_and_student = f"{prototype_set.source}.{prototype_set.student}"
            state[f"prototypes.{source_and_student}"] = prototype_set.prototypes
            if prototype_set.targets is not None:
                state[f"targets.{source_and_student}"] = prototype_set.targets
        if self.stored_labels is not None:
            state[f"labels.{KEYS}"] = self.stored_labels.keys
            state |= _with_prefix("labels", self.stored_labels.labels)
        newest = {name: rows[-BALANCED_ROWS:].clone() for name, rows in self._clustered.items()}
        sizes = {name: torch.tensor(size, device="cpu") for name, size in self._sizes.items()}
        state |= _with_prefix("centroids", self.centroids) | _with_prefix("clustered", newest)
        return state | _with_prefix("sizes", sizes) | _with_prefix("accuracy", self._accuracy)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a ``state_dict``, which is empty for a loss that has not begun."""
        if not state:
            return
        self.steps, self._calls, self._clusterings, self._next = state["counters"].tolist()
        rows_by_step: dict[int, dict[str, Tensor]] = {}
        for name, rows in _without_prefix("queue", state).items():
            number, _, column = name.partition(".")
            rows_by_step.setdefault(int(number), {})[column] = rows
        self._recent = deque(
            StoredStep(number, rows=rows, keys=rows.pop(KEYS, None))
            for number, rows in sorted(rows_by_step.items())  # safetensors sorts names as text
        )
        self._filled = sum(map(len, self._recent))
        targets = _without_prefix("targets", state)
        sets = []
        for source_and_student, prototypes in _without_prefix("prototypes", state).items():
            source, _, student = source_and_student.partition(".")
            sets.append(PrototypeSet(source, student, prototypes, targets.get(source_and_student)))
        self.sets = sets or None
        labels = _without_prefix("labels", state)
        keys = labels.pop(KEYS, None)
        self.stored_labels = None if keys is None else StoredLabels(keys, labels)
        self.centroids = _without_prefix("centroids", state)
        self._clustered = _without_prefix("clustered", state)
        self._sizes = {name: float(size) for name, size in _without_prefix("sizes", state).items()}
        self._accuracy = _without_prefix("accuracy", state)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a process group cannot be copied."""
        return vars(self) | {"builder": replace(self.builder, group=None)}

    @untraced
    def join(self, group: Group) -> None:
        """Cluster with the other ranks, whose group may be younger than the loss."""
        if self.builder.group is not group:
            self.builder = replace(self.builder, group=group)

    @untraced
    def move_to(self, device: torch.device) -> None:
        """Bring a loaded state to the device of the features."""
        if self._recent and self._recent[-1].rows["image"].device != device:
            self.load_state_dict({name: x.to(device) for name, x in self.state_dict().items()})

    def first_step(self, rows: int) -> int:
        """Steps of ``rows`` pairs on this rank before the first clustering."""
        return max(self.warmup, -(-self.queue // rows))

    @untraced
    def note(self, accuracy: Mapping[str, Tensor]) -> None:
        """Keep the step's prototype accuracy of each source, scalars on the device."""
        self._accuracy = {source: value.detach() for source, value in accuracy.items()}

    @untraced
    @torch.no_grad()
    def labels_of(
        self, features: Mapping[str, Tensor], index: Tensor | None
    ) -> dict[str, Tensor] | None:
        """Source -> int64 [B], the labels of a batch; None if there are no prototypes, or no keys
        were stored. ``features``: modality -> [B, D], read only without ``index``."""
        if self.sets is None:
            return None
        if index is not None:
            stored = self.stored_labels
            if stored is None:
                warnings.warn(
                    "ProtoClipLoss: index= came after steps without it; the loss has no prototypes "
                    "until all stored steps have one",
                    stacklevel=7,  # over torch.nn.Module, no_grad and untraced
                )
                return None
            return stored.labels_of(index.to(stored.keys.device))
        labels_by_source = {}
        for source, centroids in self.centroids.items():
            points = features[source].detach().to(centroids)
            queue = self._clustered[source][-BALANCED_ROWS:].to(centroids)
            labels_by_source[source] = balanced_labels(points, queue, centroids, self.builder.group)
        return labels_by_source

    @untraced
    @torch.no_grad()
    def observe(self, image: Tensor, text: Tensor, index: Tensor | None = None) -> None:
        """Add the step's features [N, D] to the queue; cluster when it is time. Only the last call
        of a step does so, so that all calls of the step see the same prototypes."""
        self._calls += 1
        if self._calls == 1 and (self.builder.group is None or is_main()):
            # A warning, because without it a short run would be plain CLIP in silence.
            LOGGER.warning(
                "protoclip: prototypes start after %d steps of %d pairs",
                self.first_step(len(image)),
                len(image),
            )
        if self._calls % self.calls_per_step:
            return
        self.steps += 1
        if index is None:
            rows = {"image": image.clone(), "text": text.clone()}
            capacity = self.queue
        else:
            rows = {
                "image": image.to(torch.bfloat16, copy=True),
                "text": text.to(torch.bfloat16, copy=True),
            }
            index = index.clone()
            capacity = max(self.queue, self.capacity)
        self._recent.append(StoredStep(self.steps, rows, index))
        self._filled += len(image)
        while self._filled - len(self._recent[0]) >= capacity:
            self._filled -= len(self._recent.popleft())
        is_due = self._filled >= self.queue and self.steps >= self.warmup
        if self._clusterings:
            is_due = self.steps >= self._next
        if is_due:
            self._build()
            rows_of_step = max(map(len, self._recent))  # the last batch of an epoch may be short
            self._next = self.steps + (self.every or -(-self.queue // rows_of_step))

    def _build(self) -> None:
        started = time.perf_counter()
        stored = {
            name: torch.cat([step.rows[name] for step in self._recent]).float() for name in INTERNAL
        }
        finite = torch.stack([rows.isfinite().all(dim=1) for rows in stored.values()]).all(dim=0)
        used = finite[-self.queue :]
        if 2 * int(used.sum()) <= len(used):  # not some skipped steps: k-means says what it is
            used = torch.ones_like(used)
        points = {name: rows[-self.queue :][used] for name, rows in stored.items()}
        random = generator(self.seed, self._clusterings)
        sets: list[PrototypeSet] = []
        for source in INTERNAL:
            clusters = self.builder.cluster(
                source, points[source], self.num_clusters, random, self.centroids.get(source)
            )
            sets += self.builder.translate(source, clusters, points)
            self.centroids[source] = clusters.centroids
            self._sizes[f"{source}_clusters"] = float(len(clusters.counts))
            self._sizes[f"{source}_size_max"] = float(clusters.counts.max())
        self._clustered = points
        self.stored_labels = self._label_stored(stored)
        self.sets = sets
        self._clusterings += 1
        if self.builder.group is None or is_main():
            seconds = time.perf_counter() - started
            LOGGER.info(
                "protoclip: prototypes of step %d in %.2f s: %s", self.steps, seconds, self._sizes
            )

    def _label_stored(self, stored: Mapping[str, Tensor]) -> StoredLabels | None:
        """The labels of all stored rows [R, D] that have a key, over all ranks; the newest row of a
        key counts."""
        keys = [step.keys for step in self._recent if step.keys is not None]
        if len(keys) < len(self._recent):
            return None
        device = stored["image"].device
        steps = [torch.full((len(step),), step.number, device=device) for step in self._recent]
        columns = {"key": torch.cat(keys).to(device), "step": torch.cat(steps)}
        for source in INTERNAL:
            nearest, _ = kmeans_assign(stored[source], self.centroids[source])
            columns[source] = nearest.where(nearest >= 0, LEFT_OUT)
        if self.builder.group is not None:
            rows = torch.stack(list(columns.values()), dim=1)
            of_all_ranks = gather_rows(rows, self.builder.group)
            columns = dict(zip(columns, of_all_ranks.unbind(dim=1), strict=True))
        by_step = columns["step"].argsort(stable=True)
        by_key = by_step[columns["key"][by_step].argsort(stable=True)]  # each key's newest last
        ordered = columns["key"][by_key]
        is_newest = torch.ones(len(ordered), dtype=torch.bool, device=device)
        is_newest[:-1] = ordered[1:] != ordered[:-1]
        newest = by_key[is_newest]
        return StoredLabels(
            keys=columns["key"][newest],
            labels={source: columns[source][newest] for source in INTERNAL},
        )

    def metrics(self) -> dict[str, float]:
        """The metrics as plain numbers; waits for the device."""
        accuracy = {f"{name}_proto_accuracy": float(hit) for name, hit in self._accuracy.items()}
        counts = {"steps": float(self.steps), "clusterings": float(self._clusterings)}
        return counts | self._sizes | accuracy


def _with_prefix(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``kind.``, without that prefix."""
    prefix = f"{kind}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def balanced_labels(batch: Tensor, queue: Tensor, centroids: Tensor, group: Group) -> Tensor:
    """Labels of a batch [B, D] under an assignment of batch and queue [Q, D] that gives every
    centroid [K, D] the same share of the rows of all ranks: int64 [B].

    Source: Caron et al. 2020 (SwAV), Sinkhorn's iterations in the log domain.
    """
    with without_autocast(batch.device.type):
        scores = torch.cat([batch, queue]) @ centroids.T / BALANCED_TEMPERATURE  # [B + Q, K]
    prices = scores.new_zeros(len(centroids))
    for _ in range(BALANCED_ITERATIONS):
        by_row = torch.logsumexp(scores + prices, dim=1, keepdim=True)
        demand = torch.logsumexp(scores - by_row, dim=0)
        if group is not None:
            top = max_over_ranks(demand.max(), group)
            demand = sum_over_ranks((demand - top).exp(), group).log() + top
        prices = -demand
    labels = (scores[: len(batch)] + prices).argmax(dim=1)
    return labels.masked_fill(~batch.isfinite().all(dim=1), LEFT_OUT)
