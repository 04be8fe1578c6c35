"""Nearest centroids, segment means and the end of k-means on a GPU, where there is one: what
neither the emulation nor the interpreter can show."""

import pytest
import torch

import protoclip

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = protoclip.backends("kmeans_assign")[request.param]
    if reason is not None or not torch.cuda.is_available():
        pytest.skip(str(reason or "no CUDA device"))
    return request.param


def data(n, k, d, dtype):
    torch.manual_seed(0)
    return [torch.randn(rows, d, device="cuda").to(dtype) for rows in (n, k)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k, d", [(40_000, 3000, 128), (1000, 20_000, 100), (257, 5, 513)])
def test_as_the_reference_in_fp64(backend, n, k, d, dtype):
    x, c = data(n, k, d, dtype)
    labels, distances = protoclip.kmeans_assign(x, c, backend=backend)
    _, best = protoclip.kmeans_assign(x.double(), c.double(), backend="reference")
    chosen = (x.double() - c.double()[labels]).square().sum(dim=1)
    assert ((chosen - best) <= 1e-6 * best).all()  # best is rounded to fp32
    torch.testing.assert_close(distances, best, rtol=1e-6, atol=0)
    labels[::7] = -1
    means, counts = protoclip.segment_mean(x, labels, k, backend=backend)
    truth, truth_counts = protoclip.segment_mean(x, labels, k, backend="reference")
    assert torch.equal(counts, truth_counts)
    torch.testing.assert_close(means, truth, rtol=1e-5, atol=1e-6)


def test_graph_capture_and_same_bits(backend):
    x, c = data(5000, 700, 64, torch.float32)

    def iterate():
        labels, distances = protoclip.kmeans_assign(x, c, backend=backend)
        return labels, distances, *protoclip.segment_mean(x, labels, 700, backend=backend)

    eager = iterate()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = iterate()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.parametrize("tol", [0.0, 1e-2])
def test_kmeans_ends_at_rest_and_reads_it_late(backend, tol):
    """The host learns of the end one assignment late; history and result do not show it."""
    x, c = data(4000, 8, 16, torch.float32)
    seen = []
    options = {"init": c, "tol": tol, "backend": backend}
    note = lambda i, inertia: seen.append(inertia)  # noqa: E731
    found = protoclip.kmeans(x, 8, num_iters=500, progress=note, **options)
    assert found.num_iters < 500 and [float(one) for one in seen] == list(found.history[:-1])
    exact = protoclip.kmeans(x, 8, num_iters=found.num_iters, **options)
    assert torch.equal(found.centroids, exact.centroids) and found.history == exact.history
    assert torch.equal(found.labels, exact.labels) and torch.equal(found.counts, exact.counts)
    if not tol:
        again = protoclip.kmeans(x, 8, num_iters=500, **options | {"init": found.centroids})
        assert again.num_iters == 1 and torch.equal(again.centroids, found.centroids)
