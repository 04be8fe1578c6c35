"""ProtoCLIP at the price of CLIP: losses that never store their logits, exact k-means.

Importing it loads torch and nothing heavier; the rest comes in on first use.
"""

from typing import Any

from protoclip.config import ProtoConfig
from protoclip.grad_cache import grad_cache
from protoclip.kmeans import Clusters, kmeans
from protoclip.losses import (
    ClipLoss,
    ProtoClipLoss,
    SigLipLoss,
    global_contrastive,
    global_contrastive_parts,
)
from protoclip.ops import (
    Bank,
    PrototypeLosses,
    backends,
    contrastive,
    contrastive_parts,
    info_nce,
    kmeans_assign,
    nt_xent,
    prototype_cross_entropy,
    prototype_losses,
    segment_mean,
    soft_targets,
    sup_con,
)

__version__ = "0.1.0"

_LAZY = {  # name -> module, loaded at first use
    "create_loss": "protoclip.openclip",
    "create_task": "protoclip.openclip",
    "sentence_transformers": "protoclip.sentence_transformers",  # the module itself
}

__all__ = [
    "Bank",
    "ClipLoss",
    "Clusters",
    "ProtoClipLoss",
    "ProtoConfig",
    "PrototypeLosses",
    "SigLipLoss",
    "backends",
    "contrastive",
    "contrastive_parts",
    "create_loss",
    "create_task",
    "global_contrastive",
    "global_contrastive_parts",
    "grad_cache",
    "info_nce",
    "kmeans",
    "kmeans_assign",
    "nt_xent",
    "prototype_cross_entropy",
    "prototype_losses",
    "segment_mean",
    "soft_targets",
    "sup_con",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'protoclip' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LAZY[name])
    return getattr(module, name, module)
