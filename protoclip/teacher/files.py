"""Files of teacher features, with the samples' keys, so that no order can slip."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from protoclip.data import PairDataset

SUFFIXES = (".npy", ".npz", ".safetensors")


def read_features(path: Path, dataset: PairDataset) -> Tensor:
    """float32 [dataset, d] from a file; rows by key where the file has keys.

    Raises:
        ValueError: no such file, not readable, or not of this dataset.
    """
    if not path.is_file():
        raise ValueError(f"--external-teacher: found no file at {path}")
    try:
        array, keys = _arrays(path)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(
            f"--external-teacher: {path} cannot be read ({error}); is the file whole?"
        ) from error
    if array.ndim != 2:
        raise ValueError(f"--external-teacher: expected [N, d] in {path}, got {list(array.shape)}")
    if keys is not None:
        array = array[_rows_of(keys, array, dataset, path)]
    elif len(array) != len(dataset):
        raise ValueError(
            f"--external-teacher: expected [{len(dataset)}, d], one row per sample of "
            f"{dataset.name}, got {list(array.shape)} in {path}; compute it from the same data "
            "(python -m protoclip.teacher writes keys, which need no order)"
        )
    return torch.from_numpy(array.astype(np.float32))


def _arrays(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Features, and keys where the file has them; no code of the file runs."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False), None
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            keys = [str(key) for key in file["keys"]] if "keys" in file.files else None
            return _the_one({name: file[name] for name in file.files if name != "keys"}), keys
    return _the_one({name: rows.float().numpy() for name, rows in load_file(path).items()}), None


def _the_one(arrays: dict[str, np.ndarray]) -> np.ndarray:
    if "features" in arrays:
        return arrays["features"]
    if len(arrays) != 1:
        raise ValueError(f"expected one array, or one named 'features', got {sorted(arrays)}")
    return next(iter(arrays.values()))


def _rows_of(
    keys: Sequence[str], array: np.ndarray, dataset: PairDataset, path: Path
) -> np.ndarray:
    """Row of each sample, int64 [dataset]."""
    if len(keys) != len(array):
        raise ValueError(
            f"--external-teacher: expected a key for each row in {path}, got {len(keys)} keys for "
            f"{len(array)} rows"
        )
    place = {key: row for row, key in enumerate(keys)}
    if len(place) != len(keys):
        raise ValueError(f"--external-teacher: {path} has keys that occur twice; compute it again")
    missing = [key for key in dataset.keys if key not in place]
    if missing:
        raise ValueError(
            f"--external-teacher: the keys of {path} are not the dataset's: {len(missing)} of "
            f"{len(dataset)} samples of {dataset.name} have no row, first {missing[0]!r}; compute "
            "it from the same data"
        )
    return np.array([place[key] for key in dataset.keys], dtype=np.int64)


def write_features(path: Path, features: np.ndarray, keys: Sequence[str]) -> None:
    """Write a .npz of ``features`` [N, d] and ``keys``, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, features=features, keys=np.array(list(keys)))
    os.replace(temporary, path)
