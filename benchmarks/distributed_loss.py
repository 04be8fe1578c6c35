"""InfoNCE over ranks beside OpenCLIP's local_loss + gather_with_grad: parity, memory, time.

``torchrun --nproc-per-node 4 -m benchmarks.distributed_loss``: gloo ranks on this machine, one
thread each. Peak memory is the growth of the process over loss and gradients; time is that of the
slowest rank. Variants alternate; minima are shown.
"""

import argparse
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss

import protoclip
from benchmarks.harness import peak_mib
from protoclip import distributed


def measure(loss, inputs):
    """Seconds of the slowest rank, most MiB of growth, and loss and gradients of one pass."""
    leaves, found = [t.clone().requires_grad_() for t in inputs], []

    def run():
        dist.barrier()
        start = time.perf_counter()
        found.append(loss(*leaves))
        found[0].backward()
        found.append(time.perf_counter() - start)

    grown = peak_mib(run)
    worst = torch.tensor([found[1], grown], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst, [found[0].detach(), *(t.grad for t in leaves[:2])]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16384, help="global")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.start(distributed.find_rank(), torch.device("cpu"), 600.0)
    rank, ranks = distributed.rank(), distributed.world_size()
    torch.manual_seed(rank)
    dtype = getattr(torch, options.dtype)
    x = F.normalize(torch.randn(options.batch // ranks, options.dim), dim=-1)
    y = F.normalize(x + 0.5 * torch.randn_like(x), dim=-1)
    inputs = x.to(dtype), y.to(dtype), torch.tensor(50.0)
    flags = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": ranks}
    variants = {"protoclip": protoclip.ClipLoss(**flags), "open_clip": ClipLoss(**flags)}
    best, found = {}, {}
    for _ in range(options.rounds):
        for name, loss in variants.items():
            worst, found[name] = measure(loss, inputs)
            best[name] = worst.minimum(best.get(name, worst))
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found.values(), strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    if rank == 0:
        for name, (seconds, grown) in best.items():
            print(f"{name:<10} {seconds:7.2f} s  {grown:8.1f} MiB a rank")
    distributed.stop()


if __name__ == "__main__":
    main()
