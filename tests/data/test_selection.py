"""``protoclip train --rows selected.csv``: which pairs are trained on."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pairs import write_drawings
from ranks import config_of

from protoclip.__main__ import main as protoclip
from protoclip.curate.__main__ import main as curate
from protoclip.data import PairDataset, open_dataset
from protoclip.data.settings import RunData, open_run_data
from protoclip.features.table import write_csv_table

PICTURES = 20


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_drawings(tmp_path, PICTURES, "={}.png")


@pytest.fixture
def open_with(table: Path, tmp_path: Path) -> Callable[..., RunData]:
    """``open_with(keys, positions, flags)``: the data of a run with a selection of these."""

    def open_run(keys: list[str], positions: list[int], *flags: str) -> RunData:
        columns = {"position": list(map(str, positions)), "key": keys}
        write_csv_table(tmp_path / "selected.csv", columns)
        rows = ["--rows", str(tmp_path / "selected.csv")]
        return open_run_data(config_of("--train-data", str(table), *rows, *flags))

    return open_run


def keys_of(dataset: PairDataset | None) -> list[str]:
    return [] if dataset is None else list(dataset.keys)


def test_pairs_are_found_by_key_with_all_rows_of_their_pictures(
    table: Path, open_with: Callable[..., RunData]
) -> None:
    whole = open_dataset(str(table))
    chosen = [whole.keys[i] for i in (3, 5, 12)]
    data = open_with(chosen, [0, 1, 2]).training  # the positions are not those of the pairs
    second_row_of_picture_5 = PICTURES + 1
    assert keys_of(data) == [whole.keys[i] for i in (3, 5, 12, second_row_of_picture_5)]
    assert data.captions(3) == whole.captions(second_row_of_picture_5)


def test_positions_count_where_there_are_no_keys(
    table: Path, open_with: Callable[..., RunData]
) -> None:
    whole = open_dataset(str(table))
    assert keys_of(open_with(["", ""], [7, 2]).training) == [whole.keys[2], whole.keys[7]]


def test_keys_and_positions_may_be_mixed(table: Path, open_with: Callable[..., RunData]) -> None:
    whole = open_dataset(str(table))
    chosen = open_with([whole.keys[3], "", whole.keys[7]], [0, 2, 1]).training
    assert keys_of(chosen) == [whole.keys[i] for i in (2, 3, 7)]


def test_the_same_pictures_are_held_out(table: Path, open_with: Callable[..., RunData]) -> None:
    whole = open_dataset(str(table))
    fraction = ("--val-fraction", "0.3")
    held_out = keys_of(open_run_data(config_of("--train-data", str(table), *fraction)).held_out)
    data = open_with(list(whole.keys[:10]), list(range(10)), *fraction)
    assert keys_of(data.held_out) == held_out
    assert 0 < len(data.training) < 12
    assert not set(keys_of(data.training)) & set(held_out)


def test_a_selection_of_other_data_is_refused(
    table: Path, open_with: Callable[..., RunData], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"got 1 other key in .*selected.csv, such as none.png"):
        open_with(["none.png"], [0])
    with pytest.raises(ValueError, match="expected positions below 24, the size of .*got 99 in"):
        open_with([""], [99])
    with pytest.raises(ValueError, match="expected positions below 24, the size of .*got 24 in"):
        open_with([""], [24])
    with pytest.raises(ValueError, match="expected a selected.csv of protoclip curate, got"):
        open_run_data(config_of("--train-data", str(table), "--rows", str(table)))


def test_a_missing_selection_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert protoclip(["train", "--rows", "none.csv"]) == 2
    assert "--rows: the file none.csv does not exist" in capsys.readouterr().err


def test_the_commands_fit_together(table: Path, tmp_path: Path) -> None:
    whole = open_dataset(str(table))
    features = np.random.default_rng(0).normal(size=(len(whole), 3)).astype(np.float32)
    np.savez(tmp_path / "features.npz", features=features, keys=np.array(whole.keys))
    flags = ["--levels", "6", "--target", "8", "--resamplings", "0"]
    out = tmp_path / "out"
    assert curate([str(tmp_path / "features.npz"), *flags, "--out", str(out)]) == 0
    rows = ["--rows", str(out / "selected.csv")]
    training = open_run_data(config_of("--train-data", str(table), *rows)).training
    with open(out / "selected.csv", encoding="utf-8", newline="") as file:
        selected = {row["key"].removeprefix("'") for row in csv.DictReader(file)}
    assert len(selected) == 8
    assert selected <= set(keys_of(training))
