"""A pass over the points: the nearest centroid of each, and the means of the clusters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protoclip.lloyd.points import InMemory, OnDisk
from protoclip.lloyd.slices import PointSlice
from protoclip.ops.clusters import (
    BlockAssignment,
    Bounds,
    SegmentSums,
    assignment,
    sampled_step,
    segment_mean,
)
from protoclip.ops.dispatch import resolve

OnRows = Callable[[int, int], None]


class Assigned(NamedTuple):
    """Where each point belongs."""

    labels: Tensor  # int64 [N], the nearest centroid
    distances: Tensor  # fp32 [N], squared
    sums: SegmentSums | None = None  # of the clusters' points, if they were read for it


class InMemorySweep:
    """Passes over points in memory."""

    def __init__(self, rows: PointSlice, points: InMemory, num_clusters: int, backend: str) -> None:
        self.rows = rows
        self.num_clusters = num_clusters
        self.nearest = assignment(points.x, num_clusters, backend)

    @functools.cached_property
    def values(self) -> Tensor:
        """What is averaged."""
        return self.rows.weighted(self.nearest.points, slice(None))

    def assign(
        self, centroids: Tensor, needs_sums: bool = True, bounds: Bounds | None = None
    ) -> Assigned:
        return Assigned(*self.nearest(centroids, bounds))

    def distances(self, drawn: Sequence[Tensor]) -> Tensor:
        """Squared distances to the nearest of all centroids in ``drawn``, fp64 [N], with the bits
        of an assignment to each of its tensors [K, D]."""
        nearest = (self.nearest(centroids)[1].double() for centroids in drawn)
        return functools.reduce(torch.minimum, nearest)

    def means(self, assigned: Assigned) -> tuple[Tensor, Tensor]:
        """Means [K, D] and counts [K] of all ranks' clusters."""
        means = segment_mean(
            self.values, assigned.labels, self.num_clusters, backend=self.rows.backend
        )
        return self.rows.over_ranks(*means)

    def relabelled(self, assigned: Assigned, labels: Tensor) -> Assigned:
        """As ``assigned``, with other labels for a few points."""
        return assigned._replace(labels=labels)


class OnDiskSweep:
    """Passes over points on disk: one read assigns a block and adds it to its clusters' sums, with
    the bits of the same points in memory on a CPU."""

    def __init__(
        self,
        rows: PointSlice,
        points: OnDisk,
        num_clusters: int,
        backend: str,
        on_rows: OnRows | None,
    ) -> None:
        self.rows = rows
        self.points = points
        self.num_clusters = num_clusters
        self.on_rows = on_rows
        backend_name = resolve("kmeans_assign", backend, points.device.type, points.dtype)
        step = sampled_step(points.count)
        some = points.take(torch.arange(0, points.count, step, device="cpu"))
        self.nearest = BlockAssignment(some, num_clusters, backend_name)

    def _blocks(self) -> Iterator[tuple[Tensor, slice]]:
        """Points [B, D] and the part of all that they are; ``on_rows`` hears of each block."""
        first = 0
        for block in self.points.blocks():
            part = slice(first, first + len(block))
            yield block, part
            first = part.stop
            if self.on_rows is not None:
                self.on_rows(first, self.points.count)

    def assign(
        self, centroids: Tensor, needs_sums: bool = True, bounds: Bounds | None = None
    ) -> Assigned:
        points = self.points
        labels = torch.empty(points.count, dtype=torch.int64, device=points.device)
        distances = torch.empty(points.count, dtype=torch.float32, device=points.device)
        sums = self._no_sums() if needs_sums else None
        nearest = self.nearest.to(centroids, bounds)
        for block, part in self._blocks():
            labels[part], distances[part] = nearest(block, part)
            if sums is not None:
                sums.add(self.rows.weighted(block, part), labels[part])
        if bounds is not None:
            bounds.keep(centroids, labels, distances)
        return Assigned(labels, distances, sums)

    def distances(self, drawn: Sequence[Tensor]) -> Tensor:
        """As of points in memory, by one read of the rows."""
        assignments = [self.nearest.to(centroids) for centroids in drawn]
        distances = torch.empty(self.points.count, dtype=torch.float64, device=self.points.device)
        for block, part in self._blocks():
            nearest = (assign(block, part)[1].double() for assign in assignments)
            distances[part] = functools.reduce(torch.minimum, nearest)
        return distances

    def _no_sums(self) -> SegmentSums:
        row = self.nearest.some.new_empty(self.points.columns + (self.rows.weights is not None))
        return SegmentSums.zeros(self.num_clusters, row, self.rows.backend)

    def means(self, assigned: Assigned) -> tuple[Tensor, Tensor]:
        """Means [K, D] and counts [K] of all ranks' clusters."""
        assert assigned.sums is not None
        return self.rows.over_ranks(*assigned.sums.means())

    def relabelled(self, assigned: Assigned, labels: Tensor) -> Assigned:
        """As ``assigned``, with other labels for a few points. The points of the clusters that they
        leave or enter are read again."""
        assert assigned.sums is not None
        changed = labels != assigned.labels
        clusters = torch.cat([labels[changed], assigned.labels[changed]]).unique()
        index = torch.isin(labels, clusters).nonzero()[:, 0]
        sums = assigned.sums
        sums.clear(clusters)
        first = 0
        for block in self.points.select(index).blocks():
            part = index[first : first + len(block)]
            sums.add(self.rows.weighted(block, part), labels[part])
            first += len(block)
        return Assigned(labels, assigned.distances, sums)


Sweep = InMemorySweep | OnDiskSweep


def sweep(
    rows: PointSlice, num_clusters: int, backend: str, on_rows: OnRows | None = None
) -> Sweep:
    """Passes over a rank's points. ``on_rows``: called after each block that is read from disk,
    with the rows read so far in this pass and their number."""
    points = rows.points
    if isinstance(points, InMemory):
        return InMemorySweep(rows, points, num_clusters, backend)
    return OnDiskSweep(rows, points, num_clusters, backend, on_rows)
