"""prototype_cross_entropy and soft_targets in C++: within the error budget of fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from prototype_problem import DTYPES, HARD, SOFT, check, problem, run, unit

import protoclip

REASON = protoclip.backends("prototype_cross_entropy")["cpu"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# N: none, one, two, five, a ragged tile, a tile and three. D: odd ones too, for pairs of bf16.
SHAPES = (
    (0, 64, 14.3), (1, 512, 14.3), (2, 128, 1.0), (5, 256, 100.0), (37, 1, 14.3), (37, 64, 14.3),
    (37, 123, 100.0), (37, 128, 100.0), (67, 512, 100.0), (131, 8, 1.0), (131, 8, 100.0),
)  # fmt: skip


@pytest.mark.parametrize("temperatures", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 257])  # one, two, a prime past one tile of 256
def test_loss_and_gradients_within_budget(k, dtype, temperatures):
    torch.manual_seed(0)
    for n, d, scale in SHAPES:
        check(n, k, d, dtype, temperatures, scale, draws=12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_draw_of_few_logits_is_within_budget(dtype):
    for k, n, d in ((1, 1, 8), (1, 63, 64), (2, 2, 128), (2, 500, 17), (257, 3, 512), (512, 2, 8)):
        for scale, temperature in itertools.product((1.0, 14.3, 100.0), HARD + SOFT):
            torch.manual_seed(0)
            check(n, k, d, dtype, (temperature,), scale)


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
@pytest.mark.parametrize("k, d, scale", [(257, 64, 14.3), (300, 512, 14.3), (257, 64, 100.0)])
def test_soft_targets_that_the_features_have_reached(k, d, scale, dtype):
    """Trained to the end: the expected prototype is the target; all of dh is rounding."""
    torch.manual_seed(0)
    c = unit(k, d, dtype=dtype)
    m = (torch.softmax(scale * c.double() @ c.double().T, 1) @ c.double()).to(dtype)
    args = c, c, torch.arange(k), m, scale, torch.ones(k) / k
    got, base = run(*args, dtype, "cpu"), run(*args, dtype, "reference")
    truth = run(*args, torch.float64, "reference")
    assert truth["dh"].abs().max() < 0.01 * scale / k * c.abs().max()  # of its terms
    for name in ("loss", "dh", "dc"):
        assert_within_budget(got[name], truth[name], base[name], name)


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
