"""How good the clusters are: greedy starts, empty clusters, the best state, beside scikit-learn."""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import on_threads
from torch import Tensor

import protoclip
from protoclip.episodes.prototypes import PrototypeBuilder
from protoclip.evaluate.metrics import group_scores
from protoclip.lloyd import starts
from protoclip.ops.clusters import PointsAssignment, assignment, segment_mean
from protoclip.settings.config import EpisodeConfig

ROUNDING = 1e-6  # that history may rise by: distances are fp32


def blobs(n: int, d: int, k: int, seed: int = 0) -> Tensor:
    """scikit-learn's ``make_blobs`` with its defaults."""
    datasets = pytest.importorskip("sklearn.datasets")
    points, _ = datasets.make_blobs(n, d, centers=k, random_state=seed)
    return torch.from_numpy(points).float()


def start(points: Tensor, k: int, **options: Any) -> protoclip.Clusters:
    return protoclip.kmeans(points, k, num_iters=0, **options)


# ---- greedy k-means++ ----


def test_a_greedy_start_is_as_good_as_scikit_learns() -> None:
    """Mean inertia of twelve starts."""
    cluster = pytest.importorskip("sklearn.cluster")
    points = blobs(3000, 8, 100)

    def theirs(seed: int) -> float:
        centres, _ = cluster.kmeans_plusplus(points.numpy(), 100, random_state=seed)
        return start(points, 100, init=centres).inertia

    greedy = [start(points, 100, init="k-means++", seed=seed).inertia for seed in range(12)]
    plain = [start(points, 100, init="plain k-means++", seed=seed).inertia for seed in range(12)]
    assert np.mean(greedy) < 1.04 * np.mean([theirs(seed) for seed in range(12)])
    assert np.mean(greedy) < 0.8 * np.mean(plain)


def test_a_candidate_is_taken_for_the_sum_that_it_leaves() -> None:
    """40 of 50 points lie in a heap, 10 far off, one by one on a ring: one draw mostly finds the
    ring, which wins a tenth of what the heap does."""
    angles = torch.linspace(0, 2 * math.pi, 11)[:10]
    ring = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    heap = torch.tensor([8.0, 0.0]) + 0.01 * torch.randn(40, 2)
    points = torch.cat([ring, heap])

    def heaps_found(init: str) -> int:
        found = (start(points, 2, init=init, seed=seed).centroids for seed in range(40))
        return sum(int((centroids[:, 0] > 7).any()) for centroids in found)

    assert heaps_found("k-means++") == 40


@pytest.mark.parametrize("weights", [None, torch.arange(400) % 3])
def test_above_its_limit_a_small_start_is_the_plain_one(
    weights: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = blobs(400, 4, 30)
    plain = start(points, 30, init="plain k-means++", weights=weights).centroids
    assert not torch.equal(start(points, 30, init="k-means++", weights=weights).centroids, plain)
    monkeypatch.setattr(starts, "GREEDY", 400 * 30 - 1)
    assert torch.equal(start(points, 30, init="k-means++", weights=weights).centroids, plain)


@pytest.mark.parametrize("limit", ["GREEDY", "GREEDY_BYTES"])
@pytest.mark.parametrize("weights", [None, torch.arange(9000) % 3])
def test_above_its_limit_a_start_looks_at_a_sample(
    weights: Tensor | None, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its centroids are points of weight, and nearly as good as those of all points."""
    points = blobs(9000, 8, 25)
    seeds = range(6)

    def starts_of(init: str) -> list[protoclip.Clusters]:
        return [start(points, 25, init=init, seed=seed, weights=weights) for seed in seeds]

    whole = starts_of("k-means++")
    monkeypatch.setattr(starts, limit, 64 * 25 * {"GREEDY": 25, "GREEDY_BYTES": 32}[limit])
    monkeypatch.setattr(starts, "FEWEST_ROWS", 0)
    sampled = starts_of("k-means++")
    for clusters in sampled:
        position = torch.cdist(clusters.centroids, points).argmin(1)
        assert torch.equal(points[position], clusters.centroids)
        assert weights is None or (weights[position] > 0).all()
    inertia = [sum(clusters.inertia for clusters in clustering) for clustering in (whole, sampled)]
    assert inertia[0] != inertia[1] < 1.1 * inertia[0]
    monkeypatch.setattr(starts, limit, 1)  # the sample is too large as well: one draw each
    assert inertia[1] < sum(clusters.inertia for clusters in starts_of("k-means++"))


def test_a_sample_of_fewer_points_than_clusters_is_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(3000, 3, 5)
    weights = torch.zeros(3000)
    weights[:7] = 1
    monkeypatch.setattr(starts, "GREEDY", 1)
    monkeypatch.setattr(starts, "FEWEST_ROWS", 0)
    assert protoclip.kmeans(points, 9, weights=weights).inertia == 0


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_products_of_a_greedy_start_only_choose(
    offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point once, though distances of 1e-4 are below the rounding of the products."""
    points = torch.cat([torch.eye(3), torch.eye(3) + 2**-13]).repeat(4, 1) + offset
    assert start(points, 6, init="k-means++").inertia == 0
    monkeypatch.setattr(starts, "BLOCK", 1)  # one centroid a product
    assert start(points, 6, init="k-means++").inertia == 0


@pytest.mark.parametrize("d", [16, 70])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_greedy_start_has_the_same_bits_on_any_number_of_threads(d: int, weighted: bool) -> None:
    points = blobs(9000, d, 80)
    weights = torch.arange(9000) % 5 if weighted else None
    options: dict[str, Any] = {"init": "k-means++", "weights": weights}
    runs = on_threads(lambda: start(points, 80, **options), counts=(1, 2, 7))
    assert torch.equal(runs[0].centroids, runs[1].centroids)
    assert torch.equal(runs[0].centroids, runs[2].centroids)


STARTS = {
    "few columns": (2000, 3, 40),
    "no whole vector of centroids": (500, 16, 7),
    "screened": (3000, 70, 50),
    "screened, an odd width": (1025, 33, 30),
    "more than a thousand clusters": (2100, 20, 1030),
    "one point more than a slice": (1025, 2, 90),
}


@pytest.mark.parametrize("case", STARTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_greedy_start_as_one_op_chooses_as_its_steps_do(
    case: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, d, k = STARTS[case]
    points = blobs(n, d, 20)
    weights = torch.arange(n) % 4 if weighted else None
    options: dict[str, Any] = {"init": "k-means++", "weights": weights, "seed": 3}
    chosen = start(points, k, **options).centroids
    monkeypatch.setattr(PointsAssignment, "runs_kmeans", False)
    by_steps = start(points, k, **options).centroids
    assert torch.equal(chosen, by_steps)


@pytest.mark.parametrize("scale", [1e-18, 1e17])
@pytest.mark.parametrize("d", [3, 40])
def test_a_greedy_start_takes_points_at_the_ends_of_fp32(scale: float, d: int) -> None:
    """Each of twelve points once: where no bound holds all distances are measured."""
    points = (scale * torch.eye(d)[:3]).repeat(4, 1) * torch.arange(1, 5).repeat_interleave(3)[
        :, None
    ]
    assert len(start(points.repeat(3, 1), 12, init="k-means++").centroids.unique(dim=0)) == 12


# ---- empty clusters ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_offset_changes_nothing_but_the_rounding_of_the_points(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    offset = 1e4
    points = torch.randn(300, 8, dtype=dtype) + offset
    far = 1e3 * torch.randn(8, 8, dtype=dtype)  # all but one are empty at first
    clusters = protoclip.kmeans(points, 8, init=far, num_iters=100)
    centred = protoclip.kmeans(points - offset, 8, init=far - offset, num_iters=100)
    assert clusters.inertia == pytest.approx(centred.inertia, rel=1e-6)
    assert torch.equal(clusters.labels, centred.labels)
    squared = (points.double()[:, None] - clusters.centroids.double()).square().sum(2)
    assert torch.equal(clusters.labels, squared.argmin(1))
    assert torch.equal(clusters.predict(points), clusters.labels)


@pytest.mark.parametrize("k", [200, 300])
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize("spherical", [False, True])
def test_every_distinct_point_gets_a_cluster(k: int, init: str, spherical: bool) -> None:
    torch.manual_seed(0)
    points = F.normalize(torch.randn(200, 16), dim=1).repeat(5, 1)
    clusters = protoclip.kmeans(points, k, init=init, spherical=spherical)
    assert clusters.inertia < 1000 * 1e-12 and int((clusters.counts > 0).sum()) == 200
    assert clusters.num_iters < 15  # it has ended, though clusters are empty


LINE = [-10.0, -9.5, -9, -8.5, -8, -1, 1, 9, 9.5, 10]
HEAP = [*[0.0] * 20, 5.0, 9.0]
MOVES: dict[str, tuple[list[float], list[float], list[float] | None, list[float]]] = {
    # points, first centroids, weights of the last points, the centroids after an iteration
    # scikit-learn takes 10 and 9.5 here; after 10, -10 is farther from what is there
    "far points that differ": (LINE, [-10.0, -10, -10], None, [-16.5 / 8, 10, -10]),
    "the farthest": (HEAP, [0.0, 100], [1.0, 1], [5 / 21, 9]),
    "by weight": (HEAP, [0.0, 100], [9.0, 1], [9 / 21, 5]),
    "never of weight 0": (HEAP, [0.0, 100], [1.0, 0], [0, 5]),
    "ties to the first": ([-1.0, 0, 1], [0.0, 50], None, [0.5, -1]),
}


@pytest.mark.parametrize("case", MOVES)
def test_empty_clusters_move_to_points(case: str) -> None:
    line, first, last_weights, expected = MOVES[case]
    points = torch.tensor(line)[:, None]
    weights = torch.ones(len(points))
    if last_weights is not None:
        weights[-2:] = torch.tensor(last_weights)
    clusters = protoclip.kmeans(
        points, len(first), init=torch.tensor(first)[:, None], weights=weights, num_iters=1
    )
    assert clusters.centroids[1:, 0].tolist() == expected[1:]
    assert clusters.centroids[0, 0] == pytest.approx(expected[0])


def test_an_infinite_inertia_is_said() -> None:
    points = torch.tensor([[-1e30], [1e30]])
    with pytest.warns(RuntimeWarning, match="the inertia is inf.*scale the points down"):
        assert protoclip.kmeans(points, 1).inertia == math.inf


def test_distances_too_small_for_fp32_are_said(recwarn: pytest.WarningsRecorder) -> None:
    points = torch.randn(60, 3, dtype=torch.float64)
    protoclip.kmeans(torch.cat([points[:2] * 1e-24] * 9), 2)
    assert "scale the points up" in str(recwarn.pop(RuntimeWarning).message)
    protoclip.kmeans(points * 1e-15, 5)
    protoclip.kmeans(points[:5], 5)  # each its own centroid: the inertia is 0
    protoclip.kmeans(torch.zeros(9, 3), 2)
    assert not recwarn.list


def test_weights_and_points_are_taken_in_any_layout() -> None:
    points, weights = np.random.default_rng(0).normal(size=(2, 50, 1))
    weights = np.abs(weights[:, 0])
    expected = protoclip.kmeans(points, 3, weights=weights.copy())
    layouts = [weights[::-1][::-1], weights.astype(">f8"), weights.astype(np.longdouble)]
    weights.flags.writeable = False
    for layout in [*layouts, weights, list(weights)]:
        clusters = protoclip.kmeans(points, 3, weights=layout)
        assert torch.equal(clusters.centroids, expected.centroids)
    assert protoclip.kmeans(points[:1][::-1], 1).inertia == 0


def test_arrays_of_other_kinds_are_refused_with_a_remedy_that_works() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    of_rows = np.empty(9, dtype=object)  # as numpy.load returns an array of arrays
    of_rows[:] = list(rows)
    remedy = r"object; use np.stack\(list\(points\)\)"
    for points in (of_rows, rows.astype(object)):
        with pytest.raises(TypeError, match=remedy):
            protoclip.kmeans(points, 3)
        assert (np.stack(list(points)).astype(np.float32) == rows).all()
    with pytest.raises(TypeError, match=remedy):
        protoclip.KMeans(3).fit(of_rows)
    with pytest.raises(TypeError, match=r"bool; use \.astype\(np\.float32\)"):
        protoclip.kmeans(rows > 0, 3)
    with pytest.raises(TypeError, match="<U5; give numbers"):
        protoclip.kmeans(np.array([["heavy"]]), 1)
    with pytest.raises(ValueError, match="rows of numbers"):
        protoclip.kmeans([[object()]], 1)


def test_distances_of_points_that_are_not_finite_are_not_zero() -> None:
    clusters = protoclip.kmeans(torch.randn(9, 3, dtype=torch.float64), 2)
    far = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0], [1e200, 0, 0]], dtype=torch.float64)
    distances = clusters.transform(far)
    assert not distances.isfinite().any() and distances[0].isnan().all()


def of_records(points: Tensor, centroids: Tensor, num_iters: int) -> Tensor:
    """Lloyd's algorithm as all recorded runs of training and evaluation had it -> labels."""
    k = len(centroids)
    assign = assignment(points, k, "auto")
    for _ in range(num_iters):
        means, counts = segment_mean(points, assign(centroids)[0], k)
        centroids = means.where(counts[:, None] > 0, centroids)
        sign = 1 - 2 * (torch.arange(points.shape[1]) % 2)
        largest = counts.argsort(descending=True, stable=True).tolist()
        halved = centroids.clone()
        for j, source in zip((counts == 0).nonzero()[:, 0].tolist(), largest, strict=False):
            if counts[source] > 1:
                halved[j] = centroids[source] * (1 + sign / 1024)
                halved[source] = centroids[source] * (2 - (1 + sign / 1024))
        centroids = halved
    return assign(centroids)[0]


def records_case() -> tuple[Tensor, Tensor]:
    """Rows with many copies, as captions have, and a random start with empty clusters."""
    torch.manual_seed(0)
    points = F.normalize(torch.randn(300, 16), dim=1).repeat(2, 1) + 0.02 * torch.randn(600, 16)
    points[300:500] = points[:200]
    first = points[torch.randperm(600, generator=torch.Generator().manual_seed(5))[:150]]
    return points, first


@pytest.mark.parametrize("num_iters", [1, 3, 20])
def test_split_clusters_have_the_bits_of_the_records(num_iters: int) -> None:
    points, first = records_case()
    expected = of_records(points, first, num_iters)
    options: dict[str, Any] = {"num_iters": num_iters, "empty_clusters": "split"}
    split = protoclip.kmeans(points, 150, init="random", seed=5, **options)
    assert torch.equal(split.labels, expected)
    assert torch.equal(protoclip.kmeans(points, 150, init=first, **options).labels, expected)
    moved = protoclip.kmeans(points, 150, init=first, num_iters=num_iters)
    assert not torch.equal(moved.labels, expected) and moved.inertia < split.inertia


def plain_start_of_records(points: Tensor, k: int, seed: int) -> Tensor:
    """The k-means++ of the recorded evaluations: candidates one by one, in passes."""
    generator = torch.Generator().manual_seed(seed)
    assign = assignment(points, k, "auto")
    centroids = fresh = points[torch.randperm(len(points), generator=generator)[:1]]
    squared = torch.full((len(points),), math.inf, dtype=torch.float64)
    while len(centroids) < k:
        squared = torch.minimum(squared, assign(fresh)[1].double())
        draws = max(8, len(centroids))
        where, luck = torch.rand(2, draws, generator=generator, dtype=torch.float64)
        rows = torch.searchsorted(squared.cumsum(0), where * squared.sum(), right=True)
        candidates = points[rows.clamp_max(len(points) - 1)]
        apart = torch.cdist(candidates, candidates, compute_mode="donot_use_mm_for_euclid_dist")
        drawn_at = squared[rows]
        now = drawn_at.clone()
        accepted = []
        for j, u in enumerate(luck.tolist()):
            if now[j] >= u * drawn_at[j] and now[j] > 0:
                accepted.append(j)
                now = torch.minimum(now, apart[j].double().square())
        fresh = candidates[accepted][: k - len(centroids)]
        centroids = torch.cat([centroids, fresh])
    return centroids


def test_training_and_evaluation_have_the_bits_of_the_records() -> None:
    points, _ = records_case()
    builder = PrototypeBuilder(EpisodeConfig(keep_empty=True))
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(3)))
    first = points[torch.randperm(600, generator=torch.Generator().manual_seed(seed))[:150]]
    for last, start_at in ((None, first), (points[:150], points[:150])):
        got = builder.cluster("image", points, 150, torch.Generator().manual_seed(3), last)
        assert torch.equal(got.labels, of_records(points, start_at, 20))
    metrics = pytest.importorskip("sklearn.metrics")
    truth = torch.arange(600) % 150
    amis = [
        metrics.adjusted_mutual_info_score(
            truth, of_records(unit, plain_start_of_records(unit, 150, seed), 20)
        )
        for seed in (0, 1)
        for unit in [F.normalize(points, dim=1)]
    ]
    assert group_scores(points, truth, seeds=(0, 1))["ami"] == pytest.approx(np.mean(amis), 1e-12)


# ---- the best state ----


def test_the_best_state_is_returned_where_a_split_makes_it_worse() -> None:
    points = torch.full((10, 2), 1e4)
    clusters = protoclip.kmeans(points, 4, empty_clusters="split", num_iters=5)
    assert max(clusters.history) > 1000 and clusters.inertia == 0 == clusters.history[-1]
    assert clusters.num_iters == 5 and (clusters.transform(points).amin(1) == 0).all()


class Problem(NamedTuple):
    points: Tensor
    k: int
    weights: Tensor | None


def problem(seed: int) -> Problem:
    """A random one: blobs or a cloud, some far from the origin, with copies, or with weights."""
    random = np.random.RandomState(seed)
    n = int(random.randint(30, 900))
    d = int(random.choice([1, 2, 5, 16, 64]))
    distinct = n if random.rand() < 0.5 else max(2, n // int(random.randint(2, 12)))
    k = int(random.randint(2, max(3, min(distinct + 10, n // 2))))
    kinds = max(1, int(k * random.uniform(0.3, 1.5)))
    middles = random.normal(size=(kinds, d)) * random.choice([0.0, 3.0, 10.0])
    points = middles[random.randint(kinds, size=distinct)] + random.normal(size=(distinct, d))
    points = points[np.arange(n) % distinct] + random.choice([0.0, 0.0, 100.0, 1e4])
    weights = torch.from_numpy(random.rand(n)).float() if random.rand() < 0.3 else None
    return Problem(torch.from_numpy(points).float(), k, weights)


PROBLEMS = range(60)


@pytest.fixture(scope="module")
def ratios() -> list[float]:
    """Our inertia over scikit-learn's, of the best of five starts; both measured in fp64."""
    cluster = pytest.importorskip("sklearn.cluster")

    def measured(centroids: np.ndarray, case: Problem) -> float:
        points = case.points.double()
        squared = torch.cdist(points, torch.from_numpy(centroids).double()).square()
        squared = (points - torch.from_numpy(centroids).double()[squared.argmin(1)]).square().sum(1)
        return float((squared if case.weights is None else squared * case.weights).sum())

    result = []
    for seed in PROBLEMS:
        case = problem(seed)
        ours = protoclip.kmeans(
            case.points, case.k, init="k-means++", num_restarts=5, num_iters=300, seed=seed,
            weights=case.weights,
        )  # fmt: skip
        theirs = cluster.KMeans(case.k, n_init=5, max_iter=300, tol=0, random_state=seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # fewer clusters than distinct
            theirs.fit(case.points.numpy(), sample_weight=case.weights)
        ours_measured = measured(ours.centroids.numpy(), case)
        their_measured = measured(theirs.cluster_centers_, case)
        scale = float(case.points.double().square().sum())
        if their_measured <= scale * 2.0**-40:  # only rounding is left
            assert ours_measured <= scale * 2.0**-40
        else:
            result.append(ours_measured / their_measured)
    return result


def test_sixty_problems_are_solved_as_well_as_by_scikit_learn(ratios: list[float]) -> None:
    assert len(ratios) > 40
    assert median(ratios) <= 1.02 and max(ratios) <= 1.10


@pytest.mark.parametrize("init", ["random", "far", "k-means++"])
def test_the_inertia_never_rises(init: str) -> None:
    for seed in PROBLEMS:
        points, k, weights = problem(seed)
        for spherical in (False, True):
            first = 1e3 * torch.randn(k, points.shape[1]) if init == "far" else init
            rows = F.normalize(points, dim=1) if spherical else points
            clusters = protoclip.kmeans(
                rows, k, init=first, num_iters=60, spherical=spherical, weights=weights
            )
            floor = float(rows.double().square().sum()) * 2.0**-40
            for before, after in zip(clusters.history, clusters.history[1:], strict=False):
                assert after <= before * (1 + ROUNDING) + floor
            assert clusters.inertia == min(clusters.history)


# ---- NumPy, distances, words ----


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f4"])
def test_numpy_points_and_centroids_are_taken(dtype: Any) -> None:
    array = blobs(300, 6, 7).numpy().astype(dtype)
    points = torch.from_numpy(array.astype(np.dtype(dtype).newbyteorder("=")))
    array.flags.writeable = False
    for init in ("k-means++", array[:7]):
        got = protoclip.kmeans(
            array, np.uint8(7), init=init, seed=np.int64(3), weights=np.ones(300)
        )
        given = init if isinstance(init, str) else points[:7]
        expected = protoclip.kmeans(points, 7, init=given, seed=3)
        assert torch.equal(got.centroids, expected.centroids)
    assert torch.equal(got.predict(array[::-1]), got.labels.flip(0))
    torch.testing.assert_close(got.transform(array), got.transform(points))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_transform_gives_distances(
    dtype: torch.dtype, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protoclip.lloyd.clusters.TRANSFORM_BLOCK", 64)  # nine points at a time
    points = (blobs(200, 6, 7) + offset).to(dtype)
    clusters = protoclip.kmeans(points, 7)
    distances = clusters.transform(points.requires_grad_())  # as predict, without a gradient
    points = points.detach()
    assert not distances.requires_grad
    direct = torch.cdist(
        points.double(),
        clusters.centroids.double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    torch.testing.assert_close(distances, direct.to(distances.dtype))
    assert distances.dtype == clusters.centroids.dtype
    assert (clusters.transform(clusters.centroids).diagonal() == 0).all()
    assert clusters.transform(points[:0]).shape == (0, 7)


POINTS = torch.randn(10, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("points", [np.array([["a"]]), torch.ones(3, 2, dtype=torch.bool), {}])
def test_points_of_other_types_are_refused_in_words(points: Any) -> None:
    with pytest.raises(TypeError, match="kmeans: expected points"):
        protoclip.kmeans(points, 1)
    clusters = protoclip.kmeans(POINTS, 2)
    with pytest.raises(TypeError, match="expected points"):
        clusters.transform(points)
    with pytest.raises(ValueError, match="transform: expected points and centroids to share D"):
        clusters.transform(torch.ones(3, 5))


@pytest.mark.parametrize("kind", [list, tuple, np.int64, np.uint16, torch.int32, torch.uint8])
def test_lists_and_integers_are_points(kind: Any) -> None:
    """They give the clusters of the same numbers in fp32."""
    numbers = torch.randint(0, 200, (60, 3), generator=torch.Generator().manual_seed(1))
    expected = protoclip.kmeans(numbers.float(), 4)
    points: Any = kind(numbers.tolist()) if kind in (list, tuple) else None
    if isinstance(kind, torch.dtype):
        points = numbers.to(kind)
    elif points is None:
        points = numbers.numpy().astype(kind)
    clusters = protoclip.kmeans(points, 4)
    assert clusters.centroids.dtype == torch.float32
    assert torch.equal(clusters.centroids, expected.centroids)
    assert torch.equal(clusters.predict(points), expected.labels)
    assert torch.equal(clusters.transform(points), expected.transform(numbers.float()))
    warm = protoclip.kmeans(points, 4, init=expected.centroids.tolist())
    assert torch.equal(warm.labels, expected.labels)


def test_large_integers_are_clustered_in_fp64() -> None:
    points = 2**40 + torch.arange(6)[:, None] // 3 * 5
    clusters = protoclip.kmeans(points, 2, init="k-means++")
    assert clusters.centroids.dtype == torch.float64 and clusters.inertia == 0
    with pytest.raises(ValueError, match="rows of numbers of one length"):
        protoclip.kmeans([[1.0], [1.0, 2.0]], 1)
