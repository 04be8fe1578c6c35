"""``hierarchical_kmeans`` and ``balanced_sample``: levels, shares, ranks, rows on disk, resume."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import in_group
from torch import Tensor

import protoclip
from benchmarks import curation
from protoclip import Hierarchy, balanced_sample, hierarchical_kmeans
from protoclip.curate.hierarchy import Level, plan_levels
from protoclip.curate.order import first_of_each, nearest_keys
from protoclip.lloyd import points as points_on_disk

BLOBS = 40


def blobs(rows: int = 4000, columns: int = 6) -> Tensor:
    """Blobs of which the first has half of the rows, the second a quarter, ..., [N, D]."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(BLOBS, columns, generator=generator)
    blob = torch.empty(rows).geometric_(0.5, generator=generator).long().clamp_max(BLOBS) - 1
    return centres[blob] + torch.randn(rows, columns, generator=generator)


def by_hand(labels: list[list[int]]) -> Hierarchy:
    """A hierarchy with these labels of each level; row i is at squared distance i."""
    levels: list[Level] = []
    sizes = torch.ones(len(labels[0]), dtype=torch.int64)
    for label_list in labels:
        label = torch.tensor(label_list)
        sizes = torch.zeros(int(label.max()) + 1, dtype=torch.int64).index_add_(0, label, sizes)
        squared = torch.arange(len(label), dtype=torch.float32)
        levels.append(Level(torch.zeros(len(sizes), 1), label, squared, sizes, 0.0))
    return Hierarchy(tuple(levels))


def equal(a: Hierarchy, b: Hierarchy) -> bool:
    return len(a.levels) == len(b.levels) and all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y))
        for level_a, level_b in zip(a.levels, b.levels, strict=True)
        for x, y in zip(vars(level_a).values(), vars(level_b).values(), strict=True)
    )


@pytest.mark.smoke
def test_levels_cluster_the_centroids_below() -> None:
    points = blobs()
    hierarchy = hierarchical_kmeans(points, [100, 20, 4], resamplings=2)
    below = points
    for level, clusters in zip(hierarchy.levels, (100, 20, 4), strict=True):
        labels, squared = protoclip.kmeans_assign(below, level.centroids)
        assert level.centroids.shape == (clusters, 6)
        assert torch.equal(level.labels, labels)
        assert torch.equal(level.squared, squared)
        assert level.inertia == pytest.approx(float(squared.double().sum()))
        assert int(level.sizes.sum()) == len(points)
        below = level.centroids
    tops = hierarchy.labels(3)
    assert torch.equal(tops.bincount(minlength=4), hierarchy.levels[2].sizes)
    assert torch.equal(hierarchy.labels(), hierarchy.levels[0].labels)


def test_without_resampling_the_first_level_is_kmeans() -> None:
    points = blobs()
    hierarchy = hierarchical_kmeans(points, [50], resamplings=0)
    assert hierarchy.levels[0].inertia < 1.05 * protoclip.kmeans(points, 50, num_iters=50).inertia


def test_resampling_takes_centroids_from_the_density_to_the_support() -> None:
    """Of rows on a line, nine tenths lie in a tenth of it."""
    generator = torch.Generator().manual_seed(1)
    dense, sparse = (
        torch.rand(9000, 1, generator=generator),
        torch.rand(1000, 1, generator=generator),
    )
    points = torch.cat([dense, 1 + 9 * sparse])
    in_dense_part = []
    for resamplings in (0, 10):
        hierarchy = hierarchical_kmeans(points, [100], resamplings=resamplings, sample_sizes=10)
        in_dense_part.append(int((hierarchy.levels[0].centroids < 1).sum()))
    assert in_dense_part[1] < in_dense_part[0] / 2  # uniform ones would be 10


@pytest.mark.parametrize("choose", ["closest", "random"])
def test_the_same_seed_gives_the_same_bits(choose: str) -> None:
    points = blobs()
    first, again, other = (
        hierarchical_kmeans(points, [60, 6], resamplings=2, choose=choose, seed=seed)
        for seed in (3, 3, 4)
    )
    assert equal(first, again)
    assert not equal(first, other)
    chosen = [balanced_sample(first, 100, choose=choose, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])  # what rounding leaves over is random


def test_shares_are_equal_from_the_top_down() -> None:
    # Clusters 0 (60 rows) and 1 (6) are of top cluster 0, cluster 2 (20 rows) of 1, 3 (4) of 2.
    labels = [0] * 60 + [1] * 6 + [2] * 20 + [3] * 4
    hierarchy = by_hand([labels, [0, 0, 1, 2]])
    counts = torch.tensor(labels)[balanced_sample(hierarchy, 34)].bincount(minlength=4)
    # 15 + 15 + 4 of the top clusters; of the first 15 the small cluster gives all of its 6.
    assert counts.tolist() == [9, 6, 15, 4]


def test_what_rounding_leaves_over_comes_from_clusters_that_have_more() -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 2
    seen = set()
    for seed in range(20):
        chosen = balanced_sample(by_hand([labels]), 22, seed=seed)
        counts = torch.tensor(labels)[chosen].bincount(minlength=4).tolist()
        assert counts[3] == 2
        assert sorted(counts[:3]) == [6, 7, 7]
        seen.add(tuple(counts))
    assert len(seen) == 3


def test_closest_takes_the_nearest_rows_and_random_others() -> None:
    hierarchy = by_hand([[0, 1] * 50])
    assert balanced_sample(hierarchy, 10, choose="closest").tolist() == list(range(10))
    random = [balanced_sample(hierarchy, 10, seed=seed).tolist() for seed in range(2)]
    assert random[0] != random[1]
    assert all(len(set(positions)) == 10 for positions in random)


def test_first_of_each_is_a_sort_by_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    squared = torch.randint(0, 9, (1000,), generator=generator).float()  # many are equal
    labels = torch.randint(0, 7, (1000,), generator=generator)
    quotas = torch.tensor([0, 1, 5, 50, 100, 1000, 3])
    chosen = first_of_each(nearest_keys(squared, torch.arange(1000)), labels, quotas)
    for cluster, quota in enumerate(quotas.tolist()):
        rows = (labels == cluster).nonzero()[:, 0]
        nearest = rows[squared[rows].argsort(stable=True)][:quota]
        assert rows[chosen[rows]].tolist() == sorted(nearest.tolist())


def test_weights_are_those_of_the_first_levels_means() -> None:
    points = blobs(300)
    weights = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(2)).double()
    weighted = hierarchical_kmeans(points, [1], resamplings=0, weights=weights)
    mean = (points.double() * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(weighted.levels[0].centroids[0], mean.float())
    inertia = (weights * (points.double() - mean).square().sum(1)).sum()
    assert weighted.levels[0].inertia == pytest.approx(float(inertia), rel=1e-5)


def test_equal_rows_leave_clusters_empty() -> None:
    points = torch.tensor([[0.0], [1.0]]).repeat_interleave(50, 0)
    hierarchy = hierarchical_kmeans(points, [10, 3], resamplings=2)
    assert int(hierarchy.levels[0].sizes.count_nonzero()) == 2
    chosen = balanced_sample(hierarchy, 20)
    assert (chosen < 50).sum() == 10


def test_rows_on_disk_give_the_bits_of_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = blobs().half()
    for number, part in enumerate(points.split(1700)):
        np.save(tmp_path / f"part_{number}.npy", part.numpy())
    monkeypatch.setattr(points_on_disk, "BLOCK_BYTES", 5000)  # 128 rows
    on_disk = hierarchical_kmeans(tmp_path, [60, 6], resamplings=2)
    opened = hierarchical_kmeans(protoclip.open_features(tmp_path), [60, 6], resamplings=2)
    assert equal(on_disk, opened)
    assert equal(on_disk, hierarchical_kmeans(points.numpy(), [60, 6], resamplings=2))


def test_all_rows_can_be_chosen_and_a_saved_hierarchy_is_the_same(tmp_path: Path) -> None:
    hierarchy = hierarchical_kmeans(blobs(500), [20, 3], resamplings=1)
    assert balanced_sample(hierarchy, 500).tolist() == list(range(500))
    hierarchy.save(tmp_path / "h.safetensors")
    assert equal(hierarchy, Hierarchy.load(tmp_path / "h.safetensors"))
    protoclip.kmeans(blobs(500), 3).save(tmp_path / "clusters.safetensors")
    with pytest.raises(ValueError, match="expected a file that Hierarchy.save wrote"):
        Hierarchy.load(tmp_path / "clusters.safetensors")


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [(1, 0, 3), (1, 1, 0), (1, 2, 0), (2, 0, 0), (2, 2, 0)])
def test_a_stopped_call_continues_with_the_same_bits(
    tmp_path: Path, stop_at: tuple[int, int, int]
) -> None:
    points = blobs()
    state = tmp_path / "state.safetensors"

    def stop(*place: int) -> None:
        if place == stop_at:
            raise StopError

    def run(**options: object) -> Hierarchy:
        return hierarchical_kmeans(points, [60, 9], resamplings=2, **options)  # type: ignore[arg-type]

    with pytest.raises(StopError):
        run(state=state, progress=stop)
    began: list[tuple[int, ...]] = []
    continued = run(state=state, progress=lambda *place: began.append(place))
    assert equal(continued, run())
    assert began[0] == (*stop_at[:2], max(0, stop_at[2] - 1))
    began.clear()
    assert equal(run(state=state, progress=lambda *place: began.append(place)), continued)
    assert not began  # nothing was left to compute


def test_a_state_of_another_call_is_refused(tmp_path: Path) -> None:
    points = blobs(500)
    state = tmp_path / "state.safetensors"
    hierarchical_kmeans(points, [20, 3], resamplings=1, state=state)
    with pytest.raises(ValueError, match="of a call with other seed; use another file"):
        hierarchical_kmeans(points, [20, 3], resamplings=1, state=state, seed=1)
    with pytest.raises(ValueError, match="of a call with other rows;"):
        hierarchical_kmeans(points + 1, [20, 3], resamplings=1, state=state)
    state.write_bytes(b"no state")
    with pytest.raises(ValueError, match="expected a state that it wrote"):
        hierarchical_kmeans(points, [20, 3], resamplings=1, state=state)


WRONG = [
    ({"levels": [10, 10]}, "expected numbers of clusters of at least 1 that fall"),
    ({"levels": [3, 10]}, "that fall from level to level, such as [1000, 100], got [3, 10]"),
    ({"levels": []}, "got []"),
    ({"levels": [2.5]}, "got [2.5]"),
    ({"levels": [501]}, "at most N = 500 clusters at the first level, got 501"),
    ({"resamplings": -1}, "expected resamplings as a whole number of at least 0"),
    ({"resamplings": [1]}, "or one for each of the 2 levels, got [1]"),
    ({"sample_sizes": 1}, "expected sample_sizes as a whole number of at least 2"),
    ({"choose": "far"}, "expected choose in ('random', 'closest'), got 'far'"),
    ({"rows": torch.zeros(5)}, "hierarchical_kmeans: expected rows of shape [N, D], got (5,)"),
    ({"rows": torch.full((50, 2), torch.nan)}, "NaN or inf"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_explained(options: dict[str, object], message: str) -> None:
    arguments = {"rows": blobs(500), "levels": [20, 3], **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        hierarchical_kmeans(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [0, 501, 2.5])
def test_a_target_above_the_rows_is_refused(target: int) -> None:
    hierarchy = by_hand([[0] * 500])
    with pytest.raises(ValueError, match="expected a target from 1 to N = 500 rows"):
        balanced_sample(hierarchy, target)


def test_sample_sizes_are_half_of_the_mean_cluster() -> None:
    plans = plan_levels(29_700, [1000, 300])  # the paper's circles
    assert [plan.sample_size for plan in plans] == [15, 2]
    assert [plan.rows for plan in plans] == [29_700, 1000]
    assert [plan.resamplings for plan in plan_levels(99, [9, 3], [0, 10])] == [0, 10]


def of_one_of_two_ranks() -> dict[str, Any]:
    group = dist.group.WORLD
    points = blobs()
    rows = points[:1500] if dist.get_rank() == 0 else points[1500:]
    hierarchy = hierarchical_kmeans(rows, [40, 6], resamplings=2, group=group)
    return {
        "inertia": hierarchy.levels[0].inertia,
        "centroids": hierarchy.levels[0].centroids.tolist(),
        "above": hierarchy.levels[1].labels.tolist(),
        "sizes": hierarchy.levels[1].sizes.tolist(),
        "labels": hierarchy.labels().tolist(),
        "chosen": balanced_sample(hierarchy, 200, seed=5, group=group).tolist(),
    }


def test_two_ranks_equal_one() -> None:
    first, second = in_group(2, of_one_of_two_ranks)
    whole = hierarchical_kmeans(blobs(), [40, 6], resamplings=2)
    for name in ("inertia", "centroids", "above", "sizes"):
        assert first[name] == second[name]
    assert first["inertia"] == pytest.approx(whole.levels[0].inertia, rel=1e-6)
    assert first["sizes"] == whole.levels[1].sizes.tolist()
    assert first["labels"] + second["labels"] == whole.labels().tolist()
    chosen = first["chosen"] + [1500 + position for position in second["chosen"]]
    assert chosen == balanced_sample(whole, 200, seed=5).tolist()


@pytest.mark.parametrize("name", sorted(path.stem for path in curation.RESULTS.glob("*.json")))
def test_the_page_shows_the_records(name: str) -> None:
    record = json.loads((curation.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    page = curation.PAGE.read_text(encoding="utf-8")
    assert curation.block_of(page, name, curation.TABLES[name](record)) == page
