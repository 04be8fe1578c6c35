"""``protoclip cluster`` on stored features: folders, captions, rows that cannot be grouped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_folders import write_folder, write_layout
from html_page import read_page
from pairs import draw, table
from ranks import config_of

import protoclip
from protoclip.cluster.__main__ import main as cluster
from protoclip.curate.__main__ import main as curate
from protoclip.data import open_dataset
from protoclip.data.feature_pairs import FeaturePairs
from protoclip.data.settings import open_run_data
from protoclip.encode.__main__ import main as encode
from protoclip.train import main as train

CLIP_RETRIEVAL = Path(__file__).parent / "clip_retrieval"  # its NumpyWriter, version 2.45, wrote it


def groups(out: Path) -> dict[str, str]:
    return {line["file"]: line["cluster"] for line in table(out)}


@pytest.mark.parametrize("side", ["", "text"])
def test_a_folder_of_clip_retrieval_is_clustered(tmp_path: Path, side: str) -> None:
    """Three parts of 7, 5 and 6 rows; row i of part p is of the kind (p + i) % 3."""
    pytest.importorskip("pyarrow")
    flags = ["--side", side] if side else []
    out = tmp_path / "out"
    assert cluster([str(CLIP_RETRIEVAL), "--k", "3", "--out", str(out), *flags]) == 0
    kinds = [(p + i) % 3 for p, count in enumerate((7, 5, 6)) for i in range(count)]
    keys = [f"{p:05}{i:04}" for p, count in enumerate((7, 5, 6)) for i in range(count)]
    assert list(groups(out)) == keys
    pairs = set(zip(kinds, groups(out).values(), strict=True))
    assert len(pairs) == 3  # a group for each kind
    assert "kind" in (out / "report.html").read_text()


def test_pictures_are_encoded_then_clustered_from_their_folder(nano: Path, tmp_path: Path) -> None:
    """cluster photos/ is encode, then cluster of its folder; the table says where pictures are."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        draw(tmp_path / "photos" / f"{number}.png", number)
    model = ["--model", str(nano), "--pretrained", "random", "--device", "cpu"]
    photos = str(tmp_path / "photos")
    assert cluster([photos, *model, "--k", "3", "--out", str(tmp_path / "a")]) == 0
    assert encode([photos, *model, "--out", str(tmp_path / "f")]) == 0
    for features in ("f", "a/features", "f/img_emb"):
        out = tmp_path / f"of-{features.replace('/', '-')}"
        assert cluster([str(tmp_path / features), "--k", "3", "--out", str(out)]) == 0
        assert groups(out) == groups(tmp_path / "a")
        page = read_page(out / "report.html")
        assert "12 pictures of" in page.one("p", class_="answer").text


def test_a_picture_with_several_captions_is_one_row(tmp_path: Path) -> None:
    rows = np.repeat(np.random.default_rng(0).standard_normal((10, 5)), 3, axis=0)[:23]
    folder = write_folder(tmp_path / "f", rows, [f"k{i // 3}" for i in range(23)])
    assert cluster([str(folder), "--k", "2", "--out", str(tmp_path / "a")]) == 0
    assert list(groups(tmp_path / "a")) == [f"k{i}" for i in range(8)]
    flags = ["--side", "text", "--k", "2", "--out", str(tmp_path / "b")]
    assert cluster([str(folder), *flags]) == 0
    assert len(table(tmp_path / "b")) == 23


def keys_that_begin_again(path: Path) -> Path:
    """Rows of 23 pictures whose keys begin again after 16."""
    rows = np.random.default_rng(0).standard_normal((23, 5))
    return write_folder(path, rows, [f"{i % 16:09}" for i in range(23)])


def test_keys_of_several_pictures_are_refused(tmp_path: Path, error_of: Callable[..., str]) -> None:
    data = keys_that_begin_again(tmp_path / "f")
    rows = np.random.default_rng(1).standard_normal((23, 5))
    good = write_folder(tmp_path / "good", rows, [f"{i:09}" for i in range(23)])
    flags = ["--method", "clip", "--batch-size", "8", "--logs", tmp_path / "out", "--train-data"]
    commands = {
        "cluster": (cluster, [data, "--k", "2", "--out", tmp_path / "out"]),
        "curate": (curate, [data, "--levels", "2", "--target", "4", "--out", tmp_path / "out"]),
        "train": (train, [*flags, data]),
        "train --val-data": (train, [*flags, good, "--val-data", data]),
    }
    for command, arguments in commands.values():
        message = error_of(command, arguments, among_others=True)
        assert "expected one picture for each key, got rows 0 and 16 with the key '000" in message
        assert "write a key into the table that differs between pictures" in message
        assert not (tmp_path / "out").exists()


def test_rows_without_a_key_are_pictures_of_their_own(tmp_path: Path) -> None:
    """As those of failed downloads in clip-retrieval's tables. Pages say row 12, tables the
    position."""
    keys = ["" if i % 3 == 0 else f"k{i}" for i in range(23)]
    rows = np.random.default_rng(0).standard_normal((23, 5)).astype(np.float32)
    data = write_folder(tmp_path / "f", rows, keys)
    assert cluster([str(data), "--k", "2", "--out", str(tmp_path / "a")]) == 0
    assert [line["file"] for line in table(tmp_path / "a")] == keys
    assert [line["position"] for line in table(tmp_path / "a")] == [str(i) for i in range(23)]
    assert "row 12" in (tmp_path / "a" / "report.html").read_text()
    pairs = open_dataset(str(data))
    assert list(pairs.keys) == [key or f"row {i}" for i, key in enumerate(keys)]
    flags = ["--levels", "4", "--target", "23", "--resamplings", "0"]
    assert curate([str(data), *flags, "--out", str(tmp_path / "c")]) == 0
    selected = table(tmp_path / "c", "selected.csv")
    assert [line["key"] for line in selected] == keys
    rows_flag = ["--rows", str(tmp_path / "c" / "selected.csv")]
    training = open_run_data(config_of("--train-data", str(data), *rows_flag)).training
    assert list(training.keys) == list(pairs.keys)


@pytest.mark.parametrize("captions", ["null", "empty", "missing"])
def test_missing_captions_mean_the_same(tmp_path: Path, captions: str) -> None:
    rows = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
    columns: dict[str, list[str | None]] = {"key": [f"k{i}" for i in range(12)]}
    if captions != "missing":
        columns["caption"] = [None if captions == "null" else ""] * 12
    sides = {"img_emb": rows, "text_emb": rows}
    data = write_layout(tmp_path / "f", sides, columns, ending="parquet")
    pairs = open_dataset(str(data))
    assert isinstance(pairs, FeaturePairs) and not pairs.facts.has_captions
    assert pairs.captions(3) == ("k3",)
    assert pairs.caption_ids(np.arange(12), np.zeros(12, np.int64)) is None
    assert cluster([str(data), "--k", "2", "--out", str(tmp_path / "a")]) == 0
    card = read_page(tmp_path / "a" / "report.html").section("prototypes")
    assert '"captions":' not in card.one("script", type="application/json").source


def test_rows_with_nan_are_left_out_and_listed(tmp_path: Path, capsys) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    rows[3, 1] = np.nan
    rows[20, 0] = -np.inf
    np.save(tmp_path / "x.npy", rows)
    np.savetxt(tmp_path / "w.txt", np.arange(30))
    flags = ["--weights", str(tmp_path / "w.txt"), "--k", "2", "--out", str(tmp_path / "out")]
    assert cluster([str(tmp_path / "x.npy"), *flags]) == 0
    error = capsys.readouterr().err
    assert "left out 2 of 30 rows" in error
    assert "row 3: its features hold NaN or infinity" in error
    lines = table(tmp_path / "out")
    assert [line["position"] for line in lines] == [str(i) for i in range(30) if i not in (3, 20)]
    assert {line["file"] for line in lines} == {""}
    left_out = table(tmp_path / "out", "left_out.csv")
    assert [line["position"] for line in left_out] == ["3", "20"]
    with pytest.raises(ValueError):
        protoclip.kmeans(torch.from_numpy(rows), 2)


def test_rows_of_zeros_are_counted_when_they_are_normalised(tmp_path: Path, capsys) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4))
    rows[[4, 7]] = 0
    np.save(tmp_path / "x.npy", rows)
    command = [str(tmp_path / "x.npy"), "--k", "3", "--normalize", "--out", str(tmp_path / "out")]
    assert cluster(command) == 0
    words = "2 rows of zeros have no direction"
    assert words in capsys.readouterr().err
    assert words in read_page(tmp_path / "out" / "report.html").text


@pytest.mark.usefixtures("quick_map")
def test_a_run_that_did_not_converge_says_so(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2000, 4)))
    command = [str(tmp_path / "x.npy"), "--k", "20"]
    words = "k-means stopped after 3 iterations before it converged; --iters"
    assert cluster([*command, "--iters", "3", "--out", str(tmp_path / "a")]) == 0
    assert words in capsys.readouterr().err
    assert words in read_page(tmp_path / "a" / "report.html").text
    assert cluster([*command, "--out", str(tmp_path / "b")]) == 0  # the default converges
    assert "converged" not in capsys.readouterr().err


def test_a_name_that_the_locale_does_not_have_is_named(nano: Path, tmp_path: Path) -> None:
    for number in range(4):
        draw(tmp_path / "photos" / f"{number}.png", number)
    os.replace(tmp_path / "photos" / "3.png", tmp_path / "photos" / f"{'ü' * 120}.png")
    command = [sys.executable, "-m", "protoclip", "cluster", "photos", "--k", "2", "--out", "out"]
    command += ["--model", str(nano), "--pretrained", "random", "--device", "cpu"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "left out 1 of 4 pictures" in run.stderr
    assert r"photos/\xfc\xfc" in run.stderr and "set PYTHONUTF8=1" in run.stderr


def test_features_are_grouped_without_open_clip_and_torchvision(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((60, 4)))
    code = (
        "import sys; from protoclip.__main__ import main\n"
        "assert main(['cluster', 'x.npy', '--k', '3', '--out', 'o']) == 0\n"
        "loaded = {'open_clip', 'torchvision', 'transformers', 'timm'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.usefixtures("quick_map")
@pytest.mark.parametrize("flags", [[], ["--normalize"], ["--k", "auto"]])
def test_rows_that_stay_on_disk_give_the_same_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """With NaN rows left out, so that the rows are some of those in the file."""
    rows = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float16)
    rows += 4 * (np.arange(300) % 3)[:, None].astype(np.float16)
    rows[[0, 77]] = np.nan
    np.save(tmp_path / "x.npy", rows)
    command = [str(tmp_path / "x.npy"), "--k", "3", *flags, "--device", "cpu"]
    assert cluster([*command, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.setattr("protoclip.cluster.__main__.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("protoclip.lloyd.points.BLOCK_BYTES", 4096)
    assert cluster([*command, "--out", str(tmp_path / "b")]) == 0
    for name in ("clusters.csv", "left_out.csv", "centroids.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
