"""k-means by faiss, as in the paper."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor


def load_faiss() -> ModuleType:
    """The faiss module, or ValueError with the remedy."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError(
            f"kmeans: backend 'faiss' needs faiss, which cannot be imported ({error}); "
            "pip install faiss-cpu (or faiss-gpu-cu12), or use backend='auto'"
        ) from error


def faiss_kmeans(
    points: Tensor,
    num_clusters: int,
    start: Tensor | None,
    *,
    num_iters: int,
    num_restarts: int,
    seed: int,
    spherical: bool,
) -> tuple[Tensor, list[float]]:
    """faiss.Kmeans on all points -> centroids [K, D], inertia before each update.

    It runs on the GPU if the points are there and faiss was built for it.
    """
    faiss = load_faiss()
    runner = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        gpu=points.is_cuda and faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # no subsampling
        niter=num_iters,
        nredo=num_restarts,
        seed=(seed + 2**31) % 2**32 - 2**31,  # its own has 32 bits
        spherical=spherical,
    )
    init = None if start is None else start.float().cpu().numpy()
    runner.train(points.float().cpu().contiguous().numpy(), init_centroids=init)
    centroids = torch.from_numpy(runner.centroids).to(points).clone()
    if not spherical:
        return centroids, list(runner.obj)
    total = float(points.double().square().sum()) + len(points)
    return centroids, [total - 2 * x for x in runner.obj]  # for these faiss sums x.c
