"""``protoclip`` and ``protoclip cluster``: light help, groups of features and of pictures."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import protoclip
from protoclip import cluster as cluster_module
from protoclip.__main__ import main
from protoclip.cluster import main as cluster
from protoclip.commands import EVERYDAY, PARSERS
from protoclip.config import ModelConfig
from protoclip.data import open_dataset
from protoclip.model import build_model
from protoclip.prototypes import purity
from protoclip.train import main as train


def table(folder):
    with open(folder / "clusters.csv", newline="") as file:
        return list(csv.DictReader(file))


# The command


HELP = """
import contextlib, io, json, sys, torch
before = {{name.split(".")[0] for name in sys.modules}}
from protoclip.__main__ import main
for words in {words!r}:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try: main(words)
        except SystemExit as end: assert end.code == 0
    print(json.dumps([told.getvalue(), [*{{name.split(".")[0] for name in sys.modules}} - before]]))
"""


def test_help_loads_nothing_heavy():
    """Of ``openclip``, the last, its params: a light module."""
    words = [[], ["--help"], ["--help-all"]]
    words += [[name, "--help"] for name in sorted(PARSERS, key="openclip".__eq__)]
    command = [sys.executable, "-c", HELP.format(words=words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for one, line in zip(words, done.stdout.splitlines(), strict=True):
        told, loaded = json.loads(line)
        flags = {"open_clip_train"} if "openclip" in one else set()
        assert set(loaded) - {"protoclip"} - flags <= sys.stdlib_module_names, (one, loaded)
        if len(one) < 2:
            lines = told.splitlines()
            assert len(lines) == 18 and lines[-3].startswith("More commands")
            first = [line.split()[1] for line in lines if line.startswith("  protoclip ")]
            assert first == ["train", "train", "report", "evaluate", "cluster", "export"]
        else:
            assert f"example: protoclip {one[0]} " in told


def test_help_has_the_everyday_flags_and_help_all_the_rest(capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["train", flag])
        shown[flag] = set(capsys.readouterr().out.replace(",", " ").replace("]", " ").split())
    assert len(EVERYDAY.split()) == 24 and set(EVERYDAY.split()) <= shown["--help"]
    assert "--w-proto" not in shown["--help"] and "--w-proto" in shown["--help-all"]


def test_commands_are_found_or_refused(capsys):
    assert main(["trian"]) == 2
    assert (
        capsys.readouterr().err
        == "protoclip: error: 'trian' is not a command; did you mean train?\n"
    )
    assert main(["report", "nowhere"]) == 2 and "found no nowhere" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "protoclip", "--version"], capture_output=True)
    assert done.stdout.decode() == f"protoclip {protoclip.__version__}\n" and len(PARSERS) == 9


# Features


@pytest.fixture
def features(tmp_path):
    """900 rows around 12 centres, in a file, with a text each."""
    torch.manual_seed(0)
    kind = torch.arange(900) % 12
    rows = 3 * torch.randn(12, 16)[kind] + 0.5 * torch.randn(900, 16)
    np.save(tmp_path / "x.npy", rows.numpy())
    animals = ["cat", "dog", "cow", "pig", "wolf", "bear", "fox", "owl", "ant", "bee", "fly", "rat"]
    (tmp_path / "x.txt").write_text("\n".join(f"the {animals[i]}, number {i}" for i in kind))
    return tmp_path, rows, kind


def test_features_in_groups_by_auto(features, capsys):
    path, rows, kind = features
    words = [str(path / "x.npy"), "--captions", str(path / "x.txt"), "--out"]
    assert cluster([*words, str(path / "a")]) == 0
    said = capsys.readouterr()
    assert "900 rows of 16 numbers into 12 groups" in said.err and "mean silhouette" in said.err
    clusters = protoclip.Clusters.load(path / "a" / "centroids.safetensors")
    lines = table(path / "a")
    assert [line["file"] for line in lines] == [str(i) for i in range(900)]
    labels = torch.tensor([int(line["cluster"]) for line in lines])
    assert torch.equal(labels, clusters.predict(rows)) and purity(labels, kind) == 1
    squared = torch.tensor([float(line["squared_distance"]) for line in lines])
    torch.testing.assert_close(squared, (rows - clusters.centroids[labels]).square().sum(1))
    rank = torch.tensor([int(line["rank"]) for line in lines])
    for own in (labels == k for k in range(12)):
        assert rank[own][squared[own].argsort()].tolist() == list(range(1, 76))
    page = (path / "a" / "report.html").read_text()
    assert page.count('"wolf, number"') == 1
    assert 'id="map"' in page and 'id="curves"' not in page and "<img" not in page
    assert cluster([*words, str(path / "b"), "--k", "12"]) == 0
    assert (path / "a" / "clusters.csv").read_bytes() == (path / "b" / "clusters.csv").read_bytes()


def test_the_bar_is_full_when_every_restart_comes_to_rest(features, monkeypatch, capsys):
    """Of 3 x 500 iterations a few run; a bar that stops short looks like a lost run."""
    bars = []

    def shown(*args, **options):
        bars.append(tqdm(*args, **options | {"disable": False}))
        return bars[-1]

    monkeypatch.setattr(cluster_module, "tqdm", shown)
    path, _, _ = features
    words = [str(path / "x.npy"), "--k", "4", "--iters", "500", "--out", str(path / "c")]
    assert cluster(words) == 0
    (bar,) = (bar for bar in bars if bar.desc == "k-means")
    assert 3 <= bar.n == bar.total < 300
    assert "iterations)" in capsys.readouterr().out


def test_weights_and_keys(features):
    path, rows, _ = features
    weights = torch.ones(900)
    weights[:450] = 0
    np.savez(path / "x.npz", features=rows.half(), keys=[f"row {i}" for i in range(900)])
    np.savetxt(path / "w.txt", weights)
    flags = ["--weights", f"{path}/w.txt", "--k", "2", "--out", f"{path}/o"]
    assert cluster([f"{path}/x.npz", *flags]) == 0
    found = protoclip.Clusters.load(path / "o" / "centroids.safetensors")
    half = rows.half().float()
    means, _ = protoclip.segment_mean(half[450:], found.labels[450:], 2)
    torch.testing.assert_close(found.centroids, means)
    assert table(path / "o")[5]["file"] == "row 5"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["x.npy", "--k", "901"], "--k: expected auto or 2 to N = 900"),
        (["x.npy", "--k", "some"], "--k: expected auto or 2 to N = 900"),
        (["x.npy", "--run", "logs/x"], "DATA has features"),
        (["x.npy", "--captions", "w.txt"], "--captions: expected one for each of the 900 rows"),
        (["x.npy", "--weights", "w.txt", "--k", "3"], "expected a number for each of the 900"),
        (["x.npy", "--weights", "bad.txt"], "--weights: expected one number a line in bad.txt"),
        (["x.npy", "--captions", "no.txt"], "--captions: expected a text file in UTF-8"),
        (["same.npy"], "--k auto: expected rows that differ"),
        (["words.npy", "--k", "2"], "expected numbers [N, d] with d >= 1 in words.npy"),
        (["no.npy"], "DATA: expected a file of features, found no file no.npy"),
        (["photoz"], "expected a folder of pictures, a .csv or .tsv, shards, builtin:NAME or feat"),
        (["pictures/a.png"], ".safetensors), got pictures/a.png"),
        (["pictures/*.png"], "DATA: expected a folder of pictures"),
        (["empty"], "empty: expected pictures in it, or in folders in it, found none among 0"),
        (["x.npy", "--out", "/proc/x"], "--out: /proc/x cannot be created"),
        (["pictures", "--run", "logs/x", "--model", "ViT-B-32"], "leave out --model"),
        (["pictures", "--features", "x.npy"], "expected features.npz of these pictures"),
        (["pictures", "--captions", "w.txt"], "expected a file of features"),
        (["pictures", "--model", "nano.json"], "--pretrained is missing"),
        (["pictures"], "--run logs/NAME, --model NAME --pretrained FILE, or a file of features"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(features, nano, monkeypatch, capfd, caplog, flags, words):
    path, _, _ = features
    monkeypatch.chdir(path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # weights cannot be had
    monkeypatch.setenv("HF_HUB_CACHE", str(path))
    (path / "w.txt").write_text("1\n2\n")
    (path / "bad.txt").write_text("1\nx\n")
    np.save(path / "same.npy", np.zeros((9, 2)))
    np.save(path / "words.npy", np.array([["a", "b"]] * 9))
    (path / "nano.json").write_text(nano.read_text())
    for name in ("empty", "pictures"):
        (path / name).mkdir()
    Image.new("RGB", (9, 9)).save(path / "pictures" / "a.png")
    assert cluster(flags) == 2
    message = capfd.readouterr().err.split("MiB\n")[-1]  # after the memory, where it got so far
    assert words in message and message.count("\n") == 1 and not caplog.records  # OpenCLIP's


# Pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of drawings in folders, one of them broken."""
    folder, shapes = tmp_path_factory.mktemp("photos"), open_dataset("builtin:shapes:60")
    for i in range(60):
        (folder / f"{i % 3}").mkdir(exist_ok=True)
        shapes.image(i).save(folder / f"{i % 3}" / f"{i}.gif")
    (folder / "torn.jpg").write_bytes(b"no picture")
    (folder / "torn.webp").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture, and not said to be one")
    return folder


def test_pictures_by_weights_and_by_a_run(pictures, nano, tmp_path, own_cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = build_model(ModelConfig(model=str(nano), add_projection_head=False))
    torch.save(model.clip.state_dict(), "weights.pt")
    flags = ["--model", str(nano), "--pretrained", "weights.pt", "--k", "5", "--out", "a"]
    listed = sorted(pictures.rglob("*.[gjw]*"), key=lambda path: (str(path.parent), path.name))
    counted = {str(path.relative_to(pictures)) for path in listed[3::12]}
    weights = [str(int(i % 12 == 3)) for i in range(62)]  # of the torn ones too
    (tmp_path / "w.txt").write_text("\n".join(weights))
    assert cluster([str(pictures), *flags, "--weights", "w.txt"]) == 0
    said = capsys.readouterr().err
    assert "left out 2 of 62 pictures" in said and "1 .txt" in said
    assert all(f"  {pictures}/torn.{ending}: " in said for ending in ("jpg", "webp"))
    lines = table(tmp_path / "a")
    assert {line["file"] for line in lines} == {f"{i % 3}/{i}.gif" for i in range(60)}
    # Each of the five pictures that count is a centroid.
    assert {x["file"] for x in lines if float(x["squared_distance"]) < 1e-9} == counted
    # Encoded once: the same groups from the features that it wrote.
    again = ["--features", "a/features.npz", "--k", "5", "--out", "c", "--weights", "w.txt"]
    assert cluster([str(pictures), *again]) == 0
    assert "left out 2 pictures without features" in capsys.readouterr().err
    assert (tmp_path / "a" / "clusters.csv").read_text() == (
        tmp_path / "c/clusters.csv"
    ).read_text()
    assert "60 pictures of" in (tmp_path / "c" / "report.html").read_text()
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("gallery data-run") == 1 and len(page) < 500_000
    assert "60 pictures of" in page and "is a picture, placed" in page and "caption (" not in page
    assert "the words that set" not in page and "nano.json (weights.pt)" in page

    rows = [
        f"{pictures}/{i % 3}/{i}.gif\t{'a red ball' if i % 2 else 'a blue box'}" for i in range(60)
    ]
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\n" + "\n".join(rows))
    flags = ["--train-data", "pairs.tsv", "--model", str(nano), "--batch-size", "16", "--k", "6"]
    flags += ["--infonce-warmup-epoch", "0", "--max-steps", "2", "--name", "run"]
    assert train(flags) == 0
    run = tmp_path / "logs" / "run"
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["clusters"] and board.Images("clusters")[0].width == 512
    assert b"optim.batch_size" in board.PluginTagToContent("hparams")["_hparams_/experiment"]
    trained = [line for line in table(run) if line["image"]]
    assert {line["key"] for line in table(run)} == {row.split("\t")[0] for row in rows}
    assert len(trained) >= 32 and {line["text"] for line in trained} <= set("012345")
    assert cluster(["pairs.tsv", "--run", str(run), "--k", "4", "--out", "b"]) == 0
    page = (tmp_path / "b" / "report.html").read_text()
    assert f"features by {run}" in page and "the words that set each apart" in page
    cards = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    assert len(cards) == 4 and sum(card["samples"] for card in cards) == 60
    assert all(card["words"] and card["captions"] and card["images"] for card in cards)
