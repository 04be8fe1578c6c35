"""torch.compile and torch.export of the loss classes, and what only segment_mean has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import usable
from graphs import SIZES, Counter, compiled_once, exported_once
from op_table import Draw
from torch import Tensor

import protoclip
from protoclip.ops import operators

CPU = protoclip.backends("info_nce")["cpu"]
pytestmark = pytest.mark.skipif(CPU is not None, reason=str(CPU))


def pairs(n: int, **options: Any) -> dict[str, Tensor]:
    image, text = Draw(n).unit(2, n, 8)
    scale = torch.tensor(10.0, requires_grad=True)
    features = {"image_features": image.requires_grad_(), "text_features": text.requires_grad_()}
    return features | {"logit_scale": scale} | options


def siglip_pairs(n: int) -> dict[str, Tensor]:
    bias = torch.tensor(-5.0, requires_grad=True)
    return pairs(n, logit_bias=bias, weights=Draw(n).uniform(n), ids=torch.arange(n) // 2)


CLASSES = {
    "ClipLoss": (protoclip.ClipLoss(), pairs),
    "SigLipLoss": (protoclip.SigLipLoss(), siglip_pairs),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_serves_all_batch_sizes(name: str, dynamic: bool | None) -> None:
    loss, tensors_of = CLASSES[name]
    assert compiled_once(loss, [tensors_of(n) for n in SIZES], dynamic) == (1 if dynamic else 2)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_takes_any_batch(name: str, strict: bool) -> None:
    loss, tensors_of = CLASSES[name]
    exported_once(loss, *(tensors_of(n) for n in SIZES[:2]), strict)


@pytest.mark.parametrize("backend", usable("segment_mean"))
def test_one_graph_serves_all_numbers_of_segments(backend: str) -> None:
    torch._dynamo.reset()
    counter = Counter()

    def segment_mean(values: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return protoclip.segment_mean(values, labels, k, backend=backend)

    compiled = torch.compile(segment_mean, fullgraph=True, backend=counter, dynamic=True)
    for k in (6, 9, 11):
        means, counts = compiled(Draw(k).unit(20, 8), torch.arange(20) % 6, k)
        assert means.shape == (k, 8) and counts.sum() == 20
    assert counter.graphs == 1


@pytest.mark.parametrize("lost", [False, True], ids=["private names", "register_autograd"])
def test_an_op_has_its_gradient_with_and_without_private_names(
    monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    missing = [name for name in operators.PRIVATE if not hasattr(torch._C, name)]
    assert not missing, f"without {missing} of torch._C each call takes 18 to 30 us more"
    if lost:
        monkeypatch.setattr(operators, "PRIVATE", ("_no_such_name",))

    @operators.operator(
        f"test_square_{lost}".lower(), lambda given: torch.empty_like(given.x), operators.single
    )
    def square(x: Tensor, by: float) -> Tensor:
        return by * x.square()

    operators.define_gradient(
        square,
        save=operators.saving(()),
        backward=lambda ctx, grad: {"x": 2 * ctx.other_values["by"] * grad * ctx.saved_tensors[0]},
    )
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    assert torch.autograd.grad(square(x, 0.5).sum(), x)[0].tolist() == [1.0, -3.0]
    assert not square(x.detach(), 0.5).requires_grad
