"""A run that was stopped goes on as if nothing had happened: the same losses, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from protoclip import checkpoint
from protoclip.prototypes import Clustering, Episode, PrototypeSet
from protoclip.train import main
from protoclip.training.append_log import AppendLog, cut_back
from protoclip.training.run_folder import FolderLock
from protoclip.training.saving import SaveSchedule, Stopped, StopSignals
from protoclip.training.state import pack, random_states, set_random_state, unpack

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def test_kill_minus_nine_changes_no_bit_and_loses_no_sample():
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_runs.py"), "--kills", "2", "--epochs", "2"],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 2" in done.stdout


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    sys.path.insert(0, str(HERE))
    import fault_runs

    folder = tmp_path_factory.mktemp("data")
    return [*fault_runs.prepare(folder), "--max-steps", "14", "--k", "4"]


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("protoclip.train.draw_plots", lambda *_: None)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(r["step"], r["loss"]) for r in lines(folder) if "loss" in r]


def test_a_signal_saves_and_ends_well_and_resume_is_exact(tmp_path, flags, monkeypatch):
    flags = [*flags, "--logs", str(tmp_path)]
    assert main([*flags, "--name", "whole"]) == 0
    from protoclip.training.loop import Trainer

    log = Trainer._log

    def then_signal(self, *rest):
        log(self, *rest)
        if self.step == 6:  # in the second episode, which has prototypes
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Trainer, "_log", then_signal)
    assert main([*flags, "--name", "cut", "--workers", "1"]) == 0
    assert [step for step, _ in losses(tmp_path / "cut")] == list(range(1, 7))
    monkeypatch.undo()
    monkeypatch.setattr("protoclip.train.draw_plots", lambda *_: None)
    assert main([*flags, "--resume", str(tmp_path / "cut")]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ends = [checkpoint.load_newest(tmp_path / n)[1] for n in ("cut", "whole")]
    for one, other in ((e["state_dict"] for e in ends), (e["protoclip"]["heads"] for e in ends)):
        assert all(torch.equal(one[key], other[key]) for key in other)
    moments = [e["optimizer"]["state"] for e in ends]
    assert all(
        torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[1] for k in moments[1][i]
    )
    assert main([*flags, "--name", "cut", "--resume", "auto"]) == 0  # nothing left to do
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_signals_are_heard_and_handed_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.immediate = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == "SIGTERM"
        signals.immediate = True  # nothing to save here: end where the program stands
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_stops_at_once_where_nothing_is_to_be_saved(tmp_path, flags, capsys):
    """While data are opened; within the decoding of a picture, where any error means a bad one."""
    from protoclip import train as command
    from protoclip.data import images

    shards = flags[flags.index("--train-data") + 1]
    flags = [*flags, "--logs", str(tmp_path), "--max-steps", "3", "--name", "run"]
    flags += ["--val-data", shards]
    for module, name in ((command, "open_training_data"), (images, "to_rgb")):
        original = getattr(module, name)

        def then_signal(*args, original=original):
            os.kill(os.getpid(), signal.SIGUSR1)
            return original(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, then_signal)
            assert main(flags) == 0
        assert "stopped by SIGUSR1" in capsys.readouterr().err
        assert (tmp_path / "run").exists() == (module is images)
    assert not losses(tmp_path / "run")
    assert main([*flags, "--resume", "auto"]) == 0
    assert len(losses(tmp_path / "run")) == 3


def test_resume_refuses_what_it_cannot_do(tmp_path, flags, capsys):
    flags = [*flags, "--logs", str(tmp_path)]
    short = ["--max-steps", "3", "--name", "short"]
    assert main([*flags, *short]) == 0
    run = str(tmp_path / "short")
    for extra, words in (
        (["--batch-size", "8"], "optim.batch_size was 16 and is 8"),
        (["--seed", "4"], "run.seed"),
        (["--train-data", "builtin:shapes:150"], "not those of"),
        (["--resume", str(tmp_path / "nowhere")], "found nothing"),
        (["--resume", ""], "--resume"),  # the folder is taken
        (["--save-every", "often"], "500steps"),
    ):
        assert main([*flags, *short, "--resume", run, *extra]) == 2, extra
        message = capsys.readouterr().err
        assert words in message and "Traceback" not in message
    lock = FolderLock(tmp_path / "short")
    assert main([*flags, *short, "--resume", run]) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    lock.release()
    assert main([*flags, "--resume", run, "--lr", "1e-4"]) == 0  # longer, and another rate: said
    assert "lr was 0.003" in (tmp_path / "short" / "out.log").read_text()
    assert len(losses(tmp_path / "short")) == 14


def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, flags, caplog):
    flags = [*flags, "--logs", str(tmp_path), "--name", "run", "--max-steps", "8"]
    assert main([*flags, "--save-every", "3steps"]) == 0
    whole = losses(tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / checkpoint.LATEST
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    latest.write_bytes(data)
    (tmp_path / "run" / "results.json").unlink(missing_ok=True)
    assert main([*flags, "--resume", str(tmp_path / "run")]) == 0
    assert "checksum is wrong" in caplog.text and "the one before" in caplog.text
    assert "after step 6" in (tmp_path / "run" / "out.log").read_text()
    assert losses(tmp_path / "run") == whole


def test_auto_takes_the_newest_unfinished_run_of_these_settings(tmp_path, flags):
    flags = [*flags, "--logs", str(tmp_path), "--max-steps", "4"]
    for name, extra in (("old", []), ("other", ["--lr", "0.5"]), ("new", [])):
        assert main([*flags, "--name", name, *extra]) == 0
        (tmp_path / name / "results.json").unlink(missing_ok=True)
        (tmp_path / name / "done").unlink(missing_ok=True)
        time.sleep(0.02)
    runs = {path.name for path in tmp_path.iterdir()}
    assert main([*flags, "--resume", "auto"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == runs
    assert "resumed" in (tmp_path / "new" / "out.log").read_text()
    assert "resumed" not in (tmp_path / "old" / "out.log").read_text()


def test_state_survives_packing():
    labels = torch.tensor([0, 1, -100])
    clustering = Clustering(torch.rand(2, 3), labels, torch.tensor([1, 1]))
    one = PrototypeSet("text", "image", clustering, torch.rand(2, 3), None, False)
    episode = Episode((one,), metrics={"a": 1.5})
    classes = {cls.__name__: cls for cls in (Episode, Clustering, PrototypeSet)}
    back = unpack(pack(episode), classes, CPU)
    assert isinstance(back, Episode) and back.metrics == {"a": 1.5}
    assert torch.equal(back.clusterings["text"].labels, labels)
    with pytest.raises(ValueError, match="cannot take its Clustering"):
        unpack(pack(episode), {}, CPU)


def test_random_states_come_back():
    import random

    import numpy as np

    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand()

    state = random_states(CPU)
    first = draw()
    set_random_state(state, CPU)
    assert draw() == first
    with pytest.raises(ValueError, match="of 2 ranks, this run has 1"):
        set_random_state(state * 2, CPU)


def test_save_schedules(monkeypatch):
    assert [SaveSchedule("5steps").at(step) for step in (4, 5, 10)] == [False, True, True]
    clock = SaveSchedule("2m")
    assert not clock.by_clock()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert clock.by_clock() and not SaveSchedule("").by_clock()
    clock.saved()
    assert not clock.by_clock()


def test_a_metrics_file_is_cut_back_and_keeps_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = AppendLog(path, print)
    for step in range(1, 5):
        log.write(json.dumps({"step": step}))
    log.close()
    path.write_text(path.read_text() + '{"step": 1, "lo')
    assert cut_back(path, 2) == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
