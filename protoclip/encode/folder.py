"""Encoding a data set into a folder of features, part by part.

What an earlier run has encoded is found by the picture's key and the state of the file that holds
it, and by the caption's text; everything else is encoded. Batches never cross parts, so that the
rows do not depend on where a run was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from protoclip.common.files import (
    DataError,
    is_remote,
    path_in_table,
    plural,
    printable,
    say_left_out,
    state_of,
    state_of_url,
    write_csv,
)
from protoclip.common.signals import StopSignals, stop_if_asked
from protoclip.data import PairDataset
from protoclip.data.loader import AHEAD, ignore_signals
from protoclip.distributed import (
    from_main,
    gather_objects,
    is_main,
    progress_hidden,
    rank,
    world_size,
)
from protoclip.encode.encoders import Encoders
from protoclip.features import writer
from protoclip.features.layout import IMAGES, TABLES, TEXTS, read_record
from protoclip.features.table import CAPTION, FILE, KEY, LABEL, STATE, read_csv
from protoclip.features.writer import Kept, PartFolder, Piece, State

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
        ValueError: the folder holds something else, or hardly any picture can be read.
    """
    job = _Job(dataset, encoders, settings)
    job.encode(from_main(job.prepare))
    gather_objects(None)  # all parts are written
    reasons = from_main(job.finish)
    if is_main():
        say_left_out(list(reasons.values()), len(dataset))
    return reasons


class _Job:
    """One run of ``encode_folder``, on one rank."""

    def __init__(self, dataset: PairDataset, encoders: Encoders, settings: Settings) -> None:
        self.dataset = dataset
        self.encoders = encoders
        self.settings = settings
        self.states = states_of(dataset)
        self.count = -(-len(dataset) // writer.PAIRS_IN_PART)
        self.folder = PartFolder(settings.out, self.count)
        self.class_names = {
            f"{LABEL}{name}": [*labels.names, ""] for name, labels in dataset.labels.items()
        }

    @property
    def made_by(self) -> dict[str, str]:
        """What the rows depend on, next to the pictures and captions."""
        images, texts = self.encoders.images, self.encoders.texts
        return {
            "data": self.settings.data,
            "rows": self.settings.rows,
            "images": images.name if images else "",
            "texts": texts.name if texts else "",
            "dtype": self.settings.dtype,
        }

    def prepare(self) -> list[int]:
        """Check the folder and return the numbers of the parts to encode. Parts that are no longer
        valid become pieces."""
        out = self.settings.out
        record = read_record(self.settings.out)
        shown = printable(str(out))
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
            self.folder.remove_all()
            record = {}
        record = {
            "made_by": self.made_by,
            "finished": False,
            "command": self.settings.command,
            "left_out": record.get("left_out", []),
        }
        self.folder.write_record(record)
        tables = self.folder.tables()
        if not tables and not (out / writer.UNFINISHED).exists():
            return list(range(self.count))
        reasons = Kept(self.folder, _left_out(record)).reasons
        whole = []
        for table in tables:
            number = next(
                (n for n in range(self.count) if self.folder.file(TABLES, n) == table), -1
            )
            if number >= 0 and self._is_valid(number, table, reasons):
                whole.append(number)
            else:
                self.folder.set_aside(table)
        return sorted(set(range(self.count)) - set(whole))

    def pairs_of(self, number: int) -> range:
        start = number * writer.PAIRS_IN_PART
        return range(start, min(len(self.dataset), start + writer.PAIRS_IN_PART))

    def picture(self, i: int) -> State:
        return self.dataset.keys[i], self.states[i]

    def _is_valid(self, number: int, table: Path, reasons: Mapping[State, str]) -> bool:
        """Whether a part on disk is of the data as it is now."""
        sides = {IMAGES: self.encoders.images, TEXTS: self.encoders.texts}
        if not all(self.folder.file(s, number).exists() for s, encoder in sides.items() if encoder):
            return False
        pairs = [i for i in self.pairs_of(number) if self.picture(i) not in reasons]
        if not all(self.states[i] for i in pairs):  # a file without a state is encoded again
            return False
        captions = [self.dataset.captions(i) for i in pairs]
        expected = self.columns(
            [i for i, texts in zip(pairs, captions, strict=True) for _ in texts],
            [text for texts in captions for text in texts],
        )
        try:
            return all(list(read_csv(table, name)) == cells for name, cells in expected.items())
        except (OSError, ValueError):  # damaged, or without such a column
            return False

    def columns(self, pairs: Sequence[int], captions: Sequence[str]) -> dict[str, Sequence[str]]:
        """The table of rows, each of a pair and one of its captions."""
        columns: dict[str, Sequence[str]] = {
            KEY: [self.dataset.keys[i] for i in pairs],
            FILE: [_absolute(self.dataset.container(i)) for i in pairs],
            STATE: [self.states[i] for i in pairs],
            CAPTION: captions,
        }
        for column, names in self.class_names.items():
            ids = self.dataset.labels[column.removeprefix(LABEL)].ids
            columns[column] = [names[int(ids[i])] for i in pairs]
        return columns

    def encode(self, parts: Sequence[int]) -> None:
        """Encode this rank's share of the parts."""
        kept = Kept(self.folder, _left_out(read_record(self.settings.out)))
        gather_objects(None)  # nobody adds a piece before all have read them
        own = parts[rank() :: world_size()]
        pairs = sum(len(self.pairs_of(number)) for number in own)
        with StopSignals() as signals, Progress(pairs) as progress:
            for number in own:
                _Part(self, number, kept, signals, progress).encode()

    def finish(self) -> dict[str, str]:
        """Write left_out.csv, say in the record that the folder is finished, remove the pieces."""
        record = read_record(self.settings.out)
        missing = set(range(self.count)) - {
            number for number in range(self.count) if self.folder.file(TABLES, number).exists()
        }
        if missing:
            raise DataError(
                f"--out: {printable(str(self.settings.out))}: the parts of other ranks are not "
                "here; choose a folder that all machines share"
            )
        reasons = Kept(self.folder, _left_out(record)).reasons
        pictures = map(self.picture, range(len(self.dataset)))
        left_out = {picture: reasons[picture] for picture in pictures if picture in reasons}
        if len(left_out) == len(self.dataset):
            raise DataError(next(iter(left_out.values())))
        table = [(path_in_table(key), reason) for (key, _), reason in left_out.items()]
        write_csv(self.settings.out / LEFT_OUT, ("file", "reason"), table)
        record["left_out"] = [[*picture, reason] for picture, reason in left_out.items()]
        self.folder.write_record(record | {"finished": True})
        self.folder.remove_pieces()
        return {key: reason for (key, _), reason in left_out.items()}


class Progress:
    """How many of a rank's pictures are done, and a bar that shows it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._bar = tqdm(
            desc="encoding", unit=" rows", total=total, leave=False, disable=progress_hidden()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int) -> None:
        self.done += count
        self._bar.update(count)

    def __str__(self) -> str:
        return f"{self.done:,} of {plural(self.total, 'picture')}"


class _Rows:
    """Rows by number, in an array that is made with the first of them."""

    def __init__(self, count: int) -> None:
        self.is_known = np.zeros(count, bool)
        self.values: np.ndarray | None = None  # [count, D]

    def put(self, numbers: Sequence[int], rows: np.ndarray) -> None:
        if self.values is None:
            self.values = np.zeros((len(self.is_known), rows.shape[1]), rows.dtype)
        self.values[numbers] = rows
        self.is_known[numbers] = True

    def are_finite(self, numbers: Sequence[int]) -> bool:
        return self.values is None or bool(np.isfinite(self.values[numbers]).all())


class _Part:
    """The encoding of one part. Pairs have their number in it, captions theirs among the different
    captions of the part."""

    def __init__(
        self, job: _Job, number: int, kept: Kept, signals: StopSignals, progress: Progress
    ) -> None:
        self.job = job
        self.number = number
        self.signals = signals
        self.progress = progress
        self.dtype = np.dtype(job.settings.dtype)
        self.pairs = job.pairs_of(number)  # positions in the data set
        self.reasons: dict[int, str] = {}  # pair -> why it has no row
        self.texts: dict[str, int] = {}  # caption -> its number
        self.captions: list[list[int]] = []  # of each pair
        self.pieces: list[Path] = []  # that this run has written
        for pair, i in enumerate(self.pairs):
            texts: tuple[str, ...] = ()
            if (reason := kept.reasons.get(job.picture(i))) is not None:
                self.reasons[pair] = reason
            else:
                try:
                    texts = job.dataset.captions(i)
                except DataError as error:
                    self.reasons[pair] = str(error)
            self.captions.append([self.texts.setdefault(t, len(self.texts)) for t in texts])
        self.image_rows = _Rows(len(self.pairs))
        self.text_rows = _Rows(len(self.texts))
        if job.encoders.images:
            for numbers, rows in kept.image_rows([job.picture(i) for i in self.pairs]):
                self.image_rows.put(numbers, rows)
        if job.encoders.texts:
            for numbers, rows in kept.text_rows(list(self.texts)):
                self.text_rows.put(numbers, rows)

    def encode(self) -> None:
        """Encode what is missing, and write the part."""
        encoders, settings = self.job.encoders, self.job.settings
        size = settings.batch_size * (1 if encoders.images else TEXT_BATCHES)
        rest = [pair for pair in range(len(self.pairs)) if not self._is_done(pair)]
        self.progress.add(len(self.pairs) - len(rest))
        batches = [rest[start : start + size] for start in range(0, len(rest), size)]
        since_piece: list[int] = []
        written_at = time.monotonic()
        for batch, pictures in zip(batches, self._pictures(batches), strict=True):
            self._encode_batch(batch, pictures)
            since_piece += batch
            self.progress.add(len(batch))
            if self.signals.received or time.monotonic() - written_at >= PIECE_SECONDS:
                self._write_piece(since_piece)
                since_piece = []
                written_at = time.monotonic()
            stop_if_asked(self.signals, f"after {self.progress}; the same command continues")
        if self.reasons:
            name = f"{self.number:06}-left-out"
            self.job.folder.write_piece(name, Piece({}, None, None, self._states_left_out()))
        self.job.folder.write(self.number, self._piece(range(len(self.pairs))))
        for piece in self.pieces:
            piece.unlink()

    def _is_done(self, pair: int) -> bool:
        if pair in self.reasons:
            return True
        has_image = self.job.encoders.images is None or bool(self.image_rows.is_known[pair])
        has_texts = self.job.encoders.texts is None or bool(
            self.text_rows.is_known[self.captions[pair]].all()
        )
        return has_image and has_texts

    def _pictures(self, batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Tensor | str]]:
        """For each batch its pictures, transformed, or why they cannot be read."""
        encoder = self.job.encoders.images
        if encoder is None:
            yield from ({} for _ in batches)
            return
        missing = [
            [pair for pair in batch if not self.image_rows.is_known[pair]] for batch in batches
        ]
        source = _PictureBatches(self.job.dataset, encoder.transform, self.pairs.start, missing)
        loader = torch.utils.data.DataLoader(
            source,
            batch_size=None,
            num_workers=min(self.job.settings.workers, len(batches)),
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # otherwise it uses the caller's
        )
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{self.job.dataset.name}: a data worker was killed; if memory was short, use "
                "fewer --workers, and start the same command again, which continues"
            ) from error

    def _encode_batch(self, batch: Sequence[int], pictures: Mapping[int, Tensor | str]) -> None:
        tensors = {p: picture for p, picture in pictures.items() if isinstance(picture, Tensor)}
        self.reasons |= {p: reason for p, reason in pictures.items() if isinstance(reason, str)}
        encoders = self.job.encoders
        if encoders.images and tensors:
            shapes = {tuple(tensor.shape) for tensor in tensors.values()}
            if len(shapes) > 1:
                raise ValueError(
                    "--image-model: expected tensors of one shape of its transform, got "
                    f"{sorted(shapes)}; let it resize and crop"
                )
            rows = encoders.images.encode(torch.stack(list(tensors.values())))
            self.image_rows.put(list(tensors), self._stored(rows))
        readable = [pair for pair in batch if pair not in self.reasons]
        if encoders.texts:
            names = list(self.texts)
            wanted = dict.fromkeys(number for pair in readable for number in self.captions[pair])
            numbers = [number for number in wanted if not self.text_rows.is_known[number]]
            if numbers:
                rows = encoders.texts.encode([names[number] for number in numbers])
                self.text_rows.put(numbers, self._stored(rows))
        for pair in readable:
            image_is_finite = self.image_rows.are_finite([pair])
            if not (image_is_finite and self.text_rows.are_finite(self.captions[pair])):
                key = printable(self.job.dataset.keys[self.pairs[pair]])
                self.reasons[pair] = f"{key}: the model's features hold NaN or infinity"

    def _stored(self, rows: Tensor) -> np.ndarray:
        """Rows in the dtype of the folder."""
        values = rows.numpy()
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if (np.isfinite(values) & ~np.isfinite(stored)).any():
            largest = np.abs(values[np.isfinite(values)]).max()
            raise ValueError(
                f"--dtype: expected features of at most {np.finfo(self.dtype).max:,.0f} for "
                f"{self.dtype}, got {largest:,.0f}; use --dtype fp32"
            )
        return stored

    def _write_piece(self, pairs: Sequence[int]) -> None:
        taken = len(list((self.job.folder.path / writer.UNFINISHED).glob(f"{self.number:06}-*")))
        name = f"{self.number:06}-{taken:04}"
        self.pieces.append(self.job.folder.write_piece(name, self._piece(pairs)))

    def _states_left_out(self) -> dict[State, str]:
        return {self.job.picture(self.pairs[p]): reason for p, reason in self.reasons.items()}

    def _piece(self, pairs: Sequence[int]) -> Piece:
        """The rows of some pairs, and those that were left out until now."""
        kept = [pair for pair in pairs if pair not in self.reasons]
        of_pair = [pair for pair in kept for _ in self.captions[pair]]  # of each row
        captions = [number for pair in kept for number in self.captions[pair]]
        names = list(self.texts)
        columns = self.job.columns(
            [self.pairs[pair] for pair in of_pair], [names[number] for number in captions]
        )
        encoders = self.job.encoders
        images = texts = None
        if encoders.images:
            if self.image_rows.values is None:  # no picture was readable: D is the encoder's
                blank = encoders.images.transform(Image.new("RGB", (64, 64)))
                self.image_rows.put([], self._stored(encoders.images.encode(blank[None])[:0]))
            assert self.image_rows.values is not None
            images = self.image_rows.values[of_pair]
        if encoders.texts:
            if self.text_rows.values is None:
                self.text_rows.put([], self._stored(encoders.texts.encode(["a"])[:0]))
            assert self.text_rows.values is not None
            texts = self.text_rows.values[captions]
        return Piece(columns, images, texts, self._states_left_out())


@dataclass(frozen=True)
class _PictureBatches(torch.utils.data.Dataset):
    """Batches of pictures for torch's DataLoader; picklable for workers."""

    dataset: PairDataset
    transform: Callable[[Image.Image], Tensor]
    start: int  # position of the part's first pair
    batches: Sequence[Sequence[int]]  # numbers of pairs in the part

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[int, Tensor | str]:
        """The pictures of a batch, transformed, or why they cannot be read."""
        ahead = [pair for batch in self.batches[number : number + AHEAD] for pair in batch]
        self.dataset.prefetch(self.start + np.asarray(ahead, np.int64))
        pictures: dict[int, Tensor | str] = {}
        for pair in self.batches[number]:
            try:
                pictures[pair] = self.transform(self.dataset.image(self.start + pair))
            except DataError as error:
                pictures[pair] = str(error)
        return pictures


def _left_out(record: Mapping[str, Any]) -> dict[State, str]:
    """The pictures that a folder's record says were left out."""
    return {(key, state): reason for key, state, reason in record["left_out"]}


def states_of(dataset: PairDataset) -> list[str]:
    """For each pair the state of the file that holds its picture; "": unknown, so that the picture
    is encoded again."""
    known: dict[str, str] = {"": "built in"}
    states = []
    for i in range(len(dataset)):
        container = dataset.container(i)
        if container not in known:
            known[container] = _state_of_container(container)
        states.append(known[container])
    return states


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
