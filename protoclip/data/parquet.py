"""Pairs in parquet files that hold their pictures, as the datasets library writes them."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from protoclip.common.files import (
    DataError,
    UnavailableError,
    is_remote,
    kind_of,
    local_copy,
    read_file,
)
from protoclip.common.host import lock_free_after_fork, warn_once
from protoclip.common.json_text import parse_json
from protoclip.common.strings import StringTable
from protoclip.data.folders import CLASS_TEMPLATE, LABEL, read_templates
from protoclip.data.images import decode
from protoclip.data.loader import STREAM_BUFFER
from protoclip.data.shards import expand, key_prefixes
from protoclip.data.tables import MAX_CAPTION
from protoclip.data.types import BadSample, Facts, Labels, PairDataset

# What columns are usually called, the first first.
USUAL_NAMES = {
    "picture": ("image", "jpg", "png"),
    "class": ("label", "class"),
    "caption": (
        "caption", "captions", "text", "texts", "title", "description", "sentence", "sentences",
    ),
}  # fmt: skip
STRINGS = ("string", "large_string")  # types of pyarrow
BYTES = ("binary", "large_binary")
TITLE = "title"  # what --csv-caption-key is if nobody says so
PATHS = "filepath"  # the usual name of a column of paths; pictures in the file come before it
CACHE_BYTES = 256 << 20  # of row groups that a process keeps; the window of a shuffle fits in half
logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """The columns of a file that are read."""

    image: str
    caption: str  # "": captions are made from the class
    label: str  # "": no classes
    class_names: tuple[str, ...]


class ParquetDataset(PairDataset):
    """Pictures with captions from parquet files, read one row group at a time.

    A picture is what the datasets library writes (a struct of "bytes" and "path"), bytes, or a
    path; captions are a text or a list of texts, or else the class in each of the templates. Rows
    without a picture or a caption are left out.

    Args:
        spec: files, folders, braces, globs and URLs, joined by "::".
        csv_img_key, csv_caption_key: the columns; without such columns, that of the type Image,
            and the one with a usual name (``USUAL_NAMES``), a ClassLabel, or the only text.
        class_template: of captions that are made from classes; see :func:`read_templates`.
    A shard is a row group here, and those of ``facts.window`` pairs fit in memory.
    """

    def __init__(
        self,
        spec: str,
        *,
        csv_img_key: str = PATHS,
        csv_caption_key: str = TITLE,
        class_template: str = "{}",
    ) -> None:
        self.name = spec
        self.files = expand(spec, ".parquet")
        self.templates = read_templates(class_template, CLASS_TEMPLATE)
        skipped: list[BadSample] = []
        self._groups: list[RowGroup] = []
        self._columns = Columns("", "", "", ())
        keys: list[str] = []
        shard_of: list[int] = []
        rows: list[int] = []
        classes: list[int] = []
        for file, prefix in zip(self.files, key_prefixes(self.files), strict=True):
            path = local_copy(file) if is_remote(file) else file
            schema, metadata = _read_footer(file, path)
            columns = choose_columns(schema, csv_img_key, csv_caption_key, file)
            if self._groups and columns != self._columns:
                raise DataError(
                    f"{self.name}: expected the same columns in all files, got {columns} in "
                    f"{file} and {self._columns} before it"
                )
            self._columns = columns
            first = 0
            for group in _row_groups(metadata, columns.image, file, path):
                for row, label, fault in self._scan(group):
                    if fault:
                        skipped.append(BadSample(file, f"row {first + row}", fault))
                        continue
                    keys.append(f"{prefix}/{first + row}")
                    shard_of.append(len(self._groups))
                    rows.append(row)
                    classes.append(label)
                first += group.rows
                self._groups.append(group)
        if not keys:
            reasons = "".join(f"\n  {file}, {row}: {why}" for file, row, why in skipped[:5])
            raise DataError(f"{self.name}: no row has a picture and a caption{reasons}")
        self.keys: Sequence[str] = StringTable(keys)
        self._shard_of = np.array(shard_of, np.int32)
        self._rows = np.array(rows, np.int64)
        self._classes = Labels(torch.tensor(classes), self._columns.class_names)
        if self._columns.label:
            self.labels: Mapping[str, Labels] = {LABEL: self._classes}
        num_bytes = [group.image_bytes for group in self._groups]
        rows_in_half = CACHE_BYTES // 2 * len(keys) // max(1, sum(num_bytes))
        fits = rows_in_half >= len(keys)
        self.facts = Facts(
            has_captions=bool(self._columns.caption),
            skipped=skipped,
            shard_of=self._shard_of,
            window=0 if fits else min(max(1, rows_in_half), STREAM_BUFFER),
        )
        if max(num_bytes) > CACHE_BYTES:
            warn_once(
                logger,
                f"{self.name}: row groups of up to {max(num_bytes) >> 20:,} MiB, each of which is "
                "read as a whole; write the files with row_group_size=100",
            )

    def __len__(self) -> int:
        return len(self.keys)

    def captions(self, i: int) -> tuple[str, ...]:
        if not self.facts.has_captions:
            name = self._classes.names[int(self._classes.ids[i])]
            return tuple(template.replace("{}", name) for template in self.templates)
        return captions_of(self._value(i, self._columns.caption))

    def container(self, i: int) -> str:
        return self._groups[self._shard_of[i]].file

    def image(self, i: int) -> Image.Image:
        group = self._groups[self._shard_of[i]]
        where = f"{group.file}, {self.keys[i]}"
        try:
            data = picture_of(self._value(i, self._columns.image))
        except DataError:
            raise
        except ValueError as error:  # of the picture, or UnicodeDecodeError of its path
            raise DataError(f"{where}: {error}; replace it or leave the row out") from error
        if isinstance(data, str):
            beside = os.path.join(os.path.dirname(group.path), data)
            path = data if os.path.isfile(data) else beside
            try:
                data = read_file(path)
            except (OSError, ValueError) as error:  # a path with NUL is a ValueError
                reason = getattr(error, "strerror", error)
                raise kind_of(error)(f"{where}: {reason} at {path!r}; fix the path") from error
        return decode(data, where)

    def _value(self, i: int, column: str) -> Any:
        """What pair ``i`` has in a column."""
        group = self._groups[self._shard_of[i]]
        return read_column(group, column)[int(self._rows[i])].as_py()

    def _scan(self, group: RowGroup) -> Iterator[tuple[int, int, str]]:
        """Row, class (-1: not known) and fault, or "", of each row of a group."""
        columns = self._columns
        try:
            captions = read_column(group, columns.caption) if columns.caption else None
            labels = read_column(group, columns.label) if columns.label else None
            # Pictures are looked at only where the file says that some are missing.
            pictures = read_column(group, columns.image) if group.lacks_pictures else None
        except DataError as error:
            yield from ((row, -1, str(error)) for row in range(group.rows))
            return
        for row in range(group.rows):
            label = labels[row].as_py() if labels is not None else None
            if label is None or not 0 <= label < len(columns.class_names):
                label = -1
            fault = ""
            try:
                if captions is not None:
                    captions_of(captions[row].as_py())
                elif label < 0:
                    fault = "the class is not known"
                if pictures is not None:
                    picture_of(pictures[row].as_py())
            except ValueError as error:  # UnicodeDecodeError is one
                fault = str(error)
            yield row, label, fault


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions that are not empty, each cut to ``MAX_CAPTION`` characters."""
    texts = [value] if isinstance(value, str) else value or ()
    captions = tuple(short for text in texts if text and (short := text.strip()[:MAX_CAPTION]))
    if not captions:
        raise ValueError("all captions are empty")
    return captions


def picture_of(value: Any) -> bytes | str:
    """A picture's bytes, or its path."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ValueError("the picture is missing")
    return value


class RowGroup(NamedTuple):
    """A part of a file that is read at once."""

    file: str  # path or URL
    path: str  # on this disk
    size: int  # of the file, in bytes
    number: int  # among those of the file
    rows: int
    image_bytes: int
    lacks_pictures: bool  # or may lack some


def _read_footer(file: str, path: str) -> tuple[Any, Any]:
    """The schema and the metadata of a file, in pyarrow's types."""
    parquet = _pyarrow_parquet()
    try:
        with parquet.ParquetFile(path) as reader:
            return reader.schema_arrow, reader.metadata
    except _damage() as error:
        raise DataError(f"{file}: not a parquet file ({error}); copy it again") from error


def _row_groups(metadata: Any, image: str, file: str, path: str) -> Iterator[RowGroup]:
    size = os.path.getsize(path)
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        leaves = (group.column(j) for j in range(group.num_columns))
        pictures = next(leaf for leaf in leaves if leaf.path_in_schema in (image, f"{image}.bytes"))
        statistics = pictures.statistics
        yield RowGroup(
            file=file,
            path=path,
            size=size,
            number=number,
            rows=group.num_rows,
            image_bytes=pictures.total_uncompressed_size,
            lacks_pictures=statistics is None or statistics.null_count != 0,
        )


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            "parquet files are read by pyarrow, which is missing: pip install -e '.[parquet]'"
        ) from error
    return pyarrow.parquet


def _damage() -> tuple[type[Exception], ...]:
    """What pyarrow raises on damaged files."""
    from pyarrow import ArrowException

    return ArrowException, OSError, ValueError, MemoryError


def choose_columns(schema: Any, csv_img_key: str, csv_caption_key: str, where: str) -> Columns:
    """The columns of pictures, captions and classes: the one with the first of the
    ``USUAL_NAMES``, or the only one.

    Raises:
        DataError: several columns would do, or none.
    """
    features = _features(schema)
    columns: dict[str, list[str]] = {content: [] for content in USUAL_NAMES}
    for field in schema:
        columns.setdefault(_content_of(field.type, features.get(field.name)), []).append(field.name)

    def only(content: str) -> str:
        names = columns[content]
        usual = [name for name in USUAL_NAMES[content] if name in names]
        if usual:
            return usual[0]
        return names[0] if len(names) == 1 else ""

    image = only("picture")
    if csv_img_key in schema.names and (csv_img_key != PATHS or not image):
        image = csv_img_key
    if image in schema.names:
        arrow_type = schema.field(image).type
        if not (_holds_bytes(arrow_type) or str(arrow_type) in STRINGS):
            raise DataError(
                f"{where}: expected bytes, paths or a struct with bytes in {image!r}, got "
                f"{arrow_type}; name the column of pictures with --csv-img-key"
            )
    label = only("class")
    usual = [name for name in USUAL_NAMES["caption"] if name in columns["caption"]]
    caption = "" if label and not usual else only("caption")
    if csv_caption_key in columns["caption"]:
        caption = csv_caption_key
    was_asked_for = caption == csv_caption_key != TITLE
    if len(usual) > 1 and caption in usual and not was_asked_for:
        warn_once(
            logger,
            f"captions come from the column {caption!r} of the parquet files, not from "
            f"{', '.join(name for name in usual if name != caption)}; --csv-caption-key names "
            "another",
        )
    if not image or not (caption or label):
        what = "captions (or a ClassLabel)" if image else "pictures"
        raise DataError(
            f"{where}: expected one column of {what}, got the columns {schema.names}; name it with "
            "--csv-img-key or --csv-caption-key"
        )
    return Columns(image, caption, label, features[label] if label else ())


def _content_of(arrow_type: Any, feature: Any) -> str:
    """What a column may be used for, a key of ``USUAL_NAMES``, or "". ``feature``: its type in the
    datasets library, if that is known."""
    if isinstance(feature, tuple):
        return "class"
    if _holds_bytes(arrow_type):
        return "picture" if feature in (None, "Image") else ""
    while str(arrow_type).startswith(("list<", "large_list<", "dictionary<")):
        arrow_type = arrow_type.value_type
    return "caption" if str(arrow_type) in STRINGS else ""


def _holds_bytes(arrow_type: Any) -> bool:
    is_struct = str(arrow_type).startswith("struct<")
    return str(arrow_type) in BYTES or (is_struct and arrow_type.get_field_index("bytes") >= 0)


def _features(schema: Any) -> dict[str, Any]:
    """The types that the datasets library notes of its columns: "Image", ..., or class names."""
    features: dict[str, Any] = {}
    try:
        noted = parse_json(schema.metadata[b"huggingface"].decode())["info"]["features"]
        for name, feature in noted.items():
            if isinstance(feature, dict):  # lists of a feature are lists
                is_class = feature.get("_type") == "ClassLabel"
                features[name] = tuple(map(str, feature["names"])) if is_class else feature["_type"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # another program wrote the file
    return features


# Shared by all data sets of the process; the oldest are dropped first.
_cache: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
_cache_lock = lock_free_after_fork()


def read_column(group: RowGroup, column: str) -> Any:
    """A column of a row group; the newest ``CACHE_BYTES`` are kept."""
    key = (group.path, group.number, column)
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
        parquet = _pyarrow_parquet()
        try:
            is_same = os.path.getsize(group.path) == group.size
            # Threads of pyarrow's would not survive a fork.
            with parquet.ParquetFile(group.path) as reader:
                table = reader.read_row_group(group.number, columns=[column], use_threads=False)
        except _damage() as error:
            raise kind_of(error)(
                f"{group.file}: row group {group.number} cannot be read ({error}); copy it again"
            ) from error
        if not is_same or table.num_rows != group.rows:
            raise UnavailableError(f"{group.file}: changed while in use; start again")
        values = _cache[key] = table.column(column).combine_chunks()
        while len(_cache) > 1 and sum(column.nbytes for column in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
        return values
