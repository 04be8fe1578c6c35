"""``protoclip`` and ``protoclip cluster``: light help, groups of features and of pictures."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from html_page import read_page
from pairs import table
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import protoclip
from protoclip.__main__ import main
from protoclip.cluster.__main__ import main as cluster
from protoclip.cluster.groups import choose_k
from protoclip.data import open_dataset
from protoclip.episodes.prototypes import purity
from protoclip.model import build_model
from protoclip.settings.commands import EVERYDAY, PARSERS
from protoclip.settings.config import ModelConfig
from protoclip.train import main as train

# ---- the command ----

HELP = """
import contextlib, io, json, sys, torch
before = {{name.split(".")[0] for name in sys.modules}}
from protoclip.__main__ import main
for words in {words!r}:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try: main(words)
        except SystemExit as end: assert end.code == 0
    loaded = {{name.split(".")[0] for name in sys.modules}} - before
    print(json.dumps({{"words": words, "help": printed.getvalue(), "loaded": [*loaded]}}))
"""


class Help(NamedTuple):
    words: list[str]
    text: str
    loaded: set[str]  # packages that were loaded until then, beside torch's


@pytest.fixture(scope="module")
def helps() -> list[Help]:
    """Of the program, then of each command, in one process; ``openclip`` is the last."""
    words = [[], ["--help"], ["--help-all"]]
    words += [[name, "--help"] for name in sorted(PARSERS, key="openclip".__eq__)]
    command = [sys.executable, "-c", HELP.format(words=words)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["words"] for line in lines] == words
    return [Help(line["words"], line["help"], set(line["loaded"])) for line in lines]


def test_help_loads_nothing_heavy(helps: list[Help]) -> None:
    for shown in helps:
        light = {"protoclip"} | sys.stdlib_module_names
        if "openclip" in shown.words:
            light = light | {"open_clip_train"}  # its params: a light module
        assert shown.loaded <= light, shown.words


def test_help_lists_the_commands(helps: list[Help]) -> None:
    for shown in helps[:3]:
        lines = shown.text.splitlines()
        assert len(lines) == 22 and lines[-3].startswith("More commands")
        commands = [line.split()[1] for line in lines if line.startswith("  protoclip ")]
        assert commands == [
            "train", "train", "compare", "report", "evaluate", "encode", "cluster", "curate",
            "export",
        ]  # fmt: skip


def test_help_of_each_command_has_an_example(helps: list[Help]) -> None:
    assert len(helps[3:]) == len(PARSERS) == 11
    for shown in helps[3:]:
        assert f"example: protoclip {shown.words[0]} " in shown.text


def words_of_help(flag: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main(["train", flag])
    return set(capsys.readouterr().out.replace(",", " ").replace("]", " ").split())


def test_help_has_the_everyday_flags_and_help_all_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    everyday = set(EVERYDAY.split())
    assert len(everyday) == 28
    brief = words_of_help("--help", capsys)
    assert everyday <= brief and "--w-proto" not in brief
    assert "--w-proto" in words_of_help("--help-all", capsys)


def test_a_command_that_is_misspelt_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    expected = "protoclip: error: 'trian' is not a command; did you mean train?\n"
    assert capsys.readouterr().err == expected


def test_a_command_is_found_and_gives_its_own_error(error_of: Callable[..., str]) -> None:
    assert "nowhere does not exist" in error_of(main, ["report", "nowhere"])


def test_the_version_is_the_packages() -> None:
    run = subprocess.run([sys.executable, "-m", "protoclip", "--version"], capture_output=True)
    assert run.stdout.decode() == f"protoclip {protoclip.__version__}\n"


# ---- features ----

ANIMALS = ["cat", "dog", "cow", "pig", "wolf", "bear", "fox", "owl", "ant", "bee", "fly", "rat"]


class FeatureFile(NamedTuple):
    folder: Path
    rows: Tensor  # [900, 16]
    kinds: Tensor  # int64 [900], around which of 12 centres
    rows_path: str
    captions_path: str


@pytest.fixture
def features(tmp_path: Path) -> FeatureFile:
    """900 rows around 12 centres, in a file, with a text each."""
    torch.manual_seed(0)
    kinds = torch.arange(900) % 12
    rows = 3 * torch.randn(12, 16)[kinds] + 0.5 * torch.randn(900, 16)
    features = FeatureFile(tmp_path, rows, kinds, f"{tmp_path}/x.npy", f"{tmp_path}/x.txt")
    np.save(features.rows_path, rows.numpy())
    texts = [f"the {ANIMALS[kind]}, number {kind}" for kind in kinds]
    Path(features.captions_path).write_text("\n".join(texts))
    return features


def cluster_features(features: FeatureFile, name: str, *flags: str) -> Path:
    """Run the command on the file; the folder of its results."""
    out = features.folder / name
    command = [features.rows_path, "--captions", features.captions_path, "--out", str(out)]
    assert cluster([*command, *flags]) == 0
    return out


@pytest.mark.usefixtures("quick_map")
def test_auto_finds_the_number_of_groups_and_gives_them(
    features: FeatureFile, capsys: pytest.CaptureFixture[str]
) -> None:
    by_auto = cluster_features(features, "a")
    error = capsys.readouterr().err
    assert "900 rows of 16 numbers into 12 groups" in error
    assert "mean silhouette" in error
    by_number = cluster_features(features, "b", "--k", "12")
    assert (by_auto / "clusters.csv").read_bytes() == (by_number / "clusters.csv").read_bytes()


def test_auto_takes_the_root_of_half_the_rows_where_no_number_is_clear(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32)
    np.save(tmp_path / "noise.npy", rows)
    features = protoclip.open_features(tmp_path / "noise.npy")
    assert choose_k("auto", features, 0, lambda: None).k == 10


@pytest.mark.smoke
@pytest.mark.usefixtures("quick_map")
def test_the_table_says_group_distance_and_rank_of_every_row(features: FeatureFile) -> None:
    out = cluster_features(features, "a", "--k", "12")
    clusters = protoclip.Clusters.load(out / "centroids.safetensors")
    lines = table(out)
    assert [line["position"] for line in lines] == [str(i) for i in range(900)]
    labels = torch.tensor([int(line["cluster"]) for line in lines])
    assert torch.equal(labels, clusters.predict(features.rows))
    assert purity(labels, features.kinds) == 1
    squared = torch.tensor([float(line["squared_distance"]) for line in lines])
    apart = features.rows - clusters.centroids[labels]
    torch.testing.assert_close(squared, apart.square().sum(1))
    distances = squared.sqrt()
    outliers = torch.tensor([float(line["outlier"]) for line in lines])
    mean_distances = torch.stack([distances[labels == group].mean() for group in range(12)])
    torch.testing.assert_close(outliers, distances / mean_distances[labels], rtol=1e-3, atol=0)
    assert {line["duplicate_of"] for line in lines} == {""}
    ranks = torch.tensor([int(line["rank"]) for line in lines])
    for group in range(12):
        members = labels == group
        nearest_first = squared[members].argsort()
        assert ranks[members][nearest_first].tolist() == list(range(1, 76))


def test_the_page_of_features_has_the_words_of_each_group_and_a_map(features: FeatureFile) -> None:
    page = read_page(cluster_features(features, "a", "--k", "12") / "report.html")
    assert page.one("meta", name="generator").attributes["content"] == "protoclip cluster"
    cards = json.loads(page.section("prototypes").one("script").source)
    assert sorted(card["words"] for card in cards) == sorted(ANIMALS)
    assert "map" in page.sections and "curves" not in page.sections
    assert page.all("img") == []


@pytest.mark.usefixtures("quick_map")
def test_rows_of_weight_0_move_no_centroid(features: FeatureFile) -> None:
    weights = torch.ones(900)
    weights[:450] = 0
    np.savetxt(features.folder / "w.txt", weights)
    out = cluster_features(features, "o", "--k", "2", "--weights", f"{features.folder}/w.txt")
    clusters = protoclip.Clusters.load(out / "centroids.safetensors")
    means, _ = protoclip.segment_mean(features.rows[450:], clusters.labels[450:], 2)
    torch.testing.assert_close(clusters.centroids, means)


@pytest.mark.parametrize("ending, k", [(".npy", "3"), (".safetensors", "auto")])
def test_rows_keep_the_digits_of_their_file(tmp_path: Path, ending: str, k: str) -> None:
    """Times in seconds since 1970, 40 s from group to group: fp32 rounds them to 128 s. They are
    rows of one number each, or of two."""
    kinds = torch.arange(3).repeat_interleave(20)
    seconds = 1_764_000_000 + 40 * kinds + torch.arange(60) % 5
    file = tmp_path / f"times{ending}"
    if ending == ".npy":
        np.save(file, seconds[:, None].numpy())
    else:
        save_file({"times": torch.stack([seconds.double(), torch.rand(60).double()], 1)}, file)
    out = tmp_path / "groups"
    assert cluster([str(file), "--k", k, "--out", str(out)]) == 0
    groups = torch.tensor([int(line["cluster"]) for line in table(out)])
    assert purity(groups, kinds) == 1 and len(groups.unique()) == 3
    page = read_page(out / "report.html")
    assert "map" in page.sections and "account for 100 %" in page.section("summary").text
    assert max(float(line["squared_distance"]) for line in table(out)) < 10


def test_the_median_of_two_groups_is_between_them(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0.0, 0.0]] * 9 + [[9.0, 9.0]]))
    out = tmp_path / "groups"
    assert cluster([str(tmp_path / "x.npy"), "--k", "2", "--out", str(out)]) == 0
    words = "the smallest has 1, the largest 9, the median 5."
    assert words in read_page(out / "report.html").text


@pytest.mark.usefixtures("quick_map")
def test_a_file_of_half_precision_with_keys_gives_its_keys(features: FeatureFile) -> None:
    half = features.rows.half()
    path = features.folder / "x.npz"
    np.savez(path, features=half, keys=[f"row {i}" for i in range(900)])
    out = features.folder / "o"
    assert cluster([str(path), "--k", "2", "--out", str(out)]) == 0
    assert [line["file"] for line in table(out)] == [f"row {i}" for i in range(900)]
    clusters = protoclip.Clusters.load(out / "centroids.safetensors")
    means, _ = protoclip.segment_mean(half.float(), clusters.labels, 2)
    torch.testing.assert_close(clusters.centroids, means)


def test_what_others_wrote_is_never_replaced(
    features: FeatureFile, error_of: Callable[..., str]
) -> None:
    """A page and a table of the user's own, beside the data."""
    for name in ("report.html", "clusters.csv"):
        (features.folder / name).write_text("mine")
        for flag in ((), ("--overwrite",)):
            command = [features.rows_path, "--k", "2", "--out", str(features.folder), *flag]
            error = error_of(cluster, command)
            assert f"holds {name}, which protoclip cluster did not write" in error
        assert (features.folder / name).read_text() == "mine"
        (features.folder / name).unlink()


@pytest.mark.usefixtures("quick_map")
def test_an_earlier_run_is_replaced_if_that_is_asked_for(
    features: FeatureFile, error_of: Callable[..., str]
) -> None:
    out = cluster_features(features, "o", "--k", "3")
    table_of_three = (out / "clusters.csv").read_bytes()
    (out / "features.npz").write_text("of an earlier encoding")
    command = [features.rows_path, "--k", "2", "--out", str(out)]
    assert "or replace it with --overwrite" in error_of(cluster, command)
    assert (out / "clusters.csv").read_bytes() == table_of_three
    assert cluster([*command, "--overwrite"]) == 0
    assert {line["cluster"] for line in table(out)} == {"0", "1"}
    assert (out / "features.npz").read_text() == "of an earlier encoding"
    (out / "report.html").write_text("mine")  # it has changed since
    assert "holds report.html, which" in error_of(cluster, [*command, "--overwrite"])
    assert (out / "report.html").read_text() == "mine"


def test_a_run_that_failed_leaves_no_folder_and_no_claim_to_one(
    features: FeatureFile, capsys: pytest.CaptureFixture[str]
) -> None:
    out = features.folder / "o"
    assert cluster(["nosuch", "--k", "2", "--out", str(out)]) == 2
    assert not out.exists()
    out.mkdir()
    assert cluster(["nosuch", "--k", "2", "--out", str(out)]) == 2
    (out / "report.html").write_text("mine")
    assert cluster([features.rows_path, "--k", "2", "--out", str(out), "--overwrite"]) == 2
    assert (out / "report.html").read_text() == "mine"


def test_a_k_that_is_too_large_is_refused_before_encoding(
    pictures: Path, nano: Path, tmp_path: Path, error_of: Callable[..., str]
) -> None:
    out = tmp_path / "o"
    model = ["--model", nano, "--pretrained", "random", "--device", "cpu"]
    error = error_of(cluster, [pictures, "--k", "9999", *model, "--out", out], among_others=True)
    assert "--k: expected auto or 2 to N = " in error
    assert not out.exists()


def test_names_that_look_like_formulas_stay_paths(features: FeatureFile) -> None:
    """A spreadsheet that opens the table would run them."""
    names = ["=1+2.png", "+a.png", "-b.png", "@c.png", "d=1.png", "e.png"]
    path = features.folder / "named.npz"
    np.savez(path, features=features.rows[:6].numpy(), keys=names)
    out = features.folder / "o"
    assert cluster([str(path), "--k", "2", "--out", str(out)]) == 0
    expected = ["./=1+2.png", "./+a.png", "./-b.png", "./@c.png", "d=1.png", "e.png"]
    assert [line["file"] for line in table(out)] == expected


@pytest.fixture
def folder_of_mistakes(features: FeatureFile, nano: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: features, and files that do not go with them."""
    folder = features.folder
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # weights cannot be had
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    (folder / "w.txt").write_text("1\n2\n")
    (folder / "bad.txt").write_text("1\nx\n")
    (folder / "below.txt").write_text("-1\n" + "1\n" * 899)
    np.save(folder / "same.npy", np.zeros((9, 2)))
    np.save(folder / "five.npy", np.eye(5))
    for name, rows in {
        "words": np.array([["a", "b"]] * 9),
        "flat": np.zeros(5),
        "one": np.zeros((1, 5)),
        "bools": np.zeros((5, 5), bool),
        "ragged": np.array([[1], "a"], object),
    }.items():
        np.save(folder / f"{name}.npy", rows)
    (folder / "half").mkdir()
    record = '{"finished": false, "command": "protoclip encode photos --out half"}'
    (folder / "half" / "encode.json").write_text(record)
    (folder / "nano.json").write_text(nano.read_text())
    for name in ("empty", "pictures"):
        (folder / name).mkdir()
    Image.new("RGB", (9, 9)).save(folder / "pictures" / "a.png")
    return folder


@pytest.mark.usefixtures("folder_of_mistakes")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["x.npy", "--k", "901"], "--k: expected auto or 2 to N = 900"),
        (["x.npy", "--run", "logs/x"], "expected pictures as DATA, got features"),
        (["x.npy", "--captions", "w.txt"], "--captions: expected one for each of the 900 rows"),
        (["x.npy", "--weights", "w.txt", "--k", "3"], "expected a number for each of the 900"),
        (["x.npy", "--weights", "bad.txt"], "--weights: expected one number a line in bad.txt"),
        (["x.npy", "--weights", "below.txt"], "numbers from 0 on, not all 0, in below.txt"),
        (["x.npy", "--captions", "no.txt"], "--captions: expected a text file in UTF-8"),
        (["same.npy"], "--k auto: expected rows that differ"),
        (["five.npy"], "--k auto: expected at least 6 pictures or rows, got 5; give --k"),
        (["words.npy", "--k", "2"], "words.npy: expected numbers [N, D] with D >= 1"),
        (["flat.npy", "--k", "2"], "save array.reshape(1, -1) if it is one row"),
        (["one.npy", "--k", "2"], "DATA: expected at least 2 pictures or rows, got 1"),
        (["bools.npy", "--k", "2"], "save array.astype(np.uint8)"),
        (["ragged.npy", "--k", "2"], "save np.stack(rows)"),
        (["half", "--k", "2"], "unfinished; this continues them: protoclip encode photos --out"),
        (["no.npy"], "DATA: the file no.npy does not exist"),
        (["nope/"], "DATA: the folder nope/ does not exist"),
        (["pictures/a.png"], ".safetensors), got pictures/a.png"),
        (["pictures/*.png"], "DATA: expected a folder of pictures"),
        (["empty"], "empty: expected pictures in it, or in folders in it, found none among 0"),
        (["x.npy", "--out", "/proc/x"], "--out: /proc/x cannot be created"),
        (["pictures", "--run", "logs/x", "--model", "ViT-B-32"], "leave out --model"),
        (["pictures", "--run", "logs/x", "--features", "x.npy"], "got --features too"),
        (["pictures", "--features", "x.npy"], "expected features of at least 2 of these pictures"),
        (["pictures", "--captions", "w.txt"], "expected stored features as DATA"),
        (["pictures", "--model", "nano.json"], "--pretrained is missing"),
        (["pictures"], "without a download, use --run logs/NAME, a run of protoclip train"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    flags: list[str],
    words: str,
) -> None:
    assert cluster(flags) == 2
    message = capfd.readouterr().err.split("MiB\n")[-1]  # after the memory, where it got so far
    assert words in message and message.count("\n") == 1
    assert not caplog.records  # OpenCLIP's


# ---- pictures ----

NUMBER_OF_PICTURES = 60


def picture_name(number: int) -> str:
    return f"{number % 3}/{number}.gif"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawings in three folders, two torn pictures and a text."""
    folder = tmp_path_factory.mktemp("photos")
    shapes = open_dataset(f"builtin:shapes:{NUMBER_OF_PICTURES}")
    for number in range(NUMBER_OF_PICTURES):
        path = folder / picture_name(number)
        path.parent.mkdir(exist_ok=True)
        shapes.image(number).save(path)
    (folder / "torn.jpg").write_bytes(b"no picture")
    (folder / "torn.webp").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture, and not said to be one")
    return folder


@pytest.fixture(scope="module")
def weights(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of the tiny model, as OpenCLIP saves them."""
    model = build_model(ModelConfig(model=str(nano), add_projection_head=False))
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(model.clip.state_dict(), path)
    return str(path)


COUNTED = [3, 15, 27, 39, 51]  # of the pictures in order of their paths, those with weight 1


class PictureGroups(NamedTuple):
    out: Path
    error: str  # what the command said
    weights: Path  # a number for each picture, the torn ones too
    counted: set[str]  # the files of weight 1


@pytest.fixture(scope="module")
def groups(
    pictures: Path, nano: Path, weights: str, tmp_path_factory: pytest.TempPathFactory
) -> PictureGroups:
    """Five groups of the pictures, of which five count, by a model's weights."""
    out = tmp_path_factory.mktemp("groups")
    listed = sorted(pictures.rglob("*.[gjw]*"), key=lambda path: (str(path.parent), path.name))
    counts = [int(number in COUNTED) for number in range(len(listed))]
    weights_of_pictures = out / "w.txt"
    weights_of_pictures.write_text("\n".join(map(str, counts)))
    flags = ["--model", str(nano), "--pretrained", weights, "--k", "5", "--out", str(out)]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert cluster([str(pictures), *flags, "--weights", str(weights_of_pictures)]) == 0
    return PictureGroups(
        out=out,
        error=error.getvalue(),
        weights=weights_of_pictures,
        counted={str(listed[number].relative_to(pictures)) for number in COUNTED},
    )


def test_pictures_that_cannot_be_read_are_left_out_and_named(
    pictures: Path, groups: PictureGroups
) -> None:
    assert "left out 2 of 62 pictures" in groups.error and "1 .txt" in groups.error
    for name in ("torn.jpg", "torn.webp"):
        assert f"  {pictures}/{name}: " in groups.error
    names = {picture_name(number) for number in range(NUMBER_OF_PICTURES)}
    assert {line["file"] for line in table(groups.out)} == names


def test_weights_of_pictures_count_those_that_cannot_be_read(groups: PictureGroups) -> None:
    """Each of the five pictures that count is a centroid."""
    at_a_centroid = {
        line["file"] for line in table(groups.out) if float(line["squared_distance"]) < 1e-9
    }
    assert at_a_centroid == groups.counted


def test_the_page_of_pictures_shows_groups_and_a_map(groups: PictureGroups) -> None:
    assert (groups.out / "report.html").stat().st_size < 500_000
    page = read_page(groups.out / "report.html")
    summary = page.section("summary").text
    answer = page.one("p", class_="answer").text
    assert "60 pictures of" in answer
    assert "nano.json (" in summary and "weights.pt)" in summary
    assert len(page.all("details", class_="gallery")) == 1
    assert "is a picture; similar items" in page.section("map").text
    assert "caption" not in page.section("map").text
    assert "the words that distinguish" not in page.section("prototypes").text  # there are no words


def test_pictures_are_encoded_once(
    pictures: Path, groups: PictureGroups, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same groups come from the features that the command wrote."""
    flags = ["--features", str(groups.out / "features"), "--weights", str(groups.weights)]
    assert cluster([str(pictures), *flags, "--k", "5", "--out", str(tmp_path)]) == 0
    assert f"torn.jpg: no features in {groups.out}/features" in capsys.readouterr().err
    assert (tmp_path / "clusters.csv").read_text() == (groups.out / "clusters.csv").read_text()
    assert "60 pictures of" in read_page(tmp_path / "report.html").text


# ---- pictures with captions, and the run that was trained on them ----


class CaptionedRun(NamedTuple):
    pairs: Path  # a table of 60 pictures and captions
    run: Path


@pytest.fixture(scope="module")
def captioned_run(
    pictures: Path, nano: Path, tmp_path_factory: pytest.TempPathFactory
) -> CaptionedRun:
    folder = tmp_path_factory.mktemp("captioned")
    lines = ["filepath\ttitle"]
    for number in range(NUMBER_OF_PICTURES):
        caption = "a red ball" if number % 2 else "a blue box"
        lines.append(f"{pictures}/{picture_name(number)}\t{caption}")
    pairs = folder / "pairs.tsv"
    pairs.write_text("\n".join(lines))
    flags = [
        "--train-data", str(pairs), "--model", str(nano), "--batch-size", "16", "--k", "6",
        "--infonce-warmup-epoch", "0", "--max-steps", "2", "--logs", str(folder), "--name", "run",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOCLIP_CACHE", str(folder / "cache"))
        assert train(flags) == 0
    return CaptionedRun(pairs, folder / "run")


def test_the_board_of_a_run_shows_its_groups_and_settings(captioned_run: CaptionedRun) -> None:
    board = EventAccumulator(str(captioned_run.run / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["clusters"]
    assert board.Images("clusters")[0].width == 512
    settings = board.PluginTagToContent("hparams")["_hparams_/experiment"]
    assert b"optim.batch_size" in settings


def test_a_run_lists_the_groups_of_what_it_trained_on(
    pictures: Path, captioned_run: CaptionedRun
) -> None:
    lines = table(captioned_run.run)
    files = {f"{pictures}/{picture_name(number)}" for number in range(NUMBER_OF_PICTURES)}
    assert {line["key"] for line in lines} == files
    trained = [line for line in lines if line["image"]]
    assert len(trained) >= 32
    assert {line["text"] for line in trained} <= set("012345")


def test_captioned_pictures_are_grouped_by_a_run_and_shown_with_words(
    captioned_run: CaptionedRun, tmp_path: Path
) -> None:
    flags = ["--run", str(captioned_run.run), "--k", "4", "--out", str(tmp_path)]
    assert cluster([str(captioned_run.pairs), *flags]) == 0
    page = read_page(tmp_path / "report.html")
    assert f"features (model: {captioned_run.run.name})" in page.section("summary").text
    prototypes = page.section("prototypes")
    cards = json.loads(prototypes.one("script", type="application/json").source)
    assert len(cards) == 4
    assert sum(card["samples"] for card in cards) == NUMBER_OF_PICTURES
    assert all(card["captions"] and card["images"] for card in cards)
