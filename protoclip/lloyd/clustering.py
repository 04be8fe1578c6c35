"""``protoclip.kmeans``: checks, starts, runs."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.digest import Digest, digest_of
from protoclip.common.files import in_percent
from protoclip.common.seeds import mix
from protoclip.common.waits import Wait
from protoclip.lloyd.clusters import Clusters, Rows
from protoclip.lloyd.loop import OnCentroids, Progress, Settings, inertia_of, lloyd
from protoclip.lloyd.points import (
    LARGEST_INTEGER,
    Array,
    InMemory,
    OnDisk,
    as_points,
    each_row,
    open_points,
)
from protoclip.lloyd.slices import PointSlice, Summary, largest_magnitude
from protoclip.lloyd.starts import INITS, first_centroids, held
from protoclip.lloyd.state import Outcome, RunFile, RunState, State, StateFile, identity
from protoclip.lloyd.sweep import OnRows, sweep
from protoclip.ops.operators import untraced, without_autocast

EMPTY_CLUSTERS = ("move", "split")
TOL = 1e-4
SMALLEST = 1e-18  # coordinates whose squares have all digits in fp32


@untraced
def kmeans(
    points: Rows,
    num_clusters: int,
    *,
    num_iters: int = 300,
    tol: float | None = None,
    num_restarts: int = 1,
    init: str | Tensor | Array | Sequence[Any] = "k-means++",
    seed: int = 0,
    spherical: bool = False,
    weights: Tensor | Array | Sequence[float] | None = None,
    empty_clusters: str = "move",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    on_rows: OnRows | None = None,
    on_centroids: OnCentroids | None = None,
    state: str | os.PathLike[str] | None = None,
    state_seconds: float = 600,
    warn: bool = True,
) -> Clusters:
    """Cluster points by Lloyd's algorithm; the same seed gives the same clusters.

    The run has converged when an update moves the centroids by no more than ``tol`` allows. If it
    moves none, more iterations would give the same result, bit for bit. The state with the lowest
    inertia is returned.

    Args:
        points: [N, D], a tensor, an array or a list; or rows on disk: ``open_features``, a path
            that it takes, or a ``np.memmap``. Rows on disk are read once in each iteration, in
            blocks, and give the clusters of the same rows in memory; on a CPU the same bits.
            float32, bfloat16, float16 (computed in fp32), float64, or integers (computed in fp32,
            or in fp64 if one is above 2^24). All values must be finite, and so must N times the
            largest one (float64: its square). Squared distances are fp32: if points are 1e19 apart
            the inertia is inf, and if they are 1e-18 apart it is too small. Both cases warn.
        num_clusters: K, 1 <= K <= N.
        num_iters: maximum number of updates of the centroids, >= 0. A run that it ends before it
            has converged warns.
        tol: stop after an update that moves the centroids by a total squared distance of at most
            ``tol`` times the mean variance of the points' columns, as in scikit-learn; >= 0. None:
            1e-4. With 0 only an update that moves none ends the run.
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
            on all points, as in the paper (in memory; no group, weights or tol; all iterations,
            after which it does not say whether it converged). With init="random" it draws the
            points itself.
        device: where blocks of rows on disk are clustered; None: the CPU. Points in memory are
            clustered where they are.
        progress: called in each iteration with its number and the inertia before its update, a
            scalar tensor; faiss does not call it.
        on_rows: called after each block of rows on disk with the rows read so far in this pass, and
            N.
        on_centroids: called in each iteration with its number and the updated centroids, [K, D]. As
            ``init`` they begin another run; ``state`` continues one.
        state: a file of K x D numbers, up to three times. The same call with the same points
            continues there; on as many threads of the same instruction set, with the result of an
            uninterrupted one, bit for bit, otherwise up to rounding. It is written before the work,
            every ``state_seconds``, when an exception stops the run, and at its end, after which
            the call takes one pass. With a group the first rank's file is used. Not with faiss.
        state_seconds: >= 0; 0: write in each iteration.
        warn: whether a run that has not converged warns.
    Returns:
        Clusters; ``num_iters`` says how many iterations ran, ``converged`` whether they sufficed.
    Raises:
        ValueError, TypeError: shapes or dtypes are wrong, a number is out of range, points, weights
            or given centroids are not finite, the named backend cannot run, "faiss" without faiss
            included, or a file cannot be read or has changed since it was opened; ``state`` is of
            another call, of other points, torn, or in use by another process.
        OSError: ``state`` cannot be written or read. A disk that is full later only warns.

    Example:
        >>> points = torch.cat([torch.zeros(5, 2), torch.ones(5, 2)])
        >>> clusters = protoclip.kmeans(points, 2)
        >>> clusters.inertia
        0.0
        >>> sorted(clusters.counts.tolist())
        [5, 5]
    """
    rows = PointSlice(open_points("kmeans", "points", points, device), group, backend)
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
    _check_init(rows, num_clusters, first)
    is_faiss = backend == "faiss"
    if is_faiss and state is not None:
        raise ValueError(
            f"kmeans: backend 'faiss' keeps no state, got state={str(state)!r}; leave it out, or "
            "use backend='auto'"
        )
    if not isinstance(state_seconds, Real) or not state_seconds >= 0:
        raise ValueError(f"kmeans: expected state_seconds >= 0, got {state_seconds!r}")
    largest_move = tol if tol is not None else 0.0 if is_faiss else TOL
    digest = None if state is None else Digest()
    summary = _look_over(rows, largest_move > 0, digest)
    source = rows.points
    _check_values(rows, summary.bounds)
    _weigh(rows, weights)
    if is_faiss and (
        group is not None or weights is not None or tol or not isinstance(source, InMemory)
    ):
        raise ValueError(
            "kmeans: backend 'faiss' takes points in memory, no group, no weights and no tol, got "
            f"group={group}, weights={weights}, tol={tol}; use backend='auto'"
        )
    if empty_clusters == "move" and not is_faiss:
        rows.move_to_centre(summary.bounds, spherical)
    passes = sweep(rows, num_clusters, "auto" if is_faiss else backend, on_rows)
    keeper = None
    if state is not None and digest is not None:
        weights_of_rows = [torch.tensor([rows.weight], dtype=torch.float64)]
        if rows.weights is not None:
            weights_of_rows.append(rows.weights)
        call = identity(digest.hexdigest(), weights_of_rows, group, rows.points.device) | {
            "rows of each rank": rows.sizes,
            "columns": rows.points.columns,
            "dtype": str(rows.points.dtype),
            "num_clusters": num_clusters,
            "num_iters": int(num_iters),
            "tol": float(largest_move),
            "num_restarts": int(num_restarts),
            "init": first if isinstance(first, str) else [str(first.dtype), digest_of(first)],
            "seed": seed,
            "spherical": bool(spherical),
            "empty_clusters": empty_clusters,
            "backend": backend,
        }
        file = StateFile("kmeans", Path(state), call, group, rows.points.device)
        keeper = RunFile(file, rows, passes.nearest.backend, state_seconds)

    def count(iteration: int, inertia: Tensor, share: float) -> None:
        words = [] if inertia.is_cuda else [f"inertia {float(inertia):.6g}"]
        if share < 1:
            words.append(f"{in_percent(share, 1)} of the products")
        if keeper is not None:
            words.append(f"saved {keeper.age:.0f} s ago")
        wait.update(note=", ".join(words))
        if progress is not None:
            progress(iteration, inertia)

    settings = Settings(
        num_iters=num_iters,
        limit=largest_move * summary.mean_variance(rows) if largest_move else 0.0,
        spherical=spherical,
        splits=empty_clusters == "split",
        count=count,
        on_centroids=on_centroids,
        note=keeper and keeper.note,
    )
    faiss_draws = is_faiss and isinstance(first, str) and first == "random"

    def start(begun: RunState) -> Tensor:
        # Hashed, so that the restarts of neighbouring seeds are others.
        restart_seed = int(mix(seed, begun.restart)) >> 1 if begun.restart else seed
        with Wait("its start"), without_autocast(rows.points.device.type):
            return first_centroids(passes, num_clusters, first, restart_seed, begun, settings.note)

    def run_faiss(begun: RunState) -> Outcome:
        from protoclip.lloyd.faiss_backend import faiss_kmeans

        assert isinstance(source, InMemory)
        centroids, history = faiss_kmeans(
            source.x,
            num_clusters,
            None if faiss_draws else start(begun),
            num_iters=num_iters,
            num_restarts=num_restarts if faiss_draws else 1,
            seed=seed,
            spherical=spherical,
        )
        labels, distances, _ = passes.assign(centroids, needs_sums=False)
        return Outcome(
            State(centroids, inertia_of(rows, distances), labels), history, converged=False
        )

    with (
        contextlib.nullcontext(RunState()) if keeper is None else keeper.opened() as begun,
        Wait("k-means", 0, "iterations", done=begun.iterations, at_most=True) as wait,
    ):
        best = begun.earlier
        while begun.restart < (1 if faiss_draws else num_restarts):
            runs_left = num_restarts - begun.restart  # earlier ones may have ended early
            wait.total = wait.done - begun.iterations + runs_left * num_iters
            if is_faiss:
                outcome = run_faiss(begun)
            else:
                if not begun.history:
                    begun = RunState(begun.restart, begun.earlier, start(begun))
                outcome = lloyd(passes, begun, settings)
            if best is None or outcome.state.inertia < best.state.inertia:
                best = outcome
            begun = RunState(begun.restart + 1, best)
            if keeper is not None:
                keeper.note(begun, at_once=begun.restart == num_restarts)
        assert best is not None
        labels = best.state.labels
        if labels is None:
            labels, distances, _ = passes.assign(best.state.centroids, needs_sums=False)
            assert keeper is not None
            keeper.check(best.state.inertia, inertia_of(rows, distances))
    _warn_of_range(best.state.inertia, largest_magnitude(summary.bounds, rows.centre))
    if warn and not (best.converged or is_faiss) and num_iters and rows.rank == 0:
        warnings.warn(
            f"kmeans: stopped after num_iters={num_iters} before it converged; raise num_iters "
            "or tol",
            stacklevel=3,  # over untraced
        )
    counts = rows.sum(torch.bincount(labels, minlength=num_clusters))
    history = (*best.history, best.state.inertia)
    centroids = rows.in_own_frame(best.state.centroids)
    return Clusters(centroids, labels, counts, history, best.converged)


def _look_over(rows: PointSlice, needs_variance: bool, digest: Digest | None) -> Summary:
    """What one pass over the points finds. It decides the dtype of integers on disk."""
    is_integer = isinstance(rows.points, OnDisk) and rows.points.rows.dtype.kind in "iu"
    rows.points = held(rows.points)
    summary = Summary(rows.points, needs_variance, digest)
    if is_integer and largest_magnitude(summary.bounds, None) <= LARGEST_INTEGER:
        rows.points = rows.points.with_dtype(torch.float32)
        summary.bounds = summary.bounds.float()
    return summary


def _check_numbers(
    rows: PointSlice,
    num_clusters: int,
    num_iters: int,
    num_restarts: int,
    tol: float | None,
    seed: int,
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
    if tol is not None and (not isinstance(tol, Real) or not 0 <= tol < math.inf):
        raise ValueError(f"kmeans: expected a finite tol >= 0, got {tol!r}")
    if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"kmeans: expected an integer seed of 64 bits, got {seed!r}")


def _check_init(rows: PointSlice, num_clusters: int, init: str | Tensor) -> None:
    columns = rows.points.columns
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


def _check_values(rows: PointSlice, bounds: Tensor) -> None:
    """Refuse points whose sum is not finite, or in fp64 a squared distance."""
    points = rows.points
    largest = torch.finfo(points.dtype).max / rows.count
    if points.dtype == torch.float64:
        largest = min(largest, 1e150)
    if not points.columns or not int(rows.sum((~(bounds <= largest)).sum())):  # NaN fits nowhere
        return

    def fits(block: Tensor) -> Tensor:
        return torch.linalg.vector_norm(block, ord=math.inf, dim=1) <= largest

    not_finite = each_row(points, lambda block: ~torch.isfinite(block).all(dim=1))
    _refuse_rows(not_finite, rows, "finite points", "NaN or inf")
    limit = f"points of at most {largest:.1e}, whose sums and squares are finite"
    _refuse_rows(~each_row(points, fits), rows, limit, "larger values")


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
    if weights.shape != (rows.points.count,):
        raise ValueError(
            f"kmeans: expected weights [N] = {[rows.points.count]}, got {list(weights.shape)}"
        )
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
    first = rows.pick(weights, weights.new_zeros(1, dtype=torch.int64))[0]
    if rows.sum((weights != first).sum()):
        # Scaled by a power of two, which is exact, they are neither 0 nor inf in fp32.
        rows.weight = 2.0 ** math.floor(math.log2(sum_of_weights))
        rows.weights = weights / rows.weight
    else:  # points of equal weight are drawn and averaged as those without
        rows.weight = float(first)


def _warn_of_range(inertia: float, largest: float) -> None:
    """``largest``: the largest absolute coordinate."""
    if inertia == math.inf:
        warnings.warn(
            "kmeans: the inertia is inf, because squared distances exceed fp32's 3e38; scale the "
            "points down",
            RuntimeWarning,
            stacklevel=4,
        )
    if inertia < 1e-30 and 0 < largest < SMALLEST:
        warnings.warn(
            f"kmeans: points less than {SMALLEST:g} apart, whose squared distances fp32 cannot "
            "hold, so clusters and inertia are wrong; scale the points up",
            RuntimeWarning,
            stacklevel=4,
        )
