"""csrc/segment_mean.cu, run on the CPU by the emulation, against sums in fp64."""

import pytest
import torch
from cuda_host import segment_mean

from protoclip.ops import reference


def assert_means(values, labels, k):
    means, counts = segment_mean(values, labels, k)
    kept = labels.where(labels < k, -1)
    truth, truth_counts = reference.segment_mean(values.double(), kept, k)
    size, _ = reference.segment_mean(values.double().abs(), kept, k)
    assert torch.equal(counts, truth_counts)
    # at most 128 fp32 additions in a row, one division, and the pieces' sums in fp64
    assert ((means - truth).abs() <= 130 * 2.0**-24 * size).all()
    return means


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# N: below, at and past a tile of 128 sorted rows, many tiles; K: one segment over many tiles, a
# block of 256 threads and one more, mostly empty; D: one warp, two column blocks of 128.
SHAPES = [(1, 1, 1), (127, 3, 5), (128, 1, 33), (129, 200, 64), (2048, 255, 7), (2049, 256, 31)]
SHAPES += [(5000, 2, 130), (300, 2000, 257)]


@pytest.mark.parametrize("n, k, d", SHAPES)
def test_shapes_cross_every_tile_edge(n, k, d, generator):
    values = torch.randn(n, d, generator=generator)
    assert_means(values, torch.randint(-1, k, (n,), generator=generator), k)
    assert_means(values, torch.full((n,), k - 1), k)


def test_runs_that_start_and_end_at_tile_edges(generator):
    for lengths in [(128, 128, 1), (64, 64, 128), (300, 84, 128, 5), (0, 256, 0, 129)]:
        labels = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        labels = labels[torch.randperm(len(labels), generator=generator)]
        assert_means(torch.randn(len(labels), 9, generator=generator), labels, len(lengths))


def test_left_out_rows_and_a_nan_in_its_segment(generator):
    values = torch.randn(500, 8, generator=generator)
    labels = torch.randint(10, (500,), generator=generator)
    for first, label in enumerate((-1, 10, -(2**40))):  # past the last: never a stray write
        values[first::7], labels[first::7] = float("nan"), label
    assert_means(values, labels, 10)
    values, labels = torch.ones(300, 4), torch.arange(300) % 2
    values[5, 1] = float("nan")
    means, _ = segment_mean(values, labels, 2)
    assert means.isnan().nonzero().tolist() == [[1, 1]] and (means[0] == 1).all()


def test_empty():
    for n in (0, 500):
        means, counts = segment_mean(torch.ones(n, 3), torch.full((n,), -1), 4)
        assert torch.equal(means, torch.zeros(4, 3)) and counts.tolist() == [0] * 4
    means, counts = segment_mean(torch.empty(6, 0), torch.arange(6) % 2, 3)
    assert means.shape == (3, 0) and counts.tolist() == [3, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype, generator):
    wide = torch.randn(400, 90, generator=generator).to(dtype)
    labels = torch.randint(20, (800,), generator=generator)[::2]
    for values in (wide[:, 3:40], wide[:, ::2], torch.cat([wide] * 5, 1).T[:400]):
        assert_means(values, labels, 20)
