"""What a launcher of processes has told this one: torchrun, SLURM's srun, OpenMPI's mpirun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process among those a launcher started."""

    rank: int
    world_size: int
    local_rank: int = 0  # on its machine: the number of its GPU
    master: tuple[str, int] = ("127.0.0.1", 0)  # where the processes meet


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """Read what torchrun, SLURM's srun or OpenMPI's mpirun say; alone without them.

    Raises:
        ValueError: a launcher's variables contradict each other.
    """
    names = [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        # Of the step, not of the allocation: a plain python in a batch script is alone.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ]
    for by_rank, by_size, by_local in names:
        if by_rank in env and by_size in env:
            try:
                number, size = int(env[by_rank]), int(env[by_size])
                place = Place(number, size, int(env.get(by_local, 0)), _master(env))
            except ValueError as error:
                raise ValueError(f"distributed: {by_rank}, {by_size}: {error}") from error
            if not 0 <= number < size:
                raise ValueError(
                    f"distributed: expected 0 <= {by_rank} < {by_size}, got {number} and {size}; "
                    "start the processes with torchrun or srun"
                )
            return place
    return Place(0, 1)


def _master(env: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return env["MASTER_ADDR"], int(env["MASTER_PORT"])
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
    # "gpu[03-05,9],big1" -> gpu03
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    host = first.group(1) + (first.group(2) or "") if first else "127.0.0.1"
    job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or "0"
    return host, 20000 + int(job) % 20000
