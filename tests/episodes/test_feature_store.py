"""The store of features: the newest row of every sample, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import full_disk, in_group, on_ranks
from torch import Tensor

from protoclip import distributed
from protoclip.common.seeds import generator
from protoclip.episodes import feature_store
from protoclip.episodes.feature_store import FeatureStore, choose_features, wants_to_reuse
from protoclip.episodes.prototypes import EpisodeBuilder
from protoclip.settings.config import EpisodeConfig

CPU = torch.device("cpu")
SAMPLES = 23
STEPS = 3
BATCH = 8
DIM = 4
DRAWS = torch.tensor([  # [STEPS, BATCH] positions; -1: the step was skipped
    [5, 2, 7, 22, 0, 9, 11, 2],  # 2 is drawn twice
    [7, 1, 5, 3, 8, 20, 21, 4],
    [-1, -1, -1, -1, -1, -1, -1, -1],
])  # fmt: skip


class Projections(NamedTuple):
    image: Tensor  # [BATCH, DIM]
    text: Tensor  # [BATCH, DIM]


def projections(step: int) -> Projections:
    """Rows that differ in every step, and small integers, which bf16 does not round."""
    places = torch.arange(BATCH, dtype=torch.float32)
    rows = torch.stack([places, places + step, places * step, torch.full_like(places, step)], dim=1)
    return Projections(rows, -rows)


def put_step(store: FeatureStore, step: int, index: Tensor, rows: Projections) -> None:
    """This rank's share of a step's rows."""
    share = distributed.own_slice(BATCH)
    store.put(step, index[share], rows.image[share], rows.text[share])


def empty_store(samples: int = SAMPLES, steps: int = STEPS) -> FeatureStore:
    return FeatureStore(samples, steps, BATCH, CPU)


def filled_store() -> FeatureStore:
    """This rank's store after an episode of DRAWS, not yet ended."""
    store = empty_store()
    for step, index in enumerate(DRAWS):
        put_step(store, step, index, projections(step))
    return store


def assert_same_table(got: FeatureStore, expected: FeatureStore) -> None:
    assert torch.equal(got.table, expected.table)
    assert torch.equal(got.written, expected.written)


def test_nothing_is_stored_before_the_end_of_the_episode() -> None:
    assert len(filled_store().of_episode(4).index) == 0


@pytest.mark.smoke
def test_the_newest_row_of_a_sample_counts() -> None:
    store = filled_store()
    store.end_episode(4)
    features = store.of_episode(4)
    newest_row = {}
    for step, index in enumerate(DRAWS.tolist()):
        for row, sample in enumerate(index):
            if sample >= 0:
                newest_row[sample] = projections(step).image[row]
    assert features.index.tolist() == sorted(newest_row)
    for sample, image_h, text_h in zip(
        features.index.tolist(), features.image_h, features.text_h, strict=True
    ):
        assert torch.equal(image_h, newest_row[sample])
        assert torch.equal(text_h, -image_h)


def test_rows_that_move_in_parts_are_those_that_move_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step at a time; sample 7 is drawn in two of them, and the later draw wins."""
    at_once = filled_store()
    at_once.end_episode(4)
    in_parts = filled_store()
    monkeypatch.setattr(feature_store, "CHUNK", 1)
    in_parts.end_episode(4)
    assert_same_table(in_parts, at_once)
    assert torch.equal(in_parts.index, torch.full_like(in_parts.index, -1))


def test_a_skipped_step_leaves_older_rows_alone() -> None:
    store = filled_store()
    store.end_episode(0)
    before = store.of_positions(torch.tensor([1, 2, 7]))
    rows = projections(5)
    store.put(0, torch.full((BATCH,), -1), rows.image, rows.text)
    store.put(1, torch.tensor([7, -1, 10, -1, -1, -1, -1, -1]), rows.image, rows.text)
    store.end_episode(1)
    after = store.of_positions(torch.tensor([1, 2, 7]))
    assert torch.equal(after.image_h[:2], before.image_h[:2])
    assert torch.equal(after.image_h[2], rows.image[0])
    assert store.of_episode(1).index.tolist() == [7, 10]
    of_first_episode = set(DRAWS.flatten().tolist()) - {-1, 7}
    assert set(store.of_episode(0).index.tolist()) == of_first_episode


def test_samples_without_a_row_are_left_out() -> None:
    store = filled_store()
    store.end_episode(0)
    of_all = store.of_positions(torch.arange(SAMPLES))
    assert of_all.index.tolist() == store.of_episode(0).index.tolist()
    assert len(store.of_positions(torch.tensor([6, 12])).index) == 0


def test_rows_are_rounded_to_bf16_once() -> None:
    torch.manual_seed(0)
    store = FeatureStore(4, 1, 4, CPU)
    rows = F.normalize(torch.randn(4, 6), dim=1)
    store.put(0, torch.arange(4), rows, rows)
    store.end_episode(0)
    assert torch.equal(store.of_episode(0).image_h, rows.bfloat16().float())


def two_episodes(folder: Path, saved: str | None = None) -> list:
    """This rank's rows after two episodes, as arrays; within the second the state is saved, or
    loaded from the file of that name."""
    if saved is None:
        store = filled_store()
        store.end_episode(0)
        put_step(store, 0, torch.arange(BATCH), projections(7))
    else:
        store = empty_store()
        is_main = distributed.is_main()
        store.load_state_dict(torch.load(f"{folder}/{saved}.pt") if is_main else {})
    state = store.state_dict(folder)
    if saved is None and distributed.is_main():
        torch.save(state, f"{folder}/of-{distributed.world_size()}.pt")
    store.end_episode(1)
    second = store.of_episode(1)
    first = store.of_episode(0)
    rows = (second.index, second.image_h, first.index, first.text_h)
    return [tensor.numpy().copy() for tensor in rows]


class SmallEpisode(NamedTuple):
    """Labels of an episode, and whether a state of the store loads as it was."""

    labels: dict[str, list[int]]
    reloads: bool


def episode_of_few_samples(folder: Path, samples: int) -> SmallEpisode:
    """From a store of so few samples that some ranks own none."""
    store = empty_store(samples, steps=2)
    put_step(store, 0, torch.tensor([0, 1, 2, 3, -1, -1, -1, -1]), projections(1))
    put_step(store, 1, torch.tensor([-1, -1, -1, -1, 3, 2, 1, -1]), projections(2))
    store.end_episode(0)
    state = store.state_dict(folder)
    loaded = empty_store(samples, steps=2)
    loaded.load_state_dict(state if distributed.is_main() else {})
    reloads = torch.equal(loaded.table, store.table) and torch.equal(loaded.written, store.written)
    next_samples = torch.arange(min(samples, 5))
    teacher = torch.arange(3.0 * samples).view(samples, 3)
    builder = EpisodeBuilder(EpisodeConfig(num_clusters=2), teacher=teacher)
    features = store.of_positions(next_samples)
    episode = builder.build(next_samples, features, generator(1), store.of_episode(0))
    labels = {source: values.tolist() for source, values in episode.labels.items()}
    return SmallEpisode(labels, reloads)


class StoresOfRank(NamedTuple):
    rows: list  # of two episodes
    small_episodes: list[SmallEpisode]  # of 5 and of 13 samples


def of_rank(folder: Path) -> StoresOfRank:
    rows = two_episodes(folder)
    feature_store.CHUNK = 1  # one step at a time
    small_episodes = [episode_of_few_samples(folder, samples) for samples in (5, 13)]
    return StoresOfRank(rows, small_episodes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="module")
def stores(folder: Path) -> dict[int, list[StoresOfRank]]:
    """By the number of ranks."""
    return {ranks: in_group(ranks, of_rank, folder) for ranks in (1, 2, 4)}


def assert_same_rows(ranks: list[list], expected: list) -> None:
    """The ranks' rows one after the other."""
    for parts, rows in zip(zip(*ranks, strict=True), expected, strict=True):
        assert np.array_equal(np.concatenate(parts), rows)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_stores_and_saves_the_same(
    folder: Path, stores: dict[int, list[StoresOfRank]], ranks: int
) -> None:
    """23 samples on 2 and 4 ranks: the last rank owns fewer positions than the others."""
    assert_same_rows([rank.rows for rank in stores[ranks]], stores[1][0].rows)
    expected = torch.load(folder / "of-1.pt")
    state = torch.load(folder / f"of-{ranks}.pt")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_a_state_is_loaded_on_another_number_of_ranks(
    folder: Path, stores: dict[int, list[StoresOfRank]], before: int, after: int
) -> None:
    loaded = in_group(after, two_episodes, folder, f"of-{before}")
    assert_same_rows(loaded, stores[1][0].rows)


def test_ranks_without_rows_take_part(stores: dict[int, list[StoresOfRank]]) -> None:
    """5 samples on 4 ranks: the last owns no position; of 13 two ranks own none of the rows."""
    expected = stores[1][0].small_episodes
    for episode in expected:
        assert episode.reloads
        assert [label >= 0 for label in episode.labels["image"]] == [True] * 4 + [False]
    for ranks in (2, 4):
        assert all(rank.small_episodes == expected for rank in stores[ranks])


@pytest.fixture
def two_steps() -> FeatureStore:
    """A store after two of three steps."""
    store = empty_store()
    put_step(store, 0, DRAWS[0], projections(1))
    put_step(store, 1, DRAWS[1], projections(2))
    return store


def test_a_state_holds_the_buffer_as_far_as_it_is_filled(
    tmp_path: Path, two_steps: FeatureStore
) -> None:
    state = two_steps.state_dict(tmp_path)
    assert state["index"].tolist() == DRAWS[:2].tolist()
    rows = 2 * BATCH
    modalities = 2
    bytes_of_bf16 = 2
    num_bytes = state["buffer"].untyped_storage().nbytes()
    assert num_bytes == rows * modalities * DIM * bytes_of_bf16
    two_steps.end_episode(0)
    assert two_steps.state_dict(tmp_path)["buffer"].numel() == 0


def test_a_state_goes_on_within_the_episode(tmp_path: Path, two_steps: FeatureStore) -> None:
    loaded = empty_store()
    loaded.load_state_dict(two_steps.state_dict(tmp_path))
    for store in (two_steps, loaded):
        put_step(store, 2, DRAWS[0].flip(0), projections(3))
        store.end_episode(0)
    assert_same_table(loaded, two_steps)


def test_a_state_of_longer_episodes_is_refused(tmp_path: Path, two_steps: FeatureStore) -> None:
    state = two_steps.state_dict(tmp_path)
    with pytest.raises(ValueError, match=r"stored features index \[1, 8\], got \[2, 8\]"):
        empty_store(steps=1).load_state_dict(state)


def test_a_state_of_other_data_is_refused(tmp_path: Path) -> None:
    state = filled_store().state_dict(tmp_path)
    with pytest.raises(ValueError, match=r"stored features table \[24, 2, 4\], got \[23, 2, 4\]"):
        empty_store(SAMPLES + 1).load_state_dict(state)


def save_without_room(folder: Path) -> str:
    distributed.start(distributed.find_rank(), CPU, 60)
    store = filled_store()
    if distributed.is_main():
        with full_disk(64):
            try:
                store.state_dict(folder)
            except OSError as error:
                return type(error).__name__
    return ""


def test_a_full_disk_is_an_error_and_no_dead_process(tmp_path: Path) -> None:
    assert on_ranks(2, save_without_room, tmp_path)[0] == "OSError"


@pytest.mark.parametrize(
    ("features", "warmup", "passes", "reuses"),
    [
        ("auto", 1, 2.0, True),
        ("auto", 1, 1.9, False),
        ("auto", 0, 9.0, False),
        ("reuse", 1, 1.0, True),
        ("extract", 1, 9.0, False),
    ],
)
def test_auto_stores_features_where_samples_are_seen_again(
    features: str, warmup: int, passes: float, reuses: bool
) -> None:
    config = EpisodeConfig(features=features, infonce_warmup=warmup)
    assert wants_to_reuse(config, passes) == reuses
    source = choose_features(config, passes, 2**20, CPU)
    assert source.reuses == reuses
    if reuses:
        assert source.reason == "stored from training, 1.0 MiB"  # there are no other ranks
    else:
        assert source.reason.startswith("extracted")


def test_a_table_that_does_not_fit_is_stored_only_by_force() -> None:
    source = choose_features(EpisodeConfig(), 9.0, 2**60, CPU)
    assert not source.reuses and "more than is free" in source.reason
    forced = choose_features(EpisodeConfig(features="reuse"), 9.0, 2**60, CPU)
    assert forced.reuses and forced.table_device == CPU


def test_free_memory_is_what_machine_and_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(feature_store, "MEMINFO", meminfo)
    monkeypatch.setattr(feature_store, "CGROUP", tmp_path)
    assert feature_store.free_bytes(CPU) == float("inf")
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\n")
    assert feature_store.free_bytes(CPU) == 4000 * 1024
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 700\nfile 300\ninactive_file 200\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert feature_store.free_bytes(CPU) == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    assert feature_store.free_bytes(CPU) == 2200
