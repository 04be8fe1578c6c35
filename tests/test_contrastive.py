"""contrastive and its forms: each backend of the CPU against sets written out row by row, the
formulas of well-known losses, and edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    leaf,
    loss_and_gradients,
    on_threads,
    usable,
)
from torch import Tensor

import protoclip

BACKENDS = [name for name in usable("contrastive") if name != "triton"]
FUSED = [name for name in BACKENDS if name != "reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_fused = pytest.mark.parametrize("backend", FUSED)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class KeySets(NamedTuple):
    """What a query is to be near to and what it is compared with: indices of keys."""

    positive: set[int]
    seen: set[int]


@dataclass(frozen=True)
class Problem:
    """Queries and keys, and what is said about them."""

    queries: Tensor
    keys: Tensor
    logit_scale: float = 14.3
    positives: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    same_id: str = "exclude"
    exclude: Tensor | None = None
    key_bias: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        names = ("positives", "query_ids", "key_ids", "same_id", "exclude", "key_bias")
        return {name: getattr(self, name) for name in names}

    def key_sets(self) -> list[KeySets]:
        """Of each query, as the documentation of ``contrastive`` defines them."""
        return [self._key_sets_of(query) for query in range(len(self.queries))]

    def _key_sets_of(self, query: int) -> KeySets:
        if self.positives is not None:
            positive = {int(self.positives[query])} - {-100}
        elif self.key_ids is not None and self.same_id == "positive":
            positive = set()
        else:
            positive = {query}
        seen = set(range(len(self.keys)))
        if self.key_ids is not None:
            if self.query_ids is None:
                query_ids = self.key_ids[sorted(positive)]  # those of its own key
            else:
                query_ids = self.query_ids[query : query + 1]
            alike = (self.key_ids[:, None] == query_ids).flatten(1).any(dim=1)
            same = set(alike.nonzero().flatten().tolist())
            if self.same_id == "exclude":
                seen = (seen - same) | positive
            else:
                positive = positive | same
        absent: set[int] = set()
        if self.exclude is not None:
            absent = {int(self.exclude[query])}
        if self.key_bias is not None:
            absent |= set((self.key_bias == -torch.inf).nonzero().flatten().tolist())
        return KeySets(positive - absent, seen - absent)

    def has_positive(self) -> Tensor:
        """bool [N]"""
        return torch.tensor([len(sets.positive) > 0 for sets in self.key_sets()])


@dataclass(frozen=True)
class Weights:
    """Of log-sum-exp - mean positive and of the mean positive in the sum that is differentiated."""

    gap: Tensor  # [N]
    mean: Tensor  # [N]


def gap_weights(problem: Problem, size: float = 1.0, least: float = 0.5) -> Weights:
    """Of the queries with a positive."""
    n = len(problem.queries)
    gap = size * (torch.rand(n) + least) * problem.has_positive().float()
    return Weights(gap, torch.zeros(n))


def weighted_sum(level: Tensor, mean: Tensor, weights: Weights) -> Tensor:
    """Levels are -inf where no key is seen; their weight is 0."""
    gap = (level - mean).where(weights.gap.to(level.device) != 0, 0)
    return (weights.gap.to(level) * gap + weights.mean.to(mean) * mean).sum()


def written_out(problem: Problem, dtype: torch.dtype, weights: Weights) -> PlainResults:
    """Log-sum-exp and mean positive [N] and the gradients of their weighted sum, row by row, in the
    dtype as under autocast."""
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    queries = leaf(problem.queries, dtype)
    keys = leaf(problem.keys, dtype)
    logit_scale = leaf(problem.logit_scale, at_least_fp32, queries.device)
    key_bias = problem.key_bias
    if key_bias is None:
        key_bias = torch.zeros(len(keys), device=queries.device)
    key_bias = leaf(key_bias, at_least_fp32)
    dots = queries @ keys.T
    logits = (logit_scale.to(dtype) * dots).to(at_least_fp32) + key_bias
    levels = []
    means = []
    for row, sets in zip(logits, problem.key_sets(), strict=True):
        nothing = row[:0].sum()  # 0, with a gradient
        seen = row[sorted(sets.seen)]
        levels.append(seen.logsumexp(0) if sets.seen else nothing - torch.inf)
        means.append(row[sorted(sets.positive)].mean() if sets.positive else nothing)
    level = torch.stack(levels)
    mean = torch.stack(means)
    results = loss_and_gradients(
        weighted_sum(level, mean, weights),
        queries=queries,
        keys=keys,
        logit_scale=logit_scale,
        key_bias=key_bias,
        logits=logits,
    )
    terms = (results.pop("dlogits") * dots).abs().sum() + 2**-29 * weights.gap.abs().sum()
    return PlainResults(
        results | {"level": level.detach(), "mean": mean.detach()}, float(terms.item())
    )


def computed(
    problem: Problem, weights: Weights, backend: str, stash: bool | None = None
) -> Results:
    """The same by ``contrastive_parts``."""
    at_least_fp32 = torch.promote_types(problem.queries.dtype, torch.float32)
    leaves = {
        "queries": leaf(problem.queries),
        "keys": leaf(problem.keys),
        "logit_scale": leaf(problem.logit_scale, at_least_fp32, problem.queries.device),
    }
    if problem.key_bias is not None:
        leaves["key_bias"] = leaf(problem.key_bias.to(at_least_fp32))
    options = problem.options | leaves
    level, mean = protoclip.contrastive_parts(**options, stash=stash, backend=backend)
    results = loss_and_gradients(weighted_sum(level, mean, weights), **leaves)
    del results["loss"]
    return results | {"level": level.detach(), "mean": mean.detach()}


def assert_problem_within_budget(
    problem: Problem, backend: str, weights: Weights | None = None
) -> None:
    if weights is None:
        weights = gap_weights(problem)
    got = computed(problem, weights, backend)
    truth = written_out(problem, torch.float64, weights)
    base = written_out(problem, problem.queries.dtype, weights)
    sees_nothing = truth.values["level"].isinf()
    assert torch.equal(got["level"].isinf(), sees_nothing)
    for values in (got, truth.values, base.values):
        values["level"] = values["level"].where(~sees_nothing, 0)
    bias_gradient = truth.values["dkey_bias"].abs().max().item()
    assert_results_within_budget(
        got,
        truth=truth,
        base=base,
        logit_scale=problem.logit_scale,
        magnitudes={"dkey_bias": max(bias_gradient, float(weights.gap.abs().max()))},
    )


def features(
    n: int, m: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Queries and keys that are alike for i = j, all in a cone as CLIP's are."""
    torch.manual_seed(seed)
    centre = torch.randn(1, d)
    shared = torch.randn(max(n, m), d)
    queries = F.normalize(2 * centre + shared + 0.3 * torch.randn_like(shared), dim=1)
    keys = F.normalize(2 * centre + shared + 0.3 * torch.randn_like(shared), dim=1)
    return queries[:n].to(dtype), keys[:m].to(dtype)


def random_problem(
    kind: str,
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    logit_scale: float = 14.3,
    device: str = "cpu",
) -> Problem:
    """One of the ways in which queries and keys can belong together."""
    queries, keys = features(n, m, d, dtype)
    positives = torch.randint(m, (n,))
    positives[::7] = -100
    num_groups = max(2, m // 3)
    key_ids = torch.randint(num_groups, (m,))
    query_ids = torch.randint(num_groups + 2, (n,))
    key_bias = torch.randn(m)
    key_bias[::5] = -torch.inf
    exclude = torch.randint(-1, m, (n,))
    two_ids = torch.stack([key_ids, torch.randint(-9, 9, (m,)) * 10**12], dim=1)
    all_alike = torch.zeros_like(key_ids)
    relations: dict[str, dict[str, Any]] = {
        "own": {"positives": positives},
        "exclude": {"positives": positives, "key_ids": key_ids, "exclude": exclude},
        "two ids": {"key_ids": two_ids, "key_bias": key_bias},
        "positive": {"positives": positives, "key_ids": key_ids, "same_id": "positive"},
        "groups": {
            "query_ids": query_ids,
            "key_ids": key_ids,
            "same_id": "positive",
            "exclude": exclude,
            "key_bias": key_bias,
        },
        "one id": {"positives": positives, "key_ids": all_alike, "same_id": "positive"},
        "alone": {"key_ids": all_alike},
        "bias": {"key_bias": key_bias},
    }
    relation = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in relations[kind].items()
    }
    return Problem(queries.to(device), keys.to(device), logit_scale, **relation)


KINDS = ["own", "exclude", "two ids", "positive", "groups", "one id", "alone", "bias"]


@each_backend
@pytest.mark.parametrize(
    "same_id, expected",
    [
        ("exclude", math.log(1 + math.e) - 1),  # of keys 0 and 1
        ("positive", math.log(1 + math.e + math.exp(2)) - 1.5),
    ],
)
def test_one_query_and_four_keys_by_hand(backend: str, same_id: str, expected: float) -> None:
    """Logits 0, 1, 2, 3; key 1 is its own, key 2 the same thing, key 3 is never seen."""
    loss = protoclip.contrastive(
        torch.ones(1, 1),
        torch.arange(4.0)[:, None],
        1.0,
        positives=torch.tensor([1]),
        key_ids=torch.tensor([0, 1, 1, 3]),
        same_id=same_id,
        exclude=torch.tensor([3]),
        backend=backend,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)


# The smallest, less than a vector, two ragged tiles of 128 x 256, D odd and even.
SIZES = [(1, 1, 1), (2, 5, 3), (17, 33, 20), (130, 300, 17), (150, 150, 64)]


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_sets(kind: str, backend: str) -> None:
    dtypes = DTYPES if backend in FUSED else [torch.float64]
    for dtype, logit_scale, (n, m, d) in itertools.product(dtypes, (14.3, 100.0), SIZES):
        if n * m > 10_000 and (dtype == torch.float16 or logit_scale < 100):
            continue  # rows are written out one by one
        torch.manual_seed(n)
        problem = random_problem(kind, n, m, d, dtype, logit_scale)
        assert_problem_within_budget(problem, backend)


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_positive_has_gradients_of_its_own(kind: str, backend: str) -> None:
    problem = random_problem(kind, 40, 50, 12)
    gap = torch.randn(40) * problem.has_positive().float()
    assert_problem_within_budget(problem, backend, Weights(gap=gap, mean=torch.randn(40)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference_are_those_of_its_differences(kind: str) -> None:
    problem = random_problem(kind, 5, 9, 3, torch.float64)
    key_bias = torch.zeros(9) if problem.key_bias is None else problem.key_bias
    finite = key_bias.isfinite()

    def parts(
        queries: Tensor, keys: Tensor, logit_scale: Tensor, finite_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        absent = torch.full((9,), -torch.inf, dtype=torch.float64)
        options = problem.options | {"key_bias": absent.masked_scatter(finite, finite_bias)}
        level, mean = protoclip.contrastive_parts(
            queries, keys, logit_scale, **options, backend="reference"
        )
        return level[level.isfinite()], mean

    leaves = [
        leaf(problem.queries),
        leaf(problem.keys),
        leaf(problem.logit_scale, torch.float64),
        leaf(key_bias[finite], torch.float64),
    ]
    assert torch.autograd.gradcheck(parts, leaves)


def loss_of(problem: Problem, backend: str, **options: Any) -> Tensor:
    return protoclip.contrastive(
        problem.queries,
        problem.keys,
        problem.logit_scale,
        **problem.options,
        backend=backend,
        **options,
    )


@each_backend
def test_the_loss_of_a_query_is_the_difference_of_its_parts(backend: str) -> None:
    problem = random_problem("groups", 40, 60, 8)
    level, mean = protoclip.contrastive_parts(
        problem.queries, problem.keys, problem.logit_scale, **problem.options, backend=backend
    )
    counted = problem.has_positive()
    assert 0 < counted.sum() < 40 and (mean[~counted] == 0).all()
    rows = loss_of(problem, backend, reduction="none")
    torch.testing.assert_close(rows, (level - mean).where(counted, 0), rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("weights", [None, torch.linspace(0, 1, 40), torch.zeros(40)])
def test_weights_multiply_losses_and_the_mean_is_over_queries_with_a_positive(
    backend: str, weights: Tensor | None
) -> None:
    problem = random_problem("groups", 40, 60, 8)
    rows = loss_of(problem, backend, reduction="none")
    factors = torch.ones(40) if weights is None else weights
    expected = rows * factors
    counted = (problem.has_positive() * factors).sum()

    def loss(reduction: str) -> Tensor:
        return loss_of(problem, backend, weights=weights, reduction=reduction)

    torch.testing.assert_close(loss("none"), expected)
    torch.testing.assert_close(loss("sum"), expected.sum())
    torch.testing.assert_close(loss("mean"), expected.sum() / counted.clamp_min(1e-9))


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_what_is_left_out_must_be_finite(where: str, bad: float, backend: str) -> None:
    """A query without a positive and a key that no query sees show in the loss or a gradient."""
    queries = F.normalize(torch.randn(6, 8), dim=1)
    keys = F.normalize(torch.randn(7, 8), dim=1)
    positives = torch.tensor([0, 1, -100, 3, 4, 5])
    key_bias = torch.tensor([0.0, 0, 0, 0, 0, 0, -math.inf])

    def results() -> list[Tensor]:
        x = leaf(queries)
        y = leaf(keys)
        loss = protoclip.contrastive(
            x, y, 10.0, positives=positives, key_bias=key_bias, backend=backend
        )
        return [loss.detach(), *torch.autograd.grad(loss, (x, y))]

    assert all(result.isfinite().all() for result in results())
    if where == "query":
        queries[2, 3] = bad
    else:
        keys[6, 3] = bad
    assert not all(result.isfinite().all() for result in results())


@each_backend
def test_a_query_without_a_position_has_no_loss_though_keys_share_its_id(backend: str) -> None:
    problem = random_problem("positive", 40, 60, 8)  # every seventh has position -100
    rows = loss_of(problem, backend, reduction="none")
    assert (rows[::7] == 0).all() and (rows[1::7] != 0).all()
    level, _ = protoclip.contrastive_parts(
        problem.queries, problem.keys, problem.logit_scale, **problem.options, backend=backend
    )
    assert level.isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_alone_with_its_key_costs_exactly_nothing(backend: str, dtype: torch.dtype) -> None:
    problem = random_problem("alone", 150, 300, 20, dtype, 100.0)
    queries = leaf(problem.queries)
    keys = leaf(problem.keys)
    loss = protoclip.contrastive(
        queries, keys, 100.0, key_ids=problem.key_ids, reduction="none", backend=backend
    )
    results = loss_and_gradients(loss, queries=queries, keys=keys)
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pair_whose_id_all_others_share_costs_exactly_nothing(dtype: torch.dtype) -> None:
    image, text = features(150, 150, 20, dtype)
    leaves = {"image": leaf(image), "text": leaf(text)}
    ids = torch.zeros(150, dtype=torch.int64)
    loss = protoclip.info_nce(leaves["image"], leaves["text"], 100.0, ids=ids)
    results = loss_and_gradients(loss, **leaves)
    assert all((value == 0).all() for value in results.values())


@each_backend
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize("num_ids", [1, 2])
def test_info_nce_with_ids_is_half_the_sum_of_both_directions(
    backend: str, same_id: str, num_ids: int
) -> None:
    logit_scale = 30.0
    image, text = features(150, 150, 24)
    torch.manual_seed(1)
    ids = torch.randint(60, (150, num_ids))
    weights = torch.rand(150)

    def leaves_of(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "image": leaf(image, dtype),
            "text": leaf(text, dtype),
            "logit_scale": leaf(logit_scale, dtype),
        }

    def one_direction(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        return protoclip.contrastive(
            queries,
            keys,
            scale,
            positives=torch.arange(150),
            key_ids=ids,
            same_id=same_id,
            reduction="none",
            backend="reference",
        )

    def formula(dtype: torch.dtype) -> PlainResults:
        leaves = leaves_of(dtype)
        scale = leaves["logit_scale"]
        of_images = one_direction(leaves["image"], leaves["text"], scale)
        of_texts = one_direction(leaves["text"], leaves["image"], scale)
        results = loss_and_gradients((of_images + of_texts) / 2, weights, **leaves)
        return PlainResults(results, dlogit_scale_terms=logit_scale * 150)

    leaves = leaves_of(torch.float32)
    loss = protoclip.info_nce(
        leaves["image"],
        leaves["text"],
        leaves["logit_scale"],
        ids=ids if num_ids > 1 else ids[:, 0],
        same_id=same_id,
        reduction="none",
        backend=backend,
    )
    assert_results_within_budget(
        loss_and_gradients(loss, weights, **leaves),
        truth=formula(torch.float64),
        base=formula(torch.float32),
        logit_scale=logit_scale,
    )


@each_backend
def test_unique_ids_change_nothing(backend: str) -> None:
    image, text = features(150, 150, 24)
    unique = protoclip.info_nce(image, text, 30.0, ids=torch.randperm(150), backend=backend)
    without = protoclip.info_nce(image, text, 30.0, backend="reference")
    torch.testing.assert_close(unique, without)


def whole_tiles(dtype: torch.dtype) -> Problem:
    """The rest of a stash, around ragged tiles, is not written."""
    return random_problem("groups", 128, 256, 6, dtype)


@each_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("both_directions, keep_stash", [(False, True), (True, False)])
def test_opcheck_accepts_the_op(
    backend: str, dtype: torch.dtype, both_directions: bool, keep_stash: bool
) -> None:
    problem = whole_tiles(dtype)
    assert problem.key_bias is not None
    positions = torch.arange(128).int()
    ids = torch.randint(9, (1, 256)).int()
    arguments = {
        "x": leaf(problem.queries),
        "y": leaf(problem.keys),
        "logit_scale": leaf(problem.logit_scale),
        "own_key": positions if both_directions else None,
        "offset": 0,
        "exclude": positions.roll(1),
        "query_ids": ids[:, :128].contiguous(),
        "key_ids": ids,
        "key_bias": leaf(problem.key_bias),
        "same_positive": True,
        "both_directions": both_directions,
        "reduction": "none",
        "backend": backend,
        "keep_stash": keep_stash,
        "group_name": "",
    }
    torch.library.opcheck(torch.ops.protoclip.contrastive, (), arguments)


@each_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_gradients_have_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    problem = whole_tiles(dtype)
    assert problem.key_bias is not None
    leaves = {
        "queries": leaf(problem.queries),
        "keys": leaf(problem.keys),
        "logit_scale": leaf(problem.logit_scale),
        "key_bias": leaf(problem.key_bias),
    }

    def loss(**leaves: Tensor) -> Tensor:
        options = problem.options | leaves | {"weights": torch.ones(128)}
        return 2 * protoclip.contrastive(**options, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(loss(**leaves), **leaves)
    assert_same_bits(loss_and_gradients(compiled(**leaves), **leaves), expected)


@each_fused
def test_a_stash_and_the_number_of_threads_change_no_bit(backend: str) -> None:
    problem = random_problem("groups", 300, 500, 17)
    weights = Weights(gap=torch.rand(300), mean=torch.rand(300))
    stashes = iter((True, None, False))

    def run() -> Results:
        return computed(problem, weights, backend, stash=next(stashes))

    first, *repeated = on_threads(run, (1, 2, 3))
    for again in repeated:
        assert_same_bits(again, first)


@each_backend
@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_and_no_keys_have_a_loss_of_zero(backend: str, n: int, m: int) -> None:
    queries, keys = features(n, m, 4)
    leaves = {"queries": leaf(queries), "keys": leaf(keys)}
    nothing = torch.full((n,), -100)
    loss = protoclip.contrastive(
        **leaves,
        logit_scale=3.0,
        positives=nothing,
        query_ids=torch.arange(n),
        key_ids=torch.arange(m),
        backend=backend,
    )
    results = loss_and_gradients(loss, **leaves)
    assert results["loss"] == 0
    assert results["dqueries"].shape == (n, 4) and results["dkeys"].shape == (m, 4)
    level, _ = protoclip.contrastive_parts(queries, keys, 3.0, positives=nothing)
    assert level.isinf().all()


@each_backend
def test_keys_that_are_all_absent_have_a_loss_of_zero(backend: str) -> None:
    queries, keys = features(5, 300, 4)
    absent = torch.full((300,), -torch.inf)
    leaves = {"queries": leaf(queries), "keys": leaf(keys), "key_bias": leaf(absent)}
    level, mean = protoclip.contrastive_parts(**leaves, logit_scale=3.0, backend=backend)
    assert (level == -torch.inf).all() and (mean == 0).all()
    loss = protoclip.contrastive(**leaves, logit_scale=3.0, backend=backend)
    results = loss_and_gradients(loss, **leaves)
    assert all((value == 0).all() for value in results.values())


OUT_OF_RANGE = [
    {"positives": torch.tensor([0, 6, 1, 2])},
    {"positives": torch.tensor([0, -7, 1, 2])},
    {"positives": torch.arange(4), "exclude": torch.tensor([5, -1, 7, -1])},
]


@each_backend
@pytest.mark.parametrize("relation", OUT_OF_RANGE)
@pytest.mark.parametrize("function", [protoclip.contrastive, protoclip.contrastive_parts])
def test_positions_out_of_range_are_refused(
    function: Callable[..., Any], backend: str, relation: dict[str, Tensor]
) -> None:
    queries, keys = features(4, 6, 8)
    with pytest.raises(ValueError, match=r"positives in \[0, 6\) or -100.*at query [12]"):
        function(queries, keys, 3.0, **relation, backend=backend)


@each_fused
@pytest.mark.parametrize("relation", OUT_OF_RANGE)
def test_positions_out_of_range_are_nan_in_compiled_code(
    backend: str, relation: dict[str, Tensor]
) -> None:
    """Which may not read values, as on a GPU."""
    queries, keys = features(4, 6, 8)

    def loss(queries: Tensor, reduction: str) -> Tensor:
        return protoclip.contrastive(
            queries, keys, 3.0, **relation, backend=backend, reduction=reduction
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(queries, "mean").isnan()
    queries = leaf(queries)
    rows = compiled(queries, "none")
    assert rows.isnan().sum() == 1
    (gradient,) = torch.autograd.grad(rows.sum(), queries)
    assert (gradient.isnan().any(dim=1) == rows.isnan()).all()


X, Y = features(4, 6, 8)
IDS = torch.arange(6)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": (dict(queries=X[0]), ValueError, r"queries of shape \[N, D\]"),
    "columns": (dict(keys=Y[:, :3]), ValueError, "share D"),
    "integers": (dict(keys=Y.long()), TypeError, "cast it"),
    "scale": (dict(logit_scale=X), ValueError, r"shape \[\] or \[1\]"),
    "positives' dtype": (dict(positives=torch.arange(4.0)), TypeError, r"positives.long\(\)"),
    "positives' shape": (dict(positives=IDS), ValueError, r"positives of shape \[4\], got \[6\]"),
    "a list": (dict(exclude=[1, 2]), TypeError, "exclude as a Tensor"),
    "floating ids": (dict(key_ids=IDS.float()), TypeError, r"key_ids as int64.*key_ids.long\(\)"),
    "three ids": (dict(key_ids=IDS[:, None].expand(6, 3)), ValueError, r"\[6\] or .*\[6, 2\]"),
    "other ids": (dict(key_ids=IDS, query_ids=torch.ones(4, 2).long()), ValueError, "query_ids of"),
    "device": (dict(key_ids=IDS.to("meta")), ValueError, "key_ids on cpu"),
    "query ids alone": (dict(query_ids=IDS[:4]), ValueError, "key_ids with query_ids"),
    "no own ids": (dict(key_ids=IDS, same_id="positive"), ValueError, "query_ids, got none"),
    "same_id": (dict(key_ids=IDS, same_id="both"), ValueError, "same_id in"),
    "exclude alone": (dict(exclude=IDS[:4]), ValueError, "expected positives.*got none with exc"),
    "few keys": (dict(keys=Y[:3]), ValueError, "got none with 4 queries and 3 keys"),
    "bias dtype": (dict(key_bias=torch.zeros(6).half()), TypeError, r"key_bias.float\(\)"),
    "bias shape": (dict(key_bias=torch.zeros(4)), ValueError, r"key_bias of shape \[6\]"),
    "same_id alone": (dict(same_id="both"), ValueError, "same_id in"),
    "sparse": (dict(queries=X.to_sparse()), TypeError, r"queries as a dense .*to_dense\(\)"),
    "negative weights": (dict(weights=-torch.ones(4)), ValueError, "weights >= 0, got -1"),
    "a negative weight": (
        dict(weights=torch.tensor([1, 0, -0.5, 2]), positives=IDS[:4], backend="reference"),
        ValueError,
        "weights >= 0, got -0.5",
    ),
    "weights": (dict(weights=torch.ones(6)), ValueError, r"weights of shape \[4\]"),
    "whole weights": (dict(weights=torch.ones(4).long()), TypeError, r"weights.float\(\)"),
    "weights' gradient": (dict(weights=torch.ones(4, requires_grad=True)), ValueError, "detach"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction in"),
    "backend": (dict(positives=IDS[:4], backend="cuda"), ValueError, "'cuda' cannot run: contr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case: str) -> None:
    changed, error, words = BAD[case]
    arguments = {"queries": X, "keys": Y, "logit_scale": 3.0} | changed
    with pytest.raises(error, match=rf"contrastive: .*{words}"):
        protoclip.contrastive(**arguments)


@pytest.mark.parametrize(
    "labels, error", [(torch.ones(4), TypeError), (torch.ones(4, 2).long(), ValueError)]
)
def test_bad_labels_of_sup_con_are_refused(labels: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="sup_con: expected labels"):
        protoclip.sup_con(X, labels, 3.0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_unknown_labels_of_sup_con_are_no_class(backend: str) -> None:
    """-100 is what it is elsewhere: those rows are left out, as rows with a label of their own."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(12, 8), dim=1)
    labels = torch.arange(12) % 3
    unknown = labels.clone()
    unknown[[1, 4, 5]] = -100
    alone = labels.clone()
    alone[[1, 4, 5]] = torch.tensor([70, 71, 72])
    by_row = [
        protoclip.sup_con(x, row_labels, 5.0, reduction="none", backend=backend)
        for row_labels in (unknown, alone)
    ]
    assert (
        torch.equal(by_row[0], by_row[1])
        and not by_row[0][[1, 4, 5]].any()
        and by_row[0][[0, 2]].all()
    )


@pytest.mark.parametrize(
    "ids, error", [(torch.ones(3).long(), ValueError), (torch.ones(4), TypeError)]
)
def test_bad_ids_of_info_nce_are_refused(ids: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="info_nce: expected ids"):
        protoclip.info_nce(X, X, 3.0, ids=ids)


def assert_strides_do_not_matter(backend: str) -> None:
    """Arguments of any stride are as their contiguous copies."""
    queries, keys = features(40, 60, 8)
    for key_bias in (torch.randn(60, 2)[:, 1], torch.tensor(0.5).expand(60)):
        strided = {
            "key_bias": key_bias,
            "key_ids": torch.randint(9, (60, 2))[:, 1],
            "query_ids": torch.randint(9, (2, 40)).T[:, :1],
            "positives": torch.randint(60, (40, 3))[:, 2],
            "exclude": torch.tensor(7).expand(40),
            "weights": torch.rand(40, 2)[:, 1],
        }
        got = protoclip.contrastive(queries, keys, 3.0, **strided, backend=backend)
        copies = {name: value.clone().contiguous() for name, value in strided.items()}
        expected = protoclip.contrastive(queries, keys, 3.0, **copies, backend="reference")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@each_backend
def test_strides_do_not_matter(backend: str) -> None:
    assert_strides_do_not_matter(backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint32])
def test_other_integers_are_as_good_as_int64(dtype: torch.dtype) -> None:
    """Ids, labels, positions and the samples' index: the values are those of int64."""
    x, y = (F.normalize(torch.randn(12, 8), dim=1) for _ in range(2))
    scale = torch.tensor(9.0)
    labels = torch.arange(12) % 4
    positions = torch.arange(12).flip(0)
    prototypes = F.normalize(torch.randn(4, 8), dim=1)
    options = {"query_ids": labels, "key_ids": labels, "exclude": positions.roll(1)}

    def losses(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        casted = {name: cast(value) for name, value in options.items()}
        bank = protoclip.Bank(prototypes, cast(labels))
        proto = protoclip.ProtoClipLoss(proto=protoclip.ProtoConfig(queue=12, k=3))
        results = [
            protoclip.info_nce(x, y, scale, ids=cast(labels)),
            protoclip.sigmoid_loss(x, y, scale, -3.0, ids=cast(labels)),
            protoclip.nt_xent(x, y, scale, ids=cast(labels)),
            protoclip.sup_con(x, cast(labels), scale),
            protoclip.contrastive(x, y, scale, positives=cast(positions), **casted),
            protoclip.prototype_cross_entropy(x, prototypes, cast(labels), scale),
            protoclip.prototype_losses(x, [bank], scale).loss,
            protoclip.segment_mean(x, cast(labels), 4)[0],
            protoclip.ClipLoss()(x, y, scale, ids=cast(labels)),
        ]
        return results + [proto(x, y, scale, index=cast(positions)) for _ in range(3)]

    for got, expected in zip(losses(lambda x: x.to(dtype)), losses(lambda x: x), strict=True):
        assert torch.equal(got, expected)
