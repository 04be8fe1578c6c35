"""The order of an epoch and its batches; every random choice follows from the seed and the draw."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.config import DataConfig
from protoclip.data.images import Transform
from protoclip.data.types import Batch, DataError, PairDataset, Subset, mix

STREAM_BUFFER = 10_000  # samples; the window of shard-wise orders unless --shuffle-buffer says
AHEAD = 16  # batches whose shards are fetched in advance
ATTEMPTS = 50  # bad samples, beyond the size of a batch, that a batch may meet
PATIENCE = 2.0  # seconds by which a worker's death may be known later than its silence
CRASHES = 3  # deaths of a worker at the same batch that end the run
NAMED = 20  # bad samples reported one by one
Tokenizer = Callable[[list[str]], Tensor]
logger = logging.getLogger(__name__)


class EpochOrder:
    """The order in which an epoch visits the data: fully mixed, shard by shard, or resampled.

    Args:
        dataset: with ``shard_of`` and ``source_of``, int [N], where it is made of shards.
        config: weights of the sources, window of the shuffle, resampling.
    Attributes:
        size: positions in an epoch: N, times the weights where sources have them.
    Raises:
        ValueError: weights that are not numbers, or not one for each source.
    """

    def __init__(self, dataset: Any, config: DataConfig) -> None:
        count = len(dataset)
        shard = getattr(dataset, "shard_of", np.zeros(count))
        source = getattr(dataset, "source_of", np.zeros(count)).astype(np.int64)
        self.source = torch.from_numpy(source)
        self.weights = _weights(
            config.train_data_upsampling_factors, int(source.max(initial=0)) + 1
        )
        self.resampled = config.dataset_resampled
        self.size = count
        if self.weights and not self.resampled:
            parts = torch.bincount(self.source, minlength=len(self.weights)).tolist()
            self.size = sum(round(w * n) for w, n in zip(self.weights, parts, strict=True))
        if self.size < 1:
            raise ValueError("--train-data-upsampling-factors: no sample is left in an epoch")
        self.window = config.shuffle_buffer
        if self.window <= 0:
            remote = self.window < 0 and getattr(dataset, "remote", False)
            self.window = STREAM_BUFFER if remote or self.resampled else 0
        # Runs of neighbours in the same shard; without shards the data set is one.
        edges = [0, *(np.flatnonzero(np.diff(shard)) + 1), count]
        self.starts = torch.tensor(edges[:-1], dtype=torch.int64)
        self.lengths = torch.tensor(edges[1:], dtype=torch.int64) - self.starts

    def permutation(self, random: torch.Generator) -> Tensor:
        """Positions of one epoch, int64 [size]."""
        if self.resampled:
            return _window(self._resampled(random), self.window, random)
        if not self.window:
            positions = self._repeated(torch.arange(int(self.lengths.sum())), random)
            return positions[torch.randperm(len(positions), generator=random)]
        shards = torch.randperm(len(self.starts), generator=random)
        positions = self._repeated(_runs(self.starts[shards], self.lengths[shards]), random)
        return _window(positions, self.window, random)

    def _repeated(self, positions: Tensor, random: torch.Generator) -> Tensor:
        """Repeat each position by the weight of its source; the fraction is drawn each time."""
        if not self.weights:
            return positions
        source = self.source[positions]
        times = torch.zeros(len(positions), dtype=torch.int64)
        for number, weight in enumerate(self.weights):
            members = (source == number).nonzero().flatten()
            times[members] = int(weight)
            rest = round(weight * len(members)) - int(weight) * len(members)
            times[members[torch.randperm(len(members), generator=random)[:rest]]] += 1
        return positions.repeat_interleave(times)

    def _resampled(self, random: torch.Generator) -> Tensor:
        """Whole shards with replacement, as OpenCLIP's --dataset-resampled, cut at ``size``."""
        chances = torch.ones(len(self.starts), dtype=torch.float64)
        if self.weights:
            chances = torch.tensor(self.weights, dtype=torch.float64)[self.source[self.starts]]
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < self.size:
            shards = torch.multinomial(chances, len(chances), replacement=True, generator=random)
            found = torch.cat([found, _runs(self.starts[shards], self.lengths[shards])])
        return found[: self.size]


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each run, one after the other."""
    ends = lengths.cumsum(0)
    offsets = (starts - (ends - lengths)).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) + offsets


def _window(positions: Tensor, window: int, random: torch.Generator) -> Tensor:
    """Mix so that no sample moves by more than ``window`` places: what a shuffle buffer does."""
    moved = torch.rand(len(positions), generator=random, dtype=torch.float64) * window
    return positions[(torch.arange(len(positions)) + moved).argsort(stable=True)]


def _weights(text: str, sources: int) -> list[float]:
    try:
        weights = [float(part) for part in text.split("::")] if text else []
        fine = not text or (len(weights) == sources and min(weights) >= 0)
    except ValueError:
        fine = False
    if not fine or not np.isfinite(weights).all():
        raise ValueError(
            f"--train-data-upsampling-factors: expected {sources} numbers of at least 0 joined by "
            f"'::', one for each source of --train-data, got {text!r}"
        )
    return weights


class Faults:
    """The samples of a data set that cannot be used, as far as they are known.

    Args:
        dataset: what it skipped when it was opened counts.
        max_fraction: share of bad samples above which to stop.
        report: told each new one in words.
    Raises:
        DataError: there are more than ``max_fraction`` allows already.
    """

    def __init__(
        self, dataset: PairDataset, max_fraction: float, report: Callable[[str], Any] = print
    ) -> None:
        whole: Any = dataset
        while isinstance(whole, Subset):
            whole = whole.dataset
        self.name, self.max_fraction, self.report = dataset.name, max_fraction, report
        self.known = len(getattr(whole, "skipped", ()))
        self.total = len(whole) + self.known
        self.positions: set[int] = set()
        self._check("")

    def noted(self, batch: Batch) -> Batch:
        """The batch, after its bad samples are noted; the same one counts once.

        Raises:
            DataError: there are more than ``max_fraction`` allows.
        """
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
    """Which pairs come when, and what their random choices follow from."""

    positions: Tensor  # in the data set, int64 [M], repeats allowed
    seed: int  # of captions and augmentation; another one for each episode
    start: int = 0  # first draw; batches are cut from here on
    # int64 [M], the number of each draw; None: 0 ... M - 1. A rank that loads some of the draws of
    # all ranks gives theirs, so that who loads a draw does not matter.
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
) -> Iterator[Batch]:
    """Load pairs in the given order.

    Caption and augmentation of draw j depend on (seed, j) only, so the batches are the same
    whatever the number of workers, and a run that stopped after draw j goes on with start=j.
    The global random state of the caller is left as it was.

    Args:
        dataset: where the pairs come from.
        draws: which of them, in which order.
        batch_size: pairs per batch, at least 1.
        transform: picture -> [3, H, W]; its chance must come from torch's default generator.
        tokenizer: list of B captions -> int64 [B, L].
        workers: processes besides this one; 0 loads in this one.
        captions: "random" | "first" (the canonical one) | "canonical": the first in half of the
            draws, any in the others.
        faults: notes pairs that cannot be read; another of the draws, chosen by (seed, j), stands
            in for each. None: such a pair is an error.
    Raises:
        DataError: a pair that cannot be read, or too many of them; the message names it.
    """
    count = len(draws.positions)
    if draws.numbers is None:
        draws = replace(draws, numbers=torch.arange(count))
    source = _Source(
        dataset, draws, batch_size, transform, tokenizer, captions, replace_bad=faults is not None
    )
    firsts = range(draws.start, count, batch_size)
    loaded = _in_workers(source, firsts, workers) if workers else map(source.load, firsts)
    return loaded if faults is None else map(faults.noted, loaded)


@dataclass(frozen=True)
class _Source:
    """Makes the batch that begins at a given draw; picklable, so that workers can have it."""

    dataset: PairDataset
    draws: Draws
    batch_size: int
    transform: Transform | Callable[[Image.Image], Tensor]
    tokenizer: Tokenizer
    captions: str
    replace_bad: bool

    def load(self, first: int) -> Batch:
        positions, end = self.draws.positions.numpy(), first + self.batch_size
        index = positions[first:end].copy()
        if (prefetch := getattr(self.dataset, "prefetch", None)) is not None:
            prefetch(positions[first : first + AHEAD * self.batch_size])
        assert self.draws.numbers is not None
        dice = mix(self.draws.seed, self.draws.numbers[first:end].numpy())
        pairs: list[tuple[str, Tensor]] = []
        bad: list[tuple[int, str]] = []
        generator = torch.default_generator
        before = generator.get_state()
        try:
            for row, die in enumerate(dice.tolist()):
                while len(pairs) == row:
                    try:
                        pairs.append(self._pair(int(index[row]), die))
                    except DataError as error:
                        if not self.replace_bad or len(bad) == ATTEMPTS + self.batch_size:
                            raise
                        bad.append((int(index[row]), str(error)))
                        index[row] = self._another(die, len(bad), index)
        finally:
            generator.set_state(before)
        texts, pictures = zip(*pairs, strict=True)
        images = torch.stack(pictures)
        if isinstance(self.transform, Transform):
            images = self.transform.normalise(images)
        return Batch(torch.from_numpy(index), images, self.tokenizer(list(texts)), tuple(bad))

    def _pair(self, position: int, die: int) -> tuple[str, Tensor]:
        """Caption and transformed picture, drawn by the given number."""
        choices = self.dataset.captions(position)
        choice = int(mix(0, die))
        first = self.captions == "first" or (self.captions == "canonical" and choice >> 40 & 1)
        whole = self.transform
        one = whole.pixels if isinstance(whole, Transform) else whole
        torch.default_generator.manual_seed(die)
        return choices[0 if first else choice % len(choices)], one(self.dataset.image(position))

    def _another(self, die: int, attempt: int, batch: np.ndarray) -> int:
        """A pair to replace a bad one, preferably one that is not in the batch already."""
        positions = self.draws.positions.numpy()
        candidates = positions[(mix(die, attempt, np.arange(64)) % len(positions)).astype(int)]
        fresh = candidates[~np.isin(candidates, batch)]
        return int((fresh if len(fresh) else candidates)[0])

    # What torch's DataLoader calls.
    def __getitem__(self, first: int) -> Batch | DataError:
        try:
            return self.load(first)
        except DataError as error:
            return error  # raised in a worker, it would arrive wrapped in a traceback


def _in_workers(source: _Source, firsts: range, workers: int) -> Iterator[Batch]:
    """Batches in order; workers that die are replaced, and the work goes on where it stood."""
    done, crashes = 0, 0
    while done < len(firsts):
        loader: torch.utils.data.DataLoader[Batch | DataError] = torch.utils.data.DataLoader(
            source,  # type: ignore[arg-type]
            batch_size=None,
            sampler=firsts[done:],
            num_workers=min(workers, len(firsts) - done),
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it draws from the caller's
        )
        others = set(multiprocessing.active_children())
        started: set[multiprocessing.process.BaseProcess] = set()
        # Kill workers that are stuck, here or at exit: they ignore SIGTERM.
        cleanup = Finalize(None, _kill, (started,), exitpriority=1)
        iterator: Iterator[Any] = iter(())
        try:
            iterator = _started(loader)
            started |= set(multiprocessing.active_children()) - others
            for batch in iterator:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
                done, crashes = done + 1, 0
            return
        except (RuntimeError, OSError, EOFError) as error:
            # Besides torch's own messages: the connection that carries a tensor is gone.
            dead = wait([process.sentinel for process in started], timeout=PATIENCE)
            if "DataLoader worker" not in str(error) and not dead:
                raise
            crashes += 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            iterator = iter(())  # stops the workers that still answer
            cleanup()
        index = source.draws.positions[firsts[done] :][: source.batch_size].tolist()
        keys = ", ".join(source.dataset.keys[i] for i in index[:8])
        if crashes == CRASHES:
            raise DataError(
                f"{source.dataset.name}: a data worker died {CRASHES} times at the same batch "
                f"({reason}); one of its pictures may break the decoder or the memory may be too "
                f"small for --workers {workers}; samples: {keys}, ..."
            )
        logger.warning("a data worker died (%s) near %s, ...; it is started again", reason, keys)


def _ignore_signals(worker: int) -> None:
    """A signal to the group means the training process, which still needs its step's batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _started(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """The loader's iterator, without torch's SIGCHLD handler, which raises wherever the program is
    when a worker dies; the iterator notices by itself within seconds."""
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
