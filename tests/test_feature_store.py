"""The store of features: the newest row of every sample, on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from ranks import full_disk, on_ranks

from protoclip import distributed, feature_store
from protoclip.config import EpisodeConfig
from protoclip.feature_store import FeatureStore, choose_features, wants_to_reuse
from protoclip.prototypes import EpisodeBuilder
from protoclip.seeds import generator

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


def test_rows_that_move_in_parts_are_those_that_move_at_once(monkeypatch):
    """One step at a time; sample 7 is drawn in two of them, and the later draw wins."""
    at_once, in_parts = filled_store(), filled_store()
    at_once.end_episode(4)
    monkeypatch.setattr(feature_store, "CHUNK", 1)
    in_parts.end_episode(4)
    assert torch.equal(in_parts.table, at_once.table)
    assert torch.equal(in_parts.written, at_once.written)
    assert torch.equal(in_parts.index, torch.full_like(in_parts.index, -1))


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


def rows_without_owners_of_some(folder, samples):
    """Labels from a store of so few samples that some ranks own none, and whether it reloads."""
    distributed.start(distributed.find_rank(), CPU, 60)
    feature_store.CHUNK = 1  # one step at a time
    store, own = FeatureStore(samples, 2, BATCH, CPU), distributed.own_slice(BATCH)
    for step, index in enumerate(([0, 1, 2, 3, -1, -1, -1, -1], [-1, -1, -1, -1, 3, 2, 1, -1])):
        image_h, text_h = projections(step + 1)
        store.put(step, torch.tensor(index)[own], image_h[own], text_h[own])
    store.end_episode(0)
    state = store.state_dict(folder)
    other = FeatureStore(samples, 2, BATCH, CPU)
    other.load_state_dict(state if distributed.is_main() else {})
    same = torch.equal(other.table, store.table) and torch.equal(other.written, store.written)
    coming = torch.arange(min(samples, 5))
    teacher = torch.arange(3.0 * samples).view(samples, 3)
    builder = EpisodeBuilder(EpisodeConfig(num_clusters=2), teacher=teacher)
    random, recent = generator(1), store.of_episode(0)
    episode = builder.build(coming, store.of_positions(coming), random, recent)
    distributed.stop()
    return same, {source: labels.tolist() for source, labels in episode.labels.items()}


@pytest.mark.parametrize("samples", [5, 13])
def test_ranks_without_rows_take_part(tmp_path, samples):
    """5 samples on 4 ranks: the last owns no position; of 13 two ranks own none of the rows."""
    ((same, labels),) = on_ranks(1, rows_without_owners_of_some, tmp_path, samples)
    assert same and [label >= 0 for label in labels["image"]] == [True] * 4 + [False]
    for ranks in (2, 4):
        for found in on_ranks(ranks, rows_without_owners_of_some, tmp_path, samples):
            assert found == (True, labels)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1), (2, 4)])
def test_a_state_is_loaded_on_another_number_of_ranks(tmp_path, before, after):
    (alone,) = on_ranks(1, state_of_ranks, tmp_path)
    on_ranks(before, state_of_ranks, tmp_path)
    assert_same_rows(on_ranks(after, state_of_ranks, tmp_path, f"of-{before}"), alone)


def test_a_state_holds_the_buffer_as_far_as_it_is_filled(tmp_path):
    store = FeatureStore(SAMPLES, STEPS, BATCH, CPU)
    store.put(0, DRAWS[0], *projections(1))
    store.put(1, DRAWS[1], *projections(2))
    state = store.state_dict(tmp_path)
    assert state["index"].tolist() == DRAWS[:2].tolist()
    assert state["buffer"].untyped_storage().nbytes() == 2 * BATCH * 2 * DIM * 2
    again = FeatureStore(SAMPLES, STEPS, BATCH, CPU)
    again.load_state_dict(state)
    for one in (store, again):
        one.put(2, DRAWS[0].flip(0), *projections(3))
        one.end_episode(0)
    assert torch.equal(again.table, store.table) and torch.equal(again.written, store.written)
    assert store.state_dict(tmp_path)["buffer"].numel() == 0
    shorter = FeatureStore(SAMPLES, 1, BATCH, CPU)
    with pytest.raises(ValueError, match=r"stored features index \[1, 8\], got \[2, 8\]"):
        shorter.load_state_dict(state)


def test_a_state_of_other_data_is_refused(tmp_path):
    state = filled_store().state_dict(tmp_path)
    other = FeatureStore(SAMPLES + 1, STEPS, BATCH, CPU)
    with pytest.raises(ValueError, match=r"stored features table \[24, 2, 4\], got \[23, 2, 4\]"):
        other.load_state_dict(state)


def save_without_room(folder):
    distributed.start(distributed.find_rank(), CPU, 60)
    store = filled_store()
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
