"""prototype_cross_entropy and soft_targets in C++: within the error budget, and their edges."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget, on_threads
from prototype_problem import DTYPES, TEMPERATURES, check, check_case, plain, problem, run, unit
from room import run_in_room

import protoclip
from protoclip.ops import Bank

REASON = protoclip.backends("prototype_cross_entropy")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# N: none, one, two, five, a ragged tile, a tile and three. D: odd ones too, for pairs of bf16.
SHAPES = (
    (0, 64, 14.3), (1, 512, 14.3), (2, 128, 1.0), (5, 256, 100.0), (37, 1, 14.3), (37, 64, 14.3),
    (37, 123, 100.0), (37, 128, 100.0), (67, 512, 100.0), (131, 8, 1.0), (131, 8, 100.0),
)  # fmt: skip


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 257, 700])  # one, two, past one tile of 256, past two
def test_loss_and_gradients_within_budget(k, dtype, temperature):
    torch.manual_seed(0)
    for n, d, scale in SHAPES:
        check(n, k, d, dtype, temperature, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, scale", [(8, 1.0), (64, 14.3), (256, 14.3), (512, 100.0)])
def test_twenty_thousand_prototypes_within_budget(d, scale, dtype):
    torch.manual_seed(0)
    for temperature in TEMPERATURES if d < 256 else TEMPERATURES[1:2]:
        check(23, 20_000, d, dtype, temperature, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_of_alike_prototypes(dtype):
    """Prototypes of cosine 0.99: what of the weights' rounding is common to them cancels."""
    torch.manual_seed(0)
    shared = 10 * unit(1, 64)
    h, c = (F.normalize(shared + unit(rows, 64), dim=-1).to(dtype) for rows in (90, 300))
    check_case(h, c, torch.randint(0, 300, (90,)), None, 100.0, torch.ones(90))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k, d, scale", [(257, 64, 14.3), (300, 512, 14.3), (257, 64, 100.0)])
def test_soft_targets_that_the_features_have_reached(k, d, scale, dtype):
    """Trained to the end: the expected prototype is the target; all of dh is rounding."""
    torch.manual_seed(0)
    c = unit(k, d, dtype=dtype)
    m = (torch.softmax(scale * c.double() @ c.double().T, 1) @ c.double()).to(dtype)
    check_case(c, c, torch.arange(k), m, scale, torch.ones(k) / k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_near_zero_does_not_cancel(dtype):
    c = F.normalize(torch.eye(300) + 0.03 * torch.rand(300, 300)).to(dtype)
    for scale in (20.0, 100.0):
        # Weights below 2^-126 are flushed to zero.
        size = scale * 2**-126 / torch.finfo(torch.float32).eps
        check_case(c, c, torch.arange(300), None, scale, torch.ones(300), size=size)


def plain_targets(source, c, temperature, dtype, rows):
    """The plain formula, run in ``dtype``, or in fp64 for the truth."""
    source, c = source.to(dtype), c.to(dtype)
    return torch.softmax(source[rows] @ source.T / temperature, dim=1) @ c


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "k, d_source, d", [(1, 1, 1), (2, 8, 64), (257, 64, 13), (700, 24, 128), (20_000, 16, 8)]
)
def test_soft_targets_within_budget(k, d_source, d, dtype):
    """Of 20,000 clusters in 40 rows: the truth of all would be 3 GB."""
    torch.manual_seed(0)
    rows = torch.arange(0, k, 500 if k == 20_000 else 1)
    for temperature in TEMPERATURES[1:]:
        source, c = 0.9 * unit(k, d_source, dtype=dtype), unit(k, d, dtype=dtype)
        got = protoclip.soft_targets(source, c, temperature, backend="cpu")[rows]
        truth, base = (
            plain_targets(source, c, temperature, wide, rows) for wide in (torch.float64, dtype)
        )
        assert_within_budget(got, truth, base.float(), scale=1 / temperature)


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
        c, y = bank.prototypes, bank.labels
        single = protoclip.prototype_cross_entropy(
            h, c, y, 14.3, targets=bank.targets, backend="cpu"
        )
        assert torch.equal(loss, single)
        total += torch.autograd.grad(single, h)[0].float()
        logits = h.detach().double() @ c.double().T
        assert (logits.amax(dim=1) - logits.gather(1, nearest[:, None])[:, 0]).max() <= 1e-6
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
    for dtype, n in product(DTYPES, (3, 20)):
        h, c, labels, _ = problem(n, 300, 16, dtype, 0.0)
        args = h, c, labels, None, 0.0, torch.ones(n)
        truth = plain(*args, torch.float64)["dscale"]
        assert abs(run(*args, "cpu")["dscale"] - truth) <= 1e-5 * truth.abs()


def test_same_bits_twice_and_on_any_number_of_threads():
    for dtype, (n, k) in product(DTYPES, ((777, 1500), (1100, 300), (50, 3000))):
        h, c, labels, m = problem(n, k, 40, dtype, 0.1)

        def results(h=h, c=c, labels=labels, m=m, n=n):
            found = run(h, c, labels, m, 20.0, torch.ones(n), "cpu")
            return [*found.values(), protoclip.soft_targets(c, c, 0.1, backend="cpu")]

        first, *others = on_threads(results, (torch.get_num_threads(), 1, 2, 3))
        for again in others:
            assert all(map(torch.equal, first, again)), dtype


def test_strides_do_not_matter():
    for dtype in DTYPES:
        h, c, labels, m = problem(60, 150, 34, dtype, 0.1)
        wide = torch.full((150, 73), 9.0, dtype=dtype)
        wide[:, 5:39] = c
        views = h.T.contiguous().T, wide[:, 5:39], labels.repeat_interleave(2)[::2], m.flip(0)
        want = run(h, c, labels, m.flip(0).contiguous(), 20.0, torch.ones(60), "cpu")
        got = run(*views, 20.0, torch.ones(60), "cpu")
        assert all(torch.equal(want[x], got[x]) for x in want)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_input_gives_a_non_finite_loss(dtype, bad):
    torch.manual_seed(0)
    h, c, labels, m = problem(150, 700, 20, dtype, 0.1)
    used = labels != -100

    def finite(h=h, c=c, m=None, s=10.0):
        return protoclip.prototype_cross_entropy(
            h, c, labels, s, targets=m, reduction="none", backend="cpu"
        ).isfinite()

    def spoilt(x, row):
        x = x.clone()
        x[row, 3] = bad
        return x

    for row, targets in product((0, 149), (None, m)):
        rows = finite(h=spoilt(h, row), m=targets)
        assert not rows[row] and rows.sum() == 149
    for k, targets in product((0, 256, 699), (None, m)):
        rows = finite(c=spoilt(c, k), m=targets)
        assert not rows[used].any() and rows[~used].all()
    assert not finite(m=spoilt(m, labels[0]))[0] and not finite(s=bad)[used].any()


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(label):
    h, c, labels = unit(2, 3), unit(5, 3), torch.tensor([0, label])
    for backend, targets in (("cpu", None), ("reference", None), ("reference", c)):
        words = rf"labels in \[0, K\) or -100, got {label} at row 1"
        with pytest.raises(ValueError, match=words):
            protoclip.prototype_cross_entropy(h, c, labels, 1.0, targets=targets, backend=backend)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_compile_autocast_and_no_second_derivative(dtype):
    torch.manual_seed(0)
    h, c = unit(6, 8, dtype=dtype).requires_grad_(), unit(5, 8, dtype=dtype).requires_grad_()
    labels, s = torch.randint(0, 5, (6,)), torch.tensor(3.0, requires_grad=True)
    op, ones = torch.ops.protoclip, torch.ones(2, 6)
    hard = c.new_empty(0, 8)
    torch.library.opcheck(op.prototype_ce, (h, [c], [hard], [labels], s, True, True, True, "cpu"))
    x, y, scale = (t.detach() for t in (h, c, s))
    torch.library.opcheck(
        op.prototype_ce, (x, [y], [hard], [labels], scale, False, False, False, "cpu")
    )
    torch.library.opcheck(op.scaled, (ones[..., None], torch.ones(2, 6, 8)))

    def loss(h, c, s):
        return 2 * protoclip.prototype_cross_entropy(h, c, labels, s, backend="cpu")

    want = loss(h, c, s)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(h, c, s)
    for a, b in zip(*(torch.autograd.grad(x, (h, c, s)) for x in (got, want)), strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(h, c, s), want)
    (first,) = torch.autograd.grad(loss(h, c, s), c, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        first.sum().backward()


MILLION = """
import math, pytest, torch, protoclip
torch.manual_seed(0)
h = torch.nn.functional.normalize(torch.randn(64, 128), dim=-1).bfloat16().requires_grad_()
few = torch.nn.functional.normalize(torch.randn(1000, 128), dim=-1).bfloat16()
labels = torch.randint(0, 1000, (64,))
s = torch.tensor(20.0, requires_grad=True)
small = protoclip.prototype_cross_entropy(h, few, labels, s, backend="cpu")  # libraries, JIT
want = torch.autograd.grad(small, (h, s))
c = few.repeat(1000, 1)
allow(16)
loss = protoclip.prototype_cross_entropy(h, c, labels, s, targets=c, backend="cpu")
got = torch.autograd.grad(loss, (h, s))
assert abs(loss - small - math.log(1000)) < 1e-5, (loss, small)
for a, b in zip(got, want):
    assert (a - b).abs().max() <= 0.01 * b.abs().max()
with pytest.raises(RuntimeError, match="memory"):
    protoclip.prototype_cross_entropy(h, c, labels, s, targets=c, backend="reference")
"""


def test_a_million_prototypes_need_no_more_memory():
    """[1,000,000, 128] prototypes, a thousand times the same thousand, so the answer is known.

    16 MiB are allowed; one [64, 1,000,000] matrix would be 244.
    """
    run_in_room(MILLION)
