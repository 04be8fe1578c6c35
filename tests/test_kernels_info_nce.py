"""Triton InfoNCE and sigmoid loss against fp64, on a card or in the interpreter."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from budget import assert_draws_within_budget, assert_within_budget

import protoclip
from protoclip.ops import reference
from protoclip.ops.contrastive import sigmoid_loss

pytestmark = [
    pytest.mark.skipif(
        protoclip.backends("info_nce")["triton"] is not None,
        reason=str(protoclip.backends("info_nce")["triton"]),
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, of inf and NaN
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tiles of the interpreter are 32 x 64, strips of 32 columns, features 32 at a time.
SHAPES = {
    "one pair: the loss is exactly 0": (1, 17),
    "no features: every pair alike": (3, 0),
    "two pairs, one feature": (2, 1),
    "more than what is done in fp64": (17, 17),
    "one short of a tile": (63, 64),
    "tiles off the diagonal, all sizes ragged": (161, 43),
}


def _features(n, d, kind, dtype, seed=0):
    """Unit rows: image and text of a pair alike; each modality in a narrow cone; all +-1 alike;
    some images opposite to every text, 290 binary orders below the rest of their tile."""
    torch.manual_seed(seed)
    x = torch.randn(n, d)
    y = x + 0.5 * torch.randn(n, d)
    if kind == "cones":
        x, y = (torch.randn(d) * 4 + t for t in (x, y))
    if kind == "opposite":
        x = y = x[:1] * (1.0 - 2.0 * (torch.arange(n) % 2))[:, None]
    if kind == "outcasts":
        x, y = (4 * torch.ones(d) + t for t in (x, y))
        x[::7] *= -1
    return [F.normalize(t, dim=1).to(DEVICE, dtype) for t in (x, y)]


def _loss_and_gradients(x, y, scale, weights, backend):
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves.append(torch.tensor(scale, dtype=wide, device=DEVICE, requires_grad=True))
    rows = protoclip.info_nce(*leaves, reduction="none", backend=backend)
    grads = torch.autograd.grad((rows * weights.to(rows)).sum(), leaves)
    return dict(zip(("loss", "dx", "dy", "dscale"), (rows.detach(), *grads), strict=True))


def _assert_info_nce(draws, scale, weights):
    got, truth, base = [], [], []
    for x, y in draws:
        got.append(_loss_and_gradients(x, y, scale, weights, "triton"))
        truth.append(_loss_and_gradients(x.double(), y.double(), scale, weights, "reference"))
        base.append(_loss_and_gradients(x, y, scale, weights, "reference"))
    assert_draws_within_budget(got, truth, base, {})


def _draws(*case):
    return [_features(*case, seed) for seed in range(8)]


@pytest.mark.parametrize("kind", ["alike", "cones", "opposite", "outcasts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_within_budget(shape, dtype, kind):
    n, d = shape
    _assert_info_nce(_draws(n, d, kind, dtype), 100.0 if n != 63 else 14.3, torch.rand(n) / n)


@pytest.mark.parametrize("scale", [1.0, 0.0, -20.0])
def test_any_scale(scale):
    _assert_info_nce(_draws(100, 20, "alike", torch.float32), scale, torch.rand(100) - 0.5)


def test_fp16_keeps_small_weights():
    """Weights of a batch of a million: G would be below fp16's smallest number."""
    draws = [(x.mul_(8), y) for x, y in _draws(70, 16, "cones", torch.float16)]
    _assert_info_nce(draws, 30.0, torch.rand(70) * 1e-6)


@pytest.mark.parametrize("one_program", [64, 1024])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(monkeypatch, dtype, reduction, one_program):
    """The sum of the losses from one program or several; one upstream gradient for all pairs."""
    from protoclip.kernels import info_nce_forward

    monkeypatch.setattr(info_nce_forward, "ONE_PROGRAM", one_program)
    results = []
    for wide, backend in ((dtype, "triton"), (torch.float64, "reference"), (dtype, "reference")):
        leaves = [t.to(wide).requires_grad_() for t in _features(100, 24, "cones", dtype)]
        leaves.append(
            torch.tensor(14.3, device=DEVICE, dtype=torch.promote_types(wide, torch.float))
        )
        loss = protoclip.info_nce(*leaves, reduction=reduction, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(-2.5 * loss, leaves[:2])])
    for name, got, truth, base in zip(("loss", "dx", "dy"), *results, strict=True):
        assert_within_budget(got, truth, base, name)


def _strip(x, y, offset, columns, weights, module):
    scale = torch.tensor(12.0, dtype=torch.promote_types(x.dtype, torch.float32), device=DEVICE)
    stats = module.contrastive_fwd(x, y, scale, offset, columns)
    row, column = (w.to(scale) for w in weights)
    grads = module.contrastive_bwd(x, y, scale, *stats[:4], row, column, offset)
    levels = stats[0] + stats[1].log2(), stats[2] + stats[3].log2()
    return *levels, stats[4], *grads


@pytest.mark.parametrize("columns", [True, False], ids=["both ways", "rows only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(37, 165, 101), (70, 70, 0), (5, 64, 59)])
def test_rectangles(sizes, dtype, columns):
    """A rank's rows against everybody's columns; columns may lack a positive."""
    from protoclip.kernels import info_nce

    n, m, offset = sizes
    x, y = _features(max(n, m), 24, "cones", dtype)
    x, y = x[:n], y[:m]
    weights = torch.rand(n) / (n + 1), torch.rand(m if columns else 0) / m
    got = _strip(x, y, offset, columns, weights, info_nce)
    base = _strip(x, y, offset, columns, weights, reference)
    truth = _strip(x.double(), y.double(), offset, columns, weights, reference)
    names = "row level", "column level", "positive", "dx", "dy"
    for name, g, t, b in zip(names, got, truth, base, strict=False):
        assert_within_budget(g, t, b, name)
    terms = (x.double() * truth[3]).abs().sum().item() / 12
    assert_within_budget(got[5], truth[5], base[5], "dscale", magnitude=terms)


@pytest.mark.parametrize("sizes", [(0, 5), (0, 0)])
def test_no_rows(sizes):
    from protoclip.kernels import info_nce

    n, m = sizes
    x, y = torch.zeros(n, 8, device=DEVICE), torch.ones(m, 8, device=DEVICE)
    weights = torch.zeros(n), torch.ones(m)
    for got, expected in zip(
        _strip(x, y, 0, True, weights, info_nce),
        _strip(x, y, 0, True, weights, reference) if m else [torch.zeros(0)] * 3,
        strict=False,
    ):
        assert torch.equal(got.cpu(), expected.cpu().reshape(got.shape))


def test_positives_outside_the_columns_are_refused():
    from protoclip.kernels import info_nce

    x = torch.zeros(3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="offset between 0 and M - N"):
        info_nce.contrastive_fwd(x, x, torch.tensor(1.0, device=DEVICE), 1, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_waves_and_chunks(monkeypatch, dtype):
    """Bounds so small that the forward takes several waves, merged by several programs, and the
    backward 3 x 2 chunks."""
    from protoclip.kernels import info_nce_forward, waves

    monkeypatch.setattr(info_nce_forward, "ONE_PROGRAM", 64)
    monkeypatch.setattr(info_nce_forward, "PARTIAL_BYTES", 8 * (32 * 2 + 161) * 2)
    monkeypatch.setattr(waves, "SIDE", 64)
    monkeypatch.setattr(waves, "SCRATCH_BYTES", 64 * 128 * dtype.itemsize)
    _assert_info_nce(_draws(161, 20, "cones", dtype), 14.3, torch.rand(161) / 161)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_the_same_bits_twice(dtype):
    x, y = _features(70, 20, "alike", dtype)
    weights = torch.rand(70)
    plain = _loss_and_gradients(x, y, 20.0, weights, "triton")
    again = _loss_and_gradients(x, y, 20.0, weights, "triton")
    x_t = x.T.contiguous().T  # columns first
    y_t = torch.stack([y, torch.full_like(y, torch.nan)], dim=2)[:, :, 0]  # every other value
    leaves = [x_t.requires_grad_(), y_t.requires_grad_(), torch.tensor(20.0, device=DEVICE)]
    rows = protoclip.info_nce(*leaves, reduction="none", backend="triton")
    strided = torch.autograd.grad((rows * weights.to(rows)).sum(), leaves[:2])
    assert all(torch.equal(plain[k], again[k]) for k in plain)
    assert torch.equal(rows.detach(), plain["loss"])
    for a, b in zip(strided, (plain["dx"], plain["dy"]), strict=True):
        assert_within_budget(a, b.double(), b)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card's own rows choose")
def test_descriptors_read_what_pointers_read(monkeypatch):
    from protoclip.kernels import launch

    x, y = _features(100, 40, "alike", torch.float16)
    weights = torch.rand(100)
    pointers = _loss_and_gradients(x, y, 20.0, weights, "triton")
    monkeypatch.setattr(launch, "INTERPRETER", replace(launch.INTERPRETER, descriptors=True))
    descriptors = _loss_and_gradients(x, y, 20.0, weights, "triton")
    assert all(torch.equal(pointers[k], descriptors[k]) for k in pointers)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 99])
def test_non_finite_features_give_a_non_finite_loss(row, value):
    x, y = _features(100, 12, "alike", torch.float32)
    x[row, 3] = value
    scale = torch.tensor(10.0, device=DEVICE)
    assert not protoclip.info_nce(x, y, scale, backend="triton").isfinite()
    assert not sigmoid_loss(x, y, scale, -scale, backend="triton").isfinite()


def _sigmoid(x, y, bias, offset, backend):
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves += [torch.tensor(v, dtype=wide, device=DEVICE, requires_grad=True) for v in (10.0, bias)]
    loss = sigmoid_loss(*leaves, offset=offset, backend=backend) / max(1, len(x))
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("bias", [-10.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 3, 0), (100, 130, 43, 30), (64, 64, 32, 0), (4, 4, 0, 0)])
def test_sigmoid_loss_within_budget(sizes, dtype, bias):
    n, m, d, offset = sizes
    x, y = _features(m, d, "cones", dtype)
    x = x[:n]
    got = _sigmoid(x, y, bias, offset, "triton")
    base = _sigmoid(x, y, bias, offset, "reference")
    truth = _sigmoid(x.double(), y.double(), bias, offset, "reference")
    for name, g, t, b in zip(("loss", "dx", "dy"), got, truth, base, strict=False):
        assert_within_budget(g, t, b, name)
    terms = (x.double() * truth[1]).abs().sum().item() / 10
    assert_within_budget(got[3], truth[3], base[3], "dscale", magnitude=terms + 1e-6)
    assert_within_budget(got[4], truth[4], base[4], "dbias", magnitude=1.0)
    x.requires_grad_(False)
    value = sigmoid_loss(
        x, y, torch.tensor(10.0), torch.tensor(bias), offset=offset, backend="triton"
    )
    assert_within_budget(value / max(1, n), truth[0], base[0], "loss without gradients")


def test_opcheck():
    x, y = (t.requires_grad_() for t in _features(5, 8, "alike", torch.float32))
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for op, arguments in (
        (torch.ops.protoclip.contrastive, (x, y, scale, 0, True, "none", "triton")),
        (torch.ops.protoclip.contrastive, (x, y, scale, 0, True, "mean", "triton")),
        (torch.ops.protoclip.sigmoid_loss, (x, y, scale, -scale.detach(), 0, True, "triton")),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_cuda_graph_and_no_sync():
    x, y = (t.requires_grad_() for t in _features(300, 64, "alike", torch.bfloat16))
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)

    def step():
        loss = protoclip.info_nce(x, y, scale, backend="triton")
        return loss, *torch.autograd.grad(loss, (x, y, scale))

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_more_than_two_to_the_31_pairs():
    n = 50_000
    x, y = (F.normalize(torch.randn(n, 64, device=DEVICE), dim=1).bfloat16() for _ in range(2))
    rows = protoclip.info_nce(x, y, torch.tensor(20.0, device=DEVICE), reduction="none")
    logits = 20 * x[-8:].double() @ y.double().T, 20 * y[-8:].double() @ x.double().T
    at = torch.arange(n - 8, n, device=DEVICE)
    expected = sum(F.cross_entropy(s, at, reduction="none") for s in logits) / 2
    torch.testing.assert_close(rows[-8:].double(), expected, rtol=1e-5, atol=1e-5)
