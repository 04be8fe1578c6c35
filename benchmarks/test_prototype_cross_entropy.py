"""Prototype cross-entropy, forward and backward with frozen prototypes, beside what people use.

Parity with fp64 is asserted before a variant is timed. Rates count two products for every variant
(the useful work of a pass that gives loss and gradient), so they compare as times do. Targets are
soft, of temperature 0.01, except in "protoclip-…-hard".
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import peers, roofline
from benchmarks.harness import Case
from benchmarks.machine import DEVICE, DTYPES

TAU = 0.01
SIZES = {
    "tiny": [(32, 24, 16)],
    "quick": [(4096, 20_000, 128)],
    "full": [(n, 20_000, d) for n in (512, 4096, 16384) for d in (64, 128, 256)],
}
OP = "prototype_cross_entropy"


def _autograd(loss: Callable) -> Callable:
    """loss(h, s, c, labels, source, m) -> its value and its gradients to h and s."""

    def both(h, s, *rest):
        value = loss(h, s, *rest)
        return value, *torch.autograd.grad(value, (h, s))

    return both


def ours(backend: str, soft: bool) -> Callable:
    return _autograd(
        lambda h, s, c, labels, source, m: protoclip.prototype_cross_entropy(
            h, c, labels, s, targets=m if soft else None, backend=backend
        )
    )


def _teacher(labels, source):
    return torch.softmax(source[labels] @ source.T / TAU, dim=1)  # [N, K]


def authors(h, s, c, labels, source, m):
    """Two matmuls, a teacher softmax, cross-entropy with probabilities: [N, K] several times."""
    return F.cross_entropy(s.to(h.dtype) * h @ c.T, _teacher(labels, source))


def linear_cross_entropy(h, s, c, labels, source, m):
    options = peers.optional("torch.nn", "LinearCrossEntropyOptions")
    target = _teacher(labels, source)
    return F.linear_cross_entropy(h * s.to(h.dtype), c, target, options=options())


def attention_and_gather(h, s, c, labels, source, m):
    """torch's flash attention gives sum_k p_k C_k and the LSE; the rest is the gather of m."""
    name = "flash_attention_for_cpu" if DEVICE == "cpu" else "flash_attention"
    flash = getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)
    if flash is None or (DEVICE == "cuda" and h.dtype == torch.float32):
        pytest.skip(f"torch has no {name} that returns the LSE of {h.dtype} here")
    with torch.no_grad():
        target = m[labels].float()  # [N, D]
        out, lse = flash(h[None, None], c[None, None], c[None, None], scale=s.item())[:2]
        positive = (h.float() * target).sum(dim=1)
        weighted = (out[0, 0].float() - target) / len(h)
        loss = (lse.reshape(-1)[: len(h)] - s * positive).mean()
        return loss, (s * weighted).to(h.dtype), (h.float() * weighted).sum()


PEERS = {
    "authors": lambda: _autograd(authors),
    "authors-compiled": lambda: _autograd(peers.compiled(authors)),
    "linear_cross_entropy": lambda: _autograd(linear_cross_entropy),
    "attention+gather": lambda: attention_and_gather,
}
# cut-cross-entropy and liger-kernel take class indices only: no soft targets.
VARIANTS = [f"{name}-{kind}" for name in peers.ours(OP) for kind in ("soft", "hard")] + [*PEERS]


def _variant(name: str) -> Callable:
    if not peers.is_ours(name):
        return PEERS[name]()
    row, _, kind = name.rpartition("-")
    return ours(peers.backend(OP, row), kind == "soft")


@lru_cache(maxsize=2)  # the targets of 20,000 clusters take a second
def _inputs(n, k, d, dtype):
    torch.manual_seed(0)
    h, c, source = (
        F.normalize(torch.randn(rows, d, device=DEVICE), dim=-1).to(dtype) for rows in (n, k, k)
    )
    labels = torch.randint(0, k, (n,), device=DEVICE)
    m = protoclip.soft_targets(source, c, TAU).to(dtype)
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    return h.requires_grad_(), scale, c, labels, source, m


def _assert_parity(run, variant, dtype, shape):
    """On at most 64 x 500 x 64: some roundings of the dtype, in the loss and in both gradients."""
    h, s, c, labels, source, m = _inputs(*map(min, shape, (64, 500, 64)), dtype)
    exact = [t.detach().double().requires_grad_() for t in (h, s)]
    wide_source, wide_c = source.double(), c.double()
    wide = protoclip.soft_targets(wide_source, wide_c, TAU)
    truth = protoclip.prototype_cross_entropy(
        exact[0], wide_c, labels, exact[1],
        targets=None if variant.endswith("hard") else wide, backend="reference",
    )  # fmt: skip
    want = (truth, *torch.autograd.grad(truth, exact))
    eps = 8 * torch.finfo(dtype).eps
    for got, exactly in zip(run(h, s, c, labels, source, m), want, strict=True):
        assert (got - exactly).abs().max() <= 2 * eps * exactly.abs().max().clamp_min(0.1)


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        shapes = SIZES[metafunc.config.getoption("--sizes")]
        metafunc.parametrize("shape", shapes, ids=lambda s: "N{}-K{}-D{}".format(*s))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prototype_cross_entropy(bench, variant, dtype, shape):
    run = _variant(variant)
    _assert_parity(run, variant, DTYPES[dtype], shape)
    n, k, d = shape
    inputs = _inputs(n, k, d, DTYPES[dtype])
    work = roofline.prototype_cross_entropy(n, k, d, dtype)
    case = Case(OP, {"N": n, "K": k, "D": d}, dtype, work, "both")
    rival = None if peers.is_ours(variant) else (lambda: ours("auto", True)(*inputs))
    bench.time(case, variant, lambda: run(*inputs), rival=rival)
