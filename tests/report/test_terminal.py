"""What a newcomer types: the list of commands leads on, and a wrong word is answered with the right
one."""

import os
import subprocess
import sys

import pytest

from protoclip.__main__ import HELP, main
from protoclip.settings.commands import EVERYDAY, PARSERS, train_parser


def test_the_first_screen_names_every_command_and_fits_a_terminal(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said == f"{HELP}\n" and all(len(line) <= 80 for line in said.splitlines())
    assert all(name in said for name in PARSERS) and "protoclip.ClipLoss()" in said


@pytest.mark.parametrize("words", [["help", "report"], ["report", "--help"], ["report", "-h"]])
def test_help_of_a_command(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0 and "usage: protoclip report" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["", "train --help"])
def test_help_ends_quietly_when_nobody_reads_on(words):
    command = f"{sys.executable} -m protoclip {words} | true"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_everyday_flags_exist_and_terms_are_explained():
    known = train_parser()._option_string_actions
    assert set(EVERYDAY.split()) <= set(known)
    text = " ".join(train_parser().format_help().split())
    assert "A prototype is the mean of a cluster" in text and "--max-bad-fraction" not in text


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["groups"], "did you mean cluster?"),
        (["loss"], "expected one of train"),
        (["help", "groups"], "did you mean cluster?"),
        (["train", "pairs.csv"], "--train-data pairs.csv"),
        (["train", "--data", "pairs.csv"], "--data: the flag is --train-data"),
        (["train", "--k", "3", "4"], "a flag takes one value"),
        (["train", "--train-data", "photos"], "photos: no class folders"),
        (["cluster", "--data", "photos"], "DATA has none: protoclip cluster DATA"),
        (["report", "logs"], f"did you mean logs{os.sep}run?"),
    ],
)
def test_a_wrong_word_is_answered(tmp_path, monkeypatch, error_of, words, answer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "config.json").write_text("{}")
    assert answer in error_of(main, words)
