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

from protoclip.common.digest import digest_of
from protoclip.common.files import DataError, is_remote, plural, printable, read_file
from protoclip.common.seeds import evenly_spaced
from protoclip.common.strings import StringTable
from protoclip.data.images import decode
from protoclip.data.types import Facts, Labels, PairDataset, Subset
from protoclip.features import FeatureRows, Identity, open_features, open_folder
from protoclip.features.identity import CAPTION, FILE, alike
from protoclip.features.layout import is_feature_folder
from protoclip.features.table import LABEL as LABEL_COLUMN
from protoclip.features.table import FeatureTable
from protoclip.settings.config import FEATURES

SUMMED = 4096  # rows that are added up at once for the mean of all
TRIED = 4  # files of pictures that are opened to see whether a page can show them
LABEL = "class"  # the name of the classification of a file of labels
NONE = Image.new("RGB", (1, 1), (128, 128, 128))  # in place of a picture that is not there


class FeaturePairs(PairDataset):
    """Pairs of rows, with ``image_rows`` and ``text_rows`` in place of pictures and captions.

    Rows of one picture, as ``identity`` says, are one pair with several captions.

    Args:
        images: [N, Di]; of several rows of a picture the first is used.
        texts: [N, Dt] each, with a caption for each row of ``images``; without any the data set
            shows what rows are of.
        labels: classifications of the N rows.
        identity: what the rows are of; None: what ``images`` says.
    """

    def __init__(
        self,
        name: str,
        images: FeatureRows,
        texts: Sequence[FeatureRows] = (),
        labels: Mapping[str, Labels] | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.name = name
        self.images = images
        self.texts = texts
        self.identity = images.identity if identity is None else identity
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
        images.are_images = images.are_images or len(texts) > 0
        self._captions_of_row = max(1, len(texts))
        first_rows = self.identity.first_rows
        self._length = len(first_rows)
        self.keys: Sequence[str] = self.identity.names(first_rows)
        self.labels: Mapping[str, Labels] = {
            label: Labels(classes.ids[torch.from_numpy(first_rows)], classes.names)
            for label, classes in (labels or {}).items()
        }
        self._digests: dict[int, str] = {}  # of the first rows of all sides

    def __len__(self) -> int:
        return self._length

    @functools.cached_property
    def facts(self) -> Facts:  # type: ignore[override]
        tried = evenly_spaced(len(self), TRIED).tolist()
        return Facts(
            has_captions=self.identity.knows(CAPTION),
            has_pictures=all(_picture(self.path(i)) is not NONE for i in tried),
        )

    def _row_of(self, positions: np.ndarray, caption: np.ndarray | int = 0) -> np.ndarray:
        """The row of a caption of each pair, int64 [M]; that of the first is the picture's."""
        if self._length == len(self.images):
            return positions
        rows, starts = self.identity.rows_by_picture
        return rows[starts[positions] + caption // self._captions_of_row]

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
        if self._length == len(self.images):
            return np.full(len(positions), self._captions_of_row)
        _, starts = self.identity.rows_by_picture
        return (starts[positions + 1] - starts[positions]) * self._captions_of_row

    def caption_ids(self, positions: np.ndarray, captions: np.ndarray) -> Tensor | None:
        """A number for each of these captions, int64 [M], equal for equal texts; None: the texts
        are not known, only their rows."""
        if self._caption_numbers is None:
            return None
        return torch.from_numpy(self._caption_numbers[self._row_of(positions, captions)])

    @functools.cached_property
    def _caption_numbers(self) -> np.ndarray | None:
        if len(self.texts) > 1 or not self.identity.knows(CAPTION):
            return None
        return alike(self.identity.column(CAPTION))

    def captions(self, i: int) -> tuple[str, ...]:
        """The texts of pair ``i``'s captions; in place of those that are not known the first that
        is, or else the pair's name."""
        rows, starts = self.identity.rows_by_picture
        column = self.identity.column(CAPTION)
        texts = [column[row] for row in rows[starts[i] : starts[i + 1]].tolist()]
        known = next(filter(None, texts), self.keys[i])
        if len(self.texts) > 1:
            return (known,) * len(texts) * len(self.texts)
        return tuple(text or known for text in texts)

    def path(self, i: int) -> str:
        return self.identity.column(FILE)[int(self.identity.first_rows[i])]

    def image(self, i: int) -> Image.Image:
        """The picture that row ``i`` was made of, for a page; of pairs grey if its file is not
        there."""
        path = self.path(i)
        if self.texts:
            return _picture(path)
        if not path:
            raise DataError(f"{self.name}: features have no pictures")
        try:
            return decode(read_file(path), printable(path))
        except OSError as error:
            raise DataError(f"{printable(path)}: {error.strerror}; restore the file") from error

    def marks(self, positions: np.ndarray) -> Iterator[bytes]:
        """What fingerprints from before version 0.2 are made of."""
        rows = self._row_of(positions)
        keys: Sequence[str] = [""] * len(rows)
        if self.identity.keys is not None:
            keys = self.identity.keys.take(rows)
        sides = zip(self.images.take(rows), self.texts[0].take(rows), strict=True)
        for key, i, (image, text) in zip(keys, positions.tolist(), sides, strict=True):
            mark = (key or str(i)).encode("utf-8", "surrogateescape")
            yield mark + hashlib.sha256(image.tobytes() + text.tobytes()).digest()

    def fingerprint(
        self, positions: np.ndarray, saved: str = "", is_beginning: bool = False
    ) -> str:
        """What tells these pairs, int64 [M], from others: "pairs:rows:digest:choice:state". The
        digest is that of all bytes of the rows, the choice of the positions, keys and captions, the
        state of the files' sizes and times.

        Args:
            saved: an earlier fingerprint: if the files have its state, they are not read.
            is_beginning: look at as many rows as there were then; some may be new.
        """
        sides = (self.images, *self.texts)
        state = _joined([side.state for side in sides])
        rows = len(self.images)
        if saved:
            _, saved_rows, digest, _, saved_state = saved.split(":")
            rows = min(rows, int(saved_rows)) if is_beginning else rows
            if (str(rows), state) == (saved_rows, saved_state):
                self._digests.setdefault(rows, digest)
        if rows not in self._digests:
            self._digests[rows] = _joined([side.digest(rows) for side in sides])
        choice = _joined([digest_of(positions), self.identity.digest(rows)])
        return f"{len(positions)}:{rows}:{self._digests[rows]}:{choice}:{state}"


def _joined(digests: Sequence[str]) -> str:
    """A digest of digests."""
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


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
    names = () if table is None else table.labels
    columns = {name: table.column(f"{LABEL_COLUMN}{name}") for name in names}  # type: ignore[union-attr]
    return {name: labels_of_texts(column) for name, column in columns.items() if column is not None}


def labels_of_texts(texts: StringTable) -> Labels:
    """The classification that gives row i the class ``texts[i]``; "": not known."""
    numbers = alike(texts)
    first_rows = np.unique(numbers, return_index=True)[1]
    is_class = texts.has_text[first_rows]
    class_of_number = np.where(is_class, is_class.cumsum() - 1, -1)
    names = texts.take(first_rows[is_class])
    return Labels(torch.from_numpy(class_of_number[numbers]), tuple(names))


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
    identity = rows.identity
    order, starts = identity.rows_by_picture
    names: Sequence[str] = [str(number) for number in range(len(rows))]
    if rows.keys is not None:
        names = identity.names(identity.first_rows)
    return ClassRows(rows, dict(zip(names, np.split(order, starts[1:-1]), strict=True)))


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
    own_labels = {LABEL: read_labels(labels, len(images))} if labels else {}
    return FeaturePairs(spec, images, texts, {**_table_labels(table), **own_labels})


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
        DataError: a row of the pairs holds NaN or infinity, or image rows with one key differ.
    """
    pairs, positions = origin(dataset, np.arange(len(dataset)))
    assert isinstance(pairs, FeaturePairs)
    times = np.bincount(positions, minlength=len(pairs))[pairs.identity.picture]  # of each row
    is_first = np.zeros(len(pairs.images), bool)
    is_first[pairs.identity.first_rows] = True
    image, pictures = _weighted_sum(pairs.images, times * is_first)
    sums = [_weighted_sum(texts, times) for texts in pairs.texts]
    check_finite(dataset)
    return Means(
        image=torch.from_numpy(image / pictures).float(),
        text=torch.from_numpy(sum(s for s, _ in sums) / sum(n for _, n in sums)).float(),
    )


def _weighted_sum(rows: FeatureRows, times: np.ndarray) -> tuple[np.ndarray, int]:
    """The sum [D] of rows, each so many times, int64 [N], and the number of them."""
    total = np.zeros(rows.shape[1])
    for first, block in rows.look_over():
        for start in range(0, len(block), SUMMED):
            part = _tensor(block[start : start + SUMMED])
            weights = torch.from_numpy(times[first + start : first + start + len(part)])
            total += (part[weights > 0].double() * weights[weights > 0, None]).sum(0).numpy()
    return total, int(times.sum())


def check_finite(dataset: PairDataset) -> None:
    """DataError if a row of these pairs holds NaN or infinity; reads the rows unless they were."""
    pairs, positions = origin(dataset, np.arange(len(dataset)))
    assert isinstance(pairs, FeaturePairs)
    is_asked = np.zeros(len(pairs), bool)
    is_asked[positions] = True
    identity = pairs.identity
    for side, what in ((pairs.images, "picture"), *((texts, "caption") for texts in pairs.texts)):
        bad = side.not_finite()
        bad = bad[is_asked[identity.picture[bad]]]
        if what == "picture":
            bad = bad[np.isin(bad, identity.first_rows)]
        if len(bad):
            key = pairs.keys[int(identity.picture[bad[0]])]
            raise DataError(
                f"{printable(pairs.name)}: expected finite features, got NaN or infinity in the "
                f"row of the {what} of {printable(key)!r}; encode it again, or leave it out of the "
                "files"
            )
