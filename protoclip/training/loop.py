"""The training loop: the only owner of mutable state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip.config import TrainConfig, to_dict
from protoclip.data import Batch, PairDataset, batches
from protoclip.distributed import generator
from protoclip.episode import Episode, build_episode
from protoclip.features import Features, FeatureStore, extract
from protoclip.losses import Losses, ProtoLoss
from protoclip.model import ProtoModel
from protoclip.training.ema import MovingAverage
from protoclip.training.engine import Optimiser, autocast_for
from protoclip.training.phases import Phases
from protoclip.training.plan import EPISODES, Plan, draw, learning_rate
from protoclip.training.run_folder import RunFolder

Evaluate = Callable[[ProtoModel], Mapping[str, float]]


class Trainer:
    """Trains a model on a data set, episode by episode.

    Args:
        config: of the whole run.
        plan: its arithmetic.
        model: on ``device``.
        dataset: the pairs to train on.
        transform: PIL image -> float32 [3, H, W], with augmentation.
        teachers: name -> float32 [dataset, d].
        folder: where metrics and checkpoints go.
        phases: the stopwatch.
        device, precision: of the forward passes.
        evaluate: scalars of the model as it is, by name; called every ``--val-frequency`` epochs.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        model: ProtoModel,
        dataset: PairDataset,
        transform: Callable[[Any], Tensor],
        teachers: Mapping[str, Tensor],
        folder: RunFolder,
        phases: Phases,
        *,
        device: torch.device,
        precision: str,
        evaluate: Evaluate | None = None,
    ) -> None:
        self.config, self.plan, self.model, self.dataset = config, plan, model, dataset
        self.transform, self.folder, self.phases = transform, folder, phases
        self.teachers = {name: rows.to(device) for name, rows in teachers.items()}
        self.device, self.evaluate = device, evaluate
        self.autocast = autocast_for(precision, device)
        self.optimiser = Optimiser(model, config.optim, precision)
        self.loss = ProtoLoss(config.loss, self.teachers)
        self.episode: Episode | None = None
        self.store: FeatureStore | None = None
        if config.episode.features == "reuse" and self._projects:
            self.store = FeatureStore(plan.steps_per_episode * plan.batch_size, device)
        self.average: MovingAverage | None = None
        if config.episode.ema_decay > 0 and self._projects:
            self.average = MovingAverage(model, config.episode.ema_decay)
        self.step = 0
        self._logged_at = (time.perf_counter(), 0)

    def run(self) -> None:
        """Train to the end of the plan."""
        total = self.plan.total_steps * self.plan.batch_size
        with tqdm(total=total, unit=" samples", unit_scale=True, smoothing=0.1) as bar:
            for number in range(self.plan.episodes):
                self._run_episode(number, bar)
        self.save(None)

    def _run_episode(self, number: int, bar: tqdm) -> None:
        steps = self.plan.steps_of(number)
        draws = draw(
            self.plan, self.config.run.seed, steps, replacement=self.config.episode.replacement
        )
        head = f"episode {number + 1}/{self.plan.episodes}"
        if self._wants_prototypes(number):
            self._rebuild_episode(number, draws, bar, head)
        elif self._is_lit(number):
            self.episode = None
            self.model.lock_image()
        bar.set_description(f"{head} training")
        self.model.train()
        stream = iter(self._batches(draws, number))
        for _ in steps:
            with self.phases.measure("data", on_host=True):
                batch = next(stream)
            self._train_step(batch, number, bar)
            self._at_border()

    def _wants_prototypes(self, number: int) -> bool:
        """Whether an episode needs clusters: a prototype term has a weight, the warm-up is over."""
        warm = number >= self.config.episode.infonce_warmup and not self._is_lit(number)
        return warm and (self._internal or self._external)

    def _is_lit(self, number: int) -> bool:
        """Whether an episode belongs to the last phase: image tower frozen, InfoNCE only."""
        return 0 < self.config.episode.lit_start <= number

    @property
    def _projects(self) -> bool:
        """Whether the heads will be needed: their running statistics are kept from step 0."""
        distills = bool(self.teachers) and self.config.loss.w_distill > 0
        return self._internal or self._external or distills

    @property
    def _external(self) -> bool:
        return bool(self.teachers) and self.config.loss.w_proto_external > 0

    @property
    def _internal(self) -> bool:
        return self.config.method == "protoclip" and self.config.loss.w_proto > 0

    def _batches(self, draws: Tensor, number: int) -> Any:
        return batches(
            self.dataset,
            draws,
            self.plan.batch_size,
            self.transform,
            self.model.tokenizer,
            seed=self._seed(number, 0),
            workers=self.config.data.workers,
            captions=self.config.data.captions,
        )

    def _seed(self, number: int, purpose: int) -> int:
        random = generator(self.config.run.seed, EPISODES, number, purpose)
        return int(torch.randint(2**31, (), generator=random))

    def _rebuild_episode(self, number: int, draws: Tensor, bar: tqdm, head: str) -> None:
        indices = draws.unique()
        with self.phases.measure("features"):
            if self.store is not None:
                features = self.store.features()
            else:
                features = self._extract(indices, number, bar, head)
        bar.set_description(f"{head} clusters")
        with self.phases.measure("clusters"):
            self.episode = build_episode(
                features,
                self.teachers,
                self.config.episode,
                generator(self.config.run.seed, EPISODES, number, 2),
                self.episode,
                keys=self.dataset.keys,
                internal=self._internal,
                coming=None if self.store is None else indices,
                classes={
                    name: known.ids.to(self.device) for name, known in self.dataset.labels.items()
                },
            )

    def _extract(self, indices: Tensor, number: int, bar: tqdm, head: str) -> Features:
        """A forward pass over the samples of the episode."""
        done = 0

        def show(rows: int) -> None:
            nonlocal done
            done += rows
            bar.set_description(f"{head} features {100 * done // len(indices)}%")

        show(0)
        return extract(
            self.model if self.average is None else self.average.model,
            self.dataset,
            indices,
            transform=self.transform,
            batch_size=self.plan.batch_size,
            device=self.device,
            seed=self._seed(number, 1),
            workers=self.config.data.workers,
            captions=self.config.data.captions,
            autocast=self.autocast,
            progress=show,
        )

    def _train_step(self, batch: Batch, number: int, bar: tqdm) -> None:
        lr = learning_rate(self.config.optim, self.plan.total_steps, self.step)
        self.optimiser.set_lr(lr)
        with self.phases.measure("forward"):
            batch = batch.to(self.device, non_blocking=True)
            with self.autocast():
                encoded, projected = self.model(batch.image, batch.tokens, project=self._projects)
            losses = self.loss(
                encoded,
                projected,
                batch.index,
                self.model.logit_scale,
                self.model.proto_scale,
                self.episode,
            )
        with self.phases.measure("backward"):
            norm = self.optimiser.step(losses.total)
        if self.store is not None and projected is not None:
            start = self.step - self.plan.steps_of(number).start
            self.store.put(start * self.plan.batch_size, batch.index, projected)
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, self.step)
        bar.update(len(batch))
        if self.step % self.config.run.log_every_n_steps == 0 or self.step == self.plan.total_steps:
            self._log(losses, norm, lr, number, bar)

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
        }
        values = torch.stack([v.detach().float().reshape(()) for v in scalars.values()]).tolist()
        record = dict(zip(scalars, values, strict=True))
        if not math.isfinite(record["loss"]):
            raise ValueError(
                f"training: the loss is {record['loss']} at step {self.step}; lower --lr, lengthen "
                "--warmup, or use --precision fp32"
            )
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
        bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)

    def _at_border(self) -> None:
        """After a step: evaluate and save where an epoch that asks for it has just ended."""
        per_epoch = self.plan.steps_per_epoch
        last = self.step == self.plan.total_steps
        run = self.config.run
        every = max(1, round(run.val_frequency * per_epoch))
        if self.evaluate and run.val_frequency > 0 and (self.step % every == 0 or last):
            with self.phases.measure("evaluation", on_host=True):
                scalars = self.evaluate(self.model)
            self.folder.metrics(self.step, self.step * self.plan.batch_size, scalars)
            self._logged_at = (time.perf_counter(), self.step)
        if self.step % per_epoch == 0 and run.save_frequency:
            epoch = self.step // per_epoch
            if epoch % run.save_frequency == 0:
                self.save(epoch)

    def save(self, epoch: int | None) -> None:
        """Write a checkpoint that OpenCLIP reads too; ``epoch`` None: the newest."""
        with self.phases.measure("checkpoint", on_host=True):
            payload = {
                "epoch": epoch or math.ceil(self.step / self.plan.steps_per_epoch),
                "name": self.folder.path.name,
                "state_dict": self.model.clip.state_dict(),
                "optimizer": self.optimiser.adamw.state_dict(),
                "protoclip": {
                    **self.model.extra_state(),
                    "config": to_dict(self.config),
                    "step": self.step,
                },
            }
            self.folder.checkpoint(payload, epoch)
