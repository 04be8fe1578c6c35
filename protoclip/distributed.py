"""Ranks: who this process is, and what the processes of a run do together.

With one process everything here does nothing. The launcher handles a rank that dies (torchrun
names it and ends the others); the process group's timeout handles one that hangs.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import io
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protoclip.common.files import DISK_FULL, printable_lines
from protoclip.common.signals import Signals, Stopped, name_of
from protoclip.common.waits import speaking

Result = TypeVar("Result")
Group = dist.ProcessGroup | None
# torch 2.13 gives these functions new names and warns about the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
PIECE = 2**26  # bytes of rows that one call sends
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    # The variables of the job step, not the allocation: plain python in a batch script is alone.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


class RankInfo(NamedTuple):
    """A process among those that a launcher started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on its machine: the number of its GPU
    master: tuple[str, int] = ("127.0.0.1", 0)  # where the processes meet


def find_rank(env: Mapping[str, str] = os.environ) -> RankInfo:
    """This process's rank, from the variables of torchrun, srun or mpirun; without them it is
    alone. ValueError if the variables contradict each other."""
    for by_rank, by_size, by_local in LAUNCHERS:
        if by_rank in env and by_size in env:
            number, size, local = (int(env.get(name, 0)) for name in (by_rank, by_size, by_local))
            if not 0 <= number < size:
                raise ValueError(
                    f"distributed: expected 0 <= {by_rank} < {by_size}, got {number} and {size}; "
                    "start the processes with torchrun or srun"
                )
            return RankInfo(number, size, local, _master(env, size))
    return RankInfo()


def _master(env: Mapping[str, str], ranks: int) -> tuple[str, int]:
    """Host and port of rank 0."""
    if "MASTER_ADDR" not in env and int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", ranks)) < ranks:
        raise ValueError(
            "mpirun does not say which machine has rank 0; give mpirun -x MASTER_ADDR=HOST with "
            "the first machine's name"
        )
    # "gpu[03-05,9],big1" -> gpu03
    nodes = env.get("SLURM_STEP_NODELIST", "127.0.0.1")
    first = re.sub(r"^([^,\[]+)(?:\[([^\],-]+))?.*", r"\1\2", nodes)
    # A separate port for each job, below the range of outgoing connections.
    job = env.get("SLURM_JOB_ID") or env.get("PMIX_NAMESPACE", "")
    numbers = (re.sub(r"\D", "", text) for text in (job, env.get("SLURM_STEP_ID", "")))
    port = 20000 + sum(int(number or 0) for number in numbers) % 12000
    return env.get("MASTER_ADDR", first), int(env.get("MASTER_PORT", port))


_starts = itertools.count()  # of this process, as of all others


def start(info: RankInfo, device: torch.device, timeout: float, backend: str = "auto") -> bool:
    """Join the other processes; returns False for a single process, and where they have joined.

    ``backend`` is "nccl", "gloo", or "auto": NCCL for CUDA tensors, gloo for CPU tensors. A
    rank that waits ``timeout`` seconds for another in a collective call fails.

    Raises:
        ValueError: the processes cannot meet.
    """
    if info.world_size == 1 or dist.is_initialized():
        return False
    if backend == "nccl" or (backend == "auto" and device.type == "cuda"):
        backend = "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    host, port = info.master
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    wait = datetime.timedelta(seconds=timeout)
    try:
        meeting = dist.rendezvous("env://", info.rank, info.world_size, timeout=wait)
        # The store outlives the group: a second run of the process must not read old addresses.
        store = dist.PrefixStore(f"start {next(_starts)}", next(iter(meeting))[0])
        dist.init_process_group(
            "gloo" if backend == "auto" else backend,
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            timeout=wait,
        )
    except RuntimeError as error:
        raise ValueError(
            f"distributed: rank {info.rank} of {info.world_size} cannot connect to the others at "
            f"{host}:{port} ({str(error).splitlines()[0]}); start all ranks, or set MASTER_ADDR to "
            "the machine of rank 0 and MASTER_PORT to a free port there"
        ) from error
    return True


# Kept until the process ends: as the last owner of a gloo group, DDP would wait for gloo's threads
# while it holds Python's lock, and a thread that frees its last work needs that lock.
_ended_groups: list[Any] = []
atexit.register(_ended_groups.clear)


def stop() -> None:
    """Leave the other processes; can be called twice."""
    if dist.is_initialized():
        _ended_groups.append(dist.group.WORLD)
        dist.destroy_process_group()


def run_command(work: Callable[[], int | None], name: str) -> int:
    """Do a command's work on this rank and return the exit code.

    ValueError and OSError are the user's mistakes: one sentence, printed once for all ranks, and
    code 2. A signal that ended the work gives 128 and its number. Any other error keeps its
    traceback and Python's code 1.
    """
    signals = Signals()
    try:
        with signals, speaking(name, quiet=lambda: rank() > 0 or find_rank().rank > 0):
            code = work()
    except BaseException as error:
        try:
            return _code_of(error, signals.received, name)
        finally:
            _leave_after_error()
    stop()
    return code or 0


def _code_of(error: BaseException, received: int, name: str) -> int:
    """Say what went wrong and return the exit code; raises an error that is not the user's.
    ``received``: the signal that came before the error, which may be torch's own word for it."""
    if isinstance(error, Stopped):
        _say_once(f"{name}: {printable_lines(error.message)}")
        return error.code
    if isinstance(error, KeyboardInterrupt):
        received = getattr(error, "number", signal.SIGINT)
    if received:
        _say_once(f"{name}: interrupted by {name_of(received)}")
        return 128 + received
    if not isinstance(error, (ValueError, OSError)):
        raise error
    text = str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        text = f"{error.filename}: {error.strerror}; free some space and start again"
    _say_once(f"{name}: error: {printable_lines(text)}")
    return 2


def _leave_after_error() -> None:
    """Leave the other processes unless that could wait for some that are gone: torch first lets
    NCCL's work finish (pytorch/pytorch#141510); there the end of the process has to do."""
    if dist.is_initialized() and "nccl" not in dist.get_backend_config():
        stop()


def _say_once(text: str) -> None:
    """Print a message once, although several ranks may have it."""
    try:
        alone = not dist.is_initialized()
        first = alone or dist.distributed_c10d._get_default_store().add("said", 1) == 1
    except RuntimeError:  # rank 0 held the store; it has printed and exited
        first = False
    if first:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_beside_main(info: RankInfo) -> Iterator[None]:
    """Let only rank 0 print what every rank would print: --help, an error about a flag."""
    if info.rank == 0:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            yield
        except ValueError:
            raise SystemExit(2) from None


def is_distributed() -> bool:
    """Whether several processes train together."""
    return world_size() > 1


def all_ranks() -> Group:
    """The group of all processes that train together; None for a single one."""
    return dist.group.WORLD if is_distributed() else None


def group_named(name: str) -> dist.ProcessGroup:
    """The group of a ``group_name``, which a schema of an op can hold."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # newer torch has a type of names
    return resolve(name)


# ``group`` of the functions below: None is all processes, as in torch.distributed.


def rank(group: Group = None) -> int:
    """This process's number in the group, 0 without torch.distributed."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world_size(group: Group = None) -> int:
    """How many processes a group has, 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def from_main(make: Callable[[], Result]) -> Result:
    """Call ``make`` on rank 0; return its (picklable) result or raise its error on every rank."""
    if not is_distributed():
        return make()
    box: list[Any] = [None]
    if is_main():
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[0] = error
    wait_for_main()
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def wait_for_main() -> None:
    """Wait until rank 0 comes here too, however long its work takes: a collective call would fail
    after ``timeout`` seconds."""
    if not is_distributed():
        return
    store = dist.distributed_c10d._get_default_store()
    key = f"main {next(_waits)}"
    if is_main():
        store.set(key, "here")
    pause = 0.001
    while not store.check([key]):  # by Python, which signals can interrupt
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


_waits = itertools.count()  # of this process, as of all others


def rows_from_main(
    make: Callable[[], tuple[Tensor | None, Result]],
) -> tuple[Tensor | None, Result]:
    """As ``from_main``, for what comes with rows [N, d] on the CPU, or with None. The rows may be
    many: they are sent in pieces, and a rank holds them once."""
    rows: Tensor | None = None

    def describe() -> tuple[tuple[torch.Size, torch.dtype] | None, Result]:
        nonlocal rows
        rows, result = make()
        return None if rows is None else (rows.shape, rows.dtype), result

    form, result = from_main(describe)
    if form is not None and is_distributed():
        rows = torch.empty(form[0], dtype=form[1]) if rows is None else rows.contiguous()
        bytes_each = rows.element_size() * max(1, rows.shape[1])
        broadcast(*rows.split(max(1, PIECE // bytes_each)))
    return rows, result


def gather_objects(value: Result) -> list[Result]:
    """Every rank's value (picklable, small), in rank order."""
    values: list[Any] = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def own_slice(total: int) -> slice:
    """This rank's contiguous slice of ``total`` rows; sizes differ by at most one."""
    start = total * rank() // world_size()
    stop = total * (rank() + 1) // world_size()
    return slice(start, stop)


def gather_rows(rows: Tensor, group: Group = None) -> Tensor:
    """[B, ...] of each rank -> [W * B, ...], in rank order; no gradient."""
    all_rows = rows.new_empty((world_size(group) * len(rows), *rows.shape[1:]))
    _all_gather(all_rows, rows.detach().contiguous(), group=group)
    return all_rows


def exchange_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """Send each rank its part of ``rows`` [M, ...]; a collective call.

    ``counts``, int64 [W] on the CPU: the first ``counts[0]`` rows go to rank 0, the next
    ``counts[1]`` to rank 1, and so on. Returns the rows received, in the order of the senders.
    """
    if not is_distributed():
        return rows
    sent = [int(count) for count in counts]
    of_all_ranks = gather_rows(counts.to(rows.device)[None]).tolist()  # [sender][receiver]
    received = [by_receiver[rank()] for by_receiver in of_all_ranks]
    result = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(result, rows.contiguous(), received, sent)
    return result


def receive(rows: Tensor, sender: int) -> None:
    """Fill ``rows``, a contiguous CPU tensor, with what rank ``sender`` sends to this one."""
    dist.recv(rows, sender)


def send(rows: Tensor, receiver: int) -> None:
    """Send rows to a rank that calls ``receive``; through the CPU."""
    dist.send(rows.cpu().contiguous(), receiver)


_compared_rows: dict[tuple[str, str], int] = {}  # (op, name of the group) -> of its last call


def check_equal_rows(op: str, rows: Tensor, group: Group = None) -> None:
    """ValueError if the ranks hold different numbers of rows: in a gather, gloo would abort the
    process, and NCCL would wait forever. Every call gathers the numbers, so that all ranks are in
    the same collective call. On a CPU every rank reads them; on a GPU, where that waits for the
    device, only a rank whose own number has changed, and the launcher ends the others."""
    if world_size(group) == 1 or torch.compiler.is_compiling():
        return
    all_processes: Any = dist.group.WORLD
    call = (op, (group or all_processes).group_name)
    counts = gather_rows(torch.full((1,), len(rows), device=rows.device), group)
    if not _reading_is_free(rows) and _compared_rows.get(call) == len(rows):
        return
    sizes = counts.tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{op}: expected as many rows on every rank, got {', '.join(map(str, sizes))} on ranks "
            f"0 to {len(sizes) - 1}; give the ranks equal batches, without an incomplete last one "
            "(drop_last=True)"
        )
    _compared_rows[call] = len(rows)


def _reading_is_free(rows: Tensor) -> bool:
    return rows.device.type == "cpu"


def scatter_sums(rows: Tensor, group: Group = None) -> Tensor:
    """[W * B, ...] of each rank -> this rank's [B, ...] of their sum over ranks."""
    # Sum in fp32: bf16's rounding would grow with the number of ranks.
    terms = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
    sums = terms.new_empty((len(rows) // world_size(group), *rows.shape[1:]))
    _reduce_scatter(sums, terms, group=group)
    return sums.to(rows.dtype)


def sum_over_ranks(values: Tensor, group: Group = None) -> Tensor:
    """Sum in place; no gradient."""
    if world_size(group) > 1:
        dist.all_reduce(values, group=group)
    return values


def mean_over_ranks(values: Tensor, group: Group = None) -> Tensor:
    """Mean in place; no gradient."""
    return sum_over_ranks(values, group).div_(world_size(group))


def max_over_ranks(values: Tensor, group: Group = None) -> Tensor:
    """Maximum in place; no gradient."""
    if world_size(group) > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def max_later(values: Tensor) -> Callable[[], Tensor]:
    """Start to take the maximum over ranks in place; call the result to wait for it."""
    if not is_distributed():
        return lambda: values
    work: Any = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return values

    return wait


def broadcast(*tensors: Tensor) -> None:
    """Copy rank 0's values to every rank, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter_sums(grad, ctx.group), None


def gathered_rows(rows: Tensor, group: Group = None) -> Tensor:
    """[B, D] of each rank -> [W * B, D], with the gradient of the sum of all ranks' losses."""
    return _Gather.apply(rows, group) if world_size(group) > 1 else rows


def pass_on(rows: Tensor, group: Group = None) -> Callable[[], Tensor]:
    """Start sending rows to the previous rank; call the result to wait for the next rank's."""
    ranks = world_size(group)
    before, after = (rank(group) - 1) % ranks, (rank(group) + 1) % ranks
    sent = rows.contiguous()
    received = torch.empty_like(sent)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=group, group_peer=before),
            dist.P2POp(dist.irecv, received, group=group, group_peer=after),
        ]
    )

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all ranks; every rank must have the same number.

    torch's SyncBatchNorm runs on GPUs only. Gradients are those of the sum of all ranks' losses.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not is_distributed():
            return super().forward(input)
        x = input if input.dtype == torch.float64 else input.float()
        mean = gathered_rows(x.mean(dim=0, keepdim=True)).mean(dim=0)
        centred = x - mean
        variance = gathered_rows(centred.square().mean(dim=0, keepdim=True)).mean(dim=0)
        count = len(x) * world_size()
        statistics: Any = self  # torch types its running statistics as optional
        with torch.no_grad():
            statistics.num_batches_tracked += 1
            statistics.running_mean.lerp_(mean, self.momentum)
            statistics.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        y = centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return y.to(input.dtype)
