"""Transforms, orders and batches: same seed, same bits, whatever the workers, ranks and starts."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import multiprocessing
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pairs import MEAN, STD, assert_equal, load, tokenize
from PIL import Image
from ranks import config_of
from torch import Tensor
from torchvision import transforms

from protoclip.common import host
from protoclip.data import (
    DataError,
    Draws,
    EpochOrder,
    Facts,
    PairDataset,
    build_transform,
    open_dataset,
)
from protoclip.data.loader import Loader
from protoclip.settings.config import DataConfig, from_dict


@pytest.fixture(scope="module")
def icons() -> Any:
    return open_dataset("builtin:icons", "train")


@pytest.fixture(scope="module")
def draws() -> Tensor:
    return torch.randperm(1700, generator=torch.Generator().manual_seed(0))[:37]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_and_starts_do_not_change_the_batches(
    icons: Any, draws: Tensor, workers: int
) -> None:
    whole = load(icons, draws)
    assert_equal(load(icons, draws, start=16, workers=workers), whole[2:])
    assert_equal(load(icons, draws, workers=workers), whole)


def test_the_same_picture_twice_gives_two_views_and_all_captions(icons: Any) -> None:
    many = torch.zeros(400, dtype=torch.int64)
    (batch,) = load(icons, many, batch_size=400)
    assert len({view.numpy().tobytes() for view in batch.image}) > 390
    captions = {tuple(row) for row in batch.tokens.tolist()}
    assert captions == {tuple(row) for row in tokenize(list(icons.captions(0))).tolist()}


def test_the_first_caption_may_be_asked_for(icons: Any) -> None:
    same_pair = torch.zeros(8, dtype=torch.int64)
    (batch,) = load(icons, same_pair, captions="first")
    assert torch.equal(batch.tokens, tokenize([icons.captions(0)[0]] * 8))


def gradient_picture(width: int = 90, height: int = 60) -> Image.Image:
    red = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(red[None, :, None], (height, width, 3)).copy())


def test_no_augmentation_is_what_torchvision_does() -> None:
    transform = build_transform(24, MEAN, STD, "none")
    picture = gradient_picture()
    cubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(24, cubic), transforms.CenterCrop(24), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])(picture)
    torch.testing.assert_close(transform(picture), expected, atol=1e-6, rtol=1e-6)


def test_a_batch_has_the_values_of_its_pictures_channels_last_in_memory() -> None:
    transform = build_transform(24, MEAN, STD, "clip")
    picture = gradient_picture()
    torch.manual_seed(0)
    pixels = [transform.pixels(picture) for _ in range(3)]
    batch = transform.batch(pixels)
    torch.manual_seed(0)
    assert torch.equal(batch, torch.stack([transform(picture) for _ in range(3)]))
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    assert torch.equal(batch, torch.stack([normalise(row) for row in pixels]))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_augmentations_differ_in_strength() -> None:
    picture = gradient_picture(60, 60)
    spread = {}
    for name in ("paper", "clip", "none"):
        transform = build_transform(24, MEAN, STD, name)
        torch.manual_seed(0)
        spread[name] = torch.stack([transform(picture) for _ in range(60)]).std(0).mean().item()
    assert spread["none"] == 0 < spread["clip"] < 0.5 * spread["paper"]


def test_worker_processes_can_be_spawned() -> None:
    """Everything a worker needs survives pickling: macOS, and Python 3.14's default."""
    from protoclip.data.loader import _Request, _SharedDraws, _Source

    dataset = open_dataset("builtin:icons", "heldout")
    transform = build_transform(32, MEAN, STD, "paper")
    draws = Draws(torch.arange(8), 0, numbers=torch.arange(8))
    source = _Source(dataset, 4, transform, tokenize, "random", False)
    assert draws.numbers is not None
    pickled = pickle.dumps(_SharedDraws(source, draws.positions, draws.numbers))
    assert len(pickled) < dataset.dataset.pictures.nbytes / 20  # the table, not the pictures
    request = _Request(first=4, total=8, seed=0)
    assert_equal([pickle.loads(pickled)[request]], [source.load(draws, 4)])


def loader_of(dataset: Any, **options: Any) -> Loader:
    transform = build_transform(32, MEAN, STD, "paper")
    return Loader(dataset, 8, transform, tokenize, **options)


def test_workers_live_from_order_to_order(icons: Any, draws: Tensor) -> None:
    """The same processes, whatever the length of the next order; a longer one than the first needs
    new ones, as does one that was broken off."""
    orders = [draws, draws[5:], draws[:20], torch.cat([draws, draws])]
    expected = [load(icons, positions, seed=seed) for seed, positions in enumerate(orders)]
    with contextlib.closing(loader_of(icons, workers=2)) as loader:

        def pids(number: int, batch_count: int = 99) -> set[int | None]:
            stream = loader.batches(Draws(orders[number], seed=number))
            got = list(itertools.islice(stream, min(batch_count, len(expected[number]))))
            assert_equal(got, expected[number][:batch_count])
            return {process.pid for process in multiprocessing.active_children()}

        first = pids(0)
        assert len(first) == 2 and pids(1) == pids(2) == first
        longer = pids(3)
        assert not longer & first
        pids(3, batch_count=2)
        assert not pids(0) & longer
    assert not any(Path(f"/proc/{pid}").exists() for pid in first | longer)


def test_a_start_near_the_end_leaves_the_next_order_all_workers(icons: Any, draws: Tensor) -> None:
    with contextlib.closing(loader_of(icons, workers=2)) as loader:
        assert len(list(loader.batches(Draws(draws, seed=0, start=32)))) == 1
        assert loader._pool is not None and len(loader._pool.processes) == 2


def test_any_thread_may_load(icons: Any, draws: Tensor) -> None:
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load, icons, draws[:8], workers=1).result()
    assert_equal(loaded, load(icons, draws[:8]))


KILLED = (
    r"a data worker was killed near the samples .*; if memory was short, use fewer --workers, and "
    "continue a training run with --resume auto$"
)


def test_a_worker_that_dies_between_two_orders_ends_the_run(icons: Any, draws: Tensor) -> None:
    with contextlib.closing(loader_of(icons, workers=1)) as loader:
        assert_equal(list(loader.batches(Draws(draws, seed=5))), load(icons, draws))
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(DataError, match=KILLED):
            list(loader.batches(Draws(draws, seed=5)))
        assert_equal(list(loader.batches(Draws(draws, seed=5))), load(icons, draws))


def test_a_cpu_reads_in_the_training_process_and_a_card_has_its_share_of_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(host, "usable_cores", lambda: 24)
    cpu = torch.device("cpu")
    card = torch.device("cuda")
    automatic = config_of().data.workers
    assert host.choose_workers(automatic, cpu, ranks=2) == 0
    assert host.choose_workers(automatic, card, ranks=1) == 8
    assert host.choose_workers(automatic, card, ranks=32) == 6
    assert host.choose_workers(3, cpu, ranks=1) == host.choose_workers(3, card, ranks=1) == 3
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    assert host.choose_workers(automatic, card, ranks=4) == 1


def test_workers_are_a_number_or_a_word(tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    words.write_text('{"workers": "auto", "data": {"prefetch_factor": 4}}')
    automatic = config_of().data.workers
    assert config_of("--workers", "auto").data.workers == automatic
    assert config_of("--preset", str(words)).data.workers == automatic
    assert config_of("--preset", str(words), "--workers", "5").data.workers == 5
    with pytest.raises(SystemExit):
        config_of("--workers", "many")
    with pytest.raises(ValueError, match="expected int for workers, got 'many'"):
        from_dict(DataConfig, {"workers": "many"})


class KilledWithTheLock(PairDataset):
    """Pairs of icons; the first worker that reads one is killed while it asks whether it should
    end, so it holds the lock of that question."""

    def __init__(self, pairs: Any, flag: Path) -> None:
        self.pairs = pairs
        self.flag = flag
        self.name = "killed"
        self.keys = pairs.keys

    def __len__(self) -> int:
        return len(self.pairs)

    def captions(self, i: int) -> Any:
        return self.pairs.captions(i)

    def image(self, i: int) -> Any:
        if not self.flag.exists():
            self.flag.touch()
            frame: Any = inspect.currentframe()
            while "done_event" not in frame.f_locals:
                frame = frame.f_back
            if lock := getattr(frame.f_locals["done_event"], "_cond", None):
                lock.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.pairs.image(i)


def test_a_worker_killed_with_a_lock_ends_the_run(
    icons: Any, draws: Tensor, tmp_path: Path
) -> None:
    hung = []

    def give_up(*_: Any) -> None:
        hung.append(True)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        with pytest.raises(DataError, match=KILLED):
            load(KilledWithTheLock(icons, tmp_path / "flag"), draws, workers=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not hung and not multiprocessing.active_children()


def dataset(shards: int = 20, per_shard: int = 10, remote: bool = False) -> Any:
    """Like shards: an object with the facts that matter."""
    shard_of = np.repeat(np.arange(shards, dtype=np.int32), per_shard)

    class Rows(SimpleNamespace):
        def __len__(self) -> int:
            return len(shard_of)

    return Rows(facts=Facts(shard_of=shard_of, remote=remote))


def epoch(order: EpochOrder, seed: int = 0) -> Tensor:
    return order.permutation(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("buffer", [0, 1, 25, 10_000])
def test_an_exact_epoch_has_every_sample_once(buffer: int) -> None:
    order = EpochOrder(dataset(), buffer)
    positions = epoch(order)
    assert torch.equal(positions.sort().values, torch.arange(200))
    assert torch.equal(positions, epoch(order))
    assert not torch.equal(positions, epoch(order, seed=1))


def test_a_small_buffer_goes_shard_by_shard() -> None:
    positions = epoch(EpochOrder(dataset(), 5))
    changes = (positions // 10).diff().ne(0).sum()
    assert 19 <= changes < 100  # mixed at the borders only; of a full mix about 190
    assert not torch.equal(positions.view(20, 10)[0].sort().values, positions.view(20, 10)[0])


@pytest.mark.parametrize("remote, window", [(True, 10_000), (False, 0)])
def test_only_remote_shards_are_read_in_windows(remote: bool, window: int) -> None:
    assert EpochOrder(dataset(remote=remote)).window == window
