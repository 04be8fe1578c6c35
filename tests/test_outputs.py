"""Where a command cannot write, it says so before it works, and leaves nothing behind."""

import pytest
from report_run import make_run

from protoclip.config import output_file
from protoclip.evaluate.__main__ import main as evaluate
from protoclip.export import main as export
from protoclip.report.__main__ import main as report
from protoclip.teacher.__main__ import main as teacher

COMMANDS = {
    "evaluate": (evaluate, ["protoclip-tiny", "--pretrained", "random", "--data", "builtin:none"]),
    "teacher": (teacher, ["--data", "builtin:none"]),
    "report": (report, ["run"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_mistaken_outputs_are_refused_first(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    main, argv = COMMANDS[command]
    flag = "--out" if command == "teacher" else "--output"
    for path, words in (("file/x", "but file is a file"), ("folder", "folder")):
        assert main([*argv, flag, path]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"error: {flag}: " in said and words in said
    assert sorted(tmp_path.iterdir()) == before and not list((tmp_path / "folder").iterdir())


def test_an_export_into_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "weights.pt").write_bytes(b"")
    assert export([str(tmp_path / "weights.pt"), "--out", str(tmp_path / "file" / "x")]) == 2
    assert "file is a file" in capsys.readouterr().err


def test_missing_folders_will_be_made(tmp_path):
    path = tmp_path / "a" / "b" / "c.json"
    assert output_file(path, "--output") == path and not path.parent.exists()
