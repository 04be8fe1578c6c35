"""sentence-transformers' in-batch losses, fused, without duplicates among the negatives.

The subclasses take the same arguments and work in its trainer
(``pip install -e '.[sentence-transformers]'``). Equal texts of a batch are not negatives of
each other, and no similarity matrix is stored. Without duplicates the losses equal the originals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from sentence_transformers.sentence_transformer import losses as theirs
    from sentence_transformers.util import cos_sim, dot_score
except ImportError as error:
    raise ImportError(
        "protoclip.sentence_transformers needs sentence-transformers 6: "
        "pip install -e '.[sentence-transformers]'"
    ) from error

from protoclip.distributed import all_ranks
from protoclip.ops import contrastive, contrastive_parts
from protoclip.ops.columns import columns_of

NO_ANCHOR = -(2**63)  # the anchor id of hard negatives; no query has it


class _Side(NamedTuple):
    """One direction of the loss."""

    queries: Tensor  # [B, D], of this rank
    keys: Tensor  # [M, D]
    key_ids: Tensor  # int64 [M, 2]
    exclude: Tensor | None  # int64 [B], the key that a query must not see


class _Fused(nn.Module):
    """The common part of both losses: the texts' ids, and the loss of the columns' embeddings."""

    _ids: Sequence[Tensor | None] = ()  # int64 [B] by column, while ``forward`` runs

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self._fuses():
            warnings.warn(
                f"{type(self).__name__}: expected cos_sim or dot_score without hardness, got "
                f"{self.similarity_fct} and {self.hardness_mode}; using the original loss, in "
                "which duplicates are negatives",
                stacklevel=2,
            )

    def _fuses(self: Any) -> bool:
        hard = self.hardness_mode is not None and self.hardness_strength > 0
        return self.similarity_fct in (cos_sim, dot_score) and not hard

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Loss of a batch of columns: anchors, positives, and any hard negatives."""
        columns = list(sentence_features)
        self._ids = [_text_ids(column) for column in columns]  # the model may change the columns
        try:
            return super().forward(columns, labels)
        finally:
            self._ids = ()

    def _loss(self: Any, columns: list[Tensor]) -> Tensor:
        """Mean loss of this rank's rows, from the embeddings of each column: [B, D]."""
        if self.similarity_fct is cos_sim:
            columns = [F.normalize(column, dim=1) for column in columns]
        size = len(columns[0])
        group = all_ranks() if self.gather_across_devices else None
        ranks = columns_of(type(self).__name__, group, columns[0])
        first = ranks.first(size)
        rows = torch.arange(first, first + size, device=columns[0].device)  # of this rank
        ids = []
        for number in range(len(columns)):
            text_ids = self._ids[number] if self._ids else None
            # A text without an id differs from all others.
            ids.append(rows + (number << 40) if text_ids is None else text_ids)
        anchors, positives = columns[:2]  # of this rank
        columns = [ranks.gather(column) for column in columns]
        ids = [ranks.gather(column) for column in ids]
        pairs = torch.stack(ids[:2], dim=1)  # [G, 2]: ids of a row's anchor and its positive
        by_row = [torch.stack([ids[0], i], dim=1) for i in ids[1:]]
        # An anchor's hard negatives are also negatives of an equal anchor in other rows.
        by_text = [pairs, *(torch.stack([i.new_full(i.shape, NO_ANCHOR), i], 1) for i in ids[2:])]
        documents = torch.cat(columns[1:])
        # Where queries and keys are the same column, a query must not see itself.
        sides = {
            "query_to_doc": _Side(anchors, documents, torch.cat(by_text), None),
            "query_to_query": _Side(anchors, columns[0], pairs, rows),
            "doc_to_query": _Side(positives, columns[0], pairs, None),
            "doc_to_doc": _Side(positives, documents, torch.cat(by_row), rows),
        }

        def compare(run: Callable[..., Any], direction: str) -> Any:
            side = sides[direction]
            return run(
                side.queries,
                side.keys,
                self.scale,
                positives=rows,
                query_ids=pairs[rows],
                key_ids=side.key_ids,
                exclude=side.exclude,
            )

        if self.directions == ("query_to_doc",):
            return compare(contrastive, "query_to_doc")
        parts = {name: compare(contrastive_parts, name) for name in self.directions}
        log_sums = torch.stack([log_sum for log_sum, _ in parts.values()])
        joint = self.partition_mode == "joint"
        log_sum = log_sums.logsumexp(0) if joint else log_sums.mean(0)
        _, positive = parts["query_to_doc"]
        return (log_sum - positive).mean()


class MultipleNegativesRankingLoss(_Fused, theirs.MultipleNegativesRankingLoss):
    """In-batch negatives: sentence-transformers' class and arguments, fused.

    Texts are equal if their tokens are. An anchor's negatives include neither documents equal to
    its own positive nor positives of an equal anchor. Inputs that are not only text always differ.
    ``hardness_mode`` and similarities other than ``cos_sim`` and ``dot_score`` run
    sentence-transformers' own loss, with a warning.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """Loss of the columns' embeddings, [B, D] each."""
        if not self._fuses() or len(embeddings) < 2:
            return super().compute_loss_from_embeddings(embeddings, labels)
        return self._loss(embeddings)


class CachedMultipleNegativesRankingLoss(_Fused, theirs.CachedMultipleNegativesRankingLoss):
    """``MultipleNegativesRankingLoss`` for big batches: gradients are cached by mini-batch.

    sentence-transformers' class and arguments; the loss itself is fused and sees the whole batch.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Loss of the mini-batches' embeddings by column; runs its backward pass if asked."""
        if not self._fuses():
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = self._loss([torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


def _text_ids(features: Mapping[str, Any]) -> Tensor | None:
    """A hash of each text's tokens, int64 [B]; None if the input is more than tokens."""
    tokens = features.get("input_ids")
    if not isinstance(tokens, Tensor):
        return None
    for name, x in features.items():
        # A model leaves its results here, and MatryoshkaLoss brings them again.
        result = name.endswith(("embedding", "embeddings", "weights_sum"))
        if isinstance(x, Tensor) and x.is_floating_point() and not result:
            return None
    if "cu_seq_lens_q" in features:  # all texts are joined in one row
        return _joined_ids(tokens[0], features["cu_seq_lens_q"].long())
    if tokens.ndim == 1 and "offsets" in features:  # StaticEmbedding's, without the last end
        end = tokens.new_full((1,), len(tokens))
        return _joined_ids(tokens, torch.cat([features["offsets"].to(end), end]))
    if tokens.ndim != 2:
        return None
    mask = features.get("attention_mask", torch.ones_like(tokens)).long()
    return (_mixed(tokens, mask.cumsum(1) - 1) * mask).sum(1)  # padding has no position


def _joined_ids(tokens: Tensor, bounds: Tensor) -> Tensor:
    """The ids of texts that follow each other in ``tokens``, int64 [T]; text i is between bounds i
    and i + 1, int64 [B + 1]."""
    text = torch.repeat_interleave(bounds.diff(), output_size=len(tokens))
    place = torch.arange(len(tokens), device=tokens.device) - bounds[text]
    return bounds.new_zeros(len(bounds) - 1).index_add_(0, text, _mixed(tokens, place))


def _mixed(tokens: Tensor, place: Tensor) -> Tensor:
    """64 well-mixed bits of each token and its position in the text (splitmix64)."""
    x = tokens.long() + (place << 32) + 1
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        logical = (x >> shift) & ((1 << (64 - shift)) - 1)
        x = (x ^ logical) * factor
    return x
