"""What a run is evaluated on where its data has no held-out part of its own."""

import csv
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
from pairs import write_drawings
from ranks import config_of, in_group, losses, without_page

from protoclip.data import Facts, Subset, heldout_pictures, open_dataset
from protoclip.data.settings import RunData, open_run_data
from protoclip.data.shapes import ShapesDataset
from protoclip.evaluate.__main__ import main as evaluate
from protoclip.evaluate.during import TRAINED, own_layout
from protoclip.export import main as export
from protoclip.runs import checkpoint
from protoclip.train import main as train

PAIRS = 80


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_drawings(tmp_path_factory.mktemp("table"), PAIRS)


def train_on(table, nano, logs, name, *flags, code=0):
    """The folder of a run of eight steps on the table."""
    argv = ["--train-data", str(table), "--model", str(nano), "--batch-size", "16"]
    argv += ["--infonce-warmup-epoch", "1", "--k", "4", "--report-to", "none"]
    argv += ["--logs", str(logs), "--name", name, "--max-steps", "8", *flags]
    assert train(argv) == code
    return logs / name


@pytest.fixture
def run(table, nano, tmp_path):
    """``run(name, *flags)``: the folder of such a run."""
    return partial(train_on, table, nano, tmp_path)


@pytest.fixture(scope="module")
def part(table, nano, tmp_path_factory):
    """A run on three quarters of the table."""
    logs = tmp_path_factory.mktemp("part")
    return train_on(table, nano, logs, "part", "--val-fraction", "0.25")


def test_who_is_held_out_depends_on_seed_and_number_only():
    mask = heldout_pictures(np.arange(10_000), 0.2, seed=3)
    assert abs(mask.mean() - 0.2) < 0.02
    assert (heldout_pictures(np.arange(400), 0.2, seed=3) == mask[:400]).all()
    assert (heldout_pictures(np.arange(10_000), 0.3, seed=3) >= mask).all()
    assert (heldout_pictures(np.arange(10_000), 0.2, seed=4) != mask).any()


@pytest.mark.parametrize("data", ["table", "builtin:shapes:64"])
def test_runs_of_several_seeds_are_judged_on_the_same_pictures(run, table, data, no_page):
    flags = ["--train-data", data] if data != "table" else ["--val-fraction", "0.25"]
    flags += ["--max-steps", "1", "--val-frequency", "0"]

    def judged_on(name, *more):
        folder = run(name, *flags, *more)
        return json.loads((folder / "results.json").read_text())["trained"]["HO"]["fingerprint"]

    first = judged_on("0")
    assert first and judged_on("1", "--seed", "1") == first
    assert judged_on("2", "--val-seed", "1") != first


def test_the_default_split_is_that_of_seed_0(table):
    """As it was when --seed chose the split."""
    data = open_run_data(config_of("--train-data", str(table), "--val-fraction", "0.3"))
    numbers = open_dataset(str(table)).picture_numbers()
    mask = heldout_pictures(numbers, 0.3, seed=0)
    keys = open_dataset(str(table)).keys
    assert list(data.training.keys) == [keys[i] for i in np.flatnonzero(~mask)]


def test_the_rows_of_a_picture_stay_together(table):
    data = open_run_data(config_of("--train-data", str(table), "--val-fraction", "0.3"))
    trained = {key.split("#")[0] for key in data.training.keys}
    held_out = {key.split("#")[0] for key in data.held_out.keys}
    assert not trained & held_out and len(trained | held_out) == PAIRS and len(held_out) > 10
    captions = [data.held_out.captions(i) for i in range(len(data.held_out))]
    assert len(data.training) + sum(map(len, captions)) == PAIRS + PAIRS // 5
    captions_of_two_rows = [texts for texts in captions if len(texts) == 2]
    assert captions_of_two_rows
    assert all(second == f"also {first}" for first, second in captions_of_two_rows)


def test_a_run_on_a_table_answers_with_pairs_it_was_trained_on(run, capsys, error_of):
    folder = run("whole")
    assert "evaluation: on 80 pairs of the training data" in capsys.readouterr().err
    results = json.loads((folder / "results.json").read_text())
    assert list(results["trained"]) == ["TRAIN"]
    assert results["trained"]["TRAIN"]["title"] == "80 of the pairs that it was trained on"
    chance = results["floors"]["chance"]["TRAIN"]["metrics"]["text_retrieval_recall@1"]
    assert chance == pytest.approx(1 / 80)
    page = (folder / "report.html").read_text()
    hits = 100 * results["trained"]["TRAIN"]["metrics"]["text_retrieval_recall@1"]
    assert (
        f"It finds the caption of {hits:.0f} % of pictures it was trained on among 80 "
        "captions (guessing: 1 %)." in page
    )
    assert "was not evaluated" not in page and "--val-fraction 0.1" in page
    sections = set(re.findall(r'<section id="(\w+)"', page))
    assert set(re.findall(r'<a href="#(\w+)"', page)) <= sections
    assert "retrieval" in sections and "names" not in sections
    assert export([str(folder), "--out", str(folder / "model")]) == 0
    card = (folder / "model" / "README.md").read_text()
    assert "pairs that it was trained on" in card and "model-index" not in card
    assert "was trained on all of" in error_of(evaluate, [folder])


def test_held_out_pairs_are_never_trained_on(part, table, capsys):
    data = open_run_data(config_of("--train-data", str(table), "--val-fraction", "0.25"))
    with open(part / "clusters.csv") as file:
        trained = {row["key"] for row in csv.DictReader(file)}
    assert trained == set(data.training.keys) and not trained & set(data.held_out.keys)
    saved = checkpoint.load(checkpoint.candidates(part)[0])["protoclip"]["training"]
    assert saved["data"] == checkpoint.fingerprint(data.training)
    results = json.loads((part / "results.json").read_text())
    assert list(results["trained"]) == ["HO"] and results["data"].endswith("[held out]")
    assert results["trained"]["HO"]["samples"] == len(data.held_out)
    page = (part / "report.html").read_text()
    assert "pictures it has never seen" in page and "trained on" not in page
    capsys.readouterr()
    assert evaluate([str(part), "--output", str(part / "again.json")]) == 0
    assert "Held-out pairs (HO)" in capsys.readouterr().out
    again = json.loads((part / "again.json").read_text())["trained"]["HO"]["metrics"]
    first = results["trained"]["HO"]["metrics"]
    assert again["text_retrieval_recall@1"] == first["text_retrieval_recall@1"]


@pytest.fixture
def own_table(table, tmp_path):
    """A copy of the table, to be changed."""
    return shutil.copytree(table.parent, tmp_path / "table") / table.name


def test_evaluate_leaves_out_what_training_left_out(run, own_table, capsys):
    """A picture that cannot be read ends neither the run nor its evaluation."""
    data = open_run_data(config_of("--train-data", str(own_table), "--val-fraction", "0.25"))
    bad = data.held_out.keys[1]
    (own_table.parent / bad).write_bytes(b"no picture")
    flags = ["--train-data", str(own_table), "--val-fraction", "0.25", "--max-steps", "1"]
    folder = run("bad", *flags, "--val-frequency", "0")
    capsys.readouterr()
    assert evaluate([str(folder), "--out", str(folder / "again.json"), "--tasks", "retrieval"]) == 0
    assert f"left out 1 unreadable pair, first {own_table}" in capsys.readouterr().err
    first, again = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("results", "again")
    )
    first, again = first["trained"]["HO"], again["trained"]["HO"]
    assert again["samples"] == first["samples"] == len(data.held_out) - 1
    recall = "image_retrieval_recall@1"
    assert again["metrics"][recall] == first["metrics"][recall]


def test_evaluate_refuses_held_out_pairs_that_may_have_been_trained_on(
    run, own_table, error_of, no_page
):
    flags = ["--train-data", str(own_table), "--val-fraction", "0.25", "--max-steps", "1"]
    folder = run("part", *flags, "--val-frequency", "0")
    of_training = (folder / "results.json").read_bytes()
    header, *rows = own_table.read_text().splitlines()
    for row in rows:
        file = own_table.parent / row.split(",")[0]
        shutil.copy(file, file.with_name(f"new-{file.name}"))
    own_table.write_text("\n".join([header, *rows, *(f"new-{row}" for row in rows)]))
    assert evaluate([str(folder)]) == 0  # rows at the end are as new as those that were held out
    (file,) = folder.glob("results-*.json")
    results = json.loads(file.read_text())
    assert results["trained"]["HO"]["samples"] > 25 and results["untrained"] is None
    assert (folder / "results.json").read_bytes() == of_training
    own_table.write_text("\n".join([header, *rows[1:]]))
    assert "has changed since the run was trained" in error_of(evaluate, [folder])


def test_a_resumed_run_holds_out_the_same_pairs(part, run, capsys):
    with without_page():
        half = run("half", "--val-fraction", "0.25", "--max-steps", "5")
    capsys.readouterr()
    run("half", "--resume", str(half), "--val-fraction", "0.3", code=2)
    assert "data.val_fraction was 0.25 and is 0.3" in capsys.readouterr().err
    run("half", "--resume", str(half), "--val-seed", "1", code=2)
    assert "data.val_seed was 0 and is 1" in capsys.readouterr().err
    run("half", "--resume", str(half))
    # The schedule of the first five steps was a shorter run's; the samples were the same.
    trained = [(folder / "clusters.csv").read_text().splitlines() for folder in (part, half)]
    keys = [[line.split(",")[0] for line in lines] for lines in trained]
    assert keys[0] == keys[1] and [step for step, _ in losses(half)] == list(range(1, 9))


def test_scores_before_training_on_other_data_are_not_shown(run, table, no_page):
    folder = run("run", "--max-steps", "2")
    first = json.loads((folder / "results.json").read_text())
    run("run", "--resume", str(folder), "--max-steps", "3", "--val-data", str(table))
    second = json.loads((folder / "results.json").read_text())
    assert first["untrained"] and second["trained"] and second["untrained"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--val-data", "builtin:shapes:20"], "leave one of them out"),
        (["--train-data", "builtin:shapes:64"], "has a held-out part of its own"),
        (["--val-fraction", "0.95"], "--val-fraction: expected at most 0.9"),
        (["--val-fraction", "0.0001"], "to hold out at least 2 of the 96 pairs"),
        (["--train-data", "http://127.0.0.1:9/x.tar"], "--val-data"),
    ],
)
def test_what_cannot_be_held_out(run, capsys, monkeypatch, flags, words):
    if "http" in flags[-1]:
        shards = type("Remote", (ShapesDataset,), {"facts": Facts(remote=True)})()
        shards.name = flags[-1]
        monkeypatch.setattr("protoclip.data.settings.index_together", lambda data: None)
        monkeypatch.setattr("protoclip.data.settings.open_dataset", lambda *a, **k: shards)
    folder = run("refused", "--val-fraction", "0.2", *flags, code=2)
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not folder.exists()


def test_unreadable_pictures_are_left_out(table, tmp_path):
    rows = table.read_text().splitlines()
    text = "\n".join([rows[0], *(f"{table.parent}/{row}" for row in rows[1:])])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "pairs.csv").write_text(f"{text}\n{tmp_path}/bad.png,bad\n")
    layouts = in_group(2, layout_sizes, str(tmp_path / "pairs.csv"))
    assert layouts == [("TRAIN", 80, "80 of the pairs that it was trained on")] * 2
    dataset = open_dataset(str(tmp_path / "pairs.csv"))
    unreadable = 96  # its position
    assert own_layout(RunData(Subset(dataset, [unreadable, unreadable]))) is None
    held_out = Subset(dataset, [0, unreadable, 1])
    assert own_layout(RunData(dataset, held_out)).test.keys[:] == dataset.keys[:2]
    held_out = Subset(dataset, [0, *[unreadable] * 200, 1])
    layout = own_layout(RunData(dataset, held_out))
    assert layout.test.keys[:] == dataset.keys[:2]
    assert layout.left_out[0].startswith("evaluation: left out 200 unreadable pairs, first ")


def layout_sizes(path):
    layout = own_layout(RunData(open_dataset(path)))
    return layout.key, len(layout.test), layout.title


def test_a_thousand_training_pairs_at_most():
    layout = own_layout(RunData(open_dataset("builtin:shapes:1500")))
    assert len(layout.test) == TRAINED == 1000
    assert layout.title == "1,000 of the pairs that it was trained on"
