"""The machine: its name, its versions, and its ceilings as measured in this run."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from protoclip.ops import native

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = (
    "torch", "triton", "numpy", "open_clip_torch", "faiss-cpu", "scikit-learn", "scipy",
    "cut-cross-entropy", "liger-kernel", "memeff", "siglip-kernel", "flash-kmeans",
    "faiss-gpu-cu12",
)  # fmt: skip
SOURCES = ("protoclip", "kernels", "csrc")


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def name() -> str:
    """What a table is headed by: the GPU, or the CPU with its family (virtual machines leave out
    more), cores and widest arithmetic."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)", text)
    flags = re.search(r"flags\s*:\s*(.+)", text)
    features = set(flags[1].split()) if flags else set()
    arithmetic = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    widest = next((unit for unit in arithmetic if unit in features), "-")
    cores = len(os.sched_getaffinity(0))
    processor = re.sub(r"\(R\)| Processor", "", model[1]) if model else platform.machine()
    if family:
        processor += f" (family {family[1]})"
    return f"{processor}, {cores} cores, {widest}"


def slug() -> str:
    """The machine's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name().lower()).strip("-")


def describe() -> dict[str, object]:
    """Machine, driver, versions and commit, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "machine": name(),
        "slug": slug(),
        "device": DEVICE,
        "native": native.cpu_features() if native.why_not("cpu") is None else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": _output("git", "rev-parse", "--short=12", "HEAD"),
        "modified": bool(_output("git", "status", "--porcelain", "--", *SOURCES)),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip() or None


def card_state() -> dict[str, str]:
    """What the card is at now: SM clock, power, temperature, reasons to throttle; empty without."""
    if DEVICE != "cuda":
        return {}
    fields = {
        "sm_clock": "clocks.sm",
        "power": "power.draw",
        "temperature": "temperature.gpu",
        "throttle": "clocks_throttle_reasons.active",
    }
    query = f"--query-gpu={','.join(fields.values())}"
    # By UUID: CUDA_VISIBLE_DEVICES renumbers the cards, nvidia-smi does not.
    card = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    values = _output("nvidia-smi", query, "--format=csv,noheader", card)
    return dict(zip(fields, (values or "").split(", "), strict=False))


def best_seconds(run: Callable[[], object], seconds: float) -> float:
    """The fastest round of those that fit into ``seconds``, after one to warm up."""
    run()
    sync()
    fastest = math.inf
    total = 0.0
    rounds = 0
    while rounds < 3 or total < seconds:
        start = time.perf_counter()
        run()
        sync()
        elapsed = time.perf_counter() - start
        fastest = min(fastest, elapsed)
        total += elapsed
        rounds += 1
    return fastest


def ceilings(tiny: bool) -> dict[str, float]:
    """TFLOP/s of torch's own GEMM by dtype and GB/s of a copy (read and written bytes)."""
    side = 64 if tiny else 8192 if DEVICE == "cuda" else 2048
    megabytes = 1 if tiny else 1024 if DEVICE == "cuda" else 256
    patience = 0.0 if tiny else 0.5
    rates = {}
    for dtype in ("fp32", "bf16") if DEVICE == "cpu" else DTYPES:
        x = torch.randn(side, side, device=DEVICE).to(DTYPES[dtype])
        y = torch.randn(side, side, device=DEVICE).to(DTYPES[dtype])
        rates[dtype] = 2e-12 * side**3 / best_seconds(lambda x=x, y=y: x @ y.T, patience)
    source = torch.ones(megabytes << 18, device=DEVICE)
    target = torch.empty_like(source)
    rates["copy"] = 8e-9 * len(source) / best_seconds(lambda: target.copy_(source), patience)
    return rates
