"""The order of an epoch and its batches; all random choices follow from the seed and the draw."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.files import DataError
from protoclip.common.seeds import mix
from protoclip.data.images import Transform
from protoclip.data.types import Batch, PairDataset

STREAM_BUFFER = 10_000  # samples; the default window of remote shards (--shuffle-buffer)
AHEAD = 16  # batches whose shards are fetched in advance
ATTEMPTS = 50  # bad samples tolerated beyond the batch size
PATIENCE = 2.0  # seconds to wait for the death of a worker that has stopped answering
CRASHES = 3  # worker deaths at the same batch before the run ends
NAMED = 20  # bad samples reported one by one
Tokenizer = Callable[[list[str]], Tensor]
logger = logging.getLogger(__name__)


class EpochOrder:
    """The order in which an epoch visits the data: fully mixed, or shard by shard.

    Args:
        dataset: N pairs, with ``shard_of``, int [N], if it consists of shards.
        shuffle_buffer: samples in the window that is shuffled; 0: all; -1: all, or
            ``STREAM_BUFFER`` if shards come from URLs, or the data set's own ``window``.
    """

    def __init__(self, dataset: Any, shuffle_buffer: int = -1) -> None:
        self.size = len(dataset)
        shard = getattr(dataset, "shard_of", np.zeros(self.size))
        # Runs of neighbours in the same shard; without shards the data set is one run.
        edges = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), self.size]
        self.runs = list(itertools.pairwise(edges))
        own_window = STREAM_BUFFER if getattr(dataset, "remote", False) else 0
        own_window = getattr(dataset, "window", own_window)
        self.window = own_window if shuffle_buffer < 0 else shuffle_buffer

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


class Faults:
    """The known bad samples of a data set, including those skipped when it was opened.

    A share above ``max_fraction`` raises a DataError; ``report`` gets a message for each new one.
    """

    def __init__(
        self, dataset: PairDataset, max_fraction: float, report: Callable[[str], Any] = print
    ) -> None:
        self.name = dataset.name
        self.max_fraction = max_fraction
        self.report = report
        self.known = len(getattr(dataset, "skipped", ()))
        self.total = len(dataset) + self.known
        self.positions: set[int] = set()
        self._check("")

    def noted(self, batch: Batch) -> Batch:
        """Note the bad samples of a batch, each once, and return the batch."""
        for position, reason in batch.bad:
            if position not in self.positions:
                self.positions.add(position)
                if len(self.positions) <= NAMED:
                    self.report(f"skipped sample {len(self.positions)}: {reason}")
                self._check(f"; the last one: {reason}")
        return batch

    def _check(self, last: str) -> None:
        count = self.known + len(self.positions)
        if count > self.max_fraction * self.total:
            raise DataError(
                f"{self.name}: {count} of {self.total} samples cannot be used, more than "
                f"--max-bad-fraction {self.max_fraction:g}{last}; fix the data (python -m "
                "protoclip.data --check lists what is wrong), or allow more"
            )


@dataclass(frozen=True)
class Draws:
    """The order of the pairs, and the seed of their random choices."""

    positions: Tensor  # in the data set, int64 [M], repeats allowed
    seed: int  # for captions and augmentation; differs by episode
    start: int = 0  # first draw; batches are cut from here on
    # Number of each draw among the draws of all ranks, int64 [M]; None: 0 ... M - 1.
    numbers: Tensor | None = None


def batches(
    dataset: PairDataset,
    draws: Draws,
    batch_size: int,
    transform: Transform | Callable[[Image.Image], Tensor],
    tokenizer: Tokenizer,
    *,
    workers: int = 0,
    captions: str = "random",
    faults: Faults | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Load pairs in the given order.

    Caption and augmentation of draw j depend only on (seed, j), so the batches are the same for
    any number of workers and any start. The caller's global random state does not change.

    Args:
        transform: picture -> [3, H, W]; its randomness must come from torch's default generator.
        tokenizer: list of B captions -> int64 [B, L].
        workers: number of extra processes; 0 loads in this one.
        captions: "random" | "first" (the canonical one) | "canonical": the first in half of the
            draws, any in the others.
        faults: notes unreadable pairs; each is replaced by another of the draws, chosen by
            (seed, j). None: an unreadable pair raises a DataError that names it.
        pin_memory: whether batches of workers come in pinned memory; needs a GPU.
    """
    source = _Source(dataset, draws, batch_size, transform, tokenizer, captions, faults is not None)
    firsts = range(draws.start, len(draws.positions), batch_size)
    if workers:
        loaded = _in_workers(source, firsts, workers, pin_memory)
    else:
        loaded = map(source.load, firsts)
    return loaded if faults is None else map(faults.noted, loaded)


@dataclass(frozen=True)
class _Source:
    """Makes the batch that begins at a given draw; picklable for workers."""

    dataset: PairDataset
    draws: Draws
    batch_size: int
    transform: Transform | Callable[[Image.Image], Tensor]
    tokenizer: Tokenizer
    captions: str
    replace_bad: bool

    def load(self, first: int) -> Batch:
        positions = self.draws.positions.numpy()
        index = positions[first : first + self.batch_size].copy()
        if (prefetch := getattr(self.dataset, "prefetch", None)) is not None:
            prefetch(positions[first : first + AHEAD * self.batch_size])
        if self.draws.numbers is None:
            draw_numbers = np.arange(first, first + len(index))
        else:
            draw_numbers = self.draws.numbers[first : first + len(index)].numpy()
        texts: list[str] = []
        images: list[Any] = []
        bad: list[tuple[int, str]] = []
        transform = self.transform
        # The larger part of a Transform takes the whole batch at once, below.
        transform_one = transform.pixels if isinstance(transform, Transform) else transform
        with torch.random.fork_rng(devices=[]):
            draw_seeds = mix(self.draws.seed, draw_numbers)
            caption_seeds = mix(0, draw_seeds).tolist()
            seeds = zip(draw_seeds.tolist(), caption_seeds, strict=True)
            for row, (draw_seed, caption_seed) in enumerate(seeds):
                while len(images) == row:
                    try:
                        captions = self.dataset.captions(int(index[row]))
                        torch.default_generator.manual_seed(draw_seed)
                        images.append(transform_one(self.dataset.image(int(index[row]))))
                        texts.append(self._choose(captions, caption_seed))
                    except DataError as error:
                        if not self.replace_bad or len(bad) == ATTEMPTS + self.batch_size:
                            raise
                        bad.append((int(index[row]), str(error)))
                        index[row] = self._another(draw_seed, len(bad), index)
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

    def _choose(self, captions: Sequence[str], caption_seed: int) -> str:
        """Choose one of the captions with a random number below 2**64."""
        coin = caption_seed >> 40 & 1
        if self.captions == "first" or (self.captions == "canonical" and coin):
            return captions[0]
        return captions[caption_seed % len(captions)]

    def _another(self, draw_seed: int, attempt: int, batch: np.ndarray) -> int:
        """A pair to replace a bad one, preferably not in the batch already."""
        positions = self.draws.positions.numpy()
        candidates = positions[
            (mix(draw_seed, attempt, np.arange(64)) % len(positions)).astype(int)
        ]
        return int(candidates[np.isin(candidates, batch).argmin()])

    # torch's DataLoader calls this.
    def __getitem__(self, first: int) -> Batch | DataError:
        try:
            return self.load(first)
        except DataError as error:
            return error  # raised in a worker, it would arrive wrapped in a traceback


def _in_workers(source: _Source, firsts: range, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yield batches in order; replace dead workers and continue where they stopped."""
    done = 0
    crashes = 0
    while done < len(firsts):
        loader: torch.utils.data.DataLoader[Batch | DataError] = torch.utils.data.DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=None,
            sampler=firsts[done:],
            num_workers=min(workers, len(firsts) - done),
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # otherwise it uses the caller's
        )
        started: list[multiprocessing.process.BaseProcess] = []
        # Kill workers that are stuck, here or at exit: they ignore SIGTERM.
        cleanup = Finalize(None, _kill, (started,), exitpriority=1)
        iterator: Any = iter(())
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator = iter(loader)
            # When a worker dies, torch's handler raises at an arbitrary place in the program;
            # without it the iterator notices within seconds.
            signal.signal(signal.SIGCHLD, handler)
            started += iterator._workers
            for batch in iterator:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
                done += 1
                crashes = 0
            return
        except (RuntimeError, OSError, EOFError) as error:
            # Other than torch's own messages: the connection that carries a tensor is gone.
            dead = wait([process.sentinel for process in started], timeout=PATIENCE)
            if "DataLoader worker" not in str(error) and not dead:
                raise
            crashes += 1
            reason = (str(error) or type(error).__name__).splitlines()[0]
        finally:
            iterator = iter(())  # stops the workers that still answer
            cleanup()
        index = source.draws.positions[firsts[done] :][: source.batch_size].tolist()
        keys = ", ".join(source.dataset.keys[i] for i in index[:8])
        if crashes == CRASHES:
            raise DataError(
                f"{source.dataset.name}: a data worker died {CRASHES} times at the same batch "
                f"({reason}); use fewer --workers, or look at the samples: {keys}, ..."
            )
        logger.warning("a data worker died (%s) near %s, ...; starting it again", reason, keys)


def _ignore_signals(worker: int) -> None:
    """Leave signals to the training process, which still needs the batches of its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()
