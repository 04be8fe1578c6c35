"""When to save, and how to stop: the clock of checkpoints, and signals that ask a run to end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from protoclip.distributed import world_size

SECONDS = {"s": 1, "m": 60, "h": 3600}
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
FIRST_CTRL_C = b"\nCtrl-C: finishing this step, then saving; press it again to end at once\n"


class Stopped(BaseException):
    """The run was asked to end, and has saved: not a failure.

    No Exception, for it may be raised anywhere: what takes any error of a decoder for a bad picture
    must let it through.

    Args:
        text: for the user.
        code: exit code of the command: 0, or 130 after Ctrl-C.
    """

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class SaveSchedule:
    """Whether a checkpoint is due.

    Args:
        text: "500steps", "90s", "10m", "2h", or "" for never.
    Raises:
        ValueError: anything else.
    """

    def __init__(self, text: str) -> None:
        self.steps, self.seconds = 0, 0.0
        if text:
            match = re.fullmatch(r"([1-9][0-9]*) ?(steps?|s|m|h)", text.strip())
            if match is None:
                raise ValueError(
                    f"--save-every: expected a number with steps, s, m or h, such as 500steps or "
                    f"10m, got {text!r}"
                )
            number, unit = int(match[1]), match[2]
            if unit in SECONDS:
                self.seconds = float(number * SECONDS[unit])
            else:
                self.steps = number
        self._last = time.monotonic()

    def at(self, step: int) -> bool:
        """Whether the number of steps asks for it: the same on every rank."""
        return bool(self.steps) and step % self.steps == 0

    def by_clock(self) -> bool:
        """Whether the time since the last one asks for it: each rank has its own clock."""
        return bool(self.seconds) and time.monotonic() - self._last >= self.seconds

    def saved(self) -> None:
        """Start the clock anew."""
        self._last = time.monotonic()


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and the first Ctrl-C set ``asked`` instead of ending the
    process; the second Ctrl-C ends it at once.

    Attributes:
        asked: name of the signal that came; "" for none.
        immediate: raise ``Stopped`` where the program stands, as nothing is to be saved there. Only
            in a process alone: others would wait for it, and all end at the next step agreed on.
    """

    def __init__(self) -> None:
        self.asked = ""
        self.immediate = True
        self._process = os.getpid()  # data workers inherit the handler
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = signal.Signals[name]
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        again, self.asked = self.asked == "SIGINT", signal.Signals(number).name
        if number == signal.SIGINT:
            if again or self.immediate:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # print() may be interrupted by this very signal
                os.write(2, FIRST_CTRL_C)
        elif self.immediate and world_size() == 1:
            self.immediate = False  # a second signal does not disturb the ending
            raise Stopped(f"stopped by {self.asked}; go on with --resume")

    @property
    def level(self) -> int:
        """0: go on; 1: stop; 2: stop after Ctrl-C."""
        return 2 if self.asked == "SIGINT" else int(bool(self.asked))
