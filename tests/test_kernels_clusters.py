"""Triton's assignment and segment means against fp64, on a card or in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

import protoclip

pytestmark = pytest.mark.skipif(
    protoclip.backends("kmeans_assign")["triton"] is not None,
    reason=str(protoclip.backends("kmeans_assign")["triton"]),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A tile has 128 rows (64 when scored again), 64 centroids and 64 columns.
SHAPES = [(1, 1, 1), (130, 67, 70), (300, 200, 8), (5, 3, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_exact(shape, dtype):
    torch.manual_seed(0)
    n, k, d = shape
    x, c = (F.normalize(torch.randn(s, d) + 2, dim=1).to(DEVICE, dtype) for s in (n, k))
    labels, distances = protoclip.kmeans_assign(x, c, backend="triton")
    truth = torch.cdist(x.double(), c.double()).square() if d else torch.zeros(n, k)
    reached = truth.to(DEVICE).gather(1, labels[:, None])[:, 0]
    assert ((reached - truth.to(DEVICE).amin(1)) <= 4e-7 * (1 + d / 64)).all()
    assert_within_budget(distances, reached, reached.float(), magnitude=4.0)


def test_near_ties_are_scored_again():
    """Centroids that bf16 cannot tell apart; of equal ones the lowest index."""
    torch.manual_seed(0)
    c = torch.ones(70, 16, device=DEVICE) + 1e-3 * torch.randn(70, 16, device=DEVICE)
    c[65] = c[3]
    x = c.repeat(3, 1) + 1e-4
    labels, _ = protoclip.kmeans_assign(x, c, backend="triton")
    expected = torch.arange(70, device=DEVICE)
    expected[65] = 3
    assert torch.equal(labels, expected.repeat(3))


def test_nan_has_no_label_and_strides_do_not_matter():
    torch.manual_seed(0)
    x, c = torch.randn(40, 12, device=DEVICE), torch.randn(9, 12, device=DEVICE)
    x[7, 3] = torch.nan
    labels, distances = protoclip.kmeans_assign(x, c, backend="triton")
    assert labels[7] == -1 and distances[7].isnan() and (labels >= 0).sum() == 39
    other = protoclip.kmeans_assign(x.T.contiguous().T, c.T.contiguous().T, backend="triton")
    assert torch.equal(labels, other[0])
    assert len(protoclip.kmeans_assign(x[:0], c, backend="triton")[0]) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, k, d", [(0, 3, 4), (1, 1, 1), (500, 7, 130), (2500, 2, 5), (40, 90, 3)]
)
def test_segment_mean_is_exact_and_repeats(n, k, d, dtype):
    torch.manual_seed(0)
    v, labels = torch.randn(n, d).to(DEVICE, dtype), torch.randint(-1, k, (n,), device=DEVICE)
    means, counts = protoclip.segment_mean(v, labels, k, backend="triton")
    truth, expected = protoclip.segment_mean(v.double(), labels, k, backend="reference")
    assert torch.equal(counts, expected)
    torch.testing.assert_close(means, truth.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(means, protoclip.segment_mean(v, labels, k, backend="triton")[0])
