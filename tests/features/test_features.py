"""Stored features: every form on disk gives the rows that were written, without holding them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_folders import PARTS, write_folder, write_layout, write_parts
from room import run_in_room
from safetensors.torch import save_file

import protoclip
from protoclip.common.files import DataError
from protoclip.common.strings import StringTable
from protoclip.features import open_features, open_folder
from protoclip.features.table import read_csv, write_csv_table

ROWS = np.random.default_rng(0).standard_normal((23, 5))


def written(tmp_path: Path, form: str) -> tuple[str, np.ndarray]:
    """What to open, and the rows in it."""
    path = str(tmp_path / "rows")
    kind, _, name = form.partition(" ")
    rows = ROWS.astype(name or "<f4")
    if kind == "npy":
        np.save(path := f"{path}.npy", rows)
    elif kind == "fortran":
        np.save(path := f"{path}.npy", np.asfortranarray(rows))
    elif kind == "npz":
        np.savez(path := f"{path}.npz", other=np.zeros(2), features=rows)
    elif kind == "compressed":
        np.savez_compressed(path := f"{path}.npz", rows=rows)
    elif kind == "safetensors":
        save_file({"rows": torch.from_numpy(rows)}, path := f"{path}.safetensors")
    elif kind == "bf16":
        save_file({"rows": torch.from_numpy(rows).bfloat16()}, path := f"{path}.safetensors")
        rows = torch.from_numpy(rows).bfloat16().float().numpy()
    elif kind == "parts":
        write_parts(Path(path), rows)
    elif kind == "pattern":
        path = f"{write_parts(Path(path), rows)}/p*.npy"
    else:
        write_folder(Path(path), rows, [str(i) for i in range(len(rows))])
    return path, rows


FORMS = [
    *(f"npy {dtype}" for dtype in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "|i1", ">i4", "<u8")),
    "fortran", "fortran >f8", "npz", "npz >f4", "compressed", "compressed >f4", "safetensors <f2",
    "safetensors <i8", "bf16", "parts", "parts >f2", "pattern", "folder",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_rows(tmp_path: Path, form: str, monkeypatch) -> None:
    monkeypatch.setattr("protoclip.features.parts.WINDOW_BYTES", 60)  # several windows a part
    path, expected = written(tmp_path, form)
    rows = protoclip.open_features(path)
    assert rows.shape == (23, 5) and len(rows) == 23
    assert rows.dtype == expected.dtype.newbyteorder("=") and rows.dtype.isnative
    for start, stop in ((0, 23), (3, 17), (4, 4), (22, 23), (0, 4)):
        block = rows.rows(start, stop)
        assert block.dtype == rows.dtype
        np.testing.assert_array_equal(block, expected[start:stop])
    buffer = np.empty((20, 5), rows.dtype)
    assert np.shares_memory(rows.rows(2, 19, buffer), buffer)
    np.testing.assert_array_equal(buffer[:17], expected[2:19])
    for positions in ([22, 0, 5, 5, 4], [], list(range(23))[::-1]):
        np.testing.assert_array_equal(rows.take(positions), expected[positions])
    chosen = [7, 8, 9, 3, 22, 22, 0]
    selected = rows.select(chosen)
    assert selected.shape == (7, 5)
    np.testing.assert_array_equal(selected.rows(0, 7), expected[chosen])
    np.testing.assert_array_equal(selected.rows(0, 3), expected[7:10])
    np.testing.assert_array_equal(selected.take([4, 1]), expected[[22, 8]])
    np.testing.assert_array_equal(selected.select([6, 0]).rows(0, 2), expected[[0, 7]])


def test_positions_outside_are_refused(tmp_path: Path) -> None:
    rows = open_features(written(tmp_path, "npy")[0])
    with pytest.raises(IndexError, match="expected 0 <= start <= stop <= 23, got 0 and 24"):
        rows.rows(0, 24)
    with pytest.raises(ValueError, match=r"expected a contiguous buffer \[23 or more, 5\]"):
        rows.rows(0, 23, np.empty((22, 5), np.float32))


def test_a_folder_has_both_sides_and_a_table(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(20)] + ["k19", "=1+1", "ümlaut \udce9,"]
    path = write_folder(tmp_path / "f", ROWS, keys)
    folder = open_folder(path)
    np.testing.assert_array_equal(folder.images.rows(0, 23), ROWS)
    np.testing.assert_array_equal(folder.texts.rows(0, 23), 2 * ROWS)
    assert list(folder.images.keys) == list(folder.texts.keys) == keys
    assert folder.images.select([22, 1]).keys[:] == [keys[22], "k1"]
    assert [*folder.table.names] == ["key", "file", "state", "caption", "label:group"]
    assert folder.table.labels == ("group",)
    assert folder.table.column("caption")[3] == 'a "k3",\nsecond line'
    assert folder.table.column("label:group")[20:] == ["x", "x", ""]
    assert folder.table.column("label:family") is None
    np.testing.assert_array_equal(open_features(path, "texts").rows(0, 23), 2 * ROWS)
    np.testing.assert_array_equal(open_features(path / "text_emb").rows(0, 23), 2 * ROWS)
    assert list(open_features(path / "text_emb").keys) == keys


def test_metadata_of_clip_retrieval(tmp_path: Path) -> None:
    columns = {
        "image_path": [f"{i}.jpg" for count in PARTS for i in range(count)],
        "key": [None if i == 5 else f"{i:04}é" for i in range(23)],
    }
    path = write_layout(tmp_path / "f", {"img_emb": ROWS}, columns, PARTS, "parquet")
    folder = open_folder(path)
    assert folder.images.keys[3:7] == ["0003é", "0004é", "", "0006é"]
    assert folder.table.column("file")[4] == "0.jpg"
    assert folder.table.column("caption") is None


def test_keys_of_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", features=ROWS, keys=np.array([f"k{i}" for i in range(23)]))
    assert open_features(tmp_path / "a.npz").keys[21:] == ["k21", "k22"]
    np.savez(tmp_path / "a.npz", features=ROWS, keys=np.array(["k"]))
    with pytest.raises(DataError, match="expected a key for each of the 23 rows, got 1;"):
        _ = open_features(tmp_path / "a.npz").keys


TEXTS = ["", "a", "'", "''a", "=1", "-", '"', '""', 'a"', '"a', ",", "\n", "\r\n", 'x","y\n"',
         "@'\"", "é", "\udcff", "a", "  ", "a\x00b",
         "\r", "a\rb", '"\r"', "x" * 200_000]  # fmt: skip


def test_a_table_keeps_its_texts(tmp_path: Path) -> None:
    columns = {"first": TEXTS, "second": TEXTS[::-1], "third": ["x"] * len(TEXTS)}
    write_csv_table(tmp_path / "t.csv", columns)
    for name, texts in columns.items():
        assert list(read_csv(tmp_path / "t.csv", name)) == texts
    write_csv_table(tmp_path / "t.csv", {"a": [], "b": []})
    assert list(read_csv(tmp_path / "t.csv", "b")) == []


def test_strings_are_numbered_by_their_first_occurrence() -> None:
    texts = ["b", "", "ab", "b", "a", "", "ba", "ab"]
    assert StringTable(texts).numbers().tolist() == [0, 1, 2, 0, 3, 1, 4, 2]
    assert StringTable([]).numbers().tolist() == []
    assert list(StringTable(texts).take(np.array([6, 1, 0, 0]))) == ["ba", "", "b", "b"]


def test_rows_that_are_not_finite_are_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("protoclip.features.rows.BLOCK_BYTES", 100)
    rows = ROWS.copy()
    rows[3, 1] = np.nan
    rows[20, 0] = np.inf
    np.save(tmp_path / "a.npy", rows)
    assert open_features(tmp_path / "a.npy").not_finite().tolist() == [3, 20]
    assert open_features(tmp_path / "a.npy").select([20, 1]).not_finite().tolist() == [0]
    np.save(tmp_path / "a.npy", np.ones((3, 2), np.int32))
    assert open_features(tmp_path / "a.npy").not_finite().tolist() == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("form", ["npy", "npz", "safetensors", "bf16", "parts"])
def test_a_cut_file_is_refused(tmp_path: Path, form: str) -> None:
    path = Path(written(tmp_path, form)[0])
    if form == "parts":
        path = path / "part_3.npy"
    cut(path)
    with pytest.raises(DataError, match=rf"{path.name}.*(cut off|cannot be read)"):
        open_features(path.parent if form == "parts" else path)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "npy")[0])
    rows = open_features(path)
    np.save(path, ROWS[:-1])
    for call in (lambda: rows.rows(0, 2), lambda: rows.take([1])):
        with pytest.raises(DataError, match=r"rows\.npy: the file has changed since it was opened"):
            call()
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.npy: No such file or directory; restore"):
        rows.rows(0, 2)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros(5), r"got float64 \[5\]; save array\.reshape\(1, -1\) if it is one row"),
        (np.zeros((2, 3, 4)), r"\[2, 3, 4\]; save array\.reshape\(len\(array\), -1\)"),
        (np.zeros((3, 0)), "there is nothing to read"),
        (np.zeros((2, 2), bool), r"got bool \[2, 2\]; save array\.astype\(np\.uint8\)"),
        (np.array([[1], "a"], object), r"Python objects, .* save np\.stack\(rows\)"),
        (np.zeros((2, 2), complex), "save np.hstack"),
        (np.array([["a"]]), "save the numbers alone"),
    ],
)
def test_what_is_not_rows_of_numbers_has_a_remedy(tmp_path: Path, array, words: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=rf"a\.npy: expected numbers \[N, D\].*{words}"):
        open_features(tmp_path / "a.npy")


def break_folder(path: Path, fault: str) -> None:
    part = path / "text_emb" / "text_emb_3.npy"
    if fault == "gap":
        part.unlink()
    elif fault == "twice":
        np.save(path / "text_emb" / "text_emb_03.npy", ROWS[:11])
    elif fault == "columns":
        np.save(part, ROWS[:11, :4])
    elif fault == "dtype":
        np.save(part, ROWS[:11].astype(np.float16))
    elif fault == "rows":
        np.save(part, ROWS[:10])
    elif fault == "short":
        (path / "text_emb" / "text_emb_4.npy").unlink()
    elif fault == "table":
        (path / "metadata" / "metadata_4.csv").unlink()
    elif fault == "unfinished":
        record = {"finished": False, "command": "protoclip encode photos --out f"}
        (path / "encode.json").write_text(json.dumps(record))
    elif fault == "empty":
        for file in path.rglob("*.npy"):
            file.unlink()


@pytest.mark.parametrize(
    "fault, words",
    [
        ("gap", r"text_emb_4\.npy: number 3 is missing before it"),
        ("twice", r"text_emb_0?3\.npy: its number occurs twice"),
        ("columns", r"text_emb_3\.npy: expected rows of 5 numbers of float64, as in text_emb_0"),
        ("dtype", r"text_emb_3\.npy: expected rows of 5 numbers of float64, .* got 5 of float16"),
        ("rows", r"text_emb_3\.npy: expected 11 rows, as in img_emb_3\.npy, got 10"),
        ("short", r"expected parts of the same numbers in text_emb as in img_emb, got 4 parts"),
        ("table", r"expected parts of the same numbers in metadata as in img_emb, got 4 parts"),
        ("unfinished", "unfinished; this continues them: protoclip encode photos --out f"),
        ("empty", r"expected \.npy files in img_emb or text_emb, found none"),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path: Path, fault: str, words: str) -> None:
    path = write_folder(tmp_path / "f", ROWS, [str(i) for i in range(23)])
    break_folder(path, fault)
    with pytest.raises(DataError, match=words):
        open_folder(path)
    if fault in ("unfinished", "gap"):
        with pytest.raises(DataError, match=words):
            open_features(path / "text_emb")


def test_a_table_of_other_rows_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "f", ROWS, [str(i) for i in range(23)])
    table = path / "metadata" / "metadata_3.csv"
    text = table.read_text()
    table.write_text("".join(text.splitlines(keepends=True)[:-2]))
    with pytest.raises(DataError, match=r"metadata_3\.csv: expected 11 rows.* got 10"):
        _ = open_folder(path).images.keys
    for damaged, words in (
        (text + "one more;\n", "expected 5 cells in each line"),
        (text[:-2], "expected a line break at the end"),
        (text + '"\n', "unexpected end of data"),
    ):
        table.write_text(damaged)
        with pytest.raises(DataError, match=rf"metadata_3\.csv: {words}; has another program"):
            _ = open_folder(path).images.keys


def test_what_does_not_exist_is_named(tmp_path: Path) -> None:
    for spec, words in (
        ("no.npy", "no such file"),
        ("a*.npy", "no such file"),
        (".", "found none"),
    ):
        with pytest.raises(DataError, match=words):
            open_features(tmp_path / spec)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"expected features in \.npy, \.npz, \.safetensors"):
        open_features(tmp_path / "a.txt")


def test_a_million_rows_are_opened_and_gathered_in_little_memory(tmp_path: Path) -> None:
    """Of 512 MB, 50 MiB of address space may be mapped, windows and results included."""
    rows_in_part = 250_000
    for number in range(4):
        part = np.lib.format.open_memmap(
            tmp_path / f"x{number}.npy", "w+", np.float16, (rows_in_part, 256)
        )
        part[::1000, 0] = np.arange(0, rows_in_part, 1000) % 2048
        del part
    run_in_room(
        f"""
import numpy as np
from protoclip.features import open_features
allow(50)
rows = open_features({str(tmp_path)!r})
assert rows.shape == (1_000_000, 256)
positions = np.arange(999_000, -1, -1000)
taken = rows.take(positions)[:, 0]
assert (taken == positions % 250_000 % 2048).all()
assert (rows.rows(500_000, 510_000)[::1000, 0] == np.arange(0, 10_000, 1000) % 2048).all()
"""
    )
