"""``protoclip.KMeans``: scikit-learn's interface, for arrays and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import protoclip

POINTS = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
CANNOT_PASS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "the first centroids are drawn by position, so repeated points draw others; "
        "scikit-learn's own KMeans is excused from it too"
    ),
}


@parametrize_with_checks([protoclip.KMeans()], expected_failed_checks=lambda estimator: CANNOT_PASS)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("kind", [np.ndarray, torch.Tensor])
def test_it_is_kmeans(kind: type) -> None:
    """And what comes out is of the kind that went in."""
    points: Any = POINTS if kind is torch.Tensor else POINTS.numpy()
    model = protoclip.KMeans(6, n_init=2, max_iter=50, tol=0, random_state=3).fit(points)
    expected = protoclip.kmeans(POINTS, 6, num_iters=50, num_restarts=2, init="k-means++", seed=3)
    assert model.inertia_ == expected.inertia and model.n_iter_ == expected.num_iters
    for got, value in (
        (model.cluster_centers_, expected.centroids),
        (model.labels_, expected.labels),
        (model.predict(points), expected.labels),
        (model.fit_predict(points), expected.labels),
        (model.transform(points), expected.transform(POINTS)),
    ):
        assert type(got) is kind and torch.equal(torch.as_tensor(got), value)
    assert model.score(points) == pytest.approx(-model.inertia_, rel=1e-5)
    half = torch.full((200,), 0.5)
    assert model.score(points, sample_weight=half) == pytest.approx(-model.inertia_ / 2, rel=1e-5)


def test_weights_and_given_centroids_reach_kmeans() -> None:
    weights = np.arange(200.0)
    first = POINTS[:4].numpy()
    model = protoclip.KMeans(4, init=first, tol=0).fit(POINTS.numpy(), sample_weight=weights)
    expected = protoclip.kmeans(POINTS, 4, num_iters=300, init=first, weights=weights)
    assert (model.labels_ == expected.labels.numpy()).all()
    assert model.inertia_ == expected.inertia


def test_it_works_in_a_pipeline_and_keeps_its_parameters() -> None:
    model = clone(protoclip.KMeans(n_clusters=3, random_state=np.random.RandomState(1)))
    assert model.set_params(n_clusters=2).get_params()["n_clusters"] == 2
    pipeline = make_pipeline(StandardScaler(), model)
    assert pipeline.fit_transform(POINTS.numpy()).shape == (200, 2)
    assert list(model.get_feature_names_out()) == ["kmeans0", "kmeans1"]


def test_fewer_points_than_clusters_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="at least n_clusters=8 points, got n_samples=3"):
        protoclip.KMeans().fit(POINTS[:3])
