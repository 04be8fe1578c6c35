"""The rows to cluster: features of pictures, by a model or from a file, or any rows of a file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip.cluster.encoded import (
    FEATURES,
    EncodedPictures,
    encode_rest,
    read_kept,
    remove_parts,
)
from protoclip.cluster.folders import open_group_folder
from protoclip.cluster.output import write_files
from protoclip.common.files import lines_of, plural, printable_lines, state_of
from protoclip.data import (
    DataError,
    PairDataset,
    Pictures,
    Subset,
    data_kind,
    open_dataset,
)
from protoclip.data.folders import ImageFolder
from protoclip.episodes.teacher import SUFFIXES, read_rows
from protoclip.evaluate.load import Loaded, load_model, open_encoder
from protoclip.model import choose_device
from protoclip.settings.config import TABLE

# OpenCLIP's own example.
MODEL = "ViT-B-32"
WEIGHTS = "laion2b_s34b_b79k"
NAMED = 10  # pictures that were left out, in the terminal; left_out.csv has all
CPU_BATCH = 32  # pictures encoded at once; as fast as more, and a signal is soon answered
GPU_BATCH = 256


class FeatureRows(PairDataset):
    """Rows of a file of features, as a data set without pictures."""

    def __init__(self, name: str, keys: Sequence[str], captions: Sequence[str]) -> None:
        self.name = name
        self.keys = keys
        self._captions = captions or keys

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        """The row's text, or its key."""
        return (self._captions[i],)

    def image(self, i: int) -> Any:
        raise DataError(f"{self.name}: features have no pictures")


@dataclass(frozen=True)
class Points:
    """The rows to cluster, and what they stand for."""

    dataset: PairDataset  # of length N
    rows: Tensor  # [N, D]
    of: str  # what the rows are, for the page
    shown: tuple[str, ...]  # what the dataset has: images, captions or names
    weights: Tensor | None  # float64 [N]
    left_out: Mapping[str, str]  # key -> reason


@dataclass(frozen=True)
class PictureSource:
    """Pictures, and the model that encodes them, or the file that has their features."""

    dataset: PairDataset  # each picture once
    shown: tuple[str, ...]
    weights: Tensor | None  # float64, of all pictures
    model: Loaded | None  # None: the features are in a file


def open_pictures(args: argparse.Namespace) -> PictureSource:
    """The pictures and the model that the command line names; writes nothing."""
    if args.captions or args.normalize:
        expected = f"expected a file of features ({', '.join(SUFFIXES)})"
        raise ValueError(f"--captions, --normalize: {expected}, got {args.data}")
    sources = {
        "--run": args.run,
        "--model, --pretrained": args.model + args.pretrained,
        "--features": args.features,
    }
    source_flags = [flag for flag, value in sources.items() if value]
    if len(source_flags) > 1:
        # Features are of pictures that were encoded already, and a run has its own model.
        chosen = "--features" if args.features else "--run"
        extra = " and ".join(flag for flag in source_flags if flag != chosen)
        raise ValueError(f"expected one source of features, got {chosen} too; leave out {extra}")
    source_type = data_kind(args.data)
    is_image_folder = source_type == "folder"
    if not source_type:
        raise ValueError(
            "DATA: expected a folder of pictures, a .csv or .tsv, shards, .parquet files, "
            f"builtin:NAME or features ({', '.join(SUFFIXES)}), got {args.data}"
        )
    dataset: PairDataset
    if is_image_folder:
        dataset = ImageFolder(Path(args.data))
    else:
        options = {name: value for name, value in vars(args).items() if name in TABLE}
        dataset = open_dataset(args.data, **options)
    for line in dataset.facts.left_out:
        print(line, file=sys.stderr)
    open_group_folder(args, dataset)
    numbers = dataset.picture_numbers()
    if len(np.unique(numbers)) < len(dataset):  # a table with a row for each caption
        dataset = Pictures(dataset, numbers)
    return PictureSource(
        dataset=dataset,
        shown=("images",) if is_image_folder else ("images", "captions"),
        weights=read_weights(args.weights, len(dataset)),
        model=None if args.features else load_encoder(args),
    )


def load_encoder(args: argparse.Namespace) -> Loaded:
    """The model of --run, or of --model and --pretrained."""
    name = args.run or args.model or MODEL
    pretrained = args.pretrained
    if name == MODEL and not pretrained:
        pretrained = WEIGHTS
    try:
        return load_model(name, pretrained)
    except ValueError as error:
        if args.run or args.model or args.pretrained:
            raise
        raise ValueError(
            f"the weights {WEIGHTS} of {MODEL} cannot be downloaded here; without a download, "
            "protoclip cluster features.npy groups features of your own, and --run logs/NAME "
            "encodes the pictures with a run of protoclip train (--model NAME --pretrained FILE: "
            "with a weights file)"
        ) from error


def points_of_pictures(source: PictureSource, args: argparse.Namespace, out: Path) -> Points:
    """The features of the pictures that have some; those that a model makes are kept in ``out``."""
    dataset = source.dataset
    if source.model is None:
        encoded = read_features_of(dataset, Path(args.features))
        of = f"the rows of {short(args.features)}"
    else:
        encoded = encode_pictures(dataset, source.model, args, out)
        model_name = f"{short(source.model.name)} ({short(source.model.pretrained)})"
        of = f"the pictures' features (model: {short(args.run) if args.run else model_name})"
    positions = [i for i, key in enumerate(dataset.keys) if key in encoded.rows]
    say_left_out(encoded.reasons, len(dataset))
    return Points(
        dataset=dataset if len(positions) == len(dataset) else Subset(dataset, positions),
        rows=as_rows(np.stack([encoded.rows[dataset.keys[i]] for i in positions])),
        of=of,
        shown=source.shown,
        weights=None if source.weights is None else source.weights[positions],
        left_out=encoded.reasons,
    )


def encode_pictures(
    dataset: PairDataset, model: Loaded, args: argparse.Namespace, out: Path
) -> EncodedPictures:
    """Encode the pictures that an earlier run into ``out`` has not, and write features.npz."""
    made_by = [model.name, model.pretrained, args.precision]
    made_by += [str(state_of(file)) for file in made_by[:2] if os.path.isfile(file)]
    data = os.path.abspath(args.data) if os.path.exists(args.data) else args.data
    source = f"{' '.join(made_by)} of {data}"
    kept = read_kept(out, source, args.overwrite)
    if not args.batch_size:
        is_cpu = choose_device(args.device).type == "cpu"
        args.batch_size = CPU_BATCH if is_cpu else GPU_BATCH
    with open_encoder(model.model, args, "encoding") as encoder:
        encode_rest(dataset, encoder, kept, out, source)
    encoded = kept.of(dataset.keys)
    if len(encoded.rows) < 2:
        reasons = list(encoded.reasons.values())
        raise DataError(reasons[0] if reasons else "DATA: expected at least 2 pictures, got 1")
    with write_files(out) as temporary:
        encoded.write(temporary / FEATURES, source)
    remove_parts(out)
    return encoded


def say_left_out(left_out: Mapping[str, str], count: int) -> None:
    """Name the first of ``count`` pictures that were left out."""
    if not left_out:
        return
    reasons = list(left_out.values())
    lines = [f"left out {len(reasons):,} of {plural(count, 'picture')}:", *reasons[:NAMED]]
    if (more := len(reasons) - NAMED) > 0:
        lines.append(f"and {more:,} more; left_out.csv lists them all")
    print(printable_lines("\n  ".join(lines)), file=sys.stderr)


def read_features_of(dataset: PairDataset, path: Path) -> EncodedPictures:
    """The features that a file has of the pictures."""
    array, keys = read_rows(path, "--features")
    rows = dict(zip(keys or (), array, strict=False))
    rows_of_pictures = {key: rows[key] for key in dataset.keys if key in rows}
    if len(rows_of_pictures) < 2 or len(rows) != len(array):
        raise ValueError(f"--features: expected {FEATURES} of these pictures, got {path}")
    missing = [key for key in dataset.keys if key not in rows]
    reasons = {key: f"{key}: no features in {path}" for key in missing}
    return EncodedPictures(rows_of_pictures, reasons)


def as_rows(array: np.ndarray) -> Tensor:
    """Features as fp32, or as fp64 where fp32 may not hold all of their digits."""
    dtype = np.float32 if np.can_cast(array.dtype, np.float32) else np.float64
    return torch.from_numpy(array.astype(dtype, copy=False))


def read_features(args: argparse.Namespace) -> Points:
    """The rows of a features file."""
    if args.run or args.model or args.pretrained or args.features:
        raise ValueError(
            "--run, --model, --pretrained, --features: expected pictures as DATA, got features "
            f"({args.data}); leave the flags out"
        )
    if not Path(args.data).is_file():
        raise ValueError(f"DATA: expected a file of features, found no file {args.data}")
    array, keys = read_rows(Path(args.data), "DATA")
    captions: list[str] = []
    if args.captions:
        try:
            captions = lines_of(Path(args.captions).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--captions: expected a text file in UTF-8, got {error}") from error
    for name, texts in (("captions", captions), ("keys", keys or ())):
        if texts and len(texts) != len(array):
            raise ValueError(
                f"--{name}: expected one for each of the {len(array):,} rows of {args.data}, got "
                f"{len(texts):,}"
            )
    rows = as_rows(array)
    if args.normalize:
        rows = F.normalize(rows, dim=1)
    keys = keys or [str(i) for i in range(len(rows))]
    dataset = FeatureRows(args.data, keys, captions)
    open_group_folder(args, dataset)
    return Points(
        dataset=dataset,
        rows=rows,
        of=f"the rows of {short(args.data)}",
        shown=("captions",) if captions else ("names",),
        weights=read_weights(args.weights, len(rows)),
        left_out={},
    )


def read_weights(path: str, n: int) -> Tensor | None:
    """The weights of n pictures or rows, unreadable ones included, from one number per line."""
    if not path:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
        weights = torch.tensor([float(line) for line in lines], dtype=torch.float64)
    except (OSError, ValueError) as error:
        raise ValueError(f"--weights: expected one number a line in {path}, got {error}") from error
    if len(weights) != n:
        expected = f"a number for each of the {n:,} pictures or rows"
        raise ValueError(f"--weights: expected {expected} in {path}, got {len(weights):,}")
    if not bool((weights >= 0).all() and weights.isfinite().all() and weights.any()):
        raise ValueError(f"--weights: expected numbers from 0 on, not all 0, in {path}")
    return weights


def short(path: str) -> str:
    """The last part of a path: the command on the page has the whole."""
    return Path(path).name or path
