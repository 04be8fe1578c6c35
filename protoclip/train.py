"""Train CLIP or ProtoCLIP: ``python -m protoclip.train``, no arguments needed.

Without arguments: ProtoCLIP on the built-in emoji, at most five minutes on two CPU cores, with a
table before and after, plots and a checkpoint in a run folder. Read from ``train`` down: open and
check everything, resume, train episode by episode, evaluate, report.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib.util
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip import checkpoint, distributed, evaluate, prototypes, report, schedule
from protoclip.commands import train_parser
from protoclip.config import TrainConfig, parse, to_dict
from protoclip.data import (
    Batch,
    DataError,
    Draws,
    PairDataset,
    Subset,
    batches,
    build_transform,
    index_together,
    noto_available,
    open_dataset,
)
from protoclip.data.loader import EpochOrder, Faults
from protoclip.evaluate import Results
from protoclip.evaluate.metrics import retrieval
from protoclip.evaluate.tasks import impossible
from protoclip.kmeans import load_faiss
from protoclip.losses import ProtoLoss
from protoclip.model import (
    Encoded,
    ProtoModel,
    autocast_for,
    build_model,
    check_model,
    choose_device,
    choose_precision,
)
from protoclip.ops.backends import why_not
from protoclip.run_folder import (
    NullRunFolder,
    Resume,
    RunFolder,
    changes,
    choose_folder,
    find_resume,
    write_clusters,
)
from protoclip.step import Phases, Step, Stepper, depends_on_passes, seed_everything
from protoclip.teacher import MINILM, load_teacher, minilm_missing

Evaluate = Callable[[ProtoModel], Mapping[str, float]]
STATE = (prototypes.Episode, prototypes.Clustering, prototypes.PrototypeSet)  # in a checkpoint
PROG = "python -m protoclip.train"
PICTURED = 4096  # samples in which the run's pictures look for neighbours
SHOWN_EVERY = 60.0  # seconds between lines of progress on a screen that is no terminal
NAMED = 8  # sample keys in the message about bad steps; all of them are in out.log
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What decides which sample comes when, or which tensors there are: it must not change.
FIXED = (
    "method", "data.train_num_samples", "data.captions", "data.augmentation",
    "data.dataset_resampled", "data.train_data_upsampling_factors", "data.shuffle_buffer",
    "model.model", "model.force_", "model.lock_", "model.add_", "model.projection_", "model.use_",
    "episode.size", "episode.replacement", "run.seed", "run.precision",
)  # fmt: skip
# What else may change without a note: the global batch is compared as a whole.
FREE = ("data.", "model.", "optim.batch_size", "optim.accum_freq", "run.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's mistake, 130 after Ctrl-C."""

    def work() -> int:
        info = distributed.find_rank()
        with distributed.quiet_beside_main(info):
            config = parse(train_parser(), with_saved_config(argv))
            schedule.parse_interval(config.run.save_every)  # not after minutes of work
        device = choose_device(config.run.device)
        distributed.start(info, device, config.run.dist_timeout, config.run.dist_backend)
        with schedule.StopSignals() as signals:
            try:
                return train(config, device, signals)
            except schedule.Stopped as stop:  # before there was a run folder
                print(f"{PROG}: {stop}", file=sys.stderr)
                return stop.code

    return distributed.run_command(work, PROG)


def with_saved_config(argv: Sequence[str] | None) -> list[str]:
    """The command line; ``--resume RUN`` without a preset starts from that run's settings."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = [new for old, new in pairwise(words) if old == "--resume"]
    chosen += [word.partition("=")[2] for word in words if word.startswith("--resume=")]
    if chosen and not any(word.split("=")[0] in ("--preset", "--paper") for word in words):
        path = Path(chosen[-1])
        for folder in (path, path.parent.parent):
            if (folder / "config.json").is_file():
                return ["--preset", str(folder / "config.json"), *words]
    return words


def train(config: TrainConfig, device: torch.device, signals: schedule.StopSignals) -> int:
    """A whole run: data, model, teacher, training, evaluation, plots; returns the exit code.

    Raises:
        ValueError: something the config asks for does not exist or does not fit together. Nothing
            has been written then.
        OSError: the disk is full; the last checkpoint is whole.
    """
    check_settings(config, device)
    resume = distributed.from_main(lambda: find_resume(config))
    path = distributed.from_main(lambda: resume.folder if resume else choose_folder(config))
    dataset = open_training_data(config)
    Faults(dataset, config.data.max_bad_fraction, print)  # stops where too many are known
    order = EpochOrder(dataset, config.data)
    plan = schedule.make_plan(config, order.size)
    if resume and resume.step >= plan.total_steps and (path / "results.json").exists():
        print(f"{path} is complete: {resume.step} steps and its results", file=sys.stderr)
        return 0
    precision = choose_precision(config.run.precision, device)
    setup = Setup(config, plan, dataset, order, device, precision)
    if uses_prototypes(config):
        check_episodes(setup)
    seed_everything(config.run.seed)
    model = build_model(config.model).to(device)
    phases = Phases(device)
    with phases.measure("teacher", on_host=True):
        teacher, remark = distributed.from_main(lambda: open_teacher(config, dataset, device))
    if teacher is not None:
        setup = replace(setup, teacher=teacher.to(device))
    evaluation = Evaluation(setup, phases)
    notes = check_resume(resume, setup) if resume else []
    trainer = Trainer(setup, model, NullRunFolder(path), phases, evaluation.during(), signals)
    before = None
    if resume:  # everything is checked before the folder is touched
        before = evaluation.untrained(path, model, resumed=True)
        notes += trainer.restore(resume.payload)
    folder = NullRunFolder(path)
    if distributed.is_main():
        folder = RunFolder(path, config, resume.step if resume else 0 if path.exists() else None)
    trainer.folder = folder
    try:
        announce(folder, setup, remark)
        if resume:
            folder.say(f"resumed: {resume.file}, after step {resume.step} of {plan.total_steps}")
            for note in notes:
                folder.say(note)
        else:
            before = evaluation.untrained(path, model, resumed=False)
        trainer.run()
        after = evaluation.full(model, "evaluating the trained model")
        if distributed.is_main():
            with phases.measure("plots", on_host=True):
                draw_plots(trainer, evaluation)
            conclude(trainer, evaluation, before, after)
    except schedule.Stopped as stop:
        folder.say(str(stop))
        return stop.code
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.note(traceback.format_exc())
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise OSError(
                f"{error.filename or path}: {error.strerror}; the last checkpoint is whole, make "
                f"room and go on with --resume {path}"
            ) from error
        raise
    finally:
        folder.close()
    return 0


@dataclass(frozen=True)
class Setup:
    """What a run works with once everything is open."""

    config: TrainConfig
    plan: schedule.Plan
    dataset: PairDataset
    order: EpochOrder
    device: torch.device
    precision: str  # "fp32", "amp_bf16" or "amp"
    teacher: Tensor | None = None  # [dataset, d] fp32, on the device

    def draw(self, episode: int) -> Tensor:
        """Positions of the samples of an episode, in the order of training."""
        return schedule.draw(
            self.plan,
            self.config.run.seed,
            self.plan.steps_of(episode),
            replacement=self.config.episode.replacement,
            order=self.order.permutation,
        )


class Trainer:
    """Trains a model episode by episode; the only owner of mutable state.

    Args:
        setup: of the run.
        model: on the setup's device.
        folder: where metrics and checkpoints go.
        phases: the stopwatch.
        evaluations: pairs of a function, model -> scalars by name, and its frequency in epochs.
        signals: that ask the run to save and end.
    """

    def __init__(
        self,
        setup: Setup,
        model: ProtoModel,
        folder: NullRunFolder,
        phases: Phases | None = None,
        evaluations: Sequence[tuple[Evaluate, float]] = (),
        signals: schedule.StopSignals | None = None,
    ) -> None:
        self.setup, self.model, self.folder = setup, model, folder
        self.phases = phases or Phases(setup.device)
        self.config, self.plan, self.dataset = setup.config, setup.plan, setup.dataset
        self.evaluations, self.signals = evaluations, signals or schedule.StopSignals()
        config, weights, teacher = setup.config, setup.config.loss, setup.teacher
        internal = config.method == "protoclip" and weights.w_proto > 0
        external = teacher is not None and weights.w_proto_external > 0
        self.clusters = internal or external
        # The heads run from step 0 on, for their running statistics.
        self.projects = self.clusters or (teacher is not None and weights.w_distill > 0)
        self.transform = build_transform(
            model.image_size, model.mean, model.std, config.data.augmentation
        )
        self.stepper = Stepper(
            model,
            ProtoLoss(weights, teacher),
            config.optim,
            precision=setup.precision,
            phases=self.phases,
            seed=config.run.seed,
        )
        self.builder = prototypes.EpisodeBuilder(
            config.episode,
            self.dataset.keys,
            teacher=teacher if external else None,
            internal=internal,
            classes={n: known.ids.to(setup.device) for n, known in self.dataset.labels.items()},
        )
        self.store: prototypes.FeatureStore | None = None
        if config.episode.reuses and self.projects:
            self.store = prototypes.FeatureStore(
                self.plan.steps_per_episode, self.plan.batch_size, setup.device
            )
        self.faults = Faults(
            self.dataset, config.data.max_bad_fraction, lambda text: self.folder.say(text)
        )
        self.episode: prototypes.Episode | None = None
        self.step = 0
        self._old_faults = 0  # of the checkpoint, known to all ranks
        self._skipped = 0  # steps, as last read from the device
        self._loss = math.nan  # as last logged
        self._every_steps, self._every_seconds = schedule.parse_interval(config.run.save_every)
        self.agreement = distributed.Agreement()
        self._saved_at = (time.monotonic(), -1)
        self._began_at = self._logged_at = (time.perf_counter(), 0)
        self._shown_at = time.perf_counter()

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: a signal asked to end; the state is saved.
        """
        batch = self.plan.batch_size
        self._began_at = self._logged_at = (time.perf_counter(), self.step)
        self.signals.immediate = False
        with tqdm(
            total=self.plan.total_steps * batch,
            initial=self.step * batch,
            unit=" samples",
            unit_scale=True,
            smoothing=0.1,
            disable=None if distributed.is_main() else True,  # None: where there is no terminal
        ) as bar:
            for number in range(self.step // self.plan.steps_per_episode, self.plan.episodes):
                self._run_episode(number, bar)
        if self._saved_at[1] != self.step:
            self.save(None)
        self.signals.immediate = True
        self.agreement.settle()
        asked = self.agreement.ask(self.signals.level)
        if level := (self.agreement.settle() or asked)[0]:
            text = "stopped by a signal after the last step; --resume goes on"
            raise schedule.Stopped(text, 130 if level > 1 else 0)

    def _run_episode(self, number: int, bar: tqdm) -> None:
        """New prototypes where they are due, then the episode's steps."""
        config, steps = self.config, self.plan.steps_of(number)
        draws = self.setup.draw(number)
        bar.set_description(f"episode {number + 1}/{self.plan.episodes}")
        done = self.step - steps.start  # of this episode, before the run was interrupted
        if 0 < config.episode.lit_start <= number:  # LiT: InfoNCE towards a frozen image tower
            self.episode = None
            self.model.lock_image()
        elif done == 0 and number >= config.episode.infonce_warmup and self.clusters:
            self.episode = self._build_episode(number, draws.unique(), bar)
        self.model.train()
        own, numbers = schedule.own_draws(self.plan, draws)
        seed = schedule.episode_seed(config.run.seed, number, 0)
        first = done * self.plan.batch_size // distributed.world_size()
        stream = iter(self._batches(own, numbers, seed, first))
        for _ in steps[done:]:
            self._train_step(stream, number)
            bar.set_postfix(loss=f"{self._loss:.3f}", refresh=False)
            bar.update(self.plan.batch_size)
            self._between_steps()

    def _batches(self, draws: Tensor, numbers: Tensor, seed: int, first: int = 0) -> Any:
        data = self.config.data
        return batches(
            self.dataset,
            Draws(draws, seed, first, numbers),
            self.config.optim.batch_size,
            self.transform,
            self.model.short_tokenizer,
            workers=data.workers,
            captions=data.captions,
            faults=self.faults,
        )

    def _build_episode(self, number: int, samples: Tensor, bar: tqdm) -> prototypes.Episode:
        """The prototypes of an episode that trains on ``samples``, int64 [M] positions."""
        seed = self.config.run.seed
        with self.phases.measure("features"):
            if self.store is not None:
                features, coming = self.store.features(), samples
            else:
                features, coming = self._extract(number, samples, bar), None
        with self.phases.measure("clusters"):
            random = distributed.generator(seed, schedule.EPISODES, number, 2)
            return self.builder.build(features, random, self.episode, coming)

    def _extract(self, number: int, samples: Tensor, bar: tqdm) -> prototypes.Features:
        """A forward pass over this rank's slice of the samples."""
        distributed.broadcast(*self.model.buffers())  # running statistics differ by rank
        numbers = torch.arange(len(samples))[distributed.own_slice(len(samples))]
        own, done = samples[numbers], 0

        def show(rows: int) -> None:
            nonlocal done
            done += rows
            if self.signals.asked and distributed.world_size() == 1:
                self._save_or_stop()  # nothing has changed since the last step
            bar.set_postfix_str(f"features {100 * done // len(own)} %")

        seed = schedule.episode_seed(self.config.run.seed, number, 1)
        return prototypes.extract(
            self.model,
            self._batches(own, numbers, seed),
            device=self.setup.device,
            autocast=self.stepper.autocast,
            progress=show,
        )

    def _train_step(self, stream: Iterator[Batch], number: int) -> None:
        with self.phases.measure("data", on_host=True):
            parts = [next(stream) for _ in range(self.config.optim.accum_freq)]
        lr = schedule.learning_rate(self.config.optim, self.plan.total_steps, self.step)
        step = self.stepper.step(self.step, parts, self.episode, project=self.projects, lr=lr)
        if self.store is not None and step.projected is not None:
            index = torch.cat([part.index for part in parts]).to(self.setup.device)
            place = self.step - self.plan.steps_of(number).start
            self.store.put(place, index.where(step.finite, -1), step.projected)
        self.step += 1
        last = self.step == self.plan.total_steps
        if self.step % self.config.run.log_every_n_steps == 0 or last:
            self._log(step, lr, number)
            self._check_skipped(parts)
        elif self.setup.device.type == "cpu":  # where reading a number waits for nothing
            self._check_skipped(parts)

    def _check_skipped(self, parts: Sequence[Batch]) -> None:
        """Note skipped steps; after --max-bad-steps in a row save and stop."""
        total, in_a_row = self.stepper.bad.tolist()
        new, self._skipped = total - self._skipped, total
        if new == 0:
            return
        keys = [self.dataset.keys[i] for part in parts for i in part.index.tolist()]
        which = f"step {self.step}" if new == 1 else f"{new} steps up to {self.step}"
        self.folder.note(
            f"{which} skipped, loss or gradient not finite; samples of step {self.step}: {keys}"
        )
        if in_a_row < self.config.run.max_bad_steps:
            return
        self.save(None)
        shown = ", ".join(map(repr, keys[:NAMED])) + (", ..." if len(keys) > NAMED else "")
        raise ValueError(
            f"training: loss or gradient was not finite in {in_a_row} steps in a row, the last one "
            f"step {self.step}, samples {shown} (all in out.log). The weights are those before, "
            f"saved in {self.folder.path}. Lower --lr, lengthen --warmup, use --precision fp32, "
            "look at these samples, or let torch.autograd.set_detect_anomaly(True) name the "
            "operation"
        )

    def _log(self, step: Step, lr: float, number: int) -> None:
        """Read the device once, write one line of metrics and one of progress."""
        losses, faults = step.losses, len(self.faults.positions) - self._old_faults
        scalars = {
            **losses.terms,
            **losses.accuracy,
            "loss": losses.total,
            "logit_scale": self.model.logit_scale,
            "logit_scale_proto": self.model.proto_scale,
            "logit_scale_raw": self.model.clip.logit_scale,
            "logit_scale_proto_raw": self.model.logit_scale_proto,
            "grad_norm": step.norm,
            **self.stepper.norms_by_part(step.norm),
            "bad_steps": self.stepper.bad[0],
            "bad_samples": torch.tensor(faults, device=self.setup.device),
        }
        values = torch.stack([v.detach().float().reshape(()) for v in scalars.values()])
        means = distributed.mean_over_ranks(values).tolist()
        record = {k: v for k, v in zip(scalars, means, strict=True) if math.isfinite(v)}
        # Each rank has met its own bad samples since the run began or was resumed.
        own = distributed.world_size() * record["bad_samples"]
        record["bad_samples"] = round(self.faults.known + self._old_faults + own)
        record = {k: v for k, v in record.items() if v or not k.startswith("bad_")}
        now, (then, logged) = time.perf_counter(), self._logged_at
        self._logged_at = (now, self.step)
        record |= {
            "lr": lr,
            "epoch": self.step / self.plan.steps_per_epoch,
            "episode": number,
            "samples_per_second": (self.step - logged) * self.plan.batch_size / (now - then),
        }
        record |= {f"seconds_{name}": s for name, s in self.phases.seconds().items()}
        if self.episode is not None and self.step == self.plan.steps_of(number).start + 1:
            record |= self.episode.metrics
        self.folder.metrics(self.step, self.step * self.plan.batch_size, record)
        self._loss = record.get("loss", math.nan)
        began, first = self._began_at
        left = (self.plan.total_steps - self.step) * (now - began) / (self.step - first)
        line = (
            f"step {self.step}/{self.plan.total_steps}, loss {self._loss:.4f}, "
            f"{record['samples_per_second']:,.0f} samples/s, "
            f"ETA {datetime.timedelta(seconds=round(left))}"
        )
        # Once a minute on the screen too, where there is no bar.
        seen = sys.stderr.isatty() or now - self._shown_at < SHOWN_EVERY
        (self.folder.note if seen else self.folder.say)(line)
        self._shown_at = self._shown_at if seen else now

    def _between_steps(self) -> None:
        """Evaluate and save where an epoch that asks for it has just ended, or a signal came."""
        per_epoch = self.plan.steps_per_epoch
        for measured, frequency in self.evaluations:
            last = self.step == self.plan.total_steps
            if last or self.step % max(1, round(frequency * per_epoch)) == 0:
                with self.phases.measure("evaluation", on_host=True):
                    scalars = measured(self.model)
                self.folder.metrics(self.step, self.step * self.plan.batch_size, scalars)
                self._logged_at = (time.perf_counter(), self.step)
        epochs = self.config.run.save_frequency
        if epochs and self.step % (epochs * per_epoch) == 0:
            self.save(self.step // per_epoch)
        self._save_or_stop()

    def _save_or_stop(self) -> None:
        """Write the newest state where it is due, and end where a signal asks for it."""
        due = 0 < self._every_seconds <= time.monotonic() - self._saved_at[0]  # by its own clock
        timed, stop = self.agreement.ask(due, self.signals.level)
        if stop or timed or (self._every_steps and self.step % self._every_steps == 0):
            self.save(None)
        if stop:
            asked = self.signals.asked or "a signal to another rank"
            raise schedule.Stopped(
                f"stopped by {'Ctrl-C' if asked == 'SIGINT' else asked} after step {self.step}; "
                f"go on with --resume {self.folder.path}",
                130 if stop > 1 else 0,
            )

    def save(self, epoch: int | None) -> None:
        """Write a checkpoint that OpenCLIP reads too; ``epoch`` None: the newest."""
        with self.phases.measure("checkpoint", on_host=True):
            self.folder.checkpoint(self.state(epoch), epoch)
        if epoch is None:
            self._saved_at = (time.monotonic(), self.step)

    def state(self, epoch: int | None) -> dict[str, Any]:
        """The content of a checkpoint, the same for any number of ranks; a collective call."""
        faults = distributed.gather_objects(sorted(self.faults.positions))
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
                    "batch_size": self.plan.batch_size,
                    "passes": [distributed.world_size(), self.config.optim.accum_freq],
                    "scaler": self.stepper.scaler.state_dict(),
                    "episode": checkpoint.pack(self.episode),
                    "store": None if self.store is None else self.store.state_dict(),
                    "skipped": self.stepper.bad.tolist(),
                    "faults": sorted({position for one in faults for position in one}),
                    "seconds": self.phases.seconds(),
                    "data": checkpoint.fingerprint(self.dataset.keys),
                },
            },
        }

    def restore(self, payload: Mapping[str, Any]) -> list[str]:
        """Go on from a checkpoint of the same run; notes on what will differ.

        Raises:
            ValueError: it is of other settings, or something is missing.
        """
        try:
            return self._restore(payload, payload["protoclip"]["training"])
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(
                f"--resume: the checkpoint does not hold the state of this run ({reason}); use an "
                "older checkpoint, or start a new run with --pretrained"
            ) from error

    def _restore(self, payload: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
        device = self.setup.device
        self.model.load_state(dict(payload))
        self.stepper.load_state(payload["optimizer"], training["scaler"])
        skipped, faults = training["skipped"], training["faults"]
        if len(skipped) != 2 or not all(type(one) is int for one in (*skipped, *faults)):
            raise TypeError("its counts of skipped steps, or its bad samples, are no whole numbers")
        self.stepper.bad = torch.tensor(skipped, device=device)
        self._skipped = int(self.stepper.bad[0])
        self.episode = checkpoint.unpack(training["episode"], STATE, device)
        for one in self.episode.sets if self.episode else ():
            one.check(len(self.dataset))
        if (training["store"] is None) != (self.store is None):
            raise ValueError(
                "--resume: expected a checkpoint of the same --episode-features, got one "
                + ("with" if self.store is None else "without")
                + " the features of training; resume with the settings of the run"
            )
        if self.store is not None:
            self.store.load_state_dict(training["store"])
        self.faults.positions = set(faults)
        self._old_faults = len(self.faults.positions)
        self.phases.add(training["seconds"])
        self.step = payload["protoclip"]["step"]
        passes = [distributed.world_size(), self.config.optim.accum_freq]
        if training["passes"] == passes or not depends_on_passes(self.model):
            return []
        return [
            "note: another number of ranks or passes than before; this model has dropout or batch "
            "norm by rank or pass, so the losses go on but are not those of the run left alone"
        ]


def announce(folder: NullRunFolder, setup: Setup, remark: str) -> None:
    """Say what will be done, in the user's units."""
    config, plan = setup.config, setup.plan
    folder.say(f"run folder: {folder.path}")
    folder.say(
        f"data: {setup.dataset.name}, {len(setup.dataset):,} pairs; {plan.total_steps} steps of "
        f"{plan.batch_size}, {plan.steps_per_epoch} a pass over the data"
    )
    if config.optim.warmup >= plan.total_steps:
        last = schedule.learning_rate(config.optim, plan.total_steps, plan.total_steps - 1)
        folder.say(
            f"note: --warmup {config.optim.warmup:g} steps are longer than the run's "
            f"{plan.total_steps}: the learning rate ends at {last:.3g}, below --lr "
            f"{config.optim.lr:g}; a fraction such as --warmup 0.1 follows the run"
        )
    folder.say(
        f"model: {config.model.model} on {setup.device}, {setup.precision}, "
        f"{torch.get_num_threads()} threads"
        + (f", {distributed.world_size()} ranks" if distributed.is_distributed() else "")
    )
    if not uses_prototypes(config):
        folder.say("method: clip, InfoNCE only")
        return
    episode = config.episode
    samples = min(len(setup.dataset), plan.steps_per_episode * plan.batch_size)
    folder.say(
        f"method: protoclip; {plan.episodes} episodes of {plan.steps_per_episode} steps, "
        f"{prototypes.check_clusters(episode, samples)} prototypes per source, features "
        f"{'reused' if episode.reuses else 'extracted'}, prototypes from episode "
        f"{episode.infonce_warmup + 1} on"
        + (", which this run does not reach" if plan.episodes <= episode.infonce_warmup else "")
    )
    folder.say(remark)


def draw_plots(trainer: Trainer, evaluation: Evaluation) -> None:
    """curves.png, and what the report needs."""
    folder, dataset = trainer.folder.path, trainer.dataset
    report.plot_curves(folder / "metrics.jsonl", folder / "curves.png")
    known = trainer.episode.clusterings if trainer.episode else {}
    clusters = {name: one.labels.cpu() for name, one in known.items()}
    if clusters:
        write_clusters(folder / "clusters.csv", trainer.dataset.keys, clusters)
    chosen = torch.arange(len(dataset))
    if clusters:  # the last is the teacher's, if there is one
        chosen = (list(clusters.values())[-1] >= 0).nonzero().flatten()
    # Spread over the data, which may be sorted.
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(PICTURED, len(chosen))).long()]
    bad = torch.tensor(sorted(trainer.faults.positions), dtype=torch.int64)
    chosen = chosen[~torch.isin(chosen, bad)]
    encoder = evaluation.encoder(trainer.model, sharded=False)
    try:
        images = encoder.images(Subset(dataset, chosen))
    except DataError:  # a bad sample that training has not met
        chosen = _readable(dataset, chosen)
        images = encoder.images(Subset(dataset, chosen))
    encoded = Encoded(images, encoder.texts([dataset.captions(i)[0] for i in chosen.tolist()]))
    samples = report.Samples(
        Subset(dataset, chosen),
        encoded,
        encoder.project(encoded),
        {name: labels[chosen] for name, labels in clusters.items()},
    )
    judged = next(iter(evaluation.kept.values()), None)
    snapshot = report.take_snapshot(
        samples,
        None if judged is None else (evaluation.quick_sets["HO"], judged),
        facts={"memory_bytes": trainer.phases.memory()},
    )
    report.save_snapshot(folder, snapshot)


def _readable(dataset: PairDataset, chosen: Tensor) -> Tensor:
    """Those of the positions whose pictures can be read; all of them if none can."""
    good = []
    for position in chosen.tolist():
        with contextlib.suppress(DataError):
            dataset.image(position)
            good.append(position)
    return torch.tensor(good) if good else chosen


def conclude(
    trainer: Trainer, evaluation: Evaluation, before: Results | None, after: Results | None
) -> None:
    """Print the table, the time per phase and the peak memory; write results.json."""
    folder, config, timing = trainer.folder, trainer.config, trainer.phases.seconds()
    peak = evaluate.peak_memory_bytes(trainer.setup.device)
    if after is None:
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timing.items())
        folder.say(f"time: {times}\npeak memory: {peak / 2**20:,.0f} MiB")
        folder.say("no evaluation: give --val-data")
    else:
        name, weights = config.model.model, str(checkpoint.find(folder.path))
        outcome = evaluate.Outcome(evaluation.data, name, weights, after, before, timing, peak)
        folder.say("\n" + evaluate.format_table(outcome))
        evaluate.write_results(folder.path / "results.json", outcome)
    folder.say(f"report: {report.write_report([folder.path])}")
    folder.say(f"done: {folder.path}")


class Evaluation:
    """The evaluations of a run: full tables before and after, quick recalls in between.

    Raises:
        ValueError: --val-data or --imagenet-val cannot be opened or used.
    """

    def __init__(self, setup: Setup, phases: Phases) -> None:
        self.setup, self.phases = setup, phases
        data = setup.config.data
        builtin = data.train_data.startswith("builtin:")
        self.data = data.val_data or (data.train_data if builtin else "")
        self.quick_sets: dict[str, PairDataset] = {}
        self.kept: dict[str, evaluate.EvalSet] = {}  # of the last full evaluation
        self.zeroshot_data = _zeroshot_data(data.imagenet_val, setup.config.run.seed)
        if self.data:
            split = "heldout" if self.data.startswith("builtin:") else "all"
            arguments = open_arguments(setup.config)
            self.quick_sets["HO"] = open_dataset(self.data, split, **arguments)
            if self.data == "builtin:emoji" and noto_available():
                self.quick_sets["NHO"] = open_dataset(self.data, "noto-heldout", **arguments)

    def during(self) -> list[tuple[Evaluate, float]]:
        """The evaluations between steps, each with its frequency in epochs."""
        run = self.setup.config.run
        chosen: list[tuple[Evaluate, float]] = []
        if self.quick_sets and run.val_frequency > 0:
            chosen.append((self.quick, run.val_frequency))
        if self.zeroshot_data and run.zeroshot_frequency > 0:
            chosen.append((self.zeroshot, run.zeroshot_frequency))
        return chosen

    def encoder(self, model: ProtoModel, sharded: bool | None = None) -> evaluate.Encoder:
        """Encodes with the model as it is, on all ranks unless ``sharded`` is False."""
        setup = self.setup
        return evaluate.Encoder(
            model,
            setup.device,
            workers=setup.config.data.workers,
            autocast=autocast_for(setup.precision, setup.device),
            sharded=distributed.is_distributed() if sharded is None else sharded,
        )

    def untrained(self, folder: Path, model: ProtoModel, resumed: bool) -> Results | None:
        """The evaluation before training; a resumed run reads what it found when it began."""
        path = folder / "untrained.json"
        if distributed.from_main(lambda: resumed and path.exists()):
            return evaluate.read_results(path).trained if distributed.is_main() else None
        before = self.full(model, "evaluating the untrained model")
        if before is not None and distributed.is_main() and not resumed:
            outcome = evaluate.Outcome(self.data, "untrained", "", before)
            evaluate.write_results(path, outcome)
        return before

    def full(self, model: ProtoModel, what: str) -> Results | None:
        """All metrics of all evaluation sets; None where there is nothing to evaluate on."""
        if not self.data:
            return None
        with (
            self.phases.measure("evaluation", on_host=True),
            tqdm(
                desc=what,
                unit=" rows",
                unit_scale=True,
                leave=False,
                disable=None if distributed.is_main() else True,
            ) as bar,
        ):
            layout = evaluate.open_layout(self.data, **open_arguments(self.setup.config))
            encoder = replace(self.encoder(model), bar=bar)
            self.kept, probe_train = evaluate.encode_sets(encoder, layout)
            return evaluate.evaluate_features(self.kept, probe_train)

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves."""
        encoder = self.encoder(model)
        scalars: dict[str, float] = {}
        for name, dataset in self.quick_sets.items():
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            ranks = retrieval(encoder.images(dataset), encoder.texts(texts), None)
            scalars |= {f"val_{name}_{key}": value for key, value in ranks.summary((1, 5)).items()}
        return scalars

    def zeroshot(self, model: ProtoModel) -> dict[str, float]:
        """Zero-shot accuracies on --imagenet-val."""
        assert self.zeroshot_data is not None
        tasks = ("zeroshot",)
        sets, _ = evaluate.encode_sets(self.encoder(model), self.zeroshot_data, tasks)
        found = evaluate.evaluate_features(sets, tasks=tasks)
        return {f"val_zeroshot_{n}": x for one in found.values() for n, x in one.metrics.items()}


def _zeroshot_data(spec: str, seed: int) -> evaluate.Layout | None:
    """What --imagenet-val names, opened before training starts."""
    if not spec:
        return None
    layout = evaluate.open_layout(spec, seed=seed)
    reasons = impossible(("zeroshot",), layout)
    if reasons:
        raise ValueError(f"--imagenet-val {spec}: {reasons['zeroshot']}")
    return replace(layout, captions=0, train=None, emoji=None)


def uses_prototypes(config: TrainConfig) -> bool:
    """Whether a prototype term has a weight."""
    weights = config.loss
    return config.method == "protoclip" and (weights.w_proto > 0 or weights.w_proto_external > 0)


def open_arguments(config: TrainConfig) -> dict[str, Any]:
    """How ``open_dataset`` is called, for training and evaluation alike."""
    names = ("csv_separator", "csv_img_key", "csv_caption_key", "csv_encoding")
    return {"seed": config.run.seed, **{name: getattr(config.data, name) for name in names}}


def open_training_data(config: TrainConfig) -> PairDataset:
    """The training pairs: the train split of built-in data, all of anything else."""
    data = config.data
    split = "train" if data.train_data.startswith("builtin:") else "all"
    index_together(data.train_data)
    dataset = open_dataset(data.train_data, split, **open_arguments(config))
    if data.train_num_samples > len(dataset):
        raise ValueError(
            f"--train-num-samples: expected at most {len(dataset)}, the size of {dataset.name}, "
            f"got {data.train_num_samples}"
        )
    if data.train_num_samples:
        dataset = Subset(dataset, torch.arange(data.train_num_samples))
    return dataset


def teacher_spec(config: TrainConfig) -> tuple[str, str]:
    """The teacher to open, or "" and a sentence where there is none."""
    spec, weights = config.episode.external_teacher, config.loss
    wanted = weights.w_proto_external > 0 or weights.w_distill > 0
    if config.method != "protoclip" or not wanted or spec == "none":
        return "", "external teacher: none"
    if spec != "auto":
        return spec, ""
    if not config.data.train_data.startswith("builtin:"):
        return "", f"external teacher: none; --external-teacher {MINILM} or a file adds one"
    if reason := minilm_missing():
        return "", f"external teacher: none, internal prototypes only: {reason}"
    return MINILM, ""


def open_teacher(
    config: TrainConfig, dataset: PairDataset, device: torch.device
) -> tuple[Tensor | None, str]:
    """Features [dataset, d] and a sentence about them; None where no teacher is due."""
    spec, remark = teacher_spec(config)
    if not spec:
        return None, remark
    rows = load_teacher(spec, dataset, dim=config.episode.external_teacher_dim, device=device)
    return rows, f"external teacher: {spec}, {rows.shape[1]} dimensions"


def check_settings(config: TrainConfig, device: torch.device) -> None:
    """Validate settings that need neither data nor model.

    Raises:
        ValueError: no such model, a step without a loss, k-means that cannot run, or a board that
            is not installed.
    """
    check_model(config.model)
    if "wandb" in config.run.report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError("--report-to wandb: wandb is not installed; pip install wandb")
    weights, episode = config.loss, config.episode
    teacher = bool(teacher_spec(config)[0])
    internal = config.method == "protoclip" and weights.w_proto > 0
    if weights.w_clip == 0 and not (teacher and weights.w_distill > 0):
        if not internal and not (teacher and weights.w_proto_external > 0):
            what = f"--method {config.method}" + ("" if teacher else ", no external teacher")
            raise ValueError(
                f"--w-clip 0: expected another loss with a weight, got none ({what}); use "
                "--w-clip 1, or give --w-proto, or a teacher and --w-proto-external, a weight"
            )
        warmup, lit = episode.infonce_warmup, episode.lit_start
        if value := warmup or lit:
            flag = "--infonce-warmup-epoch" if warmup else "--lit-start"
            raise ValueError(
                f"--w-clip 0: expected prototypes in every step, got {flag} {value}, whose "
                f"episodes have InfoNCE only; use {flag} 0, or --w-clip 1"
            )
    ops = ["info_nce"] if weights.w_clip > 0 else []
    if uses_prototypes(config):
        ops += ["prototype_cross_entropy", "soft_targets"]
        clustering, backend = ["kmeans_assign", "segment_mean"], episode.kmeans_backend
        if backend == "faiss":
            load_faiss()
            if distributed.world_size() > 1:
                raise ValueError(
                    "--kmeans-backend faiss: expected one process, got "
                    f"{distributed.world_size()} ranks; use --kmeans-backend auto"
                )
        elif backend == "auto":
            ops += clustering
        else:
            _check_backend("--kmeans-backend", backend, clustering, device)
    _check_backend("PROTOCLIP_BACKEND", os.environ.get("PROTOCLIP_BACKEND", ""), ops, device)


def _check_backend(name: str, backend: str, ops: Sequence[str], device: torch.device) -> None:
    for op in ops if backend not in ("", "auto") else ():
        if reason := why_not(op, backend, device.type, torch.float32):
            raise ValueError(
                f"{name}: expected one that can run all of this, got {backend}: {reason}; use "
                f"{name} auto, or see protoclip.backends({op!r})"
            )


def check_episodes(setup: Setup) -> None:
    """Check that each episode that is clustered has a sample for each cluster.

    Raises:
        ValueError: one has too few: a run may end early in it, or draw samples several times.
    """
    config, plan = setup.config, setup.plan
    episode = config.episode
    samples = min(len(setup.dataset), plan.steps_per_episode * plan.batch_size)
    prototypes.check_clusters(episode, samples)
    first, last = episode.infonce_warmup, plan.episodes
    if episode.lit_start:
        last = min(last, episode.lit_start)
    if episode.reuses:  # what the episode before has trained on
        first, last = first - 1, last - 1
    if not episode.num_clusters or first >= last:
        return
    for number in {first, last - 1}:  # those between are full; with replacement, within chance
        distinct = len(setup.draw(number).unique())
        prototypes.check_clusters(episode, distinct, f"episode {number + 1}")


def check_resume(resume: Resume, setup: Setup) -> list[str]:
    """Notes on what differs from the run that is resumed.

    Raises:
        ValueError: a setting, or the data, that the run cannot go on with.
    """
    saved = resume.payload["protoclip"]
    training, notes, wrong = saved["training"], [], []
    for key, before, now in changes(saved["config"], to_dict(setup.config)):
        change = f"{key} was {before!r} and is {now!r}"
        if key.startswith(FIXED):
            wrong.append(change)
        elif not key.startswith(FREE):
            notes.append(change)
    then, batch = training.get("batch_size"), setup.plan.batch_size
    if then != batch:
        wrong.append(f"the global batch_size (all ranks and passes) was {then} and is {batch}")
    if wrong:
        raise ValueError(
            f"--resume: {resume.file} cannot go on with other settings: {'; '.join(wrong)}; give "
            "the run's own, or start a new run with --pretrained"
        )
    if (data := checkpoint.fingerprint(setup.dataset.keys)) != training.get("data"):
        raise ValueError(
            f"--resume: the training data are not those of {resume.file} ({data} instead of "
            f"{training.get('data')}: size and digest of the keys); give the same data, or "
            "start a new run with --pretrained"
        )
    return [f"since the checkpoint, {note}: not the same run any more" for note in notes]


if __name__ == "__main__":
    sys.exit(main())
