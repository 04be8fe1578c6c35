"""webdataset shards from files and URLs: round trips, junk samples, damaged and hostile files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import TEXTS, encoded, picture, same, write_shards, write_tar
from ranks import in_group

from protoclip.common import host
from protoclip.data import DataError, open_dataset
from protoclip.data import shards as shard_module
from protoclip.data.__main__ import main as data_command
from protoclip.data.__main__ import shard_names
from protoclip.data.shards import ShardIndex, expand, index_together
from protoclip.data.tables import MAX_CAPTION
from protoclip.train import main as train_command

pytestmark = pytest.mark.usefixtures("own_cache")
Serve = Callable[..., str]


@pytest.mark.smoke
def test_shards_round_trip_and_the_cached_index_follows_the_file(tmp_path: Path) -> None:
    spec = write_shards(tmp_path / "data")
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    for dataset in (open_dataset(spec), open_dataset(spec)):  # again: from the cached index
        assert len(dataset) == 6
        assert dataset.keys[4] == "001.tar/sample4"
        for i in (5, 0, 3, 2, 4, 1):  # any order
            assert dataset.captions(i) == (TEXTS[i % 4], f"second line {i}")
            if i % 3 != 1:  # PNG is lossless
                assert same(dataset.image(i), picture(i))
            assert dataset.image(i).size == (10, 12)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
    write_shards(tmp_path / "data", per_shard=5)
    assert len(open_dataset(spec)) == 10


def damage_index(path: Path, damage: str) -> None:
    """Damage a cached index."""
    text = path.read_text()
    if damage == "cut off":
        path.write_text(text[: len(text) // 2])
    elif damage == "a key is missing":
        index = ShardIndex(*json.loads(text))
        path.write_text(json.dumps(index._replace(keys=index.keys[:-1])))


@pytest.mark.parametrize("damage", ["cut off", "a key is missing"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    spec = write_shards(tmp_path / "data", per_shard=5)
    open_dataset(spec)
    paths = list((tmp_path / "cache" / "shards").iterdir())
    contents = [path.read_text() for path in paths]
    assert len(paths) == 2
    for path in paths:
        damage_index(path, damage)
    dataset = open_dataset(spec)
    assert len(dataset) == 10
    assert dataset.captions(9) == (TEXTS[1], "second line 9")
    assert [path.read_text() for path in paths] == contents


def test_specs_expand_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "a")
    write_shards(tmp_path / "b", shards=1)
    monkeypatch.chdir(tmp_path)
    in_a = ("a/000.tar", "a/001.tar")
    assert expand("a/{000..001}.tar::b/000.tar") == (*in_a, "b/000.tar")
    assert expand("a/*.tar") == expand("a") == in_a
    dataset = open_dataset("a/*.tar::b/000.tar")
    assert len(set(dataset.keys)) == len(dataset) == 9  # same names in a and b
    for spec, words in (
        ("a/{000..005}.tar", r"no shard 'a/002\.tar'"),
        ("c/*.tar", "no shard"),
        ("a/000.tar::a/000.tar", "listed twice"),
        ("a/000.tar::a/./000.tar", "listed twice"),
        ("a/{000.tar", "braces"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(spec)


def test_json_captions_and_other_members(tmp_path: Path) -> None:
    png = encoded(picture(0))
    members = [
        ("./d/1.png", png),
        ("./d/1.json", b'{"caption": "ein Hund", "width": 9}'),
        ("./d/1.cls", b"3"),
        ("d/2.json", b'{"captions": ["one", " ", "two"]}'),
        ("d/2.PNG", png),
        ("d/3.seg.png", b"not the picture"),
        ("d/3.png", png),
        ("d/3.txt", b"text first"),
        ("d/3.json", b'{"caption": "json second"}'),
        ("d/4.png", png),  # cut inside an emoji: no file could hold the half
        ("d/4.json", b'{"caption": "a cat \\ud83d"}'),
    ]
    dataset = open_dataset(write_tar(tmp_path / "j.tar", members))
    captions = [dataset.captions(i) for i in range(4)]
    assert captions == [("ein Hund",), ("one", "two"), ("text first",), ("a cat \ufffd",)]
    assert all(same(dataset.image(i), picture(0)) for i in range(4))


def test_junk_samples_are_skipped_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    png = encoded(picture(0))
    members = [
        ("README", b"no extension"),
        ("alone.png", png),
        ("list.png", png),
        ("list.json", b"[1]"),
        ("mute.png", png),
        ("mute.txt", b"  \n"),
        ("hollow.png", b""),
        ("hollow.txt", b"a"),
        ("good.png", png),
        ("good.txt", b"a"),
        ("bytes.png", png),
        ("bytes.txt", b"\xff\xfe\xfa"),
        ("good.png", png),
        ("good.txt", b"again"),
    ]
    path = write_tar(tmp_path / "junk.tar", members)
    for _ in range(2):  # fresh and from the cache
        caplog.clear()
        host.warn_once.cache_clear()  # which says things once a process
        with caplog.at_level(logging.WARNING):
            dataset = open_dataset(path)
        assert list(dataset.keys) == ["junk.tar/good"]
        assert {key: reason for _, key, reason in dataset.facts.skipped} == {
            "alone": "the caption is missing (txt, json)",
            "list": "its json: expected a JSON object, got list",
            "mute": "its txt: all captions are empty",
            "hollow": "the picture is empty (0 bytes) (jpg, png, jpeg, webp)",
            "bytes": "its txt: 'utf-8' codec can't decode byte 0xff in position 0: "
            "invalid start byte",
            "good": "the key occurs twice",
        }
        assert "6 of 7 samples skipped" in caplog.text and "junk.tar: 'alone'" in caplog.text


@pytest.mark.parametrize("where", ["data", "header", "border", "overwritten"])
def test_a_damaged_shard_keeps_what_can_be_read(tmp_path: Path, where: str) -> None:
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
    _, key, reason = dataset.facts.skipped[-1]
    assert key == "everything after sample1"
    assert reason == f"the shard is cut off or damaged at byte {third.offset}; copy it again"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty.tar", "none of 0 samples is a pair"),
        ("text.tar", r"none of 1 samples(.|\n)*'1': the picture is missing"),
        ("zero.tar", "not an uncompressed tar"),
        ("z.tar.gz", "not an uncompressed tar.*unpack"),
    ],
)
def test_files_that_are_not_shards_are_refused(tmp_path: Path, name: str, words: str) -> None:
    write_tar(tmp_path / "empty.tar", [])
    write_tar(tmp_path / "text.tar", [("1.txt", b"a")])
    (tmp_path / "zero.tar").write_bytes(b"")
    tarfile.open(tmp_path / "z.tar.gz", "w:gz").close()
    with pytest.raises(DataError, match=words):
        open_dataset(str(tmp_path / name))


def test_the_cache_may_be_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(write_shards(tmp_path / "data"))) == 6
    assert "set PROTOCLIP_CACHE" in caplog.text


def test_a_tenth_of_data_without_groups_is_held_out(tmp_path: Path) -> None:
    spec = write_shards(tmp_path / "data", shards=2, per_shard=10)
    everything = open_dataset(spec)
    train = open_dataset(spec, "train")
    heldout = open_dataset(spec, "heldout")
    assert (len(train), len(heldout)) == (18, 2)
    assert not set(train.keys) & set(heldout.keys)
    place = everything.keys.index(heldout.keys[1])
    assert heldout.captions(1) == everything.captions(place)


def _keys_on_rank(spec: str, folder: str) -> list[str] | str:
    """The keys of the data set, or what is wrong with it."""
    os.environ["PROTOCLIP_CACHE"] = f"{folder}/cache{os.environ['RANK']}"
    try:
        index_together(spec)
        return list(open_dataset(spec).keys)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(("count", "last"), [(1, "00000.tar"), (100_001, "100000.tar")])
def test_a_range_in_braces_names_every_exported_shard(count: int, last: str) -> None:
    names = shard_names(count)
    assert names[-1] == last
    assert {len(name) for name in names} == {len(last)} and names == sorted(set(names))


class TestUrls:
    @pytest.mark.parametrize("protocol", ["http", "file"])
    def test_remote_shards_match_local_ones_and_download_once(
        self, tmp_path: Path, serve: Serve, protocol: str
    ) -> None:
        local = open_dataset(write_shards(tmp_path / "data"))
        base = serve(tmp_path / "data") if protocol == "http" else f"file://{tmp_path}/data"
        spec = f"{base}/{{000..001}}.tar"
        for _ in range(2):  # the second start needs neither the server nor the files
            remote = open_dataset(spec)
            assert [key.split("/")[1] for key in remote.keys] == [f"sample{i}" for i in range(6)]
            for i in range(6):
                assert remote.captions(i) == local.captions(i)
                assert remote.image(i).tobytes() == local.image(i).tobytes()
            for path in (tmp_path / "data").glob("*.tar"):
                path.unlink()
            local = remote

    def test_without_the_copies_a_changed_shard_is_read_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
    ) -> None:
        monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "data"
        folder.mkdir()
        url = f"{serve(folder)}/a.tar"
        for keys in (["aa", "bbb"], ["cccc", "ddddd", "eeeeee"]):
            content = {".png": encoded(picture(0)), ".txt": b"words"}
            members = [(key + ending, data) for key in keys for ending, data in content.items()]
            write_tar(folder / "a.tar", members)
            shutil.rmtree(tmp_path / "cache" / "remote", ignore_errors=True)
            shard_module._open.cache_clear()  # as in a new process
            dataset = open_dataset(url)
            assert [key.split("/")[-1] for key in dataset.keys] == keys
            assert [dataset.captions(i) for i in range(len(keys))] == [("words",)] * len(keys)

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("http://127.0.0.1:9/a.tar", "http://127.0.0.1:9/a.tar: cannot be copied"),
            ("file:///no/such/a.tar", "FileNotFoundError.*check the address"),
            ("ssh://host/a.tar", "expected a URL of http, https, s3, gs, hf, file, got ssh"),
            ("pipe:touch ran; cat a.tar", "protoclip openclip"),
            ("x.tar::pipe:touch ran # .tar", "would run a shell command"),
        ],
    )
    def test_unreadable_or_unsafe_sources_are_named(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        error_of: Callable[..., str],
        spec: str,
        words: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_tar(tmp_path / "x.tar", [("k.png", encoded(picture(0))), ("k.txt", b"a")])
        with pytest.raises(DataError, match=words):
            open_dataset(spec)
        assert spec.split("::")[-1][:20] in error_of(data_command, ["--check", spec])
        error_of(train_command, ["--train-data", spec])
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("length", ["abc", "999999"])
    def test_a_wrong_content_length_fails_the_copy(
        self, tmp_path: Path, serve: Serve, error_of: Callable[..., str], length: str
    ) -> None:
        write_shards(tmp_path / "data", shards=1)
        url = f"{serve(tmp_path / 'data', content_length=length)}/000.tar"
        assert f"{url}: cannot be copied" in error_of(data_command, ["--check", url])
        # Nothing of the half copy is taken for the shard.
        with pytest.raises(DataError, match="cannot be copied"):
            open_dataset(url)

    def test_a_run_on_remote_shards_resumes_from_its_folder_alone(
        self, tmp_path: Path, serve: Serve, nano: Path, no_page: None
    ) -> None:
        write_shards(tmp_path / "data")
        url = f"{serve(tmp_path / 'data')}/{{000..001}}.tar"
        flags = ["--train-data", url, "--model", str(nano), "--batch-size", "4", "--k", "2"]
        flags += ["--max-steps", "2", "--logs", str(tmp_path), "--name", "run", "--device", "cpu"]
        assert train_command(flags) == 0
        assert train_command(["--resume", str(tmp_path / "run"), "--max-steps", "4"]) == 0

    def test_ranks_fetch_and_index_each_shard_once(self, tmp_path: Path, serve: Serve) -> None:
        """On machines that share nothing: each rank has a cache of its own."""
        write_shards(tmp_path / "data", shards=5)
        requests: list[str] = []
        base = serve(tmp_path / "data", requests=requests)
        keys = in_group(2, _keys_on_rank, f"{base}/{{000..004}}.tar", str(tmp_path))
        assert keys[0] == keys[1] and len(keys[0]) == 15
        assert sorted(requests) == [f"/{i:03d}.tar" for i in range(5)]
        messages = in_group(2, _keys_on_rank, f"{base}/{{000..009}}.tar", str(tmp_path))
        assert messages[0] == messages[1] and "/005.tar: cannot be copied" in messages[0]


def test_a_shard_that_is_being_written_is_indexed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.tar"
    content = {".png": encoded(picture(0)), ".txt": b"words"}
    members = [(key + ending, data) for key in "abcd" for ending, data in content.items()]
    write_tar(path, members)
    whole = path.read_bytes()
    path.write_bytes(whole[:5120])  # as far as its writer has come
    scan = shard_module._scan

    def scan_while_it_grows(*arguments: str) -> ShardIndex:
        index = scan(*arguments)
        path.write_bytes(whole)
        return index

    monkeypatch.setattr(shard_module, "_scan", scan_while_it_grows)
    assert len(open_dataset(str(path))) < 4
    monkeypatch.setattr(shard_module, "_scan", scan)
    assert len(open_dataset(str(path))) == 4


def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for caption in (b"a dog", b"a small white dog"):
        write_tar(path, [("k.png", encoded(picture(0))), ("k.txt", caption)])
        if caption == b"a dog":
            dataset = open_dataset(str(path))
    os.utime(path, (1, 1))  # another time, however coarse the clock of the file system is
    with pytest.raises(DataError, match=r"a\.tar: changed while in use; start again"):
        dataset.captions(0)


def test_neighbours_with_one_key_are_not_one_pair(tmp_path: Path) -> None:
    members = [(f"{key}.png", encoded(picture(i))) for i, key in enumerate("aab")]
    texts = [(f"{key}.txt", str(i).encode()) for i, key in enumerate("aab")]
    pairs = [member for pair in zip(members, texts, strict=True) for member in pair]
    dataset = open_dataset(write_tar(tmp_path / "t.tar", pairs))
    assert [dataset.captions(i) for i in range(len(dataset))] == [("0",), ("2",)]
    assert same(dataset.image(0), picture(0))
    assert [(key, reason) for _, key, reason in dataset.facts.skipped] == [
        ("a", "the key occurs twice")
    ]


def test_captions_of_megabytes_are_cut_or_left_out(tmp_path: Path) -> None:
    texts = [("a.txt", b"word " * 200_000), ("b.txt", b"x" * 5_000_000)]
    texts += [("c.json", b'{"caption": ' + b"[" * 100_000)]
    pictures = [(f"{key}.png", encoded(picture(0))) for key in "abc"]
    members = [member for pair in zip(pictures, texts, strict=True) for member in pair]
    dataset = open_dataset(write_tar(tmp_path / "t.tar", members))
    assert list(dataset.keys) == ["t.tar/a"]
    assert len(dataset.captions(0)[0]) == MAX_CAPTION
    reasons = " ".join(reason for _, _, reason in dataset.facts.skipped)
    assert "4,194,304 bytes" in reasons and "at most 100 levels" in reasons
