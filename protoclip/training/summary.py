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
from protoclip.common.phases import Phases
from protoclip.data import BadSample, PairDataset
from protoclip.episodes import prototypes
from protoclip.episodes.feature_store import FeatureSource
from protoclip.episodes.prototypes import Episode
from protoclip.evaluate import results, tasks
from protoclip.evaluate.during import Evaluation
from protoclip.evaluate.results import Outcome, Results
from protoclip.model import ProtoModel
from protoclip.report import page, snapshot
from protoclip.report.capture import draw_plots
from protoclip.runs import checkpoint
from protoclip.runs.run_folder import NullRunFolder, sum_up
from protoclip.settings.config import ModelConfig, TrainConfig
from protoclip.training import schedule
from protoclip.training.checks import ActiveLosses

NAMED = 5  # left-out samples that the log names


def announce(
    folder: NullRunFolder,
    config: TrainConfig,
    plan: schedule.Plan,
    *,
    dataset: PairDataset,
    device: torch.device,
    precision: str,
    active: ActiveLosses,
    features: FeatureSource,
    episode_samples: int,
    first_prototype_step: int,
    teacher_remark: str,
) -> None:
    """Print what the run will do, in the user's units."""
    ranks = distributed.world_size()
    on_ranks = f", {ranks} ranks" if ranks > 1 else ""
    warmup = config.optim.warmup
    if busy := busy_note(device):
        folder.say(busy)
    chosen = config.run.precision == "auto" and precision == "amp_bf16"
    by_itself = " (--precision auto: this device multiplies bf16)" if chosen else ""
    folder.say(
        f"run folder: {folder.path}\n"
        f"data: {dataset.name}, {len(dataset):,} pairs; {plan.total_steps} steps of "
        f"{plan.global_batch_size}, {plan.steps_per_epoch} a pass over the data\n"
        f"model: {config.model.model} on {device}, {precision}{by_itself}, "
        f"{plural(torch.get_num_threads(), 'thread')}{on_ranks}"
    )
    if skipped := dataset.facts.skipped:
        folder.say(left_out(skipped, dataset.name))
    builtin = config.data.train_data.startswith("builtin:")
    if config.model.model == ModelConfig().model and not builtin:
        folder.say(
            f"note: {config.model.model}, the default, is a small model for drawings of 48 pixels; "
            "for photographs give an OpenCLIP model, such as --model ViT-B-32"
        )
    if warmup > plan.total_steps:  # the last step of it has --lr
        folder.say(
            f"note: --warmup {warmup:g} is longer than the run's {plan.total_steps} steps, so the "
            "run never reaches --lr; use a fraction such as 0.1"
        )
    if not active.prototypes:
        contrastive = "SigLIP" if config.model.siglip else "InfoNCE"
        others = "and distillation" if active.distillation else "only"
        folder.say(f"method: {config.method}, {contrastive} {others}")
        if config.method == "protoclip":
            folder.say(teacher_remark)
        return
    episode = config.episode
    limits = ""
    if features.reuses and active.internal and episode.replacement:
        limits = " at the earliest"
    if first_prototype_step > plan.total_steps:
        limits += ", which this run does not reach"
    elif first_prototype_step > 1:
        limits += "; the loss is larger from there, as it includes them"
    num_clusters = prototypes.check_clusters(episode, episode_samples)
    if config.loss.w_proto < 0 and active.external:
        teacher_remark += "; no internal prototypes beside it (--w-proto 1 adds them)"
    folder.say(
        f"method: protoclip; {plan.episodes} episodes of {plan.steps_per_episode} steps, "
        f"{num_clusters} prototypes per source\n"
        f"features: {features.reason}; {'internal ' if active.internal else ''}prototypes train "
        f"from step {first_prototype_step} on{limits}\n{teacher_remark}"
    )


def find_first_prototype_step(
    config: TrainConfig, plan: schedule.Plan, active: ActiveLosses, features: FeatureSource
) -> int:
    """The step that trains prototypes first, counted from 1; 0: the method has none."""
    if not active.prototypes:
        return 0
    episode = config.episode
    # Drawn with replacement, some samples come again before the second pass.
    after_first_pass = features.reuses and active.internal and not episode.replacement
    return 1 + plan.first_step_with_prototypes(episode.infonce_warmup, after_first_pass)


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


def conclude(
    folder: NullRunFolder,
    config: TrainConfig,
    model: ProtoModel,
    *,
    dataset: PairDataset,
    episode: Episode | None,
    evaluation: Evaluation,
    phases: Phases,
    before: Results | None,
    after: Results | None,
    steps: int,
    skipped_steps: int,
    first_prototype_step: int,
) -> None:
    """Write results.json, draw the plots, print the table, the time per phase and the peak memory,
    and write results.json again, with the plots' time, and the report."""
    floors = evaluation.floors(model)

    def outcome_so_far() -> Outcome:
        return Outcome(
            data=evaluation.data,
            model=config.model.model,
            pretrained=str(checkpoint.candidates(folder.path)[0]),
            trained=after or {},
            untrained=before,
            floors=floors,
            seconds=phases.seconds(),
            work_seconds=phases.work(),
            peak_memory_bytes=tasks.peak_memory_bytes(evaluation.device),
            steps=steps,
            skipped_steps=skipped_steps,
            first_prototype_step=first_prototype_step,
        )

    if after is not None:  # before the plots, which may take more memory than there is
        report = folder.path / page.NAME
        if page.is_report(report):
            report.unlink()  # of fewer steps: a page beside results.json is of these results
        results.write_results(folder.path / "results.json", outcome_so_far())
    with phases.measure("plots", on_host=True):
        encoder = replace(evaluation.encoder(model), batch_size=config.optim.batch_size)
        held_out = None
        if evaluation.sets:
            name = next(iter(evaluation.sets))
            held_out = (evaluation.quick_sets[name].test, evaluation.sets[name])
        draw_plots(folder.path, dataset, episode, encoder, held_out, phases.memory)
    outcome = outcome_so_far()
    folder.say("\n" + results.format_table(outcome))
    if after is None:
        folder.say("no evaluation: too few pictures could be read; give --val-data")
    else:
        results.write_results(folder.path / "results.json", outcome)
        if answer := page.answer(page.Run(folder.path.name, folder.path, {}, outcome)):
            folder.say(answer)
    if outcome.skipped:
        folder.say(f"warning: {outcome.skipped}")
    if "tensorboard" in config.run.report_to:
        scores = {
            f"{results_of_set.title}/{name}": value
            for results_of_set in (after or {}).values()
            for name, value in results_of_set.metrics.items()
        }
        captured = snapshot.load_snapshot(folder.path) or snapshot.Snapshot()
        sum_up(folder.path, config, snapshot.contact_sheet(captured), scores)
    folder.say(f"report: {page.write_report([folder.path])}\ndone: {folder.path}")


def concluded(folder: Path, steps: int, val_data: str) -> Outcome | None:
    """What ``conclude`` has left of a run of so many steps; None if there is none, if its page is
    missing, or if it was evaluated on other data than --val-data."""
    file = folder / "results.json"
    if not file.exists() or not (folder / page.NAME).exists():
        return None
    outcome = results.read_results(file)
    return outcome if outcome.steps == steps and val_data in ("", outcome.data) else None
