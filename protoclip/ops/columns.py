"""Whose columns a loss compares its rows with: those of this process, or of all ranks of a group.

A rank owns the rows of its queries in the matrix of logits [N, M]. It gathers the other side, sums
its rows and its share of every column, all-reduces the column sums, and reduce-scatters the
gradient of what it gathered; no rank holds a [N, M] matrix. Gradients are those of the sum of all
ranks' losses, which DDP's mean over ranks turns into those of the mean loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from protoclip import distributed


@dataclass(frozen=True)
class Local:
    """The columns of this process alone: every method gives back what it gets."""

    name: str = ""  # of the process group, for the schema of an op
    rank: int = 0
    size: int = 1

    def first(self, count: int) -> int:
        """The position of this rank's first row where every rank has ``count``."""
        return self.rank * count

    def gather(self, rows: Tensor) -> Tensor:
        """[M, ...] of each rank -> those of all ranks, with a gradient."""
        return rows

    def merged(self, statistics: Tensor) -> Tensor:
        """Statistics of all columns, from those over this rank's rows: a reference of base-2 logits
        and sums, the first of 2^(logit - reference)."""
        return statistics

    def own(self, by_column: Tensor) -> Tensor:
        """What belongs to this rank's columns, of values [..., all columns]."""
        return by_column

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks, in place; no gradient."""
        return value


LOCAL = Local()


@dataclass(frozen=True)
class Group(Local):
    """The columns of all ranks of a process group, in the order of its ranks."""

    group: dist.ProcessGroup | None = None

    def gather(self, rows: Tensor) -> Tensor:
        return distributed.gathered_rows(rows, self.group)

    def merged(self, statistics: Tensor) -> Tensor:
        reference, exponentials, others = statistics.tensor_split([1, 2])
        top = distributed.max_over_ranks(reference.clone(), self.group)
        sums = torch.cat([exponentials * torch.exp2(reference - top), others])
        return torch.cat([top, distributed.sum_over_ranks(sums, self.group)])

    def own(self, by_column: Tensor) -> Tensor:
        return by_column.tensor_split(self.size, dim=-1)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        return distributed.mean_over_ranks(value, self.group)


def columns_of(op: str, group: Any, rows: Tensor) -> Local:
    """The columns of a loss with this argument ``group``, None or a process group, whose ranks each
    have as many ``rows``.

    Raises:
        TypeError: ``group`` is something else; this process may be none of the group's.
        ValueError: the ranks have different numbers of rows.
    """
    if group is None:
        return LOCAL
    check_group(op, group)
    if group.size() == 1:
        return LOCAL
    distributed.check_equal_rows(op, rows, group)
    return Group(group.group_name, group.rank(), group.size(), group)


def check_group(op: str, group: Any) -> None:
    """Require a process group of this process."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: expected group as a process group that this process belongs to, got "
            f"{group!r}; pass torch.distributed.group.WORLD, or call the loss only on the ranks of "
            "a new_group"
        )


def columns_named(name: str) -> Local:
    """The columns of an op with this ``group_name``; "": of this process."""
    if not name:
        return LOCAL
    group = distributed.group_named(name)
    return Group(name, group.rank(), group.size(), group)
