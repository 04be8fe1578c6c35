"""What README shows works when pasted: its Python runs, its commands know their flags."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import open_clip
import pytest
import torch

import protoclip
from protoclip import cluster, export, openclip, plan, teacher, train
from protoclip.data import __main__ as data
from protoclip.evaluate import __main__ as evaluate
from protoclip.model import register_configs
from protoclip.report import __main__ as report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = {
    "cluster": cluster, "data": data, "evaluate": evaluate, "export": export, "openclip": openclip,
    "plan": plan, "report": report, "teacher": teacher, "train": train,
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return [text for kind, text in FENCED.findall(README) if kind == language]


def shown() -> list[tuple[str, list[str]]]:
    """(NAME, the words after it) of each "-m protoclip.NAME ..." or "protoclip NAME ..."."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", FENCED.sub("", README))]
    found = (re.search(r"(?:-m (?:-- )?protoclip\.|^protoclip )(\w+)(.*)", line) for line in lines)
    return [(match[1], shlex.split(match[2], comments=True)) for match in found if match]


def test_python_examples_run():
    torch.manual_seed(0)
    pieces, loop = blocks("python")
    exec(compile(pieces, "README: use a piece", "exec"), {})
    name = register_configs("protoclip-tiny")  # the second stands in a loop with model and batch
    scope = {
        "protoclip": protoclip,
        "model": open_clip.create_model(name, output_dict=True),
        "images": torch.randn(2, 3, 48, 48),
        "texts": open_clip.get_tokenizer(name)(["a cat", "two dogs"]),
    }
    exec(compile(loop, "README: your own loop", "exec"), scope)
    assert torch.isfinite(scope["total"])


def test_each_snippet_of_the_page_of_losses_runs():
    page = (ROOT / "docs" / "which-loss.md").read_text(encoding="utf-8")
    scope: dict = {}
    torch.manual_seed(0)
    snippets = [text for kind, text in FENCED.findall(page) if kind == "python"]
    for snippet in snippets:
        scope.pop("loss", None)
        exec(compile(snippet, "docs/which-loss.md", "exec"), scope)
        if "loss" in scope:
            scope["loss"].backward()
            assert scope["loss"].isfinite() and scope["loss"] > 0
    assert len(snippets) == page.count("\n## ") + 1


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_flags_exist(name):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        COMMANDS[name].main(["--help" if name == "openclip" else "--help-all"])
    known = set(re.findall(r"--[\w-]+", printed.getvalue()))
    uses = [words for command, words in shown() if command == name]
    assert uses, f"README does not show protoclip.{name}"
    for words in uses:
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"protoclip.{name} has no {sorted(flags - known)}"


def test_commands_and_make_targets_exist():
    assert {name for name, _ in shown()} <= set(COMMANDS)
    rules = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert re.search(rf"^{target}:", rules, re.MULTILINE), target
