"""What a card says beyond the benchmarks: time by kernel, CUDA graphs, and other launch rows.

    python -m benchmarks.gpu [profile] [graph] [sweep] [--seconds 60]

``sweep`` times candidates for a row of kernels/launch.py and prints the best as the line to paste.
PROTOCLIP_REHEARSE=1 runs the same code without a card: Triton's interpreter, tiny sizes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

REHEARSAL = os.environ.get("PROTOCLIP_REHEARSE") == "1" and not torch.cuda.is_available()
if REHEARSAL:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import protoclip  # noqa: E402
from benchmarks.machine import DEVICE, best_seconds, name  # noqa: E402
from protoclip.ops.contrastive import sigmoid_loss  # noqa: E402

Step = Callable[[], object]


def unit(*shape: int) -> torch.Tensor:
    x = F.normalize(torch.randn(*shape, device=DEVICE), dim=1)
    return x.to(torch.float32 if REHEARSAL else torch.bfloat16)


def _info_nce(n: int, d: int, phase: str = "both") -> Step:
    leaves = unit(n, d).requires_grad_(), unit(n, d).requires_grad_(), _scale().requires_grad_()
    loss = partial(protoclip.info_nce, *leaves, backend="triton")
    if phase == "forward":
        return loss
    if phase == "both":
        return lambda: torch.autograd.grad(loss(), leaves)
    kept = loss()
    return lambda: torch.autograd.grad(kept, leaves, retain_graph=True)


def _sigmoid(n: int, d: int) -> Step:
    leaves = unit(n, d).requires_grad_(), unit(n, d).requires_grad_()
    run = partial(sigmoid_loss, *leaves, _scale(), -_scale(), backend="triton")
    return lambda: torch.autograd.grad(run(), leaves)


def _prototypes(n: int, k: int, d: int) -> Step:
    h, labels = unit(n, d).requires_grad_(), torch.randint(k, (n,), device=DEVICE)
    loss = protoclip.prototype_cross_entropy
    run = partial(loss, h, unit(k, d), labels, _scale(), backend="triton")
    return lambda: torch.autograd.grad(run(), h)


def _kmeans(n: int, k: int, d: int) -> Step:
    x = torch.randn(n, d, device=DEVICE)
    return partial(protoclip.kmeans, x, k, num_iters=2, init=x[:k].clone())


def _scale() -> torch.Tensor:
    return torch.tensor(14.3, device=DEVICE)


def steps() -> dict[str, Step]:
    """One call of each operation at the size of the GPU table."""
    if REHEARSAL:
        return {"info_nce": _info_nce(64, 16), "kmeans": _kmeans(64, 8, 16)}
    return {
        "info_nce N=32768 D=512": _info_nce(32_768, 512),
        "siglip N=16384 D=512": _sigmoid(16_384, 512),
        "prototypes N=4096 K=20000 D=128": _prototypes(4096, 20_000, 128),
        "kmeans N=200000 K=20000 D=128, 2 iterations": _kmeans(200_000, 20_000, 128),
    }


def profile(seconds: float) -> None:
    """A table of device time by kernel for each operation."""
    key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    for title, step in steps().items():
        step()
        with torch.profiler.profile() as found:
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        rows = sorted(found.key_averages(), key=lambda row: -getattr(row, key))
        total = sum(getattr(row, key) for row in rows) or 1
        print(f"{title}: {total / 1e3:.3f} ms of {key}")
        for row in rows[:10]:
            taken = getattr(row, key)
            print(f"  {taken / 1e3:9.3f} ms {taken / total:5.0%} {row.count:4} x {row.key[:70]}")


def graph(seconds: float) -> None:
    """A step with and without a CUDA graph, where launches are what it costs."""
    if DEVICE != "cuda":
        print("graph: expected a CUDA device, got none; nothing is timed")
        return
    for n in (256, 512, 1024, 4096):
        step = _info_nce(n, 512)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        plain, replayed = (1e3 * best_seconds(run, 0.3) for run in (step, captured.replay))
        print(f"info_nce N={n} D=512 bf16: {plain:.3f} ms, {replayed:.3f} ms as a CUDA graph")


def _tables() -> dict[str, tuple[dict, object, Step]]:
    """What is swept: name -> the table, its key, the step that reads it."""
    from protoclip.kernels import launch

    if REHEARSAL:
        return {"INTERPRETER": (vars(launch), "INTERPRETER", _info_nce(64, 16))}
    arch = launch.architecture(torch.device(DEVICE))
    launch.HALF_DEEP.setdefault("forward", {}).setdefault(arch, launch.HALF["forward"][arch])
    n, found = 16_384, {}
    for kernel, phase in (("forward", "forward"), ("gradient", "backward")):
        found[f'HALF["{kernel}"]'] = launch.HALF[kernel], arch, _info_nce(n, 256, phase)
        if arch in launch.HALF_DEEP.get(kernel, {}):
            step = _info_nce(n, 512, phase)
            found[f'HALF_DEEP["{kernel}"]'] = launch.HALF_DEEP[kernel], arch, step
    found['HALF["sigmoid"]'] = launch.HALF["sigmoid"], arch, _sigmoid(n, 512)
    step = _prototypes(4096, 20_000, 128)
    return found | {f"ATTENTION[{arch}]": (launch.ATTENTION[arch], 128, step)}


def _candidates(row) -> Iterator:
    """Rows near one: the tile taller, wider or smaller, other warps, stages and CTAs."""
    n, m = row.block_n, row.block_m
    for block_n, block_m in ((n, m), (2 * n, m), (n, 2 * m), (n, m // 2)):
        for warps in (4, 8):
            for stages in (row.stages, row.stages + 1):
                yield replace(row, block_n=block_n, block_m=block_m, warps=warps, stages=stages)


def sweep(seconds: float) -> None:
    """Time candidates of each row within its share of the seconds; print the row to paste."""
    tables = _tables()
    for title, (table, key, step) in tables.items():
        deadline = time.monotonic() + seconds / len(tables)
        before, times = table[key], {}
        for row in dict.fromkeys([before, *_candidates(before)]):
            if times and time.monotonic() > deadline:
                break
            table[key] = row
            try:
                times[row] = 1e3 * best_seconds(step, 0.0 if REHEARSAL else 0.1)
            except Exception as error:  # whatever Triton throws where a tile does not fit
                print(f"{title} {row}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
        table[key] = before
        best = min(times, key=times.__getitem__)
        told = f"{times[best]:.3f} ms, {times[before]:.3f} ms before, of {len(times)} rows"
        print(f"{title}: paste")
        print(f"    {key!r}: {best},  # {name()}, {time.strftime('%Y-%m-%d')}: {told}")


COMMANDS = {"profile": profile, "graph": graph, "sweep": sweep}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=60, help="for the whole sweep")
    args = parser.parse_args()
    if reason := protoclip.backends("info_nce")["triton"]:
        print(f"benchmarks.gpu: expected Triton on a card, got {reason}; nothing is timed")
        return 0
    for command in COMMANDS if "all" in args.commands else args.commands:
        COMMANDS[command](args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
