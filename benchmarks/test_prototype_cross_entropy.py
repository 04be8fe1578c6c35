"""Prototype cross-entropy, forward and backward with frozen prototypes, beside what people use.

Parity with fp64 is asserted before a variant is timed, ours by benchmarks/parity.py too. Rates
count two products for every variant (the useful work of a pass that gives loss and gradient), so
they compare as times do. Targets are soft, of temperature 0.01, or hard. The table of soft targets
itself stands below.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import parity, peers, roofline
from benchmarks.harness import Case
from benchmarks.machine import DEVICE, DTYPES

TAU = 0.01
SIZES = {
    "tiny": [(48, 300, 16)],
    "quick": [(4096, 20_000, 128)],
    "full": [(n, 20_000, d) for n in (512, 4096, 16384) for d in (64, 128, 256)],
}
LARGE = (256 if DEVICE == "cpu" else 4096, 1_000_000, 128)  # no peer holds its logits
STORED = "matmul+cross_entropy"
PARITY_ROWS, PARITY_KEYS = 64, 500  # the truth stores their doubles several times
SHARE_ROWS = 384  # of ours, so that a card's tiles of keys are whole


def _teacher(labels, source):
    return torch.softmax(source[labels] @ source.T / TAU, dim=1)  # [N, K]


def authors(h, s, c, labels, source, m):
    """Two matmuls, a teacher softmax, cross-entropy with probabilities: [N, K] several times."""
    return F.cross_entropy(s.to(h.dtype) * h @ c.T, _teacher(labels, source))


def linear_cross_entropy(h, s, c, labels, source, m):
    """With probabilities torch 2.13 takes its own unchunked form, as its warning says."""
    loss = peers.optional("torch.nn.functional", "linear_cross_entropy")
    return loss(h * s.to(h.dtype), c, _teacher(labels, source))


def stored_logits(h, s, c, labels, source, m):
    return F.cross_entropy(s * h @ c.T, labels)


def ours(h, s, c, labels, source, m, backend="auto"):
    return protoclip.prototype_cross_entropy(h, c, labels, s, targets=m, backend=backend)


def _autograd(loss):
    """The value of a loss and its gradients to h and s."""

    def both(h, s, *rest):
        value = loss(h, s, *rest)
        return value.detach(), *torch.autograd.grad(value, (h, s))

    return both


@torch.no_grad()
def attention_and_gather(h, s, c, labels, source, m):
    """torch's flash attention gives sum_k p_k C_k and the LSE; the rest is a gather of m."""
    name = "flash_attention_for_cpu" if DEVICE == "cpu" else "flash_attention"
    flash = getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)
    if flash is None or (DEVICE == "cuda" and h.dtype == torch.float32):
        pytest.skip(f"torch has no {name} with an LSE for {h.dtype} here")
    target = m[labels].float()  # [N, D]
    out, lse = flash(*(x[None, None] for x in (h, c, c)), scale=s.item())[:2]
    weighted = (out[0, 0].float() - target) / len(h)
    loss = (lse.reshape(-1)[: len(h)] - s * (h.float() * target).sum(dim=1)).mean()
    return loss, (s * weighted).to(h.dtype), (h.float() * weighted).sum()


PEERS = {
    "authors": lambda: _autograd(authors),
    "authors, compiled": lambda: _autograd(peers.compiled(authors)),
    "linear_cross_entropy": lambda: _autograd(linear_cross_entropy),
    "attention+gather": lambda: attention_and_gather,
}
OURS = peers.ours("prototype_cross_entropy")


def _variant(variant):
    if variant == STORED:
        return _autograd(stored_logits)
    if not peers.is_ours(variant):
        return PEERS[variant]()
    return _autograd(partial(ours, backend=peers.backend("prototype_cross_entropy", variant)))


def _inputs(n, k, d, dtype, soft):
    torch.manual_seed(0)
    h, c, source = (
        F.normalize(torch.randn(rows, d, device=DEVICE), dim=-1).to(dtype)
        for rows in (n, k, k if soft else 0)
    )
    labels = torch.randint(0, k, (n,), device=DEVICE)
    m = protoclip.soft_targets(source, c, TAU).to(dtype) if soft else None
    s = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    return h.requires_grad_(), s, c, labels, source, m


@cache
def _truth(n, k, d, dtype, soft):
    h, s, c, labels, source, _ = _inputs(n, k, d, dtype, soft)
    h, s = (t.detach().double().requires_grad_() for t in (h, s))
    c, source = c.double(), source.double()
    m = protoclip.soft_targets(source, c, TAU) if soft else None
    return _autograd(partial(ours, backend="reference"))(h, s, c, labels, source, m)


def _assert_parity(run, n, k, d, dtype, soft):
    """Some roundings of the dtype, in the loss and in both gradients."""
    small = min(n, PARITY_ROWS), min(k, PARITY_KEYS), d, dtype, soft
    eps = 16 * torch.finfo(dtype).eps
    for got, want in zip(run(*_inputs(*small)), _truth(*small), strict=True):
        assert (got - want).abs().max() <= eps * want.abs().max().clamp_min(0.1)


def _assert_share(run, n, k, d, dtype, soft):
    """Of our gradient, what the softmax over the prototypes adds to it."""
    n, k = min(n, SHARE_ROWS), min(k, SHARE_ROWS)
    h, c = (t.to(DEVICE, dtype) for t in parity.cone(n, k, d))
    labels = torch.arange(n, device=DEVICE).roll(31) % k
    m = (0.5 * (c + c.roll(1, 0).float())).to(dtype) if soft else None
    keys = c if m is None else torch.cat([c, m])
    form = parity.prototype_form(labels, k, torch.full((n,), 1 / n, device=DEVICE), soft)
    truth, base = (parity.gradients(form, h, keys, 14.3, t) for t in (torch.float64, dtype))
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    _, dh, _ = run(h.requires_grad_(), scale, c, labels, None, m)
    parity.assert_gradients(dh, None, form, truth, base, 14.3)


def _rows(sizes):
    """(N, K, D), dtype, variant, soft targets or hard ones"""
    soft = [(name, True) for name in (*OURS, *PEERS)]
    rows = [
        (shape, dtype, *variant)
        for shape in SIZES[sizes]
        for dtype in ("fp32", "bf16")
        for variant in (*soft, *((name, False) for name in (*OURS, STORED)))
    ]
    return rows + [(LARGE, "fp32", name, False) for name in OURS if sizes == "full"]


def pytest_generate_tests(metafunc):
    if metafunc.function is not test_prototype_cross_entropy:
        return
    rows = _rows(metafunc.config.getoption("--sizes"))
    names = [
        "N{}-K{}-D{}".format(*shape) + f"-{dtype}-{name}-{'soft' if soft else 'hard'}"
        for shape, dtype, name, soft in rows
    ]
    metafunc.parametrize(("shape", "dtype", "variant", "soft"), rows, ids=names)


def test_prototype_cross_entropy(bench, shape, dtype, variant, soft):
    run = _variant(variant)
    _assert_parity(run, *shape, DTYPES[dtype], soft)
    if peers.is_ours(variant):
        _assert_share(run, *shape, DTYPES[dtype], soft)
    inputs = _inputs(*shape, DTYPES[dtype], soft)
    work = roofline.prototype_cross_entropy(*shape, dtype)
    letters = dict(zip("NKD", shape, strict=True))
    phase = "soft" if soft else "hard"
    case = Case("prototype_cross_entropy", letters, dtype, work, phase)
    rival = None if peers.is_ours(variant) else partial(_autograd(ours), *inputs)
    bench.time(case, variant, partial(run, *inputs), rival=rival)


def _softmax_product(source, prototypes, temperature):
    return torch.softmax(source @ source.T / temperature, dim=1) @ prototypes


@pytest.mark.parametrize("variant", [*peers.ours("soft_targets"), "softmax"])
def test_soft_targets(bench, variant):
    k, source_d, d = {"tiny": (64, 24, 16)}.get(bench.sizes, (2000, 384, 128))
    torch.manual_seed(0)
    source, prototypes = (torch.randn(k, size, device=DEVICE) for size in (source_d, d))
    source, prototypes = (F.normalize(x, dim=1) for x in (source, prototypes))
    run = _softmax_product
    if peers.is_ours(variant):
        run = partial(protoclip.soft_targets, backend=peers.backend("soft_targets", variant))
    truth = _softmax_product(source.double(), prototypes.double(), 0.01).float()
    torch.testing.assert_close(run(source, prototypes, 0.01), truth, rtol=1e-3, atol=1e-4)
    work = roofline.soft_targets(k, source_d, d)
    case = Case("soft_targets", {"K": k, "D'": source_d, "D": d}, "fp32", work)
    rival = None
    if not peers.is_ours(variant):
        rival = partial(protoclip.soft_targets, source, prototypes, 0.01)
    bench.time(case, variant, lambda: run(source, prototypes, 0.01), rival=rival)
