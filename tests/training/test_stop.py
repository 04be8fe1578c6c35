"""How a run is stopped, and how it goes on: signals to its processes, Ctrl-C, a killed worker.

Whenever the signal comes, ``--resume`` ends in the losses of a run that was left alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import (
    CONTEXT,
    bare_run,
    exit_codes,
    let_pictures_wait,
    logs_of,
    losses,
    output_of,
    start_command,
    steps_of,
    torchrun,
    wait_until,
)
from torch.distributed.run import get_args_parser

from protoclip.distributed import run_command

STOPS = int(os.environ.get("PROTOCLIP_STOPS", "1"))  # make faults: 300
EXIT_CODES = {"SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130}
# A learning rate that does not depend on how many steps there are.
SCHEDULE = ["--lr-scheduler", "const", "--warmup", "4", "--epochs", "1000000"]


def flags(folder: Path, name: str, *more: str) -> list[str]:
    return bare_run(folder, "--name", name, *SCHEDULE, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def train(folder: Path, argv: list[str], ranks: int) -> None:
    """To the end."""
    codes = exit_codes(start_command(folder, argv, ranks, bare=True))
    assert codes == [0] * ranks, logs_of(folder)


def whole_run(folder: Path, ranks: int, steps: int) -> list[tuple[int, float]]:
    """The losses of a run that was left alone, at least ``steps`` of them."""
    name = f"whole{ranks}"
    if steps_of(folder, name) < steps:
        shutil.rmtree(folder / "logs" / name, ignore_errors=True)
        train(folder, flags(folder, name, "--max-steps", str(2 * steps)), ranks)
    return losses(folder / "logs" / name)


def kill_workers(process: Any) -> None:
    """Until the run has ended: a worker that has loaded its last batch is not missed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.is_alive():
        with contextlib.suppress(OSError):
            for worker in children.read_text().split()[:1]:
                os.kill(int(worker), signal.SIGKILL)
        process.join(0.2)
    assert process.exitcode == 2


def assert_saved_and_resumed(folder: Path, name: str, processes: list[Any], exit_code: int) -> None:
    """Processes that were told to stop end well, and the run goes on bit for bit."""
    ranks = len(processes)
    codes = exit_codes(processes)
    printed = logs_of(folder)
    assert codes == [exit_code] * ranks, printed
    assert "continue with --resume" in printed and "Traceback" not in printed, printed
    run = folder / "logs" / name
    before = losses(run)
    total = len(before) + 4
    resumed = flags(folder, name, "--max-steps", str(total), "--resume", f"logs/{name}")
    train(folder, resumed, ranks)
    assert losses(run)[: len(before)] == before
    assert losses(run) == whole_run(folder, ranks, total)[:total]


def remove_logs(folder: Path) -> None:
    for log in folder.glob("rank*.log"):
        log.unlink()


def start_with_a_clean_log(folder: Path, name: str, workers: int, ranks: int) -> list[Any]:
    """A run that has taken its first steps."""
    remove_logs(folder)
    argv = flags(folder, name, "--workers", str(workers))
    processes = start_command(folder, argv, ranks, bare=True)
    wait_until(lambda: steps_of(folder, name) >= 6, processes, folder)
    return processes


@pytest.mark.parametrize(
    ("sent", "workers", "ranks"),
    [
        ("SIGUSR1", 0, 1),
        ("SIGUSR1", 0, 2),  # only the second rank
        ("SIGTERM", 2, 2),
        ("SIGINT", 2, 1),  # workers get it too
    ],
)
def test_a_stopped_run_is_saved_and_goes_on_bit_for_bit(
    folder: Path, sent: str, workers: int, ranks: int
) -> None:
    name = f"{sent}-{workers}-{ranks}"
    processes = start_with_a_clean_log(folder, name, workers, ranks)
    for process in processes[-1:] if sent == "SIGUSR1" else processes:
        os.killpg(process.pid, signal.Signals[sent])
    assert_saved_and_resumed(folder, name, processes, EXIT_CODES[sent])


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


@pytest.mark.usefixtures("busy_machine")
def test_two_ranks_end_whenever_they_are_stopped(tmp_path: Path) -> None:
    """At random moments beside busy processes, and resumed: a run that hangs loses a night."""
    seed = time.time_ns() if STOPS > 1 else 0
    print(f"seed {seed}")  # pytest shows it with a failure
    dice = random.Random(seed)
    for number in range(STOPS):
        remove_logs(tmp_path)
        name = f"run{number}"
        sent = dice.choice(list(EXIT_CODES))
        workers = dice.choice(["0", "1", "2"])
        argv = flags(tmp_path, name, "--workers", workers)
        said = f"stop {number + 1} of {STOPS} by {sent}, {workers} workers"
        processes = start_command(tmp_path, argv, bare=True)
        first = 1 + dice.randrange(12)
        wait_until(
            lambda name=name, first=first: steps_of(tmp_path, name) >= first, processes, tmp_path
        )
        for process in processes:
            time.sleep(0.1 * dice.random())
            os.killpg(process.pid, signal.Signals[sent])
        assert exit_codes(processes) == [EXIT_CODES[sent]] * 2, f"{said}\n{logs_of(tmp_path)}"
        run = tmp_path / "logs" / name
        before = losses(run)
        steps = len(before) + 1 + dice.randrange(8)
        argv += ["--max-steps", str(steps), "--resume", f"logs/{name}"]
        processes = start_command(tmp_path, argv, bare=True)
        assert exit_codes(processes) == [0, 0], f"{said}, resumed\n{logs_of(tmp_path)}"
        assert losses(run)[: len(before)] == before and len(losses(run)) == steps
        shutil.rmtree(run)


def test_a_run_whose_worker_was_killed_ends_and_resumes_bit_for_bit(folder: Path) -> None:
    (process,) = start_with_a_clean_log(folder, "killed", workers=2, ranks=1)
    kill_workers(process)
    assert "worker was killed" in output_of(folder)[0], logs_of(folder)
    run = folder / "logs" / "killed"
    total = len(losses(run)) + 4
    train(folder, flags(folder, "killed", "--max-steps", str(total), "--resume", "auto"), 1)
    assert losses(run) == whole_run(folder, 1, total)[:total]


def test_the_second_ctrl_c_ends_at_once(folder: Path) -> None:
    log = folder / "rank0.log"
    remove_logs(folder)
    (process,) = start_command(
        folder, flags(folder, "twice", "--save-every", "0"), 1, fault=let_pictures_wait
    )
    wait_until(lambda: steps_of(folder, "twice") >= 2, [process], folder)
    (folder / "wait").touch()
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: "press it again to end at once" in log.read_text(), [process], folder)
    os.kill(process.pid, signal.SIGINT)
    codes = exit_codes([process])
    (folder / "wait").unlink()
    assert codes == [130], logs_of(folder)
    assert "interrupted" in log.read_text() and "Traceback" not in log.read_text()
    assert not list((folder / "logs" / "twice" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("sent", "ranks", "forked", "settings"),
    [
        ("SIGTERM", 1, False, []),
        ("SIGTERM", 2, True, []),
        pytest.param(
            "SIGUSR1",
            1,
            False,
            ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"],
            marks=pytest.mark.skipif(
                "--signals-to-handle" not in get_args_parser().format_help(),
                reason="this torchrun (PyTorch 2.8) has no --signals-to-handle",
            ),
        ),
    ],
)
def test_torchrun_hands_a_signal_on_and_the_ranks_save(
    folder: Path, sent: str, ranks: int, forked: bool, settings: list[str]
) -> None:
    name = f"torchrun-{sent}-{ranks}"
    remove_logs(folder)
    argv = flags(folder, name, "--workers", "1")
    settings = ["--nproc-per-node", str(ranks), *settings]
    (agent,) = torchrun(folder, argv, *settings, forked=forked)
    wait_until(lambda: steps_of(folder, name) >= 2, [agent], folder)
    os.kill(agent.pid, signal.Signals[sent])
    assert exit_codes([agent]) == [1], logs_of(folder)
    assert f"stopped by {sent} after step" in output_of(folder)[0]
    assert (folder / "logs" / name / "checkpoints" / "epoch_latest.pt").exists()


def test_an_error_on_the_way_out_of_ctrl_c_is_still_130(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch.save, interrupted, ends in a RuntimeError of its own."""

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            raise RuntimeError("unexpected pos 157568 vs 157456")

    assert run_command(work, "protoclip.train") == 130
    assert "interrupted" in capsys.readouterr().err
