"""contrastive gives what the losses that people use now give, value and gradients."""

from __future__ import annotations

import math
from typing import Any

import open_clip.loss as open_clip_loss
import pytest
import torch
import torch.nn.functional as F
from budget import leaf
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

import protoclip

N = 48
D = 20
SCALE = 12.5


def rows(n: int = N, seed: int = 0, length: float = 1.0) -> Tensor:
    torch.manual_seed(seed)
    return (length * F.normalize(torch.randn(n, D), dim=1)).requires_grad_()


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def assert_same(ours: Tensor, theirs: Tensor, **leaves: Tensor) -> None:
    """Value and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(ours, list(leaves.values()), retain_graph=True)
    expected = torch.autograd.grad(theirs, list(leaves.values()), retain_graph=True)
    for name, gradient, other in zip(leaves, got, expected, strict=True):
        torch.testing.assert_close(
            gradient, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_contrastive_is_sentence_transformers_default_loss() -> None:
    """Queries against all columns: positives first, then hard negatives."""
    query = rows()
    positive = rows(seed=1)
    negative = rows(seed=2)
    peer = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE)
    theirs = peer.compute_loss_from_embeddings([query, positive, negative], None)
    # Theirs normalises by itself, as do those below.
    keys = torch.cat([unit(positive), unit(negative)])
    ours = protoclip.contrastive(unit(query), keys, SCALE)
    assert_same(ours, theirs, query=query, positive=positive, negative=negative)


def test_own_negatives_alone_are_sentence_transformers_loss_of_one_query_at_a_time() -> None:
    """A batch of one query each: the keys are its positive and its own negatives."""
    leaves = {
        "query": rows(),
        "positive": rows(seed=1),
        "negative": rows(seed=2),
        "other_negative": rows(seed=3),
    }
    peer = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE)
    theirs = 0.0
    for row in range(N):
        of_one_query = [column[row : row + 1] for column in leaves.values()]
        theirs = theirs + peer.compute_loss_from_embeddings(of_one_query, None) / N
    ours = protoclip.contrastive(
        unit(leaves["query"]),
        unit(leaves["positive"]),
        SCALE,
        key_ids=torch.zeros(N, dtype=torch.int64),  # so no other key is a negative
        negatives=torch.stack([unit(leaves["negative"]), unit(leaves["other_negative"])], dim=1),
    )
    assert_same(ours, theirs, **leaves)


def test_several_positives_are_metric_learnings_sup_con() -> None:
    x = rows()
    labels = torch.arange(N) % 12
    theirs = SupConLoss(temperature=1 / SCALE)(x, labels)
    same_label = (labels[:, None] == labels).fill_diagonal_(False)
    positives = same_label.nonzero()[:, 1].reshape(N, 3)
    padding = torch.full((N, 1), -100)
    ours = protoclip.contrastive(
        unit(x),
        unit(x),
        SCALE,
        positives=torch.cat([padding, positives], dim=1),
        exclude=torch.arange(N),
    )
    assert_same(ours, theirs, x=x)


def test_nt_xent_is_metric_learnings() -> None:
    """Without ids; those of the same id as positives; without negatives of the same id, theirs as
    pairs of indices: (anchor, positive), (anchor, negative)."""
    first, second = rows(), rows(seed=1)
    both = torch.cat([first, second])
    ids = torch.arange(N) % 7
    labels = ids.repeat(2)
    anchor, negative = (labels[:, None] != labels).nonzero(as_tuple=True)
    index = torch.arange(2 * N)
    of_pairs = NTXentLoss(temperature=1 / SCALE)
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (of_pairs(both, torch.arange(N).repeat(2)), {}),
        (SupConLoss(temperature=1 / SCALE)(both, labels), {"ids": ids, "same_id": "positive"}),
        (of_pairs(both, indices_tuple=(index, index.roll(N), anchor, negative)), {"ids": ids}),
    ]
    for theirs, options in cases:
        ours = protoclip.nt_xent(unit(first), unit(second), SCALE, **options)
        assert_same(ours, theirs, first=first, second=second)


def test_sup_con_is_metric_learnings() -> None:
    """Every row has a positive, a negative and a loss above 0, else its reducer drops rows."""
    x = rows()
    labels = torch.arange(N) % 7
    theirs = SupConLoss(temperature=1 / SCALE)(x, labels)
    assert_same(protoclip.sup_con(unit(x), labels, SCALE), theirs, x=x)


def test_clip_loss_with_ids_is_open_clips_with_their_other_logits_at_minus_infinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = rows()
    text = rows(seed=1)
    ids = torch.randint(20, (N,))
    logit_scale = leaf(SCALE)
    others_of_an_id = (ids[:, None] == ids).fill_diagonal_(False)
    peer = open_clip_loss.ClipLoss()
    get_logits = peer.get_logits

    def masked(*arguments: Any, **options: Any) -> list[Tensor]:
        return [
            logits.masked_fill(others_of_an_id, -math.inf)
            for logits in get_logits(*arguments, **options)
        ]

    monkeypatch.setattr(peer, "get_logits", masked)
    theirs = peer(image, text, logit_scale)
    ours = protoclip.ClipLoss()(image, text, logit_scale, ids=ids)
    assert_same(ours, theirs, image=image, text=text, logit_scale=logit_scale)
    assert not torch.allclose(ours, protoclip.ClipLoss()(image, text, logit_scale))


def test_contrastive_is_the_loss_of_dpr_of_rows_that_are_not_unit() -> None:
    query = rows(length=3.0)
    keys = rows(3 * N, seed=1, length=2.0)
    positives = 3 * torch.arange(N)  # each query's passages in a row, its positive first
    theirs = F.nll_loss(F.log_softmax(query @ keys.T, dim=1), positives)
    ours = protoclip.contrastive(query, keys, 1.0, positives=positives)
    assert_same(ours, theirs, query=query, keys=keys)


def test_contrastive_is_a_recommenders_retrieval_task() -> None:
    """TensorFlow Recommenders: logQ, accidental hits removed, weights, sum."""
    user = rows()
    item = rows(seed=1)
    ids = torch.randint(30, (N,))
    probability = torch.rand(N) + 0.01
    weights = torch.rand(N)
    accidental_hits = (ids[:, None] == ids).fill_diagonal_(False)
    logits = SCALE * user @ item.T - probability.log()
    logits = logits.masked_fill(accidental_hits, torch.finfo(torch.float32).min / 100)
    theirs = (F.cross_entropy(logits, torch.arange(N), reduction="none") * weights).sum()
    ours = protoclip.contrastive(
        user,
        item,
        SCALE,
        key_ids=ids,
        key_bias=-probability.log(),
        weights=weights,
        reduction="sum",
    )
    assert_same(ours, theirs, user=user, item=item)
