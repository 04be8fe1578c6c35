"""Contrastive losses in memory that grows with N, exact k-means, and a ProtoCLIP trainer.

In your own loop, on a CPU or a GPU::

    loss = protoclip.ClipLoss()  # in place of open_clip.loss.ClipLoss(); also SigLipLoss
    loss(image_features, text_features, logit_scale).backward()

or as functions: ``info_nce``, ``contrastive``, ``nt_xent``, ``sup_con``, ``kmeans``, ...
(``help(protoclip.info_nce)``). The commands: ``protoclip --help``.

``import protoclip`` loads torch and nothing heavier; other modules load at first use.
"""

import sys
from typing import Any

from protoclip import cached_gradients, lloyd
from protoclip.cached_gradients import grad_cache
from protoclip.lloyd import Clusters, choose_num_clusters, kmeans
from protoclip.losses import ClipLoss, ProtoClipLoss, SigLipLoss
from protoclip.losses.global_losses import (
    global_contrastive,
    global_contrastive_parts,
    global_nt_xent,
    global_sup_con,
)
from protoclip.ops import *  # noqa: F403
from protoclip.ops import __all__ as _ops
from protoclip.settings import config
from protoclip.settings.config import ProtoConfig

__version__ = "0.1.0"

# What was public in modules of these names, and stands so in pickles. A file with the name of a
# function would replace the function as soon as somebody imported it.
sys.modules["protoclip.config"] = config
sys.modules["protoclip.kmeans"] = lloyd
sys.modules["protoclip.grad_cache"] = cached_gradients
ProtoConfig.__module__ = "protoclip"  # in pickles from now on

_LAZY = {  # name -> module, loaded at first use
    "create_loss": "protoclip.openclip",
    "create_task": "protoclip.openclip",
    "open_dataset": "protoclip.data",
    "sentence_transformers": "protoclip.sentence_transformers",  # the module itself
}

__all__ = [
    *_ops,
    "ClipLoss",
    "Clusters",
    "ProtoClipLoss",
    "ProtoConfig",
    "SigLipLoss",
    "choose_num_clusters",
    "create_loss",  # noqa: F405
    "create_task",  # noqa: F405
    "global_contrastive",
    "global_contrastive_parts",
    "global_nt_xent",
    "global_sup_con",
    "grad_cache",
    "kmeans",
    "open_dataset",  # noqa: F405
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'protoclip' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LAZY[name])
    return getattr(module, name, module)
