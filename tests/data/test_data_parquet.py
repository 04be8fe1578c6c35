"""Parquet files with pictures: as the datasets library and as pyarrow write them, damaged ones,
and what is read when."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pairs import TEXTS, assert_equal, encoded, load, picture, same, write_parquet
from ranks import bare_run, exit_codes, losses, output_of, start_command, steps_of, wait_until

from protoclip.cluster.__main__ import main as cluster_command
from protoclip.data import DataError, EpochOrder, Subset, open_dataset, parquet
from protoclip.data.__main__ import main as data_command
from protoclip.evaluate.datasets import open_layout
from protoclip.training.summary import left_out

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    parquet._cache.clear()


def write_plain(path: Path, columns: dict[str, Any], per_group: int = 2) -> str:
    """A file as pyarrow or pandas writes it, without notes of the datasets library."""
    pq.write_table(pa.table(columns), path, row_group_size=per_group)
    return str(path)


def group_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """The row groups that are read from now on, with their columns."""
    reads: list[tuple[int, list[str]]] = []
    read = pq.ParquetFile.read_row_group

    def noted(self: Any, number: int, columns: list[str], **options: Any) -> Any:
        reads.append((number, columns))
        return read(self, number, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    return reads


@pytest.mark.smoke
@pytest.mark.parametrize(
    "spec",
    [
        "hub/data",
        "hub",
        "hub/data/*.parquet",
        "hub/data/train-{00000..00001}-of-00002.parquet",
        "hub/data/train-00000-of-00002.parquet::hub/data/train-00001-of-00002.parquet",
        "file://{}/hub/data/train-{{00000..00001}}-of-00002.parquet",
    ],
)
def test_files_of_the_datasets_library_round_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "hub" / "data")
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(spec.format(tmp_path) if "://" in spec else spec)
    assert len(dataset) == len(set(dataset.keys)) == 12
    for i in (11, 0, 7, 3, 2, 9):  # any order
        assert dataset.captions(i) == (TEXTS[i % 4], f"number {i}")
        assert same(dataset.image(i), picture(i))
    assert dataset.labels["class"].names == CLASSES
    assert dataset.labels["class"].ids.tolist() == [0, 1, 2] * 4
    if "://" not in spec:
        assert dataset.keys[7] == "train-00001-of-00002.parquet/1"


def test_columns_are_found_by_type_and_name_or_named(tmp_path: Path) -> None:
    pixels = [encoded(picture(i)) for i in range(4)]
    words = ["one", "two", "three", "four"]
    path = write_plain(tmp_path / "a.parquet", {"url": words, "jpg": pixels, "caption": words})
    dataset = open_dataset(path)  # as img2dataset writes it
    assert dataset.captions(2) == ("three",) and same(dataset.image(2), picture(2))
    path = write_plain(tmp_path / "p.parquet", {"filepath": words, "jpg": pixels, "text": words})
    assert same(open_dataset(path).image(1), picture(1))  # not from the path that it came from
    path = write_plain(tmp_path / "b.parquet", {"left": pixels, "right": pixels, "words": words})
    with pytest.raises(DataError, match=r"one column of pictures.*'left', 'right'.*--csv-img-key"):
        open_dataset(path)
    assert open_dataset(path, csv_img_key="right").captions(0) == ("one",)
    path = write_plain(tmp_path / "c.parquet", {"jpg": pixels, "a": words, "b": words})
    with pytest.raises(DataError, match="one column of captions.*--csv-caption-key"):
        open_dataset(path)
    texts = pa.array(words).dictionary_encode()
    path = write_plain(tmp_path / "d.parquet", {"jpg": pixels, "a": words, "b": texts})
    assert open_dataset(path, csv_caption_key="b").captions(3) == ("four",)
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    paths = [f"{i}.png" for i in range(4)]
    path = write_plain(tmp_path / "e.parquet", {"filepath": paths, "title": words})
    assert same(open_dataset(path).image(3), picture(3))  # from beside the file
    path = write_plain(tmp_path / "f.parquet", {"filepath": [1, 2], "title": ["a", "b"]})
    with pytest.raises(DataError, match="expected bytes, paths or a struct with bytes in"):
        open_dataset(path).image(0)


def test_a_path_that_no_file_can_have_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(0).save(tmp_path / "0.png")
    write_plain(tmp_path / "a.parquet", {"filepath": ["0.png", "a\0b.png"], "title": ["a", "b"]})
    assert data_command(["--check", str(tmp_path / "a.parquet")]) == 1
    text = capsys.readouterr().out
    assert "a.parquet/1" in text and "1 of 2 samples are good" in text


def test_the_column_of_captions_is_named_where_several_would_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = [encoded(picture(i)) for i in range(2)]
    columns = {"jpg": pixels, "caption": ["a dog", "a cat"], "title": ["DSC_1.jpg", "DSC_2.jpg"]}
    path = write_plain(tmp_path / "a.parquet", columns)
    assert open_dataset(path).captions(0) == ("DSC_1.jpg",)
    assert "the column 'title' of the parquet files, not from caption; --csv-caption" in caplog.text
    caplog.clear()
    assert open_dataset(path, csv_caption_key="caption").captions(0) == ("a dog",)
    path = write_plain(tmp_path / "b.parquet", {"jpg": pixels, "caption": ["a", "b"]})
    open_dataset(path)
    path = write_plain(tmp_path / "c.parquet", {**columns, "mine": ["c", "d"]})
    assert open_dataset(path, csv_caption_key="mine").captions(0) == ("c",)
    assert "captions come from" not in caplog.text


def test_classes_make_captions_where_there_are_none(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
    )
    content = {"image": [picture(i) for i in range(4)], "label": [2, 0, None, 1]}
    data = datasets.Dataset.from_dict(content, features=features)
    path = str(tmp_path / "test.parquet")
    data.to_parquet(path)
    dataset = open_dataset(path, class_template="a drawing of {c}")
    assert [dataset.captions(i)[0] for i in range(3)] == [
        "a drawing of owl",
        "a drawing of cat",
        "a drawing of dog",
    ]
    assert dataset.facts.skipped == [(path, "row 2", "the class is not known")]
    assert len(open_dataset(path, class_template="simple").captions(0)) == 7
    layout = open_layout(path)
    assert layout.test.labels["class"].names == CLASSES
    assert layout.captions == 0  # no retrieval of what the class was made into


def test_bad_rows_are_left_out_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = encoded(picture(0))
    pictures = [png, None, png, png, b"", b"no picture", png, png]
    captions = ["a", "b", None, "  ", "e", "f", "g", "h"]
    images = pa.array([{"bytes": data, "path": None} for data in pictures])
    texts = pa.array([text and text.encode() for text in captions])
    damaged_text = texts.to_pylist()
    damaged_text[7] = b"\xff\xfe"
    texts = pa.array(damaged_text).cast(pa.string(), safe=False)
    path = write_plain(tmp_path / "bad.parquet", {"image": images, "text": texts}, per_group=3)
    dataset = open_dataset(path)
    reasons = {row: reason for _, row, reason in dataset.facts.skipped}
    assert reasons.pop("row 7").startswith("'utf-8' codec can't decode byte 0xff")
    assert reasons == {
        "row 1": "the picture is missing",
        "row 2": "all captions are empty",
        "row 3": "all captions are empty",
    }
    said = left_out(dataset.facts.skipped, path).splitlines()
    assert said[:2] == [
        "left out of the data: 4 samples",
        f"  {path}, row 1: the picture is missing",
    ]
    assert list(dataset.keys) == [f"bad.parquet/{row}" for row in (0, 4, 5, 6)]
    for i, reason in ((1, "4: the picture is missing"), (2, "5: the picture does not decode")):
        with pytest.raises(DataError, match=f"bad.parquet, bad.parquet/{reason}"):
            dataset.image(i)
    assert data_command(["--check", path]) == 1
    assert "2 of 8 samples are good, 6 are not" in capsys.readouterr().out


def test_what_is_no_parquet_is_refused(
    tmp_path: Path, error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    write_parquet(folder, files=1)
    whole = next(folder.iterdir())
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-100])
    error = error_of(data_command, ["--check", tmp_path / "cut.parquet"])
    assert "cut.parquet: not a parquet file" in error
    assert "no shard" in error_of(data_command, ["--check", tmp_path / "no" / "*.parquet"])
    png = [encoded(picture(0))]
    write_plain(folder / "train-2.parquet", {"jpg": png, "caption": ["a"]})
    assert "the same columns in all files" in error_of(data_command, ["--check", folder])
    (folder / "test-0.parquet").write_bytes(whole.read_bytes())
    message = error_of(data_command, ["--check", folder])
    assert "holds files of test and train; name those of one, such as" in message
    write_plain(tmp_path / "none.parquet", {"jpg": png, "caption": [""]})
    error = error_of(data_command, ["--check", tmp_path / "none.parquet"], among_others=True)
    assert "no row has a picture and a caption" in error
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install -e '.[parquet]'" in error_of(data_command, ["--check", whole])


def test_a_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    spec = write_parquet(tmp_path / "data", files=1)
    path = next((tmp_path / "data").iterdir())
    group = pq.ParquetFile(path).metadata.row_group(1)
    captions = next(
        group.column(j)
        for j in range(group.num_columns)
        if group.column(j).path_in_schema.startswith("caption")
    )
    start = captions.dictionary_page_offset or captions.data_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * captions.total_compressed_size)
    dataset = open_dataset(spec)
    assert [key.split("/")[1] for key in dataset.keys] == ["0", "1", "4", "5"]
    assert [row for _, row, _ in dataset.facts.skipped] == ["row 2", "row 3"]
    assert "row group 1 cannot be read" in dataset.facts.skipped[0][2]


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    dataset = open_dataset(write_parquet(tmp_path / "data"))
    write_parquet(tmp_path / "data", rows=8)
    with pytest.raises(DataError, match="changed while in use"):
        dataset.image(0)


def test_row_groups_are_read_once_in_order_and_by_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_parquet(tmp_path / "data", files=2, rows=6, per_group=3)
    reads = group_reads(monkeypatch)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)  # one row group
    dataset = open_dataset(spec)
    assert not any("image" in columns for _, columns in reads)  # none is missing
    reads.clear()
    for i in range(12):
        dataset.image(i)
    assert reads == [(0, ["image"]), (1, ["image"])] * 2


def test_the_default_order_mixes_and_fits_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write_parquet(tmp_path / "data", files=4, rows=50, per_group=5)  # 40 row groups
    assert open_dataset(spec).facts.window == 0  # all of them fit
    size = sum(group.image_bytes for group in open_dataset(spec)._groups)
    monkeypatch.setattr(parquet, "CACHE_BYTES", size // 4)
    dataset = open_dataset(spec)
    assert 24 <= dataset.facts.window <= 25  # an eighth of 200 pairs
    parquet._cache.clear()
    reads = group_reads(monkeypatch)
    order = EpochOrder(Subset(dataset, range(200))).permutation(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(200))
    for i in order.tolist():
        dataset.image(i)
    assert 40 <= len(reads) <= 60  # at random it would be more than 100
    neighbours = np.diff(order.numpy()) == 1
    assert neighbours.mean() < 0.2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_the_start(tmp_path: Path, workers: int) -> None:
    dataset = open_dataset(write_parquet(tmp_path / "data", files=2, rows=20, per_group=4))
    positions = EpochOrder(dataset, 12).permutation(torch.Generator().manual_seed(1))
    whole = load(dataset, positions)
    assert_equal(load(dataset, positions, workers=workers), whole)
    assert_equal(load(dataset, positions, start=16, workers=workers), whole[2:])


def test_clusters_of_a_parquet_folder(tmp_path: Path, nano: Path) -> None:
    spec = write_parquet(tmp_path / "data", files=2, rows=12)
    out = tmp_path / "groups"
    flags = ["--model", str(nano), "--pretrained", "random", "--k", "3", "--out", str(out)]
    assert cluster_command([spec, *flags]) == 0
    table = (out / "clusters.csv").read_text().splitlines()
    assert len(table) == 25 and "train-00001-of-00002.parquet/11" in "".join(table)
    assert "Chine" in (out / "report.html").read_text()


@pytest.mark.slow
def test_a_stopped_run_on_parquet_goes_on_exactly(tmp_path: Path) -> None:
    spec = write_parquet(tmp_path / "data", files=3, rows=50, per_group=5)
    flags = bare_run(
        tmp_path, "--train-data", spec, "--shuffle-buffer", "20", "--workers", "1",
        "--max-bad-fraction", "0.2",
    )  # fmt: skip
    path = sorted(Path(spec).iterdir())[1]  # some pictures of one file do not decode
    content = pq.read_table(path).to_pylist()
    for row in content[10:20]:
        row["image"]["bytes"] = b"no picture"
    schema = pq.read_schema(path)
    pq.write_table(pa.Table.from_pylist(content, schema=schema), path, row_group_size=5)

    def start(name: str) -> list[Any]:
        argv = [*flags, "--name", name, "--max-steps", "14", "--save-every", "1steps"]
        return start_command(tmp_path, [*argv, "--resume", "auto"], bare=True)

    stopped = start("stopped")
    wait_until(lambda: steps_of(tmp_path, "stopped") > 5, stopped, tmp_path)
    for process in stopped:
        process.kill()
    exit_codes(stopped)
    assert steps_of(tmp_path, "stopped") < 14
    for name in ("stopped", "whole"):
        assert exit_codes(start(name)) == [0, 0], output_of(tmp_path)
    whole = losses(tmp_path / "logs" / "whole")
    assert len(whole) == 14 and losses(tmp_path / "logs" / "stopped") == whole
    assert "the picture does not decode" in "".join(output_of(tmp_path))
