"""Folders of class folders as pairs: names, captions, splits, training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import HEIC, load, picture, same

from protoclip.cluster.__main__ import main as cluster_command
from protoclip.data import DataError, Faults, open_dataset
from protoclip.data.__main__ import main as data_command
from protoclip.evaluate.__main__ import main as evaluate_command
from protoclip.evaluate.datasets import open_layout
from protoclip.train import main as train_command

PICTURES = 30  # of each class


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Three classes of pictures, one with a folder in it, and what is no picture."""
    root = tmp_path / "animals"
    for number, name in enumerate(("cat", "dog", "great owl")):
        for i in range(PICTURES):
            path = root / name / ("more" if i % 2 else ".") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number * PICTURES + i).save(path)
    (root / "dog" / "notes.txt").write_text("words")
    return root


@pytest.mark.smoke
def test_class_folders_are_pairs(animals: Path) -> None:
    dataset = open_dataset(str(animals))
    assert len(dataset) == 3 * PICTURES
    keys = list(dataset.keys)
    i = keys.index("great owl/more/5.png")
    assert dataset.captions(i) == ("a photo of a great owl.",)
    assert same(dataset.image(i), picture(2 * PICTURES + 5))
    labels = dataset.labels["class"]
    assert labels.names[labels.ids[i]] == "great owl"
    several = open_dataset(str(animals), class_template="simple").captions(i)
    assert len(several) == 7 and "itap of a great owl." in several
    (animals.parent / "prompts.txt").write_text("one {c}\ntwo {}\n")
    templates = str(animals.parent / "prompts.txt")
    assert open_dataset(str(animals), class_template=templates).captions(i)[1] == "two great owl"
    with pytest.raises(DataError, match="--class-template: expected openai, simple or a file"):
        open_dataset(str(animals), class_template="photo of")


def test_names_of_classes_and_the_train_split(animals: Path, tmp_path: Path) -> None:
    (animals / "classnames.txt").write_text("Katze\nHund\nUhu\n")
    assert open_dataset(str(animals)).captions(0) == ("a photo of a Katze.",)
    parts = tmp_path / "both"
    parts.mkdir()
    (animals / "classnames.txt").rename(parts / "classnames.txt")
    animals.rename(parts / "train")
    (parts / "val" / "cat").mkdir(parents=True)
    picture(0).save(parts / "val" / "cat" / "unseen.png")
    dataset = open_dataset(str(parts))
    assert len(dataset) == 3 * PICTURES and dataset.captions(0) == ("a photo of a Katze.",)


def test_pictures_without_classes_are_refused_with_the_way_out(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "flat").mkdir()
    picture(0).save(tmp_path / "flat" / "1.png")
    message = error_of(data_command, ["--check", tmp_path / "flat"])
    assert "no class folders; expected" in message and "protoclip cluster" in message


def test_a_folder_of_npy_files_is_refused_with_the_flags_for_them(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "images.npy").touch()
    message = error_of(train_command, ["--train-data", str(tmp_path)])
    assert "as --image-features FILE and --text-features FILE" in message


def test_batches_of_a_folder_replace_what_does_not_decode(animals: Path) -> None:
    (animals / "cat" / "0.png").write_bytes(b"no picture")
    dataset = open_dataset(str(animals))
    faults = Faults(dataset, 0.1, lambda _: None)
    positions = torch.arange(len(dataset))
    batches = load(dataset, positions, faults=faults, workers=2)
    assert sum(map(len, batches)) == len(dataset)
    assert [dataset.keys[i] for i in faults.positions] == ["cat/0.png"]


def test_class_folders_take_each_real_file_once(
    animals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = animals.parent / "elsewhere"
    elsewhere.mkdir()
    picture(200).save(elsewhere / "1.png")
    (animals / "cat" / "loop").symlink_to(".")
    (animals / "cat" / "of-dogs").symlink_to("../dog")
    (animals / "cat" / "shared.png").symlink_to("../dog/0.png")
    (animals / "all").symlink_to(".")
    (animals / "a pet").symlink_to("cat")  # sorts before it
    (animals / "yak").symlink_to(elsewhere)
    dataset = open_dataset(str(animals))
    keys = list(dataset.keys)
    assert len(keys) == len({(animals / key).resolve() for key in keys}) == 3 * PICTURES + 1
    labels = dataset.labels["class"]
    assert labels.names == ("cat", "dog", "great owl", "yak")
    assert [labels.names[i] for i in labels.ids] == [key.split("/")[0] for key in keys]
    assert data_command(["--check", str(animals)]) == 0
    said = capsys.readouterr().err
    assert f"{animals}: left out 5 repeated paths: regular files are read, each once" in said
    assert "left out 2 class folders without pictures: a pet, all" in said


@pytest.mark.usefixtures("no_heif")
def test_what_is_no_picture_is_counted_by_every_command(
    animals: Path, tmp_path: Path, nano: Path, no_page: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.HEIC", "2.heic"):
        (animals / "dog" / name).write_bytes(HEIC)
    (animals / "cat" / ".DS_Store").write_bytes(b"no picture")
    picture(300).save(animals / "cat" / ".face", "png")
    line = (
        f"{animals}: left out files that Pillow cannot open: 2 HEIC: pip install pillow-heif, "
        "1 without an ending, 1 .txt"
    )
    assert data_command(["--check", str(animals)]) == 0
    captured = capsys.readouterr()
    assert line in captured.err and "91 of 91 samples are good" in captured.out
    random = ["--model", str(nano), "--pretrained", "random"]
    groups = tmp_path / "groups"
    assert cluster_command([str(animals), *random, "--k", "3", "--out", str(groups)]) == 0
    assert line in capsys.readouterr().err
    assert (groups / "clusters.csv").read_text().count("\n") == 1 + 91
    flags = ["--data", str(animals), "--output", str(tmp_path / "results.json")]
    assert evaluate_command([str(nano), "--pretrained", "random", *flags]) == 0
    assert line in capsys.readouterr().err
    flags = ["--model", str(nano), "--batch-size", "16", "--logs", str(tmp_path)]
    flags += ["--report-to", "none", "--max-steps", "1", "--name", "run", "--w-clip", "1"]
    flags += ["--val-fraction", "0.2", "--external-teacher", "none", "--k", "3"]
    assert train_command(["--train-data", str(animals), *flags]) == 0
    assert (tmp_path / "run" / "out.log").read_text().count(line) == 1
    capsys.readouterr()
    assert evaluate_command([str(tmp_path / "run")]) == 0  # on the pairs that it held out
    assert line in capsys.readouterr().err


def test_what_macos_keeps_beside_a_picture_is_none(animals: Path) -> None:
    (animals / "cat" / "._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(90))
    picture(300).save(animals / "cat" / "._my own.png")
    dataset = open_dataset(str(animals))
    assert len(dataset) == 3 * PICTURES + 1 and "cat/._my own.png" in dataset.keys
    left_out = f"{animals}: left out files that Pillow cannot open: 1 ._NAME by macOS, 1 .txt"
    assert list(dataset.facts.left_out) == [left_out]


@pytest.mark.usefixtures("no_heif")
def test_a_class_without_pictures_is_none_unless_it_is_named(
    animals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (animals / "empty").mkdir()
    (animals / "phone").mkdir()
    (animals / "phone" / "1.heic").write_bytes(HEIC)
    with_pictures = ("cat", "dog", "great owl")
    labels = open_dataset(str(animals)).labels["class"]
    assert labels.names == with_pictures and labels.ids.bincount().tolist() == [PICTURES] * 3
    assert data_command(["--check", str(animals)]) == 0
    said = capsys.readouterr().err
    assert f"{animals}: left out 2 class folders without pictures: empty, phone" in said
    # A class of the training pictures alone is one that a probe may guess.
    root = tmp_path / "both"
    (root / "test" / "cat").mkdir(parents=True)
    (root / "test" / "void").mkdir()
    picture(0).save(root / "test" / "cat" / "1.png")
    animals.rename(root / "train")
    layout = open_layout(str(root))
    assert layout.test.labels["class"].names == with_pictures
    assert layout.train is not None
    assert layout.train.labels["class"].ids.bincount().tolist() == [PICTURES] * 3
    line = f"{root}: left out 3 class folders without pictures: empty, phone, void"
    assert line in layout.left_out
    names = ("Katze", "Hund", "leer", "Uhu", "Telefon", "nichts")
    (root / "classnames.txt").write_text("\n".join(names))
    assert open_layout(str(root)).test.labels["class"].names == names


def test_the_first_picture_that_evaluation_cannot_read_is_named(
    animals: Path, tmp_path: Path, nano: Path, no_page: None
) -> None:
    for name in ("4.png", "8.png"):
        (animals / "cat" / name).write_bytes(b"")
    flags = ["--model", str(nano), "--batch-size", "16", "--logs", str(tmp_path), "--name", "run"]
    flags += ["--report-to", "none", "--max-steps", "1", "--external-teacher", "none", "--k", "3"]
    assert train_command(["--train-data", str(animals), *flags]) == 0
    log = (tmp_path / "run" / "out.log").read_text()
    assert "evaluation: on 88 pairs of the training data" in log
    assert f"evaluation: left out 2 unreadable pairs, first {animals}/cat/4.png: the picture" in log


def test_training_on_a_folder_and_evaluation_on_its_other_split(
    animals: Path, tmp_path: Path, nano: Path, no_page: None
) -> None:
    root = tmp_path / "imagenet"
    root.mkdir()
    animals.rename(root / "train")
    for name in ("cat", "dog", "great owl"):
        (root / "val" / name).mkdir(parents=True)
        for i in range(4):
            picture(200 + i).save(root / "val" / name / f"{i}.png")
    flags = ["--model", str(nano), "--batch-size", "16", "--k", "3", "--logs", str(tmp_path)]
    flags += ["--infonce-warmup-epoch", "0", "--external-teacher", "none", "--report-to", "none"]
    name = ["--name", "run", "--epochs", "1", "--val-data", str(root)]
    assert train_command(["--train-data", str(root), *flags, *name]) == 0
    results = (tmp_path / "run" / "results.json").read_text()
    assert '"class/acc1"' in results
