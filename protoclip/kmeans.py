"""Lloyd's k-means over the ops ``kmeans_assign`` and ``segment_mean``, or by faiss.

Nothing is read back to the host inside an iteration. With ``group`` every rank holds a slice of the
points: assignment is local, sums and counts are all-reduced, all ranks get the same centroids.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.ops import checks
from protoclip.ops.backends import resolve
from protoclip.ops.clusters import kmeans_assign, segment_mean
from protoclip.ops.native import CodedPoints

INITS = ("random", "k-means++")
SPLIT = 1 / 1024  # relative distance between the halves of a split cluster, as in faiss
MAX_DRAWS = 1024  # k-means++ candidates of one pass over the points
KEEP_CODES = 1024  # up to this K, coding the points is 4 % of an assignment or more

Assign = Callable[[Tensor], tuple[Tensor, Tensor]]  # centroids -> labels, squared distances


@dataclass(frozen=True)
class Clusters:
    """A clustering; labels, counts and inertia belong to the returned centroids."""

    centroids: Tensor  # [K, D] fp32 (fp64 for fp64 points)
    labels: Tensor  # int64 [N]
    counts: Tensor  # int64 [K], over all ranks
    inertia: float  # sum of squared distances, over all ranks
    history: tuple[float, ...]  # inertia before each iteration's update, and the final one


class Ranks:
    """The slices of one data set on the ranks of a group, or the whole of it on one."""

    def __init__(self, local: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        sizes = torch.zeros(1 if group is None else dist.get_world_size(group), dtype=torch.int64)
        self.rank = 0 if group is None else dist.get_rank(group)
        sizes[self.rank] = local
        self.sizes = self.sum(sizes.to(device)).tolist()
        self.start, self.total = sum(self.sizes[: self.rank]), sum(self.sizes)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def rows(self, points: Tensor, index: Tensor) -> Tensor:
        """Rows of the whole data set by global index [K] -> [K, D], the same on every rank."""
        local = index.to(points.device) - self.start
        mine = (local >= 0) & (local < len(points))
        picked = points[local.where(mine, 0)] if len(points) else points.new_zeros(len(index), 1)
        return self.sum(torch.where(mine[:, None], picked, 0.0).expand(-1, points.shape[1]).clone())


def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    num_iters: int = 20,
    num_restarts: int = 1,
    init: str | Tensor = "random",
    seed: int = 0,
    spherical: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Clusters:
    """Cluster points by Lloyd's algorithm; the same seed gives the same clusters.

    A cluster that runs empty takes half of the largest one (both halves next to its mean).

    Args:
        points: [N, D], finite; float32, bfloat16, float16 (computed in fp32) or float64.
        num_clusters: K, 1 <= K <= N.
        num_iters: updates of the centroids, >= 0.
        num_restarts: runs from different initial centroids; the lowest inertia is kept.
        init: "random" (K distinct points), "k-means++", or centroids [K, D] (a warm start).
        seed: of the initial centroids; restart r uses seed + r.
        spherical: keep centroids at unit length (for unit points: cosine k-means).
        group: a process group whose ranks each hold a slice of the points; N counts all slices.
        backend: "auto", one of the backends of both ops, e.g. "reference", or "faiss": faiss.Kmeans
            on all points, the paper's own clustering (no group, no "k-means++").
    Returns:
        Clusters.
    Raises:
        ValueError, TypeError: shapes or dtypes are wrong, K is out of range, points are not finite,
            or the named backend cannot run, "faiss" without faiss included.
    """
    checks.matrix("kmeans", "points", points, "[N, D]")
    points = points.detach()
    points = points if points.dtype == torch.float64 else points.float()
    ranks = Ranks(len(points), group, points.device)
    if not 1 <= num_clusters <= ranks.total:
        raise ValueError(
            f"kmeans: expected 1 <= num_clusters <= N = {ranks.total} points, got {num_clusters}; "
            f"lower num_clusters or give more points"
        )
    if num_iters < 0 or num_restarts < 1:
        raise ValueError(
            f"kmeans: expected num_iters >= 0 and num_restarts >= 1, got {num_iters}, "
            f"{num_restarts}"
        )
    _check_values(points, num_clusters, init, ranks)
    if backend == "faiss":
        settings = {"niter": num_iters, "nredo": num_restarts, "seed": seed, "spherical": spherical}
        centroids, history = _faiss(points, num_clusters, init, group, settings)
        return _assigned(centroids, history, ranks, partial(kmeans_assign, points))
    assign = _assignment(points, num_clusters, backend)

    def run(restart: int) -> Clusters:
        if isinstance(init, Tensor):
            start = init.detach().to(points).clone()
        else:
            generator = torch.Generator().manual_seed(seed + restart)
            start = _first_centroids(points, num_clusters, init, generator, ranks)
        return _lloyd(points, start, num_iters, spherical, ranks, backend, assign)

    restarts = 1 if isinstance(init, Tensor) else num_restarts
    return min(map(run, range(restarts)), key=lambda clusters: clusters.inertia)


def _check_values(points: Tensor, k: int, init: str | Tensor, ranks: Ranks) -> None:
    shape = (k, points.shape[1])
    if isinstance(init, Tensor):
        if init.shape != shape:
            raise ValueError(
                f"kmeans: expected init centroids [K, D] = {shape}, got {tuple(init.shape)}"
            )
    elif init not in INITS:
        raise ValueError(f"kmeans: expected init in {INITS} or a Tensor [K, D], got {init!r}")
    bad = ~torch.isfinite(points).all(dim=1)
    if total := int(ranks.sum(bad.sum())):
        where = f"; the first is row {int(bad.int().argmax())}" if bad.any() else ""
        raise ValueError(f"kmeans: expected finite points, got {total} rows with NaN or inf{where}")


def _first_centroids(
    points: Tensor, k: int, init: str, generator: torch.Generator, ranks: Ranks
) -> Tensor:
    """Random points, or k-means++ (Arthur and Vassilvitskii 2007), many a pass over the points.

    Candidates are drawn together by their squared distance at the start of the pass. One after the
    other, each is kept with the probability by which the ones kept before it in this pass have
    lowered that distance: rejection sampling, so the distribution is that of the sequential method.
    """
    if init == "random":
        return ranks.rows(points, torch.randperm(ranks.total, generator=generator)[:k])
    centroids = ranks.rows(points, torch.randint(ranks.total, (1,), generator=generator))
    squared = points.new_full((len(points),), math.inf, dtype=torch.float64)
    fresh = centroids
    while len(centroids) < k:
        squared = torch.minimum(squared, kmeans_assign(points, fresh)[1].double())
        draws = min(MAX_DRAWS, max(8, len(centroids)))
        uniform = torch.rand(2, draws, generator=generator, dtype=torch.float64)
        candidates, weights = _draw(points, squared, uniform[0].to(points.device), ranks)
        fresh = candidates[_keep(candidates, weights, uniform[1])]
        fresh = fresh[: k - len(centroids)]
        centroids = torch.cat([centroids, fresh])
    return centroids


def _keep(candidates: Tensor, weights: Tensor, uniform: Tensor) -> Tensor:
    """Which candidates [M, D], drawn by weights [M], survive those kept before them -> index."""
    apart = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    between, start = apart.double().square().cpu().numpy(), weights.cpu().numpy()
    now, kept = start.copy(), []
    for j, u in enumerate(uniform.tolist()):
        # Only duplicates are left when all weights are 0: any point is as good.
        if now[j] >= u * start[j] and (now[j] > 0 or start[j] == 0):
            kept.append(j)
            np.minimum(now, between[j], out=now)
    return torch.tensor(kept, device=candidates.device)


def _draw(points: Tensor, weights: Tensor, uniform: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Rows [M, D] at which the running sum of the weights (over all ranks) passes uniform [M] times
    the total, and their weights [M]."""
    sums = weights.new_zeros(len(ranks.sizes))
    sums[ranks.rank] = weights.sum()
    bounds = ranks.sum(sums).cumsum(0)
    aim = uniform * bounds[-1]
    owner = torch.searchsorted(bounds, aim, right=True).clamp_max(len(bounds) - 1)
    local = aim - (bounds - sums)[ranks.rank]
    row = torch.searchsorted(weights.cumsum(0), local, right=True)
    row = row.clamp_max(max(0, len(points) - 1))
    mine = owner == ranks.rank
    if not len(points):
        points, weights = points.new_zeros(1, points.shape[1]), weights.new_zeros(1)
    picked = torch.where(mine[:, None], points[row], 0.0)
    return ranks.sum(picked), ranks.sum(torch.where(mine, weights[row], 0.0))


def _assignment(points: Tensor, k: int, backend: str) -> Assign:
    """``kmeans_assign`` of the same points again and again; the C++ backend keeps their codes."""
    op = "kmeans_assign"
    small = len(points) > 0 and k <= KEEP_CODES and points.dtype == torch.float32
    if small and resolve(op, backend, points.device.type, points.dtype) == "cpu":
        return CodedPoints(points).assign
    return partial(kmeans_assign, points, backend=backend)


def _lloyd(
    points: Tensor,
    centroids: Tensor,
    num_iters: int,
    spherical: bool,
    ranks: Ranks,
    backend: str,
    assign: Assign,
) -> Clusters:
    k = len(centroids)
    if spherical:
        centroids = torch.nn.functional.normalize(centroids, dim=1)
    history = []
    for _ in range(num_iters):
        labels, distances = assign(centroids)
        history.append(ranks.sum(distances.double().sum()))
        means, counts = global_segment_mean(points, labels, k, ranks.group, backend)
        centroids = _split_largest(means.where(counts[:, None] > 0, centroids), counts)
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
    return _assigned(centroids, history, ranks, assign)


def _assigned(
    centroids: Tensor, history: Sequence[Tensor | float], ranks: Ranks, assign: Assign
) -> Clusters:
    labels, distances = assign(centroids)
    counts = ranks.sum(torch.bincount(labels, minlength=len(centroids)))
    inertia = float(ranks.sum(distances.double().sum()))
    return Clusters(centroids, labels, counts, inertia, (*map(float, history), inertia))


def global_segment_mean(
    values: Tensor,
    labels: Tensor,
    num_segments: int,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``segment_mean`` of the rows that the ranks of a group hold together; the same on each."""
    means, counts = segment_mean(values, labels, num_segments, backend=backend)
    if group is None:
        return means, counts
    sums = means.double() * counts[:, None]
    dist.all_reduce(sums, group=group)
    dist.all_reduce(counts, group=group)
    return (sums / counts.clamp_min(1)[:, None]).to(means.dtype), counts


def _split_largest(centroids: Tensor, counts: Tensor) -> Tensor:
    """The j-th empty cluster takes half of the j-th largest: c (1 + e) and c (1 - e)."""
    empty = counts == 0
    largest = counts.argsort(descending=True, stable=True)
    source = largest[(empty.long().cumsum(0) - 1).clamp_min(0)]  # of each empty cluster
    split = empty & (counts[source] > 1)
    sign = 1 - 2 * (torch.arange(centroids.shape[1], device=centroids.device) % 2)
    step = 1 + SPLIT * sign.to(centroids.dtype)
    halved = torch.zeros_like(counts).index_add(0, source, split.long()) > 0
    shrunk = centroids.where(~halved[:, None], centroids * (2 - step))
    return torch.where(split[:, None], centroids[source] * step, shrunk)


def load_faiss() -> ModuleType:
    """The faiss module, or ValueError with the remedy."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError(
            f"kmeans: backend 'faiss' needs faiss, which cannot be imported ({error}); "
            "pip install faiss-cpu (or faiss-gpu-cu12), or use backend='auto'"
        ) from error


def _faiss(
    points: Tensor,
    num_clusters: int,
    init: str | Tensor,
    group: dist.ProcessGroup | None,
    settings: dict[str, Any],
) -> tuple[Tensor, list[float]]:
    """faiss.Kmeans on all points -> centroids [K, D], inertia before each update.

    It runs on the GPU where the points are on one and faiss was built for it.
    """
    faiss = load_faiss()
    if group is not None or (isinstance(init, str) and init != "random"):
        raise ValueError(
            "kmeans: backend 'faiss' takes init='random' or a Tensor and no group, got "
            f"init={init!r} and group={group}; use backend='auto'"
        )
    runner = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        gpu=points.is_cuda and faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # no subsampling
        **settings,
    )
    start = init.detach().float().cpu().numpy() if isinstance(init, Tensor) else None
    runner.train(points.float().cpu().contiguous().numpy(), init_centroids=start)
    centroids = torch.from_numpy(runner.centroids).to(points).clone()
    if not settings["spherical"]:
        return centroids, list(runner.obj)
    total = float(points.double().square().sum()) + len(points)
    return centroids, [total - 2 * x for x in runner.obj]  # faiss sums x.c there
