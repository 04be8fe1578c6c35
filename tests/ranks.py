"""Several ranks for a test, forked from one process that has done the slow imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import random
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["protoclip.train", "protoclip", "torch.distributed"])
LIMIT = 600.0  # seconds until a group of ranks counts as hanging; a compile may come first


def free_port() -> int:
    """One that no outgoing connection of another process is given before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _rank(function, number, ranks, port, args, results) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        results.put((number, True, function(*args)))
    except BaseException:
        results.put((number, False, traceback.format_exc()))
        sys.exit(1)


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on each of ``ranks`` processes with torchrun's variables set; the results
    (picklable, no tensors' memory shared) in rank order. The function joins and leaves by itself.
    """
    results = CONTEXT.Queue()
    port = free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(function, n, ranks, port, args, results), daemon=True)
        for n in range(ranks)
    ]
    for process in processes:
        process.start()
    found: list[tuple[int, bool, Any]] = []
    try:
        while len(found) < ranks:
            # A rank that has failed leaves the others waiting for it.
            found.append(results.get(timeout=LIMIT if all(fine for _, fine, _ in found) else 10))
    except queue.Empty:
        found += [(-1, False, f"{ranks - len(found)} ranks gave nothing")]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    bad = [f"rank {number}:\n{text}" for number, fine, text in found if not fine]
    assert not bad, "\n".join(bad)
    return [value for _, _, value in sorted(found, key=lambda item: item[0])]
