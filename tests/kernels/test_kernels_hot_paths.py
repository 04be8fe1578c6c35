"""The paths on which a GPU spends its time: whole tiles without a positive, of every row of the
launch table, for every loss and every form of ids; and that a wrong one fails.

Each case runs on the card that is there with the card's own row; without a card in Triton's
interpreter, whose tiles are 32 x 64, and in C++. What the logits without the positives add to a
gradient is compared (benchmarks/parity.py), and that a wrong share of it would be noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from budget import assert_within_budget, leaf, usable
from op_table import Masks, Relation
from torch import Tensor

import protoclip
from benchmarks import parity
from benchmarks.parity import Form, Gradients, assert_gradients, sigmoid_form, softmax_form
from protoclip.ops import Bank

pytest.importorskip("triton")
from protoclip.kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton"] if DEVICE == "cuda" else usable("info_nce")
TRITON_MISSING = protoclip.backends("info_nce")["triton"]
needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))


LARGE_TILES = {"large": 0, "few": 1 << 60}  # per SM, from which on the rows of large batches serve


N = 384  # three rows and columns of tiles of 128, one off the diagonal of 128 x 256
N_INTERPRETED = 192  # of the interpreter's tiles, 32 x 64


@dataclass(frozen=True)
class Problem:
    """Features, the loss written out, the same loss with the weight of one column doubled, and the
    loss as a user calls it."""

    x: Tensor
    y: Tensor
    logit_scale: float
    form: Form
    one_column_doubled: Form | None  # None: columns have no weights; double one of G itself
    call: Callable[..., Tensor]  # (x, y, logit_scale, backend) -> the weighted loss []
    fixed_keys: int = 0  # the last rows of y have no gradient


@dataclass(frozen=True)
class Returned:
    """What a backend returned: [N, D], [M, D], []."""

    dx: Tensor
    dy: Tensor
    dlogit_scale: Tensor


def row_weights(n: int) -> Tensor:
    """None is small, so that none is lost in the rounding of another."""
    generator = torch.Generator().manual_seed(7)
    return ((torch.rand(n, generator=generator) + 0.5) / n).to(DEVICE)


def shared_ids(n: int) -> Tensor:
    """[N, 2]: three neighbours share the first, and the second too or not; the first rows share the
    first with the last ones. Most tiles off the diagonal hold no equal pair, some do."""
    first = torch.arange(n) // 3
    first[-16:] = first[:16]
    return torch.stack([first, torch.arange(n) // 5 * 10**12], dim=1).to(DEVICE)


def id_options(n: int, same_id: str | None, ids: Tensor | None = None) -> dict[str, Any]:
    """With ids (``shared_ids`` unless given) or, None, without."""
    if same_id is None:
        return {}
    return {"ids": shared_ids(n) if ids is None else ids, "same_id": same_id}


def masks_of(n: int, ids: Tensor | None = None, same_id: str = "exclude") -> Masks:
    """Of pairs on the diagonal."""
    ids = None if ids is None else ids.cpu()
    masks = Relation(query_ids=ids, key_ids=ids, same_id=same_id).masks(n, n)
    return Masks(*(mask.to(DEVICE) for mask in masks))


def info_nce_problem(
    x: Tensor, y: Tensor, logit_scale: float, same_id: str | None = None
) -> Problem:
    options = id_options(len(x), same_id)
    relation = masks_of(len(x), **options)
    weights = row_weights(len(x))
    doubled_weights = weights.clone()
    doubled_weights[5] *= 2

    def form(column_weights: Tensor) -> Form:
        return softmax_form(
            relation.positive,
            relation.seen,
            weights / 2,
            column_weights / 2,
            rounds_positives=same_id is not None,
        )

    def call(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
        loss = protoclip.info_nce(x, y, logit_scale, reduction="none", backend=backend, **options)
        return (loss * weights).sum()

    return Problem(x, y, logit_scale, form(weights), form(doubled_weights), call)


def one_way_problem(x: Tensor, y: Tensor, logit_scale: float) -> Problem:
    """Queries against keys."""
    relation = masks_of(len(x))
    weights = row_weights(len(x))

    def call(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
        loss = protoclip.contrastive(x, y, logit_scale, reduction="none", backend=backend)
        return (loss * weights).sum()

    form = softmax_form(relation.positive, relation.seen, weights)
    return Problem(x, y, logit_scale, form, None, call)


def contrastive_problem(x: Tensor, y: Tensor, logit_scale: float) -> Problem:
    """All that can be said about queries and keys but that ids are positives: positions,
    exclusions, two columns of ids, biases."""
    n = len(x)
    relation = masks_of(n, shared_ids(n))
    weights = row_weights(n)
    positions = torch.arange(n, device=DEVICE)
    excluded = positions.roll(9)
    key_bias = torch.linspace(-1, 1, n, device=DEVICE)

    def call(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
        loss = protoclip.contrastive(
            x,
            y,
            logit_scale,
            positives=positions,
            key_ids=shared_ids(n),
            exclude=excluded,
            key_bias=key_bias,
            reduction="none",
            backend=backend,
        )
        return (loss * weights).sum()

    form = softmax_form(
        relation.positive,
        relation.seen & (excluded[:, None] != positions[None]),
        weights,
        key_bias=key_bias,
        rounds_positives=True,
    )
    return Problem(x, y, logit_scale, form, None, call)


def siglip_problem(
    x: Tensor, y: Tensor, logit_scale: float, same_id: str | None = None, ids: Tensor | None = None
) -> Problem:
    options = id_options(len(x), same_id, ids)
    relation = masks_of(len(x), **options)
    bias = -logit_scale  # a little below 0: the others' entries are as large as the positives'

    def call(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
        logit_bias = torch.tensor(bias, device=DEVICE)
        sum_: dict[str, Any] = {"reduction": "sum", **options}
        return protoclip.ops.sigmoid_loss(x, y, logit_scale, logit_bias, backend=backend, **sum_)

    form = sigmoid_form(masks_of(len(x)).positive, relation.positive, relation.seen, bias)
    return Problem(x, y, logit_scale, form, None, call)


def hard_prototype_problem(x: Tensor, y: Tensor, logit_scale: float) -> Problem:
    weights = row_weights(len(x))
    labels = torch.arange(len(x), device=DEVICE).roll(31) % len(y)

    def call(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
        rows = protoclip.prototype_cross_entropy(
            x, y, labels, logit_scale, reduction="none", backend=backend
        )
        return (rows * weights).sum()

    form = parity.prototype_form(labels, len(y), weights, False)
    return Problem(x, y, logit_scale, form, None, call)


def soft_prototype_problem(x: Tensor, y: Tensor, logit_scale: float) -> Problem:
    """Soft targets are more rows of y, which a row looks up; the nearest prototype is wanted too,
    which takes rows of its own."""
    k = len(y)
    weights = row_weights(len(x))
    labels = torch.arange(len(x), device=DEVICE).roll(31) % k
    targets = (0.5 * (y + y.roll(1, 0).float())).to(y)

    def call(x: Tensor, y: Tensor, logit_scale: Tensor, backend: str) -> Tensor:
        bank = Bank(y[:k], labels, y[k:].detach())
        losses = protoclip.prototype_losses(
            x, [bank], logit_scale, reduction="none", backend=backend
        )
        return (losses.loss[0] * weights).sum()

    form = parity.prototype_form(labels, k, weights, True)
    return Problem(x, torch.cat([y, targets]), logit_scale, form, None, call, fixed_keys=k)


FAMILIES: dict[str, Callable[[Tensor, Tensor, float], Problem]] = {
    "info_nce": info_nce_problem,
    "one way": one_way_problem,
    "ids excluded": partial(info_nce_problem, same_id="exclude"),
    "ids positive": partial(info_nce_problem, same_id="positive"),
    "contrastive, one way": contrastive_problem,
    "siglip": siglip_problem,
    "siglip, ids excluded": partial(siglip_problem, same_id="exclude"),
    "siglip, ids positive": partial(siglip_problem, same_id="positive"),
    "prototypes, hard": hard_prototype_problem,
    "prototypes, soft": soft_prototype_problem,
}
# D: below and at the width of Hopper's steps, and where its deep row begins; 43: rows that no wide
# load fits, 200: a padded tile of prototypes.
DEPTHS = {torch.bfloat16: (64, 128, 256, 512, 43), torch.float16: (64, 128, 512, 200)}
DEPTHS |= {torch.float32: (128,)}


class Case(NamedTuple):
    family: str
    d: int
    dtype: torch.dtype


CASES = [Case(family, d, dtype) for dtype in DEPTHS for d in DEPTHS[dtype] for family in FAMILIES]
# The interpreter has one row for all widths and takes seconds for a loss: one width for each form,
# and both dtypes for the one that the others are built on.
IN_THE_INTERPRETER = [Case(family, 64, torch.bfloat16) for family in FAMILIES]
IN_THE_INTERPRETER += [Case("info_nce", 128, torch.float16)]
# In C++: every family, every dtype, every depth.
IN_CPP = [
    Case("info_nce", 512, torch.bfloat16),
    Case("one way", 43, torch.bfloat16),
    Case("ids excluded", 128, torch.float16),
    Case("ids positive", 128, torch.float32),
    Case("contrastive, one way", 200, torch.float16),
    Case("siglip", 256, torch.bfloat16),
    Case("siglip, ids excluded", 64, torch.bfloat16),
    Case("siglip, ids positive", 512, torch.float16),
    Case("prototypes, hard", 128, torch.bfloat16),
    Case("prototypes, soft", 128, torch.float32),
]
# The reference is plain torch: one case of each formula.
IN_THE_REFERENCE = [
    Case("ids positive", 64, torch.bfloat16),
    Case("siglip, ids positive", 64, torch.float16),
    Case("prototypes, soft", 64, torch.bfloat16),
]


def pairs_for(backend: str) -> int:
    return N_INTERPRETED if backend == "triton" and DEVICE == "cpu" else N


@cache
def problem_of(family: str, d: int, dtype: torch.dtype, n: int = N) -> Problem:
    image, text = parity.cone(n, n, d)
    return FAMILIES[family](image.to(DEVICE, dtype), text.to(DEVICE, dtype), 14.3)


def computed(problem: Problem, backend: str) -> Returned:
    x = leaf(problem.x.clone())
    y = leaf(problem.y.clone())
    logit_scale = leaf(problem.logit_scale, device=DEVICE)
    loss = problem.call(x, y, logit_scale, backend=backend)
    dx, dy, dlogit_scale = torch.autograd.grad(loss, (x, y, logit_scale))
    return Returned(dx, dy, dlogit_scale)


def written_out(problem: Problem, dtype: torch.dtype) -> Gradients:
    gradients = parity.gradients(problem.form, problem.x, problem.y, problem.logit_scale, dtype)
    keys = slice(0, len(problem.y) - problem.fixed_keys)
    return replace(gradients, dy=gradients.dy[keys], share_y=gradients.share_y[keys])


def assert_right(problem: Problem, got: Returned, truth: Gradients, base: Gradients) -> None:
    dy = got.dy[: len(truth.dy)]
    assert_gradients(got.dx, dy, problem.form, truth, base, problem.logit_scale)
    assert_within_budget(
        got.dlogit_scale,
        truth=truth.dscale.float(),
        base=base.dscale,
        name="dlogit_scale",
        magnitude=truth.dscale_terms.item(),
        logit_scale=problem.logit_scale,
    )


def wrong_gradients_of_the_logits(problem: Problem, truth: Gradients) -> dict[str, Tensor]:
    """The gradient of the logits as kernels with one fault each would have it."""
    right = truth.logits
    negatives = right.masked_fill(problem.form.taken_out, 0)
    tile = torch.zeros_like(problem.form.taken_out)
    tile[-32:, 64:128] = True  # the smallest tile there is, the interpreter's
    column = torch.zeros_like(tile)
    column[:, 5] = True
    wrong_column = right + negatives * column
    if problem.one_column_doubled is not None:
        doubled = parity.gradients(
            problem.one_column_doubled, problem.x, problem.y, problem.logit_scale, torch.float64
        )
        wrong_column = torch.where(problem.form.taken_out, right, doubled.logits)
    return {
        "zero": right - negatives,
        "doubled": right + negatives,
        "a tile skipped": right - negatives * tile,
        "a column's weight": wrong_column,
    }


def with_error(problem: Problem, got: Returned, error: Tensor) -> Returned:
    """What was returned, had the gradient of the logits been off by ``error`` [N, M]."""
    scaled_error = problem.logit_scale * error
    dx = got.dx.double() + scaled_error @ problem.y.double()
    dy = got.dy.double() + scaled_error.T @ problem.x.double()
    return replace(got, dx=dx.to(got.dx.dtype), dy=dy.to(got.dy.dtype))


def cases_of(backend: str) -> list[Case]:
    if backend == "triton" and DEVICE == "cpu":
        return IN_THE_INTERPRETER
    return {"reference": IN_THE_REFERENCE, "cpu": IN_CPP}.get(backend, CASES)


def backends_and_cases() -> Iterator[Any]:
    for backend in BACKENDS:
        for case in cases_of(backend):
            marks = needs_triton if backend == "triton" else ()
            identity = f"{backend}-{case.family}-{case.d}-{case.dtype}"
            yield pytest.param(backend, case, marks=marks, id=identity)


@pytest.mark.parametrize("backend, case", backends_and_cases())
def test_the_share_of_the_negatives_is_right_and_a_wrong_one_fails(
    backend: str, case: Case
) -> None:
    problem = problem_of(case.family, case.d, case.dtype, pairs_for(backend))
    truth = written_out(problem, torch.float64)
    base = written_out(problem, case.dtype)
    got = computed(problem, backend)
    assert_right(problem, got, truth, base)
    for fault, wrong in wrong_gradients_of_the_logits(problem, truth).items():
        broken = with_error(problem, got, wrong - truth.logits)
        with pytest.raises(AssertionError, match="over the budget"):
            assert_right(problem, broken, truth, base)
            pytest.fail(f"{fault}: not seen")


def whole_tiles_without_a_positive(rows: int, columns: int, row: launch.Launch) -> int:
    """Of a square problem whose positives are the diagonal."""
    tiles = itertools.product(
        range(0, rows - row.block_n + 1, row.block_n),
        range(0, columns - row.block_m + 1, row.block_m),
    )
    return sum(i + row.block_n <= j or j + row.block_m <= i for i, j in tiles)


BY_DESCRIPTOR = ("info_nce_forward_kernel", "info_nce_gradient_kernel", "sigmoid_loss_kernel")


def rows_of_the_table(arch: int) -> dict[str, launch.Launch]:
    rows = {f"HALF {kernel}": table[arch] for kernel, table in launch.HALF.items()}
    rows |= {f"HALF_LARGE {k}": t[arch] for k, t in launch.HALF_LARGE.items() if arch in t}
    rows |= {f"HALF_ANY {kernel}": row for kernel, row in launch.HALF_ANY.items()}
    rows |= {f"ATTENTION {width}": row for width, row in launch.ATTENTION[arch].items()}
    for (of_arch, width), row in launch.ATTENTION_FULL.items():
        if of_arch == arch:
            rows[f"ATTENTION_FULL {width}"] = row
    rows |= {"FLOAT_CONTRASTIVE": launch.FLOAT_CONTRASTIVE}
    rows |= {"FLOAT_ANY": launch.FLOAT_ANY, "CHUNKED": launch.CHUNKED[arch]}
    return rows | {"CHUNKED_FLOAT": launch.CHUNKED_FLOAT}


@needs_triton
@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
def test_every_row_of_the_table_has_a_whole_tile_without_a_positive(
    monkeypatch: pytest.MonkeyPatch, arch: int
) -> None:
    """Nothing is launched: which row each case of this file takes on a GPU, and its tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from protoclip.kernels.info_nce import info_nce_forward_kernel

    options = launch.Launch.options
    asked_for: list[launch.Launch] = []
    reached: set[launch.Launch] = set()

    def remembered(row: launch.Launch) -> Any:
        asked_for.append(row)
        return options.fget(row)

    def launched(kernel: Any, *arguments: Any, **keywords: Any) -> None:
        row = asked_for[-1]
        if row.descriptors and kernel.__name__ in BY_DESCRIPTOR:
            assert isinstance(keywords["x"], TensorDescriptor), kernel.__name__
        if row.block_m and whole_tiles_without_a_positive(N, N, row):
            reached.add(row)

    monkeypatch.setattr(launch.Launch, "options", property(remembered))
    jit_function = type(info_nce_forward_kernel)
    monkeypatch.setattr(jit_function, "__getitem__", lambda kernel, grid: partial(launched, kernel))
    monkeypatch.setattr(launch, "compiling_for", arch)
    for least_tiles in LARGE_TILES.values():
        monkeypatch.setattr(launch, "LARGE_TILES", least_tiles)
        for case in CASES:
            computed(problem_of(case.family, case.d, case.dtype), "triton")
    missed = [name for name, row in rows_of_the_table(arch).items() if row not in reached]
    assert missed == []


@needs_triton
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
def test_ids_that_nobody_shares_change_no_bit_of_siglip(same_id: str) -> None:
    """Tiles without an equal pair take the path of tiles without ids."""
    n = pairs_for("triton")
    image, text = parity.cone(n, n, 64)
    x = image.to(DEVICE, torch.bfloat16)
    y = text.to(DEVICE, torch.bfloat16)
    plain = computed(siglip_problem(x, y, 14.3), "triton")
    ids = torch.arange(n, device=DEVICE)[:, None]
    distinct = computed(siglip_problem(x, y, 14.3, same_id, ids), "triton")
    assert torch.equal(plain.dx, distinct.dx)
    assert torch.equal(plain.dy, distinct.dy)
    assert torch.equal(plain.dlogit_scale, distinct.dlogit_scale)
