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
# scalars beside x and y, the loss of one process and over ranks, what both are told
LOSSES = [
    (1, protoclip.info_nce, global_info_nce, {}),
    (2, sigmoid_loss, global_sigmoid_loss, {}),
    (1, protoclip.info_nce, global_info_nce, {"same_id": "exclude"}),
    (1, protoclip.info_nce, global_info_nce, {"same_id": "positive"}),
    (2, sigmoid_loss, global_sigmoid_loss, {"same_id": "positive"}),
    (2, sigmoid_loss, global_sigmoid_loss, {"same_id": "exclude"}),
]


def features(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    x = F.normalize(torch.randn(G, D, dtype=torch.float64), dim=-1)
    y = F.normalize(x + 0.5 * torch.randn(G, D, dtype=torch.float64), dim=-1)
    return x.to(dtype), y.to(dtype)


def whole(dtype, backend, scale, wide=None):
    """One process: InfoNCE and SigLIP, each loss and gradients of x, y and the scalars."""
    inputs = [t.to(wide or dtype) for t in features(dtype)]
    kind = torch.promote_types(wide or dtype, torch.float32)
    scalars = [torch.tensor(v, dtype=kind) for v in (scale, -10.0)]
    out = []
    for count, loss, _, options in LOSSES:
        options = options | {"backend": backend} | ({"ids": IDS} if options else {})
        leaves = [t.clone().requires_grad_() for t in (*inputs, *scalars[:count])]
        value = loss(*leaves, **options) / (1 if count == 1 else G)
        value.backward()
        out.append([value.detach(), *(t.grad for t in leaves)])
    return out


def of_rank():
    """What ``whole`` returns, as DDP's mean over ranks makes it, for every kind."""
    distributed.start(find_rank(), torch.device("cpu"), 60)
    ranks, own = distributed.world_size(), distributed.own_slice(G)
    results = []
    for dtype, backend, scale in KINDS:
        kind = torch.promote_types(dtype, torch.float32)
        scalars = [torch.tensor(v, dtype=kind) for v in (scale, -10.0)]
        for count, _, loss, options in LOSSES:
            options = options | {"backend": backend} | ({"ids": IDS[own]} if options else {})
            x, y = (t[own].clone() for t in features(dtype))
            leaves = [t.requires_grad_() for t in (x, y, *(s.clone() for s in scalars[:count]))]
            value = loss(*leaves, **options) / (1 if count == 1 else len(x))
            value.backward()
            rows = [all_rows(t.grad.double() / ranks) for t in leaves[:2]]
            scalars_of = value.detach(), *(t.grad for t in leaves[2:])
            means = [distributed.mean_over_ranks(t.double()) for t in scalars_of]
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
    for (dtype, _, scale), pair in zip(KINDS, kinds, strict=True):
        truths = whole(dtype, "reference", scale, torch.float64)
        bases = whole(dtype, "reference", scale)
        for case, (got, truth, base) in enumerate(zip(pair, truths, bases, strict=True)):
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
