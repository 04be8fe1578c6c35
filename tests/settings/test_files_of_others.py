"""Files that other people made: their code does not run, their links are not followed."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image

from protoclip.cluster.output import PROG, mark_of, read_mark
from protoclip.common.files import local_copy, write_atomic, write_safetensors
from protoclip.data import DataError, open_dataset
from protoclip.data.__main__ import main as data_command
from protoclip.data.images import decode
from protoclip.evaluate.datasets import class_prompts
from protoclip.model import build_model
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_model_s_config_cannot_have_its_tokenizer_s_code_run(tmp_path: Path, form: str) -> None:
    pytest.importorskip("transformers")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    import open_clip

    settings = open_clip.get_model_config("ViT-B-32")
    settings["text_cfg"] |= {
        "hf_tokenizer_name": str(tokenizer),
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    if form == "file":
        name = str(tmp_path / "taken.json")
        Path(name).write_text(json.dumps(settings))
    else:
        name = f"local-dir:{tmp_path}"
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    with pytest.raises(ValueError, match="trust_remote_code"), torch.device("meta"):
        build_model(ModelConfig(model=name), "meta")
    assert not (tmp_path / "ran").exists()


def test_weights_that_hold_code_are_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    weights = tmp_path / "evil.pt"
    torch.save({"state_dict": Evil()}, weights, pickle_module=pickle)
    with pytest.raises(ValueError, match="it holds code, or no tensors") as caught:
        build_model(ModelConfig(model="protoclip-tiny", pretrained=str(weights)))
    assert "weights_only" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(weights)
    assert not (tmp_path / "ran").exists()


def test_a_picture_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "gs"
    command.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    with pytest.raises(DataError, match="does not decode"):
        decode(page, "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_a_line_of_pixels_is_a_bad_sample() -> None:
    for size, good in (((1000, 1), True), ((1, 1001), False)):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        if good:
            assert decode(file.getvalue(), "a.png").size == size
        else:
            with pytest.raises(DataError, match="more than 1,000 times the other"):
                decode(file.getvalue(), "a.png")


def test_a_device_or_a_pipe_in_a_table_is_a_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protoclip.data.tables.CHECKED", 0)  # rows that are looked at first
    os.mkfifo(tmp_path / "pipe")
    table = tmp_path / "pairs.csv"
    table.write_text(f"filepath,title\n/dev/zero,a\n{tmp_path}/pipe,b\n")
    dataset = open_dataset(str(table))
    for i in range(2):
        with pytest.raises(DataError, match="found a device or a pipe"):
            dataset.image(i)


def test_a_device_in_a_parquet_file_is_a_bad_sample(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "pairs.parquet"
    column = {"image": [{"bytes": None, "path": "/dev/zero"}] * 2, "caption": ["a", "b"]}
    parquet.write_table(pyarrow.table(column), path)
    with pytest.raises(DataError, match="found a device or a pipe"):
        open_dataset(str(path)).image(1)


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (f"out.json.{os.getpid()}.tmp", "out.json"):
        (tmp_path / name).symlink_to(victim)
    write_atomic(tmp_path / "out.json", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "out.json").read_text() == "new"
    assert not (tmp_path / "out.json").is_symlink()


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_files_have_the_permissions_that_the_user_chose(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "text", "a")
        write_safetensors(tmp_path / "tensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    for name in ("text", "tensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name


def test_a_url_with_a_signature_is_copied(tmp_path: Path, serve) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.tar").write_bytes(b"content")
    copied = local_copy(f"{serve(tmp_path / 'data')}/a.tar?signature=abc")
    assert Path(copied).read_bytes() == b"content"


def test_names_that_are_printed_move_no_cursor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a\x1b[2J.png").write_bytes(b"no picture")
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\na\x1b[2J.png,a\n")
    data_command(["--check", str(table)])
    printed = "".join(capsys.readouterr())
    assert "does not decode" in printed and "\x1b" not in printed
    assert "correct the path" not in printed  # one remedy


def test_templates_may_hold_other_braces() -> None:
    assert class_prompts("class", ["dog"], ["a {} of {style}"]) == [["a dog of {style}"]]


@pytest.mark.parametrize("content", ["[]", '{"clusters.csv": 5}', "[" * 5000, "x"])
def test_a_mark_that_is_none_of_ours_is_no_mark(tmp_path: Path, content: str) -> None:
    (tmp_path / mark_of(PROG)).write_text(content)
    assert read_mark(tmp_path, PROG) == {}
