"""contrastive gives what the losses that people use now give, value and gradients."""

import math

import open_clip.loss as open_clip_loss
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import protoclip

N, D, SCALE = 48, 20, 12.5


def rows(n=N, seed=0, length=1.0):
    torch.manual_seed(seed)
    return (length * F.normalize(torch.randn(n, D), dim=1)).requires_grad_()


def unit(x):
    return F.normalize(x, dim=1)


def assert_same(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    grads = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sentence_transformers_default_loss():
    """Queries against all columns: positives first, then hard negatives."""
    leaves = [rows(seed=k) for k in range(3)]
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE)
    want = theirs.compute_loss_from_embeddings(leaves, None)
    query, *keys = map(unit, leaves)  # theirs normalises by itself, as do those below
    got = protoclip.contrastive(query, torch.cat(keys), SCALE)
    assert_same(got, want, leaves)


def test_sentence_transformers_loss_of_own_negatives_alone():
    """A batch of one query each: the keys are its positive and its own negatives."""
    leaves = [rows(seed=k) for k in range(4)]
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=SCALE)
    single = [[x[i : i + 1] for x in leaves] for i in range(N)]
    want = sum(theirs.compute_loss_from_embeddings(one, None) for one in single) / N
    query, key, *own = map(unit, leaves)
    got = protoclip.contrastive(
        query,
        key,
        SCALE,
        key_ids=torch.zeros(N, dtype=torch.int64),  # so no other key is a negative
        negatives=torch.stack(own, dim=1),
    )
    assert_same(got, want, leaves)


def test_several_positives_are_metric_learnings_sup_con():
    x, labels = rows(), torch.arange(N) % 12
    want = SupConLoss(temperature=1 / SCALE)(x, labels)
    others = (labels[:, None] == labels).fill_diagonal_(False).nonzero()[:, 1].reshape(N, 3)
    positives = torch.cat([torch.full((N, 1), -100), others], dim=1)
    got = protoclip.contrastive(
        unit(x), unit(x), SCALE, positives=positives, exclude=torch.arange(N)
    )
    assert_same(got, want, (x,))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_torchs_cross_entropy_of_keys_and_own_negatives(label_smoothing):
    query, keys = rows(), rows(2 * N, seed=1)
    own = F.normalize(torch.randn(N, 4, D), dim=2).requires_grad_()
    others = SCALE * torch.einsum("nd,nhd->nh", query, own)
    logits = torch.cat([SCALE * query @ keys.T, others], dim=1)
    want = F.cross_entropy(logits, torch.arange(N), label_smoothing=label_smoothing)
    got = protoclip.contrastive(query, keys, SCALE, negatives=own, label_smoothing=label_smoothing)
    assert_same(got, want, (query, keys, own))


def test_nt_xent_is_metric_learnings_with_one_positive_each():
    a, b = rows(), rows(seed=1)
    labels = torch.arange(N).repeat(2)
    want = NTXentLoss(temperature=1 / SCALE)(torch.cat([a, b]), labels)
    assert_same(protoclip.nt_xent(unit(a), unit(b), SCALE), want, (a, b))


def test_nt_xent_of_ids_as_positives_is_metric_learnings_sup_con():
    a, b, ids = rows(), rows(seed=1), torch.arange(N) % 7
    want = SupConLoss(temperature=1 / SCALE)(torch.cat([a, b]), ids.repeat(2))
    got = protoclip.nt_xent(unit(a), unit(b), SCALE, ids=ids, same_id="positive")
    assert_same(got, want, (a, b))


def test_nt_xent_without_negatives_of_the_same_id_is_metric_learnings():
    """Its positives and negatives as pairs of indices: (anchor, positive), (anchor, negative)."""
    a, b, ids = rows(), rows(seed=1), torch.arange(N) % 7
    view, every = torch.arange(2 * N), ids.repeat(2)
    anchor, negative = (every[:, None] != every).nonzero(as_tuple=True)
    told = view, view.roll(N), anchor, negative
    want = NTXentLoss(temperature=1 / SCALE)(torch.cat([a, b]), indices_tuple=told)
    assert_same(protoclip.nt_xent(unit(a), unit(b), SCALE, ids=ids), want, (a, b))


def test_sup_con_is_metric_learnings():
    """Every row has a positive, a negative and a loss above 0, else its reducer drops rows."""
    x, labels = rows(), torch.arange(N) % 7
    want = SupConLoss(temperature=1 / SCALE)(x, labels)
    assert_same(protoclip.sup_con(unit(x), labels, SCALE), want, (x,))


def test_open_clip_with_the_other_logits_of_an_id_at_minus_infinity(monkeypatch):
    x, y, ids = rows(), rows(seed=1), torch.randint(20, (N,))
    scale = torch.tensor(SCALE, requires_grad=True)
    theirs = open_clip_loss.ClipLoss()
    others = (ids[:, None] == ids).fill_diagonal_(False)
    plain = theirs.get_logits

    def masked(*args, **kwargs):
        return [logits.masked_fill(others, -math.inf) for logits in plain(*args, **kwargs)]

    monkeypatch.setattr(theirs, "get_logits", masked)
    ours = protoclip.ClipLoss()(x, y, scale, ids=ids)
    assert_same(ours, theirs(x, y, scale), (x, y, scale))
    assert not torch.allclose(ours, protoclip.ClipLoss()(x, y, scale))


def test_dpr_of_rows_that_are_not_unit():
    query, keys = rows(length=3.0), rows(3 * N, seed=1, length=2.0)
    own = 3 * torch.arange(N)  # each query's passages in a row, its positive first
    want = F.nll_loss(F.log_softmax(query @ keys.T, dim=1), own)
    assert_same(protoclip.contrastive(query, keys, 1.0, positives=own), want, (query, keys))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_recommenders_retrieval_task(weighted):
    """TensorFlow Recommenders: logQ, accidental hits removed, weights, sum."""
    user, item, ids = rows(), rows(seed=1), torch.randint(30, (N,))
    q, weights = torch.rand(N) + 0.01, torch.rand(N) if weighted else torch.ones(N)
    logits = SCALE * user @ item.T - q.log()
    hits = (ids[:, None] == ids).fill_diagonal_(False)
    logits = logits.masked_fill(hits, torch.finfo(torch.float32).min / 100)
    want = (F.cross_entropy(logits, torch.arange(N), reduction="none") * weights).sum()
    got = protoclip.contrastive(
        user, item, SCALE, key_ids=ids, key_bias=-q.log(), weights=weights, reduction="sum"
    )
    assert_same(got, want, (user, item))


def test_negatives_of_each_query_by_logaddexp():
    query, keys = rows(), rows(seed=1)
    own = F.normalize(torch.randn(N, 4, D), dim=2).requires_grad_()
    others = SCALE * torch.einsum("nd,nhd->nh", query, own)
    level, positive = protoclip.contrastive_parts(query, keys, SCALE)
    got = (torch.logaddexp(level, others.logsumexp(1)) - positive).mean()
    logits = torch.cat([SCALE * query @ keys.T, others], dim=1)
    assert_same(got, F.cross_entropy(logits, torch.arange(N)), (query, keys, own))
