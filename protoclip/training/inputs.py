"""What a run starts from, as its config asks: training pairs and teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip.config import TrainConfig
from protoclip.data import PairDataset, Subset, open_dataset
from protoclip.data.faults import Faults
from protoclip.distributed import is_main
from protoclip.teacher import MINILM, load_teacher, minilm_missing


def open_training_data(config: TrainConfig) -> PairDataset:
    """The training pairs: the train split of built-in data, all of anything else."""
    data = config.data
    split = "train" if data.train_data.startswith("builtin:") else "all"
    dataset = open_dataset(
        data.train_data, split, keep_going=data.check_data, **open_arguments(config)
    )
    if data.train_num_samples:
        if data.train_num_samples > len(dataset):
            raise ValueError(
                f"--train-num-samples: expected at most {len(dataset)}, the size of "
                f"{dataset.name}, got {data.train_num_samples}"
            )
        dataset = Subset(dataset, torch.arange(data.train_num_samples))
    return dataset


def faults_of(dataset: PairDataset, max_fraction: float, report: Callable[[str], Any]) -> Faults:
    """The ledger of bad samples, with those that were left out when the data were opened."""
    inner: Any = dataset
    while isinstance(inner, Subset):
        inner = inner.dataset
    skipped = len(getattr(inner, "skipped", ()))
    total = len(inner) + skipped
    return Faults(dataset.name, total, max_fraction, known=skipped, report=report)


def open_arguments(config: TrainConfig) -> dict[str, Any]:
    """How ``open_dataset`` is to be called, for training and evaluation alike."""
    return {
        "seed": config.run.seed,
        "csv_separator": config.data.csv_separator,
        "csv_img_key": config.data.csv_img_key,
        "csv_caption_key": config.data.csv_caption_key,
        "csv_encoding": config.data.csv_encoding,
    }


def uses_prototypes(config: TrainConfig) -> bool:
    weights = config.loss
    return config.method == "protoclip" and (weights.w_proto > 0 or weights.w_proto_external > 0)


def uses_teachers(config: TrainConfig) -> bool:
    weights = config.loss
    wanted = weights.w_proto_external > 0 or weights.w_distill > 0
    return config.method == "protoclip" and wanted


def teacher_specs(config: TrainConfig) -> tuple[list[str], str]:
    """The teachers to open, and a sentence where there is none."""
    specs = [spec for spec in config.episode.external_teacher if spec != "none"]
    if not uses_teachers(config) or not specs:
        return [], "external teacher: none"
    if "auto" in specs:
        if not config.data.train_data.startswith("builtin:"):
            return [], f"external teacher: none; --external-teacher {MINILM} or a file adds one"
        reason = minilm_missing()
        if reason is not None:
            return [], f"external teacher: none, internal prototypes only: {reason}"
    return [MINILM if spec == "auto" else spec for spec in specs], ""


def open_teachers(
    config: TrainConfig, dataset: PairDataset, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """Name -> [dataset, d], and a sentence about it; {} where no teacher is due."""
    specs, remark = teacher_specs(config)
    if not specs:
        return {}, remark
    temperatures = config.episode.external_target_temperature
    if len(temperatures) not in (1, len(specs)):
        raise ValueError(
            f"--external-target-temperature: expected one number or {len(specs)}, one for each "
            f"teacher, got {len(temperatures)}"
        )
    teachers = {}
    for number, spec in enumerate(specs, start=1):
        name = "external" if len(specs) == 1 else f"external{number}"
        with tqdm(
            total=len(dataset),
            desc=f"teacher {spec}",
            unit=" samples",
            leave=False,
            disable=None if is_main() else True,
        ) as bar:
            teachers[name] = load_teacher(
                spec,
                dataset,
                dim=config.episode.external_teacher_dim,
                device=device,
                progress=bar.update,
            )
    said = [
        f"{spec}, {rows.shape[1]} dimensions"
        for spec, rows in zip(specs, teachers.values(), strict=True)
    ]
    return teachers, f"external teacher: {'; '.join(said)}"
