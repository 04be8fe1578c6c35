"""Folders of class folders as pairs: names, captions, splits, training and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pairs import load, picture, refused, same

from protoclip.cluster import main as cluster_command
from protoclip.data import DataError, Faults, open_dataset
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "flat").mkdir()
    picture(0).save(tmp_path / "flat" / "1.png")
    message = refused(str(tmp_path / "flat"), capsys)
    assert "no class folders; expected" in message and "protoclip cluster" in message


def test_batches_of_a_folder_replace_what_does_not_decode(animals: Path) -> None:
    (animals / "cat" / "0.png").write_bytes(b"no picture")
    dataset = open_dataset(str(animals))
    faults = Faults(dataset, 0.1, lambda _: None)
    positions = torch.arange(len(dataset))
    batches = load(dataset, positions, faults=faults, workers=2)
    assert sum(map(len, batches)) == len(dataset)
    assert [dataset.keys[i] for i in faults.positions] == ["cat/0.png"]


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


def test_the_same_folder_trains_and_clusters(animals: Path, tmp_path: Path, nano: Path) -> None:
    out = tmp_path / "groups"
    flags = ["--model", str(nano), "--pretrained", "random", "--k", "3", "--out", str(out)]
    assert cluster_command([str(animals), *flags]) == 0
    assert len((out / "clusters.csv").read_text().splitlines()) == 3 * PICTURES + 1
