"""What users write for us: lines that only newlines end, JSON of any depth, names of precisions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from ranks import config_of

from protoclip.__main__ import main
from protoclip.config import PRECISIONS
from protoclip.data.files import lines_of, printable
from protoclip.data.shards import parse_captions
from protoclip.evaluate.datasets import open_layout, read_templates
from protoclip.json_text import JSON_LEVELS, parse_json

ODD = "one\u2028line\x0cwith\x85odd\x1cbreaks"  # str.splitlines makes five of it


def test_only_newlines_end_a_line() -> None:
    assert lines_of("") == [] and lines_of("\n") == [""] and lines_of("a\n\nb") == ["a", "", "b"]
    assert lines_of(f"{ODD}\nb\r\nc\rd\n") == [ODD, "b", "c", "d"]


def test_printable_text_goes_into_any_file() -> None:
    assert (
        printable(os.fsdecode(b"caf\xe9 \xff.png") + " é \ud800")
        == r"caf\xe9 \xff.png é " + "\ufffd"
    )


def test_captions_class_names_and_templates_keep_their_odd_breaks(tmp_path: Path) -> None:
    assert parse_captions(f"{ODD}\nsecond\n".encode(), False) == (ODD, "second")
    (tmp_path / "words.txt").write_text(f"{{c}} {ODD}\n{{}}\n")
    assert read_templates(str(tmp_path / "words.txt")) == (f"{{}} {ODD}", "{}")
    from PIL import Image

    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "data" / name / "1.png")
    (tmp_path / "data" / "classnames.txt").write_text(f"{ODD}\nb\n")
    assert open_layout(str(tmp_path / "data")).test.labels["class"].names == (ODD, "b")


def test_a_row_of_features_has_one_caption_whatever_is_in_it(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((20, 3)))
    (tmp_path / "w.txt").write_text("".join(f"{ODD} {i}\n" for i in range(20)))
    flags = ["--captions", str(tmp_path / "w.txt"), "--k", "2", "--out", str(tmp_path / "out")]
    assert main(["cluster", str(tmp_path / "x.npy"), *flags]) == 0


DEEP = "[" * 200_000


def test_the_depth_of_json_is_limited() -> None:
    def nested(levels):
        return json.loads("[" * levels + "]" * levels)

    assert parse_json("[" * JSON_LEVELS + "]" * JSON_LEVELS) == nested(JSON_LEVELS)
    for deep in (DEEP, '{"a":' * 101 + "1" + "}" * 101, "[" * 101 + "]" * 101):
        with pytest.raises(ValueError, match=f"at most {JSON_LEVELS} levels"):
            parse_json(deep)


@pytest.mark.parametrize("name", ["config.json", "results.json", "report.json", "metrics.jsonl"])
@pytest.mark.parametrize("text", [DEEP, "[" * 900 + "]" * 900], ids=["torn", "whole"])
def test_deep_json_in_a_run_is_a_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / name).write_text(text)
    damaged = name in ("config.json", "results.json")  # the others are as if they were missing
    assert main(["report", str(run)]) == (2 if damaged else 0)
    said = capsys.readouterr()
    if damaged:
        assert str(run / name) in said.err and said.err.count("\n") == 1
    if name == "config.json":
        assert main(["train", "--resume", str(run)]) == 2
        said = capsys.readouterr().err
        assert f"{run}/config.json cannot be used" in said and said.count("\n") == 1


def test_deep_json_in_a_preset_or_model_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep.json").write_text('{"optim": ' + DEEP)
    for flag in ("--preset", "--model"):
        assert main(["train", flag, str(tmp_path / "deep.json")]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"protoclip train: error: {flag}: ") and said.count("\n") == 1
        assert "deep.json" in said and "100 levels" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"caption": 3}, 'expected a string in "caption", got 3'),
        ({"caption": False}, 'expected a string in "caption", got False'),
        ({"captions": "x", "caption": 3}, None),
        ({"captions": {"a": 1}}, "expected a list of strings in \"captions\", got {'a': 1}"),
        ({"captions": ["a", 3]}, "expected a list of strings in \"captions\", got ['a', 3]"),
        ({"caption": None}, "all captions are empty"),
        ({}, "all captions are empty"),
    ],
)
def test_a_caption_that_is_no_text_is_named(content, words: str) -> None:
    data = json.dumps(content).encode()
    if words is None:
        assert parse_captions(data, True) == ("x",)
        return
    with pytest.raises(ValueError) as raised:
        parse_captions(data, True)
    assert str(raised.value) == words


def test_every_precision_of_openclip_works_or_is_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    action = pytest.importorskip("open_clip_train.params")
    with pytest.raises(SystemExit):
        action.parse_args(["--precision", "none"])
    theirs = capsys.readouterr().err.rpartition("choose from ")[2].strip(" )\n").split(", ")
    theirs = {name.strip("'") for name in theirs}
    assert {"amp_bfloat16", "pure_bf16", "fp16", "fp32"} <= theirs
    for name in theirs:
        if "pure" in name or name in ("bf16", "fp16"):
            for command in (["train"], ["evaluate", "x"], ["cluster", "x"]):
                with pytest.raises(SystemExit) as ended:
                    main([*command, "--precision", name])
                said = capsys.readouterr().err
                assert ended.value.code == 2 and said.count("\n") == 1
                assert f"--precision: expected fp32 weights, got {name}" in said
                assert f"use amp{'_bf16' if 'bf16' in name else ''}," in said
        else:
            assert config_of("--precision", name).run.precision in PRECISIONS
    assert config_of("--precision", "amp_bfloat16").run.precision == "amp_bf16"
    (tmp_path / "p.json").write_text('{"run": {"precision": "amp_bfloat16"}}')
    assert config_of("--preset", str(tmp_path / "p.json")).run.precision == "amp_bf16"
