"""Signals that end a command between two pieces of its work: SIGTERM, SIGUSR1 and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

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


def stop_if_asked(signals: StopSignals, words: str) -> None:
    """Raise Stopped, with words that say how far the run came, if there was a signal."""
    if signals.received:
        by_ctrl_c = signals.received == "SIGINT"
        signal = "Ctrl-C" if by_ctrl_c else signals.received
        raise Stopped(f"stopped by {signal} {words}", code=130 if by_ctrl_c else 0)
