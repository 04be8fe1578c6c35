"""The types of the data layer: pairs, labels and batches."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.seeds import mix


@dataclass(frozen=True, eq=False)
class Labels:
    """One classification of a data set."""

    ids: Tensor  # class of each pair, int64 [N], indices into ``names``; -1: not known
    names: tuple[str, ...]  # a class may have no pairs (in a subset)


def labels_of(values: Sequence[str]) -> Labels:
    """The classification that gives pair i the class ``values[i]``."""
    names = tuple(dict.fromkeys(values))
    numbers = {name: number for number, name in enumerate(names)}
    ids = torch.tensor([numbers[value] for value in values], dtype=torch.int64)
    return Labels(ids, names)


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs ready for the model."""

    index: Tensor  # position in the data set, int64 [B]
    image: Tensor  # normalised pictures, float32 [B, 3, H, W]
    tokens: Tensor  # one tokenised caption per picture, int64 [B, L]
    # Position and reason of each bad sample that was replaced.
    bad: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return self.index.shape[0]

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies while the host goes on."""
        return Batch(
            index=self.index.pin_memory(),
            image=self.image.pin_memory(),
            tokens=self.tokens.pin_memory(),
            bad=self.bad,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(
            index=self.index.to(device, non_blocking=non_blocking),
            image=self.image.to(device, non_blocking=non_blocking),
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            bad=self.bad,
        )


class PairDataset(Protocol):
    """Pictures, each with at least one caption, by position."""

    name: str  # for messages and tables
    keys: Sequence[str]  # one per pair, unique and stable between runs
    labels: Mapping[str, Labels]  # classifications, such as "group"; {} when unknown

    def __len__(self) -> int: ...
    def image(self, i: int) -> Image.Image:
        """Picture ``i`` in RGB; may be shared, so copy before changing it in place."""

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of picture ``i``, none empty; the first is the canonical one."""


class StringTable(Sequence[str]):
    """A read-only list of strings, kept as one UTF-8 buffer and int64 offsets.

    With a list of str objects, changing reference counts copy it page by page into every forked
    worker; two arrays are not copied and need about a quarter of the memory.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        data = bytearray()
        ends = array("q", [0])
        for string in strings:
            data += string.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self._data = np.frombuffer(bytes(data), dtype=np.uint8)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        raw = self._data[self._ends[i] : self._ends[i + 1]].tobytes()
        return raw.decode("utf-8", "surrogateescape")


class Subset:
    """The pairs of a data set at ``indices``, int64 [M], in that order, with keys and labels."""

    def __init__(
        self, dataset: PairDataset, indices: Tensor | Sequence[int] | np.ndarray, name: str = ""
    ) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = name or dataset.name
        self.keys: Sequence[str] = StringTable(dataset.keys[i] for i in self.indices.tolist())
        self.labels: Mapping[str, Labels] = {
            label: Labels(full.ids[torch.from_numpy(self.indices)], full.names)
            for label, full in dataset.labels.items()
        }
        self.remote = getattr(dataset, "remote", False)
        self.skipped = getattr(dataset, "skipped", ())
        share = len(self.indices) / max(1, len(dataset))
        self.num_skipped = share * getattr(dataset, "num_skipped", len(self.skipped))
        if hasattr(dataset, "shard_of"):
            self.shard_of = dataset.shard_of[self.indices]
        if hasattr(dataset, "window"):
            self.window = dataset.window

    def __len__(self) -> int:
        return len(self.indices)

    def prefetch(self, positions: np.ndarray) -> None:
        """Tell the data set, if it prefetches, which pairs, int64 [M], come next."""
        if (inner := getattr(self.dataset, "prefetch", None)) is not None:
            inner(self.indices[positions])

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(int(self.indices[i]))

    def captions(self, i: int) -> tuple[str, ...]:
        return self.dataset.captions(int(self.indices[i]))


class Pictures:
    """The pictures of some pairs, each once, with the captions of all of its pairs."""

    labels: Mapping[str, Labels] = {}

    def __init__(self, dataset: PairDataset, numbers: np.ndarray) -> None:
        """``numbers``, int64 [N]: the same for pairs that share a picture."""
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            rows_of.setdefault(number, []).append(row)
        self.dataset = dataset
        self.rows = list(rows_of.values())
        self.name = dataset.name
        self.keys: Sequence[str] = StringTable(dataset.keys[rows[0]] for rows in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(self.rows[i][0])

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(text for row in self.rows[i] for text in self.dataset.captions(row))


def picture_numbers(dataset: Any) -> np.ndarray:
    """A number for each pair, int64 [N], the same for pairs that are known to share a picture."""
    if isinstance(dataset, Subset):
        return picture_numbers(dataset.dataset)[dataset.indices]
    return dataset.pictures() if hasattr(dataset, "pictures") else np.arange(len(dataset))


def left_out_files(dataset: Any) -> Sequence[str]:
    """What a folder holds that is not among its pairs, a line for each reason."""
    if isinstance(dataset, (Subset, Pictures)):
        return left_out_files(dataset.dataset)
    return getattr(dataset, "left_out", ())


def heldout_pictures(pictures: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out a share of the pictures, with all of their rows: bool [N].

    ``pictures``, int64 [N], has the number of each row's picture. Whether a picture is held out
    depends on the seed and its number only, so that rows that are added later change nothing.
    """
    chances = mix(seed, np.arange(int(pictures.max()) + 1)) / 2.0**64
    return (chances < fraction)[pictures]


def heldout_mask(count: int, groups: np.ndarray | None, seed: int, percent: int = 10) -> np.ndarray:
    """Choose ``percent`` % of ``count`` positions from each group: bool [count].

    ``groups`` is int64 [count], None for one group; a group of two or more gives at least one.
    """
    groups = np.zeros(count, dtype=np.int64) if groups is None else groups
    mask = np.zeros(count, dtype=bool)
    order = np.lexsort((mix(seed, np.arange(count)), groups))
    _, starts = np.unique(groups[order], return_index=True)
    for members in np.split(order, starts[1:]):
        if len(members) >= 2:
            mask[members[: max(1, (len(members) * percent + 50) // 100)]] = True
    return mask
