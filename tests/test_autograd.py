"""The losses under torch.func and forward-mode AD: by the reference or refused; no silent zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import usable
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import protoclip
from protoclip.ops import operators, sigmoid_loss

torch.manual_seed(0)
RANDOM = torch.Generator().manual_seed(0)
X = F.normalize(torch.randn(40, 8, generator=RANDOM), dim=1)
Y = F.normalize(torch.randn(40, 8, generator=RANDOM), dim=1)
PROTOTYPES = F.normalize(torch.randn(70, 8, generator=RANDOM), dim=1)
LABELS = torch.randint(0, 70, (40,), generator=RANDOM).index_fill_(0, torch.tensor(3), -100)
SEVERAL_X = torch.stack([X, Y, -X])
SCALE = torch.tensor(3.0)

Loss = Callable[[Tensor, Tensor, str], Tensor]  # (features, logit_scale, backend) -> []
OfFeatures = Callable[[Tensor], Tensor]


def info_nce(x: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
    return protoclip.info_nce(x, Y, logit_scale, backend=backend)


def squared_info_nce(x: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
    rows = protoclip.info_nce(x, Y, logit_scale, reduction="none", backend=backend)
    return rows.square().sum()


def contrastive(x: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
    """The bias of the keys has a gradient too."""
    return protoclip.contrastive(
        x,
        PROTOTYPES,
        logit_scale,
        key_ids=LABELS.roll(1).repeat(2)[:70],
        exclude=LABELS.roll(1),
        positives=LABELS,
        same_id="positive",
        key_bias=PROTOTYPES[:, 0] * x.mean(),
        backend=backend,
    )


def siglip(x: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
    return sigmoid_loss(x, Y, logit_scale, torch.tensor(-1.0), backend=backend)


def soft_prototypes(x: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
    return protoclip.prototype_cross_entropy(
        x, PROTOTYPES, LABELS, logit_scale, targets=PROTOTYPES.flip(0), backend=backend
    )


def trained_prototypes(x: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
    prototypes = PROTOTYPES * x.mean(dim=0)
    return protoclip.prototype_cross_entropy(Y, prototypes, LABELS, logit_scale, backend=backend)


LOSSES: dict[str, Loss] = {
    "info_nce": info_nce,
    "info_nce of each pair": squared_info_nce,
    "contrastive": contrastive,
    "sigmoid_loss": siglip,
    "prototype_cross_entropy": soft_prototypes,
    "prototype_cross_entropy of prototypes": trained_prototypes,
}


def of_features(loss: str, backend: str) -> OfFeatures:
    return lambda x: LOSSES[loss](x, SCALE, backend)


def grad_of_both(loss: str, backend: str) -> tuple[Tensor, Tensor]:
    """Of the features and of the scale."""

    def of_both(x: Tensor, logit_scale: Tensor) -> Tensor:
        return LOSSES[loss](x, logit_scale, backend)

    return grad(of_both, argnums=(0, 1))(X, SCALE)


def grad_of_vmap(loss: str, backend: str) -> Tensor:
    function = of_features(loss, backend)
    return grad(lambda several: vmap(function)(several).sum())(SEVERAL_X)


TRANSFORMS: dict[str, Callable[[str, str], object]] = {
    "grad": grad_of_both,
    "jacrev": lambda loss, backend: jacrev(of_features(loss, backend))(X),
    "vmap": lambda loss, backend: vmap(of_features(loss, backend))(SEVERAL_X),
    "vmap of grad": lambda loss, backend: vmap(grad(of_features(loss, backend)))(SEVERAL_X),
    "grad of vmap": grad_of_vmap,
}


def derivative(function: OfFeatures) -> Tensor:
    """At X in the direction of Y, by jvp."""
    _, tangent = jvp(function, (X,), (Y,))
    return tangent


def derivative_by_dual_numbers(function: OfFeatures) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, Y))).tangent


def compiled_derivative(function: OfFeatures) -> Tensor:
    compiled = torch.compile(lambda x: jvp(function, (x,), (Y,))[1], backend="aot_eager")
    return compiled(X)


each_loss = pytest.mark.parametrize("loss", LOSSES)
each_fused = pytest.mark.parametrize(
    "backend", [backend for backend in usable("info_nce") if backend != "reference"]
)


@each_loss
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_take_the_reference(transform: str, loss: str) -> None:
    run = TRANSFORMS[transform]
    torch.testing.assert_close(run(loss, "auto"), run(loss, "reference"))


@each_loss
@pytest.mark.parametrize(
    "forward_mode", [derivative, derivative_by_dual_numbers, compiled_derivative]
)
def test_forward_mode_is_the_derivative(
    forward_mode: Callable[[OfFeatures], Tensor], loss: str
) -> None:
    got = forward_mode(of_features(loss, "auto"))
    expected = (grad(of_features(loss, "reference"))(X) * Y).sum()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_loss
def test_the_hessian_is_the_derivative_of_the_gradient(loss: str) -> None:
    """Along X, where one number is the Hessian."""
    unit = torch.ones(())
    got = hessian(lambda factor: of_features(loss, "auto")(factor * X))(unit)
    gradient = grad(of_features(loss, "reference"))
    _, expected = jvp(lambda factor: (gradient(factor * X) * X).sum(), (unit,), (unit,))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# Every transform on every fused backend with one loss, and every other loss with one transform:
# where a transform is noticed is the same code for all.
REFUSED = [("info_nce", transform) for transform in [*TRANSFORMS, "jvp"]]
REFUSED += [(loss, "vmap of grad") for loss in LOSSES if not loss.startswith("info_nce")]
FUSED = [backend for backend in usable("info_nce") if backend != "reference"]
REFUSED_BY = [
    (loss, transform, backend)
    for loss, transform in REFUSED
    for backend in (FUSED if transform in ("grad", "jvp") else FUSED[:1])
]


@pytest.mark.parametrize("loss, transform, backend", REFUSED_BY)
def test_a_named_fused_backend_refuses_transforms(loss: str, transform: str, backend: str) -> None:
    with pytest.raises(ValueError, match="transforms and forward-mode .*backend='auto'"):
        if transform == "jvp":
            derivative(of_features(loss, backend))
        else:
            TRANSFORMS[transform](loss, backend)


@each_loss
@each_fused
def test_a_second_derivative_is_refused_by_name(backend: str, loss: str) -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(of_features(loss, backend)(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(first.sum(), x)


SEGMENTS = torch.arange(40) % 5 - 1


def means_of_segments(values: Tensor, num_segments: int = 6) -> Tensor:
    means, _ = protoclip.segment_mean(values, SEGMENTS, num_segments)
    return means


def test_the_derivative_of_segment_means_is_the_mean_of_the_tangents() -> None:
    """They are linear."""
    expected, counts = protoclip.segment_mean(Y, SEGMENTS, 6, backend="reference")
    assert counts.sum() == 32
    means, tangent = jvp(means_of_segments, (X,), (Y,))
    torch.testing.assert_close(means, means_of_segments(X))
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(derivative_by_dual_numbers(means_of_segments), expected)
    _, second = jvp(lambda x: jvp(means_of_segments, (x,), (Y,))[1], (X,), (Y,))
    assert (second == 0).all()


def test_segment_means_can_be_vmapped() -> None:
    torch.testing.assert_close(vmap(means_of_segments)(SEVERAL_X)[1], means_of_segments(Y))


def test_labels_past_the_end_are_refused_in_forward_mode() -> None:
    with pytest.raises(ValueError, match="labels below num_segments=2, got 3"):
        derivative(lambda x: means_of_segments(x, 2))


# ---- how ops get their gradient ----


def test_an_op_has_its_gradient_and_no_second_one() -> None:
    def shapes(arguments: Any) -> Tensor:
        return arguments.x.new_empty(arguments.x.shape)

    @operators.operator("test_scaled", shapes, operators.single)
    def scaled(x: Tensor, by: float) -> Tensor:
        return x * by

    @operators.operator("test_square", shapes, operators.single)
    def square(x: Tensor, by: float) -> Tensor:
        return by * x.square()

    operators.define_gradient(
        square,
        save=lambda ctx, arguments, result: operators.save(ctx, x=arguments.x, by=arguments.by),
        backward=lambda ctx, grad: {
            "x": grad * scaled(operators.saved_values(ctx).x, 2 * operators.saved_values(ctx).by)
        },
    )
    operators.refuse_gradient(scaled, "square")
    x = torch.tensor([1.0, -3.0], requires_grad=True)
    (dx,) = torch.autograd.grad(square(x, 0.5).sum(), x, create_graph=True)
    assert dx.tolist() == [1.0, -3.0]
    assert not square(x.detach(), 0.5).requires_grad
    with pytest.raises(RuntimeError, match="square: its fused backends have no second derivative"):
        dx.sum().backward()
