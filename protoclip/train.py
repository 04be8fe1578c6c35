"""Train CLIP or ProtoCLIP: ``protoclip train``.

Without arguments it trains ProtoCLIP on the built-in icons in a few minutes on two CPU cores,
and leaves results, plots and a checkpoint in a run folder. Read from ``_train`` down: open
and check everything, restore a checkpoint, train, evaluate, report.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("train", sys.argv[1:])

import contextlib
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protoclip import distributed
from protoclip.common.files import DISK_FULL, mebibytes
from protoclip.common.host import choose_workers, keep_freed_memory
from protoclip.common.phases import Phases
from protoclip.common.seeds import seed_everything
from protoclip.data.feature_pairs import check_finite, mean_rows
from protoclip.data.loader import EpochOrder
from protoclip.data.settings import open_run_data, with_widths
from protoclip.distributed import gathered_rows
from protoclip.episodes import prototypes
from protoclip.episodes.teacher import open_teacher
from protoclip.evaluate.during import Evaluation
from protoclip.evaluate.results import Results
from protoclip.losses.objective import Term, TermInputs
from protoclip.model import build_model, choose_device, choose_precision, put_channels_last
from protoclip.ops.dispatch import resolve
from protoclip.runs import checkpoint
from protoclip.runs.resume import open_resume, refuse_changes, refuse_other_terms
from protoclip.runs.run_folder import NullRunFolder, RunFolder, choose_folder
from protoclip.settings.commands import train_parser
from protoclip.settings.config import TrainConfig
from protoclip.settings.flags import parse, with_saved_config, words_of
from protoclip.training.checks import active_losses, check_settings
from protoclip.training.features import bytes_of_features
from protoclip.training.loop import Trainer
from protoclip.training.run import Run
from protoclip.training.schedule import make_plan
from protoclip.training.stops import Stopped
from protoclip.training.summary import announce, conclude, concluded
from protoclip.training.towers import tf32_products

__all__ = ["Term", "TermInputs", "Trained", "gathered_rows", "main", "make_config", "train"]
PROG = "protoclip train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's mistake, or that of a signal."""

    def work() -> int:
        info = distributed.find_rank()
        with distributed.quiet_beside_main(info):
            config = parse(train_parser(), with_saved_config(argv))
        device = choose_device(config.run.device)
        if device.type == "cpu" and (argv is None or sys.argv[1:] == ["train", *argv]):
            keep_freed_memory()  # the process is ours; called from Python, main changes nothing
        try:
            train(config)
        except Stopped as stop:
            return stop.code
        return 0

    return distributed.run_command(work, PROG)


def make_config(**settings: Any) -> TrainConfig:
    """A run's settings from keywords: the names of the flags with underscores, such as
    ``train_data="pairs.csv", w_clip=0.5, PBT=False``. None is the same as no keyword.

    Raises:
        TypeError: no such setting.
        ValueError: a value that a setting cannot have, or settings that contradict each other.
    """
    parser = train_parser()
    parser.raises = True
    return parse(parser, with_saved_config(words_of(parser, settings)))


class Trained(NamedTuple):
    """What a run leaves."""

    folder: Path
    results: Results | None  # on rank 0, by evaluation set; None without evaluation data


def train(
    config: TrainConfig,
    terms: Mapping[str, Term] | None = None,
    trainer: type[Trainer] = Trainer,
) -> Trained:
    """Do a whole run: data, model, teacher, training, evaluation, plots.

    Args:
        config: all settings, such as ``make_config`` gives.
        terms: losses of your own, by the name under which they are logged (docs/own-loss.md).
        trainer: the loop, or your own subclass of it (docs/own-loss.md).

    Raises:
        ValueError: something in the config does not exist, or settings contradict each other.
            Nothing has been written then.
        OSError: the disk is full; the last checkpoint, if there is one, is intact.
        Stopped: a signal asked the run to stop; the state is saved. It is a ``SystemExit``.
    """
    device = choose_device(config.run.device)
    info = distributed.find_rank()
    joined = distributed.start(info, device, config.run.dist_timeout, config.run.dist_backend)
    # A machine without the folder of a resumed run has not read its settings.
    of_rank_0 = distributed.from_main(lambda: config)
    config = replace(of_rank_0, run=replace(of_rank_0.run, device=config.run.device))
    exactly = tf32_products(False) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with exactly:  # except in the towers while they train
            trained = _train(config, device, terms or {}, trainer)
    except Stopped:  # on every rank
        if joined:
            distributed.stop()
        raise
    if joined:
        distributed.stop()
    return trained


def _train(
    config: TrainConfig,
    device: torch.device,
    terms: Mapping[str, Term],
    trainer_class: type[Trainer],
) -> Trained:
    run = open_run(config, device, terms)
    if isinstance(run, Trained):
        return run
    evaluation = run.evaluation
    assert evaluation is not None  # open_run gives it
    path = run.folder.path
    trainer = trainer_class(run)
    notes = [*run.dataset.facts.left_out, *evaluation.remarks]
    notes.append(free_space(path, checkpoint_bytes(trainer)))
    if run.resume:
        notes += trainer.restore(run.resume)
        run.folder.open(run.resume.step, run.resume.file)
    else:
        if config.run.resume:
            notes.append(f"--resume auto: no checkpoint in {path}, starting at step 0")
        run.folder.open(0 if path.exists() else None)
    try:
        announce(trainer, notes)
        resolve("info_nce", "auto", device.type, torch.float32)  # compile before the clocks start
        before = evaluation.untrained(path, run.model, resumed=run.resume is not None)
        trainer.train()
        after = evaluation.full(run.model, "evaluating the trained model")
        if distributed.is_main():
            conclude(trainer, before, after)
    except Stopped as stop:
        run.folder.say(stop.message)
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):
            run.folder.note(traceback.format_exc())
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise full_disk(error, path) from error
        raise
    finally:
        trainer.replicas.end()
        run.folder.close()
    return Trained(path, after)


def open_run(config: TrainConfig, device: torch.device, terms: Mapping[str, Term]) -> Run | Trained:
    """Open and check everything that a run is made of; nothing is written. If the run that
    --resume names is complete, what it has left."""
    check_settings(config, device, terms)
    weights = {name: term.weight for name, term in terms.items()}
    resume = open_resume(config)
    if resume:
        refuse_other_terms(resume, weights)
    path = distributed.from_main(lambda: resume.folder if resume else choose_folder(config))
    run_data = open_run_data(config)
    dataset = run_data.training
    config = with_widths(config, dataset)
    order = EpochOrder(dataset, config.data.shuffle_buffer)
    plan = make_plan(config, order.size)
    if resume and resume.step >= plan.total_steps:
        refuse_changes(resume, config)
        steps = resume.step
        done = distributed.from_main(lambda: concluded(path, steps, config.data.val_data))
        if done is not None:
            if distributed.is_main():
                print(f"{path} is complete: {steps} steps and its results", file=sys.stderr)
            return Trained(path, done.trained)
    if active_losses(config, has_teacher=True).prototypes:  # whether or not there is one
        prototypes.check_clusters(config.episode, plan.episode_samples(len(dataset)))
    precision = distributed.from_main(lambda: choose_precision(config.run.precision, device))
    # The config keeps "auto", so that a run can continue on another machine.
    workers = choose_workers(config.data.workers, device, distributed.world_size())
    seed_everything(config.run.seed)
    model = build_model(config.model).to(device)
    if config.model.image_width and resume is None:
        model.centre(distributed.from_main(partial(mean_rows, dataset)))
        if run_data.held_out is not None:
            distributed.from_main(partial(check_finite, run_data.held_out))
    saved_data = str(resume.training.get("data", "")) if resume else ""
    data = distributed.from_main(partial(checkpoint.fingerprint, dataset, saved_data))
    put_channels_last(model, device)
    phases = Phases(device)
    with phases.measure("teacher", on_host=True):
        make = partial(open_teacher, config, dataset, device)
        teacher, remark = distributed.rows_from_main(make)
        if teacher is not None:
            teacher = teacher.to(device)
    return Run(
        config=config,
        plan=plan,
        dataset=dataset,
        order=order,
        model=model,
        device=device,
        precision=precision,
        folder=RunFolder(path, config, weights) if distributed.is_main() else NullRunFolder(path),
        phases=phases,
        teacher=teacher,
        teacher_remark=remark,
        workers=workers,
        terms=terms,
        evaluation=Evaluation(config, run_data, device, precision, phases, workers),
        resume=resume,
        data_fingerprint=data,
    )


def checkpoint_bytes(trainer: Trainer) -> int:
    """About how large a checkpoint is: weights, their two moments, and stored features."""
    weights = sum(tensor.nbytes for tensor in trainer.run.model.state_dict().values())
    stored = bytes_of_features(trainer.run, 1) if trainer.features.source.reuses else 0
    return 3 * weights + stored


def free_space(path: Path, checkpoint_bytes: int) -> str:
    """A warning if the disk of a run folder has no room for a checkpoint and the one before."""
    above = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    if free >= 2 * checkpoint_bytes:
        return ""
    return (
        f"warning: {mebibytes(free)} are free at {above}, and the last two checkpoints need about "
        f"{mebibytes(2 * checkpoint_bytes)}; free some space or choose another --logs"
    )


def full_disk(error: OSError, path: Path) -> OSError:
    """The error with what to do about it."""
    if checkpoint.candidates(path):
        remedy = f"the last checkpoint is intact, free some space and continue with --resume {path}"
    else:
        remedy = f"there is no checkpoint yet; free some space, remove {path} and start again"
    return OSError(f"{error.filename or path}: {error.strerror}; {remedy}")


if __name__ == "__main__":
    sys.exit(main())
