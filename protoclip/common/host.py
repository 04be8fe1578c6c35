"""The machine that a process runs on: memory in use, malloc, what else keeps the cores busy,
numbers that come from its GPU, and what its threads and forks share."""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MOST_WORKERS = 8  # that --workers auto starts for a GPU
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
    cores = usable_cores()
    load = os.getloadavg()[0]
    if load <= cores:
        return ""
    return (
        f"note: the load is {load:.1f} on {cores} cores, which can make this run very slow; "
        "OMP_WAIT_POLICY=passive helps"
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_workers(setting: int, device: torch.device, ranks: int) -> int:
    """The number of processes that read images. A ``setting`` below 0 is automatic: none during
    training on a CPU; on a GPU this process's share of the machine's cores, at most MOST_WORKERS.
    """
    if setting >= 0:
        return setting
    if device.type == "cpu":
        return 0
    on_this_machine = min(ranks, torch.cuda.device_count()) or 1  # a process has a GPU
    return min(MOST_WORKERS, max(1, usable_cores() // on_this_machine))


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: on the card for a GPU, else of the process; 0 if that is unknown."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0


def start_copy_to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy values to the host; the result waits for them, but for no work queued later."""
    if not values.is_cuda:
        return values.tolist
    on_host = torch.empty_like(values, device="cpu", pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    arrived = torch.cuda.current_stream(values.device).record_event()

    def read() -> list[float]:
        arrived.synchronize()
        return on_host.tolist()

    return read


def lock_free_after_fork() -> threading.Lock:
    """A lock that a forked child finds free, even if another thread held it at the fork."""
    lock = threading.Lock()
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


@functools.lru_cache(maxsize=1024)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, the same only once: evaluation, for example, opens files again."""
    logger.warning("%s", message)
