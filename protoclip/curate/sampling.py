"""A sample that takes equal shares of the clusters of each level, from the top down."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.curate.hierarchy import Hierarchy
from protoclip.curate.order import (
    check_choice,
    first_of_each,
    nearest_keys,
    positions_of,
    random_keys,
)
from protoclip.lloyd.points import Points

SIZE_BITS = 48  # of the number of rows
ROWS, REMAINDER = 1, 2  # purposes of random keys
PIECE = 1024  # rows that are compared with each other at once


def balanced_sample(
    hierarchy: Hierarchy,
    target: int,
    *,
    choose: str = "random",
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Choose rows so that each level's clusters give equal shares, as far as they have the rows.

    The clusters of the highest level share the target: each gives min(c, its rows), with the cut c
    for which the shares add up to the target. Its own clusters share what it gives in the same way,
    and so on; what rounding leaves over comes one each from random clusters that have more.

    Args:
        hierarchy: of ``hierarchical_kmeans``.
        target: number of rows to choose, from 1 to the number of rows.
        choose: rows of a lowest cluster: "random", or "closest" to its centroid.
        seed: decides the random choices.
        group: the process group that the hierarchy was made with.
    Returns:
        Positions of rows, int64, increasing; with a group those of this rank's rows.
    Raises:
        ValueError: there are fewer rows than ``target``, or ``choose`` is unknown.
    Source:
        Vo et al. 2024, section 3.3 (arXiv 2405.15613).

    Example:
        >>> points = torch.cat([torch.zeros(90, 1), torch.ones(10, 1)])
        >>> hierarchy = protoclip.hierarchical_kmeans(points, [2])
        >>> positions = protoclip.balanced_sample(hierarchy, 12)
        >>> int((positions < 90).sum()), int((positions >= 90).sum())
        (6, 6)
    """
    check_choice("balanced_sample", choose)
    shares = shares_of(hierarchy, target, seed)
    labels = hierarchy.levels[0].labels
    keys = row_keys(hierarchy, choose, seed, group)
    return first_of_each(keys, labels, shares, group).nonzero()[:, 0]


def shares_of(hierarchy: Hierarchy, target: int, seed: int) -> Tensor:
    """How many rows each cluster of the lowest level gives, int64 [K]."""
    count = int(hierarchy.levels[-1].sizes.sum())
    if not isinstance(target, Integral) or not 1 <= target <= count:
        raise ValueError(
            f"balanced_sample: expected a target from 1 to N = {count:,} rows, got {target!r}; "
            "lower the target"
        )
    top = hierarchy.levels[-1]
    parents = torch.zeros_like(top.sizes)  # all are of one cluster, which gives the target
    shares = parents.new_tensor([int(target)])
    for number, level in reversed(list(enumerate(hierarchy.levels))):
        shares = _fill(level.sizes, parents, shares, (seed, REMAINDER, number))
        if number:
            parents = level.labels
    return shares


def _fill(sizes: Tensor, parents: Tensor, targets: Tensor, stream: tuple[int, ...]) -> Tensor:
    """The shares [K] of clusters in what their parents give, ``targets``."""

    def shares_up_to(cut: Tensor) -> Tensor:
        return torch.minimum(sizes, cut[parents])

    def sums(shares: Tensor) -> Tensor:
        return torch.zeros_like(targets).index_add_(0, parents, shares)

    cut = torch.zeros_like(targets)  # the largest whose shares do not exceed the target
    for bit in reversed(range(SIZE_BITS)):
        higher = cut + (1 << bit)
        cut = torch.where(sums(shares_up_to(higher)) <= targets, higher, cut)
    shares = shares_up_to(cut)
    has_more = (sizes > shares).nonzero()[:, 0]
    left = targets - sums(shares)
    keys = random_keys(has_more, *stream)
    shares[has_more] += first_of_each(keys, parents[has_more], left).long()
    return shares


def row_keys(
    hierarchy: Hierarchy, choose: str, seed: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The order in which rows of a lowest cluster are chosen: int64 [N]."""
    squared = hierarchy.levels[0].squared
    positions = positions_of(len(squared), group, squared.device)
    if choose == "closest":
        return nearest_keys(squared, positions)
    return random_keys(positions, seed, ROWS)


def sample_without_duplicates(
    rows: Points, hierarchy: Hierarchy, target: int, distance: float, *, choose: str, seed: int
) -> tuple[Tensor, Tensor]:
    """``balanced_sample`` whose rows of a lowest cluster are at least ``distance`` apart.

    A row that is nearer to one that was chosen before is passed over for the next of its cluster.

    Returns:
        Positions, int64, increasing; and how many rows each lowest cluster lacks, int64 [K].
    """
    check_choice("balanced_sample", choose)
    shares = shares_of(hierarchy, target, seed)
    lowest = hierarchy.levels[0]
    keys = row_keys(hierarchy, choose, seed)
    order = torch.from_numpy(np.lexsort((keys.numpy(), lowest.labels.numpy())))
    members = order.split(lowest.sizes.tolist())  # of each cluster, in the order of choice
    chosen = [
        _choose_apart(rows, of_cluster, share, distance)
        for of_cluster, share in zip(members, shares.tolist(), strict=True)
    ]
    counts = shares.new_tensor([len(positions) for positions in chosen])
    return torch.cat(chosen).sort().values, shares - counts


def _choose_apart(rows: Points, members: Tensor, share: int, distance: float) -> Tensor:
    """The first members of a cluster, at most ``share``, none of which is near one before it."""
    chosen = members[:0]
    points = rows.take(chosen)
    tried, step = 0, share
    while len(chosen) < share and tried < len(members):
        candidates = members[tried : tried + min(step, PIECE)]
        tried += len(candidates)
        step *= 2  # where many are near others, few are lacking for long
        values = rows.take(candidates)
        is_apart = _apart(values, points, distance)
        chosen = torch.cat([chosen, candidates[is_apart]])
        points = torch.cat([points, values[is_apart]])
    return chosen[:share]


def _apart(points: Tensor, kept: Tensor, distance: float) -> Tensor:
    """Which points are not near those kept, nor those before them that are apart: bool [M]."""
    direct = "donot_use_mm_for_euclid_dist"  # a product loses the digits of near points
    is_apart = ~(torch.cdist(points, kept, compute_mode=direct) < distance).any(dim=1)
    near = torch.cdist(points, points, compute_mode=direct) < distance
    for i in (near.sum(1) > 1).nonzero()[:, 0].tolist():
        is_apart[i] &= not (near[i, :i] & is_apart[:i]).any()
    return is_apart
