"""prototype_cross_entropy and soft_targets: by hand, against the authors' own form, edges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from budget import leaf, loss_and_gradients, usable
from torch import Tensor

import protoclip


def unit(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(shape, dtype=dtype), dim=-1)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 0.0])
@pytest.mark.parametrize("logit_scale", [1.0, 14.3, 100.0])
def test_the_loss_is_the_authors_formulation_in_fp64(
    temperature: float, logit_scale: float
) -> None:
    """K logits a sample, a teacher softmax over the source's centroids of the sample's cluster,
    cross-entropy with probabilities."""
    torch.manual_seed(0)
    leaves = {"features": leaf(unit(23, 8)), "logit_scale": leaf(logit_scale, torch.float64)}
    prototypes = 0.9 * unit(11, 8)
    source = 0.8 * unit(11, 5)
    labels = torch.randint(0, 11, (23,))
    ours = protoclip.prototype_cross_entropy(
        leaves["features"],
        prototypes,
        labels,
        leaves["logit_scale"],
        targets=protoclip.soft_targets(source, prototypes, temperature),
    )
    logits = leaves["logit_scale"] * leaves["features"] @ prototypes.T
    if temperature > 0:
        probabilities = torch.softmax(source[labels] @ source.T / temperature, dim=1)
    else:
        probabilities = F.one_hot(labels, 11).double()
    theirs = -(probabilities * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(
        loss_and_gradients(ours, **leaves),
        loss_and_gradients(theirs, **leaves),
        atol=1e-12,
        rtol=0,
    )


each_backend = pytest.mark.parametrize(
    "backend", [backend for backend in usable("soft_targets") if backend != "triton"]
)


@each_backend
def test_the_loss_of_two_prototypes_by_hand(backend: str) -> None:
    features = torch.tensor([[1.0, 0.0]])
    loss = protoclip.prototype_cross_entropy(
        features, torch.eye(2), torch.tensor([1]), 2.0, backend=backend
    )
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 1), rel=1e-6)


@each_backend
def test_soft_targets_of_two_prototypes_by_hand(backend: str) -> None:
    """At temperature 0.5 the logits are 2 and 0."""
    prototypes = torch.tensor([[1.0], [3.0]])
    targets = protoclip.soft_targets(torch.eye(2), prototypes, 0.5, backend=backend)
    p = 1 / (1 + math.exp(-2.0))
    expected = torch.tensor([[p * 1 + (1 - p) * 3], [(1 - p) * 1 + p * 3]])
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_of_trainable_prototypes_are_those_of_differences(soft: bool) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (7,))
    targets = torch.randn(5, 4, dtype=torch.float64) if soft else None

    def loss(features: Tensor, prototypes: Tensor, logit_scale: Tensor) -> Tensor:
        return protoclip.prototype_cross_entropy(
            features, prototypes, labels, logit_scale, targets=targets
        )

    leaves = (leaf(unit(7, 4)), leaf(unit(5, 4)), leaf(3.0, torch.float64))
    assert torch.autograd.gradcheck(loss, leaves)
