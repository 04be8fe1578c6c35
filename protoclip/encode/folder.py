"""Encoding a data set into a folder of features, part by part.

What an earlier run has encoded is found by the picture's key and the state of the file that holds
it, and by the caption's text; everything else is encoded. Batches never cross parts, so that the
rows do not depend on where a run was stopped.

A part's rows come first and its table last, so a part with a table is whole. What is encoded of a
part that is not whole, or of one that is no longer valid, lies in pieces, DIR/.unfinished/*.npz.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    whole_file,
    write_atomic,
    write_csv,
)
from protoclip.common.json_text import parse_json
from protoclip.common.signals import StopSignals, become_worker, stop_if_asked
from protoclip.common.waits import Wait
from protoclip.data import PairDataset, Subset
from protoclip.data.loader import AHEAD
from protoclip.distributed import from_main, gather_objects, is_main, rank, world_size
from protoclip.encode.encoders import Encoders
from protoclip.episodes.teacher import teacher_text
from protoclip.features.layout import IMAGES, RECORD, SIDES, TABLES, TEXTS, read_record
from protoclip.features.parts import open_part
from protoclip.features.table import CAPTION, FILE, KEY, LABEL, STATE, read_csv, write_csv_table

LEFT_OUT = "left_out.csv"
PIECE_SECONDS = 30.0  # between two pieces: what a killed run loses
PAIRS_IN_PART = 16_384
UNFINISHED = ".unfinished"
NAMES = (KEY, STATE, CAPTION)  # of the columns that a piece has
REASONS = "left_out"  # in a piece and in the record: key, state and reason of pictures without rows
TEXT_BATCHES = 32  # without pictures, so many batches of texts go to the encoder at once
State = tuple[str, str]  # of a picture: its key, and the state of the file that holds it
Columns = Mapping[str, Sequence[str]]  # of a table: key, file, state, caption, labels
Sides = Mapping[str, np.ndarray]  # of IMAGES, TEXTS or both, the rows [M, D]


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


class OneText(Subset):
    """The pairs of a data set, each with one text: what a text teacher reads."""

    def __init__(self, dataset: PairDataset) -> None:
        super().__init__(dataset, np.arange(len(dataset)))

    def captions(self, i: int) -> tuple[str, ...]:
        return (teacher_text(super().captions(i)),)


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
        self.sides = encoders
        self.settings = settings
        self.made_by = {  # what the rows depend on, next to the pictures and captions
            "data": settings.data,
            "rows": settings.rows,
            **{name: encoders[s].name if s in encoders else "" for s, name in SIDES.items()},
            "dtype": settings.dtype,
        }
        containers = map(dataset.container, range(len(dataset)))
        states = map(functools.cache(_state_of_container), containers)
        self.pictures: list[State] = list(zip(dataset.keys, states, strict=True))
        self.folder = PartFolder(settings.out, -(-len(dataset) // PAIRS_IN_PART))
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
        start = int(part) * PAIRS_IN_PART
        return range(start, min(len(self.dataset), start + PAIRS_IN_PART))

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
        for name, labels in self.dataset.labels.items():
            classes = [*labels.names, ""]
            columns[f"{LABEL}{name}"] = [classes[int(labels.ids[i])] for i, _ in rows]
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
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
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
        if IMAGES not in job.sides:
            yield from ({} for _ in batches)
            return
        transform = job.sides[IMAGES].transform
        assert transform is not None
        missing = [[i for i in batch if self._lacks(IMAGES, i)] for batch in batches]
        loader = torch.utils.data.DataLoader(
            _PictureBatches(job.dataset, transform, missing),
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
        job = self.job
        tensors = {i: picture for i, picture in pictures.items() if isinstance(picture, Tensor)}
        self.left_out |= {i: why for i, why in pictures.items() if isinstance(why, LeftOut)}
        if tensors:
            shapes = {tuple(tensor.shape) for tensor in tensors.values()}
            if len(shapes) > 1:
                raise ValueError(
                    "--image-model: expected tensors of one shape of its transform, got "
                    f"{sorted(shapes)}; let it resize and crop"
                )
            rows = job.stored(job.sides[IMAGES].encode(torch.stack(list(tensors.values()))))
            names = [job.pictures[i] for i in tensors]
            self.known[IMAGES] |= zip(names, rows, strict=True)
        readable = [i for i in batch if i not in self.left_out]
        if TEXTS in job.sides:
            texts = dict.fromkeys(text for i in readable for text in self.captions[i])
            if new := [text for text in texts if text not in self.known[TEXTS]]:
                rows = job.stored(job.sides[TEXTS].encode(new))
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


def _state_of_container(container: str) -> str:
    """The state of a file that holds pictures; "": unknown, so that they are encoded again."""
    if not container:
        return "built in"
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
    sides = [f"{s} by {printable(made_by[s])}" for s in SIDES.values() if made_by.get(s)]
    return (
        f"features of {printable(str(made_by.get('data')))} ({', '.join(sides)}, "
        f"{made_by.get('dtype')})"
    )


class PartFolder:
    """The parts of a folder, ``count`` of them. A part is named by its number in file names."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        digits = len(str(count - 1))  # embedding-reader sorts parts by name
        self.parts = [f"{number:0{digits}}" for number in range(count)]

    def file(self, kind: str, part: str) -> Path:
        """The path of a part's rows (``IMAGES``, ``TEXTS``) or of its table (``TABLES``)."""
        return self.path / kind / f"{kind}_{part}.{'csv' if kind == TABLES else 'npy'}"

    def parts_on_disk(self) -> list[str]:
        """The parts that have any file."""
        files = (
            file for kind in (IMAGES, TEXTS, TABLES) for file in (self.path / kind).glob("*_*")
        )
        return sorted({file.stem.rpartition("_")[2] for file in files})

    def write(self, part: str, columns: Columns, sides: Sides) -> None:
        """Write a part; its table, which says that it is whole, is renamed last."""
        for side, rows in sides.items():
            _write_npy(self.file(side, part), rows)
        table = self.file(TABLES, part)
        table.parent.mkdir(exist_ok=True)
        write_parquet(table.with_suffix(".parquet"), columns)
        write_csv_table(table, columns)

    def set_aside(self, part: str) -> None:
        """Make a piece of a part that is not valid, and remove its files."""
        table = self.file(TABLES, part)
        files = {side: self.file(side, part) for side in (IMAGES, TEXTS)}
        sides = {}
        with contextlib.suppress(FileNotFoundError, EOFError, ValueError):  # not whole, or damaged
            columns = {name: list(read_csv(table, name)) for name in NAMES}
            sides = {side: np.load(file) for side, file in files.items() if file.exists()}
        if sides and all(len(rows) == len(columns[KEY]) for rows in sides.values()):
            self.write_piece(f"before_{part}", columns, sides)
        for file in (table, table.with_suffix(".parquet"), *files.values()):
            file.unlink(missing_ok=True)

    def write_piece(
        self, of: str, columns: Columns, sides: Sides, left_out: Sequence[Sequence[str]] = ()
    ) -> Path:
        """Write a piece, whole or not at all."""
        folder = self.path / UNFINISHED
        folder.mkdir(exist_ok=True)
        paths = (folder / f"{of}-{number:06}.npz" for number in itertools.count())
        path = next(path for path in paths if not path.exists())
        lists = {name: list(columns.get(name, ())) for name in NAMES} | {REASONS: left_out}
        # An array of texts would give each the space of the longest.
        arrays = {name: np.array(json.dumps(values)) for name, values in lists.items()}
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, **sides)  # type: ignore[arg-type]
        return path

    def remove_all(self) -> None:
        """Remove every part and piece."""
        for kind in (TABLES, IMAGES, TEXTS, UNFINISHED):
            if (self.path / kind).exists():
                shutil.rmtree(self.path / kind)

    def write_record(self, record: Mapping[str, Any]) -> None:
        write_atomic(self.path / RECORD, json.dumps(record, indent=1) + "\n")


class Kept:
    """What the pieces of a folder hold, by picture and by caption, and why pictures are left out as
    long as their files stay as they are, by the pieces and the record."""

    def __init__(self, path: Path) -> None:
        left_out = read_record(path)[REASONS]
        self._places: dict[str, dict[Any, tuple[Path, int]]] = {IMAGES: {}, TEXTS: {}}
        for piece in sorted((path / UNFINISHED).glob("*.npz")):
            with np.load(piece, allow_pickle=False) as arrays:
                lists = {name: _list_of(arrays[name]) for name in (*NAMES, REASONS)}
                left_out += lists[REASONS]
                pictures = zip(lists[KEY], lists[STATE], strict=True)
                for side, names in ((IMAGES, pictures), (TEXTS, lists[CAPTION])):
                    if side in arrays.files:
                        self._places[side] |= {name: (piece, i) for i, name in enumerate(names)}
        self.reasons: dict[State, str] = {(key, s): reason for key, s, reason in left_out if s}

    def rows(self, side: str, names: Iterable[Any]) -> dict[Any, np.ndarray]:
        """The rows [D] of those pictures (``IMAGES``) or captions (``TEXTS``) that were encoded as
        they are now."""
        places = self._places[side]
        by_file: dict[Path, list[Any]] = {}
        for name in dict.fromkeys(names):
            if name in places and (side == TEXTS or name[1]):  # without a state it may be another
                by_file.setdefault(places[name][0], []).append(name)
        rows: dict[Any, np.ndarray] = {}
        for path, of_file in by_file.items():
            with np.load(path, allow_pickle=False) as arrays:
                taken = arrays[side][[places[name][1] for name in of_file]]
            rows |= zip(of_file, taken, strict=True)
        return rows


def _list_of(array: np.ndarray) -> list[Any]:
    """A list that ``write_piece`` wrote, now as JSON, before as an array of texts."""
    value = array.tolist()
    return parse_json(value) if isinstance(value, str) else value


def write_parquet(path: Path, columns: Columns) -> None:
    """Write a part's table under clip-retrieval's names, if pyarrow is installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    table = {}
    for name, texts in columns.items():
        if name != STATE:  # parquet cannot hold the bytes of names that are not UTF-8
            cells = [text.encode("utf-8", "replace").decode() for text in texts]
            table["image_path" if name == FILE else name] = pyarrow.array(cells, pyarrow.string())
    with whole_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(table), temporary)


def _write_npy(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    header = np.lib.format.header_data_from_array_1_0(rows)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(rows.reshape(-1).view(np.uint8).data)  # np.save does not name a full disk
