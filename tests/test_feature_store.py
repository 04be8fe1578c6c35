"""The store of features: the newest row of every sample, on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from ranks import full_disk, on_ranks

from protoclip import distributed
from protoclip.config import EpisodeConfig
from protoclip.feature_store import FeatureStore, choose_features, wants_to_reuse

CPU = torch.device("cpu")
SAMPLES, STEPS, BATCH, DIM = 23, 3, 8, 4
DRAWS = torch.tensor([  # [STEPS, BATCH] positions; -1: the step was skipped
    [5, 2, 7, 22, 0, 9, 11, 2],  # 2 is drawn twice
    [7, 1, 5, 3, 8, 20, 21, 4],
    [-1, -1, -1, -1, -1, -1, -1, -1],
])  # fmt: skip


def projections(step):
    """Rows that differ in every step, and small integers, which bf16 does not round."""
    places = torch.arange(BATCH, dtype=torch.float32)
    rows = torch.stack([places, places + step, places * step, torch.full_like(places, step)], dim=1)
    return rows, -rows


def filled_store():
    """This rank's store after an episode of DRAWS, not yet ended."""
    store = FeatureStore(SAMPLES, STEPS, BATCH, CPU)
    own = distributed.own_slice(BATCH)
    for step, index in enumerate(DRAWS):
        image_h, text_h = projections(step)
        store.put(step, index[own], image_h[own], text_h[own])
    return store


def test_the_newest_row_of_a_sample_counts():
    store = filled_store()
    assert len(store.of_episode(4).index) == 0  # nothing moves before the episode's end
    store.end_episode(4)
    features = store.of_episode(4)
    drawn = {}
    for step, index in enumerate(DRAWS.tolist()):
        drawn |= {sample: (step, row) for row, sample in enumerate(index) if sample >= 0}
    assert features.index.tolist() == sorted(drawn)
    for sample, image_h, text_h in zip(
        features.index, features.image_h, features.text_h, strict=True
    ):
        step, row = drawn[int(sample)]
        assert torch.equal(image_h, projections(step)[0][row].float())
        assert torch.equal(text_h, -image_h)


def test_a_skipped_step_leaves_older_rows_alone():
    store = filled_store()
    store.end_episode(0)
    before = store.of_positions(torch.tensor([1, 2, 7]))
    image_h, text_h = projections(5)
    store.put(0, torch.full((BATCH,), -1), image_h, text_h)
    store.put(1, torch.tensor([7, -1, 10, -1, -1, -1, -1, -1]), image_h, text_h)
    store.end_episode(1)
    after = store.of_positions(torch.tensor([1, 2, 7]))
    assert torch.equal(after.image_h[:2], before.image_h[:2])
    assert torch.equal(after.image_h[2], image_h[0].float())
    assert store.of_episode(1).index.tolist() == [7, 10]
    assert set(store.of_episode(0).index.tolist()) == set(DRAWS.flatten().tolist()) - {-1, 7}


def test_samples_without_a_row_are_not_given():
    store = filled_store()
    store.end_episode(0)
    asked = torch.arange(SAMPLES)
    assert store.of_positions(asked).index.tolist() == store.of_episode(0).index.tolist()
    assert len(store.of_positions(torch.tensor([6, 12])).index) == 0


def test_rows_are_rounded_to_bf16_once():
    torch.manual_seed(0)
    store, rows = FeatureStore(4, 1, 4, CPU), F.normalize(torch.randn(4, 6), dim=1)
    store.put(0, torch.arange(4), rows, rows)
    store.end_episode(0)
    assert torch.equal(store.of_episode(0).image_h, rows.bfloat16().float())


def state_of_ranks(folder, loaded=None):
    """A rank's table and state within the second episode; ``loaded``: from a state of that name."""
    distributed.start(distributed.find_rank(), CPU, 60)
    if loaded is None:
        store = filled_store()
        store.end_episode(0)
        own = distributed.own_slice(BATCH)
        image_h, text_h = projections(7)
        store.put(0, torch.arange(BATCH)[own], image_h[own], text_h[own])
    else:
        store = FeatureStore(SAMPLES, STEPS, BATCH, CPU)
        is_main = distributed.is_main()
        store.load_state_dict(torch.load(f"{folder}/{loaded}.pt") if is_main else {})
    state = store.state_dict(folder)
    if distributed.is_main():
        torch.save(state, f"{folder}/of-{distributed.world_size()}.pt")
    store.end_episode(1)
    newest, older = store.of_episode(1), store.of_episode(0)
    distributed.stop()
    return [x.numpy().copy() for x in (newest.index, newest.image_h, older.index, older.text_h)]


def assert_same_rows(ranks, alone):
    for number, want in enumerate(alone):
        rows = torch.cat([torch.from_numpy(parts[number]) for parts in ranks])
        assert torch.equal(rows, torch.from_numpy(want))


def test_any_number_of_ranks_stores_and_saves_the_same(tmp_path):
    """23 samples on 2 and 4 ranks: the last rank owns fewer positions than the others."""
    (alone,) = on_ranks(1, state_of_ranks, tmp_path)
    saved = torch.load(tmp_path / "of-1.pt")
    for ranks in (2, 4):
        assert_same_rows(on_ranks(ranks, state_of_ranks, tmp_path), alone)
        other = torch.load(tmp_path / f"of-{ranks}.pt")
        assert other.keys() == saved.keys()
        assert all(torch.equal(other[name], saved[name]) for name in saved)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_a_state_is_loaded_on_another_number_of_ranks(tmp_path, before, after):
    (alone,) = on_ranks(1, state_of_ranks, tmp_path)
    on_ranks(before, state_of_ranks, tmp_path)
    assert_same_rows(on_ranks(after, state_of_ranks, tmp_path, f"of-{before}"), alone)


def test_a_state_of_other_data_is_refused(tmp_path):
    state = filled_store().state_dict(tmp_path)
    other = FeatureStore(SAMPLES + 1, STEPS, BATCH, CPU)
    with pytest.raises(ValueError, match=r"stored features table \[24, 2, 4\], got \[23, 2, 4\]"):
        other.load_state_dict(state)


def save_without_room(folder):
    distributed.start(distributed.find_rank(), CPU, 60)
    store = filled_store()
    store.end_episode(0)
    raised = ""
    if distributed.is_main():
        with full_disk(64):
            try:
                store.state_dict(folder)
            except OSError as error:
                raised = type(error).__name__
    return raised


def test_a_full_disk_is_an_error_and_no_dead_process(tmp_path):
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
def test_auto_stores_features_where_samples_are_seen_again(features, warmup, passes, reuses):
    config = EpisodeConfig(features=features, infonce_warmup=warmup)
    assert wants_to_reuse(config, passes) == reuses
    source = choose_features(config, passes, 2**20, CPU)
    assert source.reuses == reuses
    assert source.reason.startswith("stored from training, 1.0 MiB" if reuses else "extracted")


def test_a_table_that_does_not_fit_is_not_stored():
    config = EpisodeConfig()
    source = choose_features(config, 9.0, 2**60, CPU)
    assert not source.reuses and "more than is free" in source.reason
    forced = choose_features(EpisodeConfig(features="reuse"), 9.0, 2**60, CPU)
    assert forced.reuses and forced.table_device == CPU
