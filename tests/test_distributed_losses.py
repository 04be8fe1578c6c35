"""Losses and gradients over 1 to 4 ranks are those of one process with the whole batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from ranks import on_ranks

import protoclip
from protoclip import distributed
from protoclip.distributed import GlobalBatchNorm1d, find_rank
from protoclip.losses import global_info_nce, global_sigmoid_loss, similarity_distillation
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
        found = losses_and_gradients(kind, True, own)
        for value, dx, dy, *scalars in found:
            rows = [all_rows(t.double() / ranks) for t in (dx, dy)]
            means = [distributed.mean_over_ranks(t.double()) for t in (value, *scalars)]
            results.append([t.numpy() for t in (means[0], *rows, *means[1:])])
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_give_the_loss_and_gradients_of_the_whole_batch(ranks):
    found = on_ranks(ranks, of_rank)
    *results, distilled, norms, message = found[0]
    assert "one text per image" in message
    for got, want in zip(distilled, distillation(slice(None)), strict=True):
        assert np.abs(got - want).max() <= 1e-12 * max(1, np.abs(want).max())
    results = [[torch.from_numpy(a) for a in r] for r in results]
    size = len(LOSSES)
    kinds = [results[first : first + size] for first in range(0, len(results), size)]
    for (dtype, _, scale), found in zip(KINDS, kinds, strict=True):
        truths = losses_and_gradients((dtype, "reference", scale), False, wide=torch.float64)
        bases = losses_and_gradients((dtype, "reference", scale), False)
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
