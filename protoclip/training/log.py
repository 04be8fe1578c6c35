"""What training writes as it goes: lines of metrics and progress, and the steps it skipped.

Every number that a step leaves on the device reaches the host through ``Log.begin_line``.
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip import distributed
from protoclip.common.files import plural
from protoclip.common.host import start_copy_to_host
from protoclip.common.phases import Phases
from protoclip.data.loader import Faults
from protoclip.model import ProtoModel
from protoclip.runs.run_folder import NullRunFolder
from protoclip.settings.config import TrainConfig
from protoclip.training.schedule import Plan
from protoclip.training.step import Step

LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


@dataclass(frozen=True)
class Line:
    """A line whose numbers are being copied to the host."""

    step: int
    time: float  # on the clock of ``time.perf_counter``
    record: dict[str, float]
    positions: list[int]  # the step's samples of this rank
    names: list[str]
    read: Callable[[], list[float]]  # waits for the values of ``names``
    due: bool  # False: only skipped steps are looked for


@dataclass(frozen=True)
class Skipped:
    """New skipped steps, up to ``step``; the key of that step's first sample, and which of its
    numbers were not finite, as far as they were read."""

    step: int
    in_a_row: int
    key: str
    numbers: list[str]


class Log:
    """Writes a run's lines. On a GPU the host does not wait for a line's numbers: it reads them
    when the next line is due, or the run saves or evaluates.

    Attributes:
        reads_freely: whether reading a number costs no waiting.
        loss: as last written.
        episode_metrics: of a new episode, until the next line holds them.
        reported_skips: skipped steps, as last read.
        last_skipped: the last of them since this process began.
    """

    def __init__(
        self, config: TrainConfig, plan: Plan, phases: Phases, device: torch.device
    ) -> None:
        self.reads_freely = device.type == "cpu"
        self.every = config.run.log_every_n_steps or (1 if self.reads_freely else 10)
        self.dedup = config.loss.dedup
        self.plan = plan
        self.phases = phases
        self.loss = math.nan
        self.episode_metrics: Mapping[str, float] = {}
        self.reported_skips = 0
        self.last_skipped: Skipped | None = None
        self._line: Line | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the clocks of a process that goes on after ``step``."""
        self._began_time = self._last_printed_time = time.perf_counter()
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

    def begin_line(
        self,
        step: int,
        scalars: Mapping[str, Tensor],
        skips: Mapping[str, Tensor],
        lr: float,
        positions: list[int],
    ) -> None:
        """Start to bring numbers to the host. A collective call; the line shows the means of
        ``scalars`` over ranks. ``skips``: "bad_steps" and those "in_a_row", equal on all ranks."""
        now = time.perf_counter()
        values = _stacked(skips)
        record: dict[str, float] = {}
        if scalars:
            values = torch.cat([distributed.mean_over_ranks(_stacked(scalars)), values])
            samples = (step - self._logged_step) * self.plan.global_batch_size
            record = {
                "lr": lr,
                "epoch": step * self.plan.global_batch_size / self.plan.samples,
                "episode": (step - 1) // self.plan.steps_per_episode,
                "samples_per_second": samples / (now - self._logged_time),
                **self.episode_metrics,
            }
            self._logged_time = now
            self._logged_step = step
            self.episode_metrics = {}
        self._line = Line(
            step=step,
            time=now,
            record=record,
            positions=positions,
            names=[*scalars, *skips],
            read=start_copy_to_host(values),
            due=bool(scalars),
        )

    def finish_line(self, folder: NullRunFolder, keys: Sequence[str]) -> Skipped | None:
        """Write the line that was begun, if any, and report new skipped steps; ``keys``: of the
        data set."""
        line, self._line = self._line, None
        if line is None:
            return None
        values = dict(zip(line.names, line.read(), strict=True))
        in_a_row = int(values.pop("in_a_row"))
        if line.due:
            self._write(folder, line, values)
        total = int(values["bad_steps"])
        if total == self.reported_skips:
            return None
        new = total - self.reported_skips
        self.reported_skips = total
        if not in_a_row:  # the line is of a later step, with other samples
            folder.note(
                f"{plural(new, 'step')} before step {line.step} skipped: loss or gradient not "
                f"finite, {total} so far; --log-every-n-steps 1 names the samples"
            )
            return None
        samples = [keys[position] for position in line.positions]
        numbers = [name for name, value in values.items() if not math.isfinite(value)]
        which = ", ".join(numbers) or "loss or gradient"
        of_rank = " of rank 0" if distributed.world_size() > 1 else ""
        folder.note(
            f"step {line.step} skipped: {which} not finite, {total} so far; samples{of_rank}: "
            f"{samples}"
        )
        self.last_skipped = Skipped(
            step=line.step, in_a_row=in_a_row, key=samples[0], numbers=numbers
        )
        return self.last_skipped

    def _write(self, folder: NullRunFolder, line: Line, values: Mapping[str, float]) -> None:
        """Write one line of metrics and one line of progress; numbers that are not finite, and
        counts of bad steps and samples that are 0, are left out."""
        plan = self.plan
        step = line.step
        record = {
            name: value
            for name, value in values.items()
            if math.isfinite(value) and (value or not name.startswith("bad_"))
        } | line.record
        for phase, seconds in self.phases.seconds(wait=False).items():
            record[f"seconds_{phase}"] = seconds
        folder.metrics(step, step * plan.global_batch_size, record)
        if "same_caption" in record and step == self.every:
            pairs = plan.global_batch_size // distributed.world_size()
            folder.note(
                f"--dedup {self.dedup}: in a batch of {pairs} pairs, "
                f"{record['same_caption']:g} share their caption with another one"
            )
        self.loss = record.get("loss", math.nan)
        per_step = (line.time - self._began_time) / (step - self._began_step)
        seconds_left = round((plan.total_steps - step) * per_step)
        words = (
            f"step {step}/{plan.total_steps}, loss {self.loss:.4f}, "
            f"{record['samples_per_second']:,.0f} samples/s, "
            f"ETA {datetime.timedelta(seconds=seconds_left)}"
        )
        if not sys.stderr.isatty() and line.time - self._last_printed_time >= LINE_SECONDS:
            self._last_printed_time = line.time
            folder.say(words)  # there is no progress bar
        else:
            folder.note(words)


def scalars_of(outcome: Step, model: ProtoModel, faults: Faults) -> dict[str, Tensor]:
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
        "bad_samples": torch.full_like(outcome.norm, bad),
    }
    if outcome.same_caption is not None:
        scalars["same_caption"] = outcome.same_caption
    if model.logit_bias is not None:
        scalars["logit_bias"] = model.logit_bias
    return scalars


def _stacked(scalars: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([value.detach().float().reshape(()) for value in scalars.values()])
