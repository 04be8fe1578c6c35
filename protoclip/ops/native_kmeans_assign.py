"""kmeans_assign on the CPU: csrc/kmeans_assign_cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import native

native.load()


def kmeans_assign(
    points: Tensor, centroids: Tensor, *, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """[N, D], [K, D] -> labels int64 [N], squared distances fp32 [N].

    Exact whatever is asked: the 8-bit screening is faster than bf16 scores.
    """
    return torch.ops.protoclip_native.kmeans_assign(points, centroids)


class CodedPoints:
    """Points [N, D] fp32, finite, with their 8-bit codes, N (D + 16) bytes, for many assignments.

    Labels and distances have the bits of ``kmeans_assign`` (unless squares leave fp32).
    """

    def __init__(self, points: Tensor) -> None:
        self.points = points.contiguous()
        self.codes = torch.ops.protoclip_native.kmeans_encode(self.points)

    def assign(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """[K, D] fp32 -> labels int64 [N], squared distances fp32 [N]."""
        return torch.ops.protoclip_native.kmeans_assign_coded(self.points, centroids, *self.codes)
