"""The training loop: the only owner of mutable state."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip.config import TrainConfig
from protoclip.data import Batch, PairDataset, batches
from protoclip.data.loader import EpochOrder
from protoclip.distributed import Agreement, is_main, mean_over_ranks, world_size
from protoclip.losses import Losses, ProtoLoss
from protoclip.model import ProtoModel, autocast_for
from protoclip.prototypes import Episode, FeatureStore
from protoclip.training.capture import (
    Stateful,
    capture,
    report_bad_step,
    save_if_room,
    save_or_stop,
)
from protoclip.training.engine import Optimiser
from protoclip.training.episodes import episode_seed, rebuild_episode
from protoclip.training.gradients import norms_by_part
from protoclip.training.guard import Guard
from protoclip.training.inputs import faults_of
from protoclip.training.launch import OtherRank
from protoclip.training.phases import Phases
from protoclip.training.plan import Plan, draw, learning_rate, own_draws
from protoclip.training.run_folder import RunFolder
from protoclip.training.saving import SaveSchedule, Stopped, StopSignals
from protoclip.training.stepper import Stepper

Evaluate = Callable[[ProtoModel], Mapping[str, float]]
SHOWN_EVERY = 60.0  # seconds between lines of progress on a screen that is no terminal


class Trainer:
    """Trains a model on a data set, episode by episode.

    Args:
        config: of the whole run.
        plan: its arithmetic.
        model: on ``device``.
        dataset: the pairs to train on.
        transform: PIL image -> float32 [3, H, W], with augmentation.
        teacher: float32 [dataset, d], or None.
        folder: where metrics and checkpoints go.
        phases: the stopwatch.
        device, precision: of the forward passes.
        evaluate: scalars of the model as it is, by name; called every ``--val-frequency`` epochs.
        zeroshot: the same, called every ``--zeroshot-frequency`` epochs.
        signals: that ask the run to save and end.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        model: ProtoModel,
        dataset: PairDataset,
        transform: Callable[[Any], Tensor],
        teacher: Tensor | None,
        folder: RunFolder | OtherRank,
        phases: Phases,
        *,
        device: torch.device,
        precision: str,
        evaluate: Evaluate | None = None,
        zeroshot: Evaluate | None = None,
        signals: StopSignals | None = None,
    ) -> None:
        self.config, self.plan, self.model, self.dataset = config, plan, model, dataset
        self.transform, self.folder, self.phases = transform, folder, phases
        self.teacher = None if teacher is None else teacher.to(device)
        self.device, self.evaluate, self.zeroshot = device, evaluate, zeroshot
        self.autocast = autocast_for(precision, device)
        self.optimiser = Optimiser(model, config.optim, precision)
        loss = ProtoLoss(config.loss, self.teacher)
        self.stepper = Stepper(model, loss, self.optimiser, self.autocast, phases, device)
        self.share = plan.batch_size // world_size()  # of a step's samples, this rank's
        self.episode: Episode | None = None
        self.store: FeatureStore | None = None
        if config.episode.reuses and self._projects:
            self.store = FeatureStore(plan.steps_per_episode, plan.batch_size, device)
        self.step = 0
        self.guard = Guard(model, device)
        self.order = EpochOrder(dataset, config.data)
        self.faults = faults_of(
            dataset, config.data.max_bad_fraction, lambda text: self.folder.say(text)
        )
        self.stateful: dict[str, Stateful] = {  # more to save and restore
            name: part
            for name, part in (
                ("guard", self.guard),
                ("faults", self.faults),
                ("store", self.store),
            )
            if part is not None
        }
        self.schedule = SaveSchedule(config.run.save_every)
        self.signals = signals or StopSignals()
        self.agreement = Agreement()
        self._saved_at = -1
        self._began_at = self._logged_at = (time.perf_counter(), 0)
        self._shown_at = time.perf_counter()

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: a signal asked to end; the state is saved.
        """
        total, done = (n * self.plan.batch_size for n in (self.plan.total_steps, self.step))
        self._began_at = self._logged_at = (time.perf_counter(), self.step)
        self.signals.immediate = False
        with tqdm(
            total=total,
            initial=done,
            unit=" samples",
            unit_scale=True,
            smoothing=0.1,
            disable=None if is_main() else True,  # None: where there is no terminal
        ) as bar:
            for number in range(self.step // self.plan.steps_per_episode, self.plan.episodes):
                self._run_episode(number, bar)
        if self._saved_at != self.step:
            self.save(None)
        self.signals.immediate = True
        self.agreement.settle()
        (level,) = self.agreement.ask(self.signals.level)
        level = (self.agreement.settle() or [level])[0]
        if level:
            text = "stopped by a signal after the last step; --resume goes on"
            raise Stopped(text, 130 if level > 1 else 0)

    def _run_episode(self, number: int, bar: tqdm) -> None:
        steps = self.plan.steps_of(number)
        draws = draw(
            self.plan,
            self.config.run.seed,
            steps,
            replacement=self.config.episode.replacement,
            order=self.order.permutation,
        )
        head = f"episode {number + 1}/{self.plan.episodes}"
        done = self.step - steps.start  # of this episode, before the run was interrupted
        if done == 0 and self._wants_prototypes(number):
            self.episode = rebuild_episode(self, number, draws, bar, head)
        elif self._is_lit(number):
            self.episode = None
            self.model.lock_image()
        bar.set_description(f"{head} training")
        self.model.train()
        stream = iter(self._batches(draws, number, done))
        for _ in steps[done:]:
            with self.phases.measure("data", on_host=True):
                parts = [next(stream) for _ in range(self.config.optim.accum_freq)]
            self._train_step(parts, number, bar)
            self._at_border()

    def _wants_prototypes(self, number: int) -> bool:
        """Whether an episode needs clusters: a prototype term has a weight, the warm-up is over."""
        warm = number >= self.config.episode.infonce_warmup and not self._is_lit(number)
        return warm and (self.internal or self._external)

    def _is_lit(self, number: int) -> bool:
        """Whether an episode belongs to the last phase: image tower frozen, InfoNCE only."""
        return 0 < self.config.episode.lit_start <= number

    @property
    def _projects(self) -> bool:
        """Whether the heads will be needed: their running statistics are kept from step 0."""
        distills = self.teacher is not None and self.config.loss.w_distill > 0
        return self.internal or self._external or distills

    @property
    def _external(self) -> bool:
        return self.teacher is not None and self.config.loss.w_proto_external > 0

    @property
    def internal(self) -> bool:
        return self.config.method == "protoclip" and self.config.loss.w_proto > 0

    def _batches(self, draws: Tensor, number: int, done: int) -> Any:
        own, numbers = own_draws(self.plan, draws)
        return batches(
            self.dataset,
            own,
            self.config.optim.batch_size,
            self.transform,
            self.model.short_tokenizer,
            seed=episode_seed(self.config.run.seed, number, 0),
            workers=self.config.data.workers,
            captions=self.config.data.captions,
            start=done * self.share,
            faults=self.faults,
            numbers=numbers,
        )

    def _train_step(self, parts: list[Batch], number: int, bar: tqdm) -> None:
        lr = learning_rate(self.config.optim, self.plan.total_steps, self.step)
        self.optimiser.set_lr(lr)
        self.guard.before()
        losses, projected, norm, finite = self.stepper.step(parts, self.episode, self._projects)
        index = torch.cat([part.index for part in parts])
        if self.store is not None and projected is not None:
            with self.phases.measure("forward"):
                done = self.step - self.plan.steps_of(number).start
                known = torch.where(finite, index.to(self.device), -1)  # -1: no such row
                self.store.put(done, known, projected)
        self.step += 1
        bar.update(self.plan.batch_size)
        if self.step % self.config.run.log_every_n_steps == 0 or self.step == self.plan.total_steps:
            self._log(losses, norm, lr, number, bar)
        for step, bad in self.guard.after(self.step, parts, finite):
            report_bad_step(self, step, bad)

    def forward(self, batch: Batch) -> tuple[Any, Losses]:
        """Projections and losses of a batch, without a step."""
        return self.stepper.forward(batch.to(self.device), self.episode, self._projects)

    def _log(self, losses: Losses, norm: Tensor, lr: float, number: int, bar: tqdm) -> None:
        """Read the device once, write one line of metrics, refresh the bar."""
        scalars = {
            **losses.terms,
            **losses.accuracy,
            "loss": losses.total,
            "logit_scale": self.model.logit_scale,
            "logit_scale_proto": self.model.proto_scale,
            "logit_scale_raw": self.model.clip.logit_scale,
            "logit_scale_proto_raw": self.model.logit_scale_proto,
            "grad_norm": norm,
            **norms_by_part(self.model, norm, self.config.optim.grad_clip_norm),
            "bad_samples": torch.tensor(len(self.faults.positions), device=self.device),
        }
        values = torch.stack([v.detach().float().reshape(()) for v in scalars.values()])
        means = mean_over_ranks(values).tolist()
        record = {k: v for k, v in zip(scalars, means, strict=True) if math.isfinite(v)}
        if self.guard.total:
            record["bad_steps"] = self.guard.total
        bad = self.faults.known + world_size() * record.pop("bad_samples")  # each rank has its own
        if bad:
            record["bad_samples"] = round(bad)
        now, step = time.perf_counter(), self.step
        then, last = self._logged_at
        self._logged_at = (now, step)
        record |= {
            "lr": lr,
            "epoch": step / self.plan.steps_per_epoch,
            "episode": number,
            "samples_per_second": (step - last) * self.plan.batch_size / (now - then),
        }
        record |= {f"seconds_{name}": s for name, s in self.phases.seconds().items()}
        if self.episode is not None and step == self.plan.steps_of(number).start + 1:
            record |= self.episode.metrics
        self.folder.metrics(step, step * self.plan.batch_size, record)
        bar.set_postfix(loss=f"{record.get('loss', math.nan):.3f}", refresh=False)
        self._say_progress(record, now)

    def _say_progress(self, record: Mapping[str, float], now: float) -> None:
        """A line in out.log; once a minute on the screen too where there is no bar."""
        began, first = self._began_at
        left = (self.plan.total_steps - self.step) * (now - began) / (self.step - first)
        line = (
            f"step {self.step}/{self.plan.total_steps}, loss {record.get('loss', math.nan):.4f}, "
            f"{record['samples_per_second']:,.0f} samples/s, "
            f"ETA {datetime.timedelta(seconds=round(left))}"
        )
        if now - self._shown_at < SHOWN_EVERY or sys.stderr.isatty():
            self.folder.note(line)
        else:
            self._shown_at = now
            self.folder.say(line)

    def _at_border(self) -> None:
        """After a step: evaluate and save where an epoch that asks for it has just ended."""
        per_epoch = self.plan.steps_per_epoch
        last = self.step == self.plan.total_steps
        run = self.config.run
        for evaluate, frequency in (
            (self.evaluate, run.val_frequency),
            (self.zeroshot, run.zeroshot_frequency),
        ):
            due = last or self.step % max(1, round(frequency * per_epoch)) == 0
            if evaluate and frequency > 0 and due:
                with self.phases.measure("evaluation", on_host=True):
                    scalars = evaluate(self.model)
                self.folder.metrics(self.step, self.step * self.plan.batch_size, scalars)
                self._logged_at = (time.perf_counter(), self.step)
        if self.step % per_epoch == 0 and run.save_frequency:
            epoch = self.step // per_epoch
            if epoch % run.save_frequency == 0:
                save_if_room(self, epoch)
        save_or_stop(self)

    def save(self, epoch: int | None) -> None:
        """Write a checkpoint that OpenCLIP reads too; ``epoch`` None: the newest."""
        with self.phases.measure("checkpoint", on_host=True):
            payload = capture(self, epoch)
            self.folder.checkpoint(payload, epoch)
        if epoch is None:
            self._saved_at = self.step
            self.schedule.saved()
