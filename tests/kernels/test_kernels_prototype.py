"""Triton prototype cross-entropy and soft targets against fp64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from budget import Results, leaf, loss_and_gradients
from op_table import (
    FUSED_DTYPES as DTYPES,
)
from op_table import (
    Size,
    assert_as_formula,
    make_prototype_cross_entropy,
)
from torch import Tensor

import protoclip
from protoclip.ops import Bank

pytestmark = pytest.mark.skipif(
    protoclip.backends("soft_targets")["triton"] is not None,
    reason=str(protoclip.backends("soft_targets")["triton"]),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def unit(*shape: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(shape, device=DEVICE), dim=-1).to(dtype)


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
    call = make_prototype_cross_entropy(Size(20, 60, d), dtype, logit_scale=0.0)
    got = call.results("triton", DEVICE)["dlogit_scale"]
    truth = call.plain(torch.float64).values["dlogit_scale"]
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

    monkeypatch.setattr(prototype_cross_entropy, "PROTOTYPE_BYTES", 4 * 70 * 20)
    call = make_prototype_cross_entropy(Size(70, 90, 12), torch.float32, logit_scale=20.0)
    assert_as_formula(call, "triton", DEVICE)


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
