"""Lloyd's k-means with the ops ``kmeans_assign`` and ``segment_mean``, or with faiss.

With ``group`` every rank holds a slice of the points: assignment is local, sums and counts are
all-reduced, and all ranks get the same centroids. On a GPU no iteration waits for the device: the
host reads whether the centroids still move while the device runs the next assignment.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.host import start_copy_to_host
from protoclip.common.seeds import evenly_spaced, mix
from protoclip.lloyd.starts import INITS, PointSlice, first_centroids
from protoclip.ops import checks
from protoclip.ops.clusters import (
    KMeansIteration,
    PointsAssignment,
    assignment,
    kmeans_assign,
)
from protoclip.ops.operators import without_autocast

SPLIT = 1 / 1024  # relative distance between the halves of a split cluster, as in faiss
EMPTY_CLUSTERS = ("move", "split")
CANDIDATES = 1024  # points that empty clusters may move to in one iteration
MEAN_ERROR = 128  # units in the last place that the mean of equal points may be off
LARGEST_INTEGER = 2**24  # up to which fp32 holds all integers
SMALLEST = 1e-18  # coordinates whose squares have all digits in fp32
TRANSFORM_BLOCK = 1 << 21  # distances that ``Clusters.transform`` computes at once

REMEDIES = {  # for arrays of another kind than numbers
    "b": "use .astype(np.float32), which gives 0 and 1",
    "O": "use np.stack(list(points)).astype(np.float32); its rows must be numbers, of one length",
}

Progress = Callable[[int, Tensor], None]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, repr=False)
class Clusters:
    """A clustering; labels, counts and inertia belong to the returned centroids.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> clusters = protoclip.kmeans(points, 2, init="k-means++")
        >>> bool(clusters.predict(torch.tensor([[0.2]])) == clusters.labels[0])
        True
    """

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

    def predict(self, points: Tensor | Array | Sequence[Any]) -> Tensor:
        """The nearest cluster of each point: [M, D] -> int64 [M]."""
        x = as_points(points)
        checks.matrix("predict", "points", x, "[M, D]")
        return kmeans_assign(x, self.centroids.to(x.device))[0]

    @torch.no_grad()
    def transform(self, points: Tensor | Array | Sequence[Any]) -> Tensor:
        """The distance of each point to each centroid: [M, D] -> [M, K] in the centroids' dtype.

        They are computed in fp64, some points at a time, so that points far from the origin have
        exact distances too.
        """
        x = as_points(points)
        checks.matrix("transform", "points", x, "[M, D]")
        centroids = self.centroids.to(x.device)
        checks.like("transform", "points", x, "centroids", centroids)
        middle = centroids.double().mean(0)
        centroids = centroids - middle
        norms = centroids.square().sum(1)
        distances = x.new_empty(len(x), len(centroids), dtype=self.centroids.dtype)
        rows = max(1, TRANSFORM_BLOCK // len(centroids))
        for block, out in zip(x.split(rows), distances.split(rows), strict=True):
            shifted = block - middle
            size = shifted.square().sum(1)[:, None] + norms  # [rows, K]
            squared = torch.addmm(size, shifted, centroids.T, alpha=-2)
            rounding = torch.finfo(torch.float64).eps * (2 + x.shape[1] ** 0.5) * size
            is_zero = (squared <= rounding) & size.isfinite()
            out.copy_(torch.where(is_zero, 0, squared).sqrt())
        return distances

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


@torch._disable_dynamo  # torch.compiler.disable would load dynamo and triton (1.6 s)
def kmeans(
    points: Tensor | Array | Sequence[Any],
    num_clusters: int,
    *,
    num_iters: int = 20,
    tol: float = 0.0,
    num_restarts: int = 1,
    init: str | Tensor | Array | Sequence[Any] = "k-means++",
    seed: int = 0,
    spherical: bool = False,
    weights: Tensor | Array | Sequence[float] | None = None,
    empty_clusters: str = "move",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    progress: Progress | None = None,
) -> Clusters:
    """Cluster points by Lloyd's algorithm; the same seed gives the same clusters.

    The run stops as soon as an update moves no centroid. More iterations would give the same
    result, bit for bit. The state with the lowest inertia is returned.

    Args:
        points: [N, D], a tensor, an array or a list. float32, bfloat16, float16 (computed in fp32),
            float64, or integers (computed in fp32, or in fp64 if one is above 2^24). All values
            must be finite, and so must N times the largest one (float64: its square). Squared
            distances are fp32: if points are 1e19 apart the inertia is inf, and if they are 1e-18
            apart it is too small. Both cases warn.
        num_clusters: K, 1 <= K <= N.
        num_iters: maximum number of updates of the centroids, >= 0.
        tol: also stop after an update that moves the centroids by a total squared distance of at
            most ``tol`` times the mean variance of the points' columns, as in scikit-learn; >= 0.
        num_restarts: independent runs from different initial centroids; the result is the one with
            the lowest inertia. Only 1 with given centroids.
        init: "k-means++", "random" (K distinct points), or centroids (a warm start): [K, D], or
            fewer, to which random points are added. "k-means++" is greedy, as in scikit-learn: the
            best of 2 + log K candidates for each centroid. Where N K is above 64 million, or the
            points take more than 256 MiB, it looks at a sample of 64 K points, and at least
            16,384; where the sample exceeds these limits too, one candidate is drawn for each
            centroid, as "plain k-means++" does with all points.
        seed: decides the initial centroids. The first run starts as one without restarts does,
            the others from a hash of the seed and their number.
        spherical: keep centroids at unit length (for unit points: cosine k-means).
        weights: [N], >= 0, of each point in means, inertia and initial draws; None: 1. Equal
            weights give the clusters of None.
        empty_clusters: "move" them to the points that contribute most to the inertia; with more
            clusters than distinct points some stay empty. "split": they take half of the largest
            cluster, as in faiss, and the points are not centred (training's episodes).
        group: a process group whose ranks each hold a slice of the points; N counts all slices.
        backend: "auto", a backend that both ops have, e.g. "reference", or "faiss": faiss.Kmeans
            on all points, as in the paper (no group, weights or tol; all iterations). With
            init="random" it draws the points itself.
        progress: called in each iteration with its number and the inertia before its update, a
            scalar tensor; faiss does not call it.
    Returns:
        Clusters; ``num_iters`` says how many iterations ran.
    Raises:
        ValueError, TypeError: shapes or dtypes are wrong, a number is out of range, points, weights
            or given centroids are not finite, or the named backend cannot run, "faiss" without
            faiss included.

    Example:
        >>> points = torch.cat([torch.zeros(5, 2), torch.ones(5, 2)])
        >>> clusters = protoclip.kmeans(points, 2, init="k-means++")
        >>> clusters.inertia
        0.0
        >>> sorted(clusters.counts.tolist())
        [5, 5]
    """
    x = as_points(points)
    checks.matrix("kmeans", "points", x, "[N, D]")
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    rows = PointSlice(x, group, backend)
    _check_numbers(rows, num_clusters, num_iters, num_restarts, tol, seed)
    num_clusters, seed = int(num_clusters), int(seed)  # NumPy's integers overflow
    if empty_clusters not in EMPTY_CLUSTERS:
        raise ValueError(
            f"kmeans: expected empty_clusters in {EMPTY_CLUSTERS}, got {empty_clusters!r}"
        )
    first = init if isinstance(init, str) else as_points(init)
    if isinstance(first, Tensor) and num_restarts > 1:
        raise ValueError(
            f"kmeans: expected num_restarts=1 with init centroids, got {num_restarts}; every "
            "restart would begin at the same centroids"
        )
    _check_values(rows, num_clusters, first)
    _weigh(rows, weights)
    if empty_clusters == "move" and backend != "faiss":
        rows.move_to_centre(spherical)

    assign = assignment(rows.points, num_clusters, "auto" if backend == "faiss" else backend)

    def start(restart: int) -> Tensor:
        # Hashed, so that the restarts of neighbouring seeds are others.
        restart_seed = int(mix(seed, restart)) >> 1 if restart else seed
        with without_autocast(x.device.type):
            return first_centroids(rows, num_clusters, first, restart_seed, assign)

    if backend == "faiss" and (group is not None or weights is not None or tol):
        raise ValueError(
            "kmeans: backend 'faiss' takes no group, no weights and no tol, got group="
            f"{group}, weights={weights}, tol={tol}; use backend='auto'"
        )
    limit = tol * _mean_variance(rows) if tol else 0.0
    faiss_draws = backend == "faiss" and isinstance(first, str) and first == "random"

    def run(restart: int) -> Clusters:
        if backend == "faiss":
            centroids, history = _faiss(
                x,
                num_clusters,
                None if faiss_draws else start(restart),
                num_iters=num_iters,
                num_restarts=num_restarts if faiss_draws else 1,
                seed=seed,
                spherical=spherical,
            )
            labels, distances = assign(centroids)
            state = _State(centroids, labels, distances, _inertia(rows, distances))
            return _clusters(rows, state, history)
        return _lloyd(
            rows,
            start(restart),
            num_iters=num_iters,
            limit=limit,
            spherical=spherical,
            splits=empty_clusters == "split",
            assign=assign,
            progress=progress,
        )

    restarts = range(1 if faiss_draws else num_restarts)
    return min(map(run, restarts), key=lambda clusters: clusters.inertia)


def as_points(x: Any) -> Any:
    """A list or array of numbers as a floating-point tensor, which shares the array's memory where
    torch can; integers become fp32, or fp64 where fp32 does not hold them."""
    if isinstance(x, (list, tuple)):
        try:
            x = np.array(x, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"kmeans: expected points, or centroids, as rows of numbers of one length ({error})"
            ) from error
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "fiu":
            remedy = REMEDIES.get(x.dtype.kind, "give numbers, such as features of an encoder")
            raise TypeError(
                "kmeans: expected points, or centroids, as an array of numbers, got one of "
                f"{x.dtype}; {remedy}"
            )
        if min(x.strides, default=0) < 0:  # torch takes none, also where there is one row
            x = x.copy()
        native = x.dtype.newbyteorder("=")
        x = torch.from_numpy(np.require(x, dtype=native, requirements=["C", "W"]))
    if not isinstance(x, Tensor) or x.dtype not in checks.INTEGERS + checks.OTHER_INTEGERS:
        return x
    x = x.double()
    return x if (x.abs() > LARGEST_INTEGER).any() else x.float()


def _check_numbers(
    rows: PointSlice, num_clusters: int, num_iters: int, num_restarts: int, tol: float, seed: int
) -> None:
    if not isinstance(num_clusters, Integral) or not 1 <= num_clusters <= rows.count:
        raise ValueError(
            f"kmeans: expected an integer 1 <= num_clusters <= N = {rows.count} points, got "
            f"{num_clusters!r}; lower num_clusters or give more points"
        )
    if (
        not isinstance(num_iters, Integral)
        or not isinstance(num_restarts, Integral)
        or num_iters < 0
        or num_restarts < 1
    ):
        raise ValueError(
            "kmeans: expected integers num_iters >= 0 and num_restarts >= 1, got "
            f"{num_iters!r}, {num_restarts!r}"
        )
    if not isinstance(tol, Real) or not 0 <= tol < math.inf:
        raise ValueError(f"kmeans: expected a finite tol >= 0, got {tol!r}")
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"kmeans: expected an integer seed of 64 bits, got {seed!r}")


def _check_values(rows: PointSlice, num_clusters: int, init: str | Tensor) -> None:
    columns = rows.points.shape[1]
    if isinstance(init, Tensor):
        if init.ndim != 2 or len(init) > num_clusters or init.shape[1] != columns:
            raise ValueError(
                f"kmeans: expected init centroids [at most K, D] = {[num_clusters, columns]}, got "
                f"{list(init.shape)}"
            )
        bad = ~torch.isfinite(init).all(dim=1)
        if bad.any():
            raise ValueError(
                f"kmeans: expected finite init centroids, got {int(bad.sum())} rows with NaN or "
                f"inf; the first is row {int(bad.int().argmax())}"
            )
    elif init not in INITS:
        raise ValueError(f"kmeans: expected init in {INITS} or a Tensor [K, D], got {init!r}")
    # So the sum of the points is finite, and in fp64 a squared distance.
    largest = torch.finfo(rows.points.dtype).max / rows.count
    if rows.points.dtype == torch.float64:
        largest = min(largest, 1e150)
    if rows.points.shape[1] == 0:
        return
    if int(rows.sum((~(rows.bounds <= largest)).sum())):  # NaN fits nowhere
        fits = torch.linalg.vector_norm(rows.points, ord=math.inf, dim=1) <= largest
        not_finite = ~torch.isfinite(rows.points).all(dim=1)
        _refuse_rows(not_finite, rows, "finite points", "NaN or inf")
        limit = f"points of at most {largest:.1e}, whose sums and squares are finite"
        _refuse_rows(~fits, rows, limit, "larger values")


def _refuse_rows(bad: Tensor, rows: PointSlice, expected: str, found: str) -> None:
    """Raise ValueError on all ranks if a row of any is bad, bool [N]."""
    if total := int(rows.sum(bad.sum())):
        where = f"; the first is row {int(bad.int().argmax())}" if bad.any() else ""
        raise ValueError(f"kmeans: expected {expected}, got {total} rows with {found}{where}")


def _weigh(rows: PointSlice, weights: Tensor | Array | Sequence[float] | None) -> None:
    """Give the rows their weights, checked, in fp64 on the points' device."""
    if weights is None:
        return
    try:
        if not isinstance(weights, Tensor):
            weights = np.array(weights, dtype=np.float64)  # of any order, also a pandas Series
        weights = torch.as_tensor(weights, dtype=torch.float64, device=rows.points.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"kmeans: expected weights [N] as numbers, got {weights!r:.80}") from error
    if weights.shape != (n := rows.points.shape[:1]):
        raise ValueError(f"kmeans: expected weights [N] = {list(n)}, got {list(weights.shape)}")
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if total := int(rows.sum(bad.sum())):
        raise ValueError(
            f"kmeans: expected finite weights of at least 0, got {total} negative or not finite"
        )
    sum_of_weights = float(rows.sum(weights.sum()))
    if not sum_of_weights:
        raise ValueError("kmeans: expected a weight above 0, got zeros only")
    if sum_of_weights == math.inf:
        raise ValueError("kmeans: expected weights with a finite sum; divide them by a number")
    first = rows.pick(weights[:, None], weights.new_zeros(1, dtype=torch.int64))[0, 0]
    if rows.sum((weights != first).sum()):
        # Scaled by a power of two, which is exact, they are neither 0 nor inf in fp32.
        rows.weight = 2.0 ** math.floor(math.log2(sum_of_weights))
        rows.weights = weights / rows.weight
    else:  # points of equal weight are drawn and averaged as those without
        rows.weight = float(first)


def _mean_variance(rows: PointSlice) -> float:
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


class _State(NamedTuple):
    """Centroids, and what belongs to them."""

    centroids: Tensor  # [K, D]
    labels: Tensor  # int64 [N]
    distances: Tensor  # fp32 [N], squared
    inertia: float


def _lloyd(
    rows: PointSlice,
    centroids: Tensor,
    *,
    num_iters: int,
    limit: float,
    spherical: bool,
    splits: bool,
    assign: PointsAssignment,
    progress: Progress | None,
) -> Clusters:
    """Lloyd's iterations, until the centroids move by at most ``limit`` in squared distance."""
    centroids = rows.placed(centroids, spherical)
    values = rows.values()
    history: list[float] = []
    best: _State | None = None
    labels, distances = assign(centroids)
    for iteration in range(num_iters):
        update = _iteration(
            rows,
            values,
            centroids,
            labels,
            distances,
            limit=limit,
            spherical=spherical,
            splits=splits,
            assign=assign,
        )
        updated = update.centroids
        if progress is not None:
            progress(iteration, _Facts._make(update.facts).inertia)
        wait_for_facts = start_copy_to_host(update.facts)
        ahead = (update.labels, update.distances) if len(update.labels) else None
        if updated.is_cuda:
            ahead = assign(updated)  # while the host reads
        on_host = _Facts._make(wait_for_facts())
        history.append(on_host.inertia)
        if best is None or not best.inertia < on_host.inertia:
            best = _State(centroids, labels, distances, on_host.inertia)
        moving = on_host.moving
        if on_host.empty and not splits:
            relabelled = _moved_to_points(
                rows, updated, update.counts, labels, distances, spherical
            )
            if relabelled is not None:
                means, counts = rows.means(values, relabelled, len(centroids))
                updated = rows.placed(means.where(counts[:, None] > 0, centroids), spherical)
            else:
                updated = torch.where(
                    _inexact(rows, centroids, labels, distances), updated, centroids
                )
            moving = float(rows.sum(_moved(centroids, updated, limit).double()))
            ahead = None
        if not limit and not moving:
            break  # equal centroids: the labels are theirs already
        centroids = updated
        labels, distances = ahead or assign(centroids)
        if not moving:
            break
    last = _State(centroids, labels, distances, _inertia(rows, distances))
    return _clusters(rows, best if best and best.inertia < last.inertia else last, history)


def _iteration(
    rows: PointSlice,
    values: Tensor,
    centroids: Tensor,
    labels: Tensor,
    distances: Tensor,
    *,
    limit: float,
    spherical: bool,
    splits: bool,
    assign: PointsAssignment,
) -> KMeansIteration:
    """An update of the centroids, with the labels of the new ones where the backend computes both
    in one op."""
    if assign.runs_kmeans and rows.group is None and not (spherical or splits):
        return assign.iteration(
            values,
            centroids,
            labels,
            distances,
            weights=rows.weights,
            weight=rows.weight,
            centre=rows.centre,
            limit=limit,
        )
    means, counts = rows.means(values, labels, len(centroids))
    updated = means.where(counts[:, None] > 0, centroids)
    if splits:
        updated = _split_largest(updated, counts)
    updated = rows.placed(updated, spherical)
    moved = _moved(centroids, updated, limit)
    facts = _facts(rows, distances, moved, (counts == 0).any())
    return KMeansIteration(updated, counts, facts, labels[:0], distances[:0])


class _Facts(NamedTuple):
    """Of an iteration, over all ranks: numbers, or scalars that are still on the device."""

    inertia: Any  # the weighted sum of squared distances
    moving: Any  # ranks whose centroids moved, so that ranks that round differently stop together
    empty: Any  # ranks that saw clusters without points


def _facts(rows: PointSlice, distances: Tensor, moved: Tensor, empty: Tensor) -> Tensor:
    """``_Facts`` as fp64 [3]. ``distances``: squared, [N]; ``moved``, ``empty``: bool []."""
    inertia = _weighted_sum(rows, distances)
    return rows.sum(torch.stack([inertia, moved.to(inertia), empty.to(inertia)]))


def _inertia(rows: PointSlice, distances: Tensor) -> float:
    return float(rows.sum(_weighted_sum(rows, distances)))


def _weighted_sum(rows: PointSlice, distances: Tensor) -> Tensor:
    return rows.by_weight(distances).sum() * rows.weight


def _moved(old: Tensor, new: Tensor, limit: float) -> Tensor:
    """Whether the squared distances of centroids [K, D] add up to more than ``limit``, bool []."""
    if not limit:
        return (new != old).any()
    return ~(torch.linalg.vector_norm(new - old, dtype=torch.float64).square() <= limit)


def _clusters(rows: PointSlice, state: _State, history: list[float]) -> Clusters:
    """The result: the state in the points' own frame, and the inertia before each update."""
    centroids, labels, _, inertia = state
    if inertia == math.inf:
        warnings.warn(
            "kmeans: the inertia is inf, because squared distances exceed fp32's 3e38; scale the "
            "points down",
            RuntimeWarning,
            stacklevel=3,
        )
    if inertia < 1e-30 and 0 < _largest(rows.points) < SMALLEST:
        warnings.warn(
            f"kmeans: points less than {SMALLEST:g} apart, whose squared distances fp32 cannot "
            "hold, so clusters and inertia are wrong; scale the points up",
            RuntimeWarning,
            stacklevel=3,
        )
    counts = rows.sum(torch.bincount(labels, minlength=len(centroids)))
    if rows.centre is not None:
        centroids = centroids + rows.centre
    return Clusters(centroids, labels, counts, (*history, inertia))


def _largest(points: Tensor) -> float:
    """The largest absolute coordinate."""
    return float(torch.linalg.vector_norm(points, math.inf)) if points.numel() else 0.0


def _mean_error(points: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared distance to a point [M, D] that the mean of its copies may have by rounding."""
    error = MEAN_ERROR * torch.finfo(dtype).eps
    return error**2 * points.double().square().sum(1)


def _inexact(rows: PointSlice, centroids: Tensor, labels: Tensor, distances: Tensor) -> Tensor:
    """Which centroids differ from some of their points, bool [K, 1]. The others may stay where they
    are: the mean of copies of a point is a bit off, and an empty cluster would take them over."""
    errors = torch.zeros(2, len(centroids), dtype=torch.float64, device=labels.device)
    errors[0].index_add_(0, labels, distances.double())
    errors[1] = torch.bincount(labels, minlength=len(centroids))
    total, counts = rows.sum(errors)
    return (total > counts * _mean_error(centroids, centroids.dtype))[:, None]


def _moved_to_points(
    rows: PointSlice,
    centroids: Tensor,
    counts: Tensor,
    labels: Tensor,
    distances: Tensor,
    spherical: bool,
) -> Tensor | None:
    """Labels [N] that give each empty cluster one of the points that contribute most to the
    inertia, ties by index; None if no such point differs from its centroid.

    The points are taken one by one, each the farthest from the updated centroids and from those
    taken before, so that clusters do not move to copies of one point.
    """
    index = rows.largest(rows.by_weight(distances), CANDIDATES)
    points = rows.pick(rows.points, index).double()  # [M, D]
    own = rows.pick(labels[:, None], index)[:, 0]
    nearest = centroids.double()[own]
    weights = points.new_ones(len(points))
    if rows.weights is not None:
        weights = rows.pick(rows.weights[:, None], index)[:, 0]
    floor = _mean_error(points, centroids.dtype)
    if rows.centre is not None:
        points, nearest = points + rows.centre, nearest + rows.centre
    if spherical:  # |x - c|^2 falls by |x| |x / |x| - c|^2
        lengths = points.norm(dim=1)
        points = torch.nn.functional.normalize(points, dim=1)
        weights = weights * lengths
    squared = (points - nearest).square().sum(1)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    labels = labels.clone()
    for number, cluster in enumerate(empty):
        gain = torch.where(squared > floor, weights * squared, 0.0).cpu().numpy()
        taken = int(gain.argmax())
        if not gain[taken] > 0:
            return labels if number else None
        local = int(index[taken]) - rows.start
        if 0 <= local < len(labels):
            labels[local] = cluster
        squared = torch.minimum(squared, (points - points[taken]).square().sum(1))
    return labels


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
        seed=(seed + 2**31) % 2**32 - 2**31,  # its own has 32 bits
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
    points: Tensor | Array,
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
        seed, backend: as for ``kmeans``.
        progress: called after each number with the number and its mean silhouette.
    Returns:
        The number, and the mean silhouette, -1 to 1, of each number tried. Numbers that leave one
        cluster, or only clusters of one point, have none and are missing.
    Raises:
        ValueError: fewer than 6 points, a limit is too small, or the points are equal.
    Source:
        Rousseeuw 1987, "Silhouettes".

    Example:
        >>> points = torch.arange(3).repeat_interleave(20)[:, None] * 10.0 + torch.randn(60, 1)
        >>> k, silhouettes = protoclip.choose_num_clusters(points)
        >>> k
        3
    """
    op = "choose_num_clusters"
    x = as_points(points)
    checks.matrix(op, "points", x, "[N, D]")
    if max_clusters < 2 or max_points < 6:
        raise ValueError(
            f"{op}: expected max_clusters >= 2 and max_points >= 6, got {max_clusters} and "
            f"{max_points}"
        )
    if len(x) < 6:
        raise ValueError(f"{op}: expected at least 6 points, got {len(x)}; give a number")
    from sklearn.metrics import silhouette_score

    bad = ~torch.isfinite(x).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{op}: expected finite points, got {int(bad.sum())} rows with NaN or inf; the first "
            f"is row {int(bad.int().argmax())}"
        )
    sample = x.detach()[evenly_spaced(len(x), max_points).to(x.device)]
    sample = sample if sample.dtype == torch.float64 else sample.float()
    centred = (sample - sample.mean(0)).cpu().numpy()  # far from 0 silhouettes lose their digits
    silhouettes: dict[int, float] = {}
    if not bool((sample == sample[0]).all()):
        for k in numbers_to_try(len(sample), max_clusters):
            clusters = kmeans(
                sample, k, num_iters=10, num_restarts=3, init="k-means++", seed=seed,
                backend=backend,
            )  # fmt: skip
            labels = clusters.labels.cpu().numpy()
            if 2 <= len(np.unique(labels)) < len(labels):
                silhouettes[k] = float(silhouette_score(centred, labels))
                if progress is not None:
                    progress(k, silhouettes[k])
    if not silhouettes:
        raise ValueError(f"{op}: expected points that differ, got equal ones; give a number")
    return max(silhouettes, key=silhouettes.__getitem__), silhouettes
