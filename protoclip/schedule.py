"""The schedule of a run: steps, episodes, samples, learning rate, checkpoints, and stopping.

Apart from the clock and the signals, everything follows from (seed, step): there is no state.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from protoclip.config import OptimConfig, TrainConfig
from protoclip.distributed import own_slice, world_size
from protoclip.seeds import generator

# Streams of random numbers: samples, and an episode's draws.
DRAWS = 1
EPISODES = 2
# Purposes of an episode's draws.
TRAINING = 0
FEATURES = 1
CLUSTERS = 2
FIRST_CTRL_C = b"\nCtrl-C: finishing this step, then saving; press it again to end at once\n"


@dataclass(frozen=True)
class Plan:
    """How a data set is cut into steps; batches are full, an epoch sees every sample."""

    samples: int
    batch_size: int  # of a step, over all ranks
    steps_per_epoch: int
    steps_per_episode: int
    total_steps: int

    @property
    def episodes(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_episode)

    @property
    def passes(self) -> float:
        """Passes over the data, of the whole run."""
        return self.total_steps * self.batch_size / self.samples

    def first_step_with_prototypes(self, warmup: int, second_pass: bool) -> int:
        """The step that trains prototypes first: after ``warmup`` episodes and, with
        ``second_pass``, in the second pass over the data, when its samples have stored features."""
        if not second_pass:
            return warmup * self.steps_per_episode
        episode = max(warmup, self.steps_per_epoch // self.steps_per_episode)
        return max(episode * self.steps_per_episode, self.steps_per_epoch)

    def steps_of(self, episode: int) -> range:
        """The steps of an episode; the run may end inside the last one."""
        start = episode * self.steps_per_episode
        return range(start, min(start + self.steps_per_episode, self.total_steps))


def make_plan(config: TrainConfig, samples: int) -> Plan:
    """The plan for a data set of ``samples``.

    Raises:
        ValueError: fewer samples than a batch, an episode shorter than a batch, or no steps at all.
    """
    parts = config.optim.accum_freq * world_size()  # passes and ranks
    batch = config.optim.batch_size * parts
    episode = config.episode.size
    if samples < batch:
        raise ValueError(
            f"--batch-size: expected at most {samples} in all, got {config.optim.batch_size} x "
            f"{parts} passes and ranks; use --batch-size {max(2, samples // (4 * parts))}"
        )
    if episode and episode < batch:
        raise ValueError(
            f"--episode-size: expected at least one batch of {batch}, got {episode}; "
            "use 0 for one epoch, or a smaller --batch-size"
        )
    per_epoch = math.ceil(samples / batch)
    total = math.ceil(config.optim.epochs * samples / batch)
    if config.optim.max_steps:
        total = min(total, config.optim.max_steps)
    if total == 0:
        raise ValueError("--epochs: expected more than 0, got 0")
    per_episode = math.ceil(min(episode, samples) / batch) if episode else per_epoch
    return Plan(samples, batch, per_epoch, per_episode, total)


def draw(
    plan: Plan,
    seed: int,
    steps: range,
    *,
    replacement: bool = False,
    order: Callable[[torch.Generator], Tensor] | None = None,
) -> Tensor:
    """Positions of the samples of ``steps``, int64 [len(steps) * batch_size].

    Without replacement each epoch is one permutation; its last batch is filled up from the start
    of the epoch, so that no batch holds a sample twice. ``order``, if given, makes the permutation
    of an epoch, int64 [plan.samples].
    """
    parts = []
    first = steps.start // plan.steps_per_epoch
    last = (steps.stop - 1) // plan.steps_per_epoch
    per_epoch = plan.steps_per_epoch * plan.batch_size
    for epoch in range(first, last + 1):
        random = generator(seed, DRAWS, epoch)
        if replacement:
            parts.append(torch.randint(plan.samples, (per_epoch,), generator=random))
        else:
            permutation = order(random) if order else torch.randperm(plan.samples, generator=random)
            parts.append(torch.cat([permutation, permutation[: per_epoch - plan.samples]]))
    start = (steps.start - first * plan.steps_per_epoch) * plan.batch_size
    return torch.cat(parts)[start : start + len(steps) * plan.batch_size]


def learning_rate(
    config: OptimConfig, total_steps: int, step: int, end: int | None = None
) -> float:
    """Learning rate at ``step``: linear warm-up to ``lr``, then half a cosine to 0, or constant.

    The cosine reaches 0 at step ``end``, by default the run's last, and stays there.
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    if step < warmup:
        return config.lr * (step + 1) / math.ceil(warmup)
    if config.lr_scheduler == "const":
        return config.lr
    progress = (step - warmup) / max(1.0, (total_steps if end is None else end) - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def image_learning_rate(config: TrainConfig, plan: Plan, step: int) -> float:
    """The image tower's learning rate; its cosine ends when the tower is locked (LiT)."""
    end = plan.total_steps
    if config.episode.lit_start:
        end = min(end, config.episode.lit_start * plan.steps_per_episode)
    return learning_rate(config.optim, plan.total_steps, step, end)


def own_draws(plan: Plan, draws: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of each step's draws, and their numbers in ``draws``: int64 [M] each.

    The ranks' shares of a step are contiguous and, by ``make_plan``, equal.
    """
    numbers = torch.arange(len(draws)).view(-1, plan.batch_size)[:, own_slice(plan.batch_size)]
    return draws[numbers.flatten()], numbers.flatten()


def episode_seed(seed: int, number: int, purpose: int) -> int:
    """The seed for one purpose, TRAINING or FEATURES, in episode ``number``."""
    return int(torch.randint(2**31, (), generator=generator(seed, EPISODES, number, purpose)))


class Stopped(Exception):
    """The run was asked to stop and has saved."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.message = message
        self.code = code


def parse_interval(text: str) -> tuple[int, float]:
    """Parse --save-every: "500steps", "90s", "10m" or "2h" -> steps and seconds, one of them 0.

    Raises:
        ValueError: any other text except "", which gives 0 for both.
    """
    match = re.fullmatch(r"([1-9]\d*) ?(steps?|s|m|h)|", text.strip())
    if match is None:
        raise ValueError(
            f"--save-every: expected a number with steps, s, m or h (500steps, 10m), got {text!r}"
        )
    number = int(match[1] or 0)
    seconds_per_unit = {"s": 1.0, "m": 60.0, "h": 3600.0}
    if match[2] in seconds_per_unit:
        return 0, number * seconds_per_unit[match[2]]
    return number, 0.0


class StopSignals:
    """Inside this context SIGTERM, SIGUSR1 and the first Ctrl-C only set ``asked`` to the signal's
    name; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.asked = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        second_ctrl_c = number == signal.SIGINT and self.asked == "SIGINT"
        self.asked = signal.Signals(number).name
        if second_ctrl_c:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # print() may be interrupted by this very signal
                os.write(2, FIRST_CTRL_C)

    @property
    def level(self) -> int:
        """0: go on; 1: stop; 2: stop after Ctrl-C."""
        return 2 if self.asked == "SIGINT" else int(bool(self.asked))
