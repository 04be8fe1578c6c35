"""Triton InfoNCE and sigmoid loss against the plain formulas, on a card or in the interpreter; and
how often they launch: below a few thousand pairs that is what they cost."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget, sigmoid_gradients, strip_gradients
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import protoclip
from protoclip.ops.contrastive_losses import sigmoid_loss
from protoclip.ops.strips import LN2

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
    "one short of a tile": (63, 64),
    "tiles off the diagonal, all sizes ragged": (161, 43),
}


def _features(n, d, kind, dtype, seed=0):
    """Unit rows: image and text of a pair alike; each modality in a narrow cone; all +-1 alike;
    some images opposite to every text, 290 binary orders below the rest of their tile; the columns
    that a tile looks at first 280 below the others."""
    torch.manual_seed(seed)
    x = torch.randn(n, d)
    y = x + 0.5 * torch.randn(n, d)
    if kind in ("cones", "buried"):
        x, y = (torch.randn(d) * 4 + t for t in (x, y))
    if kind == "opposite":
        x = y = x[:1] * (1.0 - 2.0 * (torch.arange(n) % 2))[:, None]
    if kind == "outcasts":
        x, y = (4 * torch.ones(d) + t for t in (x, y))
        x[::7] *= -1
    if kind == "buried":
        y[torch.arange(n) % 64 < 8] *= -1
    return [F.normalize(t, dim=1).to(DEVICE, dtype) for t in (x, y)]


def _loss_and_gradients(x, y, scale, weights, backend="triton", reduction="none"):
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    wide = torch.promote_types(x.dtype, torch.float32)
    leaves.append(torch.tensor(scale, dtype=wide, device=DEVICE, requires_grad=True))
    loss = protoclip.info_nce(*leaves, reduction=reduction, backend=backend)
    grads = torch.autograd.grad(loss, leaves, weights.to(loss).expand(loss.shape))
    return dict(zip(("loss", "dx", "dy", "dscale"), (loss.detach(), *grads), strict=True))


def _assert_within(got, truth, base, scale):
    for name, value in got.items():
        size = truth["terms"].item() if name == "dscale" else None
        assert_within_budget(value, truth[name], base[name], name, magnitude=size, scale=scale)


def _assert_info_nce(x, y, scale, weights, reduction="none"):
    got = _loss_and_gradients(x, y, scale, weights, reduction=reduction)
    count = len(x) if reduction == "mean" else 1
    half = weights.to(DEVICE).expand(len(x)) / (2 * count)
    truth, base = (
        strip_gradients(x, y, scale, 0, half, half, dtype) for dtype in (torch.float64, x.dtype)
    )
    for found in (truth, base):
        found["loss"] = (found["row level"] + found["column level"]) / 2 - found["positive"]
        if reduction != "none":
            found["loss"] = found["loss"].sum() / count
    _assert_within(got, truth, base, scale)


KINDS = ["alike", "cones", "opposite", "outcasts", "buried"]
CASES = [(s, d, k) for s in SHAPES.values() for d in DTYPES for k in KINDS
         if s[0] < 100 or d != torch.float16 or k == "buried"]  # fmt: skip


@pytest.mark.parametrize("shape, dtype, kind", CASES, ids=str)
def test_loss_and_gradients_within_budget(shape, dtype, kind):
    n, d = shape
    x, y = _features(n, d, kind, dtype)
    _assert_info_nce(x, y, 100.0 if n != 63 else 14.3, torch.rand(n) / n)


@pytest.mark.parametrize(
    "scale, dtype, size",
    [*((s, torch.float32, 1) for s in (1.0, 0.0, -20.0)), (240.0, torch.float16, 1e-6)],
)
def test_any_scale_and_weights(scale, dtype, size):
    """Weights of a batch of a million: G would be below fp16's smallest number."""
    x, y = _features(100, 20, "alike" if size == 1 else "cones", dtype)
    _assert_info_nce(x, y, scale, size * (torch.rand(100) - 0.5 * (size == 1)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_loss_near_zero_keeps_its_gradient(dtype):
    """The positive's entry is 1e-4 of its weight: rounded inside G it would be lost. What is left
    is the rounding of the other entries and of the result."""
    x = F.normalize(torch.eye(100) + 0.03 * torch.rand(100, 100)).to(DEVICE, dtype)
    got = _loss_and_gradients(x, x, 15.0, torch.ones(100))
    truth = _loss_and_gradients(x.double(), x.double(), 15.0, torch.ones(100), "reference")
    assert truth["loss"].max() < 1e-3
    for name in ("dx", "dy"):
        error = (got[name].double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("reduction, one_program", [("mean", 64), ("sum", 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(monkeypatch, dtype, reduction, one_program):
    """The sum of the losses from one program or several, whose gradient looks for the extremes of
    its references first; one upstream gradient for all pairs."""
    from protoclip.kernels import info_nce

    monkeypatch.setattr(info_nce, "ONE_PROGRAM", one_program)
    x, y = _features(100, 24, "cones", dtype)
    _assert_info_nce(x, y, 14.3, torch.tensor(-2.5), reduction)


def _strip(x, y, scale, offset, columns, weights):
    from protoclip.kernels import info_nce

    scale = torch.tensor(scale, device=DEVICE)
    strip = info_nce.contrastive_fwd(x, y, scale, offset, columns)
    row_weight, column_weight = (w.to(scale) for w in weights)
    gradients = info_nce.contrastive_bwd(
        x,
        y,
        scale,
        row_max=strip.row_max,
        row_sum=strip.row_sum,
        column_max=strip.column_max,
        column_sum=strip.column_sum,
        row_weight=row_weight,
        column_weight=column_weight,
        offset=offset,
    )
    return {
        "row level": LN2 * (strip.row_max + strip.row_sum.log2()),
        "column level": LN2 * (strip.column_max + strip.column_sum.log2()),
        "positive": LN2 * strip.positive,
        "dx": gradients.dx,
        "dy": gradients.dy,
        "dscale": gradients.dlogit_scale,
    }


@pytest.mark.parametrize("columns", [True, False], ids=["both ways", "rows only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(37, 165, 101), (70, 70, 0), (5, 64, 59)])
def test_rectangles(sizes, dtype, columns):
    """A rank's rows against everybody's columns; columns may lack a positive."""
    n, m, offset = sizes
    x, y = _features(max(n, m), 24, "cones", dtype)
    x, y = x[:n], y[:m]
    weights = torch.rand(n) / (n + 1), torch.rand(m if columns else 0) / m
    got = _strip(x, y, 12.0, offset, columns, weights)
    weights = [w.to(DEVICE) for w in weights]
    truth, base = (
        strip_gradients(x, y, 12.0, offset, *weights, wide) for wide in (torch.float64, dtype)
    )
    _assert_within(got, truth, base, 12.0)


@pytest.mark.parametrize("m", [5, 0])
def test_no_rows(m):
    x, y = torch.zeros(0, 8, device=DEVICE), torch.ones(m, 8, device=DEVICE)
    got = _strip(x, y, 12.0, 0, True, (torch.zeros(0), torch.ones(m)))
    assert got["dx"].shape == (0, 8) and torch.equal(got["dy"], torch.zeros_like(y))
    assert (got["column level"] == -torch.inf).all() and got["dscale"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_waves_and_chunks(monkeypatch, dtype):
    """Bounds so small that the forward takes several waves, merged by several programs, and the
    backward 3 x 2 chunks."""
    from protoclip.kernels import info_nce, waves

    monkeypatch.setattr(info_nce, "ONE_PROGRAM", 64)
    monkeypatch.setattr(info_nce, "PARTIAL_BYTES", 2 * (8 * 32 * 3 + 12 * 161))
    monkeypatch.setattr(waves, "SIDE", 64)
    monkeypatch.setattr(waves, "SCRATCH_BYTES", 64 * 128 * dtype.itemsize)
    _assert_info_nce(*_features(161, 20, "cones", dtype), 14.3, torch.rand(161) / 161)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_the_same_bits_twice(dtype):
    x, y = _features(70, 20, "alike", dtype)
    weights = torch.rand(70)
    plain, again = (_loss_and_gradients(x, y, 20.0, weights) for _ in "12")
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
def test_descriptors_read_and_write_what_pointers_do(monkeypatch):
    from protoclip.kernels import launch

    pairs, found = _features(100, 40, "alike", torch.float16), []
    for descriptors in (False, True):
        row = replace(launch.INTERPRETER, descriptors=descriptors)
        monkeypatch.setattr(launch, "INTERPRETER", row)
        one = _loss_and_gradients(*pairs, 20.0, torch.ones(100)), _sigmoid(*pairs, -3.0, 0)
        found.append([*one[0].values(), *one[1].values()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 99])
def test_non_finite_features_give_a_non_finite_loss(row, value):
    x, y = _features(100, 12, "alike", torch.float32)
    x[row, 3] = value
    scale = torch.tensor(10.0, device=DEVICE)
    assert not protoclip.info_nce(x, y, scale, backend="triton").isfinite()
    assert not sigmoid_loss(x, y, scale, -scale, backend="triton").isfinite()


def _sigmoid(x, y, bias, offset, **ids):
    leaves = [t.detach().clone().requires_grad_() for t in (x, y)]
    leaves += [torch.tensor(v, device=DEVICE, requires_grad=True) for v in (10.0, bias)]
    loss = sigmoid_loss(*leaves, offset=offset, **ids, backend="triton")
    names = "loss", "dx", "dy", "dscale", "dbias"
    return dict(zip(names, (loss.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


@pytest.mark.parametrize(
    "bias, same_id", [(-10.0, None), (-10.0, "positive"), (0.0, "positive"), (0.0, "exclude")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 3, 0), (100, 130, 43, 30), (64, 64, 32, 0), (4, 4, 0, 0)])
def test_sigmoid_loss_within_budget(sizes, dtype, bias, same_id):
    """Ids that share a text with few others, and, where the bias is 0, with many in a second
    column."""
    n, m, d, offset = sizes
    x, y = _features(m, d, "cones", dtype)
    x = x[:n]
    ids = torch.arange(m, device=DEVICE)[:, None] // torch.tensor([3, 40], device=DEVICE)
    ids = {"ids": ids[:, : 2 - (bias < 0)], "same_id": same_id} if same_id else {}
    got = _sigmoid(x, y, bias, offset, **ids)
    truth, base = (
        sigmoid_gradients(x, y, 10.0, bias, offset, wide, **ids) for wide in (torch.float64, dtype)
    )
    _assert_within(got, truth, base, 10.0)
    # Scalars on the features' device: others are refused (tests/test_backends.py).
    scale, bias = (torch.tensor(v, device=DEVICE) for v in (10.0, bias))
    value = sigmoid_loss(x, y, scale, bias, offset=offset, **ids, backend="triton")
    assert_within_budget(value, truth["loss"], base["loss"], "loss without gradients")


def test_opcheck():
    x, y = (t.requires_grad_() for t in _features(5, 8, "alike", torch.float32))
    scale = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    own, ids = torch.arange(5, device=DEVICE), torch.zeros(2, 5, device=DEVICE)
    relation = own.int(), own.int().roll(1), ids.int(), ids.int(), scale.expand(5), True
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    op = torch.ops.protoclip
    for one, arguments in (
        (op.contrastive, (x, y, scale, 0, True, "none", "triton", False)),
        (op.contrastive, (x, y, scale, 0, True, "mean", "triton", False)),
        (op.sigmoid_loss, (x, y, scale, -scale.detach(), 0, True, "triton", None, None, True)),
        (op.matched, (x, y, scale, *relation, True, "triton", False)),
        (op.prototype_ce, (x, [y], [y[:0]], [own], scale, True, True, True, "triton")),
    ):
        torch.library.opcheck(one, arguments, test_utils=checks)


ROOM = ("empty", "empty_strided", "new_empty", "empty_like", "promote_types")  # no launch


class Launches(TorchDispatchMode):
    """Names of what reaches the device, in order: Triton kernels, and torch's ops but for those
    that only look at a tensor or make room for one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        from protoclip.kernels.info_nce import forward_kernel

        launch = type(forward_kernel).run

        def run(kernel, *args, **kwargs):
            self.names.append(kernel.__name__)
            with _disable_current_modes():  # the interpreter itself computes with torch
                return launch(kernel, *args, **kwargs)

        monkeypatch.setattr(type(forward_kernel), "run", run)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "protoclip":
            with self:  # look into the op
                key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, DEVICE.upper()))
                return func.redispatch(key, *args, **(kwargs or {}))
        # Without a card there is no product of half precision into fp32: the operands are widened.
        widened = name == "_to_copy" and DEVICE == "cpu"
        if not (func.is_view or name in ROOM or widened):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_six_launches(monkeypatch, dtype):
    """Of OpenCLIP's loss at a small batch, forward and backward."""
    monkeypatch.setenv("PROTOCLIP_BACKEND", "triton")
    scale = torch.tensor(20.0, device=DEVICE)
    leaves = [t.requires_grad_() for t in (*_features(252, 64, "alike", dtype), scale)]
    loss, upstream = protoclip.ClipLoss(), torch.rand((), device=DEVICE)
    loss(*leaves)
    with Launches(monkeypatch) as found:
        torch.autograd.grad(loss(*leaves), leaves, upstream)
    forward = ["forward_kernel", "merge_kernel"]
    assert found.names == [*forward, "gradient_kernel", "addmm", "addmm", "finish_kernel"]


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
