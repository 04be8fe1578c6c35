"""When to save, and how to stop: the clock of checkpoints, and signals that ask a run to end."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from protoclip.distributed import max_over_ranks, world_size

SECONDS = {"s": 1, "m": 60, "h": 3600}
AGREE_EVERY = 10  # steps between two questions to the other ranks whether to stop or save
SIGNALS = ("SIGTERM", "SIGUSR1")


class Stopped(BaseException):
    """The run was asked to end, and has saved: not a failure.

    No Exception, for it may be raised anywhere: what takes any error of a decoder for a bad picture
    must let it through.
    """


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
    """While entered, SIGTERM and SIGUSR1 set ``asked`` instead of ending the process.

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
        self.asked = signal.Signals(number).name
        if self.immediate and os.getpid() == self._process and world_size() == 1:
            self.immediate = False  # a second signal does not disturb the ending
            raise Stopped(f"stopped by {self.asked}; go on with --resume")


def agree(step: int, *wishes: bool) -> list[bool]:
    """The wishes of any rank, known to all: what one asks for, every one does at the same step.

    With several ranks the question is put every ``AGREE_EVERY`` steps; in between the answer is no.
    """
    if world_size() == 1:
        return list(wishes)
    if step % AGREE_EVERY:
        return [False] * len(wishes)
    votes = torch.tensor([float(wish) for wish in wishes])
    return [bool(vote) for vote in max_over_ranks(votes).tolist()]
