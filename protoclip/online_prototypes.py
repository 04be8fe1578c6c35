"""A queue of features and the prototypes made from it, for loops that know no sample index."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.kmeans import kmeans
from protoclip.ops import segment_mean, soft_targets

LOGGER = logging.getLogger(__name__)
INTERNAL = (("image", "text"), ("text", "image"))  # source, its student


@dataclass(frozen=True)
class PrototypeSet:
    """One modality's clusters as the other one sees them; constants, fp32."""

    source: str
    student: str
    centroids: Tensor  # [K, D] in the source's space: a sample's cluster is the nearest
    prototypes: Tensor  # [K, D] in the student's space
    targets: Tensor | None  # [K, D], rows m_y; None: hard labels


class OnlinePrototypes:
    """The newest features of each rank, and prototypes over all ranks.

    Args:
        queue: pairs that this rank keeps.
        clusters: k-means' K, over all ranks.
        every: steps between clusterings; 0: as many as renew the queue.
        warmup: steps before the first clustering, at least.
        temperature: of the soft targets; 0: hard labels.
        num_iters: of k-means.
        pbt: prototypes are means in the student's space; else the source's centroids.
        seed: of the first centroids; later ones start from the last.
        distributed: sum over the default process group.
        calls_per_step: calls of ``observe`` with the rows of one and the same step.
    """

    def __init__(
        self,
        *,
        queue: int,
        clusters: int,
        every: int,
        warmup: int,
        temperature: float,
        num_iters: int,
        pbt: bool,
        seed: int,
        distributed: bool,
        calls_per_step: int = 1,
    ) -> None:
        self.queue, self.clusters = queue, clusters
        self.every, self.warmup = every, warmup
        self.temperature, self.num_iters, self.pbt, self.seed = temperature, num_iters, pbt, seed
        self.distributed, self.calls_per_step = distributed, calls_per_step
        self.current: tuple[PrototypeSet, ...] | None = None
        self.steps = 0
        self._calls = 0
        self._clusterings = 0
        self._rows: dict[str, Tensor] = {}  # modality -> [queue, D], the first _filled are in use
        self._filled = 0
        self._cursor = 0
        self._warm: dict[str, Tensor] = {}  # modality -> [clusters, D], the last centroids
        self._sizes: dict[str, float] = {}
        self._hits: list[Tensor] = []
        self._next = 0

    def first_step(self, rows: int) -> int:
        """Steps of ``rows`` pairs on this rank before the first clustering."""
        return max(self.warmup, -(-self.queue // rows))

    @torch.compiler.disable
    def note(self, hits: list[Tensor]) -> None:
        """Keep the prototype accuracies of the step, scalars on the device."""
        self._hits = [hit.detach() for hit in hits]

    @torch.compiler.disable
    @torch.no_grad()
    def observe(self, image: Tensor, text: Tensor) -> None:
        """Take the step's features [N, D] in; cluster when it is time. The last of a step's calls
        does it, so that all of them see the same prototypes."""
        self._calls += 1
        if self._calls % self.calls_per_step:
            return
        rows = {"image": image, "text": text}
        if not self._rows:
            self._rows = {name: x.new_zeros(self.queue, x.shape[1]) for name, x in rows.items()}
            self._next = self.first_step(len(image))
        self.steps += 1
        self._push(rows)
        if self.steps >= self._next:
            self._cluster()
            self._next = self.steps + (self.every or -(-self.queue // len(image)))

    def _push(self, rows: dict[str, Tensor]) -> None:
        count = min(len(rows["image"]), self.queue)
        place = torch.arange(self._cursor, self._cursor + count, device=rows["image"].device)
        for name, x in rows.items():
            kept = x[len(x) - count :].to(self._rows[name].dtype)
            self._rows[name].index_copy_(0, place % self.queue, kept)
        self._cursor = (self._cursor + count) % self.queue
        self._filled = min(self._filled + count, self.queue)

    def _cluster(self) -> None:
        started = time.perf_counter()
        points = {name: x[: self._filled].float() for name, x in self._rows.items()}
        self.current = tuple(
            self._translate(source, student, points) for source, student in INTERNAL
        )
        self._clusterings += 1
        if not self.distributed or dist.get_rank() == 0:
            sizes = ", ".join(f"{name} {size:g}" for name, size in self._sizes.items())
            LOGGER.info(
                "protoclip: prototypes of step %d in %.2f s: %s",
                self.steps,
                time.perf_counter() - started,
                sizes,
            )

    def _translate(self, source: str, student: str, points: dict[str, Tensor]) -> PrototypeSet:
        """Clusters of one modality, warm-started; the empty ones are left out."""
        try:
            found = kmeans(
                points[source],
                self.clusters,
                num_iters=self.num_iters,
                init=self._warm.get(source, "random"),
                seed=self.seed,
                group=dist.group.WORLD if self.distributed else None,
            )
        except ValueError as error:
            raise ValueError(
                f"ProtoClipLoss: cannot cluster the {source} features of the queue ({error}); "
                "if they are not finite, training has diverged: lower --lr or lengthen --warmup"
            ) from error
        self._warm[source] = found.centroids
        kept = found.counts > 0
        labels = (kept.cumsum(0) - 1)[found.labels]
        centroids, counts = found.centroids[kept], found.counts[kept]
        self._sizes[f"{source}_clusters"] = float(len(counts))
        self._sizes[f"{source}_size_max"] = float(counts.max())
        prototypes = centroids
        if self.pbt:
            prototypes = self._means(points[student], labels, len(counts))
        targets = None
        if self.temperature > 0:
            targets = soft_targets(centroids, prototypes, self.temperature)
        return PrototypeSet(source, student, centroids, prototypes, targets)

    def _means(self, values: Tensor, labels: Tensor, num_segments: int) -> Tensor:
        """Mean of each cluster's values over all ranks: [K, D]."""
        means, counts = segment_mean(values, labels, num_segments)
        if not self.distributed:
            return means
        sums = means.double() * counts[:, None]
        dist.all_reduce(sums)
        dist.all_reduce(counts)
        return (sums / counts.clamp_min(1)[:, None]).to(means.dtype)

    def metrics(self) -> dict[str, float]:
        """Plain numbers; waits for the device."""
        values = {"steps": float(self.steps), "clusterings": float(self._clusterings)}
        values |= self._sizes
        for (_, student), hit in zip(INTERNAL, self._hits, strict=False):
            values[f"{student}_proto_accuracy"] = float(hit)
        return values
