"""What training writes as it goes: lines of metrics and progress, and the steps it skipped.

Every number that a step leaves on the device reaches the host through ``Log.after``.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protoclip import distributed
from protoclip.common.files import plural
from protoclip.common.host import start_copy_to_host
from protoclip.common.waits import Wait
from protoclip.data.loader import Faults
from protoclip.losses.objective import Losses
from protoclip.model import Encoded, ProtoModel
from protoclip.training.run import Run

MOST_SKIPPED = 0.9  # of all steps; a run with more has trained nothing
IF_NOT_FINITE = (
    "lower --lr, use --precision fp32, or find the operation with torch.autograd."
    "set_detect_anomaly(True)"
)


class TooManySkipped(ValueError):
    """Loss or gradient was not finite in --max-bad-steps steps in a row."""


@dataclass(frozen=True)
class Step:
    """The outcome of a step; tensors on the device, for which the host has not waited."""

    index: Tensor  # int64 [B], positions in the data set, of all batches
    positions: Tensor  # the same on the host
    lr: float
    losses: Losses
    projected: Encoded | None  # [B, Dh] of all batches
    norm: Tensor  # of the gradient before clipping
    finite: Tensor  # bool: whether the step was taken
    # Number of pairs in this rank's batch that share their caption; None without --dedup caption.
    same_caption: Tensor | None


@dataclass(frozen=True)
class Line:
    """A line whose numbers are being copied to the host."""

    step: int
    time: float  # on the clock of ``time.perf_counter``
    record: dict[str, float]  # what the host knows; empty: only a skipped step is reported
    positions: Tensor  # of the step's samples of this rank, on the host
    names: list[str]
    read: Callable[[], list[float]]  # waits for the values of ``names``


class Log:
    """Writes a run's lines, and counts and judges its skipped steps.

    On a GPU the host does not wait for a line's numbers: it reads them when the next line is due,
    or the run saves or evaluates.

    Attributes:
        reads_freely: whether reading a number costs no waiting.
        episode_metrics: of a new episode, until the next line holds them.
        reported_skips: skipped steps, as last read.
        wait: for the run's steps.
    """

    def __init__(self, run: Run, faults: Faults) -> None:
        self.run = run
        self.faults = faults
        self.reads_freely = run.device.type == "cpu"
        self.every = run.config.run.log_every_n_steps or (1 if self.reads_freely else 10)
        self.episode_metrics: Mapping[str, float] = {}
        self.reported_skips = 0
        self._skipped = torch.zeros((), dtype=torch.int64, device=run.device)
        self._in_a_row = torch.zeros_like(self._skipped)
        self._not_finite: list[str] = []  # numbers of the last skipped step, as far as read
        self._line: Line | None = None
        self.start(0)

    def load_state(self, skipped: Sequence[int]) -> None:
        """Continue with the skipped steps that ``state`` gave."""
        self._skipped, self._in_a_row = torch.tensor(skipped, device=self.run.device).unbind()
        self.reported_skips = skipped[0]

    def begin_episode(self, step: int, metrics: Mapping[str, float], warning: str) -> None:
        """Have the next line hold the metrics of a new episode; say what is wrong with it."""
        self.episode_metrics = metrics
        if warning:
            self.run.folder.say(f"step {step}: {warning}")

    def resume_episode(self, step: int, metrics: Mapping[str, float]) -> None:
        """Continue after ``step`` inside an episode: its metrics are due if no line has them."""
        first = step - step % self.run.plan.steps_per_episode
        if first < step and first // self.every == step // self.every:
            self.episode_metrics = metrics

    def start(self, step: int) -> Wait:
        """Start the clocks, and the wait for the steps, of a process that continues after
        ``step``."""
        self._began_time = self._logged_time = time.perf_counter()
        self._began_step = self._logged_step = step
        self.wait = Wait("training", self.run.plan.total_steps, "steps", done=step)
        return self.wait

    def after(self, step: int, outcome: Step) -> None:
        """Count the outcome of the run's ``step``-th step, and begin its line if one is due, after
        the line before has been written. A collective call.

        Raises:
            TooManySkipped: too many steps in a row were not finite.
        """
        skipped = (~outcome.finite).long()
        self._skipped = self._skipped + skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        due = step == self.run.plan.total_steps or step % self.every == 0
        if due or (self.reads_freely and not outcome.finite):
            self._write_line()
            self._line = self._begin_line(step, outcome, due)
        if self.reads_freely:
            self._write_line()
        self.wait.update()

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Write an evaluation's scores, and leave its time out of the next line's rate."""
        self._write_line()
        self.run.folder.metrics(step, step * self.run.plan.global_batch_size, scores)
        self._logged_time = time.perf_counter()
        self._logged_step = step

    def state(self) -> list[int]:
        """The skipped steps for a checkpoint, all and those in a row. All lines up to it are
        written first."""
        self._write_line()
        return [int(self._skipped), int(self._in_a_row)]

    def check_trained(self) -> None:
        """ValueError if hardly a step of the run was taken."""
        total = self.run.plan.total_steps
        if self.reported_skips <= MOST_SKIPPED * total:
            return
        numbers = f" (in the last one: {', '.join(self._not_finite)})" if self._not_finite else ""
        raise ValueError(
            f"training: {self.reported_skips:,} of {plural(total, 'step')} were skipped, as "
            f"loss or gradient was not finite{numbers}, so the model has not been trained; "
            f"{IF_NOT_FINITE}; then remove {self.run.folder.path} and start again"
        )

    def _begin_line(self, step: int, outcome: Step, due: bool) -> Line:
        """Start to bring a step's numbers to the host; the line shows their means over ranks."""
        plan = self.run.plan
        now = time.perf_counter()
        skips = {"bad_steps": self._skipped, "in_a_row": self._in_a_row}  # equal on all ranks
        scalars = scalars_of(outcome, self.run.model, self.faults)
        values = torch.cat([distributed.mean_over_ranks(_stacked(scalars)), _stacked(skips)])
        record: dict[str, float] = {}
        if due:
            samples = (step - self._logged_step) * plan.global_batch_size
            record = {
                "lr": outcome.lr,
                "epoch": step * plan.global_batch_size / plan.samples,
                "episode": (step - 1) // plan.steps_per_episode,
                "samples_per_second": samples / (now - self._logged_time),
                **self.episode_metrics,
            }
            self._logged_time = now
            self._logged_step = step
            self.episode_metrics = {}
        return Line(
            step=step,
            time=now,
            record=record,
            positions=outcome.positions,
            names=[*scalars, *skips],
            read=start_copy_to_host(values),
        )

    def _write_line(self) -> None:
        """Write the line that was begun, if any, and report new skipped steps."""
        line, self._line = self._line, None
        if line is None:
            return
        values = dict(zip(line.names, line.read(), strict=True))
        in_a_row = int(values.pop("in_a_row"))
        if line.record:
            self._write(line, values)
        new = int(values["bad_steps"]) - self.reported_skips
        if new:
            self.reported_skips += new
            self._report_skips(line, values, new, in_a_row)

    def _write(self, line: Line, values: Mapping[str, float]) -> None:
        """Write one line of metrics and one of out.log; numbers that are not finite, and
        counts of bad steps and samples that are 0, are left out."""
        plan = self.run.plan
        folder = self.run.folder
        step = line.step
        record = {
            name: value
            for name, value in values.items()
            if math.isfinite(value) and (value or not name.startswith("bad_"))
        } | line.record
        for phase, seconds in self.run.phases.seconds(wait=False).items():
            record[f"seconds_{phase}"] = seconds
        folder.metrics(step, step * plan.global_batch_size, record)
        if "same_caption" in record and step == self.every:
            pairs = plan.global_batch_size // distributed.world_size()
            folder.note(
                f"--dedup {self.run.config.loss.dedup}: in a batch of {pairs} pairs, "
                f"{record['same_caption']:g} share their caption with another one"
            )
        loss = record.get("loss", math.nan)
        numbers = f"loss {loss:.4f}, {record['samples_per_second']:,.0f} samples/s"
        self.wait.note = numbers
        per_step = (line.time - self._began_time) / (step - self._began_step)
        seconds_left = round((plan.total_steps - step) * per_step)
        folder.note(
            f"step {step}/{plan.total_steps}, {numbers}, "
            f"ETA {datetime.timedelta(seconds=seconds_left)}"
        )

    def _report_skips(
        self, line: Line, values: Mapping[str, float], new: int, in_a_row: int
    ) -> None:
        """Note new skipped steps in out.log; raise TooManySkipped after --max-bad-steps of them."""
        folder = self.run.folder
        so_far = f"{self.reported_skips} so far"
        if not in_a_row:  # the line is of a later step, with other samples
            folder.note(
                f"{plural(new, 'step')} before step {line.step} skipped: loss or gradient not "
                f"finite, {so_far}; --log-every-n-steps 1 names the samples"
            )
            return
        samples = [self.run.dataset.keys[position] for position in line.positions.tolist()]
        self._not_finite = [name for name, value in values.items() if not math.isfinite(value)]
        which = ", ".join(self._not_finite) or "loss or gradient"
        of_rank = " of rank 0" if distributed.world_size() > 1 else ""
        folder.note(
            f"step {line.step} skipped: {which} not finite, {so_far}; samples{of_rank}: {samples}"
        )
        if in_a_row >= self.run.config.run.max_bad_steps:
            raise TooManySkipped(
                f"training: loss or gradient was not finite in {in_a_row} steps in a row, "
                f"up to step {line.step} (its numbers and samples are in out.log, first "
                f"{samples[0]}); {IF_NOT_FINITE}; the last finite weights are in {folder.path}"
            )


def scalars_of(outcome: Step, model: ProtoModel, faults: Faults) -> dict[str, Tensor]:
    """What a line says of a step, scalars on the device, for which the host has not waited."""
    # Each rank counts its own bad samples: multiplied by the ranks, their mean is the sum.
    bad = len(faults.positions) * distributed.world_size() + faults.known
    scalars = {
        **outcome.losses.terms,
        **outcome.losses.accuracy,
        "loss": outcome.losses.total,
        "logit_scale": model.logit_scale,
        "proto_logit_scale": model.proto_logit_scale,
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
