"""How a run is stopped, and how it goes on: signals to its processes, Ctrl-C, a killed worker.

Whenever the signal comes, ``--resume`` ends in the losses of a run that was left alone.
"""

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from ranks import (
    bare_run,
    ended,
    free_port,
    losses,
    said,
    start_command,
    steps_of,
    torchrun,
    wait_until,
)

from protoclip.distributed import run_command

SIGNALS = {"SIGTERM": 0, "SIGUSR1": 0, "SIGINT": 130}
CASES = [("SIGTERM", n, ranks) for n in (0, 2) for ranks in (1, 2)]
CASES += [("killed", 2, 1), ("SIGUSR1", 2, 2), ("SIGINT", 2, 1), ("SIGINT", 2, 2)]
# A learning rate that does not depend on how many steps there are.
SCHEDULE = ["--lr-scheduler", "const", "--warmup", "4", "--epochs", "1000000"]


def flags(folder, name, *more):
    return bare_run(folder, "--name", name, *SCHEDULE, *more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def whole_run(folder, ranks, steps):
    """The losses of a run that was left alone, at least ``steps`` of them."""
    name = f"whole{ranks}"
    if steps_of(folder, name) < steps:
        shutil.rmtree(folder / "logs" / name, ignore_errors=True)
        argv = flags(folder, name, "--max-steps", str(2 * steps))
        assert ended(start_command(folder, argv, ranks, bare=True)) == [0] * ranks, said(folder)
    return losses(folder / "logs" / name)


def kill_a_worker(folder, name, process):
    """The run goes on, with a warning; a worker that has loaded its last batch is not missed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while "worker died" not in said(folder)[0]:
        for worker in children.read_text().split()[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        wait_for_steps(folder, name, 8, process, or_until="worker died")
    wait_for_steps(folder, name, 2, process)


def wait_for_steps(folder, name, more, process, or_until="never printed"):
    steps = steps_of(folder, name) + more
    wait_until(
        lambda: or_until in said(folder)[0] or steps_of(folder, name) >= steps, [process], folder
    )


@pytest.mark.parametrize(("what", "workers", "ranks"), CASES)
def test_a_stopped_run_is_saved_and_goes_on_bit_for_bit(folder, what, workers, ranks):
    for log in folder.glob("rank*.log"):
        log.unlink()
    name = f"{what}-{workers}-{ranks}"
    argv = flags(folder, name, "--workers", str(workers))
    processes = start_command(folder, argv, ranks, bare=True)
    wait_until(lambda: steps_of(folder, name) >= 6, processes, folder)
    if what == "killed":
        kill_a_worker(folder, name, processes[0])
    for process in processes:
        os.killpg(process.pid, signal.Signals[what if what in SIGNALS else "SIGTERM"])
    codes, printed = ended(processes), said(folder)
    assert codes == [SIGNALS.get(what, 0)] * ranks, printed
    assert "continue with --resume" in printed[0] and "Traceback" not in "".join(printed), printed

    before = losses(folder / "logs" / name)
    total = len(before) + 4
    argv = flags(folder, name, "--max-steps", str(total), "--resume", f"logs/{name}")
    assert ended(start_command(folder, argv, ranks, bare=True)) == [0] * ranks, said(folder)
    assert losses(folder / "logs" / name)[: len(before)] == before
    assert losses(folder / "logs" / name) == whole_run(folder, ranks, total)[:total]


def pictures_that_wait():
    """No picture is read while there is a file "wait"."""
    open_ = Image.open

    def waiting(*args, **options):
        while Path("wait").exists():
            time.sleep(0.01)
        return open_(*args, **options)

    Image.open = waiting


def test_the_second_ctrl_c_ends_at_once(folder):
    (log,) = list(folder.glob("rank0.log")) or [folder / "rank0.log"]
    log.unlink(missing_ok=True)
    (process,) = start_command(folder, flags(folder, "twice"), 1, fault=pictures_that_wait)
    wait_until(lambda: steps_of(folder, "twice") >= 2, [process], folder)
    (folder / "wait").touch()
    os.kill(process.pid, signal.SIGINT)
    wait_until(lambda: "press it again to end at once" in log.read_text(), [process], folder)
    os.kill(process.pid, signal.SIGINT)
    codes = ended([process])
    (folder / "wait").unlink()
    assert codes == [130], said(folder)
    assert "interrupted" in log.read_text() and "Traceback" not in log.read_text()
    assert not list((folder / "logs" / "twice" / "checkpoints").iterdir())


def test_torchrun_hands_sigterm_on_and_the_ranks_save(folder):
    argv = flags(folder, "torchrun", "--workers", "1")
    process = torchrun(folder, argv, "--nproc-per-node", "2", "--master-port", str(free_port()))
    try:
        wait_until(lambda: steps_of(folder, "torchrun") >= 2, [process], folder)
        process.terminate()
        printed = process.communicate(timeout=300)[0]
    finally:
        process.kill()
    assert "stopped by SIGTERM after step" in printed
    assert (folder / "logs" / "torchrun" / "checkpoints" / "epoch_latest.pt").exists()


def test_progress_is_a_line_in_the_log_and_no_bar_in_a_redirected_stderr(folder):
    (folder / "rank0.log").unlink(missing_ok=True)
    argv = flags(folder, "log", "--max-steps", "6", "--log-every-n-steps", "2")
    assert ended(start_command(folder, argv, 1, bare=True)) == [0]
    lines = (folder / "logs" / "log" / "out.log").read_text().splitlines()
    form = r"\d{4}-\d\d-\d\d [\d:,]+ step (\d+)/6, loss \d\.\d{4}, [\d,]+ samples/s, ETA [\d:]+"
    matches = [match for line in lines if (match := re.fullmatch(form, line))]
    assert [match[1] for match in matches] == ["2", "4", "6"]
    printed = said(folder)[0]
    assert "\r" not in printed and "%|" not in printed and "it/s" not in printed


def test_an_error_on_the_way_out_of_ctrl_c_is_still_130(capsys):
    """torch.save, interrupted, ends in a RuntimeError of its own."""

    def work():
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 157568 vs 157456")

    assert run_command(work, "protoclip.train") == 130
    assert "interrupted" in capsys.readouterr().err
