"""The rows to cluster: stored features, or features of pictures, which are encoded first."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.cluster.folders import open_group_folder
from protoclip.cluster.groups import BLOCK
from protoclip.common.files import (
    DataError,
    lines_of,
    locked_folder,
    printable,
    read_file,
)
from protoclip.common.strings import StringTable
from protoclip.data import PairDataset, Subset, data_kind, each_picture_once, open_dataset
from protoclip.data.folders import ImageFolder
from protoclip.data.images import decode, no_picture
from protoclip.features import (
    SUFFIXES,
    FeatureRows,
    FeatureTable,
    holds_features,
    is_feature_folder,
    open_features,
    open_folder,
)
from protoclip.features.rows import UnitRows
from protoclip.features.table import CAPTION, FILE
from protoclip.settings.config import TABLE

if TYPE_CHECKING:
    from protoclip.encode.encoders import ImageEncoder

IN_MEMORY_BYTES = 256 << 20  # of rows that are loaded; k-means reads more from disk
FEATURES = "features"  # the folder in --out that pictures are encoded into


@dataclass(frozen=True)
class Points:
    """The rows to cluster, and what they are of."""

    dataset: PairDataset  # of length N
    rows: Tensor | FeatureRows  # [N, D]; in memory float32 or float64
    stored_dtype: np.dtype
    of: str  # what the rows are, for the page
    shown: tuple[str, ...]  # what the dataset has: images, captions or names
    weights: Tensor | None  # float64 [N]
    left_out: Mapping[str, str]  # key -> reason
    notes: Sequence[str] = ()  # sentences about the rows


@dataclass(frozen=True)
class Source:
    """Pictures or rows, and where their features are."""

    dataset: PairDataset
    shown: tuple[str, ...]
    of: str
    weights: Tensor | None  # float64, of each pair of the data set
    rows: FeatureRows | None = None  # None: the pictures must be encoded
    places: np.ndarray | None = None  # row of each pair, int64; -1: it has none
    left_out: Mapping[str, str] = field(default_factory=dict)


class StoredPictures(PairDataset):
    """What stored rows are of: keys, and captions and pictures where a table has them."""

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        captions: Sequence[Sequence[str]],
        files: Sequence[str],
    ) -> None:
        self.name = name
        self.keys = keys
        self._captions = captions  # of each row; empty if there are none
        self._files = files  # of each row; empty if there are none

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        """The row's texts, or its key."""
        texts = tuple(text for text in self._captions[i] if text) if self._captions else ()
        return texts or (self.keys[i],)

    def path(self, i: int) -> str:
        return self._files[i] if self._files else ""

    def image(self, i: int) -> Image.Image:
        path = self.path(i)
        if not path:
            raise DataError(f"{self.name}: features have no pictures")
        try:
            return decode(read_file(path), printable(path))
        except OSError as error:
            raise DataError(f"{printable(path)}: {error.strerror}; restore the file") from error


def open_source(args: argparse.Namespace) -> Source:
    """What the command line names; writes nothing but an empty --link-to."""
    return open_stored(args) if holds_features(args.data) else open_pictures(args)


def open_stored(args: argparse.Namespace) -> Source:
    """Stored features; those of pictures that a table names are read once for each key."""
    if args.run or args.model or args.pretrained or args.features:
        raise ValueError(
            "--run, --model, --pretrained, --features: expected pictures as DATA, got features "
            f"({args.data}); leave the flags out"
        )
    rows, table = open_rows(args.data, args.side)
    keys = StringTable(map(str, range(len(rows)))) if rows.keys is None else rows.keys
    numbers = np.arange(len(rows))  # of each row's picture
    if table is not None and args.side != "text":
        numbers = keys.numbers()
    first_rows = np.unique(numbers, return_index=True)[1]
    captions: Sequence[Sequence[str]] = ()
    if args.captions:
        lines = read_captions(args.captions, len(rows), args.data)
        captions = [(lines[row],) for row in first_rows.tolist()]
    elif table is not None:
        captions = captions_of(table, numbers)
    files = picture_files(table, first_rows)
    dataset = StoredPictures(args.data, keys.take(first_rows), captions, files)
    open_group_folder(args, dataset)
    return Source(
        dataset,
        shown=("images", "captions") if files else ("captions",) if captions else ("names",),
        of=f"the rows of {short(args.data)}",
        weights=read_weights(args.weights, len(dataset)),
        rows=rows,
        places=first_rows,
    )


def open_rows(spec: str, side: str = "") -> tuple[FeatureRows, FeatureTable | None]:
    """Stored rows and their table, if they have one; ``side``: of --side."""
    path = Path(spec)
    if is_feature_folder(path):
        folder = open_folder(path)
        return open_features(path, f"{side}s" if side else ""), folder.table
    if side:
        raise ValueError(
            f"--side: expected a folder of protoclip encode or clip-retrieval as DATA, got {spec}; "
            "leave the flag out"
        )
    table = open_folder(path.parent).table if is_feature_folder(path.parent) else None
    return open_features(spec), table if path.is_dir() else None


def captions_of(table: FeatureTable, numbers: np.ndarray) -> Sequence[Sequence[str]]:
    """The captions of each picture, whose number each row has, int64 [rows]."""
    column = table.column(CAPTION)
    if column is None:
        return ()
    texts = list(column.take(np.argsort(numbers, kind="stable")))
    ends = np.bincount(numbers).cumsum().tolist()
    return [texts[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def picture_files(table: FeatureTable | None, rows: np.ndarray) -> Sequence[str]:
    """The file of each row's picture; empty unless the table names pictures that are there."""
    column = None if table is None else table.column(FILE)
    if column is None or not len(rows):
        return ()
    return column.take(rows) if is_picture(column[int(rows[0])]) else ()


def is_picture(path: str) -> bool:
    """Whether a file is there and holds one picture."""
    return os.path.isfile(path) and not no_picture(path)


def open_pictures(args: argparse.Namespace) -> Source:
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
    source = Source(
        dataset,
        shown=("images",) if is_image_folder else ("images", "captions"),
        of="",
        weights=read_weights(args.weights, len(dataset)),
    )
    if not args.features:
        return source
    if not holds_features(args.features):
        raise ValueError(
            f"--features: expected a folder of protoclip encode, or a file "
            f"({', '.join(SUFFIXES)}), got {printable(args.features)}"
        )
    rows, _ = open_rows(args.features)
    return with_rows(source, rows, f"the rows of {short(args.features)}", args.features)


def with_rows(source: Source, rows: FeatureRows, of: str, spec: str) -> Source:
    """Find the row of each picture by its key; of several rows of one key, the first."""
    row_of: dict[str, int] = {}
    for row, key in enumerate(rows.keys or ()):
        row_of.setdefault(key, row)
    keys = source.dataset.keys
    places = np.array([row_of.get(key, -1) for key in keys], np.int64)
    if (places >= 0).sum() < 2:
        raise ValueError(
            f"--features: expected features of at least 2 of these pictures, by key, got "
            f"{printable(spec)}"
        )
    missing = [keys[i] for i in np.flatnonzero(places < 0).tolist()]
    left_out = {key: f"{key}: no features in {spec}" for key in missing}
    return Source(source.dataset, source.shown, of, source.weights, rows, places, left_out)


def encode_pictures(
    source: Source, images: ImageEncoder, args: argparse.Namespace, out: Path
) -> Source:
    """Encode what ``out``/features does not have yet; one row for each picture."""
    from protoclip.encode.encoders import MODEL, WEIGHTS, Encoders, batch_size_of
    from protoclip.encode.folder import Settings, encode_folder
    from protoclip.encode.pairs import OneText

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
        reasons = encode_folder(OneText(source.dataset), Encoders(images, None), settings)
    if len(source.dataset) - len(reasons) < 2:
        raise DataError(next(iter(reasons.values()), "DATA: expected at least 2 pictures, got 1"))
    weights = short(args.pretrained or args.model or WEIGHTS)
    model = short(args.run) if args.run else f"{short(args.model or MODEL)} ({weights})"
    of = f"the pictures' features (model: {model})"
    rows = open_features(folder)
    encoded = with_rows(source, rows, of, str(folder))
    return Source(
        encoded.dataset, encoded.shown, of, encoded.weights, rows, encoded.places, reasons
    )


def read_points(source: Source, args: argparse.Namespace) -> Points:
    """The rows of a source. Those with NaN or infinity are left out, as unreadable pictures are."""
    assert source.rows is not None and source.places is not None
    chosen = np.flatnonzero(source.places >= 0)
    rows = source.rows
    if not np.array_equal(source.places[chosen], np.arange(len(rows))):
        rows = rows.select(source.places[chosen])
    left_out = dict(source.left_out)
    if len(bad := rows.not_finite()):
        for i in chosen[bad].tolist():
            key = source.dataset.keys[i]
            left_out[key] = f"{key}: its features hold NaN or infinity"
        finite = np.setdiff1d(np.arange(len(rows)), bad)
        rows = rows.select(finite)
        chosen = chosen[finite]
    stored_dtype = rows.dtype
    notes = []
    if args.normalize:
        if zeros := sum(int((~block.any(dim=1)).sum()) for block in blocks_of(rows)):
            have = "row of zeros has" if zeros == 1 else "rows of zeros have"
            notes.append(f"{zeros:,} {have} no direction; --normalize does not change such rows.")
        rows = UnitRows(rows)
    is_whole = len(chosen) == len(source.dataset)
    return Points(
        dataset=source.dataset if is_whole else Subset(source.dataset, chosen),
        rows=load(rows) if 4 * rows.shape[0] * rows.shape[1] <= IN_MEMORY_BYTES else rows,
        stored_dtype=stored_dtype,
        of=source.of,
        shown=source.shown,
        weights=None if source.weights is None else source.weights[torch.from_numpy(chosen)],
        left_out=left_out,
        notes=notes,
    )


def load(rows: FeatureRows) -> Tensor:
    """Rows as fp32, or as fp64 where fp32 may not hold all of their digits."""
    return torch.cat([torch.empty(0, rows.shape[1], dtype=float_dtype(rows)), *blocks_of(rows)])


def float_dtype(rows: Tensor | FeatureRows) -> torch.dtype:
    """fp32, or fp64 where fp32 may not hold all digits of the rows."""
    if isinstance(rows, Tensor):
        return rows.dtype
    return torch.float32 if np.can_cast(rows.dtype, np.float32) else torch.float64


def blocks_of(rows: Tensor | FeatureRows) -> Iterator[Tensor]:
    """The rows in order, ``BLOCK`` of them at once, as fp32 or fp64."""
    dtype = float_dtype(rows)
    for start in range(0, len(rows), BLOCK):
        stop = min(len(rows), start + BLOCK)
        if isinstance(rows, Tensor):
            yield rows[start:stop]
        else:
            yield torch.from_numpy(rows.rows(start, stop)).to(dtype)


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
