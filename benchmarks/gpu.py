"""What a card says beyond the benchmarks: time by kernel, CUDA graphs, and other launch rows.

    python -m benchmarks.gpu [profile] [graph] [sweep] [--seconds 60]

``sweep`` compiles candidates for each row of kernels/launch.py in a pool of processes, drops those
that spill or do not fit, times the others, and prints the fastest whose gradients are right as the
line to paste. PROTOCLIP_REHEARSE=1 runs the same code without a card: Triton's interpreter, tiny
sizes, one candidate compiled for Hopper.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

REHEARSAL = os.environ.get("PROTOCLIP_REHEARSE") == "1" and not torch.cuda.is_available()
if REHEARSAL:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import protoclip  # noqa: E402
from benchmarks import parity  # noqa: E402
from benchmarks.machine import DEVICE, best_seconds, name  # noqa: E402
from protoclip.ops.contrastive import sigmoid_loss  # noqa: E402

with contextlib.suppress(ImportError):  # of Triton: main says so
    from protoclip.kernels import launch

Step = Callable[[], object]


def unit(*shape: int) -> torch.Tensor:
    x = F.normalize(torch.randn(*shape, device=DEVICE), dim=1)
    return x.to(torch.float32 if REHEARSAL else torch.bfloat16)


def _info_nce(n: int, d: int, phase: str = "both", ids: bool = False) -> Step:
    leaves = unit(n, d).requires_grad_(), unit(n, d).requires_grad_(), _scale().requires_grad_()
    loss = partial(protoclip.info_nce, *leaves, backend="triton")
    if ids:
        loss = partial(loss, ids=torch.arange(n, device=DEVICE) // 2)
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
        "info_nce with ids N=32768 D=512": _info_nce(32_768, 512, ids=True),
        "siglip N=16384 D=512": _sigmoid(16_384, 512),
        "prototypes N=4096 K=20000 D=128": _prototypes(4096, 20_000, 128),
        "kmeans N=200000 K=20000 D=128, 2 iterations": _kmeans(200_000, 20_000, 128),
    }


def time_by_kernel(
    averages: torch.autograd.profiler_util.EventList,
) -> list[tuple[float, int, str]]:
    """-> ms, calls and name of each kernel, the longest first; on a CPU of each op.

    The profiler gives a kernel's time to the op that launched it and again to the kernel itself:
    where there are kernels, only they count."""
    kernels = [row for row in averages if row.device_type != torch.autograd.DeviceType.CPU]
    if kernels:
        rows = [(row.self_device_time_total / 1e3, row.count, row.key) for row in kernels]
    else:
        rows = [(row.self_cpu_time_total / 1e3, row.count, row.key) for row in averages]
    return sorted(rows, reverse=True)


def profile(seconds: float) -> None:
    """A table of device time by kernel for each operation."""
    for title, step in steps().items():
        step()
        with torch.profiler.profile() as found:
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        rows = time_by_kernel(found.key_averages())
        total = sum(taken for taken, _, _ in rows) or 1e-9
        print(f"{title}: {total:.3f} ms of {DEVICE}")
        for taken, count, key in rows[:10]:
            print(f"  {taken:9.3f} ms {taken / total:5.0%} {count:4} x {key[:70]}")


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


@dataclass(frozen=True)
class Swept:
    """A row of the launch table, how to compile the kernel that takes it, and what times it."""

    table: str  # of protoclip.kernels.launch
    keys: tuple[Any, ...]  # that lead to the row
    kernel: str
    case: tuple[str, str, str, int]  # op, form, dtype and D of compile_report.Case
    step: Callable[[], Step]
    right: Callable[[], None]  # raises AssertionError where gradients are not within the budget

    def __str__(self) -> str:
        return (self.table or self.keys[0]) + "".join(f"[{key!r}]" for key in self.keys[:-1])

    @property
    def rows(self) -> dict:
        found = vars(launch)[self.table] if self.keys[:-1] else vars(launch)
        for key in self.keys[:-1]:
            found = found.setdefault(key, {})
        return found


def _swept() -> list[Swept]:
    check_nce = partial(assert_right, "info_nce")
    if REHEARSAL:
        case = ("sigmoid", "gradients", "bf16", 128)
        step = partial(_info_nce, 64, 16)
        return [Swept("", ("INTERPRETER",), "sigmoid", case, step, partial(check_nce, 64))]
    arch = launch.architecture(torch.device(DEVICE))
    launch.HALF_DEEP.setdefault("forward", {}).setdefault(arch, launch.HALF["forward"][arch])
    n, found = 16_384, []
    for kernel, phase in (("forward", "forward"), ("gradient", "backward")):
        for table, d in (("HALF", 256), ("HALF_DEEP", 512)):
            if arch in vars(launch)[table].get(kernel, {}):
                case = ("info_nce", "large", "bf16", d)
                step, right = partial(_info_nce, n, d, phase), partial(check_nce, d)
                found.append(Swept(table, (kernel, arch), kernel, case, step, right))
    case, step = ("sigmoid", "gradients", "bf16", 512), partial(_sigmoid, n, 512)
    right = partial(assert_right, "siglip", 512)
    found.append(Swept("HALF", ("sigmoid", arch), "sigmoid", case, step, right))
    case, step = ("prototypes", "soft", "bf16", 128), partial(_prototypes, 4096, 20_000, 128)
    right = partial(assert_right, "prototypes", 128)
    found.append(Swept("ATTENTION", (arch, 128), "attention", case, step, right))
    return found


def assert_right(op: str, d: int) -> None:
    """Gradients of 384 rows within the budget of benchmarks/parity.py."""
    n = 96 if REHEARSAL else 384
    dtype = unit(1, 1).dtype
    x, y = (t.to(DEVICE, dtype).requires_grad_() for t in parity.cone(n, n, d))
    own = torch.eye(n, dtype=torch.bool, device=DEVICE)
    everything, weight = torch.ones_like(own), own.new_ones(n) / n
    scale = _scale()
    if op == "info_nce":
        form = parity.softmax_form(own, everything, weight / 2, weight / 2)
        loss = protoclip.info_nce(x, y, scale, backend="triton")
    elif op == "siglip":
        form = parity.sigmoid_form(own, own, everything, -scale)
        loss = sigmoid_loss(x, y, scale, -scale, backend="triton")
    else:
        labels = torch.arange(n, device=DEVICE)
        form = parity.prototype_form(labels, n, weight, False)
        loss = protoclip.prototype_cross_entropy(x, y, labels, scale, backend="triton")
    truth, base = (parity.gradients(form, x, y, scale, t) for t in (torch.float64, dtype))
    dx, dy = torch.autograd.grad(loss, (x, y))
    parity.assert_gradients(dx, dy, form, truth, base, scale.item())


def _candidates(row) -> Iterator:
    """Rows near one: the tile taller, wider or smaller, other warps, stages and CTAs."""
    n, m = row.block_n, row.block_m
    for block_n, block_m in ((n, m), (2 * n, m), (n // 2, m), (n, 2 * m), (n, m // 2)):
        for warps in (4, 8):
            for stages in (row.stages, row.stages + 1):
                yield replace(row, block_n=block_n, block_m=block_m, warps=warps, stages=stages)


def compiled(swept: Swept, arch: int, row: launch.Launch) -> list[str]:
    """Compile a candidate for an architecture, into the compiler's cache: why it is no use, or
    nothing. Runs in a process of its own, which needs no card."""
    from protoclip.kernels.compile_report import report

    if swept.table:  # a rehearsal has no table of its own
        swept.rows[swept.keys[-1]] = row
    try:
        costs = report.costs(report.Case(arch, *swept.case))
    except Exception as error:  # whatever Triton throws where a tile does not fit
        return [str(error).splitlines()[0][:80]]
    problems = []
    for cost in costs:
        if cost.kernel == swept.kernel:
            if cost.local_bytes:
                problems.append(f"{cost.local_bytes} bytes of local memory")
            problems += cost.problems
    return problems


def compile_all(wanted: list[tuple[Swept, launch.Launch]], arch: int) -> list[list[str]]:
    """``compiled`` of each, in a pool of processes that Triton's interpreter does not reach."""
    hidden = {k: os.environ.pop(k, None) for k in ("TRITON_INTERPRET", "PROTOCLIP_REHEARSE")}
    try:
        workers = min(os.cpu_count() or 1, 16, max(1, len(wanted)))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            jobs = [pool.submit(compiled, swept, arch, row) for swept, row in wanted]
            return [job.result() for job in jobs]
    finally:
        os.environ.update({k: value for k, value in hidden.items() if value is not None})


def sweep(seconds: float) -> None:
    """Compile all candidates, then time each row's within its share of the seconds; print the row
    to paste."""
    wanted = []
    for swept in _swept():
        before = swept.rows[swept.keys[-1]]
        rows = [before] if REHEARSAL else dict.fromkeys([before, *_candidates(before)])
        wanted += [(swept, row) for row in rows]
    arch = launch.architecture(torch.device(DEVICE)) or 90
    start = time.monotonic()
    usable: dict[Swept, list[launch.Launch]] = {}
    for (swept, row), problems in zip(wanted, compile_all(wanted, arch), strict=True):
        for problem in problems:
            print(f"{swept} {row}: {problem}", file=sys.stderr)
        if not problems:
            usable.setdefault(swept, []).append(row)
    print(f"{len(wanted)} candidates compiled in {time.monotonic() - start:.0f} s")
    for swept in dict.fromkeys(swept for swept, _ in wanted):
        sweep_row(swept, usable.get(swept, []), seconds / len({s for s, _ in wanted}))


def sweep_row(swept: Swept, rows: list[launch.Launch], seconds: float) -> None:
    """Time the candidates of one row and print the fastest whose gradients are right."""
    table, key = swept.rows, swept.keys[-1]
    before, times = table[key], {}
    deadline = time.monotonic() + seconds
    for row in rows:
        if times and time.monotonic() > deadline:
            break
        table[key] = row
        try:
            times[row] = 1e3 * best_seconds(swept.step(), 0.0 if REHEARSAL else 0.1)
        except Exception as error:  # as in ``compiled``
            print(f"{swept} {row}: {str(error).splitlines()[0][:80]}", file=sys.stderr)
    for row in sorted(times, key=times.__getitem__):
        table[key] = row
        try:
            swept.right()
        except AssertionError as error:
            print(f"{swept} {row}: {error}", file=sys.stderr)
            continue
        table[key] = before
        was = f"{times[before]:.3f} ms" if before in times else "not timed"
        told = f"{times[row]:.3f} ms, {was} before, fastest of {len(times)} rows timed"
        print(f"{swept}: paste")
        print(f"    {key!r}: {row},  # {name()}, {time.strftime('%Y-%m-%d')}: {told}")
        return
    table[key] = before
    print(f"{swept}: no candidate of {len(rows)} compiled ran with the right gradients")


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
