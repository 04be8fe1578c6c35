"""Hierarchical k-means with resampling: centroids that follow the support of the data rather than
its density."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.digest import digest_of
from protoclip.common.files import printable, write_safetensors
from protoclip.common.seeds import mix
from protoclip.curate.order import (
    check_choice,
    first_of_each,
    nearest_keys,
    positions_of,
    random_keys,
    sum_over,
)
from protoclip.lloyd import kmeans
from protoclip.lloyd.clusters import Rows, assign_blocks
from protoclip.lloyd.points import InMemory, OnDisk, Points, open_points
from protoclip.lloyd.state import OtherCallError, StateFile, identity, remove_state

OP = "hierarchical_kmeans"
KMEANS, SAMPLE = 0, 1  # purposes of random numbers

Progress = Callable[[int, int, int], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Level:
    """Clusters of rows, or of the clusters of the level below."""

    centroids: Tensor  # [K, D] fp32 (fp64 for fp64 rows)
    labels: Tensor  # int64 [M], the cluster of each row, or of each cluster below
    squared: Tensor  # fp32 [M], squared distances to the centroids
    sizes: Tensor  # int64 [K], rows below each cluster, over all ranks
    inertia: float  # the sum of squared distances, over all ranks


@dataclass(frozen=True, repr=False)
class Hierarchy:
    """Clusters of rows, clusters of their centroids, and so on.

    Example:
        >>> hierarchy = protoclip.hierarchical_kmeans(torch.randn(1000, 8), [50, 5])
        >>> hierarchy.labels(2).shape
        torch.Size([1000])
    """

    levels: tuple[Level, ...]  # from the lowest

    def __repr__(self) -> str:
        rows = int(self.levels[0].sizes.sum())
        clusters = ", ".join(f"{len(level.sizes):,}" for level in self.levels)
        return f"Hierarchy(N={rows:,}, clusters {clusters})"

    def labels(self, level: int = 1) -> Tensor:
        """The cluster of each row at a level, from 1: int64 [N]."""
        labels = self.levels[0].labels
        for higher in self.levels[1:level]:
            labels = higher.labels[labels]
        return labels

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file."""
        tensors = {}
        for number, level in enumerate(self.levels, 1):
            inertia = torch.tensor(level.inertia, dtype=torch.float64)
            for name, value in (vars(level) | {"inertia": inertia}).items():
                tensors[f"{number}.{name}"] = value
        write_safetensors(Path(path), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Hierarchy:
        """Read what ``save`` wrote.

        Raises:
            ValueError: ``save`` did not write the file.
            OSError: the file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path, str(device))
            levels = []
            for number in range(1, 1 + max(1, len(tensors) // len(fields(Level)))):
                values: dict[str, Any] = {
                    field.name: tensors[f"{number}.{field.name}"] for field in fields(Level)
                }
                values["inertia"] = float(values["inertia"])
                levels.append(Level(**values))
        except (SafetensorError, LookupError) as error:
            raise ValueError(
                f"Hierarchy.load: expected a file that Hierarchy.save wrote, got {path} ({error})"
            ) from error
        return cls(tuple(levels))


@dataclass(frozen=True)
class LevelPlan:
    """What is computed for a level."""

    rows: int  # over all ranks
    clusters: int
    resamplings: int
    sample_size: int  # rows of each cluster


def plan_levels(
    count: int,
    levels: Sequence[int],
    resamplings: int | Sequence[int] = 10,
    sample_sizes: int | Sequence[int] | None = None,
) -> list[LevelPlan]:
    """The plans of the levels for ``count`` rows.

    Raises:
        ValueError: as ``hierarchical_kmeans``.
    """
    clusters = list(levels)
    counts = [count, *clusters[:-1]]
    is_whole = all(isinstance(k, Integral) and k >= 1 for k in clusters)
    if not clusters or not is_whole or sorted(set(clusters), reverse=True) != clusters:
        raise ValueError(
            f"{OP}: expected numbers of clusters of at least 1 that fall from level to level, such "
            f"as [1000, 100], got {clusters}"
        )
    if clusters[0] > count:
        raise ValueError(
            f"{OP}: expected at most N = {count:,} clusters at the first level, got "
            f"{clusters[0]:,}; lower the levels or give more rows"
        )
    if sample_sizes is None:
        sample_sizes = [max(2, round(n / (2 * k))) for n, k in zip(counts, clusters, strict=True)]
    plans = zip(
        counts,
        clusters,
        _of_each("resamplings", resamplings, len(clusters), low=0),
        _of_each("sample_sizes", sample_sizes, len(clusters), low=2),
        strict=True,
    )
    return [LevelPlan(*map(int, plan)) for plan in plans]


def _of_each(name: str, value: int | Sequence[int], count: int, low: int) -> list[int]:
    """A number for each level."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count or not all(isinstance(x, Integral) and int(x) >= low for x in values):
        raise ValueError(
            f"{OP}: expected {name} as a whole number of at least {low}, or one for each of the "
            f"{count} levels, got {value!r}"
        )
    return values


def hierarchical_kmeans(
    rows: Rows,
    levels: Sequence[int],
    *,
    resamplings: int | Sequence[int] = 10,
    sample_sizes: int | Sequence[int] | None = None,
    choose: str = "closest",
    num_iters: int = 50,
    init: str = "k-means++",
    seed: int = 0,
    weights: Tensor | np.ndarray | Sequence[float] | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Hierarchy:
    """Cluster rows, then the centroids of the clusters, level by level.

    At each level some rows of each cluster are clustered again, several times: dense regions have
    no more of these rows than sparse ones, so the centroids spread over the support of the data.
    The same seed gives the same hierarchy.

    Args:
        rows: [N, D], finite; in memory or on disk, as for ``kmeans``.
        levels: numbers of clusters from the lowest level to the highest; they fall.
        resamplings: how often the rows of a level are sampled from its clusters and clustered
            again; one number, or one for each level.
        sample_sizes: rows of each cluster in a sample, >= 2; one number, or one for each level.
            None: half of the mean number of rows of a cluster.
        choose: the rows of a sample: "closest" to the centroid, or "random".
        num_iters, init, backend, device: of each k-means, as for ``kmeans``.
        seed: decides initial centroids and random samples.
        weights: [N], >= 0, of the rows in the means of the first level; None: 1. A centroid of the
            levels above counts as one.
        group: a process group whose ranks each hold a slice of the rows. Each rank computes the
            levels above the first, which get the same bits.
        state: a file that is written after each k-means, and next to it one of the k-means that
            runs, as for ``kmeans``. If it exists, the call continues there, with the result of an
            uninterrupted call; with a group the first rank's file is used.
        progress: called in each iteration with the level, from 1, the number of the k-means at
            this level, from 0, and that of the iteration.
    Returns:
        Hierarchy; ``balanced_sample`` chooses rows by it.
    Raises:
        ValueError: the levels do not fall, there are fewer rows than clusters, a number is out of
            range, rows are not finite, or ``state`` is of another call, torn or in use.
    Source:
        Vo et al. 2024, "Automatic Data Curation for Self-Supervised Learning" (arXiv 2405.15613).

    Example:
        >>> points = torch.cat([torch.randn(900, 2), 9 + torch.randn(100, 2)])
        >>> protoclip.hierarchical_kmeans(points, [20, 2])
        Hierarchy(N=1,000, clusters 20, 2)
    """
    check_choice(OP, choose)
    points = open_points(OP, "rows", rows, device)
    count = int(sum_over(group, torch.tensor([points.count], device=points.device)))
    plans = plan_levels(count, levels, resamplings, sample_sizes)
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float64, device=points.device)
    call = {
        "levels": [vars(plan) for plan in plans],
        "choose": choose,
        "num_iters": num_iters,
        "init": init,
        "seed": seed,
    }
    file = None
    if state is not None:
        digest = points.rows.digest() if isinstance(points, OnDisk) else digest_of(points.x)
        of_weights = [] if weights is None else [weights]
        digests = identity(digest, of_weights, group, points.device)
        facts = {"shape": [count, points.columns], "backend": backend}
        crc = None if weights is None else zlib.crc32(weights.cpu().numpy().tobytes())
        old_call = call | {"rows": [count, points.columns], "weights": crc}
        read_old = partial(_read_old, call=old_call)
        file = StateFile(OP, Path(state), digests | facts | call, group, points.device, read_old)
    levels_until_now: list[Level] = []
    with contextlib.nullcontext() if file is None else file.opened() as content:
        finished = _Finished(file, content or {})
        members = _Members(points, weights, None, group)
        for number, plan in enumerate(plans):

            def cluster(chosen: _Members, step: int, number: int = number) -> Tensor:
                return kmeans(
                    chosen.points.rows if isinstance(chosen.points, OnDisk) else chosen.points.x,
                    plans[number].clusters,
                    num_iters=num_iters,
                    tol=0,
                    init=init,
                    seed=int(mix(seed, KMEANS, number, step)) >> 1,
                    weights=chosen.weights,
                    group=chosen.group,
                    backend=backend,
                    device=device,
                    progress=progress and (lambda i, _: progress(number + 1, step, i)),
                    state=finished.running(number, step, chosen.group),
                    warn=False,
                ).centroids

            level = _cluster_level(members, plan, number, finished, cluster, choose, seed, backend)
            levels_until_now.append(level)
            members = _Members(InMemory(level.centroids), None, level.sizes, None)
    return Hierarchy(tuple(levels_until_now))


@dataclass(frozen=True)
class _Members:
    """What a level clusters: rows, or the centroids of the level below."""

    points: Points  # [M, D]
    weights: Tensor | None  # fp64 [M]
    sizes: Tensor | None  # int64 [M], rows below each; None: 1
    group: dist.ProcessGroup | None  # whose ranks hold the others

    def select(self, positions: Tensor) -> _Members:
        weights = None if self.weights is None else self.weights[positions]
        return _Members(self.points.select(positions), weights, None, self.group)


def _cluster_level(
    members: _Members,
    plan: LevelPlan,
    number: int,
    finished: _Finished,
    cluster: Callable[[_Members, int], Tensor],
    choose: str,
    seed: int,
    backend: str,
) -> Level:
    """One level; ``cluster`` gives the centroids of some members in a step."""
    group = members.group
    if number not in finished.of_level:
        finished.put(number, 1, cluster(members, 0))
    steps, centroids = finished.of_level[number]
    centroids = centroids.to(members.points.device)
    labels, squared = assign_blocks(members.points, centroids, backend)
    positions = positions_of(members.points.count, group, labels.device)
    quotas = labels.new_full((plan.clusters,), plan.sample_size)
    for step in range(steps, 1 + plan.resamplings):
        keys = nearest_keys(squared, positions)
        if choose == "random":
            keys = random_keys(positions, seed, SAMPLE, number, step)
        sample = first_of_each(keys, labels, quotas, group).nonzero()[:, 0]
        if int(sum_over(group, labels.new_tensor([len(sample)]))) < plan.clusters:
            break  # so many clusters are empty, as happens with few different rows
        centroids = cluster(members.select(sample), step)
        finished.put(number, step + 1, centroids)
        labels, squared = assign_blocks(members.points, centroids, backend)
    sizes = torch.ones_like(labels) if members.sizes is None else members.sizes
    totals = torch.zeros_like(quotas).index_add_(0, labels, sizes)
    inertia = squared.double()
    if members.weights is not None:
        inertia = inertia * members.weights
    return Level(
        centroids=centroids,
        labels=labels,
        squared=squared,
        sizes=sum_over(group, totals),
        inertia=float(sum_over(group, inertia.sum())),
    )


class _Finished:
    """The centroids of each level's last k-means, in a file, and the file of the k-means that runs
    beside it."""

    def __init__(self, file: StateFile | None, content: dict[str, Tensor]) -> None:
        self.file = file
        self.of_level = {  # -> number of k-means, centroids
            level: (number, centroids)
            for name, centroids in content.items()
            for level, number in [map(int, name.split("."))]
        }
        for level, (number, _) in self.of_level.items():
            self._remove_running(level, number - 1)

    def put(self, level: int, number: int, centroids: Tensor) -> None:
        """The first ``number`` k-means of a level have ended."""
        self.of_level[level] = number, centroids
        if self.file is not None:
            tensors = {f"{level}.{number}": x for level, (number, x) in self.of_level.items()}
            self.file.write(tensors)
            self._remove_running(level, number - 1)

    def running(self, level: int, number: int, group: dist.ProcessGroup | None) -> Path | None:
        """The file of a k-means. One that all ranks run alike, only the first rank keeps."""
        if self.file is None or (group is None and not self.file.is_first):
            return None
        path = self.file.path
        return path.with_name(f"{path.name}.{level + 1}.{number}")

    def _remove_running(self, level: int, number: int) -> None:
        if path := self.running(level, number, None):
            remove_state(path)


def _read_old(path: Path, call: dict[str, Any]) -> dict[str, Tensor]:
    """Of a file without a checksum, as earlier versions wrote it, which knew some rows only."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        written = json.loads(bytes(tensors.pop("settings").tolist()))
        written["rows"] = written["rows"][:2]
    except (SafetensorError, LookupError) as error:
        raise ValueError(str(error)) from error
    if names := [name for name in call if written.get(name) != call[name]]:
        raise OtherCallError(OP, printable(str(path)), names)
    logger.warning(
        "%s: %s was made before version 0.2; only the number of its rows is compared", OP, path
    )
    return tensors
