"""Segment means: values within the error budget, the same bits always, every label defined."""

import pytest
import torch
from budget import on_threads, usable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import protoclip

NATIVE_MISSING = protoclip.backends("segment_mean").get("cpu")
native = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
EPS = torch.finfo(torch.float32).eps


backends = pytest.mark.parametrize("backend", usable("segment_mean"))


def truth(values, labels, k):
    kept = labels >= 0
    sums = torch.zeros(k, values.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels[kept], values[kept].double())
    counts = torch.bincount(labels[kept], minlength=k)
    return sums / counts.clamp_min(1)[:, None], counts


def assert_means(values, labels, k, backend, pieces=256):
    """An fp32 sum of at most ``pieces`` terms, each mean's error within its worst case."""
    means, counts = protoclip.segment_mean(values, labels, k, backend=backend)
    want, want_counts = truth(values, labels, k)
    size, _ = truth(values.double().abs(), labels, k)
    assert means.dtype == torch.float32 and torch.equal(counts, want_counts)
    terms = counts.clamp(1, pieces)[:, None] + 2
    assert ((means.double() - want).abs() <= terms * EPS / 2 * size).all()


# One segment; far more than rows; one huge among small ones; a piece's edge at 256 and 257
@pytest.mark.parametrize("shape", [(2500, 1, 16), (50, 400, 7), (3000, 20, 130), (513, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@backends
def test_within_the_rounding_of_fp32_sums(backend, dtype, shape):
    torch.manual_seed(0)
    n, k, d = shape
    labels = torch.randint(-1, k, (n,))
    labels[: n // 2] = k - 1
    assert_means(torch.randn(n, d).to(dtype) + 3, labels, k, backend)


@backends
@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    n=st.integers(0, 700), k=st.integers(1, 40), d=st.integers(1, 40), seed=st.integers(0, 1 << 30)
)
def test_any_shape_and_stride(backend, n, k, d, seed):
    torch.manual_seed(seed)
    n = n if backend != "triton" else n // 8  # the interpreter is slow
    values = torch.randn(d, 2 * n).T[::2]
    labels = torch.randint(-1, k, (n, 2))[:, 0]
    assert_means(values, labels, k, backend)


# D: scalars; a last vector that overlaps; blocks; blocks, vectors and an overlap
# K: means in the caches; past them (more than 1 MiB, D a multiple of 16)
@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [5, 33, 128, 301])
@pytest.mark.parametrize("k", [50, 2500])
def test_same_bits_with_one_thread_and_two(k, d, dtype):
    torch.manual_seed(1)
    values, labels = torch.randn(12_000, d).to(dtype), torch.randint(-1, k, (12_000,))
    labels[:3000] = 7  # in pieces
    labels[labels == 11] = 12  # empty
    values[5000, d - 1] = torch.nan
    runs = on_threads(lambda: protoclip.segment_mean(values, labels, k, backend="cpu")[0])
    for run in runs[1:]:
        assert torch.equal(runs[0].view(torch.int32), run.view(torch.int32))
    assert torch.equal(runs[0][11], torch.zeros(d))
    label = labels[5000]
    assert runs[0].isnan().nonzero().tolist() == ([] if label < 0 else [[label, d - 1]])
    values[5000, d - 1] = 0
    assert_means(values, labels, k, "cpu")


@native
def test_means_in_kept_memory_stay_while_anyone_holds_them():
    values, labels = torch.randn(6000, 64), torch.arange(6000)  # 1.5 MiB: a block of the pool
    torch.ops.protoclip_native.release_memory()
    run = lambda x: protoclip.segment_mean(x, labels, 6000, backend="cpu")[0]  # noqa: E731
    means = run(values)
    place, row = means.data_ptr(), means[7]
    other = run(values + 1)
    assert other.data_ptr() != place and torch.equal(means, values)
    del means, other
    other = run(values + 1)
    assert other.data_ptr() != place and torch.equal(row, values[7])  # a view holds it too
    del row, other
    assert place in [mean.data_ptr() for mean in [run(values), run(values)]]


@backends
def test_means_of_segments_by_hand(backend):
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    labels = torch.tensor([2, 0, 2, -1])
    means, counts = protoclip.segment_mean(values, labels, 4, backend=backend)
    assert means.tolist() == [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]
    assert counts.tolist() == [1, 0, 2, 0]


@backends
def test_a_label_past_the_end_is_refused_and_nan_stays_in_its_segment(backend):
    values, labels = torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    values[2, 1] = torch.nan
    means, _ = protoclip.segment_mean(values, labels, 4, backend=backend)
    assert means[1, 1].isnan() and means.isnan().sum() == 1
    with pytest.raises(ValueError, match="labels below num_segments=2, got 2"):
        protoclip.segment_mean(values, labels, 2, backend=backend)


@backends
def test_operator_contract(backend):
    args = (torch.randn(9, 5), torch.randint(0, 4, (9,)), 4, backend)
    torch.library.opcheck(torch.ops.protoclip.segment_mean.default, args)
