"""What a run writes and where: metrics, boards, full disks, folders that cannot be written."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ranks import bare_run, config_of, full_disk, metrics

from protoclip import train
from protoclip.runs import checkpoint
from protoclip.runs.resume import find_resume
from protoclip.runs.run_folder import RunFolder, choose_folder, sum_up
from protoclip.settings.config import RunConfig, TrainConfig
from protoclip.train import main
from protoclip.training.loop import Trainer

WANDB = importlib.util.find_spec("wandb") is not None


def open_folder(path: Path, config: TrainConfig, resume_step: int | None = None) -> RunFolder:
    folder = RunFolder(path, config)
    folder.open(resume_step)
    return folder


def test_a_full_disk_ends_the_run_in_a_sentence_and_resume_goes_on(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the second checkpoint; the first one stays whole."""
    flags = bare_run(workdir, "--max-steps", "9")
    run = workdir / "logs" / "run"
    original_save = Trainer.save

    def save_on_a_full_disk(trainer: Trainer, epoch: int | None = None) -> None:
        if trainer.step != 6:
            return original_save(trainer, epoch)
        with full_disk(1_000_000):
            original_save(trainer, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_on_a_full_disk)
        assert main([*flags, "--save-every", "3steps"]) == 2
    message = capsys.readouterr().err
    assert "epoch_latest.pt: " in message and "--resume" in message and "Traceback" not in message
    assert checkpoint.load(run / "checkpoints" / checkpoint.LATEST)["protoclip"]["step"] == 3
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {checkpoint.LATEST, checkpoint.PREVIOUS}
    assert main([*flags, "--resume", str(run)]) == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 10))


def test_a_power_cut_leaves_metrics_and_a_checkpoint_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not synced may be lost: the metrics first, then the checkpoint, which then takes the
    place of the one before."""
    folder = open_folder(tmp_path / "run", config_of())
    events: list[str] = []
    original_sync, original_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append(f"synced {name.partition('.')[0]}")
        original_sync(descriptor)

    def replace(old: Any, new: Any) -> None:
        events.append(f"renamed to {Path(new).name}")
        original_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    folder.checkpoint({"epoch": 1}, None)
    folder.close()
    assert events == ["synced metrics", "synced epoch_latest", "renamed to epoch_latest.pt"]


def saved_steps(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[int]:
    """The steps after which a run of nine steps saves."""
    steps: list[int] = []
    original_save = Trainer.save

    def save(trainer: Trainer, epoch: int | None = None) -> None:
        steps.append(trainer.step)
        original_save(trainer, epoch)

    monkeypatch.setattr(Trainer, "save", save)
    assert main(bare_run(folder, "--max-steps", "9", *flags)) == 0
    return steps


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], [1, 9]), (["--save-every", "4steps"], [1, 4, 8, 9]), (["--save-every", "0"], [9])],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_run_saves_after_its_first_step(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: list[int]
) -> None:
    """A full disk shows at once, and little is lost whatever ends the run."""
    assert saved_steps(workdir, monkeypatch, *flags) == expected


def test_little_free_space_is_said_before_training(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(workdir)
    for free, warned in ((10_000, True), (10**9, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        flags = bare_run(workdir, "--max-steps", "2", "--name", f"with-{free}")
        assert main(flags) == 0
        assert ("0.0 MiB are free at" in capsys.readouterr().err) == warned
    file = workdir / "logs" / "with-10000" / "checkpoints" / checkpoint.LATEST
    planned = train.checkpoint_bytes
    sizes: list[int] = []
    monkeypatch.setattr(
        train, "checkpoint_bytes", lambda trainer: sizes.append(planned(trainer)) or sizes[0]
    )
    assert main(bare_run(workdir, "--max-steps", "2", "--name", "again")) == 0
    assert 0.8 < sizes[0] / file.stat().st_size < 1.25


def test_a_start_that_failed_can_be_tried_again_in_the_same_process(tmp_path: Path) -> None:
    """A notebook keeps the error, and so all that it holds."""
    config = TrainConfig()
    with full_disk(0), pytest.raises(OSError, match="config.json") as kept:
        open_folder(tmp_path / "run", config, 0)
    open_folder(tmp_path / "run", config, 0).close()
    assert kept.value.filename


def test_resume_auto_without_a_checkpoint_begins_again_and_keeps_the_old_metrics(
    workdir: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str]
) -> None:
    flags = bare_run(workdir, "--max-steps", "3")
    run = workdir / "logs" / "run"
    for attempt in (1, 2):
        with full_disk(60_000):  # at the first checkpoint
            assert main([*flags, "--resume", "auto"]) == 2
        said = capsys.readouterr().err
        assert "there is no checkpoint yet" in said and "intact" not in said
        assert "Traceback" not in said
        assert len(metrics(run)) == 1 and not list((run / "checkpoints").iterdir())
        kept = [run / f"metrics.{number}.jsonl" for number in range(1, attempt)]
        assert all(path.read_text().count("\n") == 1 for path in kept)
    # What the folder's name alone, and --resume with its path, say about the way out.
    assert "start it again with --resume auto" in error_of(main, flags)
    error = error_of(main, [*flags, "--resume", run])
    assert f"--resume auto --logs {run.parent} --name run" in error
    assert main([*flags, "--resume", "auto"]) == 0
    assert f"no checkpoint in {Path('logs/run')}, starting at step 0" in capsys.readouterr().err
    assert len(metrics(run)) == 3 and (run / "metrics.2.jsonl").exists()


def test_a_resumed_run_drops_later_and_torn_lines_and_scalars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    # Files of one second sort by this number as text: 9 would come after 10.
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))
    config = TrainConfig(run=RunConfig(report_to="tensorboard"))
    folder = open_folder(tmp_path / "r", config)
    for step in (1, 2, 3):
        folder.metrics(step, step, {"loss": float(step), "val_HO_recall@1": 0.5})
    folder.close()
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    folder = open_folder(tmp_path / "r", config, resume_step=1)
    folder.metrics(2, 2, {"loss": 20.0})
    folder.close()
    assert [line["step"] for line in metrics(tmp_path / "r")] == [1, 2]
    events = accumulator.EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert [e.value for e in events.Scalars("val/HO_recall@1")] == [0.5]


def test_a_resumed_run_continues_the_same_run_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = TrainConfig(run=RunConfig(report_to="wandb", wandb_project_name="pairs"))
    for name, resume_step in (("a", None), ("a", 1), ("b", None)):
        run = wandb.init.return_value = mock.Mock()
        folder = open_folder(tmp_path / name, config, resume_step)
        folder.metrics(2, 8, {"loss": 3.0, "val_HO_recall@1": 0.5})
        run.log.assert_called_once_with({"train/loss": 3.0, "val/HO_recall@1": 0.5}, step=2)
        assert not run.finish.called
        folder.close()
        assert run.finish.called
    first, resumed, other = [call.kwargs for call in wandb.init.call_args_list]
    assert first == resumed and first["resume"] == "allow"
    assert first["id"] and first["id"] != other["id"]
    assert (first["name"], first["project"], first["dir"]) == ("a", "pairs", str(tmp_path / "a"))
    assert first["config"]["run"]["wandb_project_name"] == "pairs"


def test_the_settings_of_a_resumed_run_are_a_preset_of_another_one(tmp_path: Path) -> None:
    run = tmp_path / "a"
    flags = ["--logs", str(tmp_path), "--report-to", "none"]
    open_folder(run, config_of("--name", "a", "--resume", str(run), *flags)).close()
    (run / "checkpoints" / checkpoint.LATEST).touch()
    other = config_of("--preset", str(run / "config.json"), "--name", "b")
    assert find_resume(other) is None and choose_folder(other) == tmp_path / "b"


def test_the_boards_take_settings_that_are_not_utf_8(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_of("--train-data", os.fsdecode(b"caf\xe9"))
    sum_up(tmp_path, config, None, {"recall": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("recall")] == [0.5]


def test_a_kept_checkpoint_of_a_run_is_its_newest(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is of a pass that the end of the run cuts off: 2 x 150 samples in 19 steps."""
    steps = saved_steps(
        workdir, monkeypatch, "--max-steps", "0", "--epochs", "2", "--save-frequency", "1",
        "--save-every", "0", "--method", "clip",
    )  # fmt: skip
    run = workdir / "logs" / "run"
    saved = {
        file.name: checkpoint.load(file)["protoclip"]["step"] for file in checkpoint.candidates(run)
    }
    assert steps == [10, 19]
    assert saved == {
        checkpoint.LATEST: 19, checkpoint.PREVIOUS: 10, "epoch_2.pt": 19, "epoch_1.pt": 10
    }  # fmt: skip
    assert metrics(run)[-1]["epoch"] == 19 * 16 / 150


@pytest.mark.skipif(WANDB, reason="wandb is installed")
def test_a_board_that_is_not_installed_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--report-to", "wandb", "--train-data", "builtin:shapes:64", "--logs", str(tmp_path)]
    assert main([*flags, "--external-teacher", "none"]) != 0
    assert "pip install wandb" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
