"""The losses: OpenCLIP's with OpenCLIP's signatures, ProtoCLIP's, and the training objective.

None of them forms a matrix of logits. What happens over ranks is in ``losses.global_losses``,
the computation on one process in ``protoclip.ops``.
"""

from protoclip.losses.drop_in import (
    DIST_IMPLS,
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    ProtoClipLoss,
    SigLipLoss,
)
from protoclip.losses.global_losses import (
    global_contrastive,
    global_contrastive_parts,
    global_info_nce,
    global_nt_xent,
    global_sigmoid_loss,
    global_sup_con,
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
    "global_contrastive",
    "global_contrastive_parts",
    "global_info_nce",
    "global_nt_xent",
    "global_sigmoid_loss",
    "global_sup_con",
    "hit_rate",
    "prototype_term",
    "similarity_distillation",
]
