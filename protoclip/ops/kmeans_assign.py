"""Nearest centroid: contract and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import checks
from protoclip.ops.backends import implementation, resolve

_lib = torch.library.Library("protoclip", "FRAGMENT")
_lib.define("kmeans_assign(Tensor points, Tensor centroids, str backend) -> (Tensor, Tensor)")


def _assign(points: Tensor, centroids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation("kmeans_assign", backend, "kmeans_assign")(points, centroids)


def _fake(points, centroids, backend):
    n = points.shape[0]
    return points.new_empty(n, dtype=torch.int64), points.new_empty(n, dtype=torch.float32)


_lib.impl("kmeans_assign", _assign, "CompositeExplicitAutograd")
torch.library.register_fake("protoclip::kmeans_assign", _fake, lib=_lib)


@torch.no_grad()
def kmeans_assign(
    points: Tensor, centroids: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, exactly, without the [N, K] distances in memory.

    Args:
        points: [N, D]; float32, bfloat16, float16 (float64: reference), any strides.
        centroids: [K, D], dtype and device of ``points``.
        backend: "auto" or a row of ``protoclip.backends("kmeans_assign")``.
    Returns:
        labels int64 [N] (ties go to the lowest index; -1 for a point with NaN) and squared
        Euclidean distances fp32 [N] (NaN there).
    Raises:
        ValueError, TypeError: shapes, dtypes or devices disagree, K = 0 with N > 0, or the named
            backend cannot run.
    """
    op = "kmeans_assign"
    checks.matrix(op, "points", points, "[N, D]")
    checks.matrix(op, "centroids", centroids, "[K, D]")
    checks.like(op, "centroids", centroids, "points", points)
    if len(points) and not len(centroids):
        raise ValueError(f"{op}: expected K >= 1 centroids for N = {len(points)} points, got 0")
    name = resolve(op, backend, points.device.type, points.dtype)
    with torch.autocast(points.device.type, enabled=False):
        return torch.ops.protoclip.kmeans_assign(points, centroids, name)
