"""What a run starts from, as its config asks: training pairs and teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip.config import TrainConfig
from protoclip.data import PairDataset, Subset, open_dataset
from protoclip.data.loader import Faults
from protoclip.data.shards import index_together
from protoclip.data.sources import is_sharded
from protoclip.distributed import is_main
from protoclip.teacher import MINILM, load_teacher, minilm_missing


def open_training_data(config: TrainConfig) -> PairDataset:
    """The training pairs: the train split of built-in data, all of anything else."""
    data = config.data
    split = "train" if data.train_data.startswith("builtin:") else "all"
    if is_sharded(data.train_data):
        index_together(data.train_data)
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
    return Faults(dataset, max_fraction, report)


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


def uses_teacher(config: TrainConfig) -> bool:
    weights = config.loss
    wanted = weights.w_proto_external > 0 or weights.w_distill > 0
    return config.method == "protoclip" and wanted


def teacher_spec(config: TrainConfig) -> tuple[str, str]:
    """The teacher to open, or "" and a sentence where there is none."""
    spec = config.episode.external_teacher
    if not uses_teacher(config) or spec == "none":
        return "", "external teacher: none"
    if spec != "auto":
        return spec, ""
    if not config.data.train_data.startswith("builtin:"):
        return "", f"external teacher: none; --external-teacher {MINILM} or a file adds one"
    reason = minilm_missing()
    if reason is not None:
        return "", f"external teacher: none, internal prototypes only: {reason}"
    return MINILM, ""


def open_teacher(
    config: TrainConfig, dataset: PairDataset, device: torch.device
) -> tuple[Tensor | None, str]:
    """Features [dataset, d] and a sentence about them; None where no teacher is due."""
    spec, remark = teacher_spec(config)
    if not spec:
        return None, remark
    with tqdm(
        total=len(dataset),
        desc=f"teacher {spec}",
        unit=" samples",
        leave=False,
        disable=None if is_main() else True,
    ) as bar:
        rows = load_teacher(
            spec,
            dataset,
            dim=config.episode.external_teacher_dim,
            device=device,
            progress=bar.update,
        )
    return rows, f"external teacher: {spec}, {rows.shape[1]} dimensions"
