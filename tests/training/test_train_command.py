"""``protoclip train`` as a user runs it: it learns, repeats, and refuses in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import losses, metrics

from protoclip.model import build_model
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig
from protoclip.train import main, make_config

SMALL = ["--train-data", "builtin:shapes:600", "--batch-size", "64", "--report-to", "none"]
CLIP = ["--method", "clip"]
BARE = ["--val-frequency", "0"]  # no evaluation in between


def run(folder: Path, name: str, flags: list[str]) -> Path:
    """The folder of a run that ends well."""
    assert main(["--logs", str(folder), "--name", name, *SMALL, *flags]) == 0
    return folder / name


def test_the_same_seed_repeats_bit_for_bit(tmp_path: Path, nano: Path, no_evaluation: None) -> None:
    flags = ["--max-steps", "12", "--infonce-warmup-epoch", "0", "--model", str(nano), *BARE]
    first = run(tmp_path, "first", flags)
    again = run(tmp_path, "again", flags)
    assert losses(first) == losses(again) and len(losses(first)) == 12
    expected = checkpoint.load(first / "checkpoints" / checkpoint.LATEST)["state_dict"]
    weights = checkpoint.load(again / "checkpoints" / checkpoint.LATEST)["state_dict"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_run_learns_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    """Six epochs with evaluation, plots and report."""
    flags = ["--epochs", "6", "--infonce-warmup-epoch", "1", "--w-proto", "1"]
    folder = run(tmp_path, "learns", flags)
    steps = [line for line in metrics(folder) if "loss" in line]
    history = [line["contrastive_loss"] for line in steps]
    assert history[-1] < history[0] - 1.0  # nats; chance is ln 64 = 4.2
    results = json.loads((folder / "results.json").read_text())
    untrained = results["untrained"]["HO"]["metrics"]
    trained = results["trained"]["HO"]["metrics"]
    for name in ("image_retrieval_recall@5", "text_retrieval_recall@5"):  # of 60 held-out pairs
        assert trained[name] > untrained[name] + 0.3, name
    names = {"step", "samples", "contrastive_loss", "proto_loss", "logit_scale", "lr"}
    assert names <= set(steps[-1])
    for name in ("config.json", "out.log", "clusters.csv", "report.html"):
        assert (folder / name).stat().st_size > 100, name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        # Before the teacher, which may take minutes, is even looked for.
        (["--k", "601", "--external-teacher", "nowhere.npz"], "at most one cluster per sample"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--train-data", "no/such/file.csv"], "no/such/file.csv"),
        (["--val-data", "no/such.csv"], "no/such.csv: No such file"),
        (["--batch-size", "5000"], "--batch-size"),
        (["--external-teacher", "missing.npy"], "missing.npy"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--force-image-size", "4", "--model", "protoclip-tiny"], "--force-image-size"),
        (["--logs", __file__], "--logs: expected a path in a folder"),
        # Before the batch size, which 5 samples do not fill.
        (["--train-data", "builtin:shapes:5", "--model", "no-such-model"], "no-such-model"),
        (["--kmeans-backend", "cuda"], "--kmeans-backend auto"),
        ([*CLIP, "--w-clip", "0"], "leaves some steps without a loss"),
        (["--w-clip", "0", "--w-proto", "0", "--w-proto-external", "0"], "use --w-clip 1"),
        (["--w-clip", "0", "--w-proto", "0", "--external-teacher", "none"], "no external teacher"),
        (["--w-proto", "-0.5"], "--w-proto: expected -1 (automatic), or 0 and more, got -0.5"),
        (["--w-clip", "0"], "--infonce-warmup-epoch 0"),
        (["--w-clip", "0", "--infonce-warmup-epoch", "0", "--lit-start", "1"], "--lit-start 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message(
    tmp_path: Path, error_of: Callable[..., str], flags: list[str], words: str
) -> None:
    assert words in error_of(main, ["--logs", tmp_path, "--name", "bad", *SMALL, *flags])
    assert not (tmp_path / "bad").exists()


def test_an_existing_run_is_not_overwritten(tmp_path: Path, error_of: Callable[..., str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    assert "taken" in error_of(main, ["--logs", tmp_path, "--name", "taken", *SMALL])
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["precious.txt"]


def test_a_bad_picture_is_skipped_to_the_end(
    tmp_path: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty pictures of one colour, of which the eighth does not decode. Plots and report too go
    without it, whether or not training meets it."""
    rows = ["filepath\ttitle"]
    for i in range(40):
        Image.new("RGB", (24, 24), (6 * i, 90, 200)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png\tsquare number {i}")
    (tmp_path / "7.png").write_bytes(b"no picture")
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(rows) + "\n")
    flags = [
        "--train-data", str(table), "--batch-size", "8", "--k", "3",
        "--infonce-warmup-epoch", "0", "--model", str(nano),
    ]  # fmt: skip
    unmet = run(tmp_path, "unmet", [*flags, "--max-steps", "1", *CLIP])
    capsys.readouterr()
    met = run(tmp_path, "met", [*flags, "--epochs", "1"])
    for folder in (unmet, met):
        assert (folder / "report.html").stat().st_size > 1000
    message = capsys.readouterr().err
    assert "skipped sample 1" in message
    assert "the picture does not decode (cannot identify" in message
    assert "BytesIO" not in message


def test_a_short_last_episode_has_as_many_prototypes_as_samples(
    tmp_path: Path, nano: Path, no_evaluation: None
) -> None:
    flags = ["--max-steps", "10", "--k", "65", "--infonce-warmup-epoch", "0", "--model", str(nano)]
    flags += ["--lr", "1e-3"]  # a higher one makes features equal, and so clusters empty
    folder = run(tmp_path, "short", [*flags, *BARE, "--external-teacher", "none"])
    num_clusters = [line["image_clusters"] for line in metrics(folder) if "image_clusters" in line]
    assert num_clusters == [65, 64]


def test_a_run_too_short_for_prototypes_says_so(
    tmp_path: Path, nano: Path, capsys: pytest.CaptureFixture[str], no_evaluation: None
) -> None:
    run(tmp_path, "short", ["--max-steps", "1", "--model", str(nano), *BARE])
    message = capsys.readouterr().err
    words = r"prototypes train from step \d+ on, which this run does not reach"
    assert re.search(words, message)


def test_a_run_that_has_no_prototypes_says_so(
    tmp_path: Path, nano: Path, capsys: pytest.CaptureFixture[str], no_page: None
) -> None:
    """A teacher's alone were asked for, and there is no teacher."""
    flags = ["--max-steps", "1", "--model", str(nano), *BARE]
    folder = run(tmp_path, "none", [*flags, "--w-proto", "0", "--external-teacher", "none"])
    message = capsys.readouterr().err
    assert "method: protoclip, InfoNCE only\nexternal teacher: none" in message
    assert json.loads((folder / "results.json").read_text())["first_prototype_step"] == 0


def test_the_first_lines_say_why_the_loss_will_jump(trained: Path) -> None:
    log = (trained / "out.log").read_text()
    assert (
        "prototypes train from step 5 on; the loss is larger from there, as it includes them" in log
    )


@pytest.mark.parametrize("size", [0, 4000])
@pytest.mark.parametrize("name", ["torn.pt", "torn.safetensors"])
def test_torn_weights_are_named(tmp_path: Path, name: str, size: int) -> None:
    torn = tmp_path / name
    torn.write_bytes((b"PK\x03\x04" + bytes(4000))[:size])
    with pytest.raises(ValueError, match=rf"{name}.*is the file complete"):
        build_model(ModelConfig(pretrained=str(torn)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected an OpenCLIP config"),
        ("[]", "lacks embed_dim, text_cfg, vision_cfg"),
        ('{"embed_dim": 8, "text_cfg": {}}', "lacks vision_cfg"),
        ('{"embed_dim": 8, "vision_cfg": {"wdith": 8}, "text_cfg": {}}', "wdith"),
    ],
)
def test_an_invalid_model_config_is_named(
    tmp_path: Path, error_of: Callable[..., str], content: str, words: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    error = error_of(main, ["--logs", tmp_path, "--model", path, *SMALL])
    assert "mine.json" in error and words in error
    build_model(ModelConfig())  # OpenCLIP's registry is as it was


def test_a_keyword_that_is_none_is_not_given() -> None:
    assert make_config(name=None, max_steps=None, lr=0.5) == make_config(lr=0.5)
