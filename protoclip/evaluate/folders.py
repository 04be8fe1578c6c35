"""Pictures sorted into classes: an ImageFolder, and CLIP_benchmark's classification shards."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.data import DataError, Labels
from protoclip.data.images import decode
from protoclip.data.shards import IMAGE_KINDS, samples

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
LABEL = "class"


class ImageFolder:
    """``root/CLASS/.../picture``, torchvision's layout; class ids follow the sorted folder names.

    Args:
        root: the folder of class folders.
        folders: class folders by id, where another split has more; None: those in ``root``.
        names: what each class is called, by id; None: as its folder.
    Raises:
        DataError: no class folder, no picture in any, or another number of names than of classes.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        folders: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.name = str(root)
        self.folders = tuple(class_folders(root) if folders is None else folders)
        names = _checked_names(self.name, names, self.folders)
        self.files: list[str] = []
        ids: list[int] = []
        for number, folder in enumerate(self.folders):
            found = sorted(
                str(path.relative_to(root))
                for path in (Path(root) / folder).rglob("*")
                if path.suffix.lower() in SUFFIXES and path.is_file()
            )
            self.files += found
            ids += [number] * len(found)
        if not self.files:
            raise DataError(
                f"{self.name}: no pictures in its {len(self.folders)} class folders; expected "
                f"{self.name}/CLASS/picture.png (or another of {', '.join(SUFFIXES)})"
            )
        self.keys: Sequence[str] = self.files
        self.labels: Mapping[str, Labels] = {LABEL: Labels(torch.tensor(ids), names)}

    def __len__(self) -> int:
        return len(self.files)

    def captions(self, i: int) -> tuple[str, ...]:
        """The class; such pictures have no captions of their own."""
        known = self.labels[LABEL]
        return (known.names[int(known.ids[i])],)

    def image(self, i: int) -> Image.Image:
        path = os.path.join(self.name, self.files[i])
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; mend the file") from error
        return decode(data, path)

    def stamp(self) -> list[str]:
        """What changes when a picture does."""
        stats = (os.stat(os.path.join(self.name, file)) for file in self.files)
        return [f"{s.st_size} {s.st_mtime_ns}" for s in stats]


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """Names of the class folders, sorted: ids follow their order."""
    with os.scandir(root) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no class folders; expected {root}/CLASS/picture.png")
    return found


def _checked_names(
    where: str, names: Sequence[str] | None, folders: Sequence[str]
) -> tuple[str, ...]:
    if names is None:
        return tuple(folders)
    if len(names) != len(folders):
        raise DataError(
            f"{where}: {len(names)} class names for {len(folders)} class folders; give one name "
            "per folder, in the order of the sorted folder names"
        )
    return tuple(names)


class ClassShards:
    """Classification shards of CLIP_benchmark: picture and ``cls`` (or ``npy``) under one key.

    Args:
        name: for messages and tables.
        shards: the tar files.
        names: the class names, by id; None: the classes are called by their ids.
        multilabel: whether ``npy`` holds a 0/1 vector over the classes rather than ``cls`` an id.
    Attributes:
        targets: bool [N, C] of a multilabel data set, else None.
    Raises:
        DataError: no sample, a label that is no class id, or more classes than names.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[str],
        names: Sequence[str] | None = None,
        multilabel: bool = False,
    ) -> None:
        self.name, self.shards = name, tuple(shards)
        self.targets: Tensor | None = None
        self.labels: Mapping[str, Labels] = {}
        keys: list[str] = []
        places: list[tuple[int, int, int]] = []
        values: list[np.ndarray] = []
        for number, shard in enumerate(self.shards):
            with open(_existing(shard), "rb") as file:
                for key, members, fault in samples(shard):
                    where = f"{shard}: {key!r}"
                    if fault:
                        raise DataError(f"{where}: {fault}")
                    kind = next((k for k in IMAGE_KINDS if members.get(k, (0, 0))[1]), None)
                    if kind is None:
                        raise DataError(f"{where}: no picture ({', '.join(IMAGE_KINDS)})")
                    values.append(_label(file, members, where, "npy" if multilabel else "cls"))
                    keys.append(f"{number}/{key}")
                    places.append((number, *members[kind]))
        if not keys:
            raise DataError(f"{name}: its {len(self.shards)} shards hold no sample")
        self.keys: Sequence[str] = keys
        self._places = np.array(places, dtype=np.int64)
        if multilabel:
            self._set_targets(values, names)
        else:
            self._set_ids(np.array(values).reshape(-1), names)

    def _set_ids(self, ids: np.ndarray, names: Sequence[str] | None) -> None:
        high = int(ids.max())
        if names is None:
            names = [str(i) for i in range(high + 1)]
        if high >= len(names) or ids.min() < 0:
            key = self.keys[int(ids.argmax() if high >= len(names) else ids.argmin())]
            raise DataError(
                f"{self.name}: {len(names)} class names, but sample {key!r} is of class "
                f"{int(ids.max() if high >= len(names) else ids.min())} (they count from 0); "
                "mend classnames.txt, one name per line, or the labels"
            )
        self.labels = {LABEL: Labels(torch.from_numpy(ids.astype(np.int64)), tuple(names))}

    def _set_targets(self, values: list[np.ndarray], names: Sequence[str] | None) -> None:
        sizes = {value.size for value in values} | ({len(names)} if names is not None else set())
        if len(sizes) != 1:
            raise DataError(
                f"{self.name}: multilabel vectors and classnames.txt must have one length, found "
                f"{sorted(sizes)}"
            )
        self.targets = torch.from_numpy(np.stack(values).reshape(len(values), -1) > 0)

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        """The class; such pictures have no captions of their own."""
        if LABEL not in self.labels:
            return ("",)
        known = self.labels[LABEL]
        return (known.names[int(known.ids[i])],)

    def image(self, i: int) -> Image.Image:
        number, offset, size = (int(value) for value in self._places[i])
        with open(self.shards[number], "rb") as file:
            file.seek(offset)
            return decode(file.read(size), f"{self.shards[number]}: {self.keys[i]!r}")

    def stamp(self) -> list[str]:
        """What changes when a shard does."""
        return [f"{s.st_size} {s.st_mtime_ns}" for s in map(os.stat, self.shards)]


def _existing(shard: str) -> str:
    if not os.path.isfile(shard):
        raise DataError(f"{shard}: no such shard; nshards.txt and the files disagree, or the path")
    return shard


def _label(
    file: io.BufferedReader, members: Mapping[str, tuple[int, int]], where: str, kind: str
) -> np.ndarray:
    """The label of one sample: a class id, or a 0/1 vector over the classes."""
    if kind not in members:
        raise DataError(
            f"{where}: no {kind}; a classification sample holds a picture and a {kind} under one "
            "key (captions: write 'retrieval' into dataset_type.txt)"
        )
    offset, size = members[kind]
    file.seek(offset)
    data = file.read(size)
    try:
        if kind == "npy":
            return np.load(io.BytesIO(data), allow_pickle=False)
        return np.array(int(data.decode("ascii")))
    except (ValueError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{where}: its {kind} is no label ({error})") from error
