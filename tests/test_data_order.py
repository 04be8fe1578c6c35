"""Epochs shard by shard, weighted and resampled: what is seen how often, and in which order."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protoclip.config import DataConfig
from protoclip.data.loader import EpochOrder


def dataset(shards=20, per_shard=10, first_source=15, remote=False):
    """Like shards of two sources: an object with the columns that matter."""
    shard_of = np.repeat(np.arange(shards, dtype=np.int32), per_shard)

    class Rows(SimpleNamespace):
        def __len__(self):
            return len(shard_of)

    return Rows(shard_of=shard_of, source_of=(shard_of >= first_source) * 1, remote=remote)


def epoch(order, seed=0):
    return order.permutation(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("buffer", [0, 1, 25, 10_000])
def test_an_exact_epoch_has_every_sample_once(buffer):
    order = EpochOrder(dataset(), DataConfig(shuffle_buffer=buffer))
    first, other = epoch(order), epoch(order, seed=1)
    assert order.size == 200 and torch.equal(first.sort().values, torch.arange(200))
    assert torch.equal(first, epoch(order)) and not torch.equal(first, other)


def test_a_small_buffer_goes_shard_by_shard():
    positions = epoch(EpochOrder(dataset(), DataConfig(shuffle_buffer=5)))
    changes = (positions // 10).diff().ne(0).sum()
    assert 19 <= changes < 100  # mixed at the borders only; of a full mix about 190
    assert not torch.equal(positions.view(20, 10)[0].sort().values, positions.view(20, 10)[0])
    streams = EpochOrder(dataset(remote=True), DataConfig())
    assert streams.window == 10_000 and EpochOrder(dataset(), DataConfig()).window == 0


@pytest.mark.parametrize("buffer", [0, 25])
def test_weights_say_how_often_a_source_is_seen(buffer):
    config = DataConfig(train_data_upsampling_factors="0.5::2.5", shuffle_buffer=buffer)
    order = EpochOrder(dataset(), config)
    assert order.size == 75 + 125
    counts = torch.bincount(epoch(order), minlength=200)
    assert counts[:150].max() == 1 and counts[:150].sum() == 75
    assert set(counts[150:].tolist()) == {2, 3}


def test_resampling_takes_whole_shards_by_their_chance():
    config = DataConfig(
        dataset_resampled=True, train_data_upsampling_factors="1::9", shuffle_buffer=1
    )
    order = EpochOrder(dataset(), config)
    drawn = torch.cat([epoch(order, seed) for seed in range(20)])
    assert len(drawn) == 4000
    share = (drawn >= 150).float().mean()  # 5 x 9 of 15 + 5 x 9 shards: 0.75
    assert 0.65 < share < 0.85
    assert len(epoch(order).unique()) < 200


@pytest.mark.parametrize("text", ["1", "1::2::3", "1::x", "1::-1", "0::0", "1::inf"])
def test_weights_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="upsampling-factors: "):
        EpochOrder(dataset(), DataConfig(train_data_upsampling_factors=text))
