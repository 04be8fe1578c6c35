"""What training writes as it goes: lines of metrics and progress, and the steps it skipped."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from protoclip import distributed
from protoclip.common.phases import Phases
from protoclip.data.loader import Faults
from protoclip.model import ProtoModel
from protoclip.runs.run_folder import NullRunFolder
from protoclip.settings.config import TrainConfig
from protoclip.training.schedule import Plan
from protoclip.training.step import Step, Stepper


class Log:
    """Writes a run's lines; reads the device only when a line is due.

    Attributes:
        loss: as last written.
        episode_metrics: of a new episode, until the next line holds them.
    """

    def __init__(self, config: TrainConfig, plan: Plan, phases: Phases) -> None:
        self.every = config.run.log_every_n_steps
        self.dedup = config.loss.dedup
        self.plan = plan
        self.phases = phases
        self.loss = math.nan
        self.episode_metrics: Mapping[str, float] = {}
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the clocks of a process that goes on after ``step``."""
        self._began_time = time.perf_counter()
        self._began_step = step
        self.pause(step)

    def pause(self, step: int) -> None:
        """Leave the time since the last line out of the next line's rate."""
        self._logged_time = time.perf_counter()
        self._logged_step = step

    def due(self, step: int) -> bool:
        """Whether a line is written after ``step`` steps."""
        return step == self.plan.total_steps or step % self.every == 0

    def resume(self, step: int, episode_metrics: Mapping[str, float]) -> None:
        """Continue after ``step``: the metrics of its episode are due if no line has held them."""
        first = step // self.plan.steps_per_episode * self.plan.steps_per_episode
        if first < step and first // self.every == step // self.every:
            self.episode_metrics = episode_metrics

    def write(
        self, folder: NullRunFolder, step: int, scalars: Mapping[str, Tensor], lr: float
    ) -> None:
        """Read the device once; write one line of metrics and one line of progress. A collective
        call; ``scalars`` on the device, of which the means over ranks are written."""
        plan = self.plan
        now = time.perf_counter()
        samples_per_second = (
            (step - self._logged_step) * plan.global_batch_size / (now - self._logged_time)
        )
        record = _means(scalars) | {
            "lr": lr,
            "epoch": step / plan.steps_per_epoch,
            "episode": (step - 1) // plan.steps_per_episode,
            "samples_per_second": samples_per_second,
        }
        self._logged_time = now
        self._logged_step = step
        for phase, seconds in self.phases.seconds().items():
            record[f"seconds_{phase}"] = seconds
        record |= self.episode_metrics
        self.episode_metrics = {}
        folder.metrics(step, step * plan.global_batch_size, record)
        if "same_caption" in record and step == self.every:
            pairs = plan.global_batch_size // distributed.world_size()
            folder.note(
                f"--dedup {self.dedup}: in a batch of {pairs} pairs, "
                f"{record['same_caption']:g} share their caption with another one"
            )
        self.loss = record.get("loss", math.nan)
        per_step = (now - self._began_time) / (step - self._began_step)
        seconds_left = round((plan.total_steps - step) * per_step)
        folder.note(
            f"step {step}/{plan.total_steps}, loss {self.loss:.4f}, {samples_per_second:,.0f} "
            f"samples/s, ETA {datetime.timedelta(seconds=seconds_left)}"
        )


def scalars_of(
    outcome: Step, model: ProtoModel, stepper: Stepper, faults: Faults
) -> dict[str, Tensor]:
    """What a line says of a step, scalars on the device, for which the host has not waited."""
    # Each rank counts its own bad samples: multiplied by the ranks, their mean is the sum.
    bad = len(faults.positions) * distributed.world_size() + faults.known
    scalars = {
        **outcome.losses.terms,
        **outcome.losses.accuracy,
        "loss": outcome.losses.total,
        # Both are the multipliers, under the names of their parameters, the logarithms.
        "logit_scale": model.logit_scale,
        "logit_scale_proto": model.proto_logit_scale,
        "grad_norm": outcome.norm,
        "bad_steps": stepper.skipped_steps,
        "bad_samples": torch.tensor(float(bad)).to(outcome.norm.device),
    }
    if outcome.same_caption is not None:
        scalars["same_caption"] = outcome.same_caption
    if model.logit_bias is not None:
        scalars["logit_bias"] = model.logit_bias
    return scalars


def _means(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over ranks; without those that are not finite, and without counts of bad steps and
    samples that are 0."""
    values = torch.stack([value.detach().float().reshape(()) for value in scalars.values()])
    means = distributed.mean_over_ranks(values).tolist()
    return {
        name: mean
        for name, mean in zip(scalars, means, strict=True)
        if math.isfinite(mean) and (mean or not name.startswith("bad_"))
    }
