"""InfoNCE, SigLIP and contrastive losses with ids beside what people train with today.

Parity with fp64 is asserted before a variant is timed (benchmarks/parity.py). Rates count four
products for every variant (the useful work of a loss that stores no logits), so they compare as
times do. InfoNCE's phases are timed apart too. Each peer is asked for what it can:
sentence-transformers' loss has no ids (one positive, in-batch negatives), pytorch-metric-learning's
two have labels; ``info_nce`` with and without ids shows what ids cost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import parity, peers, roofline
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
# The truth stores N x N doubles several times: beyond, parity is shown on so many rows. Other
# libraries' losses with ids store N x N booleans or N^3.
PARITY_ROWS = {"info_nce": 4096, "siglip": 4096}
FEWER_PARITY_ROWS = 384


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


# -- the losses written out on their logits: (ids, bias) of N pairs -> the form


def _eye(ids):
    return torch.eye(len(ids), dtype=torch.bool, device=ids.device)


def _two_ways(same_id=None):
    def form(ids, bias):
        own, same = _eye(ids), ids[:, None] == ids[None]
        positive, seen = own, torch.ones_like(own)
        if same_id == "positive":
            positive = own | same
        elif same_id == "exclude":
            seen = own | ~same
        weight = torch.full((len(ids),), 0.5 / len(ids), device=ids.device)
        rounds = same_id is not None
        return parity.softmax_form(positive, seen, weight, weight, rounds_positives=rounds)

    return form


def _one_way_form(ids, bias):
    own, weight = _eye(ids), torch.full((len(ids),), 1 / len(ids), device=ids.device)
    return parity.softmax_form(own, torch.ones_like(own), weight)


def _views_form(ids, bias):
    """Of N / 2 samples of two views: each view against all others."""
    own = _eye(ids[: len(ids) // 2 * 2])
    positive, weight = own.roll(len(own) // 2, 0), own.new_ones(len(own)) / len(own)

    def sides(x, y):
        both = _stacked(x, y)[0]
        return both, both

    return parity.softmax_form(positive, ~own, weight, rounds_positives=True, sides=sides)


def _sigmoid_form(ids, bias, per_pair=False):
    own = _eye(ids)
    if not per_pair:
        return parity.sigmoid_form(own, own, torch.ones_like(own), bias)
    same = own | (ids[:, None] == ids[None])
    total = parity.sigmoid_form(own, same, torch.ones_like(own), 0.0)
    return replace(total, loss=lambda logits: total.loss(logits) / len(ids))


@dataclass(frozen=True)
class Loss:
    """One loss: ours(x, y, scale, bias, ids, backend=...), the same written out, and its row in the
    table of backends."""

    ours: Callable
    form: Callable
    table: str = "contrastive"
    peers: dict[str, Callable] = field(default_factory=dict)
    roundings: float = 16  # of the value


CASES = {
    "info_nce": Loss(
        lambda x, y, s, b, ids, **o: protoclip.info_nce(x, y, s, **o),
        _two_ways(),
        "info_nce",
        {
            "open_clip": lambda x, y, s, b: _open_clip("ClipLoss")(x, y, s),
            "torch.compile": lambda x, y, s, b: peers.compiled(one_matmul)(x, y, s),
            "linear_cross_entropy": _both_ways(linear_cross_entropy),
            "cut_cross_entropy": _both_ways(cut_cross_entropy),
            "liger": _both_ways(liger),
            "memeff": memeff,
        },
        8,
    ),
    "siglip": Loss(
        lambda x, y, s, b, ids, **o: protoclip.ops.sigmoid_loss(x, y, s, b, **o),
        _sigmoid_form,
        "siglip",
        {  # its mean is over the pairs, ours a sum
            "open_clip": lambda x, y, *rest: _open_clip("SigLipLoss")(x, y, *rest) * len(x),
            "siglip-kernel": siglip_kernel,
        },
        32,
    ),
    "contrastive, one way": Loss(
        lambda x, y, s, b, ids, **o: protoclip.contrastive(x, y, s, **o),
        _one_way_form,
        "info_nce",
        {"sentence-transformers": _sentence_transformers},
    ),
    "contrastive, nt_xent": Loss(
        lambda x, y, s, b, ids, **o: protoclip.nt_xent(x[: len(x) // 2], y[: len(x) // 2], s, **o),
        _views_form,
        peers={"metric-learning": lambda x, y, *_: _metric_learning("NTXentLoss", *_stacked(x, y))},
    ),
    "contrastive, sup_con": Loss(
        lambda x, y, s, b, ids, **o: protoclip.sup_con(*_stacked(x, y), s, **o),
        _views_form,
        peers={"metric-learning": lambda x, y, *_: _metric_learning("SupConLoss", *_stacked(x, y))},
    ),
    "contrastive, two ways, ids excluded": Loss(
        lambda x, y, s, b, ids, **o: protoclip.info_nce(x, y, s, ids=ids, **o),
        _two_ways("exclude"),
    ),
    "contrastive, two ways, ids positive": Loss(
        lambda x, y, s, b, ids, **o: protoclip.info_nce(x, y, s, ids=ids, same_id="positive", **o),
        _two_ways("positive"),
    ),
    "contrastive, sigmoid, ids": Loss(
        lambda x, y, s, b, ids, **o: (
            protoclip.ops.sigmoid_loss(x, y, s, 0 * s.detach(), ids=ids, **o) / len(x)
        ),
        partial(_sigmoid_form, per_pair=True),
        "siglip",
    ),
}
ONE_PASS = {"linear_cross_entropy", "liger"}  # their forward makes the gradients


@cache
def _inputs(case, n, d, dtype, cone=False):
    """Features, scale and bias, and ids; in a cone for parity (``parity.cone``)."""
    torch.manual_seed(0)
    if cone:
        x, y = (t.to(DEVICE) for t in parity.cone(n, n, d))
    else:
        x = F.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
        y = F.normalize(x + torch.randn(n, d, device=DEVICE) / d**0.5, dim=-1)
    ids = torch.randint(max(1, n // 2), (n,), device=DEVICE)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    scale = torch.tensor(-BIAS if case == "siglip" else SCALE, device=DEVICE, requires_grad=True)
    return (x, y, scale, torch.tensor(BIAS, device=DEVICE)), ids


@cache
def _written_out(case, n, d, dtype, exact):
    (x, y, scale, bias), ids = _inputs(case, n, d, dtype, cone=True)
    form = CASES[case].form(ids, bias)
    return form, parity.gradients(form, x, y, scale, torch.float64 if exact else dtype)


# Peers whose gradients are outside the budget are not timed: (variant, dtype, D) -> why.
INEXACT = {("linear_cross_entropy", "bf16", 128): "dx is off by 2.8e-5, allowed are 2.3e-5"}


def _assert_parity(loss, case, n, d, dtype, variant):
    """The value within some roundings, the gradients within the budget of G's share. A peer may
    have none for the scale, rounds the positives' entries as the others, and, if it normalises by
    itself, has none along a row: there it does not count."""
    shape = min(n, PARITY_ROWS.get(case, FEWER_PARITY_ROWS)), d
    (x, y, scale, bias), ids = _inputs(case, *shape, dtype, cone=True)
    form, truth = _written_out(case, *shape, dtype, True)
    _, base = _written_out(case, *shape, dtype, False)
    value = loss(x, y, scale, bias, ids)
    eps, own = torch.finfo(dtype).eps, peers.is_ours(variant)
    assert abs(value - truth.loss) <= CASES[case].roundings * eps * max(1, abs(truth.loss))
    dx, dy, dscale = torch.autograd.grad(value, (x, y, scale), allow_unused=not own)
    assert dscale is not None or "contrastive" in case or variant == "memeff"
    if not own:
        form = replace(form, rounds_positives=True)
        if "contrastive" in case:
            truth, base = (_across_rows(found, x, y) for found in (truth, base))
            dx, dy = _across(dx, x), _across(dy, y)
    parity.assert_gradients(dx, dy, form, truth, base, scale.item())
    if dscale is not None:
        allowed = 2 * abs(base.dscale - truth.dscale) + eps * truth.dscale_terms
        assert abs(dscale - truth.dscale) <= allowed


def _across(gradient, rows):
    """What of a gradient is not along the rows themselves."""
    unit = rows.detach().double()
    return gradient.double() - (gradient.double() * unit).sum(1, keepdim=True) * unit


def _across_rows(found, x, y):
    sides = (("dx", x), ("share_x", x), ("dy", y), ("share_y", y))
    dtype = found.dx.dtype
    return replace(found, **{k: _across(getattr(found, k), rows).to(dtype) for k, rows in sides})


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
    if reason := INEXACT.get((variant, dtype, shape[1])):
        pytest.skip(f"{variant}: {reason}")
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
