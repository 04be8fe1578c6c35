"""Disks that are full, folders that cannot be written, checkpoints that are torn."""

import contextlib
import json
import os
import resource

import pytest
import torch
from fault_runs import prepare

from protoclip import checkpoint
from protoclip.config import RunConfig, TrainConfig
from protoclip.train import main
from protoclip.training.append_log import AppendLog
from protoclip.training.loop import Trainer
from protoclip.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("protoclip.train.draw_plots", lambda *_: None)


@contextlib.contextmanager
def full_disk(room):
    """Files cannot grow past ``room`` bytes: the system refuses the write as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.ones(3)})
    with full_disk(100_000), pytest.raises(OSError, match="(too large|No space).*c.pt"):
        checkpoint.save(path, {"a": torch.zeros(1_000_000)})
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_training_outlives_a_full_disk(tmp_path, monkeypatch):
    flags = [*prepare(tmp_path), "--max-steps", "9", "--k", "4", "--name", "run"]
    save = Trainer.save

    def on_full_disk(self, epoch):
        with full_disk(1_000_000 if self.step == 6 else resource.RLIM_INFINITY):
            save(self, epoch)

    monkeypatch.setattr(Trainer, "save", on_full_disk)
    assert main([*flags, "--save-every", "3steps"]) == 0
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "checkpoint after step 6 not written" in log and "untouched" in log
    payload = checkpoint.load(tmp_path / "logs" / "run" / "checkpoints" / checkpoint.PREVIOUS)
    assert payload["protoclip"]["step"] == 3
    assert len((tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()) == 9


def test_a_run_whose_last_checkpoint_fails_says_so(tmp_path, monkeypatch, capsys):
    flags = [*prepare(tmp_path), "--max-steps", "2", "--method", "clip", "--name", "run"]
    save = Trainer.save

    def on_full_disk(self, epoch):
        with full_disk(1_000_000):
            save(self, epoch)

    monkeypatch.setattr(Trainer, "save", on_full_disk)
    assert main(flags) == 2
    message = capsys.readouterr().err
    assert "epoch_latest.pt" in message and "Traceback" not in message


def test_lines_wait_for_room_on_the_disk(tmp_path):
    said = []
    log = AppendLog(tmp_path / "metrics.jsonl", said.append)
    log.write('{"step": 1}')
    with full_disk(20):
        log.write('{"step": 2, "loss": 1.0}')
        log.write('{"step": 3}')
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    log.write('{"step": 4}')
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert len(said) == 1 and "make room" in said[0]


def test_lines_that_never_find_room_are_said(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run", TrainConfig(run=RunConfig(report_to="none")))
    folder.metrics(1, 16, {"loss": 5.0})
    with full_disk(0):
        for step in range(2, 12):
            folder.metrics(step, 16 * step, {"loss": 5.0 - step})
        folder.close()
        folder.close()
    said = capsys.readouterr().err.splitlines()
    assert sum("10 lines are missing" in line for line in said) == 1
    shown = [json.loads(line)["step"] for line in said if line.startswith("{")]
    assert shown == [7, 8, 9, 10, 11]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]


def test_tensorboard_gives_up_in_words_on_a_full_disk(tmp_path, capsys):
    """Its writer is a thread, whose error arrives later, and may arrive at the end only."""
    for lines in (1, 100):
        config = TrainConfig(run=RunConfig(report_to="tensorboard"))
        folder = RunFolder(tmp_path / str(lines), config)
        with full_disk(0):
            for step in range(lines):
                folder.metrics(step, step, {f"value {i}": 1.0 for i in range(20)})
            folder.close()
        said = capsys.readouterr().err
        assert "tensorboard: File too large" in said and "Traceback" not in said


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Root may write anywhere, so a child process gives that up first."""
    folder = tmp_path / "logs"
    (folder / "run").mkdir(parents=True)
    for path in (folder / "run", folder):
        path.chmod(0o555)
    tmp_path.chmod(0o755)
    for path in tmp_path.parents:
        if path.name.startswith(("pytest-", "popen-")):  # the latter: pytest-xdist's
            path.chmod(0o755)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        words = []
        if os.getuid() == 0:
            os.setuid(65534)
        for name, resume in (("new", None), ("run", 0)):
            try:
                RunFolder(folder / name, TrainConfig(), resume)
            except ValueError as error:
                words.append(str(error))
            except BaseException as error:
                words.append(repr(error))
        os.write(write, json.dumps(words).encode())
        os._exit(0)
    os.waitpid(child, 0)
    words = json.loads(os.read(read, 10_000))
    assert len(words) == 2 and all("Permission denied" in w and "folder" in w for w in words), words
    assert "logs/new" in words[0] and "logs/run" in words[1]


@pytest.mark.parametrize("how", ["cut", "bit", "comment", "empty", "text"])
def test_a_torn_checkpoint_is_told_from_a_whole_one(tmp_path, how):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"a": torch.arange(1000), "n": 3})
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:middle],
            "bit": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "comment": data[:-1] + b"?",
            "empty": b"",
            "text": b"not a checkpoint at all\n" * 50,
        }[how]
    )
    with pytest.raises(ValueError, match="torn or no checkpoint"):
        checkpoint.load(path)


def test_a_pickle_of_a_stranger_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "made").exists()


def test_torch_and_open_clip_read_a_sealed_file(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"state_dict": {"w": torch.ones(2)}})
    for options in ({}, {"mmap": True}):
        assert torch.equal(torch.load(path, **options)["state_dict"]["w"], torch.ones(2))
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")  # no seal: OpenCLIP's
    assert torch.equal(checkpoint.load(tmp_path / "plain.pt")["w"], torch.ones(2))
