"""The data of a run, opened as its settings say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protoclip.data import (
    DataError,
    PairDataset,
    Pictures,
    Subset,
    heldout_pictures,
    index_together,
    open_dataset,
)
from protoclip.data.feature_pairs import ClassRows, feature_pairs, open_class_rows
from protoclip.data.selection import read_selection, selected_pairs
from protoclip.settings.config import TABLE, TrainConfig


@dataclass(frozen=True)
class RunData:
    """The pairs that a run trains on, and the pictures that --val-fraction keeps out of training,
    each with all of its captions."""

    training: PairDataset
    held_out: PairDataset | None = None
    class_rows: ClassRows | None = None  # of stored features


def open_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments of ``open_dataset``, the same for training and evaluation."""
    return {"seed": config.data.val_seed, **{name: getattr(config.data, name) for name in TABLE}}


def open_run_data(config: TrainConfig) -> RunData:
    """The training pairs (the train split of built-in data, all of anything else; of those the
    selected ones of --rows) without those that --val-fraction holds out, and the held-out ones."""
    data = config.data
    split = "train" if data.train_data.startswith("builtin:") else "all"
    index_together(data.train_data)
    dataset = open_dataset(data.train_data, split, labels=data.labels, **open_arguments(config))
    held_out: PairDataset | None = None
    selected = read_selection(Path(data.rows), dataset) if data.rows else None
    if data.val_fraction:
        dataset, held_out = _hold_out(dataset, data.val_fraction, data.val_seed)
        selected = None if selected is None else selected[dataset.indices]
    if selected is not None:
        dataset = selected_pairs(dataset, selected)
    if data.train_num_samples > len(dataset):
        raise ValueError(
            f"--train-num-samples: expected at most {len(dataset)}, the size of {dataset.name}, "
            f"got {data.train_num_samples}"
        )
    if data.train_num_samples:
        dataset = Subset(dataset, torch.arange(data.train_num_samples))
    class_rows = None
    if data.class_features:
        class_rows = open_class_rows(data.class_features, dataset)
        names = {name for labels in dataset.labels.values() for name in labels.names}
        if not data.val_data and not names & class_rows.names.keys():
            raise DataError(
                f"--class-features: expected rows of classes that the data has, got "
                f"{', '.join(list(class_rows.names)[:5])}; the data has "
                f"{', '.join(sorted(names)[:5]) or 'no classes: give --labels'}"
            )
    return RunData(dataset, held_out, class_rows)


def with_widths(config: TrainConfig, dataset: PairDataset) -> TrainConfig:
    """The settings with the columns of the stored features that the run trains on, if it does."""
    pairs = feature_pairs(dataset)
    if pairs is None:
        return config
    model = replace(
        config.model, image_width=pairs.images.shape[1], text_width=pairs.texts[0].shape[1]
    )
    return replace(config, model=model)


def _hold_out(dataset: PairDataset, fraction: float, seed: int) -> tuple[Subset, PairDataset]:
    """The pairs to train on and those to hold out; rows of the same picture stay together."""
    if dataset.facts.remote:
        raise DataError(
            f"--val-fraction: expected data on a disk, got the URL {dataset.name}, all of whose "
            "shards would be fetched before the first step; give one of the shards as --val-data"
        )
    pictures = dataset.picture_numbers()
    mask = heldout_pictures(pictures, fraction, seed)
    if mask.sum() < 2 or mask.all():
        raise DataError(
            f"--val-fraction: expected to hold out at least 2 of the {len(dataset):,} pairs of "
            f"{dataset.name} and to keep some, got {int(mask.sum())} with {fraction:g}; choose "
            "another share"
        )
    name = dataset.name
    held_out = Subset(dataset, np.flatnonzero(mask), f"{name}[held out]")
    training = Subset(dataset, np.flatnonzero(~mask), name)
    if feature_pairs(dataset):  # each is a picture with all of its captions
        return training, held_out
    return training, Pictures(held_out, pictures[mask])
