"""Prototype cross-entropy, forward and backward with frozen prototypes, beside what people use.

Parity with fp64 is asserted before a variant is timed. Rates count two products for every variant
(the useful work of a pass that gives loss and gradient), so they compare as times do. Targets are
soft, of temperature 0.01, except in "protoclip-…-hard". Memory: harness.peak_mib.
"""

import importlib
from collections.abc import Callable

import harness
import pytest
import torch
import torch.nn.functional as F

import protoclip

DEVICE = harness.DEVICE
TAU = 0.01
SIZES = {
    "quick": [(4096, 20_000, 128)],
    "full": [(n, 20_000, d) for n in (512, 4096, 16384) for d in (64, 128, 256)],
}
BACKENDS = [b for b in protoclip.backends("prototype_cross_entropy") if b != "reference"]
BEST: dict[tuple, float] = {}  # (shape, dtype, variant) -> seconds


def _optional(module: str, attribute: str):
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{module}.{attribute}: {error}")


def _autograd(loss: Callable) -> Callable:
    """loss(h, s, c, labels, source, m) -> its value and its gradients to h and s."""

    def both(h, s, *rest):
        value = loss(h, s, *rest)
        return value, *torch.autograd.grad(value, (h, s))

    return both


def protoclip_loss(backend: str, soft: bool) -> Callable:
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
    options = _optional("torch.nn", "LinearCrossEntropyOptions")
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


def cut_cross_entropy(h, s, c, labels, source, m):
    _optional("cut_cross_entropy", "linear_cross_entropy")
    pytest.skip("cut-cross-entropy takes class indices only")


def liger(h, s, c, labels, source, m):
    if DEVICE == "cpu":
        pytest.skip("liger-kernel runs on GPUs only")
    _optional("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    pytest.skip("liger-kernel's fused loss takes class indices only")


VARIANTS = {
    "authors": _autograd(authors),
    "authors-compiled": _autograd(torch.compile(authors)),
    "linear_cross_entropy": _autograd(linear_cross_entropy),
    "attention+gather": attention_and_gather,
    "cut_cross_entropy": _autograd(cut_cross_entropy),
    "liger": _autograd(liger),
    **{f"protoclip-{b}-soft": protoclip_loss(b, soft=True) for b in BACKENDS},
    **{f"protoclip-{b}-hard": protoclip_loss(b, soft=False) for b in BACKENDS},
}


def _inputs(n, k, d, dtype):
    torch.manual_seed(0)
    h, c, source = (
        F.normalize(torch.randn(rows, d, device=DEVICE), dim=-1).to(dtype) for rows in (n, k, k)
    )
    labels = torch.randint(0, k, (n,), device=DEVICE)
    m = protoclip.soft_targets(source, c, TAU).to(dtype)
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    return h.requires_grad_(), scale, c, labels, source, m


def _assert_parity(run, variant, dtype):
    """On 64 x 500: some roundings of the dtype, in the loss and in both gradients."""
    h, s, c, labels, source, m = _inputs(64, 500, 64, dtype)
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


@pytest.fixture(scope="module", autouse=True)
def ratios():
    """After the last case: each variant's time over ours, soft, on this machine."""
    yield
    for backend in BACKENDS:
        for (shape, dtype, variant), seconds in BEST.items():
            ours = BEST.get((shape, dtype, f"protoclip-{backend}-soft"))
            if ours:
                name = "N={} K={} D={}".format(*shape)
                harness.LINES.append(
                    f"{variant:24s} {name} {str(dtype)[6:]}: {seconds / ours:.2f} x the time of "
                    f"protoclip-{backend}-soft"
                )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_prototype_cross_entropy(benchmark, variant, dtype, shape):
    for name in BACKENDS:
        reason = protoclip.backends("prototype_cross_entropy")[name]
        if variant.startswith(f"protoclip-{name}") and reason is not None:
            pytest.skip(reason)
    run = VARIANTS[variant]
    _assert_parity(run, variant, dtype)
    inputs = _inputs(*shape, dtype)

    def step():
        run(*inputs)
        harness.sync()

    step()
    memory = harness.peak_mib(step)
    n, k, d = shape
    x = inputs[0].detach()
    ceiling = 2e-12 * n * k * d / harness.best_seconds(lambda: x @ inputs[2].T)
    benchmark.pedantic(step, rounds=5 if DEVICE == "cpu" else 20, warmup_rounds=1)
    BEST[shape, dtype, variant] = benchmark.stats.stats.min
    name = f"N={n} K={k} D={d} {str(dtype)[6:]}"
    harness.report(benchmark, f"prototype_ce {variant}", name, 4.0 * n * k * d, ceiling, memory)
