"""k-means of rows on disk: the bits of a run in memory, one read an iteration, errors, progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kmeans_cases import (
    CASES,
    SCREENED,
    WEIGHTS,
    CountedRows,
    assert_same_clusters,
    keep_rows_on_disk,
    set_rows_in_block,
    stored,
)
from torch import Tensor

import protoclip
from protoclip.features import FeatureRows
from protoclip.lloyd import points as points_module
from protoclip.lloyd import starts
from protoclip.ops.clusters import BlockAssignment

SPLITS: dict[str, Sequence[int]] = {
    "one file": [3000],
    "a row first": [1, 2999],
    "a row last": [2999, 1],
    "halves": [1500, 1500],
    "sevenths": [428, 428, 428, 429, 429, 429, 429],
    "uneven": [7, 1000, 256, 257, 1, 479, 1000],
    "many": [30] * 100,
}


@pytest.fixture(autouse=True)
def rows_stay_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_rows_on_disk(monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_rows_on_disk_have_the_bits_of_rows_in_memory(case: str, tmp_path: Path) -> None:
    assert_same_clusters(CASES[case].run(stored(CASES[case].array, tmp_path)), CASES[case].run())


@pytest.mark.parametrize("split", SPLITS)
def test_how_rows_are_split_into_files_changes_no_bit(split: str, tmp_path: Path) -> None:
    rows = stored(SCREENED.numpy(), tmp_path, SPLITS[split])
    assert_same_clusters(CASES["weights"].run(rows), CASES["weights"].run())


@pytest.mark.parametrize("rows_in_block", [32, 1024])
@pytest.mark.parametrize("case", ["weights", "fp64", "tol", "empty clusters"])
def test_the_size_of_blocks_changes_no_bit(
    case: str, rows_in_block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CASES[case].run()
    rows = stored(CASES[case].array, tmp_path)
    set_rows_in_block(rows_in_block * CASES[case].array.itemsize // 4, monkeypatch)
    assert_same_clusters(CASES[case].run(rows), expected)


def test_rows_are_read_once_in_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once before, and for the labels of the last centroids; never more than a block at once.
    Centroids are prepared once for all blocks."""
    rows = CountedRows(SCREENED.numpy())
    num_prepared = 0
    prepare = BlockAssignment.to

    def prepare_and_count(self: BlockAssignment, *arguments: Any) -> Any:
        nonlocal num_prepared
        num_prepared += 1
        return prepare(self, *arguments)

    monkeypatch.setattr(BlockAssignment, "to", prepare_and_count)
    clusters = protoclip.kmeans(rows, 60, init=SCREENED[:60], num_iters=5)
    assert clusters.num_iters == 5 and num_prepared == 6
    of_sample = len(range(0, 3000, 3000 // 256))
    assert rows.num_read == 3000 * (1 + 6) + of_sample
    assert rows.most_at_once <= max(256, of_sample)


def test_a_start_looks_at_a_sample_of_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "ROWS_PER_CLUSTER", 2)
    rows = CountedRows(SCREENED.numpy())
    protoclip.kmeans(rows, 60, num_iters=0)
    looked_over, labels, sample_of_codes = 3000, 3000, 300
    assert rows.num_read < looked_over + labels + sample_of_codes + 20 * 2 * 60


def test_small_rows_are_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "GREEDY_BYTES", SCREENED.nbytes)
    rows = CountedRows(SCREENED.numpy())
    assert_same_clusters(protoclip.kmeans(rows, 60), protoclip.kmeans(SCREENED, 60))
    assert rows.num_read == 3000


# ---- np.memmap, paths, predict, the estimator, the number of clusters ----


@pytest.fixture
def path(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", SCREENED.numpy())
    return tmp_path / "rows.npy"


def test_maps_and_paths_are_rows_on_disk(path: Path) -> None:
    expected = CASES["screened in 8 bits"].run()
    assert_same_clusters(CASES["screened in 8 bits"].run(path), expected)
    assert_same_clusters(CASES["screened in 8 bits"].run(str(path)), expected)
    mapped = np.load(path, mmap_mode="r")
    assert isinstance(points_module.stored_rows(mapped), FeatureRows)
    assert_same_clusters(CASES["screened in 8 bits"].run(mapped), expected)


def test_a_part_of_a_map_is_what_it_shows(path: Path) -> None:
    """Also where it was changed in memory, or is not one run of the file."""
    mapped = np.load(path, mmap_mode="r")
    changed = np.load(path, mmap_mode="c")
    changed[7] = 0
    for part in (mapped[501:], mapped[10:2000][5:], mapped[:, 3:30], mapped[::2], changed):
        in_memory = protoclip.kmeans(np.array(part), 60, num_iters=3)
        assert_same_clusters(protoclip.kmeans(part, 60, num_iters=3), in_memory)
    assert points_module.stored_rows(mapped[501:]) is not None
    assert points_module.stored_rows(changed) is None


def test_predict_takes_rows_on_disk(path: Path) -> None:
    clusters = protoclip.kmeans(SCREENED, 60)
    for rows in (path, protoclip.open_features(path), np.load(path, mmap_mode="r")):
        assert torch.equal(clusters.predict(rows), clusters.labels)


@pytest.mark.parametrize("kind", ["path", "map", "rows"])
def test_the_estimator_takes_rows_on_disk(kind: str, path: Path) -> None:
    X: Any = {
        "path": path,
        "map": np.load(path, mmap_mode="r"),
        "rows": protoclip.open_features(path),
    }[kind]
    options: dict[str, Any] = {"max_iter": 5, "random_state": 3}
    model = protoclip.KMeans(60, **options).fit(X, sample_weight=WEIGHTS.numpy())
    expected = protoclip.KMeans(60, **options).fit(SCREENED.numpy(), sample_weight=WEIGHTS.numpy())
    assert (model.cluster_centers_ == expected.cluster_centers_).all()
    assert (model.labels_ == expected.labels_).all() and isinstance(model.labels_, np.ndarray)
    assert (model.predict(X) == expected.predict(SCREENED.numpy())).all()
    assert model.score(X) == pytest.approx(expected.score(SCREENED.numpy()), rel=1e-12)
    with pytest.raises(ValueError, match="X has 40 features, but KMeans is expecting 3 features"):
        protoclip.KMeans(3).fit(SCREENED[:, :3]).predict(X)


def test_the_number_of_clusters_is_chosen_by_a_sample(tmp_path: Path) -> None:
    groups = torch.arange(3).repeat_interleave(400)[:, None] * 10.0
    points = (groups + torch.randn(1200, 2, generator=torch.Generator().manual_seed(0))).numpy()
    in_memory = protoclip.choose_num_clusters(points, max_clusters=9, max_points=120)
    rows = CountedRows(points)
    assert protoclip.choose_num_clusters(rows, max_clusters=9, max_points=120) == in_memory
    assert rows.num_read == 120 and in_memory[0] == 3
    points[5] = np.nan  # not in the sample
    assert protoclip.choose_num_clusters(points, max_clusters=9, max_points=120) == in_memory


# ---- errors, progress, Ctrl-C ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    array = SCREENED.numpy().copy()
    array[[1700, 2900], 3] = value
    with pytest.raises(ValueError, match="got 2 rows with NaN or inf; the first is row 1700"):
        protoclip.kmeans(stored(array, tmp_path), 60)


def test_numbers_are_checked_before_a_row_is_read() -> None:
    rows = CountedRows(SCREENED.numpy())
    for options in ({"num_iters": -1}, {"init": "best"}, {"init": SCREENED[:2, :5]}, {"tol": -1}):
        with pytest.raises(ValueError, match="kmeans: expected"):
            protoclip.kmeans(rows, 60, **options)
    with pytest.raises(ValueError, match="num_clusters <= N = 3000"):
        protoclip.kmeans(rows, 3001)
    assert rows.num_read == 0


@pytest.mark.parametrize("damage", ["removed", "written again", "cut off"])
def test_a_file_that_changes_in_a_run_is_one_sentence(damage: str, path: Path) -> None:
    def harm(done: int, total: int) -> None:
        if damage == "removed":
            path.unlink(missing_ok=True)
        elif damage == "written again":
            np.save(path, SCREENED.numpy() + 1)
            os.utime(path, (1, 1))
        else:
            os.truncate(path, 1000)

    sentence = "restore the file" if damage == "removed" else "the file has changed since"
    with pytest.raises(ValueError, match=f"rows.npy: .*{sentence}.*start again"):
        protoclip.kmeans(path, 60, on_rows=harm)


def test_a_missing_path_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.npy"):
        protoclip.kmeans(tmp_path / "nothing.npy", 2)


def test_ctrl_c_ends_a_run(path: Path) -> None:
    """And leaves no thread that reads."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protoclip.kmeans(path, 60, on_rows=interrupt)
    assert not any(thread.name.startswith("protoclip-rows") for thread in threading.enumerate())


def test_progress_is_told_of_rows_and_iterations(path: Path) -> None:
    passes: list[list[int]] = []

    def on_rows(done: int, total: int) -> None:
        assert total == 3000
        if not passes or passes[-1][-1] == total:
            passes.append([])
        passes[-1].append(done)

    inertias: list[float] = []
    clusters = protoclip.kmeans(
        path, 60, num_iters=3, init=SCREENED[:60], on_rows=on_rows,
        progress=lambda iteration, inertia: inertias.append(float(inertia)),
    )  # fmt: skip
    assert tuple(inertias) == clusters.history[:-1]
    assert passes == [[*range(256, 3000, 256), 3000]] * 4


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_run_continues_from_the_centroids_that_it_told(kind: str, path: Path) -> None:
    points: Any = path if kind == "disk" else SCREENED
    told: list[Tensor] = []
    whole = protoclip.kmeans(
        points, 60, num_iters=6, on_centroids=lambda _, centroids: told.append(centroids.clone())
    )
    assert len(told) == 6
    continued = protoclip.kmeans(points, 60, num_iters=3, init=told[2])
    assert torch.equal(continued.centroids, whole.centroids)
    assert continued.history == whole.history[3:]
