"""Work in a process of its own: because it must do with little memory, or because of what a process
decides once.

What a process keeps resident is a matter of the allocator and the kernel, and a busy sandbox may
count it coarsely. Its address space is not: past a limit an allocation fails, on any machine.
"""

import multiprocessing
import os
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOW = """
import resource
def allow(mib):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, resource.RLIM_INFINITY))
"""


class Made(TorchDispatchMode):
    """Notes the shape of each tensor that an op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = function(*args, **(kwargs or {}))
        each = results if isinstance(results, tuple | list) else [results]
        self.shapes += [tensor.shape for tensor in each if isinstance(tensor, torch.Tensor)]
        return results


def run_in_room(code: str) -> None:
    """Run ``code``, in which ``allow(mib)`` limits what may be mapped from there on.

    Two threads at most, with one heap: each more would reserve address space of its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", ALLOW + code],
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()


def run_in_fork(code: str, **environment: str) -> None:
    """Run ``code`` in a process that has computed nothing yet. It is forked from the one that the
    ranks of other tests are forked from, which has imported torch."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_execute, args=(code, environment, sender))
    process.start()
    sender.close()
    try:
        failure = receiver.recv()
    except EOFError:
        process.join()
        failure = f"it ended with exit code {process.exitcode}"
    process.join()
    assert failure is None, failure


def _execute(code: str, environment: dict[str, str], result: Connection) -> None:
    os.environ.update(environment)
    try:
        exec(code, {})
    except BaseException:
        result.send(traceback.format_exc())
    else:
        result.send(None)
