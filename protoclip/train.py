"""Train CLIP or ProtoCLIP: ``protoclip train``.

Without arguments it trains ProtoCLIP on the built-in icons in a few minutes on two CPU cores,
and leaves results, plots and a checkpoint in a run folder. Read from ``train`` down: open
and check everything, resume, train episode by episode, evaluate, report.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protoclip import distributed
from protoclip.common.files import DISK_FULL, mebibytes
from protoclip.common.host import choose_workers, keep_freed_memory, start_again_if_busy
from protoclip.common.phases import Phases
from protoclip.common.seeds import seed_everything
from protoclip.data.loader import EpochOrder
from protoclip.data.settings import open_run_data
from protoclip.distributed import gathered_rows
from protoclip.episodes import prototypes
from protoclip.episodes.teacher import open_teacher
from protoclip.evaluate.during import Evaluation
from protoclip.evaluate.results import Results
from protoclip.losses import Term, TermInputs
from protoclip.model import (
    build_model,
    choose_device,
    choose_precision,
    put_channels_last,
)
from protoclip.ops.dispatch import resolve
from protoclip.runs import checkpoint
from protoclip.runs.resume import (
    check_resume,
    open_resume,
    refuse_changes,
    refuse_other_terms,
)
from protoclip.runs.run_folder import NullRunFolder, RunFolder, choose_folder
from protoclip.settings.commands import train_parser
from protoclip.settings.config import TrainConfig
from protoclip.settings.flags import parse, with_saved_config, words_of
from protoclip.training import schedule
from protoclip.training.checks import (
    check_settings,
    uses_prototypes,
)
from protoclip.training.stops import Stopped
from protoclip.training.summary import announce, conclude, concluded, find_first_prototype_step
from protoclip.training.towers import tf32_products
from protoclip.training.trainer import Setup, Trainer

__all__ = ["Term", "TermInputs", "Trained", "gathered_rows", "main", "make_config", "train"]
PROG = "protoclip train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's mistake, 130 after Ctrl-C."""

    def work() -> int:
        info = distributed.find_rank()
        with distributed.quiet_beside_main(info):
            config = parse(train_parser(), with_saved_config(argv))
        device = choose_device(config.run.device)
        if device.type == "cpu" and (argv is None or sys.argv[1:] == ["train", *argv]):
            start_again_if_busy(device)
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


def train(config: TrainConfig, terms: Mapping[str, Term] | None = None) -> Trained:
    """Do a whole run: data, model, teacher, training, evaluation, plots.

    Args:
        config: all settings, such as ``make_config`` gives.
        terms: losses of your own, by the name under which they are logged (docs/own-loss.md).

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
            trained = _train(config, device, terms or {})
    except Stopped:  # on every rank
        if joined:
            distributed.stop()
        raise
    if joined:
        distributed.stop()
    return trained


def _train(config: TrainConfig, device: torch.device, terms: Mapping[str, Term]) -> Trained:
    check_settings(config, device, terms)
    weights = {name: term.weight for name, term in terms.items()}
    resume = open_resume(config)
    if resume:
        refuse_other_terms(resume, weights)
    path = distributed.from_main(lambda: resume.folder if resume else choose_folder(config))
    run_data = open_run_data(config)
    dataset = run_data.training
    order = EpochOrder(dataset, config.data.shuffle_buffer)
    plan = schedule.make_plan(config, order.size)
    if resume and resume.step >= plan.total_steps:
        refuse_changes(resume, config)
        steps = resume.step
        done = distributed.from_main(lambda: concluded(path, steps, config.data.val_data))
        if done is not None:
            if distributed.is_main():
                print(f"{path} is complete: {steps} steps and its results", file=sys.stderr)
            return Trained(path, done.trained)
    precision = distributed.from_main(lambda: choose_precision(config.run.precision, device))
    # The config keeps "auto", so that a run can go on on another machine.
    workers = choose_workers(config.data.workers, device, distributed.world_size())
    setup = Setup(config, plan, dataset, order, device, precision, workers=workers)
    if uses_prototypes(config):
        prototypes.check_clusters(config.episode, setup.episode_samples)
    seed_everything(config.run.seed)
    model = build_model(config.model).to(device)
    put_channels_last(model, device)
    phases = Phases(device)
    with phases.measure("teacher", on_host=True):
        make = partial(open_teacher, config, dataset, device)
        teacher, remark = distributed.rows_from_main(make)
    if teacher is not None:
        setup = replace(setup, teacher=teacher.to(device))
        del teacher  # on a GPU this is another copy
    evaluation = Evaluation(config, run_data, device, precision, phases, workers)
    reuses = None if resume is None else resume.training["features"] is not None
    trainer = Trainer(setup, model, NullRunFolder(path), phases, evaluation.during, reuses, terms)
    notes = [free_space(path, trainer.checkpoint_bytes())]
    if resume:  # check everything before touching the folder
        notes.append(f"resumed: {resume.file}, after step {resume.step} of {plan.total_steps}")
        notes += check_resume(resume, config, plan.global_batch_size, dataset.keys)
        notes += trainer.restore(resume.payload)
    elif config.run.resume:
        notes.append(f"--resume auto: no checkpoint in {path}, starting at step 0")
    if distributed.is_main():
        step = resume.step if resume else 0 if path.exists() else None
        file = resume.file if resume else None
        trainer.folder = RunFolder(path, config, step, weights, file)
    folder = trainer.folder
    try:
        first_prototype_step = find_first_prototype_step(
            config, plan, trainer.active, trainer.features.source
        )
        announce(
            folder,
            config,
            plan,
            dataset=dataset,
            device=device,
            precision=precision,
            active=trainer.active,
            features=trainer.features.source,
            episode_samples=setup.episode_samples,
            first_prototype_step=first_prototype_step,
            teacher_remark=remark,
        )
        # The same folder may give both kinds of pairs.
        for note in dict.fromkeys([*dataset.facts.left_out, *evaluation.remarks, *notes]):
            if note:
                folder.say(note)
        resolve("info_nce", "auto", device.type, torch.float32)  # compile before the clocks start
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
                steps=plan.total_steps,
                skipped_steps=trainer.log.reported_skips,
                first_prototype_step=first_prototype_step,
            )
    except Stopped as stop:
        folder.say(stop.message)
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.note(traceback.format_exc())
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise full_disk(error, path) from error
        raise
    finally:
        trainer.stepper.replicas.end()
        folder.close()
    return Trained(path, after)


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
