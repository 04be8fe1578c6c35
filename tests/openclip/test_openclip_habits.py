"""What people type out of habit: OpenCLIP's flags, slips of the fingers, and their remedies."""

from __future__ import annotations

import contextlib
import io
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from ranks import losses, without_page

from protoclip.__main__ import main
from protoclip.runs import checkpoint


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        ("train", ["--epcohs", "3"], "--epcohs: no such flag; did you mean --epochs?"),
        ("train", ["--weight-decay", "1"], "the flag is --wd"),
        ("train", ["--xyz"], "--xyz: no such flag; see --help"),
        ("train", ["--imagenet-val", "x"], "protoclip openclip"),
        ("report", ["RUN", "--weight-decay", "1"], "--weight-decay: no such flag; see --help"),
        ("train", ["--k", "3", "9"], "expected a flag, got '9'"),
        ("train", ["--k", "many"], "--k: invalid int value: 'many'"),
        ("train", ["--opt", "sgd"], "--opt: invalid choice: 'sgd'"),
        ("train", ["--dataset-type", "csv"], "csv: expected such data in --train-data"),
        (
            "train",
            ["--dataset-type", "webdataset", "--train-data", "x.csv"],
            "does not exist",
        ),
        ("evaluate", ["RUN", "--taks", "all"], "did you mean --tasks?"),
        ("report", ["RUN", "--otuput", "x.html"], "did you mean --output?"),
        ("data", ["--chekc", "builtin:icons"], "did you mean --check?"),
        ("encode", ["--modle", "x"], "did you mean --model?"),
        ("plan", ["--batchsize", "8"], "did you mean --batch-size?"),
        ("export", ["RUN", "--uot", "x"], "did you mean --out?"),
        ("openclip", ["--proto-wieght", "1"], "did you mean --proto-weight?"),
        ("openclip", ["--proto-k", "50", "--proto-queue", "20"], "--proto-k"),
        ("openclip", ["--proto-k", "5", "--siglip"], "--siglip"),
        ("openclip", ["--proto-k", "5", "--model", "coca_ViT-B-32"], "CoCa"),
        ("openclip", ["--model", "no/such.json"], "no/such.json"),
        ("openclip", ["--batch", "8", "--epcohs", "3"], "did you mean --epochs?"),
    ],
)
def test_a_slip_ends_in_one_line_with_a_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
    command: str,
    argv: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(main, [command, *argv])
    assert words in message and message.startswith(f"protoclip {command}: error: ")


HABITS = [
    "--dataset-type", "synthetic", "--train-num-samples", "60", "--batch-size", "16",
    "--local-loss", "--gather-with-grad", "--ddp-static-graph", "--dist-url", "env://",
    "--opt", "adamw", "--precision", "amp", "--device", "cpu", "--lock-text",
    "--force-context-length", "8", "--save-frequency", "1", "--save-most-recent",
    "--delete-previous-checkpoint", "--report-to", "none", "--method", "clip",
    "--resume", "latest", "--warmup", "10000",
]  # fmt: skip


class Run(NamedTuple):
    """One epoch, and then another two after --resume latest."""

    folder: Path
    first_stderr: str
    first_weights: dict[str, torch.Tensor]
    last_weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    logs = tmp_path_factory.mktemp("logs")
    folder = logs / "habits"
    flags = [*HABITS, "--model", str(nano), "--logs", str(logs), "--name", "habits"]

    def stderr_of_training(epochs: str) -> str:
        with contextlib.redirect_stderr(io.StringIO()) as stderr, without_page():
            assert main(["train", *flags, "--epochs", epochs]) == 0, stderr.getvalue()
        return stderr.getvalue()

    def newest_weights() -> dict[str, torch.Tensor]:
        return checkpoint.load(folder / "checkpoints" / "epoch_latest.pt")["state_dict"]

    first_stderr = stderr_of_training("1")
    first_weights = newest_weights()
    stderr_of_training("3")
    return Run(folder, first_stderr, first_weights, newest_weights())


NEEDLESS = ["--local-loss", "--gather-with-grad", "--ddp-static-graph", "--dist-url", "--opt",
            "--save-most-recent"]  # fmt: skip


def test_needless_flags_are_noted(run: Run) -> None:
    for flag in NEEDLESS:
        assert f"note: {flag} changes nothing: " in run.first_stderr
    assert "--precision amp: fp16 needs a GPU" in run.first_stderr


def test_open_clips_flags_train_and_resume(run: Run) -> None:
    log = (run.folder / "out.log").read_text()
    for words in (
        "note: --warmup 10000 is longer than the run's 3 steps",
        "data: builtin:shapes",
        "3 steps of 16, 3 a pass",
        "on cpu, fp32",
        "resumed: ",
        "after step 3 of 9",
    ):
        assert words in log
    assert len(losses(run.folder)) == 9


def test_a_locked_text_tower_stays(run: Run) -> None:
    moved = {
        name
        for name, value in run.first_weights.items()
        if not torch.equal(value, run.last_weights[name])
    }
    assert "visual.proj" in moved and "logit_scale" in moved
    assert all(name.startswith("visual.") or name == "logit_scale" for name in moved)


def test_the_context_is_the_one_asked_for(run: Run) -> None:
    assert run.last_weights["positional_embedding"].shape[0] == 8


def test_only_the_newest_numbered_checkpoint_stays(run: Run) -> None:
    names = {path.name for path in (run.folder / "checkpoints").glob("*.pt")}
    assert {name for name in names if name[6:-3].isdigit()} == {"epoch_3.pt"}
    assert "epoch_latest.pt" in names


def test_export_keeps_the_context_and_others_can_read_it(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run.folder), "--out", str(out)]) == 0
    model = open_clip.create_model(f"local-dir:{out}")
    assert model.context_length == 8
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path
