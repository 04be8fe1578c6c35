"""What a card says beyond the benchmarks: time by kernel, CUDA graphs, and other launch rows.

    python -m benchmarks.gpu [canary] [profile] [small] [sweep] [--seconds 60]

``canary`` runs each op once, in a process of its own: a kernel that crashes takes its process and
its context with it, and the others still tell. ``sweep`` compiles candidates for each row of
kernels/launch.py in a pool of processes, drops those that spill or do not fit, times the others,
and prints the fastest whose gradients are right as the line to paste. PROTOCLIP_REHEARSE=1 runs the
same code without a card: Triton's interpreter, tiny sizes, one candidate compiled for Hopper.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

REHEARSAL = os.environ.get("PROTOCLIP_REHEARSE") == "1" and not torch.cuda.is_available()
if REHEARSAL:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import protoclip  # noqa: E402
from benchmarks import parity  # noqa: E402
from benchmarks.machine import DEVICE, best_seconds, name  # noqa: E402
from protoclip.ops import sigmoid_loss  # noqa: E402

with contextlib.suppress(ImportError):  # of Triton: main says so
    from protoclip.kernels import launch

Step = Callable[[], object]


def unit(*shape: int) -> torch.Tensor:
    x = F.normalize(torch.randn(*shape, device=DEVICE), dim=1)
    return x.to(torch.float32 if REHEARSAL else torch.bfloat16)


def _ids(n: int) -> torch.Tensor:
    """Two neighbours share one."""
    return torch.arange(n, device=DEVICE) // 2


def _info_nce(n: int, d: int, phase: str = "both", ids: torch.Tensor | None = None) -> Step:
    x = unit(n, d).requires_grad_()
    y = unit(n, d).requires_grad_()
    scale = _scale().requires_grad_()
    loss = partial(protoclip.info_nce, x, y, scale, ids=ids, backend="triton")
    if phase == "forward":
        return loss
    if phase == "both":
        return lambda: torch.autograd.grad(loss(), (x, y, scale))
    value = loss()
    return lambda: torch.autograd.grad(value, (x, y, scale), retain_graph=True)


def _sigmoid(n: int, d: int, ids: torch.Tensor | None = None) -> Step:
    x = unit(n, d).requires_grad_()
    y = unit(n, d).requires_grad_()
    loss = partial(sigmoid_loss, x, y, _scale(), -_scale(), ids=ids, backend="triton")
    return lambda: torch.autograd.grad(loss(), (x, y))


def _prototypes(n: int, k: int, d: int) -> Step:
    features = unit(n, d).requires_grad_()
    labels = torch.randint(k, (n,), device=DEVICE)
    loss = partial(
        protoclip.prototype_cross_entropy, features, unit(k, d), labels, _scale(), backend="triton"
    )
    return lambda: torch.autograd.grad(loss(), features)


def _kmeans(n: int, k: int, d: int) -> Step:
    points = torch.randn(n, d, device=DEVICE)
    return partial(
        protoclip.kmeans, points, k, num_iters=2, tol=0, warn=False, init=points[:k].clone()
    )


def _scale() -> torch.Tensor:
    return torch.tensor(14.3, device=DEVICE)


def steps() -> dict[str, Step]:
    """One call of each operation at the size of the GPU table."""
    if REHEARSAL:
        return {"info_nce": _info_nce(64, 16), "kmeans": _kmeans(64, 8, 16)}
    return {
        "info_nce N=32768 D=512": _info_nce(32_768, 512),
        "info_nce with ids N=32768 D=512": _info_nce(32_768, 512, ids=_ids(32_768)),
        "siglip N=16384 D=512": _sigmoid(16_384, 512),
        "siglip with ids N=16384 D=512": _sigmoid(16_384, 512, ids=_ids(16_384)),
        "prototypes N=4096 K=20000 D=128": _prototypes(4096, 20_000, 128),
        "kmeans N=200000 K=20000 D=128, 2 iterations": _kmeans(200_000, 20_000, 128),
    }


class KernelTime(NamedTuple):
    ms: float
    calls: int
    name: str


def time_by_kernel(averages: torch.autograd.profiler_util.EventList) -> list[KernelTime]:
    """Of each kernel, the longest first; on a CPU of each op.

    The profiler gives a kernel's time to the op that launched it, to a range of the user's around
    it, and again to the kernel itself: where there are kernels, only they count."""
    kernels = [
        row
        for row in averages
        if row.device_type != torch.autograd.DeviceType.CPU and not row.is_user_annotation
    ]
    times = [KernelTime(row.self_device_time_total / 1e3, row.count, row.key) for row in kernels]
    if not kernels:
        times = [KernelTime(row.self_cpu_time_total / 1e3, row.count, row.key) for row in averages]
    return sorted(times, reverse=True)


def profile(seconds: float) -> None:
    """A table of device time by kernel for each operation."""
    for title, step in steps().items():
        step()
        with torch.profiler.profile() as profiler:
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        kernels = time_by_kernel(profiler.key_averages())
        total = sum(kernel.ms for kernel in kernels) or 1e-9
        print(f"{title}: {total:.3f} ms of {DEVICE}")
        for ms, calls, name_of_kernel in kernels[:10]:
            print(f"  {ms:9.3f} ms {100 * ms / total:4.0f} % {calls:4} x {name_of_kernel[:70]}")


def small(seconds: float) -> None:
    """Steps of few pairs, dominated by launches: wall time, device time, and wall time as a CUDA
    graph."""
    if DEVICE != "cuda":
        print("small: expected a CUDA device, got none; nothing is timed")
        return
    for n in (256, 512, 1024, 2048, 4096):
        steps = {
            "info_nce": _info_nce(n, 512),
            "info_nce with ids": _info_nce(n, 512, ids=_ids(n)),
            "siglip": _sigmoid(n, 512),
            "prototypes K=5000 D=128": _prototypes(n, 5000, 128),
        }
        for title, step in steps.items():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                step()
            wall = 1e3 * best_seconds(step, 0.2)
            replayed = 1e3 * best_seconds(captured.replay, 0.2)
            with torch.profiler.profile() as profiler:
                step()
                torch.cuda.synchronize()
            device = sum(kernel.ms for kernel in time_by_kernel(profiler.key_averages()))
            print(
                f"{title} N={n}: wall {wall:.3f} ms, device {device:.3f} ms, as a CUDA graph "
                f"{replayed:.3f} ms"
            )


class Launched(NamedTuple):
    """The call that compiles a kernel: a Case of benchmarks.compile_report, but for the
    architecture."""

    op: str
    form: str
    dtype: str
    depth: int


@dataclass(eq=False)
class Swept:
    """A row of the launch table, how to compile the kernel that takes it, and what times it."""

    path: tuple[Any, ...]  # in protoclip.kernels.launch: its table, and the keys that lead to it
    kernel: str
    launched: Launched
    step: Callable[[], Step]
    assert_right: Callable[[], None]  # that gradients are within the budget

    def __str__(self) -> str:
        return self.path[0] + "".join(f"[{key!r}]" for key in self.path[1:-1])

    @property
    def table(self) -> dict[Any, launch.Launch]:
        """What holds the row, under the last of the keys."""
        table = vars(launch)
        for key in self.path[:-1]:
            table = table.setdefault(key, {})
        return table

    @property
    def row(self) -> launch.Launch:
        return self.table[self.path[-1]]

    @row.setter
    def row(self, row: launch.Launch) -> None:
        self.table[self.path[-1]] = row


def _swept() -> list[Swept]:
    if REHEARSAL:
        swept = Swept(
            path=("INTERPRETER",),
            kernel="sigmoid_loss",
            launched=Launched("sigmoid_loss", "gradients", "bf16", 128),
            step=partial(_info_nce, 64, 16),
            assert_right=partial(assert_right, "info_nce", 64),
        )
        return [swept]
    arch = launch.architecture(torch.device(DEVICE))
    # A row of large batches is timed where the table has none too.
    for kernel in ("info_nce_forward", "info_nce_gradient"):
        launch.HALF_LARGE.setdefault(kernel, {}).setdefault(arch, launch.HALF[kernel][arch])
    n = 16_384
    rows = [
        Swept(
            path=(table, row, arch),
            kernel=row,
            launched=Launched("info_nce", "large", "bf16", d),
            step=partial(_info_nce, n, d, phase),
            assert_right=partial(assert_right, "info_nce", d),
        )
        for row, phase in (("info_nce_forward", "forward"), ("info_nce_gradient", "backward"))
        for table, d in (("HALF", 256), ("HALF_LARGE", 512))
        if arch in vars(launch)[table].get(row, {})
    ]
    rows.append(
        Swept(
            path=("HALF", "sigmoid_loss", arch),
            kernel="sigmoid_loss",
            launched=Launched("sigmoid_loss", "gradients", "bf16", 512),
            step=partial(_sigmoid, n, 512),
            assert_right=partial(assert_right, "siglip", 512),
        )
    )
    rows.append(
        Swept(
            path=("ATTENTION", arch, 128),
            kernel="attention",
            launched=Launched("prototypes", "soft", "bf16", 128),
            step=partial(_prototypes, 4096, 20_000, 128),
            assert_right=partial(assert_right, "prototypes", 128),
        )
    )
    return rows


def assert_right(op: str, d: int) -> None:
    """Gradients of 384 rows within the budget of benchmarks/parity.py."""
    n = 96 if REHEARSAL else 384
    dtype = unit(1, 1).dtype
    x, y = parity.cone(n, n, d)
    x = x.to(DEVICE, dtype).requires_grad_()
    y = y.to(DEVICE, dtype).requires_grad_()
    positive = torch.eye(n, dtype=torch.bool, device=DEVICE)
    seen = torch.ones_like(positive)
    weight = torch.full((n,), 1 / n, device=DEVICE)
    scale = _scale()
    if op == "info_nce":
        form = parity.softmax_form(positive, seen, weight / 2, weight / 2)
        loss = protoclip.info_nce(x, y, scale, backend="triton")
    elif op == "info_nce with ids":
        ids = _ids(n)
        seen = positive | (ids[:, None] != ids[None])
        form = parity.softmax_form(positive, seen, weight / 2, weight / 2, rounds_positives=True)
        loss = protoclip.info_nce(x, y, scale, ids=ids, backend="triton")
    elif op == "siglip":
        form = parity.sigmoid_form(positive, positive, seen, -scale)
        loss = sigmoid_loss(x, y, scale, -scale, reduction="sum", backend="triton")
    else:
        labels = torch.arange(n, device=DEVICE)
        form = parity.prototype_form(labels, n, weight, False)
        loss = protoclip.prototype_cross_entropy(x, y, labels, scale, backend="triton")
    truth = parity.gradients(form, x, y, scale, torch.float64)
    base = parity.gradients(form, x, y, scale, dtype)
    dx, dy = torch.autograd.grad(loss, (x, y))
    parity.assert_gradients(dx, dy, form, truth, base, scale.item())


def assert_soft_targets() -> None:
    source = unit(96, 16)
    prototypes = unit(96, 16)
    targets = protoclip.soft_targets(source, prototypes, 0.1, backend="triton")
    truth = protoclip.soft_targets(source.double(), prototypes.double(), 0.1, backend="reference")
    assert (targets - truth).abs().max() <= 1e-4


def assert_clusters(backend: str) -> None:
    """No other centroid is nearer, and means are those of the reference."""
    points = torch.randn(300, 40, device=DEVICE)
    centroids = torch.randn(70, 40, device=DEVICE)
    labels, _ = protoclip.kmeans_assign(points, centroids, backend=backend)
    gap = torch.cdist(points.double(), centroids.double())
    assert (gap.gather(1, labels[:, None])[:, 0] <= gap.amin(1) * (1 + 1e-6)).all()
    means, _ = protoclip.segment_mean(points, labels, 70, backend=backend)
    truth, _ = protoclip.segment_mean(points.double(), labels, 70, backend="reference")
    assert (means - truth).abs().max() <= 1e-5


# CUDA's last: its library is the only one that has no interpreter to have run it.
CANARIES: dict[str, Callable[[], None]] = {
    "info_nce": partial(assert_right, "info_nce", 64),
    "info_nce with ids": partial(assert_right, "info_nce with ids", 64),
    "siglip": partial(assert_right, "siglip", 64),
    "prototypes": partial(assert_right, "prototypes", 64),
    "soft targets": assert_soft_targets,
    "clusters in Triton": partial(assert_clusters, "triton"),
    "clusters in CUDA": partial(assert_clusters, "cuda"),
}
WRONG = 3  # exit status of a canary whose results are wrong


def run_canary(title: str) -> int:
    """One canary, in this process."""
    backend = "cuda" if title.endswith("CUDA") else "triton"
    if reason := protoclip.backends("kmeans_assign")[backend]:
        print(f"skipped, {reason}")
        return 0
    try:
        CANARIES[title]()
    except AssertionError as error:
        print(f"wrong, {error!s:.200}")
        return WRONG
    print("ran")
    return 0


def _canary_outcome(title: str, seconds: float) -> str:
    """What became of a canary in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--run-canary", title]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"crashed, no end after {seconds:.0f} s"
    if run.returncode in (0, WRONG):
        return run.stdout.splitlines()[-1]
    if run.returncode < 0:
        return f"crashed, {signal.Signals(-run.returncode).name}"
    return f"crashed, {run.stderr.splitlines()[-1]}"


def canary(seconds: float) -> bool:
    """Whether every op ran and was right, or could not be asked to run here."""
    *titles, last = CANARIES
    with ThreadPoolExecutor(4) as pool:  # what they wait for is the compiler
        outcomes = list(pool.map(lambda title: _canary_outcome(title, seconds), titles))
    outcomes.append(_canary_outcome(last, seconds))
    for title, result in zip(CANARIES, outcomes, strict=True):
        print(f"{title}: {result}")
    return all(result.startswith(("ran", "skipped")) for result in outcomes)


def _candidates(row: launch.Launch) -> Iterator[launch.Launch]:
    """A row and those near it: the tile taller, wider or smaller, other warps and stages."""
    yield row
    if REHEARSAL:
        return
    n, m = row.block_n, row.block_m
    for block_n, block_m in ((n, m), (2 * n, m), (n // 2, m), (n, 2 * m), (n, m // 2)):
        for warps in (4, 8):
            for stages in (row.stages, row.stages + 1):
                near = replace(row, block_n=block_n, block_m=block_m, warps=warps, stages=stages)
                if block_n * block_m > n * m:  # two CTAs of a larger tile do not fit
                    near = replace(near, ctas_per_sm=1, max_registers=None)
                yield near


def compiled(swept: Swept, arch: int, row: launch.Launch) -> list[str]:
    """Compile a candidate for an architecture, into the compiler's cache: why it is no use, or
    nothing. Runs in a process of its own, which needs no card."""
    from benchmarks.compile_report import report

    if len(swept.path) > 1:  # a rehearsal compiles Hopper's row, as it is
        swept.row = row
    try:
        costs = report.costs(report.Case(arch=arch, **swept.launched._asdict()))
    except Exception as error:  # whatever Triton throws where a tile does not fit
        return [repr(error)[:120]]
    problems = []
    for cost in costs:
        if cost.kernel == swept.kernel:
            if cost.local_bytes:
                problems.append(f"{cost.local_bytes} bytes of local memory")
            problems += cost.problems
    return problems


class Candidate(NamedTuple):
    swept: Swept
    row: launch.Launch


def compile_all(
    candidates: list[Candidate], arch: int, seconds: float = math.inf
) -> list[list[str]]:
    """``compiled`` of each, in a pool of processes that Triton's interpreter does not reach; those
    that no process began within the seconds are no use either."""
    hidden = {key: os.environ.pop(key, None) for key in ("TRITON_INTERPRET", "PROTOCLIP_REHEARSE")}
    try:
        workers = min(os.cpu_count() or 1, 16, max(1, len(candidates)))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            jobs = [pool.submit(compiled, swept, arch, row) for swept, row in candidates]
            wait(jobs, timeout=None if math.isinf(seconds) else seconds)
            pool.shutdown(cancel_futures=True)
        return [_problems(job) for job in jobs]
    finally:
        os.environ.update({key: value for key, value in hidden.items() if value is not None})


def _problems(job: Future[list[str]]) -> list[str]:
    if job.cancelled():
        return ["no time to compile it"]
    try:
        return job.result()
    except BrokenProcessPool as error:  # the assembler may take its process down
        return [repr(error)[:120]]


def sweep(seconds: float) -> None:
    """Compile candidates for half of the seconds, the nearest of every row first; then time each
    row's within its share of the rest, and print the row to paste."""
    rows = _swept()
    by_row = [
        [Candidate(swept, row) for row in dict.fromkeys(_candidates(swept.row))] for swept in rows
    ]
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_row))
    candidates = [candidate for candidate in in_turn if candidate is not None]
    arch = launch.architecture(torch.device(DEVICE)) or 90
    began = time.monotonic()
    usable: dict[Swept, list[launch.Launch]] = {swept: [] for swept in rows}
    results = compile_all(candidates, arch, math.inf if REHEARSAL else seconds / 2)
    for (swept, row), problems in zip(candidates, results, strict=True):
        for problem in problems:
            print(f"{swept} {row}: {problem}", file=sys.stderr)
        if not problems:
            usable[swept].append(row)
    print(f"candidates compiled: {len(candidates)}, in {time.monotonic() - began:.0f} s")
    for swept in rows:
        sweep_row(swept, usable[swept], seconds / 2 / len(rows))


def sweep_row(swept: Swept, candidates: list[launch.Launch], seconds: float) -> None:
    """Time the candidates of one row and print the fastest whose gradients are right."""
    before = swept.row
    times = _times(swept, candidates, seconds)
    fastest = next(
        (row for row in sorted(times, key=times.__getitem__) if _is_right(swept, row)), None
    )
    swept.row = before
    if fastest is None:
        print(f"{swept}: no candidate of {len(candidates)} compiled ran with the right gradients")
        return
    was = f"{times[before]:.3f} ms" if before in times else "not timed"
    result = f"{times[fastest]:.3f} ms, {was} before, fastest of {len(times)} rows timed"
    print(f"{swept}: {'of a rehearsal, not to paste' if REHEARSAL else 'paste'}")
    print(f"    {swept.path[-1]!r}: {fastest},  # {name()}, {time.strftime('%Y-%m-%d')}: {result}")


def _times(
    swept: Swept, candidates: list[launch.Launch], seconds: float
) -> dict[launch.Launch, float]:
    """ms of those that run, and for which there is time."""
    times: dict[launch.Launch, float] = {}
    deadline = time.monotonic() + seconds
    for row in candidates:
        if times and time.monotonic() > deadline:
            break
        swept.row = row
        try:
            times[row] = 1e3 * best_seconds(swept.step(), 0.0 if REHEARSAL else 0.1)
        except Exception as error:  # as in ``compiled``
            print(f"{swept} {row}: {error!r:.120}", file=sys.stderr)
    return times


def _is_right(swept: Swept, row: launch.Launch) -> bool:
    swept.row = row
    least_tiles = launch.LARGE_TILES
    launch.LARGE_TILES = 0  # the few rows that are checked take rows of large batches too
    try:
        swept.assert_right()
    except Exception as error:  # an AssertionError, or as in ``compiled``
        print(f"{swept} {row}: {error}", file=sys.stderr)
        return False
    finally:
        launch.LARGE_TILES = least_tiles
    return True


COMMANDS = {"canary": canary, "profile": profile, "small": small, "sweep": sweep}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=60, help="for the sweep, or each canary")
    parser.add_argument("--run-canary", choices=CANARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_canary:
        return run_canary(args.run_canary)
    if reason := protoclip.backends("info_nce")["triton"]:
        print(f"benchmarks.gpu: expected Triton on a card, got {reason}; nothing is timed")
        return 0
    commands = ["profile", "small", "sweep"] if "all" in args.commands else args.commands
    results = [COMMANDS[command](args.seconds) for command in commands]
    return int(False in results)


if __name__ == "__main__":
    sys.exit(main())
