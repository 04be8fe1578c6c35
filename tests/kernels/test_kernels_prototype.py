"""Prototype cross-entropy where little is left of its numbers, in Triton, on a GPU or in the
interpreter, and on the other backends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_features import DEVICE
from op_table import (
    FUSED_DTYPES,
    Size,
    assert_as_formula,
    make_prototype_cross_entropy,
)
from torch import Tensor

import protoclip

REASON = protoclip.backends("soft_targets")["triton"]
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
EACH_BACKEND = [
    (name, DEVICE if name == "triton" else "cpu")
    for name, reason in protoclip.backends("prototype_cross_entropy").items()
    if reason is None
]
each_backend_and_device = pytest.mark.parametrize("backend, device", EACH_BACKEND)


def unit(*shape: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(shape, device=DEVICE), dim=-1).to(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
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


@needs_triton
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


@needs_triton
def test_the_scratch_bound_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from protoclip.kernels import prototype_cross_entropy

    monkeypatch.setattr(prototype_cross_entropy, "PROTOTYPE_BYTES", 4 * 70 * 20)
    call = make_prototype_cross_entropy(Size(70, 90, 12), torch.float32, logit_scale=20.0)
    assert_as_formula(call, "triton", DEVICE)


@needs_triton
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


@each_backend_and_device
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_batch_without_labels_costs_nothing(backend: str, device: str, reduction: str) -> None:
    call = make_prototype_cross_entropy(Size(20, 30, 8), torch.float32, reduction=reduction)
    call.constants["labels"].fill_(-100)
    assert all((value == 0).all() for value in call.results(backend, device).values())


@each_backend_and_device
@pytest.mark.parametrize("logit_scale, expected", [(10.0, [1, 0]), (0.0, [0, 0])])
def test_nearest_is_the_lowest_index_of_a_tie(
    backend: str, device: str, logit_scale: float, expected: list[int]
) -> None:
    copies = 200 if backend == "triton" else 600  # over many tiles
    prototypes = torch.eye(2, device=device).repeat(copies, 1)
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=device)
    bank = protoclip.Bank(prototypes, torch.tensor([0, 1], device=device))
    scale = torch.tensor(logit_scale, device=device)
    losses = protoclip.prototype_losses(features, [bank], scale, backend=backend)
    assert losses.nearest[0].tolist() == expected


@each_backend_and_device
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
@pytest.mark.parametrize("size", [Size(3, 300, 16), Size(20, 300, 16), Size(20, 60, 300)], ids=str)
def test_a_scale_of_zero_still_has_a_gradient(
    backend: str, device: str, size: Size, dtype: torch.dtype
) -> None:
    call = make_prototype_cross_entropy(size, dtype, logit_scale=0.0)
    got = call.results(backend, device)["dlogit_scale"]
    truth = call.plain(torch.float64).values["dlogit_scale"]
    assert abs(got - truth) <= 1e-5 * truth.abs()
