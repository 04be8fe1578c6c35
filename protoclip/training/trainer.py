"""The training loop: episodes, steps, and what happens between them.

Read ``Trainer.run`` down; one step is in ``step.py``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip import distributed
from protoclip.common.files import plural
from protoclip.common.phases import Phases
from protoclip.common.seeds import generator
from protoclip.data import Batch, Draws, PairDataset, build_transform
from protoclip.data.loader import EpochOrder, Faults, Loader
from protoclip.distributed import progress_hidden
from protoclip.episodes import prototypes
from protoclip.episodes.feature_store import Features
from protoclip.episodes.prototypes import Episode
from protoclip.evaluate.during import PeriodicEvaluation
from protoclip.losses import ProtoLoss, Term
from protoclip.model import ProtoModel
from protoclip.runs import checkpoint, state
from protoclip.runs.run_folder import NullRunFolder
from protoclip.runs.state import TrainingState
from protoclip.settings.config import TrainConfig
from protoclip.training import schedule
from protoclip.training.checks import (
    ActiveLosses,
    active_losses,
    depends_on_split,
    loss_weights,
)
from protoclip.training.features import EpisodeFeatures
from protoclip.training.log import Log, scalars_of
from protoclip.training.step import Step, Stepper
from protoclip.training.stops import SaveTimes, Stopped, StopRequest, StopSignals

MOST_SKIPPED = 0.9  # of all steps; a run with more has trained nothing
IF_NOT_FINITE = (
    "lower --lr, use --precision fp32, or find the operation with torch.autograd."
    "set_detect_anomaly(True)"
)


@dataclass(frozen=True)
class Setup:
    """What a run needs once everything is open."""

    config: TrainConfig
    plan: schedule.Plan
    dataset: PairDataset
    order: EpochOrder
    device: torch.device
    precision: str  # "fp32", "amp_bf16" or "amp"
    teacher: Tensor | None = None  # [dataset, d] fp32, on the device
    workers: int = 0  # processes that read images

    @property
    def episode_samples(self) -> int:
        """Samples per episode, at most; the last episode may be shorter."""
        return min(len(self.dataset), self.plan.steps_per_episode * self.plan.global_batch_size)


class Trainer:
    """Trains a model on the setup's device, episode by episode.

    Its ``Stepper`` holds the optimiser and counts the skipped steps; the trainer holds everything
    else that changes. ``evaluations`` are repeated between the steps.
    ``reuses``: whether a resumed run stores training's own features, whatever "auto" would choose.
    ``terms``: losses of the user's own, by name.
    """

    def __init__(
        self,
        setup: Setup,
        model: ProtoModel,
        folder: NullRunFolder,
        phases: Phases | None = None,
        evaluations: Sequence[PeriodicEvaluation] = (),
        reuses: bool | None = None,
        terms: Mapping[str, Term] | None = None,
    ) -> None:
        self.setup = setup
        self.config = setup.config
        self.plan = setup.plan
        self.dataset = setup.dataset
        self.model = model
        self.folder = folder
        self.phases = phases or Phases(setup.device)
        self.evaluations = evaluations
        has_teacher = setup.teacher is not None
        self.active = active_losses(self.config, has_teacher=has_teacher)
        weights = loss_weights(self.config, has_teacher=has_teacher)
        loss = ProtoLoss(weights, setup.teacher, self.phases.measure)
        self.stepper = Stepper(
            model,
            loss,
            self.config.optim,
            precision=setup.precision,
            phases=self.phases,
            seed=self.config.run.seed,
            terms=terms,
            compiled=self.config.model.torchcompile,
        )
        classes = {
            name: labels.ids.to(setup.device)
            for name, labels in self.dataset.labels.items()
            if bool((labels.ids >= 0).all())  # known of every sample
        }
        self.builder = prototypes.EpisodeBuilder(
            self.config.episode,
            teacher=setup.teacher if self.active.external else None,
            internal=self.active.internal,
            classes=classes,
        )
        self.features = EpisodeFeatures(
            self.config.episode,
            self.plan,
            samples=len(self.dataset),
            dim=model.projection_dim,
            device=setup.device,
            needed=self.active.prototypes,
            reuses=reuses,
            extract=self._extract_features,
        )
        self.watch = prototypes.Watch()
        self.faults = Faults(
            self.dataset, self.config.data.max_bad_fraction, lambda text: self.folder.say(text)
        )
        self.loader = Loader(
            self.dataset,
            self.config.optim.batch_size,
            build_transform(model.image_size, model.mean, model.std, self.config.data.augmentation),
            model.short_tokenizer,
            workers=setup.workers,
            prefetch_factor=self.config.data.prefetch_factor,
            captions=self.config.data.captions,
            faults=self.faults,
            pin_memory=setup.device.type == "cuda",
        )
        self.episode: Episode | None = None
        self.step = 0
        self.signals = StopSignals()
        self.saves = SaveTimes(self.config.run.save_every, self.signals)
        self.log = Log(self.config, self.plan, self.phases, setup.device)

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: weights, their two moments, and stored features."""
        weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        return 3 * weights + self.features.checkpoint_bytes()

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: a signal asked the run to stop; the state is saved.
            ValueError: hardly a step had a finite loss and gradient; the state is saved.
        """
        plan = self.plan
        self.log.begin(self.step)
        with (
            self.signals,
            contextlib.closing(self.loader),
            tqdm(
                initial=self.step * plan.global_batch_size,
                total=plan.total_steps * plan.global_batch_size,
                unit=" samples",
                unit_scale=True,
                smoothing=0.1,
                disable=progress_hidden(),
            ) as bar,
        ):
            first_episode = self.step // plan.steps_per_episode
            for episode_number in range(first_episode, plan.episodes):
                self.run_episode(episode_number, bar)
            self._finish_line()
            if self.saves.saved_step != self.step:
                self.save(None)
        self._check_taken()

    def _check_taken(self) -> None:
        """ValueError if hardly a step of the run was taken."""
        skipped = self.log.reported_skips
        if skipped <= MOST_SKIPPED * self.plan.total_steps:
            return
        last = self.log.last_skipped
        numbers = f" (in the last one: {', '.join(last.numbers)})" if last and last.numbers else ""
        raise ValueError(
            f"training: {skipped:,} of {plural(self.plan.total_steps, 'step')} were skipped, as "
            f"loss or gradient was not finite{numbers}, so the model has not been trained; "
            f"{IF_NOT_FINITE}; then remove {self.folder.path} and start again"
        )

    def run_episode(self, episode_number: int, bar: tqdm) -> None:
        """Build the episode's prototypes, if it has any, then run its steps."""
        config = self.config
        plan = self.plan
        steps = plan.steps_of(episode_number)
        bar.set_description(f"episode {episode_number + 1}/{plan.episodes}")
        stream = self._begin_episode(episode_number)
        for step_number in steps[self.step - steps.start :]:  # an interrupted run has done some
            with self.phases.measure("data", on_host=True):
                step_batches = [next(stream) for _ in range(config.optim.accum_freq)]
            lr = schedule.learning_rate(config.optim, plan.total_steps, step_number)
            outcome = self.stepper.step(
                step_number,
                step_batches,
                self.episode,
                project=self.active.projects,
                lr=lr,
                image_lr=schedule.image_learning_rate(config, plan, step_number),
            )
            self.features.put(step_number, episode_number, outcome)
            self.watch.count(outcome.losses.hits)
            self.step += 1
            self._log_or_check(outcome, step_batches, lr)
            bar.set_postfix(loss=f"{self.log.loss:.3f}", refresh=False)
            bar.update(plan.global_batch_size)
            self._between_steps()

    def _begin_episode(self, episode_number: int) -> Iterator[Batch]:
        """Build the episode's prototypes, if it has any; returns the batches of its steps from the
        current one on."""
        config = self.config
        plan = self.plan
        steps = plan.steps_of(episode_number)
        draws = self._draw(steps)
        done = self.step - steps.start  # steps of this episode before an interruption
        warmed_up = episode_number >= config.episode.infonce_warmup
        if 0 < config.episode.lit_start <= episode_number:
            self.episode = None  # LiT: the image tower is frozen, InfoNCE only
            self.model.lock_image()
        elif done == 0 and warmed_up and self.active.prototypes:
            whole = range(steps.start, steps.start + plan.steps_per_episode)
            samples = draws
            if self.features.source.reuses and whole != steps:  # a resume with more steps does all
                samples = self._draw(whole)
            self.episode = self._build_episode(episode_number, samples.unique())
        self.model.train()
        positions, draw_numbers = schedule.own_draws(plan, draws)
        own_draws = Draws(
            positions=positions,
            seed=schedule.episode_seed(config.run.seed, episode_number, schedule.TRAINING),
            start=done * plan.global_batch_size // distributed.world_size(),
            numbers=draw_numbers,
        )
        return self.loader.batches(own_draws)

    def _draw(self, steps: range) -> Tensor:
        """The positions that these steps train on, over all ranks."""
        return schedule.draw(
            self.plan,
            self.config.run.seed,
            steps,
            replacement=self.config.episode.replacement,
            order=self.setup.order.permutation,
        )

    def _build_episode(self, episode_number: int, samples: Tensor) -> Episode | None:
        """Build the prototypes of an episode that trains on ``samples``, int64 [M] sorted
        positions; None while too few of them have stored features."""
        seed = self.config.run.seed
        with self.phases.measure("features"):
            features = self.features.of_samples(episode_number, samples)
            recent = None
            if self.builder.teacher is not None:
                recent = self.features.of_episode(episode_number - 1)
        with self.phases.measure("clusters"):
            random = generator(seed, schedule.EPISODES, episode_number, schedule.CLUSTERS)
            episode = self.builder.build(samples, features, random, recent, self.episode)
        if episode is None:
            return None
        episode = replace(episode, metrics={**episode.metrics, **self.watch.accuracy()})
        self.log.episode_metrics = episode.metrics
        if warning := self.watch.collapse(episode.metrics):
            self.folder.say(f"step {self.step}: {warning}")
        return episode

    def _extract_features(self, episode_number: int, samples: Tensor) -> Features:
        """A forward pass over this rank's share of the samples."""
        draw_numbers = torch.arange(len(samples))[distributed.own_slice(len(samples))]
        draws = Draws(
            positions=samples[draw_numbers],
            seed=schedule.episode_seed(self.config.run.seed, episode_number, schedule.FEATURES),
            numbers=draw_numbers,
        )
        return prototypes.extract(
            self.model,
            self._stoppable(self.loader.batches(draws)),
            device=self.setup.device,
            autocast=self.stepper.autocast,
        )

    def _stoppable(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the stream on; it may take minutes, so a single process can stop inside it."""
        bar = tqdm(stream, "features", unit=" batches", leave=False, disable=progress_hidden())
        for batch in bar:
            yield batch
            if self.signals.received and not distributed.is_distributed():
                self._save_or_stop()  # nothing has changed since the last step

    def _log_or_check(self, outcome: Step, step_batches: Sequence[Batch], lr: float) -> None:
        """After a step: begin a line if one is due, and finish the one before. A line that need
        not be waited for is finished at once."""
        due = self.log.due(self.step)
        if not (due or self.log.reads_freely):
            return
        self._finish_line()
        positions = [position for batch in step_batches for position in batch.index.tolist()]
        skips = {
            "bad_steps": self.stepper.skipped_steps,
            "in_a_row": self.stepper.consecutive_skips,
        }
        scalars = scalars_of(outcome, self.model, self.faults) if due else {}
        self.log.begin_line(self.step, scalars, skips, lr, positions)
        if self.log.reads_freely:
            self._finish_line()

    def _finish_line(self) -> None:
        """Write the line that was begun, if any; after --max-bad-steps skipped steps in a row, save
        and stop."""
        skipped = self.log.finish_line(self.folder, self.dataset.keys)
        if skipped is not None and skipped.in_a_row >= self.config.run.max_bad_steps:
            self.save(None)
            raise ValueError(
                f"training: loss or gradient was not finite in {skipped.in_a_row} steps in a row, "
                f"up to step {skipped.step} (its numbers and samples are in out.log, first "
                f"{skipped.key}); {IF_NOT_FINITE}; the last finite weights are in "
                f"{self.folder.path}"
            )

    def _between_steps(self) -> None:
        """Evaluate and save at the end of an epoch that asks for it, or after a signal."""
        per_epoch = self.plan.steps_per_epoch
        last = self.step == self.plan.total_steps
        for evaluation in self.evaluations:
            interval_steps = max(1, round(evaluation.interval_epochs * per_epoch))
            if last or self.step % interval_steps == 0:
                self._finish_line()
                with self.phases.measure("evaluation", on_host=True):
                    scalars = evaluation.evaluate(self.model)
                self.folder.metrics(self.step, self.step * self.plan.global_batch_size, scalars)
                self.log.pause(self.step)
        epochs = self.config.run.save_frequency
        epoch = math.ceil(self.step / per_epoch)
        if epochs and epoch % epochs == 0 and self.plan.ends_pass(self.step):
            self.save(epoch)
        self._save_or_stop()

    def _save_or_stop(self) -> None:
        """Save if it is time; save and stop if a signal asks for it."""
        requests = self.saves.requests_after(self.step)
        if requests.save or requests.stop:
            self.save(None)
        if requests.stop:
            by_ctrl_c = requests.stop == StopRequest.CTRL_C
            signal = "Ctrl-C" if by_ctrl_c else self.signals.received or "a signal to another rank"
            raise Stopped(
                f"stopped by {signal} after step {self.step}; continue with --resume "
                f"{self.folder.path}",
                code=130 if by_ctrl_c else 0,
            )
        self.saves.exchange_requests()

    def save(self, epoch: int | None) -> None:
        """Write a checkpoint that OpenCLIP can read: epoch_latest.pt, and with ``epoch`` the same
        one under that number."""
        self._finish_line()
        with self.phases.measure("checkpoint", on_host=True):
            training = self.state()
            payload = state.payload(
                training,
                step=self.step,
                epoch=epoch or math.ceil(self.step / self.plan.steps_per_epoch),
                name=self.folder.path.name,
                config=self.config,
                model=self.model,
                optimizer=self.stepper.adamw.state_dict(),
                own_terms=self.stepper.terms.state(),
            )
            self.folder.checkpoint(payload, epoch)
        self.saves.mark_saved(self.step)
        self.faults.check(len(training.faults))  # of all ranks: each has counted its own

    def state(self) -> TrainingState:
        """The state between two steps; a collective call."""
        faults_by_rank = distributed.gather_objects(sorted(self.faults.positions))
        return TrainingState(
            batch_size=self.plan.global_batch_size,
            passes=self._passes,
            precision=self.setup.precision,
            terms=asdict(self.active),
            scaler=self.stepper.scaler.state_dict(),
            episode=None if self.episode is None else self.episode.state_dict(),
            watch=self.watch.state_dict(),
            features=self.features.state_dict(self.folder.path / "checkpoints"),
            skipped=[int(self.stepper.skipped_steps), int(self.stepper.consecutive_skips)],
            faults=sorted({fault for faults in faults_by_rank for fault in faults}),
            seconds=self.phases.saved(),
            data=checkpoint.fingerprint(self.dataset.keys),
        )

    def restore(self, payload: Mapping[str, Any]) -> list[str]:
        """Continue from a checkpoint of the same run; returns notes on what will differ.

        Raises:
            ValueError: the checkpoint has other settings, or something is missing.
        """
        saved = state.read_state(payload)
        device = self.setup.device
        self.model.load_state(dict(payload))
        self.stepper.terms.load_state(payload["protoclip"].get("own_terms", {}))
        self.stepper.load_state(payload["optimizer"], saved.scaler, saved.skipped)
        self.features.load_state_dict(saved.features)
        if saved.episode is not None:
            self.episode = Episode.from_state(saved.episode, device)
        self.watch.load_state_dict(saved.watch, device)
        self.faults.positions = set(saved.faults) if distributed.is_main() else set()
        self.phases.add(saved.seconds)
        self.step = payload["protoclip"]["step"]
        self.log.reported_skips = saved.skipped[0]
        if self.episode is not None:
            self.log.resume(self.step, self.episode.metrics)
        trained = ActiveLosses(**saved.terms)
        return state.differences(
            saved,
            passes=self._passes if depends_on_split(self.model) else saved.passes,
            precision=self.setup.precision,
            trained=trained.words(),
            trains=self.active.words(),
        )

    @property
    def _passes(self) -> list[int]:
        """How a step's batch is split: ranks, and forward passes of each."""
        return [distributed.world_size(), self.config.optim.accum_freq]
