"""Signals that end a command: SIGTERM, SIGUSR1 and Ctrl-C. Its exit code is then 128 and the number
of the signal, as a shell shows it of a process that has no handler."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, TypeVar

Context = TypeVar("Context", bound="Signals")
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
FIRST_CTRL_C = b"\nCtrl-C: finishing this step, then saving; press it again to end at once\n"


class Stopped(SystemExit):
    """The command was asked to stop and has saved.

    It ends a script that does not catch it without a traceback, with the command's exit code; like
    Ctrl-C's own exception, it is not caught by ``except Exception``.

    Args:
        number: of the signal.
        words: how far the command came, and what continues it.
    """

    code: int

    def __init__(self, number: int, words: str) -> None:
        super().__init__(128 + number)
        self.message = f"stopped by {name_of(number)} {words}"


class Interrupted(KeyboardInterrupt):
    """A signal ends the command at once, SIGTERM and SIGUSR1 as Ctrl-C does.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Inside this context SIGTERM, SIGUSR1 and Ctrl-C raise ``Interrupted``.

    Attributes:
        received: the number of the last signal; 0: none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self: Context) -> Context:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        raise Interrupted(number)


class StopSignals(Signals):
    """Inside this context SIGTERM, SIGUSR1 and the first Ctrl-C only set ``received``; a second
    Ctrl-C ends the command at once."""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_second_ctrl_c = number == self.received == signal.SIGINT
        self.received = number
        if is_second_ctrl_c:
            raise Interrupted(number)
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # print() may be interrupted by this very signal
                os.write(2, FIRST_CTRL_C)


class EarlySignals(Signals):
    """Inside this context, in which modules are imported, the signals end the process at once: an
    exception could end up anywhere in torch's import."""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"protoclip: interrupted by {name_of(number)}\n".encode())
        os._exit(128 + number)


def name_of(number: int) -> str:
    """ "SIGTERM", "SIGUSR1" or "Ctrl-C"."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def stop_if_asked(signals: StopSignals, words: str) -> None:
    """Raise Stopped, with words that say how far the command came, if there was a signal."""
    if signals.received:
        raise Stopped(signals.received, words)


def become_worker(number: int = 0) -> None:
    """In a new process: leave signals to the one that started it, which still needs its work, and
    end with that one, even if it is killed. ``number``: of the worker, as torch passes it."""
    for signal_number in NUMBERS:
        signal.signal(signal_number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    this, parent = multiprocessing.current_process(), multiprocessing.parent_process()
    is_forked = type(this).__name__ == "ForkProcess"  # a server's children have another parent
    if is_forked and parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # killed before the line above


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """In a new process: have Linux send a signal when the one that started it ends, even if that is
    killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
