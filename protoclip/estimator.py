"""scikit-learn's interface to ``kmeans``, for pipelines and searches."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from protoclip.lloyd import Clusters, kmeans
from protoclip.ops import kmeans_assign


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """``protoclip.kmeans`` as a scikit-learn estimator, for arrays and tensors on any device.

    ``fit``, ``predict`` and ``transform`` return arrays for arrays and tensors for tensors.

    Args:
        n_clusters: K, at most the number of points.
        init: "k-means++", "random", or centroids [K, D].
        n_init: independent runs, of which the one with the lowest inertia counts.
        max_iter: iterations of each run, at most.
        tol: also stop after an update that moves the centroids by a total squared distance of at
            most ``tol`` times the mean variance of the columns.
        random_state: a seed, a ``numpy.random.RandomState``, or None for NumPy's global one.
    Attributes:
        cluster_centers_: [K, D], in the dtype of the points (fp32 for 16-bit tensors).
        labels_: int64 [N], the cluster of each point.
        inertia_: the sum of squared distances, weighted by ``sample_weight``.
        n_iter_: iterations that ran.
        clusters_: the ``protoclip.Clusters``.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> protoclip.KMeans(n_clusters=2, random_state=0).fit(points).inertia_
        1.0
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Cluster points [N, D], with optional weights [N]; ``y`` is ignored."""
        points = self._points(X, reset=True)
        if len(points) < self.n_clusters:
            raise ValueError(
                f"KMeans: expected at least n_clusters={self.n_clusters} points, got "
                f"n_samples={len(points)}; lower n_clusters or give more points"
            )
        if sample_weight is not None and not isinstance(X, Tensor):
            sample_weight = _check_sample_weight(sample_weight, X)
        seed = self.random_state
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(2**31 - 1)
        self.clusters_: Clusters = kmeans(
            points,
            self.n_clusters,
            num_iters=self.max_iter,
            tol=self.tol,
            num_restarts=self.n_init,
            init=self.init,
            seed=int(seed),
            weights=sample_weight,
        )
        self.cluster_centers_ = _like(X, self.clusters_.centroids)
        self.labels_ = _like(X, self.clusters_.labels)
        self.inertia_ = self.clusters_.inertia
        self.n_iter_ = self.clusters_.num_iters
        return self

    def predict(self, X: Any) -> Any:
        """The nearest cluster of each point: [M, D] -> int64 [M]."""
        return _like(X, self._fitted().predict(self._points(X)))

    def transform(self, X: Any) -> Any:
        """The distance of each point to each centroid: [M, D] -> [M, K]."""
        return _like(X, self._fitted().transform(self._points(X)))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of points [M, D], with optional weights [M]; ``y`` is ignored."""
        centroids = self._fitted().centroids
        points = self._points(X)
        _, squared = kmeans_assign(points, centroids.to(points.device))
        if sample_weight is not None:
            squared = squared * torch.as_tensor(sample_weight).to(squared)
        return -float(squared.double().sum())

    def _points(self, X: Any, reset: bool = False) -> Tensor:
        if isinstance(X, Tensor):
            if reset and X.ndim == 2:
                self.n_features_in_ = X.shape[1]
            return X
        array = validate_data(self, X, reset=reset, dtype=("float64", "float32"), order="C")
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def _fitted(self) -> Clusters:
        check_is_fitted(self)
        return self.clusters_

    @property
    def _n_features_out(self) -> int:
        return len(self.cluster_centers_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _like(X: Any, result: Tensor) -> Any:
    return result if isinstance(X, Tensor) else result.numpy()
