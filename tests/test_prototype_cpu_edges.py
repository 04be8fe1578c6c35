"""prototype_cross_entropy and soft_targets in C++: what the contract says beside the numbers."""

import math

import pytest
import torch
from prototype_problem import DTYPES, problem, run, unit
from room import run_in_room

import protoclip
from protoclip.ops import Bank, few_logits

REASON = protoclip.backends("prototype_cross_entropy")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(params=[0, few_logits.FEW_LOGITS], ids=["kernel", "fp64"])
def either(request, monkeypatch):
    """Small sizes in the kernel too, which else sees large ones only."""
    monkeypatch.setattr(few_logits, "FEW_LOGITS", request.param)


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


@pytest.mark.parametrize("n", [3, 20])
def test_scale_of_zero_still_has_a_gradient(n):
    torch.manual_seed(0)
    for dtype in DTYPES:
        h, c, labels, _ = problem(n, 300, 16, dtype, 0.0)
        args = h, c, labels, None, 0.0, torch.ones(n)
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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_input_of_few_logits(bad):
    torch.manual_seed(0)
    h, c, labels, m = problem(4, 70, 20, torch.float32, 0.1)
    used = labels != -100
    for targets in (None, m):
        for spoilt in (0, 1, 2):
            args = [h.clone(), c.clone(), 10.0]
            args[spoilt] = bad if spoilt == 2 else args[spoilt].index_fill_(1, torch.tensor(3), bad)
            x, y, s = args
            rows = protoclip.prototype_cross_entropy(
                x, y, labels, s, targets=targets, reduction="none", backend="cpu"
            )
            assert not rows[used].isfinite().any() and (rows[~used] == 0).all()


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_out_of_range_are_refused(label, either):
    labels = torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"labels in \[0, K\) or -100, got {label} at row 1"):
        protoclip.prototype_cross_entropy(unit(2, 3), unit(5, 3), labels, 1.0, backend="cpu")


@pytest.mark.parametrize("soft", [False, True])
def test_the_reference_refuses_labels_out_of_range_too(soft):
    h, c = unit(2, 3), unit(5, 3)
    for label in (-1, 5):
        with pytest.raises(ValueError, match=rf"labels in \[0, K\) or -100, got {label} at row 1"):
            protoclip.prototype_cross_entropy(
                h, c, torch.tensor([0, label]), 1.0, targets=c if soft else None,
                backend="reference",
            )  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 3, 8), (0, 0, 8), (4, 3, 0), (4, 300, 0), (4, 1, 8)])
def test_empty_and_single(shape, either):
    n, k, d = shape
    for dtype in DTYPES:
        h, c = torch.ones(n, d, dtype=dtype), torch.ones(k, d, dtype=dtype, requires_grad=True)
        labels = torch.zeros(n, dtype=torch.int64)
        loss = protoclip.prototype_cross_entropy(h, c, labels, 5.0, backend="cpu")
        assert loss.item() == pytest.approx(math.log(k) if n else 0.0, abs=1e-6)
        (grad,) = torch.autograd.grad(loss, c)
        assert grad.shape == (k, d) and (grad == 0).all()
        assert protoclip.soft_targets(c.detach(), c.detach(), 0.1, backend="cpu").shape == (k, d)


def test_opcheck_compile_autocast_and_no_second_derivative(either):
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
