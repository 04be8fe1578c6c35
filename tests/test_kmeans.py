"""k-means as a whole: restarts and starts, two processes, faiss as a backend and as a peer."""

import importlib
import math
import sys
import warnings
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import on_threads
from ranks import on_ranks

import protoclip
from protoclip.ops.clusters import assignment

kmeans_module = importlib.import_module("protoclip.kmeans")  # protoclip.kmeans is the function
INITS = "random", "k-means++"


def mixture(n=4000, k=30, d=16, spread=0.5):
    torch.manual_seed(0)
    return torch.randn(k, d)[torch.randint(k, (n,))] + spread * torch.randn(n, d)


def test_plus_plus_picks_distinct_points_then_any():
    points = torch.arange(12.0)[:, None]
    clusters = protoclip.kmeans(points, 12, init="k-means++", num_iters=0)
    assert sorted(clusters.centroids[:, 0].tolist()) == list(range(12)) and clusters.inertia == 0
    twins = torch.tensor([[0.0], [1.0]]).repeat(5, 1)
    assert protoclip.kmeans(twins, 7, init="k-means++", num_iters=0).inertia == 0
    clusters = protoclip.kmeans(twins, 4, num_iters=3)
    assert clusters.inertia == pytest.approx(0, abs=1e-4) and clusters.counts.sum() == 10


@pytest.mark.parametrize("init, spherical", [("random", False), ("k-means++", True)])
def test_history_falls_and_labels_belong_to_the_centroids(init, spherical):
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


def blobs(k, each):
    torch.manual_seed(0)
    truth = torch.arange(k).repeat_interleave(each)
    return (10 * torch.randn(k, 4))[truth] + 0.1 * torch.randn(k * each, 4), truth


def test_well_separated_blobs_are_found():
    points, truth = blobs(6, 40)
    clusters = protoclip.kmeans(points, 6, init="k-means++", num_restarts=3)
    assert len(torch.stack([truth, clusters.labels]).unique(dim=1).T) == 6
    assert clusters.counts.tolist() == [40] * 6


def test_restarts_keep_the_best_and_another_seed_gives_others():
    points = torch.randn(200, 3)
    each = [protoclip.kmeans(points, 12, seed=s).inertia for s in range(4)]
    assert len(set(each)) > 1
    assert protoclip.kmeans(points, 12, num_restarts=4).inertia == min(each)


def test_a_warm_start_goes_on_where_it_was():
    points = torch.randn(200, 3)
    first = protoclip.kmeans(points, 12, num_iters=5)
    more = protoclip.kmeans(points, 12, num_iters=5, init=first.centroids)
    assert torch.equal(more.centroids, protoclip.kmeans(points, 12, num_iters=10).centroids)
    fewer = protoclip.kmeans(points, 12, num_iters=0, init=first.centroids[:9]).centroids
    assert torch.equal(fewer[:9], first.centroids[:9])
    assert (fewer[9:, None] == points).all(dim=2).any(dim=1).all()  # random points


def test_empty_clusters_take_half_of_the_largest():
    points, _ = blobs(2, 100)
    far = torch.cat([points[:1], points[-1:], torch.full((2, 4), 1e4)])
    assert (protoclip.kmeans(points, 4, init=far, num_iters=3).counts > 0).all()


def _weights(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(2))


def _equal_points():
    return mixture(n=40).repeat(10, 1)  # each of 40 points ten times


AT_REST = {  # points, number of clusters, options
    "plain": (mixture(n=600), 12, {}),
    "k-means++": (mixture(n=600), 12, {"init": "k-means++"}),
    "fp64": (mixture(n=600).double(), 12, {}),
    "bf16": (mixture(n=600).bfloat16(), 12, {}),
    "reference": (mixture(n=600), 12, {"backend": "reference"}),
    "weights": (mixture(n=600), 12, {"weights": _weights(600)}),
    "weights of zero": (mixture(n=600), 12, {"weights": _weights(600).round()}),
    "spherical": (F.normalize(mixture(n=600), dim=1), 12, {"spherical": True}),
    "spherical weights": (mixture(n=600), 12, {"spherical": True, "weights": _weights(600)}),
    "equal points": (_equal_points(), 12, {}),
    "equal spherical points": (_equal_points(), 12, {"spherical": True}),
    "a cluster a point": (mixture(n=40), 40, {}),
    "one cluster": (mixture(n=40), 1, {}),
    "empty clusters at first": (mixture(n=600), 12, {"init": mixture(n=12) * 100}),
}


def without_end(monkeypatch, points, k, **options):
    """``kmeans`` that always runs all its iterations."""
    with monkeypatch.context() as patch:
        patch.setattr(kmeans_module, "_moved", lambda *_: torch.tensor(True))
        return protoclip.kmeans(points, k, **options)


def assert_same_bits(one, other):
    assert torch.equal(one.centroids, other.centroids) and torch.equal(one.labels, other.labels)
    assert torch.equal(one.counts, other.counts) and one.inertia == other.inertia


@pytest.mark.parametrize("case", AT_REST)
def test_ends_at_rest_with_the_bits_of_any_more_iterations(case, monkeypatch):
    points, k, options = AT_REST[case]
    found = protoclip.kmeans(points, k, num_iters=400, **options)
    ran = found.num_iters
    assert 1 <= ran < 200 and found.inertia == found.history[-2]
    for more in (0, 1, 2, 25):
        longer = without_end(monkeypatch, points, k, num_iters=ran + more, **options)
        assert_same_bits(found, longer)
        assert found.history[:ran] == longer.history[:ran] and longer.num_iters == ran + more
    if ran > 1:  # and not an iteration later than it must
        before = without_end(monkeypatch, points, k, num_iters=ran - 1, **options)
        assert torch.equal(before.centroids, found.centroids)
    if ran > 2:
        before = without_end(monkeypatch, points, k, num_iters=ran - 2, **options)
        assert not torch.equal(before.centroids, found.centroids)


@pytest.mark.parametrize("spherical", [False, True])
def test_more_clusters_than_distinct_points_end_or_not_but_never_wrong(spherical, monkeypatch):
    """Half of a split cluster can be empty at once, and again: nothing is promised of the end."""
    for seed in range(4):
        options = {"seed": seed, "spherical": spherical, "num_iters": 60}
        points = mixture(n=9).repeat(20, 1)
        found = protoclip.kmeans(points, 15, **options)
        assert_same_bits(found, without_end(monkeypatch, points, 15, **options))


def test_a_run_at_rest_costs_one_assignment(monkeypatch):
    points = mixture(n=600)
    rest = protoclip.kmeans(points, 12, num_iters=400)
    calls = []

    def counted(*args):
        assign = assignment(*args)
        return lambda centroids: (calls.append(len(centroids)), assign(centroids))[1]

    monkeypatch.setattr(kmeans_module, "assignment", counted)
    again = protoclip.kmeans(points, 12, num_iters=200, init=rest.centroids)
    assert_same_bits(rest, again)
    assert again.num_iters == len(calls) == 1
    calls.clear()
    protoclip.kmeans(points, 12, num_iters=400)
    assert len(calls) == rest.num_iters  # a run that does not end makes one more


def test_each_restart_ends_by_itself():
    points = mixture(n=600)
    seen = [[]]

    def note(iteration, inertia):
        if iteration == 0:
            seen.append([])
        assert iteration == len(seen[-1])
        seen[-1].append(float(inertia))

    best = protoclip.kmeans(points, 12, num_iters=400, num_restarts=4, seed=7, progress=note)
    each = [protoclip.kmeans(points, 12, num_iters=400, seed=7 + r) for r in range(4)]
    assert [tuple(of_run) for of_run in seen[1:]] == [run.history[:-1] for run in each]
    assert len({run.num_iters for run in each}) > 1
    assert_same_bits(best, min(each, key=lambda run: run.inertia))


@pytest.mark.parametrize("tol", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
def test_tol_is_scikit_learns(tol):
    """Same start: the same number of iterations, and the same centroids."""
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(5):
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


def test_compiled_code_runs_it_as_it_is():
    """Traced, it warned, compiled dozens of pieces and took up to a minute."""
    points = mixture(n=300)

    def clustered(x):
        return protoclip.kmeans(x * 2, 7).centroids.sin()

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = torch.compile(protoclip.kmeans, backend="eager")(points, 7)
        part = torch.compile(clustered, backend="eager")(points)
    assert_same_bits(whole, protoclip.kmeans(points, 7))
    assert torch.equal(part, clustered(points))
    assert graphs["unique_graphs"] <= 2  # x * 2, and the sine


BAD = {
    "lower num_clusters": {"num_clusters": 11},
    "1 <= num_clusters": {"num_clusters": 0},
    "got 2.5": {"num_clusters": 2.5},
    "expected init in": {"init": "best"},
    "init centroids": {"init": torch.randn(3, 2)},
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
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments(words):
    with pytest.raises(ValueError, match=words):
        protoclip.kmeans(**{"points": torch.randn(10, 2), "num_clusters": 2, **BAD[words]})


def test_backends_walk_the_same_way():
    points = mixture(n=800)
    runs = [protoclip.kmeans(points, 20, num_iters=5, backend=b) for b in ("auto", "reference")]
    torch.testing.assert_close(runs[0].centroids, runs[1].centroids, rtol=1e-4, atol=1e-4)
    assert runs[0].inertia == pytest.approx(runs[1].inertia, rel=1e-5)


def test_same_bits_with_one_thread_and_two():
    points = mixture()
    runs = on_threads(lambda: protoclip.kmeans(points, 60, num_iters=6, num_restarts=2), (1, 2))
    assert torch.equal(runs[0].labels, runs[1].labels)
    if protoclip.backends("kmeans_assign").get("cpu", "missing") is None:
        assert torch.equal(runs[0].centroids, runs[1].centroids)


@pytest.mark.parametrize("spherical", [False, True])
def test_no_worse_than_faiss(spherical):
    faiss = pytest.importorskip("faiss")
    points = F.normalize(mixture(), dim=1) if spherical else mixture()
    ours, theirs = 0.0, 0.0
    for seed in range(6):
        settings = {"num_iters": 10, "seed": seed, "spherical": spherical}
        ours += protoclip.kmeans(points, 30, **settings).inertia
        clusters = protoclip.kmeans(points, 30, backend="faiss", **settings)
        theirs += clusters.inertia
        assert len(clusters.history) == 11 and clusters.history[-1] <= clusters.history[0]
        assert torch.equal(clusters.counts, torch.bincount(clusters.labels, minlength=30))
    assert ours <= theirs * 1.02, faiss.__version__  # six random starts each


def test_faiss_is_the_papers_own_clustering():
    faiss = pytest.importorskip("faiss")
    points = mixture()
    direct = faiss.Kmeans(
        16, 25, niter=7, nredo=3, seed=5, min_points_per_centroid=1, max_points_per_centroid=4000
    )
    direct.train(points.numpy())
    clusters = protoclip.kmeans(points, 25, num_iters=7, num_restarts=3, seed=5, backend="faiss")
    torch.testing.assert_close(clusters.centroids, torch.from_numpy(direct.centroids))
    assert clusters.history[:-1] == pytest.approx(list(direct.obj), rel=1e-6)


@pytest.mark.parametrize("spherical", [False, True])
def test_faiss_takes_a_warm_start_and_counts_as_we_do(spherical):
    """The history of both counts squared distances, spherical too."""
    pytest.importorskip("faiss")
    points = F.normalize(mixture(), dim=1)
    start = F.normalize(points[:25], dim=1)
    settings = {"num_iters": 1, "init": start, "spherical": spherical}
    ours = protoclip.kmeans(points, 25, **settings).history
    theirs = protoclip.kmeans(points, 25, backend="faiss", **settings).history
    assert theirs == pytest.approx(ours, rel=1e-4)


def test_faiss_missing_or_asked_too_much(monkeypatch):
    points = torch.randn(30, 4)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(ValueError, match="pip install faiss-cpu"):
            protoclip.kmeans(points, 3, backend="faiss")
    pytest.importorskip("faiss")
    for options in ({"init": "k-means++"}, {"weights": torch.ones(30)}, {"tol": 1e-4}):
        with pytest.raises(ValueError, match="init='random' or a Tensor.*no tol"):
            protoclip.kmeans(points, 3, backend="faiss", **options)


def test_a_weight_counts_as_so_many_copies():
    points = mixture(n=600).double()
    times = torch.arange(600) % 4  # some points count nothing
    start = points[times > 0][:12]
    weighted = protoclip.kmeans(points, 12, init=start, weights=times.float(), num_iters=5)
    copied = protoclip.kmeans(points.repeat_interleave(times, 0), 12, init=start, num_iters=5)
    torch.testing.assert_close(weighted.centroids, copied.centroids)
    assert weighted.history == pytest.approx(copied.history)
    assert torch.equal(weighted.labels.repeat_interleave(times), copied.labels)
    ones = protoclip.kmeans(points, 12, init=start, weights=[1] * 600, num_iters=5)
    plain = protoclip.kmeans(points, 12, init=start, num_iters=5)
    assert torch.equal(ones.centroids, plain.centroids)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weight", [1.0, 0.3, 1e-30])
def test_equal_weights_are_no_weights_bit_for_bit(init, weight):
    """Of any size; the inertia alone is multiplied by it."""
    points = mixture(n=600)
    options = {"init": init, "num_restarts": 2, "num_iters": 7}
    plain = protoclip.kmeans(points, 12, **options)
    equal = protoclip.kmeans(points, 12, weights=[weight] * 600, **options)
    assert torch.equal(equal.centroids, plain.centroids) and torch.equal(equal.counts, plain.counts)
    assert torch.equal(equal.labels, plain.labels)
    assert equal.history == pytest.approx([weight * x for x in plain.history], rel=1e-15)


@pytest.mark.parametrize("init", INITS)
def test_starts_are_drawn_by_weight(init):
    points = torch.cat([torch.arange(500.0)[:, None], torch.rand(500, 1) - 9])
    weights = torch.cat([torch.full((500,), 1e-9), torch.ones(500)])
    drawn = [
        protoclip.kmeans(points, 3, init=init, weights=weights, num_iters=0, seed=seed).centroids
        for seed in range(20)
    ]
    assert sum(int((c < -7).sum()) for c in drawn) >= 58  # of 60; without weights about half or few
    none = protoclip.kmeans(points, 3, init=init, weights=weights * (points[:, 0] < 0), seed=1)
    assert (none.centroids < -7).all()


def test_clusters_predict_are_saved_and_say_what_they_are(tmp_path):
    points = mixture(n=500)
    seen = []
    note = lambda i, inertia: seen.append(float(inertia))  # noqa: E731
    clusters = protoclip.kmeans(points, 9, num_iters=4, progress=note)
    assert tuple(seen) == clusters.history[:-1]
    assert torch.equal(clusters.predict(points), clusters.labels)
    with pytest.raises(TypeError, match="predict: expected points as a Tensor, got list"):
        clusters.predict([1])
    said = repr(clusters)
    assert said.startswith("Clusters(K=9, D=16, N=500, sizes ") and len(said) < 99
    clusters.save(tmp_path / "c.safetensors")
    again = protoclip.Clusters.load(tmp_path / "c.safetensors")
    assert torch.equal(again.centroids, clusters.centroids)
    assert torch.equal(again.labels, clusters.labels) and again.history == clusters.history
    (tmp_path / "other.safetensors").write_text("no")
    with pytest.raises(ValueError, match="a file that Clusters.save wrote"):
        protoclip.Clusters.load(tmp_path / "other.safetensors")


def of_rank():
    """Clusters of this rank's slice of the points, as arrays."""
    dist.init_process_group("gloo")
    points, weights = mixture(n=400), torch.rand(400)
    mine = slice(0, 130) if dist.get_rank() == 0 else slice(130, 400)  # unequal slices
    found = []
    for init, weight in product(INITS, (None, weights[mine])):
        options = {"init": init, "weights": weight, "group": dist.group.WORLD}
        c = protoclip.kmeans(points[mine], 20, num_iters=6, **options)
        found.append((c.centroids.numpy(), c.labels.numpy(), c.counts.numpy(), c.history))
    dist.destroy_process_group()
    return found


def test_two_processes_equal_one():
    ranks = on_ranks(2, of_rank)
    points, weights = mixture(n=400), torch.rand(400)
    for (init, weight), *of_ranks in zip(product(INITS, (None, weights)), *ranks, strict=True):
        alone = protoclip.kmeans(points, 20, num_iters=6, init=init, weights=weight)
        for centroids, _, counts, history in of_ranks:
            torch.testing.assert_close(torch.from_numpy(centroids), alone.centroids)
            assert counts.tolist() == alone.counts.tolist()
            assert history == pytest.approx(alone.history, rel=1e-6)
        assert [*of_ranks[0][1], *of_ranks[1][1]] == alone.labels.tolist()
        assert (of_ranks[0][0] == of_ranks[1][0]).all()


SLICES = slice(0, 130), slice(130, 130), slice(130, 400)  # of three ranks, one without points
GROUPS = {
    "plain": {},
    "weights": {"weights": _weights(400)},
    "equal weights": {"weights": torch.full((400,), 0.7)},
    "spherical": {"spherical": True},
    "restarts": {"num_restarts": 3, "init": "k-means++"},
    "tol": {"tol": 1e-2},
}


def _of_slice(case, num_iters):
    """The result on this rank, with arrays, which a process can send."""
    mine, options = SLICES[dist.get_rank()], dict(GROUPS[case])
    if "weights" in options:
        options["weights"] = options["weights"][mine]
    points = mixture(n=400)[mine]
    run = protoclip.kmeans(points, 8, num_iters=num_iters, group=dist.group.WORLD, **options)
    arrays = {name: getattr(run, name).numpy() for name in ("centroids", "labels", "counts")}
    return arrays | {"history": run.history}


def ends_of_rank():
    """For each case the result with an end, and that of some more iterations without one."""
    dist.init_process_group("gloo")
    ended = {case: _of_slice(case, 300) for case in GROUPS}
    kmeans_module._moved = lambda *_: torch.tensor(True)
    longer = {case: _of_slice(case, len(run["history"]) + 3) for case, run in ended.items()}
    # A rank that rounds differently from the others: all go on while one of them moves.
    kmeans_module._moved = lambda *_: torch.tensor(dist.get_rank() == 1)
    odd = len(_of_slice("plain", 20)["history"])
    dist.destroy_process_group()
    return ended, longer, odd


@pytest.fixture(scope="module")
def of_three_ranks():
    return on_ranks(3, ends_of_rank)


@pytest.mark.parametrize("case", GROUPS)
def test_ranks_end_together(of_three_ranks, case):
    alone = protoclip.kmeans(mixture(n=400), 8, num_iters=300, **GROUPS[case])
    first = of_three_ranks[0][0][case]
    for ended, longer, odd in of_three_ranks:
        run, more = ended[case], longer[case]
        assert run["history"] == first["history"] and len(run["history"]) == len(alone.history)
        assert len(run["history"]) < 100 and odd == 21
        assert (run["centroids"] == first["centroids"]).all()
        torch.testing.assert_close(torch.from_numpy(run["centroids"]), alone.centroids)
        if case != "tol":
            assert all((run[n] == more[n]).all() for n in ("centroids", "labels", "counts"))
            assert run["history"][-1] == more["history"][-1]
