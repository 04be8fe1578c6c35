"""The ops: contract, checks, backends and autograd of each. They know tensors but no models."""

from protoclip.kernels import scratch as scratch
from protoclip.ops.clusters import kmeans_assign, segment_mean
from protoclip.ops.contrastive_losses import (
    contrastive,
    contrastive_parts,
    info_nce,
    nt_xent,
    sup_con,
)
from protoclip.ops.dispatch import backends
from protoclip.ops.prototypes import (
    Bank,
    PrototypeLosses,
    prototype_cross_entropy,
    prototype_losses,
    soft_targets,
)
from protoclip.ops.siglip_loss import sigmoid_loss

__all__ = [
    "Bank",
    "PrototypeLosses",
    "backends",
    "contrastive",
    "contrastive_parts",
    "info_nce",
    "kmeans_assign",
    "nt_xent",
    "prototype_cross_entropy",
    "prototype_losses",
    "segment_mean",
    "sigmoid_loss",
    "soft_targets",
    "sup_con",
]
