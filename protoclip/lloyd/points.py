"""Points [N, D] as k-means reads them: in memory, or on disk and block by block."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from protoclip.common.digest import Digest
from protoclip.common.waits import Wait
from protoclip.ops import checks

if TYPE_CHECKING:
    from protoclip.features import FeatureRows

Array = np.ndarray[Any, Any]
LARGEST_INTEGER = 2**24  # up to which fp32 holds all integers
BLOCK_BYTES = 32 << 20  # of a block in fp32 or fp64: two or three are in memory
REMEDIES = {  # for arrays of another kind than numbers
    "b": "use .astype(np.float32), which gives 0 and 1",
    "O": "use np.stack(list(points)).astype(np.float32); its rows must be numbers, of one length",
}


def as_points(x: Any) -> Any:
    """A list or array of numbers as a floating-point tensor, which shares the array's memory where
    torch can; integers become fp32, or fp64 where fp32 does not hold them."""
    if isinstance(x, (list, tuple)):
        try:
            x = np.array(x, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"kmeans: expected points, or centroids, as rows of numbers of one length ({error})"
            ) from error
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "fiu":
            remedy = REMEDIES.get(x.dtype.kind, "give numbers, such as features of an encoder")
            raise TypeError(
                "kmeans: expected points, or centroids, as an array of numbers, got one of "
                f"{x.dtype}; {remedy}"
            )
        if min(x.strides, default=0) < 0:  # torch takes none, also where there is one row
            x = x.copy()
        native = x.dtype.newbyteorder("=")
        x = torch.from_numpy(np.require(x, dtype=native, requirements=["C", "W"]))
    if not isinstance(x, Tensor) or x.dtype not in checks.INTEGERS + checks.OTHER_INTEGERS:
        return x
    x = x.double()
    return x if (x.abs() > LARGEST_INTEGER).any() else x.float()


def stored_rows(x: Any) -> FeatureRows | None:
    """The rows on disk that a path, a ``np.memmap`` or ``open_features`` stands for; None if x is
    something else."""
    if isinstance(x, Tensor):
        return None
    from protoclip.features import FeatureRows, open_features

    if isinstance(x, FeatureRows):
        return x
    if isinstance(x, (str, os.PathLike)):
        return open_features(x)
    if isinstance(x, np.memmap):
        return _rows_of_map(x)
    return None


def _rows_of_map(array: np.memmap[Any, Any]) -> FeatureRows | None:
    """Rows that are read from the mapped file: pages of a map would count as memory of the process.
    None where the array is not what the file holds."""
    mapped = getattr(array, "_mmap", None)
    if mapped is None or array.filename is None or array.mode not in ("r", "r+"):
        return None
    has_rows = array.ndim == 2 and array.shape[1] > 0 and array.flags.c_contiguous
    if not has_rows or array.dtype.kind not in "fiu":
        return None
    # A view has the offset of the array that it is a part of.
    start_of_map = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    address_of_map = np.frombuffer(mapped, np.uint8).ctypes.data
    offset = start_of_map + array.ctypes.data - address_of_map
    from protoclip.common.files import state_of
    from protoclip.features.parts import Part
    from protoclip.features.rows import StoredRows

    path = Path(array.filename)
    part = Part(path, state_of(path), offset, array.shape, array.dtype)
    return StoredRows(str(path), [part])


def below_power_of_two(number: int) -> int:
    """The largest power of two up to a number, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


class InMemory:
    """Points in memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x  # [N, D], fp32 or fp64
        self.count, self.columns = x.shape
        self.dtype = x.dtype
        self.device = x.device

    def blocks(self, digest: Digest | None = None) -> Iterator[Tensor]:
        """All of them, which are added to ``digest``."""
        if digest is not None:
            digest.update(self.x)
        yield self.x

    def take(self, index: Tensor) -> Tensor:
        """Points by index [M] -> [M, D]."""
        return self.x[index.to(self.device)]

    def select(self, index: Tensor) -> InMemory:
        return InMemory(self.take(index))

    def minus(self, centre: Tensor) -> InMemory:
        return InMemory(self.x - centre)

    def with_dtype(self, dtype: torch.dtype) -> InMemory:
        return InMemory(self.x.to(dtype))


class OnDisk:
    """Points on disk, of which two or three blocks are in memory while they are read.

    A block has a power of two of rows, so that parts of it, which also are one, are the same
    wherever a block ends.
    """

    def __init__(
        self,
        rows: FeatureRows,
        dtype: torch.dtype,
        device: torch.device,
        centre: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.count, self.columns = rows.shape
        self.dtype = dtype
        self.device = device
        self.centre = centre  # [D], what is subtracted
        self._buffers: tuple[list[Array], Tensor | None] | None = None

    def blocks(self, digest: Digest | None = None) -> Iterator[Tensor]:
        """All points, [at most B, D] at a time and at least one block; a block is valid until the
        next one is asked for. A thread reads one block ahead. ``digest`` is of the stored rows."""
        raw, converted = self._take_buffers()
        step = len(raw[0])
        starts = range(0, max(1, self.count), step)

        def read(number: int) -> Array:
            start = starts[number]
            return self.rows.rows(start, min(self.count, start + step), raw[number % 2])

        try:
            with (
                Wait("reading the rows", self.count, "rows") as wait,
                ThreadPoolExecutor(1, "protoclip-rows") as reader,
            ):
                ahead = reader.submit(read, 0)
                for number in range(len(starts)):
                    stored = ahead.result()
                    if digest is not None:
                        digest.update(stored)
                    block = torch.from_numpy(stored)
                    if number + 1 < len(starts):
                        ahead = reader.submit(read, number + 1)
                    if converted is not None:
                        block = converted[: len(block)].copy_(block)
                    yield self._centred(block.to(self.device))
                    wait.update(len(block))
        finally:
            self._buffers = raw, converted

    def _take_buffers(self) -> tuple[list[Array], Tensor | None]:
        """Two for what is read, and one for the numbers in another dtype. They are kept for the
        next pass; a pass within a pass has its own."""
        buffers, self._buffers = self._buffers, None
        if buffers is not None:
            return buffers
        row_bytes = max(1, self.columns * self.dtype.itemsize)
        most = min(BLOCK_BYTES // row_bytes, 2 * self.count - 1)
        shape = (below_power_of_two(most), self.columns)
        raw = [np.empty(shape, self.rows.dtype) for _ in range(2)]
        is_converted = torch.from_numpy(raw[0]).dtype != self.dtype
        return raw, torch.empty(shape, dtype=self.dtype, device="cpu") if is_converted else None

    def take(self, index: Tensor) -> Tensor:
        """Points by index [M] -> [M, D]."""
        taken = torch.from_numpy(self.rows.take(index.cpu().numpy()))
        return self._centred(taken.to(self.device, self.dtype))

    def _centred(self, x: Tensor) -> Tensor:
        return x if self.centre is None else x.sub_(self.centre)

    def select(self, index: Tensor) -> OnDisk:
        rows = self.rows.select(index.cpu().numpy())
        return OnDisk(rows, self.dtype, self.device, self.centre)

    def minus(self, centre: Tensor) -> OnDisk:
        return OnDisk(self.rows, self.dtype, self.device, centre)

    def with_dtype(self, dtype: torch.dtype) -> OnDisk:
        return OnDisk(self.rows, dtype, self.device, self.centre)

    def loaded(self) -> InMemory:
        return InMemory(torch.cat([block.clone() for block in self.blocks()]))


Points = InMemory | OnDisk


def on_disk(rows: FeatureRows, device: torch.device) -> OnDisk:
    """Rows on disk in the dtype that k-means computes them in; integers in fp64 at first."""
    is_narrow = rows.dtype.kind == "f" and rows.dtype.itemsize <= 4
    return OnDisk(rows, torch.float32 if is_narrow else torch.float64, device)


def open_points(op: str, name: str, points: Any, device: torch.device | str | None) -> Points:
    """Points on disk, which blocks bring to a device, or those of a tensor, an array or a list in
    fp32 or fp64 where they are; errors name the function and its argument."""
    stored = stored_rows(points)
    if stored is not None:
        return on_disk(stored, torch.device(device or "cpu"))
    x = as_points(points)
    checks.matrix(op, name, x, "[N, D]")
    x = x.detach()
    return InMemory(x if x.dtype == torch.float64 else x.float())


def each_row(points: Points, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of the points [M, D], which gives a value for each row: [N]."""
    return torch.cat([f(block) for block in points.blocks()])
