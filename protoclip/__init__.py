"""ProtoCLIP at the price of CLIP: losses that never store their logits, exact k-means.

Importing it loads torch and nothing heavier; the rest comes in on first use.
"""

from protoclip.kmeans import Clusters, kmeans
from protoclip.openclip_losses import ClipLoss, SigLipLoss
from protoclip.ops import (
    Bank,
    PrototypeLosses,
    backends,
    info_nce,
    kmeans_assign,
    prototype_cross_entropy,
    prototype_losses,
    segment_mean,
    soft_targets,
)

__version__ = "0.1.0"

__all__ = [
    "Bank",
    "ClipLoss",
    "Clusters",
    "PrototypeLosses",
    "SigLipLoss",
    "backends",
    "info_nce",
    "kmeans",
    "kmeans_assign",
    "prototype_cross_entropy",
    "prototype_losses",
    "segment_mean",
    "soft_targets",
]
