"""What the data layer hands out: pairs, labels, batches, and the one error it raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class DataError(ValueError):
    """A fault of the data: the message names the file, row or key and says what to do."""


@dataclass(frozen=True, eq=False)
class Labels:
    """One classification of a data set.

    Attributes:
        ids: class of each pair, int64 [N], positions in ``names``.
        names: class names; a class may have no pair (in a subset).
    """

    ids: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs ready for the model.

    Attributes:
        index: position in the data set, int64 [B].
        image: normalised pictures, float32 [B, 3, H, W].
        tokens: one tokenised caption per picture, int64 [B, L].
        bad: position and reason of each sample that another one stands in for.
    """

    index: Tensor
    image: Tensor
    tokens: Tensor
    bad: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return self.index.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        index, image, tokens = (
            part.to(device, non_blocking=non_blocking)
            for part in (self.index, self.image, self.tokens)
        )
        return Batch(index, image, tokens, self.bad)


class PairDataset(Protocol):
    """Pictures, each with at least one caption, by position.

    Attributes:
        name: for messages and tables.
        keys: one per pair, unique and stable between runs.
        labels: classifications by name, such as "group"; {} when unknown.
    """

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Mapping[str, Labels]: ...

    def __len__(self) -> int: ...
    def image(self, i: int) -> Image.Image:
        """Picture ``i`` in RGB; may be shared, so copy before changing it in place."""

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions of picture ``i``, none empty; the first is the canonical one."""


class Subset:
    """Some pairs of a data set, in the given order, with their keys and labels.

    Args:
        dataset: where the pairs come from.
        indices: positions in ``dataset``, int64 [M].
        name: for messages and tables; default the name of ``dataset``.
    """

    def __init__(
        self, dataset: PairDataset, indices: Tensor | Sequence[int] | np.ndarray, name: str = ""
    ) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        if self.indices.size and not 0 <= self.indices.min() <= self.indices.max() < len(dataset):
            raise ValueError(
                f"Subset: indices must lie in 0 ... {len(dataset) - 1}, got "
                f"{self.indices.min()} ... {self.indices.max()}"
            )
        self.name = name or dataset.name
        self.keys: Sequence[str] = _Taken(dataset.keys, self.indices)
        self.labels: Mapping[str, Labels] = {
            label: Labels(full.ids[torch.from_numpy(self.indices)], full.names)
            for label, full in dataset.labels.items()
        }
        for name in ("shard_of", "source_of"):
            if (full_column := getattr(dataset, name, None)) is not None:
                setattr(self, name, full_column[self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def prefetch(self, positions: np.ndarray) -> None:
        """Tell the data set, where it cares, which pairs, int64 [M], come next."""
        if (inner := getattr(self.dataset, "prefetch", None)) is not None:
            inner(self.indices[positions])

    def image(self, i: int) -> Image.Image:
        return self.dataset.image(int(self.indices[i]))

    def captions(self, i: int) -> tuple[str, ...]:
        return self.dataset.captions(int(self.indices[i]))


class _Taken(Sequence[str]):
    """``[values[i] for i in indices]``, without the list."""

    def __init__(self, values: Sequence[str], indices: np.ndarray) -> None:
        self.values = values
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        if isinstance(i, slice):
            return _Taken(self.values, self.indices[i])
        return self.values[int(self.indices[i])]
