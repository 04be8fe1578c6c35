"""A file of features, or a part of many: where its rows are, and how they are read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from protoclip.common.files import DataError, printable, state_of
from protoclip.common.json_text import parse_json

SUFFIXES = (".npy", ".npz", ".safetensors")
WINDOW_BYTES = 32 << 20  # of a file that is mapped at once while scattered rows are gathered
# Types of safetensors that NumPy has; the others are loaded whole by torch.
SAFETENSORS_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """Rows [N, D] in a file."""

    path: Path
    state: tuple[int, int]  # of the file when it was opened
    offset: int  # of the first row, in bytes
    shape: tuple[int, int]
    stored_dtype: np.dtype  # of either byte order
    loaded: np.ndarray | None = None  # [N, D], if the file does not hold its rows one by one

    @property
    def dtype(self) -> np.dtype:
        return self.stored_dtype.newbyteorder("=")

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Read rows ``start`` to ``stop`` into ``out`` [stop - start, D], which is contiguous."""
        if self.loaded is not None:
            out[:] = self.loaded[start:stop]
            return
        buffer = out.view(np.uint8).reshape(-1).data
        row_bytes = self.shape[1] * self.stored_dtype.itemsize
        position = self.offset + start * row_bytes
        with self._open() as file:
            while buffer:  # one call reads at most 2 GiB
                count = os.preadv(file.fileno(), [buffer], position)
                if not count:
                    raise self._changed()
                buffer = buffer[count:]
                position += count
        if not self.stored_dtype.isnative:
            out.byteswap(inplace=True)

    def gather(self, positions: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Copy the rows at ``positions``, int64 [M] and sorted, to ``out[places]``.

        A window of the file is mapped at a time: one read for each row would cost more, and a map
        of the whole file could become resident as a whole.
        """
        if self.loaded is not None:
            out[places] = self.loaded[positions]
            return
        columns = self.shape[1]
        row_bytes = columns * self.stored_dtype.itemsize
        rows_in_window = max(1, WINDOW_BYTES // row_bytes)
        window_of = positions // rows_in_window
        boundaries = np.flatnonzero(np.diff(window_of)) + 1
        with self._open() as file:
            for chosen in np.split(np.arange(len(positions)), boundaries):
                first = int(positions[chosen[0]])
                window = np.memmap(
                    file,
                    dtype=self.stored_dtype,
                    mode="r",
                    offset=self.offset + first * row_bytes,
                    shape=(int(positions[chosen[-1]]) - first + 1, columns),
                )
                out[places[chosen]] = window[positions[chosen] - first]
                del window  # else two are mapped at once

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb", buffering=0) as file:
                if state_of(file.fileno()) != self.state:
                    raise self._changed()
                yield file
        except OSError as error:
            reason = f"{error.strerror}; restore the file and start again"
            raise DataError(f"{printable(str(self.path))}: {reason}") from error

    def _changed(self) -> DataError:
        return DataError(
            f"{printable(str(self.path))}: the file has changed since it was opened; start again"
        )


def in_order(files: Sequence[Path], is_pattern: bool = False) -> list[Path]:
    """Files in the order of all the numbers in their names: a_2 before a_10.

    Args:
        is_pattern: a pattern chose the files, so they need not be all that "-of-N" in their names
            promises.
    Raises:
        DataError: one of numbered files has no number, the names differ only in one number and one
            is missing or occurs twice, or there are not N files of "-of-N".
    """
    ordered = sorted(files, key=_natural)
    names = [_numbers_of(file) for file in ordered]
    numbered = [file for file, (_, numbers) in zip(ordered, names, strict=True) if numbers]
    for file, (_, numbers) in zip(ordered, names, strict=True):
        if numbered and not numbers:
            pattern = re.sub(r"\d+", "*", numbered[0].name)
            raise DataError(
                f"{printable(str(file))}: expected a number in its name, as {numbered[0].name} "
                f'has; move it away, or choose the parts by a pattern, such as "{pattern}"'
            )
    differing = _differing(names)
    for before, number, file in zip(names, names[1:], ordered[1:], strict=False):
        problem = ""
        if number == before:
            problem = "its number occurs twice"
        elif len(differing) == 1 and number[1][differing[0]] != before[1][differing[0]] + 1:
            problem = f"number {before[1][differing[0]] + 1} is missing before it"
        if problem:
            raise DataError(f"{printable(str(file))}: {problem}; copy or write the parts again")
    promised = [int(count) for file in ordered for count in re.findall(r"-of-(\d+)", file.name)]
    if promised and not is_pattern and set(promised) != {len(ordered)}:
        raise DataError(
            f"{printable(str(ordered[-1]))}: expected {max(promised)} parts by its name, found "
            f"{len(ordered)}; copy or write the missing ones again"
        )
    return ordered


def part_numbers(files: Sequence[Path]) -> list[tuple[int, ...]]:
    """What tells parts from each other: the numbers that differ between their names; of a single
    file the last."""
    names = [_numbers_of(file) for file in files]
    differing = _differing(names)
    if differing or len({texts for texts, _ in names}) > 1:
        return [tuple(numbers[i] for i in differing) or numbers for _, numbers in names]
    return [numbers[-1:] for _, numbers in names]


def _numbers_of(file: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The texts of a name around its numbers, and the numbers without that of "-of-N"."""
    words = re.split(r"(\d+)", re.sub(r"-of-\d+", "-of-", file.name))
    return tuple(words[::2]), tuple(map(int, words[1::2]))


def _differing(names: Sequence[tuple[tuple[str, ...], tuple[int, ...]]]) -> list[int]:
    """The places of the numbers that differ between names of the same texts; else none."""
    if len({texts for texts, _ in names}) != 1:
        return []
    columns = zip(*(numbers for _, numbers in names), strict=True)
    return [place for place, column in enumerate(columns) if len(set(column)) > 1]


def _natural(file: Path) -> list[tuple[int, int, str]]:
    words = re.split(r"(\d+)", file.name)
    return [(1, int(word), "") if word.isdecimal() else (0, 0, word) for word in words]


def open_part(path: Path) -> Part:
    """The rows of a .npy, .npz or .safetensors file, of which only the header is read.

    Rows that are not stored one after the other (Fortran order, a compressed .npz) are loaded.

    Raises:
        DataError: the file cannot be read, is cut off, or holds something else.
    """
    openers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
    shown = printable(str(path))
    try:
        return openers[path.suffix](path)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # each format has its own errors
        raise DataError(f"{shown}: cannot be read ({error}); is it complete?") from error


def _open_npy(path: Path) -> Part:
    with open(path, "rb") as file:
        return _part_of_array(path, file, os.fstat(file.fileno()).st_size, "")


def _part_of_array(path: Path, file: BinaryIO, end: int, member: str) -> Part:
    """The part whose .npy header begins where ``file`` is; its rows must lie before ``end``.
    ``member``: the array's name in a .npz."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
    check_numbers(path, shape, dtype)
    rows, columns = shape
    offset = file.tell()
    if offset + rows * columns * dtype.itemsize > end:
        raise _cut_off(path)
    if not is_fortran or rows == 1 or columns == 1:
        return Part(path, state_of(path), offset, (rows, columns), dtype)
    return _loaded(path, member)


def _loaded(path: Path, member: str) -> Part:
    state = state_of(path)
    content = np.load(path, allow_pickle=False)
    if member:
        with content:
            content = content[member]
    check_numbers(path, content.shape, content.dtype)
    return Part(path, state, 0, content.shape, content.dtype, content)


def _open_npz(path: Path) -> Part:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        name = choose_array(list(members))
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            return _loaded(path, name)
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local_header = file.read(30)  # its last four bytes: lengths of the name and of extras
        name_length = int.from_bytes(local_header[26:28], "little")
        extra_length = int.from_bytes(local_header[28:30], "little")
        file.seek(name_length + extra_length, os.SEEK_CUR)
        return _part_of_array(path, file, file.tell() + info.file_size, name)


def _open_safetensors(path: Path) -> Part:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise _cut_off(path)
        tensors = parse_json(file.read(length))
    tensors.pop("__metadata__", None)
    name = choose_array(list(tensors))
    tensor = tensors[name]
    begin, end = tensor["data_offsets"]
    if 8 + length + end > size:
        raise _cut_off(path)
    shape = tuple(tensor["shape"])
    if tensor["dtype"] not in SAFETENSORS_TYPES:
        from safetensors.torch import load_file

        content = load_file(path)[name]
        loaded = content.float().numpy() if content.is_floating_point() else content.numpy()
        check_numbers(path, shape, loaded.dtype)
        return Part(path, state_of(path), 0, loaded.shape, loaded.dtype, loaded)
    dtype = np.dtype(SAFETENSORS_TYPES[tensor["dtype"]])
    check_numbers(path, shape, dtype)
    return Part(path, state_of(path), 8 + length + begin, shape, dtype)


def choose_array(names: list[str]) -> str:
    """The array of features among those of a file: the only one next to keys, or "features"."""
    others = [name for name in names if name != "keys"]
    if "features" in others:
        return "features"
    if len(others) != 1:
        raise ValueError(
            f"expected one array next to keys, or one named 'features', got {sorted(others)}"
        )
    return others[0]


def check_numbers(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """DataError, with what to do, unless an array holds numbers [N, D]."""
    remedy = ""
    if dtype.kind == "O":
        remedy = "it holds Python objects, as of rows of different lengths; save np.stack(rows)"
    elif dtype.kind == "b":
        remedy = "save array.astype(np.uint8)"
    elif dtype.kind == "c":
        remedy = "save np.hstack([array.real, array.imag])"
    elif dtype.kind not in "fiu":
        remedy = "save the numbers alone, as one array"
    elif len(shape) == 1:
        remedy = "save array.reshape(1, -1) if it is one row, array.reshape(-1, 1) if one column"
    elif len(shape) != 2:
        remedy = "save array.reshape(len(array), -1)"
    elif not shape[1]:
        remedy = "there is nothing to read"
    if remedy:
        raise DataError(
            f"{printable(str(path))}: expected numbers [N, D] with D >= 1, got {dtype} "
            f"{json.dumps(list(shape))}; {remedy}"
        )


def _cut_off(path: Path) -> DataError:
    return DataError(
        f"{printable(str(path))}: the file is cut off: it is shorter than its header says; copy or "
        "write it again"
    )
