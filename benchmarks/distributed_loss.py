"""InfoNCE over ranks beside OpenCLIP's local_loss + gather_with_grad: parity, memory, time.

``torchrun --nproc-per-node 4 -m benchmarks.distributed_loss``: gloo ranks on this machine, one
thread each. Peak memory is the growth of the process over loss and gradients; time is that of the
slowest rank. Variants alternate; minima are shown.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

import protoclip
from benchmarks.harness import peak_mib
from protoclip import distributed


class Pass(NamedTuple):
    """Forward and backward of one loss."""

    seconds: float  # of the slowest rank
    grown_mib: float  # of the rank that grew most
    loss: Tensor
    dx: Tensor
    dy: Tensor


def measure(loss: Callable[..., Tensor], x: Tensor, y: Tensor, scale: Tensor) -> Pass:
    x = x.clone().requires_grad_()
    y = y.clone().requires_grad_()
    scale = scale.clone().requires_grad_()
    value = torch.empty(0)
    seconds = 0.0

    def run() -> None:
        nonlocal value, seconds
        dist.barrier()
        began = time.perf_counter()
        value = loss(x, y, scale)
        value.backward()
        seconds = time.perf_counter() - began

    grown = peak_mib(run)
    worst = torch.tensor([seconds, grown], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return Pass(
        seconds=worst[0].item(),
        grown_mib=worst[1].item(),
        loss=value.detach(),
        dx=x.grad,
        dy=y.grad,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16384, help="global")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.start(distributed.find_rank(), torch.device("cpu"), 600.0)
    rank = distributed.rank()
    ranks = distributed.world_size()
    torch.manual_seed(rank)
    dtype = getattr(torch, options.dtype)
    x = F.normalize(torch.randn(options.batch // ranks, options.dim), dim=-1)
    y = F.normalize(x + 0.5 * torch.randn_like(x), dim=-1)
    x = x.to(dtype)
    y = y.to(dtype)
    flags = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": ranks}
    variants = {"protoclip": protoclip.ClipLoss(**flags), "open_clip": ClipLoss(**flags)}
    passes: dict[str, list[Pass]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, loss in variants.items():
            passes[name].append(measure(loss, x, y, torch.tensor(50.0)))
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    ours = passes["protoclip"][-1]
    theirs = passes["open_clip"][-1]
    for result in ("loss", "dx", "dy"):
        expected = getattr(theirs, result)
        error = (getattr(ours, result) - expected).abs().max()
        assert error <= tolerance * expected.abs().max(), result
    if rank == 0:
        for name, rounds in passes.items():
            seconds = min(of_round.seconds for of_round in rounds)
            grown = min(of_round.grown_mib for of_round in rounds)
            print(f"{name:<10} {seconds:7.2f} s  {grown:8.1f} MiB a rank")
    distributed.stop()


if __name__ == "__main__":
    main()
