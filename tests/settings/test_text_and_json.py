"""What users write for us: lines that only newlines end, JSON of any depth, names of precisions."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import config_of

from protoclip.__main__ import main
from protoclip.common.files import lines_of, printable
from protoclip.common.json_text import JSON_LEVELS, parse_json
from protoclip.data.shards import parse_captions
from protoclip.evaluate.datasets import open_layout, read_templates
from protoclip.runs.run_folder import choose_folder

ODD = "one\u2028line\x0cwith\x85odd\x1cbreaks"  # str.splitlines makes five of it


def test_only_newlines_end_a_line() -> None:
    assert lines_of("") == [] and lines_of("\n") == [""] and lines_of("a\n\nb") == ["a", "", "b"]
    assert lines_of(f"{ODD}\nb\r\nc\rd\n") == [ODD, "b", "c", "d"]


def test_printable_text_goes_into_any_file_and_does_nothing_to_a_terminal() -> None:
    name = os.fsdecode(b"caf\xe9 \xff.png")
    assert printable(f"{name} é \ud800") == r"caf\xe9 \xff.png é " + "\ufffd"
    assert printable("a\x1b[2J\x07\r\nb\x9b é\t.png") == r"a\x1b[2J\x07\r\nb\x9b é" + "\t.png"


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


def test_a_run_on_data_whose_name_is_not_utf_8_has_a_page_and_a_model_card(
    trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for name in ("config.json", "results.json"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace("builtin:shapes:64", r"caf\udce9"))
    assert main(["report", str(trained), str(run), "--out", str(tmp_path / "x.html")]) == 0
    assert r"caf\udce9" in (tmp_path / "x.html").read_text()
    assert main(["export", str(run), "--out", str(tmp_path / "model")]) == 0
    assert r"Results on caf\xe9" in (tmp_path / "model" / "README.md").read_text()


def test_a_run_folder_has_a_name_in_utf_8() -> None:
    with pytest.raises(ValueError, match=r"name in UTF-8, got logs/caf\\xe9;"):
        choose_folder(config_of("--name", os.fsdecode(b"caf\xe9")))


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


DEEP_TEXTS = pytest.mark.parametrize("text", [DEEP, "[" * 900 + "]" * 900], ids=["torn", "whole"])


def run_with(trained: Path, folder: Path, name: str, text: str) -> Path:
    """A copy of a run with another content of one of its files."""
    run = shutil.copytree(trained, folder / "run")
    (run / name).write_text(text)
    return run


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        (["report"], "config.json", ""),
        (["report"], "results.json", ""),
        (["train", "--resume"], "config.json", " cannot be used"),
    ],
)
@DEEP_TEXTS
def test_a_command_that_needs_a_deep_file_is_refused_in_one_line(
    trained: Path, tmp_path: Path, error_of: Callable[..., str], command, name, words, text: str
) -> None:
    run = run_with(trained, tmp_path, name, text)
    assert f"{run}/{name}{words}" in error_of(main, [*command, run])


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl"])
@DEEP_TEXTS
def test_deep_optional_files_do_not_stop_a_report(
    trained: Path, tmp_path: Path, name: str, text: str
) -> None:
    run = run_with(trained, tmp_path, name, text)
    assert main(["report", str(run)]) == 0


def test_deep_json_in_a_preset_or_model_is_a_sentence(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    (tmp_path / "deep.json").write_text('{"optim": ' + DEEP)
    for flag in ("--preset", "--model"):
        message = error_of(main, ["train", flag, tmp_path / "deep.json"])
        assert message.startswith(f"protoclip train: error: {flag}: ")
        assert "deep.json" in message and "100 levels" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"caption": 3}, 'expected a string in "caption", got 3'),
        ({"caption": False}, 'expected a string in "caption", got False'),
        ({"captions": {"a": 1}}, "expected a list of strings in \"captions\", got {'a': 1}"),
        ({"captions": ["a", 3]}, "expected a list of strings in \"captions\", got ['a', 3]"),
        ({"caption": None}, "all captions are empty"),
        ({}, "all captions are empty"),
    ],
)
def test_a_caption_that_is_not_text_is_named(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_captions(json.dumps(content).encode(), True)
    assert str(raised.value) == words


def test_a_caption_beside_captions_is_not_read() -> None:
    assert parse_captions(b'{"captions": "x", "caption": 3}', True) == ("x",)


# OpenCLIP's names of precisions, and ours.
TRAINABLE = {"amp": "amp", "amp_bf16": "amp_bf16", "amp_bfloat16": "amp_bf16", "fp32": "fp32"}
# Weights in 16 bits: refused, with what to use instead.
REFUSED = {"bf16": "amp_bf16", "fp16": "amp", "pure_bf16": "amp_bf16", "pure_fp16": "amp"}


def test_every_precision_of_openclip_has_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    params = pytest.importorskip("open_clip_train.params")
    parsers: list[argparse.ArgumentParser] = []
    parse_args = argparse.ArgumentParser.parse_args

    def noting(parser: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
        parsers.append(parser)
        return parse_args(parser, *arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", noting)
    params.parse_args(["--precision", "fp32"])
    choices = parsers[0]._option_string_actions["--precision"].choices
    assert choices is not None and set(choices) <= TRAINABLE.keys() | REFUSED.keys()


@pytest.mark.parametrize(("name", "precision"), TRAINABLE.items())
def test_precisions_that_keep_fp32_weights_are_taken(
    tmp_path: Path, name: str, precision: str
) -> None:
    assert config_of("--precision", name).run.precision == precision
    (tmp_path / "preset.json").write_text(json.dumps({"run": {"precision": name}}))
    assert config_of("--preset", str(tmp_path / "preset.json")).run.precision == precision


@pytest.mark.parametrize(("name", "remedy"), REFUSED.items())
@pytest.mark.parametrize("command", [["train"], ["evaluate", "x"], ["cluster", "x"]])
def test_precisions_of_16_bit_weights_are_refused_with_a_remedy(
    error_of: Callable[..., str], command: list[str], name: str, remedy: str
) -> None:
    message = error_of(main, [*command, "--precision", name])
    assert f"--precision: expected fp32 weights, got {name}" in message
    assert f"use {remedy}," in message
