"""The points of all ranks, and the centroids where k-means starts.

``PointSlice`` holds what ``lloyd`` iterates over. With a group every rank holds a slice of the
points; all ranks draw the same centroids, which do not depend on how the points are sliced.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.ops.clusters import PointsAssignment, assignment, segment_mean

INITS = ("random", "k-means++", "plain k-means++")
# "k-means++" looks at all rows up to this N x K and this size, else at a sample of
# ROWS_PER_CLUSTER, and at least FEWEST_ROWS, which then starts greedily up to the same limits.
GREEDY = 64_000_000
GREEDY_BYTES = 256 << 20
ROWS_PER_CLUSTER = 64
FEWEST_ROWS = 16_384
MAX_DRAWS = 1024  # candidates per pass over the points
BLOCK = 1 << 22  # distances that the greedy start keeps at once
PRODUCT_ERROR = 2.0**-20  # of a squared distance from fp32 products, as a part of |x|^2 + |c|^2
FEW = 1 << 17  # numbers; up to so many, finding those near a point takes longer than all of them
FAR = 64  # a column lies far from 0 if its values differ by less than one part in so many


class PointSlice:
    """This rank's points and their weights, and sums over the ranks of a group."""

    def __init__(self, points: Tensor, group: dist.ProcessGroup | None, backend: str) -> None:
        self.points = points  # [N, D]
        self.group = group
        self.backend = backend
        self.centre: Tensor | None = None  # [D], what was subtracted from the points
        self.weights: Tensor | None = None  # fp64 [N], in units of ``weight``; None: all equal
        self.weight = 1.0  # of each point, where they are equal
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sizes = [len(points)]  # of all ranks
        if group is not None:
            sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device="cpu")
            sizes[self.rank] = len(points)
            self.sizes = self.sum(sizes.to(points.device)).tolist()
        self.start = sum(self.sizes[: self.rank])
        self.count = sum(self.sizes)
        # -min and max of this rank's columns, [2, D]; NaN where a column has one.
        self.bounds = points.new_full((2, points.shape[1]), -math.inf)
        if len(points):
            self.bounds = torch.stack([-points.amin(dim=0), points.amax(dim=0)])

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def move_to_centre(self, spherical: bool) -> None:
        """Subtract a common centre from columns far from 0, where fp32 has few digits.

        All values of such a column lie within a factor of two of the centre, so the differences are
        exact (Sterbenz 1974), and labels are those of the points as given. With ``spherical`` only
        columns within 1 of 0: a centroid of unit length has no digits next to a larger centre.
        """
        bounds = self.bounds
        if self.group is not None:
            bounds = bounds.clone()
            dist.all_reduce(bounds, dist.ReduceOp.MAX, self.group)
        low, high = -bounds[0], bounds[1]
        is_far = FAR * (high - low) <= torch.minimum(low.abs(), high.abs())
        if spherical:
            is_far &= torch.maximum(low.abs(), high.abs()) <= 1
        if is_far.any() and (centre := torch.where(is_far, low + (high - low) / 2, 0)).any():
            self.centre = centre
            self.points = self.points - centre

    def placed(self, centroids: Tensor, spherical: bool) -> Tensor:
        """The nearest centroids [K, D] that can be returned: of unit length if spherical, and in
        the precision that they have when the centre is added."""
        if self.centre is not None:
            centroids = centroids + self.centre
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
        return centroids if self.centre is None else centroids - self.centre

    def pick(self, values: Tensor, index: Tensor) -> Tensor:
        """Rows of values [N, D] by index [K] over all ranks' rows -> [K, D], equal on each rank."""
        if self.group is None:
            return values[index.to(values.device)]
        local = index.to(values.device) - self.start
        mine = (local >= 0) & (local < len(values))
        picked = values[local.where(mine, 0)] if len(values) else values.new_zeros(len(index), 1)
        return self.sum(torch.where(mine[:, None], picked, 0).expand(-1, values.shape[1]).clone())

    def draw(self, mass: Tensor, where: Tensor) -> Tensor:
        """The rows where the running sum of ``mass`` fp64 [N], over all ranks, passes the parts
        ``where`` [M] of its total: int64 [M], equal on each rank."""
        running = mass.cumsum(0)
        sums = mass.new_zeros(len(self.sizes))
        sums[self.rank] = mass.sum()
        bounds = self.sum(sums).cumsum(0)
        aim = where.to(mass.device) * bounds[-1]
        last = max(rank for rank, size in enumerate(self.sizes) if size)
        owner = torch.searchsorted(bounds, aim, right=True).clamp_max(last)
        local = aim - (bounds - sums)[self.rank]
        row = torch.searchsorted(running, local, right=True).clamp_max(max(0, len(mass) - 1))
        return self.sum(torch.where(owner == self.rank, self.start + row, 0))

    def sample(self, count: int, generator: torch.Generator) -> PointSlice:
        """``count`` rows drawn by weight, with replacement; each is there once. Where weights
        differ, the sample's are the times that a row was drawn."""
        if self.weights is None:
            index = torch.randint(self.count, (count,), generator=generator, device="cpu")
        else:
            where = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
            index = self.draw(self.weights, where).cpu()
        index, times = index.unique(return_counts=True)
        mine = (index >= self.start) & (index < self.start + len(self.points))
        local = (index[mine] - self.start).to(self.points.device)
        sample = PointSlice(self.points[local], self.group, self.backend)
        if self.weights is not None:
            sample.weights = times[mine].to(self.weights)
        return sample

    def largest(self, values: Tensor, count: int) -> Tensor:
        """Indices over all ranks of the ``count`` largest values >= 0 [N]; ties by index."""
        count = min(count, self.count)
        order = values.argsort(descending=True, stable=True)[:count]
        top = values.new_full((len(self.sizes), 2, count), 0.0, dtype=torch.float64)
        top[self.rank, 0] = -1
        top[self.rank, 0, : len(order)] = values[order].double()
        top[self.rank, 1, : len(order)] = order.double() + self.start
        values, index = self.sum(top).transpose(0, 1).flatten(1)  # [ranks x count] each
        return index[values.argsort(descending=True, stable=True)[:count]].long()

    def by_weight(self, values: Tensor) -> Tensor:
        """Weight x value, fp64 [N]; equal weights count as 1."""
        return values.double() if self.weights is None else values.double() * self.weights

    def values(self) -> Tensor:
        """The rows to average: the points, or weight x point and weight, [N, D + 1]."""
        if self.weights is None:
            return self.points
        weights = self.weights.to(self.points.dtype)[:, None]
        return torch.cat([self.points * weights, weights], dim=1)

    def means(self, values: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
        """Means [K, D] and row counts [K] of the clusters; a cluster of weight 0 has count 0."""
        means, counts = global_segment_mean(values, labels, num_clusters, self.group, self.backend)
        if self.weights is None:
            return means, counts
        mass = means[:, -1:]
        return means[:, :-1] / mass.where(mass > 0, 1), counts * (mass[:, 0] > 0)


def global_segment_mean(
    values: Tensor,
    labels: Tensor,
    num_segments: int,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``segment_mean`` over the rows of all ranks of a group; the same result on each rank."""
    means, counts = segment_mean(values, labels, num_segments, backend=backend)
    if group is None:
        return means, counts
    sums = means.double() * counts[:, None]
    dist.all_reduce(sums, group=group)
    dist.all_reduce(counts, group=group)
    return (sums / counts.clamp_min(1)[:, None]).to(means.dtype), counts


def first_centroids(
    rows: PointSlice, num_clusters: int, init: str | Tensor, seed: int, assign: PointsAssignment
) -> Tensor:
    """Given centroids, random points, or k-means++: greedy, or plain where that takes too long."""
    generator = torch.Generator().manual_seed(seed)
    is_greedy = False
    if isinstance(init, str) and init == "k-means++":
        count = rows.count
        row_bytes = rows.points.shape[1] * rows.points.element_size()
        if not _fits(count, num_clusters, row_bytes):
            count = min(count, max(FEWEST_ROWS, ROWS_PER_CLUSTER * num_clusters))
        if count < rows.count:
            rows = rows.sample(count, generator)
            assign = assignment(rows.points, num_clusters, assign.backend)
        is_greedy = _fits(rows.count, num_clusters, row_bytes)
    points = rows.points
    if isinstance(init, Tensor):
        warm = init.detach().to(points)
        warm = warm if rows.centre is None else warm - rows.centre
    else:
        warm = points[:0]
    is_random = isinstance(init, Tensor) or init == "random"
    num_random = num_clusters - len(warm) if is_random else 1
    if not num_random:
        return warm
    if rows.weights is None:
        index = torch.randperm(rows.count, generator=generator, device="cpu")[:num_random]
    else:
        # By weight, without replacement: the largest log(u) / w (Efraimidis and Spirakis 2006).
        uniform = torch.rand(rows.count, generator=generator, dtype=torch.float64, device="cpu")
        keys = torch.zeros_like(uniform, device=points.device)
        of_rank = slice(rows.start, rows.start + len(points))
        keys[of_rank] = uniform[of_rank].to(points.device).log() / rows.weights
        index = rows.sum(keys).topk(num_random).indices
    centroids = torch.cat([warm, rows.pick(points, index)])
    if is_random:
        return centroids
    if is_greedy:
        trials = 2 + int(math.log(num_clusters))
        rounds = max(1, BLOCK // (trials * rows.count))
        if rows.group is not None or not assign.runs_kmeans:
            return _greedy(rows, centroids, num_clusters, trials, rounds, generator)
        chosen = assign.greedy_start(
            int(index[0]),
            rows.weights,
            num_clusters,
            trials=trials,
            rounds=rounds,
            generator=generator,
        )
        return points[chosen]
    return _plain(rows, centroids, num_clusters, generator, assign)


def _fits(count: int, num_clusters: int, row_bytes: int) -> bool:
    return count * num_clusters <= GREEDY and count * row_bytes <= GREEDY_BYTES


class _Candidates(NamedTuple):
    """Points drawn by weight x squared distance to the nearest centroid, equal on each rank.

    They may be drawn many at a time: visited in order, each is kept with probability (distance now)
    / (distance when drawn). This is rejection sampling, so those that are kept have the
    distribution of points drawn one by one.
    """

    points: Tensor  # [M, D]
    squared: np.ndarray  # fp64 [M], to the nearest centroid when they were drawn
    luck: np.ndarray  # fp64 [M]

    @classmethod
    def draw(
        cls, rows: PointSlice, squared: Tensor, count: int, generator: torch.Generator
    ) -> _Candidates:
        """A candidate is the point where the running sum of weight x squared distance, over all
        ranks, passes a random part of the total."""
        where, luck = torch.rand(2, count, generator=generator, dtype=torch.float64, device="cpu")
        index = rows.draw(rows.by_weight(squared), where)
        start = rows.pick(squared.double()[:, None], index)[:, 0]
        return cls(rows.pick(rows.points, index), start.cpu().numpy(), luck.numpy())

    def kept(self, now: np.ndarray, first: int) -> np.ndarray:
        """The positions, from ``first`` on, of those that are kept at squared distances [M]."""
        # All distances are 0 if only duplicates are left; then any point will do.
        now, start = now[first:], self.squared[first:]
        is_kept = (now >= self.luck[first:] * start) & ((now > 0) | (start == 0))
        return first + np.flatnonzero(is_kept)

    def apart(self) -> np.ndarray:
        """The squared distances between them, fp64 [M, M]."""
        direct = "donot_use_mm_for_euclid_dist"
        apart = torch.cdist(self.points, self.points, compute_mode=direct)
        return apart.double().square().cpu().numpy()


def _plain(
    rows: PointSlice,
    centroids: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    assign: PointsAssignment,
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) in few passes over the points: centroids [1, D] ->
    [K, D]."""
    squared = rows.points.new_full((len(rows.points),), math.inf, dtype=torch.float64)
    fresh = centroids
    while len(centroids) < num_clusters:
        squared = torch.minimum(squared, assign(fresh)[1].double())
        count = min(MAX_DRAWS, max(8, len(centroids)))
        candidates = _Candidates.draw(rows, squared, count, generator)
        apart = candidates.apart()
        now = candidates.squared.copy()
        accepted: list[int] = []
        while len(kept := candidates.kept(now, accepted[-1] + 1 if accepted else 0)):
            accepted.append(int(kept[0]))
            np.minimum(now, apart[kept[0]], out=now)
        fresh = candidates.points[accepted][: num_clusters - len(centroids)]
        centroids = torch.cat([centroids, fresh])
    return centroids


def _greedy(
    rows: PointSlice,
    centroids: Tensor,
    num_clusters: int,
    trials: int,
    most_rounds: int,
    generator: torch.Generator,
) -> Tensor:
    """k-means++ that draws some candidates (``trials``) for each centroid, and takes the one that
    leaves the lowest sum of squared distances: centroids [1, D] -> [K, D]. Those of up to
    ``most_rounds`` centroids are drawn together.

    Distances of many candidates are one product, about the mean of the points. It only chooses:
    distances to the chosen centroids are then computed from differences, for the points near it.
    """
    points = rows.points
    weights = None if rows.weights is None else rows.weights.to(points.dtype)
    mean = rows.sum(points.sum(0, dtype=torch.float64)) / rows.count
    shifted = points - mean.to(points)
    norms = shifted.square().sum(1)  # [N]
    squared = (points - centroids).square().sum(1)  # [N]
    chosen = [centroids]
    num_chosen = 1
    while num_chosen < num_clusters:
        # While half as many more centroids are chosen, few of the candidates become too near.
        rounds = max(1, min(most_rounds, num_chosen // 2, num_clusters - num_chosen))
        candidates = _Candidates.draw(rows, squared, trials * rounds, generator)
        apart = candidates.apart()
        offsets = candidates.points - mean.to(points)
        offset_norms = offsets.square().sum(1)
        products = torch.addmm(norms, offsets, shifted.T, alpha=-2)  # [M, N]
        distances = products.add_(offset_norms[:, None])
        now = candidates.squared.copy()
        visited = 0
        while num_chosen < num_clusters:
            kept = candidates.kept(now, visited)[:trials]
            if len(kept) < trials and visited:
                break
            visited = int(kept[-1]) + 1
            left = torch.minimum(distances[torch.from_numpy(kept).to(points.device)], squared)
            sums = left.sum(1) if weights is None else left @ weights
            best = int(kept[int(rows.sum(sums.double()).argmin())])
            near: Tensor | slice = slice(None)
            if points.numel() > FEW:
                error = PRODUCT_ERROR * (norms + offset_norms[best])
                near = (distances[best] < squared + error).nonzero()[:, 0]
            centroid = candidates.points[best]
            fresh = (points[near] - centroid).square().sum(1)
            squared[near] = torch.minimum(squared[near], fresh)
            np.minimum(now, apart[best], out=now)
            chosen.append(centroid[None])
            num_chosen += 1
    return torch.cat(chosen)
