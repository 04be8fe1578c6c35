"""The centroids of ``kmeans(backend="faiss")``: faiss.Kmeans, which the paper used."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor


def load_faiss() -> ModuleType:
    """The module; ValueError with the remedy where it is missing."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ValueError(
            "kmeans: backend 'faiss' needs faiss, which cannot be imported "
            f"({error}); pip install faiss-cpu (or faiss-gpu-cu12), or use backend='auto'"
        ) from error


def faiss_kmeans(
    points: Tensor,
    num_clusters: int,
    num_iters: int,
    num_restarts: int,
    init: str | Tensor,
    seed: int,
    spherical: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, list[float]]:
    """Arguments as kmeans() has checked them -> centroids [K, D], inertia before each update.

    All points are used: faiss's subsampling is off. It runs on the GPU where the points are on one
    and faiss was built for it.

    Raises:
        ValueError: faiss is not installed; ``group`` or init="k-means++" was asked, which
            faiss.Kmeans has not.
    """
    faiss = load_faiss()
    if group is not None:
        raise ValueError(
            "kmeans: backend 'faiss' runs in one process, got a process group; gather the points "
            "on one rank, or use backend='auto'"
        )
    if isinstance(init, str) and init != "random":
        raise ValueError(
            f"kmeans: backend 'faiss' takes init='random' or a Tensor, got {init!r}; use "
            f"backend='auto' for k-means++"
        )
    runner = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=num_iters,
        nredo=num_restarts,
        seed=seed,
        spherical=spherical,
        gpu=points.is_cuda and faiss.get_num_gpus() > 0,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    start = init.detach().float().cpu().numpy() if isinstance(init, Tensor) else None
    runner.train(points.float().cpu().contiguous().numpy(), init_centroids=start)
    centroids = torch.from_numpy(runner.centroids).to(points).clone()
    history = [float(x) for x in runner.obj]
    if spherical:  # faiss counts x.c there; |x - c|^2 = |x|^2 + 1 - 2 x.c
        total = float(points.double().square().sum()) + len(points)
        history = [total - 2 * x for x in history]
    return centroids, history
