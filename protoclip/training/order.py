"""In which order an epoch goes through the data: all mixed, shard by shard, or resampled.

Every order follows from a generator, so that a run goes on exactly from any step; none needs more
than a few arrays of the data set's length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from protoclip.config import DataConfig

STREAM_BUFFER = 10_000  # samples; the window of shard-wise orders unless --shuffle-buffer says


class EpochOrder:
    """The positions of an epoch.

    Args:
        dataset: with ``shard_of`` and ``source_of``, int [N], where it is made of shards.
        config: weights of the sources, window of the shuffle, resampling.
    Attributes:
        size: positions in an epoch: N, times the weights where sources have them.
    Raises:
        ValueError: weights that are none, or not one for each source.
    """

    def __init__(self, dataset: Any, config: DataConfig) -> None:
        count = len(dataset)
        source = getattr(dataset, "source_of", None)
        shard = getattr(dataset, "shard_of", None)
        weights = _weights(config.train_data_upsampling_factors, source)
        self.source = None if source is None else torch.from_numpy(source.astype(np.int64))
        self.weights = weights
        self.resampled = config.dataset_resampled
        self.size = count
        if weights is not None and self.source is not None and not self.resampled:
            parts = torch.bincount(self.source, minlength=len(weights))
            self.size = int(sum(round(w * int(n)) for w, n in zip(weights, parts, strict=True)))
        if self.size < 1:
            raise ValueError("--train-data-upsampling-factors: no sample is left in an epoch")
        self.window = config.shuffle_buffer
        if self.window < 0:
            self.window = STREAM_BUFFER if getattr(dataset, "remote", False) else 0
        if self.resampled and self.window == 0:
            self.window = STREAM_BUFFER
        # Runs of neighbours in the same shard; without shards the data set is one.
        edges = [0, count] if shard is None else [0, *(np.flatnonzero(np.diff(shard)) + 1), count]
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
        """Each position as often as the weight of its source says; a rest is drawn anew."""
        if self.weights is None or self.source is None:
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
        if self.weights is not None and self.source is not None:
            chances = torch.tensor(self.weights, dtype=torch.float64)[self.source[self.starts]]
        parts, left = [], self.size
        while left > 0:
            shards = torch.multinomial(
                chances, len(self.starts), replacement=True, generator=random
            )
            parts.append(_runs(self.starts[shards], self.lengths[shards])[:left])
            left -= len(parts[-1])
        return torch.cat(parts)


def _runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each run, one after the other."""
    ends = lengths.cumsum(0)
    offsets = (starts - (ends - lengths)).repeat_interleave(lengths)
    return torch.arange(int(lengths.sum())) + offsets


def _window(positions: Tensor, window: int, random: torch.Generator) -> Tensor:
    """Mix so that no sample moves by more than ``window`` places: what a shuffle buffer does."""
    moved = torch.rand(len(positions), generator=random, dtype=torch.float64) * window
    return positions[(torch.arange(len(positions)) + moved).argsort(stable=True)]


def _weights(text: str, source: np.ndarray | None) -> list[float] | None:
    if not text:
        return None
    try:
        weights = [float(part) for part in text.split("::")]
    except ValueError as error:
        raise ValueError(
            f"--train-data-upsampling-factors: expected numbers joined by '::', got {text!r}"
        ) from error
    sources = 1 if source is None or not len(source) else int(source.max()) + 1
    if len(weights) != sources or min(weights) < 0 or not np.isfinite(weights).all():
        raise ValueError(
            f"--train-data-upsampling-factors: expected {sources} numbers of at least 0, one for "
            f"each source of --train-data, got {text!r}"
        )
    return weights
