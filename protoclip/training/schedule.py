"""The schedule of a run: steps, episodes, samples, learning rate.

Everything follows from (seed, step): there is no state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip.common.seeds import generator
from protoclip.data import Draws
from protoclip.data.loader import Mixup
from protoclip.distributed import own_slice, world_size
from protoclip.settings.config import OptimConfig, TrainConfig

# Streams of random numbers: samples, and an episode's draws.
DRAWS = 1
EPISODES = 2
# Purposes of an episode's draws.
TRAINING = 0
FEATURES = 1
CLUSTERS = 2


@dataclass(frozen=True)
class Plan:
    """How a data set is cut into steps; batches are full, an epoch sees every sample."""

    samples: int
    global_batch_size: int  # of a step, over all ranks and forward passes
    steps_per_epoch: int
    steps_per_episode: int
    total_steps: int

    @property
    def episodes(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_episode)

    @property
    def epochs(self) -> float:
        """Passes over the data, of the whole run."""
        return self.total_steps * self.global_batch_size / self.samples

    def ends_pass(self, step: int) -> bool:
        """Whether a pass over the data ends with ``step``. The run may end before the last pass has
        filled up its batches, with all the samples that --epochs asks for."""
        passes = math.ceil(step / self.steps_per_epoch)
        return step % self.steps_per_epoch == 0 or (
            step == self.total_steps and self.epochs >= passes
        )

    def episode_samples(self, pairs: int) -> int:
        """Samples per episode of so many pairs, at most; the last episode may be shorter."""
        return min(pairs, self.steps_per_episode * self.global_batch_size)

    def episode_of(self, step: int) -> int:
        """The number of the episode that a step belongs to."""
        return step // self.steps_per_episode

    def begins_episode(self, step: int) -> bool:
        return step % self.steps_per_episode == 0

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
    global_batch_size = config.optim.batch_size * parts
    episode_size = config.episode.size
    if samples < global_batch_size:
        raise ValueError(
            f"--batch-size: expected at most {samples} in all, got {config.optim.batch_size} x "
            f"{parts} passes and ranks; use --batch-size {max(2, samples // (4 * parts))}"
        )
    if episode_size and episode_size < global_batch_size:
        raise ValueError(
            f"--episode-size: expected at least one batch of {global_batch_size}, got "
            f"{episode_size}; use 0 for one epoch, or a smaller --batch-size"
        )
    steps_per_epoch = math.ceil(samples / global_batch_size)
    total_steps = math.ceil(config.optim.epochs * samples / global_batch_size)
    if config.optim.max_steps:
        total_steps = min(total_steps, config.optim.max_steps)
    if total_steps == 0:
        raise ValueError("--epochs: expected more than 0, got 0")
    steps_per_episode = steps_per_epoch
    if episode_size:
        steps_per_episode = math.ceil(min(episode_size, samples) / global_batch_size)
    return Plan(
        samples=samples,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps_per_epoch,
        steps_per_episode=steps_per_episode,
        total_steps=total_steps,
    )


def draw(
    plan: Plan,
    seed: int,
    steps: range,
    *,
    replacement: bool = False,
    order: Callable[[torch.Generator], Tensor] | None = None,
) -> Tensor:
    """Positions of the samples of ``steps``, int64 [len(steps) * global_batch_size].

    Without replacement each epoch is one permutation; its last batch is filled up from the start
    of the epoch, so that no batch holds a sample twice. ``order``, if given, makes the permutation
    of an epoch, int64 [plan.samples].
    """
    parts = []
    first_epoch = steps.start // plan.steps_per_epoch
    last_epoch = (steps.stop - 1) // plan.steps_per_epoch
    draws_per_epoch = plan.steps_per_epoch * plan.global_batch_size
    for epoch in range(first_epoch, last_epoch + 1):
        random = generator(seed, DRAWS, epoch)
        if replacement:
            parts.append(torch.randint(plan.samples, (draws_per_epoch,), generator=random))
        else:
            permutation = order(random) if order else torch.randperm(plan.samples, generator=random)
            parts.append(torch.cat([permutation, permutation[: draws_per_epoch - plan.samples]]))
    start = (steps.start - first_epoch * plan.steps_per_epoch) * plan.global_batch_size
    return torch.cat(parts)[start : start + len(steps) * plan.global_batch_size]


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


def own_draws(plan: Plan, config: TrainConfig, draws: Tensor, step: int) -> Draws:
    """This rank's share of an episode's ``draws``, from ``step`` on.

    The ranks' shares of a step are contiguous and, by ``make_plan``, equal.
    """
    numbers_by_step = torch.arange(len(draws)).view(-1, plan.global_batch_size)
    draw_numbers = numbers_by_step[:, own_slice(plan.global_batch_size)].flatten()
    done = step % plan.steps_per_episode  # before an interruption
    mixup = None
    if config.data.mixup:
        mixup = Mixup(config.data.mixup, draws, plan.global_batch_size)
    return Draws(
        positions=draws[draw_numbers],
        seed=episode_seed(config.run.seed, plan.episode_of(step), TRAINING),
        start=done * plan.global_batch_size // world_size(),
        numbers=draw_numbers,
        mixup=mixup,
    )


def episode_seed(seed: int, episode_number: int, purpose: int) -> int:
    """The seed for one purpose, TRAINING or FEATURES, in an episode."""
    random = generator(seed, EPISODES, episode_number, purpose)
    return int(torch.randint(2**31, (), generator=random))


def parse_interval(text: str) -> tuple[int, float]:
    """Parse --save-every: "500steps", "90s", "10m", "2h", or "0" for never. Returns the steps and
    the seconds between saves, one of them, or none, above 0.

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
        return 0, number * seconds_per_unit[match[2]]
    return number, 0.0
