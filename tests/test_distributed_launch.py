"""The commands on several ranks: launchers, mistakes, and a rank that is lost."""

import json
import os
import signal

import pytest
from ranks import (
    bare_run,
    ended,
    free_port,
    metrics,
    said,
    start_command,
    steps_of,
    tiny_run,
    torchrun,
    wait_until,
)

from protoclip.distributed import find_rank


@pytest.mark.parametrize(
    ("victim", "kind"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)]
)
def test_a_lost_rank_ends_the_others(tmp_path, victim, kind):
    """One that is killed at once, one that hangs after --dist-timeout seconds."""
    flags = "--max-steps", "100000", "--epochs", "100000", "--dist-timeout", "10"
    processes = start_command(tmp_path, bare_run(tmp_path, *flags))
    wait_until(lambda: steps_of(tmp_path, "run") >= 2, processes, tmp_path)
    os.kill(processes[victim].pid, kind)
    codes = ended([processes[1 - victim]])
    processes[victim].kill()
    assert codes == [1], said(tmp_path)


def test_a_mistake_is_said_once(tmp_path):
    processes = start_command(tmp_path, tiny_run(tmp_path, "bad", "--k", "1000"))
    assert ended(processes) == [2, 2]
    together = "".join(said(tmp_path))
    assert together.count("--k: expected") == 1 and "Traceback" not in together


def broken_step():
    """The third step raises what nobody expects."""
    from protoclip.step import Stepper

    step, calls = Stepper.step, []

    def raising(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("a mistake of the program")
        return step(self, *args, **options)

    Stepper.step = raising


def broken_pictures():
    """This rank's disk has lost the pictures."""
    from protoclip.data import DataError
    from protoclip.data.shapes import ShapesDataset

    def image(self, position):
        raise DataError(f"sample {position}: the picture is gone")

    ShapesDataset.image = image


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (broken_step, 1, "KeyError: 'a mistake of the program'"),
        (broken_pictures, 2, "the picture is gone"),
    ],
    ids=["exception", "bad data"],
)
def test_a_rank_that_fails_ends_the_others(tmp_path, fault, code, words):
    flags = "--max-steps", "1000", "--epochs", "1000", "--dist-timeout", "60"
    processes = start_command(tmp_path, tiny_run(tmp_path, "fails", *flags), fault=fault)
    codes = ended(processes)
    printed = said(tmp_path)
    assert codes[1] == code and codes[0] not in (0, None), printed
    assert words in printed[1] and printed[1].count("Traceback") == (code == 1)


def killed_at_a_picture():
    """This rank dies where it reads its first picture."""
    from protoclip.data.shapes import ShapesDataset

    ShapesDataset.image = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "data", "codes", "words"),
    [
        (killed_at_a_picture, "builtin:shapes:64", [1, -signal.SIGKILL], ""),
        (None, "builtin:cats", [2, 2], "expected one of builtin:icons"),
        (None, "builtin:shapes:64", [0, 0], "Evaluated in"),
    ],
    ids=["a rank is killed", "a mistake", "all goes well"],
)
def test_evaluation_ends_on_all_ranks(tmp_path, fault, data, codes, words):
    tiny_run(tmp_path, "")  # writes the model
    argv = ["tiny.json", "--pretrained", "random", "--data", data, "--output"]
    command = "protoclip.evaluate.__main__"
    processes = start_command(tmp_path, [*argv, "two.json"], fault=fault, command=command)
    assert ended(processes) == codes, said(tmp_path)
    together = "".join(said(tmp_path))
    assert words in together and together.count("error:") <= (codes == [2, 2])
    if codes == [0, 0]:  # the numbers of one process
        assert ended(start_command(tmp_path, [*argv, "one.json"], 1, command=command)) == [0]
        one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
        for name, own in one["trained"].items():
            assert two["trained"][name]["metrics"] == pytest.approx(own["metrics"], rel=1e-4)


LAUNCHERS = {
    "srun": {
        "SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "{rank}", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "{port}",
    },
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{rank}", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_NAMESPACE": "prterun-host-{port}@1",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_variables_are_enough(tmp_path, launcher):
    argv = tiny_run(tmp_path, "run", "--max-steps", "2")
    processes = start_command(tmp_path, argv, variables=LAUNCHERS[launcher])
    assert ended(processes) == [0, 0], said(tmp_path)
    printed = said(tmp_path)
    assert "2 steps of 24" in printed[0] and "2 ranks" in printed[0] and "done: " not in printed[1]


def test_torchrun_trains_evaluates_and_writes_one_folder(tmp_path):
    argv, agents = tiny_run(tmp_path, "both", "--max-steps", "4"), 2
    flags = ["--nproc-per-node", "1", "--nnodes", str(agents)]
    flags += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    running = [torchrun(tmp_path, argv, *flags, "--node-rank", str(n)) for n in range(agents)]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * agents, printed
    run = tmp_path / "logs" / "both"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert json.loads((run / "results.json").read_text())["trained"]
    assert (run / "checkpoints" / "epoch_latest.pt").exists()
    assert sum(text.count("run folder:") for text in printed) == 1
    assert sum(text.count("done: ") for text in printed) == 1


def test_launchers_are_recognised():
    assert find_rank({}).world_size == 1
    slurm = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08,11],big1", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    info = find_rank(slurm)
    assert (info.rank, info.world_size, info.local_rank) == (5, 16, 1)
    assert info.master == ("gpu07", 23456)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert find_rank(batch_script).world_size == 1
    mpirun = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    assert find_rank(mpirun).master == ("127.0.0.1", 20000)
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR"):
        find_rank({**mpirun, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK"):
        find_rank({"RANK": "4", "WORLD_SIZE": "4"})
