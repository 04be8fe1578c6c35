"""The order of an epoch and its batches; every random choice follows from the seed and the draw."""

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

from protoclip.data.images import Transform
from protoclip.data.types import Batch, DataError, PairDataset, mix

STREAM_BUFFER = 10_000  # samples; the window of shard-wise orders unless --shuffle-buffer says
AHEAD = 16  # batches whose shards are fetched in advance
ATTEMPTS = 50  # bad samples, beyond the size of a batch, that a batch may meet
PATIENCE = 2.0  # seconds by which a worker's death may be known later than its silence
CRASHES = 3  # deaths of a worker at the same batch that end the run
NAMED = 20  # bad samples reported one by one
Tokenizer = Callable[[list[str]], Tensor]
logger = logging.getLogger(__name__)


class EpochOrder:
    """The order in which an epoch visits the data: fully mixed, or shard by shard.

    Args:
        dataset: N pairs, with ``shard_of``, int [N], where it is of shards.
        shuffle_buffer: samples of the window that is mixed over; 0: all; -1: all, but
            ``STREAM_BUFFER`` where shards come from urls.
    """

    def __init__(self, dataset: Any, shuffle_buffer: int = -1) -> None:
        self.size = count = len(dataset)
        shard = getattr(dataset, "shard_of", np.zeros(count))
        # Runs of neighbours in the same shard; without shards the data set is one.
        edges = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), count]
        self.runs = list(itertools.pairwise(edges))
        remote = getattr(dataset, "remote", False)
        self.window = STREAM_BUFFER if shuffle_buffer < 0 and remote else max(0, shuffle_buffer)

    def permutation(self, random: torch.Generator) -> Tensor:
        """Positions of one epoch, int64 [N]."""
        if not self.window:
            return torch.randperm(self.size, generator=random)
        order = torch.randperm(len(self.runs), generator=random).tolist()
        positions = torch.cat([torch.arange(*self.runs[run]) for run in order])
        # No sample moves by more than the window: what a shuffle buffer does.
        moved = torch.rand(self.size, generator=random, dtype=torch.float64) * self.window
        return positions[(torch.arange(self.size) + moved).argsort(stable=True)]


class Faults:
    """The known samples of a data set that cannot be used, those skipped at its opening included.

    A share above ``max_fraction`` is a DataError; ``report`` is told each new one in words.
    """

    def __init__(
        self, dataset: PairDataset, max_fraction: float, report: Callable[[str], Any] = print
    ) -> None:
        self.name, self.max_fraction, self.report = dataset.name, max_fraction, report
        self.known = len(getattr(dataset, "skipped", ()))
        self.total = len(dataset) + self.known
        self.positions: set[int] = set()
        self._check("")

    def noted(self, batch: Batch) -> Batch:
        """The batch, after its bad samples are noted; the same one counts once."""
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
    # Number of each draw among those of all ranks, int64 [M]; None: 0 ... M - 1.
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

    Caption and augmentation of draw j depend on (seed, j) only, so the batches are the same for
    any number of workers and any start. The caller's global random state is left as it was.

    Args:
        transform: picture -> [3, H, W]; its chance must come from torch's default generator.
        tokenizer: list of B captions -> int64 [B, L].
        workers: processes besides this one; 0 loads in this one.
        captions: "random" | "first" (the canonical one) | "canonical": the first in half of the
            draws, any in the others.
        faults: notes pairs that cannot be read; another of the draws, chosen by (seed, j), stands
            in for each. None: such a pair is a DataError that names it.
    """
    source = _Source(dataset, draws, batch_size, transform, tokenizer, captions, faults is not None)
    firsts = range(draws.start, len(draws.positions), batch_size)
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
        positions, numbers = self.draws.positions.numpy(), self.draws.numbers
        index = positions[first : first + self.batch_size].copy()
        own = slice(first, first + len(index))
        if (prefetch := getattr(self.dataset, "prefetch", None)) is not None:
            prefetch(positions[first : first + AHEAD * self.batch_size])
        draws = np.arange(own.start, own.stop) if numbers is None else numbers[own].numpy()
        texts: list[str] = []
        pictures: list[Tensor] = []
        bad: list[tuple[int, str]] = []
        whole = self.transform
        one = whole.pixels if isinstance(whole, Transform) else whole
        with torch.random.fork_rng(devices=[]):
            for row, die in enumerate(mix(self.draws.seed, draws).tolist()):
                while len(pictures) == row:
                    try:
                        captions = self.dataset.captions(int(index[row]))
                        torch.default_generator.manual_seed(die)
                        pictures.append(one(self.dataset.image(int(index[row]))))
                        texts.append(self._choose(captions, die))
                    except DataError as error:
                        if not self.replace_bad or len(bad) == ATTEMPTS + self.batch_size:
                            raise
                        bad.append((int(index[row]), str(error)))
                        index[row] = self._another(die, len(bad), index)
        images = torch.stack(pictures)
        if isinstance(whole, Transform):
            images = whole.normalise(images)
        return Batch(torch.from_numpy(index), images, self.tokenizer(texts), tuple(bad))

    def _choose(self, captions: Sequence[str], die: int) -> str:
        """One of the captions, drawn by the given number."""
        choice = int(mix(0, die))
        first = self.captions == "first" or (self.captions == "canonical" and choice >> 40 & 1)
        return captions[0 if first else choice % len(captions)]

    def _another(self, die: int, attempt: int, batch: np.ndarray) -> int:
        """A pair to replace a bad one, preferably one that is not in the batch already."""
        positions = self.draws.positions.numpy()
        candidates = positions[(mix(die, attempt, np.arange(64)) % len(positions)).astype(int)]
        return int(candidates[np.isin(candidates, batch).argmin()])

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
        started: list[multiprocessing.process.BaseProcess] = []
        # Kill workers that are stuck, here or at exit: they ignore SIGTERM.
        cleanup = Finalize(None, _kill, (started,), exitpriority=1)
        iterator: Any = iter(())
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator = iter(loader)
            # Torch's handler raises wherever the program is when a worker dies; the iterator
            # notices by itself within seconds.
            signal.signal(signal.SIGCHLD, handler)
            started += iterator._workers
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
        logger.warning("a data worker died (%s) near %s, ...; it is started again", reason, keys)


def _ignore_signals(worker: int) -> None:
    """A signal to the group means the training process, which still needs its step's batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _kill(processes: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()
