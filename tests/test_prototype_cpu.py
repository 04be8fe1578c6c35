"""prototype_cross_entropy and soft_targets in C++: within the error budget, and their edges."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import assert_same_bits, assert_within_budget, leaf, loss_and_gradients, on_threads
from prototype_problem import (
    DTYPES,
    TEMPERATURES,
    Problem,
    assert_problem_within_budget,
    assert_random_problem_within_budget,
    computed,
    plain,
    random_problem,
    unit,
)
from room import run_in_room
from torch import Tensor

import protoclip
from protoclip.model import processor_multiplies_bf16
from protoclip.ops import Bank

REASON = protoclip.backends("prototype_cross_entropy")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Shape(NamedTuple):
    n: int
    d: int
    logit_scale: float


# N: none, one, two, five, a ragged tile, a tile and three. D: odd ones too, for pairs of bf16.
SHAPES = [
    Shape(0, 64, 14.3), Shape(1, 512, 14.3), Shape(2, 128, 1.0), Shape(5, 256, 100.0),
    Shape(37, 1, 14.3), Shape(37, 64, 14.3), Shape(37, 123, 100.0), Shape(37, 128, 100.0),
    Shape(67, 512, 100.0), Shape(131, 8, 1.0), Shape(131, 8, 100.0),
]  # fmt: skip


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 257, 700])  # one, two, past one tile of 256, past two
def test_loss_and_gradients_are_within_budget(
    k: int, dtype: torch.dtype, temperature: float
) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        assert_random_problem_within_budget(
            shape.n,
            k,
            shape.d,
            dtype=dtype,
            temperature=temperature,
            logit_scale=shape.logit_scale,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, logit_scale", [(8, 1.0), (64, 14.3), (512, 100.0)])
def test_twenty_thousand_prototypes_are_within_budget(
    d: int, logit_scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for temperature in TEMPERATURES if d == 8 else TEMPERATURES[1:2]:
        assert_random_problem_within_budget(
            23, 20_000, d, dtype=dtype, temperature=temperature, logit_scale=logit_scale
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prototypes_that_are_almost_alike_are_within_budget(dtype: torch.dtype) -> None:
    """Prototypes of cosine 0.99: what of the weights' rounding is common to them cancels."""
    torch.manual_seed(0)
    shared = 10 * unit(1, 64)
    problem = Problem(
        features=F.normalize(shared + unit(90, 64), dim=-1).to(dtype),
        prototypes=F.normalize(shared + unit(300, 64), dim=-1).to(dtype),
        labels=torch.randint(0, 300, (90,)),
        logit_scale=100.0,
    )
    assert_problem_within_budget(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, d, logit_scale", [(257, 64, 14.3), (300, 512, 14.3), (257, 64, 100.0)])
def test_soft_targets_that_the_features_have_reached_are_within_budget(
    k: int, d: int, logit_scale: float, dtype: torch.dtype
) -> None:
    """Trained to the end: the expected prototype is the target; all of dfeatures is rounding."""
    torch.manual_seed(0)
    prototypes = unit(k, d, dtype=dtype)
    exact = prototypes.double()
    targets = torch.softmax(logit_scale * exact @ exact.T, dim=1) @ exact
    problem = Problem(
        features=prototypes,
        prototypes=prototypes,
        labels=torch.arange(k),
        targets=targets.to(dtype),
        logit_scale=logit_scale,
        weights=torch.ones(k) / k,
    )
    assert_problem_within_budget(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_near_zero_does_not_cancel(dtype: torch.dtype) -> None:
    prototypes = F.normalize(torch.eye(300) + 0.03 * torch.rand(300, 300)).to(dtype)
    for logit_scale in (20.0, 100.0):
        # Weights below 2^-126 are flushed to zero.
        size = logit_scale * 2**-126 / torch.finfo(torch.float32).eps
        problem = Problem(prototypes, prototypes, torch.arange(300), logit_scale=logit_scale)
        assert_problem_within_budget(problem, size=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "k, d_source, d", [(1, 1, 1), (2, 8, 64), (257, 64, 13), (700, 24, 128), (5_000, 16, 8)]
)
def test_soft_targets_are_within_budget(k: int, d_source: int, d: int, dtype: torch.dtype) -> None:
    """Of 5,000 clusters in 40 rows: the truth of all would be 200 MB."""
    torch.manual_seed(0)
    rows = torch.arange(0, k, 125 if k == 5_000 else 1)
    for temperature in TEMPERATURES[1:]:
        source = 0.9 * unit(k, d_source, dtype=dtype)
        prototypes = unit(k, d, dtype=dtype)

        def formula(
            wide: torch.dtype,
            source: Tensor = source,
            prototypes: Tensor = prototypes,
            temperature: float = temperature,
        ) -> Tensor:
            points = source.to(wide)
            shares = torch.softmax(points[rows] @ points.T / temperature, dim=1)
            return shares @ prototypes.to(wide)

        targets = protoclip.soft_targets(source, prototypes, temperature, backend="cpu")
        assert_within_budget(
            targets[rows],
            truth=formula(torch.float64),
            base=formula(dtype).float(),
            logit_scale=1 / temperature,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_banks_have_the_losses_of_one_call_each(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = unit(150, 24, dtype=dtype).requires_grad_()

    def random_bank(k: int, targets: Tensor | None = None) -> Bank:
        return Bank(unit(k, 24, dtype=dtype), torch.randint(0, k, (150,)), targets)

    banks = [random_bank(700), random_bank(7, unit(7, 24, dtype=dtype)), random_bank(257)]
    got = protoclip.prototype_losses(features, banks, 14.3, backend="cpu")
    (gradient,) = torch.autograd.grad(got.loss.sum(), features)
    expected_gradient = torch.zeros_like(gradient, dtype=torch.float32)
    for loss, nearest, bank in zip(got.loss, got.nearest, banks, strict=True):
        single = protoclip.prototype_cross_entropy(
            features, bank.prototypes, bank.labels, 14.3, targets=bank.targets, backend="cpu"
        )
        assert torch.equal(loss, single)
        expected_gradient += torch.autograd.grad(single, features)[0].float()
        logits = features.detach().double() @ bank.prototypes.double().T
        reached = logits.gather(1, nearest[:, None])[:, 0]
        assert (logits.amax(dim=1) - reached).max() <= 1e-6
    # Sums of bf16 gradients.
    torch.testing.assert_close(gradient.float(), expected_gradient, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("logit_scale, expected", [(10.0, [1, 0]), (0.0, [0, 0])])
def test_nearest_is_the_lowest_index_of_a_tie(logit_scale: float, expected: list[int]) -> None:
    prototypes = torch.eye(2).repeat(600, 1)  # every prototype 600 times, over many tiles
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    bank = Bank(prototypes, torch.tensor([0, 1]))
    scale = torch.tensor(logit_scale)
    losses = protoclip.prototype_losses(features, [bank], scale, backend="cpu")
    assert losses.nearest[0].tolist() == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nearest_is_chosen_in_more_digits_than_the_features_have(backend: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(64, 40).bfloat16()
    prototypes = torch.randn(500, 40).bfloat16()
    bank = Bank(prototypes, torch.zeros(64, dtype=torch.int64))
    losses = protoclip.prototype_losses(features, [bank], 10.0, backend=backend)
    assert torch.equal(losses.nearest[0], (features.double() @ prototypes.double().T).argmax(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [3, 20])
def test_a_scale_of_zero_still_has_a_gradient(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    problem = random_problem(n, 300, 16, dtype=dtype, temperature=0.0, logit_scale=0.0)
    got = computed(problem, "cpu")["dlogit_scale"]
    truth = plain(problem, torch.float64).values["dlogit_scale"]
    assert abs(got - truth) <= 1e-5 * truth.abs()


@pytest.mark.parametrize("n, k", [(777, 1500), (1100, 300), (50, 3000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(n: int, k: int, dtype: torch.dtype) -> None:
    problem = random_problem(n, k, 40, dtype=dtype, temperature=0.1, logit_scale=20.0)

    def run() -> dict[str, Tensor]:
        points = problem.prototypes
        targets = protoclip.soft_targets(points, points, 0.1, backend="cpu")
        return computed(problem, "cpu") | {"targets": targets}

    first, *repeated = on_threads(run, (torch.get_num_threads(), 1, 2, 3))
    for again in repeated:
        assert_same_bits(again, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    problem = random_problem(60, 150, 34, dtype=dtype, temperature=0.1, logit_scale=20.0)
    assert problem.targets is not None
    wide = torch.full((150, 73), 9.0, dtype=dtype)
    wide[:, 5:39] = problem.prototypes
    views = replace(
        problem,
        features=problem.features.T.contiguous().T,
        prototypes=wide[:, 5:39],
        labels=problem.labels.repeat_interleave(2)[::2],
        targets=problem.targets.T.contiguous().T,
    )
    assert not any(
        view.is_contiguous()
        for view in (views.features, views.prototypes, views.labels, views.targets)
    )
    assert_same_bits(computed(views, "cpu"), computed(problem, "cpu"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_makes_the_losses_it_reaches_non_finite(
    dtype: torch.dtype, bad: float
) -> None:
    torch.manual_seed(0)
    problem = random_problem(150, 700, 20, dtype=dtype, temperature=0.1, logit_scale=10.0)
    soft_targets = problem.targets
    assert soft_targets is not None
    hard = replace(problem, targets=None)
    used = problem.labels != -100

    def finite(problem: Problem) -> Tensor:
        return protoclip.prototype_cross_entropy(
            problem.features,
            problem.prototypes,
            problem.labels,
            problem.logit_scale,
            targets=problem.targets,
            reduction="none",
            backend="cpu",
        ).isfinite()

    def spoiled(values: Tensor, row: int) -> Tensor:
        values = values.clone()
        values[row, 3] = bad
        return values

    for row, form in product((0, 149), (hard, problem)):
        rows = finite(replace(form, features=spoiled(form.features, row)))
        assert not rows[row] and rows.sum() == 149
    for row, form in product((0, 256, 699), (hard, problem)):
        rows = finite(replace(form, prototypes=spoiled(form.prototypes, row)))
        assert not rows[used].any() and rows[~used].all()
    looked_up = int(problem.labels[0])
    assert not finite(replace(problem, targets=spoiled(soft_targets, looked_up)))[0]
    assert not finite(replace(hard, logit_scale=torch.tensor(bad)))[used].any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_features_without_a_prototype_have_a_non_finite_gradient(
    bad: float, soft: bool
) -> None:
    torch.manual_seed(0)
    problem = random_problem(150, 300, 20, dtype=torch.float32, temperature=0.1, logit_scale=10.0)
    left_out = int((problem.labels == -100).nonzero()[0])
    features = problem.features.clone()
    features[left_out, 3] = bad
    features.requires_grad_()
    loss = protoclip.prototype_cross_entropy(
        features,
        problem.prototypes,
        problem.labels,
        problem.logit_scale,
        targets=problem.targets if soft else None,
        backend="cpu",
    )
    loss.backward()
    finite = features.grad.isfinite().all(1)
    assert loss.isfinite() and not finite[left_out] and finite.sum() == 149


@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize(
    "backend, soft", [("cpu", False), ("reference", False), ("reference", True)]
)
def test_labels_out_of_range_are_refused(backend: str, soft: bool, label: int) -> None:
    features = unit(2, 3)
    prototypes = unit(5, 3)
    words = rf"labels in \[0, K\) or -100, got {label} at row 1"
    with pytest.raises(ValueError, match=words):
        protoclip.prototype_cross_entropy(
            features,
            prototypes,
            torch.tensor([0, label]),
            1.0,
            targets=prototypes if soft else None,
            backend=backend,
        )


@pytest.mark.parametrize("n, k, d", [(0, 3, 8), (0, 0, 8), (4, 3, 0), (4, 300, 0), (4, 1, 8)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_no_prototypes_and_no_features_have_a_loss(
    n: int, k: int, d: int, dtype: torch.dtype
) -> None:
    features = torch.ones(n, d, dtype=dtype)
    prototypes = torch.ones(k, d, dtype=dtype, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64)
    loss = protoclip.prototype_cross_entropy(features, prototypes, labels, 5.0, backend="cpu")
    assert loss.item() == pytest.approx(math.log(k) if n else 0.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, prototypes)
    assert gradient.shape == (k, d) and (gradient == 0).all()
    points = prototypes.detach()
    assert protoclip.soft_targets(points, points, 0.1, backend="cpu").shape == (k, d)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def trained(request: pytest.FixtureRequest) -> Problem:
    """Six features, five prototypes and the scale as leaves."""
    torch.manual_seed(0)
    return Problem(
        features=leaf(unit(6, 8, dtype=request.param)),
        prototypes=leaf(unit(5, 8, dtype=request.param)),
        labels=torch.randint(0, 5, (6,)),
        logit_scale=leaf(3.0),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
def test_opcheck_accepts_the_op(trained: Problem, gradients: bool, reduction: str) -> None:
    def argument(tensor: Tensor) -> Tensor:
        return tensor if gradients else tensor.detach()

    arguments = {
        "features": argument(trained.features),
        "prototypes": argument(trained.prototypes),
        "targets": trained.prototypes.detach()[:0],  # hard labels
        "labels": trained.labels,
        "logit_scale": argument(trained.logit_scale),
        "need_grad": gradients,
        "need_nearest": gradients,
        "need_scale_gradient": gradients,
        "reduction": reduction,
        "backend": "cpu",
    }
    torch.library.opcheck(torch.ops.protoclip.prototype_cross_entropy, (), arguments)


def test_opcheck_accepts_the_op_that_scales_gradients() -> None:
    arguments = {
        "grad": torch.tensor(2.0),
        "divisor": torch.tensor(2.0),
        "logit_scale": torch.tensor(10.0),
        "gradient": torch.ones(6, 8),
        "scale_gradient": torch.ones(6),
        "features": torch.ones(6, 8),
        "backend": "cpu",
    }
    torch.library.opcheck(torch.ops.protoclip.prototype_cross_entropy_scale, (), arguments)


def test_compiled_code_and_autocast_change_no_bit(trained: Problem) -> None:
    def loss(features: Tensor, prototypes: Tensor, logit_scale: Tensor) -> Tensor:
        return 2 * protoclip.prototype_cross_entropy(
            features, prototypes, trained.labels, logit_scale, backend="cpu"
        )

    leaves = {
        "features": trained.features,
        "prototypes": trained.prototypes,
        "logit_scale": trained.logit_scale,
    }
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = loss_and_gradients(loss(**leaves), **leaves)
    assert_same_bits(loss_and_gradients(compiled(**leaves), **leaves), eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(**leaves), eager["loss"])


def test_a_second_derivative_is_refused(trained: Problem) -> None:
    loss = protoclip.prototype_cross_entropy(
        trained.features, trained.prototypes, trained.labels, trained.logit_scale, backend="cpu"
    )
    (first,) = torch.autograd.grad(2 * loss, trained.prototypes, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        first.sum().backward()


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
