"""When a run saves, and how it stops: --save-every, SIGTERM, SIGUSR1 and Ctrl-C.

Several ranks agree on both, so that none saves or ends alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any, NamedTuple

import torch

from protoclip.distributed import max_later

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


class SaveInterval(NamedTuple):
    """How often to save: every so many steps, or seconds, or (both 0) not at all."""

    steps: int
    seconds: float

    @property
    def never(self) -> bool:
        return not (self.steps or self.seconds)


def parse_interval(text: str) -> SaveInterval:
    """Parse --save-every: "500steps", "90s", "10m", "2h", or "0" for never.

    Raises:
        ValueError: any other text.
    """
    match = re.fullmatch(r"([1-9]\d*) ?(steps?|s|m|h)|0|", text.strip())
    if match is None:
        raise ValueError(
            "--save-every: expected a number with steps, s, m or h (500steps, 10m), or 0 for only "
            f"at the end, got {text!r}"
        )
    number = int(match[1] or 0)
    seconds_per_unit = {"s": 1.0, "m": 60.0, "h": 3600.0}
    if match[2] in seconds_per_unit:
        return SaveInterval(steps=0, seconds=number * seconds_per_unit[match[2]])
    return SaveInterval(steps=number, seconds=0.0)


class StopRequest(IntEnum):
    """Whether a rank wants to stop, and why; of several ranks the largest counts."""

    NONE = 0
    SIGNAL = 1
    CTRL_C = 2


class Requests(NamedTuple):
    """What should happen between two steps."""

    save: bool
    stop: StopRequest


def agree_later(requests: Requests) -> Callable[[], Requests]:
    """Start to tell all ranks; call the result to wait for what they request together."""
    pending = max_later(torch.tensor([float(requests.save), float(requests.stop)]))

    def wait() -> Requests:
        save, stop = pending().tolist()
        return Requests(save=bool(save), stop=StopRequest(int(stop)))

    return wait


class StopSignals:
    """Inside this context SIGTERM, SIGUSR1 and the first Ctrl-C only set ``received`` to the
    signal's name; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        second_ctrl_c = number == signal.SIGINT and self.received == "SIGINT"
        self.received = signal.Signals(number).name
        if second_ctrl_c:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # print() may be interrupted by this very signal
                os.write(2, FIRST_CTRL_C)

    @property
    def request(self) -> StopRequest:
        """What this rank wants."""
        if self.received == "SIGINT":
            return StopRequest.CTRL_C
        return StopRequest.SIGNAL if self.received else StopRequest.NONE


class SaveTimes:
    """Says between steps whether to save and whether to stop, the same on all ranks.

    Args:
        save_every: --save-every.
    Attributes:
        saved_step: after which the run was last saved; -1: not yet.
    """

    def __init__(self, save_every: str, signals: StopSignals) -> None:
        self.saved_step = -1
        self._saved_time = time.monotonic()
        self._every = parse_interval(save_every)
        self._signals = signals
        nothing = Requests(save=False, stop=StopRequest.NONE)
        self._agreed: Callable[[], Requests] = lambda: nothing

    def mark_saved(self, step: int) -> None:
        """Restart the interval: the run was saved after ``step``."""
        self.saved_step = step
        self._saved_time = time.monotonic()

    def requests_after(self, step: int) -> Requests:
        """What to do after ``step``: what the ranks agreed on one step ago; also save every so many
        steps, and the first time after one step."""
        agreed = self._agreed()
        is_first = self.saved_step < 0 and not self._every.never
        by_step = self._every.steps and step % self._every.steps == 0
        return Requests(save=bool(agreed.save or is_first or by_step), stop=agreed.stop)

    def exchange_requests(self) -> None:
        """Tell all ranks what this one wants, for the next ``requests_after``."""
        seconds = time.monotonic() - self._saved_time  # by this rank's clock
        due = 0 < self._every.seconds <= seconds
        self._agreed = agree_later(Requests(save=due, stop=self._signals.request))
