"""The data of a run, opened as its settings say."""

from __future__ import annotations

from typing import Any

import torch

from protoclip.config import TABLE, TrainConfig
from protoclip.data import PairDataset, Subset, index_together, open_dataset


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
