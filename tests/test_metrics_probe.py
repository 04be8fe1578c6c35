"""Linear probe and k-NN against scikit-learn."""

import pytest
import torch

from protoclip import metrics
from protoclip.metrics import _common

linear_model = pytest.importorskip("sklearn.linear_model")


def blobs(n=400, d=16, c=6, spread=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(c, d, generator=g)
    labels = torch.randint(0, c, (n,), generator=g)
    scale = torch.logspace(-3, 3, d)  # standardising matters
    return (centre[labels] + spread * torch.randn(n, d, generator=g)) * scale, labels


@pytest.mark.parametrize("penalty", [1.0, 0.03])
def test_linear_probe_is_sklearns_minimum(penalty):
    x, y = blobs()
    probe = metrics.fit_linear_probe(x, y, 6, penalties=(penalty,))
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    want = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=5000)
    want.fit(scaled, y.numpy())
    got = torch.softmax(probe.logits(x), dim=1)
    torch.testing.assert_close(
        got.double(), torch.from_numpy(want.predict_proba(scaled)), atol=2e-3, rtol=0
    )
    assert (got.argmax(1).numpy() == want.predict(scaled)).mean() > 0.995


def test_linear_probe_chooses_lambda():
    x, y = blobs(n=300, d=64, spread=4.0)  # nearly noise: a weak penalty overfits
    test_x, test_y = x[200:], y[200:]
    x, y = x[:200], y[:200]
    chosen = metrics.fit_linear_probe(x, y, 6)
    weakest = metrics.fit_linear_probe(x, y, 6, penalties=(1e-4,))
    assert chosen.penalty >= 0.1

    def loss(probe):
        return torch.nn.functional.cross_entropy(probe.logits(test_x), test_y)

    assert loss(chosen) < loss(weakest)
    again = metrics.fit_linear_probe(x, y, 6)
    assert torch.equal(chosen.weight, again.weight) and torch.equal(chosen.bias, again.bias)


def test_linear_probe_copes_with_constant_columns_and_missing_classes():
    x, y = blobs()
    x = torch.cat([x, torch.full((len(x), 1), 1e6)], dim=1)
    probe = metrics.fit_linear_probe(x, y, 8)  # classes 6 and 7 do not occur
    assert metrics.accuracy(probe.logits(x), y).acc1 > 0.8
    assert torch.isfinite(probe.logits(x + 1.0)).all()


def test_linear_probe_refuses():
    x, y = blobs(n=20)
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.fit_linear_probe(x.masked_fill(x > 0, torch.nan), y, 6)
    with pytest.raises(ValueError, match=r"0..2"):
        metrics.fit_linear_probe(x, y, 3)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metrics.fit_linear_probe(x[:1], y[:1], 6)
    with pytest.raises(ValueError, match="expected shape"):
        metrics.fit_linear_probe(x, y, 6, penalties=(1.0,)).logits(x[:, :3])


@pytest.mark.parametrize("block", [1000, 1 << 24])
def test_knn_equals_sklearn(monkeypatch, block):
    neighbors = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(_common, "BLOCK_ELEMENTS", block)
    x, y = blobs(n=330, spread=0.7)
    x = x / torch.logspace(-3, 3, 16)
    train, query = x[:300], x[300:]
    for temperature, weights in (
        (None, "uniform"),
        (0.1, lambda d: torch.softmax(torch.from_numpy(1 - d) / 0.1, dim=1).numpy()),
    ):
        want = neighbors.KNeighborsClassifier(7, weights=weights, metric="cosine")
        want.fit(train.numpy(), y[:300].numpy())
        got = metrics.knn_logits(train, y[:300], query, 6, k=7, temperature=temperature)
        torch.testing.assert_close(
            got, torch.from_numpy(want.predict_proba(query.numpy())).float(), atol=1e-5, rtol=0
        )


def test_knn_edges():
    x, y = torch.eye(3), torch.arange(3)
    got = metrics.knn_logits(x, y, x, 4, k=50)  # fewer samples than neighbours
    assert got.argmax(1).tolist() == [0, 1, 2] and got.shape == (3, 4)
    assert metrics.knn_logits(x, y, x[:0], 4).shape == (0, 4)
    with pytest.raises(ValueError, match="training samples"):
        metrics.knn_logits(x[:0], y[:0], x, 4)
    with pytest.raises(ValueError, match=r"0..1"):
        metrics.knn_logits(x, y, x, 2)
