"""Two ranks that are stopped and resumed at random moments beside busy processes: a run that hangs
loses a night."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import (
    CONTEXT,
    bare_run,
    exit_codes,
    logs_of,
    losses,
    start_command,
    steps_of,
    wait_until,
)

STOPS = int(os.environ.get("PROTOCLIP_STOPS", "1"))  # make faults: 300
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}
# A learning rate that does not depend on how many steps there are.
SCHEDULE = ["--lr-scheduler", "const", "--warmup", "4", "--epochs", "1000000"]


def _spin() -> None:
    while True:
        pass


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """As many processes as cores that never wait; one in the tests of every day, of which another
    file runs on the other core."""
    number = (os.cpu_count() or 1) if STOPS > 1 else 1
    processes = [CONTEXT.Process(target=_spin, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.kill()


def has_steps(folder: Path, name: str, number: int) -> bool:
    return steps_of(folder, name) >= number


@pytest.mark.usefixtures("busy_machine")
def test_two_ranks_end_whenever_they_are_stopped(tmp_path: Path) -> None:
    seed = time.time_ns() if STOPS > 1 else 0
    print(f"seed {seed}")  # pytest shows it with a failure
    dice = random.Random(seed)
    for number in range(STOPS):
        for log in tmp_path.glob("rank*.log"):
            log.unlink()
        name = f"run{number}"
        sent = dice.choice(list(EXIT_CODES))
        workers = dice.choice(["0", "1", "2"])
        flags = bare_run(tmp_path, "--name", name, *SCHEDULE, "--workers", workers)
        said = f"stop {number + 1} of {STOPS} by {sent.name}, {workers} workers"
        processes = start_command(tmp_path, flags, bare=True)
        first = 1 + dice.randrange(12)
        wait_until(
            lambda name=name, first=first: steps_of(tmp_path, name) >= first, processes, tmp_path
        )
        for process in processes:
            time.sleep(0.1 * dice.random())
            os.killpg(process.pid, sent)
        assert exit_codes(processes) == [EXIT_CODES[sent]] * 2, f"{said}\n{logs_of(tmp_path)}"
        run = tmp_path / "logs" / name
        before = losses(run)
        steps = len(before) + 1 + dice.randrange(8)
        again = ["--max-steps", str(steps), "--resume", f"logs/{name}"]
        processes = start_command(tmp_path, [*flags, *again], bare=True)
        assert exit_codes(processes) == [0, 0], f"{said}, resumed\n{logs_of(tmp_path)}"
        assert losses(run)[: len(before)] == before and len(losses(run)) == steps
        shutil.rmtree(run)
