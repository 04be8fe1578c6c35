"""Lloyd's k-means with the ops ``kmeans_assign`` and ``segment_mean``, or with faiss.

With ``group`` every rank holds a slice of the points: assignment is local, sums and counts are
all-reduced, and all ranks get the same centroids. On a GPU no iteration waits for the device: the
host reads whether the centroids still move while the device runs the next assignment.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.ops import checks
from protoclip.ops.clusters import assignment, kmeans_assign, segment_mean

INITS = ("random", "k-means++")
SPLIT = 1 / 1024  # relative distance between the halves of a split cluster, as in faiss
MAX_DRAWS = 1024  # k-means++ candidates per pass over the points

Assign = Callable[[Tensor], tuple[Tensor, Tensor]]  # centroids -> labels, squared distances
Progress = Callable[[int, Tensor], None]


@dataclass(frozen=True, repr=False)
class Clusters:
    """A clustering; labels, counts and inertia belong to the returned centroids."""

    centroids: Tensor  # [K, D] fp32 (fp64 for fp64 points)
    labels: Tensor  # int64 [N]
    counts: Tensor  # int64 [K], over all ranks
    history: tuple[float, ...]  # inertia before each iteration's update, and the final one

    @property
    def num_iters(self) -> int:
        """The iterations that ran, each with one update of the centroids."""
        return len(self.history) - 1

    @property
    def inertia(self) -> float:
        """The sum of squared distances, over all ranks."""
        return self.history[-1]

    def __repr__(self) -> str:
        k, d = self.centroids.shape
        return (
            f"Clusters(K={k:,}, D={d}, N={int(self.counts.sum()):,}, "
            f"sizes {int(self.counts.min())} to {int(self.counts.max())}, "
            f"inertia {self.inertia:.4g}, {self.num_iters} iterations)"
        )

    def predict(self, points: Tensor) -> Tensor:
        """The nearest cluster of each point: [M, D] -> int64 [M]."""
        checks.matrix("predict", "points", points, "[M, D]")
        return kmeans_assign(points, self.centroids.to(points.device))[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file: centroids, labels, counts and history. OSError if the folder
        is missing or the disk is full; then no file is left."""
        from protoclip.common.files import write_safetensors

        tensors = vars(self) | {"history": torch.tensor(self.history, dtype=torch.float64)}
        write_safetensors(Path(path), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Clusters:
        """Read what ``save`` wrote.

        Raises:
            ValueError: ``save`` did not write the file.
            OSError: the file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path, str(device))
            return cls(
                centroids=tensors.pop("centroids"),
                labels=tensors.pop("labels"),
                counts=tensors.pop("counts"),
                history=tuple(tensors.pop("history").tolist()),
                **tensors,  # anything else is an error
            )
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"Clusters.load: expected a file that Clusters.save wrote, got {path} ({error})"
            ) from error


class _Points:
    """This rank's points and their weights, and sums over the ranks of a group."""

    def __init__(self, points: Tensor, group: dist.ProcessGroup | None, backend: str) -> None:
        self.points = points  # [N, D]
        self.group = group
        self.backend = backend
        self.weights: Tensor | None = None  # fp64 [N]; None: all equal
        self.weight = 1.0  # of each point, where they are equal
        sizes = torch.zeros(1 if group is None else dist.get_world_size(group), dtype=torch.int64)
        self.rank = 0 if group is None else dist.get_rank(group)
        sizes[self.rank] = len(points)
        self.sizes = self.sum(sizes.to(points.device)).tolist()
        self.start = sum(self.sizes[: self.rank])
        self.count = sum(self.sizes)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def pick(self, values: Tensor, index: Tensor) -> Tensor:
        """Rows of values [N, D] by index [K] over all ranks' rows -> [K, D], equal on each rank."""
        local = index.to(values.device) - self.start
        mine = (local >= 0) & (local < len(values))
        picked = values[local.where(mine, 0)] if len(values) else values.new_zeros(len(index), 1)
        return self.sum(torch.where(mine[:, None], picked, 0.0).expand(-1, values.shape[1]).clone())

    def inertia(self, distances: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of squared distances [N] over all ranks, and on how many of them the
        centroids ``moved``; ranks that round differently still stop together."""
        local = distances.double()
        local = local.sum() * self.weight if self.weights is None else (local * self.weights).sum()
        total, moving = self.sum(torch.stack([local, moved.to(local)]))
        return total, moving

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


@torch._disable_dynamo  # torch.compiler.disable would load dynamo and triton (1.6 s)
def kmeans(
    points: Tensor,
    num_clusters: int,
    *,
    num_iters: int = 20,
    tol: float = 0.0,
    num_restarts: int = 1,
    init: str | Tensor = "random",
    seed: int = 0,
    spherical: bool = False,
    weights: Tensor | Sequence[float] | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Clusters:
    """Cluster points by Lloyd's algorithm; the same seed gives the same clusters.

    An empty cluster takes half of the largest one (both halves start next to its mean). The run
    ends when an update changes no centroid: more iterations would give the same result, bit for
    bit. With more clusters than distinct points that may never happen.

    Args:
        points: [N, D], finite; float32, bfloat16, float16 (computed in fp32) or float64. Squared
            distances are fp32: for points 1e19 apart the inertia is inf, so scale them down.
        num_clusters: K, 1 <= K <= N.
        num_iters: updates of the centroids, at most; >= 0.
        tol: also stop after an update that moves the centroids by a total squared distance of at
            most ``tol`` times the mean variance of the points' columns, as in scikit-learn; >= 0.
        num_restarts: independent runs from different initial centroids; the result is the one with
            the lowest inertia. Only 1 with a Tensor ``init``.
        init: "random" (K distinct points), "k-means++", or centroids (a warm start): [K, D], or
            fewer, to which random points are added.
        seed: decides the initial centroids; restart r uses seed + r.
        spherical: keep centroids at unit length (for unit points: cosine k-means).
        weights: [N], >= 0, of each point in means, inertia and initial draws; None: 1. Equal
            weights give the clusters of None.
        group: a process group whose ranks each hold a slice of the points; N counts all slices.
        backend: "auto", a backend that both ops have, e.g. "reference", or "faiss": faiss.Kmeans
            on all points, as in the paper (no group, weights, "k-means++" or tol; all iterations).
        progress: called in each iteration with its number and the inertia before its update, a
            scalar tensor; faiss does not call it.
    Returns:
        Clusters; ``num_iters`` says how many iterations ran.
    Raises:
        ValueError, TypeError: shapes or dtypes are wrong, K is out of range, points or weights are
            not finite, or the named backend cannot run, "faiss" without faiss included.
    """
    checks.matrix("kmeans", "points", points, "[N, D]")
    points = points.detach()
    points = points if points.dtype == torch.float64 else points.float()
    rows = _Points(points, group, backend)
    if not isinstance(num_clusters, Integral) or not 1 <= num_clusters <= rows.count:
        raise ValueError(
            f"kmeans: expected 1 <= num_clusters <= N = {rows.count} points, got {num_clusters}; "
            f"lower num_clusters or give more points"
        )
    if num_iters < 0 or num_restarts < 1:
        raise ValueError(
            f"kmeans: expected num_iters >= 0 and num_restarts >= 1, got {num_iters}, "
            f"{num_restarts}"
        )
    if isinstance(init, Tensor) and num_restarts > 1:
        raise ValueError(
            f"kmeans: expected num_restarts=1 with init centroids, got {num_restarts}; every "
            "restart would begin at the same centroids"
        )
    if not isinstance(tol, Real) or not 0 <= tol < math.inf:
        raise ValueError(f"kmeans: expected a finite tol >= 0, got {tol!r}")
    _check_values(rows, num_clusters, init)
    _weigh(rows, weights)

    assign = assignment(points, num_clusters, "auto" if backend == "faiss" else backend)

    def start(restart: int) -> Tensor:
        return _first_centroids(rows, num_clusters, init, seed + restart, assign)

    if backend == "faiss":
        if group is not None or weights is not None or init == "k-means++" or tol:
            raise ValueError(
                "kmeans: backend 'faiss' takes init='random' or a Tensor, no group, no weights and "
                f"no tol, got init={init!r}, group={group}, weights={weights}, tol={tol}; use "
                "backend='auto'"
            )
        centroids, history = _faiss(
            points,
            num_clusters,
            start(0) if isinstance(init, Tensor) else None,
            num_iters=num_iters,
            num_restarts=num_restarts,
            seed=seed,
            spherical=spherical,
        )
        labels, distances = assign(centroids)
        return _clusters(rows, centroids, labels, distances, history)
    limit = tol * _mean_variance(rows) if tol else 0.0

    def run(restart: int) -> Clusters:
        return _lloyd(rows, start(restart), num_iters, limit, spherical, assign, progress)

    return min(map(run, range(num_restarts)), key=lambda clusters: clusters.inertia)


def _check_values(rows: _Points, num_clusters: int, init: str | Tensor) -> None:
    points = rows.points
    if isinstance(init, Tensor):
        if init.ndim != 2 or len(init) > num_clusters or init.shape[1] != points.shape[1]:
            most = [num_clusters, points.shape[1]]
            raise ValueError(
                f"kmeans: expected init centroids [at most K, D] = {most}, got {list(init.shape)}"
            )
    elif init not in INITS:
        raise ValueError(f"kmeans: expected init in {INITS} or a Tensor [K, D], got {init!r}")
    bad = ~torch.isfinite(points).all(dim=1)
    if total := int(rows.sum(bad.sum())):
        where = f"; the first is row {int(bad.int().argmax())}" if bad.any() else ""
        raise ValueError(f"kmeans: expected finite points, got {total} rows with NaN or inf{where}")


def _weigh(rows: _Points, weights: Tensor | Sequence[float] | None) -> None:
    """Give the rows their weights, checked, in fp64 on the points' device."""
    if weights is None:
        return
    weights = torch.as_tensor(weights, dtype=torch.float64, device=rows.points.device).detach()
    if weights.shape != (n := rows.points.shape[:1]):
        raise ValueError(f"kmeans: expected weights [N] = {list(n)}, got {list(weights.shape)}")
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if total := int(rows.sum(bad.sum())):
        raise ValueError(
            f"kmeans: expected finite weights of at least 0, got {total} negative or not finite"
        )
    if not rows.sum(weights.sum()):
        raise ValueError("kmeans: expected a weight above 0, got zeros only")
    first = rows.pick(weights[:, None], torch.zeros(1, dtype=torch.int64))[0, 0]
    if rows.sum((weights != first).sum()):
        rows.weights = weights
    else:  # points of equal weight are drawn and averaged as those without
        rows.weight = float(first)


def _mean_variance(rows: _Points) -> float:
    """The mean over the columns of the variance of all ranks' points, unweighted."""
    points = rows.points
    columns = points.shape[1]
    if not columns:
        return 0.0
    if len(points):
        variance, mean = (x.double() for x in torch.var_mean(points, dim=0, correction=0))
    else:
        variance = mean = points.new_zeros(columns, dtype=torch.float64)
    whole_mean = rows.sum(mean * len(points)) / rows.count
    apart = (mean - whole_mean).square()
    return float(rows.sum((variance + apart) * len(points)).mean()) / rows.count


def _first_centroids(
    rows: _Points, num_clusters: int, init: str | Tensor, seed: int, assign: Assign
) -> Tensor:
    """Given centroids, random points, or k-means++ (Arthur and Vassilvitskii 2007) in few passes.

    A pass draws many candidates by their squared distance at its start. They are then visited in
    order, and each is kept with probability (distance now) / (distance at the start). This is
    rejection sampling, so the distribution is that of the sequential method.
    """
    points = rows.points
    generator = torch.Generator().manual_seed(seed)
    warm = init.detach().to(points) if isinstance(init, Tensor) else points[:0]
    num_random = 1 if init == "k-means++" else num_clusters - len(warm)
    if rows.weights is None:
        index = torch.randperm(rows.count, generator=generator)[:num_random]
    else:
        # By weight, without replacement: the largest log(u) / w (Efraimidis and Spirakis 2006).
        uniform = torch.rand(rows.count, generator=generator, dtype=torch.float64)
        keys = torch.zeros_like(uniform, device=points.device)
        of_rank = slice(rows.start, rows.start + len(points))
        keys[of_rank] = uniform[of_rank].to(points.device).log() / rows.weights
        index = rows.sum(keys).topk(num_random).indices
    centroids = torch.cat([warm, rows.pick(points, index)])
    squared = points.new_full((len(points),), math.inf, dtype=torch.float64)
    fresh = centroids
    while len(centroids) < num_clusters:
        squared = torch.minimum(squared, assign(fresh)[1].double())
        draws = min(MAX_DRAWS, max(8, len(centroids)))
        where, luck = torch.rand(2, draws, generator=generator, dtype=torch.float64)
        fresh = _drawn(rows, squared, where, luck)[: num_clusters - len(centroids)]
        centroids = torch.cat([centroids, fresh])
    return centroids


def _drawn(rows: _Points, squared: Tensor, where: Tensor, luck: Tensor) -> Tensor:
    """The candidates that ``luck`` [M] keeps, [<= M, D]. A candidate is the point where the running
    sum of weight x squared distance, over all ranks, passes ``where`` [M] times the total."""
    points = rows.points
    mass = squared if rows.weights is None else squared * rows.weights
    sums = mass.new_zeros(len(rows.sizes))
    sums[rows.rank] = mass.sum()
    bounds = rows.sum(sums).cumsum(0)
    aim = where.to(points.device) * bounds[-1]
    owner = torch.searchsorted(bounds, aim, right=True).clamp_max(len(bounds) - 1)
    local = aim - (bounds - sums)[rows.rank]
    row = torch.searchsorted(mass.cumsum(0), local, right=True).clamp_max(max(0, len(points) - 1))
    index = rows.sum(torch.where(owner == rows.rank, rows.start + row, 0))
    candidates = rows.pick(points, index)
    start = rows.pick(squared[:, None], index)[:, 0].cpu().numpy()
    apart = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    between = apart.double().square().cpu().numpy()
    now = start.copy()
    accepted = []
    for j, u in enumerate(luck.tolist()):
        # All distances are 0 if only duplicates are left; then any point will do.
        if now[j] >= u * start[j] and (now[j] > 0 or start[j] == 0):
            accepted.append(j)
            np.minimum(now, between[j], out=now)
    return candidates[accepted]


def _lloyd(
    rows: _Points,
    centroids: Tensor,
    num_iters: int,
    limit: float,
    spherical: bool,
    assign: Assign,
    progress: Progress | None,
) -> Clusters:
    """Lloyd's iterations, until the centroids move by at most ``limit`` in squared distance."""
    if spherical:
        centroids = torch.nn.functional.normalize(centroids, dim=1)
    values = rows.values()
    history: list[Tensor] = []
    labels, distances = assign(centroids)
    for iteration in range(num_iters):
        means, counts = rows.means(values, labels, len(centroids))
        updated = _split_largest(means.where(counts[:, None] > 0, centroids), counts)
        if spherical:
            updated = torch.nn.functional.normalize(updated, dim=1)
        inertia, moving = rows.inertia(distances, _moved(centroids, updated, limit))
        history.append(inertia)
        if progress is not None:
            progress(iteration, inertia)
        centroids = updated
        is_moving = _read_later(moving)
        waits = moving.is_cuda  # reading now would leave the device idle
        if not limit and not waits and not is_moving():
            break  # equal centroids: the labels are theirs already
        labels, distances = assign(centroids)
        if not is_moving():
            break
    return _clusters(rows, centroids, labels, distances, history)


def _moved(old: Tensor, new: Tensor, limit: float) -> Tensor:
    """Whether the squared distances of centroids [K, D] add up to more than ``limit``, bool []."""
    if not limit:
        return (new != old).any()
    return ~(torch.linalg.vector_norm(new - old, dtype=torch.float64).square() <= limit)


def _read_later(value: Tensor) -> Callable[[], bool]:
    """A function that waits for a scalar on the device, but not for work queued after it."""
    if not value.is_cuda:
        return lambda: bool(value)
    host = torch.empty_like(value, device="cpu", pin_memory=True)
    host.copy_(value, non_blocking=True)
    arrived = torch.cuda.current_stream(value.device).record_event()

    def read() -> bool:
        arrived.synchronize()
        return bool(host)

    return read


def _clusters(
    rows: _Points,
    centroids: Tensor,
    labels: Tensor,
    distances: Tensor,
    history: list[Tensor] | list[float],
) -> Clusters:
    """The result: centroids [K, D], the labels and squared distances that belong to them, and the
    inertia before each update."""
    counts = rows.sum(torch.bincount(labels, minlength=len(centroids)))
    inertia, _ = rows.inertia(distances, torch.zeros((), dtype=torch.bool, device=labels.device))
    return Clusters(centroids, labels, counts, (*map(float, history), float(inertia)))


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
    start: Tensor | None,
    *,
    num_iters: int,
    num_restarts: int,
    seed: int,
    spherical: bool,
) -> tuple[Tensor, list[float]]:
    """faiss.Kmeans on all points -> centroids [K, D], inertia before each update.

    It runs on the GPU if the points are there and faiss was built for it.
    """
    faiss = load_faiss()
    runner = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        gpu=points.is_cuda and faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # no subsampling
        niter=num_iters,
        nredo=num_restarts,
        seed=seed,
        spherical=spherical,
    )
    init = None if start is None else start.float().cpu().numpy()
    runner.train(points.float().cpu().contiguous().numpy(), init_centroids=init)
    centroids = torch.from_numpy(runner.centroids).to(points).clone()
    if not spherical:
        return centroids, list(runner.obj)
    total = float(points.double().square().sum()) + len(points)
    return centroids, [total - 2 * x for x in runner.obj]  # for these faiss sums x.c


def numbers_to_try(num_points: int, max_clusters: int) -> list[int]:
    """2 to 16, then steps of a fifth, up to ``max_clusters`` and a third of the points."""
    steps = {*range(2, 17), *(int(16 * 1.2**i) for i in range(1, 100))}
    return sorted(k for k in steps if k <= min(max_clusters, num_points // 3))


def choose_num_clusters(
    points: Tensor,
    *,
    max_clusters: int = 300,
    max_points: int = 3000,
    seed: int = 0,
    backend: str = "auto",
    progress: Callable[[int, float], None] | None = None,
) -> tuple[int, dict[int, float]]:
    """The number of clusters with the largest mean silhouette, for ``kmeans``.

    Each number that ``numbers_to_try`` lists is clustered (k-means++, three restarts, ten
    iterations) on a sample of the points, and scored there.

    Args:
        points: [N, D] with N >= 6, as for ``kmeans``.
        max_clusters: the largest number to try, >= 2.
        max_points: size of the sample, evenly spaced rows; time grows with its square.
        seed, backend: as for ``kmeans``; "faiss" has no k-means++.
        progress: called after each number with the number and its mean silhouette.
    Returns:
        The number, and the mean silhouette, -1 to 1, of each number tried. Numbers that leave one
        cluster, or only clusters of one point, have none and are missing.
    Raises:
        ValueError: fewer than 6 points, a limit is too small, or the points are equal.
    Source:
        Rousseeuw 1987, "Silhouettes".
    """
    op = "choose_num_clusters"
    checks.matrix(op, "points", points, "[N, D]")
    if max_clusters < 2 or max_points < 6:
        raise ValueError(
            f"{op}: expected max_clusters >= 2 and max_points >= 6, got {max_clusters} and "
            f"{max_points}"
        )
    if len(points) < 6:
        raise ValueError(f"{op}: expected at least 6 points, got {len(points)}; give a number")
    from sklearn.metrics import silhouette_score

    rows = torch.linspace(0, len(points) - 1, min(max_points, len(points))).round().long()
    sample = points.detach()[rows.to(points.device)].float()
    silhouettes: dict[int, float] = {}
    if not bool((sample == sample[0]).all()):
        for k in numbers_to_try(len(sample), max_clusters):
            clusters = kmeans(
                sample, k, num_iters=10, num_restarts=3, init="k-means++", seed=seed,
                backend=backend,
            )  # fmt: skip
            labels = clusters.labels.cpu().numpy()
            if 2 <= len(np.unique(labels)) < len(labels):
                silhouettes[k] = float(silhouette_score(sample.cpu().numpy(), labels))
                if progress is not None:
                    progress(k, silhouettes[k])
    if not silhouettes:
        raise ValueError(f"{op}: expected points that differ, got equal ones; give a number")
    return max(silhouettes, key=silhouettes.__getitem__), silhouettes
