"""InfoNCE over ranks beside OpenCLIP's local_loss + gather_with_grad: parity, memory, time.

``python benchmarks/distributed_loss.py --ranks 4 --batch 16384``: gloo ranks on this machine, one
thread each. Peak memory is the growth of the process over loss and gradients, with malloc told to
return what is freed; time is that of the slowest rank. Variants alternate; minima are shown.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F


def resident(name: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at its peak."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", text)[1])


def measure(loss, image, text, scale):
    """Seconds of the slowest rank, bytes of growth, loss and gradients of one pass."""
    leaves = [t.clone().requires_grad_() for t in (image, text, scale)]
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.perf_counter()
    value = loss(*leaves)
    value.backward()
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    grown = torch.tensor(float(resident("VmHWM") - before), dtype=torch.float64)
    for number in (seconds, grown):
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return seconds.item(), grown.item(), value.detach(), [t.grad for t in leaves]


def rank(number: int, options: argparse.Namespace, port: int) -> None:
    from open_clip.loss import ClipLoss

    from protoclip.losses import global_info_nce

    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    torch.set_num_threads(1)
    ranks = options.ranks
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=ranks)
    torch.manual_seed(number)
    dtype = getattr(torch, options.dtype)
    x = F.normalize(torch.randn(options.batch // ranks, options.dim), dim=-1)
    y = F.normalize(x + 0.5 * torch.randn_like(x), dim=-1)
    inputs = x.to(dtype), y.to(dtype), torch.tensor(50.0)
    flags = {"local_loss": True, "gather_with_grad": True, "rank": number, "world_size": ranks}
    variants = {"protoclip": global_info_nce, "open_clip": ClipLoss(**flags)}
    best: dict[str, list[float]] = {name: [float("inf")] * 2 for name in variants}
    for _ in range(options.rounds):
        found = {name: measure(loss, *inputs) for name, loss in variants.items()}
        for name, (seconds, grown, *_) in found.items():
            best[name] = [min(best[name][0], seconds), min(best[name][1], grown)]
    (_, _, ours, gradients), (_, _, theirs, others) = found["protoclip"], found["open_clip"]
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours, theirs.float(), rtol=tolerance, atol=1e-5)
    for a, b in zip(gradients[:2], others[:2], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    if number == 0:
        report(options, best)
    dist.destroy_process_group()


def report(options: argparse.Namespace, best: dict[str, list[float]]) -> None:
    for name, (seconds, grown) in best.items():
        print(f"{name:<10} {seconds:7.2f} s  {grown / 2**20:8.1f} MiB a rank")
    (s, m), (s_peer, m_peer) = best["protoclip"], best["open_clip"]
    print(f"ratio      {s / s_peer:7.2f}    {m / m_peer:8.2f}")
    if options.out:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        results = {"options": {k: v for k, v in vars(options).items() if k != "out"}}
        results |= {name: {"seconds": a, "bytes": b} for name, (a, b) in best.items()}
        Path(options.out).write_text(json.dumps({**results, **machine}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16384, help="global")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29777)
    parser.add_argument("--out", default="", help="JSON file")
    options = parser.parse_args()
    mp.spawn(rank, (options, options.port), nprocs=options.ranks)


if __name__ == "__main__":
    main()
