"""The points of all ranks: each holds a slice, and sums go over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.digest import Digest
from protoclip.lloyd.points import Points, below_power_of_two
from protoclip.ops.clusters import segment_mean

FAR = 64  # a column lies far from 0 if its values differ by less than one part in so many
CHUNK = 1 << 20  # numbers whose variance is computed at once


class PointSlice:
    """This rank's points and their weights, and sums over the ranks of a group."""

    def __init__(self, points: Points, group: dist.ProcessGroup | None, backend: str) -> None:
        self.points = points
        self.group = group
        self.backend = backend
        self.centre: Tensor | None = None  # [D], what was subtracted from the points
        self.weights: Tensor | None = None  # fp64 [N], in units of ``weight``; None: all equal
        self.weight = 1.0  # of each point, where they are equal
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sizes = [points.count]  # of all ranks
        if group is not None:
            sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device="cpu")
            sizes[self.rank] = points.count
            self.sizes = self.sum(sizes.to(points.device)).tolist()
        self.start = sum(self.sizes[: self.rank])
        self.count = sum(self.sizes)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def move_to_centre(self, bounds: Tensor, spherical: bool) -> None:
        """Subtract a common centre from columns far from 0, where fp32 has few digits. ``bounds``:
        -min and max of this rank's columns, [2, D].

        All values of such a column lie within a factor of two of the centre, so the differences are
        exact (Sterbenz 1974), and labels are those of the points as given. With ``spherical`` only
        columns within 1 of 0: a centroid of unit length has no digits next to a larger centre.
        """
        if self.group is not None:
            bounds = bounds.clone()
            dist.all_reduce(bounds, dist.ReduceOp.MAX, self.group)
        low, high = -bounds[0], bounds[1]
        is_far = FAR * (high - low) <= torch.minimum(low.abs(), high.abs())
        if spherical:
            is_far &= torch.maximum(low.abs(), high.abs()) <= 1
        if is_far.any() and (centre := torch.where(is_far, low + (high - low) / 2, 0)).any():
            self.centre = centre
            self.points = self.points.minus(centre)

    def in_own_frame(self, centroids: Tensor) -> Tensor:
        """Centroids [K, D] among the points as they were given."""
        return centroids if self.centre is None else centroids + self.centre

    def placed(self, centroids: Tensor, spherical: bool) -> Tensor:
        """The nearest centroids [K, D] that can be returned: of unit length if spherical, and in
        the precision that they have when the centre is added."""
        if self.centre is not None:
            centroids = centroids + self.centre
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
        return centroids if self.centre is None else centroids - self.centre

    def pick(self, values: Tensor, index: Tensor) -> Tensor:
        """Of values [N] by index [K] over all ranks' rows -> [K], equal on each rank."""
        return self._picked(index, lambda local: values[local.to(values.device)], values[:0])

    def pick_points(self, index: Tensor) -> Tensor:
        """Points by index [K] over all ranks' -> [K, D], equal on each rank."""
        points = self.points
        none = torch.empty(0, points.columns, dtype=points.dtype, device=points.device)
        return self._picked(index, points.take, none)

    def _picked(self, index: Tensor, take: Callable[[Tensor], Tensor], none: Tensor) -> Tensor:
        if self.group is None:
            return take(index)
        local = index.to(none.device) - self.start
        mine = (local >= 0) & (local < self.points.count)
        picked = none.new_zeros(len(index), *none.shape[1:])
        picked[mine] = take(local[mine])
        return self.sum(picked)

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
        mine = (index >= self.start) & (index < self.start + self.points.count)
        sample = PointSlice(self.points.select(index[mine] - self.start), self.group, self.backend)
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

    def weighted(self, points: Tensor, index: slice | Tensor) -> Tensor:
        """What is averaged of the points [M, D] at an index: themselves, or weight x point and
        weight, [M, D + 1]."""
        if self.weights is None:
            return points
        weights = self.weights[index].to(points.dtype)[:, None]
        return torch.cat([points * weights, weights], dim=1)

    def over_ranks(self, means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Means [K, D] and row counts [K] of all ranks' clusters, of the means of this rank's
        ``weighted`` rows; a cluster of weight 0 has count 0."""
        means, counts = _global_means(means, counts, self.group)
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
    return _global_means(means, counts, group)


def _global_means(
    means: Tensor, counts: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    if group is None:
        return means, counts
    sums = means.double() * counts[:, None]
    dist.all_reduce(sums, group=group)
    dist.all_reduce(counts, group=group)
    return (sums / counts.clamp_min(1)[:, None]).to(means.dtype), counts


class Summary:
    """What one pass over a rank's points finds before the first iteration.

    ``bounds``: -min and max of the columns, [2, D]; NaN where a column has one. ``spread``: the sum
    of squared distances to the mean, fp64 [D], and the mean, if asked for. ``digest`` is given the
    points as they are stored.
    """

    def __init__(self, points: Points, needs_variance: bool, digest: Digest | None = None) -> None:
        self.bounds = torch.full(
            (2, points.columns), -math.inf, dtype=points.dtype, device=points.device
        )
        self.mean = torch.zeros(points.columns, dtype=torch.float64, device=points.device)
        self.spread = torch.zeros_like(self.mean)
        self.count = 0
        # Chunks of the same rows, in memory or on disk, give the same bits.
        rows_in_chunk = below_power_of_two(CHUNK // max(1, points.columns))
        for block in points.blocks(digest):
            if not len(block):
                continue
            found = torch.stack([-block.amin(dim=0), block.amax(dim=0)])
            self.bounds = torch.maximum(self.bounds, found)
            for chunk in block.split(rows_in_chunk) if needs_variance and points.columns else ():
                self._add(chunk)

    def _add(self, chunk: Tensor) -> None:
        """Chan, Golub and LeVeque 1979."""
        variance, mean = (x.double() for x in torch.var_mean(chunk, dim=0, correction=0))
        before, self.count = self.count, self.count + len(chunk)
        gap = mean - self.mean
        self.spread += variance * len(chunk) + gap.square() * (before * len(chunk) / self.count)
        self.mean += gap * (len(chunk) / self.count)

    def mean_variance(self, rows: PointSlice) -> float:
        """The mean over the columns of the variance of all ranks' points, unweighted."""
        if not len(self.mean):
            return 0.0
        whole_mean = rows.sum(self.mean * self.count) / rows.count
        apart = (self.mean - whole_mean).square() * self.count
        return float(rows.sum(self.spread + apart).mean()) / rows.count


def largest_magnitude(bounds: Tensor, centre: Tensor | None) -> float:
    """The largest absolute coordinate of points between bounds [2, D], from the centre."""
    if not bounds.numel():
        return 0.0
    shifted = bounds if centre is None else bounds + torch.stack([centre, -centre])
    return float(shifted.max())
