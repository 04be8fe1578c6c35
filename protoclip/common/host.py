"""The machine that a process runs on: memory in use, malloc, and what else keeps the cores busy."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import torch

# Options of glibc's mallopt.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory, because the next step needs as much again.

    By default it returns large blocks to the system, which then has to clear every page again. The
    first two settings switch off malloc's own adjustment of the third, so that one is set too.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26), (MMAP_THRESHOLD, 2**25)):
        mallopt(option, value)


def busy_note(device: torch.device) -> str:
    """A line for a CPU run on a machine whose load exceeds its cores; "" otherwise."""
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    if device.type != "cpu" or policy == "passive" or torch.get_num_threads() == 1:
        return ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0]
    if load <= (cores or 1):
        return ""
    return (
        f"note: the load is {load:.1f} on {cores} cores; threads that spin while they wait then "
        "make a run crawl, so start it with OMP_WAIT_POLICY=passive"
    )


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: on the card for a GPU, else of the process; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0
