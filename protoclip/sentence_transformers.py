"""sentence-transformers' in-batch losses, fused and with known duplicates left out.

Drop-in classes for its trainer (``pip install 'protoclip[sentence-transformers]'``). Equal texts in
a batch are not taken for negatives, and no matrix of similarities is stored. Without duplicates the
losses are theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import all_gather, all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor

from protoclip.ops import contrastive, contrastive_parts


class _Fused:
    """What both losses share: ids of the texts, and the loss of the columns' embeddings."""

    _ids: list[Tensor] | None = None  # int64 [B] by column, while ``forward`` runs

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self._fuses():
            warnings.warn(
                f"{type(self).__name__}: expected cos_sim or dot_score and no hardness_mode, got "
                f"{self.get_config_dict()}; sentence-transformers' own loss runs, duplicates stay "
                "negatives",
                stacklevel=2,
            )

    def _fuses(self) -> bool:
        hard = self.hardness_mode is not None and self.hardness_strength > 0
        return self.similarity_fct in (cos_sim, dot_score) and not hard

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        columns = list(sentence_features)
        # Before the model runs: its modules may change the features in place.
        ids = [_text_ids(column) for column in columns]
        self._ids = None if any(column is None for column in ids) else ids
        try:
            return super().forward(columns, labels)
        finally:
            self._ids = None

    def _loss(self, columns: Sequence[Tensor]) -> Tensor:
        ...
