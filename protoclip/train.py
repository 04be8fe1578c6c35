"""Train CLIP or ProtoCLIP: ``protoclip train``.

Without arguments it trains ProtoCLIP on the built-in icons in a few minutes on two CPU cores,
and leaves results, plots and a checkpoint in a run folder. Read from ``train`` down: open
and check everything, resume, train episode by episode, evaluate, report.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip import distributed
from protoclip.common.host import keep_freed_memory
from protoclip.common.phases import Phases
from protoclip.common.seeds import generator, seed_everything
from protoclip.data import Batch, Draws, PairDataset, batches, build_transform
from protoclip.data.loader import EpochOrder, Faults
from protoclip.data.settings import open_run_data
from protoclip.distributed import progress_hidden
from protoclip.episodes import prototypes
from protoclip.episodes.feature_store import (
    Features,
    FeatureSource,
    FeatureStore,
    buffer_bytes,
    choose_features,
    table_bytes,
)
from protoclip.episodes.prototypes import Episode
from protoclip.episodes.teacher import open_teacher
from protoclip.evaluate.during import Evaluation, PeriodicEvaluation
from protoclip.losses import ProtoLoss
from protoclip.model import (
    ProtoModel,
    build_model,
    choose_device,
    choose_precision,
    match_layout,
    put_channels_last,
)
from protoclip.runs import checkpoint
from protoclip.runs.resume import check_resume, open_resume, refuse_changes, with_saved_config
from protoclip.runs.run_folder import NullRunFolder, RunFolder, choose_folder
from protoclip.settings.commands import train_parser
from protoclip.settings.config import TrainConfig, to_dict
from protoclip.settings.flags import parse
from protoclip.training import schedule
from protoclip.training.checks import (
    Terms,
    active_terms,
    check_settings,
    loss_weights,
    uses_prototypes,
)
from protoclip.training.step import Step, Stepper, depends_on_split
from protoclip.training.summary import announce, conclude

PROG = "protoclip train"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's mistake, 130 after Ctrl-C."""

    def work() -> int:
        info = distributed.find_rank()
        with distributed.quiet_beside_main(info):
            config = parse(train_parser(), with_saved_config(argv))
        device = choose_device(config.run.device)
        if device.type == "cpu" and (argv is None or sys.argv[1:] == ["train", *argv]):
            keep_freed_memory()  # the process is ours; called from Python, main changes nothing
        distributed.start(info, device, config.run.dist_timeout, config.run.dist_backend)
        return train(config, device)

    return distributed.run_command(work, PROG)


def train(config: TrainConfig, device: torch.device) -> int:
    """Do a whole run: data, model, teacher, training, evaluation, plots; returns the exit code.

    Raises:
        ValueError: something in the config does not exist, or settings contradict each other.
            Nothing has been written then.
        OSError: the disk is full; the last checkpoint, if there is one, is intact.
    """
    check_settings(config, device)
    resume = open_resume(config)
    path = distributed.from_main(lambda: resume.folder if resume else choose_folder(config))
    run_data = open_run_data(config)
    dataset = run_data.training
    order = EpochOrder(dataset, config.data.shuffle_buffer)
    plan = schedule.make_plan(config, order.size)
    if resume and resume.step >= plan.total_steps:
        refuse_changes(resume, config)
        if (path / "results.json").exists():
            print(f"{path} is complete: {resume.step} steps and its results", file=sys.stderr)
            return 0
    precision = distributed.from_main(lambda: choose_precision(config.run.precision, device))
    setup = Setup(config, plan, dataset, order, device, precision)
    if uses_prototypes(config):
        prototypes.check_clusters(config.episode, setup.episode_samples)
    seed_everything(config.run.seed)
    model = build_model(config.model).to(device)
    put_channels_last(model, device)
    phases = Phases(device)
    with phases.measure("teacher", on_host=True):
        teacher, remark = distributed.from_main(lambda: open_teacher(config, dataset, device))
    if teacher is not None:
        setup = replace(setup, teacher=teacher.to(device))
    evaluation = Evaluation(config, run_data, device, precision, phases)
    reuses = None if resume is None else resume.training["features"] is not None
    trainer = Trainer(setup, model, NullRunFolder(path), phases, evaluation.during, reuses)
    notes = []
    if resume:  # check everything before touching the folder
        notes.append(f"resumed: {resume.file}, after step {resume.step} of {plan.total_steps}")
        notes += check_resume(resume, config, plan.global_batch_size, dataset.keys)
        notes += trainer.restore(resume.payload)
    if distributed.is_main():
        step = resume.step if resume else 0 if path.exists() else None
        trainer.folder = RunFolder(path, config, step)
    folder = trainer.folder
    try:
        announce(
            folder,
            config,
            plan,
            dataset=dataset,
            device=device,
            precision=precision,
            terms=trainer.terms,
            features=trainer.features,
            episode_samples=setup.episode_samples,
            teacher_remark=remark,
        )
        for note in filter(None, [evaluation.remark, *notes]):
            folder.say(note)
        before = evaluation.untrained(path, model, resumed=resume is not None)
        trainer.run()
        after = evaluation.full(model, "evaluating the trained model")
        if distributed.is_main():
            conclude(
                folder,
                config,
                model,
                dataset=dataset,
                episode=trainer.episode,
                evaluation=evaluation,
                phases=phases,
                before=before,
                after=after,
            )
    except schedule.Stopped as stop:
        folder.say(stop.message)
        return stop.code
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.note(traceback.format_exc())
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise full_disk(error, path) from error
        raise
    finally:
        folder.close()
    return 0


def full_disk(error: OSError, path: Path) -> OSError:
    """The error with what to do about it."""
    if checkpoint.candidates(path):
        remedy = f"the last checkpoint is intact, free some space and continue with --resume {path}"
    else:
        remedy = f"there is no checkpoint yet; free some space, remove {path} and start again"
    return OSError(f"{error.filename or path}: {error.strerror}; {remedy}")


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

    @property
    def episode_samples(self) -> int:
        """Samples per episode, at most; the last episode may be shorter."""
        return min(len(self.dataset), self.plan.steps_per_episode * self.plan.global_batch_size)


class Trainer:
    """Trains a model on the setup's device, episode by episode.

    Its ``Stepper`` holds the optimiser and counts the skipped steps; the trainer holds everything
    else that changes. ``evaluations`` are repeated between the steps.
    ``reuses``: whether a resumed run stores training's own features, whatever "auto" would choose.
    """

    def __init__(
        self,
        setup: Setup,
        model: ProtoModel,
        folder: NullRunFolder,
        phases: Phases | None = None,
        evaluations: Sequence[PeriodicEvaluation] = (),
        reuses: bool | None = None,
    ) -> None:
        self.setup = setup
        self.config = setup.config
        self.plan = setup.plan
        self.dataset = setup.dataset
        self.model = model
        self.folder = folder
        self.phases = phases or Phases(setup.device)
        self.evaluations = evaluations
        teacher = setup.teacher is not None
        self.terms = active_terms(self.config, teacher=teacher)
        self.transform = build_transform(
            model.image_size, model.mean, model.std, self.config.data.augmentation
        )
        self.stepper = Stepper(
            model,
            ProtoLoss(
                loss_weights(self.config, teacher=teacher), setup.teacher, self.phases.measure
            ),
            self.config.optim,
            setup.precision,
            self.phases,
            self.config.run.seed,
        )
        classes = {
            name: labels.ids.to(setup.device)
            for name, labels in self.dataset.labels.items()
            if bool((labels.ids >= 0).all())  # known of every sample
        }
        self.builder = prototypes.EpisodeBuilder(
            self.config.episode,
            teacher=setup.teacher if self.terms.external else None,
            internal=self.terms.internal,
            classes=classes,
        )
        self.features = self._choose_features(reuses)
        self.store: FeatureStore | None = None
        if self.features.reuses:
            self.store = FeatureStore(
                len(self.dataset),
                self.plan.steps_per_episode,
                self.plan.global_batch_size,
                setup.device,
                self.features.table_device,
            )
        self.watch = prototypes.Watch()
        self.faults = Faults(
            self.dataset, self.config.data.max_bad_fraction, lambda text: self.folder.say(text)
        )
        self.episode: Episode | None = None
        self.step = 0
        self.signals = schedule.StopSignals()
        # How a step's batch is split: ranks, and forward passes of each.
        self._split = [distributed.world_size(), self.config.optim.accum_freq]
        self._episode_metrics: Mapping[str, float] = {}  # of a new episode, until the next log
        self._reported_skips = 0  # skipped steps, as last read from the device
        self._loss = math.nan  # as last logged
        self._save_every = schedule.parse_interval(self.config.run.save_every)
        self._saved_time = time.monotonic()
        self._saved_step = -1
        nothing = schedule.Requests(save=False, stop=schedule.StopRequest.NONE)
        self._agreed_requests: Callable[[], schedule.Requests] = lambda: nothing
        self._begin_clock()

    def _choose_features(self, reuses: bool | None) -> FeatureSource:
        """Where the features of clusters and labels come from."""
        if not self.terms.prototypes:
            return FeatureSource(False, "none")
        ranks = distributed.world_size()
        dim = self.model.projection_dim
        drawn = self.plan.steps_per_episode * self.plan.global_batch_size
        size = table_bytes(len(self.dataset), ranks, dim) + buffer_bytes(drawn, ranks, dim)
        episode = self.config.episode
        if reuses is not None:
            episode = replace(episode, features="reuse" if reuses else "extract")
        return choose_features(episode, self.plan.epochs, size, self.setup.device)

    def _begin_clock(self) -> None:
        self._began_time = self._logged_time = time.perf_counter()
        self._began_step = self._logged_step = self.step

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: a signal asked the run to stop; the state is saved.
        """
        plan = self.plan
        self._begin_clock()
        with (
            self.signals,
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
            if self._saved_step != self.step:
                self.save(None)

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
                project=self.terms.projects,
                lr=lr,
                image_lr=schedule.image_learning_rate(config, plan, step_number),
            )
            self._store_features(step_number, episode_number, step_batches, outcome)
            self.watch.count(outcome.losses.hits)
            self.step += 1
            self._log_or_check(outcome, step_batches, lr, episode_number)
            bar.set_postfix(loss=f"{self._loss:.3f}", refresh=False)
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
        elif done == 0 and warmed_up and self.terms.prototypes:
            samples = draws
            if self.store is not None:  # also of steps that only a resume with more steps would do
                samples = self._draw(range(steps.start, steps.start + plan.steps_per_episode))
            self.episode = self._build_episode(episode_number, samples.unique())
        self.model.train()
        positions, draw_numbers = schedule.own_draws(plan, draws)
        own_draws = Draws(
            positions=positions,
            seed=schedule.episode_seed(config.run.seed, episode_number, schedule.TRAINING),
            start=done * plan.global_batch_size // distributed.world_size(),
            numbers=draw_numbers,
        )
        return self._batches(own_draws)

    def _draw(self, steps: range) -> Tensor:
        """The positions that these steps train on, over all ranks."""
        return schedule.draw(
            self.plan,
            self.config.run.seed,
            steps,
            replacement=self.config.episode.replacement,
            order=self.setup.order.permutation,
        )

    def _batches(self, draws: Draws) -> Iterator[Batch]:
        stream = batches(
            self.dataset,
            draws,
            self.config.optim.batch_size,
            self.transform,
            self.model.short_tokenizer,
            workers=self.config.data.workers,
            captions=self.config.data.captions,
            faults=self.faults,
        )
        return iter(stream)

    def _build_episode(self, episode_number: int, samples: Tensor) -> Episode | None:
        """Build the prototypes of an episode that trains on ``samples``, int64 [M] sorted
        positions; None while too few of them have stored features."""
        seed = self.config.run.seed
        with self.phases.measure("features"):
            recent = None
            if self.store is None:
                features = self._extract_features(episode_number, samples)
            else:
                features = self.store.of_positions(samples)
                if self.builder.teacher is not None:
                    recent = self.store.of_episode(episode_number - 1)
        with self.phases.measure("clusters"):
            random = generator(seed, schedule.EPISODES, episode_number, schedule.CLUSTERS)
            episode = self.builder.build(samples, features, random, recent, self.episode)
        if episode is None:
            return None
        episode = replace(episode, metrics={**episode.metrics, **self.watch.accuracy()})
        self._episode_metrics = episode.metrics
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
        stream = self._batches(draws)
        return prototypes.extract(
            self.model,
            self._stoppable(stream),
            device=self.setup.device,
            autocast=self.stepper.autocast,
        )

    def _stoppable(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the stream on; it may take minutes, so a single process can stop inside it."""
        bar = tqdm(stream, "features", unit=" batches", leave=False, disable=progress_hidden())
        for batch in bar:
            yield batch
            if self.signals.asked and not distributed.is_distributed():
                self._save_or_stop()  # nothing has changed since the last step

    def _store_features(
        self, step_number: int, episode_number: int, step_batches: Sequence[Batch], outcome: Step
    ) -> None:
        """Put the step's projections into the buffer, which moves to the table after the episode's
        last step; those of a skipped step belong to no sample."""
        if self.store is None or outcome.projected is None:
            return
        positions = torch.cat([batch.index for batch in step_batches]).to(self.setup.device)
        positions = positions.where(outcome.finite, -1)
        steps = self.plan.steps_of(episode_number)
        projected = outcome.projected
        self.store.put(step_number - steps.start, positions, projected.image, projected.text)
        if step_number == steps[-1]:  # before anything can save
            self.store.end_episode(episode_number)

    def _log_or_check(
        self, outcome: Step, step_batches: Sequence[Batch], lr: float, episode_number: int
    ) -> None:
        """After a step: log if it is time, and look for skipped steps if that costs no waiting."""
        last = self.step == self.plan.total_steps
        logs = last or self.step % self.config.run.log_every_n_steps == 0
        if logs:
            self._log(outcome, lr, episode_number)
        if logs or self.setup.device.type == "cpu":  # on a CPU reading a number is free
            self._check_skipped(step_batches)

    def _check_skipped(self, step_batches: Sequence[Batch]) -> None:
        """Log skipped steps; after --max-bad-steps in a row, save and stop."""
        total = int(self.stepper.skipped_steps)
        if total == self._reported_skips:
            return
        self._reported_skips = total
        in_a_row = int(self.stepper.consecutive_skips)
        keys = [self.dataset.keys[i] for batch in step_batches for i in batch.index.tolist()]
        self.folder.note(f"step {self.step} skipped: not finite, {total} so far; samples: {keys}")
        if in_a_row >= self.config.run.max_bad_steps:
            self.save(None)
            raise ValueError(
                f"training: loss or gradient was not finite in {in_a_row} steps in a row, up to "
                f"step {self.step} (its samples are in out.log, first {keys[0]}); lower --lr, use "
                "--precision fp32, or find the operation with torch.autograd."
                f"set_detect_anomaly(True); the last finite weights are in {self.folder.path}"
            )

    def _log(self, outcome: Step, lr: float, episode_number: int) -> None:
        """Read the device once; write one line of metrics and one line of progress."""
        now = time.perf_counter()
        samples = (self.step - self._logged_step) * self.plan.global_batch_size
        record = self._means(outcome) | {
            "lr": lr,
            "epoch": self.step / self.plan.steps_per_epoch,
            "episode": episode_number,
            "samples_per_second": samples / (now - self._logged_time),
        }
        self._logged_time = now
        self._logged_step = self.step
        for phase, seconds in self.phases.seconds().items():
            record[f"seconds_{phase}"] = seconds
        record |= self._episode_metrics
        self._episode_metrics = {}
        self.folder.metrics(self.step, self.step * self.plan.global_batch_size, record)
        if "same_caption" in record and self.step == self.config.run.log_every_n_steps:
            pairs = self.plan.global_batch_size // distributed.world_size()
            self.folder.note(
                f"--dedup {self.config.loss.dedup}: in a batch of {pairs} pairs, "
                f"{record['same_caption']:g} share their caption with another one"
            )
        self._loss = record.get("loss", math.nan)
        total = self.plan.total_steps
        per_step = (now - self._began_time) / (self.step - self._began_step)
        seconds_left = round((total - self.step) * per_step)
        self.folder.note(
            f"step {self.step}/{total}, loss {self._loss:.4f}, {record['samples_per_second']:,.0f} "
            f"samples/s, ETA {datetime.timedelta(seconds=seconds_left)}"
        )

    def _means(self, outcome: Step) -> dict[str, float]:
        """The step's scalars, means over ranks; without those that are not finite, and without
        counts of bad steps and samples that are 0."""
        # Each rank counts its own bad samples: multiplied by the ranks, their mean is the sum.
        faults = torch.tensor(float(len(self.faults.positions)) * distributed.world_size())
        scalars = {
            **outcome.losses.terms,
            **outcome.losses.accuracy,
            "loss": outcome.losses.total,
            # Both are the multipliers, under the names of their parameters, the logarithms.
            "logit_scale": self.model.logit_scale,
            "logit_scale_proto": self.model.proto_logit_scale,
            "grad_norm": outcome.norm,
            "bad_steps": self.stepper.skipped_steps,
            "bad_samples": (faults + self.faults.known).to(self.setup.device),
        }
        if outcome.same_caption is not None:
            scalars["same_caption"] = outcome.same_caption
        if self.model.logit_bias is not None:
            scalars["logit_bias"] = self.model.logit_bias
        values = torch.stack([v.detach().float().reshape(()) for v in scalars.values()])
        means = distributed.mean_over_ranks(values).tolist()
        return {
            name: mean
            for name, mean in zip(scalars, means, strict=True)
            if math.isfinite(mean) and (mean or not name.startswith("bad_"))
        }

    def _between_steps(self) -> None:
        """Evaluate and save at the end of an epoch that asks for it, or after a signal."""
        per_epoch = self.plan.steps_per_epoch
        last = self.step == self.plan.total_steps
        for evaluation in self.evaluations:
            interval_steps = max(1, round(evaluation.interval_epochs * per_epoch))
            if last or self.step % interval_steps == 0:
                with self.phases.measure("evaluation", on_host=True):
                    scalars = evaluation.evaluate(self.model)
                self.folder.metrics(self.step, self.step * self.plan.global_batch_size, scalars)
                self._logged_time = time.perf_counter()
                self._logged_step = self.step
        epochs = self.config.run.save_frequency
        if epochs and self.step % (epochs * per_epoch) == 0:
            self.save(self.step // per_epoch)
        self._save_or_stop()

    def _save_or_stop(self) -> None:
        """Save if --save-every asks for it; save and stop if a signal does."""
        requests = self._agreed_requests()  # of one step ago
        every = self._save_every
        if requests.stop or requests.save or (every.steps and self.step % every.steps == 0):
            self.save(None)
        if requests.stop:
            by_ctrl_c = requests.stop == schedule.StopRequest.CTRL_C
            signal = "Ctrl-C" if by_ctrl_c else self.signals.asked or "a signal to another rank"
            raise schedule.Stopped(
                f"stopped by {signal} after step {self.step}; continue with --resume "
                f"{self.folder.path}",
                code=130 if by_ctrl_c else 0,
            )
        due = 0 < every.seconds <= time.monotonic() - self._saved_time  # by this rank's clock
        self._agreed_requests = schedule.agree_later(
            schedule.Requests(save=due, stop=self.signals.request)
        )

    def save(self, epoch: int | None) -> None:
        """Write a checkpoint that OpenCLIP can read; ``epoch`` None: epoch_latest.pt."""
        with self.phases.measure("checkpoint", on_host=True):
            self.folder.checkpoint(self.state(epoch), epoch)
        if epoch is None:
            self._saved_time = time.monotonic()
            self._saved_step = self.step

    def state(self, epoch: int | None) -> dict[str, Any]:
        """The content of a checkpoint, the same for any number of ranks; a collective call."""
        faults_by_rank = distributed.gather_objects(sorted(self.faults.positions))
        stored = None
        if self.store is not None:
            stored = self.store.state_dict(self.folder.path / "checkpoints")
        return {
            "epoch": epoch or math.ceil(self.step / self.plan.steps_per_epoch),
            "name": self.folder.path.name,
            "state_dict": self.model.clip.state_dict(),
            "optimizer": self.stepper.adamw.state_dict(),
            "protoclip": {
                **self.model.extra_state(),
                "format": checkpoint.FORMAT,
                "config": to_dict(self.config),
                "step": self.step,
                "training": {
                    "batch_size": self.plan.global_batch_size,
                    "passes": self._split,
                    "precision": self.setup.precision,
                    "terms": asdict(self.terms),
                    "scaler": self.stepper.scaler.state_dict(),
                    "episode": None if self.episode is None else self.episode.state_dict(),
                    "watch": self.watch.state_dict(),
                    "features": stored,
                    "skipped": [
                        int(self.stepper.skipped_steps),
                        int(self.stepper.consecutive_skips),
                    ],
                    "faults": sorted({fault for faults in faults_by_rank for fault in faults}),
                    "seconds": self.phases.seconds(),
                    "data": checkpoint.fingerprint(self.dataset.keys),
                },
            },
        }

    def restore(self, payload: Mapping[str, Any]) -> list[str]:
        """Continue from a checkpoint of the same run; returns notes on what will differ.

        Raises:
            ValueError: the checkpoint has other settings, or something is missing.
        """
        try:
            training = payload["protoclip"]["training"]
            self.model.load_state(dict(payload))
            self.stepper.load_state(payload["optimizer"], training["scaler"])
            match_layout(self.stepper.adamw)
            skipped = torch.tensor([*map(index, training["skipped"])]).reshape(2)
            total, in_a_row = skipped.to(self.setup.device).unbind()
            self.stepper.skipped_steps = total
            self.stepper.consecutive_skips = in_a_row
            self._reported_skips = int(total)
            self.episode = None
            if training["episode"] is not None:
                self.episode = Episode.from_state(training["episode"], self.setup.device)
            self.watch.load_state_dict(training["watch"], self.setup.device)
            if self.store is not None:
                self.store.load_state_dict(training["features"])
            faults = set(map(index, training["faults"]))
            self.faults.positions = faults if distributed.is_main() else set()
            self.phases.add(training["seconds"])
            self.step = payload["protoclip"]["step"]
            every = self.config.run.log_every_n_steps
            first = self.step // self.plan.steps_per_episode * self.plan.steps_per_episode
            unlogged = first < self.step and first // every == self.step // every
            if self.episode is not None and unlogged:
                self._episode_metrics = self.episode.metrics  # no line has held them yet
            same_split = training["passes"] == self._split
            precision = training["precision"]
            terms = Terms(**training["terms"])
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                "--resume: the checkpoint does not hold the state of this run "
                f"({type(error).__name__}: {str(error)[:300]}); use an older checkpoint"
            ) from error
        notes = []
        if not same_split and depends_on_split(self.model):
            notes.append(
                "note: the number of ranks or passes has changed; this model has dropout or batch "
                "norm by rank or pass, so the losses differ from those of an uninterrupted run"
            )
        if precision != self.setup.precision:
            notes.append(
                f"note: until now the run computed in {precision}, and --precision auto means "
                f"{self.setup.precision} here, so the losses differ from those of an uninterrupted "
                f"run; --precision {precision} goes on as before"
            )
        if terms != self.terms:
            notes.append(
                f"note: until now the run trained {terms.words()}, and from here on "
                f"{self.terms.words()}, so the losses differ from those of an uninterrupted run"
            )
        return notes


if __name__ == "__main__":
    sys.exit(main())
