"""The ops: contract, checks, backends and autograd of each. They know tensors, no model."""

from protoclip.ops.backends import backends
from protoclip.ops.info_nce import info_nce
from protoclip.ops.kmeans_assign import kmeans_assign
from protoclip.ops.prototype_cross_entropy import (
    Bank,
    PrototypeLosses,
    prototype_cross_entropy,
    prototype_losses,
)
from protoclip.ops.segment_mean import segment_mean
from protoclip.ops.siglip import sigmoid_loss
from protoclip.ops.soft_targets import soft_targets

__all__ = [
    "Bank",
    "PrototypeLosses",
    "backends",
    "info_nce",
    "kmeans_assign",
    "prototype_cross_entropy",
    "prototype_losses",
    "segment_mean",
    "sigmoid_loss",
    "soft_targets",
]
