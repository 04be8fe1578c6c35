"""Losses and gradients over 1 to 4 ranks are those of one process with the whole batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from ranks import on_ranks

import protoclip
from protoclip import contrastive, contrastive_parts, distributed
from protoclip.distributed import GlobalBatchNorm1d, find_rank
from protoclip.losses import (
    global_contrastive,
    global_contrastive_parts,
    global_info_nce,
    global_sigmoid_loss,
    similarity_distillation,
)
from protoclip.model import Encoded
from protoclip.ops import sigmoid_loss

G, D = 96, 20  # of 1, 2, 3 and 4 equal shares
KINDS = [
    (torch.float64, "reference", 3.0),
    (torch.float64, "reference", 100.0),
    (torch.float32, "auto", 14.3),
    (torch.float32, "auto", 100.0),
    (torch.bfloat16, "auto", 14.3),
]


IDS = torch.randint(30, (G, 2), generator=torch.Generator().manual_seed(0))
# the loss of one process and over ranks, what both are told beside the ids
LOSSES = [
    (protoclip.info_nce, global_info_nce, {}),
    (sigmoid_loss, global_sigmoid_loss, {}),
    (protoclip.info_nce, global_info_nce, {"same_id": "exclude"}),
    (protoclip.info_nce, global_info_nce, {"same_id": "positive"}),
    (sigmoid_loss, global_sigmoid_loss, {"same_id": "positive"}),
    (sigmoid_loss, global_sigmoid_loss, {"same_id": "exclude"}),
]


def relations():
    """What ``contrastive`` is told of G queries and G keys, or 2 G: two of each query."""
    random = torch.Generator().manual_seed(5)
    own, bias = torch.randint(2 * G, (G,), generator=random), torch.randn(2 * G, generator=random)
    own[:30:2], bias[::7] = -100, -torch.inf  # of several ranks, unequally many
    ids = torch.randint(40, (2 * G,), generator=random)
    weights = {"weights": torch.rand(G, generator=random)}
    negatives = F.normalize(torch.randn(G, 2, D, generator=random), dim=-1)
    every = {"query_ids": ids[::2], "key_ids": ids, "exclude": own.roll(1), "key_bias": bias}
    return [
        {},
        weights | {"key_ids": ids[:G], "key_bias": bias[:G]},
        {"positives": own, "key_ids": ids},
        weights | every | {"positives": own},
        weights | every | {"same_id": "positive"},
        weights | {"label_smoothing": 0.2},
        every | {"positives": several(random), "label_smoothing": 0.2, "negatives": negatives},
    ]


def several(random):
    """Positions [G, 3] of own keys among 2 G, some of them padding, of some queries all."""
    own = torch.randint(2 * G, (G, 3), generator=random)
    own[torch.rand(G, 3, generator=random) < 0.3] = -100
    own[::9] = -100
    return own


def contrastive_and_gradients(kind, over_ranks, own=slice(None), wide=None):
    """As ``losses_and_gradients``; the parts of the last relations are weighed into one number."""
    dtype, backend, scale = kind
    x, y = (t.to(wide or dtype) for t in features(dtype))
    scalar = torch.promote_types(x.dtype, torch.float32)
    calls = [(contrastive, global_contrastive, told) for told in relations()]
    calls += [(contrastive_parts, global_contrastive_parts, told) for told in relations()[3:5]]
    for one, of_ranks, told in calls:
        many = len(told.get("key_ids", y)) > G
        keys = torch.stack([y, -x], dim=1).flatten(0, 1) if many else y
        share = slice(2 * own.start, 2 * own.stop) if many and own.start is not None else own
        mine = {"key_ids": share, "key_bias": share}
        told = {
            k: v[mine.get(k, own)] if isinstance(v, torch.Tensor) else v for k, v in told.items()
        }
        weights = told.pop("weights", None) if one is contrastive_parts else None
        leaves = [x[own], keys[share], torch.tensor(scale, dtype=scalar)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        for name, kind_of_leaf in (("key_bias", scalar), ("negatives", x.dtype)):
            if name in told:
                told[name] = told[name].to(kind_of_leaf, copy=True).requires_grad_()
                leaves.append(told[name])
        value = (of_ranks if over_ranks else one)(*leaves[:3], **told, backend=backend)
        if weights is not None:
            value = (weights * (value[0] - 2 * value[1])).mean()
        value.backward()
        yield value.detach(), *(t.grad for t in leaves)


def features(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    x = F.normalize(torch.randn(G, D, dtype=torch.float64), dim=-1)
    y = F.normalize(x + 0.5 * torch.randn(G, D, dtype=torch.float64), dim=-1)
    return x.to(dtype), y.to(dtype)


def losses_and_gradients(kind, over_ranks, own=slice(None), wide=None):
    """Of each loss: it, and the gradients of x, y and the scalars."""
    dtype, backend, scale = kind
    for one, of_ranks, more in LOSSES:
        options = more | {"backend": backend} | ({"ids": IDS[own]} if more else {})
        values = [scale] if one is protoclip.info_nce else [scale, -10.0]
        inputs = [t[own].to(wide or dtype) for t in features(dtype)]
        scalar = torch.promote_types(wide or dtype, torch.float32)
        inputs += [torch.tensor(value, dtype=scalar) for value in values]
        leaves = [t.clone().requires_grad_() for t in inputs]
        value = (of_ranks if over_ranks else one)(*leaves, **options)
        value = value / (1 if len(values) == 1 else len(inputs[0]))
        value.backward()
        yield value.detach(), *(t.grad for t in leaves)


def of_rank():
    """All kinds, as DDP's mean over ranks makes them."""
    distributed.start(find_rank(), torch.device("cpu"), 60)
    ranks, own = distributed.world_size(), distributed.own_slice(G)
    results = []
    for kind in KINDS:
        for run in (losses_and_gradients, contrastive_and_gradients):
            for value, *grads in run(kind, True, own):
                means = [distributed.mean_over_ranks(value.double())]
                for grad in grads:
                    wide = grad.double()
                    rows = grad.ndim > 0
                    means += [all_rows(wide / ranks) if rows else distributed.mean_over_ranks(wide)]
                results.append([t.numpy() for t in means])
    results += [distillation(own), batch_norm(own), refusal()]
    distributed.stop()
    return results


def all_rows(rows):
    """The rows of all ranks."""
    return distributed.gather_rows(rows) if distributed.is_distributed() else rows


def batch_norm(own):
    """Output, gradients and running statistics of the heads' batch norm."""
    norm, x, w = norm_and_input()
    x = x[own].requires_grad_()
    y = norm(x)
    (w[own] * y).sum().backward()
    means = [distributed.sum_over_ranks(p.grad.clone()) for p in norm.parameters()]
    rows = [all_rows(t) for t in (y.detach(), x.grad)]
    return [t.numpy() for t in (*rows, *means, norm.running_mean, norm.running_var)]


def distillation(own):
    """The loss and the gradients of both students and of the scale."""
    students = [t[own].clone().requires_grad_() for t in features()]
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    teacher = features(seed=7)[0].float()[own]
    loss = similarity_distillation(Encoded(*students), teacher, scale, 0.2)
    loss.backward()
    ranks = distributed.world_size()
    rows = [all_rows(t.grad / ranks) for t in students]
    means = [distributed.mean_over_ranks(t) for t in (loss.detach(), scale.grad)]
    return [t.numpy() for t in (*means, *rows)]


def norm_and_input(kind=GlobalBatchNorm1d):
    torch.manual_seed(3)
    norm = kind(D).double()
    torch.nn.init.normal_(norm.weight)
    return norm, 5 + 2 * torch.randn(G, D).double(), torch.randn(G, D).double()


def refusal():
    try:
        global_info_nce(torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor(1.0))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_ranks_give_the_loss_and_gradients_of_the_whole_batch(ranks):
    found = on_ranks(ranks, of_rank)
    *results, distilled, norms, message = found[0]
    assert "one text per image" in message
    for got, want in zip(distilled, distillation(slice(None)), strict=True):
        assert np.abs(got - want).max() <= 1e-12 * max(1, np.abs(want).max())
    results = [[torch.from_numpy(a) for a in r] for r in results]
    size = len(results) // len(KINDS)
    kinds = [results[first : first + size] for first in range(0, len(results), size)]
    for (dtype, _, scale), found in zip(KINDS, kinds, strict=True):
        truths, bases = (
            [
                *losses_and_gradients((dtype, "reference", scale), False, wide=wide),
                *contrastive_and_gradients((dtype, "reference", scale), False, wide=wide),
            ]
            for wide in (torch.float64, None)
        )
        for case, (got, truth, base) in enumerate(zip(found, truths, bases, strict=True)):
            for number, (a, t, b) in enumerate(zip(got, truth, base, strict=True)):
                where = f"{dtype} {scale} loss {case} result {number} of {t.flatten()[0]:.3g}"
                if dtype == torch.float64:
                    assert (a - t).abs().max() <= 1e-12 * max(1, t.abs().max()), where
                else:  # a scalar's error is that of the logits it is made of
                    size = max(10 + scale, t.abs().item()) if a.ndim == 0 else None
                    assert_within_budget(a.to(b.dtype), t, b, where, magnitude=size)
    norm, x, w = norm_and_input(torch.nn.BatchNorm1d)
    x.requires_grad_()
    y = norm(x)
    (w * y).sum().backward()
    grads = [p.grad for p in norm.parameters()]
    want = y.detach(), x.grad, *grads, norm.running_mean, norm.running_var
    for a, b in zip(norms, want, strict=True):
        assert (torch.from_numpy(a) - b).abs().max() <= 1e-12 * max(1, b.abs().max())


def unequal_batches(kind, equal):
    """What a loss says to batches of 6 and 5 (of rank 1), and its gathers in two calls."""
    info = find_rank()
    distributed.start(info, torch.device("cpu"), 60)
    gathers, gather = [], distributed.gather_rows
    distributed.gather_rows = lambda rows: gathers.append(len(rows)) or gather(rows)
    losses = {"ClipLoss": protoclip.ClipLoss, "SigLipLoss": protoclip.SigLipLoss}
    loss = losses[kind](rank=info.rank, world_size=info.world_size)
    x = F.normalize(torch.randn(6 if equal else 6 - info.rank, D), dim=1)
    said = ""
    try:
        counts = []
        for _ in range(2):
            before = len(gathers)
            loss(x, x, torch.tensor(14.0))
            counts.append(gathers[before:])
    except ValueError as error:
        said = str(error)
    distributed.stop()
    return said, counts


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_unequal_batches_are_a_sentence_on_every_rank(kind):
    for said, _ in on_ranks(2, unequal_batches, kind, False):
        assert said.startswith(f"{kind}: expected as many rows on every rank, got 6, 5 on ranks")
        assert "drop_last=True" in said
    for said, (first, second) in on_ranks(2, unequal_batches, kind, True):
        assert not said and first.count(1) == 1 and 1 not in second  # looked at once
