"""The order of an epoch and its batches; all random choices follow from the seed and the draw."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.files import DataError
from protoclip.common.seeds import mix
from protoclip.common.signals import become_worker
from protoclip.data.faults import Faults
from protoclip.data.feature_pairs import FeaturePairs, feature_pairs, origin
from protoclip.data.images import Transform
from protoclip.data.types import Batch, PairDataset

STREAM_BUFFER = 10_000  # samples; the default window of remote shards (--shuffle-buffer)
AHEAD = 16  # batches whose shards are fetched in advance
ATTEMPTS = 50  # bad samples tolerated beyond the batch size
PATIENCE = 2.0  # seconds to wait for the death of a worker that has stopped answering
Tokenizer = Callable[[list[str]], Tensor]


class EpochOrder:
    """The order in which an epoch visits the data: fully mixed, or shard by shard.

    Args:
        dataset: N pairs.
        shuffle_buffer: samples in the window that is shuffled; 0: all; -1: all, or
            ``STREAM_BUFFER`` if shards come from URLs, or the data set's own ``window``.
    """

    def __init__(self, dataset: PairDataset, shuffle_buffer: int = -1) -> None:
        self.size = len(dataset)
        facts = dataset.facts
        shard = np.zeros(self.size) if facts.shard_of is None else facts.shard_of
        # Runs of neighbours in the same shard; without shards the data set is one run.
        edges = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), self.size]
        self.runs = list(itertools.pairwise(edges))
        if shuffle_buffer >= 0:
            self.window = shuffle_buffer
        elif facts.window is not None:
            self.window = facts.window
        else:
            self.window = STREAM_BUFFER if facts.remote else 0

    def permutation(self, random: torch.Generator) -> Tensor:
        """Positions of one epoch, int64 [N]."""
        if not self.window:
            return torch.randperm(self.size, generator=random)
        order = torch.randperm(len(self.runs), generator=random).tolist()
        runs = [self.runs[number] for number in order]
        positions = torch.cat([torch.arange(start, stop) for start, stop in runs])
        # No sample moves by more than the window, as with a shuffle buffer.
        moved = torch.rand(self.size, generator=random, dtype=torch.float64) * self.window
        return positions[(torch.arange(self.size) + moved).argsort(stable=True)]


@dataclass(frozen=True)
class Mixup:
    """FuseMix (arXiv 2312.10144): each pair is mixed with the next one of its step, by one share of
    a Beta distribution for the step and both modalities. The larger share is the pair's own, so
    that its position and label still say what it is."""

    alpha: float  # of the Beta distribution, > 0
    positions: Tensor  # of the draws of all ranks, int64 [steps * global_batch_size]
    global_batch_size: int

    def next_in_step(self, number: int) -> int:
        """The number of the draw after draw ``number``; after a step's last its first."""
        first = number - number % self.global_batch_size
        return first + (number + 1) % self.global_batch_size

    def share(self, seed: int, number: int) -> float:
        """The share of the other pair in the step of draw ``number``, at most 0.5."""
        random = np.random.default_rng([seed, number - number % self.global_batch_size])
        share = random.beta(self.alpha, self.alpha)
        return min(share, 1 - share)


@dataclass(frozen=True)
class Draws:
    """The order of the pairs, and the seed of their random choices."""

    positions: Tensor  # in the data set, int64 [M], repeats allowed
    seed: int  # for captions, augmentation and mixup; differs by episode
    start: int = 0  # first draw; batches are cut from here on
    # Number of each draw among the draws of all ranks, int64 [M]; None: 0 ... M - 1.
    numbers: Tensor | None = None
    mixup: Mixup | None = None  # of stored features, whose batches are consecutive draws of a step

    def numbers_of(self, draws: range) -> np.ndarray:
        """Their numbers among the draws of all ranks, int64 [B]."""
        if self.numbers is None:
            return np.arange(draws.start, draws.stop)
        return self.numbers[draws.start : draws.stop].numpy()


def batches(
    dataset: PairDataset,
    draws: Draws,
    batch_size: int,
    transform: Transform | Callable[[Image.Image], Tensor] | None,
    tokenizer: Tokenizer | None,
    *,
    workers: int = 0,
    captions: str = "random",
    faults: Faults | None = None,
) -> Iterator[Batch]:
    """Load pairs in one order; its worker processes end with it. Arguments as in ``Loader``."""
    loader = Loader(
        dataset, batch_size, transform, tokenizer, workers=workers, captions=captions, faults=faults
    )
    with contextlib.closing(loader):
        yield from loader.batches(draws)


class Loader:
    """Loads pairs in one order after another, by worker processes that live until ``close``.

    Caption and augmentation of draw j depend only on (seed, j), so the batches are the same for
    any number of workers and any start. The caller's global random state does not change.

    Args:
        transform: picture -> [3, H, W]; its randomness must come from torch's default generator.
        tokenizer: list of B captions -> int64 [B, L]. Stored features need neither of the two.
        workers: number of extra processes; 0 loads in this one. Stored features are read by a
            thread instead, one batch ahead.
        prefetch_factor: batches that each worker loads ahead.
        captions: "random" | "first" (the canonical one) | "canonical": the first in half of the
            draws, any in the others.
        faults: notes unreadable pairs; each is replaced by another of the draws, chosen by
            (seed, j). None: an unreadable pair raises a DataError that names it.
        pin_memory: whether batches of workers come in pinned memory; needs a GPU.
    """

    def __init__(
        self,
        dataset: PairDataset,
        batch_size: int,
        transform: Transform | Callable[[Image.Image], Tensor] | None,
        tokenizer: Tokenizer | None,
        *,
        workers: int = 0,
        prefetch_factor: int = 2,
        captions: str = "random",
        faults: Faults | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._source: _Source | _RowSource
        if feature_pairs(dataset):
            self._source = _RowSource(dataset, batch_size, captions)
        else:
            assert transform is not None and tokenizer is not None
            replace_bad = faults is not None
            self._source = _Source(dataset, batch_size, transform, tokenizer, captions, replace_bad)
        self._workers = workers
        self._prefetch_factor = prefetch_factor
        self._faults = faults
        self._pin_memory = pin_memory
        self._pool: _Pool | None = None

    def batches(self, draws: Draws) -> Iterator[Batch]:
        """Load the pairs of ``draws``; the batches of an earlier call are no longer valid."""
        firsts = range(draws.start, len(draws.positions), self._source.batch_size)
        if isinstance(self._source, _RowSource):
            loaded = _ahead(partial(self._source.load, draws), firsts)
        elif self._workers:
            loaded = self._in_workers(draws, firsts)
        else:
            loaded = (self._source.load(draws, first) for first in firsts)
        return loaded if self._faults is None else map(self._faults.noted, loaded)

    def close(self) -> None:
        """End the worker processes; they start again when they are needed."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _in_workers(self, draws: Draws, firsts: range) -> Iterator[Batch]:
        """Yield batches in order; a worker that is killed ends them with a DataError."""
        pool = self._pool_for(draws)
        done = 0
        try:
            for batch in pool.load(draws, firsts):
                if isinstance(batch, DataError):
                    raise batch
                done += 1
                pool.is_idle = done == len(firsts)
                yield batch
        except (RuntimeError, OSError, EOFError) as error:
            # Other than torch's own messages: the connection that carries a tensor is gone.
            dead = wait([process.sentinel for process in pool.processes], timeout=PATIENCE)
            if "DataLoader worker" not in str(error) and not dead:
                raise
            dataset = self._source.dataset
            index = draws.positions[firsts[done] :][: self._source.batch_size].tolist()
            keys = ", ".join(dataset.keys[i] for i in index[:8])
            raise DataError(
                f"{dataset.name}: a data worker was killed near the samples {keys}, ...; if memory "
                "was short, use fewer --workers, and continue a training run with --resume auto"
            ) from error
        finally:
            if not pool.is_idle:
                self.close()

    def _pool_for(self, draws: Draws) -> _Pool:
        """The idle workers of the order before, or new ones if it was shorter or broken off."""
        pool = self._pool
        if pool is not None and pool.is_idle and len(draws.positions) <= len(pool.positions):
            return pool
        self.close()
        assert isinstance(self._source, _Source)
        # Of the whole order: one that begins near its end, as after a resume, is not the last.
        batch_count = math.ceil(len(draws.positions) / self._source.batch_size)
        self._pool = _Pool(
            self._source,
            capacity=len(draws.positions),
            workers=min(self._workers, batch_count),
            prefetch_factor=self._prefetch_factor,
            pin_memory=self._pin_memory,
        )
        return self._pool


@dataclass(frozen=True)
class _Source:
    """Makes the batch that begins at a given draw; picklable for workers."""

    dataset: PairDataset
    batch_size: int
    transform: Transform | Callable[[Image.Image], Tensor]
    tokenizer: Tokenizer
    captions: str
    replace_bad: bool

    def load(self, draws: Draws, first: int) -> Batch:
        positions = draws.positions.numpy()
        index = positions[first : first + self.batch_size].copy()
        self.dataset.prefetch(positions[first : first + AHEAD * self.batch_size])
        draw_seeds = mix(draws.seed, draws.numbers_of(range(first, first + len(index))))
        captions: list[Sequence[str]] = []
        images: list[Any] = []
        bad: list[tuple[int, str]] = []
        transform = self.transform
        # The larger part of a Transform takes the whole batch at once, below.
        transform_one = transform.pixels if isinstance(transform, Transform) else transform
        with torch.random.fork_rng(devices=[]):
            for row, draw_seed in enumerate(draw_seeds.tolist()):
                while len(images) == row:
                    try:
                        of_pair = self.dataset.captions(int(index[row]))
                        torch.default_generator.manual_seed(draw_seed)
                        images.append(transform_one(self.dataset.image(int(index[row]))))
                        captions.append(of_pair)
                    except DataError as error:
                        if not self.replace_bad or len(bad) == ATTEMPTS + self.batch_size:
                            raise
                        bad.append((int(index[row]), str(error)))
                        index[row] = self._another(positions, draw_seed, len(bad), index)
        counts = np.array(list(map(len, captions)))
        chosen = choose_captions(self.captions, counts, draw_seeds).tolist()
        texts = [of_pair[number] for of_pair, number in zip(captions, chosen, strict=True)]
        if isinstance(transform, Transform):
            stacked = transform.batch(images)
        else:
            stacked = torch.stack(images)
        return Batch(
            index=torch.from_numpy(index),
            image=stacked,
            tokens=self.tokenizer(texts),
            bad=tuple(bad),
        )

    def _another(
        self, positions: np.ndarray, draw_seed: int, attempt: int, batch: np.ndarray
    ) -> int:
        """One of the positions to replace a bad pair, preferably not in the batch already."""
        candidates = positions[
            (mix(draw_seed, attempt, np.arange(64)) % len(positions)).astype(int)
        ]
        return int(candidates[np.isin(candidates, batch).argmin()])


@dataclass(frozen=True)
class _RowSource:
    """Makes the batch of stored features that begins at a given draw, all of its rows at once."""

    dataset: PairDataset
    batch_size: int
    captions: str

    def load(self, draws: Draws, first: int) -> Batch:
        index = draws.positions[first : first + self.batch_size].clone()
        draw_numbers = draws.numbers_of(range(first, first + len(index)))
        if draws.mixup is None:
            return self._rows(index, draw_numbers, draws.seed)
        last = int(draw_numbers[-1])
        following = draws.mixup.next_in_step(last)
        batch = self._rows(
            torch.cat([index, draws.mixup.positions[following : following + 1]]),
            np.append(draw_numbers, following),
            draws.seed,
        )
        return _mixed(batch, draws.mixup.share(draws.seed, last))

    def _rows(self, index: Tensor, draw_numbers: np.ndarray, seed: int) -> Batch:
        """The rows of the pairs ``index``, int64 [B], of the draws with these numbers."""
        pairs, positions = origin(self.dataset, index.numpy())
        assert isinstance(pairs, FeaturePairs)
        counts = pairs.num_captions(positions)
        captions = choose_captions(self.captions, counts, mix(seed, draw_numbers))
        return Batch(
            index,
            pairs.image_rows(positions),
            pairs.text_rows(positions, captions),
            caption_ids=pairs.caption_ids(positions, captions),
        )


def choose_captions(which: str, counts: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
    """Choose a caption of each pair, which has so many: its number, int64 [B]."""
    seeds = mix(0, draw_seeds)
    chosen = (seeds % counts.astype(np.uint64)).astype(np.int64)
    if which == "first":
        chosen[:] = 0
    elif which == "canonical":
        chosen[(seeds >> np.uint64(40) & np.uint64(1)).astype(bool)] = 0
    return chosen


def _mixed(batch: Batch, share: float) -> Batch:
    """Each pair of a batch of [B + 1] but the last, mixed with the next one: [B]."""
    image = batch.image.float()
    text = batch.tokens.float()
    return Batch(
        batch.index[:-1],
        image[:-1].lerp(image[1:], share),
        text[:-1].lerp(text[1:], share),
        caption_ids=None if batch.caption_ids is None else batch.caption_ids[:-1],
    )


def _ahead(load: Callable[[int], Batch], firsts: range) -> Iterator[Batch]:
    """The batches that begin at ``firsts``; a thread loads each while the one before is used."""
    with ThreadPoolExecutor(1, "rows") as thread:
        loading = deque([thread.submit(load, first) for first in firsts[:1]])
        for first in firsts[1:]:
            loading.append(thread.submit(load, first))
            yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()


class _Request(NamedTuple):
    """A batch for a worker to load: its first draw, and of which draws."""

    first: int
    total: int  # number of all draws
    seed: int


@dataclass(frozen=True)
class _SharedDraws:
    """Makes the batches that a worker is asked for, from draws in memory that it shares."""

    source: _Source
    positions: Tensor  # int64 [capacity], as in ``Draws``
    numbers: Tensor

    def __getitem__(self, request: _Request) -> Batch | DataError:
        draws = Draws(
            positions=self.positions[: request.total],
            seed=request.seed,
            numbers=self.numbers[: request.total],
        )
        try:
            return self.source.load(draws, request.first)
        except DataError as error:
            return error  # raised in a worker, it would arrive wrapped in a traceback


class _Pool:
    """Worker processes that load the batches of one order after another.

    Attributes:
        is_idle: whether all batches that were asked for have come, so that the draws may change.
        processes: the workers.
    """

    def __init__(
        self,
        source: _Source,
        *,
        capacity: int,
        workers: int,
        prefetch_factor: int,
        pin_memory: bool,
    ) -> None:
        self.is_idle = True
        self.positions = torch.empty(capacity, dtype=torch.int64).share_memory_()
        self.numbers = torch.empty(capacity, dtype=torch.int64).share_memory_()
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self._requests: list[_Request] = []
        self._iterator: Any = iter(())
        self._loader: Any = torch.utils.data.DataLoader(
            _SharedDraws(source, self.positions, self.numbers),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=True,
            pin_memory=pin_memory,
            worker_init_fn=become_worker,
            multiprocessing_context=_context_without_locks(),
            generator=torch.Generator(),  # otherwise it uses the caller's
        )
        # Kill workers that are stuck, here or at exit: they ignore SIGTERM.
        self._cleanup = Finalize(None, _kill, (self.processes,), exitpriority=1)

    def load(self, draws: Draws, firsts: range) -> Iterator[Batch | DataError]:
        """Load the batches that begin at ``firsts``."""
        total = len(draws.positions)
        self.positions[:total] = draws.positions
        self.numbers[:total] = torch.arange(total) if draws.numbers is None else draws.numbers
        self._requests[:] = [_Request(first, total, draws.seed) for first in firsts]
        self.is_idle = False
        handler = signal.getsignal(signal.SIGCHLD)
        self._iterator = iter(self._loader)
        # When a worker dies, torch's handler raises at an arbitrary place in the program;
        # without it the iterator notices within seconds. Only the main thread sets handlers.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        self.processes[:] = self._iterator._workers
        return self._iterator

    def close(self) -> None:
        """End the workers."""
        self._loader = self._iterator = None  # stops the workers that still answer
        self._cleanup()


class _Flag:
    """What torch uses of an Event, without its lock: a worker that is killed while it holds the
    lock would leave the training process waiting for ever."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.bool).share_memory_()

    def set(self) -> None:
        self._value.fill_(True)

    def is_set(self) -> bool:
        return bool(self._value)


def _context_without_locks() -> Any:
    """Python's way to start processes, with ``_Flag`` for an Event."""
    context: Any = copy.copy(multiprocessing.get_context())
    context.Event = _Flag
    return context


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()
