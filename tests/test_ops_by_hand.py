"""Every backend that works on this machine's CPU, on small cases whose answer is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from budget import usable

import protoclip


def on_backends(op):
    """The interpreter has tests of its own."""
    names = [name for name in usable(op) if name != "triton"]
    return pytest.mark.parametrize("backend", names)


@on_backends("info_nce")
def test_info_nce_of_two_pairs_of_equal_rows_and_of_one_pair(backend):
    x = torch.eye(2)
    two = protoclip.info_nce(x, x, 2.0, backend=backend)
    assert two.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    x = F.normalize(torch.ones(9, 4), dim=1)
    assert protoclip.info_nce(x, x, 50.0, backend=backend).item() == pytest.approx(math.log(9))
    x = torch.randn(1, 5, requires_grad=True)
    one = protoclip.info_nce(x, x.detach(), 100.0, backend=backend)
    assert one == 0 and (torch.autograd.grad(one, x)[0] == 0).all()


@on_backends("contrastive")
def test_one_query_and_four_keys(backend):
    """Logits 0, 1, 2, 3; key 1 is its own, key 2 the same thing, key 3 is never seen."""
    keys, ids = torch.arange(4.0)[:, None], torch.tensor([0, 1, 1, 3])
    given = {"positives": torch.tensor([1]), "exclude": torch.tensor([3]), "backend": backend}
    for same_id, want in (
        ("exclude", math.log(1 + math.e) - 1),  # of keys 0 and 1
        ("positive", math.log(1 + math.e + math.exp(2)) - 1.5),
    ):
        given |= {"key_ids": ids, "same_id": same_id}
        got = protoclip.contrastive(torch.ones(1, 1), keys, 1.0, **given)
        assert got.item() == pytest.approx(want, rel=1e-6)


@on_backends("prototype_cross_entropy")
def test_two_prototypes(backend):
    h, c = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    got = protoclip.prototype_cross_entropy(h, c, torch.tensor([1]), 2.0, backend=backend)
    assert got.item() == pytest.approx(math.log(math.exp(2) + 1), rel=1e-6)


@on_backends("soft_targets")
def test_soft_targets_of_two_clusters(backend):
    source, prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
    p = 1 / (1 + math.exp(-2.0))  # tau = 0.5: logits 2 and 0
    want = torch.tensor([[p * 1 + (1 - p) * 3], [(1 - p) * 1 + p * 3]])
    torch.testing.assert_close(
        protoclip.soft_targets(source, prototypes, 0.5, backend=backend), want
    )


@on_backends("kmeans_assign")
def test_nearest_centroids_and_ties_go_low(backend):
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
    centroids = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    labels, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
    assert labels.tolist() == [1, 0, 0] and squared.tolist() == [0.0, 17.0, 1.0]


@on_backends("segment_mean")
def test_means_of_segments(backend):
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
    labels = torch.tensor([2, 0, 2, -1])
    means, counts = protoclip.segment_mean(values, labels, 4, backend=backend)
    assert means.tolist() == [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]
    assert counts.tolist() == [1, 0, 2, 0]
