"""Where scalars go besides metrics.jsonl."""

import importlib.util
import json

import pytest

from protoclip.config import RunConfig, TrainConfig
from protoclip.train import main
from protoclip.training.run_folder import RunFolder, choose_folder

WANDB = importlib.util.find_spec("wandb") is not None


def test_tensorboard_has_the_scalars_and_forgets_what_a_resumed_run_does_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(run=RunConfig(report_to="tensorboard"))
    folder = RunFolder(tmp_path / "r", config)
    for step in (1, 2, 3):
        folder.metrics(step, step, {"loss": float(step), "val_HO_recall@1": 0.5})
    folder.close()
    folder = RunFolder(tmp_path / "r", config, resume_step=1)
    folder.metrics(2, 2, {"loss": 20.0})
    folder.close()
    events = accumulator.EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert [e.value for e in events.Scalars("val/HO_recall@1")] == [0.5]


@pytest.mark.skipif(WANDB, reason="wandb is installed")
def test_a_board_that_is_not_installed_is_refused_before_anything_is_made(tmp_path, capsys):
    flags = ["--report-to", "wandb", "--train-data", "builtin:shapes:64", "--logs", str(tmp_path)]
    assert main([*flags, "--external-teacher", "none"]) != 0
    assert "pip install wandb" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not WANDB, reason="wandb is not installed")
def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = TrainConfig(run=RunConfig(report_to="tensorboard,wandb", name="r", logs=str(tmp_path)))
    ids = []
    for resume_step in (None, 1):
        folder = RunFolder(choose_folder(config) if resume_step is None else tmp_path / "r", config,
                           resume_step)  # fmt: skip
        folder.metrics(2, 2, {"loss": 0.5})
        folder.close()
        ids.append((tmp_path / "r" / "wandb_id").read_text())
    assert ids[0] == ids[1] and (tmp_path / "r" / "tensorboard").is_dir()
    runs = [p for p in (tmp_path / "r" / "wandb").glob("offline-run-*") if ids[0] in p.name]
    assert runs and json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[0])
