"""k-means beside what people use: assignment, update, and whole runs at equal iterations.

Parity first: every peer must find the same distances, every k-means an inertia within 0.1 % of ours
from the same start.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import protoclip
from benchmarks import peers, roofline
from benchmarks.harness import Case
from benchmarks.machine import DEVICE, DTYPES

ITERATIONS = 10  # fewer than ours needs to come to rest, where it would stop and its peers not


def mixture(n: int, k: int, d: int) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(k, d)[torch.randint(k, (n,))] + 0.8 * torch.randn(n, d)).to(DEVICE)


# -- assignment: (points, centroids) -> labels


def _faiss_knn(x: Tensor, c: Tensor) -> Tensor:
    faiss = peers.optional("faiss")
    if DEVICE == "cpu":
        return torch.from_numpy(faiss.knn(x.numpy(), c.numpy(), 1)[1][:, 0])
    peers.optional("faiss.contrib.torch_utils")
    resources = peers.optional("faiss", "StandardGpuResources")()
    return faiss.knn_gpu(resources, x, c, 1)[1][:, 0]


ASSIGN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "faiss.knn": _faiss_knn,
    "cdist+argmin": lambda x, c: torch.cdist(x, c).argmin(dim=1),
}
SMALL = (2048, 1024, 128)
ASSIGN_SIZES = {
    "tiny": [(256, 32, 16)],
    "quick": [SMALL, (32768, 1024, 256)],
    "full": [SMALL, (32768, 1024, 128), (32768, 1024, 256), (32768, 1024, 512)],
}
if DEVICE == "cuda":
    ASSIGN_SIZES["quick"] = [(200_000, 20_000, 128)]
    ASSIGN_SIZES["full"] = [(200_000, 20_000, d) for d in (128, 256, 512)]


def pytest_generate_tests(metafunc):
    if metafunc.function is test_assign:
        rows = [
            (shape, dtype, name)
            for shape in ASSIGN_SIZES[metafunc.config.getoption("--sizes")]
            for dtype in ("fp32", "bf16")
            for name in (*peers.ours("kmeans_assign"), *ASSIGN)
            if dtype == "fp32" or peers.is_ours(name) or (DEVICE == "cuda" and name != "faiss.knn")
        ]
        names = ["x".join(map(str, s)) + f"-{dtype}-{name}" for s, dtype, name in rows]
        metafunc.parametrize(("shape", "dtype", "name"), rows, ids=names)


def test_assign(bench, shape, dtype, name) -> None:
    n, k, d = shape
    points, centroids = mixture(n, min(n, k), d), torch.randn(k, d, device=DEVICE)
    x, c = (t.to(DTYPES[dtype]) for t in (points, centroids))
    if peers.is_ours(name):
        run = partial(protoclip.kmeans_assign, backend=peers.backend("kmeans_assign", name))
        labels, rival = run(x, c)[0], None
    else:
        run, rival = ASSIGN[name], lambda: protoclip.kmeans_assign(x, c)
        labels = run(x, c)
    some = torch.arange(0, n, max(n // 2048, 1), device=DEVICE)  # the reference stores distances
    _, nearest = protoclip.kmeans_assign(x[some].float(), c.float(), backend="reference")
    excess = (x[some].float() - c.float()[labels[some]]).square().sum(dim=1) / nearest - 1
    # cdist in bf16 rounds the distances themselves: it is timed, and its error is in the line.
    rounds = dtype == "bf16" and not peers.is_ours(name)
    assert rounds or excess.max() < 1e-4, "not the nearest centroids"
    note = f"{(excess > 1e-4).float().mean():.1%} of labels wrong" if rounds else ""
    work = roofline.kmeans_assign(n, k, d, dtype)
    case = Case("kmeans_assign", {"N": n, "K": k, "D": d}, dtype, work)
    bench.time(case, name, lambda: run(x, c), rival=rival, note=note)


# -- update: (values, labels, K) -> means


def _index_add(x: Tensor, labels: Tensor, k: int) -> Tensor:
    sums = torch.zeros(k, x.shape[1], device=x.device).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=k).clamp_min(1)[:, None]


@pytest.mark.parametrize("name", [*peers.ours("segment_mean"), "index_add+bincount"])
def test_update(bench, name: str) -> None:
    torch.manual_seed(0)
    n, k, d = (2000, 50, 16) if bench.sizes == "tiny" else (200_000, 20_000, 128)
    x, labels = torch.randn(n, d, device=DEVICE), torch.randint(k, (n,), device=DEVICE)
    if peers.is_ours(name):
        backend, rival = peers.backend("segment_mean", name), None
        run = lambda *a: protoclip.segment_mean(*a, backend=backend)[0]  # noqa: E731
    else:
        run, rival = _index_add, lambda: protoclip.segment_mean(x, labels, k)
    want, _ = protoclip.segment_mean(x, labels, k, backend="reference")
    torch.testing.assert_close(run(x, labels, k), want, rtol=1e-4, atol=1e-5)
    work = roofline.segment_mean(n, k, d, "fp32")
    case = Case("segment_mean", {"N": n, "K": k, "D": d}, "fp32", work)
    bench.time(case, name, lambda: run(x, labels, k), rival=rival)


# -- whole runs: (points, starting centroids) -> centroids after ITERATIONS updates


def _ours(x: Tensor, start: Tensor, backend: str = "auto") -> Tensor:
    run = protoclip.kmeans(x, len(start), num_iters=ITERATIONS, init=start, backend=backend)
    return run.centroids


def _faiss(x: Tensor, start: Tensor) -> Tensor:
    peers.optional("faiss")
    return _ours(x, start, "faiss")


def _sklearn(x: Tensor, start: Tensor) -> Tensor:
    cluster = peers.optional("sklearn.cluster")
    if DEVICE != "cpu":
        pytest.skip("it takes arrays on the host")
    run = cluster.KMeans(
        len(start), init=start.numpy(), n_init=1, max_iter=ITERATIONS, tol=0, algorithm="lloyd"
    )
    return torch.from_numpy(run.fit(x.numpy()).cluster_centers_)


def _flash_kmeans(x: Tensor, start: Tensor) -> Tensor:
    run = peers.on_a_gpu("flash_kmeans", "batch_kmeans_Euclid")
    # It stops at movement < tol: below zero runs all iterations. It overwrites the start.
    _, centroids, _ = run(x[None], len(start), ITERATIONS, -1.0, start[None].clone())
    return centroids[0].float()


LLOYD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "protoclip-auto": _ours,
    "faiss.Kmeans": _faiss,
    "sklearn": _sklearn,
    "flash-kmeans": _flash_kmeans,
}


@pytest.fixture(scope="module")
def whole(sizes) -> tuple[Tensor, Tensor, float]:
    n, k = {"tiny": (500, 10), "quick": (20_000, 1000), "full": (100_000, 5000)}[sizes]
    x = mixture(n, k, 128)
    start = x[torch.randperm(n)[:k]]
    run = protoclip.kmeans(x, k, num_iters=ITERATIONS, init=start)
    if sizes != "tiny":
        assert run.num_iters == ITERATIONS, "at rest early: rivals would run more iterations"
    return x, start, run.inertia


@pytest.mark.parametrize("name", LLOYD)
def test_lloyd(bench, name: str, whole: tuple[Tensor, Tensor, float]) -> None:
    x, start, ours = whole
    centroids = LLOYD[name](x, start)
    assert centroids.shape == start.shape
    inertia = protoclip.kmeans_assign(x, centroids)[1].double().sum().item()
    assert abs(inertia / ours - 1) < 1e-3, "same start and iterations: same objective"
    (n, d), k = x.shape, len(start)
    work = roofline.kmeans(n, k, d, ITERATIONS)
    case = Case("kmeans", {"N": n, "K": k, "D": d}, "fp32", work, f"{ITERATIONS} iterations")
    rival = None if peers.is_ours(name) else (lambda: _ours(x, start))
    bench.time(case, name, lambda: LLOYD[name](x, start), rival=rival)
