"""info_nce: each backend of the CPU within the error budget, its edges, and the products it keeps.

Triton has its own tests.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget, on_threads, usable
from budget import strip_gradients as plain_gradients
from room import run_in_room

import protoclip
from protoclip.ops import reference
from protoclip.ops.strips import LN2, strip_gradients, strip_statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("backend", [b for b in usable("info_nce") if b != "triton"])
needs_cpu = pytest.mark.skipif(
    protoclip.backends("info_nce")["cpu"] is not None, reason="no native library"
)


def clustered(n: int, d: int, dtype=torch.float32, seed: int = 0, noise: float = 0.25):
    """Unit rows as CLIP trains them: one modality's rows share a direction (cosine about 0.94),
    pairs are alike."""
    torch.manual_seed(seed)
    shared = torch.randn(n, d)
    centers = torch.randn(2, 1, d) / noise
    x, y = (F.normalize(c + shared + 0.3 * torch.randn(n, d), dim=-1) for c in centers)
    return x.to(dtype), y.to(dtype)


def leaves(n, d, dtype=torch.float32, scale=30.0):
    pair = (t.requires_grad_() for t in clustered(n, d, dtype))
    return *pair, torch.tensor(scale, requires_grad=True)


def run(inputs, weights, **options):
    """Losses of the pairs and the gradients of sum(weights * losses)."""
    loss = protoclip.info_nce(*inputs, reduction="none", **options)
    grads = torch.autograd.grad((loss * weights).sum(), inputs)
    return dict(zip(("loss", "dx", "dy", "dscale"), (loss.detach(), *grads), strict=True))


def check(x, y, scale, backend, weights=None, terms=0.0):
    """``terms``: the size of what a row's gradient sums, where it counts, not the gradient's."""
    w = torch.ones(len(x)) if weights is None else weights
    inputs = [t.detach().requires_grad_() for t in (x, y, torch.tensor(scale))]
    got = run(inputs, w, backend=backend)
    truth, base = (
        plain_gradients(x, y, scale, 0, w / 2, w / 2, dtype) for dtype in (torch.float64, x.dtype)
    )
    for found in (truth, base):
        found["loss"] = (found["row level"] + found["column level"]) / 2 - found["positive"]
    sizes = {name: max(truth[name].abs().max().item(), terms) for name in ("dx", "dy")}
    sizes |= {"loss": 1 + truth["loss"].abs().max().item(), "dscale": truth["terms"].item()}
    for name, size in sizes.items():
        assert_within_budget(got[name], truth[name], base[name], name, size, scale)


# N: the smallest, one short of a vector multiple, two ragged tiles, many tiles.
# D: odd, so that bf16 pairs need a zero; 64, 512, 768: as users have them.
SIZES = [*itertools.product([1, 2, 16, 63, 252], [1, 17, 64, 123, 512, 768]), (1000, 512)]


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_values_and_gradients_are_within_budget(scale, dtype):
    for seed, (n, d) in enumerate(SIZES):
        x, y = clustered(n, d, dtype, seed)
        check(x, y, scale, "cpu")
        check(x, y, scale, "cpu", weights=torch.rand(n) + 0.5)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_cosines(dtype):
    """cos +1 and -1 at scale 100: losses near zero, and logits 289 powers of two apart.

    Where all rows are alike too, a gradient is a sum of equal terms that cancel: bf16 products
    round each by 2^-9, so there alone the size of the terms counts."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(150, 32), dim=-1).to(dtype)
    same = x[:1].expand(150, 32)
    half = torch.cat([same[:75], -same[:75]])
    kinds = ((x, x), (x, -x), (same, same), (same, -same), (half, x), (half, half.flip(0)))
    for k, pair in enumerate(kinds):
        alike = k >= 2 and dtype == torch.bfloat16
        check(*pair, 100.0, "cpu", terms=2 * 100.0 * x.abs().max().item() if alike else 0.0)


@needs_cpu
def test_a_loss_near_zero_keeps_its_digits():
    """The positive's own weight is exactly one: no 1e-7 of a rounded reference remains."""
    x = torch.eye(256)
    for scale in (14.0, 100.0):
        loss = protoclip.info_nce(x, x, scale, reduction="none", backend="cpu")
        want = reference.info_nce(x.double(), x.double(), torch.tensor(scale).double())
        assert (loss.double() - want).abs().max() <= 2**-21
        assert scale < 100 or (loss == 0).all()  # the truth is 1e-41


WITHOUT_BF16 = """
import sys; sys.path.insert(0, {tests!r})
import torch, test_info_nce, prototype_problem
x, y = test_info_nce.clustered(300, 65, torch.bfloat16)
test_info_nce.check(x, y, 100.0, "cpu", torch.rand(300) + 0.5)
prototype_problem.check(90, 301, 65, torch.bfloat16, 0.1, 100.0)
"""


@needs_cpu
@pytest.mark.parametrize("cpu", ["AVX512_CORE", "SSE41"])
def test_cpus_without_bf16_products(cpu):
    """fp32 products for bf16 features; on the second CPU oneDNN has none either, and ours run."""
    code = WITHOUT_BF16.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": cpu}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@needs_cpu
@pytest.mark.parametrize("scale", [40.0, 100.0])
@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rectangles(columns, dtype, scale):
    """Rows of one rank against the columns of all, as local_loss asks for."""
    x, y = clustered(700, 48, dtype)
    x, offset = x[300:431], 300
    w, v = torch.rand(131), torch.rand(700) if columns else torch.empty(0)
    options = {"offset": offset, "backend": "cpu"}
    strip = strip_statistics(x, y, torch.tensor(scale), columns=columns, **options)
    gradients = strip_gradients(
        x,
        y,
        torch.tensor(scale),
        row_max=strip.row_max,
        row_sum=strip.row_sum,
        column_max=strip.column_max,
        column_sum=strip.column_sum,
        row_weight=w,
        column_weight=v,
        direction_weight=1.0,
        mean=False,
        stash=None,
        **options,
    )
    got = {
        "row level": LN2 * (strip.row_sum.log2() + strip.row_max),
        "positive": LN2 * strip.positive,
        "dx": gradients.dx,
        "dy": gradients.dy,
        "dscale": gradients.dlogit_scale,
    }
    if columns:
        got["column level"] = LN2 * (strip.column_sum.log2() + strip.column_max)
    truth, base = (
        plain_gradients(x, y, scale, offset, w, v, wide) for wide in (torch.float64, dtype)
    )
    for name, value in got.items():
        size = truth["terms" if name == "dscale" else name].abs().max().item()
        assert_within_budget(value, truth[name], base[name], name, size, scale)


@needs_cpu
def test_strides_and_offsets_do_not_matter():
    for dtype in DTYPES:
        x, y = clustered(70, 34, dtype)
        want = protoclip.info_nce(x, y, 20.0, reduction="none", backend="cpu")
        wide = torch.full((70, 73), 9.0, dtype=dtype)
        wide[:, 5:39] = x
        for view in (wide[:, 5:39], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2]):
            got = protoclip.info_nce(view, y, 20.0, reduction="none", backend="cpu")
            assert torch.equal(got, want)


@both
def test_two_pairs_and_equal_rows_by_hand(backend):
    x = torch.eye(2)
    two = protoclip.info_nce(x, x, 2.0, backend=backend)
    assert two.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    x = F.normalize(torch.ones(9, 4), dim=1)
    assert protoclip.info_nce(x, x, 50.0, backend=backend).item() == pytest.approx(math.log(9))


@both
def test_empty_and_single(backend):
    for n, d in ((0, 8), (1, 8), (3, 0), (1, 0), (0, 0)):
        x, y = (torch.ones(n, d, requires_grad=True) for _ in range(2))
        scale = torch.tensor(5.0, requires_grad=True)
        loss = protoclip.info_nce(x, y, scale, backend=backend)
        assert loss.item() == pytest.approx(torch.tensor(float(max(n, 1))).log().item())
        loss.backward()
        assert x.grad.shape == x.shape and (x.grad == 0).all() and scale.grad == 0


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_gives_a_non_finite_loss(backend, bad):
    for dtype in DTYPES:
        for row in (0, 150, 299):
            x, y = clustered(300, 20, dtype)
            x[row, 3] = bad
            assert not protoclip.info_nce(x, y, 10.0, backend=backend).isfinite()
            assert not protoclip.info_nce(y, x, 10.0, backend=backend).isfinite()
    x, y = clustered(30, 20)
    assert not protoclip.info_nce(x, y, bad, backend=backend).isfinite()


@both
def test_reductions_and_upstream_gradients(backend):
    x, y = clustered(40, 16)
    rows = protoclip.info_nce(x, y, 9.0, reduction="none", backend=backend)
    assert rows.shape == (40,) and rows.dtype == torch.float32
    total = protoclip.info_nce(x, y, 9.0, reduction="sum", backend=backend)
    mean = protoclip.info_nce(x, y, 9.0, backend=backend)
    assert torch.allclose(total, rows.sum()) and torch.allclose(mean, rows.mean())
    x.requires_grad_()
    (want,) = torch.autograd.grad(reference.info_nce(x, y, torch.tensor(9.0)).mean(), x)
    for factor in (1.0, -3.5):
        (g,) = torch.autograd.grad(factor * protoclip.info_nce(x, y, 9.0, backend=backend), x)
        assert torch.allclose(g, factor * want, rtol=1e-4, atol=1e-7)


@both
def test_autocast_keeps_the_features_dtype(backend):
    x, y = clustered(24, 10)
    want = protoclip.info_nce(x, y, 5.0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = protoclip.info_nce(x, y, 5.0, backend=backend)
    assert got.dtype == torch.float32 and torch.equal(got, want)


# ---- products kept for the backward pass: no bit of the result ----


# 1: one lane; 130 and 300: ragged tiles in both directions; 777: several tasks; D odd and even.
@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (130, 17), (300, 64), (777, 96)])
def test_same_bits_with_and_without_a_stash_on_any_number_of_threads(n, d, dtype):
    inputs, weights = leaves(n, d, dtype), torch.rand(n)
    plain = run(inputs, weights, stash=False, backend="cpu")
    for options in ({}, {"stash": True}):
        options["backend"] = "cpu"
        for got in on_threads(lambda more=options: run(inputs, weights, **more), (1, 2, 3)):
            assert all(torch.equal(got[name], plain[name]) for name in plain)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_and_one_graph(dtype):
    x, y, scale = leaves(256, 6, dtype)  # whole tiles: the room around ragged ones is not written
    op = torch.ops.protoclip.contrastive
    for options in ((0, True, "mean", "cpu", True), (0, True, "none", "cpu", False)):
        torch.library.opcheck(op, (x, y, scale, *options))
    torch.library.opcheck(op, (x[:128], y, scale, 3, False, "none", "cpu", True))

    def loss(x, y, scale):
        return 2 * protoclip.info_nce(x, y, scale, backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (256, 230):
        got, want = (
            torch.autograd.grad(f(x[:n], y[:n], scale), (x, y, scale)) for f in (compiled, loss)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_cpu
@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    """Rows of five kinds: the truth follows from a 5 x 5 table."""
    n, kinds = 46_345, 5
    a, b = (t.double() for t in clustered(kinds, 4, noise=1.0))
    s = torch.tensor(10.0, dtype=torch.float64)
    logits = s * a @ b.T
    count = n / kinds
    rows, columns = (torch.softmax(logits, dim=k) / count for k in (1, 0))
    lse = sum(torch.logsumexp(logits, dim=k) for k in (1, 0)) + 2 * torch.tensor(count).log()
    want = lse / 2 - logits.diagonal()
    da = s * ((rows + columns) / 2 * count @ b - b)  # of the sum over pairs, for one row of a kind
    kind = torch.arange(n) % kinds
    x, y = a.float()[kind].requires_grad_(), b.float()[kind]
    loss = protoclip.info_nce(x, y, 10.0, reduction="none", backend="cpu")
    loss.sum().backward()
    assert (loss.detach() - want[kind]).abs().max() < 1e-5
    assert (x.grad - da[kind]).abs().max() < 1e-4 * da.abs().max()


MEMORY = """
import pytest, torch, protoclip
n, d = 8192, 512
x = torch.nn.functional.normalize(torch.randn(n, d), dim=-1).{dtype}().requires_grad_()
y = x.detach().roll(1, 0).requires_grad_()
grads = 2 * x.nbytes // 2**20  # of x and y
small = x[:256].detach().requires_grad_()
protoclip.info_nce(small, small, 10.0, backend="cpu").backward()  # libraries, JIT
allow(72 + grads)
protoclip.info_nce(x, y, 10.0, backend="cpu").backward()
with pytest.raises(RuntimeError, match="memory"):
    protoclip.info_nce(x, y, 10.0, backend="reference")
"""


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_memory_does_not_grow_with_the_square(dtype):
    """64 MiB beside the gradients hold it, and 8 of mere addresses: blocks are whole huge pages.

    A matrix of fp32 logits would be 256."""
    run_in_room(MEMORY.replace("{dtype}", dtype))
