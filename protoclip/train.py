"""Train CLIP or ProtoCLIP: ``python -m protoclip.train``, no arguments needed.

Without arguments: ProtoCLIP on the built-in emoji, at most five minutes on two CPU cores, with a
table before and after, plots and a checkpoint in a run folder.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip import checkpoint
from protoclip.config import TrainConfig, build_parser, parse
from protoclip.data import PairDataset, Subset, build_transform, noto_available, open_dataset
from protoclip.distributed import seed_everything
from protoclip.episode import check_clusters
from protoclip.evaluate import (
    Encoder,
    Results,
    evaluate_model,
    format_table,
    peak_memory_bytes,
    write_results,
)
from protoclip.features import extract
from protoclip.metrics import retrieval
from protoclip.model import ProtoModel, build_model
from protoclip.report import plot_curves, plot_prototypes
from protoclip.teacher import MINILM, load_teacher, minilm_missing
from protoclip.training.engine import autocast_for, choose_device, choose_precision
from protoclip.training.loop import Trainer
from protoclip.training.phases import Phases
from protoclip.training.plan import Plan, make_plan
from protoclip.training.run_folder import RunFolder, choose_folder

PROG = "python -m protoclip.train"
PICTURED = 4096  # samples among which prototypes.png looks for neighbours
DESCRIPTION = (
    "Train ProtoCLIP (or CLIP) on image-text pairs. Without arguments: ProtoCLIP on the built-in "
    "emoji, a few minutes on two CPU cores."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for a user's mistake (one message on stderr)."""
    try:
        train(parse(build_parser(PROG, DESCRIPTION), argv))
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    return 0


def train(config: TrainConfig) -> Path:
    """A whole run: data, model, teacher, training, evaluation, plots; returns the run folder.

    Raises:
        ValueError: something the config asks for does not exist or does not fit together; the
            message has the remedy. Nothing is overwritten.
    """
    path = choose_folder(config)
    device = choose_device(config.run.device)
    precision = choose_precision(config.run.precision, device)
    phases = Phases(device)

    dataset = open_training_data(config)
    plan = make_plan(config, len(dataset))
    seed_everything(config.run.seed)
    model = build_model(config.model).to(device)
    with phases.measure("teacher", on_host=True):
        teachers, remark = open_teachers(config, dataset, device)
    if uses_prototypes(config):
        # With replacement an episode has fewer distinct samples; it checks again itself.
        check_clusters(config.episode, min(len(dataset), plan.steps_per_episode * plan.batch_size))

    folder = RunFolder(path, config)
    try:
        announce(folder, config, plan, dataset, teachers, remark, device, precision)
        run(config, plan, model, dataset, teachers, folder, phases, device, precision)
    except BaseException:
        folder.note(traceback.format_exc())
        raise
    finally:
        folder.close()
    return path


def run(
    config: TrainConfig,
    plan: Plan,
    model: ProtoModel,
    dataset: PairDataset,
    teachers: Mapping[str, Tensor],
    folder: RunFolder,
    phases: Phases,
    device: torch.device,
    precision: str,
) -> None:
    """Evaluate, train, evaluate again, and write what is to be seen."""
    evaluate = Evaluation(config, phases, device, precision)
    before = evaluate.full(model, "evaluating the untrained model")
    transform = build_transform(model.image_size, model.mean, model.std, config.data.augmentation)
    trainer = Trainer(
        config,
        plan,
        model,
        dataset,
        transform,
        teachers,
        folder,
        phases,
        device=device,
        precision=precision,
        evaluate=evaluate.quick if evaluate.quick_sets else None,
    )
    trainer.run()
    after = evaluate.full(model, "evaluating the trained model")
    with phases.measure("plots", on_host=True):
        draw_plots(folder, config, trainer, dataset)
    report(folder, config, before, after, phases, device)


def open_training_data(config: TrainConfig) -> PairDataset:
    """The training pairs: the train split of built-in data, all of anything else."""
    data = config.data
    split = "train" if data.train_data.startswith("builtin:") else "all"
    dataset = open_dataset(data.train_data, split, **open_arguments(config))
    if data.train_num_samples:
        if data.train_num_samples > len(dataset):
            raise ValueError(
                f"--train-num-samples: expected at most {len(dataset)}, the size of "
                f"{dataset.name}, got {data.train_num_samples}"
            )
        dataset = Subset(dataset, torch.arange(data.train_num_samples))
    return dataset


def open_arguments(config: TrainConfig) -> dict[str, Any]:
    """How ``open_dataset`` is to be called, for training and evaluation alike."""
    return {
        "seed": config.run.seed,
        "csv_separator": config.data.csv_separator,
        "csv_img_key": config.data.csv_img_key,
        "csv_caption_key": config.data.csv_caption_key,
    }


def uses_prototypes(config: TrainConfig) -> bool:
    weights = config.loss
    return config.method == "protoclip" and (weights.w_proto > 0 or weights.w_proto_external > 0)


def open_teachers(
    config: TrainConfig, dataset: PairDataset, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """Name -> [dataset, d], and a sentence about it; {} where no teacher is due."""
    spec = config.episode.external_teacher
    if not uses_prototypes(config) or config.loss.w_proto_external == 0 or spec == "none":
        return {}, "external teacher: none"
    if spec == "auto":
        if not config.data.train_data.startswith("builtin:"):
            return {}, f"external teacher: none; --external-teacher {MINILM} or a file adds one"
        reason = minilm_missing()
        if reason is not None:
            return {}, f"external teacher: none, internal prototypes only: {reason}"
        spec = MINILM
    with tqdm(total=len(dataset), desc=f"teacher {spec}", unit=" samples", leave=False) as bar:
        rows = load_teacher(
            spec,
            dataset,
            dim=config.episode.external_teacher_dim,
            device=device,
            progress=bar.update,
        )
    return {"external": rows}, f"external teacher: {spec}, {rows.shape[1]} dimensions"


def announce(
    folder: RunFolder,
    config: TrainConfig,
    plan: Plan,
    dataset: PairDataset,
    teachers: Mapping[str, Tensor],
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
    folder.say(
        f"model: {config.model.model} on {device}, {precision}, {torch.get_num_threads()} threads"
    )
    if uses_prototypes(config):
        samples = min(len(dataset), plan.steps_per_episode * plan.batch_size)
        folder.say(
            f"method: protoclip; {plan.episodes} episodes of {plan.steps_per_episode} steps, "
            f"{check_clusters(config.episode, samples)} prototypes per source, "
            f"prototypes from episode {config.episode.infonce_warmup + 1} on"
        )
        folder.say(remark)
    else:
        folder.say("method: clip, InfoNCE only")


class Evaluation:
    """The evaluations of a run: full tables before and after, quick recalls in between."""

    def __init__(
        self, config: TrainConfig, phases: Phases, device: torch.device, precision: str
    ) -> None:
        self.config, self.phases, self.device = config, phases, device
        self.autocast = autocast_for(precision, device)
        data = config.data
        builtin = data.train_data.startswith("builtin:")
        self.data = data.val_data or (data.train_data if builtin else "")
        self.quick_sets: dict[str, PairDataset] = {}
        if not self.data:
            return
        arguments = open_arguments(config)
        self.quick_sets["HO"] = open_dataset(
            self.data, "heldout" if self.data.startswith("builtin:") else "all", **arguments
        )
        if self.data == "builtin:emoji" and noto_available():
            self.quick_sets["NHO"] = open_dataset(self.data, "noto-heldout", **arguments)

    def full(self, model: ProtoModel, what: str) -> Results | None:
        """All metrics of all evaluation sets; None where there is nothing to evaluate on."""
        if not self.data:
            return None
        arguments = open_arguments(self.config)
        with (
            self.phases.measure("evaluation", on_host=True),
            tqdm(desc=what, unit=" rows", unit_scale=True, leave=False) as bar,
        ):
            return evaluate_model(
                model,
                self.data,
                seed=arguments.pop("seed"),
                device=self.device,
                workers=self.config.data.workers,
                autocast=self.autocast,
                progress=bar.update,
                open_kwargs=arguments,
            )

    def quick(self, model: ProtoModel) -> dict[str, float]:
        """Recalls on the small sets, for the curves."""
        encoder = Encoder(
            model, self.device, workers=self.config.data.workers, autocast=self.autocast
        )
        scalars: dict[str, float] = {}
        for name, dataset in self.quick_sets.items():
            texts = [dataset.captions(i)[0] for i in range(len(dataset))]
            ranks = retrieval(encoder.images(dataset), encoder.texts(texts), None)
            scalars |= {f"val_{name}_{key}": value for key, value in ranks.summary((1, 5)).items()}
        return scalars


def draw_plots(
    folder: RunFolder, config: TrainConfig, trainer: Trainer, dataset: PairDataset
) -> None:
    """curves.png, and prototypes.png where there are prototypes."""
    plot_curves(folder.path / "metrics.jsonl", folder.path / "curves.png")
    if trainer.episode is None:
        return
    source = list(trainer.episode.clusterings)[-1]  # the teacher, if there is one
    labels = trainer.episode.clusterings[source].labels.cpu()
    chosen = (labels >= 0).nonzero().flatten()[:PICTURED]
    model = trainer.model
    features = extract(
        model,
        dataset,
        chosen,
        transform=build_transform(model.image_size, model.mean, model.std, "none"),
        batch_size=256,
        device=trainer.device,
        seed=config.run.seed,
        workers=config.data.workers,
        autocast=trainer.autocast,
    )
    plot_prototypes(
        folder.path / "prototypes.png",
        dataset,
        features.image_h,
        features.text_h,
        labels[features.index.cpu()],
        index=features.index,
        classes=dataset.labels.get("group"),
        title=f"Prototypes of the {source} clusters",
    )


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
    folder.say(f"done: {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
