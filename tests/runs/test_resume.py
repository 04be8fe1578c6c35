"""A run that was stopped goes on as if nothing had happened: the same losses, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import (
    LONGEST,
    TINY,
    bare_run,
    exit_codes,
    logs_of,
    losses,
    metrics,
    output_of,
    start_command,
    steps_of,
    tiny_run,
    wait_until,
)
from steps import poison
from torch import Tensor

from protoclip.data import loader
from protoclip.runs import checkpoint
from protoclip.settings.flags import with_saved_config
from protoclip.train import main
from protoclip.training.loop import Trainer
from protoclip.training.stops import Stops

KILLS = int(os.environ.get("PROTOCLIP_KILLS", "2"))  # make faults: 20


def pause_inside_a_save(number: int) -> None:
    """The write of the checkpoint of this number, from 1, does not end."""
    original_save = torch.save
    saves = 0

    def save(*arguments: Any, **options: Any) -> None:
        nonlocal saves
        original_save(*arguments, **options)
        saves += 1
        if saves == number:
            time.sleep(LONGEST)

    torch.save = save


@pytest.mark.parametrize("ranks", [1, 2] if KILLS > 2 else [1])
def test_kill_minus_nine_changes_no_bit(tmp_path: Path, ranks: int) -> None:
    """Every other time inside the write of a checkpoint."""
    num_steps = 16 + 3 * KILLS

    def start(name: str, fault: Callable[[], None] | None = None) -> list[Any]:
        argv = bare_run(
            tmp_path, "--name", name, "--max-steps", str(num_steps), "--save-every", "1steps",
            "--resume", "auto", "--episode-features", "reuse",
        )  # fmt: skip
        return start_command(tmp_path, argv, ranks, fault=fault, faulty_rank=0, bare=True)

    checkpoints = tmp_path / "logs" / "killed" / "checkpoints"
    dice = random.Random(0)
    for number in range(KILLS):
        if number % 2:
            processes = start("killed", partial(pause_inside_a_save, 1 + dice.randrange(3)))
            unfinished = f"*.{processes[0].pid}.tmp"
            wait_until(lambda name=unfinished: list(checkpoints.glob(name)), processes, tmp_path)
        else:
            steps_before = steps_of(tmp_path, "killed")
            processes = start("killed")
            wait_until(
                lambda steps=steps_before: steps_of(tmp_path, "killed") > steps, processes, tmp_path
            )
            time.sleep(0.1 * dice.random())
        for process in processes:
            process.kill()
        exit_codes(processes)
    for name in ("killed", "whole"):
        assert exit_codes(start(name)) == [0] * ranks, logs_of(tmp_path)
    whole = losses(tmp_path / "logs" / "whole")
    assert losses(tmp_path / "logs" / "killed") == whole and len(whole) == num_steps


pytestmark = pytest.mark.usefixtures("no_evaluation")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ten steps a pass over the data and four an episode: stored features have labels for all of
    an episode's samples from step 13 on."""
    folder = tmp_path_factory.mktemp("data")
    return bare_run(folder, "--max-steps", "22", "--episode-features", "reuse")


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def stored_features(payload: dict[str, Any]) -> dict[str, Tensor]:
    return payload["protoclip"]["training"]["features"]


def lines_without_times(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, those of its episodes too."""
    return [
        {name: value for name, value in line.items() if "second" not in name and name != "time"}
        for line in metrics(run)
    ]


@pytest.mark.parametrize(
    "more",
    [[], ["--lit-start", "3"], ["--lit-start", "4"], ["--siglip"], ["--log-every-n-steps", "5"]],
    ids=" ".join,
)
def test_resume_ends_in_the_same_bits(tmp_path: Path, flags: list[str], more: list[str]) -> None:
    """From a checkpoint within the fourth episode, which has prototypes or, after --lit-start 3, a
    locked image tower; moments and heads included."""
    flags = [*flags, "--logs", str(tmp_path), "--save-every", "14steps", *more]
    whole_run = tmp_path / "whole"
    cut_run = tmp_path / "cut"
    assert main([*flags, "--name", "whole"]) == 0
    shutil.copytree(whole_run, cut_run)
    (cut_run / "checkpoints" / checkpoint.LATEST).unlink()
    assert main([*flags, "--resume", str(cut_run), "--workers", "1"]) == 0
    assert "after step 14" in (cut_run / "out.log").read_text()
    assert losses(cut_run) == losses(whole_run)
    assert lines_without_times(cut_run) == lines_without_times(whole_run)
    (step_15,) = [line for line in metrics(cut_run) if line["step"] == 15 and "loss" in line]
    assert ("proto_loss" in step_15) == ("3" not in more)
    cut = checkpoint.load_newest(cut_run)[1]
    whole = checkpoint.load_newest(whole_run)[1]
    assert_same_tensors(cut["state_dict"], whole["state_dict"])
    assert_same_tensors(cut["protoclip"]["heads"], whole["protoclip"]["heads"])
    for parameter, moments in whole["optimizer"]["state"].items():
        assert_same_tensors(cut["optimizer"]["state"][parameter], moments)
    assert_same_tensors(stored_features(cut), stored_features(whole))


def test_a_stop_at_an_episodes_last_step_has_stored_the_episode(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 7 and 8 have pictures of NaN; the second one ends an episode and the run."""
    poison(monkeypatch, {6, 7})
    flags = [*flags, "--logs", str(tmp_path), "--val-frequency", "0"]
    assert main([*flags, "--name", "whole"]) == 0
    assert main([*flags, "--name", "cut", "--max-bad-steps", "2"]) == 2
    stopped = checkpoint.load_newest(tmp_path / "cut")[1]
    features = stored_features(stopped)
    assert stopped["protoclip"]["step"] == 8 and len(features["index"]) == 0
    # Both episodes are of 64 distinct samples; the rows of the two bad steps do not count.
    assert torch.bincount(features["written"] + 1).tolist() == [150 - 96, 64, 32]
    assert main([*flags, "--resume", str(tmp_path / "cut"), "--max-bad-steps", "9"]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_same_tensors(
        stored_features(checkpoint.load_newest(tmp_path / "cut")[1]),
        stored_features(checkpoint.load_newest(tmp_path / "whole")[1]),
    )


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        (
            ["--precision", "auto"], ["--precision", "auto"],
            "until now the run computed in fp32, and --precision auto means amp_bf16 here",
        ),
        (
            ["--external-teacher", "teacher.npy"], [],  # automatic weights, and it is gone
            "until now the run trained a teacher's prototypes, and from here on internal "
            "prototypes",
        ),
        (
            ["--model", "dropout.json"],
            ["--model", "dropout.json", "--batch-size", "6", "--accum-freq", "2"],
            "the number of ranks or passes has changed; this model has dropout",
        ),
    ],
    ids=["precision", "prototypes", "passes"],
)  # fmt: skip
def test_a_resumed_run_says_why_its_losses_will_differ(
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: list[str],
    after: list[str],
    note: str,
) -> None:
    model = TINY | {"vision_cfg": TINY["vision_cfg"] | {"patch_dropout": 0.5}}
    Path("dropout.json").write_text(json.dumps(model))
    np.save("teacher.npy", np.random.default_rng(0).standard_normal((52, 4), dtype=np.float32))
    flags = tiny_run(workdir, "run")
    monkeypatch.setattr("protoclip.model.processor_multiplies_bf16", lambda: False)
    assert main([*flags, "--max-steps", "3", *before]) == 0
    monkeypatch.setattr("protoclip.model.processor_multiplies_bf16", lambda: True)
    capsys.readouterr()
    assert main([*flags, "--max-steps", "5", *after, "--resume", "logs/run"]) == 0
    assert note in capsys.readouterr().err


def test_a_run_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Within an episode, whose labels are of features that other ranks have computed: 64 pairs are
    three steps a pass, an episode as well. Beside whole runs on as many ranks as it began with: on
    another number stored features round to other bf16 values, which moves the clusters of a later
    episode a little."""

    def run(name: str, *, ranks: int, steps: int, resume: list[str] | None = None) -> None:
        argv = tiny_run(
            tmp_path, name, "--lr-scheduler", "const", "--warmup", "2", "--epochs", "100",
            "--episode-features", "reuse",  # five steps alone are too few for "auto"
            "--batch-size", str(24 // ranks), "--max-steps", str(steps), *(resume or []),
        )  # fmt: skip
        codes = exit_codes(start_command(tmp_path, argv, ranks, bare=True))
        assert codes == [0] * ranks, logs_of(tmp_path)

    whole = {}
    for ranks in (1, 2):
        run(f"whole-{ranks}", ranks=ranks, steps=10)
        whole[ranks] = dict(losses(tmp_path / "logs" / f"whole-{ranks}"))
    for before, after in ((1, 2), (2, 1), (2, 4)):
        name = f"{before}-{after}"
        run(name, ranks=before, steps=5)
        run(name, ranks=after, steps=10, resume=["--resume", f"logs/{name}"])
        moved = dict(losses(tmp_path / "logs" / name))
        assert list(moved) == list(range(1, 11))
        assert "number of ranks or passes" not in output_of(tmp_path)[0]
        assert moved == pytest.approx(whole[before], rel=3e-4), name


def test_a_torn_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*flags, "--logs", str(tmp_path), "--name", "run", "--max-steps", "8"]
    assert main([*flags, "--save-every", "3steps"]) == 0
    whole = losses(tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / checkpoint.LATEST
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    latest.write_bytes(data)
    assert main([*flags, "--resume", str(tmp_path / "run")]) == 0
    assert "checksum is wrong" in caplog.text and "the one before" in caplog.text
    assert "after step 6" in (tmp_path / "run" / "out.log").read_text()
    assert losses(tmp_path / "run") == whole


@pytest.mark.smoke
def test_auto_starts_a_named_run_and_goes_on_with_it(tmp_path: Path, flags: list[str]) -> None:
    flags = [*flags, "--logs", str(tmp_path), "--resume", "auto", "--name", "run"]
    assert main([*flags, "--max-steps", "2"]) == 0
    assert main([*flags, "--max-steps", "4"]) == 0
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]


def test_workers_chosen_for_a_machine_stay_out_of_the_config(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine for which --workers auto means two processes, in a run of three episodes; then one
    for which it means none."""
    flags = [*flags, "--logs", str(tmp_path), "--save-every", "9steps", "--max-steps", "11"]
    assert main([*flags, "--name", "whole"]) == 0
    started: list[set[Any]] = []
    original = loader._Pool.load

    def load(pool: Any, *arguments: Any) -> Any:
        batches = original(pool, *arguments)
        started.append({process.pid for process in pool.processes})
        return batches

    monkeypatch.setattr(loader._Pool, "load", load)
    monkeypatch.setattr("protoclip.train.choose_workers", lambda *_: 2)
    assert main([*flags, "--name", "cut"]) == 0
    in_training = [pids for pids in started if started.count(pids) > 1]
    assert len(in_training) == 3 and len(set.union(*in_training)) == 2
    run = tmp_path / "cut"
    assert json.loads((run / "config.json").read_text())["data"]["workers"] == -1
    assert checkpoint.load_newest(run)[1]["protoclip"]["config"]["data"]["workers"] == -1
    (run / "checkpoints" / checkpoint.LATEST).unlink()
    monkeypatch.undo()
    monkeypatch.setattr("protoclip.training.summary.draw_plots", lambda *_: None)
    monkeypatch.setattr("protoclip.training.summary.page.write_report", lambda runs: runs[0])
    assert main(["--resume", str(run)]) == 0
    assert "after step 9" in (run / "out.log").read_text()
    assert losses(run) == losses(tmp_path / "whole")


def test_a_run_goes_on_from_the_checkpoint_it_was_given_or_kept_last(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a kept checkpoint, at step 10; then before the first save of a run that goes
    back to it."""
    run = tmp_path / "run"
    kept = ["--save-frequency", "1", "--save-every", "0"]
    flags = [*flags, "--logs", str(tmp_path), "--name", "run", *kept]

    def killed(trainer: Trainer) -> None:
        raise SystemError("killed")

    after = Stops.after

    def killed_at_step_12(stops: Stops, step: int) -> None:
        if step == 12:
            raise SystemError("killed")
        after(stops, step)

    with monkeypatch.context() as patch:
        patch.setattr(Stops, "after", killed_at_step_12)
        with pytest.raises(SystemError):
            main(flags)
    assert checkpoint.load_newest(run)[1]["protoclip"]["step"] == 10
    assert main([*flags, "--max-steps", "13", "--resume", str(run)]) == 0
    assert checkpoint.load_newest(run)[1]["protoclip"]["step"] == 13
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", killed)
        with pytest.raises(SystemError):
            main([*flags, "--resume", str(run / "checkpoints" / "epoch_1.pt")])
    assert checkpoint.load_newest(run)[1]["protoclip"]["step"] == 10
    assert main([*flags, "--max-steps", "12", "--resume", str(run)]) == 0
    assert [step for step, _ in losses(run)] == list(range(1, 13))


def test_the_settings_of_a_run_are_found_by_its_folder_or_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in the folder where one works, which may have a config.json of something else."""
    run = tmp_path / "logs" / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / checkpoint.LATEST).touch()
    for folder in (run, tmp_path):
        (folder / "config.json").write_text("{}")

    def settings_for(resume: str) -> list[Path]:
        words = with_saved_config(["--resume", resume])
        return [Path(word).resolve() for word in words if word.endswith(".json")]

    monkeypatch.chdir(tmp_path)
    for resume in ("auto", "latest", "nowhere"):
        assert settings_for(resume) == []
    checkpoints = "logs/run/checkpoints"
    for resume in ("logs/run", checkpoints, f"{checkpoints}/{checkpoint.LATEST}"):
        assert settings_for(resume) == [run / "config.json"]
    monkeypatch.chdir(checkpoints)
    for resume in (".", checkpoint.LATEST):
        assert settings_for(resume) == [run / "config.json"]
