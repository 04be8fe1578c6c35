"""ARI, AMI, NMI and prototype health against scikit-learn and hand-computed cases."""

import math
from types import SimpleNamespace

import pytest
import torch

from protoclip import metrics

cluster = pytest.importorskip("sklearn.metrics.cluster")

G = torch.Generator().manual_seed(0)
NOISE = torch.randint(0, 40, (1000,), generator=G)
CLASSES = torch.randint(0, 25, (1000,), generator=G)
CASES = {
    "unrelated": (CLASSES, NOISE),
    "related": (CLASSES, torch.where(NOISE < 12, NOISE, CLASSES)),
    "same partition, other names": (CLASSES, (CLASSES * 7 + 3) % 101),
    "one against many": (torch.zeros(50, dtype=torch.long), torch.arange(50)),
    "all one": (torch.zeros(9, dtype=torch.long), torch.zeros(9, dtype=torch.long)),
    "all alone": (torch.arange(30), torch.arange(30).flip(0)),
    "one giant": (torch.cat([torch.zeros(900), torch.arange(100)]).long(), NOISE),
    "negative names": (CLASSES - 12, NOISE),
    "two samples": (torch.tensor([0, 1]), torch.tensor([0, 1])),
    "one sample": (torch.tensor([3]), torch.tensor([5])),
    "none": (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_sklearn(case):
    a, b = CASES[case]
    table = metrics.contingency(a, b)
    pairs = [
        (metrics.adjusted_rand_index, cluster.adjusted_rand_score),
        (metrics.normalized_mutual_information, cluster.normalized_mutual_info_score),
        (metrics.adjusted_mutual_information, cluster.adjusted_mutual_info_score),
    ]
    for ours, theirs in pairs:
        assert ours(table) == pytest.approx(theirs(a.numpy(), b.numpy()), abs=1e-9), ours.__name__


def test_ami_of_many_samples():
    g = torch.Generator().manual_seed(1)
    a = torch.randint(0, 300, (20_000,), generator=g)
    other = torch.randint(0, 200, (20_000,), generator=g)
    b = torch.where(torch.rand(20_000, generator=g) < 0.5, a, other)
    want = cluster.adjusted_mutual_info_score(a.numpy(), b.numpy())
    got = metrics.adjusted_mutual_information(metrics.contingency(a, b))
    assert got == pytest.approx(want, abs=1e-9)


def test_scores_by_hand():
    # Of 6 pairs 2 are together in a, 1 in b, 1 in both; expected 2 * 1 / 6.
    table = metrics.contingency(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]))
    assert metrics.adjusted_rand_index(table) == pytest.approx((1 - 2 / 6) / (1.5 - 2 / 6))
    h_a, h_b = math.log(2), 1.5 * math.log(2)  # MI = H(a): b refines a
    assert metrics.normalized_mutual_information(table) == pytest.approx(h_a / ((h_a + h_b) / 2))


def test_contingency_refuses():
    with pytest.raises(ValueError, match="one label per row"):
        metrics.contingency(torch.zeros(3).long(), torch.zeros(4).long())
    with pytest.raises(ValueError, match="integers"):
        metrics.contingency(torch.zeros(3), torch.zeros(3).long())


def test_group_scores_call_kmeans_on_the_sphere():
    seen = []

    def kmeans(points, num_clusters, *, seed):
        seen.append((points, num_clusters, seed))
        return SimpleNamespace(labels=(points[:, 0] > points[:, 1]).long())

    x = torch.tensor([[9.0, 1], [2, 1], [1, 5], [0.1, 1]])
    labels = torch.tensor([4, 4, 2, 2])
    got = metrics.group_scores(x, labels, kmeans, seeds=(3, 5))
    assert got == pytest.approx({"ari": 1.0, "ami": 1.0, "nmi": 1.0})
    assert [(k, seed) for _, k, seed in seen] == [(2, 3), (2, 5)]
    torch.testing.assert_close(seen[0][0].norm(dim=1), torch.ones(4))


def test_prototype_health_by_hand():
    labels = torch.tensor([0, 0, 0, 2, 2, 3])
    classes = torch.tensor([1, 1, 0, 5, 5, 5])
    previous = torch.tensor([7, 7, 7, 1, 1, 4])  # the same partition under other names
    got = metrics.prototype_health(labels, 4, previous=previous, classes=classes)
    assert got["empty"] == pytest.approx(1 / 4)
    assert got["imbalance"] == pytest.approx(4 * (9 + 4 + 1) / 36)
    assert got["largest"] == pytest.approx(1 / 2)
    assert got["churn"] == pytest.approx(0)
    assert got["purity"] == pytest.approx(5 / 6)
    # One of six leaves the pair for the singleton: 5/6 kept one way, 5/6 the other.
    assert metrics.churn(labels, torch.tensor([0, 0, 0, 2, 3, 3])) == pytest.approx(1 / 6)
    # Merging everything keeps all company forwards, half of it backwards.
    assert metrics.churn(labels, torch.zeros(6, dtype=torch.long)) == pytest.approx(1 / 4)


def test_prototype_health_edges():
    none = torch.zeros(0, dtype=torch.long)
    assert math.isnan(metrics.prototype_health(none, 4)["empty"])
    assert math.isnan(metrics.purity(none, none))
    balanced = metrics.prototype_health(torch.arange(8), 8)
    assert balanced == pytest.approx({"empty": 0, "imbalance": 1, "largest": 1 / 8})
    with pytest.raises(ValueError, match=r"0..2, found 0..3"):
        metrics.prototype_health(torch.tensor([0, 3]), 3)
