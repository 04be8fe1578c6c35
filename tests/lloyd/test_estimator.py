"""``protoclip.KMeans``: scikit-learn's interface, for arrays and tensors."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import sklearn.cluster
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
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


@pytest.mark.smoke
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


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_score_checks_weights_as_fit_does(kind: Any) -> None:
    points: Any = kind(POINTS)
    model = protoclip.KMeans(4, random_state=0).fit(points)
    weights = torch.rand(200)
    squared = model.transform(points).min(1)
    squared = torch.as_tensor(squared if kind is np.asarray else squared.values).square()
    expected = -float((squared * weights).sum())
    assert model.score(points, sample_weight=kind(weights)) == pytest.approx(expected, rel=1e-5)
    bad = {
        "Sample weights must be 1D": weights[:, None],  # the sum over [N, N] was wrong
        "Negative values in data passed to `sample_weight`": -weights,
        "sample_weight contains NaN": weights * torch.nan,
        "sample_weight.shape == ": weights[:9],
    }
    for words, value in bad.items():
        for call in (model.fit, model.score):
            with pytest.raises(ValueError, match=words):
                call(points, sample_weight=kind(value))


WRONG: dict[str, dict[str, Any]] = {
    "'n_clusters' parameter of KMeans must be an int .* Got 0": {"n_clusters": 0},
    "'n_init' .* a str among {'auto'} or an int .* Got 0": {"n_init": 0},
    "'max_iter' .* Got 2.5": {"max_iter": 2.5},
    "'tol' .* Got -1": {"tol": -1},
    "'tol' .* Got nan": {"tol": float("nan")},
    "'init' .* an array-like. Got 'best'": {"init": "best"},
    "'init' .* Got <built-in function max>": {"init": max},
    "'algorithm' .* Got 'full'": {"algorithm": "full"},
    "'random_state' .* Got 'now'": {"random_state": "now"},
    r"init centroids .* \[8, 5\], got \[8, 2\]": {"init": np.zeros((8, 2))},
}


@pytest.mark.parametrize("words", WRONG)
def test_errors_name_the_estimators_own_arguments(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        protoclip.KMeans(**WRONG[words]).fit(POINTS)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_errors_name_x(kind: Any) -> None:
    points: Any = kind(POINTS)
    model = protoclip.KMeans(3).fit(points)
    for call in (model.predict, model.transform, model.score):
        with pytest.raises(ValueError, match="X has 2 features, but KMeans is expecting 5"):
            call(points[:, :2])
    with pytest.raises(TypeError, match=r"KMeans: expected X in float32.*X.float\(\)"):
        model.fit(POINTS > 0)


def test_scikit_learns_parameters_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    names = inspect.signature(sklearn.cluster.KMeans).parameters
    assert inspect.signature(protoclip.KMeans).parameters.keys() == names.keys()
    options: dict[str, Any] = {"random_state": 3, "max_iter": 5, "tol": 0}
    plain = protoclip.KMeans(4, **options).fit(POINTS)
    points = POINTS.clone()
    other = protoclip.KMeans(4, algorithm="elkan", verbose=1, copy_x=False, **options).fit(points)
    assert torch.equal(other.labels_, plain.labels_) and torch.equal(points, POINTS)
    history = plain.clusters_.history[:-1]
    lines = [f"Iteration {i}, inertia {inertia}." for i, inertia in enumerate(history)]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("init, num_runs", [("random", 10), ("k-means++", 1), (POINTS[:4], 1)])
def test_n_init_auto_is_scikit_learns(init: Any, num_runs: int) -> None:
    auto = protoclip.KMeans(4, init=init, max_iter=2, random_state=3).fit(POINTS)
    expected = protoclip.kmeans(
        POINTS, 4, num_iters=2, tol=1e-4, num_restarts=num_runs, init=init, seed=3
    )
    assert auto.clusters_.history == expected.history
    assert auto.get_params()["n_init"] == "auto"


def test_n_init_with_given_centroids_warns() -> None:
    with pytest.warns(RuntimeWarning, match="only one init in KMeans instead of n_init=5"):
        protoclip.KMeans(4, init=POINTS[:4], n_init=5).fit(POINTS)


def test_fewer_distinct_points_than_clusters_warn() -> None:
    points = POINTS[:3].repeat(9, 1)
    with pytest.warns(ConvergenceWarning, match=r"clusters \(3\) .* than n_clusters \(5\)"):
        protoclip.KMeans(5).fit(points)


def test_it_works_in_a_pipeline_and_keeps_its_parameters() -> None:
    model = clone(protoclip.KMeans(n_clusters=3, random_state=np.random.RandomState(1)))
    assert model.set_params(n_clusters=2).get_params()["n_clusters"] == 2
    pipeline = make_pipeline(StandardScaler(), model)
    assert pipeline.fit_transform(POINTS.numpy()).shape == (200, 2)
    assert list(model.get_feature_names_out()) == ["kmeans0", "kmeans1"]


def test_fewer_points_than_clusters_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="at least n_clusters=8 points, got n_samples=3"):
        protoclip.KMeans().fit(POINTS[:3])
