"""The one place that knows about ranks: who this process is, and what ranks do together.

Everything here works in one process too, where it does nothing.
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from protoclip.launchers import Place

Result = TypeVar("Result")
Group = dist.ProcessGroup | None
# torch 2.13 gives them new names, and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return world_size() > 1


def rank() -> int:
    """This process's number, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_ranks() -> Group:
    """The group of all ranks; None for a process alone."""
    return dist.group.WORLD if is_distributed() else None


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch (weights, dropout; every device), NumPy and Python.

    The same on every rank. protoclip draws from torch's alone; a model or a transform of somebody
    else's may draw from the others, and a checkpoint holds all three.
    """
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator(*stream: int) -> torch.Generator:
    """A CPU generator for one purpose: equal ``stream`` numbers give equal draws on every rank.

    Streams are (seed, purpose, position), so that no draw depends on how many were made before it.
    """
    state = 0
    for number in stream:
        # A multiply-and-add over the odd constant of splitmix64 keeps (1, 2) and (2, 1) apart.
        state = (state * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return torch.Generator().manual_seed(state)


def hosts_store(place: Place) -> bool:
    """Whether the store of all processes is in this one, and not in a launcher's."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def open_store(place: Place, name: str, timeout: float = 300.0) -> dist.Store:
    """A new connection to the store of all processes, for keys of one purpose.

    Raises:
        ValueError: there is none within ``timeout`` seconds, or its port is taken.
    """
    host, port = place.master
    try:
        store = dist.TCPStore(
            host,
            port,
            place.world_size,
            is_master=hosts_store(place),
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout),
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise ValueError(
            f"distributed: rank {place.rank} of {place.world_size} cannot meet the others at "
            f"{host}:{port} ({str(error).splitlines()[0]}); start all ranks, or set MASTER_ADDR to "
            "the machine of rank 0 and MASTER_PORT to a free port there"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"protoclip/{attempt}/{name}", store)


def start(place: Place, device: torch.device, timeout: float, backend: str = "auto") -> None:
    """Join the other processes; nothing to do alone.

    Args:
        device: of this process: NCCL for CUDA (and gloo for CPU tensors), gloo for the CPU.
        timeout: seconds a rank waits for another in a collective.
        backend: "auto", "nccl" or "gloo".
    """
    if place.world_size == 1:
        return
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl":
        backend = "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=open_store(place, "group"),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def stop() -> None:
    """Leave the other processes; can be called twice."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def from_main(make: Callable[[], Result]) -> Result:
    """What ``make`` returns on rank 0 (picklable), on every rank; its ValueError too."""
    if not is_distributed():
        return make()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_objects(value: Result) -> list[Result]:
    """Every rank's value (picklable, small), in rank order, on rank 0; [] on the others."""
    if not is_distributed():
        return [value]
    found: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, found)
    return found or []


def own_slice(total: int, number: int | None = None) -> slice:
    """Which of ``total`` rows are this rank's, or those of rank ``number``: contiguous, sizes
    differ by one at most."""
    number, ranks = rank() if number is None else number, world_size()
    return slice(total * number // ranks, total * (number + 1) // ranks)


def gather_slices(rows: Tensor, total: int) -> Tensor:
    """The whole [total, ...] of which this rank holds its ``own_slice`` rows, on every rank."""
    if not is_distributed():
        return rows
    ranks = world_size()
    padded = rows.new_zeros((-(-total // ranks), *rows.shape[1:]))
    padded[: len(rows)] = rows
    every = gather_rows(padded).unflatten(0, (ranks, len(padded)))
    slices = [own_slice(total, number) for number in range(ranks)]
    return torch.cat([part[: s.stop - s.start] for part, s in zip(every, slices, strict=True)])


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """[B, ...] of each rank -> [W * B, ...], in rank order; no gradient."""
    every = rows.new_empty((dist.get_world_size(group) * len(rows), *rows.shape[1:]))
    _all_gather(every, rows.detach().contiguous(), group=group)
    return every


def scatter_sums(rows: Tensor, group: Group = None) -> Tensor:
    """[W * B, ...] of each rank -> this rank's [B, ...] of their sum over ranks."""
    own = rows.new_empty((len(rows) // dist.get_world_size(group), *rows.shape[1:]))
    _reduce_scatter(own, rows.contiguous(), group=group)
    return own


def exchange_rows(rows: Tensor, wanted: list[Tensor]) -> Tensor:
    """Move rows between ranks: [N, D] of each -> [M, D], the rows ``wanted[r]`` of rank r, by r.

    Args:
        rows: this rank's.
        wanted: for each rank, its own rows' numbers that go to rank r: int64 [m_r].
    """
    counts = torch.tensor([len(part) for part in wanted], device=rows.device)
    taken = gather_rows(counts).view(len(wanted), -1)[:, rank()].tolist()
    given = rows[torch.cat(wanted)]
    out = rows.new_empty(sum(taken), *rows.shape[1:])
    dist.all_to_all_single(out, given, taken, counts.tolist())
    return out


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum in place; no gradient."""
    if is_distributed():
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean in place; no gradient."""
    return sum_over_ranks(values).div_(world_size())


def max_over_ranks(values: Tensor) -> Tensor:
    """Maximum in place; no gradient."""
    if is_distributed():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


class Agreement:
    """What any rank wishes, known to all at the same step.

    The ranks' wishes travel while the next step is computed, so with several ranks the answer is
    that of the step before, and no rank waits for it.
    """

    def __init__(self) -> None:
        self._votes: Tensor | None = None
        self._sent: Any = None

    def ask(self, *wishes: float) -> list[float]:
        """The largest of each wish over the ranks; a collective call."""
        if not is_distributed():
            return list(wishes)
        answer = self.settle() or [0.0] * len(wishes)
        self._votes = torch.tensor(wishes, dtype=torch.float32)
        self._sent = dist.all_reduce(self._votes, dist.ReduceOp.MAX, async_op=True)
        return answer

    def settle(self) -> list[float]:
        """The answer to the last question, as of now; [] without one."""
        if self._votes is None:
            return []
        self._sent.wait()
        answer, self._votes = self._votes.tolist(), None
        return answer


def broadcast(*tensors: Tensor) -> None:
    """Rank 0's values for every rank, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return scatter_sums(grad)


def gathered_rows(rows: Tensor) -> Tensor:
    """[B, D] of each rank -> [W * B, D], with the gradient of the sum of all ranks' losses."""
    return _Gather.apply(rows) if is_distributed() else rows


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return mean_over_ranks(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return mean_over_ranks(grad.clone())


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all ranks, which must have equally many.

    torch's SyncBatchNorm runs on GPUs only. Gradients are those of the sum of all ranks' losses.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not is_distributed():
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        mean = _Mean.apply(x.mean(dim=0))
        centred = x - mean
        variance = _Mean.apply(centred.square().mean(dim=0))
        self._track(mean.detach(), variance.detach(), len(x) * world_size())
        y = centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
