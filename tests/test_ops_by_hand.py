"""Every backend that works on this machine's CPU, on small cases whose answer is known."""

import math

import pytest
import torch
import torch.nn.functional as F

import protoclip
from protoclip.ops.backends import TABLE

LN2 = math.log(2.0)


def usable(op):
    """The op's backends that run on CPU tensors here; the interpreter has tests of its own."""
    rows = TABLE[op]
    return [
        name
        for name, reason in protoclip.backends(op).items()
        if reason is None and name != "triton" and "cpu" in (rows[name].device_types or ("cpu",))
    ]


@pytest.mark.parametrize("backend", usable("info_nce"))
class TestInfoNCE:
    def test_two_pairs(self, backend):
        x = torch.eye(2)
        got = protoclip.info_nce(x, x, 2.0, backend=backend)
        assert got.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)

    def test_one_pair_costs_nothing_and_none_is_zero(self, backend):
        x = torch.randn(1, 5, requires_grad=True)
        loss = protoclip.info_nce(x, x.detach(), 100.0, backend=backend)
        assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()
        empty = torch.randn(0, 5, requires_grad=True)
        loss = protoclip.info_nce(empty, empty.detach(), 100.0, backend=backend)
        assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 5)

    def test_equal_rows_cost_log_n(self, backend):
        x = F.normalize(torch.ones(9, 4), dim=1)
        assert protoclip.info_nce(x, x, 50.0, backend=backend).item() == pytest.approx(math.log(9))

    def test_gradients_equal_autograd_of_the_formula(self, backend):
        torch.manual_seed(0)
        x, y = (F.normalize(torch.randn(33, 20), dim=1).requires_grad_() for _ in range(2))
        s = torch.tensor([20.0], requires_grad=True)
        weights = torch.rand(33)
        got = (protoclip.info_nce(x, y, s, reduction="none", backend=backend) * weights).sum()
        logits = s.double() * x.double() @ y.double().T
        each = [F.cross_entropy(z, torch.arange(33), reduction="none") for z in (logits, logits.T)]
        want = (sum(each) / 2 * weights).sum()
        assert got.item() == pytest.approx(want.item(), rel=1e-6)
        for a, b in zip(
            torch.autograd.grad(got, (x, y, s)), torch.autograd.grad(want, (x, y, s)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 3])
def test_the_strip_is_cross_entropy_of_its_rows(offset):
    """What fused backends and distributed losses share: rows against more columns than rows."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    rows, *_ = torch.ops.protoclip.contrastive(x, y, s, offset, False, "none", "reference")
    want = F.cross_entropy(s * x @ y.T, torch.arange(5) + offset, reduction="none")
    torch.testing.assert_close(rows, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(5, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(rows, (x, y, s), upstream),
        torch.autograd.grad(want, (x, y, s), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", usable("kmeans_assign"))
class TestAssign:
    def test_by_hand_and_ties_go_low(self, backend):
        points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]])
        centroids = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
        labels, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
        assert labels.tolist() == [1, 0, 0] and squared.tolist() == [0.0, 17.0, 1.0]

    def test_not_a_number(self, backend):
        points = torch.randn(5, 3)
        points[2, 1] = math.nan
        labels, squared = protoclip.kmeans_assign(points, torch.randn(4, 3), backend=backend)
        assert labels[2] == -1 and squared[2].isnan()
        assert (labels[[0, 1, 3, 4]] >= 0).all()

    def test_no_points_and_one_centroid(self, backend):
        labels, squared = protoclip.kmeans_assign(
            torch.randn(0, 3), torch.randn(4, 3), backend=backend
        )
        assert labels.shape == squared.shape == (0,)
        labels, _ = protoclip.kmeans_assign(torch.randn(7, 3), torch.randn(1, 3), backend=backend)
        assert (labels == 0).all()


@pytest.mark.parametrize("backend", usable("segment_mean"))
class TestSegmentMean:
    def test_by_hand(self, backend):
        values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [9.0, 9.0]])
        means, counts = protoclip.segment_mean(
            values, torch.tensor([2, 0, 2, -1]), 4, backend=backend
        )
        assert means.tolist() == [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]
        assert counts.tolist() == [1, 0, 2, 0]

    def test_empty_inputs(self, backend):
        none = torch.zeros(0, dtype=torch.int64)
        means, counts = protoclip.segment_mean(torch.randn(0, 3), none, 2, backend=backend)
        assert means.tolist() == [[0.0] * 3] * 2 and counts.tolist() == [0, 0]


class TestKMeans:
    def blobs(self, k=6, each=40):
        torch.manual_seed(0)
        centres = 10 * torch.randn(k, 4)
        truth = torch.arange(k).repeat_interleave(each)
        return centres[truth] + 0.1 * torch.randn(k * each, 4), truth

    def test_finds_well_separated_blobs(self):
        points, truth = self.blobs()
        clusters = protoclip.kmeans(points, 6, init="k-means++", num_restarts=3)
        for j in range(6):
            assert len(set(truth[clusters.labels == j].tolist())) == 1
        assert clusters.counts.tolist() == [40] * 6

    @pytest.mark.parametrize("init", ["random", "k-means++"])
    def test_labels_and_inertia_belong_to_the_centroids(self, init):
        points = torch.randn(300, 5)
        clusters = protoclip.kmeans(points, 17, init=init, num_iters=7)
        labels, squared = protoclip.kmeans_assign(points, clusters.centroids)
        assert torch.equal(labels, clusters.labels)
        assert clusters.inertia == pytest.approx(squared.double().sum().item(), rel=1e-12)
        assert torch.equal(clusters.counts, torch.bincount(labels, minlength=17))
        assert len(clusters.history) == 8 and clusters.history[-1] == clusters.inertia
        assert list(clusters.history) == sorted(clusters.history, reverse=True)

    def test_same_seed_same_clusters_and_another_seed_others(self):
        points = torch.randn(200, 3)
        first, again = (protoclip.kmeans(points, 20, seed=3, num_restarts=2) for _ in range(2))
        assert torch.equal(first.centroids, again.centroids) and first.history == again.history
        assert first.history != protoclip.kmeans(points, 20, seed=9).history

    def test_restarts_keep_the_best(self):
        points = torch.randn(200, 3)
        each = [protoclip.kmeans(points, 12, seed=s).inertia for s in range(4)]
        assert protoclip.kmeans(points, 12, num_restarts=4).inertia == min(each)

    def test_warm_start_goes_on_where_it_was(self):
        points = torch.randn(200, 3)
        first = protoclip.kmeans(points, 12, num_iters=5)
        more = protoclip.kmeans(points, 12, num_iters=5, init=first.centroids)
        whole = protoclip.kmeans(points, 12, num_iters=10)
        assert torch.equal(more.centroids, whole.centroids)

    def test_empty_clusters_take_half_of_the_largest(self):
        points, _ = self.blobs(k=2, each=100)
        far = torch.cat([points[:1], points[-1:], torch.full((2, 4), 1e4)])
        clusters = protoclip.kmeans(points, 4, init=far, num_iters=3)
        assert (clusters.counts > 0).all()

    def test_fewer_distinct_points_than_clusters(self):
        points = torch.tensor([[0.0], [1.0]]).repeat(5, 1)
        clusters = protoclip.kmeans(points, 4, num_iters=3)
        assert clusters.inertia == pytest.approx(0, abs=1e-4) and clusters.counts.sum() == 10

    def test_spherical_centroids_have_unit_length(self):
        points = F.normalize(torch.randn(100, 6), dim=1)
        clusters = protoclip.kmeans(points, 8, spherical=True)
        torch.testing.assert_close(clusters.centroids.norm(dim=1), torch.ones(8))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"num_clusters": 11}, "lower num_clusters"),
            ({"num_clusters": 0}, "1 <= num_clusters"),
            ({"num_clusters": 2, "init": "best"}, "expected init in"),
            ({"num_clusters": 2, "init": torch.randn(3, 2)}, "init centroids"),
            ({"num_clusters": 2, "num_restarts": 0}, "num_restarts >= 1"),
        ],
    )
    def test_bad_arguments(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            protoclip.kmeans(torch.randn(10, 2), **arguments)

    def test_points_that_are_no_numbers(self):
        points = torch.randn(10, 2)
        points[4, 0] = math.inf
        with pytest.raises(ValueError, match="1 rows with NaN or inf; the first is row 4"):
            protoclip.kmeans(points, 2)
