"""Samples that cannot be used: named once, counted, and a clear stop when there are too many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from protoclip.data.types import DataError

NAMED = 20  # bad samples reported one by one; the rest are counted


class Faults:
    """The bad samples of a data set, as far as they are known.

    Args:
        name: of the data set.
        total: number of its samples, the unusable ones included.
        max_fraction: share of bad samples at which to stop.
        known: bad samples that were left out beforehand.
        report: told each new one in words.
    """

    def __init__(
        self,
        name: str,
        total: int,
        max_fraction: float,
        *,
        known: int = 0,
        report: Callable[[str], Any] = print,
    ) -> None:
        self.name, self.total, self.max_fraction = name, total, max_fraction
        self.known, self.report = known, report
        self.positions: set[int] = set()
        self._check("")

    @property
    def count(self) -> int:
        """Bad samples so far."""
        return self.known + len(self.positions)

    def add(self, position: int, reason: str) -> None:
        """Note a bad sample; the same one counts once.

        Raises:
            DataError: there are more than ``max_fraction`` allows.
        """
        if position in self.positions:
            return
        self.positions.add(position)
        if len(self.positions) <= NAMED:
            self.report(f"skipped sample {len(self.positions)}: {reason}")
        elif self.count % 1000 == 0:
            self.report(f"{self.count} of {self.total} samples skipped by now")
        self._check(reason)

    def _check(self, reason: str) -> None:
        if self.count > self.max_fraction * self.total:
            raise DataError(
                f"{self.name}: {self.count} of {self.total} samples cannot be used, more than "
                f"--max-bad-fraction {self.max_fraction:g}"
                + (f"; the last one: {reason}" if reason else "")
                + "; mend the data (python -m protoclip.data --check lists what is wrong), or "
                "allow more"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"positions": torch.tensor(sorted(self.positions), dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.positions = set(state["positions"].tolist())
