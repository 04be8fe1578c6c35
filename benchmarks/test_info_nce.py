"""InfoNCE, forward, backward and both, beside everything people use instead.

Parity with fp64 is asserted before a variant is timed. Rates count four products for every variant
(the useful work of a loss that stores no logits), so they compare as times do. A sweep over N shows
how time and memory grow.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import peers, roofline
from benchmarks.harness import Case
from benchmarks.machine import DEVICE, DTYPES

SIZES = {
    "cpu": {
        "tiny": [(48, 16)],
        "quick": [(1024, 512), (4096, 128), (4096, 512)],
        "full": [(1024, 512), (4096, 128), (4096, 512), (4096, 1024), (16384, 512)],
    },
    "cuda": {
        "tiny": [(512, 64)],
        "quick": [(8192, 512), (32768, 512)],
        "full": [(256, 512), (1024, 512), (2048, 512), (8192, 512)]
        + [(32768, d) for d in (256, 512, 768, 1024)],
    },
}[DEVICE]
APART = {"tiny": SIZES["tiny"][0], "quick": SIZES["quick"][-1], "full": SIZES["quick"][-1]}
SWEEP = {"tiny": [32, 64], "quick": [1024 << i for i in range(4)]}
SWEEP["full"] = [1024 << i for i in range(7)] if DEVICE == "cpu" else [256 << i for i in range(10)]
LOGITS = 2**27 if DEVICE == "cpu" else 2**30  # what a form that stores them may store
SCALE = 14.3  # where CLIP starts
PARITY_ROWS = 4096  # the truth stores N x N doubles: beyond, parity is shown on the first rows


def open_clip(x, y, scale):
    loss = peers.optional("open_clip.loss", "ClipLoss")()
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
    options = peers.optional("torch.nn", "LinearCrossEntropyOptions")
    return F.linear_cross_entropy(x, y, labels, options=options())


def cut_cross_entropy(x, y, labels):
    run = peers.optional("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if DEVICE == "cuda" else "torch_compile"
    return run(x, y, labels, filter_eps=None, impl=impl)  # the default drops the gradient


def liger(x, y, labels):
    if DEVICE == "cpu":
        pytest.skip("liger-kernel runs on GPUs only")
    loss = peers.optional("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    return loss()(y, x, labels)


def memeff(x, y, scale):
    if DEVICE == "cpu":
        pytest.skip("memeff runs on GPUs only")
    loss = peers.optional("memeff", "MemoryEfficientCLIPLoss")
    return loss(temperature=1 / SCALE, normalized_inputs=True)(x, y)


PEERS = {
    "open_clip": lambda: open_clip,
    "torch.compile": lambda: peers.compiled(one_matmul),
    "linear_cross_entropy": lambda: _both_ways(linear_cross_entropy),
    "cut_cross_entropy": lambda: _both_ways(cut_cross_entropy),
    "liger": lambda: _both_ways(liger),
    "memeff": lambda: memeff,
}
ONE_PASS = {"linear_cross_entropy", "liger"}  # their forward makes the gradients
VARIANTS = [*peers.ours("info_nce"), *PEERS]


def _loss(variant):
    if peers.is_ours(variant):
        return partial(protoclip.info_nce, backend=peers.backend("info_nce", variant))
    return PEERS[variant]()


def _inputs(n, d, dtype):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
    y = F.normalize(x + torch.randn(n, d, device=DEVICE) / d**0.5, dim=-1)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    return x, y, torch.tensor(SCALE, device=DEVICE, requires_grad=True)


@cache
def _truth(n, d, dtype):
    exact = [t.detach().double().requires_grad_() for t in _inputs(n, d, dtype)]
    loss = protoclip.info_nce(*exact, backend="reference")
    return loss.detach(), torch.autograd.grad(loss, exact)


def _assert_parity(loss, n, d, dtype):
    """Some roundings of the dtype, in the loss and in all gradients.

    A probability is off by the rounding of its logit, which the scale multiplies.
    """
    inputs = _inputs(min(n, PARITY_ROWS), d, dtype)
    value = loss(*inputs)
    truth, gradients = _truth(min(n, PARITY_ROWS), d, dtype)
    eps = torch.finfo(dtype).eps
    assert abs(value - truth) <= 8 * eps * max(1, abs(truth))
    allowed = min(16 * SCALE * eps, 0.25)
    # memeff has no gradient for the scale.
    found = torch.autograd.grad(value, inputs, allow_unused=loss is memeff)
    for got, want in zip(found, gradients, strict=True):
        if got is None:
            continue
        assert (got - want).abs().max() <= allowed * want.abs().max().clamp_min(1e-3 / n)


def step(loss, phase):
    """``run`` and ``prepare`` of a phase; the graph of "backward" is made off the clock."""

    def run(inputs, kept=None):
        if phase == "forward":
            loss(*inputs)
        else:
            value = loss(*inputs) if kept is None else kept
            torch.autograd.grad(value, inputs, allow_unused=loss is memeff)

    def prepare(inputs):
        return (inputs, loss(*inputs)) if phase == "backward" else (inputs,)

    return run, prepare


def _rows(sizes):
    """phase, (N, D), dtype, variant, sweep"""
    rows = [
        (phase, shape, dtype, variant, None)
        for shape in SIZES[sizes]
        for phase in ("forward", "backward", "both")
        if phase == "both" or shape == APART[sizes]
        for dtype in ("fp32", "bf16")
        for variant in VARIANTS
        if phase == "both" or variant not in ONE_PASS
    ]
    d = 16 if sizes == "tiny" else 128 if DEVICE == "cpu" else 512
    # Compiling takes longer than the quick sweep.
    swept = ["open_clip", *(["torch.compile"] if sizes == "full" else [])]
    rows += [
        ("both", (n, d), "bf16", variant, "N")
        for n in SWEEP[sizes]
        for variant in (*peers.ours("info_nce"), *(swept if n * n <= LOGITS else []))
    ]
    return rows


def pytest_generate_tests(metafunc):
    rows = _rows(metafunc.config.getoption("--sizes"))
    names = [
        f"{sweep or ''}{phase}-N{n}-D{d}-{dtype}-{name}"
        for phase, (n, d), dtype, name, sweep in rows
    ]
    metafunc.parametrize(("phase", "shape", "dtype", "variant", "sweep"), rows, ids=names)


def test_info_nce(bench, phase, shape, dtype, variant, sweep):
    n, d = shape
    loss = _loss(variant)
    _assert_parity(loss, n, d, DTYPES[dtype])
    inputs = _inputs(n, d, DTYPES[dtype])
    run, prepare = step(loss, phase)
    rival = None
    if not peers.is_ours(variant):
        ours, ready = step(protoclip.info_nce, phase)
        rival = lambda: ours(*ready(inputs))  # noqa: E731
        if phase == "backward":
            rival = None  # its forward would be on the clock; ratios come from "both"
    work = roofline.info_nce(n, d, dtype, phase)
    case = Case("info_nce", {"N": n, "D": d}, dtype, work, phase, sweep)
    bench.time(case, variant, run, prepare=lambda: prepare(inputs), rival=rival)
