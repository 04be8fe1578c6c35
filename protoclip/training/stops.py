"""When a run saves, and how it stops: --save-every, SIGTERM, SIGUSR1 and Ctrl-C.

Several ranks agree on both, so that none saves or ends alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoclip.distributed import max_later
from protoclip.training.run import Run
from protoclip.training.schedule import parse_interval

FIRST_CTRL_C = b"\nCtrl-C: finishing this step, then saving; press it again to end at once\n"


class Stopped(SystemExit):
    """The run was asked to stop and has saved.

    It ends a script that does not catch it without a traceback, with ``protoclip train``'s exit
    code; like Ctrl-C's own exception, it is not caught by ``except Exception``.
    """

    code: int

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message


class AfterStep(NamedTuple):
    """What all ranks do between two steps."""

    save: bool
    epoch: int | None  # keep the checkpoint under this number too
    stop: Stopped | None  # what to raise, once the run is saved


class Stops:
    """Says after each step whether to save and whether to stop, the same on all ranks.

    Inside its context SIGTERM, SIGUSR1 and the first Ctrl-C only set ``received`` to the signal's
    name; a second Ctrl-C ends the process at once.

    Attributes:
        saved_step: after which the run was last saved; -1: not yet.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.received = ""
        self.saved_step = -1
        self._saved_time = time.monotonic()
        self._every = parse_interval(run.config.run.save_every)
        # What the ranks want, on its way while they take a step: to save; to stop, by any signal
        # and by Ctrl-C.
        self._wanted: Callable[[], Tensor] = lambda: torch.zeros(3)
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        second_ctrl_c = number == signal.SIGINT and self.received == "SIGINT"
        self.received = signal.Signals(number).name
        if second_ctrl_c:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # print() may be interrupted by this very signal
                os.write(2, FIRST_CTRL_C)

    def after(self, step: int) -> AfterStep:
        """What to do after ``step``. Signals and the clock count one step later, when all ranks
        know of them. A collective call."""
        by_time, stop, by_ctrl_c = map(bool, self._wanted().tolist())
        epoch = self._epoch_to_keep(step)
        is_first = self.saved_step < 0 and not self._every.never
        by_step = bool(self._every.steps) and step % self._every.steps == 0
        save = by_time or stop or is_first or by_step or epoch is not None
        if stop:
            signal_name = "Ctrl-C" if by_ctrl_c else self.received or "a signal to another rank"
            message = (
                f"stopped by {signal_name} after step {step}; continue with --resume "
                f"{self.run.folder.path}"
            )
            return AfterStep(save, epoch, Stopped(message, code=130 if by_ctrl_c else 0))
        seconds = time.monotonic() - self._saved_time  # by this rank's clock
        is_time = not save and 0 < self._every.seconds <= seconds
        wanted = [is_time, bool(self.received), self.received == "SIGINT"]
        self._wanted = max_later(torch.tensor(wanted, dtype=torch.float32))
        return AfterStep(save, epoch, None)

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
