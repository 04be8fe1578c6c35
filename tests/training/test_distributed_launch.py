"""The commands on several ranks: launchers, mistakes, and a rank that is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import (
    bare_run,
    exit_codes,
    logs_of,
    metrics,
    on_ranks,
    output_of,
    start_command,
    steps_of,
    tiny_run,
    torchrun,
    wait_until,
)

from protoclip import distributed
from protoclip.distributed import find_rank


def lose_a_rank(folder: Path, victim: int, sent: signal.Signals, timeout: str) -> list[Any]:
    """The processes of a run, one of which was sent a signal after two steps."""
    argv = bare_run(folder, "--max-steps", "100000", "--epochs", "100000")
    processes = start_command(folder, [*argv, "--dist-timeout", timeout], bare=True)
    wait_until(lambda: steps_of(folder, "run") >= 2, processes, folder)
    os.kill(processes[victim].pid, sent)
    return processes


@pytest.fixture(scope="module")
def hanging_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The rank that waits for one that hangs, and its folder. It waits twenty seconds, in which a
    healthy one must have got its turn on a busy machine, while other tests run."""
    folder = tmp_path_factory.mktemp("hangs")
    waiting, hanging = lose_a_rank(folder, victim=1, sent=signal.SIGSTOP, timeout="20")
    yield waiting, folder
    hanging.kill()


@pytest.mark.usefixtures("hanging_run")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path, victim: int) -> None:
    processes = lose_a_rank(tmp_path, victim, signal.SIGKILL, timeout="600")
    assert exit_codes([processes[1 - victim]]) == [1], logs_of(tmp_path)


def test_a_mistake_is_reported_once(tmp_path: Path) -> None:
    processes = start_command(tmp_path, tiny_run(tmp_path, "bad", "--k", "1000"))
    assert exit_codes(processes) == [2, 2]
    together = "".join(output_of(tmp_path))
    assert together.count("--k: expected") == 1 and "Traceback" not in together


def break_the_third_step() -> None:
    """It raises what nobody expects."""
    from protoclip.training.loop import Trainer

    original_step = Trainer.take_step

    def raising(trainer: Trainer, step: int, batches: Any) -> Any:
        if step == 2:
            raise KeyError("a mistake of the program")
        return original_step(trainer, step, batches)

    Trainer.take_step = raising


def lose_the_pictures() -> None:
    """As a rank whose disk has failed."""
    from protoclip.data import DataError
    from protoclip.data.shapes import ShapesDataset

    def image(dataset: ShapesDataset, position: int) -> Any:
        raise DataError(f"sample {position}: the picture is gone")

    ShapesDataset.image = image


@pytest.mark.parametrize(
    ("fault", "code", "tracebacks", "words"),
    [
        (break_the_third_step, 1, 1, "KeyError: 'a mistake of the program'"),
        (lose_the_pictures, 2, 0, "the picture is gone"),
    ],
    ids=["exception", "bad data"],
)
def test_a_rank_that_fails_ends_the_others(
    tmp_path: Path, fault: Callable[[], None], code: int, tracebacks: int, words: str
) -> None:
    argv = tiny_run(
        tmp_path, "fails", "--max-steps", "1000", "--epochs", "1000", "--dist-timeout", "60"
    )
    first_code, second_code = exit_codes(start_command(tmp_path, argv, fault=fault))
    printed = output_of(tmp_path)
    assert second_code == code and first_code not in (0, None), printed
    assert words in printed[1] and printed[1].count("Traceback") == tracebacks


def die_at_a_picture() -> None:
    """Where this rank reads its first one."""
    from protoclip.data.shapes import ShapesDataset

    ShapesDataset.image = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def evaluate_on_ranks(
    folder: Path,
    data: str,
    output: str,
    ranks: int = 2,
    fault: Callable[[], None] | None = None,
) -> list[int | None]:
    """The exit codes of ``protoclip evaluate`` of an untrained model."""
    tiny_run(folder, "")  # writes the model
    argv = ["tiny.json", "--pretrained", "random", "--data", data, "--output", output]
    command = "protoclip.evaluate.__main__"
    return exit_codes(start_command(folder, argv, ranks, fault=fault, command=command))


def fail_alone() -> tuple[int, bool, str]:
    """Exit code, whether the process is still one of the group, and what the loss of the other
    rank raised."""

    def work() -> None:
        distributed.start(find_rank(), torch.device("cpu"), timeout=100)
        later = distributed.max_later(torch.ones(1))
        if distributed.rank() == 1:
            raise ValueError("only here")
        later()
        distributed.sum_over_ranks(torch.ones(1))

    raised = ""
    try:
        code = distributed.run_command(work, "protoclip")
    except RuntimeError as error:  # the other one is gone
        code = 1
        raised = str(error)
    return code, dist.is_initialized(), raised


def test_a_rank_that_fails_leaves_the_group_and_lets_go_of_the_others() -> None:
    outcomes = on_ranks(2, fail_alone)
    assert [(code, still_member) for code, still_member, _ in outcomes] == [(1, False), (2, False)]
    _, _, raised = outcomes[0]
    assert raised and "timed out" not in raised.lower()  # closed, reset or a broken pipe: by chance


def start_again() -> list[float]:
    """Sums over the ranks in groups that follow each other, as of runs of one program."""
    sums: list[float] = []
    for turn in range(4):
        distributed.start(find_rank(), torch.device("cpu"), timeout=60)
        total = distributed.sum_over_ranks(torch.ones(1))
        sums.append(float(total))
        distributed.stop()
        if find_rank().rank == turn // 2:
            time.sleep(0.5)  # the other one is at the next start already
    return sums


def test_processes_can_train_again() -> None:
    """Their store outlives a group; the next one must not read its addresses."""
    assert on_ranks(2, start_again) == [[2.0] * 4] * 2


def test_evaluation_ends_when_a_rank_is_killed(tmp_path: Path) -> None:
    codes = evaluate_on_ranks(tmp_path, "builtin:shapes:64", "two.json", fault=die_at_a_picture)
    assert codes == [1, -signal.SIGKILL], logs_of(tmp_path)
    assert "".join(output_of(tmp_path)).count("error:") == 0


def test_evaluation_reports_a_mistake_once(tmp_path: Path) -> None:
    assert evaluate_on_ranks(tmp_path, "builtin:cats", "two.json") == [2, 2], logs_of(tmp_path)
    together = "".join(output_of(tmp_path))
    assert "expected one of builtin:icons" in together and together.count("error:") <= 1


def test_evaluation_on_two_ranks_has_the_numbers_of_one(tmp_path: Path) -> None:
    assert evaluate_on_ranks(tmp_path, "builtin:shapes:64", "two.json") == [0, 0], logs_of(tmp_path)
    together = "".join(output_of(tmp_path))
    assert "Evaluated in" in together and together.count("error:") == 0
    assert evaluate_on_ranks(tmp_path, "builtin:shapes:64", "one.json", ranks=1) == [0]
    on_two = json.loads((tmp_path / "two.json").read_text())["trained"]
    on_one = json.loads((tmp_path / "one.json").read_text())["trained"]
    for name, results in on_one.items():
        assert on_two[name]["metrics"] == pytest.approx(results["metrics"], rel=1e-4)


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
def test_other_launchers_variables_are_enough(tmp_path: Path, launcher: str) -> None:
    argv = tiny_run(tmp_path, "run", "--max-steps", "2")
    processes = start_command(tmp_path, argv, variables=LAUNCHERS[launcher])
    assert exit_codes(processes) == [0, 0], logs_of(tmp_path)
    printed = output_of(tmp_path)
    assert "2 steps of 24" in printed[0] and "2 ranks" in printed[0] and "done: " not in printed[1]


def test_torchrun_trains_evaluates_and_writes_one_folder(tmp_path: Path) -> None:
    """Two agents of one rank each, as on two machines."""
    argv = tiny_run(tmp_path, "both", "--max-steps", "4")
    agents = torchrun(tmp_path, argv, "--nproc-per-node", "1", machines=2)
    assert exit_codes(agents) == [0, 0], logs_of(tmp_path)
    printed = output_of(tmp_path)
    run = tmp_path / "logs" / "both"
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert json.loads((run / "results.json").read_text())["trained"]
    assert (run / "checkpoints" / "epoch_latest.pt").exists()
    assert sum(text.count("run folder:") for text in printed) == 1
    assert sum(text.count("done: ") for text in printed) == 1


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(
    hanging_run: tuple[Any, Path],
) -> None:
    waiting, folder = hanging_run
    assert exit_codes([waiting]) == [1], logs_of(folder)


def slow_imports() -> bool:
    return {"open_clip", "sklearn.neighbors", "matplotlib.figure"} <= sys.modules.keys()


def test_ranks_are_forked_from_a_process_that_has_done_the_slow_imports() -> None:
    """Each would take six seconds for them, and a fork server leaves out in silence what it does
    not find."""
    assert on_ranks(1, slow_imports) == [True]


def test_slurms_variables_are_recognised() -> None:
    info = find_rank({
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08,11],big1", "SLURM_JOB_ID": "123456",
    })  # fmt: skip
    assert (info.rank, info.world_size, info.local_rank) == (5, 16, 1)
    assert info.master == ("gpu07", 23456)


def test_without_a_launcher_there_is_one_rank() -> None:
    """A batch script of SLURM is none."""
    for variables in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}):
        assert find_rank(variables).world_size == 1


def test_mpiruns_variables_are_recognised() -> None:
    mpirun = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
    assert find_rank(mpirun).master == ("127.0.0.1", 20000)
    on_several_machines = mpirun | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match="mpirun -x MASTER_ADDR"):
        find_rank(on_several_machines)


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="RANK"):
        find_rank({"RANK": "4", "WORLD_SIZE": "4"})
