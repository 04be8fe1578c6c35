"""Segment means: values within the error budget, the same bits always, every label defined."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from budget import on_threads, usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vmap

import protoclip
from protoclip.ops.clusters import SegmentSums

NATIVE_MISSING = protoclip.backends("segment_mean").get("cpu")
native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
each_backend = pytest.mark.parametrize("backend", usable("segment_mean"))
EPS = torch.finfo(torch.float32).eps


class Means(NamedTuple):
    means: Tensor  # [K, D]
    counts: Tensor  # int64 [K]


def exact_means(values: Tensor, labels: Tensor, k: int) -> Means:
    used = labels >= 0
    sums = torch.zeros(k, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels[used], values[used].double())
    counts = torch.bincount(labels[used], minlength=k)
    return Means(sums / counts.clamp_min(1)[:, None], counts)


def assert_means(values: Tensor, labels: Tensor, k: int, backend: str) -> None:
    """An fp32 sum of at most 256 terms, each mean's error within its worst case."""
    means, counts = protoclip.segment_mean(values, labels, k, backend=backend)
    expected = exact_means(values, labels, k)
    size = exact_means(values.double().abs(), labels, k).means
    assert means.dtype == torch.float32 and torch.equal(counts, expected.counts)
    terms = counts.clamp(1, 256)[:, None] + 2
    assert ((means.double() - expected.means).abs() <= terms * EPS / 2 * size).all()


@each_backend
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    n=st.integers(0, 700), k=st.integers(1, 40), d=st.integers(1, 40), seed=st.integers(0, 1 << 30)
)
def test_means_of_any_shape_and_stride_are_right(
    backend: str, n: int, k: int, d: int, seed: int
) -> None:
    torch.manual_seed(seed)
    n = n if backend != "triton" else n // 8  # the interpreter is slow
    values = torch.randn(d, 2 * n).T[::2]
    labels = torch.randint(-1, k, (n, 2))[:, 0]
    assert_means(values, labels, k, backend)


# D: scalars; a last vector that overlaps; blocks; blocks, vectors and an overlap
# K: means in the caches; past them (more than 1 MiB, D a multiple of 16)
@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k, d", [(50, 5), (50, 33), (50, 128), (50, 301), (2500, 33), (2500, 128)])
def test_means_of_large_and_empty_segments_have_the_same_bits_on_any_number_of_threads(
    k: int, d: int, dtype: torch.dtype
) -> None:
    """Segment 7 is large, 11 is empty. A NaN stays in its segment and column."""
    torch.manual_seed(1)
    values = torch.randn(12_000, d).to(dtype)
    labels = torch.randint(-1, k, (12_000,))
    labels[:3000] = 7  # in pieces
    labels[labels == 11] = 12
    assert_means(values, labels, k, "cpu")
    row = 5000
    values[row, d - 1] = torch.nan

    def run() -> Tensor:
        means, _ = protoclip.segment_mean(values, labels, k, backend="cpu")
        return means

    first, *repeated = on_threads(run)
    for again in repeated:
        assert torch.equal(again.view(torch.int32), first.view(torch.int32))
    label = int(labels[row])
    assert first.isnan().nonzero().tolist() == ([] if label < 0 else [[label, d - 1]])
    assert not first[11].any()


@native
def test_means_in_pooled_memory_stay_while_anyone_holds_them() -> None:
    values = torch.randn(6000, 64)  # 1.5 MiB: a block of the pool
    labels = torch.arange(6000)
    torch.ops.protoclip_native.release_memory()

    def means_of(values: Tensor) -> Tensor:
        means, _ = protoclip.segment_mean(values, labels, 6000, backend="cpu")
        return means

    means = means_of(values)
    address = means.data_ptr()
    row = means[7]
    other = means_of(values + 1)
    assert other.data_ptr() != address and torch.equal(means, values)
    del means, other
    other = means_of(values + 1)
    assert other.data_ptr() != address and torch.equal(row, values[7])  # a view holds it too
    del row, other
    first = means_of(values)
    second = means_of(values)
    assert address in (first.data_ptr(), second.data_ptr())


@each_backend
def test_means_of_segments_by_hand(backend: str) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    labels = torch.tensor([2, 0, 2, -1])
    means, counts = protoclip.segment_mean(values, labels, 4, backend=backend)
    assert means.tolist() == [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]
    assert counts.tolist() == [1, 0, 2, 0]


@each_backend
def test_a_nan_stays_in_its_segment(backend: str) -> None:
    values = torch.ones(6, 3)
    values[2, 1] = torch.nan
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    means, _ = protoclip.segment_mean(values, labels, 4, backend=backend)
    assert means[1, 1].isnan() and means.isnan().sum() == 1


X, Y = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.arange(40) % 5 - 1


def means_of_segments(values: Tensor, num_segments: int = 6) -> Tensor:
    means, _ = protoclip.segment_mean(values, SEGMENTS, num_segments)
    return means


def test_the_derivative_of_segment_means_is_the_mean_of_the_tangents() -> None:
    """They are linear."""
    expected, _ = protoclip.segment_mean(Y, SEGMENTS, 6, backend="reference")
    means, tangent = jvp(means_of_segments, (X,), (Y,))
    torch.testing.assert_close(means, means_of_segments(X))
    torch.testing.assert_close(tangent, expected)
    _, second = jvp(lambda x: jvp(means_of_segments, (x,), (Y,))[1], (X,), (Y,))
    assert (second == 0).all()
    torch.testing.assert_close(vmap(means_of_segments)(torch.stack([X, Y]))[1], expected)
    with pytest.raises(ValueError, match="labels below num_segments=2, got 3"):
        jvp(lambda x: means_of_segments(x, 2), (X,), (Y,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k, d", [(1, 20), (9, 5), (50, 33)])
@pytest.mark.parametrize("sizes", [[700, 1], [256, 256, 256], [1] * 9 + [2990], [700] * 9], ids=str)
def test_sums_of_blocks_have_the_bits_of_all_rows(
    sizes: list[int], k: int, d: int, dtype: torch.dtype
) -> None:
    """A segment's open piece of 256 rows continues in the next block."""
    torch.manual_seed(0)
    n = sum(sizes)
    values = torch.randn(n, d, dtype=dtype) + 3
    labels = torch.randint(-1, k, (n,))
    labels[: n // 3] = 0
    sums = SegmentSums.zeros(k, values[0], "auto")
    for rows, segments in zip(values.split(sizes), labels.split(sizes), strict=True):
        sums.add(rows, segments)
    expected = protoclip.segment_mean(values, labels, k)
    means, counts = sums.means()
    assert torch.equal(means, expected.means) and torch.equal(counts, expected.counts)
    again = torch.tensor([0, k - 1]).unique()
    sums.clear(again)
    one_of_them = torch.isin(labels, again)
    sums.add(values[one_of_them], labels[one_of_them])
    assert torch.equal(sums.means().means, expected.means)
