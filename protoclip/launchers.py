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
                local, port = int(env.get(by_local, 0)), _port(env)
            except ValueError as error:
                raise ValueError(f"distributed: {by_rank}, {by_size}: {error}") from error
            if not 0 <= number < size:
                raise ValueError(
                    f"distributed: expected 0 <= {by_rank} < {by_size}, got {number} and {size}; "
                    "start the processes with torchrun or srun"
                )
            return Place(number, size, local, (_host(env, size), port))
    return Place(0, 1)


def _host(env: Mapping[str, str], ranks: int) -> str:
    """Of rank 0."""
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"]
    if int(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", ranks)) < ranks:
        raise ValueError(
            "distributed: mpirun does not say on which of several machines rank 0 is; give "
            "mpirun -x MASTER_ADDR=HOST, the first machine's name"
        )
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
    # "gpu[03-05,9],big1" -> gpu03
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return first.group(1) + (first.group(2) or "") if first else "127.0.0.1"


def _port(env: Mapping[str, str]) -> int:
    """Another one for each job, below those that outgoing connections get."""
    if "MASTER_PORT" in env:
        return int(env["MASTER_PORT"])
    job = env.get("SLURM_JOB_ID") or env.get("PMIX_NAMESPACE", "")
    step = int(re.sub(r"\D", "", env.get("SLURM_STEP_ID", "")) or 0)
    return 20000 + (int(re.sub(r"\D", "", job) or 0) + step) % 12000
