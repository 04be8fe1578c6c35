"""webdataset shards: round trips, junk samples, damaged files."""

import io
import json
import logging
import tarfile

import pytest
import webdataset
from test_data_csv import TEXTS, encoded, picture, same

from protoclip.data import DataError, open_dataset
from protoclip.data import shards as shard_module
from protoclip.data.shards import expand


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


def write_shards(folder, shards=2, per_shard=3):
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{shard:03d}.tar")) as writer:
            for j in range(per_shard):
                number = shard * per_shard + j
                writer.write(
                    {
                        "__key__": f"sample{number}",
                        ("png", "webp")[j % 2]: encoded(picture(number), ("PNG", "WEBP")[j % 2]),
                        "txt": f"{TEXTS[number % 4]}\n\n  second line {number} \n",
                    }
                )
    return str(folder / f"{{000..{shards - 1:03d}}}.tar")


def test_shards_round_trip(tmp_path):
    spec = write_shards(tmp_path / "data")
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    first = open_dataset(spec)
    again = open_dataset(spec)  # from the cached index
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
    for dataset in (first, again):
        assert len(dataset) == 6
        assert dataset.keys[4] == "001.tar/sample4"
        for i in (5, 0, 3, 2, 4, 1):  # any order
            assert dataset.captions(i) == (TEXTS[i % 4], f"second line {i}")
            if i % 3 != 1:  # PNG is lossless
                assert same(dataset.image(i), picture(i))
            assert dataset.image(i).size == (10, 12)


def test_the_cached_index_follows_the_file(tmp_path):
    spec = write_shards(tmp_path / "data", shards=1)
    assert len(open_dataset(spec)) == 3
    write_shards(tmp_path / "data", shards=1, per_shard=5)
    assert len(open_dataset(spec)) == 5
    for index in (tmp_path / "cache" / "shards").iterdir():
        index.write_text('{"stamp": ')  # torn
    assert len(open_dataset(spec)) == 5


def test_specs_expand(tmp_path, monkeypatch):
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", shards=1)
    monkeypatch.chdir(tmp_path)
    assert expand("a/{000..001}.tar::b/000.tar") == (
        ("a/000.tar", "a/001.tar", "b/000.tar"),
        (0, 0, 1),
    )
    assert expand("a/*.tar")[0] == expand("a")[0] == ("a/000.tar", "a/001.tar")
    dataset = open_dataset("a/*.tar::b/000.tar")
    assert len(set(dataset.keys)) == len(dataset) == 9  # same names in a and b
    for spec, words in (
        ("a/{000..005}.tar", r"no shard 'a/002\.tar'"),
        ("c/*.tar", "no shard"),
        ("a/000.tar::a/000.tar", "listed twice"),
        ("a/{000.tar", "braces"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(spec)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_json_captions_and_other_members(tmp_path):
    png = encoded(picture(0))
    path = write_tar(
        tmp_path / "j.tar",
        [
            ("./d/1.png", png),
            ("./d/1.json", json.dumps({"caption": "ein Hund", "width": 9}).encode()),
            ("./d/1.cls", b"3"),
            ("d/2.json", json.dumps({"captions": ["one", " ", "two"]}).encode()),
            ("d/2.PNG", png),
            ("d/3.seg.png", b"not the picture"),
            ("d/3.png", png),
            ("d/3.txt", b"text first"),
            ("d/3.json", json.dumps({"caption": "json second"}).encode()),
        ],
    )
    dataset = open_dataset(path)
    assert [dataset.captions(i) for i in range(3)] == [
        ("ein Hund",),
        ("one", "two"),
        ("text first",),
    ]
    assert all(same(dataset.image(i), picture(0)) for i in range(3))


def test_junk_samples_are_skipped_named_and_counted(tmp_path, caplog):
    png = encoded(picture(0))
    path = write_tar(
        tmp_path / "junk.tar",
        [
            ("alone.png", png),
            ("mute.png", png),
            ("mute.txt", b"  \n"),
            ("hollow.png", b""),
            ("hollow.txt", b"a"),
            ("good.png", png),
            ("good.txt", b"a"),
            ("bytes.png", png),
            ("bytes.txt", b"\xff\xfe\xfa"),
            ("list.png", png),
            ("list.json", b"[1]"),
            ("README", b"no extension"),
            ("good.png", png),
            ("good.txt", b"again"),
        ],
    )
    for _ in range(2):  # fresh and from the cache
        caplog.clear()
        shard_module._warn.cache_clear()  # which says things once a process
        with caplog.at_level(logging.WARNING):
            dataset = open_dataset(path)
        assert list(dataset.keys) == ["junk.tar/good"]
        reasons = {(key, reason.split("(")[0].strip()) for _, key, reason in dataset.skipped}
        assert {
            ("alone", "the caption is missing"),
            ("mute", "its txt: no caption is there"),
            ("hollow", "the picture is empty"),
            ("good", "the key occurs twice"),
        } <= reasons
        assert {key for _, key, _ in dataset.skipped} == {
            "alone", "mute", "hollow", "good", "bytes", "list",
        }  # fmt: skip
        assert "6 of 7 samples skipped" in caplog.text
        assert "junk.tar: 'alone'" in caplog.text


@pytest.mark.parametrize("where", ["data", "header", "border", "overwritten"])
def test_a_damaged_shard_keeps_what_can_be_read(tmp_path, where):
    write_shards(tmp_path / "data", shards=1, per_shard=4)
    path = tmp_path / "data" / "000.tar"
    with tarfile.open(path) as tar:
        third = next(member for member in tar if member.name == "sample2.png")
    content = path.read_bytes()
    content = {
        "data": content[: third.offset_data + 7],
        "header": content[: third.offset + 100],
        "border": content[: third.offset],
        "overwritten": content[: third.offset] + b"x" * 512 + content[third.offset + 512 :],
    }[where]
    path.write_bytes(content)
    dataset = open_dataset(str(path))
    assert [dataset.image(i).size for i in range(len(dataset))] == [(10, 12)] * 2
    assert dataset.skipped[-1][1] == "what follows sample1" or where == "data"
    assert "cut off" in dataset.skipped[-1][2] or "damaged at byte" in dataset.skipped[-1][2]


def test_files_that_are_no_shards(tmp_path):
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "text.tar", [("1.txt", b"a")])
    (tmp_path / "zero.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz"):
        pass
    for name, words in (
        ("empty.tar", "none of 0 samples is a pair"),
        ("text.tar", r"none of 1 samples(.|\n)*'1': the picture is missing"),
        ("zero.tar", "not an uncompressed tar"),
        ("z.tar.gz", "not an uncompressed tar.*unpack"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(str(tmp_path / name))


def test_a_broken_picture_in_a_shard_names_shard_and_key(tmp_path):
    path = write_tar(tmp_path / "b.tar", [("k.jpg", b"\xff\xd8 no"), ("k.txt", b"a")])
    dataset = open_dataset(path)
    with pytest.raises(DataError, match=r"b\.tar: 'b\.tar/k'.*does not decode"):
        dataset.image(0)


def test_the_cache_may_be_unwritable(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(write_shards(tmp_path / "data"))) == 6
    assert "set PROTOCLIP_CACHE" in caplog.text


def test_splits_of_data_without_groups(tmp_path):
    spec = write_shards(tmp_path / "data", shards=2, per_shard=10)
    train, heldout = open_dataset(spec, "train"), open_dataset(spec, "heldout")
    assert (len(train), len(heldout)) == (18, 2)
    assert not set(train.keys) & set(heldout.keys)
    everything = open_dataset(spec)
    for i in range(2):
        assert heldout.captions(i) == everything.captions(everything.keys.index(heldout.keys[i]))
