"""The losses under torch.func and forward-mode AD: right, or refused by name. Never a silent 0."""

import pytest
import torch
import torch.nn.functional as F
from budget import usable
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import protoclip
from protoclip.ops import sigmoid_loss

torch.manual_seed(0)
X, Y, C = (F.normalize(torch.randn(n, 8), dim=1) for n in (40, 40, 70))
LABELS = torch.randint(0, 70, (40,)).index_fill_(0, torch.tensor(3), -100)
XS = torch.stack([X, Y, -X])
# name -> f(features, scale, backend) -> scalar
LOSSES = {
    "info_nce": lambda x, s, b: protoclip.info_nce(x, Y, s, backend=b),
    "info_nce of each pair": lambda x, s, b: (
        protoclip.info_nce(x, Y, s, reduction="none", backend=b).square().sum()
    ),
    "contrastive": lambda x, s, b: protoclip.contrastive(
        x,
        C,
        s,
        key_ids=LABELS.roll(1).repeat(2)[:70],
        exclude=LABELS.roll(1),
        positives=LABELS,
        same_id="positive",
        key_bias=C[:, 0] * x.mean(),
        backend=b,
    ),
    "sigmoid_loss": lambda x, s, b: sigmoid_loss(x, Y, s, torch.tensor(-1.0), backend=b),
    "prototype_cross_entropy": lambda x, s, b: protoclip.prototype_cross_entropy(
        x, C, LABELS, s, targets=C.flip(0), backend=b
    ),
    "prototype_cross_entropy of prototypes": lambda x, s, b: protoclip.prototype_cross_entropy(
        Y, C * x.mean(dim=0), LABELS, s, backend=b
    ),
}
CALLS = {
    "grad": lambda f, b: grad(lambda x, s: f(x, s, b), argnums=(0, 1))(X, torch.tensor(3.0)),
    "jacrev": lambda f, b: (jacrev(lambda x: f(x, torch.tensor(3.0), b))(X),),
    "vmap": lambda f, b: (vmap(lambda x: f(x, torch.tensor(3.0), b))(XS),),
    "vmap of grad": lambda f, b: (vmap(grad(lambda x: f(x, torch.tensor(3.0), b)))(XS),),
    "grad of vmap": lambda f, b: (
        grad(lambda xs: vmap(lambda x: f(x, torch.tensor(3.0), b))(xs).sum())(XS),
    ),
}


losses = pytest.mark.parametrize("loss", LOSSES)
fused = pytest.mark.parametrize("backend", [b for b in usable("info_nce") if b != "reference"])


@losses
@pytest.mark.parametrize("call", CALLS)
@fused
def test_reverse_mode_transforms_are_those_of_the_reference(backend, call, loss):
    if backend == "triton" and not torch.cuda.is_available() and call != "grad":
        pytest.skip("the interpreter is slow; grad is tried there")
    got, want = (CALLS[call](LOSSES[loss], b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, Y))).tangent


FORWARD = {
    "jvp": lambda f: jvp(f, (X,), (Y,))[1],
    "jvp of grad": lambda f: jvp(grad(f), (X,), (Y,))[1],
    "hessian": lambda f: hessian(lambda a: f(a * X))(torch.tensor(1.0)),
    "dual numbers": _dual,
    "compiled": lambda f: torch.compile(
        lambda x: jvp(f, (x,), (Y,))[1], backend="aot_eager"
    )(X),
}  # fmt: skip


@losses
@pytest.mark.parametrize("mode", FORWARD)
@fused
def test_forward_mode_is_refused_by_name(backend, mode, loss):
    name = loss.split()[0]
    with pytest.raises(NotImplementedError, match=rf"{name}: .*use backend='reference'"):
        FORWARD[mode](lambda x: LOSSES[loss](x, torch.tensor(3.0), backend))


@losses
@pytest.mark.parametrize("mode", ["jvp", "dual numbers"])
def test_forward_mode_of_the_reference_is_the_derivative(mode, loss):
    f = LOSSES[loss]
    tangent = FORWARD[mode](lambda x: f(x, torch.tensor(3.0), "reference"))
    gradient = grad(lambda x: f(x, torch.tensor(3.0), "reference"))(X)
    torch.testing.assert_close(tangent, (gradient * Y).sum(), rtol=1e-4, atol=1e-5)


@losses
@fused
def test_a_second_derivative_is_refused_by_name(backend, loss):
    def first(x):
        return grad(lambda x: LOSSES[loss](x, torch.tensor(3.0), backend))(x).sum()

    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        grad(first)(X)
