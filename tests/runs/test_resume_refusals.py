"""A refused --resume changes nothing in the run's folder; the reason is a sentence."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock
from ranks import losses

from protoclip.evaluate.results import read_results
from protoclip.runs import checkpoint
from protoclip.train import main


class Outcome(NamedTuple):
    code: int
    message: str
    changed_files: bool


class Run:
    """A copy of a run of five steps, with its newest checkpoint."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.checkpoint = checkpoint.candidates(folder)[0]
        self.payload = checkpoint.load(self.checkpoint)

    def files(self) -> dict[Path, bytes]:
        return {
            path: path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    def resume(self, *flags: str) -> Outcome:
        before = self.files()
        self.capsys.readouterr()
        logs = str(self.folder.parent)
        code = main(["--resume", str(self.folder), "--logs", logs, "--max-steps", "6", *flags])
        return Outcome(code, self.capsys.readouterr().err, self.files() != before)

    def assert_refused(self, *flags: str, words: tuple[str, ...]) -> None:
        outcome = self.resume(*flags)
        assert outcome.code == 2 and not outcome.changed_files, outcome.message
        assert "Traceback" not in outcome.message and outcome.message.count("error:") == 1
        for word in words:
            assert word in outcome.message


@pytest.fixture
def run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(shutil.copytree(trained, tmp_path / "logs" / "run"), capsys)


def test_what_is_not_refused_goes_on(run: Run) -> None:
    outcome = run.resume("--lr", "0.5", "--csv-caption-key", "text")
    assert outcome.code == 0 and outcome.changed_files, outcome.message
    assert json.loads((run.folder / "config.json").read_text())["optim"]["lr"] == 0.5
    log = (run.folder / "out.log").read_text()
    assert "lr was 0.0" in log and "csv_caption_key was 'title' and is 'text'" in log
    assert [step for step, _ in losses(run.folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.5", "--batch-size", "8"], "batch_size (all ranks and passes) was 16 and is 8"),
        (["--lr", "0.5", "--train-data", "builtin:shapes:90"], "training data"),
        (["--lr", "0.5", "--episode-features", "extract"], "--resume"),
        (["--resume", "auto", "--name", "../logs/run"], "--name"),
        (["--resume", "auto", "--name", ".."], "--name"),
        (["--resume", "auto", "--name", ""], "--resume auto: expected --name"),
        (["--lr", "0.5", "--seed", "4"], "run.seed"),
        (["--lr", "0.5", "--siglip"], "model.siglip"),
        (["--lr", "0.5", "--save-every", "often"], "500steps"),
        (["--resume", "nowhere"], "found nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_settings_that_decide_the_run_are_refused(run: Run, flags: list[str], words: str) -> None:
    run.assert_refused(*flags, words=(words,))


@pytest.mark.parametrize(
    ("module", "flags", "remedy"),
    [
        (
            "protoclip.train",
            ["--resume", "logs/nowhere"],
            "--resume: found nothing at logs/nowhere; check the path, or use --resume auto, "
            "which starts where there is none",
        ),
        (
            "protoclip.evaluate.__main__",
            ["logs/nowhere"],
            "found nothing at logs/nowhere; check the path",
        ),
        (
            "protoclip.export",
            ["logs/nowhere", "--out", "out"],
            "found nothing at logs/nowhere; check the path",
        ),
    ],
    ids=["train", "evaluate", "export"],
)
def test_a_command_that_finds_no_run_names_no_flag_of_another(
    module: str,
    flags: list[str],
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(importlib.import_module(module).main, flags).endswith(remedy)
    assert list(tmp_path.iterdir()) == []


NO_OTHER_SETTINGS = (
    "has done all of its steps", "optim.lr was", "is 0.5", "--epochs", "--pretrained",
)  # fmt: skip


@pytest.mark.parametrize("has_results", [True, False], ids=["with results", "without"])
def test_a_finished_run_takes_no_other_settings(run: Run, has_results: bool) -> None:
    """Without evaluation data a finished run has no results."""
    if not has_results:
        (run.folder / "results.json").unlink()
    run.assert_refused("--max-steps", "5", "--lr", "0.5", words=NO_OTHER_SETTINGS)
    run.assert_refused("--max-steps", "5", "--seed", "4", words=("run.seed was 0 and is 4",))
    outcome = run.resume("--max-steps", "5", "--workers", "0")
    assert outcome.code == 0 and outcome.changed_files == (not has_results), outcome.message


def test_a_run_is_complete_with_results_and_page_of_its_last_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the last evaluation, then between results.json and the page."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("protoclip.train.conclude", "protoclip.training.summary.page.write_report"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            assert run.resume().code == 130
    assert "is complete" not in run.resume().message
    assert read_results(run.folder / "results.json").steps == 6
    assert (run.folder / "report.html").exists()
    outcome = run.resume()
    assert "is complete: 6 steps" in outcome.message and not outcome.changed_files


def test_a_run_that_another_process_has_is_refused(run: Run) -> None:
    with FileLock(run.folder / ".lock"):
        run.assert_refused("--lr", "0.5", words=("in use by another process",))


# What only a note or evaluation reads may be missing.
MAY_BE_MISSING = {"name", "preprocess", "protoclip", "passes", "format", "epoch"}


def part_of(payload: dict[str, Any], name: str) -> dict[str, Any]:
    if name == "training":
        return payload["protoclip"]["training"]
    return payload["protoclip"] if name == "protoclip" else payload


@pytest.mark.parametrize("part", ["training", "protoclip", "checkpoint"])
def test_a_checkpoint_without_an_entry_is_refused(run: Run, part: str) -> None:
    """The newest one only, so that there is none to fall back on."""
    entries = part_of(run.payload, part)
    for name in sorted(set(entries) - MAY_BE_MISSING):
        value = entries.pop(name)
        checkpoint.save(run.checkpoint, run.payload)
        run.assert_refused("--lr", "0.5", words=("checkpoint",))
        entries[name] = value


@pytest.mark.parametrize(
    ("name", "value"), [("watch", {}), ("skipped", "ten"), ("episode", 3), ("faults", 3)]
)
def test_a_checkpoint_with_an_entry_of_another_kind_is_refused(
    run: Run, name: str, value: Any
) -> None:
    run.payload["protoclip"]["training"][name] = value
    checkpoint.save(run.checkpoint, run.payload)
    run.assert_refused("--lr", "0.5", words=("does not hold the state of this run", name))


@pytest.mark.parametrize("missing", ["state_dict", "config", "all"])
@pytest.mark.parametrize(
    ("module", "flags"),
    [("protoclip.evaluate.__main__", []), ("protoclip.export", ["--out", "out"])],
)
def test_other_commands_refuse_it_too(
    run: Run,
    module: str,
    flags: list[str],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
) -> None:
    if missing == "state_dict":
        del run.payload["state_dict"]
    elif missing == "config":
        del run.payload["protoclip"]["config"]
    else:
        run.payload["protoclip"] = {}
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "stranger.pt", run.payload)
    error_of(importlib.import_module(module).main, ["stranger.pt", *flags])
