"""k-means over the ranks of a group: each holds a slice of the points, and all have the clusters of
one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kmeans_cases import (
    FAR,
    SCREENED,
    Case,
    CountedRows,
    bound_few_points,
    keep_rows_on_disk,
    mixture,
)
from ranks import in_group

from protoclip.lloyd import loop, starts

SLICES = [slice(0, 130), slice(130, 130), slice(130, 400)]  # one rank has no points
WEIGHTS = torch.rand(400, generator=torch.Generator().manual_seed(2))
WEIGHTED = {"weights": WEIGHTS}
FORTY = torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
COPIES = FORTY.repeat(10, 1) + 0.1 * torch.arange(400)[:, None].sin()
EMPTY = {"init": 1e3 * FORTY}
MIXED = mixture(400, 16).numpy()
UNLIKE = MIXED + (np.arange(400) >= 130)[:, None].astype(np.float32)  # the ranks' means differ
STORED = SCREENED[:400].numpy()
ENDS = {  # before the last iteration
    "plain": Case(UNLIKE, 8, {"num_iters": 300}),
    "weights": Case(UNLIKE, 8, {"num_iters": 300} | WEIGHTED),
    "equal weights": Case(UNLIKE, 8, {"num_iters": 300, "weights": torch.full((400,), 0.7)}),
    "spherical": Case(UNLIKE, 8, {"num_iters": 300, "spherical": True}),
    "restarts": Case(UNLIKE, 8, {"num_iters": 300, "num_restarts": 3}),
}
CALLS = ENDS | {
    "tol": Case(UNLIKE, 8, {"num_iters": 300, "tol": 0.2}),
    "random": Case(MIXED, 20, {"init": "random"}),
    "random, weights": Case(MIXED, 20, {"init": "random"} | WEIGHTED),
    "k-means++": Case(MIXED, 20),
    "k-means++, weights": Case(MIXED, 20, WEIGHTED),
    "on disk, given": Case(STORED, 60, {"init": SCREENED[:60]}),
    "on disk, empty": Case(STORED, 60, {"init": FAR}),
    "on disk, sample": Case(STORED, 60),
    "on disk, sample, weights": Case(STORED, 60, WEIGHTED),
    "on disk, tol": Case(
        STORED, 60, {"init": "plain k-means++", "tol": 1e-2, "num_iters": 100}
    ),
    "bounded": Case(STORED, 60, {"init": FAR, "num_iters": 8}),
    "split": Case(COPIES.numpy(), 40, {"empty_clusters": "split"} | EMPTY),  # is not centred
}  # fmt: skip
for where, offset in (("near", 0.0), ("far", 1e4)):
    copies = (COPIES + offset).numpy()
    CALLS |= {
        f"greedy, {where}": Case(copies, 40),
        f"sample, {where}": Case(copies, 40),
        f"sample, weights, {where}": Case(copies, 40, WEIGHTED),
        f"greedy, weights, {where}": Case(copies, 40, WEIGHTED),
        f"plain, {where}": Case(copies, 40, {"init": "plain k-means++"} | WEIGHTED),
        f"empty, {where}": Case(copies, 40, EMPTY),
        f"empty, weights, {where}": Case(copies, 40, EMPTY | WEIGHTED),
        f"empty, spherical, {where}": Case(
            copies, 40, {"init": torch.ones(40, 5), "spherical": True}
        ),
    }
TWO_POINTS = np.float32([[1, 2], [3, 4]] * 3)  # all of them on the first rank
FEW = {init: Case(TWO_POINTS, 4, {"init": init}) for init in starts.INITS}


def run(name: str, case: Case, **options: Any) -> dict[str, Any]:
    """Its clusters as arrays, which a process can send; a rank runs it on its slice."""
    points: Any = case.array
    with pytest.MonkeyPatch.context() as patch:
        if name.startswith("sample"):
            patch.setattr(starts, "GREEDY", 1)
            patch.setattr(starts, "FEWEST_ROWS", 0)
            patch.setattr(starts, "ROWS_PER_CLUSTER", 5)
        if name == "bounded":
            bound_few_points(patch)
        if name.startswith("on disk"):
            keep_rows_on_disk(patch)
        if dist.is_initialized():
            case = case.part(SLICES[dist.get_rank()])
            points = CountedRows(case.array) if name.startswith("on disk") else case.array
            options["group"] = dist.group.WORLD
        clusters = case.run(points, **options)
    return {name: np.asarray(value) for name, value in vars(clusters).items()}


class OfRank(NamedTuple):
    calls: dict[str, dict[str, Any]]
    longer: dict[str, dict[str, Any]]  # some more iterations without an end
    few: dict[str, dict[str, Any]]
    unbounded: dict[str, Any]
    iterations_while_one_rank_moves: int


def of_one_rank() -> OfRank:
    calls = {name: run(name, case) for name, case in CALLS.items()}
    few = {name: run(name, case) for name, case in FEW.items()}
    unbounded = run("", CALLS["bounded"])
    loop._moved = lambda *_: torch.tensor(True)
    longer = {
        name: run(name, case, num_iters=len(calls[name]["history"]) + 3)
        for name, case in ENDS.items()
    }
    # A rank that rounds differently from the others: all go on while one of them moves.
    loop._moved = lambda *_: torch.tensor(dist.get_rank() == 1)
    iterations = len(run("plain", CALLS["plain"], num_iters=20)["history"]) - 1
    return OfRank(calls, longer, few, unbounded, iterations)


@pytest.fixture(scope="module")
def three_ranks() -> list[OfRank]:
    return in_group(3, of_one_rank)


@pytest.mark.parametrize("name", CALLS)
def test_three_ranks_equal_one(three_ranks: list[OfRank], name: str) -> None:
    whole = run(name, CALLS[name])
    ranks = [rank.calls[name] for rank in three_ranks]
    for result in ranks:
        np.testing.assert_allclose(result["centroids"], whole["centroids"], 1.3e-6, 1e-5)
        np.testing.assert_allclose(result["history"], whole["history"], 1e-6)
        assert (result["counts"] == whole["counts"]).all()
        assert (result["centroids"] == ranks[0]["centroids"]).all()
        assert (result["history"] == ranks[0]["history"]).all()
    assert (np.concatenate([result["labels"] for result in ranks]) == whole["labels"]).all()


@pytest.mark.parametrize("name", ENDS)
def test_ranks_end_with_the_bits_of_any_more_iterations(
    three_ranks: list[OfRank], name: str
) -> None:
    for rank in three_ranks:
        result, longer = rank.calls[name], rank.longer[name]
        assert len(result["history"]) < 100
        for value in ("centroids", "labels", "counts"):
            assert (result[value] == longer[value]).all()
        assert result["history"][-1] == longer["history"][-1]


def test_each_rank_has_bounds_of_its_own_points(three_ranks: list[OfRank]) -> None:
    for rank in three_ranks:
        for value, expected in rank.unbounded.items():
            assert (rank.calls["bounded"][value] == expected).all()


def test_all_ranks_go_on_while_one_of_them_moves(three_ranks: list[OfRank]) -> None:
    assert [rank.iterations_while_one_rank_moves for rank in three_ranks] == [20, 20, 20]


@pytest.mark.parametrize("init", FEW)
def test_every_start_is_a_point_also_where_ranks_have_none(
    three_ranks: list[OfRank], init: str
) -> None:
    centroids = three_ranks[0].few[init]["centroids"].tolist()
    assert len(centroids) == 4 and all(row in ([1.0, 2.0], [3.0, 4.0]) for row in centroids)
