"""When a run saves, and how it stops: --save-every, SIGTERM, SIGUSR1 and Ctrl-C.

Several ranks agree on both, so that none saves or ends alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from protoclip.common.signals import Stopped, StopSignals
from protoclip.common.waits import Wait
from protoclip.data import Batch
from protoclip.distributed import is_distributed, max_later
from protoclip.training.run import Run
from protoclip.training.schedule import parse_interval


class Stops(StopSignals):
    """Saves and stops a run after each step for which it is time, the same on all ranks.

    Args:
        save: writes a checkpoint, and if it gets the number of an epoch keeps it under that, too.
    Attributes:
        saved_step: after which the run was last saved; -1: not yet.
    """

    def __init__(self, run: Run, save: Callable[[int | None], None]) -> None:
        super().__init__()
        self.run = run
        self.save = save
        self.saved_step = -1
        self._saved_time = time.monotonic()
        self._every_steps, self._every_seconds = parse_interval(run.config.run.save_every)
        # What the ranks want, on its way while they take a step: to save; to stop by a signal.
        self._wanted: Callable[[], Tensor] = lambda: torch.zeros(2)

    def after(self, step: int) -> None:
        """Save if it is time, and raise Stopped if a signal came. Signals and the clock count one
        step later, when all ranks know of them. A collective call."""
        by_time, received = map(int, self._wanted().tolist())
        epoch = self._epoch_to_keep(step)
        is_first = self.saved_step < 0 and bool(self._every_steps or self._every_seconds)
        by_step = bool(self._every_steps) and step % self._every_steps == 0
        if by_time or received or is_first or by_step or epoch is not None:
            self.save(epoch)
        if received:
            words = f"after step {step}; continue with --resume {self.run.folder.path}"
            raise Stopped(received, words)
        seconds = time.monotonic() - self._saved_time  # by this rank's clock
        wanted = [0 < self._every_seconds <= seconds, self.received]
        self._wanted = max_later(torch.tensor(wanted, dtype=torch.float32))

    def inside(self, stream: Iterable[Batch], step: int, what: str) -> Iterator[Batch]:
        """Pass a stream of batches on. It may take minutes, so a single process can stop inside
        it: nothing has changed since ``step``."""
        with Wait(what, unit="batches") as wait:
            for batch in stream:
                yield batch
                wait.update()
                if self.received and not is_distributed():
                    self.after(step)

    def saved(self, step: int) -> None:
        """Restart the interval: the run was saved after ``step``."""
        self.saved_step = step
        self._saved_time = time.monotonic()

    def _epoch_to_keep(self, step: int) -> int | None:
        """The epoch that ends with ``step`` if --save-frequency keeps it."""
        frequency = self.run.config.run.save_frequency
        epoch = math.ceil(step / self.run.plan.steps_per_epoch)
        if frequency and epoch % frequency == 0 and self.run.plan.ends_pass(step):
            return epoch
        return None
