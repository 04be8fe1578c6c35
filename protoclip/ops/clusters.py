"""Nearest centroid and mean of the rows of each segment: contract and dispatch. No gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.ops import checks, reference
from protoclip.ops.dispatch import TABLE, Backend, function, resolve
from protoclip.ops.operators import empty, in_transform, operator, without_autocast

SAMPLED = 256  # points that the C++ looks at before it codes them: kSample in kmeans_centroids.h


class Assignment(NamedTuple):
    """Where each point belongs."""

    labels: Tensor  # int64 [N], the nearest centroid
    distances: Tensor  # fp32 [N], squared


def _assign_shapes(arguments: Any) -> Assignment:
    points = arguments.points
    n = points.shape[0]
    return Assignment(
        labels=points.new_empty(n, dtype=torch.int64),
        distances=points.new_empty(n, dtype=torch.float32),
    )


@operator("kmeans_assign", _assign_shapes, Assignment)
def _kmeans_assign(points: Tensor, centroids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    run = function("kmeans_assign", backend, "kmeans_assign")
    return run(points=points, centroids=centroids)


@torch.no_grad()
def kmeans_assign(
    points: Tensor, centroids: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, exactly, without the [N, K] distances in memory.

    A label differs from the one in fp64 only where the squared distances to both centroids agree
    to fp32 rounding.

    Args:
        points: [N, D]; float32, bfloat16, float16 (float64: reference), any strides.
        centroids: [K, D], finite, on the same device; different dtypes are promoted.
        backend: "auto" or a row of ``protoclip.backends("kmeans_assign")``.
    Returns:
        labels int64 [N] (ties go to the lowest index; -1 for a point with NaN, any for one with
        inf) and squared Euclidean distances fp32 [N] (NaN for a point with NaN).
    Raises:
        ValueError, TypeError: shapes or devices disagree, K = 0 with N > 0, or the named backend
            cannot run.

    Example:
        >>> points, centroids = torch.tensor([[0.0], [9.0]]), torch.tensor([[1.0], [10.0]])
        >>> protoclip.kmeans_assign(points, centroids)
        Assignment(labels=tensor([0, 1]), distances=tensor([1., 1.]))
    """
    op = "kmeans_assign"
    checks.matrix(op, "points", points, "[N, D]")
    checks.matrix(op, "centroids", centroids, "[K, D]")
    checks.like(op, "points", points, "centroids", centroids)
    n, k = points.shape[0], centroids.shape[0]
    if n and not k:
        raise ValueError(f"{op}: expected K >= 1 centroids for N = {n} points, got 0")
    points, centroids = checks.promoted(points, centroids)
    backend_name = resolve(op, backend, points.device.type, points.dtype)
    with without_autocast(points.device.type):
        return _kmeans_assign(points=points, centroids=centroids, backend=backend_name)


class KMeansIteration(NamedTuple):
    """What an iteration of Lloyd's algorithm does; in C++ it is one op, ``kmeans_iteration``, with
    the bits of the steps that ``lloyd.loop`` makes it of.

    It takes points [N, D] and their ``codes``, the centroids with their labels and distances, and
    ``values``: what is averaged, the points, or weight x point and weight, [N, D + 1]; ``weights``
    are fp64 [N] in units of ``weight``, None if all are equal; ``centre`` [D] was subtracted from
    the points, if anything. Centroids have moved if their squared distances add up to more than
    ``limit``.
    """

    centroids: Tensor  # [K, D], updated; a cluster without points keeps its own
    counts: Tensor  # int64 [K], the points of the clusters before the update
    facts: Tensor  # fp64 [3]: inertia before it, whether centroids moved, whether some are empty
    labels: Tensor  # int64 [N], of the updated centroids; [0] if none moved or some are empty
    distances: Tensor  # fp32 [N] or [0]


# With fewer clusters, or products N x K x D of an assignment, bounds do not pay: on Zen 4 whole
# runs over normal points take 1.1 to 1.8 of the time at 1.4e8 products, .74 to .93 at 5e8 to 1e9.
BOUNDED_CLUSTERS, BOUNDED_PRODUCTS = 256, 1 << 29
BOUND_BYTES = 64  # of a point: kBoundsSize in kmeans_reassign_cpu.cpp
MOST_BOUND_BYTES = 1 << 30
BALLS = 1024  # centroids whose distances to each other are measured to group them


class Bounds:
    """What is known of the points' distances to k-means' centroids from one assignment to the next,
    so that an assignment computes only what may have changed (Yinyang k-means). Nothing at first.
    Labels and distances have the bits of ``kmeans_assign``, whatever is known."""

    def __init__(self, backend: Backend) -> None:
        self.share = 1.0  # of the products, that the last assignment took
        self._backend = backend
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # centroids, labels, distances
        self._order: Tensor | None = None  # int64 [K], centroids that are near each other together
        self._records = torch.empty(0)  # uint8 [N, BOUND_BYTES]
        self._prepared: list[Tensor] = []  # the centroids of the assignment that is being made

    @property
    def is_empty(self) -> bool:
        return self._last is None

    def to(self, centroids: Tensor, some: Tensor, is_coded: bool) -> None:
        """Begin an assignment to these centroids [K, D]. ``some``: sampled points [M, D]."""
        assert self._last is not None
        if self._order is None:  # they are means now, no longer points
            size = self._backend.function("kmeans_group_size")(len(centroids))
            self._order = _grouped(centroids.float(), size)
            self._records = torch.zeros(len(self._last[1]), BOUND_BYTES, dtype=torch.uint8)
        self._prepared = self._backend.function("kmeans_prepare")(
            centroids=centroids, some=some.float(), coded=is_coded, order=self._order
        )
        self.share = 0.0

    def assign(self, points: Tensor, part: slice, codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels and squared distances of the points [B, D] in this part of all."""
        assert self._last is not None
        centroids, labels, distances = self._last
        new_labels, new_distances, share = self._backend.function("kmeans_reassign")(
            points=points,
            prepared=self._prepared,
            order=self._order,
            codes=codes,
            previous=centroids,
            labels=labels[part],
            distances=distances[part],
            bounds=self._records[part],
        )
        self.share += share * len(points) / len(labels)
        return new_labels, new_distances

    def keep(self, centroids: Tensor, labels: Tensor, distances: Tensor) -> None:
        """What the assignment found."""
        self._last = centroids, labels, distances


def bounds_for(num_points: int, num_clusters: int, columns: int, backend: str) -> Bounds | None:
    """Empty bounds where a backend can use them and they pay."""
    row = TABLE["kmeans_assign"][backend]
    products = num_points * num_clusters * columns
    pays = num_clusters >= BOUNDED_CLUSTERS and products >= BOUNDED_PRODUCTS
    is_screened = row.runs_kmeans and num_clusters * columns > row.most_measured
    fits = 0 < num_points * BOUND_BYTES <= MOST_BOUND_BYTES
    return Bounds(row) if is_screened and pays and fits else None


def _grouped(centroids: Tensor, size: int) -> Tensor:
    """An order of centroids [K, D], int64 [K], whose runs of ``size`` are near each other: halves
    along a direction of large variance until ``BALLS`` are left, then balls."""
    pending, runs = [torch.arange(len(centroids))], []
    while pending:
        index = pending.pop()
        rows = centroids[index]
        if len(index) <= max(BALLS, size):
            runs.append(index[_balls(rows, size)])
            continue
        rows = rows - rows.mean(0)
        direction = rows[rows.square().sum(1).argmax()]
        for _ in range(4):  # of power iteration
            direction = torch.nn.functional.normalize((rows @ direction) @ rows, dim=0)
        along = (rows @ direction).argsort(stable=True)
        half = max(1, len(index) // size // 2) * size
        pending += [index[along[half:]], index[along[:half]]]
    return torch.cat(runs)


def _balls(rows: Tensor, size: int) -> Tensor:
    """An order of rows [M, D] that begins with the densest ball of ``size`` rows, then that of the
    rest, and so on."""
    distances = torch.cdist(rows, rows)
    some = distances[:, ::4]
    radius = some.kthvalue(min(-(-size // 4), some.shape[1]), dim=1).values
    taken = torch.zeros(len(rows), dtype=torch.bool)
    runs = []
    while int(taken.sum()) + size < len(rows):
        centre = radius.where(~taken, torch.inf).argmin()
        near = distances[centre].where(~taken, torch.inf).topk(size, largest=False).indices
        runs.append(near)
        taken[near] = True
    return torch.cat([*runs, (~taken).nonzero()[:, 0]])


@dataclass(frozen=True)
class PointsAssignment:
    """``kmeans_assign`` of the same points, for many calls, with the same bits."""

    points: Tensor  # [N, D]
    backend: str  # a row of the table
    codes: list[Tensor]  # what the backend keeps of the points, if anything

    def __call__(self, centroids: Tensor, bounds: Bounds | None = None) -> tuple[Tensor, Tensor]:
        """Centroids [K, D] -> labels and squared distances. ``bounds``: of the same points."""
        if bounds is None:
            return self._assign(centroids)
        if bounds.is_empty:
            labels, distances = self._assign(centroids)
        else:
            bounds.to(centroids, self.points[:: sampled_step(len(self.points))], bool(self.codes))
            labels, distances = bounds.assign(self.points, slice(None), self.codes)
        bounds.keep(centroids, labels, distances)
        return labels, distances

    def _assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        if not self.codes:
            return self.function("kmeans_assign")(points=self.points, centroids=centroids)
        run = self.function("kmeans_assign_coded")
        return run(points=self.points, centroids=centroids, codes=self.codes)

    @property
    def runs_kmeans(self) -> bool:
        """Whether the backend has ``kmeans_greedy_start`` and ``kmeans_iteration``."""
        return TABLE["kmeans_assign"][self.backend].runs_kmeans

    def function(self, name: str) -> Callable[..., Any]:
        """Another function of the same backend."""
        return function("kmeans_assign", self.backend, name)


def assignment(points: Tensor, num_clusters: int, backend: str) -> PointsAssignment:
    """``kmeans_assign`` of these points as a function of centroids [K, D], with the same bits.

    It is for many calls: the form in which products take fp32 points is computed once and kept.
    C++: 8-bit codes, N (D + 16) bytes, where coding takes 4 % of an assignment or more. CUDA: two
    bfloat16 parts, 4 N D bytes; Triton: one, 2 N D. A GPU always keeps them: a single assignment
    takes as much.
    """
    backend_name = resolve("kmeans_assign", backend, points.device.type, points.dtype)
    codes: list[Tensor] = []
    if _keeps_codes(backend_name, num_clusters, points):
        codes = function("kmeans_assign", backend_name, "kmeans_encode")(points)
    return PointsAssignment(points, backend_name, codes)


def sampled_step(num_points: int) -> int:
    """Every how many points one is looked at."""
    return max(1, num_points // SAMPLED)


def _keeps_codes(backend: str, num_clusters: int, points: Tensor) -> bool:
    row = TABLE["kmeans_assign"][backend]
    is_measured = num_clusters * points.shape[1] <= row.most_measured
    is_coded = num_clusters <= row.most_coded_clusters and not is_measured
    return is_coded and points.dtype == torch.float32 and len(points) > 0


@dataclass(frozen=True)
class BlockAssignment:
    """``kmeans_assign`` of points that come in blocks, with the bits of all points in one call."""

    some: Tensor  # every sampled_step(N)-th point, [M, D]
    num_clusters: int
    backend: str  # a row of the table

    def to(
        self, centroids: Tensor, bounds: Bounds | None = None
    ) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]]:
        """Centroids [K, D] -> a function of points [B, D] and the part of all that they are. C++
        prepares the centroids here, once for all blocks: 22 ms at K = 1,000."""
        row = TABLE["kmeans_assign"][self.backend]
        if not row.runs_kmeans:
            whole = row.function("kmeans_assign")
            return lambda points, part: whole(points=points, centroids=centroids)
        is_coded = _keeps_codes(self.backend, self.num_clusters, self.some)
        if bounds is not None and not bounds.is_empty:
            bounds.to(centroids, self.some, is_coded)
            return partial(bounds.assign, codes=())
        prepared = row.function("kmeans_prepare")(
            centroids=centroids, some=self.some, coded=is_coded
        )
        assign = row.function("kmeans_assign_prepared")
        return lambda points, part: assign(points=points, prepared=prepared)


class SegmentMeans(NamedTuple):
    """The mean and the size of each segment."""

    means: Tensor  # [K, D]
    counts: Tensor  # int64 [K]


def _segment_mean_shapes(arguments: Any) -> SegmentMeans:
    values, k = arguments.values, arguments.num_segments
    return SegmentMeans(
        means=empty(values, k, values.shape[1]),
        counts=values.new_empty(k, dtype=torch.int64),
    )


@operator("segment_mean", _segment_mean_shapes, SegmentMeans)
def _segment_mean(
    values: Tensor, labels: Tensor, num_segments: int, backend: str
) -> tuple[Tensor, Tensor]:
    run = function("segment_mean", backend, "segment_mean")
    return run(values=values, labels=labels, num_segments=num_segments)


@torch.no_grad()
def segment_mean(
    values: Tensor, labels: Tensor, num_segments: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mean of the rows that share a label: the k-means update and back translation (PBT).

    Deterministic: rows are summed in a fixed order, without atomics.

    Args:
        values: [N, D]; float32, bfloat16, float16 (float64: reference), any strides.
        labels: int64 [N] in [0, num_segments); negative labels are left out.
        num_segments: K >= 0.
        backend: "auto" or a row of ``protoclip.backends("segment_mean")``.
    Returns:
        means fp32 [K, D] (fp64 for fp64 values; zeros where empty) and counts int64 [K].
    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, a label is >= num_segments
            (checked on the CPU; a precondition on a GPU), or the named backend cannot run.

    Example:
        >>> values = torch.tensor([[1.0], [3.0], [5.0]])
        >>> protoclip.segment_mean(values, torch.tensor([0, 0, 2]), 3)
        SegmentMeans(means=tensor([[2.],
                [0.],
                [5.]]), counts=tensor([2, 0, 1]))
    """
    op = "segment_mean"
    checks.matrix(op, "values", values, "[N, D]")
    labels = checks.labels(op, labels, values)
    if not isinstance(num_segments, int) or num_segments < 0:
        raise ValueError(f"{op}: expected num_segments as an int >= 0, got {num_segments!r}")
    backend_name = resolve(op, backend, values.device.type, values.dtype)
    with without_autocast(values.device.type):
        if in_transform():
            return reference.segment_mean(values, labels, num_segments)
        return _segment_mean(
            values=values, labels=labels, num_segments=num_segments, backend=backend_name
        )


@dataclass(frozen=True)
class SegmentSums:
    """Sums of the rows of each segment that are added block by block; their means have the bits of
    ``segment_mean`` of all rows on a CPU. C++ adds 256 rows of a segment in fp32, then continues in
    fp64, so a segment's open piece is carried from block to block."""

    backend: str  # a row of the table
    dtype: torch.dtype  # of the rows, and of the means
    sums: Tensor  # fp64 [K, D]
    open: Tensor  # fp32 [K, D] in C++, else [0, D]
    counts: Tensor  # int64 [K]

    @classmethod
    def zeros(cls, num_segments: int, row: Tensor, backend: str) -> SegmentSums:
        """Of no rows yet. ``row``: [D], of the dtype and device of the rows to come."""
        backend_name = resolve("segment_mean", backend, row.device.type, row.dtype)
        in_pieces = TABLE["segment_mean"][backend_name].runs_kmeans
        shape = (num_segments, len(row))
        return cls(
            backend_name,
            row.dtype,
            row.new_zeros(shape, dtype=torch.float64),
            row.new_zeros(shape if in_pieces else (0, len(row))),
            row.new_zeros(num_segments, dtype=torch.int64),
        )

    def add(self, values: Tensor, labels: Tensor) -> None:
        """Rows [B, D] with labels int64 [B]; negative ones are left out."""
        if not len(self.open):
            reference.segment_add(values, labels, self.sums, self.counts)
            return
        add = function("segment_mean", self.backend, "segment_add")
        add(values=values, labels=labels, open=self.open, closed=self.sums, counts=self.counts)

    def clear(self, segments: Tensor) -> None:
        """As if no row of these segments, int64 [M], had been added."""
        for part in (self.sums, self.open, self.counts):
            if len(part):
                part[segments] = 0

    def means(self) -> SegmentMeans:
        counts = self.counts.clone()
        if not len(self.open):
            means = self.sums / counts.clamp_min(1)[:, None]
            return SegmentMeans(means.to(self.dtype), counts)
        mean = function("segment_mean", self.backend, "segment_sums_mean")
        return SegmentMeans(mean(open=self.open, closed=self.sums, counts=counts), counts)
