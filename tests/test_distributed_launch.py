"""The command under torchrun, and what is said when a rank is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import CONTEXT, free_port

from protoclip.heartbeat import EXIT_CODE
from protoclip.launchers import find_place

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def arguments(folder, name, *flags):
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return [
        *("--train-data", "builtin:shapes:64", "--model", "tiny.json", "--batch-size", "12"),
        *("--projection-hidden-dim", "24", "--projection-dim", "8", "--external-teacher", "none"),
        *("--k", "6", "--infonce-warmup-epoch", "1", "--report-to", "none", "--name", name),
        *("--val-frequency", "0", *flags),
    ]  # fmt: skip


def _run(folder, argv, number, ranks, port):
    """A rank: protoclip.train with its output in a file."""
    import torch

    from protoclip.train import main

    torch.set_num_threads(1)
    os.chdir(folder)
    handle = os.open(f"rank{number}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.exit(main(argv))


def started(folder, argv, ranks=2):
    port = free_port()
    processes = [
        CONTEXT.Process(target=_run, args=(folder, argv, number, ranks, port), daemon=True)
        for number in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes, limit):
    """The exit codes; a process that is still there after ``limit`` seconds is a failure."""
    deadline = time.monotonic() + limit
    try:
        for process in processes:
            process.join(max(0.1, deadline - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for_steps(folder, name, processes, limit=60):
    metrics = folder / "logs" / name / "metrics.jsonl"
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            return
        assert all(process.is_alive() for process in processes), logs(folder)
        time.sleep(0.05)
    pytest.fail("no step in time:\n" + "\n".join(logs(folder)))


def logs(folder):
    return [(folder / f"rank{number}.log").read_text() for number in range(2)]


@pytest.mark.parametrize(
    ("victim", "kind", "words"),
    [
        (1, signal.SIGKILL, "rank 1 of 2"),
        (1, signal.SIGSTOP, "has given no sign for 2 s"),
        (0, signal.SIGKILL, "rank 0, or the launcher on its machine, is gone"),
    ],
    ids=["killed", "frozen", "killed with the store"],
)
def test_a_lost_rank_is_named_and_all_end(tmp_path, victim, kind, words):
    flags = "--max-steps", "100000", "--epochs", "100000", "--dist-timeout", "2"
    processes = started(tmp_path, arguments(tmp_path, "lost", *flags))
    wait_for_steps(tmp_path, "lost", processes)
    os.kill(processes[victim].pid, kind)
    survivor = processes[1 - victim]
    codes = ended([survivor], 15)
    processes[victim].kill()
    said = logs(tmp_path)[1 - victim]
    assert codes == [EXIT_CODE], said
    message = next(line for line in said.splitlines() if "error:" in line)
    assert words in message and "phase" in message and f"rank {victim}" in message


def test_a_mistake_is_said_once(tmp_path):
    processes = started(tmp_path, arguments(tmp_path, "bad", "--k", "1000"))
    assert ended(processes, 60) == [2, 2]
    together = "".join(logs(tmp_path))
    assert together.count("--k: expected") == 1 and "Traceback" not in together


def environment():
    """One thread, and the sources of this checkout wherever the command runs."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(folder, argv, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "protoclip.train"]
    return subprocess.Popen(
        [*command, *argv], cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("agents", [1, 2], ids=["one agent", "two agents"])
def test_torchrun_trains_evaluates_and_writes_one_folder(tmp_path, agents):
    argv = arguments(tmp_path, "both", "--max-steps", "4")
    flags = ["--nproc-per-node", str(2 // agents), "--nnodes", str(agents)]
    flags += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    running = [torchrun(tmp_path, argv, *flags, "--node-rank", str(n)) for n in range(agents)]
    said = [process.communicate(timeout=180)[0] for process in running]
    assert [process.returncode for process in running] == [0] * agents, said
    run = tmp_path / "logs" / "both"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert json.loads((run / "results.json").read_text())["trained"]["sets"]
    assert (run / "checkpoints" / "epoch_latest.pt").exists()
    assert sum(text.count("run folder:") for text in said) == 1
    assert sum(text.count("done: ") for text in said) == 1


def test_launchers_are_recognised():
    assert find_place({}).world_size == 1
    slurm = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08,11],big1", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    place = find_place(slurm)
    assert (place.rank, place.world_size, place.local_rank) == (5, 16, 1)
    assert place.master == ("gpu07", 23456)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert find_place(batch_script).world_size == 1
    with pytest.raises(ValueError, match="RANK"):
        find_place({"RANK": "4", "WORLD_SIZE": "4"})
