"""info_nce: each backend of the CPU within the error budget, its edges, and the products it keeps.

Triton has its own tests.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import (
    PlainResults,
    Results,
    assert_results_within_budget,
    assert_same_bits,
    info_nce_gradients,
    leaf,
    loss_and_gradients,
    on_threads,
    strip_gradients,
    usable,
)
from room import run_in_fork, run_in_room
from torch import Tensor

import protoclip
from protoclip.model import processor_multiplies_bf16
from protoclip.ops import reference, softmax
from protoclip.ops.stash import no_stash
from protoclip.ops.sums import LN2

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_backend = pytest.mark.parametrize("backend", [b for b in usable("info_nce") if b != "triton"])
needs_cpu = pytest.mark.skipif(
    protoclip.backends("info_nce")["cpu"] is not None, reason="no native library"
)


def clustered(
    n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0, noise: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Unit rows as CLIP trains them: one modality's rows share a direction (cosine about 0.94),
    pairs are alike."""
    torch.manual_seed(seed)
    shared = torch.randn(n, d)
    centers = torch.randn(2, 1, d) / noise
    x = F.normalize(centers[0] + shared + 0.3 * torch.randn(n, d), dim=-1)
    y = F.normalize(centers[1] + shared + 0.3 * torch.randn(n, d), dim=-1)
    return x.to(dtype), y.to(dtype)


def computed(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float,
    weights: Tensor,
    backend: str,
    stash: bool | None = None,
) -> Results:
    """Losses of the pairs and the gradients of sum(weights * losses)."""
    leaves = {"x": leaf(x), "y": leaf(y), "logit_scale": leaf(logit_scale)}
    losses = protoclip.info_nce(
        leaves["x"],
        leaves["y"],
        leaves["logit_scale"],
        reduction="none",
        stash=stash,
        backend=backend,
    )
    return loss_and_gradients(losses, weights, **leaves)


def assert_info_nce_within_budget(
    x: Tensor,
    y: Tensor,
    *,
    logit_scale: float,
    weights: Tensor | None = None,
    row_terms: float = 0.0,
) -> None:
    """``row_terms``: the size of what a row's gradient sums, where that counts."""
    if weights is None:
        weights = torch.ones(len(x))

    def formula(dtype: torch.dtype) -> PlainResults:
        return info_nce_gradients(x, y, logit_scale=logit_scale, weights=weights, dtype=dtype)

    truth = formula(torch.float64)
    assert_results_within_budget(
        computed(x, y, logit_scale=logit_scale, weights=weights, backend="cpu"),
        truth=truth,
        base=formula(x.dtype),
        logit_scale=logit_scale,
        magnitudes={
            "loss": 1 + truth.values["loss"].abs().max().item(),
            "dx": max(truth.values["dx"].abs().max().item(), row_terms),
            "dy": max(truth.values["dy"].abs().max().item(), row_terms),
        },
    )


# N: the smallest, one short of a vector multiple, two ragged tiles, many tiles.
# D: odd, so that bf16 pairs need a zero; 64, 512, 768: as users have them. Each D with an N of one
# tile and with one of several.
SIZES = [
    (1, 1), (1, 512), (2, 17), (2, 768), (16, 64), (16, 123), (63, 1), (63, 512),
    (252, 17), (252, 64), (252, 123), (252, 768), (1000, 64),
]  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit_scale", [1.0, 14.3, 100.0])
def test_losses_and_gradients_are_within_budget(logit_scale: float, dtype: torch.dtype) -> None:
    for seed, (n, d) in enumerate(SIZES):
        x, y = clustered(n, d, dtype, seed)
        weights = torch.ones(n) if seed % 2 else torch.rand(n) + 0.5
        assert_info_nce_within_budget(x, y, logit_scale=logit_scale, weights=weights)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosines_of_one_and_minus_one_are_within_budget(dtype: torch.dtype) -> None:
    """At scale 100: losses near zero, and logits 289 powers of two apart.

    Where all rows are alike too, a gradient is a sum of equal terms that cancel: bf16 products
    round each by 2^-9, so there alone the size of the terms counts."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(150, 32), dim=-1).to(dtype)
    assert_info_nce_within_budget(x, x, logit_scale=100.0)
    assert_info_nce_within_budget(x, -x, logit_scale=100.0)
    row_terms = 0.0
    if dtype == torch.bfloat16:
        row_terms = 2 * 100.0 * x.abs().max().item()
    same = x[:1].expand(150, 32)
    half = torch.cat([same[:75], -same[:75]])
    for image, text in ((same, same), (same, -same), (half, x), (half, half.flip(0))):
        assert_info_nce_within_budget(image, text, logit_scale=100.0, row_terms=row_terms)


@needs_cpu
def test_a_loss_near_zero_keeps_its_digits() -> None:
    """The positive's own weight is exactly one: no 1e-7 of a rounded reference remains."""
    x = torch.eye(256)
    for logit_scale in (14.0, 100.0):
        loss = protoclip.info_nce(x, x, logit_scale, reduction="none", backend="cpu")
        truth = reference.info_nce(x.double(), x.double(), torch.tensor(logit_scale).double())
        assert (loss.double() - truth).abs().max() <= 2**-21
        if logit_scale == 100:
            assert (loss == 0).all()  # the truth is 1e-41


WITHOUT_BF16 = """
import torch, test_info_nce, prototype_problem
x, y = test_info_nce.clustered(300, 65, torch.bfloat16)
weights = torch.rand(300) + 0.5
test_info_nce.assert_info_nce_within_budget(x, y, logit_scale=100.0, weights=weights)
prototype_problem.assert_random_problem_within_budget(
    90, 301, 65, dtype=torch.bfloat16, temperature=0.1, logit_scale=100.0
)
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


class Columns(NamedTuple):
    """Of all ranks; of one rank ``n`` rows, from ``offset`` on."""

    n: int
    m: int
    offset: int


BLOCK = Columns(131, 700, 300)  # within a block of G
# More blocks of rows (1,024) and of columns (4,096), each with an odd end.
BLOCKS = Columns(1153, 4229, 3000)


@needs_cpu
@pytest.mark.parametrize(
    "columns, both_directions, dtype, logit_scale",
    [
        (BLOCK, True, torch.float32, 40.0),
        (BLOCK, True, torch.bfloat16, 100.0),
        (BLOCK, False, torch.float32, 100.0),
        (BLOCK, False, torch.bfloat16, 40.0),
        (BLOCKS, True, torch.bfloat16, 40.0),
        (BLOCKS, False, torch.float32, 100.0),
    ],
    ids=str,
)
def test_rows_of_one_rank_against_the_columns_of_all_are_within_budget(
    columns: Columns, both_directions: bool, dtype: torch.dtype, logit_scale: float
) -> None:
    """As local_loss asks for; the same bits for any number of threads."""
    n, m, offset = columns
    features, y = clustered(m, 48, dtype)
    x = features[offset : offset + n]
    row_weight = torch.rand(n)
    column_weight = torch.rand(m) if both_directions else torch.empty(0)
    strip = softmax.info_nce_loss(
        x=x,
        y=y,
        logit_scale=torch.tensor(logit_scale),
        offset=offset,
        both_directions=both_directions,
        reduction="none",
        backend="cpu",
        keep_stash=False,
        group_name="",
    )

    def strip_gradient() -> Any:
        return softmax.info_nce_gradients(
            x,
            y,
            torch.tensor(logit_scale),
            row_reference=strip.row_reference,
            row_sum=strip.row_sum,
            column_reference=strip.column_reference,
            column_sum=strip.column_sum,
            row_weight=row_weight,
            column_weight=column_weight,
            both_directions=False,
            reduction="none",
            group_name="",
            stash=no_stash(x),
            offset=offset,
            backend="cpu",
        )

    gradients, *repeated = on_threads(strip_gradient, (1, 2, 7))
    for other in repeated:
        assert torch.equal(gradients.dx, other.dx) and torch.equal(gradients.dy, other.dy)
        assert torch.equal(gradients.dlogit_scale, other.dlogit_scale)
    got = {
        "row level": LN2 * (strip.row_sum.log2() + strip.row_reference),
        "positive": LN2 * strip.positive,
        "dx": gradients.dx,
        "dy": gradients.dy,
        "dlogit_scale": gradients.dlogit_scale,
    }
    if both_directions:
        got["column level"] = LN2 * (strip.column_sum.log2() + strip.column_reference)

    def formula(wide: torch.dtype) -> PlainResults:
        return strip_gradients(
            x,
            y,
            logit_scale=logit_scale,
            row_weight=row_weight,
            column_weight=column_weight,
            dtype=wide,
            offset=offset,
        )

    assert_results_within_budget(
        got, truth=formula(torch.float64), base=formula(dtype), logit_scale=logit_scale
    )


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_offsets_do_not_matter(dtype: torch.dtype) -> None:
    x, y = clustered(70, 34, dtype)

    def rows(x: Tensor) -> Tensor:
        return protoclip.info_nce(x, y, 20.0, reduction="none", backend="cpu")

    wide = torch.full((70, 73), 9.0, dtype=dtype)
    wide[:, 5:39] = x
    expected = rows(x)
    for view in (wide[:, 5:39], x.T.contiguous().T, x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(rows(view), expected)


@each_backend
def test_two_pairs_and_equal_rows_by_hand(backend: str) -> None:
    two = torch.eye(2)
    loss = protoclip.info_nce(two, two, 2.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)
    equal = F.normalize(torch.ones(9, 4), dim=1)
    loss = protoclip.info_nce(equal, equal, 50.0, backend=backend)
    assert loss.item() == pytest.approx(math.log(9))


@each_backend
@pytest.mark.parametrize("n, d", [(0, 8), (1, 8), (3, 0), (1, 0), (0, 0)])
def test_no_pairs_one_pair_and_no_features_have_a_loss(backend: str, n: int, d: int) -> None:
    x = torch.ones(n, d, requires_grad=True)
    y = torch.ones(n, d, requires_grad=True)
    logit_scale = torch.tensor(5.0, requires_grad=True)
    loss = protoclip.info_nce(x, y, logit_scale, backend=backend)
    assert loss.item() == pytest.approx(torch.tensor(float(max(n, 1))).log().item())
    loss.backward()
    assert x.grad.shape == x.shape and (x.grad == 0).all() and logit_scale.grad == 0


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_gives_a_non_finite_loss(backend: str, bad: float) -> None:
    for dtype, row in itertools.product(DTYPES, (0, 150, 299)):
        x, y = clustered(300, 20, dtype)
        x[row, 3] = bad
        assert not protoclip.info_nce(x, y, 10.0, backend=backend).isfinite()
        assert not protoclip.info_nce(y, x, 10.0, backend=backend).isfinite()
    x, y = clustered(30, 20)
    assert not protoclip.info_nce(x, y, torch.tensor(bad), backend=backend).isfinite()


@each_backend
def test_sum_and_mean_are_those_of_the_rows(backend: str) -> None:
    x, y = clustered(40, 16)
    rows = protoclip.info_nce(x, y, 9.0, reduction="none", backend=backend)
    assert rows.shape == (40,) and rows.dtype == torch.float32
    total = protoclip.info_nce(x, y, 9.0, reduction="sum", backend=backend)
    mean = protoclip.info_nce(x, y, 9.0, backend=backend)
    assert torch.allclose(total, rows.sum()) and torch.allclose(mean, rows.mean())


@each_backend
@pytest.mark.parametrize("factor", [1.0, -3.5])
def test_a_factor_of_the_mean_is_one_of_its_gradient(backend: str, factor: float) -> None:
    x, y = clustered(40, 16)
    x.requires_grad_()
    loss = reference.info_nce(x, y, torch.tensor(9.0)).mean()
    (of_mean,) = torch.autograd.grad(loss, x)
    (got,) = torch.autograd.grad(factor * protoclip.info_nce(x, y, 9.0, backend=backend), x)
    assert torch.allclose(got, factor * of_mean, rtol=1e-4, atol=1e-7)


@each_backend
def test_autocast_keeps_the_features_dtype(backend: str) -> None:
    x, y = clustered(24, 10)
    expected = protoclip.info_nce(x, y, 5.0, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = protoclip.info_nce(x, y, 5.0, backend=backend)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


# ---- products kept for the backward pass: no bit of the result ----


# 1: one lane; 130 and 300: ragged tiles in both directions; 777: several tasks; D odd and even.
@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, d", [(1, 1), (2, 3), (130, 17), (300, 64), (777, 96)])
def test_a_stash_and_the_number_of_threads_change_no_bit(
    n: int, d: int, dtype: torch.dtype
) -> None:
    x, y = clustered(n, d, dtype)
    weights = torch.rand(n)

    def run(stash: bool | None) -> Results:
        return computed(x, y, logit_scale=30.0, weights=weights, stash=stash, backend="cpu")

    without = run(stash=False)
    for stash in (None, True):
        for results in on_threads(lambda stash=stash: run(stash), (1, 2, 3)):
            assert_same_bits(results, without)


@dataclass(frozen=True)
class Strip:
    """A call of the op: rows against 256 columns, and what it returns."""

    rows: int
    offset: int
    both_directions: bool
    reduction: str
    keep_stash: bool


STRIPS = [
    Strip(rows=256, offset=0, both_directions=True, reduction="mean", keep_stash=True),
    Strip(rows=256, offset=0, both_directions=True, reduction="none", keep_stash=False),
    Strip(rows=128, offset=3, both_directions=False, reduction="none", keep_stash=True),
]


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", STRIPS, ids=str)
def test_opcheck_accepts_the_op(form: Strip, dtype: torch.dtype) -> None:
    x, y = clustered(256, 6, dtype)  # whole tiles: the room around ragged ones is not written
    arguments = {
        "x": leaf(x[: form.rows]),
        "y": leaf(y),
        "logit_scale": leaf(30.0),
        "offset": form.offset,
        "both_directions": form.both_directions,
        "reduction": form.reduction,
        "backend": "cpu",
        "keep_stash": form.keep_stash,
        "group_name": "",
    }
    torch.library.opcheck(torch.ops.protoclip.info_nce, (), arguments)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_gradients_have_the_same_bits_at_every_size(dtype: torch.dtype) -> None:
    def loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        return 2 * protoclip.info_nce(x, y, logit_scale, backend="cpu")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (256, 230):
        x, y = clustered(n, 6, dtype)
        leaves = {"x": leaf(x), "y": leaf(y), "logit_scale": leaf(30.0)}
        expected = loss_and_gradients(loss(**leaves), **leaves)
        assert_same_bits(loss_and_gradients(compiled(**leaves), **leaves), expected)


@needs_cpu
@pytest.mark.slow
def test_more_than_two_to_the_31_logits_are_right(pytestconfig: pytest.Config) -> None:
    """Rows of five kinds: the truth follows from a 5 x 5 table."""
    if not pytestconfig.getoption("--all-sizes"):
        pytest.skip("half a minute: make check-sizes")
    n = 46_345
    num_kinds = 5
    rows_of_a_kind = n / num_kinds
    x_kinds, y_kinds = (t.double() for t in clustered(num_kinds, 4, noise=1.0))
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
