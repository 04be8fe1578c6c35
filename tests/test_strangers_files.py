"""Saved settings of a stranger's run or checkpoint neither start commands nor reach the network."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from protoclip.evaluate.__main__ import main as evaluate
from protoclip.export import main as export
from protoclip.report.__main__ import main as report
from protoclip.train import main as train

DATA = "builtin:shapes:64"
FIELDS = ("train_data", "val_data")
KINDS = ("pipe", "url", "second source")


@pytest.fixture
def server(serve, tmp_path):
    """A web server of this machine, and what was asked of it."""
    asked = []
    return SimpleNamespace(asked=asked, url=serve(tmp_path / "nothing", asked=asked))


@pytest.fixture
def stranger(trained, server, tmp_path):
    """Makes of the run one whose saved settings name data elsewhere."""
    marker = tmp_path / "marker"
    url = f"{server.url}/{{000..001}}.tar"
    words = {
        "pipe": f"pipe:touch {marker}; cat {tmp_path}/none.tar",
        "url": url,
        "second source": f"{tmp_path}/none.tar::{url}",
    }

    def make(kind, fields=FIELDS, model=""):
        folder = shutil.copytree(trained, tmp_path / "run")
        settings = json.loads((folder / "config.json").read_text())
        settings["data"] |= dict.fromkeys(fields, words[kind])
        settings["model"]["model"] = model or settings["model"]["model"]
        (folder / "config.json").write_text(json.dumps(settings))
        for path in (folder / "checkpoints").glob("*.pt"):
            payload = torch.load(path, weights_only=True)
            payload["protoclip"]["config"] = settings
            torch.save(payload, path)
        return folder

    yield make
    assert not marker.exists(), "a saved setting ran a command"


def refused(capsys, server, flag):
    """The message names the flag and says what to do; nothing was asked of the network."""
    message = capsys.readouterr().err
    assert flag in message and "command line" in message and "Traceback" not in message, message
    assert not server.asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", FIELDS)
def test_resume_opens_local_data_only(stranger, server, capsys, kind, field):
    folder = stranger(kind, (field,))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(["--resume", str(folder), "--device", "cpu"]) == 2
    refused(capsys, server, "--" + field.replace("_", "-"))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_preset_goes_no_further_and_data_given_again_do(stranger, server, capsys):
    folder = stranger("pipe")
    assert train(["--preset", str(folder / "config.json"), "--logs", str(folder / "logs")]) == 2
    refused(capsys, server, "--train-data")
    assert not (folder / "logs").exists()
    flags = ["--train-data", DATA, "--val-data", "", "--device", "cpu"]
    assert train(["--resume", str(folder), *flags]) == 0
    assert not server.asked


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_report_open_local_data_only(stranger, server, capsys, kind):
    folder = stranger(kind)
    for model in (folder, next((folder / "checkpoints").glob("*.pt"))):
        assert evaluate([str(model), "--device", "cpu", "--output", str(folder / "new.json")]) == 2
        refused(capsys, server, "--data")
    assert not (folder / "new.json").exists()
    assert report([str(folder), "--output", str(folder / "page.html")]) == 0
    text = (folder / "page.html").read_text()
    assert "hexagram" in text and "data:image/webp" in text and not server.asked


def test_evaluate_takes_what_the_command_line_says(stranger, server, capsys):
    folder = stranger("url")
    flags = ["--device", "cpu", "--tasks", "retrieval"]
    flags += ["--output", str(folder / "new.json")]
    assert evaluate([str(folder), "--data", DATA, *flags]) == 0 and (folder / "new.json").exists()
    assert not server.asked
    url = f"{server.url}/asked.tar"
    assert evaluate([str(folder), "--data", url, *flags]) == 2 and "/asked.tar" in server.asked
    assert "command line" not in capsys.readouterr().err


def test_a_saved_model_of_the_hub_is_not_fetched(stranger, server, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = str(stranger("url", (), model="hf-hub:stranger/model"))
    for main, argv in (
        (train, ["--resume", folder, "--device", "cpu"]),
        (evaluate, [folder, "--data", DATA, "--device", "cpu"]),
        (export, [folder, "--out", folder + "/out"]),
    ):
        assert main(argv) == 2
        refused(capsys, server, "--model")
