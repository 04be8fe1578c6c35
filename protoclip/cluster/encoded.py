"""Features of pictures that are kept while they are computed, so that a stopped run continues.

The output folder holds parts of them, ``features.parts/*.npz``, and at the end ``features.npz``
with all. Both have a row for each key, and say which model made it of which file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from protoclip.common.files import DataError, plural, printable, state_of
from protoclip.common.signals import Stopped, StopSignals
from protoclip.data import Faults, PairDataset, Subset, readable
from protoclip.episodes.teacher import write_rows
from protoclip.evaluate.tasks import Encoder

FEATURES = "features.npz"
PARTS = "features.parts"
PART_SECONDS = 30.0  # between two parts: what a killed run loses
State = tuple[int, int]  # of a file: size and time of change


@dataclass
class EncodedPictures:
    """Pictures by key: their features, or the reason why they have none."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)  # [D], by a model: unit rows
    reasons: dict[str, str] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)  # of the files, for rows and reasons

    def update(self, other: EncodedPictures) -> None:
        for key in other.states:  # it may have been left out before, or the other way round
            self.rows.pop(key, None)
            self.reasons.pop(key, None)
        self.rows.update(other.rows)
        self.reasons.update(other.reasons)
        self.states.update(other.states)

    def of(self, keys: Sequence[str]) -> EncodedPictures:
        """Those with some keys, in their order; there may be others of an earlier run."""
        return EncodedPictures(
            rows={key: self.rows[key] for key in keys if key in self.rows},
            reasons={key: self.reasons[key] for key in keys if key in self.reasons},
            states={key: self.states[key] for key in keys},
        )

    def write(self, path: Path, source: str) -> None:
        """Write a file, whole or not at all; ``source``: what the features were made by and of."""
        left_out = [[key, *self.states[key], reason] for key, reason in self.reasons.items()]
        write_rows(
            path,
            np.stack(list(self.rows.values())) if self.rows else np.zeros((0, 1), np.float32),
            list(self.rows),
            states=np.array([self.states[key] for key in self.rows]).reshape(-1, 2),
            left_out=np.array(json.dumps(left_out)),
            source=np.array(source),
        )


def read_encoded(path: Path) -> tuple[str, EncodedPictures]:
    """The source and the content of a file that ``EncodedPictures.write`` wrote."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = arrays["keys"].tolist()
            left_out = json.loads(str(arrays["left_out"]))
            states = dict(zip(keys, map(tuple, arrays["states"].tolist()), strict=True))
            states |= {key: (size, changed) for key, size, changed, _ in left_out}
            return str(arrays["source"]), EncodedPictures(
                rows=dict(zip(keys, arrays["features"], strict=True)),
                reasons={key: reason for key, _, _, reason in left_out},
                states=states,
            )
    except Exception as error:  # a damaged file has errors of its own
        shown = printable(str(path))
        raise ValueError(
            f"--out: {shown} cannot be read ({error}); remove it to encode its pictures again"
        ) from error


def read_kept(out: Path, source: str, overwrite: bool) -> EncodedPictures:
    """The pictures that an earlier run into ``out`` has encoded.

    Raises:
        ValueError: they were encoded by another model or from other data, and without
            ``overwrite`` they must not be replaced.
    """
    encoded_before = EncodedPictures()
    files = sorted((out / PARTS).glob("*.npz"))
    if (out / FEATURES).exists():
        files.insert(0, out / FEATURES)
    for file in files:
        source_of_file, encoded = read_encoded(file)
        if source_of_file == source:
            encoded_before.update(encoded)
        elif not overwrite:
            raise ValueError(
                f"--out: {printable(str(out))} holds features of an unfinished run with "
                f"{printable(source_of_file)}, expected {printable(source)}; choose another "
                "folder, or replace them with --overwrite"
            )
    if overwrite and not encoded_before.states:
        remove_parts(out)
    return encoded_before


def remove_parts(out: Path) -> None:
    """Remove what ``features.npz`` makes superfluous."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(out / PARTS)


def encode_rest(
    dataset: PairDataset, encoder: Encoder, kept: EncodedPictures, out: Path, source: str
) -> None:
    """Encode the pictures that ``kept`` does not have, or not as they are now, and add them.

    Raises:
        Stopped: a signal asked for it; what is encoded is in the parts.
    """
    states = [state_of_picture(dataset, i) for i in range(len(dataset))]
    rest = [i for i, key in enumerate(dataset.keys) if kept.states.get(key) != states[i]]
    done = len(dataset) - len(rest)
    encoder.bar.reset(len(dataset))
    encoder.bar.initial = encoder.bar.n = done
    numbers = itertools.count(len(list((out / PARTS).glob("*.npz"))))
    part = EncodedPictures()
    written_at = time.monotonic()
    with StopSignals() as signals:
        for batch in _batches(encoder, Subset(dataset, rest), [states[i] for i in rest]):
            part.update(batch)
            done += len(batch.states)
            if signals.received or time.monotonic() - written_at >= PART_SECONDS:
                (out / PARTS).mkdir(exist_ok=True)
                part.write(out / PARTS / f"{next(numbers):06}.npz", source)
                kept.update(part)
                part = EncodedPictures()
                written_at = time.monotonic()
            stop_if_asked(
                signals,
                f"after {done:,} of {plural(len(dataset), 'picture')}; the same command continues",
            )
    kept.update(part)


def stop_if_asked(signals: StopSignals, words: str) -> None:
    """Raise Stopped, with words that say how far the run came, if there was a signal."""
    if signals.received:
        by_ctrl_c = signals.received == "SIGINT"
        signal = "Ctrl-C" if by_ctrl_c else signals.received
        raise Stopped(f"stopped by {signal} {words}", code=130 if by_ctrl_c else 0)


def _batches(
    encoder: Encoder, dataset: PairDataset, states: Sequence[State]
) -> Iterator[EncodedPictures]:
    """The pictures of a data set, batch by batch; ``states``: of their files."""
    faults = Faults(dataset, max_fraction=1.0, report=lambda _: None)  # the loader replaces them
    keys = dataset.keys
    start = 0
    try:
        for batch, features in encoder.image_batches(dataset, faults=faults):
            positions = range(start, start + len(batch))
            reasons = dict(batch.bad)  # others that were tried as a replacement come later
            rows = zip(positions, F.normalize(features, dim=1).cpu().numpy(), strict=True)
            yield EncodedPictures(
                rows={keys[i]: row for i, row in rows if i not in reasons},
                reasons={keys[i]: reasons[i] for i in positions if i in reasons},
                states={keys[i]: states[i] for i in positions},
            )
            start = positions.stop
    except DataError:  # hardly a picture of a batch can be read
        rest = np.arange(start, len(dataset))
        unreadable = readable(Subset(dataset, rest)).faults
        if not unreadable:
            raise
        reasons = {int(rest[i]): reason for i, reason in unreadable.items()}
        yield EncodedPictures(
            reasons={keys[i]: reason for i, reason in reasons.items()},
            states={keys[i]: states[i] for i in reasons},
        )
        good = [i for i in rest.tolist() if i not in reasons]
        if good:
            yield from _batches(encoder, Subset(dataset, good), [states[i] for i in good])


def state_of_picture(dataset: PairDataset, i: int) -> State:
    """The state of the file of picture ``i``; (0, 0) where it has no file of its own."""
    with contextlib.suppress(OSError):
        return state_of(dataset.path(i))
    return (0, 0)
