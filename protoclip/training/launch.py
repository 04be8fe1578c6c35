"""What the ranks other than 0 are to a training run."""

from __future__ import annotations

from pathlib import Path

import torch

from protoclip import distributed


class OtherRank:
    """The run folder as ranks other than 0 see it: they write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def say(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def metrics(self, step: int, samples: int, scalars: object) -> None: ...
    def checkpoint(self, payload: object, epoch: int | None) -> None: ...
    def close(self) -> None: ...


def seed_rank(seed: int) -> None:
    """Dropout of its own for every rank; rank 0 goes on as a process alone."""
    if not distributed.is_main():
        torch.manual_seed(seed + distributed.rank())
