"""A training run: its episodes, its steps, and what happens between them. Read it from the top.

A batch comes from ``data/loader.py``, its losses from ``losses/objective.py``, its prototypes from
``episodes/prototypes.py``. Override ``draw`` to sample an episode in another way, ``loss_weights``
to change the weights over time, and ``stored`` to save more (docs/own-loss.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from protoclip import distributed
from protoclip.common.seeds import generator, seed_everything
from protoclip.data import Batch, Draws
from protoclip.data.loader import Faults
from protoclip.episodes import prototypes
from protoclip.episodes.feature_store import Features
from protoclip.episodes.prototypes import Episode
from protoclip.losses.objective import Losses, OwnTerms, ProtoLoss, pair_ids, repeated
from protoclip.model import Encoded, autocast_for
from protoclip.runs.resume import Resume, check_resume
from protoclip.settings.config import LossConfig
from protoclip.training import schedule, state
from protoclip.training.checks import loss_weights
from protoclip.training.features import EpisodeFeatures
from protoclip.training.log import Log, Step, TooManySkipped
from protoclip.training.optimiser import load_optimiser
from protoclip.training.replicas import Replicas
from protoclip.training.run import Run
from protoclip.training.state import Stored
from protoclip.training.stops import Stops
from protoclip.training.towers import Copies, Towers
from protoclip.training.update import Statistics, Update


class Trainer:
    """Trains a run's model, and holds all that changes between two steps.

    Attributes:
        step: how many are done.
        episode: the prototypes of the running episode; None: it has none.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.plan = run.plan
        self.step = 0
        self.episode: Episode | None = None
        weights = loss_weights(run.config, has_teacher=run.teacher is not None)
        self.loss = ProtoLoss(weights, run.teacher, run.phases.measure)
        self.terms = OwnTerms(run.terms).to(run.device)
        self.autocast = autocast_for(run.precision, run.device)
        on_gpu = run.device.type == "cuda"
        self.towers = Towers(run.model, compiled=run.config.model.torchcompile, tf32=on_gpu)
        self.update = Update(run, self.terms)
        self.statistics = Statistics(run.model, self.terms)
        self.replicas = Replicas(run, self.terms, self.towers, self.update, self.statistics)
        self.copies = Copies(run.device)
        self.builder = run.episode_builder()
        self.watch = prototypes.Watch(device=run.device)
        self.features = EpisodeFeatures(run, self.extract)
        self.faults = Faults(run.dataset, run.config.data.max_bad_fraction, run.folder.say)
        self.loader = run.open_loader(self.faults)
        self.stops = Stops(run, self.save)
        self.log = Log(run, self.faults)

    def train(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: a signal asked the run to stop; the state is saved.
            ValueError: too many steps had no finite loss and gradient; the state is saved.
        """
        with self.stops, contextlib.closing(self.loader), self.log.start(self.step):
            try:
                self.train_until(self.plan.total_steps)
                if self.stops.saved_step != self.step:
                    self.save()
            except TooManySkipped:
                self.save()
                raise
        self.log.check_trained()

    def train_until(self, end: int) -> None:
        """Take the steps up to ``end`` steps."""
        stream: Iterator[Batch] | None = None
        for step in range(self.step, end):
            if stream is None or self.plan.begins_episode(step):  # None: maybe resumed inside one
                stream = self.begin_episode(step)
            with self.run.phases.measure("data", on_host=True):
                batches = [next(stream) for _ in range(self.run.config.optim.accum_freq)]
            outcome = self.take_step(step, batches)
            self.features.keep(step, outcome)
            self.watch.count(outcome.losses.hits)
            self.step = step + 1
            self.log.after(self.step, outcome)
            self.evaluate_if_due()
            self.stops.after(self.step)  # saves if it is time

    def draw(self, steps: range) -> Tensor:
        """The positions that these steps train on, over all ranks: int64 [steps * batch]."""
        seed, order = self.run.config.run.seed, self.run.order.permutation
        replacement = self.run.config.episode.replacement
        return schedule.draw(self.plan, seed, steps, replacement=replacement, order=order)

    def begin_episode(self, step: int) -> Iterator[Batch]:
        """Build the prototypes of a step's episode, if it has any; returns the batches of the
        episode's steps from this one on."""
        number = self.plan.episode_of(step)
        steps = self.plan.steps_of(number)
        config = self.run.config.episode
        self.log.wait.what = f"training, episode {number + 1} of {self.plan.episodes}"
        draws = self.draw(steps)
        warmed_up = self.run.active.prototypes and number >= config.infonce_warmup
        if 0 < config.lit_start <= number:
            self.episode = None  # LiT: the image tower is frozen, InfoNCE only
            self.run.model.lock_image()
        elif step == steps.start and warmed_up:
            whole = range(steps.start, steps.start + self.plan.steps_per_episode)
            # A resume with more steps does all of an episode that ended early.
            samples = self.draw(whole) if self.features.source.reuses and whole != steps else draws
            self.episode = self.build_episode(number, samples.unique())
        self.run.model.train()
        return self.loader.batches(schedule.own_draws(self.plan, self.run.config, draws, step))

    def build_episode(self, number: int, samples: Tensor) -> Episode | None:
        """Build the prototypes of an episode that trains on ``samples``, int64 [M] sorted
        positions; None while too few of them have stored features."""
        with self.run.phases.measure("features"):
            features, recent = self.features.of(number, samples)
        with self.run.phases.measure("clusters"):
            seed = self.run.config.run.seed
            random = generator(seed, schedule.EPISODES, number, schedule.CLUSTERS)
            episode = self.builder.build(samples, features, random, recent, self.episode)
        if episode is None:
            return None
        episode, warning = self.watch.begin(episode)
        self.log.begin_episode(self.step, episode.metrics, warning)
        return episode

    def extract(self, number: int, samples: Tensor) -> Features:
        """A forward pass over this rank's share of an episode's samples."""
        numbers = torch.arange(len(samples))[distributed.own_slice(len(samples))]
        seed = schedule.episode_seed(self.run.config.run.seed, number, schedule.FEATURES)
        batches = self.loader.batches(Draws(samples[numbers], seed, numbers=numbers))
        batches = self.stops.inside(batches, self.step, "features")
        model, device = self.run.model, self.run.device
        return prototypes.extract(model, batches, device=device, autocast=self.autocast)

    def loss_weights(self, step: int) -> LossConfig:
        """The weights of the losses in a step."""
        return self.loss.config

    def take_step(self, step: int, batches: Sequence[Batch]) -> Step:
        """One update from this rank's batches, of equal size and on the host. It depends on the
        global batch alone: the towers encode each batch separately, heads and losses see all of
        them at once (OpenCLIP's accumulation forms one loss per batch)."""
        lr = self.update.begin(step)
        positions = torch.cat([batch.index for batch in batches])
        batches = [self.copies.of(batch) for batch in batches]
        index = torch.cat([batch.index for batch in batches])
        ids = pair_ids(self.loss.config.dedup, batches, index)
        before = self.statistics.copy()

        forward = partial(self.forward, step, batches, index, ids)
        with self.run.phases.measure("forward"):
            heads = self.loss.trains_heads(self.episode)
            losses, projected = self.replicas(forward, heads=heads)
            counted = self.statistics.copy()  # before the backward pass encodes batches again
        with self.run.phases.measure("backward"):
            self.towers.backward(self.update.scaler.scale(losses.total))
            norm = self.update.clipped_norm()
            finite = self.replicas.finite(losses.total, norm)
            self.update.take_if(finite)
        # Evaluation and checkpoints then hold the same statistics on all ranks.
        self.statistics.restore_unless(finite, before, counted)
        same_caption = repeated(ids) if ids is not None and ids is not index else None
        return Step(index, positions, lr, losses, projected, norm, finite, same_caption)

    def forward(
        self, step: int, batches: Sequence[Batch], index: Tensor, ids: Tensor | None
    ) -> tuple[Losses, Encoded | None]:
        """The losses of this rank's batches, and their projections without a graph."""
        if len(batches) == 1:
            encoded = self.encode(step, 0, batches[0])
        else:  # GradCache: backward encodes each batch again
            parts = enumerate(batches)
            again = partial(checkpoint, self.encode, step, use_reentrant=False)
            encoded = Encoded.joined([again(part, batch) for part, batch in parts])
        with self.autocast():
            projected = self.towers.project(encoded) if self.run.active.projects else None
        model = self.run.model
        losses = self.loss(
            encoded,
            projected,
            index,
            logit_scale=model.logit_scale,
            proto_logit_scale=model.proto_logit_scale,
            episode=self.episode,
            ids=ids,
            logit_bias=model.logit_bias,
            weights=self.loss_weights(step),
        )
        trained = projected if self.loss.trains_heads(self.episode) else None
        losses = self.terms(losses, encoded, trained, index, ids, step, model.logit_scale)
        return losses, projected and projected.detached()

    def encode(self, step: int, part: int, batch: Batch) -> Encoded:
        """The towers' features of a batch; dropout follows from step, rank and ``part``."""
        seed_everything(self.run.config.run.seed, step, distributed.rank(), part)
        with self.autocast():
            return self.towers.encode(batch.image, batch.tokens)

    def evaluate_if_due(self) -> None:
        """Repeat the quick evaluation after the steps that its intervals end with."""
        evaluation, plan = self.run.evaluation, self.plan
        if evaluation and evaluation.is_due(self.step, plan.steps_per_epoch, plan.total_steps):
            with self.run.phases.measure("evaluation", on_host=True):
                scores = evaluation.quick(self.run.model)
            self.log.evaluated(self.step, scores)

    def stored(self) -> dict[str, Stored]:
        """What a checkpoint holds besides the weights: name -> who gives it, who takes it."""
        run, update, features, watch = self.run, self.update, self.features, self.watch
        load_adamw = partial(load_optimiser, update.adamw)
        return {
            "global_batch_size": Stored(lambda: self.plan.global_batch_size),
            "passes": Stored(lambda: run.passes),
            "precision": Stored(lambda: run.precision),
            "terms": Stored(lambda: vars(run.active)),
            "data": Stored(lambda: run.data_fingerprint),
            "own_terms": Stored(self.terms.state, self.terms.load_state),
            "optimizer": Stored(update.adamw.state_dict, load_adamw),
            "scaler": Stored(update.scaler.state_dict, update.load_scaler),
            "features": Stored(features.state, features.load_state),
            "episode": Stored(
                lambda: self.episode and self.episode.state_dict(), self._load_episode
            ),
            "watch": Stored(watch.state_dict, watch.load_state_dict),
            "faults": Stored(self.faults.state, self.faults.load_state),
            "seconds": Stored(run.phases.saved, run.phases.add),
            "skipped": Stored(self.log.state, self.log.load_state),
        }

    def _load_episode(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            self.episode = Episode.from_state(saved, self.run.device)

    def save(self, epoch: int | None = None) -> None:
        """Write a checkpoint that OpenCLIP can read: epoch_latest.pt, and with ``epoch`` the same
        one under that number."""
        with self.run.phases.measure("checkpoint", on_host=True):
            values = {name: row.give() for name, row in self.stored().items()}
            self.run.folder.checkpoint(state.payload(values, self.step, self.run), epoch)
        self.stops.saved(self.step)
        self.faults.check(len(values["faults"]))  # of all ranks: each has counted its own

    def restore(self, resume: Resume) -> list[str]:
        """Continue from a checkpoint of the same run; returns notes on what will differ.

        Raises:
            ValueError: the checkpoint has other settings, or something is missing.
        """
        run, plan = self.run, self.plan
        notes = check_resume(resume, run.config, plan.global_batch_size, run.data_fingerprint)
        self.step = resume.step
        run.model.load_state(dict(resume.payload))
        saved = state.restore(resume, self.stored())
        if self.episode is not None:
            self.log.resume_episode(self.step, self.episode.metrics)
        notes = [f"resumed: {resume.file}, after step {self.step} of {plan.total_steps}", *notes]
        return notes + state.differences(run, saved)
