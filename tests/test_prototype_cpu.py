"""prototype_cross_entropy and soft_targets in C++: within the error budget of fp64, and edges."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

import protoclip
from protoclip.ops import Bank

REASON = protoclip.backends("prototype_cross_entropy")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape), dim=-1).to(dtype)


def problem(n, k, d, dtype, temperature):
    """Features, prototypes, labels (one ignored) and targets; the last are exact to fp64 in the
    rows that are looked up, the others are not computed."""
    h, c, labels = unit(n, d, dtype=dtype), unit(k, d, dtype=dtype), torch.randint(0, k, (n,))
    if temperature <= 0:
        targets = None
    else:
        source = 0.9 * unit(k, d).double()
        targets = torch.zeros_like(c)
        used = labels.unique()
        t = torch.softmax(source[used] @ source.T / temperature, dim=1)
        targets[used] = (t @ c.double()).to(dtype)
    if n > 2:
        labels[n // 2] = -100
    return h, c, labels, targets


def run(h, c, labels, targets, scale, weights, dtype, backend):
    """Losses and the gradients of sum(weights * losses)."""
    h, c = (t.to(dtype).detach().requires_grad_() for t in (h, c))
    s = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    m = None if targets is None else targets.to(dtype)
    loss = protoclip.prototype_cross_entropy(
        h, c, labels, s, targets=m, reduction="none", backend=backend
    )
    (loss * weights.to(loss.dtype)).sum().backward()
    return {"loss": loss.detach(), "dh": h.grad, "dc": c.grad, "dscale": s.grad}


def check(n, k, d, dtype, temperatures, scale, draws=1):
    """The budget over all draws at once: the maxima of a few rows alone are a matter of luck."""
    results: dict = {"got": [], "truth": [], "base": []}
    logits = rows = 0.0
    for draw in range(draws):
        h, c, labels, m = problem(n, k, d, dtype, temperatures[draw % len(temperatures)])
        weights = torch.rand(n) / max(n, 1)
        for name, wide, backend in (
            ("got", dtype, "cpu"), ("base", dtype, "reference"),
            ("truth", torch.float64, "reference"),
        ):  # fmt: skip
            results[name].append(run(h, c, labels, m, scale, weights, wide, backend))
        if n:
            logits = max(logits, scale * (h.double() @ c.double().T).abs().max().item())
        rows = max(rows, weights.sum().item())
    # What is rounded where the result cancels: the logits of a loss; for dscale, one number, the
    # terms w (E[h.c] - h.m), whose probabilities are as exact as the logits.
    sizes = {"loss": logits, "dscale": 2 * rows * logits * max(1.0, logits) / scale}
    for name in ("loss", "dh", "dc", "dscale"):
        got, base, truth = (
            torch.stack([r[name] for r in results[x]]) for x in ("got", "base", "truth")
        )
        largest = truth.abs().max().item() if truth.numel() else 0.0
        size = max(largest, sizes.get(name, 0.0))
        assert_within_budget(got, truth, base, f"{name} of {n, k, d, scale}", size)


HARD, SOFT = (0.0,), (0.01, 0.1, 1.0)
# N: none, one, five, a ragged tile, a tile and three. D: odd ones too, for pairs of bf16.
SHAPES = (
    (0, 64, 14.3), (1, 512, 14.3), (5, 256, 100.0), (37, 1, 14.3), (37, 64, 14.3),
    (37, 123, 100.0), (37, 128, 100.0), (67, 512, 100.0), (131, 8, 1.0), (131, 8, 100.0),
)  # fmt: skip


@pytest.mark.parametrize("temperatures", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 257])  # one, two, a prime past one tile of 256
def test_loss_and_gradients_within_budget(k, dtype, temperatures):
    torch.manual_seed(0)
    for n, d, scale in SHAPES:
        check(n, k, d, dtype, temperatures, scale, draws=24 if min(n, k) < 3 else 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "d, scale", [(8, 1.0), (64, 14.3), (128, 100.0), (256, 14.3), (512, 100.0)]
)
def test_twenty_thousand_prototypes_within_budget(d, scale, dtype):
    torch.manual_seed(0)
    check(23, 20_000, d, dtype, SOFT + HARD, scale, draws=4 if d < 256 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_alike_prototypes(dtype):
    """Prototypes of cosine 0.99: what of the weights' rounding is common to them cancels."""
    torch.manual_seed(0)
    shared = 10 * unit(1, 64)
    h, c = (F.normalize(shared + unit(rows, 64), dim=-1).to(dtype) for rows in (90, 300))
    args = h, c, torch.randint(0, 300, (90,)), None, 100.0, torch.ones(90)
    got, base = run(*args, dtype, "cpu"), run(*args, dtype, "reference")
    truth = run(*args, torch.float64, "reference")
    assert_within_budget(got["dh"], truth["dh"], base["dh"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_near_zero_does_not_cancel(dtype):
    c = F.normalize(torch.eye(300) + 0.03 * torch.rand(300, 300)).to(dtype)
    for scale in (20.0, 100.0):
        args = c, c, torch.arange(300), None, scale, torch.ones(300)
        got, truth = run(*args, dtype, "cpu"), run(*args, torch.float64, "reference")
        base = run(*args, dtype, "reference")
        assert_within_budget(got["loss"], truth["loss"], base["loss"], "loss", 1.0)  # of 1 + small
        for name in ("dh", "dc"):
            # Weights below 2^-126 are flushed to zero.
            size = max(
                truth[name].abs().max().item(), scale * 2**-126 / torch.finfo(torch.float32).eps
            )
            assert_within_budget(got[name], truth[name], base[name], name, size)


@pytest.mark.parametrize("arithmetic", ["float", "split"])
def test_other_arithmetics_of_the_cpu(arithmetic, monkeypatch):
    """What "auto" picks on other machines: fp32 for bf16 features, split bf16 for fp32 ones."""
    from protoclip.ops import native_prototype_cross_entropy

    monkeypatch.setattr(native_prototype_cross_entropy, "ARITHMETIC", arithmetic)
    torch.manual_seed(0)
    if arithmetic == "float":
        return check(90, 300, 65, torch.bfloat16, SOFT, 100.0, draws=3)
    h, c, labels, m = problem(90, 301, 65, torch.float32, 0.1)
    args = h, c, labels, m, 100.0, torch.ones(90)
    try:
        got = run(*args, torch.float32, "cpu")
    except RuntimeError as error:
        assert "AVX-512 with bf16" in str(error)
        pytest.skip("this CPU has no bf16 products")
    truth = run(*args, torch.float64, "reference")
    # A product loses lo * lo and the rounding of lo, 2^-16 of it.
    assert (got["loss"] - truth["loss"]).abs().max() <= 2**-16 * 100.0
    for name in ("dh", "dc"):
        assert (got[name] - truth[name]).abs().max() <= 2**-9 * truth[name].abs().max(), name
    soft = protoclip.soft_targets(c, c, 0.1, backend="cpu")
    exact = protoclip.soft_targets(c.double(), c.double(), 0.1)
    assert (soft - exact).abs().max() <= 2**-16 * 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banks_are_the_single_losses(dtype):
    torch.manual_seed(0)
    h = unit(150, 24, dtype=dtype).requires_grad_()
    banks = [
        Bank(unit(k, 24, dtype=dtype), torch.randint(0, k, (150,)), m)
        for k, m in ((700, None), (7, unit(7, 24, dtype=dtype)), (257, None))
    ]
    got = protoclip.prototype_losses(h, banks, 14.3, backend="cpu")
    (grad,) = torch.autograd.grad(got.loss.sum(), h)
    total = torch.zeros_like(grad, dtype=torch.float32)
    for loss, nearest, bank in zip(got.loss, got.nearest, banks, strict=True):
        single = protoclip.prototype_cross_entropy(
            h, bank.prototypes, bank.labels, 14.3, targets=bank.targets, backend="cpu"
        )
        assert torch.equal(loss, single)
        total += torch.autograd.grad(single, h)[0].float()
        logits = h.detach().double() @ bank.prototypes.double().T
        reached = logits.gather(1, nearest[:, None])[:, 0]
        assert (logits.amax(dim=1) - reached).max() <= 1e-6
    torch.testing.assert_close(grad.float(), total, rtol=0.02, atol=1e-3)  # bf16 sums


@pytest.mark.parametrize("scale", [10.0, -10.0, 0.0])
def test_nearest_takes_the_lowest_index_of_a_tie(scale):
    c = torch.eye(2).repeat(600, 1)  # every prototype 600 times, over many tiles
    h = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    nearest = protoclip.prototype_losses(h, [Bank(c, torch.tensor([0, 1]))], scale, backend="cpu")
    want = {10.0: [1, 0], -10.0: [0, 1], 0.0: [0, 0]}[scale]
    assert nearest.nearest[0].tolist() == want


def test_scale_of_zero_still_has_a_gradient():
    torch.manual_seed(0)
    for dtype in DTYPES:
        h, c, labels, _ = problem(20, 300, 16, dtype, 0.0)
        args = h, c, labels, None, 0.0, torch.ones(20)
        got, truth = run(*args, dtype, "cpu"), run(*args, torch.float64, "reference")
        assert abs(got["dscale"] - truth["dscale"]) <= 1e-5 * truth["dscale"].abs()


def test_same_bits_twice_and_on_any_number_of_threads():
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        for n, k in ((777, 1500), (1100, 300), (50, 3000)):
            h, c, labels, m = problem(n, k, 40, dtype, 0.1)
            args = h, c, labels, m, 20.0, torch.ones(n)
            first = run(*args, dtype, "cpu")
            soft = protoclip.soft_targets(c, c, 0.1, backend="cpu")
            try:
                for count in (threads, 1, 2, 3):
                    torch.set_num_threads(count)
                    again = run(*args, dtype, "cpu")
                    assert all(torch.equal(first[x], again[x]) for x in first), (dtype, count)
                    assert torch.equal(soft, protoclip.soft_targets(c, c, 0.1, backend="cpu"))
            finally:
                torch.set_num_threads(threads)


def test_strides_do_not_matter():
    for dtype in DTYPES:
        h, c, labels, m = problem(60, 150, 34, dtype, 0.1)
        wide = torch.full((150, 73), 9.0, dtype=dtype)
        wide[:, 5:39] = c
        views = h.T.contiguous().T, wide[:, 5:39], labels.repeat_interleave(2)[::2], m.flip(0)
        want = run(h, c, labels, m.flip(0).contiguous(), 20.0, torch.ones(60), dtype, "cpu")
        got = run(*views, 20.0, torch.ones(60), dtype, "cpu")
        assert all(torch.equal(want[x], got[x]) for x in want)
        one = h[:1].expand(60, 34)  # stride 0
        rows = protoclip.prototype_losses(one, [Bank(c, labels)], 9.0, backend="cpu").nearest
        assert (rows == rows[0, 0]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_gives_a_non_finite_loss(bad):
    torch.manual_seed(0)
    for dtype in DTYPES:
        h, c, labels, m = problem(150, 700, 20, dtype, 0.1)

        def rows(h=h, c=c, m=None, s=10.0, labels=labels):
            return protoclip.prototype_cross_entropy(
                h, c, labels, s, targets=m, reduction="none", backend="cpu"
            )

        used = labels != -100
        for row in (0, 149):
            spoilt = h.clone()
            spoilt[row, 3] = bad
            for targets in (None, m):
                finite = rows(h=spoilt, m=targets).isfinite()
                assert not finite[row] and finite.sum() == 149
        for k in (0, 256, 699):
            spoilt = c.clone()
            spoilt[k, 3] = bad
            assert not rows(c=spoilt)[used].isfinite().any()
            assert not rows(c=spoilt, m=m)[used].isfinite().any()
        spoilt = m.clone()
        spoilt[labels[0], 3] = bad
        assert not rows(m=spoilt)[0].isfinite()
        assert not rows(s=bad)[used].isfinite().any()
        assert (rows(c=torch.full_like(c, bad))[~used] == 0).all()


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(label):
    labels = torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"labels in \[0, K\) or -100, got {label} at row 1"):
        protoclip.prototype_cross_entropy(unit(2, 3), unit(5, 3), labels, 1.0, backend="cpu")


@pytest.mark.parametrize("shape", [(0, 3, 8), (0, 0, 8), (4, 3, 0), (4, 300, 0), (4, 1, 8)])
def test_empty_and_single(shape):
    n, k, d = shape
    for dtype in DTYPES:
        h, c = torch.ones(n, d, dtype=dtype), torch.ones(k, d, dtype=dtype, requires_grad=True)
        labels = torch.zeros(n, dtype=torch.int64)
        loss = protoclip.prototype_cross_entropy(h, c, labels, 5.0, backend="cpu")
        assert loss.item() == pytest.approx(math.log(k) if n else 0.0, abs=1e-6)
        (grad,) = torch.autograd.grad(loss, c)
        assert grad.shape == (k, d) and (grad == 0).all()
        assert protoclip.soft_targets(c.detach(), c.detach(), 0.1, backend="cpu").shape == (k, d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, d_source, d", [(1, 1, 1), (2, 8, 64), (257, 64, 13), (700, 24, 128)])
def test_soft_targets_within_budget(k, d_source, d, dtype):
    torch.manual_seed(0)
    for temperature in (0.01, 0.1, 1.0):
        source, c = 0.9 * unit(k, d_source, dtype=dtype), unit(k, d, dtype=dtype)
        got, base = (
            protoclip.soft_targets(source, c, temperature, backend=b) for b in ("cpu", "reference")
        )
        truth = protoclip.soft_targets(source.double(), c.double(), temperature)
        assert_within_budget(got, truth, base, f"tau {temperature}")


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_soft_targets_of_twenty_thousand_clusters(temperature):
    """Against fp64 in 40 rows: all of them would be 3 GB."""
    torch.manual_seed(0)
    source, c = 0.9 * unit(20_000, 16), unit(20_000, 8)
    rows = torch.arange(0, 20_000, 500)
    got = protoclip.soft_targets(source, c, temperature, backend="cpu")[rows]
    base, truth = (
        torch.softmax(s[rows] @ s.T / temperature, dim=1) @ v
        for s, v in ((source, c), (source.double(), c.double()))
    )
    assert_within_budget(got, truth, base)


def test_opcheck_compile_autocast_and_no_second_derivative():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        h, c = unit(6, 8, dtype=dtype).requires_grad_(), unit(5, 8, dtype=dtype).requires_grad_()
        labels, s = torch.randint(0, 5, (6,)), torch.tensor(3.0, requires_grad=True)
        for grad, nearest in ((True, True), (False, False))[: 2 if dtype == torch.float32 else 1]:
            leaves = (h, c, s) if grad else (x.detach() for x in (h, c, s))
            x, y, scale = leaves
            args = x, [y], [y.new_empty(0, 8)], [labels], scale, grad, nearest, "cpu"
            torch.library.opcheck(torch.ops.protoclip.prototype_ce, args)
        torch.library.opcheck(
            torch.ops.protoclip.prototype_ce_bwd,
            (torch.ones(2, 6), h.detach(), s.detach(), torch.ones(2, 6, 8), torch.ones(2, 6)),
        )

        def loss(h, c, s, labels=labels):
            return 2 * protoclip.prototype_cross_entropy(h, c, labels, s, backend="cpu")

        want = loss(h, c, s)
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(h, c, s)
        for a, b in zip(*(torch.autograd.grad(x, (h, c, s)) for x in (got, want)), strict=True):
            assert torch.equal(a, b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(h, c, s), want)
        for leaf in (h, c):
            (first,) = torch.autograd.grad(loss(h, c, s), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="have no second derivative"):
                first.sum().backward()


MILLION = """
import math, re, torch, protoclip
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.manual_seed(0)
h = torch.nn.functional.normalize(torch.randn(64, 128), dim=-1).bfloat16().requires_grad_()
few = torch.nn.functional.normalize(torch.randn(1000, 128), dim=-1).bfloat16()
labels = torch.randint(0, 1000, (64,))
s = torch.tensor(20.0, requires_grad=True)
small = protoclip.prototype_cross_entropy(h, few, labels, s, backend="cpu")  # libraries, JIT
want = torch.autograd.grad(small, (h, s))
c = few.repeat(1000, 1)
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
start = peak()
loss = protoclip.prototype_cross_entropy(h, c, labels, s, targets=c, backend="cpu")
got = torch.autograd.grad(loss, (h, s))
used = peak() - start
assert abs(loss - small - math.log(1000)) < 1e-5, (loss, small)
for a, b in zip(got, want):
    assert (a - b).abs().max() <= 0.01 * b.abs().max()
print(used)
"""


def test_a_million_prototypes_need_no_more_memory():
    """[1,000,000, 128] prototypes, a thousand times the same thousand, so the answer is known."""
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 16  # MiB; one [64, 1,000,000] matrix would be 244
