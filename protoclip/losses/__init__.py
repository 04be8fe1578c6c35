"""The losses: OpenCLIP's with OpenCLIP's signatures, ProtoCLIP's, and the training objective.

None of them forms a matrix of logits. ``protoclip.ops`` computes them, over ranks too.
"""

from protoclip.losses.drop_in import (
    DIST_IMPLS,
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    ProtoClipLoss,
    SigLipLoss,
)
from protoclip.losses.objective import (
    Losses,
    OwnTerms,
    ProtoLoss,
    Term,
    TermInputs,
    caption_ids,
    similarity_distillation,
)
from protoclip.losses.prototypes import PrototypeTerm, hit_rate, prototype_term

__all__ = [
    "DIST_IMPLS",
    "ClipLoss",
    "CoCaLoss",
    "DistillClipLoss",
    "Losses",
    "OwnTerms",
    "ProtoClipLoss",
    "ProtoLoss",
    "PrototypeTerm",
    "SigLipLoss",
    "Term",
    "TermInputs",
    "caption_ids",
    "hit_rate",
    "prototype_term",
    "similarity_distillation",
]
