"""Losses and gradients over 1 to 3 ranks are those of one process with the whole batch."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import Results, assert_within_budget, leaf, loss_and_gradients
from ranks import in_group, on_ranks
from torch import Tensor

import protoclip
from protoclip import contrastive, contrastive_parts, distributed
from protoclip.distributed import GlobalBatchNorm1d, find_rank
from protoclip.losses.objective import similarity_distillation
from protoclip.model import Encoded
from protoclip.ops import sigmoid_loss

G = 96  # pairs, of 1, 2 and 3 equal shares
D = 20
WHOLE = slice(0, G)
CPU = torch.device("cpu")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kind:
    dtype: torch.dtype
    backend: str
    logit_scale: float


KINDS = [
    Kind(torch.float64, "reference", 3.0),
    Kind(torch.float64, "reference", 100.0),
    Kind(torch.float32, "auto", 14.3),
    Kind(torch.float32, "auto", 100.0),
    Kind(torch.bfloat16, "auto", 14.3),
]


class Pairs(NamedTuple):
    image: Tensor  # [G, D]
    text: Tensor  # [G, D]


def features(dtype: torch.dtype = torch.float64, seed: int = 0) -> Pairs:
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(G, D, dtype=torch.float64), dim=-1)
    text = F.normalize(image + 0.5 * torch.randn(G, D, dtype=torch.float64), dim=-1)
    return Pairs(image.to(dtype), text.to(dtype))


# ---- losses of pairs ----


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs. ``logit_bias``: of SigLIP's."""

    function: Callable[..., Tensor]
    logit_bias: float | None = None
    same_id: str | None = None  # None: without ids
    options: Mapping[str, Any] = field(default_factory=dict)  # tensors are of all pairs


WEIGHTS = torch.rand(G, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(20, (G,), generator=torch.Generator().manual_seed(2))
LABELS[::5] = -100


def sup_con_of_views(image: Tensor, text: Tensor, *scale: Tensor, **options: Any) -> Tensor:
    views = torch.stack([image, text], dim=1)
    return protoclip.sup_con(views, options.pop("labels"), *scale, **options)


SMOOTHED = {"weights": WEIGHTS, "label_smoothing": 0.1}
PAIR_LOSSES = {
    "info_nce": PairLoss(protoclip.info_nce),
    "info_nce, weights": PairLoss(protoclip.info_nce, options={"weights": WEIGHTS}),
    "info_nce, ids excluded": PairLoss(protoclip.info_nce, same_id="exclude"),
    "info_nce, ids positive": PairLoss(protoclip.info_nce, same_id="positive"),
    "info_nce, ids and weights": PairLoss(
        protoclip.info_nce, same_id="positive", options={"weights": WEIGHTS}
    ),
    "info_nce, kept logits": PairLoss(protoclip.info_nce, options={"stash": True}),
    "siglip": PairLoss(sigmoid_loss, -10.0),
    "siglip, ids positive": PairLoss(sigmoid_loss, -10.0, "positive"),
    "siglip, ids excluded": PairLoss(sigmoid_loss, -10.0, "exclude"),
    "siglip, weights": PairLoss(sigmoid_loss, -10.0, "exclude", SMOOTHED),
    "siglip, label smoothing": PairLoss(sigmoid_loss, -10.0, options={"label_smoothing": 0.1}),
    "nt_xent": PairLoss(protoclip.nt_xent),
    "nt_xent, options": PairLoss(protoclip.nt_xent, same_id="positive", options=SMOOTHED),
    "nt_xent, decoupled": PairLoss(
        protoclip.nt_xent, options={"decoupled": True, "label_smoothing": 0.1}
    ),
    "nt_xent, decoupled, options": PairLoss(
        protoclip.nt_xent, same_id="exclude", options={"decoupled": True, "weights": WEIGHTS}
    ),
    "sup_con": PairLoss(sup_con_of_views, options={"labels": LABELS}),
    "sup_con, options": PairLoss(sup_con_of_views, options={"labels": LABELS, **SMOOTHED}),
}
IDS = torch.randint(30, (G, 2), generator=torch.Generator().manual_seed(0))


def pair_loss_results(
    name: str, kind: Kind, *, dtype: torch.dtype, group: Any = None, mine: slice = WHOLE
) -> Results:
    """Features of the kind's dtype, computed in ``dtype``."""
    case = PAIR_LOSSES[name]
    image, text = features(kind.dtype)
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    leaves = {
        "image": leaf(image[mine], dtype),
        "text": leaf(text[mine], dtype),
        "logit_scale": leaf(kind.logit_scale, at_least_fp32),
    }
    if case.logit_bias is not None:
        leaves["logit_bias"] = leaf(case.logit_bias, at_least_fp32)
    options: dict[str, Any] = {"backend": kind.backend, "group": group}
    if case.same_id is not None:
        options |= {"ids": IDS[mine], "same_id": case.same_id}
    for name, value in case.options.items():
        options[name] = value[mine] if isinstance(value, Tensor) else value
    loss = case.function(*leaves.values(), **options)
    return loss_and_gradients(loss, **leaves)


# ---- contrastive ----


def several_positions(draw: torch.Generator) -> Tensor:
    """Of own keys [G, 3] among 2 G, some of them padding, of some queries all."""
    positions = torch.randint(2 * G, (G, 3), generator=draw)
    positions[torch.rand(G, 3, generator=draw) < 0.3] = -100
    positions[::9] = -100
    return positions


def relations() -> dict[str, dict[str, Any]]:
    """What ``contrastive`` is told of G queries and G keys, or 2 G: two of each query."""
    draw = torch.Generator().manual_seed(5)
    positions = torch.randint(2 * G, (G,), generator=draw)
    positions[:30:2] = -100  # of several ranks, unequally many
    key_bias = torch.randn(2 * G, generator=draw)
    key_bias[::7] = -torch.inf
    ids = torch.randint(40, (2 * G,), generator=draw)
    weights = {"weights": torch.rand(G, generator=draw)}
    negatives = F.normalize(torch.randn(G, 2, D, generator=draw), dim=-1)
    everything = {
        "query_ids": ids[::2],
        "key_ids": ids,
        "exclude": positions.roll(1),
        "key_bias": key_bias,
    }
    return {
        "plain": {},
        "ids and biases": weights | {"key_ids": ids[:G], "key_bias": key_bias[:G]},
        "positions": {"positives": positions, "key_ids": ids},
        "everything": weights | everything | {"positives": positions},
        "ids positive": weights | everything | {"same_id": "positive"},
        "label smoothing": weights | {"label_smoothing": 0.2},
        "several positives and own negatives": everything
        | {
            "positives": several_positions(draw),
            "label_smoothing": 0.2,
            "negatives": negatives,
        },
    }


OF_KEYS = {"key_ids", "key_bias"}  # the others are of queries
PARTS_OF = ["everything", "ids positive"]


def contrastive_results(
    name: str,
    kind: Kind,
    *,
    dtype: torch.dtype,
    group: Any = None,
    mine: slice = WHOLE,
    parts: bool = False,
) -> Results:
    """``parts``: log-sum-exp and mean positive, weighed into one number."""
    relation = relations()[name]
    queries, keys = (t.to(dtype) for t in features(kind.dtype))
    my_keys = mine
    if len(relation.get("key_ids", keys)) > G:
        keys = torch.stack([keys, -queries], dim=1).flatten(0, 1)
        my_keys = slice(2 * mine.start, 2 * mine.stop)
    options = {
        option: value[my_keys if option in OF_KEYS else mine]
        if isinstance(value, Tensor)
        else value
        for option, value in relation.items()
    }
    at_least_fp32 = torch.promote_types(dtype, torch.float32)
    leaves = {
        "queries": leaf(queries[mine]),
        "keys": leaf(keys[my_keys]),
        "logit_scale": leaf(kind.logit_scale, at_least_fp32),
    }
    if "key_bias" in options:
        leaves["key_bias"] = leaf(options.pop("key_bias"), at_least_fp32)
    if "negatives" in options:
        leaves["negatives"] = leaf(options.pop("negatives"), dtype)
    if not parts:
        loss = contrastive(**leaves, **options, backend=kind.backend, group=group)
        return loss_and_gradients(loss, **leaves)
    weights = options.pop("weights")
    level, mean = contrastive_parts(**leaves, **options, backend=kind.backend, group=group)
    return loss_and_gradients((weights * (level - 2 * mean)).mean(), **leaves)


def every_result(
    kind: Kind, *, dtype: torch.dtype, group: Any = None, mine: slice = WHOLE
) -> dict[str, Results]:
    options: dict[str, Any] = {"dtype": dtype, "group": group, "mine": mine}
    results = {name: pair_loss_results(name, kind, **options) for name in PAIR_LOSSES}
    for name in relations():
        results[f"contrastive, {name}"] = contrastive_results(name, kind, **options)
    for name in PARTS_OF:
        results[f"parts, {name}"] = contrastive_results(name, kind, **options, parts=True)
    return results


# ---- on the ranks ----


class RankResults(NamedTuple):
    """Gathered, as arrays, which a process can send."""

    losses: list[dict[str, Arrays]]  # of each kind, by case
    distillation: Arrays
    batch_norm: Arrays
    refusal: str


def all_rows(rows: Tensor) -> Tensor:
    return distributed.gather_rows(rows) if distributed.is_distributed() else rows


def as_ddp_averages(results: Results) -> Arrays:
    """The mean over ranks: of scalars, and of rows that each belong to one rank."""
    averages = {}
    for name, value in results.items():
        wide = value.double()
        if value.ndim == 0:
            average = distributed.mean_over_ranks(wide)
        else:
            average = all_rows(wide / distributed.world_size())
        averages[name] = average.numpy()
    return averages


def of_rank() -> RankResults:
    mine = distributed.own_slice(G)
    results = RankResults(
        losses=[
            {
                name: as_ddp_averages(values)
                for name, values in every_result(
                    kind, dtype=kind.dtype, group=dist.group.WORLD, mine=mine
                ).items()
            }
            for kind in KINDS
        ],
        distillation=as_ddp_averages(distillation(mine)),
        batch_norm=batch_norm_over_ranks(mine),
        refusal=refusal(),
    )
    return results


def distillation(mine: slice = WHOLE) -> Results:
    """The loss and the gradients of both students and of the scale."""
    pairs = features()
    leaves = {
        "image": leaf(pairs.image[mine]),
        "text": leaf(pairs.text[mine]),
        "logit_scale": leaf(9.0, torch.float64),
    }
    teacher = features(seed=7).image.float()[mine]
    students = Encoded(leaves["image"], leaves["text"])
    loss = similarity_distillation(students, teacher, leaves["logit_scale"], 0.2)
    return loss_and_gradients(loss, **leaves)


class NormProblem(NamedTuple):
    norm: torch.nn.BatchNorm1d
    x: Tensor  # [G, D]
    output_weights: Tensor  # [G, D], of the sum whose gradients are compared


def norm_problem(norm_class: type[torch.nn.BatchNorm1d]) -> NormProblem:
    torch.manual_seed(3)
    norm = norm_class(D).double()
    torch.nn.init.normal_(norm.weight)
    return NormProblem(norm, 5 + 2 * torch.randn(G, D).double(), torch.randn(G, D).double())


def batch_norm_results(problem: NormProblem, mine: slice = WHOLE) -> Results:
    norm = problem.norm
    x = leaf(problem.x[mine])
    y = norm(x)
    (problem.output_weights[mine] * y).sum().backward()
    return {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": norm.weight.grad,
        "dbias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }


def batch_norm_over_ranks(mine: slice) -> Arrays:
    """Rows of all ranks, sums of the parameters' gradients."""
    results = batch_norm_results(norm_problem(GlobalBatchNorm1d), mine)
    for name in ("y", "dx"):
        results[name] = all_rows(results[name])
    for name in ("dweight", "dbias"):
        results[name] = distributed.sum_over_ranks(results[name].clone())
    return {name: value.numpy() for name, value in results.items()}


def refusal() -> str:
    try:
        protoclip.info_nce(torch.zeros(3, 4), torch.zeros(2, 4), 1.0, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda ranks: f"{ranks} ranks")
def first_rank(request: pytest.FixtureRequest) -> RankResults:
    return in_group(request.param, of_rank)[0]


def assert_equal_in_fp64(got: Any, expected: Tensor, name: str = "") -> None:
    error = (torch.as_tensor(got) - expected).abs().max()
    assert error <= 1e-12 * max(1, expected.abs().max()), name


@cache
def of_one_process(kind: Kind, dtype: torch.dtype) -> dict[str, Results]:
    reference = Kind(kind.dtype, "reference", kind.logit_scale)
    return every_result(reference, dtype=dtype)


@pytest.mark.parametrize("number, kind", list(enumerate(KINDS)), ids=str)
def test_losses_and_gradients_over_ranks_are_those_of_the_whole_batch(
    first_rank: RankResults, number: int, kind: Kind
) -> None:
    truths = of_one_process(kind, torch.float64)
    bases = of_one_process(kind, kind.dtype)
    assert first_rank.losses[number].keys() == truths.keys()
    for case, results in first_rank.losses[number].items():
        assert results.keys() == truths[case].keys()
        for name, array in results.items():
            truth = truths[case][name]
            base = bases[case][name]
            where = f"{case}: {name}"
            if kind.dtype == torch.float64:
                assert_equal_in_fp64(array, truth, where)
                continue
            magnitude = None
            if truth.ndim == 0:  # a scalar's error is that of the logits it is made of
                magnitude = max(10 + kind.logit_scale, truth.abs().item())
            got = torch.as_tensor(array).to(base.dtype)
            assert_within_budget(got, truth, base, where, magnitude)


def test_distillation_over_ranks_is_that_of_the_whole_batch(first_rank: RankResults) -> None:
    for name, expected in distillation().items():
        assert_equal_in_fp64(first_rank.distillation[name], expected, name)


def test_batch_norm_over_ranks_is_torchs_of_the_whole_batch(first_rank: RankResults) -> None:
    expected = batch_norm_results(norm_problem(torch.nn.BatchNorm1d))
    for name, value in expected.items():
        assert_equal_in_fp64(first_rank.batch_norm[name], value.detach(), name)


def test_unpaired_features_are_refused_over_ranks(first_rank: RankResults) -> None:
    assert "one text per image" in first_rank.refusal


# ---- other groups than all ranks ----


IN_FP32 = Kind(torch.float32, "auto", 14.3)
OF_GROUPS = ["info_nce", "info_nce, ids positive", "siglip", "siglip, ids excluded", "sup_con"]


class OfGroup(NamedTuple):
    """Of one rank of two groups, as arrays, which a process can send."""

    number: int  # of the group
    losses: dict[str, Arrays]  # by case, the mean over the ranks of the group
    refusals: dict[str, str]


def of_two_groups() -> OfGroup:
    """Ranks 0 and 2 share the pairs in order, ranks 1 and 3 in reverse: neighbours in a group are
    none among all ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    number = dist.get_rank() % 2
    group = groups[number]
    half = G // 2
    first = half * (group.rank() if number == 0 else 1 - group.rank())
    mine = slice(first, first + half)
    losses = {}
    for name in OF_GROUPS:
        results = pair_loss_results(name, IN_FP32, dtype=torch.float32, group=group, mine=mine)
        means = {"loss": results["loss"].double(), "dlogit_scale": results["dlogit_scale"].double()}
        losses[name] = {
            value: distributed.mean_over_ranks(mean, group).numpy() for value, mean in means.items()
        }
    return OfGroup(number, losses, refusals_of(groups[1 - number], group))


def refusals_of(other_group: Any, group: Any) -> dict[str, str]:
    x = F.normalize(torch.randn(4 if group.rank() else 5, D), dim=1)
    equal = x[:4]
    calls: dict[str, Callable[[], Any]] = {
        "another group": lambda: protoclip.info_nce(x, x, 9.0, group=other_group),
        "class of another group": lambda: protoclip.ClipLoss(group=other_group),
        "wrong rank": lambda: protoclip.ClipLoss(rank=1 - group.rank(), world_size=2, group=group),
        "wrong size": lambda: protoclip.SigLipLoss(rank=group.rank(), world_size=4, group=group),
        "smoothing": lambda: protoclip.info_nce(
            equal, equal, 9.0, label_smoothing=0.1, group=group
        ),
        "offset": lambda: protoclip.sigmoid_loss(equal[:2], equal, 9.0, -9.0, group=group),
        "rows": lambda: protoclip.info_nce(x, x, 9.0, group=group),
        "keys": lambda: protoclip.contrastive(equal[:2], x, 9.0, group=group),
        "views": lambda: protoclip.nt_xent(x, x, 9.0, group=group),
        "labels": lambda: protoclip.sup_con(x, torch.zeros(len(x)).long(), 9.0, group=group),
        "images": lambda: protoclip.sigmoid_loss(x, x, 9.0, -9.0, group=group),
        "module": lambda: protoclip.ClipLoss(group=group)(x, x, torch.tensor(9.0)),
    }
    refusals = {}
    for name, call in calls.items():
        refusals[name] = ""
        try:
            call()
        except (TypeError, ValueError) as error:
            refusals[name] = str(error)
    loss = protoclip.ClipLoss(local_loss=True, gather_with_grad=True, group=group)
    assert (loss.rank, loss.world_size) == (group.rank(), 2)
    expected = protoclip.info_nce(equal, equal, 9.0, group=group)
    assert torch.equal(loss(equal, equal, torch.tensor(9.0)), expected)
    assert torch.equal(copy.deepcopy(loss)(equal, equal, torch.tensor(9.0)), expected)
    return refusals


@pytest.fixture(scope="module")
def four_ranks() -> list[OfGroup]:
    return in_group(4, of_two_groups)


def test_two_groups_of_two_have_each_the_losses_of_their_own_pairs(
    four_ranks: list[OfGroup],
) -> None:
    truths = of_one_process(IN_FP32, torch.float64)
    bases = of_one_process(IN_FP32, torch.float32)
    for results in four_ranks:
        for case, values in results.losses.items():
            for name, array in values.items():
                truth, base = truths[case][name], bases[case][name]
                magnitude = max(10 + IN_FP32.logit_scale, truth.abs().item())
                got = torch.as_tensor(array).to(base.dtype)
                assert_within_budget(got, truth, base, f"{case}: {name}", magnitude)


def test_what_a_group_cannot_have_is_refused_on_every_rank(four_ranks: list[OfGroup]) -> None:
    words = {
        "another group": "info_nce: expected group as a process group that this process belongs to",
        "class of another group": "ClipLoss: expected group as a process group",
        "wrong rank": "ClipLoss: expected rank=",
        "wrong size": "world_size=2, those of the group, got",
        "smoothing": "info_nce: expected label_smoothing=0 with a group",
        "offset": "sigmoid_loss: expected as many texts as images with a group",
        "rows": "info_nce: expected as many rows on every rank, got 5, 4",
        "keys": "contrastive: expected as many rows on every rank, got 5, 4",
        "views": "nt_xent: expected as many rows on every rank, got 5, 4",
        "labels": "sup_con: expected as many rows on every rank, got 5, 4",
        "images": "sigmoid_loss: expected as many rows on every rank, got 5, 4",
        "module": "ClipLoss: expected as many rows on every rank, got 5, 4",
    }
    for results in four_ranks:
        assert results.refusals.keys() == words.keys()
        for name, refusal in results.refusals.items():
            assert words[name] in refusal, name


class TwoCalls(NamedTuple):
    """Sizes of what each call of a loss gathered, or what it said."""

    first_gathers: list[int]
    second_gathers: list[int]
    error: str


# The loss, and the sizes of rank 1's batches in its two calls; rank 0 has 6 pairs.
CALLS = [(name, sizes) for name in ("ClipLoss", "SigLipLoss") for sizes in ((5, 6), (6, 5), (6, 6))]


def calls_of_rank() -> list[TwoCalls]:
    """Of each of CALLS."""
    info = find_rank()
    gathers: list[int] = []
    gather_rows = distributed.gather_rows

    def noted(rows: Tensor, group: Any = None) -> Tensor:
        gathers.append(len(rows))
        return gather_rows(rows, group)

    distributed.gather_rows = noted
    results = []
    for name, sizes in CALLS:
        gathers.clear()
        loss = getattr(protoclip, name)(rank=info.rank, world_size=info.world_size)
        first_x, x = (F.normalize(torch.randn(n if info.rank else 6, D), dim=1) for n in sizes)
        try:
            loss(first_x, first_x, torch.tensor(14.0))
            first_gathers = gathers.copy()
            loss(x, x, torch.tensor(14.0))
            results.append(TwoCalls(first_gathers, gathers[len(first_gathers) :], ""))
        except ValueError as error:
            results.append(TwoCalls([], [], str(error)))
    return results


def test_sizes_are_compared_at_every_call_and_unequal_ones_are_a_sentence_on_every_rank() -> None:
    for results in in_group(2, calls_of_rank):
        for (_, sizes), calls in zip(CALLS, results, strict=True):
            if sizes == (6, 6):
                assert calls.error == ""
                assert calls.first_gathers.count(1) == calls.second_gathers.count(1) == 1
            else:
                words = "expected as many rows on every rank, got 6, 5 on ranks"
                assert words in calls.error and "drop_last=True" in calls.error


SHAPES = [[7, 3], [1, 3], [0, 3], [3, 0], None, []]


def sent_rows() -> list[Any]:
    """What rank 0 sends of each of SHAPES, rows in Fortran's order in pieces of two, or what it
    says of an error."""
    info = find_rank()
    distributed.PIECE = 24

    def make(shape: list[int] | None) -> tuple[Tensor | None, str]:
        assert info.rank == 0
        if shape is None:
            return None, "no rows"
        if not shape:
            raise ValueError("no such file")
        return rows_in_fortrans_order(shape), "rows"

    sent = []
    for shape in SHAPES:
        try:
            rows, words = distributed.rows_from_main(partial(make, shape))
        except ValueError as error:
            rows, words = None, str(error)
        sent.append([words, None if rows is None else rows.tolist()])
    return sent


def rows_in_fortrans_order(shape: list[int]) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape[::-1]).T


def test_rows_of_rank_0_reach_every_rank() -> None:
    expected = [["rows", rows_in_fortrans_order(shape).tolist()] for shape in SHAPES if shape]
    expected += [["no rows", None], ["no such file", None]]
    assert in_group(3, sent_rows) == [expected] * 3


def of_a_slow_rank_0() -> str:
    info = find_rank()
    distributed.start(info, CPU, 5)

    def make() -> str:
        time.sleep(6)
        return "made"

    result = distributed.from_main(make)
    distributed.stop()
    return result


def test_the_work_of_rank_0_may_take_longer_than_ranks_wait_for_each_other() -> None:
    assert on_ranks(2, of_a_slow_rank_0) == ["made"] * 2


def of_no_pairs() -> list[float]:
    """Losses, and largest gradients, of a batch without pairs on any rank."""
    info = find_rank()
    results = []
    for local_loss, gather_with_grad in itertools.product([False, True], repeat=2):
        loss = protoclip.ClipLoss(
            local_loss, gather_with_grad, rank=info.rank, world_size=info.world_size
        )
        x = torch.zeros(0, D, requires_grad=True)
        value = loss(x, x, torch.tensor(14.0))
        (gradient,) = torch.autograd.grad(value, x)
        results += [float(value), float(gradient.abs().sum())]
    return results


def test_a_batch_without_pairs_costs_nothing() -> None:
    assert in_group(2, of_no_pairs) == [[0.0] * 8] * 2
