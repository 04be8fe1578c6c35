"""k-means that computes only what may have changed has the bits of one that computes everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kmeans_cases import (
    CASES,
    Case,
    bound_few_points,
    keep_rows_on_disk,
    mixture,
    set_rows_in_block,
    stored,
)
from torch import Tensor

import protoclip
from protoclip.ops import clusters as ops
from protoclip.ops.clusters import Bounds, assignment, bounds_for

pytestmark = pytest.mark.skipif(
    protoclip.backends("kmeans_assign")["cpu"] is not None, reason="bounds are the C++ backend's"
)


@pytest.fixture(autouse=True)
def few_points_have_bounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # not the function's: hypothesis runs many in one
        bound_few_points(patch)
        yield


def shares(points: Tensor, trail: list[Tensor]) -> list[float]:
    """Of the products of each assignment to the centroids of a trail [K, D], after it was compared
    with one that knows nothing."""
    k, d = trail[0].shape
    nearest = assignment(points, k, "cpu")
    bounds = bounds_for(len(points), k, d, "cpu")
    assert bounds is not None
    found = []
    for centroids in trail:
        assert_same_bits(tuple(nearest(centroids, bounds)), tuple(nearest(centroids)))
        found.append(bounds.share)
    return found


def lloyd_trail(points: Tensor, k: int, steps: int) -> list[Tensor]:
    """Centroids on their way from the first points."""
    trail: list[Tensor] = [points[:k].float()]
    for _ in range(steps):
        labels, _ = protoclip.kmeans_assign(points, trail[-1], backend="cpu")
        means, counts = protoclip.segment_mean(points, labels, k)
        trail.append(means.where(counts[:, None] > 0, trail[-1]))
    return trail


def normal(n: int, k: int, d: int) -> Tensor:
    return torch.randn(n, d)


def blobs(n: int, k: int, d: int) -> Tensor:
    centres = 3 * torch.randn(max(1, k // 3), d)
    return centres[torch.randint(len(centres), (n,))] + torch.randn(n, d)


def integers(n: int, k: int, d: int) -> Tensor:
    """Exact ties in abundance."""
    return torch.randint(-2, 3, (n, d)).float()


def copies(n: int, k: int, d: int) -> Tensor:
    """Equal points and, as they are the first centroids, equal centroids."""
    return torch.randn(max(1, n // 4), d)[torch.randint(max(1, n // 4), (n,))]


def outlier(n: int, k: int, d: int) -> Tensor:
    points = torch.randn(n, d)
    points[0] *= 1e6
    return points


def far_from_zero(n: int, k: int, d: int) -> Tensor:
    return 300 + 0.01 * torch.randn(n, d)


def of_all_sizes(n: int, k: int, d: int) -> Tensor:
    """Squares of some leave fp32, and some do not fit the screen."""
    return torch.randn(n, d) * 10 ** torch.empty(n, 1).uniform_(-18, 18)


KINDS = [normal, blobs, integers, copies, outlier, far_from_zero, of_all_sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_iterations_have_the_same_bits(
    kind: Callable[[int, int, int], Tensor], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    points = kind(1100, 150, 40)  # more than one block; D is no multiple of a vector
    if dtype == torch.float16:
        points = points.clamp(-100, 100)
    shares(points.to(dtype), lloyd_trail(points.to(dtype), 150, 8))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 700),
    part=st.floats(0, 1),
    d=st.integers(1, 90),
    exponent=st.sampled_from([-18, -9, 0, 9, 18]),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_and_magnitude_has_the_same_bits(
    kind: Callable[[int, int, int], Tensor], n: int, part: float, d: int, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    k = 1 + int(part * (n - 1))  # 1 to N
    d = max(d, ops.TABLE["kmeans_assign"]["cpu"].most_measured // k + 1)
    points = kind(n, k, d) * 10.0**exponent
    shares(points, lloyd_trail(points, k, 3))


@pytest.mark.parametrize("k", [60, 150, 1500])  # up to a group for each panel, and more
def test_centroids_that_jump_anywhere_have_the_same_bits(k: int) -> None:
    """As where a cluster is split or moves, and further than in any run."""
    torch.manual_seed(1)
    points = blobs(2000, k, 40)
    trail = lloyd_trail(points, k, 3)
    for moved in (1, 5, k // 2, k):
        jumped = trail[-1].clone()
        jumped[torch.randperm(k)[:moved]] = points[torch.randperm(len(points))[:moved]]
        trail += [jumped, trail[-1]]
    shares(points, trail)


def test_centroids_that_jump_do_not_take_their_groups_with_them() -> None:
    """As where empty clusters move, to points far from their own."""
    torch.manual_seed(4)
    points = mixture(4000, 64, 400)
    trail = lloyd_trail(points, 400, 20)
    jumped = trail[-1].clone()
    jumped[::45] = points[::450] * 1.01
    before, after = shares(points, [*trail, jumped])[-2:]
    assert before < 0.05 and after < 0.3


def test_of_equal_distances_the_lowest_index_wins_after_a_move() -> None:
    """A centroid of another group comes exactly as near as the own one: at half the distance of the
    bound, a group is skipped only if all of it is farther."""
    d = 64
    axes = torch.eye(d).repeat(3, 1)[:150]
    points = torch.zeros(600, d)
    before = 40 * axes + 1.0 * (torch.arange(150) % 7)[:, None]
    before[100] = 0
    before[100, 5] = 8
    after = before.clone()
    after[3] = 0
    after[3, 7] = 8
    shares(points, [before, before, before, after, after])
    for centroids, nearest in ((before, 100), (after, 3)):
        labels, _ = protoclip.kmeans_assign(points, centroids, backend="cpu")
        assert set(labels.tolist()) == {nearest}


def test_most_products_of_separate_clusters_are_skipped() -> None:
    torch.manual_seed(2)
    points = mixture(4000, 64, 400)
    found = shares(points, lloyd_trail(points, 400, 12))
    assert found[:2] == [1.0, 1.0]  # nothing is known, then all of it is found
    assert all(0 <= share <= 1 for share in found)
    assert 0 < found[4] < 0.3


def test_centroids_that_stay_take_hardly_a_product() -> None:
    """Only those of points that are nearly as far from another one."""
    torch.manual_seed(3)
    points = mixture(2000, 64, 100)
    assert max(shares(points, [points[:100]] * 4)[2:]) < 0.01


def result(case: Case, bounded: bool, points: Any = None) -> tuple[Any, ...]:
    with pytest.MonkeyPatch.context() as patch:
        if not bounded:
            patch.setattr(ops, "MOST_BOUND_BYTES", 0)
        trail: list[Tensor] = []
        clusters = case.run(points, on_centroids=lambda _, centroids: trail.append(centroids))
    return clusters.centroids, clusters.labels, torch.tensor(clusters.history), trail


@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_same_bits(case: str) -> None:
    assert_same_bits(result(CASES[case], True), result(CASES[case], False))


@pytest.mark.parametrize("rows_in_block", [100, 1024])  # a tile of a group ends inside a block
@pytest.mark.parametrize("case", ["screened in 8 bits", "fp16", "weights", "empty clusters"])
def test_a_run_on_disk_has_the_same_bits(
    case: str, rows_in_block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_rows_on_disk(monkeypatch)
    set_rows_in_block(rows_in_block, monkeypatch)
    rows = stored(CASES[case].array, tmp_path)
    assert_same_bits(result(CASES[case], True, rows), result(CASES[case], False, rows))


@pytest.mark.parametrize(
    "points, clusters, columns, expected",
    [(1 << 20, 1000, 256, Bounds), (1 << 25, 1000, 256, None), (0, 1000, 256, None)],
)
def test_bounds_have_a_limit_of_memory(
    points: int, clusters: int, columns: int, expected: Any
) -> None:
    assert isinstance(bounds_for(points, clusters, columns, "cpu"), expected or type(None))
    assert bounds_for(points, clusters, columns, "reference") is None
