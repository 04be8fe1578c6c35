"""Encoding a data set into a folder of features, part by part.

What an earlier run has encoded is found by the picture's key and the state of the file that holds
it, and by the caption's text; everything else is encoded. Batches never cross parts, so that the
rows do not depend on where a run was stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.files import (
    DataError,
    UnavailableError,
    is_remote,
    path_in_table,
    plural,
    printable,
    say_left_out,
    state_of,
    state_of_url,
    write_csv,
)
from protoclip.common.signals import StopSignals, become_worker, stop_if_asked
from protoclip.common.waits import Wait
from protoclip.data import PairDataset
from protoclip.data.loader import AHEAD
from protoclip.distributed import from_main, gather_objects, is_main, rank, world_size
from protoclip.encode.encoders import Encoders, ImageEncoder, TextEncoder
from protoclip.features import writer
from protoclip.features.layout import IMAGES, TABLES, TEXTS, read_record
from protoclip.features.parts import open_part
from protoclip.features.table import CAPTION, FILE, KEY, LABEL, STATE, read_csv
from protoclip.features.writer import REASONS, Columns, Kept, PartFolder, Sides, State

LEFT_OUT = "left_out.csv"
PIECE_SECONDS = 30.0  # between two pieces: what a killed run loses
TEXT_BATCHES = 32  # without pictures, so many batches of texts go to the encoder at once


@dataclass(frozen=True)
class Settings:
    """How a folder is encoded."""

    out: Path
    command: str  # that continues it
    data: str  # what is encoded, for the record
    rows: str = "a row for each caption"
    dtype: str = "float16"
    batch_size: int = 32
    workers: int = 0
    overwrite: bool = False


def encode_folder(dataset: PairDataset, encoders: Encoders, settings: Settings) -> dict[str, str]:
    """Encode the pictures and captions of a data set; returns why pictures were left out, by key.

    The caller holds the folder's lock. Under torchrun ranks share the parts.

    Raises:
        Stopped: a signal asked for it; the same call continues.
        ValueError: the folder holds something else, or no picture can be read.
    """
    job = _Job(dataset, encoders, settings)
    own = from_main(job.prepare)[rank() :: world_size()]
    kept = Kept(settings.out)
    gather_objects(None)  # nobody adds a piece before all have read them
    total = sum(len(job.pairs_of(part)) for part in own)
    with StopSignals() as signals, Wait("encoding", total, "pictures") as wait:
        for part in own:
            for count in _Part(job, part, kept).encode(signals):
                wait.update(count)
                words = f"after {wait.done:,} of {plural(total, 'picture')}"
                stop_if_asked(signals, f"{words}; the same command continues")
    all_left_out = gather_objects(job.left_out)  # all parts are written
    left_out = {i: why for of_rank in all_left_out for i, why in of_rank.items()}
    reasons = from_main(lambda: job.finish(dict(sorted(left_out.items()))))
    if is_main():
        say_left_out(list(reasons.values()), len(dataset))
    return reasons


class LeftOut(NamedTuple):
    """Why a pair has no row."""

    reason: str
    is_lasting: bool = True  # as long as the file stays as it is; not where the system refused it

    @classmethod
    def because(cls, error: DataError) -> LeftOut:
        return cls(str(error), not isinstance(error, UnavailableError))


class _Job:
    """One run of ``encode_folder``, on one rank."""

    def __init__(self, dataset: PairDataset, encoders: Encoders, settings: Settings) -> None:
        self.dataset = dataset
        self.encoders = encoders
        self.settings = settings
        self.made_by = {  # what the rows depend on, next to the pictures and captions
            "data": settings.data,
            "rows": settings.rows,
            "images": encoders.images.name if encoders.images else "",
            "texts": encoders.texts.name if encoders.texts else "",
            "dtype": settings.dtype,
        }
        self.sides: dict[str, ImageEncoder | TextEncoder] = {}
        if encoders.images:
            self.sides[IMAGES] = encoders.images
        if encoders.texts:
            self.sides[TEXTS] = encoders.texts
        self.pictures: list[State] = list(zip(dataset.keys, states_of(dataset), strict=True))
        self.folder = PartFolder(settings.out, -(-len(dataset) // writer.PAIRS_IN_PART))
        self.class_names = {
            f"{LABEL}{name}": [*labels.names, ""] for name, labels in dataset.labels.items()
        }
        self.left_out: dict[int, LeftOut] = {}  # position -> why, of what this rank has looked at

    def prepare(self) -> list[str]:
        """Check the folder and return the parts to encode. Parts that are no longer valid become
        pieces."""
        out = self.settings.out
        shown = printable(str(out))
        record = read_record(out)
        if not record and any((out / kind).exists() for kind in (IMAGES, TEXTS, TABLES)):
            raise ValueError(
                f"--out: {shown} holds features that protoclip encode did not write there; choose "
                "a new folder"
            )
        if record and record.get("made_by") != self.made_by:
            if not self.settings.overwrite:
                raise ValueError(
                    f"--out: {shown} holds {_words(record.get('made_by'))}, expected "
                    f"{_words(self.made_by)}; choose another folder, or replace them with "
                    "--overwrite"
                )
            self.folder.write_record(record | {"finished": False})
            self.folder.remove_all()
            record = {}
        self.folder.write_record(
            {
                "made_by": self.made_by,
                "finished": False,
                "command": self.settings.command,
                REASONS: record.get(REASONS, []),
            }
        )
        reasons = Kept(out).reasons
        for part in self.folder.parts_on_disk():
            if part not in self.folder.parts or not self._is_valid(part, reasons):
                self.folder.set_aside(part)
        return [part for part in self.folder.parts if not self.folder.file(TABLES, part).exists()]

    def pairs_of(self, part: str) -> range:
        start = int(part) * writer.PAIRS_IN_PART
        return range(start, min(len(self.dataset), start + writer.PAIRS_IN_PART))

    def _is_valid(self, part: str, reasons: Mapping[State, str]) -> bool:
        """Whether a part on disk is of the data as it is now. Of pictures that it lacks, those that
        the system refused are tried again."""
        table = self.folder.file(TABLES, part)
        left_out: dict[int, LeftOut] = {}
        try:
            keys = read_csv(table, KEY)
            counts = {open_part(self.folder.file(side, part)).shape[0] for side in self.sides}
            if counts != {len(keys)}:
                return False
            has_rows = set(keys)
            for i in self.pairs_of(part):
                key, state = self.pictures[i]
                if reason := reasons.get((key, state)):
                    left_out[i] = LeftOut(reason)
                elif key not in has_rows:
                    try:
                        if IMAGES in self.sides:
                            self.dataset.image(i)
                        self.dataset.captions(i)
                    except UnavailableError as error:
                        left_out[i] = LeftOut.because(error)
                    else:
                        return False
            pairs = [i for i in self.pairs_of(part) if i not in left_out]
            if not all(self.pictures[i][1] for i in pairs):  # without a state it is encoded again
                return False
            expected = self.columns([(i, text) for i in pairs for text in self.dataset.captions(i)])
            is_valid = all(list(read_csv(table, name)) == cells for name, cells in expected.items())
        except (OSError, ValueError):  # damaged, or without such a column
            return False
        if is_valid:
            self.left_out |= left_out
        return is_valid

    def columns(self, rows: Sequence[tuple[int, str]]) -> dict[str, Sequence[str]]:
        """The table of rows, each of a pair and one of its captions."""
        columns: dict[str, Sequence[str]] = {
            KEY: [self.pictures[i][0] for i, _ in rows],
            FILE: [_absolute(self.dataset.container(i)) for i, _ in rows],
            STATE: [self.pictures[i][1] for i, _ in rows],
            CAPTION: [text for _, text in rows],
        }
        for column, names in self.class_names.items():
            ids = self.dataset.labels[column.removeprefix(LABEL)].ids
            columns[column] = [names[int(ids[i])] for i, _ in rows]
        return columns

    def lasting(self, left_out: Mapping[int, LeftOut]) -> list[tuple[str, str, str]]:
        """Key, state and reason of the pictures that the folder remembers."""
        return [(*self.pictures[i], why.reason) for i, why in left_out.items() if why.is_lasting]

    def finish(self, left_out: Mapping[int, LeftOut]) -> dict[str, str]:
        """Write left_out.csv, say in the record that the folder is finished, remove the pieces."""
        out = self.settings.out
        if not all(self.folder.file(TABLES, part).exists() for part in self.folder.parts):
            raise DataError(
                f"--out: {printable(str(out))}: the parts of other ranks are not here; choose a "
                "folder that all machines share"
            )
        if len(left_out) == len(self.dataset):
            raise DataError(next(iter(left_out.values())).reason)
        reasons = {self.dataset.keys[i]: why.reason for i, why in left_out.items()}
        table = [(path_in_table(key), reason) for key, reason in reasons.items()]
        write_csv(out / LEFT_OUT, ("file", "reason"), table)
        record = {REASONS: self.lasting(left_out), "finished": True}
        self.folder.write_record(read_record(out) | record)
        shutil.rmtree(out / writer.UNFINISHED, ignore_errors=True)
        return reasons

    def stored(self, rows: Tensor) -> np.ndarray:
        """Rows in the dtype of the folder."""
        values = rows.numpy()
        dtype = np.dtype(self.settings.dtype)
        with np.errstate(over="ignore"):
            stored = values.astype(dtype)
        if (np.isfinite(values) & ~np.isfinite(stored)).any():
            largest = np.abs(values[np.isfinite(values)]).max()
            raise ValueError(
                f"--dtype: expected features of at most {np.finfo(dtype).max:,.0f} for {dtype}, "
                f"got {largest:,.0f}; use --dtype fp32"
            )
        return stored


class _Part:
    """The encoding of one part. Pairs are positions in the data set."""

    def __init__(self, job: _Job, part: str, kept: Kept) -> None:
        self.job = job
        self.part = part
        self.pairs = job.pairs_of(part)
        self.left_out: dict[int, LeftOut] = {}
        self.captions: dict[int, tuple[str, ...]] = {}
        for i in self.pairs:
            try:
                if reason := kept.reasons.get(job.pictures[i]):
                    self.left_out[i] = LeftOut(reason)
                else:
                    self.captions[i] = job.dataset.captions(i)
            except DataError as error:
                self.left_out[i] = LeftOut.because(error)
        # The rows [D] that are known, by picture and by caption.
        self.known: dict[str, dict[Any, np.ndarray]] = {
            side: kept.rows(side, (name for i in self.captions for name in self._names(side, i)))
            for side in job.sides
        }

    def _names(self, side: str, i: int) -> Sequence[Any]:
        """What a pair's rows are known by."""
        return [self.job.pictures[i]] if side == IMAGES else self.captions[i]

    def _lacks(self, side: str, i: int) -> bool:
        return any(name not in self.known[side] for name in self._names(side, i))

    def encode(self, signals: StopSignals) -> Iterator[int]:
        """Encode what is missing, and write the part; yields how many more pairs are done. After a
        signal all of them are in a piece."""
        job = self.job
        size = job.settings.batch_size * (1 if IMAGES in job.sides else TEXT_BATCHES)
        rest = [i for i in self.captions if any(self._lacks(side, i) for side in job.sides)]
        yield len(self.pairs) - len(rest)
        batches = [rest[start : start + size] for start in range(0, len(rest), size)]
        since_piece: list[int] = []
        pieces: list[Path] = []
        written_at = time.monotonic()
        for batch, pictures in zip(batches, self._pictures(batches), strict=True):
            self._encode_batch(batch, pictures)
            since_piece += batch
            if signals.received or time.monotonic() - written_at >= PIECE_SECONDS:
                pieces.append(self._write_piece(*self._table_and_rows(since_piece)))
                since_piece = []
                written_at = time.monotonic()
            yield len(batch)
        if job.lasting(self.left_out):  # for a run that is killed before the record has them
            self._write_piece({}, {})
        job.folder.write(self.part, *self._table_and_rows(self.pairs))
        job.left_out |= self.left_out
        for piece in pieces:
            piece.unlink()

    def _write_piece(self, columns: Columns, sides: Sides) -> Path:
        left_out = self.job.lasting(self.left_out)
        return self.job.folder.write_piece(self.part, columns, sides, left_out)

    def _pictures(self, batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Tensor | LeftOut]]:
        """For each batch its pictures, transformed, or why they cannot be read."""
        job = self.job
        if job.encoders.images is None:
            yield from ({} for _ in batches)
            return
        missing = [[i for i in batch if self._lacks(IMAGES, i)] for batch in batches]
        loader = torch.utils.data.DataLoader(
            _PictureBatches(job.dataset, job.encoders.images.transform, missing),
            batch_size=None,
            num_workers=min(job.settings.workers, len(batches)),
            worker_init_fn=become_worker,
            generator=torch.Generator(),  # otherwise it uses the caller's
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{job.dataset.name}: a data worker was killed; if memory was short, use fewer "
                "--workers, and start the same command again, which continues"
            ) from error

    def _encode_batch(self, batch: Sequence[int], pictures: Mapping[int, Tensor | LeftOut]) -> None:
        job, encoders = self.job, self.job.encoders
        tensors = {i: picture for i, picture in pictures.items() if isinstance(picture, Tensor)}
        self.left_out |= {i: why for i, why in pictures.items() if isinstance(why, LeftOut)}
        if encoders.images and tensors:
            shapes = {tuple(tensor.shape) for tensor in tensors.values()}
            if len(shapes) > 1:
                raise ValueError(
                    "--image-model: expected tensors of one shape of its transform, got "
                    f"{sorted(shapes)}; let it resize and crop"
                )
            rows = job.stored(encoders.images.encode(torch.stack(list(tensors.values()))))
            names = [job.pictures[i] for i in tensors]
            self.known[IMAGES] |= zip(names, rows, strict=True)
        readable = [i for i in batch if i not in self.left_out]
        if encoders.texts:
            texts = dict.fromkeys(text for i in readable for text in self.captions[i])
            if new := [text for text in texts if text not in self.known[TEXTS]]:
                rows = job.stored(encoders.texts.encode(new))
                self.known[TEXTS] |= zip(new, rows, strict=True)
        for i in readable:
            rows_of_pair = (
                self.known[side][name] for side in job.sides for name in self._names(side, i)
            )
            if not all(np.isfinite(row).all() for row in rows_of_pair):
                key = printable(job.dataset.keys[i])
                self.left_out[i] = LeftOut(f"{key}: the model's features hold NaN or infinity")

    def _table_and_rows(self, pairs: Sequence[int]) -> tuple[Columns, Sides]:
        """What is written of some pairs: of each that is not left out, a row for each caption."""
        job = self.job
        rows = [(i, text) for i in pairs if i not in self.left_out for text in self.captions[i]]
        names: dict[str, list[Any]] = {
            IMAGES: [job.pictures[i] for i, _ in rows],
            TEXTS: [text for _, text in rows],
        }
        sides = {
            side: np.stack([self.known[side][name] for name in names[side]])
            if rows
            else job.stored(encoder.no_rows())
            for side, encoder in job.sides.items()
        }
        return job.columns(rows), sides


@dataclass(frozen=True)
class _PictureBatches(torch.utils.data.Dataset):
    """Batches of pictures for torch's DataLoader; picklable for workers."""

    dataset: PairDataset
    transform: Callable[[Image.Image], Tensor]
    batches: Sequence[Sequence[int]]  # positions

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[int, Tensor | LeftOut]:
        """The pictures of a batch, transformed, or why they cannot be read."""
        ahead = [i for batch in self.batches[number : number + AHEAD] for i in batch]
        self.dataset.prefetch(np.asarray(ahead, np.int64))
        pictures: dict[int, Tensor | LeftOut] = {}
        for i in self.batches[number]:
            try:
                pictures[i] = self.transform(self.dataset.image(i))
            except DataError as error:
                pictures[i] = LeftOut.because(error)
        return pictures


def states_of(dataset: PairDataset) -> list[str]:
    """For each pair the state of the file that holds its picture; "": unknown, so that the picture
    is encoded again."""
    known: dict[str, str] = {"": "built in"}
    for container in map(dataset.container, range(len(dataset))):
        if container not in known:
            known[container] = _state_of_container(container)
    return [known[container] for container in map(dataset.container, range(len(dataset)))]


def _state_of_container(container: str) -> str:
    if is_remote(container):
        return state_of_url(container)
    try:
        size, changed_ns = state_of(container)
    except (OSError, ValueError):  # it is gone, or its name cannot be written in this locale
        return ""
    return f"{size}:{changed_ns}"


def _absolute(container: str) -> str:
    return str(Path(container).absolute()) if container and not is_remote(container) else container


def _words(made_by: Any) -> str:
    """What a folder's rows depend on, in a few words."""
    if not isinstance(made_by, dict):
        return "features of another program"
    sides = [f"{s} by {printable(made_by[s])}" for s in ("images", "texts") if made_by.get(s)]
    return (
        f"features of {printable(str(made_by.get('data')))} ({', '.join(sides)}, "
        f"{made_by.get('dtype')})"
    )
