"""contrastive with ids, forward and backward, beside the losses that people train with today.

Each peer is asked for what it can: sentence-transformers' loss has no ids (one positive, in-batch
negatives), pytorch-metric-learning's two have labels; memeff and siglip-kernel stand beside the
losses that they have, in test_info_nce.py and test_ops.py. ``info_nce`` with and without ids shows
what ids cost. Parity with fp64 comes before the clock.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import protoclip
from benchmarks import peers, roofline
from benchmarks.harness import Case
from benchmarks.machine import DEVICE, DTYPES

SHAPES = {"tiny": (48, 16), "quick": (4096, 512), "full": (4096, 512)}
if DEVICE == "cuda":
    SHAPES |= {"quick": (8192, 512), "full": (32768, 512)}
SCALE = 14.3


def _metric_learning(name, x, labels, scale):
    loss = peers.optional("pytorch_metric_learning.losses", name)(temperature=1 / SCALE)
    if name == "NTXentLoss" and len(x) ** 3 > 2**32:  # bytes of its mask
        pytest.skip(f"NTXentLoss holds N^3 bytes: {len(x) ** 3 / 2**30:.0f} GiB at N = {len(x)}")
    return loss(x, labels)


def _sentence_transformers(x, y, scale):
    module = "sentence_transformers.sentence_transformer.losses"
    loss = peers.optional(module, "MultipleNegativesRankingLoss")(torch.nn.Identity(), scale=SCALE)
    return loss.compute_loss_from_embeddings([x, y], None)


def _stacked(x, y):
    """[N, D] as pytorch-metric-learning takes it, and its labels: N / 2 samples of two views."""
    half = len(x) // 2
    return torch.cat([x[:half], y[:half]]), torch.arange(half, device=x.device).repeat(2)


# case -> ours(x, y, scale, ids, backend=...) and the peers' f(x, y, scale)
CASES = {
    "one way": (
        lambda x, y, s, ids, **o: protoclip.contrastive(x, y, s, **o),
        {"sentence-transformers": _sentence_transformers},
    ),
    "nt_xent": (
        lambda x, y, s, ids, **o: protoclip.nt_xent(x[: len(x) // 2], y[: len(x) // 2], s, **o),
        {"metric-learning": lambda x, y, s: _metric_learning("NTXentLoss", *_stacked(x, y), s)},
    ),
    "sup_con": (
        lambda x, y, s, ids, **o: protoclip.sup_con(*_stacked(x, y), s, **o),
        {"metric-learning": lambda x, y, s: _metric_learning("SupConLoss", *_stacked(x, y), s)},
    ),
    "two ways": (
        lambda x, y, s, ids, **o: protoclip.info_nce(x, y, s, **o),
        {},
    ),
    "two ways, ids excluded": (
        lambda x, y, s, ids, **o: protoclip.info_nce(x, y, s, ids=ids, **o),
        {},
    ),
    "two ways, ids positive": (
        lambda x, y, s, ids, **o: protoclip.info_nce(x, y, s, ids=ids, same_id="positive", **o),
        {},
    ),
    "sigmoid, ids": (
        lambda x, y, s, ids, **o: (
            protoclip.ops.sigmoid_loss(x, y, s, 0 * s.detach(), ids=ids, **o) / len(x)
        ),
        {},
    ),
}


def _inputs(n, d, dtype):
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=DEVICE), dim=-1)
    y = F.normalize(x + torch.randn(n, d, device=DEVICE) / d**0.5, dim=-1)
    ids = torch.randint(max(1, n // 2), (n,), device=DEVICE)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    return x, y, torch.tensor(SCALE, device=DEVICE, requires_grad=True), ids


def _op(case):
    """The name in the table of backends."""
    plain = {"one way": "info_nce", "two ways": "info_nce"}
    return plain.get(case, "siglip" if case == "sigmoid, ids" else "contrastive")


def _rows(sizes):
    return [
        (case, dtype, variant)
        for case, (_, others) in CASES.items()
        for dtype in ("fp32", "bf16")
        for variant in (*peers.ours(_op(case)), *others)
    ]


def pytest_generate_tests(metafunc):
    rows = _rows(metafunc.config.getoption("--sizes"))
    names = [f"{case}-{dtype}-{variant}".replace(" ", "_") for case, dtype, variant in rows]
    metafunc.parametrize(("case", "dtype", "variant"), rows, ids=names)


def _assert_parity(case, loss, dtype, ours):
    """Loss and gradients of 256 rows against fp64, some roundings of the dtype apart. Peers that
    normalise by themselves have no gradient along a row; there it does not count."""
    x, y, s, ids = _inputs(256, 64, dtype)
    value = loss(x, y, s, ids)
    exact = [t.detach().double().requires_grad_() for t in (x, y, s)]
    truth = CASES[case][0](*exact, ids, backend="reference")
    eps = torch.finfo(dtype).eps
    assert abs(value - truth) <= 16 * eps * max(1, abs(truth))
    grads = zip(
        torch.autograd.grad(value, (x, y)), torch.autograd.grad(truth, exact[:2]), strict=True
    )
    for row, (got, want) in zip(exact[:2], grads, strict=True):
        if not ours:
            got, want = (g - (g * row).sum(1, keepdim=True) * row for g in (got.double(), want))
        assert (got - want).abs().max() <= min(16 * SCALE * eps, 0.25) * want.abs().max()


def test_contrastive(bench, case, dtype, variant, request):
    n, d = SHAPES[request.config.getoption("--sizes")]
    ours, others = CASES[case]
    if peers.is_ours(variant):
        loss = partial(ours, backend=peers.backend(_op(case), variant))
    else:
        loss = lambda x, y, s, ids: others[variant](x, y, s)  # noqa: E731
    _assert_parity(case, loss, DTYPES[dtype], peers.is_ours(variant))
    inputs = _inputs(n, d, DTYPES[dtype])

    def run(*given, loss=loss):
        torch.autograd.grad(loss(*given), given[:2])

    rival = None if peers.is_ours(variant) else lambda: run(*inputs, loss=ours)
    work = roofline.info_nce(n, d, dtype, "both")
    where = Case(f"contrastive, {case}", {"N": n, "D": d}, dtype, work, "both")
    bench.time(where, variant, run, prepare=lambda: inputs, rival=rival)
