"""What k-means returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from protoclip.lloyd.points import Array, Points, as_points, on_disk, stored_rows
from protoclip.ops import checks
from protoclip.ops.clusters import kmeans_assign

if TYPE_CHECKING:
    from protoclip.features import FeatureRows

TRANSFORM_BLOCK = 1 << 21  # distances that ``Clusters.transform`` computes at once

# Points as users give them: in memory, rows on disk, or a path to them.
Rows: TypeAlias = "Tensor | Array | Sequence[Any] | FeatureRows | str | os.PathLike[str]"


def assign_blocks(
    points: Points, centroids: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``kmeans_assign`` of all points, block by block."""
    blocks = [kmeans_assign(x, centroids.to(x), backend=backend) for x in points.blocks()]
    labels, squared = zip(*blocks, strict=True)
    return torch.cat(labels), torch.cat(squared)


@dataclass(frozen=True, repr=False)
class Clusters:
    """A clustering; labels, counts and inertia belong to the returned centroids.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> clusters = protoclip.kmeans(points, 2, seed=0)
        >>> bool(clusters.predict(torch.tensor([[0.2]])) == clusters.labels[0])
        True
    """

    centroids: Tensor  # [K, D] fp32 (fp64 for fp64 points)
    labels: Tensor  # int64 [N]
    counts: Tensor  # int64 [K], over all ranks
    history: tuple[float, ...]  # inertia before each iteration's update, and the final one
    converged: bool  # before num_iters ended the run; False from faiss, which does not say

    @property
    def num_iters(self) -> int:
        """The iterations that ran, each with one update of the centroids."""
        return len(self.history) - 1

    @property
    def inertia(self) -> float:
        """The sum of squared distances, over all ranks."""
        return self.history[-1]

    def __repr__(self) -> str:
        k, d = self.centroids.shape
        return (
            f"Clusters(K={k:,}, D={d}, N={int(self.counts.sum()):,}, "
            f"sizes {int(self.counts.min())} to {int(self.counts.max())}, "
            f"inertia {self.inertia:.4g}, {self.num_iters} iterations)"
        )

    def predict(self, points: Rows) -> Tensor:
        """The nearest cluster of each point: [M, D] -> int64 [M]. Rows on disk are read block by
        block, to the centroids' device."""
        return self.nearest("predict", points)[0]

    def nearest(self, op: str, points: Rows) -> tuple[Tensor, Tensor]:
        """``kmeans_assign`` of points as ``kmeans`` takes them; ``op`` is named in errors."""
        stored = stored_rows(points)
        if stored is None:
            x = as_points(points)
            checks.matrix(op, "points", x, "[M, D]")
            return kmeans_assign(x, self.centroids.to(x.device))
        return assign_blocks(on_disk(stored, self.centroids.device), self.centroids)

    @torch.no_grad()
    def transform(self, points: Rows) -> Tensor:
        """The distance of each point to each centroid: [M, D] -> [M, K] in the centroids' dtype.

        They are computed in fp64, some points at a time, so that points far from the origin have
        exact distances too.
        """
        x = as_points(points)
        checks.matrix("transform", "points", x, "[M, D]")
        centroids = self.centroids.to(x.device)
        checks.like("transform", "points", x, "centroids", centroids)
        middle = centroids.double().mean(0)
        centroids = centroids - middle
        norms = centroids.square().sum(1)
        distances = x.new_empty(len(x), len(centroids), dtype=self.centroids.dtype)
        rows = max(1, TRANSFORM_BLOCK // len(centroids))
        for block, out in zip(x.split(rows), distances.split(rows), strict=True):
            shifted = block - middle
            size = shifted.square().sum(1)[:, None] + norms  # [rows, K]
            squared = torch.addmm(size, shifted, centroids.T, alpha=-2)
            rounding = torch.finfo(torch.float64).eps * (2 + x.shape[1] ** 0.5) * size
            is_zero = (squared <= rounding) & size.isfinite()
            out.copy_(torch.where(is_zero, 0, squared).sqrt())
        return distances

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file: centroids, labels, counts, history and converged. OSError if
        the folder is missing or the disk is full; then no file is left."""
        from protoclip.common.files import write_safetensors

        tensors = vars(self) | {
            "history": torch.tensor(self.history, dtype=torch.float64),
            "converged": torch.tensor(self.converged),
        }
        write_safetensors(Path(path), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Clusters:
        """Read what ``save`` wrote.

        Raises:
            ValueError: ``save`` did not write the file.
            OSError: the file cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path, str(device))
            history = tuple(tensors.pop("history").tolist())
            at_rest = history[-1:] == history[-2:-1]  # what older files can tell
            return cls(
                centroids=tensors.pop("centroids"),
                labels=tensors.pop("labels"),
                counts=tensors.pop("counts"),
                history=history,
                converged=bool(tensors.pop("converged", at_rest)),
                **tensors,  # anything else is an error
            )
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(
                f"Clusters.load: expected a file that Clusters.save wrote, got {path} ({error})"
            ) from error
