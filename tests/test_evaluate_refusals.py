"""What is wrong with folders, tables, flags and models is said in words, without a traceback."""

import pytest
from evaluation_data import evaluate, image_folder

from protoclip.evaluate import __main__ as command


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("protoclip.evaluate.tasks.cache_dir", lambda: tmp_path / "cache")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--classnames", "nowhere.txt"], "no file nowhere.txt"),
        (["--templates", "nowhere.txt"], "--templates: expected openai, simple or a file"),
        (["--split", "holdout"], "--split holdout: no folder"),
        (["--tasks", "zeroshot,cooking"], "'cooking' is unknown"),
        (["--tasks", "retrieval"], "no captions"),
        (["--device", "cuda:9"], "not on this machine"),
        (["--data", "builtin:cats"], "expected one of builtin:emoji"),
        (["--data", "none.csv"], "none.csv"),
    ],
)
def test_wrong_flags_are_refused_in_words(tmp_path, capsys, flags, words):
    root = image_folder(tmp_path / "digits", 20)
    code, content = evaluate(tmp_path, "--data", root, *flags)
    message = capsys.readouterr().err
    assert code == 2 and words in message and "Traceback" not in message and content is None


def test_folders_are_refused_in_words(tmp_path, capsys):
    (tmp_path / "empty" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    image_folder(tmp_path / "ten", 20)
    (tmp_path / "ten" / "classnames.txt").write_text("zero\none\n")
    cases = {"empty": "no pictures in", "flat": "no class folders", "ten": "2 class names for 10"}
    for name, words in cases.items():
        assert evaluate(tmp_path, "--data", tmp_path / name)[0] == 2
        assert words in capsys.readouterr().err
    picture = tmp_path / "ten" / "test" / "1" / "torn.png"
    (tmp_path / "ten" / "classnames.txt").unlink()
    picture.write_bytes(b"no picture")
    assert evaluate(tmp_path, "--data", tmp_path / "ten")[0] == 2
    assert "torn.png" in capsys.readouterr().err


def test_models_are_refused_in_words(tmp_path, capsys):
    for argv, words in (
        (["ViT-B-23"], "did you mean"),
        (["ViT-B-32"], "--pretrained is missing"),
        (["ViT-B-32", "--pretrained", "nothing"], "no tag of ViT-B-32"),
        ([str(tmp_path / "run")], "found nothing"),
    ):
        assert command.main([*argv, "--data", "builtin:shapes:40"]) == 2
        assert words in capsys.readouterr().err
