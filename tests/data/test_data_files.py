"""Tables, pictures and the data command: every fault with its place and remedy."""

from __future__ import annotations

import json
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import TEXTS, encoded, picture, same, spoil, write_shards, write_table
from PIL import Image
from room import ALLOW, run_in_fork

from protoclip.data import DataError, open_dataset
from protoclip.data.__main__ import main as data_command
from protoclip.data.faults import Faults
from protoclip.data.tables import MAX_CAPTION

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


@pytest.mark.smoke
def test_a_table_has_unicode_and_paths_beside_it(folder: Path) -> None:
    texts = [text.replace('"', "") for text in TEXTS]
    path = write_table(folder, [(f"images/{i}.png", text) for i, text in enumerate(texts)])
    dataset = open_dataset(path)
    assert [dataset.captions(i) for i in range(4)] == [(text,) for text in texts]
    assert list(dataset.keys) == [f"images/{i}.png" for i in range(4)]
    assert all(same(dataset.image(i), picture(i)) for i in range(4))
    assert dataset.labels == {}


def test_a_table_has_flags_quotes_a_byte_order_mark_and_repeats(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = '\ufeffid,pic,text\n1,0.png,\'a\'\n2,0.png,"a, b"\n\n3,1.png,"two\nlines"\n'
    (folder / "t.csv").write_text(content, encoding="utf-8")
    monkeypatch.chdir(folder / "images")  # paths from the working directory, as in OpenCLIP
    keys = {"csv_separator": ",", "csv_img_key": "pic", "csv_caption_key": "text"}
    dataset = open_dataset(str(folder / "t.csv"), **keys)
    assert [dataset.captions(i)[0] for i in range(3)] == ["'a'", "a, b", "two\nlines"]
    assert list(dataset.keys) == ["0.png", "0.png#2", "1.png"]
    assert same(dataset.image(2), picture(1))


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_a_table_without_tabs_needs_no_separator_flag(folder, separator):
    lines = [("filepath", "title"), ("images/0.png", "a dog"), ("images/1.png", '"cat, black"')]
    path = folder / "t.csv"
    path.write_text("\ufeff" + "\n".join(map(separator.join, lines)), encoding="utf-8")
    dataset = open_dataset(str(path))
    assert [dataset.captions(i)[0] for i in range(2)] == ["a dog", "cat, black"]
    path.write_text("filepath\ttitle, in English\nimages/0.png\ta, b\n")  # tabs come first
    assert open_dataset(str(path), csv_caption_key="title, in English").captions(0) == ("a, b",)


HEADER = "filepath,title\nimages/0.png,first\n"
TABLE_FAULTS = {
    "caption": (
        "filepath\ttitle\nimages/0.png\ta\nimages/1.png\t  \n",
        "1 of 2 rows has no caption .*line 3",
    ),
    "picture": ("filepath\ttitle\nimages/9.png\ta\n", "line 2.*no picture at 'images/9.png'"),
    "short row": ("filepath\ttitle\nimages/0.png\n", "line 2.*1 columns where the header has 2"),
    "long row": ("filepath,title\nimages/0.png,a dog, running\n", "line 2.*3 columns where"),
    "open quote": (
        'filepath\ttitle\nimages/0.png\t"The Night\nimages/1.png\ta\nimages/2.png\ta disc of 12"\n',
        "line 4.*holds tabs and line breaks; close the quote",
    ),
    "open to the end": (
        f'{HEADER}images/1.png,"6 inch nails\nimages/2.png,b\nimages/3.png,c\n',
        "line 5.*a quote that is not closed makes one row of 3 lines",
    ),
    "open to a quote": (
        f'{HEADER}images/1.png,"6 inch nails\nimages/2.png,"bird"\nimages/3.png,c\n',
        "line 4.*one row of 2 lines .*close it, or write it twice",
    ),
    "column": ("filepath\tcaption\nimages/0.png\ta\n", "no column 'title'.*--csv-caption-key"),
    "separator": ("filepath title\nimages/0.png a\n", "no column 'filepath'.*--csv-separator"),
    "no rows": ("filepath\ttitle\n", "no rows"),
    "empty": ("", r"no column 'filepath'.*the columns are \[\]"),
    "no file": (None, "No such file"),
    "quote": ('filepath\ttitle\nimages/0.png\t"' + "x" * 200_000, "unclosed quote"),
}


@pytest.mark.parametrize(("content", "words"), TABLE_FAULTS.values(), ids=TABLE_FAULTS)
def test_faults_of_a_table_name_the_line_and_the_remedy(
    folder: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (folder / "bad.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        open_dataset(str(folder / "bad.tsv"))


def test_rows_that_an_open_quote_takes_in_are_not_called_good(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "t.csv"
    path.write_text(f'{HEADER}images/1.png,"6 inch nails\nimages/2.png,"bird"\nimages/3.png,c\n')
    assert data_command(["--check", str(path)]) == 1
    assert "2 of 3 samples are good, 1 are not" in capsys.readouterr().out


def test_values_of_several_lines_and_quotes_within_one_are_read(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_text(f'{HEADER}images/1.png,"two ""big""\nlines, both"\nimages/2.png,a 19" rack\n')
    dataset = open_dataset(str(path))
    assert [dataset.captions(i)[0] for i in (1, 2)] == ['two "big"\nlines, both', 'a 19" rack']


def test_keys_of_a_table_differ_whatever_its_files_are_called(folder: Path) -> None:
    names = ["a.png", "a.png#2", "a.png", "a.png#2", "a.png"]
    for name in names:
        picture(0).save(folder / name, "PNG")
    keys = open_dataset(write_table(folder, [(name, "a") for name in names])).keys
    assert list(keys[:2]) == names[:2] and len(set(keys)) == 5


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "bomb"])
def test_a_picture_that_does_not_decode_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole = encoded(picture(0))
    content = {"text": b"<html>", "cut": whole[: len(whole) // 2], "empty": b"", "bomb": whole}
    (folder / "images" / "0.png").write_bytes(content[damage])
    dataset = open_dataset(write_table(folder, [("images/0.png", "a"), ("images/1.png", "b")]))
    assert same(dataset.image(1), picture(1))
    words = "the picture does not decode"
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        words = ".*decompression bomb.*MAX_IMAGE_PIXELS"
    with pytest.raises(DataError, match=rf"pair 1, .*images/0\.png: {words}"):
        dataset.image(0)


@pytest.mark.parametrize(
    ("spec", "split", "words"),
    [
        ("builtin:birds", "all", "expected one of builtin:icons"),
        ("builtin:shapes:many", "all", "whole number"),
        ("builtin:shapes:0", "all", "at least 1"),
        ("builtin:shapes:1", "heldout", "too few"),
        ("builtin:icons", "test", "split must be all, train or heldout"),
        ("builtin:icons:disney", "all", "expected builtin:icons without a further part"),
        ("builtin:shapes", "noto", "split must be all, train or heldout"),
        ("photos.zip", "all", "expected one of"),
    ],
)
def test_unknown_data_lists_what_is_known(spec: str, split: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(spec, split)


def opened(
    folder: Path, image: Image.Image, image_format: str = "PNG", **options: Any
) -> Image.Image:
    """As the data layer reads it from a file."""
    image.save(folder / "a.bin", image_format, **options)
    return open_dataset(write_table(folder, [("a.bin", "x")])).image(0)


class TestPictures:
    def test_transparency_becomes_white(self, tmp_path: Path) -> None:
        clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
        assert opened(tmp_path, clear).getcolors() == [(16, (255, 255, 255))]
        assert opened(tmp_path, picture(2, "LA")).mode == "RGB"

    def test_a_transparent_colour_of_a_palette_becomes_white(self, tmp_path: Path) -> None:
        palette = Image.new("P", (4, 4), 0)
        palette.putpalette([200, 0, 0, 0, 0, 200])
        pixels = opened(tmp_path, palette, transparency=0)
        assert pixels.getcolors() == [(16, (255, 255, 255))]

    def test_16_bits_are_scaled_not_clipped(self, tmp_path: Path) -> None:
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
        pixels = np.asarray(opened(tmp_path, Image.fromarray(ramp)))
        assert pixels.shape == (4, 256, 3)
        assert np.abs(pixels[0, :, 0].astype(int) - np.arange(256)).max() <= 1
        dark = opened(tmp_path, Image.fromarray((ramp // 256).astype(np.uint16)))
        assert np.asarray(dark).max() <= 1  # 255 of 65,535 is nearly black
        grey_map = opened(tmp_path, Image.fromarray(ramp.astype(np.int32), "I"), "PPM")
        assert np.array_equal(np.asarray(grey_map), pixels)

    @pytest.mark.parametrize("white", [1.0, 65535, 1e6])
    def test_32_bits_are_refused_where_white_is_not_255(self, tmp_path: Path, white: float) -> None:
        greys = np.linspace(0, white, 64, dtype=np.float32).reshape(8, 8)
        with pytest.raises(DataError, match="greys of 0 to 255.*convert it to 8 bits"):
            opened(tmp_path, Image.fromarray(greys), "TIFF")
        if white > 1:
            with pytest.raises(DataError, match="32-bit ones"):
                opened(tmp_path, Image.fromarray(greys.astype(np.int32)), "TIFF")
        greys = np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8)
        whole = np.asarray(opened(tmp_path, Image.fromarray(greys), "TIFF"))
        assert whole.max() == 255 and whole.min() == 0

    @pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
    def test_a_picture_of_a_camera_held_sideways_is_upright(
        self, tmp_path: Path, image_format: str
    ) -> None:
        pixels = np.zeros((16, 32, 3), dtype=np.uint8)
        pixels[:, :16] = 255  # the left half is white
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
        upright = opened(tmp_path, Image.fromarray(pixels), image_format, exif=exif)
        assert upright.size == (16, 32)
        values = np.asarray(upright).astype(int)
        assert values[:16].min() > 200 and values[16:].max() < 50  # now the upper half

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_damaged_exif_does_not_cost_the_picture(self, tmp_path: Path) -> None:
        exif = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff"
        assert opened(tmp_path, picture(0), "JPEG", exif=exif).size == (10, 12)


class TestCheck:
    def test_all_that_is_wrong_with_a_table_is_listed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture(0).save(tmp_path / "0.png")
        (tmp_path / "1.png").write_bytes(b"<html>")
        rows = [("0.png", "good"), ("0.png", " "), ("9.png", "missing"), ("1.png", "web")]
        table = write_table(tmp_path, [*rows, ("0.png",), ("8.png", "missing too")])
        assert data_command(["--check", table]) == 1
        text = capsys.readouterr().out
        for words in (
            "line 3: the caption is empty",
            "line 4: no picture at '9.png'",
            "line 6: 1 columns where the header has 2",
            "line 7: no picture at '8.png'",
            "1.png: the picture does not decode",
            "1 of 6 samples are good, 5 are not",
        ):
            assert words in text
        with pytest.raises(DataError, match="line 6: 1 columns"):  # of training
            open_dataset(table)

    def test_holes_of_a_table_are_counted_and_can_be_left_out(self, tmp_path: Path) -> None:
        picture(0).save(tmp_path / "0.png")
        rows = [("0.png", f"text {i}") for i in range(96)]
        rows[10] = ("gone.png", "a")
        rows[20:24] = [("lost.png", "b")] * 4
        rows[30:62] = [("0.png", " ")] * 32
        table = write_table(tmp_path, rows)
        counts = r"5 of 96 rows have no picture \(first: line 12, no picture at 'gone.png' .*\) "
        counts += r"and 32 of 96 rows have no caption \(first: line 32, the caption is empty\)"
        with pytest.raises(DataError, match=counts + "; fix them, or leave them .* --skip-bad"):
            open_dataset(table)
        dataset = open_dataset(table, skip_bad=True)
        assert len(dataset) == 59 and len(dataset.facts.left_out) == 1
        assert re.search("left out, as " + counts, dataset.facts.left_out[0])
        Faults(dataset, max_fraction=0.05)  # those were asked for
        with pytest.raises(DataError, match="3 of 3 rows have no caption"):
            open_dataset(write_table(tmp_path, [("0.png", "")] * 3), skip_bad=True)

    def test_a_hole_found_late_is_counted_with_those_after_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pictures of later rows are looked for only then, and with --skip-bad."""
        monkeypatch.setattr("protoclip.data.tables.CHECKED", 2)
        picture(0).save(tmp_path / "0.png")
        rows = [("0.png", "a"), ("0.png", "b"), ("late.png", "c"), ("late.png", "d")]
        table = write_table(tmp_path, rows)
        assert len(open_dataset(table)) == 4
        assert len(open_dataset(table, skip_bad=True)) == 2
        with pytest.raises(DataError, match="3 of 4 rows have no picture"):
            open_dataset(write_table(tmp_path, [("gone.png", "a"), *rows[1:]]))

    def test_a_table_without_a_good_sample_is_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        missing = ("9.png", "a")
        assert data_command(["--check", write_table(tmp_path, [missing] * 3)]) == 1
        assert "0 of 3 samples are good" in capsys.readouterr().out

    def test_all_that_is_wrong_with_shards_is_listed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        spec = write_shards(tmp_path / "data", shards=2, per_shard=6)
        assert data_command(["--check", spec]) == 0
        assert "12 of 12 samples are good" in capsys.readouterr().out
        spoil(tmp_path / "data" / "000.tar", "sample2.png")
        with tarfile.open(tmp_path / "data" / "001.tar", "a") as tar:
            tar.addfile(tarfile.TarInfo("hollow.png"))
        assert data_command(["--check", spec]) == 1
        text = capsys.readouterr().out
        assert "sample2" in text and "'hollow'" in text and "11 of 13 samples are good" in text


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "UTF8", "cp1252"])
def test_a_table_has_any_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str], encoding: str
) -> None:
    picture(0).save(tmp_path / "0.png")
    table = tmp_path / "t.tsv"
    shards = str(tmp_path / "out")
    table.write_bytes("filepath\ttitle\n0.png\tein Mädchen läuft\n".encode(encoding))
    assert data_command(["--check", str(table), "--encoding", encoding]) == 0
    assert "1 of 1 samples are good" in capsys.readouterr().out
    assert data_command(["--export", str(table), "--encoding", encoding, "--out", shards]) == 0
    assert open_dataset(shards).captions(0) == ("ein Mädchen läuft",)
    if encoding in ("latin-1", "utf-16"):
        assert "--encoding, such as latin-1" in error_of(data_command, ["--check", table])
    error = error_of(data_command, ["--check", table, "--encoding", "klingon"])
    assert "--encoding: expected one that Python knows" in error


def test_long_captions_of_a_table_are_cut_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    table = tmp_path / "t.csv"
    table.write_text("filepath\ttitle\na.png\t" + "word " * 20_000)
    assert len(open_dataset(str(table)).captions(0)[0]) == MAX_CAPTION
    table.write_text("filepath\ttitle\na.png\t" + "word " * 200_000)
    with pytest.raises(DataError, match="line 2: field larger than"):
        open_dataset(str(table))


EXPORT = ["--export", "builtin:shapes:25", "--per-shard", "10"]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    assert data_command([*EXPORT, "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_an_export_says_how_to_train_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_command([*EXPORT, "--out", str(tmp_path / "out")]) == 0
    assert f"--train-data '{tmp_path}/out/" in capsys.readouterr().out


def test_an_export_to_a_folder_with_braces_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a{1,2}"
    assert data_command([*EXPORT, "--out", str(out)]) == 0
    source = shlex.split(capsys.readouterr().out)[-1]
    assert len(open_dataset(source)) == len(open_dataset(f"{out}/00000.tar")) + 15 == 25


def test_exported_shards_read_back(exported: Path) -> None:
    sizes = json.loads((exported / "sizes.json").read_text())
    assert sizes == {"00000.tar": 10, "00001.tar": 10, "00002.tar": 5}
    shapes = open_dataset("builtin:shapes:25")
    shards = open_dataset(f"{exported}/{{00000..00002}}.tar")
    assert len(shards) == 25
    for i in (0, 9, 10, 24):
        assert shards.captions(i) == shapes.captions(i)
        assert same(shards.image(i), shapes.image(i))
        assert shards.keys[i].endswith("/" + shapes.keys[i])


def test_the_same_export_has_the_same_bytes(tmp_path: Path) -> None:
    first = tmp_path / "first" / "00000.tar"
    again = tmp_path / "again" / "00000.tar"
    for tar in (first, again):
        assert data_command([*EXPORT, "--out", str(tar.parent), "--image-format", "jpg"]) == 0
    assert first.read_bytes() == again.read_bytes()
    with tarfile.open(first) as tar:
        assert len([name for name in tar.getnames() if name.endswith(".jpg")]) == 10


def test_an_export_keeps_every_pair_whatever_their_keys(folder: Path) -> None:
    names = ["0.png", "1.png", "000000001"]  # the last one is a number that 1.png might get
    for number, name in enumerate(names):
        picture(number).save(folder / name, "PNG")
    table = write_table(folder, [(name, f"picture {name}") for name in names])
    out = folder / "out"
    assert data_command(["--export", table, "--out", str(out)]) == 0
    shards = open_dataset(f"{out}/00000.tar")
    assert [shards.captions(i)[0] for i in range(len(shards))] == [f"picture {n}" for n in names]
    assert not shards.facts.skipped


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_of_a_table_does_not_divide_a_picture(folder: Path, split: str) -> None:
    names = [f"images/{i}.png" for i in range(4)]
    rows = [(f"{'./' * (n % 2)}{name}", f"caption {n}") for n in range(5) for name in names]
    dataset = open_dataset(write_table(folder, rows), split)
    files = [key.removeprefix("./").split("#")[0] for key in dataset.keys]
    assert 0 < len(set(files)) < 4 and len(files) == 5 * len(set(files))


def test_an_export_overwrites_nothing(exported: Path, error_of: Callable[..., str]) -> None:
    assert "not empty" in error_of(data_command, [*EXPORT, "--out", exported])


def test_an_export_needs_a_folder(error_of: Callable[..., str]) -> None:
    assert "--out" in error_of(data_command, EXPORT)


NO_MEMORY = """
import io
from PIL import Image
from protoclip.data.images import decode
buffer = io.BytesIO()
Image.new("RGB", (8000, 8000)).save(buffer, "png")
decode(buffer.getvalue(), "first")
allow(100)
try:
    decode(buffer.getvalue(), "large.png")
except ValueError as error:
    assert type(error).__name__ == "UnavailableError", repr(error)
    assert "large.png: the picture does not decode (MemoryError)" in str(error), str(error)
else:
    raise AssertionError
"""


def test_a_picture_that_finds_no_memory_may_be_read_next_time() -> None:
    run_in_fork(ALLOW + NO_MEMORY)
