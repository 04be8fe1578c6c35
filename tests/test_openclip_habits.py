"""What people type out of habit: OpenCLIP's flags, slips of the fingers, and their remedies."""

import contextlib
import io
import stat

import open_clip
import pytest
import torch
from ranks import losses

from protoclip import checkpoint
from protoclip.__main__ import main


def code_of(argv):
    try:
        return main(argv)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        ("train", ["--epcohs", "3"], "--epcohs: no such flag; did you mean --epochs?"),
        ("train", ["--weight-decay", "1"], "the flag is --wd"),
        ("train", ["--xyz"], "--xyz: no such flag; see --help"),
        ("train", ["--ema-decay", "0.9"], "--ema-decay: extraction uses the model itself"),
        ("train", ["--distill-model", "ViT-B-32"], "protoclip openclip"),
        ("train", ["--torchcompile"], "protoclip openclip"),
        ("train", ["--imagenet-val", "x"], "protoclip evaluate RUN --data DIR"),
        ("train", ["--k", "3", "9"], "expected a flag, got '9'"),
        ("train", ["--k", "many"], "--k: invalid int value: 'many'"),
        ("train", ["--opt", "sgd"], "--opt: invalid choice: 'sgd'"),
        ("train", ["--dataset-type", "csv"], "csv: expected such data in --train-data"),
        ("train", ["--dataset-type", "webdataset", "--train-data", "x.csv"], "got 'x.csv'"),
        ("evaluate", ["RUN", "--taks", "all"], "did you mean --tasks?"),
        ("report", ["RUN", "--otuput", "x.html"], "did you mean --output?"),
        ("data", ["--chekc", "builtin:icons"], "did you mean --check?"),
        ("teacher", ["--modle", "x"], "did you mean --model?"),
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
def test_a_slip_ends_in_one_line_with_a_remedy(tmp_path, monkeypatch, capsys, command, argv, words):
    monkeypatch.chdir(tmp_path)
    assert code_of([command, *argv]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith(f"protoclip {command}: error: ")
    assert said.count("\n") == 1


HABITS = [
    "--dataset-type", "synthetic", "--train-num-samples", "60", "--batch-size", "16",
    "--local-loss", "--gather-with-grad", "--ddp-static-graph", "--dist-url", "env://",
    "--opt", "adamw", "--precision", "amp", "--device", "cpu", "--lock-text",
    "--force-context-length", "8", "--save-frequency", "1", "--save-most-recent",
    "--delete-previous-checkpoint", "--report-to", "none", "--method", "clip",
    "--resume", "latest", "--warmup", "10000",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(nano, tmp_path_factory):
    """OpenCLIP's flags train one epoch, and --resume latest another; what was said each time."""
    logs = tmp_path_factory.mktemp("logs")
    flags = [*HABITS, "--model", str(nano), "--logs", str(logs), "--name", "habits"]
    said, states = [], []
    for epochs in ("1", "3"):
        with contextlib.redirect_stderr(io.StringIO()) as kept:
            assert main(["train", *flags, "--epochs", epochs]) == 0, kept.getvalue()
        said.append(kept.getvalue())
        states.append(checkpoint.load(logs / "habits" / "checkpoints" / "epoch_latest.pt"))
    return logs / "habits", said, states


def test_needless_flags_are_noted_and_the_rest_is_done(run):
    folder, (first, second), _ = run
    for flag in ("--local-loss", "--gather-with-grad", "--ddp-static-graph", "--dist-url",
                 "--opt", "--save-most-recent"):  # fmt: skip
        assert f"note: {flag} changes nothing: " in first
    assert "--precision amp: fp16 needs a GPU" in first
    log = (folder / "out.log").read_text()
    assert "note: --warmup 10000 is longer than the run's 3 steps" in log
    assert (
        "data: builtin:shapes" in log and "3 steps of 16, 3 a pass" in log and "on cpu, fp32" in log
    )
    assert "resumed: " in log and "after step 3 of 9" in log
    assert len(losses(folder)) == 9


def test_a_locked_text_tower_stays_and_the_context_is_the_wanted_one(run):
    _, _, (before, after) = (run[0], run[1], [state["state_dict"] for state in run[2]])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "visual.proj" in moved and "logit_scale" in moved
    assert all(name.startswith("visual.") or name == "logit_scale" for name in moved)
    assert after["positional_embedding"].shape[0] == 8


def test_only_the_newest_numbered_checkpoint_is_kept(run):
    names = {path.name for path in (run[0] / "checkpoints").glob("*.pt")}
    assert {name for name in names if name[6:-3].isdigit()} == {"epoch_3.pt"}
    assert "epoch_latest.pt" in names


def test_export_keeps_the_context_and_others_can_read_it(run, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(run[0]), "--out", str(out)]) == 0
    model = open_clip.create_model(f"local-dir:{out}")
    assert model.context_length == 8
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path
