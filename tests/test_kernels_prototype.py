"""Triton prototype cross-entropy and soft targets against fp64, on a card or in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from prototype_problem import DTYPES, check_case, run

import protoclip
from protoclip.ops import Bank

pytestmark = pytest.mark.skipif(
    protoclip.backends("soft_targets")["triton"] is not None,
    reason=str(protoclip.backends("soft_targets")["triton"]),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "one of each": (1, 1, 1),
    "two prototypes, no columns": (520, 2, 0),
    "primes, more keys than a tile": (37, 257, 23),
    "several row tiles": (131, 67, 8),
    "keys in slices": (5, 700, 16),
    "a padded tile of 256": (19, 70, 200),
    "wider than one tile": (19, 97, 300),
}


def _unit(*shape, dtype):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1).to(dtype)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_within_budget(shape, dtype, soft):
    torch.manual_seed(0)
    n, k, d = shape
    for scale in (1.0, 100.0):
        h, c = _unit(n, d, dtype=dtype), _unit(k, d, dtype=dtype)
        m = 0.9 * _unit(k, d, dtype=dtype) if soft else None
        labels = torch.randint(0, k, (n,), device=DEVICE)
        if n > 1:
            labels[n // 2] = -100
        check_case(h, c, labels, m, scale, torch.rand(n, device=DEVICE) + 0.5, "triton")


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (67, 5, 13), (300, 16, 8), (40, 300, 24)])
def test_soft_targets_within_budget(shape, dtype, temperature):
    torch.manual_seed(0)
    k, d_source, d = shape
    source, c = 0.8 * _unit(k, d_source, dtype=dtype), _unit(k, d, dtype=dtype)
    got = protoclip.soft_targets(source, c, temperature, backend="triton")
    base = protoclip.soft_targets(source, c, temperature, backend="reference")
    truth = protoclip.soft_targets(source.double(), c.double(), temperature)
    assert got.dtype == torch.float32
    assert_within_budget(got, truth, base)


@pytest.mark.parametrize("shape", [(0, 3, 8), (0, 0, 8), (4, 3, 0)])
def test_empty_input(shape):
    n, k, d = shape
    h, c = torch.zeros(n, d, device=DEVICE), torch.zeros(k, d, device=DEVICE, requires_grad=True)
    labels = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    loss = protoclip.prototype_cross_entropy(h, c, labels, 5.0, backend="triton")
    assert loss.item() == pytest.approx(torch.tensor(float(max(k, 1))).log().item() if n else 0)
    assert torch.autograd.grad(loss, c)[0].shape == (k, d)
    assert protoclip.soft_targets(c.detach(), c.detach(), 0.1, backend="triton").shape == (k, d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_matter(dtype):
    torch.manual_seed(0)
    h, c, m = (_unit(40, 12, dtype=dtype) for _ in range(3))
    labels = torch.randint(0, 40, (80,), device=DEVICE)[::2]
    h, c, m = *(x.T.contiguous().T for x in (h, c)), torch.cat([m, m], 1)[:, :12]
    check_case(h, c, labels, m, 9.0, torch.ones(40, device=DEVICE), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_banks_agree_with_single_calls_and_repeat_to_the_bit(dtype):
    torch.manual_seed(0)
    h = _unit(50, 16, dtype=dtype).requires_grad_()
    banks = [
        Bank(_unit(k, 16, dtype=dtype), torch.randint(0, k, (50,), device=DEVICE), m)
        for k, m in ((300, None), (7, _unit(7, 16, dtype=dtype)), (129, None))
    ]
    first, second = (protoclip.prototype_losses(h, banks, 14.3, backend="triton") for _ in "12")
    grads = [torch.autograd.grad(x.loss.sum(), h)[0] for x in (first, second)]
    assert torch.equal(first.loss, second.loss) and torch.equal(*grads)
    for loss, nearest, bank in zip(first.loss, first.nearest, banks, strict=True):
        single = protoclip.prototype_cross_entropy(
            h, bank.prototypes, bank.labels, 14.3, targets=bank.targets, backend="triton"
        )
        torch.testing.assert_close(loss, single)
        logits = h.detach().double() @ bank.prototypes.double().T
        reached = logits.gather(1, nearest[:, None])[:, 0]
        assert (logits.amax(dim=1) - reached).max() <= 1e-6


@pytest.mark.parametrize("scale", [10.0, -10.0, 0.0])
def test_nearest_takes_the_lowest_index_of_a_tie(scale):
    c = torch.eye(2, device=DEVICE).repeat(200, 1)  # every prototype 200 times, over many tiles
    h = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=DEVICE)
    bank = Bank(c, torch.tensor([0, 1], device=DEVICE))
    nearest = protoclip.prototype_losses(h, [bank], scale, backend="triton").nearest[0]
    assert nearest.tolist() == {10.0: [1, 0], -10.0: [0, 1], 0.0: [0, 0]}[scale]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 300])
def test_scale_of_zero_still_has_a_gradient(d, dtype):
    torch.manual_seed(0)
    h, c = _unit(20, d, dtype=dtype), _unit(60, d, dtype=dtype)
    rest = torch.arange(20, device=DEVICE), None, 0.0, torch.ones(20, device=DEVICE)
    got = run(h, c, *rest, "triton")["dscale"]
    truth = run(h.double(), c.double(), *rest, "reference")["dscale"]
    assert (got - truth).abs() <= 1e-5 * truth.abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_near_zero_does_not_cancel(dtype):
    c = F.normalize(torch.eye(100, 100) + 0.03 * torch.rand(100, 100)).to(DEVICE, dtype)
    labels = torch.arange(100, device=DEVICE)
    args = (labels, torch.tensor(100.0, device=DEVICE))
    got = protoclip.prototype_cross_entropy(c, c, *args, reduction="none", backend="triton")
    truth = protoclip.prototype_cross_entropy(c.double(), c.double(), *args, reduction="none")
    assert (got - truth).abs().max() <= 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_numbers_and_labels_stay_visible(value, dtype):
    h, c = _unit(4, 3, dtype=dtype), _unit(90, 3, dtype=dtype)
    h[2, 1] = value
    labels = torch.tensor([0, -100, 2, 90], device=DEVICE)

    def rows(backend, labels=labels):
        return protoclip.prototype_cross_entropy(
            h, c, labels, 10.0, reduction="none", backend=backend
        )

    assert rows("triton").isfinite().tolist() == [True, True, False, False]
    assert rows("triton")[1] == 0
    c[70, 0] = value
    known = labels.clamp(max=89)
    hidden = rows("triton", known).isfinite() & ~rows("reference", known).isfinite()
    assert not hidden.any()


def test_the_scratch_bound_changes_nothing(monkeypatch):
    from protoclip.kernels import prototype_cross_entropy

    torch.manual_seed(0)
    h, c = _unit(70, 12, dtype=torch.float32), _unit(90, 12, dtype=torch.float32)
    labels, weights = torch.randint(0, 90, (70,), device=DEVICE), torch.rand(70, device=DEVICE)
    monkeypatch.setattr(prototype_cross_entropy, "SCRATCH_BYTES", 4 * 70 * 20)
    check_case(h, c, labels, None, 20.0, weights, "triton")
