"""k-means beside what people use: assignment, update, and whole runs at equal iterations.

Parity first: every exact peer must find the same distances, every k-means an inertia within 0.1 %
of ours, or its row says by how much it differs. A peer that is not installed is a skipped row.
``pytest benchmarks/test_kmeans.py --benchmark-only --benchmark-columns=min,median,rounds``.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import protoclip

ITERATIONS = 20


def mixture(n: int, k: int, d: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(k, d)[torch.randint(k, (n,))] + 0.8 * torch.randn(n, d)


# -- assignment: (points, centroids) -> labels


def _faiss_knn(x: Tensor, c: Tensor) -> Tensor:
    faiss = pytest.importorskip("faiss")
    return torch.from_numpy(faiss.knn(x.numpy(), c.numpy(), 1)[1][:, 0])


def _sklearn_assign(x: Tensor, c: Tensor) -> Tensor:
    metrics = pytest.importorskip("sklearn.metrics")
    return torch.from_numpy(metrics.pairwise_distances_argmin(x.numpy(), c.numpy()))


def _vq(x: Tensor, c: Tensor) -> Tensor:
    vq = pytest.importorskip("scipy.cluster.vq")
    return torch.from_numpy(vq.vq(x.numpy(), c.numpy(), check_finite=False)[0]).long()


def _tree(x: Tensor, c: Tensor) -> Tensor:
    spatial = pytest.importorskip("scipy.spatial")
    return torch.from_numpy(spatial.cKDTree(c.numpy()).query(x.numpy(), workers=-1)[1])


ASSIGN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "protoclip": lambda x, c: protoclip.kmeans_assign(x, c)[0],
    "faiss.knn": _faiss_knn,
    "sklearn": _sklearn_assign,
    "cdist+argmin": lambda x, c: torch.cdist(x, c).argmin(dim=1),
    "scipy.vq": _vq,
    "scipy.cKDTree": _tree,
}
SLOW = {"scipy.cKDTree", "scipy.vq"}  # a tree in 128 dimensions visits all of it: small shape only
SHAPES = {"32768x1024x256": (32768, 1024, 256), "2048x1024x128": (2048, 1024, 128)}
ASSIGN_ROWS = [
    (shape, name) for shape in SHAPES for name in ASSIGN if shape[0] == "2" or name not in SLOW
]


@pytest.mark.parametrize(("shape", "name"), ASSIGN_ROWS)
def test_assign(benchmark, shape: str, name: str) -> None:
    n, k, d = SHAPES[shape]
    x, c = mixture(n, k, d), torch.randn(k, d)
    labels = ASSIGN[name](x, c)
    _, squared = protoclip.kmeans_assign(x, c, backend="reference")
    excess = (x - c[labels]).square().sum(dim=1) / squared - 1
    assert excess.max() < 1e-4, "not the nearest centroids"
    benchmark.extra_info["gflop"] = 2e-9 * n * k * d
    benchmark(ASSIGN[name], x, c)


# -- update: (values, labels, K) -> means


def _index_add(x: Tensor, labels: Tensor, k: int) -> Tensor:
    sums = torch.zeros(k, x.shape[1]).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=k).clamp_min(1)[:, None]


UPDATE: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "protoclip": lambda x, y, k: protoclip.segment_mean(x, y, k)[0],
    "index_add": _index_add,
}


@pytest.mark.parametrize("name", UPDATE)
def test_update(benchmark, name: str) -> None:
    torch.manual_seed(0)
    n, k, d = 200_000, 20_000, 128
    x, labels = torch.randn(n, d), torch.randint(k, (n,))
    want, _ = protoclip.segment_mean(x, labels, k, backend="reference")
    torch.testing.assert_close(UPDATE[name](x, labels, k), want, rtol=1e-4, atol=1e-5)
    benchmark.extra_info["gbytes"] = 4e-9 * n * d
    benchmark(UPDATE[name], x, labels, k)


# -- whole runs: (points, starting centroids) -> centroids after ITERATIONS updates


def _ours(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, start: (
        protoclip.kmeans(x, len(start), num_iters=ITERATIONS, init=start, backend=backend).centroids
    )


def _sklearn(x: Tensor, start: Tensor) -> Tensor:
    cluster = pytest.importorskip("sklearn.cluster")
    run = cluster.KMeans(
        len(start), init=start.numpy(), n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd"
    )
    return torch.from_numpy(run.fit(x.numpy()).cluster_centers_)


def _fastkmeans(x: Tensor, start: Tensor) -> Tensor:
    module = pytest.importorskip("fastkmeans")
    run = module.FastKMeans(
        x.shape[1],
        len(start),
        niter=ITERATIONS,
        tol=0,
        gpu=False,
        max_points_per_centroid=None,
        use_triton=False,
    )
    run.train(x.numpy())
    return torch.from_numpy(run.centroids)


def _superkmeans(x: Tensor, start: Tensor) -> Tensor:
    module = pytest.importorskip("superkmeans")
    run = module.SuperKMeans(len(start), x.shape[1], iters=ITERATIONS)
    return torch.from_numpy(run.train(x.numpy())).float()


LLOYD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "protoclip": _ours("auto"),
    "faiss.Kmeans": _ours("faiss"),
    "sklearn": _sklearn,
    "fastkmeans": _fastkmeans,  # starts of its own
    "superkmeans": _superkmeans,  # starts of its own, samples, stops early
}


@pytest.fixture(scope="module")
def whole() -> tuple[Tensor, Tensor, float]:
    x = mixture(20_000, 1000, 128)
    start = x[torch.randperm(len(x))[:1000]]
    inertia = protoclip.kmeans(x, 1000, num_iters=ITERATIONS, init=start).inertia
    return x, start, inertia


@pytest.mark.parametrize("name", LLOYD)
def test_lloyd(benchmark, name: str, whole: tuple[Tensor, Tensor, float]) -> None:
    x, start, ours = whole
    centroids = LLOYD[name](x, start)
    assert centroids.shape == start.shape
    inertia = protoclip.kmeans_assign(x, centroids)[1].double().sum().item()
    benchmark.extra_info["objective"] = f"{100 * (inertia / ours - 1):+.2f} % of protoclip's"
    if name in ("faiss.Kmeans", "sklearn"):
        assert abs(inertia / ours - 1) < 1e-3, "same start, same iterations: same objective"
    benchmark.pedantic(LLOYD[name], (x, start), rounds=3)
