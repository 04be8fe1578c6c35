"""The CUDA backend on a GPU, where there is one: what the emulation cannot show."""

import pytest
import torch

import protoclip

REASON = protoclip.backends("kmeans_assign")["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def data(n, k, d, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda rows: torch.randn(rows, d, device="cuda", generator=generator)  # noqa: E731
    return make(n).to(dtype), make(k).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k, d", [(40_000, 3000, 128), (1000, 20_000, 100), (257, 5, 513)])
def test_nearest_as_the_reference_in_fp64(n, k, d, dtype):
    x, c = data(n, k, d, dtype)
    labels, distances = protoclip.kmeans_assign(x, c, backend="cuda")
    _, best = protoclip.kmeans_assign(x.double(), c.double(), backend="reference")
    chosen = (x.double() - c.double()[labels]).square().sum(dim=1)
    assert ((chosen - best) <= 1e-6 * best).all()  # best is rounded to fp32
    torch.testing.assert_close(distances, best, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segment_mean_as_the_reference(dtype):
    values, _ = data(100_000, 1, 96, dtype)
    labels = torch.randint(-1, 3000, (100_000,), device="cuda")
    means, counts = protoclip.segment_mean(values, labels, 3000, backend="cuda")
    truth, truth_counts = protoclip.segment_mean(values, labels, 3000, backend="reference")
    assert torch.equal(counts, truth_counts)
    torch.testing.assert_close(means, truth, rtol=1e-5, atol=1e-6)


def test_graph_capture_and_same_bits():
    x, c = data(5000, 700, 64, torch.float32)

    def iterate():
        labels, distances = protoclip.kmeans_assign(x, c, backend="cuda")
        return labels, distances, *protoclip.segment_mean(x, labels, 700, backend="cuda")

    eager = iterate()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = iterate()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
