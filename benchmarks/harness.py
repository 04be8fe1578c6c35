"""What the benchmark files share: the machine's GEMM rate, peak memory, one line a case."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LINES: list[str] = []


def card() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-")
    return f"{torch.backends.cpu.get_cpu_capability()}x{torch.get_num_threads()}"


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """The fastest of some rounds, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        sync()
        start = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def gemm_tflops(n: int, d: int, dtype: torch.dtype) -> float:
    """The ceiling: torch's own X Y^T of the case's shape, measured beside it."""
    x, y = (torch.randn(n, d, device=DEVICE).to(dtype) for _ in range(2))
    return 2e-12 * n * n * d / best_seconds(lambda: x @ y.T)


def peak_mib(run: Callable[[], object]) -> float:
    """Memory added at the highest point of one run.

    On the CPU it is resident memory, so what malloc kept of an earlier run and hands out again does
    not show; tests/test_info_nce.py measures in a fresh process.
    """
    if DEVICE == "cuda":
        sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _high_water_mib()
    run()
    return _high_water_mib() - before


def _high_water_mib() -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def report(benchmark, name: str, shape: str, flop: float, ceiling: float, memory: float) -> None:
    """Put the case's numbers in the JSON and in the printed table."""
    seconds = benchmark.stats.stats.min
    share = flop / seconds * 1e-12 / ceiling
    benchmark.extra_info.update(
        card=card(), torch=torch.__version__, gemm_tflops=ceiling, share_of_gemm=share,
        peak_mib=memory, shape=shape,
    )  # fmt: skip
    s = benchmark.stats.stats
    LINES.append(
        f"{name:44s} {card()} {shape} | {s.median * 1e3:8.2f} ms [{s.q1 * 1e3:.2f}, "
        f"{s.q3 * 1e3:.2f}] min {seconds * 1e3:.2f} | {flop / seconds * 1e-12:.3f} TFLOP/s "
        f"({share:.0%} of GEMM) | {memory:.0f} MiB"
    )
