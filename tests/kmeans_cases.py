"""Calls of ``kmeans`` whose rows lie in memory or on disk, for the tests of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from protoclip.features import FeatureRows
from protoclip.lloyd import points as points_module
from protoclip.lloyd import slices, starts
from protoclip.ops import clusters, reference


def mixture(n: int, d: int, k: int = 30) -> Tensor:
    random = torch.Generator().manual_seed(0)
    middles = torch.randn(k, d, generator=random)[torch.randint(k, (n,), generator=random)]
    return middles + 0.5 * torch.randn(n, d, generator=random)


@dataclass(frozen=True)
class Case:
    """A call of ``kmeans`` with rows that are stored as an array."""

    array: Any  # or a tensor
    num_clusters: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, points: Any = None, **options: Any) -> protoclip.Clusters:
        points = self.array if points is None else points
        options = {"num_iters": 6} | self.options | options
        return protoclip.kmeans(points, self.num_clusters, **options)

    def part(self, rows: slice) -> Case:
        """The same call with some of the rows."""
        options = dict(self.options)
        if options.get("weights") is not None:
            options["weights"] = options["weights"][rows]
        return replace(self, array=self.array[rows], options=options)


SCREENED = mixture(3000, 40)
WEIGHTS = torch.rand(3000, generator=torch.Generator().manual_seed(1))
FAR = 1e3 * torch.randn(60, 40, generator=torch.Generator().manual_seed(2))
CASES = {
    "screened in 8 bits": Case(SCREENED.numpy(), 60),
    "all distances, clusters of many pieces": Case(mixture(4000, 16).numpy(), 6),
    "more clusters than are coded": Case(mixture(2500, 4).numpy(), 1030),
    "one cluster": Case(SCREENED.numpy(), 1),
    "fp16": Case(SCREENED.half().numpy(), 60),
    "fp64": Case(SCREENED.double().numpy(), 60),
    "big-endian": Case(SCREENED.numpy().astype(">f4"), 60),
    "small integers": Case((100 * SCREENED).numpy().astype(np.int16), 60),
    "large integers": Case((1e9 * SCREENED).numpy().astype(np.int64), 60),
    "weights": Case(SCREENED.numpy(), 60, {"weights": WEIGHTS}),
    "equal weights": Case(SCREENED.numpy(), 60, {"weights": torch.full((3000,), 0.3)}),
    "weights of zero": Case(SCREENED.numpy(), 60, {"weights": WEIGHTS.round()}),
    "spherical": Case(F.normalize(SCREENED, dim=1).numpy(), 60, {"spherical": True}),
    "split": Case(SCREENED.numpy(), 60, {"init": FAR, "empty_clusters": "split"}),
    "empty clusters": Case(SCREENED.numpy(), 60, {"init": FAR}),
    "empty clusters, weights": Case(SCREENED.numpy(), 60, {"init": FAR, "weights": WEIGHTS}),
    "more clusters than points": Case(mixture(9, 40).repeat(300, 1).numpy(), 60),
    "far from 0": Case((SCREENED + 1e4).numpy(), 60),
    "tol": Case(SCREENED.numpy(), 60, {"tol": 1e-3, "num_iters": 100}),
    "restarts": Case(SCREENED.numpy(), 60, {"num_restarts": 3, "num_iters": 2}),
    "random": Case(SCREENED.numpy(), 60, {"init": "random"}),
    "plain k-means++": Case(SCREENED.numpy(), 60, {"init": "plain k-means++"}),
    "the reference": Case(SCREENED.numpy(), 60, {"backend": "reference"}),
}


def set_rows_in_block(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points_module, "BLOCK_BYTES", rows * 40 * 4)


def keep_rows_on_disk(patch: pytest.MonkeyPatch) -> None:
    """Small rows too, in blocks of at most 256 x 40 numbers; sums and products are by 32 rows."""
    patch.setattr(starts, "GREEDY_BYTES", 3000)
    patch.setattr(starts, "FEWEST_ROWS", 0)
    set_rows_in_block(256, patch)
    patch.setattr(slices, "CHUNK", 32 * 40)
    patch.setattr(reference, "_CHUNK_ELEMENTS", 32 * 60)


def bound_few_points(patch: pytest.MonkeyPatch) -> None:
    """Small runs have bounds too."""
    patch.setattr(clusters, "BOUNDED_CLUSTERS", 1)
    patch.setattr(clusters, "BOUNDED_PRODUCTS", 0)


def stored(array: np.ndarray, folder: Path, sizes: Sequence[int] = (1000, 1)) -> FeatureRows:
    """In files of these numbers of rows, and one of the others."""
    parts = np.split(array, np.cumsum(sizes))
    for number, part in enumerate(part for part in parts if len(part)):
        np.save(folder / f"part_{number:03d}.npy", part)
    return protoclip.open_features(folder)


def assert_same_clusters(got: protoclip.Clusters, expected: protoclip.Clusters) -> None:
    """Bit for bit."""
    assert got.history == expected.history
    assert torch.equal(got.centroids, expected.centroids)
    assert got.centroids.dtype == expected.centroids.dtype
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.counts, expected.counts)


class CountedRows(FeatureRows):
    """Rows in memory that note what is read of them."""

    name = "counted"

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.num_read = 0
        self.most_at_once = 0

    @property
    def keys(self) -> None:
        return None

    def rows(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        return self._note(self.array[start:stop].copy())

    def take(self, positions: Any) -> np.ndarray:
        return self._note(self.array[np.asarray(positions)])

    def _note(self, rows: np.ndarray) -> np.ndarray:
        self.num_read += len(rows)
        self.most_at_once = max(self.most_at_once, len(rows))
        return rows
