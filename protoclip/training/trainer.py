"""The training loop: episodes, steps, and what happens between them.

Read ``Trainer.train`` down. One step, with the gradient's clipping and the skip of a step that is
not finite, is in ``step.py``; ``log.py`` counts the skipped ones, ``stops.py`` decides when a run
saves or stops.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from protoclip import distributed
from protoclip.common.seeds import generator
from protoclip.common.waits import Wait
from protoclip.data import Batch, Draws
from protoclip.data.loader import Faults, Loader, Mixup
from protoclip.episodes import prototypes
from protoclip.episodes.feature_store import Features
from protoclip.episodes.prototypes import Episode
from protoclip.evaluate.during import PeriodicEvaluation
from protoclip.losses.objective import ProtoLoss
from protoclip.runs import state
from protoclip.runs.resume import Resume, check_resume
from protoclip.runs.state import TrainingState
from protoclip.training import schedule
from protoclip.training.checks import ActiveLosses, depends_on_split, loss_weights
from protoclip.training.features import EpisodeFeatures
from protoclip.training.log import Log, TooManySkipped
from protoclip.training.run import Run
from protoclip.training.step import Stepper
from protoclip.training.stops import Stops


class Trainer:
    """Trains a run's model, and holds all that changes between two steps.

    Args:
        evaluations: repeated between the steps.
    Attributes:
        step: how many are done.
        episode: the prototypes of the running episode; None: it has none.
    """

    def __init__(self, run: Run, evaluations: Sequence[PeriodicEvaluation] = ()) -> None:
        config = run.config
        self.run = run
        self.plan = run.plan
        self.evaluations = evaluations
        self.step = 0
        self.episode: Episode | None = None
        weights = loss_weights(config, has_teacher=run.teacher is not None)
        self.stepper = Stepper(
            run.model,
            ProtoLoss(weights, run.teacher, run.phases.measure),
            config.optim,
            precision=run.precision,
            phases=run.phases,
            seed=config.run.seed,
            terms=run.terms,
            compiled=config.model.torchcompile,
        )
        classes = {
            name: labels.ids.to(run.device)
            for name, labels in run.dataset.labels.items()
            if bool((labels.ids >= 0).all())  # known of every sample
        }
        self.builder = prototypes.EpisodeBuilder(
            config.episode,
            teacher=run.teacher if run.active.external else None,
            internal=run.active.internal,
            classes=classes,
        )
        self.features = EpisodeFeatures(run, self._extract_features)
        self.watch = prototypes.Watch()
        self.faults = Faults(run.dataset, config.data.max_bad_fraction, run.folder.say)
        model = run.model
        self.loader = Loader(
            run.dataset,
            config.optim.batch_size,
            model.transform(config.data.augmentation),
            model.short_tokenizer,
            workers=run.workers,
            prefetch_factor=config.data.prefetch_factor,
            captions=config.data.captions,
            faults=self.faults,
            pin_memory=run.device.type == "cuda",
        )
        self.stops = Stops(run)
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
                stream = self._begin_episode(step)
            outcome = self.stepper.step(
                step,
                self._next_batches(stream),
                self.episode,
                project=self.run.active.projects,
                lr=schedule.learning_rate(self.run.config.optim, self.plan.total_steps, step),
                image_lr=schedule.image_learning_rate(self.run.config, self.plan, step),
            )
            self.features.put(step, outcome)
            self.watch.count(outcome.losses.hits)
            self.step = step + 1
            self.log.after(self.step, outcome)
            self._evaluate_if_due()
            self._save_or_stop()

    def _next_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        """The batches of one step."""
        with self.run.phases.measure("data", on_host=True):
            return [next(stream) for _ in range(self.run.config.optim.accum_freq)]

    def _evaluate_if_due(self) -> None:
        for evaluation in self.evaluations:
            interval_steps = max(1, round(evaluation.interval_epochs * self.plan.steps_per_epoch))
            if self.step == self.plan.total_steps or self.step % interval_steps == 0:
                with self.run.phases.measure("evaluation", on_host=True):
                    scores = evaluation.evaluate(self.run.model)
                self.log.evaluated(self.step, scores)

    def _save_or_stop(self) -> None:
        what = self.stops.after(self.step)
        if what.save:
            self.save(what.epoch)
        if what.stop:
            raise what.stop

    def _begin_episode(self, step: int) -> Iterator[Batch]:
        """Build the prototypes of a step's episode, if it has any; returns the batches of the
        episode's steps from this one on."""
        config = self.run.config
        plan = self.plan
        number = plan.episode_of(step)
        steps = plan.steps_of(number)
        self.log.wait.what = f"training, episode {number + 1} of {plan.episodes}"
        draws = self._draw(steps)
        warmed_up = number >= config.episode.infonce_warmup
        if 0 < config.episode.lit_start <= number:
            self.episode = None  # LiT: the image tower is frozen, InfoNCE only
            self.run.model.lock_image()
        elif step == steps.start and warmed_up and self.run.active.prototypes:
            whole = range(steps.start, steps.start + plan.steps_per_episode)
            samples = draws
            if self.features.source.reuses and whole != steps:  # a resume with more steps does all
                samples = self._draw(whole)
            self.episode = self._build_episode(number, samples.unique())
        self.run.model.train()
        positions, draw_numbers = schedule.own_draws(plan, draws)
        done = step - steps.start  # before an interruption
        mixup = None
        if config.data.mixup:
            mixup = Mixup(config.data.mixup, draws, plan.global_batch_size)
        own_draws = Draws(
            positions=positions,
            seed=schedule.episode_seed(config.run.seed, number, schedule.TRAINING),
            start=done * plan.global_batch_size // distributed.world_size(),
            numbers=draw_numbers,
            mixup=mixup,
        )
        return self.loader.batches(own_draws)

    def _draw(self, steps: range) -> Tensor:
        """The positions that these steps train on, over all ranks."""
        return schedule.draw(
            self.plan,
            self.run.config.run.seed,
            steps,
            replacement=self.run.config.episode.replacement,
            order=self.run.order.permutation,
        )

    def _build_episode(self, number: int, samples: Tensor) -> Episode | None:
        """Build the prototypes of an episode that trains on ``samples``, int64 [M] sorted
        positions; None while too few of them have stored features."""
        phases = self.run.phases
        with phases.measure("features"):
            features = self.features.of_samples(number, samples)
            recent = None
            if self.builder.teacher is not None:
                recent = self.features.of_episode(number - 1)
        with phases.measure("clusters"):
            seed = self.run.config.run.seed
            random = generator(seed, schedule.EPISODES, number, schedule.CLUSTERS)
            episode = self.builder.build(samples, features, random, recent, self.episode)
        if episode is None:
            return None
        episode = replace(episode, metrics={**episode.metrics, **self.watch.accuracy()})
        self.log.episode_metrics = episode.metrics
        if warning := self.watch.collapse(episode.metrics):
            self.run.folder.say(f"step {self.step}: {warning}")
        return episode

    def _extract_features(self, number: int, samples: Tensor) -> Features:
        """A forward pass over this rank's share of an episode's samples."""
        draw_numbers = torch.arange(len(samples))[distributed.own_slice(len(samples))]
        draws = Draws(
            positions=samples[draw_numbers],
            seed=schedule.episode_seed(self.run.config.run.seed, number, schedule.FEATURES),
            numbers=draw_numbers,
        )
        return prototypes.extract(
            self.run.model,
            self._stoppable(self.loader.batches(draws)),
            device=self.run.device,
            autocast=self.stepper.autocast,
        )

    def _stoppable(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the stream on; it may take minutes, so a single process can stop inside it."""
        with Wait("features", unit="batches") as wait:
            for batch in stream:
                yield batch
                wait.update()
                if self.stops.received and not distributed.is_distributed():
                    self._save_or_stop()  # nothing has changed since the last step

    def save(self, epoch: int | None = None) -> None:
        """Write a checkpoint that OpenCLIP can read: epoch_latest.pt, and with ``epoch`` the same
        one under that number."""
        with self.run.phases.measure("checkpoint", on_host=True):
            training = self.state()
            payload = state.payload(
                training,
                step=self.step,
                epoch=math.ceil(self.step / self.plan.steps_per_epoch),
                name=self.run.folder.path.name,
                config=self.run.config,
                model=self.run.model,
                optimizer=self.stepper.adamw.state_dict(),
                own_terms=self.stepper.terms.state(),
            )
            self.run.folder.checkpoint(payload, epoch)
        self.stops.saved(self.step)
        self.faults.check(len(training.faults))  # of all ranks: each has counted its own

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: weights, their two moments, and stored features."""
        weights = sum(tensor.nbytes for tensor in self.run.model.state_dict().values())
        return 3 * weights + self.features.checkpoint_bytes()

    def state(self) -> TrainingState:
        """The state between two steps; a collective call."""
        faults_by_rank = distributed.gather_objects(sorted(self.faults.positions))
        return TrainingState(
            global_batch_size=self.plan.global_batch_size,
            passes=self._passes,
            precision=self.run.precision,
            terms=asdict(self.run.active),
            scaler=self.stepper.scaler.state_dict(),
            episode=None if self.episode is None else self.episode.state_dict(),
            watch=self.watch.state_dict(),
            features=self.features.state_dict(self.run.folder.path / "checkpoints"),
            skipped=self.log.state(),
            faults=sorted({fault for faults in faults_by_rank for fault in faults}),
            seconds=self.run.phases.saved(),
            data=self.run.data_fingerprint,
        )

    def restore(self, resume: Resume) -> list[str]:
        """Continue from a checkpoint of the same run; returns notes on what will differ.

        Raises:
            ValueError: the checkpoint has other settings, or something is missing.
        """
        run = self.run
        payload = resume.payload
        notes = [
            f"resumed: {resume.file}, after step {resume.step} of {self.plan.total_steps}",
            *check_resume(resume, run.config, self.plan.global_batch_size, run.data_fingerprint),
        ]
        saved = state.read_state(payload)
        self.step = resume.step
        run.model.load_state(dict(payload))
        self.stepper.terms.load_state(payload["protoclip"].get("own_terms", {}))
        self.stepper.load_state(payload["optimizer"], saved.scaler)
        self.features.load_state_dict(saved.features)
        if saved.episode is not None:
            self.episode = Episode.from_state(saved.episode, run.device)
        self.watch.load_state_dict(saved.watch, run.device)
        self.faults.positions = set(saved.faults) if distributed.is_main() else set()
        run.phases.add(saved.seconds)
        metrics = {} if self.episode is None else self.episode.metrics
        self.log.load_state(self.step, saved.skipped, metrics)
        return notes + state.differences(
            saved,
            passes=self._passes if depends_on_split(run.model) else saved.passes,
            precision=run.precision,
            trained=ActiveLosses(**saved.terms).words(),
            trains=run.active.words(),
        )

    @property
    def _passes(self) -> list[int]:
        """How a step's batch is split: ranks, and forward passes of each."""
        return [distributed.world_size(), self.run.config.optim.accum_freq]
