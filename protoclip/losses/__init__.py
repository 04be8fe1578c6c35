"""The losses: OpenCLIP's with OpenCLIP's signatures, ProtoCLIP's, and the training objective.

None of them forms a matrix of logits. ``protoclip.ops`` computes them, over ranks too.
"""

from protoclip.losses.drop_in import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    ProtoClipLoss,
    SigLipLoss,
)

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "ProtoClipLoss",
    "SigLipLoss",
]
