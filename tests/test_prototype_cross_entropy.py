"""prototype_cross_entropy and soft_targets: by hand, against the authors' own form, edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from budget import usable

import protoclip


def authors_loss(h, prototypes, source, labels, scale, temperature):
    """The loss as the authors state it: K logits a sample, a teacher softmax over the source's
    centroids of the sample's cluster, cross-entropy with probabilities."""
    logits = scale * h @ prototypes.T
    if temperature <= 0:
        target = F.one_hot(labels, len(prototypes)).to(h.dtype)
    else:
        target = torch.softmax(source[labels] @ source.T / temperature, dim=1)
    return -(target * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


def _unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 0.0])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_equals_the_authors_formulation_in_fp64(temperature, scale):
    torch.manual_seed(0)
    h, c, source = _unit(23, 8).requires_grad_(), 0.9 * _unit(11, 8), 0.8 * _unit(11, 5)
    labels = torch.randint(0, 11, (23,))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    targets = protoclip.soft_targets(source, c, temperature)
    got = protoclip.prototype_cross_entropy(h, c, labels, s, targets=targets)
    want = authors_loss(h, c, source, labels, s, temperature)
    assert abs(got - want) < 1e-12
    for a, b in zip(
        torch.autograd.grad(got, (h, s)), torch.autograd.grad(want, (h, s)), strict=True
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("backend", [b for b in usable("soft_targets") if b != "triton"])
def test_two_prototypes_by_hand(backend):
    h, c = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    got = protoclip.prototype_cross_entropy(h, c, torch.tensor([1]), 2.0, backend=backend)
    assert got.item() == pytest.approx(math.log(math.exp(2) + 1), rel=1e-6)
    p = 1 / (1 + math.exp(-2.0))  # tau = 0.5: logits 2 and 0
    want = torch.tensor([[p * 1 + (1 - p) * 3], [(1 - p) * 1 + p * 3]])
    got = protoclip.soft_targets(c, torch.tensor([[1.0], [3.0]]), 0.5, backend=backend)
    torch.testing.assert_close(got, want)


def test_ignored_samples_count_for_nothing():
    torch.manual_seed(0)
    h, c = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4)
    labels = torch.tensor([0, -100, 2, 1, -100, 0])
    used = labels >= 0
    for targets in (None, torch.randn(3, 4)):
        rows = protoclip.prototype_cross_entropy(
            h, c, labels, 5.0, targets=targets, reduction="none"
        )
        assert (rows[~used] == 0).all() and (rows[used] != 0).all()
        mean = protoclip.prototype_cross_entropy(h, c, labels, 5.0, targets=targets)
        kept = protoclip.prototype_cross_entropy(h[used], c, labels[used], 5.0, targets=targets)
        torch.testing.assert_close(mean, kept)
        (grad,) = torch.autograd.grad(mean, h)
        assert (grad[~used] == 0).all()
        ignored = protoclip.prototype_cross_entropy(h, c, 0 * labels - 100, 5.0, targets=targets)
        assert ignored == 0


def test_gradient_of_trainable_prototypes():
    torch.manual_seed(0)
    h, c = _unit(7, 4).requires_grad_(), _unit(5, 4).requires_grad_()
    labels, s = torch.randint(0, 5, (7,)), torch.tensor(3.0, dtype=torch.float64)
    targets = torch.randn(5, 4, dtype=torch.float64)
    for m in (None, targets):
        assert torch.autograd.gradcheck(
            lambda h, c, s, m=m: protoclip.prototype_cross_entropy(h, c, labels, s, targets=m),
            (h, c, s.clone().requires_grad_()),
        )
