"""csrc/segment_mean.cu, run on the CPU by the emulation, against sums in fp64."""

from __future__ import annotations

import pytest
import torch
from cuda_host import segment_mean
from torch import Tensor

from protoclip.ops import reference


def assert_means(values: Tensor, labels: Tensor, k: int) -> None:
    means, counts = segment_mean(values, labels, k)
    in_range = labels.where(labels < k, -1)
    truth, truth_counts = reference.segment_mean(values.double(), in_range, k)
    size, _ = reference.segment_mean(values.double().abs(), in_range, k)
    assert torch.equal(counts, truth_counts)
    # at most 128 fp32 additions in a row, one division, and the pieces' sums in fp64
    assert ((means - truth).abs() <= 130 * 2.0**-24 * size).all()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# N: below, at and past a tile of 128 sorted rows, many tiles; K: one segment over many tiles, a
# block of 256 threads and one more, mostly empty; D: one warp, two column blocks of 128.
SHAPES = [(1, 1, 1), (127, 3, 5), (128, 1, 33), (129, 200, 64), (2048, 255, 7), (2049, 256, 31)]
SHAPES += [(5000, 2, 130), (300, 2000, 257)]


@pytest.mark.parametrize("n, k, d", SHAPES)
def test_means_are_right_across_every_tile_edge(
    n: int, k: int, d: int, generator: torch.Generator
) -> None:
    values = torch.randn(n, d, generator=generator)
    assert_means(values, torch.randint(-1, k, (n,), generator=generator), k)
    assert_means(values, torch.full((n,), k - 1), k)


@pytest.mark.parametrize(
    "lengths", [(128, 128, 1), (64, 64, 128), (300, 84, 128, 5), (0, 256, 0, 129)], ids=str
)
def test_segments_that_start_and_end_at_tile_edges_are_right(
    lengths: tuple[int, ...], generator: torch.Generator
) -> None:
    labels = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    assert_means(torch.randn(len(labels), 9, generator=generator), labels, len(lengths))


def test_rows_with_other_labels_are_left_out(generator: torch.Generator) -> None:
    """Below 0 and past the last; never a stray write."""
    values = torch.randn(500, 8, generator=generator)
    labels = torch.randint(10, (500,), generator=generator)
    for first, label in enumerate((-1, 10, -(2**40))):
        values[first::7] = float("nan")
        labels[first::7] = label
    assert_means(values, labels, 10)


def test_a_nan_stays_in_its_segment() -> None:
    values = torch.ones(300, 4)
    values[5, 1] = float("nan")
    means, _ = segment_mean(values, torch.arange(300) % 2, 2)
    assert means.isnan().nonzero().tolist() == [[1, 1]] and (means[0] == 1).all()


@pytest.mark.parametrize("n", [0, 500])
def test_segments_without_rows_are_zero(n: int) -> None:
    means, counts = segment_mean(torch.ones(n, 3), torch.full((n,), -1), 4)
    assert torch.equal(means, torch.zeros(4, 3)) and counts.tolist() == [0, 0, 0, 0]


def test_rows_without_columns_are_counted() -> None:
    means, counts = segment_mean(torch.empty(6, 0), torch.arange(6) % 2, 3)
    assert means.shape == (3, 0) and counts.tolist() == [3, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_do_not_matter(dtype: torch.dtype, generator: torch.Generator) -> None:
    wide = torch.randn(400, 90, generator=generator).to(dtype)
    labels = torch.randint(20, (800,), generator=generator)[::2]
    columns_first = torch.cat([wide, wide, wide, wide, wide], 1).T[:400]
    for values in (wide[:, 3:40], wide[:, ::2], columns_first):
        assert_means(values, labels, 20)
