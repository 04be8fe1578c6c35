"""The paths on which a GPU spends its time: whole tiles without a positive, of every row of the
launch table, for every loss and every form of ids; and that a wrong one fails.

Each case runs on the card that is there with the card's own row; without a card in Triton's
interpreter, whose tiles are 32 x 64, and in C++. What the logits without the positives add to a
gradient is compared (benchmarks/parity.py). The mutations at the end of the file make that wrong:
once in the gradients that a backend returned, once inside a kernel while the interpreter runs it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from budget import assert_within_budget, usable

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
interpreted = pytest.mark.skipif(
    TRITON_MISSING is not None or DEVICE == "cuda",
    reason=str(TRITON_MISSING or "a compiled kernel cannot be changed while it runs"),
)
N = 384  # three rows and columns of tiles of 128, one off the diagonal of 128 x 256


@dataclass(frozen=True)
class Problem:
    """Features, the loss written out, the same loss with the weight of one column doubled, and the
    loss as a user calls it."""

    x: torch.Tensor
    y: torch.Tensor
    scale: float
    form: Form
    one_column_doubled: Form | None  # None: columns have no weights; double one of G itself
    call: Callable[..., torch.Tensor]  # (x, y, scale, backend=...) -> the weighted loss []
    fixed_keys: int = 0  # the last rows of y have no gradient


@dataclass(frozen=True)
class Returned:
    """What a backend returned: [N, D], [M, D], []."""

    dx: torch.Tensor
    dy: torch.Tensor
    dscale: torch.Tensor


def _weights(n: int) -> torch.Tensor:
    """Of rows: none is small, so that none is lost in the rounding of another."""
    generator = torch.Generator().manual_seed(7)
    return ((torch.rand(n, generator=generator) + 0.5) / n).to(DEVICE)


def _ids(n: int) -> torch.Tensor:
    """[N, 2]: three neighbours share the first, and the second too or not; the first rows share the
    first with the last ones. Most tiles off the diagonal hold no equal pair, some do."""
    first = torch.arange(n) // 3
    first[-16:] = first[:16]
    return torch.stack([first, torch.arange(n) // 5 * 10**12], dim=1).to(DEVICE)


def _relation(n: int, same_id: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> positives and pairs seen, [N, N]."""
    own = torch.eye(n, dtype=torch.bool, device=DEVICE)
    same = (ids[:, None] == ids[None]).any(dim=2)
    if same_id == "positive":
        return own | same, torch.ones_like(own)
    return own, own | ~same


def _info_nce(x, y, scale: float, same_id: str | None = None, ids=None) -> Problem:
    n, weights = len(x), _weights(len(x))
    positive = torch.eye(n, dtype=torch.bool, device=DEVICE)
    seen, options = torch.ones_like(positive), {}
    if same_id is not None:
        ids = _ids(n) if ids is None else ids
        positive, seen = _relation(n, same_id, ids)
        options = {"ids": ids, "same_id": same_id}
    doubled = weights.clone()
    doubled[5] *= 2
    forms = [
        softmax_form(positive, seen, weights / 2, columns / 2, rounds_positives=same_id is not None)
        for columns in (weights, doubled)
    ]

    def call(x, y, scale, backend):
        loss = protoclip.info_nce(x, y, scale, reduction="none", backend=backend, **options)
        return (loss * weights).sum()

    return Problem(x, y, scale, forms[0], forms[1], call)


def _one_way(x, y, scale: float, matched: bool = False) -> Problem:
    """Queries against keys; or, ``matched``, with all that can be said about pairs but that ids are
    positives: positions, exclusions, two columns of ids, biases."""
    n, weights = len(x), _weights(len(x))
    positive = torch.eye(n, dtype=torch.bool, device=DEVICE)
    seen, bias, options = torch.ones_like(positive), None, {}
    if matched:
        ids = _ids(n)
        positive, seen = _relation(n, "exclude", ids)
        own, excluded = torch.arange(n, device=DEVICE), torch.arange(n, device=DEVICE).roll(9)
        bias = torch.linspace(-1, 1, n, device=DEVICE)
        seen = seen & (excluded[:, None] != own[None])
        options = {"positives": own, "key_ids": ids, "exclude": excluded, "key_bias": bias}
    form = softmax_form(positive, seen, weights, key_bias=bias, rounds_positives=matched)

    def call(x, y, scale, backend):
        loss = protoclip.contrastive(x, y, scale, reduction="none", backend=backend, **options)
        return (loss * weights).sum()

    return Problem(x, y, scale, form, None, call)


def _siglip(x, y, scale: float, same_id: str | None = None, ids=None) -> Problem:
    own = torch.eye(len(x), dtype=torch.bool, device=DEVICE)
    positive, seen, options = own, torch.ones_like(own), {}
    if same_id is not None:
        ids = _ids(len(x)) if ids is None else ids
        positive, seen = _relation(len(x), same_id, ids)
        options = {"ids": ids, "same_id": same_id}
    bias = -scale  # logits a little below 0: the others' entries are as large as the positives'

    def call(x, y, scale, backend):
        given = torch.tensor(bias, device=DEVICE)
        return protoclip.ops.sigmoid_loss(x, y, scale, given, backend=backend, **options)

    return Problem(x, y, scale, sigmoid_form(own, positive, seen, bias), None, call)


def _prototypes(x, y, scale: float, soft: bool = False) -> Problem:
    """Features against prototypes; soft targets are more rows of y, which a row looks up."""
    n, k, weights = len(x), len(y), _weights(len(x))
    labels = torch.arange(n, device=DEVICE).roll(31) % k
    if soft:
        y = torch.cat([y, (0.5 * (y + y.roll(1, 0).float())).to(y)])

    def call(x, y, scale, backend):
        if soft:  # with the nearest prototype, which takes rows of its own
            bank = Bank(y[:k], labels, y[k:].detach())
            losses = protoclip.prototype_losses(x, [bank], scale, reduction="none", backend=backend)
            rows = losses.loss[0]
        else:
            rows = protoclip.prototype_cross_entropy(
                x, y, labels, scale, reduction="none", backend=backend
            )
        return (rows * weights).sum()

    form = parity.prototype_form(labels, k, weights, soft)
    return Problem(x, y, scale, form, None, call, fixed_keys=k if soft else 0)


FAMILIES: dict[str, Callable[..., Problem]] = {
    "info_nce": _info_nce,
    "one way": _one_way,
    "ids excluded": lambda *given: _info_nce(*given, "exclude"),
    "ids positive": lambda *given: _info_nce(*given, "positive"),
    "matched, one way": lambda *given: _one_way(*given, True),
    "siglip": _siglip,
    "siglip, ids excluded": lambda *given: _siglip(*given, "exclude"),
    "siglip, ids positive": lambda *given: _siglip(*given, "positive"),
    "prototypes, hard": _prototypes,
    "prototypes, soft": lambda *given: _prototypes(*given, True),
}
# D: below and at the width of Hopper's steps, and where its deep row begins; 43: rows that no wide
# load fits, 200: a padded tile of prototypes.
DEPTHS = {torch.bfloat16: (64, 128, 256, 512, 43), torch.float16: (64, 128, 512, 200)}
DEPTHS |= {torch.float32: (128,)}
CASES = [(f, d, t) for t, depths in DEPTHS.items() for d in depths for f in FAMILIES]
# The interpreter has one row for all widths and takes seconds for a loss: one width for each form,
# and both dtypes for the one that the others are built on.
IN_THE_INTERPRETER = [(f, 64, torch.bfloat16) for f in FAMILIES]
IN_THE_INTERPRETER += [("info_nce", 128, torch.float16)]


@cache
def _problem(family: str, d: int, dtype: torch.dtype, n: int = N) -> Problem:
    x, y = (t.to(DEVICE, dtype) for t in parity.cone(n, n, d))
    return FAMILIES[family](x, y, 14.3)


def _run(problem: Problem, backend: str) -> Returned:
    x, y = (t.detach().clone().requires_grad_() for t in (problem.x, problem.y))
    scale = torch.tensor(problem.scale, device=DEVICE, requires_grad=True)
    loss = problem.call(x, y, scale, backend=backend)
    return Returned(*torch.autograd.grad(loss, (x, y, scale)))


def _written_out(problem: Problem, dtype: torch.dtype) -> Gradients:
    found = parity.gradients(problem.form, problem.x, problem.y, problem.scale, dtype)
    keys = slice(0, len(problem.y) - problem.fixed_keys)
    return replace(found, dy=found.dy[keys], share_y=found.share_y[keys])


def _check(problem: Problem, got: Returned, truth: Gradients, base: Gradients) -> None:
    dy = got.dy[: len(truth.dy)]
    assert_gradients(got.dx, dy, problem.form, truth, base, problem.scale)
    terms = truth.dscale_terms.item()
    assert_within_budget(
        got.dscale, truth.dscale.float(), base.dscale, "dscale", terms, scale=problem.scale
    )


def _wrong_gradients_of_the_logits(problem: Problem, truth: Gradients) -> dict[str, torch.Tensor]:
    """The gradient of the logits as kernels with one fault each would have it."""
    g, off = truth.logits, truth.logits.masked_fill(problem.form.taken_out, 0)
    tile = torch.zeros_like(problem.form.taken_out)
    tile[320:352, 64:128] = True  # the smallest tile there is, the interpreter's
    column = torch.zeros_like(tile)
    column[:, 5] = True
    wrong = {"zero": g - off, "doubled": g + off, "a tile skipped": g - off * tile}
    wrong["a column's weight"] = g + off * column
    if problem.one_column_doubled is not None:
        doubled = parity.gradients(
            problem.one_column_doubled, problem.x, problem.y, problem.scale, torch.float64
        )
        wrong["a column's weight"] = torch.where(problem.form.taken_out, g, doubled.logits)
    return wrong


def _with_fault(problem: Problem, got: Returned, fault: torch.Tensor) -> Returned:
    """What was returned, had the gradient of the logits been off by ``fault`` [N, M]."""
    x, y, scale = problem.x.double(), problem.y.double(), problem.scale
    dx = (got.dx.double() + scale * fault @ y).to(got.dx.dtype)
    dy = (got.dy.double() + scale * fault.T @ x).to(got.dy.dtype)
    return replace(got, dx=dx, dy=dy)


def _cases():
    for backend in BACKENDS:
        chosen = CASES
        if backend == "triton" and DEVICE == "cpu":
            chosen = IN_THE_INTERPRETER
        if backend == "reference":
            chosen = [case for case in CASES if case[1] == 64]
        for case in chosen:
            marks = needs_triton if backend == "triton" else ()
            yield pytest.param(backend, *case, marks=marks)


@pytest.mark.parametrize("backend, family, d, dtype", _cases())
def test_the_share_of_the_negatives_and_that_a_wrong_one_fails(backend, family, d, dtype):
    problem = _problem(family, d, dtype)
    truth, base = (_written_out(problem, t) for t in (torch.float64, dtype))
    got = _run(problem, backend)
    _check(problem, got, truth, base)
    for fault, wrong in _wrong_gradients_of_the_logits(problem, truth).items():
        broken = _with_fault(problem, got, wrong - truth.logits)
        with pytest.raises(AssertionError, match="over the budget"):
            _check(problem, broken, truth, base)
            pytest.fail(f"{fault}: not seen")


def _whole_tiles_without_a_positive(rows: int, columns: int, row: launch.Launch) -> int:
    """Of a square problem whose positives are the diagonal."""
    firsts = itertools.product(
        range(0, rows - row.block_n + 1, row.block_n),
        range(0, columns - row.block_m + 1, row.block_m),
    )
    return sum(i + row.block_n <= j or j + row.block_m <= i for i, j in firsts)


BY_DESCRIPTOR = ("forward_kernel", "gradient_kernel", "sigmoid_kernel")


def _rows_of_the_table(arch: int) -> dict[str, launch.Launch]:
    rows = {f"HALF {kernel}": table[arch] for kernel, table in launch.HALF.items()}
    rows |= {f"HALF_DEEP {k}": t[arch] for k, t in launch.HALF_DEEP.items() if arch in t}
    rows |= {f"HALF_ANY {kernel}": row for kernel, row in launch.HALF_ANY.items()}
    rows |= {f"ATTENTION {width}": row for width, row in launch.ATTENTION[arch].items()}
    full = launch.ATTENTION_FULL.items()
    rows |= {f"ATTENTION_FULL {width}": row for (own, width), row in full if own == arch}
    rows |= {"FLOAT_MATCHED": launch.FLOAT_MATCHED}
    rows |= {"FLOAT_ANY": launch.FLOAT_ANY, "CHUNKED": launch.CHUNKED[arch]}
    return rows | {"CHUNKED_FLOAT": launch.CHUNKED_FLOAT}


@needs_triton
@pytest.mark.parametrize("arch", launch.ARCHITECTURES)
def test_every_row_of_the_table_has_a_whole_tile_without_a_positive(monkeypatch, arch):
    """Nothing is launched: which row each case of this file takes on a card, and its tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from protoclip.kernels.info_nce import forward_kernel

    options, asked, reached = launch.Launch.options, [], set()

    def remembered(row):
        asked.append(row)
        return options.fget(row)

    def launched(kernel, *arguments, **keywords):
        row = asked[-1]
        if row.descriptors and kernel.__name__ in BY_DESCRIPTOR:
            assert isinstance(keywords["x"], TensorDescriptor), kernel.__name__
        if row.block_m and _whole_tiles_without_a_positive(N, N, row):
            reached.add(row)

    monkeypatch.setattr(launch.Launch, "options", property(remembered))
    monkeypatch.setattr(type(forward_kernel), "run", launched)
    monkeypatch.setattr(launch, "compiling_for", arch)
    for family, d, dtype in CASES:
        problem = _problem(family, d, dtype)
        _run(problem, "triton")
    missed = {name: row for name, row in _rows_of_the_table(arch).items() if row not in reached}
    assert not missed


FAULTS = ["zero", "doubled", "a tile skipped", "a column's weight"]


def _spoil(fault: str, values: np.ndarray, first_row: int, first_column: int) -> np.ndarray:
    """A part of G as a kernel with this fault would have it."""
    height, width = values.shape
    if first_row < first_column + width and first_column < first_row + height:
        return values  # it holds positives
    wrong = values.copy()
    if fault == "zero":
        wrong[:] = 0
    elif fault == "doubled":
        wrong *= 2
    elif fault == "a tile skipped" and (first_row, first_column) == (128, 64):
        wrong[:] = 0
    elif fault == "a column's weight" and first_column == 64:
        wrong[:, 5] *= 1.5  # its half from the column doubled
    return wrong


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family, module", [
    ("info_nce", "info_nce"), ("ids excluded", "matched"), ("matched, one way", "matched"),
    ("siglip, ids positive", "siglip"),
])  # fmt: skip
def test_a_kernel_that_writes_a_wrong_tile_fails(monkeypatch, family, module, fault):
    """The interpreter runs the kernel; where it stores a tile of G, the tile is changed."""
    kernels = importlib.import_module(f"protoclip.kernels.{module}")
    store = kernels.store_gradient

    def spoiled_store(g, row0, col0, g_ptr, stride_g):
        first = (int(t.handle.data.item()) for t in (row0, col0))
        g.handle.data = _spoil(fault, g.handle.data, *first)
        store(g, row0, col0, g_ptr, stride_g)

    monkeypatch.setattr(kernels, "store_gradient", spoiled_store)
    _assert_red_with(fault, _problem(family, 64, torch.bfloat16, n=192))


def _assert_red_with(fault: str, problem: Problem) -> None:
    truth, base = (_written_out(problem, t) for t in (torch.float64, problem.x.dtype))
    got = _run(problem, "triton")
    with pytest.raises(AssertionError, match="over the budget"):
        _check(problem, got, truth, base)
        pytest.fail(f"{fault}: not seen")


@interpreted
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize("form, module", [(_info_nce, "matched"), (_siglip, "siglip")])
def test_a_kernel_that_overlooks_equal_ids_fails(monkeypatch, form, module, same_id):
    """Every tile holds some; without the check all but the diagonal would go without masks."""
    x, y = (t.to(torch.bfloat16) for t in parity.cone(192, 192, 64))
    problem = form(x, y, 14.3, same_id, ids=torch.arange(192)[:, None] % 8)
    truth, base = (_written_out(problem, t) for t in (torch.float64, torch.bfloat16))
    _check(problem, _run(problem, "triton"), truth, base)
    kernels = importlib.import_module(f"protoclip.kernels.{module}")
    equal_ids = kernels.equal_ids

    def overlooked(ids, row, col):
        same = equal_ids(ids, row, col)
        return same & (same == 0)

    monkeypatch.setattr(kernels, "equal_ids", overlooked)
    _assert_red_with("equal ids overlooked", problem)


@needs_triton
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
def test_ids_that_nobody_shares_change_no_bit_of_siglip(same_id):
    """Tiles without an equal pair take the path of tiles without ids."""
    x, y = (t.to(DEVICE, torch.bfloat16) for t in parity.cone(N, N, 64))
    plain = _run(_siglip(x, y, 14.3), "triton")
    ids = torch.arange(N, device=DEVICE)[:, None]
    distinct = _run(_siglip(x, y, 14.3, same_id, ids), "triton")
    assert torch.equal(plain.dx, distinct.dx)
    assert torch.equal(plain.dy, distinct.dy)
    assert torch.equal(plain.dscale, distinct.dscale)


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_attention_over_wrong_values_fails(monkeypatch, soft, fault):
    """The softmax is computed from the right prototypes and sums wrong ones."""
    from protoclip.kernels import attention

    read, first_tile = attention._products, []
    tile_bytes = 32 * 64 * torch.float16.itemsize

    def spoiled_products(q, q_ptr, rows, k_ptr, *rest):
        s, k = read(q, q_ptr, rows, k_ptr, *rest)
        first_tile.append(int(k_ptr.handle.data.item()))
        values = k.to(k.dtype, bitcast=True)
        values.handle.data = spoiled(k.handle.data, (first_tile[-1] - first_tile[0]) // tile_bytes)
        return s, values

    def spoiled(values, tile):
        wrong = values.copy()
        if fault == "zero" or (fault == "a tile skipped" and tile == 2):
            wrong[:] = 0
        elif fault == "doubled":
            wrong *= 2
        elif fault == "a column's weight" and tile == 2:
            wrong[5] *= 3
        return wrong

    monkeypatch.setattr(attention, "_products", spoiled_products)
    problem = _problem("prototypes, soft" if soft else "prototypes, hard", 64, torch.float16, 192)
    _assert_red_with(fault, problem)


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_gradient_of_the_prototypes_fails(monkeypatch, fault):
    from protoclip.kernels import prototype_cross_entropy as prototypes

    computed = prototypes.weights

    def spoiled_weights(q, keys, *given, **options):
        g = computed(q, keys, *given, **options)
        wrong, n = g.clone(), len(g)
        if fault == "zero":
            wrong.zero_()
        elif fault == "doubled":
            wrong *= 2
        elif fault == "a tile skipped":
            wrong[128:160, :32] = 0
        elif fault == "a column's weight":
            wrong[:, 5] *= 2
        label = torch.arange(n).roll(31)
        return wrong.scatter(1, label[:, None], g.gather(1, label[:, None]))

    monkeypatch.setattr(prototypes, "weights", spoiled_weights)
    _assert_red_with(fault, _problem("prototypes, hard", 64, torch.float16, 192))


# -- k-means: labels and means, which have no logits


def _backends(op: str) -> list[str]:
    return usable(op) if DEVICE == "cpu" else ["triton", "cuda"]


def _skip_without(op: str, backend: str) -> None:
    if reason := protoclip.backends(op)[backend]:
        pytest.skip(reason)


def _points_and_centroids(n: int = 96, k: int = 512, d: int = 40):
    """The second half of the centroids is the first again: every label is a tie."""
    torch.manual_seed(0)
    points, centroids = torch.randn(n, d), torch.randn(k // 2, d)
    return points.to(DEVICE), torch.cat([centroids, centroids]).to(DEVICE)


def _check_labels(points, centroids, labels):
    """The lowest index of the least distance in fp64; no two differing ones are as near as fp32
    could confuse."""
    expected = torch.cdist(points.double(), centroids[:256].double()).argmin(dim=1)
    wrong = (labels != expected).sum().item()
    assert wrong == 0, f"{wrong} of {len(labels)} labels are not the nearest of lowest index"


@pytest.mark.parametrize("backend", _backends("kmeans_assign"))
def test_labels_and_that_wrong_ones_fail(backend):
    _skip_without("kmeans_assign", backend)
    points, centroids = _points_and_centroids()
    labels, _ = protoclip.kmeans_assign(points, centroids, backend=backend)
    _check_labels(points, centroids, labels)
    rest = torch.cat([centroids[:64], centroids[128:256]])  # without a tile of 64
    among_the_rest = torch.cdist(points, rest).argmin(dim=1)
    skipped = among_the_rest + 64 * (among_the_rest >= 64)
    for wrong in (labels + 256, skipped):
        with pytest.raises(AssertionError, match="not the nearest of lowest index"):
            _check_labels(points, centroids, wrong)


@interpreted
@pytest.mark.parametrize("fault", ["a tile skipped", "ties the other way"])
def test_an_assignment_with_a_fault_fails(monkeypatch, fault):
    from protoclip.kernels import clusters

    points, centroids = _points_and_centroids()
    keep = clusters._keep_best

    def skipping(s, start, *so_far):
        return so_far if int(start) == 0 else keep(s, start, *so_far)

    if fault == "a tile skipped":
        monkeypatch.setattr(clusters, "_keep_best", skipping)
    else:
        monkeypatch.setattr(clusters, "leads", lambda score, best: score >= best)
    labels, _ = protoclip.kmeans_assign(points, centroids, backend="triton")
    with pytest.raises(AssertionError, match="not the nearest of lowest index"):
        _check_labels(points, centroids, labels)


def _check_means(values, labels, k, means, counts):
    """Sums of at most 512 terms in fp32, each mean's error within its worst case."""
    chosen = torch.nn.functional.one_hot(labels, k).double()  # [N, K]
    expected = chosen.sum(0)
    truth = chosen.T @ values.double() / expected[:, None]
    size = chosen.T @ values.double().abs() / expected[:, None]
    assert torch.equal(counts, expected.long()), "counts"
    allowed = 512 * torch.finfo(torch.float32).eps / 2 * size
    assert ((means.double() - truth).abs() <= allowed).all(), "means are off"


def _values_and_labels(n: int = 600, k: int = 3, d: int = 20):
    torch.manual_seed(0)
    return torch.randn(n, d).to(DEVICE) + 3, (torch.arange(n) % k).to(DEVICE)


@pytest.mark.parametrize("backend", _backends("segment_mean"))
def test_means_and_that_wrong_ones_fail(backend):
    _skip_without("segment_mean", backend)
    values, labels = _values_and_labels()
    means, counts = protoclip.segment_mean(values, labels, 3, backend=backend)
    _check_means(values, labels, 3, means, counts)
    one_row = torch.zeros_like(means)
    one_row[labels[7]] = values[7] / counts[labels[7]]
    for wrong in (means - one_row, means + one_row):
        with pytest.raises(AssertionError, match="means are off"):
            _check_means(values, labels, 3, wrong, counts)
    with pytest.raises(AssertionError, match="counts"):
        _check_means(values, labels, 3, means, counts + 1)


@interpreted
def test_a_mean_that_skips_a_row_fails(monkeypatch):
    from protoclip.kernels import clusters

    values, labels = _values_and_labels()
    read = clusters.load_tile

    def skipping(*arguments):
        tile = read(*arguments)
        tile.handle.data = tile.handle.data.copy()
        tile.handle.data[1] = 0
        return tile

    monkeypatch.setattr(clusters, "load_tile", skipping)
    means, counts = protoclip.segment_mean(values, labels, 3, backend="triton")
    with pytest.raises(AssertionError, match="means are off"):
        _check_means(values, labels, 3, means, counts)
