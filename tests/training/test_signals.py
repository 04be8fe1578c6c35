"""Exit codes of commands that a signal ends, as the shell shows them: 143, 138 and 130. How a run
saves and continues is in test_stop.py."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from ranks import exit_codes, logs_of, start_command, wait_until

from protoclip.settings.commands import PARSERS

EXIT_CODES = {"SIGTERM": 143, "SIGUSR1": 138, "SIGINT": 130}
# Pauses are short: Python handles a signal that comes just before one only after it.
WAITING_MODULE = """
import time
open("importing", "w").close()
while True:
    time.sleep(0.02)
"""
# Words of each command, about folders that are there, and a function that it then calls.
COMMANDS = {
    "cluster": ("photos --k 2", "protoclip.cluster.__main__", "check_exists"),
    "compare": ("--train-data builtin:shapes:64", "protoclip.compare", "opened"),
    "curate": (
        "rows --levels 4,2 --target 2 --out out", "protoclip.curate.__main__", "check_exists",
    ),
    "data": ("--check builtin:shapes:64", "protoclip.data.__main__", "run"),
    "encode": ("photos --out out", "protoclip.encode.__main__", "run"),
    "evaluate": ("run", "protoclip.evaluate.__main__", "run"),
    "export": ("run --out out", "protoclip.export", "export"),
    "openclip": ("--model RN50", "open_clip_train.main", "main"),
    "plan": ("", "protoclip.plan", "build_run"),
    "report": ("run", "protoclip.report.__main__", "write_report"),
    "train": ("", "protoclip.train", "train"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("photos", "rows", "run"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_every_command_is_here() -> None:
    assert COMMANDS.keys() == PARSERS.keys()


@pytest.mark.parametrize("sent", EXIT_CODES)
def test_a_command_that_a_signal_ends_in_its_first_seconds(folder: Path, sent: str) -> None:
    """While it imports torch, in whose place there is a module that waits."""
    (folder / "torch.py").write_text(WAITING_MODULE)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    for command, (words, *_) in COMMANDS.items():
        process = subprocess.Popen(
            [sys.executable, "-m", "protoclip", command, *words.split()],
            cwd=folder, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        wait_until(lambda: (folder / "importing").exists(), [process], folder)
        process.send_signal(signal.Signals[sent])
        _, said = process.communicate()
        assert (command, process.returncode) == (command, EXIT_CODES[sent]), said
        name = sent.replace("SIGINT", "Ctrl-C")
        assert said == f"protoclip: interrupted by {name}\n", command
        (folder / "importing").unlink()


def wait_in(module: str, function: str) -> None:
    """Let a function of a command wait in place of its work."""

    def wait(*_: object, **__: object) -> None:
        Path("working").touch()
        while True:
            time.sleep(0.02)

    imported = importlib.import_module(module)
    assert hasattr(imported, function)
    setattr(imported, function, wait)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_a_signal_ends_at_work(folder: Path, command: str) -> None:
    words, module, function = COMMANDS[command]
    for sent, code in EXIT_CODES.items():
        (process,) = start_command(
            folder,
            words.split(),
            ranks=1,
            fault=partial(wait_in, module, function),
            command=module if command != "openclip" else "protoclip.openclip",
        )
        wait_until(lambda: (folder / "working").exists(), [process], folder)
        os.kill(process.pid, signal.Signals[sent])
        assert exit_codes([process]) == [code], logs_of(folder)
        name = sent.replace("SIGINT", "Ctrl-C")
        said = (folder / "rank0.log").read_text()
        assert f"protoclip {command}: interrupted by {name}\n" in said, said
        assert "Traceback" not in said, said
        (folder / "working").unlink()
        (folder / "rank0.log").unlink()
