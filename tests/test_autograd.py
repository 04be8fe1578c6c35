"""The losses under torch.func and forward-mode AD: by the reference or refused; no silent zero."""

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


def _dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, Y))).tangent


FORWARD = {
    "jvp": lambda f: jvp(f, (X,), (Y,))[1],
    "hessian": lambda f: hessian(lambda a: f(a * X))(torch.tensor(1.0)),
    "dual numbers": _dual,
    "compiled": lambda f: torch.compile(
        lambda x: jvp(f, (x,), (Y,))[1], backend="aot_eager"
    )(X),
}  # fmt: skip


@losses
@pytest.mark.parametrize("call", CALLS)
def test_transforms_take_the_reference(call, loss):
    got, want = (CALLS[call](LOSSES[loss], b) for b in ("auto", "reference"))
    torch.testing.assert_close(got, want)


@losses
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode_is_the_derivative(mode, loss):
    got = FORWARD[mode](lambda x: LOSSES[loss](x, torch.tensor(3.0), "auto"))
    gradient = grad(lambda x: LOSSES[loss](x, torch.tensor(3.0), "reference"))
    want = (gradient(X) * Y).sum()
    if mode == "hessian":
        one = torch.ones(())
        _, want = jvp(lambda a: (gradient(a * X) * X).sum(), (one,), (one,))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@losses
@fused
def test_a_named_fused_backend_refuses_transforms(backend, loss):
    for use in (*CALLS.values(), lambda f, b: FORWARD["jvp"](lambda x: f(x, torch.tensor(3.0), b))):
        with pytest.raises(ValueError, match="transforms and forward-mode .*backend='auto'"):
            use(LOSSES[loss], backend)


@losses
@fused
def test_a_second_derivative_is_refused_by_name(backend, loss):
    x = X.clone().requires_grad_()
    value = LOSSES[loss](x, torch.tensor(3.0), backend)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        torch.autograd.grad(first.sum(), x)


def test_segment_mean_in_forward_mode():
    """The mean is linear: its derivative is the mean of the tangents."""
    labels = torch.arange(40) % 5 - 1
    want, counts = protoclip.segment_mean(Y, labels, 6, backend="reference")
    segment_means = lambda x: protoclip.segment_mean(x, labels, 6)[0]  # noqa: E731
    means, tangent = jvp(segment_means, (X,), (Y,))
    torch.testing.assert_close(means, segment_means(X))
    torch.testing.assert_close(tangent, want)
    torch.testing.assert_close(_dual(segment_means), want)
    _, second = jvp(lambda x: jvp(segment_means, (x,), (Y,))[1], (X,), (Y,))
    assert (second == 0).all() and counts.sum() == 32
    torch.testing.assert_close(vmap(segment_means)(XS)[1], segment_means(Y))
    with pytest.raises(ValueError, match="labels below num_segments=2, got 3"):
        jvp(lambda x: protoclip.segment_mean(x, labels, 2)[0], (X,), (Y,))
