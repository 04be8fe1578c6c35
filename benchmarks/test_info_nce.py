"""InfoNCE, forward, backward and both, beside everything people use instead.

Parity with fp64 is asserted before a variant is timed. Rates count four products for every variant
(the useful work of a loss that stores no logits), so they compare as times do.
"""

import importlib

import harness
import pytest
import torch
import torch.nn.functional as F

import protoclip

DEVICE = harness.DEVICE
QUICK = [(1024, 512), (4096, 128), (4096, 512)] if DEVICE == "cpu" else [(8192, 512), (32768, 512)]
FULL = [(n, d) for d in (128, 256, 512, 768, 1024) for n in (1024, 4096, 16384)]
SIZES = {"quick": QUICK, "full": FULL}
BACKENDS = [name for name in protoclip.backends("info_nce") if name != "reference"]


def _optional(module: str, attribute: str):
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{module}.{attribute}: {error}")


def open_clip_loss(x, y, scale):
    loss = _optional("open_clip.loss", "ClipLoss")()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return loss(x, y, scale)


def one_matmul(x, y, scale):
    """The strongest form for torch.compile: one matmul, logsumexp over both axes."""
    logits = scale.to(x.dtype) * x @ y.T
    logits = logits.float()
    rows, columns = torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)
    return ((rows + columns) / 2 - logits.diagonal()).mean()


def _both_ways(one_way):
    def loss(x, y, scale):
        labels = torch.arange(len(x), device=x.device)
        s = scale.to(x.dtype)
        return (one_way(x * s, y, labels) + one_way(y * s, x, labels)) / 2

    return loss


def linear_cross_entropy(x, y, labels):
    options = _optional("torch.nn", "LinearCrossEntropyOptions")
    return F.linear_cross_entropy(x, y, labels, options=options())


def cut_cross_entropy(x, y, labels):
    run = _optional("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if DEVICE == "cuda" else "torch_compile"
    return run(x, y, labels, filter_eps=None, impl=impl)  # the default drops the gradient


def liger(x, y, labels):
    if DEVICE == "cpu":
        pytest.skip("liger-kernel runs on GPUs only")
    loss = _optional("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    return loss()(y, x, labels)


VARIANTS = {
    **{
        f"protoclip-{name}": lambda *a, name=name: protoclip.info_nce(*a, backend=name)
        for name in BACKENDS
    },
    "open_clip": open_clip_loss,
    "one-matmul-compiled": torch.compile(one_matmul),
    "linear_cross_entropy": _both_ways(linear_cross_entropy),
    "cut_cross_entropy": _both_ways(cut_cross_entropy),
    "liger": _both_ways(liger),
}


def _inputs(n, d, dtype):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
    y = F.normalize(x + torch.randn(n, d, device=DEVICE) / d**0.5, dim=-1)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    return x, y, torch.tensor(14.3, device=DEVICE, requires_grad=True)


def _assert_parity(loss, dtype):
    """On 256 rows: a few roundings of the dtype, in the loss and in all gradients."""
    inputs = _inputs(256, 64, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    value, truth = loss(*inputs), protoclip.info_nce(*exact, backend="reference")
    eps = 8 * torch.finfo(dtype).eps
    assert abs(value - truth) <= eps * max(1, abs(truth))
    pairs = zip(torch.autograd.grad(value, inputs), torch.autograd.grad(truth, exact), strict=True)
    for got, want in pairs:
        assert (got - want).abs().max() <= 4 * eps * want.abs().max().clamp_min(1e-3)


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        shapes = SIZES[metafunc.config.getoption("--sizes")]
        metafunc.parametrize("shape", shapes, ids=lambda s: f"N{s[0]}-D{s[1]}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
def test_info_nce(benchmark, variant, dtype, phase, shape):
    name = variant.removeprefix("protoclip-")
    if name in BACKENDS and (reason := protoclip.backends("info_nce")[name]) is not None:
        pytest.skip(reason)
    if phase != "both" and shape != SIZES["quick"][-1]:
        pytest.skip("forward and backward apart are timed at one size")
    loss = VARIANTS[variant]
    _assert_parity(loss, dtype)
    inputs = _inputs(*shape, dtype)

    def prepare():  # the graph of "backward" is made outside the clock
        return ((loss(*inputs),) if phase == "backward" else (), {})

    def run(kept=None):
        if phase == "forward":
            loss(*inputs)
        else:
            torch.autograd.grad(loss(*inputs) if kept is None else kept, inputs)
        harness.sync()

    run(*prepare()[0])
    kept = prepare()[0]
    memory = harness.peak_mib(lambda: run(*kept))
    ceiling = harness.gemm_tflops(*shape, dtype)
    rounds = 5 if DEVICE == "cpu" else 20
    benchmark.pedantic(run, setup=prepare, rounds=rounds, warmup_rounds=1)
    n, d = shape
    flop = {"forward": 2.0, "backward": 6.0, "both": 8.0}[phase] * n * n * d
    label = f"info_nce {phase} {variant}"
    harness.report(benchmark, label, f"N={n} D={d} {str(dtype)[6:]}", flop, ceiling, memory)
