"""The types of the data layer: pairs, labels and batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.seeds import mix
from protoclip.common.strings import StringTable


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
    """Pairs ready for the model: pictures and tokens, or rows of stored features."""

    index: Tensor  # position in the data set, int64 [B]
    image: Tensor  # normalised pictures, float32 [B, 3, H, W], or rows [B, Di]
    tokens: Tensor  # one tokenised caption per picture, int64 [B, L], or rows [B, Dt]
    # Position and reason of each bad sample that was replaced.
    bad: tuple[tuple[int, str], ...] = ()
    caption_ids: Tensor | None = None  # int64 [B], equal for equal captions; None: not known

    def __len__(self) -> int:
        return self.index.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All of the tensors that it has."""
        tensors = [self.index, self.image, self.tokens]
        return tensors if self.caption_ids is None else [*tensors, self.caption_ids]

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies while the host continues."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            index=change(self.index),
            image=change(self.image),
            tokens=change(self.tokens),
            bad=self.bad,
            caption_ids=None if self.caption_ids is None else change(self.caption_ids),
        )


class BadSample(NamedTuple):
    """A sample that was left out when a data set was opened."""

    file: str  # for a table with the line
    key: str  # of the sample, or its row; "" where the file says it
    reason: str


@dataclass(frozen=True, eq=False)
class Facts:
    """What a data set says of itself, next to its pairs."""

    remote: bool = False  # whether any file comes from a URL
    has_captions: bool = True  # False: captions are made from the class, or not known
    has_pictures: bool = True  # False: there are only rows of features, and no files to show
    skipped: Sequence[BadSample] = ()
    skipped_share: float = 1.0  # a subset counts this share of ``skipped`` as its own
    left_out: Sequence[str] = ()  # what a folder holds that is not among its pairs, a line each
    shard_of: np.ndarray | None = None  # number of each pair's shard, int32 [N]
    window: int | None = None  # pairs that are shuffled by default, 0: all; None: not known

    @property
    def num_skipped(self) -> float:
        return self.skipped_share * len(self.skipped)


class PairDataset(ABC):
    """Pictures, each with at least one caption, by position."""

    name: str  # for messages and tables
    keys: Sequence[str]  # one per pair, unique and stable between runs
    labels: Mapping[str, Labels] = {}  # classifications, such as "group"
    facts = Facts()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Picture ``i`` in RGB; may be shared, so copy before changing it in place."""

    @abstractmethod
    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of picture ``i``, none empty; the first is the canonical one."""

    def path(self, i: int) -> str:
        """The file of picture ``i``; "" if it has none of its own."""
        return ""

    def container(self, i: int) -> str:
        """The file or URL that holds picture ``i``: its own, a shard or a parquet file; "" of
        built-in data."""
        return self.path(i)

    def picture_numbers(self) -> np.ndarray:
        """A number for each pair, int64 [N]; pairs known to share a picture have the same."""
        return np.arange(len(self))

    def prefetch(self, positions: np.ndarray) -> None:
        """Start to fetch what these pairs, int64 [M], will need."""
        return

    def marks(self, positions: np.ndarray) -> Iterator[bytes]:
        """What tells each of these pairs from a pair of other data, for a fingerprint."""
        for i in positions.tolist():
            yield self.keys[i].encode("utf-8", "surrogateescape")


class SelectedKeys(Sequence[str]):
    """The keys at ``indices``, int64 [M], of those of a data set, which are not copied."""

    def __init__(self, keys: Sequence[str], indices: np.ndarray) -> None:
        self._keys = keys
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._keys[j] for j in self._indices[i].tolist()]
        return self._keys[int(self._indices[i])]


class _View(PairDataset):
    """The pictures of a data set at ``indices``, int64 [M], in that order, with their labels."""

    def __init__(
        self, dataset: PairDataset, indices: Tensor | Sequence[int] | np.ndarray, name: str = ""
    ) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = name or dataset.name
        self.labels: Mapping[str, Labels] = {
            label: Labels(full.ids[torch.from_numpy(self.indices)], full.names)
            for label, full in dataset.labels.items()
        }

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, i: int) -> str:
        return self.dataset.path(int(self.indices[i]))

    def container(self, i: int) -> str:
        return self.dataset.container(int(self.indices[i]))

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(int(self.indices[i]))


class Subset(_View):
    """The pairs of a data set at ``indices``, int64 [M], in that order, with keys and labels."""

    def __init__(
        self, dataset: PairDataset, indices: Tensor | Sequence[int] | np.ndarray, name: str = ""
    ) -> None:
        super().__init__(dataset, indices, name)
        self.keys: Sequence[str] = SelectedKeys(dataset.keys, self.indices)
        facts = dataset.facts
        share = len(self.indices) / max(1, len(dataset))
        self.facts = replace(
            facts,
            skipped_share=share * facts.skipped_share,
            shard_of=None if facts.shard_of is None else facts.shard_of[self.indices],
        )

    def prefetch(self, positions: np.ndarray) -> None:
        self.dataset.prefetch(self.indices[positions])

    def picture_numbers(self) -> np.ndarray:
        return self.dataset.picture_numbers()[self.indices]

    def marks(self, positions: np.ndarray) -> Iterator[bytes]:
        return self.dataset.marks(self.indices[positions])

    def captions(self, i: int) -> tuple[str, ...]:
        return self.dataset.captions(int(self.indices[i]))


class Pictures(_View):
    """The pictures of some pairs, each once, with the captions of all of its pairs and the labels
    of the first."""

    def __init__(self, dataset: PairDataset, numbers: np.ndarray) -> None:
        """``numbers``, int64 [N]: the same for pairs that share a picture."""
        rows_of: dict[int, list[int]] = {}
        for row, number in enumerate(numbers.tolist()):
            rows_of.setdefault(number, []).append(row)
        self.rows = list(rows_of.values())
        first_rows = [rows[0] for rows in self.rows]
        super().__init__(dataset, first_rows)
        self.keys: Sequence[str] = StringTable(dataset.keys[row] for row in first_rows)
        self.facts = Facts(left_out=dataset.facts.left_out)

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(text for row in self.rows[i] for text in self.dataset.captions(row))


def each_picture_once(dataset: PairDataset) -> PairDataset:
    """The pictures, each with the captions of all of its pairs: a table may have a row for each."""
    numbers = dataset.picture_numbers()
    return dataset if len(np.unique(numbers)) == len(dataset) else Pictures(dataset, numbers)


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
