"""Arithmetic of a run: steps, episodes, which samples when, and the learning rate.

Everything follows from (seed, step): nothing here remembers what was asked before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.config import OptimConfig, TrainConfig
from protoclip.distributed import generator, own_slice, world_size

DRAWS = 1  # the generator stream of sample draws, as distinct from that of episodes
EPISODES = 2


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

    def steps_of(self, episode: int) -> range:
        """The steps of an episode; the run may end inside the last one."""
        start = episode * self.steps_per_episode
        return range(start, min(start + self.steps_per_episode, self.total_steps))


def make_plan(config: TrainConfig, samples: int) -> Plan:
    """The plan for a data set of ``samples``.

    Raises:
        ValueError: fewer samples than a batch, an episode shorter than a batch, or no steps at all.
    """
    times = config.optim.accum_freq * world_size()
    batch, episode = config.optim.batch_size * times, config.episode.size
    if samples < batch:
        fewer = samples // (4 * times)
        made_of = f" ({config.optim.batch_size} x {times})" if times > 1 else ""
        raise ValueError(
            f"--batch-size: expected at most the number of samples, got {batch}{made_of} for "
            f"{samples}; "
            + (f"use --batch-size {max(2, fewer)} or more data" if samples > 1 else "add data")
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
        raise ValueError("--epochs: expected more than 0, got 0; nothing would be trained")
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

    Without replacement each epoch is one permutation; its last batch is filled from its beginning,
    so that no batch holds a sample twice. ``order`` makes the epoch, int64 [plan.samples], in
    another way.
    """
    parts = []
    first, last = steps.start // plan.steps_per_epoch, (steps.stop - 1) // plan.steps_per_epoch
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


def learning_rate(config: OptimConfig, total_steps: int, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up to ``lr``, then half a cosine to 0, or constant."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    if step < warmup:
        return config.lr * (step + 1) / math.ceil(warmup)
    if config.lr_scheduler == "const":
        return config.lr
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def own_draws(plan: Plan, draws: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of each step's draws, and their numbers in ``draws``: int64 [M] each.

    Ranks' shares of a step are contiguous and, by ``make_plan``, equal.
    """
    numbers = torch.arange(len(draws)).view(-1, plan.batch_size)[:, own_slice(plan.batch_size)]
    return draws[numbers.flatten()], numbers.flatten()
