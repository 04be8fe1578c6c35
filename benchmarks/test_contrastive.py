"""InfoNCE, SigLIP and contrastive losses with ids beside what people train with today.

Parity with fp64 is asserted before a variant is timed. Rates count four products for every variant
(the useful work of a loss that stores no logits), so they compare as times do. InfoNCE's phases are
timed apart too. Each peer is asked for what it can: sentence-transformers' loss has no ids (one
positive, in-batch negatives), pytorch-metric-learning's two have labels; ``info_nce`` with and
without ids shows what ids cost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
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
SCALE, BIAS = 14.3, -10.0  # where CLIP and SigLIP start
PARITY_ROWS = 4096  # the truth stores N x N doubles: beyond, parity is shown on the first rows


# -- peers: (x, y, scale, bias) -> loss


def _open_clip(name):
    def loss(x, y, *rest):
        run = peers.optional("open_clip.loss", name)()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            return run(x, y, *rest)

    return loss


def one_matmul(x, y, scale):
    """The strongest form for torch.compile: one matmul, logsumexp over both axes."""
    logits = scale.to(x.dtype) * x @ y.T
    logits = logits.float()
    rows, columns = torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)
    return ((rows + columns) / 2 - logits.diagonal()).mean()


def _both_ways(one_way):
    def loss(x, y, scale, bias):
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
    module = "liger_kernel.transformers"
    return peers.on_a_gpu(module, "LigerFusedLinearCrossEntropyLoss")()(y, x, labels)


def memeff(x, y, scale, bias):
    loss = peers.on_a_gpu("memeff", "MemoryEfficientCLIPLoss")
    return loss(temperature=1 / SCALE, normalized_inputs=True)(x, y)


def siglip_kernel(x, y, scale, bias):
    return peers.on_a_gpu("siglip_kernel", "fused_siglip_loss")(x, y, scale.log(), bias) * len(x)


def _metric_learning(name, x, labels):
    loss = peers.optional("pytorch_metric_learning.losses", name)(temperature=1 / SCALE)
    if name == "NTXentLoss" and len(x) ** 3 > 2**32:  # bytes of its mask
        pytest.skip(f"NTXentLoss holds N^3 bytes: {len(x) ** 3 / 2**30:.0f} GiB at N = {len(x)}")
    return loss(x, labels)


def _sentence_transformers(x, y, scale, bias):
    module = "sentence_transformers.sentence_transformer.losses"
    loss = peers.optional(module, "MultipleNegativesRankingLoss")(torch.nn.Identity(), scale=SCALE)
    return loss.compute_loss_from_embeddings([x, y], None)


def _stacked(x, y):
    """[N, D] as pytorch-metric-learning takes it, and its labels: N / 2 samples of two views."""
    half = len(x) // 2
    return torch.cat([x[:half], y[:half]]), torch.arange(half, device=x.device).repeat(2)


@dataclass(frozen=True)
class Loss:
    """One loss: ours(x, y, scale, bias, ids, backend=...), its row in the table of backends."""

    ours: Callable
    table: str = "contrastive"
    peers: dict[str, Callable] = field(default_factory=dict)
    roundings: tuple[float, float] = (16, 16 * SCALE)  # of value and gradient


CASES = {
    "info_nce": Loss(
        lambda x, y, s, b, ids, **o: protoclip.info_nce(x, y, s, **o),
        "info_nce",
        {
            "open_clip": lambda x, y, s, b: _open_clip("ClipLoss")(x, y, s),
            "torch.compile": lambda x, y, s, b: peers.compiled(one_matmul)(x, y, s),
            "linear_cross_entropy": _both_ways(linear_cross_entropy),
            "cut_cross_entropy": _both_ways(cut_cross_entropy),
            "liger": _both_ways(liger),
            "memeff": memeff,
        },
        (8, 16 * SCALE),  # a probability is off by its logit's rounding, which the scale multiplies
    ),
    "siglip": Loss(
        lambda x, y, s, b, ids, **o: protoclip.ops.sigmoid_loss(x, y, s, b, **o),
        "siglip",
        {  # its mean is over the pairs, ours a sum
            "open_clip": lambda x, y, *rest: _open_clip("SigLipLoss")(x, y, *rest) * len(x),
            "siglip-kernel": siglip_kernel,
        },
        (32, 128),
    ),
    "contrastive, one way": Loss(
        lambda x, y, s, b, ids, **o: protoclip.contrastive(x, y, s, **o),
        "info_nce",
        {"sentence-transformers": _sentence_transformers},
    ),
    "contrastive, nt_xent": Loss(
        lambda x, y, s, b, ids, **o: protoclip.nt_xent(x[: len(x) // 2], y[: len(x) // 2], s, **o),
        peers={"metric-learning": lambda x, y, *_: _metric_learning("NTXentLoss", *_stacked(x, y))},
    ),
    "contrastive, sup_con": Loss(
        lambda x, y, s, b, ids, **o: protoclip.sup_con(*_stacked(x, y), s, **o),
        peers={"metric-learning": lambda x, y, *_: _metric_learning("SupConLoss", *_stacked(x, y))},
    ),
    "contrastive, two ways, ids excluded": Loss(
        lambda x, y, s, b, ids, **o: protoclip.info_nce(x, y, s, ids=ids, **o)
    ),
    "contrastive, two ways, ids positive": Loss(
        lambda x, y, s, b, ids, **o: protoclip.info_nce(x, y, s, ids=ids, same_id="positive", **o)
    ),
    "contrastive, sigmoid, ids": Loss(
        lambda x, y, s, b, ids, **o: (
            protoclip.ops.sigmoid_loss(x, y, s, 0 * s.detach(), ids=ids, **o) / len(x)
        ),
        "siglip",
    ),
}
ONE_PASS = {"linear_cross_entropy", "liger"}  # their forward makes the gradients


@cache
def _inputs(case, n, d, dtype):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
    y = F.normalize(x + torch.randn(n, d, device=DEVICE) / d**0.5, dim=-1)
    ids = torch.randint(max(1, n // 2), (n,), device=DEVICE)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    scale = torch.tensor(-BIAS if case == "siglip" else SCALE, device=DEVICE, requires_grad=True)
    return (x, y, scale, torch.tensor(BIAS, device=DEVICE)), ids


@cache
def _truth(case, n, d, dtype):
    leaves, ids = _inputs(case, n, d, dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    loss = CASES[case].ours(*exact, ids, backend="reference")
    return loss.detach(), torch.autograd.grad(loss, exact[:3])


def _assert_parity(loss, case, n, d, dtype, variant):
    """Some roundings of the dtype, in the loss and in all gradients. A peer may have none for the
    scale, and one that normalises by itself none along a row: there it does not count."""
    shape = (256, 64) if "contrastive" in case else (min(n, PARITY_ROWS), d)
    (*leaves, bias), ids = _inputs(case, *shape, dtype)
    value = loss(*leaves, bias, ids)
    truth, gradients = _truth(case, *shape, dtype)
    eps, (most, steepest) = torch.finfo(dtype).eps, CASES[case].roundings
    assert abs(value - truth) <= most * eps * max(1, abs(truth))
    found = torch.autograd.grad(value, leaves, allow_unused=not peers.is_ours(variant))
    for row, got, want in zip(leaves, found, gradients, strict=True):
        if got is None:
            assert row is leaves[2] and ("contrastive" in case or variant == "memeff")
            continue
        if "contrastive" in case and not peers.is_ours(variant):
            unit = row.detach().double()
            got, want = (g - (g * unit).sum(1, keepdim=True) * unit for g in (got.double(), want))
        allowed = min(steepest * eps, 0.25) * want.abs().max().clamp_min(1e-3 / n)
        assert (got - want).abs().max() <= allowed


def step(loss, phase):
    """``run`` and ``prepare`` of a phase; the graph of "backward" is made off the clock."""

    def run(leaves, ids, kept=None):
        if phase == "forward":
            loss(*leaves, ids)
        else:
            value = loss(*leaves, ids) if kept is None else kept
            torch.autograd.grad(value, leaves[:3], allow_unused=True)

    def prepare(leaves, ids):
        return (leaves, ids, loss(*leaves, ids)) if phase == "backward" else (leaves, ids)

    return run, prepare


def _rows(sizes):
    """case, phase, (N, D), dtype, variant"""
    rows = [
        ("info_nce", phase, shape, dtype, variant)
        for shape in SIZES[sizes]
        for phase in ("both", "forward", "backward")
        if phase == "both" or shape == APART[sizes]
        for dtype in ("fp32", "bf16")
        for variant in (*peers.ours("info_nce"), *CASES["info_nce"].peers)
        if phase == "both" or variant not in ONE_PASS
    ]
    rows += [
        (case, "both", APART[sizes], dtype, variant)
        for case, loss in CASES.items()
        if case != "info_nce"
        for dtype in ("fp32", "bf16")
        for variant in (*peers.ours(loss.table), *loss.peers)
    ]
    return rows


def pytest_generate_tests(metafunc):
    rows = _rows(metafunc.config.getoption("--sizes"))
    names = [
        f"{case}-{phase}-N{n}-D{d}-{dtype}-{variant}".replace(" ", "_")
        for case, phase, (n, d), dtype, variant in rows
    ]
    metafunc.parametrize(("case", "phase", "shape", "dtype", "variant"), rows, ids=names)


def test_contrastive(bench, case, phase, shape, dtype, variant):
    own = CASES[case]
    if peers.is_ours(variant):
        loss = partial(own.ours, backend=peers.backend(own.table, variant))
    else:
        loss = lambda x, y, s, b, ids: own.peers[variant](x, y, s, b)  # noqa: E731
    _assert_parity(loss, case, *shape, DTYPES[dtype], variant)
    inputs = _inputs(case, *shape, DTYPES[dtype])
    run, prepare = step(loss, phase)
    rival = None
    if not peers.is_ours(variant) and phase != "backward":  # its forward would be on the clock
        ours, ready = step(own.ours, phase)
        rival = lambda: ours(*ready(*inputs))  # noqa: E731
    work = roofline.info_nce(*shape, dtype, phase)
    where = Case(case, dict(zip("ND", shape, strict=True)), dtype, work, phase)
    bench.time(where, variant, run, prepare=lambda: prepare(*inputs), rival=rival)
