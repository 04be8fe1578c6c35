"""Train CLIP or ProtoCLIP: ``python -m protoclip.train``, no arguments needed.

Without arguments: ProtoCLIP on the built-in emoji, at most five minutes on two CPU cores, with a
table before and after, plots and a checkpoint in a run folder.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from protoclip import checkpoint
from protoclip.commands import on_all_ranks, quietly
from protoclip.config import TrainConfig, build_parser, parse
from protoclip.data import PairDataset, build_transform
from protoclip.data.__main__ import check_data
from protoclip.data.loader import EpochOrder
from protoclip.distributed import (
    from_main,
    is_distributed,
    is_main,
    seed_everything,
    world_size,
)
from protoclip.evaluate import Results, format_table, peak_memory_bytes, read_results, write_results
from protoclip.launchers import find_place
from protoclip.model import ProtoModel, build_model, choose_device, choose_precision
from protoclip.prototypes import check_clusters
from protoclip.report import write_report
from protoclip.training.adopt import OpenClipRun, adopt
from protoclip.training.capture import restore
from protoclip.training.checks import check_episodes, check_settings
from protoclip.training.inputs import faults_of, open_teacher, open_training_data, uses_prototypes
from protoclip.training.launch import OtherRank, seed_rank
from protoclip.training.loop import Trainer
from protoclip.training.phases import Phases
from protoclip.training.plan import Plan, learning_rate, make_plan
from protoclip.training.resume import Resume, check_resume, find_resume
from protoclip.training.run_folder import RunFolder, choose_folder
from protoclip.training.saving import SaveSchedule, Stopped, StopSignals
from protoclip.training.views import Evaluation, draw_plots

PROG = "python -m protoclip.train"
REMEDY = "--resume goes on from the last checkpoint"  # where a rank is lost
DESCRIPTION = (
    "Train ProtoCLIP (or CLIP) on image-text pairs. Without arguments: ProtoCLIP on the built-in "
    "emoji, a few minutes on two CPU cores."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for a user's mistake (one message on stderr)."""
    try:
        place = find_place()
        with quietly(place):
            config = parse(build_parser(PROG, DESCRIPTION), with_saved_config(argv))
        if place.world_size > 1:
            run = config.run
            settings = run.device, run.dist_timeout, run.dist_backend
            return on_all_ranks(lambda: train(config), place, *settings, PROG, REMEDY)
        train(config)
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:  # before there was a run folder
        print(f"{PROG}: {stop}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


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


def check(dataset: PairDataset, workers: int) -> int:
    """--check-data: the exit code is 1 where a sample is bad."""
    return int(check_data(dataset, workers) > 0)


def train(config: TrainConfig) -> Path:
    """A whole run: data, model, teacher, training, evaluation, plots; returns the run folder.

    Raises:
        ValueError: something the config asks for does not exist or does not fit together; the
            message has the remedy. Nothing is overwritten.
    """
    SaveSchedule(config.run.save_every)  # a mistake there should not cost the minutes before
    with StopSignals() as signals:
        return _train(config, signals)


def _train(config: TrainConfig, signals: StopSignals) -> Path:
    found = from_main(lambda: find_resume(config))
    theirs = found if isinstance(found, OpenClipRun) else None
    resume = found if isinstance(found, Resume) else None
    if theirs:
        config = theirs.settings(config)
    path = from_main(lambda: resume.folder if resume else choose_folder(config))
    device = choose_device(config.run.device)
    precision = choose_precision(config.run.precision, device)
    phases = Phases(device)
    check_settings(config, device)

    dataset = open_training_data(config)
    if config.data.check_data:
        raise SystemExit(from_main(lambda: check(dataset, config.data.workers)))
    faults_of(dataset, config.data.max_bad_fraction, print)  # stops where too many are known
    order = EpochOrder(dataset, config.data)
    plan = make_plan(config, order.size)
    if theirs:
        theirs.step(plan)  # says what is wrong before anything is made
    if resume and resume.step >= plan.total_steps and (path / "results.json").exists():
        print(f"{path} is complete: {resume.step} steps and its results", file=sys.stderr)
        return path
    if uses_prototypes(config):
        check_episodes(config, plan, len(dataset), order.permutation)
    seed_everything(config.run.seed)
    model = build_model(config.model).to(device)
    if theirs:
        theirs.prepare(model, config)
    seed_rank(config.run.seed)
    with phases.measure("teacher", on_host=True):
        teacher, remark = from_main(lambda: open_teacher(config, dataset, device))

    evaluate = Evaluation(config, phases, device, precision)
    notes = check_resume(resume, config, dataset.keys) if resume else []
    again = resume.step if resume else 0 if path.exists() else None
    transform = build_transform(model.image_size, model.mean, model.std, config.data.augmentation)
    trainer = Trainer(
        config,
        plan,
        model,
        dataset,
        transform,
        teacher,
        OtherRank(path),
        phases,
        device=device,
        precision=precision,
        evaluate=evaluate.quick if evaluate.quick_sets else None,
        zeroshot=evaluate.zeroshot if evaluate.zeroshot_data else None,
        signals=signals,
    )
    before = None
    if resume:  # everything is checked before the folder is touched
        before = untrained(path, evaluate, model, True)
        restore(trainer, resume.payload)
    folder = RunFolder(path, config, again) if is_main() else OtherRank(path)
    trainer.folder = folder
    try:
        announce(folder, config, plan, dataset, remark, device, precision)
        if resume:
            folder.say(f"resumed: {resume.file}, after step {resume.step} of {plan.total_steps}")
        for note in notes:
            folder.say(note)
        if not resume:
            before = untrained(path, evaluate, model, False)
        if theirs:
            folder.say(adopt(trainer, theirs))
        run(trainer, evaluate, before)
    except Stopped as stop:
        folder.say(str(stop))
        if stop.code:
            raise SystemExit(stop.code) from None
    except BaseException:
        folder.note(traceback.format_exc())
        raise
    finally:
        folder.close()
    return path


def run(trainer: Trainer, evaluate: Evaluation, before: Results | None) -> None:
    """Train, evaluate, and write tables, plots and the report."""
    trainer.run()
    after = evaluate.full(trainer.model, "evaluating the trained model")
    folder, config, phases = trainer.folder, trainer.config, evaluate.phases
    if isinstance(folder, OtherRank):
        return
    with phases.measure("plots", on_host=True):
        draw_plots(folder, config, trainer, trainer.dataset, evaluate, after)
    report(folder, config, before, after, phases, trainer.device)


def untrained(
    folder: Path, evaluate: Evaluation, model: ProtoModel, resumed: bool
) -> Results | None:
    """The evaluation before training; a resumed run reads what it found when it began."""
    path = folder / "untrained.json"
    if from_main(lambda: resumed and path.exists()):
        return read_results(path)["trained"] if is_main() else None
    before = evaluate.full(model, "evaluating the untrained model")
    if before is not None and is_main() and not resumed:
        write_results(path, before, None, data=evaluate.data, model="untrained", pretrained="")
    return before


def announce(
    folder: RunFolder | OtherRank,
    config: TrainConfig,
    plan: Plan,
    dataset: PairDataset,
    remark: str,
    device: torch.device,
    precision: str,
) -> None:
    """Say what will be done, in the user's units."""
    folder.say(f"run folder: {folder.path}")
    folder.say(
        f"data: {dataset.name}, {len(dataset):,} pairs; {plan.total_steps} steps of "
        f"{plan.batch_size}, {plan.steps_per_epoch} a pass over the data"
    )
    if config.optim.warmup >= plan.total_steps:
        folder.say(
            f"note: --warmup {config.optim.warmup:g} steps are longer than the run's "
            f"{plan.total_steps}: the learning rate ends at "
            f"{learning_rate(config.optim, plan.total_steps, plan.total_steps - 1):.3g}, below "
            f"--lr {config.optim.lr:g}; a fraction such as --warmup 0.1 follows the run"
        )
    folder.say(
        f"model: {config.model.model} on {device}, {precision}, {torch.get_num_threads()} threads"
        + (f", {world_size()} ranks" if is_distributed() else "")
    )
    if uses_prototypes(config):
        samples = min(len(dataset), plan.steps_per_episode * plan.batch_size)
        never = plan.episodes <= config.episode.infonce_warmup
        folder.say(
            f"method: protoclip; {plan.episodes} episodes of {plan.steps_per_episode} steps, "
            f"{check_clusters(config.episode, samples)} prototypes per source, features "
            f"{'reused' if config.episode.reuses else 'extracted'}, prototypes from episode "
            f"{config.episode.infonce_warmup + 1} on"
            + (", which this run does not reach" if never else "")
        )
        folder.say(remark)
    else:
        folder.say("method: clip, InfoNCE only")


def report(
    folder: RunFolder,
    config: TrainConfig,
    before: Results | None,
    after: Results | None,
    phases: Phases,
    device: torch.device,
) -> None:
    """Print the table, the time per phase and the peak memory; write results.json."""
    timing = phases.seconds()
    peak = peak_memory_bytes(device)
    if after is None:
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timing.items())
        folder.say(f"time: {times}\npeak memory: {peak / 2**20:,.0f} MiB")
        folder.say("no evaluation: give --val-data")
    else:
        folder.say("\n" + format_table(before, after, timing, peak_memory_bytes=peak))
        write_results(
            folder.path / "results.json",
            after,
            before,
            data=config.data.val_data or config.data.train_data,
            model=config.model.model,
            pretrained=str(checkpoint.find(folder.path)),
            timing=timing,
            peak_memory_bytes=peak,
        )
    folder.say(f"report: {write_report([folder.path])}")
    folder.say(f"done: {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
