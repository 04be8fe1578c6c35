"""Triton prototype cross-entropy and soft targets against fp64, on a GPU or in the interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import Results, assert_same_bits, assert_within_budget, leaf, loss_and_gradients
from prototype_problem import DTYPES, Problem, assert_problem_within_budget, computed
from torch import Tensor

import protoclip
from protoclip.ops import Bank

pytestmark = pytest.mark.skipif(
    protoclip.backends("soft_targets")["triton"] is not None,
    reason=str(protoclip.backends("soft_targets")["triton"]),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    n: int
    k: int
    d: int


SHAPES = {
    "one of each": Shape(1, 1, 1),
    "two prototypes, no columns": Shape(520, 2, 0),
    "primes, more keys than a tile": Shape(37, 257, 23),
    "several row tiles": Shape(131, 67, 8),
    "keys in slices": Shape(5, 700, 16),
    "a padded tile of 256": Shape(19, 70, 200),
    "wider than one tile": Shape(19, 97, 300),
}


def unit(*shape: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(shape, device=DEVICE), dim=-1).to(dtype)


@pytest.mark.parametrize(
    "dtype, soft",
    [(dtype, soft) for dtype in DTYPES for soft in (False, True) if dtype != torch.float16 or soft],
    ids=lambda value: ("soft" if value else "hard") if isinstance(value, bool) else str(value),
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_are_within_budget(shape: Shape, dtype: torch.dtype, soft: bool) -> None:
    torch.manual_seed(0)
    for logit_scale in (1.0, 100.0):
        features = unit(shape.n, shape.d, dtype=dtype)
        prototypes = unit(shape.k, shape.d, dtype=dtype)
        targets = 0.9 * unit(shape.k, shape.d, dtype=dtype) if soft else None
        labels = torch.randint(0, shape.k, (shape.n,), device=DEVICE)
        if shape.n > 1:
            labels[shape.n // 2] = -100
        weights = torch.rand(shape.n, device=DEVICE) + 0.5
        problem = Problem(features, prototypes, labels, targets, logit_scale, weights)
        assert_problem_within_budget(problem, "triton")


# No label, one, most of them; every reduction and dtype in one pass and in waves.
@pytest.mark.parametrize("d", [8, 300], ids=["one pass", "in waves"])
@pytest.mark.parametrize(
    "reduction, dtype, labelled",
    [
        ("mean", torch.float32, 0),
        ("mean", torch.float32, 1),
        ("mean", torch.float32, 60),
        ("sum", torch.bfloat16, 0),
        ("sum", torch.bfloat16, 60),
        ("mean", torch.float16, 60),
    ],
    ids=str,
)
def test_the_loss_of_a_batch_is_that_of_its_samples(
    reduction: str, dtype: torch.dtype, d: int, labelled: int
) -> None:
    """The kernels reduce it themselves, and multiply by the upstream gradient."""
    torch.manual_seed(0)
    values = {
        "features": unit(70, d, dtype=dtype),
        "prototypes": unit(33, d, dtype=dtype),
        "logit_scale": torch.tensor(20.0, device=DEVICE),
    }
    labels = torch.randint(0, 33, (70,), device=DEVICE)
    labels[labelled:] = -100

    def run(asked: str) -> Results:
        leaves = {name: leaf(value) for name, value in values.items()}
        loss = protoclip.prototype_cross_entropy(
            **leaves, labels=labels, reduction=asked, backend="triton"
        )
        if asked == "none":
            loss = loss.sum() / max(labelled, 1) if reduction == "mean" else loss.sum()
        return loss_and_gradients(loss * 3, **leaves)

    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(run(reduction), run("none"), rtol=2 * rounding, atol=rounding / 8)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, d_source, d", [(1, 1, 1), (67, 5, 13), (300, 16, 8), (40, 300, 24)])
def test_soft_targets_are_within_budget(
    k: int, d_source: int, d: int, dtype: torch.dtype, temperature: float
) -> None:
    torch.manual_seed(0)
    source = 0.8 * unit(k, d_source, dtype=dtype)
    prototypes = unit(k, d, dtype=dtype)
    got = protoclip.soft_targets(source, prototypes, temperature, backend="triton")
    base = protoclip.soft_targets(source, prototypes, temperature, backend="reference")
    truth = protoclip.soft_targets(source.double(), prototypes.double(), temperature)
    assert got.dtype == torch.float32
    assert_within_budget(got, truth, base)


@pytest.mark.parametrize("n, k, d", [(0, 3, 8), (0, 0, 8), (4, 3, 0)])
def test_no_rows_no_prototypes_and_no_features_have_a_loss(n: int, k: int, d: int) -> None:
    features = torch.zeros(n, d, device=DEVICE)
    prototypes = torch.zeros(k, d, device=DEVICE, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    loss = protoclip.prototype_cross_entropy(features, prototypes, labels, 5.0, backend="triton")
    assert loss.item() == pytest.approx(torch.tensor(float(max(k, 1))).log().item() if n else 0)
    assert torch.autograd.grad(loss, prototypes)[0].shape == (k, d)
    points = prototypes.detach()
    assert protoclip.soft_targets(points, points, 0.1, backend="triton").shape == (k, d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    targets = unit(40, 12, dtype=dtype)
    problem = Problem(
        features=unit(40, 12, dtype=dtype).T.contiguous().T,
        prototypes=unit(40, 12, dtype=dtype).T.contiguous().T,
        labels=torch.randint(0, 40, (80,), device=DEVICE)[::2],
        targets=torch.cat([targets, targets], dim=1)[:, :12],
        logit_scale=9.0,
    )
    assert_problem_within_budget(problem, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_banks_agree_with_one_call_each_and_repeat_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = leaf(unit(50, 16, dtype=dtype))

    def random_bank(k: int, targets: Tensor | None = None) -> Bank:
        labels = torch.randint(0, k, (50,), device=DEVICE)
        return Bank(unit(k, 16, dtype=dtype), labels, targets)

    banks = [random_bank(300), random_bank(7, unit(7, 16, dtype=dtype)), random_bank(129)]
    first = protoclip.prototype_losses(features, banks, 14.3, backend="triton")
    second = protoclip.prototype_losses(features, banks, 14.3, backend="triton")
    assert torch.equal(first.loss, second.loss)
    assert_same_bits(
        torch.autograd.grad(first.loss.sum(), features),
        torch.autograd.grad(second.loss.sum(), features),
    )
    for loss, nearest, bank in zip(first.loss, first.nearest, banks, strict=True):
        single = protoclip.prototype_cross_entropy(
            features, bank.prototypes, bank.labels, 14.3, targets=bank.targets, backend="triton"
        )
        torch.testing.assert_close(loss, single)
        logits = features.detach().double() @ bank.prototypes.double().T
        reached = logits.gather(1, nearest[:, None])[:, 0]
        assert (logits.amax(dim=1) - reached).max() <= 1e-6


@pytest.mark.parametrize("logit_scale, expected", [(10.0, [1, 0]), (0.0, [0, 0])])
def test_nearest_is_the_lowest_index_of_a_tie(logit_scale: float, expected: list[int]) -> None:
    prototypes = torch.eye(2, device=DEVICE).repeat(200, 1)  # each 200 times, over many tiles
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=DEVICE)
    bank = Bank(prototypes, torch.tensor([0, 1], device=DEVICE))
    scale = torch.tensor(logit_scale, device=DEVICE)  # a negative Python number is refused
    losses = protoclip.prototype_losses(features, [bank], scale, backend="triton")
    assert losses.nearest[0].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 300])
def test_a_scale_of_zero_still_has_a_gradient(d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    features = unit(20, d, dtype=dtype)
    prototypes = unit(60, d, dtype=dtype)
    labels = torch.arange(20, device=DEVICE)
    problem = Problem(features, prototypes, labels, logit_scale=0.0)
    exact = Problem(features.double(), prototypes.double(), labels, logit_scale=0.0)
    got = computed(problem, "triton")["dlogit_scale"]
    truth = computed(exact, "reference")["dlogit_scale"]
    assert (got - truth).abs() <= 1e-5 * truth.abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loss_near_zero_does_not_cancel(dtype: torch.dtype) -> None:
    prototypes = F.normalize(torch.eye(100, 100) + 0.03 * torch.rand(100, 100)).to(DEVICE, dtype)

    def rows(prototypes: Tensor, backend: str) -> Tensor:
        return protoclip.prototype_cross_entropy(
            prototypes,
            prototypes,
            torch.arange(100, device=DEVICE),
            torch.tensor(100.0, device=DEVICE),
            reduction="none",
            backend=backend,
        )

    truth = rows(prototypes.double(), "auto")
    assert (rows(prototypes, "triton") - truth).abs().max() <= 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_numbers_and_labels_make_their_own_losses_non_finite(
    value: float, dtype: torch.dtype
) -> None:
    features = unit(4, 3, dtype=dtype)
    prototypes = unit(90, 3, dtype=dtype)
    features[2, 1] = value
    labels = torch.tensor([0, -100, 2, 90], device=DEVICE)  # the last is out of range

    def rows(labels: Tensor, backend: str) -> Tensor:
        return protoclip.prototype_cross_entropy(
            features, prototypes, labels, 10.0, reduction="none", backend=backend
        )

    losses = rows(labels, "triton")
    assert losses.isfinite().tolist() == [True, True, False, False]
    assert losses[1] == 0
    prototypes[70, 0] = value
    in_range = labels.clamp(max=89)
    hidden = rows(in_range, "triton").isfinite() & ~rows(in_range, "reference").isfinite()
    assert not hidden.any()


def test_the_scratch_bound_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoclip.kernels import prototype_cross_entropy

    torch.manual_seed(0)
    problem = Problem(
        features=unit(70, 12, dtype=torch.float32),
        prototypes=unit(90, 12, dtype=torch.float32),
        labels=torch.randint(0, 90, (70,), device=DEVICE),
        logit_scale=20.0,
        weights=torch.rand(70, device=DEVICE),
    )
    monkeypatch.setattr(prototype_cross_entropy, "PROTOTYPE_BYTES", 4 * 70 * 20)
    assert_problem_within_budget(problem, "triton")


def test_the_grid_holds_more_than_four_million_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card takes 2^31 - 1 programs on the first axis of a grid, but 65,535 on the others."""
    kernels = pytest.importorskip("protoclip.kernels.prototype_cross_entropy")
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return lambda **_: None

    monkeypatch.setattr(kernels, "weights_kernel", Recorder())
    q, scale = torch.zeros(4, 16, dtype=torch.bfloat16), torch.tensor(1.0)
    kernels.weights(q, q[:1].expand(5_000_000, 16), scale, torch.zeros(4))
    kernels.weights(q[:1].expand(5_000_000, 16), q, scale, torch.zeros(5_000_000))
    assert all(grid[0] < 2**31 and max(grid[1:], default=1) <= 65_535 for grid in grids), grids
    assert len(grids) == 2
