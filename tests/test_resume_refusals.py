"""A refused --resume changes nothing in the run's folder; the reason is a sentence."""

import json
import shutil

import pytest
from filelock import FileLock
from ranks import losses

from protoclip import checkpoint
from protoclip.train import main


@pytest.fixture
def run(trained, tmp_path, capsys):
    """The folder of a copy, its newest payload, and how to resume it: (code, message, touched)."""
    folder = shutil.copytree(trained, tmp_path / "logs" / "run")
    latest = checkpoint.candidates(folder)[0]

    def files():
        return {
            path: path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    def resume(*flags, payload=None):
        if payload is not None:
            checkpoint.save(latest, payload)
        before = files()
        argv = ["--resume", str(folder), "--logs", str(tmp_path / "logs"), "--max-steps", "6"]
        capsys.readouterr()
        code = main([*argv, *flags])
        return code, capsys.readouterr().err, files() != before

    resume.payload = checkpoint.load(latest)
    resume.folder = folder
    return resume


def assert_refused(outcome, *words):
    code, message, touched = outcome
    assert code == 2 and not touched, message
    assert "Traceback" not in message and message.count("error:") == 1
    for word in words:
        assert word in message


def test_it_resumes(run):
    code, message, touched = run("--lr", "0.5")
    assert code == 0 and touched, message
    assert json.loads((run.folder / "config.json").read_text())["optim"]["lr"] == 0.5
    assert "lr was 0.0" in (run.folder / "out.log").read_text()
    assert [step for step, _ in losses(run.folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.5", "--batch-size", "8"], "batch_size"),
        (["--lr", "0.5", "--train-data", "builtin:shapes:90"], "training data"),
        (["--lr", "0.5", "--episode-features", "extract"], "--resume"),
        (["--resume", "auto", "--name", "../logs/run"], "--name"),
        (["--resume", "auto", "--name", ".."], "--name"),
        (["--lr", "0.5", "--seed", "4"], "run.seed"),
        (["--lr", "0.5", "--siglip"], "model.siglip"),
        (["--lr", "0.5", "--save-every", "often"], "500steps"),
        (["--resume", "nowhere"], "found nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_settings_that_do_not_go_on(run, flags, words):
    assert_refused(run(*flags), words)


@pytest.mark.parametrize("results", [True, False], ids=["with results", "without"])
def test_a_finished_run_takes_no_other_settings(run, results):
    """Without evaluation data a finished run has no results."""
    if not results:
        (run.folder / "results.json").unlink()
    words = ("has done all of its steps", "optim.lr was", "is 0.5", "--epochs", "--pretrained")
    assert_refused(run("--max-steps", "5", "--lr", "0.5"), *words)
    assert_refused(run("--max-steps", "5", "--seed", "4"), "run.seed was 0 and is 4")
    code, message, touched = run("--max-steps", "5", "--workers", "0")
    assert code == 0 and touched == (not results), message


def test_a_run_that_goes_on_elsewhere(run):
    with FileLock(run.folder / ".lock"):
        assert_refused(run("--lr", "0.5"), "in use by another process")


def test_what_is_missing_is_named(run):
    """Any entry of a checkpoint; the newest one only, so that there is none to fall back on."""
    for part in (
        run.payload["protoclip"]["training"], run.payload["protoclip"], run.payload,
    ):  # fmt: skip
        # What only a note or evaluation reads may be missing.
        for name in sorted(
            set(part) - {"name", "preprocess", "protoclip", "passes", "format", "epoch"}
        ):
            value = part.pop(name)
            assert_refused(run("--lr", "0.5", payload=run.payload), "checkpoint")
            part[name] = value


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize("missing", ["state_dict", "config", "all"])
def test_other_commands_say_it_too(run, command, missing, tmp_path, capsys):
    if missing == "all":
        run.payload["protoclip"] = {}
    else:
        del (run.payload if missing in run.payload else run.payload["protoclip"])[missing]
    path = tmp_path / "stranger.pt"
    checkpoint.save(path, run.payload)
    module = pytest.importorskip(f"protoclip.{command}{'.__main__' * (command == 'evaluate')}")
    rest = ["--out", str(tmp_path / "out")] if command == "export" else []
    assert module.main([str(path), *rest]) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "Traceback" not in message
