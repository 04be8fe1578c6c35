"""The centroids where k-means starts: all ranks draw the same ones, which do not depend on how the
points are sliced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from protoclip.lloyd.points import InMemory, OnDisk
from protoclip.lloyd.slices import PointSlice
from protoclip.lloyd.state import RunState
from protoclip.lloyd.sweep import InMemorySweep, Sweep, sweep

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
MEASURED_COLUMNS = 16  # up to so many, C++ measures all distances, without codes
FEW = 1 << 17  # numbers; up to so many, finding those near a point takes longer than all of them

Note = Callable[[RunState], None]


def first_centroids(
    passes: Sweep,
    num_clusters: int,
    init: str | Tensor,
    seed: int,
    begun: RunState,
    note: Note | None,
) -> Tensor:
    """Given centroids, random points, or k-means++: greedy, or plain where that takes too long,
    from where a start was stopped."""
    generator = torch.Generator().manual_seed(seed)
    rows = passes.rows
    if isinstance(init, Tensor):
        given = init.detach().to(rows.points.device, rows.points.dtype)
        given = given if rows.centre is None else given - rows.centre
        if missing := num_clusters - len(given):
            drawn = _random_points(rows, missing, generator)
            given = torch.cat([given, rows.pick_points(drawn)])
        return given
    if init == "random":
        return rows.pick_points(_random_points(rows, num_clusters, generator))
    if init == "k-means++" and not _fits(rows, num_clusters):
        count = max(FEWEST_ROWS, ROWS_PER_CLUSTER * num_clusters)
        if count < rows.count:
            rows = rows.sample(count, generator)
            rows.points = held(rows.points)
            passes = sweep(rows, num_clusters, passes.nearest.backend)
    drawn = _random_points(rows, 1, generator)
    centroids = rows.pick_points(drawn)
    if init == "plain k-means++" or not _fits(rows, num_clusters):
        return _plain(passes, centroids, num_clusters, generator, begun, note)
    assert isinstance(passes, InMemorySweep)  # GREEDY_BYTES fit into memory
    nearest = passes.nearest
    points = nearest.points
    trials = 2 + int(math.log(num_clusters))
    rounds = max(1, BLOCK // (trials * rows.count))
    if rows.group is not None or not nearest.runs_kmeans:
        return _greedy(rows, points, centroids, num_clusters, trials, rounds, generator)
    codes = nearest.codes
    if not codes and rows.points.columns > MEASURED_COLUMNS:
        codes = nearest.function("kmeans_encode")(points)
    chosen = nearest.function("kmeans_greedy_start")(  # the steps of ``_greedy`` as one op
        points=points,
        weights=rows.weights,
        codes=codes,
        first=int(drawn[0]),
        num_clusters=num_clusters,
        trials=trials,
        rounds=rounds,
        generator=generator,
    )
    return points[chosen]


def held(points: InMemory | OnDisk) -> InMemory | OnDisk:
    """In memory, if it is no larger than what starts greedily."""
    if isinstance(points, InMemory):
        return points
    num_bytes = points.count * points.columns * points.dtype.itemsize
    return points.loaded() if num_bytes <= GREEDY_BYTES else points


def _random_points(rows: PointSlice, count: int, generator: torch.Generator) -> Tensor:
    """Distinct ones, by weight: their numbers, int64 [count]."""
    if rows.weights is None:
        return torch.randperm(rows.count, generator=generator, device="cpu")[:count]
    # Without replacement: the largest log(u) / w (Efraimidis and Spirakis 2006).
    uniform = torch.rand(rows.count, generator=generator, dtype=torch.float64, device="cpu")
    keys = torch.zeros_like(uniform, device=rows.points.device)
    of_rank = slice(rows.start, rows.start + rows.points.count)
    keys[of_rank] = uniform[of_rank].to(keys.device).log() / rows.weights
    return rows.sum(keys).topk(count).indices


def _fits(rows: PointSlice, num_clusters: int) -> bool:
    row_bytes = rows.points.columns * rows.points.dtype.itemsize
    return rows.count * num_clusters <= GREEDY and rows.count * row_bytes <= GREEDY_BYTES


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
        start = rows.pick(squared.double(), index)
        return cls(rows.pick_points(index), start.cpu().numpy(), luck.numpy())

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
    passes: Sweep,
    centroids: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    begun: RunState,
    note: Note | None,
) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) in few passes over the points: centroids [1, D] ->
    [K, D]."""
    rows = passes.rows
    squared = torch.full(
        (rows.points.count,), math.inf, dtype=torch.float64, device=rows.points.device
    )
    drawn = [1]  # by each pass
    fresh = [centroids]
    if begun.generator is not None:
        assert begun.centroids is not None
        centroids = begun.centroids
        drawn = list(begun.drawn)
        fresh = list(centroids.split(drawn))
        generator.set_state(begun.generator.cpu())
    while len(centroids) < num_clusters:
        squared = torch.minimum(squared, passes.distances(fresh))
        count = min(MAX_DRAWS, max(8, len(centroids)))
        candidates = _Candidates.draw(rows, squared, count, generator)
        apart = candidates.apart()
        now = candidates.squared.copy()
        accepted: list[int] = []
        while len(kept := candidates.kept(now, accepted[-1] + 1 if accepted else 0)):
            accepted.append(int(kept[0]))
            np.minimum(now, apart[kept[0]], out=now)
        fresh = [candidates.points[accepted][: num_clusters - len(centroids)]]
        drawn.append(len(fresh[0]))
        centroids = torch.cat([centroids, *fresh])
        if note is not None:
            state = generator.get_state()
            note(begun._replace(centroids=centroids, drawn=tuple(drawn), generator=state))
    return centroids


def _greedy(
    rows: PointSlice,
    points: Tensor,
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
