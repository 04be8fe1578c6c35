"""prototype_cross_entropy and soft_targets, beyond what every op is asked: many prototypes, sums
that cancel, ties and what is not finite."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from op_table import (
    BF16,
    FP16,
    FP32,
    Draw,
    Size,
    assert_as_formula,
    make_prototype_cross_entropy,
    prototype_cross_entropy,
)
from room import run_in_room
from torch import Tensor

import protoclip
from protoclip.model import processor_multiplies_bf16
from protoclip.ops import Bank

REASON = protoclip.backends("prototype_cross_entropy")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
unit = Draw(0).unit


@each_dtype
@pytest.mark.parametrize("d, logit_scale", [(8, 1.0), (64, 14.3), (96, 100.0)])
def test_twenty_thousand_prototypes_are_within_budget(
    d: int, logit_scale: float, dtype: torch.dtype
) -> None:
    prototypes = unit(20_000, d).to(dtype)
    labels = torch.randint(0, 20_000, (23,))
    for targets in (None, 0.9 * prototypes.flip(0)):
        call = prototype_cross_entropy(
            unit(23, d).to(dtype), prototypes, labels, logit_scale, targets=targets
        )
        assert_as_formula(call, "cpu")


@each_dtype
def test_prototypes_that_are_almost_alike_are_within_budget(dtype: torch.dtype) -> None:
    """Prototypes of cosine 0.99: what of the weights' rounding is common to them cancels."""
    shared = 10 * unit(1, 64)
    call = prototype_cross_entropy(
        F.normalize(shared + unit(90, 64), dim=-1).to(dtype),
        F.normalize(shared + unit(300, 64), dim=-1).to(dtype),
        torch.randint(0, 300, (90,)),
        100.0,
    )
    assert_as_formula(call, "cpu")


@each_dtype
@pytest.mark.parametrize("k, d, logit_scale", [(257, 64, 14.3), (300, 512, 14.3), (257, 64, 100.0)])
def test_soft_targets_that_the_features_have_reached_are_within_budget(
    k: int, d: int, logit_scale: float, dtype: torch.dtype
) -> None:
    """Trained to the end: the expected prototype is the target; all of dfeatures is rounding."""
    prototypes = unit(k, d).to(dtype)
    exact = prototypes.double()
    targets = torch.softmax(logit_scale * exact @ exact.T, dim=1) @ exact
    call = prototype_cross_entropy(
        prototypes, prototypes, torch.arange(k), logit_scale, targets=targets.to(dtype)
    )
    assert_as_formula(call, "cpu")


@each_dtype
def test_a_loss_near_zero_does_not_cancel(dtype: torch.dtype) -> None:
    prototypes = F.normalize(torch.eye(300) + 0.03 * torch.rand(300, 300)).to(dtype)
    for logit_scale in (20.0, 100.0):
        # Weights below 2^-126 are flushed to zero.
        size = logit_scale * 2**-126 / torch.finfo(torch.float32).eps
        call = prototype_cross_entropy(prototypes, prototypes, torch.arange(300), logit_scale)
        assert_as_formula(call, "cpu", size=size)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nearest_is_chosen_in_more_digits_than_the_features_have(backend: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 40).bfloat16()
    prototypes = torch.randn(500, 40).bfloat16()
    bank = Bank(prototypes, torch.zeros(64, dtype=torch.int64))
    losses = protoclip.prototype_losses(features, [bank], 10.0, backend=backend)
    assert torch.equal(losses.nearest[0], (features.double() @ prototypes.double().T).argmax(1))


@pytest.mark.parametrize("temperature", [0, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_dtype
def test_non_finite_input_makes_the_losses_it_reaches_non_finite(
    dtype: torch.dtype, bad: float, temperature: float
) -> None:
    call = make_prototype_cross_entropy(Size(150, 700, 20), dtype, temperature=temperature)
    labels = call.constants["labels"]
    used = labels != -100

    def finite(name: str, row: int) -> Tensor:
        values = (call.leaves | call.constants)[name].clone()
        values[row, 3] = bad
        return call.run("cpu", **{name: values}).isfinite()

    for row in (0, 149):
        rows = finite("features", row)
        assert not rows[row] and rows.sum() == 149
    for row in (0, 256, 699):
        rows = finite("prototypes", row)
        assert not rows[used].any() and rows[~used].all()
    if temperature:
        assert not finite("targets", int(labels[0]))[0]


@pytest.mark.parametrize("temperature, bad", product([0, 0.1], [math.nan, math.inf]))
def test_non_finite_features_without_a_prototype_have_a_non_finite_gradient(
    bad: float, temperature: float
) -> None:
    call = make_prototype_cross_entropy(
        Size(150, 300, 20), FP32, temperature=temperature, reduction="mean"
    )
    left_out = int((call.constants["labels"] == -100).nonzero()[0])
    features = call.leaves["features"].clone()
    features[left_out, 3] = bad
    features.requires_grad_()
    loss = call.run("cpu", features=features)
    loss.backward()
    finite = features.grad.isfinite().all(1)
    assert loss.isfinite() and not finite[left_out] and finite.sum() == 149


MILLION = """
import math, pytest, torch, protoclip
torch.manual_seed(0)
h = torch.nn.functional.normalize(torch.randn(64, 128), dim=-1).bfloat16().requires_grad_()
few = torch.nn.functional.normalize(torch.randn(1000, 128), dim=-1).bfloat16()
labels = torch.randint(0, 1000, (64,))
s = torch.tensor(20.0, requires_grad=True)
small = protoclip.prototype_cross_entropy(h, few, labels, s, backend="cpu")  # libraries, JIT
want = torch.autograd.grad(small, (h, s))
c = few.repeat(1000, 1)
allow(16)
loss = protoclip.prototype_cross_entropy(h, c, labels, s, targets=c, backend="cpu")
got = torch.autograd.grad(loss, (h, s))
assert abs(loss - small - math.log(1000)) < 1e-5, (loss, small)
for a, b in zip(got, want):
    assert (a - b).abs().max() <= 0.01 * b.abs().max()
with pytest.raises(RuntimeError, match="memory"):
    protoclip.prototype_cross_entropy(h, c, labels, s, targets=c, backend="reference")
"""


@pytest.mark.skipif(not processor_multiplies_bf16(), reason="this CPU widens bf16 rows to fp32")
def test_a_million_prototypes_need_no_more_memory() -> None:
    """[1,000,000, 128] prototypes, a thousand times the same thousand, so the answer is known.

    16 MiB are allowed; one [64, 1,000,000] matrix would be 244.
    """
    run_in_room(MILLION)
