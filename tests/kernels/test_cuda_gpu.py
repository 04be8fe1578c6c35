"""Nearest centroids, segment means and the end of k-means on a GPU, where there is one: what
neither the emulation nor the interpreter can show."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from budget import assert_same_bits
from torch import Tensor

import protoclip

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    reason = protoclip.backends("kmeans_assign")[request.param]
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(str(reason or "no CUDA device"))
    return request.param


class Problem(NamedTuple):
    points: Tensor  # [N, D]
    centroids: Tensor  # [K, D]


def random(n: int, k: int, d: int, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    points = torch.randn(n, d, device="cuda")
    return Problem(points.to(dtype), torch.randn(k, d, device="cuda").to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, d", [(40_000, 3000, 128), (1000, 20_000, 100), (257, 5, 513)])
def test_labels_and_means_are_those_of_the_reference_in_fp64(
    backend: str, n: int, k: int, d: int, dtype: torch.dtype
) -> None:
    points, centroids = random(n, k, d, dtype)
    labels, distances = protoclip.kmeans_assign(points, centroids, backend=backend)
    _, best = protoclip.kmeans_assign(points.double(), centroids.double(), backend="reference")
    chosen = (points.double() - centroids.double()[labels]).square().sum(dim=1)
    assert ((chosen - best) <= 1e-6 * best).all()  # best is rounded to fp32
    torch.testing.assert_close(distances, best, rtol=1e-6, atol=0)
    labels[::7] = -1
    means, counts = protoclip.segment_mean(points, labels, k, backend=backend)
    truth, truth_counts = protoclip.segment_mean(points, labels, k, backend="reference")
    assert torch.equal(counts, truth_counts)
    torch.testing.assert_close(means, truth, rtol=1e-5, atol=1e-6)


def test_a_cuda_graph_has_the_same_bits(backend: str) -> None:
    points, centroids = random(5000, 700, 64, torch.float32)

    def iterate() -> tuple[Tensor, ...]:
        labels, distances = protoclip.kmeans_assign(points, centroids, backend=backend)
        return labels, distances, *protoclip.segment_mean(points, labels, 700, backend=backend)

    eager = iterate()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = iterate()
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, eager)


@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_kmeans_ends_at_rest_and_reads_it_late(backend: str, tol: float) -> None:
    """The host learns of the end one assignment late; history and result do not show it."""
    points, start = random(4000, 8, 16, torch.float32)
    inertias: list[Tensor] = []

    def run(num_iters: int, init: Tensor = start) -> protoclip.Clusters:
        inertias.clear()
        return protoclip.kmeans(
            points,
            8,
            num_iters=num_iters,
            init=init,
            tol=tol,
            backend=backend,
            progress=lambda iteration, inertia: inertias.append(inertia),
        )

    clusters = run(num_iters=500)
    assert clusters.num_iters < 500
    assert [float(inertia) for inertia in inertias] == list(clusters.history[:-1])
    exact = run(num_iters=clusters.num_iters)
    assert exact.history == clusters.history
    assert torch.equal(exact.centroids, clusters.centroids)
    assert torch.equal(exact.labels, clusters.labels)
    assert torch.equal(exact.counts, clusters.counts)
    if not tol:
        again = run(num_iters=500, init=clusters.centroids)
        assert again.num_iters == 1 and torch.equal(again.centroids, clusters.centroids)


def test_of_equal_centroids_the_lowest_index_wins(backend: str) -> None:
    points, centroids = random(96, 256, 40, torch.float32)
    labels, _ = protoclip.kmeans_assign(points, centroids.repeat(2, 1), backend=backend)
    expected = torch.cdist(points.double(), centroids.double()).argmin(dim=1)
    assert torch.equal(labels, expected)
