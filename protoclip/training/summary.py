"""What a training run says: what it will do, before it; plots, table and report, after it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from protoclip import distributed
from protoclip.common.files import plural
from protoclip.common.host import busy_note
from protoclip.common.waits import Wait
from protoclip.data import BadSample
from protoclip.episodes import prototypes
from protoclip.episodes.feature_store import FeatureSource
from protoclip.evaluate import results, tasks
from protoclip.evaluate.results import Outcome, Results
from protoclip.report import page, snapshot
from protoclip.report.capture import draw_plots
from protoclip.runs import checkpoint
from protoclip.runs.run_folder import sum_up
from protoclip.settings.config import ModelConfig
from protoclip.training.loop import Trainer
from protoclip.training.run import Run

NAMED = 5  # left-out samples that the log names


def announce(trainer: Trainer, notes: Sequence[str]) -> None:
    """Print what the run will do, in the user's units, and notes on what it was made of."""
    run = trainer.run
    config = run.config
    plan = run.plan
    dataset = run.dataset
    folder = run.folder
    ranks = distributed.world_size()
    on_ranks = f", {ranks} ranks" if ranks > 1 else ""
    warmup = config.optim.warmup
    if busy := busy_note(run.device):
        folder.say(busy)
    chosen = config.run.precision == "auto" and run.precision == "amp_bf16"
    by_itself = " (--precision auto: this device multiplies bf16)" if chosen else ""
    folder.say(
        f"run folder: {folder.path}\n"
        f"data: {dataset.name}, {len(dataset):,} pairs; {plan.total_steps} steps of "
        f"{plan.global_batch_size}, {plan.steps_per_epoch} a pass over the data\n"
        f"model: {config.model.name} on {run.device}, {run.precision}{by_itself}, "
        f"{plural(torch.get_num_threads(), 'thread')}{on_ranks}"
    )
    if skipped := dataset.facts.skipped:
        folder.say(left_out(skipped, dataset.name))
    builtin = config.data.train_data.startswith("builtin:")
    if config.model.name == ModelConfig().model and not builtin:
        folder.say(
            f"note: {config.model.model}, the default, is a small model for drawings of 48 pixels; "
            "for photographs give an OpenCLIP model, such as --model ViT-B-32"
        )
    if warmup > plan.total_steps:  # the last step of it has --lr
        folder.say(
            f"note: --warmup {warmup:g} is longer than the run's {plan.total_steps} steps, so the "
            "run never reaches --lr; use a fraction such as 0.1"
        )
    folder.say(_method(run, trainer.features.source))
    for note in dict.fromkeys(notes):  # two of them may be about one folder
        if note:
            folder.say(note)


def _method(run: Run, features: FeatureSource) -> str:
    """What the run trains, and from when on."""
    config = run.config
    active = run.active
    if not active.prototypes:
        contrastive = "SigLIP" if config.model.siglip else "InfoNCE"
        others = "and distillation" if active.distillation else "only"
        method = f"method: {config.method}, {contrastive} {others}"
        return f"{method}\n{run.teacher_remark}" if config.method == "protoclip" else method
    episode = config.episode
    first_step = first_prototype_step(run, features)
    limits = ""
    if features.reuses and active.internal and episode.replacement:
        limits = " at the earliest"
    if first_step > run.plan.total_steps:
        limits += ", which this run does not reach"
    elif first_step > 1:
        limits += "; the loss is larger from there, as it includes them"
    samples = run.plan.episode_samples(len(run.dataset))
    remark = run.teacher_remark
    if config.loss.w_proto < 0 and active.external:
        remark += "; no internal prototypes (--w-proto 1 adds them)"
    return (
        f"method: protoclip; {run.plan.episodes} episodes of {run.plan.steps_per_episode} steps, "
        f"{prototypes.check_clusters(episode, samples)} prototypes per source\n"
        f"features: {features.reason}; {'internal ' if active.internal else ''}prototypes train "
        f"from step {first_step} on{limits}\n{remark}"
    )


def first_prototype_step(run: Run, features: FeatureSource) -> int:
    """The step that trains prototypes first, counted from 1; 0: the method has none."""
    if not run.active.prototypes:
        return 0
    plan = run.plan
    episode = run.config.episode
    first = episode.infonce_warmup * plan.steps_per_episode
    # In the first pass no sample has stored features; drawn with replacement, some come again.
    if features.reuses and run.active.internal and not episode.replacement:
        first = max(first, plan.steps_per_epoch)
    return 1 + first


def left_out(skipped: Sequence[BadSample], data: str) -> str:
    """The first samples, (file, row or key, reason), that could not be used when the data was
    opened."""
    lines = [f"left out of the data: {plural(len(skipped), 'sample')}"]
    lines += [
        f"  {', '.join(filter(None, (file, key)))}: {why}" for file, key, why in skipped[:NAMED]
    ]
    if len(skipped) > NAMED:
        lines.append(f"  ... (protoclip data --check {shlex.quote(data)} lists all)")
    return "\n".join(lines)


def conclude(trainer: Trainer, before: Results | None, after: Results | None) -> None:
    """Write results.json, draw the plots, print the table, and write the report. ``before`` and
    ``after``: the evaluations of the untrained and of the trained model."""
    run = trainer.run
    evaluation = run.evaluation
    assert evaluation is not None  # it has evaluated
    config = run.config
    path = run.folder.path
    outcome = Outcome(
        data=evaluation.data,
        model=config.model.name,
        pretrained=str(checkpoint.candidates(path)[0]),
        trained=after or {},
        untrained=before,
        training_data=run.data_fingerprint,
        steps=run.plan.total_steps,
        skipped_steps=trainer.log.reported_skips,
        first_prototype_step=first_prototype_step(run, trainer.features.source),
        floors=evaluation.floors(run.model),
        seconds=run.phases.seconds(),
        work_seconds=run.phases.work(),
        shared_machine=run.phases.shared_machine,
        peak_memory_bytes=tasks.peak_memory_bytes(run.device),
    )
    if outcome.trained:  # before the plots, which may take more memory than there is
        report = path / page.NAME
        if page.is_report(report):
            report.unlink()  # of fewer steps: a page next to results.json is of these results
        results.write_results(path / "results.json", outcome)
    encoder = replace(evaluation.encoder(run.model), batch_size=config.optim.batch_size)
    held_out = None
    if evaluation.sets:
        name = next(iter(evaluation.sets))
        held_out = (evaluation.quick_sets[name].test, evaluation.sets[name])
    with Wait("drawing the page"):
        draw_plots(path, run.dataset, trainer.episode, encoder, held_out, run.phases.memory)
    run.folder.say("\n" + results.format_table(outcome))
    if not outcome.trained:
        run.folder.say("no evaluation: too few pictures could be read; give --val-data")
    elif answer := page.answer(page.Run(path.name, path, {}, outcome)):
        run.folder.say(answer)
    if outcome.skipped:
        run.folder.say(f"warning: {outcome.skipped}")
    if "tensorboard" in config.run.report_to:
        scores = {
            f"{results_of_set.title}/{name}": value
            for results_of_set in outcome.trained.values()
            for name, value in results_of_set.metrics.items()
        }
        captured = snapshot.load_snapshot(path) or snapshot.Snapshot()
        sum_up(path, config, snapshot.contact_sheet(captured), scores)
    run.folder.say(f"report: {page.write_report([path])}\ndone: {path}")


def concluded(folder: Path, steps: int, val_data: str) -> Outcome | None:
    """What ``conclude`` has left of a run of so many steps; None if there is none, if its page is
    missing, or if it was evaluated on other data than --val-data."""
    file = folder / "results.json"
    if not file.exists() or not (folder / page.NAME).exists():
        return None
    outcome = results.read_results(file)
    return outcome if outcome.steps == steps and val_data in ("", outcome.data) else None
