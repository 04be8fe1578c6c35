"""Losses and gradients over 1 to 3 ranks are those of one process with the whole batch."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from budget import Results, leaf, loss_and_gradients, said
from op_table import BF16, FP32, FP64, OPS, Call, Plain, assert_results_as_formula
from ranks import in_group, on_ranks
from torch import Tensor

import protoclip
from protoclip import distributed
from protoclip.distributed import GlobalBatchNorm1d, find_rank
from protoclip.losses.objective import similarity_distillation
from protoclip.model import Encoded

G = 96  # pairs
D = 20
WHOLE = slice(0, G)
CPU = torch.device("cpu")
Arrays = dict[str, np.ndarray]
BACKENDS = {FP64: "reference", FP32: "auto", BF16: "auto"}
DTYPES = {1: (FP64,), 2: (FP64, FP32, BF16), 3: (FP64, FP32)}  # by the number of ranks


class Pairs(NamedTuple):
    image: Tensor  # [G, D]
    text: Tensor  # [G, D]


def features(seed: int = 0) -> Pairs:
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(G, D, dtype=torch.float64), dim=-1)
    text = F.normalize(image + 0.5 * torch.randn(G, D, dtype=torch.float64), dim=-1)
    return Pairs(image, text)


# ---- the rows of op_table.py ----


def as_one_number(call: Call, results: Sequence[Tensor], rows: int) -> Tensor:
    """Of a share's results, so that its mean over ranks is that of the whole batch: of "none" some
    function of each row, a sum divided by the rows."""
    if (reduction := call.constants.get("reduction", "none")) == "none":
        return sum((x.where(x.isfinite(), 0) / 8).sin().mean() for x in results)
    return results[0] / rows if reduction == "sum" else results[0]


def averaged(call: Call) -> Call:
    def formula(**leaves: Tensor) -> Plain:
        plain = call.formula(**leaves)
        number = as_one_number(call, plain.results, len(next(iter(leaves.values()))))
        return Plain([number], plain.logits)

    def observe(results: Any, **leaves: Tensor) -> Sequence[Tensor]:
        rows = len(next(iter(leaves.values())))
        return [as_one_number(call, results if isinstance(results, tuple) else [results], rows)]

    return replace(call, formula=formula, observe=observe)


@cache
def calls(dtype: torch.dtype) -> dict[str, Call]:
    return {
        f"{op.name}, {row}": averaged(op.make(dtype=dtype, **row))
        for op in OPS
        for row in op.rows_over_ranks()
    }


def of_share(call: Call, number: int, of: int, group: Any) -> Results:
    mine = call.with_tensors(lambda x: x.tensor_split(of)[number] if x.ndim else x)
    return mine.results(BACKENDS[call.dtype], group=group)


# ---- on the ranks ----


class RankResults(NamedTuple):
    """Gathered, as arrays, which a process can send."""

    losses: dict[torch.dtype, dict[str, Arrays]]  # by call
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
    share = (distributed.rank(), distributed.world_size(), dist.group.WORLD)
    return RankResults(
        losses={
            dtype: {
                name: as_ddp_averages(of_share(call, *share)) for name, call in calls(dtype).items()
            }
            for dtype in DTYPES[distributed.world_size()]
        },
        distillation=as_ddp_averages(distillation(mine)),
        batch_norm=batch_norm_over_ranks(mine),
        refusal=refusal(),
    )


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


def assert_as_whole_batch(call: Call, averages: Arrays) -> None:
    plain = call.plain(call.dtype).values
    got = {name: torch.as_tensor(array).to(plain[name].dtype) for name, array in averages.items()}
    assert_results_as_formula(call, got)


def test_losses_and_gradients_over_ranks_are_those_of_the_whole_batch(
    first_rank: RankResults,
) -> None:
    for dtype, losses in first_rank.losses.items():
        for name, averages in losses.items():
            with said((dtype, name)):
                assert_as_whole_batch(calls(dtype)[name], averages)


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
    half = group.rank() if number == 0 else 1 - group.rank()
    losses = {}
    for name, call in calls(FP32).items():
        if not name.startswith("contrastive"):  # whose keys have positions
            results = of_share(call, half, 2, group)
            means = {name: value.double() for name, value in results.items() if value.ndim == 0}
            losses[name] = {
                value: distributed.mean_over_ranks(mean, group).numpy()
                for value, mean in means.items()
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
    for results in four_ranks:
        for name, averages in results.losses.items():
            with said(name):
                assert_as_whole_batch(calls(FP32)[name], averages)


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


@pytest.mark.smoke
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


def loss_with_a_short_last_batch(short_rank: int) -> str:
    """By the rule of a GPU, on which only a rank whose number of rows has changed reads those of
    the others; returns this rank's error."""
    distributed._reading_is_free = lambda rows: False
    for step in range(3):
        count = 3 if step == 2 and dist.get_rank() == short_rank else 4
        rows = F.normalize(torch.randn(count, 8), dim=1)
        try:
            protoclip.info_nce(rows, rows, 10.0, group=dist.group.WORLD, backend="reference")
        except ValueError as error:
            return str(error)
        except RuntimeError:  # the other rank has gone
            return "left alone"
    return "trained"


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_whose_last_batch_is_short_says_so_and_nobody_hangs(ranks: int) -> None:
    *others, short = in_group(ranks, loss_with_a_short_last_batch, ranks - 1)
    sizes = ", ".join(["4"] * (ranks - 1) + ["3"])
    expected = f"info_nce: expected as many rows on every rank, got {sizes} on ranks 0 to "
    assert short.startswith(expected), short
    assert set(others) == {"left alone"}
