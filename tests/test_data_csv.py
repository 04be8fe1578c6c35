"""CSV tables, and what no data source is: every fault with its line and remedy."""

import io

import numpy as np
import pytest
from PIL import Image

from protoclip.data import DataError, open_dataset
from protoclip.data.types import StringTable

TEXTS = ("ein Mädchen läuft", "女の子が走る", "drapeau\u202f: Chine 🇨🇳", 'says "hi", twice')


def picture(number: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def same(got: Image.Image, expected: Image.Image) -> bool:
    return got.mode == "RGB" and got.tobytes() == expected.tobytes()


def write_table(folder, rows, header=("filepath", "title"), separator="\t", name="pairs.tsv"):
    lines = [separator.join(header)] + [separator.join(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def test_csv_round_trip_with_unicode_and_paths_beside_the_table(folder):
    texts = [text.replace('"', "") for text in TEXTS]
    path = write_table(folder, [(f"images/{i}.png", text) for i, text in enumerate(texts)])
    dataset = open_dataset(path)
    assert [dataset.captions(i) for i in range(4)] == [(text,) for text in texts]
    assert list(dataset.keys) == [f"images/{i}.png" for i in range(4)]
    assert all(same(dataset.image(i), picture(i)) for i in range(4))
    assert dataset.labels == {}


def test_csv_flags_quotes_byte_order_mark_and_repeats(folder, monkeypatch):
    content = '\ufeffid,pic,text\n1,0.png,\'a\'\n2,0.png,"a, b"\n\n3,1.png,"two\nlines"\n'
    (folder / "t.csv").write_text(content, encoding="utf-8")
    monkeypatch.chdir(folder / "images")  # paths from the working directory, as in OpenCLIP
    keys = {"csv_separator": ",", "csv_img_key": "pic", "csv_caption_key": "text"}
    dataset = open_dataset(str(folder / "t.csv"), **keys)
    assert [dataset.captions(i)[0] for i in range(3)] == ["'a'", "a, b", "two\nlines"]
    assert list(dataset.keys) == ["0.png", "0.png#2", "1.png"]
    assert same(dataset.image(2), picture(1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("filepath\ttitle\nimages/0.png\ta\nimages/1.png\t  \n", "line 3.*empty.*remove the row"),
        ("filepath\ttitle\nimages/9.png\ta\n", "line 2.*no picture at 'images/9.png'"),
        ("filepath\ttitle\nimages/0.png\n", "line 2.*1 columns where the header has 2"),
        ("filepath\tcaption\nimages/0.png\ta\n", "no column 'title'.*--csv-caption-key"),
        ("filepath,title\nimages/0.png,a\n", "no column 'filepath'.*--csv-separator ','"),
        ("filepath\ttitle\n", "no rows"),
        ("", "the file is empty"),
        ('filepath\ttitle\nimages/0.png\t"' + "x" * 200_000, "unclosed quote"),
    ],
    ids=["caption", "picture", "short-row", "column", "separator", "no-rows", "empty", "quote"],
)
def test_csv_faults_name_the_line_and_the_remedy(folder, content, words):
    (folder / "bad.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        open_dataset(str(folder / "bad.tsv"))


def test_csv_that_is_missing_or_not_utf8(folder):
    with pytest.raises(DataError, match="No such file"):
        open_dataset(str(folder / "absent.csv"))
    (folder / "latin.tsv").write_bytes("filepath\ttitle\nimages/0.png\tMädchen\n".encode("latin1"))
    with pytest.raises(DataError, match="not UTF-8"):
        open_dataset(str(folder / "latin.tsv"))


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_a_picture_that_does_not_decode_is_named(folder, damage):
    whole = encoded(picture(0))
    content = {"text": b"<html>", "cut": whole[: len(whole) // 2], "empty": b""}[damage]
    (folder / "images" / "0.png").write_bytes(content)
    dataset = open_dataset(write_table(folder, [("images/0.png", "a"), ("images/1.png", "b")]))
    with pytest.raises(DataError, match=r"pair 1, .*images/0\.png: the picture"):
        dataset.image(0)
    assert same(dataset.image(1), picture(1))


def test_transparency_becomes_white(folder):
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    clear.save(folder / "images" / "0.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.save(folder / "images" / "1.png", transparency=0)
    picture(2, "LA").save(folder / "images" / "2.png")
    dataset = open_dataset(write_table(folder, [(f"images/{i}.png", "a") for i in range(3)]))
    assert dataset.image(0).getcolors() == dataset.image(1).getcolors() == [(16, (255,) * 3)]
    assert dataset.image(2).mode == "RGB"


@pytest.mark.parametrize(
    ("spec", "split", "words"),
    [
        ("builtin:birds", "all", "expected one of builtin:emoji"),
        ("builtin:shapes:many", "all", "whole number"),
        ("builtin:shapes:0", "all", "at least 1"),
        ("builtin:shapes:1", "heldout", "too few"),
        ("builtin:emoji", "test", "split must be one of"),
        ("builtin:shapes", "noto", "split must be all, train or heldout"),
        ("photos.zip", "all", "expected one of"),
    ],
)
def test_unknown_data_lists_what_is_known(spec, split, words):
    with pytest.raises(DataError, match=words):
        open_dataset(spec, split)


def test_string_table():
    strings = ["", *TEXTS, "caf\udce9"]  # the last: a file name that is not UTF-8
    table = StringTable(strings)
    assert list(table) == strings and table[-1] == strings[-1] and table[1:3] == strings[1:3]
    assert len(StringTable()) == 0
    with pytest.raises(IndexError):
        table[len(strings)]
