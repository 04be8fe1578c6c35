"""Several ranks for a test, forked from one process that has done the slow imports."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import json
import multiprocessing
import os
import queue
import random
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from protoclip import distributed
from protoclip.data import open_dataset
from protoclip.data.__main__ import export_shards
from protoclip.ops import native
from protoclip.settings.config import TrainConfig
from protoclip.settings.flags import build_parser, parse

ENVIRONMENT = dict(os.environ)  # a test may have another for a while
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["protoclip.train", "torch.distributed.run", "sklearn.neighbors", "warm"]
    + ["sklearn.feature_extraction.text", "matplotlib.figure", "matplotlib.backends.backend_svg"]
)
LIMIT = 120.0  # seconds in which nobody could use a core until a group of ranks counts as hanging
LONGEST = 600.0  # seconds, however much it computes
STACKS = signal.SIGUSR2  # makes a process of these tests write the stacks of all of its threads
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TORCHRUN = {
    "RANK": "{rank}", "WORLD_SIZE": "{ranks}", "LOCAL_RANK": "{rank}",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}",
}  # fmt: skip
AGENT = {  # of torchrun itself, for which these are flags; its ranks import this checkout
    "PET_NODE_RANK": "{rank}", "PET_NNODES": "{ranks}",
    "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "{port}",
    "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
}  # fmt: skip


@functools.cache
def compile_first() -> None:
    """Compile the C++ library, which takes longer than ranks may wait for each other, and start the
    process that the ranks are forked from: not with the cache of the test that is the first."""
    # Python 3.11 has a fork server leave out what only sys.path finds, here ``warm``, in silence.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = ENVIRONMENT | {"PYTHONPATH": path}
    with mock.patch.dict(os.environ, environment, clear=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native.why_not("cpu")
        forkserver.ensure_running()


class Patience:
    """How long to wait for processes: on a busy machine they wait for a core, a hang does not."""

    def __init__(self, processes: list[Any]) -> None:
        self.pids = [process.pid for process in processes]
        self.began_at = self.active_at = self.looked_at = time.monotonic()
        self.active_seconds = 0.0

    def is_over(self) -> bool:
        now = time.monotonic()
        if now < self.looked_at + 1:
            return False
        self.looked_at = now
        active_seconds = sum(map(_active_seconds, self.pids))
        if abs(active_seconds - self.active_seconds) > 1:  # less when a thread has ended
            self.active_seconds = active_seconds
            self.active_at = now
        return now > min(self.active_at + LIMIT, self.began_at + LONGEST)


def _active_seconds(pid: int) -> float:
    """How long the threads of a process and of its data workers have run or waited for a core."""
    seconds = 0.0
    for process in (pid, *_children(pid)):
        for task in Path(f"/proc/{process}/task").glob("*"):
            with contextlib.suppress(OSError):  # it has ended
                running, waiting, _ = (task / "schedstat").read_text().split()
                seconds += (int(running) + int(waiting)) / 1e9
    return seconds


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def ask_for_stacks(processes: list[Any]) -> None:
    """Have processes that hang, and their data workers, write the stacks of all threads to their
    logs; what the kernel knows of the threads goes to stderr."""
    for process in processes:
        with contextlib.suppress(OSError):
            for pid in [process.pid, *_children(process.pid)]:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    place = (task / "wchan").read_text()
                    name = (task / "comm").read_text().strip()
                    print(f"process {pid}, thread {task.name} ({name}): {place}", file=sys.stderr)
                os.kill(pid, STACKS)
    time.sleep(2)


def free_port() -> int:
    """One that no outgoing connection of another process is given before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class Outcome(NamedTuple):
    """What a rank's function returned, or the traceback of what it raised."""

    rank: int
    failed: bool
    value: Any


def _run_rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    port: int,
    arguments: tuple[Any, ...],
    outcomes: multiprocessing.Queue[Outcome],
    log: str,
) -> None:
    import torch

    torch.set_num_threads(1)
    faulthandler.register(STACKS, os.open(log, os.O_CREAT | os.O_WRONLY), all_threads=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        outcomes.put(Outcome(rank, failed=False, value=function(*arguments)))
    except BaseException:
        outcomes.put(Outcome(rank, failed=True, value=traceback.format_exc()))
        sys.exit(1)


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on each of ``ranks`` processes with torchrun's variables set; the
    results (picklable, no tensors' memory shared) in rank order. The function joins and leaves by
    itself."""
    compile_first()
    queue_of_outcomes = CONTEXT.Queue()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(
                target=_run_rank,
                args=(function, rank, ranks, port, arguments, queue_of_outcomes),
                kwargs={"log": f"{folder}/rank{rank}.log"},
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        outcomes: list[Outcome] = []
        try:
            patience = Patience(processes)
            while len(outcomes) < ranks and not patience.is_over():
                # A rank that has failed leaves the others waiting for it.
                failed = any(outcome.failed for outcome in outcomes)
                with contextlib.nullcontext() if failed else contextlib.suppress(queue.Empty):
                    outcomes.append(queue_of_outcomes.get(timeout=10))
            if len(outcomes) < ranks:
                raise queue.Empty
        except queue.Empty:
            ask_for_stacks(processes)
            missing = f"{ranks - len(outcomes)} ranks gave nothing\n{logs_of(Path(folder))}"
            outcomes.append(Outcome(rank=-1, failed=True, value=missing))
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    failures = [f"rank {outcome.rank}:\n{outcome.value}" for outcome in outcomes if outcome.failed]
    assert not failures, "\n".join(failures)
    return [outcome.value for outcome in sorted(outcomes, key=lambda outcome: outcome.rank)]


def in_group(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As ``on_ranks``, with the processes in a group."""
    return on_ranks(ranks, _in_group, function, *arguments)


def _in_group(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    distributed.start(distributed.find_rank(), torch.device("cpu"), 60)
    result = function(*arguments)
    distributed.stop()
    return result


def config_of(*flags: str) -> TrainConfig:
    """The settings of ``protoclip train`` with these flags."""
    return parse(build_parser("train", ""), list(flags))


def tiny_run(folder: Path, name: str, *flags: str) -> list[str]:
    """The flags of a run of milliseconds a step, with prototypes from step 6 on; in fp32, in which
    a step hardly depends on how its batch is split."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return [  # no --logs: torchrun takes it for one of its own
        "--train-data", "builtin:shapes:64", "--model", str(folder / "tiny.json"),
        "--batch-size", "12", "--projection-hidden-dim", "24", "--projection-dim", "8",
        "--external-teacher", "none", "--k", "6", "--infonce-warmup-epoch", "1",
        "--report-to", "none", "--val-frequency", "0", "--precision", "fp32", "--name", name,
        *flags,
    ]  # fmt: skip


def bare_run(folder: Path, *flags: str) -> list[str]:
    """The flags of the same run on 150 pairs in shards, for ten steps of which nothing is
    evaluated, in episodes of four."""
    if not (folder / "shards").exists():
        export_shards(open_dataset("builtin:shapes:150"), folder / "shards", per_shard=40)
    return tiny_run(folder, "run") + [
        "--train-data", str(folder / "shards"), "--batch-size", "16", "--episode-size", "64",
        "--k", "4", "--lr", "0.003", *flags,
    ]  # fmt: skip


def _run_command(
    folder: Path,
    argv: list[str],
    environment: dict[str, str],
    log: str,
    fault: Callable[[], None] | None,
    command: str,
    bare: bool,
) -> None:
    """A rank in a session of its own, as torchrun starts it, with its output in a file."""
    import torch

    module = importlib.import_module(command)
    torch.set_num_threads(1)
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as outside of tests
    os.chdir(folder)
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.register(STACKS, all_threads=True)
    os.environ |= environment
    if bare:
        summary = importlib.import_module("protoclip.training.summary")
        module.Evaluation.full = summary.draw_plots = lambda *_: None
        summary.page.write_report = lambda runs: runs[0]
    if fault:
        fault()
    sys.exit(module.main(argv))


def start_command(
    folder: Path,
    argv: list[str],
    ranks: int = 2,
    variables: dict[str, str] | None = None,
    fault: Callable[[], None] | None = None,
    command: str = "protoclip.train",
    bare: bool = False,
    faulty_rank: int | None = None,
) -> list[Any]:
    """The processes of a command; ``fault`` is called by one rank before it begins, the last one
    unless another is named. ``bare``: no evaluation and no report, which take ten times as long as
    such a run's steps."""
    compile_first()
    if variables is None:
        variables = TORCHRUN if ranks > 1 else {}
    if faulty_rank is None:
        faulty_rank = ranks - 1
    port = free_port()
    processes = []
    for rank in range(ranks):
        environment = {
            name: template.format(rank=rank, ranks=ranks, port=port)
            for name, template in variables.items()
        }
        process = CONTEXT.Process(
            target=_run_command,
            kwargs={
                "folder": folder,
                "argv": argv,
                "environment": environment,
                "log": f"rank{rank}.log",
                "fault": fault if rank == faulty_rank else None,
                "command": command,
                "bare": bare,
            },
        )
        process.start()
        processes.append(process)
    return processes


def torchrun(
    folder: Path, argv: list[str], *flags: str, machines: int = 1, forked: bool = False
) -> list[Any]:
    """The agents of ``protoclip train`` under torchrun, one a machine. ``forked``: their ranks
    begin with what the agent has imported, in a third of the time."""
    words = [*flags, "-m", "protoclip.train", *argv]
    command = "forked_torchrun" if forked else "torch.distributed.run"
    return start_command(folder, words, machines, AGENT, command=command)


def exit_codes(processes: list[Any]) -> list[int | None]:
    """Wait for the processes; their exit codes, None for one that hangs, whose stacks are in its
    log."""
    patience = Patience(processes)
    try:
        while any(process.exitcode is None for process in processes) and not patience.is_over():
            for process in processes:
                process.join(0.05)
        if any(process.exitcode is None for process in processes):
            ask_for_stacks(processes)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_until(condition: Callable[[], Any], processes: list[Any], folder: Path) -> None:
    """Wait for a condition that one of the processes makes true."""
    patience = Patience(processes)
    while not condition():
        is_over = patience.is_over()
        if is_over:
            ask_for_stacks(processes)
        if is_over or not all(map(_alive, processes)):
            for process in processes:
                process.kill()
            raise AssertionError(logs_of(folder))
        time.sleep(0.005)


def _alive(process: Any) -> bool:
    return process.is_alive() if hasattr(process, "is_alive") else process.poll() is None


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files cannot grow past ``room`` bytes: the system refuses the write as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def without_page() -> Iterator[None]:
    """As the fixture ``no_page``, for fixtures that tests share."""
    plots = mock.patch("protoclip.training.summary.draw_plots")
    with plots, mock.patch("protoclip.training.summary.page.write_report", lambda runs: runs[0]):
        yield


def let_pictures_wait() -> None:
    """No picture is read while there is a file "wait"."""
    from PIL import Image

    original_open = Image.open

    def waiting(*arguments: Any, **options: Any) -> Any:
        while Path("wait").exists():
            time.sleep(0.01)
        return original_open(*arguments, **options)

    Image.open = waiting


def steps_of(folder: Path, name: str) -> int:
    """Lines in a run's metrics.jsonl."""
    metrics = folder / "logs" / name / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of the lines that have a loss."""
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


def output_of(folder: Path) -> list[str]:
    """What each rank has printed."""
    return [path.read_text() for path in sorted(folder.glob("rank*.log"))]


def logs_of(folder: Path) -> str:
    """The same in one text, which pytest shows whole in an assertion."""
    return "\n".join(
        f"---- {path.name} ----\n{path.read_text()}" for path in sorted(folder.glob("rank*.log"))
    )
