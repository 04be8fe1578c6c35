"""``protoclip curate``: its files, duplicates, faults of the data, resume, the forecast."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_folders import write_layout
from html_page import read_page
from pairs import table
from PIL import Image
from safetensors.torch import save_file

from protoclip import Hierarchy, balanced_sample, hierarchical_kmeans
from protoclip.__main__ import main as protoclip
from protoclip.common import sealed
from protoclip.common.files import sole_writer
from protoclip.common.seeds import evenly_spaced
from protoclip.common.signals import Stopped
from protoclip.curate import __main__ as command
from protoclip.curate.__main__ import main as curate
from protoclip.features.table import read_csv

ROWS, COLUMNS = 600, 5
SIZES = [300, 150, 90, 60]  # of four blobs
FLAGS = ["--levels", "40,4", "--target", "80", "--resamplings", "1"]


def blobs() -> np.ndarray:
    """Rows of four blobs far from each other, the largest first: fp16 [N, D]."""
    generator = np.random.default_rng(0)
    centres = np.repeat(20 * np.eye(4, COLUMNS), SIZES, axis=0)
    return (centres + generator.normal(size=(ROWS, COLUMNS))).astype(np.float16)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """A file of features."""
    np.save(tmp_path / "rows.npy", blobs())
    return tmp_path / "rows.npy"


def positions(out: Path) -> list[int]:
    return [int(row["position"]) for row in table(out, "selected.csv")]


def test_selected_rows_are_those_of_the_functions(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert curate([str(features), *FLAGS, "--out", str(out)]) == 0
    hierarchy = hierarchical_kmeans(blobs(), [40, 4], resamplings=1)
    chosen = balanced_sample(hierarchy, 80)
    assert positions(out) == chosen.tolist()
    rows = table(out, "selected.csv")
    assert list(rows[0]) == ["position", "key", "file", "cluster_1", "cluster_2"]
    assert [int(row["cluster_1"]) for row in rows] == hierarchy.labels(1)[chosen].tolist()
    assert [int(row["cluster_2"]) for row in rows] == hierarchy.labels(2)[chosen].tolist()
    assert {row["key"] for row in rows} == {""}
    loaded = Hierarchy.load(out / "hierarchy.safetensors")
    assert torch.equal(loaded.labels(2), hierarchy.labels(2))
    assert table(out, "left_out.csv") == []
    blob_of_row = np.repeat(np.arange(4), SIZES)[positions(out)]
    assert np.bincount(blob_of_row).tolist() == [20, 20, 20, 20]
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "80 of 600 rows of rows.npy, with equal shares of 4 clusters." in text
    assert "All rows are spread like equal shares of 3." in text
    assert "The chosen rows are spread like equal shares of 4.0 clusters" in text


def test_keys_files_and_pictures_of_a_folder(tmp_path: Path) -> None:
    """In clip-retrieval's layout, in two parts, with a picture for each even row."""
    files = [str(tmp_path / f"{i}.png") if i % 2 == 0 else "" for i in range(ROWS)]
    for i in range(0, ROWS, 2):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(files[i])
    columns = {
        "key": [f"=key {i}" for i in range(ROWS)],
        "file": files,
        "caption": [f"drawing, number {i}" for i in range(ROWS)],
    }
    folder = write_layout(tmp_path / "features", {"img_emb": blobs()}, columns, [400, 200])
    out = tmp_path / "out"
    assert curate([str(folder), *FLAGS, "--out", str(out)]) == 0
    keys = read_csv(out / "selected.csv", "key")
    assert list(keys) == [f"=key {i}" for i in positions(out)]
    files = [row["file"] for row in table(out, "selected.csv")]
    assert [bool(file) for file in files] == [i % 2 == 0 for i in positions(out)]
    page = read_page(out / "report.html")
    assert page.one("meta", name="generator").attributes["content"] == "protoclip curate"
    groups = page.section("prototypes")
    cards = json.loads(groups.one("script", type="application/json").source)
    assert sorted(card["samples"] for card in cards) == sorted(SIZES)
    assert {card["class"] for card in cards} == {"20 chosen"}
    assert all(card["images"] and card["captions"] for card in cards)


def test_choose_and_seed_and_normalize(features: Path, tmp_path: Path) -> None:
    chosen = {}
    for name, flags in {
        "random": [],
        "other seed": ["--seed", "1"],
        "closest": ["--choose", "closest"],
        "unit": ["--normalize"],
    }.items():
        out = tmp_path / name
        assert curate([str(features), *FLAGS, *flags, "--out", str(out)]) == 0
        chosen[name] = tuple(positions(out))
    assert len(set(chosen.values())) == 4
    rows = torch.nn.functional.normalize(torch.from_numpy(blobs()).float(), dim=1)
    unit = hierarchical_kmeans(rows, [40, 4], resamplings=1)
    stored = Hierarchy.load(tmp_path / "unit" / "hierarchy.safetensors")
    assert stored.levels[0].inertia == pytest.approx(unit.levels[0].inertia, rel=0.05)


def test_duplicates_are_replaced_by_rows_of_their_cluster(tmp_path: Path) -> None:
    """Of each of 30 places there are 20 rows within 0.01, and one more row at 0.5."""
    generator = np.random.default_rng(0)
    places = np.repeat(10 * generator.normal(size=(30, 4)), 20, axis=0)
    places += 0.004 * generator.uniform(-1, 1, size=places.shape)
    others = places[::20] + np.array([0.5, 0, 0, 0])
    np.save(tmp_path / "rows.npy", np.concatenate([places, others]).astype(np.float32))
    flags = ["--levels", "30", "--target", "60", "--resamplings", "0", "--seed", "3"]
    assert curate([str(tmp_path / "rows.npy"), *flags, "--out", str(tmp_path / "plain")]) == 0
    assert sum(i >= 600 for i in positions(tmp_path / "plain")) < 15
    flags += ["--without-duplicates", "0.1"]
    assert curate([str(tmp_path / "rows.npy"), *flags, "--out", str(tmp_path / "apart")]) == 0
    chosen = positions(tmp_path / "apart")
    assert sum(i >= 600 for i in chosen) == 30
    assert sorted(i // 20 for i in chosen if i < 600) == list(range(30))


def test_missing_rows_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "rows.npy", np.repeat(np.eye(3, dtype=np.float32), 10, axis=0))
    flags = ["--levels", "3", "--target", "12", "--without-duplicates", "0.1"]
    assert curate([str(tmp_path / "rows.npy"), *flags, "--out", str(tmp_path / "out")]) == 0
    assert len(positions(tmp_path / "out")) == 3
    sentence = (
        "No two chosen rows of a lowest cluster are nearer than 0.1; 3 lowest clusters had too few "
        "such rows, so 9 rows of 12 could not be chosen."
    )
    assert sentence in capsys.readouterr().err
    assert sentence in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_rows_with_nan_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = blobs()
    rows[[3, 500]] = np.nan
    rows[7, 2] = np.inf
    np.save(tmp_path / "rows.npy", rows)
    flags = ["--levels", "40,4", "--target", "597", "--resamplings", "1"]
    assert curate([str(tmp_path / "rows.npy"), *flags, "--out", str(tmp_path / "out")]) == 0
    assert "left out 3 rows of 600 with NaN or inf" in capsys.readouterr().err
    assert [row["position"] for row in table(tmp_path / "out", "left_out.csv")] == ["3", "7", "500"]
    assert positions(tmp_path / "out") == [i for i in range(600) if i not in (3, 7, 500)]
    flags[3] = "598"
    assert curate([str(tmp_path / "rows.npy"), *flags, "--out", str(tmp_path / "more")]) == 2
    assert "expected at most the 597 rows" in capsys.readouterr().err


def content_of(out: Path) -> dict[str, bytes]:
    names = ("selected.csv", "hierarchy.safetensors", "left_out.csv", "curate.state")
    return {name: (out / name).read_bytes() for name in names}


def noted_places(
    monkeypatch: pytest.MonkeyPatch, sent: signal.Signals | None = None
) -> list[tuple[int, ...]]:
    """The places that hierarchical k-means comes to; when it first begins the second k-means of
    the first level, it is sent a signal."""
    places: list[tuple[int, ...]] = []
    hierarchical = command.hierarchical_kmeans

    def noting(*rows: Any, progress: Any, **options: Any) -> Hierarchy:
        def note(*place: int) -> None:
            places.append(place)
            if sent is not None and place == (1, 1, 0) and places.count(place) == 1:
                os.kill(os.getpid(), sent)
            progress(*place)

        return hierarchical(*rows, progress=note, **options)

    monkeypatch.setattr(command, "hierarchical_kmeans", noting)
    return places


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_continues(
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sent: signal.Signals,
    code: int,
) -> None:
    arguments = [str(features), *FLAGS, "--out"]
    assert curate([*arguments, str(tmp_path / "whole")]) == 0
    places = noted_places(monkeypatch, sent)
    out = tmp_path / "stopped"
    assert curate([*arguments, str(out)]) == code
    assert "stopped by" in capsys.readouterr().err
    assert not (out / "selected.csv").exists()
    places.clear()
    places.append((1, 1, 0))
    assert curate([*arguments, str(out)]) == 0
    assert places[1] == (1, 1, 0)  # the first k-means of the level was kept
    assert content_of(out) == content_of(tmp_path / "whole")


@pytest.mark.parametrize("flags", [[], ["--seed", "5"]], ids=["same settings", "others"])
def test_overwrite_after_a_k_means_that_was_not_noted(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """The first k-means has ended in a file of its own, but curate.state does not know it: the same
    settings take its result, others remove it."""
    arguments = [str(features), *FLAGS, *flags, "--out"]
    assert curate([*arguments, str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise Stopped(signal.SIGTERM, "before the note")

    with monkeypatch.context() as patch:
        patch.setattr("protoclip.curate.hierarchy._Finished.put", stop)
        assert curate([str(features), *FLAGS, "--out", str(out)]) == 143
    assert [file.name for file in out.glob("curate.state.1*")] == ["curate.state.1.0"]
    places = noted_places(monkeypatch)
    assert curate([*arguments, str(out), "--overwrite"]) == 0
    assert ((1, 0, 0) in places) == bool(flags)
    assert content_of(out) == content_of(tmp_path / "whole")
    assert not list(out.glob("*curate.state.1*"))


def test_another_target_uses_the_clusters_again(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert curate([str(features), *FLAGS, "--out", str(out)]) == 0
    before = content_of(out)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the clusters are there")

    monkeypatch.setattr("protoclip.curate.hierarchy.kmeans", fail)
    flags = [*FLAGS[:3], "100", *FLAGS[4:], "--overwrite"]
    assert curate([str(features), *flags, "--out", str(out)]) == 0
    assert len(positions(out)) == 100
    after = content_of(out)
    assert after["hierarchy.safetensors"] == before["hierarchy.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_rows_have_other_clusters(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overwrite: bool
) -> None:
    """Of 600 rows those change that no sample of 64 evenly spaced ones has."""
    out = tmp_path / "out"
    arguments = [str(features), *FLAGS, "--out", str(out)]
    assert curate(arguments) == 0
    rows = blobs()
    is_sampled = np.zeros(ROWS, bool)
    is_sampled[evenly_spaced(ROWS, 64)] = True
    changed = np.flatnonzero(~is_sampled)[:100]
    rows[changed] = rows[changed][:, ::-1] + np.float16(50)
    np.save(features, rows)
    if not overwrite:
        (out / "selected.csv").unlink()  # as if it had been stopped
        assert curate(arguments) == 2
        assert "holds clusters of other settings (rows)" in capsys.readouterr().err
        return
    assert curate([*arguments, "--overwrite"]) == 0
    assert curate([str(features), *FLAGS, "--out", str(tmp_path / "new")]) == 0
    assert content_of(out) == content_of(tmp_path / "new")
    assert np.isin(positions(out), changed).sum() >= 10


def test_a_state_of_before_continues_with_a_warning(
    features: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Version 0.1 kept a checksum of 64 rows."""
    arguments = [str(features), *FLAGS, "--out", str(tmp_path / "out")]
    assert curate(arguments) == 0
    before = content_of(tmp_path / "out")
    state = tmp_path / "out" / "curate.state"
    payload = sealed.load(state)
    call, places = json.loads(payload["text"])
    tensors = {name: payload["tensors"][place["tensor"]] for name, place in places.items()}
    settings = call | {"rows": [ROWS, COLUMNS, 123], "weights": None}
    text = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
    state.unlink()
    save_file(tensors | {"settings": text}, tmp_path / "out" / "state.safetensors")
    assert curate([*arguments, "--overwrite"]) == 0
    assert "was made before version 0.2; only the number of its rows is compared" in caplog.text
    after = content_of(tmp_path / "out")
    assert after["hierarchy.safetensors"] == before["hierarchy.safetensors"]


def test_an_output_of_others_is_refused(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(features), *FLAGS, "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine", encoding="utf-8")
    assert curate([*arguments, "--overwrite"]) == 2
    assert "holds report.html, which protoclip curate did not write" in capsys.readouterr().err
    (tmp_path / "out" / "report.html").unlink()
    with sole_writer(tmp_path / "out" / ".lock", "--out"):
        assert curate(arguments) == 2
    assert "in use by another process" in capsys.readouterr().err
    assert curate(arguments) == 0
    capsys.readouterr()
    assert curate(arguments) == 2
    assert "holds an earlier run of protoclip curate; choose another" in capsys.readouterr().err
    for name in command.NAMES:
        (tmp_path / "out" / name).unlink()  # as if it had been stopped
    assert curate([*arguments, "--seed", "1"]) == 2
    message = "holds clusters of other settings (seed); choose another folder, or replace them"
    assert message in capsys.readouterr().err
    assert curate([*arguments, "--seed", "1", "--overwrite"]) == 0


WRONG = {
    "--levels 4,40 --target 8": "--levels: expected numbers of clusters that fall, such as",
    "--levels 40,40 --target 8": "got 40,40",
    "--levels 40,x --target 8": "got 40,x",
    "--levels 601 --target 8": "expected at most N = 600 clusters at the first level, got 601",
    "--levels 40 --target 601": "--target: expected at most the 600 rows of DATA, got 601",
    "--levels 40 --target 0": "--target: expected a whole number of at least 1, got 0",
    "--levels 40 --target 8 --choose far": "--choose",
    "--levels 40 --target 8 --without-duplicates -1": "--without-duplicates: expected a number",
    "--target 8": "--levels",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags_are_explained_and_write_nothing(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    arguments = ["curate", str(features), *flags.split(), "--out", str(tmp_path / "out")]
    try:
        code = protoclip(arguments)
    except SystemExit as exit_of_argparse:
        code = exit_of_argparse.code
    assert code == 2
    assert WRONG[flags] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_passes_and_writes_nothing(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--levels", "40,4", "--target", "80", "--dry-run", "--out", str(tmp_path / "out")]
    assert curate([str(features), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "600 rows of 5 numbers (float16), 0.0 MiB"
    # Half of a cluster's 15 rows; 52 + 10 (51 x 320 / 600 + 1) passes.
    assert lines[1].startswith("level 1: 600 into 40 clusters, then 10 times 320 of them (8 of a")
    assert "at most 334 passes that read 1.9 MiB" in lines[1]
    assert lines[2].startswith("level 2: 40 into 4 clusters, then 10 times 20 of them (5 of a")
    assert re.match(r"at most about \d+ s ", lines[3])
    assert not (tmp_path / "out").exists()
