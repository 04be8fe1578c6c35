"""A map of images and texts: a small t-SNE of landmarks, and every sample between its nearest.

t-SNE of all samples would cost N^2; of a few hundred k-means centroids it costs a second, and a
sample's place follows from its nearest landmarks, 50,000 at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.kmeans import kmeans

LANDMARKS = 300
NEAREST = 4


def lay_out(points: Tensor, seed: int = 0) -> Tensor:
    """Places in 0 ... 1 of [N, P] points, float32 [N, 2]; deterministic."""
    count = min(LANDMARKS, max(1, len(points) // 3))
    fitted = points[:: max(1, len(points) // 20_000)]  # landmarks need no more
    landmarks = kmeans(fitted, min(count, len(fitted)), num_iters=8, seed=seed).centroids.float()
    if len(landmarks) < 5:
        places = _padded(points)
    else:
        places = _between(points, landmarks, tsne(landmarks, seed=seed))
    low, high = places.amin(0), places.amax(0)
    return (places - low) / (high - low).clamp_min(1e-9)


def _padded(points: Tensor) -> Tensor:
    wide = torch.zeros(len(points), 2)
    kept = points[:, :2].float()
    wide[:, : kept.shape[1]] = kept
    return wide


def _between(points: Tensor, landmarks: Tensor, places: Tensor) -> Tensor:
    """Each point at the weighted mean of the places of its nearest landmarks."""
    parts = []
    for block in points.float().split(4096):
        squared, near = (
            torch.cdist(block, landmarks)
            .square()
            .topk(min(NEAREST, len(landmarks)), dim=1, largest=False)
        )
        width = squared[:, -1:].clamp_min(1e-12)  # the farthest of them hardly counts
        weight = torch.softmax(-3 * squared / width, dim=1)
        parts.append((weight[:, :, None] * places[near]).sum(1))
    return torch.cat(parts)


def tsne(points: Tensor, *, perplexity: float = 12.0, steps: int = 350, seed: int = 0) -> Tensor:
    """Plain t-SNE of [L, P] points, O(L^2) a step -> [L, 2].

    Source: van der Maaten and Hinton 2008; early exaggeration for the first quarter.
    """
    p = _affinities(torch.cdist(points, points).square(), min(perplexity, (len(points) - 1) / 3))
    random = torch.Generator().manual_seed(seed)
    y = 1e-2 * torch.randn(len(points), 2, generator=random)
    y += 1e-1 * points[:, :2] / points[:, :2].std().clamp_min(1e-9)  # the broad shape, from PCA
    speed, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(points) / 4, 20.0)
    for step in range(steps):
        early = step < steps // 4
        inverse = 1 / (1 + torch.cdist(y, y).square())
        inverse.fill_diagonal_(0)
        q = inverse / inverse.sum()
        pull = ((12.0 if early else 1.0) * p - q) * inverse
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient * speed < 0, gains + 0.2, (gains * 0.8).clamp_min(0.01))
        speed = (0.5 if early else 0.8) * speed - rate * gains * gradient
        y = y + speed
    return y - y.mean(0)


def _affinities(squared: Tensor, perplexity: float) -> Tensor:
    """Joint probabilities [L, L] whose rows have the perplexity, by bisection of the widths."""
    n = len(squared)
    own = torch.eye(n, dtype=torch.bool)
    low, high = torch.full((n, 1), -20.0), torch.full((n, 1), 20.0)  # log of the precision
    target = torch.tensor(perplexity).log()
    scaled = squared / squared[~own].mean().clamp_min(1e-12)
    for _ in range(40):
        middle = (low + high) / 2
        p = torch.softmax((-middle.exp() * scaled).masked_fill(own, -torch.inf), dim=1)
        entropy = -(p * p.clamp_min(1e-12).log()).sum(1, keepdim=True)
        wide = entropy > target
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (p + p.T) / (2 * n)
