"""Bad data, urls, workers that die: each ends in its stated outcome."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from pairs import spoil
from ranks import bare_run, exit_codes, logs_of, losses, metrics, start_command

from protoclip.train import main


@pytest.fixture(autouse=True)
def _alone(monkeypatch, workdir):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(workdir / "cache"))
    monkeypatch.setenv("PROTOCLIP_BACKEND", "reference")  # the cache has no compiled library


def test_training_on_urls_resumes_exactly(tmp_path: Path) -> None:
    flags = bare_run(tmp_path, "--max-steps", "6", "--k", "4", "--shuffle-buffer", "20")
    flags += ["--train-data", f"file://{tmp_path}/shards/{{00000..00003}}.tar"]
    assert main([*flags, "--name", "whole"]) == 0
    run = tmp_path / "logs"
    assert main([*flags, "--name", "cut", "--save-every", "5steps"]) == 0
    # As a kill between the two renames of a save leaves it.
    (run / "cut" / "checkpoints" / "epoch_latest.pt").unlink()
    for copy in (tmp_path / "cache" / "remote").glob("*/*"):
        copy.unlink()  # as after somebody has made room
    assert main([*flags, "--resume", "auto", "--name", "cut", "--workers", "1"]) == 0
    assert "after step 5" in (run / "cut" / "out.log").read_text()
    assert losses(run / "whole") == losses(run / "cut") and len(losses(run / "cut")) == 6


def _name(folder, i):
    with tarfile.open(folder / "shards" / "00001.tar") as tar:
        return [name for name in tar.getnames() if name.endswith(".png")][i - 40]


def test_too_many_stop_the_run_with_a_clear_word(
    tmp_path: Path, error_of: Callable[..., str]
) -> None:
    flags = bare_run(tmp_path, "--max-steps", "8", "--method", "clip")
    for i in range(40, 49):
        spoil(tmp_path / "shards" / "00001.tar", _name(tmp_path, i))
    message = error_of(main, [*flags, "--name", "stops"], among_others=True)
    assert "8 of 150 samples cannot be used, more than --max-bad-fraction 0.05" in message
    assert "00001.tar" in message
    more = ["--max-bad-fraction", "0.1"]
    for workers in ("0", "1"):  # the same replacements, of which no bad sample is one
        assert main([*flags, "--name", workers, *more, "--workers", workers]) == 0
        assert metrics(tmp_path / "logs" / workers)[-1]["bad_samples"] > 0
    assert losses(tmp_path / "logs" / "0") == losses(tmp_path / "logs" / "1")


def test_too_many_of_all_ranks_stop_the_run_after_its_checkpoint(tmp_path: Path) -> None:
    """Each of two ranks meets about half of them."""
    flags = bare_run(tmp_path, "--max-steps", "9", "--method", "clip", "--batch-size", "8")
    for i in range(40, 49):
        spoil(tmp_path / "shards" / "00001.tar", _name(tmp_path, i))
    codes = exit_codes(start_command(tmp_path, [*flags, "--name", "stops"], 2, bare=True))
    assert codes == [2, 2]
    said = logs_of(tmp_path)
    assert "of 150 samples cannot be used, more than --max-bad-fraction 0.05" in said
    assert "Traceback" not in said
    more = ["--max-bad-fraction", "0.1", "--resume", str(tmp_path / "logs" / "stops")]
    assert exit_codes(start_command(tmp_path, [*flags, *more], 2, bare=True)) == [0, 0]
