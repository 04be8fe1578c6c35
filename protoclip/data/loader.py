"""Batches whose every random choice depends on the seed and the draw alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.data.hashing import mix
from protoclip.data.transforms import Transform
from protoclip.data.types import Batch, DataError, PairDataset

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
    Raises:
        DataError: a pair that cannot be read; the message names it.
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
    source = _Source(dataset, draws.cpu().numpy(), batch_size, transform, tokenizer, seed, captions)
    if numbers is not None:
        source.numbers = numbers.cpu().numpy()
    last = len(draws) - batch_size + 1 if drop_last else len(draws)
    firsts = range(start, last, batch_size)
    return _in_workers(source, firsts, workers) if workers else map(source.load, firsts)


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
    ) -> None:
        self.dataset = dataset
        self.draws = draws
        self.numbers = np.arange(len(draws))
        self.batch_size = batch_size
        self.transform = transform
        self.tokenizer = tokenizer
        self.seed = seed
        self.captions = captions

    def load(self, first: int) -> Batch:
        index = self.draws[first : first + self.batch_size]
        dice = mix(self.seed, self.numbers[first : first + self.batch_size])
        texts = []
        for position, die in zip(index.tolist(), mix(0, dice).tolist(), strict=True):
            choices = self.dataset.captions(position)
            first = self.captions == "first" or (self.captions == "canonical" and die >> 40 & 1)
            texts.append(choices[0 if first else die % len(choices)])
        return Batch(
            torch.from_numpy(index.copy()), self._images(index, dice), self.tokenizer(texts)
        )

    def _images(self, index: np.ndarray, dice: np.ndarray) -> Tensor:
        """Transformed pictures, float32 [B, 3, H, W], drawn from the given seeds."""
        whole = self.transform
        one = whole.pixels if isinstance(whole, Transform) else whole
        generator = torch.default_generator
        before = generator.get_state()
        try:
            images = []
            for position, die in zip(index.tolist(), dice.tolist(), strict=True):
                generator.manual_seed(die)
                images.append(one(self.dataset.image(position)))
        finally:
            generator.set_state(before)
        stacked = torch.stack(images)
        return whole.normalise(stacked) if isinstance(whole, Transform) else stacked

    # What torch's DataLoader calls.
    def __getitem__(self, first: int) -> Batch | DataError:
        try:
            return self.load(first)
        except DataError as error:
            return error  # raised in a worker, it would arrive wrapped in a traceback


def _in_workers(source: _Source, firsts: range, workers: int) -> Iterator[Batch]:
    loader: torch.utils.data.DataLoader[Batch | DataError] = torch.utils.data.DataLoader(
        source,  # type: ignore[arg-type]
        batch_size=None,
        sampler=firsts,
        num_workers=min(workers, max(1, len(firsts))),
        collate_fn=_as_is,
        generator=torch.Generator(),  # else it draws from the caller's
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_is(batch: Any) -> Any:
    return batch
