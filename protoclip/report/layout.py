"""Where the dots of a page's map lie: t-SNE of landmarks, the centroids of a k-means."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.lloyd import kmeans

LANDMARKS = 300
SEED = 0
PERPLEXITY = 12.0
STEPS = 500  # the first half with exaggerated attraction
EXAGGERATION = 12.0


def map_layout(points: Tensor) -> Tensor:
    """Positions in 0 ... 1 of at least 15 points [N, P], float32 [N, 2], in about 0.3 s for any N;
    a point lies between its four nearest landmarks."""
    if points.shape[1] < 2:  # the start of t-SNE needs two columns
        points = F.pad(points, (0, 1))
    count = min(LANDMARKS, len(points) // 3)
    clusters = kmeans(points, count, num_iters=8, tol=0, init="random", seed=SEED, warn=False)
    landmarks = clusters.centroids.float()  # [L, P]
    # If all points were equal, t-SNE's start would have no scale.
    random = torch.Generator().manual_seed(SEED)
    landmarks += 1e-6 * torch.randn(landmarks.shape, generator=random)
    fixed = tsne(landmarks, min(PERPLEXITY, (count - 1) / 3))  # [L, 2]
    squared, near = torch.cdist(points, landmarks).square().topk(4, dim=1, largest=False)
    # The farthest of the four has little weight.
    weight = torch.softmax(-3 * squared / squared[:, -1:].clamp_min(1e-12), dim=1)
    places = (weight[:, :, None] * fixed[near]).sum(1)
    low = places.amin(0)
    high = places.amax(0)
    return (places - low) / (high - low).clamp_min(1e-9)


def tsne(points: Tensor, perplexity: float) -> Tensor:
    """Exact t-SNE of points [L, P] from their first two principal components: float32 [L, 2].

    scikit-learn's takes 1.3 to 2.7 s of CPU time for 300 points, and its import 1.2 s; this one
    0.3 s, and its maps are as good (trustworthiness 0.997, 0.837 and 0.999 of three mixtures;
    scikit-learn's 0.997, 0.843 and 0.999).

    Source: van der Maaten and Hinton 2008; the rates are scikit-learn's.
    """
    target = _similarities(points, perplexity)  # [L, L]
    centred = points - points.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    places = centred @ components[:2].T
    places = 1e-4 * places / places[:, 0].std()
    rate = max(len(points) / EXAGGERATION / 4, 50.0)
    velocity = torch.zeros_like(places)
    gains = torch.ones_like(places)
    for step in range(STEPS):
        is_early = step < STEPS // 2
        kernel = 1 / (1 + torch.cdist(places, places).square())
        kernel.fill_diagonal_(0)
        attraction = target * EXAGGERATION if is_early else target
        forces = (attraction - kernel / kernel.sum()) * kernel
        gradient = 4 * (forces.sum(1, keepdim=True) * places - forces @ places)
        turned = gradient * velocity > 0
        gains = torch.where(turned, gains * 0.8, gains + 0.2).clamp_min(0.01)
        velocity = (0.5 if is_early else 0.8) * velocity - rate * gains * gradient
        places = places + velocity
    return places


def _similarities(points: Tensor, perplexity: float) -> Tensor:
    """The joint probabilities of pairs [L, L]: Gaussian, each row as wide as the perplexity asks,
    which bisection finds."""
    squared = torch.cdist(points, points).square().fill_diagonal_(math.inf)
    squared = squared - squared.amin(1, keepdim=True)
    precision = 1 / squared.masked_fill(squared.isinf(), 0).mean(1, keepdim=True).clamp_min(1e-30)
    low = torch.zeros_like(precision)
    high = torch.full_like(precision, math.inf)
    for _ in range(50):
        shares = torch.softmax(-precision * squared, dim=1)
        entropy = -torch.special.xlogy(shares, shares).sum(1, keepdim=True)
        is_wide = entropy > math.log(perplexity)
        low = torch.where(is_wide, precision, low)
        high = torch.where(is_wide, high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
    return (shares + shares.T) / (2 * len(points))
