"""Features of the training samples, kept from one visit of a sample to the next.

Prototypes must not label the features that are being trained: the model would choose its own
labels, and all samples would end up in one cluster. So every step's projections are stored, and the
labels of a step come from rows that were stored before it.

The rows of the running episode stay on the rank that computed them, in draw order (the buffer). At
the episode's end they move to the rank that owns the sample's position in the dataset (the table).
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from protoclip.distributed import (
    exchange_rows,
    from_main,
    gather_objects,
    is_distributed,
    is_main,
    rank,
    receive,
    send,
    sum_over_ranks,
    world_size,
)
from protoclip.settings.config import EpisodeConfig

DTYPE = torch.bfloat16  # of stored features; clustering reads them as fp32
NEVER = -1  # the episode of a sample that has no row yet
CHUNK = 1 << 22  # values that travel together, to their owners or to and from a checkpoint
BY_DRAW = ("index", "buffer")  # of a checkpoint's rows; the others are by position
HOST_SHARE = 0.5  # of the free memory that the stores of a machine's ranks may take
DEVICE_SHARE = 0.25
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


@dataclass(frozen=True)
class Features:
    """Features of N distinct samples, fp32, on the model's device."""

    index: Tensor  # int64 [N], position in the dataset
    image_h: Tensor  # [N, Dh], unit rows
    text_h: Tensor  # [N, Dh], unit rows


def stored_bytes(samples: int, drawn: int, ranks: int, dim: int) -> int:
    """Bytes that a rank stores: image and text rows of ``dim`` values, of its share of all samples,
    each with its episode, and of an episode's ``drawn`` samples, each with its position."""
    row = 2 * dim * DTYPE.itemsize
    table = math.ceil(samples / ranks) * (row + torch.int32.itemsize)
    buffer = math.ceil(drawn / ranks) * (row + torch.int64.itemsize)
    return table + buffer


@dataclass(frozen=True)
class FeatureSource:
    """Where an episode's features come from, and why."""

    reuses: bool  # training's own projections, stored; else a forward pass extracts them
    reason: str  # a few words for the log
    table_device: torch.device | None = None  # where the stored rows are, buffer and table


def wants_to_reuse(config: EpisodeConfig, epochs: float) -> bool:
    """Whether features are stored from training, if they fit. In a run of fewer than two
    epochs, hardly any sample is seen again."""
    if config.features == "auto":
        return config.infonce_warmup >= 1 and epochs >= 2
    return config.features == "reuse"


def choose_features(
    config: EpisodeConfig, epochs: float, bytes_of_rank: int, device: torch.device
) -> FeatureSource:
    """Decide between "reuse" and "extract". A collective call; all ranks get the same answer.

    Args:
        epochs: passes over the data, of the whole run.
        bytes_of_rank: of a rank's table and buffer.
        device: where the model is.
    """
    if not wants_to_reuse(config, epochs):
        why = ""
        if config.features == "auto" and config.infonce_warmup >= 1:
            why = f", as the run makes fewer than two passes over the data ({epochs:.3g})"
        return FeatureSource(False, "extracted" + why)
    size = f"{bytes_of_rank / 2**20:,.1f} MiB"
    if world_size() > 1:
        size += " on each rank"
    place = _place_for_table(bytes_of_rank, device)
    if place is None and config.features == "auto":
        return FeatureSource(False, f"extracted, as storing them takes {size}, more than is free")
    return FeatureSource(True, f"stored from training, {size}", place or torch.device("cpu"))


def _place_for_table(needed: int, device: torch.device) -> torch.device | None:
    """Where every rank can keep ``needed`` bytes: the device, else the host, else None."""
    on_device = device.type != "cpu" and needed <= DEVICE_SHARE * free_bytes(device)
    on_host = needed * ranks_here() <= HOST_SHARE * free_bytes(torch.device("cpu"))
    fits = torch.tensor([float(on_device), float(on_host)], device=device)
    on_device, on_host = (sum_over_ranks(fits) == world_size()).tolist()
    if on_device:
        return device
    return torch.device("cpu") if on_host else None


def free_bytes(device: torch.device) -> float:
    """Free memory of a GPU, or the memory available on this machine and within its container's
    limit; inf if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":") for line in lines)
        free = float(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = math.inf
    try:
        limit = float((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = float((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        statistics = dict(line.split() for line in lines)
        used -= float(statistics["inactive_file"])  # files read before, dropped when others need it
    except (OSError, KeyError, ValueError):  # no container, or "max"
        return free
    return min(free, limit - used)


def ranks_here() -> int:
    """Ranks on this machine; a collective call, as not every launcher says so."""
    return gather_objects(platform.node()).count(platform.node())


class FeatureStore:
    """The newest projections of every sample, over all ranks.

    Rank r owns the positions [r ceil(N/W), (r+1) ceil(N/W)) and keeps their rows in bf16,
    2 Dh x 2 bytes a sample. No rank holds the rows of the whole data.

    Args:
        samples: N, of the dataset.
        steps: of the longest episode.
        global_batch_size: of a step, over all ranks.
        device: where features are computed and clustered.
        table_device: where table and buffer are kept; default: ``device``.
    """

    def __init__(
        self,
        samples: int,
        steps: int,
        global_batch_size: int,
        device: torch.device,
        table_device: torch.device | None = None,
    ) -> None:
        self.samples = samples
        self.device = device
        self.table_device = table_device or device
        self.batch_share = global_batch_size // world_size()  # rows of a step on each rank
        self.table_share = math.ceil(samples / world_size())  # positions that a rank owns
        self.first = min(rank() * self.table_share, samples)  # position of this rank's first row
        owned = min(self.table_share, samples - self.first)
        rows = steps * self.batch_share
        self.index = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.dim = 0  # Dh; 0 until the first rows arrive
        self.steps = 0  # of the running episode, in the buffer
        # Image and text.
        self.buffer = torch.empty(rows, 2, 0, dtype=DTYPE, device=self.table_device)
        self.table = torch.empty(owned, 2, 0, dtype=DTYPE, device=self.table_device)
        # The episode in which a position's row was written.
        self.written = torch.full((owned,), NEVER, dtype=torch.int32, device=self.table_device)

    def _allocate(self, dim: int) -> None:
        self.dim = dim
        self.buffer = self.buffer.new_zeros(len(self.index), 2, dim)
        self.table = self.table.new_zeros(len(self.written), 2, dim)

    @torch.no_grad()
    def put(self, step: int, index: Tensor, image_h: Tensor, text_h: Tensor) -> None:
        """Keep this rank's projections, [B, Dh] each, of one step of the episode. ``index`` holds
        the samples' positions, int64 [B]; -1 marks a row that does not count."""
        if not self.dim:
            self._allocate(image_h.shape[1])
        self.steps = step + 1
        rows = slice(step * self.batch_share, step * self.batch_share + len(index))
        self.index[rows] = index
        self.buffer[rows, 0] = image_h.to(DTYPE)
        self.buffer[rows, 1] = text_h.to(DTYPE)

    def end_episode(self, episode: int) -> None:
        """Move the episode's rows to their owners; the last draw of a sample wins. Rows that do not
        count leave older ones alone. A collective call."""
        step_values = max(1, self.batch_share * 2 * self.dim)
        rows_at_once = max(1, CHUNK // step_values) * self.batch_share  # the same on every rank
        for first in range(0, len(self.index), rows_at_once):
            self._move(slice(first, first + rows_at_once), episode)
        self.index.fill_(-1)
        self.steps = 0

    def _move(self, part: slice, episode: int) -> None:
        """Move some of the buffer's steps, which are later than those already moved."""
        filled = (self.index[part] >= 0).nonzero().flatten() + part.start
        positions = self.index[filled]
        step = filled // self.batch_share
        place = filled % self.batch_share
        draws = (step * world_size() + rank()) * self.batch_share + place
        owners, order = (positions // self.table_share).sort(stable=True)
        counts = torch.bincount(owners, minlength=world_size()).cpu()
        pairs = torch.stack([positions, draws], dim=1)[order]
        positions, draws = exchange_rows(pairs, counts).to(self.table_device).unbind(1)
        sent = self.buffer[filled[order].to(self.table_device)].to(self.device)
        rows = exchange_rows(sent, counts).to(self.table_device)
        by_draw = draws.argsort()
        ordered, place_in_draws = positions[by_draw].sort(stable=True)
        newest = torch.ones_like(ordered, dtype=torch.bool)
        newest[:-1] = ordered[1:] != ordered[:-1]
        local = ordered[newest] - self.first
        self.table[local] = rows[by_draw[place_in_draws[newest]]]
        self.written[local] = episode

    def of_episode(self, episode: int) -> Features:
        """The rows that this rank owns and that were written in ``episode``, by position."""
        return self._features((self.written == episode).nonzero().flatten())

    def of_positions(self, positions: Tensor) -> Features:
        """Those of the sorted ``positions`` that this rank owns and has a row of."""
        local = positions.to(self.table_device) - self.first
        local = local[(local >= 0) & (local < len(self.written))]
        return self._features(local[self.written[local] != NEVER])

    def _features(self, local: Tensor) -> Features:
        image_h, text_h = self.table[local].to(self.device).float().unbind(1)
        index = (local + self.first).to(self.device)
        return Features(index, image_h.contiguous(), text_h.contiguous())

    def state_dict(self, folder: Path) -> dict[str, Tensor]:
        """The rows of all ranks, for a checkpoint; a collective call.

        On rank 0: the buffer's steps in draw order and the table by position, the same for any
        number of ranks. Several ranks send their rows in chunks, to files without a name in
        ``folder``, so that rank 0 does not hold them in memory. Elsewhere: nothing.
        """
        local = self._local_rows()
        if not is_distributed():  # torch would save all of the buffer with a part of it
            return local | {name: local[name].clone() for name in BY_DRAW}
        if not is_main():
            for rows in local.values():
                for chunk in _chunks(rows):
                    send(chunk, 0)
            return {}
        state = {}
        for name, rows in local.items():
            state[name] = _file_backed(self._shape_of_all(name), rows.dtype, folder)
            self._share_of(state[name], name, 0).copy_(rows)
            for sender in range(1, world_size()):
                _receive_chunks(self._share_of(state[name], name, sender), sender)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load this rank's share of a ``state_dict`` that any number of ranks wrote. A collective
        call; rank 0 has the state and sends the others their shares.

        Raises:
            ValueError: on every rank, if the state is that of other data or of another batch size.
        """
        dim, self.steps = from_main(lambda: self._checked_sizes(state))
        self._allocate(dim)
        for name, rows in self._local_rows().items():
            if not is_main():
                _receive_chunks(rows, 0)
                continue
            for receiver in range(1, world_size()):
                for chunk in _chunks(self._share_of(state[name], name, receiver)):
                    send(chunk, receiver)
            rows.copy_(self._share_of(state[name], name, 0))

    def _local_rows(self) -> dict[str, Tensor]:
        """This rank's part of a checkpoint: [steps, rows of a step, ...] and [positions, ...]."""
        by_step = (-1, self.batch_share)
        return {
            "index": self.index.unflatten(0, by_step)[: self.steps],
            "buffer": self.buffer.unflatten(0, by_step)[: self.steps],
            "table": self.table,
            "written": self.written,
        }

    def _shape_of_all(self, name: str) -> tuple[int, ...]:
        """The shape of all ranks' rows together."""
        shape = self._local_rows()[name].shape
        if name in BY_DRAW:
            return (shape[0], shape[1] * world_size(), *shape[2:])
        return (self.samples, *shape[1:])

    def _share_of(self, whole: Tensor, name: str, owner: int) -> Tensor:
        """The part of rank ``owner`` in the rows of all ranks."""
        if name in BY_DRAW:
            return whole[:, owner * self.batch_share : (owner + 1) * self.batch_share]
        first = min(owner * self.table_share, self.samples)
        return whole[first : first + self.table_share]

    def _checked_sizes(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """Dh and the number of buffered steps of a state that fits this store."""
        dim = state["table"].shape[-1]
        steps = len(state["index"])
        most = len(self.index) // self.batch_share
        for name in self._local_rows():
            expected = list(self._shape_of_all(name))
            if name in ("buffer", "table"):
                expected[-1] = dim
            if name in BY_DRAW:
                expected[0] = min(steps, most)
            if list(state[name].shape) != expected:
                raise ValueError(
                    f"checkpoint: expected stored features {name} {expected}, got "
                    f"{list(state[name].shape)}; resume with the settings and data of the run"
                )
        return dim, steps


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    """Views of at most CHUNK values or one row, along the first dimension."""
    return iter(rows.split(max(1, CHUNK // max(1, rows[:1].numel()))))


def _receive_chunks(rows: Tensor, sender: int) -> None:
    """Fill ``rows`` with what another rank sends from rows of the same shape."""
    for chunk in _chunks(rows):
        received = torch.empty(chunk.shape, dtype=chunk.dtype)
        receive(received, sender)
        chunk.copy_(received)


def _file_backed(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor in a file without a name, which takes disk instead of memory.

    Raises:
        OSError: the disk is full.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # else a full disk kills the process later
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.truncate(size)
        pages = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(pages).view(dtype).view(shape)
