"""Lloyd's iterations, over points in memory or on disk: update the centroids, assign the points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.common.digest import digest_of
from protoclip.common.host import start_copy_to_host
from protoclip.lloyd.slices import PointSlice
from protoclip.lloyd.state import Outcome, RunState, State
from protoclip.lloyd.sweep import Assigned, InMemorySweep, Sweep
from protoclip.ops.clusters import KMeansIteration, bounds_for

SPLIT = 1 / 1024  # relative distance between the halves of a split cluster, as in faiss
CANDIDATES = 1024  # points that empty clusters may move to in one iteration
MEAN_ERROR = 128  # units in the last place that the mean of equal points may be off

Progress = Callable[[int, Tensor], None]
Count = Callable[[int, Tensor, float], None]
OnCentroids = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Settings:
    """How Lloyd's iterations go."""

    num_iters: int
    limit: float  # they end when the centroids move by at most this squared distance in total
    spherical: bool
    splits: bool  # empty clusters, instead of moving them
    count: Count  # called with an iteration, its inertia, and its share of all products
    on_centroids: OnCentroids | None
    note: Callable[[RunState], None] | None  # of where the run is, in each iteration


def lloyd(passes: Sweep, begun: RunState, settings: Settings) -> Outcome:
    """Lloyd's iterations from the centroids where a run has begun, or was stopped."""
    assert begun.centroids is not None
    rows = passes.rows
    centroids = begun.centroids
    if not begun.history:
        centroids = rows.placed(centroids, settings.spherical)
    history = list(begun.history[:-1])  # the last is computed again
    repeated = list(begun.repeated)
    best = begun.best
    converged = False
    count, columns = rows.points.count, rows.points.columns
    bounds = bounds_for(count, len(centroids), columns, passes.nearest.backend)
    assigned = passes.assign(centroids, settings.num_iters > 0, bounds)
    for iteration in range(len(history), settings.num_iters):
        is_last = iteration + 1 == settings.num_iters
        update = _iteration(passes, centroids, assigned, settings, fused=bounds is None)
        updated = update.centroids
        share = 1.0 if bounds is None else bounds.share
        settings.count(iteration, update.facts[0], share)
        wait_for_facts = start_copy_to_host(update.facts)
        ahead = Assigned(update.labels, update.distances) if len(update.labels) else None
        if updated.is_cuda and isinstance(passes, InMemorySweep):
            ahead = passes.assign(updated)  # while the host reads
        inertia, moving, empty = wait_for_facts()
        is_repeated = settings.spherical and inertia in history
        history.append(inertia)
        if best is None or not best.inertia < inertia:
            best = State(centroids, inertia, assigned.labels)
        if settings.note is not None:
            settings.note(
                begun._replace(
                    centroids=centroids,
                    history=tuple(history),
                    best=best if best.inertia < inertia else None,
                    repeated=tuple(repeated),
                )
            )
        if is_repeated and _is_circle(rows, centroids, repeated):
            converged = True
            break
        if empty and not settings.splits:
            updated = _without_empty(passes, centroids, update, assigned, settings.spherical)
            moving = float(rows.sum(_moved(centroids, updated, settings.limit).double()))
            ahead = None
        if settings.on_centroids is not None:
            settings.on_centroids(iteration, rows.in_own_frame(updated))
        converged = not moving
        if not settings.limit and converged:
            break  # equal centroids: the labels are theirs already
        centroids = updated
        assigned = ahead or passes.assign(centroids, bool(moving) and not is_last, bounds)
        if converged:
            break
    last = State(centroids, inertia_of(rows, assigned.distances), assigned.labels)
    return Outcome(best if best and best.inertia < last.inertia else last, history, converged)


def _is_circle(rows: PointSlice, centroids: Tensor, repeated: list[str]) -> bool:
    """Whether centroids have come back; they are noted. Rows of zeros are as far from all centroids
    of unit length, so that rounding can send them back and forth for ever."""
    digest = digest_of(centroids)
    is_there = torch.tensor(float(digest in repeated), device=centroids.device)
    repeated.append(digest)
    return bool(rows.sum(is_there))


def _iteration(
    passes: Sweep,
    centroids: Tensor,
    assigned: Assigned,
    settings: Settings,
    fused: bool,
) -> KMeansIteration:
    """An update of the centroids; if ``fused`` with the labels of the new ones where the backend
    computes both in one op."""
    rows = passes.rows
    if (
        fused
        and isinstance(passes, InMemorySweep)
        and passes.nearest.runs_kmeans
        and rows.group is None
        and not (settings.spherical or settings.splits)
    ):
        run = passes.nearest.function("kmeans_iteration")
        results = run(
            points=passes.nearest.points,
            values=passes.values,
            weights=rows.weights,
            weight=rows.weight,
            centre=rows.centre,
            centroids=centroids,
            labels=assigned.labels,
            distances=assigned.distances,
            codes=passes.nearest.codes,
            limit=settings.limit,
        )
        return KMeansIteration._make(results)
    means, counts = passes.means(assigned)
    updated = means.where(counts[:, None] > 0, centroids)
    if settings.splits:
        updated = _split_largest(updated, counts)
    updated = rows.placed(updated, settings.spherical)
    moved = _moved(centroids, updated, settings.limit)
    facts = _facts(rows, assigned.distances, moved, (counts == 0).any())
    return KMeansIteration(updated, counts, facts, assigned.labels[:0], assigned.distances[:0])


def _without_empty(
    passes: Sweep, centroids: Tensor, update: KMeansIteration, assigned: Assigned, spherical: bool
) -> Tensor:
    """The updated centroids [K, D] after empty clusters have moved to points."""
    rows = passes.rows
    labels = _moved_to_points(rows, update, assigned, spherical)
    if labels is None:
        return torch.where(_inexact(rows, centroids, assigned), update.centroids, centroids)
    means, counts = passes.means(passes.relabelled(assigned, labels))
    return rows.placed(means.where(counts[:, None] > 0, centroids), spherical)


def _facts(rows: PointSlice, distances: Tensor, moved: Tensor, empty: Tensor) -> Tensor:
    """The inertia, and the numbers of ranks whose centroids moved, so that ranks that round
    differently stop together, and that saw clusters without points: fp64 [3]. ``distances``:
    squared, [N]; ``moved``, ``empty``: bool []."""
    inertia = _weighted_sum(rows, distances)
    return rows.sum(torch.stack([inertia, moved.to(inertia), empty.to(inertia)]))


def inertia_of(rows: PointSlice, distances: Tensor) -> float:
    """The weighted sum of squared distances [N], over all ranks."""
    return float(rows.sum(_weighted_sum(rows, distances)))


def _weighted_sum(rows: PointSlice, distances: Tensor) -> Tensor:
    return rows.by_weight(distances).sum() * rows.weight


def _moved(old: Tensor, new: Tensor, limit: float) -> Tensor:
    """Whether the squared distances of centroids [K, D] add up to more than ``limit``, bool []."""
    if not limit:
        return (new != old).any()
    return ~(torch.linalg.vector_norm(new - old, dtype=torch.float64).square() <= limit)


def _mean_error(points: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared distance to a point [M, D] that the mean of its copies may have by rounding."""
    error = MEAN_ERROR * torch.finfo(dtype).eps
    return error**2 * points.double().square().sum(1)


def _inexact(rows: PointSlice, centroids: Tensor, assigned: Assigned) -> Tensor:
    """Which centroids differ from some of their points, bool [K, 1]. The others may stay where they
    are: the mean of copies of a point is a bit off, and an empty cluster would take them over."""
    errors = torch.zeros(2, len(centroids), dtype=torch.float64, device=centroids.device)
    errors[0].index_add_(0, assigned.labels, assigned.distances.double())
    errors[1] = torch.bincount(assigned.labels, minlength=len(centroids))
    total, counts = rows.sum(errors)
    return (total > counts * _mean_error(centroids, centroids.dtype))[:, None]


def _moved_to_points(
    rows: PointSlice, update: KMeansIteration, assigned: Assigned, spherical: bool
) -> Tensor | None:
    """Labels [N] that give each empty cluster one of the points that contribute most to the
    inertia, ties by index; None if no such point differs from its centroid.

    The points are taken one by one, each the farthest from the updated centroids and from those
    taken before, so that clusters do not move to copies of one point.
    """
    index = rows.largest(rows.by_weight(assigned.distances), CANDIDATES)
    points = rows.pick_points(index).double()  # [M, D]
    own = rows.pick(assigned.labels, index)
    nearest = update.centroids.double()[own]
    weights = points.new_ones(len(points))
    if rows.weights is not None:
        weights = rows.pick(rows.weights, index)
    floor = _mean_error(points, update.centroids.dtype)
    if rows.centre is not None:
        points, nearest = points + rows.centre, nearest + rows.centre
    if spherical:  # |x - c|^2 falls by |x| |x / |x| - c|^2
        lengths = points.norm(dim=1)
        points = torch.nn.functional.normalize(points, dim=1)
        weights = weights * lengths
    squared = (points - nearest).square().sum(1)
    empty = (update.counts == 0).nonzero()[:, 0].tolist()
    labels = assigned.labels.clone()
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
