"""Train CLIP or ProtoCLIP: ``protoclip train``.

Without arguments it trains ProtoCLIP on the built-in icons in a few minutes on two CPU cores,
and leaves results, plots and a checkpoint in a run folder. Read from ``train`` down: open
and check everything, resume, train episode by episode, evaluate, report.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import importlib.util
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip import checkpoint, distributed, prototypes, schedule
from protoclip.commands import train_parser
from protoclip.config import TABLE, TrainConfig, flat, parse, to_dict
from protoclip.data import (
    Batch,
    Draws,
    PairDataset,
    Subset,
    batches,
    build_transform,
    index_together,
    open_dataset,
)
from protoclip.data.files import write_csv
from protoclip.data.loader import EpochOrder, Faults
from protoclip.evaluate import results, tasks
from protoclip.evaluate.datasets import open_layout
from protoclip.evaluate.metrics import recalls, retrieval
from protoclip.evaluate.results import Outcome, Results
from protoclip.feature_store import (
    FeatureSource,
    FeatureStore,
    buffer_bytes,
    choose_features,
    table_bytes,
)
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
    match_layout,
    put_channels_last,
)
from protoclip.ops.backends import why_not
from protoclip.prototypes import Episode, PrototypeSet
from protoclip.report import page
from protoclip.report import snapshot as looks
from protoclip.run_folder import (
    NullRunFolder,
    Resume,
    RunFolder,
    choose_folder,
    find_resume,
    sum_up,
)
from protoclip.step import Phases, Step, Stepper, depends_on_passes, seed_everything
from protoclip.teacher import MINILM, load_teacher, minilm_missing

Evaluate = Callable[[ProtoModel], Mapping[str, float]]
PROG = "protoclip train"
PICTURED = 4096  # training samples from which the report's pictures are chosen
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # options of mallopt, by glibc's numbers
# Settings that decide the order of the samples or the set of tensors: a resume must keep them.
FIXED = (
    "method", "data.train_num_samples", "data.captions", "data.augmentation",
    "data.shuffle_buffer", "model.model", "model.force_", "model.lock_", "model.add_",
    "model.projection_", "model.use_", "model.siglip", "episode.size", "episode.replacement",
    "episode.features", "run.seed", "run.precision",
)  # fmt: skip
# Other settings that may change without a note; the global batch is compared as a whole.
FREE = ("data.", "model.", "optim.batch_size", "optim.accum_freq", "run.")


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


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed, because the next step needs as much again.

    By default it returns large blocks to the system, which then has to clear every page anew. The
    first two settings switch off malloc's own adjustment of the third, so that one is set too.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26), (MMAP_THRESHOLD, 2**25)):
        mallopt(option, value)


def busy_note(device: torch.device) -> str:
    """A line for a CPU run on a machine that has more to do than cores to do it; "" for others."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if device.type != "cpu" or policy == "passive" or torch.get_num_threads() == 1:
        return ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    if load <= (cores or 1):
        return ""
    return (
        f"note: the load is {load:.1f} on {cores} cores; threads that wait for each other by "
        "spinning make a run crawl then, so start it with OMP_WAIT_POLICY=passive"
    )


def with_saved_config(argv: Sequence[str] | None) -> list[str]:
    """The command line; with ``--resume RUN`` and no preset it starts from that run's settings."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = [new for old, new in pairwise(words) if old == "--resume"]
    chosen += [word.partition("=")[2] for word in words if word.startswith("--resume=")]
    if chosen and not any(word.split("=")[0] in ("--preset", "--paper") for word in words):
        path = Path(chosen[-1])
        for folder in (path, path.parent.parent):
            if (folder / "config.json").is_file():
                return ["--preset", str(folder / "config.json"), *words]
    return words


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
    dataset = open_training_data(config)
    order = EpochOrder(dataset, config.data.shuffle_buffer)
    plan = schedule.make_plan(config, order.size)
    if resume and resume.step >= plan.total_steps:
        refuse_changes(resume, config)
        if (path / "results.json").exists():
            print(f"{path} is complete: {resume.step} steps and its results", file=sys.stderr)
            return 0
    precision = choose_precision(config.run.precision, device)
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
    evaluation = Evaluation(setup, phases)
    reuses = None if resume is None else saved_training(resume)["features"] is not None
    trainer = Trainer(setup, model, NullRunFolder(path), phases, evaluation.during, reuses)
    notes = []
    if resume:  # check everything before touching the folder
        notes = [f"resumed: {resume.file}, after step {resume.step} of {plan.total_steps}"]
        notes += check_resume(resume, setup) + trainer.restore(resume.payload)
    if distributed.is_main():
        step = resume.step if resume else 0 if path.exists() else None
        trainer.folder = RunFolder(path, config, step)
    folder = trainer.folder
    try:
        announce(folder, setup, trainer.features, trainer.internal, remark)
        for note in notes:
            folder.say(note)
        before = evaluation.untrained(path, model, resumed=resume is not None)
        trainer.run()
        after = evaluation.full(model, "evaluating the trained model")
        if distributed.is_main():
            with phases.measure("plots", on_host=True):
                draw_plots(trainer, evaluation)
            conclude(trainer, evaluation, before, after)
    except schedule.Stopped as stop:
        words, code = stop.args
        folder.say(words)
        return code
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.note(traceback.format_exc())
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            remedy = (
                f"the last checkpoint is intact, free some space and continue with --resume {path}"
                if checkpoint.candidates(path)
                else f"there is no checkpoint yet; free some space, remove {path} and start again"
            )
            raise OSError(f"{error.filename or path}: {error.strerror}; {remedy}") from error
        raise
    finally:
        folder.close()
    return 0


def open_resume(config: TrainConfig) -> Resume | None:
    """The run that --resume names, on every rank; its stored features on rank 0 only."""
    stored: dict[str, Tensor] = {}

    def find() -> Resume | None:
        resume = find_resume(config)
        if resume is not None:
            training = saved_training(resume)
            if "features" not in training:
                raise ValueError(
                    f"--resume: {resume.file} is from a version of protoclip that stored features "
                    "in another form; load its weights with --pretrained"
                )
            if training["features"] is not None:
                stored.update(training["features"])
                training["features"] = {}
        return resume

    resume = distributed.from_main(find)
    if resume is not None and stored:
        saved_training(resume)["features"] = stored
    return resume


def saved_training(resume: Resume) -> dict[str, Any]:
    """The state of training in a checkpoint."""
    return resume.payload["protoclip"]["training"]


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
        return min(len(self.dataset), self.plan.steps_per_episode * self.plan.batch_size)


class Trainer:
    """Trains a model on the setup's device, episode by episode; alone owns the mutable state.

    ``evaluations`` holds pairs: a function, model -> scalars by name, and its interval in epochs.
    ``reuses``: whether a resumed run stores training's own features, whatever "auto" would choose.
    """

    def __init__(
        self,
        setup: Setup,
        model: ProtoModel,
        folder: NullRunFolder,
        phases: Phases | None = None,
        evaluations: Sequence[tuple[Evaluate, float]] = (),
        reuses: bool | None = None,
    ) -> None:
        self.setup, self.model, self.folder = setup, model, folder
        self.config, self.plan, self.dataset = setup.config, setup.plan, setup.dataset
        self.phases, self.evaluations = phases or Phases(setup.device), evaluations
        config, weights, teacher = setup.config, setup.config.loss, setup.teacher
        internal = config.method == "protoclip" and weights.w_proto > 0
        external = teacher is not None and weights.w_proto_external > 0
        self.clusters = internal or external
        self.internal = internal
        # The heads run from step 0 so that their running statistics are ready.
        self.projects = self.clusters or (teacher is not None and weights.w_distill > 0)
        crop = model.image_size, model.mean, model.std, config.data.augmentation
        self.transform = build_transform(*crop)
        loss = ProtoLoss(weights, teacher, self.phases.measure)
        self.stepper = Stepper(
            model, loss, config.optim, setup.precision, self.phases, config.run.seed
        )
        self.builder = prototypes.EpisodeBuilder(
            config.episode,
            teacher=teacher if external else None,
            internal=internal,
            classes={
                name: known.ids.to(setup.device)
                for name, known in self.dataset.labels.items()
                if bool((known.ids >= 0).all())  # known of every sample
            },
        )
        self.features = FeatureSource(False, "none")
        self.store: FeatureStore | None = None
        if self.clusters:
            samples, dim = len(self.dataset), model.projection_dim
            drawn = self.plan.steps_per_episode * self.plan.batch_size
            size = table_bytes(samples, distributed.world_size(), dim)
            size += buffer_bytes(drawn, distributed.world_size(), dim)
            episode = config.episode
            if reuses is not None:
                episode = replace(episode, features="reuse" if reuses else "extract")
            self.features = choose_features(episode, self.plan.passes, size, setup.device)
            if self.features.reuses:
                self.store = FeatureStore(
                    samples,
                    self.plan.steps_per_episode,
                    self.plan.batch_size,
                    setup.device,
                    self.features.table_device,
                )
        self.watch = prototypes.Watch()
        most = config.data.max_bad_fraction
        self.faults = Faults(self.dataset, most, lambda text: self.folder.say(text))
        self.episode: Episode | None = None
        self.step = 0
        self.signals = schedule.StopSignals()
        self._passes = [distributed.world_size(), config.optim.accum_freq]
        self._episode_metrics: Mapping[str, float] = {}  # of a new episode, until the next log
        self._skipped = 0  # steps, as last read from the device
        self._loss = math.nan  # as last logged
        self._every_steps, self._every_seconds = schedule.parse_interval(config.run.save_every)
        self._saved_at = (time.monotonic(), -1)
        self._agreed = lambda: torch.zeros(2)  # whether to save, and to stop
        self._began_at = self._logged_at = (time.perf_counter(), 0)

    def run(self) -> None:
        """Train to the end of the plan.

        Raises:
            Stopped: a signal asked the run to stop; the state is saved.
        """
        batch = self.plan.batch_size
        self._began_at = self._logged_at = (time.perf_counter(), self.step)
        shown = {"initial": self.step * batch, "unit": " samples", "unit_scale": True}
        total = self.plan.total_steps * batch
        with self.signals, tqdm(total=total, smoothing=0.1, disable=hidden(), **shown) as bar:
            for number in range(self.step // self.plan.steps_per_episode, self.plan.episodes):
                self._run_episode(number, bar)
            if self._saved_at[1] != self.step:
                self.save(None)

    def _run_episode(self, number: int, bar: tqdm) -> None:
        """Build the episode's prototypes, if it has any, then run its steps."""
        config, steps, seed = self.config, self.plan.steps_of(number), self.config.run.seed
        order, replacement = self.setup.order.permutation, config.episode.replacement
        draws = schedule.draw(self.plan, seed, steps, replacement=replacement, order=order)
        bar.set_description(f"episode {number + 1}/{self.plan.episodes}")
        done = self.step - steps.start  # steps of this episode before an interruption
        if 0 < config.episode.lit_start <= number:  # LiT: the image tower is frozen, InfoNCE only
            self.episode = None
            self.model.lock_image()
        elif done == 0 and number >= config.episode.infonce_warmup and self.clusters:
            if self.store is not None:  # also of steps that only a resume with more steps would do
                whole = range(steps.start, steps.start + self.plan.steps_per_episode)
                coming = schedule.draw(self.plan, seed, whole, replacement=replacement, order=order)
                self.episode = self._build_episode(number, coming.unique())
            else:
                self.episode = self._build_episode(number, draws.unique())
        self.model.train()
        own, numbers = schedule.own_draws(self.plan, draws)
        first = done * self.plan.batch_size // distributed.world_size()
        stream = self._batches(Draws(own, schedule.episode_seed(seed, number, 0), first, numbers))
        for _ in steps[done:]:
            self._train_step(stream, number)
            bar.set_postfix(loss=f"{self._loss:.3f}", refresh=False)
            bar.update(self.plan.batch_size)
            self._between_steps()

    def _batches(self, draws: Draws) -> Iterator[Batch]:
        data, size = self.config.data, self.config.optim.batch_size
        read = self.transform, self.model.short_tokenizer
        how: dict[str, Any] = {"workers": data.workers, "captions": data.captions}
        return iter(batches(self.dataset, draws, size, *read, faults=self.faults, **how))

    def _build_episode(self, number: int, samples: Tensor) -> Episode | None:
        """Build the prototypes of an episode that trains on ``samples``, int64 [M] sorted
        positions; None while too few of them have stored features."""
        seed, recent = self.config.run.seed, None
        with self.phases.measure("features"):
            if self.store is not None:
                features = self.store.of_positions(samples)
                if self.builder.teacher is not None:
                    recent = self.store.of_episode(number - 1)
            else:
                numbers = torch.arange(len(samples))[distributed.own_slice(len(samples))]
                drawn = schedule.episode_seed(seed, number, 1)
                stream = self._stoppable(self._batches(Draws(samples[numbers], drawn, 0, numbers)))
                autocast, device = self.stepper.autocast, self.setup.device
                features = prototypes.extract(self.model, stream, device=device, autocast=autocast)
        with self.phases.measure("clusters"):
            random = distributed.generator(seed, schedule.EPISODES, number, 2)
            episode = self.builder.build(samples, features, random, recent, self.episode)
        if episode is None:
            return None
        episode = replace(episode, metrics={**episode.metrics, **self.watch.accuracy()})
        self._episode_metrics = episode.metrics
        if warning := self.watch.collapse(episode.metrics):
            self.folder.say(f"step {self.step}: {warning}")
        return episode

    def _stoppable(self, stream: Iterable[Batch]) -> Iterator[Batch]:
        """Pass the stream on; it may take minutes, so a single process can stop inside it."""
        for batch in tqdm(stream, "features", unit=" batches", leave=False, disable=hidden()):
            yield batch
            if self.signals.asked and not distributed.is_distributed():
                self._save_or_stop()  # nothing has changed since the last step

    def _train_step(self, stream: Iterator[Batch], number: int) -> None:
        with self.phases.measure("data", on_host=True):
            parts = [next(stream) for _ in range(self.config.optim.accum_freq)]
        optim, total, lit = self.config.optim, self.plan.total_steps, self.config.episode.lit_start
        lr = schedule.learning_rate(optim, total, self.step)
        # The image tower's cosine ends when the tower is locked (LiT).
        end = min(total, lit * self.plan.steps_per_episode) if lit else total
        image_lr = schedule.learning_rate(optim, total, self.step, end)
        step = self.stepper.step(
            self.step, parts, self.episode, project=self.projects, lr=lr, image_lr=image_lr
        )
        if self.store is not None and step.projected is not None:
            rows = torch.cat([part.index for part in parts]).to(self.setup.device)
            place = self.step - self.plan.steps_of(number).start
            projected = step.projected
            self.store.put(place, rows.where(step.finite, -1), projected.image, projected.text)
            if self.step == self.plan.steps_of(number)[-1]:  # before anything below can save
                self.store.end_episode(number)
        self.watch.count(step.losses.hits)
        self.step += 1
        last = self.step == self.plan.total_steps
        logs = last or self.step % self.config.run.log_every_n_steps == 0
        if logs:
            self._log(step, lr, number)
        if logs or self.setup.device.type == "cpu":  # on a CPU reading a number is free
            self._check_skipped(parts)

    def _check_skipped(self, parts: Sequence[Batch]) -> None:
        """Log skipped steps; after --max-bad-steps in a row, save and stop."""
        total, in_a_row = self.stepper.bad.tolist()
        if total == self._skipped:
            return
        self._skipped = total
        keys = [self.dataset.keys[i] for part in parts for i in part.index.tolist()]
        self.folder.note(f"step {self.step} skipped: not finite, {total} so far; samples: {keys}")
        if in_a_row >= self.config.run.max_bad_steps:
            self.save(None)
            raise ValueError(
                f"training: loss or gradient was not finite in {in_a_row} steps in a row, up to "
                f"step {self.step} (its samples are in out.log, first {keys[0]}); lower --lr, use "
                "--precision fp32, or find the operation with torch.autograd."
                f"set_detect_anomaly(True); the last finite weights are in {self.folder.path}"
            )

    def _log(self, step: Step, lr: float, number: int) -> None:
        """Read the device once; write one line of metrics and one line of progress."""
        # Each rank counts its own bad samples; times ranks, their mean is the sum.
        faults = torch.tensor(float(len(self.faults.positions)) * distributed.world_size())
        scalars = {
            **step.losses.terms,
            **step.losses.accuracy,
            "loss": step.losses.total,
            "logit_scale": self.model.logit_scale,
            "logit_scale_proto": self.model.proto_scale,
            "same_caption": step.same_caption,
            "grad_norm": step.norm,
            "bad_steps": self.stepper.bad[0],
            "bad_samples": (faults + self.faults.known).to(self.setup.device),
        }
        if self.model.logit_bias is not None:
            scalars["logit_bias"] = self.model.logit_bias
        values = torch.stack([v.detach().float().reshape(()) for v in scalars.values()])
        means = zip(scalars, distributed.mean_over_ranks(values).tolist(), strict=True)
        kept = {k: v for k, v in means if math.isfinite(v)}
        record = {k: v for k, v in kept.items() if v or not k.startswith("bad_")}
        now, (then, logged) = time.perf_counter(), self._logged_at
        self._logged_at = (now, self.step)
        record |= {
            "lr": lr,
            "epoch": self.step / self.plan.steps_per_epoch,
            "episode": number,
            "samples_per_second": (self.step - logged) * self.plan.batch_size / (now - then),
        }
        record |= {f"seconds_{name}": s for name, s in self.phases.seconds().items()}
        record |= self._episode_metrics
        self._episode_metrics = {}
        self.folder.metrics(self.step, self.step * self.plan.batch_size, record)
        if self.step == self.config.run.log_every_n_steps:
            own = self.plan.batch_size // distributed.world_size()
            self.folder.note(
                f"--dedup {self.config.loss.dedup}: in a batch of {own} pairs, "
                f"{record['same_caption']:g} share their caption with another one"
            )
        self._loss = record.get("loss", math.nan)
        total, (began, first) = self.plan.total_steps, self._began_at
        left = round((total - self.step) * (now - began) / (self.step - first))
        self.folder.note(
            f"step {self.step}/{total}, loss {self._loss:.4f}, {record['samples_per_second']:,.0f} "
            f"samples/s, ETA {datetime.timedelta(seconds=left)}"
        )

    def _between_steps(self) -> None:
        """Evaluate and save at the end of an epoch that asks for it, or after a signal."""
        per_epoch, last = self.plan.steps_per_epoch, self.step == self.plan.total_steps
        for measured, frequency in self.evaluations:
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
        """Save if --save-every asks for it; save and stop if a signal does."""
        timed, stop = self._agreed().tolist()  # what the ranks asked for one step ago
        if stop or timed or (self._every_steps and self.step % self._every_steps == 0):
            self.save(None)
        if stop:
            signal = "Ctrl-C" if stop > 1 else self.signals.asked or "a signal to another rank"
            words = f"stopped by {signal} after step {self.step}; continue with --resume"
            raise schedule.Stopped(f"{words} {self.folder.path}", 130 if stop > 1 else 0)
        due = 0 < self._every_seconds <= time.monotonic() - self._saved_at[0]  # by its own clock
        self._agreed = distributed.max_later(torch.tensor([float(due), self.signals.level]))

    def save(self, epoch: int | None) -> None:
        """Write a checkpoint that OpenCLIP can read; ``epoch`` None: epoch_latest.pt."""
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
                    "passes": self._passes,
                    "scaler": self.stepper.scaler.state_dict(),
                    "episode": pack_episode(self.episode),
                    "watch": self.watch.state_dict(),
                    "features": None if self.store is None else self._stored_rows(),
                    "skipped": self.stepper.bad.tolist(),
                    "faults": sorted({position for one in faults for position in one}),
                    "seconds": self.phases.seconds(),
                    "data": checkpoint.fingerprint(self.dataset.keys),
                },
            },
        }

    def _stored_rows(self) -> dict[str, Tensor]:
        assert self.store is not None
        return self.store.state_dict(self.folder.path / "checkpoints")

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
            self.stepper.bad, self._skipped = skipped.to(self.setup.device), int(skipped[0])
            self.episode = unpack_episode(training["episode"], self.setup.device)
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
            same = training["passes"] == self._passes
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                "--resume: the checkpoint does not hold the state of this run "
                f"({type(error).__name__}: {str(error)[:300]}); use an older checkpoint"
            ) from error
        if same or not depends_on_passes(self.model):
            return []
        return [
            "note: the number of ranks or passes has changed; this model has dropout or batch norm "
            "by rank or pass, so the losses differ from those of an uninterrupted run"
        ]


def pack_episode(episode: Episode | None) -> dict[str, Any] | None:
    """Turn an episode into tensors, numbers and names for a checkpoint."""
    if episode is None:
        return None
    return {
        "positions": episode.positions,
        "labels": dict(episode.labels),
        "centroids": dict(episode.centroids),
        "sets": [vars(item) for item in episode.sets],
        "metrics": dict(episode.metrics),
    }


def unpack_episode(state: Any, device: torch.device) -> Episode | None:
    """The inverse of ``pack_episode``."""
    if state is None:
        return None

    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in values.items()}

    return Episode(
        positions=state["positions"].to(device),
        labels=moved(state["labels"]),
        centroids=moved(state["centroids"]),
        sets=tuple(PrototypeSet(**moved(values)) for values in state["sets"]),
        metrics=state["metrics"],
    )


def announce(
    folder: NullRunFolder, setup: Setup, features: FeatureSource, internal: bool, remark: str
) -> None:
    """Print what the run will do, in the user's units."""
    config, plan, episode = setup.config, setup.plan, setup.config.episode
    ranks, warmup = distributed.world_size(), config.optim.warmup
    if busy := busy_note(setup.device):
        folder.say(busy)
    folder.say(
        f"run folder: {folder.path}\n"
        f"data: {setup.dataset.name}, {len(setup.dataset):,} pairs; {plan.total_steps} steps of "
        f"{plan.batch_size}, {plan.steps_per_epoch} a pass over the data\n"
        f"model: {config.model.model} on {setup.device}, {setup.precision}, "
        f"{torch.get_num_threads()} threads" + f", {ranks} ranks" * (ranks > 1)
    )
    if warmup >= plan.total_steps:
        folder.say(
            f"note: --warmup {warmup:g} is longer than the run's {plan.total_steps} steps, so the "
            "run never reaches --lr; use a fraction such as 0.1"
        )
    if not uses_prototypes(config):
        folder.say(f"method: clip, {'SigLIP' if config.model.siglip else 'InfoNCE'} only")
        return
    # Drawn with replacement, some samples come again before the second pass.
    stored, again = features.reuses and internal, episode.replacement
    first = plan.first_step_with_prototypes(episode.infonce_warmup, stored and not again)
    reached = " at the earliest" if stored and again else ""
    reached += "" if first < plan.total_steps else ", which this run does not reach"
    folder.say(
        f"method: protoclip; {plan.episodes} episodes of {plan.steps_per_episode} steps, "
        f"{prototypes.check_clusters(episode, setup.episode_samples)} prototypes per source\n"
        f"features: {features.reason}; {'internal ' if internal else ''}prototypes train from step "
        f"{first + 1} on{reached}\n{remark}"
    )


def labels_by_position(episode: Episode | None, samples: int) -> dict[str, Tensor]:
    """Source -> the label of every sample of the dataset, int64 [samples], IGNORE without one."""
    if episode is None:
        return {}
    rows = {source: torch.full((samples,), prototypes.IGNORE) for source in episode.labels}
    for source, labels in episode.labels.items():
        rows[source][episode.positions.cpu()] = labels.long().cpu()
    return rows


@torch.no_grad()
def draw_plots(trainer: Trainer, evaluation: Evaluation) -> None:
    """Write clusters.csv and report.json, from which the report is made."""
    folder, model, device = trainer.folder.path, trainer.model.eval(), trainer.setup.device
    clusters = labels_by_position(trainer.episode, len(trainer.dataset))
    chosen = torch.arange(len(trainer.dataset))
    if clusters:  # the last is the teacher's, if there is one
        columns = [["" if k < 0 else k for k in own.tolist()] for own in clusters.values()]
        lines = zip(trainer.dataset.keys, *columns, strict=True)
        write_csv(folder / "clusters.csv", ("key", *clusters), lines)
        chosen = (list(clusters.values())[-1] >= 0).nonzero().flatten()
    stream = batches(
        trainer.dataset,
        Draws(looks.every(chosen, PICTURED), seed=0),
        trainer.config.optim.batch_size,
        tasks.eval_transform(model),
        model.short_tokenizer,
        workers=trainer.config.data.workers,
        captions="first",
        faults=Faults(trainer.dataset, 1.0, lambda _: None),  # a bad sample is replaced
    )
    parts = []
    for batch in stream:
        with trainer.stepper.autocast():
            parts.append((batch.index, *model(batch.image.to(device), batch.tokens.to(device))))
    positions, *features = zip(*parts, strict=True)
    shown = torch.cat(positions)
    encoded, projected = (
        Encoded(torch.cat([one.image for one in rows]), torch.cat([one.text for one in rows]))
        for rows in features
    )
    key, judged = next(iter(evaluation.kept.items()), ("", None))
    labels = {name: own[shown] for name, own in clusters.items()}
    samples = looks.Samples(Subset(trainer.dataset, shown), encoded, projected, labels)
    held_out = None if judged is None else (evaluation.quick_sets[key], judged)
    facts = {"memory_bytes": trainer.phases.memory}
    looks.save_snapshot(folder, looks.take_snapshot(samples, held_out, facts=facts))


def conclude(
    trainer: Trainer, evaluation: Evaluation, before: Results | None, after: Results | None
) -> None:
    """Print the table, the time per phase and the peak memory; write results.json."""
    folder, floors = trainer.folder, evaluation.floors(trainer.model)
    timing = trainer.phases.seconds()
    peak = tasks.peak_memory_bytes(trainer.setup.device)
    name, weights = trainer.config.model.model, str(checkpoint.candidates(folder.path)[0])
    outcome = Outcome(evaluation.data, name, weights, after or {}, before, timing, peak, floors)
    recorded = page.recorded_baseline(to_dict(trainer.config)) if after else None
    folder.say("\n" + results.format_table(outcome, recorded.outcome if recorded else None))
    if after is None:
        folder.say("no evaluation: give --val-data")
    else:
        results.write_results(folder.path / "results.json", outcome)
    if "tensorboard" in trainer.config.run.report_to:
        sets = (after or {}).values()
        scores = {f"{one.title}/{name}": x for one in sets for name, x in one.metrics.items()}
        snapshot = looks.load_snapshot(folder.path) or looks.Snapshot()
        sum_up(folder.path, trainer.config, looks.contact_sheet(snapshot), scores)
    folder.say(f"report: {page.write_report([folder.path])}\ndone: {folder.path}")


class Evaluation:
    """The evaluations of a run: full tables before and after, quick recalls in between."""

    def __init__(self, setup: Setup, phases: Phases) -> None:
        self.setup, self.phases = setup, phases
        data, self.arguments = setup.config.data, open_arguments(setup.config)
        builtin = data.train_data.startswith("builtin:")
        self.data = data.val_data or (data.train_data if builtin else "")
        self.quick_sets: dict[str, PairDataset] = {}
        self.kept: dict[str, tasks.EvalSet] = {}  # of the last full evaluation
        if self.data:
            if self.data == "builtin:icons":
                parts = open_layout(self.data, **self.arguments).parts
                self.quick_sets = {key: part.test for key, part in parts.items() if part.captions}
            else:
                split = "heldout" if self.data.startswith("builtin:") else "all"
                self.quick_sets["HO"] = open_dataset(self.data, split, **self.arguments)
        often = setup.config.run.val_frequency if self.quick_sets else 0  # in epochs
        self.during: list[tuple[Evaluate, float]] = [(self.quick, often)] if often else []

    def encoder(self, model: ProtoModel) -> tasks.Encoder:
        """An encoder that uses the current weights, on all ranks."""
        device, workers = self.setup.device, self.setup.config.data.workers
        autocast = autocast_for(self.setup.precision, device)
        return tasks.Encoder(model, device, workers=workers, autocast=autocast)

    def untrained(self, folder: Path, model: ProtoModel, resumed: bool) -> Results | None:
        """The evaluation before training; a resumed run reads the one from its start."""
        path = folder / "untrained.json"
        if resumed:
            found = distributed.is_main() and path.exists()
            return results.read_results(path).trained if found else None
        before = self.full(model, "evaluating the untrained model")
        if before is not None and distributed.is_main():
            results.write_results(path, Outcome(self.data, "untrained", "", before))
        return before

    def full(self, model: ProtoModel, what: str) -> Results | None:
        """All metrics of all evaluation sets; None if there is no evaluation data."""
        if not self.data:
            return None
        with (
            self.phases.measure("evaluation", on_host=True),
            tqdm(desc=what, unit=" rows", unit_scale=True, leave=False, disable=hidden()) as bar,
        ):
            layout = open_layout(self.data, **self.arguments)
            encoder = replace(self.encoder(model), bar=bar)
            self.kept, probe_train = tasks.encode_sets(encoder, layout)
            return tasks.evaluate_features(self.kept, probe_train)

    def floors(self, model: ProtoModel) -> dict[str, Results]:
        """The scores that need no training, for built-in data; other data may be too large."""
        if not self.data.startswith("builtin:"):
            return {}
        with self.phases.measure("evaluation", on_host=True):
            layout = open_layout(self.data, **self.arguments)
            return tasks.floors(self.encoder(model), layout)

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves."""
        encoder = self.encoder(model)
        scalars: dict[str, float] = {}
        for name, dataset in self.quick_sets.items():
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            found = recalls(retrieval(encoder.images(dataset), encoder.texts(texts)), (1, 5))
            scalars |= {f"val_{name}_{key}": float(hits.mean()) for key, hits in found.items()}
        return scalars


def hidden() -> bool | None:
    """``disable`` of a progress bar: only the main process shows one, and only on a terminal."""
    return None if distributed.is_main() else True


def uses_prototypes(config: TrainConfig) -> bool:
    """Whether a prototype term has a positive weight."""
    weights = config.loss
    return config.method == "protoclip" and (weights.w_proto > 0 or weights.w_proto_external > 0)


def open_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of ``open_dataset``, the same for training and evaluation."""
    return {"seed": config.run.seed, **{name: getattr(config.data, name) for name in TABLE}}


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
    """The teacher to open, or "" and a sentence that says why there is none."""
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
    """Features [dataset, d] and a sentence about them; None if the run has no teacher."""
    spec, remark = teacher_spec(config)
    if not spec:
        return None, remark
    rows = load_teacher(spec, dataset, dim=config.episode.external_teacher_dim, device=device)
    return rows, f"external teacher: {spec}, {rows.shape[1]} dimensions"


def check_settings(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError for settings that cannot work, whatever the data."""
    check_model(config.model)
    schedule.parse_interval(config.run.save_every)
    if "wandb" in config.run.report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError("--report-to wandb: wandb is not installed; pip install wandb")
    weights, episode, backend = config.loss, config.episode, config.episode.kmeans_backend
    teacher = bool(teacher_spec(config)[0])
    internal = config.method == "protoclip" and weights.w_proto > 0
    clusters = internal or (teacher and weights.w_proto_external > 0)
    always = clusters and not (episode.infonce_warmup or episode.lit_start)
    if weights.w_clip == 0 and not always and not (teacher and weights.w_distill > 0):
        raise ValueError(
            "--w-clip 0: expected another loss with a weight in every step, got none with --method "
            f"{config.method} and {'an' if teacher else 'no'} external teacher; use --w-clip 1, or "
            "a positive --w-proto with --infonce-warmup-epoch 0 and --lit-start 0"
        )
    if backend == "faiss":
        load_faiss()
        if distributed.is_distributed():
            raise ValueError("--kmeans-backend faiss: expected one process; use auto")
    elif backend != "auto":
        for op in ("kmeans_assign", "segment_mean"):
            if reason := why_not(op, backend, device.type, torch.float32):
                raise ValueError(f"--kmeans-backend {backend}: {reason}; use --kmeans-backend auto")


def changes_since(resume: Resume, config: TrainConfig) -> tuple[list[str], list[str]]:
    """Settings that differ from the resumed run's: those that must not, and others that matter."""
    old, new = flat(resume.payload["protoclip"]["config"]), flat(to_dict(config))
    wrong, notes = [], []
    for key in sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
        change = f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        if key.startswith(FIXED):
            wrong.append(change)
        elif not key.startswith(FREE):
            notes.append(change)
    return wrong, notes


def refuse_changes(resume: Resume, config: TrainConfig) -> None:
    """ValueError for other settings of training where no step is left that would use them."""
    wrong, notes = changes_since(resume, config)
    if wrong or notes:
        raise ValueError(
            f"--resume: {resume.folder} has done all of its steps, so nothing would be trained "
            f"with other settings: {'; '.join(wrong + notes)}; leave them out, add --epochs or "
            f"--max-steps for more steps, or start a new run with --pretrained {resume.file}"
        )


def check_resume(resume: Resume, setup: Setup) -> list[str]:
    """Notes on settings that differ from the resumed run; ValueError for those that must not."""
    training = resume.payload["protoclip"]["training"]
    wrong, notes = changes_since(resume, setup.config)
    now = {
        "the global batch_size (all ranks and passes)": ("batch_size", setup.plan.batch_size),
        "the training data": ("data", checkpoint.fingerprint(setup.dataset.keys)),
    }
    for words, (key, value) in now.items():
        if (then := training.get(key)) != value:
            wrong.append(f"{words} was {then} and is {value}")
    if wrong:
        raise ValueError(
            f"--resume: {resume.file} cannot go on with other settings: {'; '.join(wrong)}; use "
            "the run's own settings, or start a new run with --pretrained"
        )
    return [f"since the checkpoint, {note}: this is no longer the same run" for note in notes]


if __name__ == "__main__":
    sys.exit(main())
