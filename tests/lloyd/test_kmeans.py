"""k-means as a whole: restarts and starts, two processes, faiss as a backend and as a peer."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import on_threads
from kmeans_cases import Case
from safetensors.torch import load_file, save_file
from torch import Tensor

import protoclip
from protoclip import Clusters
from protoclip.common.seeds import mix
from protoclip.evaluate.metrics import group_scores
from protoclip.lloyd import loop, starts
from protoclip.ops.clusters import PointsAssignment

INITS = ["random", "k-means++", "plain k-means++"]


def mixture(n: int = 4000, k: int = 30, d: int = 16, spread: float = 0.5) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(k, d)[torch.randint(k, (n,))] + spread * torch.randn(n, d)


TWINS = torch.tensor([[0.0], [1.0]]).repeat(5, 1)
NO_COLUMNS = torch.zeros(30, 0)
EASY = {
    "distinct points": Case(torch.arange(12.0)[:, None], 12, {"num_iters": 0}),
    "any once those are taken": Case(TWINS, 7, {"num_iters": 0}),
    "few distinct points": Case(TWINS, 4, {"num_iters": 3}),
    "no columns": Case(NO_COLUMNS, 7),
    "no columns, split": Case(NO_COLUMNS, 7, {"empty_clusters": "split"}),
    "equal points": Case(torch.full((10, 2), 1e4), 4),
    "equal points, many columns": Case(torch.full((1000, 8), 0.1), 5),
}


@pytest.mark.parametrize("case", EASY)
def test_points_that_are_their_centroids_have_no_inertia(case: str) -> None:
    points, k = EASY[case].array, EASY[case].num_clusters
    clusters = EASY[case].run()
    assert clusters.inertia == 0 and clusters.counts.sum() == len(points)
    assert clusters.centroids.shape == (k, points.shape[1])
    distinct = len(points.unique(dim=0)) if points.shape[1] else 1
    assert int((clusters.counts > 0).sum()) == min(k, distinct)


@pytest.mark.parametrize("init, spherical", [("random", False), ("k-means++", True)])
def test_history_falls_and_labels_belong_to_the_centroids(init: str, spherical: bool) -> None:
    points = F.normalize(mixture(), dim=1) if spherical else mixture()
    clusters = protoclip.kmeans(points, 50, num_iters=12, init=init, spherical=spherical)
    if spherical:
        torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(50))
    history = clusters.history
    assert len(history) == 13 and list(history) == sorted(history, reverse=True)
    labels, squared = protoclip.kmeans_assign(points, clusters.centroids)
    assert torch.equal(labels, clusters.labels)
    assert torch.equal(clusters.counts, torch.bincount(labels, minlength=50))
    assert history[-1] == clusters.inertia == pytest.approx(squared.double().sum().item(), 1e-12)


class Blobs(NamedTuple):
    points: Tensor
    labels: Tensor


def blobs(k: int, points_each: int) -> Blobs:
    torch.manual_seed(0)
    labels = torch.arange(k).repeat_interleave(points_each)
    points = (10 * torch.randn(k, 4))[labels] + 0.1 * torch.randn(k * points_each, 4)
    return Blobs(points, labels)


@pytest.mark.smoke
def test_well_separated_blobs_are_found() -> None:
    points, truth = blobs(6, points_each=40)
    clusters = protoclip.kmeans(points, 6, init="k-means++", num_restarts=3)
    pairs_of_labels = torch.stack([truth, clusters.labels]).unique(dim=1)
    assert pairs_of_labels.shape == (2, 6)
    assert clusters.counts.tolist() == [40] * 6


def restart_seeds(seed: int, count: int) -> list[int]:
    """The first run keeps the seed, so that recorded runs keep their bits."""
    return [seed, *(int(mix(seed, restart)) >> 1 for restart in range(1, count))]


def test_restarts_of_neighbouring_seeds_share_no_start() -> None:
    """With the seeds s, s + 1, ... they shared all but one: here twelve seeds had four results."""
    random = torch.Generator().manual_seed(0)
    middles = torch.randn(20, 8, generator=random).repeat_interleave(100, 0)
    points = middles + torch.randn(2000, 8, generator=random)
    results = [
        protoclip.kmeans(points, 20, num_iters=3, num_restarts=10, seed=seed) for seed in range(12)
    ]
    assert len({clusters.inertia for clusters in results}) == 12


def test_the_default_start_is_k_means_plus_plus() -> None:
    """From a random one, 2,000 points in 30 blobs ended at 4 times this inertia."""
    points, _ = blobs(30, points_each=67)
    default = [protoclip.kmeans(points, 30, seed=seed) for seed in range(5)]
    named = [protoclip.kmeans(points, 30, init="k-means++", seed=seed) for seed in range(5)]
    assert [clusters.history for clusters in default] == [clusters.history for clusters in named]
    random = [protoclip.kmeans(points, 30, init="random", seed=seed) for seed in range(5)]
    total = sum(clusters.inertia for clusters in default)
    assert 3 * total < sum(clusters.inertia for clusters in random)


def test_a_warm_start_with_too_few_centroids_takes_random_points_for_the_others() -> None:
    points = torch.randn(200, 3)
    few = protoclip.kmeans(points, 9, num_iters=5).centroids
    start = protoclip.kmeans(points, 12, num_iters=0, init=few).centroids
    assert torch.equal(start[:9], few)
    is_a_point = (start[9:, None] == points).all(dim=2).any(dim=1)
    assert is_a_point.all()


def without_end(case: Case, num_iters: int) -> Clusters:
    """All iterations, also those at rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_moved", lambda *_: torch.tensor(True))
        patch.setattr(loop, "_is_circle", lambda *_: False)
        patch.setattr(PointsAssignment, "runs_kmeans", False)
        return case.run(num_iters=num_iters)


MANY = mixture(n=600)
FEW = mixture(n=40)
TEN_OF_EACH = FEW.repeat(10, 1)
WEIGHTS = torch.rand(600, generator=torch.Generator().manual_seed(2))
SPHERE = F.normalize(MANY, dim=1)
AT_REST = {
    "plain": Case(MANY, 12),
    "k-means++": Case(MANY, 12, {"init": "k-means++"}),
    "fp64": Case(MANY.double(), 12),
    "bf16": Case(MANY.bfloat16(), 12),
    "reference": Case(MANY, 12, {"backend": "reference"}),
    "weights": Case(MANY, 12, {"weights": WEIGHTS}),
    "weights of zero": Case(MANY, 12, {"weights": WEIGHTS.round()}),
    "spherical": Case(SPHERE, 12, {"spherical": True}),
    "spherical weights": Case(MANY, 12, {"spherical": True, "weights": WEIGHTS}),
    "equal points": Case(TEN_OF_EACH, 12),
    "equal spherical points": Case(TEN_OF_EACH, 12, {"spherical": True}),
    "a cluster a point": Case(FEW, 40),
    "one cluster": Case(FEW, 1),
    "empty clusters at first": Case(MANY, 12, {"init": mixture(n=12) * 100}),
}


def assert_same_clusters(got: Clusters, expected: Clusters) -> None:
    """Bit for bit."""
    assert torch.equal(got.centroids, expected.centroids)
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.counts, expected.counts)
    assert got.inertia == expected.inertia


@pytest.mark.parametrize("case", AT_REST)
def test_a_run_ends_at_rest_with_the_bits_of_any_more_iterations_and_not_later(case: str) -> None:
    clusters = AT_REST[case].run(num_iters=400, tol=0)
    num_iters = clusters.num_iters
    assert 1 <= num_iters < 200 and clusters.inertia == clusters.history[-2]
    for more in (0, 1, 2, 25):
        longer = without_end(AT_REST[case], num_iters + more)
        assert_same_clusters(clusters, longer)
        assert clusters.history[:num_iters] == longer.history[:num_iters]
        assert longer.num_iters == num_iters + more
    for fewer in range(1, min(3, num_iters)):
        before = without_end(AT_REST[case], num_iters - fewer)
        assert torch.equal(before.centroids, clusters.centroids) == (fewer == 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("empty_clusters", ["move", "split"])
def test_more_clusters_than_distinct_points_never_end_wrong(
    spherical: bool, seed: int, empty_clusters: str
) -> None:
    """Moved clusters end. Half of a split one can be empty at once, and again."""
    case = Case(
        mixture(n=9).repeat(20, 1),
        15,
        {"seed": seed, "spherical": spherical, "empty_clusters": empty_clusters},
    )
    clusters = case.run(num_iters=60)
    assert_same_clusters(clusters, without_end(case, 60))
    if empty_clusters == "move":
        assert clusters.num_iters < 10 and int((clusters.counts > 0).sum()) == 9


def test_a_run_at_rest_costs_one_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    at_rest = protoclip.kmeans(MANY, 12, num_iters=400, tol=0)
    num_assignments = 0
    assign = PointsAssignment.__call__

    def assign_and_count(self: PointsAssignment, *arguments: Any) -> Any:
        nonlocal num_assignments
        num_assignments += 1
        return assign(self, *arguments)

    monkeypatch.setattr(PointsAssignment, "__call__", assign_and_count)
    monkeypatch.setattr(PointsAssignment, "runs_kmeans", False)
    again = protoclip.kmeans(MANY, 12, num_iters=200, tol=0, init=at_rest.centroids)
    assert_same_clusters(again, at_rest)
    assert again.num_iters == num_assignments == 1
    num_assignments = 0
    protoclip.kmeans(MANY, 12, num_iters=400, tol=0)
    assert num_assignments == at_rest.num_iters  # a run that does not end makes one more


OFFSET = MANY + 1e4
ONE_OP = AT_REST | {
    "tol": Case(MANY, 12, {"tol": 1e-3}),
    "far from 0": Case(OFFSET, 12, {"weights": WEIGHTS}),
    "screened": Case(mixture(n=900, k=60, d=64), 60, {"weights": None}),
}


@pytest.mark.parametrize("case", ONE_OP)
def test_an_iteration_as_one_op_has_the_bits_of_its_steps(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clusters = ONE_OP[case].run(init="random", num_iters=30)
    monkeypatch.setattr(PointsAssignment, "runs_kmeans", False)
    by_steps = ONE_OP[case].run(init="random", num_iters=30)
    assert_same_clusters(clusters, by_steps)
    assert clusters.history == by_steps.history


def test_each_restart_ends_by_itself() -> None:
    histories: list[list[float]] = []

    def note(iteration: int, inertia: Any) -> None:
        if iteration == 0:
            histories.append([])
        assert iteration == len(histories[-1])
        histories[-1].append(float(inertia))

    best = protoclip.kmeans(MANY, 12, num_iters=400, num_restarts=4, seed=7, progress=note)
    runs = [protoclip.kmeans(MANY, 12, num_iters=400, seed=seed) for seed in restart_seeds(7, 4)]
    assert histories == [list(run.history[:-1]) for run in runs]
    assert len({run.num_iters for run in runs}) > 1
    assert_same_clusters(best, min(runs, key=lambda run: run.inertia))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tol", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
def test_tol_is_scikit_learns(tol: float, seed: int) -> None:
    """Same start: the same number of iterations, and the same centroids."""
    cluster = pytest.importorskip("sklearn.cluster")
    points = mixture(n=900).double() + 3  # off the origin: the variance is about the mean
    start = points[torch.randperm(900, generator=torch.Generator().manual_seed(seed))[:9]]
    ours = protoclip.kmeans(points, 9, init=start, num_iters=300, tol=tol)
    theirs = cluster.KMeans(
        9, init=start.numpy(), n_init=1, max_iter=300, tol=tol, algorithm="lloyd"
    ).fit(points.numpy())
    assert ours.num_iters == theirs.n_iter_
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_))
    assert ours.labels.tolist() == theirs.labels_.tolist()
    assert ours.inertia == pytest.approx(theirs.inertia_)
    labels, _ = protoclip.kmeans_assign(points, ours.centroids)
    assert torch.equal(labels, ours.labels)


def test_the_defaults_are_scikit_learns() -> None:
    """It stopped after 20 iterations, of the 79 that 5,000 points need, without a word."""
    cluster = pytest.importorskip("sklearn.cluster")
    points = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = protoclip.kmeans(points, 20, init=points[:20])
    theirs = cluster.KMeans(20, init=points[:20].numpy(), n_init=1).fit(points.numpy())
    assert ours.num_iters == theirs.n_iter_ > 20 and ours.converged
    assert ours.inertia == pytest.approx(theirs.inertia_)


def test_a_run_that_has_not_converged_says_so_where_it_was_called(
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert not protoclip.kmeans(MANY, 12, num_iters=2).converged
    warning = recwarn.pop(UserWarning)
    assert str(warning.message) == (
        "kmeans: stopped after num_iters=2 before it converged; raise num_iters or tol"
    )
    assert warning.filename == __file__
    assert not protoclip.kmeans(MANY, 12, num_iters=2, warn=False).converged
    assert not protoclip.kmeans(MANY, 12, num_iters=0).converged  # the start was asked for
    assert protoclip.kmeans(MANY, 12).converged
    assert protoclip.kmeans(MANY, 12, num_iters=400, tol=0).converged
    needed = protoclip.kmeans(MANY, 12, tol=0).num_iters
    assert protoclip.kmeans(MANY, 12, num_iters=needed, tol=0).converged
    assert not recwarn.list


def test_callers_inside_the_package_have_their_own_words(tmp_path: Path) -> None:
    points = mixture(n=600, spread=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        protoclip.choose_num_clusters(points, max_clusters=20)
        protoclip.hierarchical_kmeans(points, [40, 9], num_iters=1)
        group_scores(points, torch.arange(600) % 20)
        assert protoclip.KMeans(40, max_iter=2).fit(points).n_iter_ == 2


def test_compiled_code_runs_it_as_it_is() -> None:
    """Traced, it warned, compiled dozens of pieces and took up to a minute."""
    points = mixture(n=300)

    def clustered(x: Tensor) -> Tensor:
        return protoclip.kmeans(x * 2, 7).centroids.sin()

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = torch.compile(protoclip.kmeans, backend="eager")(points, 7)
        part = torch.compile(clustered, backend="eager")(points)
    assert_same_clusters(whole, protoclip.kmeans(points, 7))
    assert torch.equal(part, clustered(points))
    assert graphs["unique_graphs"] <= 2  # x * 2, and the sine


BAD: dict[str, dict[str, Any]] = {
    "lower num_clusters": {"num_clusters": 11},
    "1 <= num_clusters": {"num_clusters": 0},
    "got 2.5": {"num_clusters": 2.5},
    "expected init in": {"init": "best"},
    "num_restarts >= 1": {"num_restarts": 0},
    "num_restarts=1 with init centroids, got 2": {"init": torch.randn(2, 2), "num_restarts": 2},
    "finite tol >= 0, got -0.1": {"tol": -0.1},
    "finite tol >= 0, got nan": {"tol": math.nan},
    "finite tol >= 0, got '1e-4'": {"tol": "1e-4"},
    "1 rows with NaN or inf; the first is row 4": {
        "points": torch.randn(10, 2).index_fill_(0, torch.tensor(4), math.inf)
    },
    r"expected weights \[N\] = \[10\], got \[9\]": {"weights": torch.ones(9)},
    "at least 0, got 2 negative or not finite": {
        "weights": torch.tensor([-1.0, torch.nan] + [1.0] * 8)
    },
    "a weight above 0": {"weights": torch.zeros(10)},
    "weights with a finite sum": {"weights": [1e308] * 10},
    r"at most 3.4e\+37, .*are finite, got 1 rows with larger values; the first is row 2": {
        "points": torch.randn(10, 2).index_fill_(0, torch.tensor(2), 1e38)
    },
    r"at most 1.0e\+150, .*finite, got 1 rows": {
        "points": torch.randn(10, 2).double().index_fill_(0, torch.tensor(2), 1e160)
    },
    "expected weights .* as numbers, got 'heavy'": {"weights": "heavy"},
    "expected an integer .* got 2.0": {"num_clusters": 2.0},
    "num_clusters <= N = 10 points, got None": {"num_clusters": None},
    "finite init centroids, got 1 rows with NaN or inf; the first is row 1": {
        "init": torch.tensor([[0.0, 0.0], [math.nan, 0.0]])
    },
    "an integer seed of 64 bits, got None": {"seed": None},
    "an integer seed of 64 bits, got 1.5": {"seed": 1.5},
    "an integer seed of 64 bits, got 2361183241434822606848": {"seed": 2**71},
    "integers num_iters >= 0 and num_restarts >= 1, got 2.5, 1": {"num_iters": 2.5},
    "num_restarts >= 1, got 300, '3'": {"num_restarts": "3"},
    r"expected init in .* got None": {"init": None},
    r"init centroids .* got \[3, 2\]": {"init": [[0.0, 0.0]] * 3},
    r"init centroids .* got \[2\]": {"init": [0.0, 0.0]},
    "empty_clusters in .* got 'drop'": {"empty_clusters": "drop"},
    "backend 'faiss' keeps no state": {"backend": "faiss", "state": "k.state"},
    "expected state_seconds >= 0, got -1": {"state_seconds": -1},
    "expected state_seconds >= 0, got 'often'": {"state_seconds": "often"},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments_are_refused_in_words(words: str) -> None:
    arguments = {"points": torch.randn(10, 2), "num_clusters": 2} | BAD[words]
    with pytest.raises(ValueError, match=words):
        protoclip.kmeans(**arguments)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_autocast_and_the_default_device_change_nothing(init: str, weighted: bool) -> None:
    points = mixture(n=900, k=20)
    options: dict[str, Any] = {"num_iters": 3, "init": init}
    if weighted:
        options["weights"] = torch.linspace(0, 2, 900)
    plain = protoclip.kmeans(points, 20, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_clusters(protoclip.kmeans(points, 20, **options), plain)
    with torch.device("meta"):
        assert_same_clusters(protoclip.kmeans(points, 20, **options), plain)


def test_spherical_centroids_are_of_unit_length_wherever_the_points_are() -> None:
    points = torch.randn(200, 4)
    points[:, 0] += 1.7e9  # beside it a unit vector has no digits
    for column in (points, torch.randn(200, 4) + 1e3, F.normalize(points, dim=1)):
        lengths = protoclip.kmeans(column, 3, spherical=True).centroids.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(3), rtol=0, atol=1e-6)


def test_backends_walk_the_same_way() -> None:
    points = mixture(n=800)
    auto = protoclip.kmeans(points, 20, num_iters=5, backend="auto")
    reference = protoclip.kmeans(points, 20, num_iters=5, backend="reference")
    torch.testing.assert_close(auto.centroids, reference.centroids, rtol=1e-4, atol=1e-4)
    assert auto.inertia == pytest.approx(reference.inertia, rel=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    points = mixture()
    on_one, on_two = on_threads(
        lambda: protoclip.kmeans(points, 60, num_iters=6, num_restarts=2), counts=(1, 2)
    )
    assert torch.equal(on_one.labels, on_two.labels)
    if protoclip.backends("kmeans_assign").get("cpu", "missing") is None:
        assert torch.equal(on_one.centroids, on_two.centroids)


@pytest.mark.parametrize("spherical", [False, True])
def test_no_worse_than_faiss(spherical: bool) -> None:
    faiss = pytest.importorskip("faiss")
    points = F.normalize(mixture(), dim=1) if spherical else mixture()

    def runs(backend: str) -> list[Clusters]:
        return [
            protoclip.kmeans(
                points, 30, num_iters=10, init="random", seed=seed, spherical=spherical,
                backend=backend,
            )
            for seed in range(6)
        ]  # fmt: skip

    theirs = runs("faiss")
    for clusters in theirs:
        assert len(clusters.history) == 11 and clusters.history[-1] <= clusters.history[0]
        assert torch.equal(clusters.counts, torch.bincount(clusters.labels, minlength=30))
    our_inertia = sum(clusters.inertia for clusters in runs("auto"))
    their_inertia = sum(clusters.inertia for clusters in theirs)
    assert our_inertia <= their_inertia * 1.02, faiss.__version__  # six random starts each


def test_faiss_is_the_papers_own_clustering() -> None:
    faiss = pytest.importorskip("faiss")
    points = mixture()
    direct = faiss.Kmeans(
        16, 25, niter=7, nredo=3, seed=5, min_points_per_centroid=1, max_points_per_centroid=4000
    )
    direct.train(points.numpy())
    clusters = protoclip.kmeans(
        points, 25, num_iters=7, num_restarts=3, init="random", seed=5, backend="faiss"
    )
    torch.testing.assert_close(clusters.centroids, torch.from_numpy(direct.centroids))
    assert clusters.history[:-1] == pytest.approx(list(direct.obj), rel=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_faiss_takes_a_warm_start_and_counts_as_we_do(spherical: bool) -> None:
    """The history of both counts squared distances, spherical too."""
    pytest.importorskip("faiss")
    points = F.normalize(mixture(), dim=1)

    def history(backend: str) -> tuple[float, ...]:
        start = F.normalize(points[:25], dim=1)
        return protoclip.kmeans(
            points, 25, num_iters=1, init=start, spherical=spherical, backend=backend
        ).history

    assert history("faiss") == pytest.approx(history("auto"), rel=1e-4)


def test_a_missing_faiss_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        protoclip.kmeans(torch.randn(30, 4), 3, backend="faiss")


def test_faiss_starts_where_ours_does() -> None:
    """Its own k-means++ is as good as a random start; init="random" is the paper's. Its seeds have
    32 bits."""
    pytest.importorskip("faiss")
    options: dict[str, Any] = {"num_iters": 2, "num_restarts": 3}
    theirs = protoclip.kmeans(MANY, 25, backend="faiss", seed=4, **options)
    ours = protoclip.kmeans(MANY, 25, seed=4, **options)
    assert theirs.history == pytest.approx(ours.history, rel=1e-5)
    far = protoclip.kmeans(MANY, 7, backend="faiss", init="random", seed=2**40 + 3)
    near = protoclip.kmeans(MANY, 7, backend="faiss", init="random", seed=3)
    assert_same_clusters(far, near)
    assert far.num_iters > 1 and not far.converged  # it does not say


@pytest.mark.parametrize(
    "options",
    [{"weights": torch.ones(30)}, {"tol": 1e-4}, {"points": "rows.npy"}],
    ids=["weights", "tol", "points on disk"],
)
def test_what_faiss_has_not_is_refused(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starts, "GREEDY_BYTES", 0)
    np.save("rows.npy", np.ones((30, 4)))
    call: dict[str, Any] = {"points": torch.randn(30, 4), "num_clusters": 3} | options
    with pytest.raises(ValueError, match="takes points in memory, no group, no weights"):
        protoclip.kmeans(**call, backend="faiss")


def test_a_weight_counts_as_so_many_copies() -> None:
    points = MANY.double()
    times = torch.arange(600) % 4  # some points count nothing
    start = points[times > 0][:12]
    weighted = protoclip.kmeans(points, 12, init=start, weights=times.float(), num_iters=5)
    copied = protoclip.kmeans(points.repeat_interleave(times, 0), 12, init=start, num_iters=5)
    torch.testing.assert_close(weighted.centroids, copied.centroids)
    assert weighted.history == pytest.approx(copied.history)
    assert torch.equal(weighted.labels.repeat_interleave(times), copied.labels)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-30])
def test_equal_weights_are_no_weights_bit_for_bit(init: str, weight: float) -> None:
    """Of any size; the inertia alone is multiplied by it."""
    case = Case(MANY, 12, {"init": init, "num_restarts": 2, "num_iters": 7})
    without = case.run()
    equal = case.run(weights=[weight] * 600)
    assert torch.equal(equal.centroids, without.centroids)
    assert torch.equal(equal.counts, without.counts)
    assert torch.equal(equal.labels, without.labels)
    assert equal.history == pytest.approx([weight * x for x in without.history], rel=1e-15)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("scale", [2.0**-1000, 1e-44, 1e39])
def test_weights_mean_the_same_at_any_scale(init: str, scale: float) -> None:
    """Those beyond fp32's range too."""
    case = Case(MANY, 12, {"init": init, "num_iters": 7})
    weights = torch.rand(600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clusters = case.run(weights=weights)
    scaled = case.run(weights=scale * weights)
    torch.testing.assert_close(scaled.centroids, clusters.centroids)
    assert scaled.history == pytest.approx([scale * x for x in clusters.history])


@pytest.fixture
def light_and_heavy() -> Case:
    """500 points of hardly any weight at 0 to 499, and 500 of weight 1 between -9 and -8."""
    points = torch.cat([torch.arange(500.0)[:, None], torch.rand(500, 1) - 9])
    weights = torch.cat([torch.full((500,), 1e-9), torch.ones(500)])
    return Case(points, 3, {"weights": weights})


@pytest.mark.parametrize("init", INITS)
def test_starts_are_drawn_by_weight(init: str, light_and_heavy: Case) -> None:
    num_heavy = 0
    for seed in range(20):
        start = light_and_heavy.run(init=init, num_iters=0, seed=seed).centroids
        num_heavy += int((start < -7).sum())
    assert num_heavy >= 58  # of 60; without weights about half or few


@pytest.mark.parametrize("init", INITS)
def test_points_of_weight_zero_are_no_start(init: str, light_and_heavy: Case) -> None:
    weights = light_and_heavy.options["weights"] * (light_and_heavy.array[:, 0] < 0)
    clusters = light_and_heavy.run(init=init, weights=weights, seed=1)
    assert (clusters.centroids < -7).all()


def test_predict_repeats_the_labels() -> None:
    points = mixture(n=500)
    clusters = protoclip.kmeans(points, 9, num_iters=4)
    assert torch.equal(clusters.predict(points), clusters.labels)
    with pytest.raises(ValueError, match=r"predict: expected points of shape \[M, D\], got \(1,\)"):
        clusters.predict([1])


def test_clusters_say_what_they_are_in_one_line() -> None:
    text = repr(protoclip.kmeans(mixture(n=500), 9, num_iters=4))
    assert text.startswith("Clusters(K=9, D=16, N=500, sizes ") and len(text) < 99


@pytest.mark.parametrize("num_iters", [4, 400])
def test_clusters_are_saved_and_loaded(num_iters: int, tmp_path: Path) -> None:
    """Those of older files converged if they came to rest."""
    clusters = protoclip.kmeans(MANY, 9, num_iters=num_iters, tol=0)
    clusters.save(tmp_path / "new.safetensors")
    tensors = load_file(tmp_path / "new.safetensors")
    del tensors["converged"]
    save_file(tensors, tmp_path / "old.safetensors")
    for name in ("new", "old"):
        loaded = protoclip.Clusters.load(tmp_path / f"{name}.safetensors")
        assert_same_clusters(loaded, clusters)
        assert loaded.history == clusters.history
        assert loaded.converged is clusters.converged is (num_iters == 400)


def test_a_file_that_holds_no_clusters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_text("no")
    with pytest.raises(ValueError, match="a file that Clusters.save wrote"):
        protoclip.Clusters.load(tmp_path / "other.safetensors")
