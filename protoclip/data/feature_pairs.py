"""Pairs whose pictures and captions are rows of stored features."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoclip.common.files import DataError, is_remote, plural, printable, read_file
from protoclip.common.seeds import evenly_spaced
from protoclip.common.strings import StringTable
from protoclip.data.images import decode
from protoclip.data.types import Facts, Labels, PairDataset, Subset
from protoclip.features import FeatureRows, FeatureTable, open_features, open_folder
from protoclip.features.layout import is_feature_folder
from protoclip.features.table import CAPTION, FILE
from protoclip.settings.config import FEATURES

BLOCK = 16_384  # rows that are read at once for the mean of all
TRIED = 4  # files of pictures that are opened to see whether a page can show them
LABEL = "class"  # the name of the classification of a file of labels
NONE = Image.new("RGB", (1, 1), (128, 128, 128))  # in place of a picture that is not there


class FeaturePairs(PairDataset):
    """Pairs of rows, with ``image_rows`` and ``text_rows`` in place of pictures and captions.

    Rows with the same key are one picture with several captions.

    Args:
        images: [N, Di]; of several rows of a picture the first is used.
        texts: one or more [N, Dt]; each holds a caption for each row of ``images``.
        table: what each row is of.
        labels: classifications of the N rows, next to those of the table.
    """

    def __init__(
        self,
        name: str,
        images: FeatureRows,
        texts: Sequence[FeatureRows],
        table: FeatureTable | None = None,
        labels: Mapping[str, Labels] | None = None,
    ) -> None:
        self.name = name
        self.images = images
        self.texts = texts
        self.table = table
        for rows in texts:
            if len(rows) != len(images):
                raise DataError(
                    f"{printable(rows.name)}: expected {plural(len(images), 'row')}, as in "
                    f"{printable(images.name)}, got {len(rows):,}; row i must be of one pair in all"
                )
            if rows.shape[1] != texts[0].shape[1]:
                raise DataError(
                    f"{printable(rows.name)}: expected {texts[0].shape[1]:,} columns, as in "
                    f"{printable(texts[0].name)}, got {rows.shape[1]:,}; encode all captions with "
                    "one encoder"
                )
        if not len(images):
            raise DataError(f"{printable(name)}: expected at least one row, found none")
        # The rows of each pair: _rows[_starts[i] : _starts[i + 1]]; None: pair i is row i.
        self._rows: np.ndarray | None = None
        self._starts: np.ndarray | None = None
        row_keys = images.keys
        if row_keys is not None:
            numbers = row_keys.numbers()
            if numbers.max() + 1 < len(numbers):
                self._rows = np.argsort(numbers, kind="stable")
                self._starts = np.searchsorted(numbers[self._rows], np.arange(numbers.max() + 2))
        self._length = len(images) if self._starts is None else len(self._starts) - 1
        first_rows = self._row_of(np.arange(self._length))
        self.keys: Sequence[str] = RowNumbers(self._length)
        if row_keys is not None:
            self.keys = row_keys.take(first_rows)
        self.labels: Mapping[str, Labels] = {
            label: Labels(classes.ids[torch.from_numpy(first_rows)], classes.names)
            for label, classes in {**_table_labels(table), **(labels or {})}.items()
        }

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def facts(self) -> Facts:  # type: ignore[override]
        return Facts(
            has_captions=self._column(CAPTION) is not None, has_pictures=self._has_pictures()
        )

    def _has_pictures(self) -> bool:
        files = self._column(FILE)
        if files is None:
            return False
        tried = [files[i] for i in evenly_spaced(len(files), TRIED).tolist()]
        return all(_picture(file) is not NONE for file in tried)

    def _column(self, name: str) -> StringTable | None:
        return None if self.table is None else self.table.column(name)

    def _row_of(self, positions: np.ndarray, caption: np.ndarray | int = 0) -> np.ndarray:
        """The row of a caption of each pair, int64 [M]; that of the first is the picture's."""
        if self._rows is None or self._starts is None:
            return positions
        return self._rows[self._starts[positions] + caption // len(self.texts)]

    def image_rows(self, positions: np.ndarray) -> Tensor:
        """The rows of these pairs' pictures, [M, Di] in the dtype of the files."""
        return _tensor(self.images.take(self._row_of(positions)))

    def text_rows(self, positions: np.ndarray, captions: np.ndarray) -> Tensor:
        """The rows of these captions, counted from 0 for each pair, [M, Dt]."""
        rows = self._row_of(positions, captions)
        if len(self.texts) == 1:
            return _tensor(self.texts[0].take(rows))
        file = captions % len(self.texts)
        taken = np.empty((len(rows), self.texts[0].shape[1]), self.texts[0].dtype)
        for number, texts in enumerate(self.texts):
            taken[file == number] = texts.take(rows[file == number])
        return _tensor(taken)

    def num_captions(self, positions: np.ndarray) -> np.ndarray:
        """How many captions each of these pairs has, int64 [M]."""
        if self._starts is None:
            return np.full(len(positions), len(self.texts))
        return (self._starts[positions + 1] - self._starts[positions]) * len(self.texts)

    def caption_ids(self, positions: np.ndarray, captions: np.ndarray) -> Tensor | None:
        """A number for each of these captions, int64 [M], equal for equal texts; None: the texts
        are not known, only their rows."""
        if self._caption_numbers is None:
            return None
        return torch.from_numpy(self._caption_numbers[self._row_of(positions, captions)])

    @functools.cached_property
    def _caption_numbers(self) -> np.ndarray | None:
        captions = self._column(CAPTION)
        return None if captions is None or len(self.texts) > 1 else captions.numbers()

    def captions(self, i: int) -> tuple[str, ...]:
        """The texts of pair ``i``'s captions; its key where they are not known."""
        column = self._column(CAPTION)
        position = np.array([i])
        count = int(self.num_captions(position)[0])
        if column is None:
            return (self.keys[i],) * count
        rows = self._row_of(np.repeat(position, count), np.arange(count))
        return tuple(column[row] or self.keys[i] for row in rows.tolist())

    def path(self, i: int) -> str:
        files = self._column(FILE)
        return "" if files is None else files[int(self._row_of(np.array([i]))[0])]

    def image(self, i: int) -> Image.Image:
        """The picture that row ``i`` was made of, for a page; grey if its file is not there."""
        return _picture(self.path(i))

    def marks(self, positions: np.ndarray) -> Iterator[bytes]:
        image_rows = self.images.take(self._row_of(positions))
        text_rows = self.texts[0].take(self._row_of(positions))
        for key, image, text in zip(super().marks(positions), image_rows, text_rows, strict=True):
            yield key + hashlib.sha256(image.tobytes() + text.tobytes()).digest()


class RowNumbers(Sequence[str]):
    """The keys of rows that have none: their numbers, from 0."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int | slice) -> str | list[str]:  # type: ignore[override]
        numbers = self._numbers[i]
        return [str(n) for n in numbers] if isinstance(numbers, range) else str(numbers)


def _tensor(rows: np.ndarray) -> Tensor:
    """The rows as floating-point numbers; those of the files' own are not converted."""
    return torch.from_numpy(rows if rows.dtype.kind == "f" else rows.astype(np.float32))


def _picture(file: str) -> Image.Image:
    """The picture in a file, or ``NONE``."""
    if not file or is_remote(file) or not os.path.isfile(file):
        return NONE
    try:
        return decode(read_file(file), file)
    except (DataError, OSError):
        return NONE


def _table_labels(table: FeatureTable | None) -> dict[str, Labels]:
    """The classifications in a table, by name, of each row."""
    labels: dict[str, Labels] = {}
    for name in () if table is None else table.labels:
        column = table.column(f"label:{name}")  # type: ignore[union-attr]
        assert column is not None
        labels[name] = labels_of_texts(column)
    return labels


def labels_of_texts(texts: StringTable) -> Labels:
    """The classification that gives row i the class ``texts[i]``; "": not known."""
    numbers = texts.numbers()
    first = np.unique(numbers, return_index=True)[1]  # of each class
    names = list(texts.take(first))
    number_of_name = np.array([-1 if name == "" else 0 for name in names])
    number_of_name[number_of_name == 0] = np.arange(int((number_of_name == 0).sum()))
    return Labels(torch.from_numpy(number_of_name[numbers]), tuple(n for n in names if n))


def read_labels(path: str, count: int) -> Labels:
    """The classes of ``count`` rows from a file: a class on each line, or integers in a .npy.

    Raises:
        DataError: the file cannot be read, or has another number of classes.
    """
    shown = f"--labels {printable(path)}"
    try:
        if path.endswith(".npy"):
            ids = np.load(path, allow_pickle=False)
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise ValueError(f"expected integers [N], got {ids.dtype} {list(ids.shape)}")
            names = tuple(map(str, range(int(ids.max(initial=-1)) + 1)))
            labels = Labels(torch.from_numpy(ids.astype(np.int64).clip(min=-1)), names)
        else:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
            labels = labels_of_texts(StringTable(line.strip() for line in lines))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{shown}: {error}; give one class per line, or integers in a .npy"
        ) from error
    if len(labels.ids) != count:
        raise DataError(
            f"{shown}: expected a class for each of the {plural(count, 'row')}, got "
            f"{len(labels.ids):,}; leave a line empty where the class is not known"
        )
    return labels


@dataclass(frozen=True)
class ClassRows:
    """Rows of class names, for zero-shot; a class with several templates has several rows."""

    rows: FeatureRows  # [R, Dt]
    names: Mapping[str, np.ndarray]  # class -> its rows, int64


def open_class_rows(spec: str, dataset: PairDataset) -> ClassRows:
    """The rows that ``protoclip encode --classes`` wrote for classes of ``dataset``; those of a
    file without keys are of the classes "0", "1", and so on.

    Raises:
        DataError: the rows are not finite, or not as wide as those of the captions.
    """
    rows = open_features(spec, "texts" if is_feature_folder(spec) else "")
    shown = f"--class-features {printable(spec)}"
    pairs = feature_pairs(dataset)
    if pairs is not None and (width := pairs.texts[0].shape[1]) != rows.shape[1]:
        raise DataError(
            f"{shown}: expected rows of {width} columns, as those of the captions have, got "
            f"{rows.shape[1]}; encode the names with the captions' encoder"
        )
    if len(bad := rows.not_finite()):
        raise DataError(f"{shown}: expected finite features, got NaN or infinity in row {bad[0]}")
    numbers = np.arange(len(rows))
    names: Sequence[str] = RowNumbers(len(rows))
    if rows.keys is not None:
        numbers = rows.keys.numbers()
        names = rows.keys.take(np.unique(numbers, return_index=True)[1])
    return ClassRows(
        rows, {name: np.flatnonzero(numbers == number) for number, name in enumerate(names)}
    )


def open_feature_pairs(spec: str, labels: str = "") -> FeaturePairs:
    """Open a folder that ``protoclip encode`` or clip-retrieval wrote, or the files of a name such
    as "features:images.npy::texts.npy".

    Args:
        labels: file of the rows' classes; see ``read_labels``.
    Raises:
        DataError: a side is missing, or the files do not fit together.
    """
    table = None
    if spec.startswith(FEATURES):
        image_spec, *text_specs = spec.removeprefix(FEATURES).split("::")
        if not image_spec or not text_specs:
            raise DataError(
                f"{printable(spec)}: expected rows of pictures and of captions, got only one of "
                "them; give both --image-features and --text-features"
            )
        images = _open_side(image_spec, "images")
        texts = [_open_side(text_spec, "texts") for text_spec in text_specs]
    else:
        folder = open_folder(spec)
        for side, rows in (("images", folder.images), ("texts", folder.texts)):
            if rows is None:
                raise DataError(
                    f"{printable(spec)}: expected rows of pictures and of captions, found none of "
                    f"{side}; encode both sides"
                )
        assert folder.images is not None and folder.texts is not None
        images = folder.images
        texts = [folder.texts]
        table = folder.table
    own_labels = {LABEL: read_labels(labels, len(images))} if labels else None
    return FeaturePairs(spec, images, texts, table, own_labels)


def _open_side(spec: str, side: str) -> FeatureRows:
    return open_features(spec, side if is_feature_folder(spec) else "")


def origin(dataset: PairDataset, positions: np.ndarray) -> tuple[PairDataset, np.ndarray]:
    """The data set that subsets take their pairs from, and the places of these pairs in it."""
    while isinstance(dataset, Subset):
        positions = dataset.indices[positions]
        dataset = dataset.dataset
    return dataset, positions


def feature_pairs(dataset: PairDataset) -> FeaturePairs | None:
    """The stored features that a data set, or the data set of a subset, consists of; None: it
    consists of pictures."""
    source, _ = origin(dataset, np.zeros(0, np.int64))
    return source if isinstance(source, FeaturePairs) else None


@dataclass(frozen=True)
class Means:
    """The mean of the rows of each modality, fp32."""

    image: Tensor  # [Di]
    text: Tensor  # [Dt]


def mean_rows(dataset: PairDataset) -> Means:
    """The means over all pairs and captions, from one pass in the order of the files.

    Raises:
        DataError: a row holds NaN or infinity.
    """
    pairs, positions = origin(dataset, np.arange(len(dataset)))
    assert isinstance(pairs, FeaturePairs)
    image = np.zeros(pairs.images.shape[1])
    text = np.zeros(pairs.texts[0].shape[1])
    count = pairs.num_captions(positions)
    captions = 0
    for start in range(0, len(positions), BLOCK):
        block = positions[start : start + BLOCK]
        image += _sum(pairs, pairs.image_rows(block), block, "picture")
        of_block = count[start : start + BLOCK]
        for caption in range(int(of_block.max())):
            chosen = block[of_block > caption]
            rows = pairs.text_rows(chosen, np.full(len(chosen), caption))
            text += _sum(pairs, rows, chosen, "caption")
            captions += len(chosen)
    return Means(
        image=torch.from_numpy(image / len(positions)).float(),
        text=torch.from_numpy(text / captions).float(),
    )


def _sum(pairs: FeaturePairs, rows: Tensor, positions: np.ndarray, what: str) -> np.ndarray:
    total = rows.double().sum(0).numpy()
    if not np.isfinite(total).all():
        bad = np.flatnonzero(~torch.isfinite(rows).all(1).numpy())
        key = pairs.keys[int(positions[bad[0]])]
        raise DataError(
            f"{printable(pairs.name)}: expected finite features, got NaN or infinity in the row of "
            f"the {what} of {printable(key)!r}; encode it again, or leave it out of the files"
        )
    return total
