"""The rows to cluster: stored features, or features of pictures, which are encoded first."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from protoclip.cluster.folders import open_group_folder
from protoclip.common.files import DataError, lines_of, locked_folder, printable
from protoclip.common.strings import StringTable
from protoclip.data import PairDataset, Subset, data_kind, each_picture_once, open_dataset
from protoclip.data.feature_pairs import FeaturePairs
from protoclip.data.folders import ImageFolder
from protoclip.features import (
    SUFFIXES,
    FeatureRows,
    holds_features,
    is_feature_folder,
    open_features,
)
from protoclip.features.layout import IMAGES
from protoclip.features.rows import UnitRows
from protoclip.lloyd.points import on_disk
from protoclip.settings.config import TABLE

if TYPE_CHECKING:
    from protoclip.encode.encoders import Encoder

FEATURES = "features"  # the folder in --out that pictures are encoded into


@dataclass(frozen=True)
class Points:
    """Pictures or rows, and their features as soon as these are known."""

    source: PairDataset  # all pairs of DATA
    shown: tuple[str, ...]  # what the pairs have: images, captions or names
    of: str  # what the rows are, for the page
    weights: Tensor | None  # float64, of each pair
    stored: FeatureRows | None = None  # of the chosen pairs [N, D]; None: they must be encoded
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # pairs of DATA [N]
    left_out: Mapping[int, str] = field(default_factory=dict)  # the other pairs -> reason
    is_normalized: bool = False
    notes: Sequence[str] = ()  # sentences about the rows

    @functools.cached_property
    def dataset(self) -> PairDataset:
        """The pairs that are clustered."""
        is_whole = len(self.chosen) == len(self.source)
        return self.source if is_whole else Subset(self.source, self.chosen)

    @functools.cached_property
    def rows(self) -> FeatureRows:
        """What is clustered, [N, D]."""
        assert self.stored is not None
        return UnitRows(self.stored) if self.is_normalized else self.stored


def open_stored(args: argparse.Namespace) -> Points:
    """Stored features; those of pictures that a table names are read once for each key."""
    if args.run or args.model or args.pretrained or args.features:
        raise ValueError(
            "--run, --model, --pretrained, --features: expected pictures as DATA, got features "
            f"({args.data}); leave the flags out"
        )
    if args.side and not is_feature_folder(args.data):
        raise ValueError(
            f"--side: expected a folder of protoclip encode or clip-retrieval as DATA, got "
            f"{args.data}; leave the flag out"
        )
    rows = open_features(args.data, f"{args.side}s" if args.side else "")
    identity = rows.identity
    if args.captions:
        lines = read_captions(args.captions, len(rows), args.data)
        identity = identity.with_captions(StringTable(lines))
    if args.side == "text" or not Path(args.data).is_dir():
        identity = identity.separate()
    dataset = FeaturePairs(args.data, rows, identity=identity)
    open_group_folder(args, dataset)
    shown: tuple[str, ...] = ("captions",) if dataset.facts.has_captions else ("names",)
    return Points(
        dataset,
        shown=("images", "captions") if dataset.facts.has_pictures else shown,
        of=f"the rows of {short(args.data)}",
        weights=read_weights(args.weights, len(dataset)),
        stored=rows.select(identity.first_rows),
        chosen=np.arange(len(dataset)),
        is_normalized=args.normalize,
    )


def open_pictures(args: argparse.Namespace) -> Points:
    """Pictures, and the stored features of --features."""
    if args.captions or args.normalize or args.side:
        raise ValueError(
            "--captions, --normalize, --side: expected stored features as DATA (a folder of "
            f"protoclip encode, or {', '.join(SUFFIXES)}), got {args.data}"
        )
    if args.features and (args.run or args.model or args.pretrained):
        raise ValueError(
            "expected one source of features, got --features too; leave out --run, --model, "
            "--pretrained"
        )
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
    dataset = each_picture_once(dataset)
    points = Points(
        dataset,
        shown=("images",) if is_image_folder else ("images", "captions"),
        of="",
        weights=read_weights(args.weights, len(dataset)),
    )
    if not args.features:
        return points
    if not holds_features(args.features):
        raise ValueError(
            f"--features: expected a folder of protoclip encode, or a file "
            f"({', '.join(SUFFIXES)}), got {printable(args.features)}"
        )
    rows = open_features(args.features)
    return with_rows(points, rows, f"the rows of {short(args.features)}", args.features)


def with_rows(points: Points, rows: FeatureRows, of: str, spec: str) -> Points:
    """Find the row of each picture by its key; of several rows of one key, the first."""
    keys = points.source.keys
    places = rows.identity.find(keys)
    if (places >= 0).sum() < 2:
        raise ValueError(
            f"--features: expected features of at least 2 of these pictures, by key, got "
            f"{printable(spec)}"
        )
    missing = np.flatnonzero(places < 0).tolist()
    left_out = {i: f"{keys[i]}: no features in {spec}" for i in missing}
    chosen = np.flatnonzero(places >= 0)
    stored = rows.select(places[chosen])
    return replace(points, stored=stored, chosen=chosen, of=of, left_out=left_out)


def encode_pictures(points: Points, images: Encoder, args: argparse.Namespace, out: Path) -> Points:
    """Encode what ``out``/features does not have yet; one row for each picture."""
    from protoclip.encode.encoders import MODEL, WEIGHTS, batch_size_of
    from protoclip.encode.folder import OneText, Settings, encode_folder

    folder = out / FEATURES
    data = os.path.abspath(args.data) if os.path.exists(args.data) else args.data
    settings = Settings(
        out=folder,
        command=shlex.join(["protoclip", *sys.argv[1:]]),
        data=data,
        rows="a row for each picture",
        batch_size=batch_size_of(args),
        workers=args.workers,
        overwrite=args.overwrite,
    )
    with locked_folder(folder, "--out"):
        reasons = encode_folder(OneText(points.source), {IMAGES: images}, settings)
    if len(points.source) - len(reasons) < 2:
        raise DataError(next(iter(reasons.values()), "DATA: expected at least 2 pictures, got 1"))
    weights = short(args.pretrained or args.model or WEIGHTS)
    model = short(args.run) if args.run else f"{short(args.model or MODEL)} ({weights})"
    of = f"the pictures' features (model: {model})"
    encoded = with_rows(points, open_features(folder), of, str(folder))
    keys = enumerate(points.source.keys)
    return replace(encoded, left_out={i: reasons[key] for i, key in keys if key in reasons})


def finite_points(points: Points) -> Points:
    """The points without rows with NaN or infinity, which are left out as unreadable pictures are.
    Reads all rows."""
    assert points.stored is not None
    bad = points.stored.not_finite()
    left_out = dict(points.left_out)
    for i in points.chosen[bad].tolist():
        left_out[i] = f"{points.source.keys[i]}: its features hold NaN or infinity"
    finite = np.delete(np.arange(len(points.stored)), bad)
    stored = points.stored.select(finite)
    chosen = points.chosen[finite]
    weights = None if points.weights is None else points.weights[torch.from_numpy(chosen)]
    notes = []
    blocks = blocks_of(stored) if points.is_normalized else ()
    if zeros := sum(int((~block.any(dim=1)).sum()) for _, block in blocks):
        have = "row of zeros has" if zeros == 1 else "rows of zeros have"
        notes.append(f"{zeros:,} {have} no direction; --normalize does not change such rows.")
    return replace(
        points, stored=stored, chosen=chosen, weights=weights, left_out=left_out, notes=notes
    )


def blocks_of(rows: FeatureRows) -> Iterator[tuple[slice, Tensor]]:
    """The rows in order, as fp32 or fp64, block by block: their positions and the block, which is
    valid until the next one."""
    start = 0
    for block in on_disk(rows, torch.device("cpu")).blocks():
        yield slice(start, start + len(block)), block
        start += len(block)


def squared_distances(rows: FeatureRows, labels: Tensor, centroids: Tensor) -> Tensor:
    """The squared distance of each row to the centroid of its label, [N] on the CPU."""
    distances = [
        (block.to(centroids.device) - centroids[labels[part]]).square().sum(1).cpu()
        for part, block in blocks_of(rows)
    ]
    return torch.cat(distances)


def read_captions(path: str, count: int, data: str) -> list[str]:
    """The text of each of ``count`` rows of ``data``, a line of a file each."""
    try:
        lines = lines_of(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--captions: expected a text file in UTF-8, got {error}") from error
    if len(lines) != count:
        raise ValueError(
            f"--captions: expected one for each of the {count:,} rows of {data}, got {len(lines):,}"
        )
    return lines


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
