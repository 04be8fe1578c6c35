"""Contrastive losses in memory that grows with N, exact k-means, and a ProtoCLIP trainer.

In your own loop, on a CPU or a GPU::

    loss = protoclip.ClipLoss()  # in place of open_clip.loss.ClipLoss(); also SigLipLoss
    loss(image_features, text_features, logit_scale).backward()

or as functions: ``info_nce``, ``contrastive``, ``nt_xent``, ``sup_con``, ``kmeans``, ...
(``help(protoclip.info_nce)``). The commands: ``protoclip --help``.

``import protoclip`` loads nothing else; the first use of a name imports its module, and torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names below, for type checkers
    from protoclip.cached_gradients import grad_cache
    from protoclip.curate.hierarchy import Hierarchy, hierarchical_kmeans
    from protoclip.curate.sampling import balanced_sample
    from protoclip.data import open_dataset
    from protoclip.estimator import KMeans
    from protoclip.features import open_features
    from protoclip.heads import load_heads
    from protoclip.lloyd import Clusters, kmeans
    from protoclip.lloyd.number import choose_num_clusters
    from protoclip.losses import ClipLoss, ProtoClipLoss, SigLipLoss
    from protoclip.openclip import create_loss, create_task
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
        sigmoid_loss,
        soft_targets,
        sup_con,
    )
    from protoclip.settings.config import ProtoConfig

__version__ = "0.2.0"

__all__ = [
    "Bank",
    "ClipLoss",
    "Clusters",
    "Hierarchy",
    "KMeans",
    "ProtoClipLoss",
    "ProtoConfig",
    "PrototypeLosses",
    "SigLipLoss",
    "backends",
    "balanced_sample",
    "choose_num_clusters",
    "contrastive",
    "contrastive_parts",
    "create_loss",
    "create_task",
    "grad_cache",
    "hierarchical_kmeans",
    "info_nce",
    "kmeans",
    "kmeans_assign",
    "load_heads",
    "nt_xent",
    "open_dataset",
    "open_features",
    "prototype_cross_entropy",
    "prototype_losses",
    "segment_mean",
    "sigmoid_loss",
    "soft_targets",
    "sup_con",
]

# The modules of the public names that are not in protoclip.ops.
_MODULES = {
    "ClipLoss": "losses",
    "Clusters": "lloyd",
    "Hierarchy": "curate.hierarchy",
    "KMeans": "estimator",
    "ProtoClipLoss": "losses",
    "ProtoConfig": "settings.config",
    "SigLipLoss": "losses",
    "balanced_sample": "curate.sampling",
    "choose_num_clusters": "lloyd.number",
    "create_loss": "openclip",
    "create_task": "openclip",
    "grad_cache": "cached_gradients",
    "hierarchical_kmeans": "curate.hierarchy",
    "kmeans": "lloyd",
    "load_heads": "heads",
    "open_dataset": "data",
    "open_features": "features",
}
_SUBMODULES = ("losses", "ops", "sentence_transformers")  # usable after import protoclip


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"protoclip.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'protoclip' has no attribute {name!r}")
    module = importlib.import_module(f"protoclip.{_MODULES.get(name, 'ops')}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
