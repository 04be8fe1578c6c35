"""scikit-learn's own tests of KMeans, from the installed package, on ``protoclip.kmeans``.

``NOT_OURS`` lists the tests that are left out; cases with sparse input and MiniBatchKMeans are
skipped with that reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import protoclip

cluster = pytest.importorskip("sklearn.cluster")
base = pytest.importorskip("sklearn.base")
check_random_state = pytest.importorskip("sklearn.utils").check_random_state

NOT_OURS = {
    "test_relocate_empty_clusters": "private function; the example is in test_kmeans_quality.py",
    "test_minibatch_update_consistency": "MiniBatchKMeans",
    "test_minibatch_kmeans_partial_fit_init": "MiniBatchKMeans",
    "test_minibatch_kmeans_verbose": "MiniBatchKMeans",
    "test_minibatch_kmeans_warning_init_size": "MiniBatchKMeans",
    "test_minibatch_sensible_reassign": "MiniBatchKMeans",
    "test_minibatch_reassign": "MiniBatchKMeans",
    "test_minibatch_with_many_reassignments": "MiniBatchKMeans",
    "test_minibatch_kmeans_init_size": "MiniBatchKMeans",
    "test_minibatch_declared_convergence": "MiniBatchKMeans",
    "test_minibatch_iter_steps": "MiniBatchKMeans",
    "test_dense_sparse": "sparse input",
    "test_predict_dense_sparse": "sparse input",
    "test_kmeans_verbose": "its words; ours are in test_estimator.py",
    "test_kmeans_init_auto_with_initial_centroids": "estimator: the private _n_init",
    "test_n_init_auto": "estimator: the private _n_init",
    "test_wrong_params": "its words; ours are in test_estimator.py",
    "test_warning_elkan_1_cluster": "a warning about Elkan's algorithm",
    "test_kmeans_plusplus_wrong_params": "x_squared_norms, which nothing here takes",
    "test_euclidean_distance": "private function",
    "test_inertia": "private function",
    "test_is_same_clustering": "private function",
}


class KMeans(protoclip.KMeans):
    """With the callable starts of scikit-learn's, whose tests with sparse input are skipped."""

    def fit(self, X, y=None, sample_weight=None):
        init = self.init
        if callable(init):
            random = check_random_state(self.random_state)
            self.init = init(X, self.n_clusters, random_state=random)
        super().fit(X, sample_weight=sample_weight)
        self.init = init
        return self

    def _points(self, X, reset=False):
        if hasattr(X, "tocsr"):
            pytest.skip("sparse input")
        return super()._points(X, reset)

    def _init_centroids(self, X, x_squared_norms, init, random_state, sample_weight, n_centroids):
        return kmeans_plusplus(
            X, n_centroids, sample_weight=sample_weight, random_state=random_state, init=init
        )[0]


class MiniBatchKMeans:
    def __init__(self, *args, **options):
        pytest.skip("MiniBatchKMeans")


def k_means(X, n_clusters, *, sample_weight=None, random_state=None):
    fitted = KMeans(n_clusters, random_state=random_state).fit(X, sample_weight=sample_weight)
    return fitted.cluster_centers_, fitted.labels_, fitted.inertia_


def kmeans_plusplus(
    X, n_clusters, *, sample_weight=None, x_squared_norms=None, random_state=None, init="k-means++"
):
    points = KMeans()._points(X, reset=True)
    seed = int(check_random_state(random_state).randint(2**31 - 1))
    start = protoclip.kmeans(
        points, n_clusters, num_iters=0, init=init, seed=seed, weights=sample_weight
    )
    nearest = start.transform(points).argmin(dim=0)
    return start.centroids.numpy(), nearest.numpy()


@pytest.fixture
def global_random_seed() -> int:
    return 42


@pytest.fixture(params=[np.float32, np.float64])
def global_dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


def their_tests() -> Iterator[tuple[str, Any]]:
    path = Path(cluster.__file__).parent / "tests" / "test_k_means.py"
    if not path.is_file():
        return
    spec = importlib.util.spec_from_file_location("sklearn_test_k_means", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # the names are read while it is imported
        for ours in (KMeans, MiniBatchKMeans, k_means, kmeans_plusplus):
            patch.setattr(cluster, ours.__name__, ours)
        spec.loader.exec_module(module)
    yield from ((name, test) for name, test in vars(module).items() if name.startswith("test_"))


THEIRS = dict(their_tests())
globals().update({name: test for name, test in THEIRS.items() if name not in NOT_OURS})


@pytest.mark.skipif(not THEIRS, reason="this scikit-learn is installed without its tests")
def test_what_is_left_out_exists() -> None:
    assert NOT_OURS.keys() <= THEIRS.keys() and len(THEIRS) > len(NOT_OURS) + 25
