"""What a command that is killed leaves: no process, and no file after the next one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import (
    CONTEXT,
    bare_run,
    compile_first,
    let_pictures_wait,
    start_command,
    steps_of,
    wait_until,
)

from protoclip.common.files import locked_folder, whole_file, whole_files
from protoclip.data import images
from protoclip.data.icons import Icon, load_icons

ICON = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path d="M1 1h{}v4z"/></svg>'


def workers_of(process: Any) -> list[int]:
    return list(
        map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    )


def runs(pid: int) -> bool:
    """Whether a process has not ended; nobody may collect an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def assert_killed_with_its_workers(process: Any, folder: Path) -> None:
    """Within the seconds of a busy machine; orphans would work for ever."""
    workers = workers_of(process)
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    until = time.monotonic() + 60
    while any(map(runs, workers)) and time.monotonic() < until:
        time.sleep(0.02)
    left = [pid for pid in workers if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def icons() -> list[Icon]:
    return [Icon("family", "", f"icon-{i}", ICON.format(i % 5 + 1)) for i in range(300)]


def draw_for_ever(folder: Path) -> None:
    def wait(start: int) -> None:
        while True:
            time.sleep(0.02)

    globals()["wait"] = wait  # the pool finds it by name
    wait.__qualname__ = "wait"
    images._draw_part = wait
    os.sched_getaffinity = lambda _: {0, 1}
    os.environ["PROTOCLIP_CACHE"] = str(folder)
    load_icons("drawn", "state", icons)


def test_drawing_leaves_no_process_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_first()
    process = CONTEXT.Process(target=draw_for_ever, args=(tmp_path,))
    process.start()
    wait_until(lambda: len(workers_of(process)) == 2, [process], tmp_path)
    assert list(tmp_path.glob("*.tmp"))
    assert_killed_with_its_workers(process, tmp_path)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path))
    assert len(load_icons("drawn", "state", icons)) > 0
    assert not list(tmp_path.glob("*.tmp"))


def test_data_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    (process,) = start_command(
        tmp_path, bare_run(tmp_path, "--workers", "2"), 1, fault=let_pictures_wait, bare=True
    )
    wait_until(lambda: steps_of(tmp_path, "run") >= 2, [process], tmp_path)
    (tmp_path / "wait").touch()
    assert_killed_with_its_workers(process, tmp_path)


def killed_in(writer: Callable[[Path], Any], folder: Path) -> None:
    with locked_folder(folder, "--out"):
        (folder / "a" / "b").mkdir(parents=True, exist_ok=True)
        with writer(folder):
            os.kill(os.getpid(), signal.SIGKILL)


def part_of_features(folder: Path) -> Any:
    return whole_file(folder / "a" / "b" / "rows.npy")


@pytest.mark.parametrize("writer", [whole_files, part_of_features])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, writer: Any) -> None:
    compile_first()
    process = CONTEXT.Process(target=killed_in, args=(writer, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path.name for path in tmp_path.rglob("*")} - {".lock", "a", "b"}
    assert before
    with locked_folder(tmp_path, "--out"):
        assert {path.name for path in tmp_path.rglob("*")} == {".lock", "a", "b"}
