"""Batches whose every random choice depends on the seed and the draw alone."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.data.faults import Faults
from protoclip.data.hashing import mix
from protoclip.data.transforms import Transform
from protoclip.data.types import Batch, DataError, PairDataset

AHEAD = 16  # batches whose shards are fetched in advance
ATTEMPTS = 50  # pairs tried in place of a bad one
CRASHES = 3  # deaths of a worker at the same batch that end the run
logger = logging.getLogger(__name__)
CAPTIONS = ("random", "canonical", "first")
Tokenizer = Callable[[list[str]], Tensor]


def batches(
    dataset: PairDataset,
    draws: Tensor,
    batch_size: int,
    transform: Transform | Callable[[Image.Image], Tensor],
    tokenizer: Tokenizer,
    *,
    seed: int,
    workers: int = 0,
    captions: str = "random",
    drop_last: bool = False,
    start: int = 0,
    numbers: Tensor | None = None,
    faults: Faults | None = None,
) -> Iterator[Batch]:
    """Load pairs in the given order.

    Caption and augmentation of draw j depend on (seed, j) only, so the batches are the same
    whatever the number of workers, and a run that stopped after draw j goes on with start=j.
    Give each episode its own seed (:func:`protoclip.data.mix_seed`). The global random state of
    the caller is left as it was.

    Args:
        dataset: where the pairs come from.
        draws: positions in ``dataset``, int64 [M], repeats allowed.
        batch_size: pairs per batch, at least 1.
        transform: picture -> [3, H, W]; its chance must come from torch's default generator.
        tokenizer: list of B captions -> int64 [B, L].
        seed: of captions and augmentation, any integer.
        workers: processes beside this one; 0 loads in this one.
        captions: "random" | "first" (the canonical one) | "canonical": the first in half of the
            draws, any in the others.
        drop_last: leave out an incomplete last batch.
        start: first draw; batches are cut from here on.
        numbers: int64 [M], the j of each draw; None: 0 ... M - 1. A rank that loads some of the
            draws of all ranks gives theirs, so that who loads a draw does not matter.
        faults: notes pairs that cannot be read; another of the draws, chosen by (seed, j), stands
            in for each. None: such a pair is an error.
    Raises:
        DataError: a pair that cannot be read, or too many of them; the message names it.
        ValueError: arguments that make no sense.
    """
    draws = torch.as_tensor(draws)
    if draws.dim() != 1 or draws.dtype != torch.int64:
        raise ValueError(f"draws: expected int64 [M], got {draws.dtype} {tuple(draws.shape)}")
    if len(draws) and not 0 <= int(draws.min()) <= int(draws.max()) < len(dataset):
        raise ValueError(
            f"draws: expected positions in 0 ... {len(dataset) - 1}, got "
            f"{int(draws.min())} ... {int(draws.max())}"
        )
    if batch_size < 1 or workers < 0 or start < 0:
        raise ValueError(
            "batches: expected batch_size of at least 1, workers and start of at least 0, got "
            f"{batch_size}, {workers} and {start}"
        )
    if captions not in CAPTIONS:
        raise ValueError(f"captions: expected one of {', '.join(CAPTIONS)}, got {captions!r}")
    source = _Source(
        dataset, draws.cpu().numpy(), batch_size, transform, tokenizer, seed, captions,
        faults is not None,
    )  # fmt: skip
    if numbers is not None:
        source.numbers = numbers.cpu().numpy()
    last = len(draws) - batch_size + 1 if drop_last else len(draws)
    firsts = range(start, last, batch_size)
    loaded = _in_workers(source, firsts, workers) if workers else map(source.load, firsts)
    return loaded if faults is None else _noted(loaded, faults)


def _noted(loaded: Iterator[Batch], faults: Faults) -> Iterator[Batch]:
    for batch in loaded:
        for position, reason in batch.bad:
            faults.add(position, reason)
        yield batch


class _Source:
    """Makes the batch that begins at a given draw; picklable, so that workers can have it."""

    def __init__(
        self,
        dataset: PairDataset,
        draws: np.ndarray,
        batch_size: int,
        transform: Transform | Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer,
        seed: int,
        captions: str,
        replace_bad: bool = False,
    ) -> None:
        self.dataset = dataset
        self.draws = draws
        self.numbers = np.arange(len(draws))
        self.batch_size = batch_size
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self.captions = captions
        self.replace_bad = replace_bad
        self.prefetch: Callable[[np.ndarray], None] | None = getattr(dataset, "prefetch", None)

    def load(self, first: int) -> Batch:
        index = self.draws[first : first + self.batch_size].copy()
        if self.prefetch is not None:
            self.prefetch(self.draws[first : first + AHEAD * self.batch_size])
        dice = mix(self.seed, self.numbers[first : first + self.batch_size])
        texts: list[str] = []
        pictures: list[Tensor] = []
        bad: list[tuple[int, str]] = []
        generator = torch.default_generator
        before = generator.get_state()
        try:
            for row, die in enumerate(dice.tolist()):
                position = int(index[row])
                for attempt in range(1, ATTEMPTS + 1):
                    try:
                        text, picture = self._pair(position, die)
                        break
                    except DataError as error:
                        if not self.replace_bad or attempt == ATTEMPTS:
                            raise
                        bad.append((position, str(error)))
                        position = self._another(die, attempt, index)
                index[row] = position
                texts.append(text)
                pictures.append(picture)
        finally:
            generator.set_state(before)
        images = torch.stack(pictures)
        if isinstance(self.transform, Transform):
            images = self.transform.normalise(images)
        return Batch(torch.from_numpy(index), images, self.tokenizer(texts), tuple(bad))

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
        """A pair to stand in for a bad one, if possible none that is in the batch already."""
        candidates = self.draws[(mix(die, attempt, np.arange(64)) % len(self.draws)).astype(int)]
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
            collate_fn=_as_is,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it draws from the caller's
        )
        others = set(multiprocessing.active_children())
        started: set[multiprocessing.process.BaseProcess] = set()
        # Ends those that are stuck, here or when the program ends: they ignore SIGTERM.
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
            # Beside torch's own words: the connection over which a tensor was to come is gone.
            if "DataLoader worker" not in str(error) and all(p.is_alive() for p in started):
                raise
            crashes += 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        finally:
            iterator = iter(())  # lets those go that can
            cleanup()
        index = source.draws[firsts[done] : firsts[done] + source.batch_size]
        keys = ", ".join(source.dataset.keys[int(i)] for i in index[:8])
        if crashes == CRASHES:
            raise DataError(
                f"{source.dataset.name}: a data worker died {CRASHES} times at the same batch "
                f"({reason}); one of its pictures may break the decoder or the memory may be too "
                f"small for --workers {workers}; samples: {keys}, ..."
            )
        logger.warning("a data worker died (%s) near %s, ...; it is started again", reason, keys)


def _ignore_signals(worker: int) -> None:
    """A signal to the whole process group asks the training process to stop, which still needs the
    batches of its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _started(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """The loader's iterator, without the handler by which torch raises wherever the program stands
    when a worker dies; the iterator finds out by itself within seconds."""
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


def _as_is(batch: Any) -> Any:
    return batch
