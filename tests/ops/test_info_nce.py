"""info_nce, beyond what every op is asked: by hand, digits, processors, many pairs, memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from budget import usable
from op_table import FUSED_DTYPES, Draw, Size, assert_as_formula, info_nce
from room import run_in_fork, run_in_room

import protoclip
from protoclip.model import processor_multiplies_bf16

each_backend = pytest.mark.parametrize("backend", [b for b in usable("info_nce") if b != "triton"])
needs_cpu = pytest.mark.skipif(
    protoclip.backends("info_nce")["cpu"] is not None, reason="no native library"
)


@needs_cpu
@pytest.mark.parametrize("dtype", FUSED_DTYPES, ids=str)
def test_cosines_of_one_and_minus_one_are_within_budget(dtype: torch.dtype) -> None:
    """At scale 100: losses near zero, and logits 289 powers of two apart.

    Where all rows are alike too, a gradient is a sum of equal terms that cancel: bf16 products
    round each by 2^-9, so there alone the size of the terms counts."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(150, 32), dim=-1).to(dtype)
    assert_as_formula(info_nce(x, x, 100.0), "cpu")
    assert_as_formula(info_nce(x, -x, 100.0), "cpu")
    row_terms = 0.0
    if dtype == torch.bfloat16:
        row_terms = 2 * 100.0 * x.abs().max().item()
    same = x[:1].expand(150, 32)
    half = torch.cat([same[:75], -same[:75]])
    for image, text in ((same, same), (same, -same), (half, x), (half, half.flip(0))):
        assert_as_formula(info_nce(image, text, 100.0), "cpu", size=row_terms)


@needs_cpu
def test_a_loss_near_zero_keeps_its_digits() -> None:
    """The positive's own weight is exactly one: no 1e-7 of a rounded reference remains."""
    x = torch.eye(256)
    for logit_scale in (14.0, 100.0):
        loss = protoclip.info_nce(x, x, logit_scale, reduction="none", backend="cpu")
        image = x.double()
        truth = protoclip.info_nce(image, image, logit_scale, reduction="none", backend="reference")
        assert (loss.double() - truth).abs().max() <= 2**-21
        if logit_scale == 100:
            assert (loss == 0).all()  # the truth is 1e-41


WITHOUT_BF16 = """
import torch, op_table
for op in ("info_nce", "prototype_cross_entropy"):
    call = op_table.BY_NAME[op].make(
        op_table.Size(300, 301, 65), torch.bfloat16, logit_scale=100.0
    )
    op_table.assert_as_formula(call, "cpu")
"""


@needs_cpu
@pytest.mark.parametrize("cpu", ["AVX512_CORE", "SSE41"])
def test_cpus_without_bf16_products_are_within_budget(cpu: str) -> None:
    """fp32 products for bf16 features; on the second CPU oneDNN has none either, and ours run."""
    run_in_fork(WITHOUT_BF16, ONEDNN_MAX_CPU_ISA=cpu)


SWITCHED_OFF = """
import torch, protoclip
x = torch.nn.functional.normalize(torch.randn(300, 66), dim=1).bfloat16().requires_grad_()
def both() -> torch.Tensor:
    loss = protoclip.info_nce(x, x.detach().roll(1, 0), 14.0)
    return torch.cat([loss.detach()[None], *torch.autograd.grad(loss, x)[0].float()])
off = torch.backends.mkldnn.flags(enabled=False)
if {off_first}:
    with off:
        without = both()
    with_onednn = both()
else:
    with_onednn = both()
    with off:
        without = both()
assert torch.equal(with_onednn, both())
torch.testing.assert_close(without, with_onednn, rtol=1e-2, atol=1e-4)
"""


@needs_cpu
@pytest.mark.parametrize("off_first", [True, False])
def test_onednn_may_be_switched_off_at_any_time(off_first: bool) -> None:
    """torch.backends.mkldnn.flags: then bf16 has fp32 products, and afterwards its own again."""
    run_in_fork(SWITCHED_OFF.format(off_first=off_first))


@each_backend
def test_two_pairs_and_equal_rows_by_hand(backend: str) -> None:
    two = torch.eye(2)
    loss = protoclip.info_nce(two, two, 2.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    equal = F.normalize(torch.ones(9, 4), dim=1)
    loss = protoclip.info_nce(equal, equal, 50.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(9))


# ---- products kept for the backward pass: no bit of the result ----


@needs_cpu
@pytest.mark.slow
def test_more_than_two_to_the_31_logits_are_right(pytestconfig: pytest.Config) -> None:
    """Rows of five kinds: the truth follows from a 5 x 5 table."""
    if not pytestconfig.getoption("--all-sizes"):
        pytest.skip("half a minute: make check-sizes")
    n = 46_345
    num_kinds = 5
    rows_of_a_kind = n / num_kinds
    x_kinds, y_kinds = (x.double() for x in Draw(0).pairs(Size(num_kinds, num_kinds, 4), "cone"))
    logit_scale = 10.0
    logits = logit_scale * x_kinds @ y_kinds.T
    by_row = torch.softmax(logits, dim=1) / rows_of_a_kind
    by_column = torch.softmax(logits, dim=0) / rows_of_a_kind
    levels = logits.logsumexp(dim=1) + logits.logsumexp(dim=0) + 2 * math.log(rows_of_a_kind)
    losses = levels / 2 - logits.diagonal()
    # Of the sum over the pairs, for one row of a kind.
    expected = (by_row + by_column) / 2 * rows_of_a_kind @ y_kinds
    dx = logit_scale * (expected - y_kinds)
    kind_of_row = torch.arange(n) % num_kinds
    x = x_kinds.float()[kind_of_row].requires_grad_()
    y = y_kinds.float()[kind_of_row]
    loss = protoclip.info_nce(x, y, logit_scale, reduction="none", backend="cpu")
    loss.sum().backward()
    assert (loss.detach() - losses[kind_of_row]).abs().max() < 1e-5
    assert (x.grad - dx[kind_of_row]).abs().max() < 1e-4 * dx.abs().max()


MEMORY = """
import pytest, torch, protoclip
n, d = 8192, 64
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
@pytest.mark.parametrize(
    "dtype",
    [
        "float",
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                not processor_multiplies_bf16(), reason="this CPU widens bf16 rows to fp32"
            ),
        ),
    ],
)
def test_memory_does_not_grow_with_the_square_of_the_batch(dtype: str) -> None:
    """64 MiB beside the gradients hold it, and 8 of mere addresses: blocks are whole huge pages.

    A matrix of fp32 logits would be 256."""
    run_in_room(MEMORY.replace("{dtype}", dtype))
