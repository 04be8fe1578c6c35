"""A run on the CPU: memory that malloc keeps, and what the log says when the cores are taken."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import bare_run

from protoclip.common import waits
from protoclip.common.host import busy_note
from protoclip.train import main
from protoclip.training.log import Log

FREED = 128  # MiB
FREE_MEMORY = """
import ctypes, sys, torch
from protoclip.common.host import keep_freed_memory
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
if "keep" in sys.argv:
    keep_freed_memory()
for _ in range(3):
    parts = [torch.ones(2**22) for _ in range(8)]  # 16 MiB each, freed together
    del parts
print(mallinfo2().fordblks // 2**20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")
def test_freed_blocks_are_kept() -> None:
    """By malloc's own accounts: what is resident also depends on the kernel."""

    def free_mib(*words: str) -> int:
        command = [sys.executable, "-c", FREE_MEMORY, *words]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert free_mib("keep") >= FREED > 2 * free_mib()  # 160 and 0


def test_malloc_is_set_in_our_own_process_only(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("protoclip.train.keep_freed_memory", lambda: calls.append(1))
    flags = bare_run(workdir, "--max-steps", "1", "--method", "clip")
    flags += ["--name", "called"]
    monkeypatch.setattr(sys, "argv", ["script.py", "its-own-word", *flags])
    assert main(flags) == 0 and not calls
    flags += ["--name", "command"]
    monkeypatch.setattr(sys, "argv", ["protoclip", "train", *flags])
    assert main(flags) == 0 and calls == [1]  # as protoclip.__main__ calls it
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--name", "module"])
    assert main(None) == 0 and calls == [1, 1]


@pytest.fixture
def threads():
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(count)


def test_the_log_begins_with_a_busy_machine(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, threads
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    flags = bare_run(workdir, "--max-steps", "1", "--method", "clip")
    for load, name in ((2.1, "busy"), (2.0, "free")):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert main([*flags, "--name", name]) == 0
        first = (workdir / "logs" / name / "out.log").read_text().splitlines()[0]
        assert ("note: the load is 2.1 on 2 cores" in first) == (load > 2)
        assert ("OMP_WAIT_POLICY=passive" in first) == (load > 2)


def test_nothing_is_said_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch, threads) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    cpu = torch.device("cpu")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert busy_note(cpu) == ""
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert busy_note(cpu) and busy_note(torch.device("cuda")) == ""
    torch.set_num_threads(1)
    assert busy_note(cpu) == ""


def test_without_a_terminal_progress_is_a_line_now_and_then(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock on which a step takes a minute."""
    now = 0.0
    speaker = waits.Speaker("protoclip train", lambda: now)
    monkeypatch.setattr(waits, "_speaker", speaker)
    after = Log.after

    def after_a_minute(self: Log, *arguments: Any) -> None:
        nonlocal now
        after(self, *arguments)
        now += 60
        speaker.look()

    monkeypatch.setattr(Log, "after", after_a_minute)
    flags = bare_run(workdir, "--max-steps", "3", "--method", "clip")
    assert main([*flags, "--name", "run"]) == 0
    printed = capsys.readouterr().err
    lines = re.findall(
        r"training, episode 1 of 1: (\d) of 3 steps, loss \d\.\d{4}, [\d,]+ samples/s, "
        r"(\d) min so far, about (.*) left",
        printed.replace("60 s so", "1 min so"),
    )
    assert lines == [("1", "1", "2 min"), ("2", "2", "60 s"), ("3", "3", "0 s")]
    assert "\r" not in printed and "%|" not in printed and "it/s" not in printed
    line_of_a_step = (
        r"\d{4}-\d\d-\d\d [\d:,]+ step (\d)/3, loss \d\.\d{4}, [\d,]+ samples/s, ETA [\d:]+\n"
    )
    log = (workdir / "logs" / "run" / "out.log").read_text()
    assert re.findall(line_of_a_step, log) == ["1", "2", "3"]
