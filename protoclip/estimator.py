"""scikit-learn's interface to ``kmeans``, for pipelines and searches."""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import (
    _check_n_features,
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from protoclip.features import FeatureRows
from protoclip.lloyd import INITS, Clusters, as_points, kmeans, stored_rows
from protoclip.ops import checks


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """``protoclip.kmeans`` as a scikit-learn estimator, for arrays and tensors on any device.

    ``fit``, ``predict`` and ``transform`` return arrays for arrays and tensors for tensors. Rows on
    disk (``open_features``, a path, a ``np.memmap``) are read block by block, but whole by
    ``transform``, and give arrays.
    Differences from ``sklearn.cluster.KMeans``: sparse ``X`` and a callable ``init`` are refused;
    ``init`` may also be "plain k-means++"; every ``algorithm`` gives Lloyd's result; empty clusters
    move to the points that contribute most to the inertia, one after the other; the random draws,
    and so the clusters of a seed, are others.

    Args:
        n_clusters: K, at most the number of points.
        init: "k-means++", "random", or centroids [K, D].
        n_init: independent runs, of which the one with the lowest inertia counts. "auto": 10 with
            init="random", else 1.
        max_iter: iterations of each run, at most.
        tol: also stop after an update that moves the centroids by a total squared distance of at
            most ``tol`` times the mean variance of the columns.
        verbose: print the inertia of each iteration.
        random_state: a seed, a ``numpy.random.RandomState``, or None for NumPy's global one.
        copy_x: has no effect; ``X`` is never changed.
        algorithm: "lloyd" or "elkan", with the same result.
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

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions(set(INITS)), "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
        "copy_x": ["boolean"],
        "algorithm": [StrOptions({"lloyd", "elkan"})],
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: Any = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: int = 0,
        random_state: Any = None,
        copy_x: bool = True,
        algorithm: str = "lloyd",
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm = algorithm

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KMeans:
        """Cluster points [N, D], with optional weights [N]; ``y`` is ignored."""
        self._validate_params()
        points = self._points(X, reset=True)
        if len(points) < self.n_clusters:
            raise ValueError(
                f"KMeans: expected at least n_clusters={self.n_clusters} points, got "
                f"n_samples={len(points)}; lower n_clusters or give more points"
            )
        seed = self.random_state
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(2**31 - 1)
        self.clusters_: Clusters = kmeans(
            points,
            self.n_clusters,
            num_iters=self.max_iter,
            tol=self.tol,
            num_restarts=self._num_restarts(),
            init=self.init,
            seed=int(seed),
            weights=_weights(sample_weight, points),
            progress=_print_inertia if self.verbose else None,
            warn=False,  # scikit-learn's users look at n_iter_
        )
        self.cluster_centers_ = _like(X, self.clusters_.centroids)
        self.labels_ = _like(X, self.clusters_.labels)
        self.inertia_ = self.clusters_.inertia
        self.n_iter_ = self.clusters_.num_iters
        num_filled = int((self.clusters_.counts > 0).sum())
        if num_filled < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({num_filled}) found smaller than n_clusters "
                f"({self.n_clusters}). Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _num_restarts(self) -> int:
        if not isinstance(self.init, str):
            if self.n_init not in ("auto", 1):
                warnings.warn(
                    "Explicit initial center position passed: performing only one init in KMeans "
                    f"instead of n_init={self.n_init}.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return 1
        if self.n_init == "auto":
            return 10 if self.init == "random" else 1
        return int(self.n_init)

    def predict(self, X: Any) -> Any:
        """The nearest cluster of each point: [M, D] -> int64 [M]."""
        return _like(X, self._fitted().predict(self._points(X)))

    def transform(self, X: Any) -> Any:
        """The distance of each point to each centroid: [M, D] -> [M, K]."""
        points = self._points(X)
        if isinstance(points, FeatureRows):
            points = as_points(points.rows(0, len(points)))
        return _like(X, self._fitted().transform(points))

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of points [M, D], with optional weights [M]; ``y`` is ignored."""
        points = self._points(X)
        _, squared = self._fitted().nearest("KMeans", points)
        squared = squared.double()
        if sample_weight is not None:
            squared *= torch.from_numpy(_weights(sample_weight, points)).to(squared.device)
        return -float(squared.sum())

    def _points(self, X: Any, reset: bool = False) -> Tensor | FeatureRows:
        stored = stored_rows(X)
        if stored is not None:
            _check_n_features(self, stored, reset=reset)
            return stored
        if isinstance(X, Tensor):
            points = as_points(X)
            checks.matrix("KMeans", "X", points, "[N, D]")
            _check_n_features(self, points, reset=reset)
            return points
        if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1:
            as_points(X)  # says how to make rows of its elements
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


def _weights(sample_weight: Any, points: Tensor | FeatureRows) -> Any:
    """fp64 [N], checked, or None."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.detach().cpu().numpy()
    return _check_sample_weight(sample_weight, points, dtype=np.float64, ensure_non_negative=True)


def _print_inertia(iteration: int, inertia: Tensor) -> None:
    print(f"Iteration {iteration}, inertia {float(inertia)}.")


def _like(X: Any, result: Tensor) -> Any:
    return result if isinstance(X, Tensor) else result.numpy()
