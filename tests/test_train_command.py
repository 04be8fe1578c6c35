"""``protoclip train`` as a user runs it: it learns, repeats, and refuses in words."""

import json
import re

import pytest
import torch
from PIL import Image
from ranks import losses, metrics

from protoclip import checkpoint
from protoclip.config import ModelConfig
from protoclip.model import build_model
from protoclip.train import main

SMALL = ["--train-data", "builtin:shapes:600", "--batch-size", "64", "--report-to", "none"]
CLIP = ["--method", "clip"]


BARE = ["--val-frequency", "0"]  # no evaluation in between


def run(tmp_path, name, *flags):
    assert main(["--logs", str(tmp_path), "--name", name, *SMALL, *flags]) == 0
    return tmp_path / name


def test_the_same_seed_repeats_bit_for_bit(tmp_path, nano, no_page):
    flags = ["--max-steps", "12", "--infonce-warmup-epoch", "0", "--model", str(nano), *BARE]
    first, again = (run(tmp_path, name, *flags) for name in ("first", "again"))
    assert losses(first) == losses(again) and len(losses(first)) == 12
    found = (checkpoint.load(x / "checkpoints" / checkpoint.LATEST) for x in (first, again))
    ours, theirs = (one["state_dict"] for one in found)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_it_learns_and_leaves_a_whole_run_folder(tmp_path):
    folder = run(tmp_path, "learns", "--epochs", "6", "--infonce-warmup-epoch", "1")
    before, *_, after = [r["contrastive_loss"] for r in metrics(folder) if "contrastive_loss" in r]
    assert after < before - 1.0  # nats; chance is ln 64 = 4.2
    results = json.loads((folder / "results.json").read_text())
    old, new = (results[name]["HO"]["metrics"] for name in ("untrained", "trained"))
    for name in ("image_retrieval_recall@5", "text_retrieval_recall@5"):  # of 60 held-out pairs
        assert new[name] > old[name] + 0.3, name
    last = [r for r in metrics(folder) if "loss" in r][-1]
    names = {"step", "samples", "contrastive_loss", "proto_loss", "logit_scale", "lr"}
    assert names <= set(last)
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
        (["--w-clip", "0"], "--infonce-warmup-epoch 0"),
        (["--w-clip", "0", "--infonce-warmup-epoch", "0", "--lit-start", "1"], "--lit-start 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message(tmp_path, capsys, flags, words):
    code = main(["--logs", str(tmp_path), "--name", "bad", *SMALL, *flags])
    message = capsys.readouterr().err
    assert code == 2 and words in message and "Traceback" not in message
    assert not (tmp_path / "bad").exists()


def test_an_existing_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    assert main(["--logs", str(tmp_path), "--name", "taken", *SMALL]) == 2
    assert "taken" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["precious.txt"]


def test_a_bad_picture_is_skipped_to_the_end(tmp_path, nano, capsys):
    """Plots and report too go without it, whether training has met it or not."""
    rows = ["filepath\ttitle"]
    for i in range(40):
        Image.new("RGB", (24, 24), (6 * i, 90, 200)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png\tsquare number {i}")
    (tmp_path / "7.png").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    flags = ["--train-data", str(tmp_path / "pairs.csv"), "--batch-size", "8", "--k", "3"]
    flags += ["--infonce-warmup-epoch", "0", "--model", str(nano)]
    for name, more in (("met", ["--epochs", "1"]), ("unmet", ["--max-steps", "1", *CLIP])):
        folder = run(tmp_path, name, *flags, *more)
        assert (folder / "report.html").stat().st_size > 1000
    said = capsys.readouterr().err
    assert "skipped sample 1" in said and "the picture does not decode (cannot identify" in said
    assert "BytesIO" not in said


def test_a_short_last_episode_has_as_many_prototypes_as_samples(tmp_path, nano, no_page):
    flags = ["--max-steps", "10", "--k", "65", "--infonce-warmup-epoch", "0", "--model", str(nano)]
    flags += ["--lr", "1e-3"]  # a higher one makes features equal, and so clusters empty
    folder = run(tmp_path, "short", *flags, *BARE, "--external-teacher", "none")
    assert [r["image_clusters"] for r in metrics(folder) if "image_clusters" in r] == [65, 64]


def test_a_run_too_short_for_prototypes_says_so(tmp_path, nano, capsys, no_page):
    run(tmp_path, "short", "--max-steps", "1", "--model", str(nano), *BARE)
    said = capsys.readouterr().err
    assert re.search(r"prototypes train from step \d+ on, which this run does not reach", said)


@pytest.mark.parametrize("name", ["torn.pt", "torn.safetensors"])
def test_torn_weights_are_named(tmp_path, name):
    torn = tmp_path / name
    for size in (0, 4000):
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
def test_a_config_that_is_none_is_named(tmp_path, capsys, content, words):
    path = tmp_path / "mine.json"
    path.write_text(content)
    assert main(["--logs", str(tmp_path), "--model", str(path), *SMALL]) == 2
    message = capsys.readouterr().err
    assert "mine.json" in message and words in message
    build_model(ModelConfig())  # OpenCLIP's registry is as it was
