"""A run that was stopped goes on as if nothing had happened: the same losses, bit for bit."""

import json
import os
import random
import shutil
import time

import pytest
import torch
from ranks import (
    TINY,
    bare_run,
    ended,
    losses,
    metrics,
    said,
    start_command,
    steps_of,
    tiny_run,
    wait_until,
)

from protoclip import checkpoint
from protoclip.step import Stepper
from protoclip.train import main

KILLS = int(os.environ.get("PROTOCLIP_KILLS", "2"))  # make faults: 20


@pytest.mark.parametrize("ranks", [1, 2] if KILLS > 2 else [1])
def test_kill_minus_nine_changes_no_bit(tmp_path, ranks):
    """Every other time inside the write of a checkpoint."""

    def started(name):
        more = "--max-steps", str(16 + 3 * KILLS), "--save-every", "1steps", "--resume", "auto"
        more += ("--episode-features", "reuse")
        return start_command(tmp_path, bare_run(tmp_path, "--name", name, *more), ranks, bare=True)

    dice = random.Random(0)
    for number in range(KILLS):
        processes, steps = started("killed"), steps_of(tmp_path, "killed")
        wait_until(lambda before=steps: steps_of(tmp_path, "killed") > before, processes, tmp_path)
        if number % 2:
            folder = tmp_path / "logs" / "killed" / "checkpoints"
            wait_until(lambda where=folder: list(where.glob("*.tmp")), processes, tmp_path)
        else:
            time.sleep(0.1 * dice.random())
        for process in processes:
            process.kill()
        ended(processes)
    for name in ("killed", "whole"):
        assert ended(started(name)) == [0] * ranks, said(tmp_path)
    whole = losses(tmp_path / "logs" / "whole")
    assert losses(tmp_path / "logs" / "killed") == whole and len(whole) == 16 + 3 * KILLS


pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Ten steps a pass over the data and four an episode: stored features have labels for all of
    an episode's samples from step 13 on."""
    folder = tmp_path_factory.mktemp("data")
    return bare_run(folder, "--max-steps", "22", "--episode-features", "reuse")


@pytest.mark.parametrize(
    "more",
    [[], ["--lit-start", "3"], ["--lit-start", "4"], ["--siglip"], ["--log-every-n-steps", "5"]],
    ids=" ".join,
)
def test_resume_ends_in_the_same_bits(tmp_path, flags, more):
    """From a checkpoint within the fourth episode, which has prototypes or, after --lit-start 3, a
    locked image tower; moments and heads included."""
    flags = [*flags, "--logs", str(tmp_path), "--save-every", "14steps", *more]
    assert main([*flags, "--name", "whole"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / checkpoint.LATEST).unlink()
    assert main([*flags, "--resume", str(tmp_path / "cut"), "--workers", "1"]) == 0
    assert "after step 14" in (tmp_path / "cut" / "out.log").read_text()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert untimed_lines(tmp_path / "cut") == untimed_lines(tmp_path / "whole")
    after = {line["step"]: line for line in metrics(tmp_path / "cut") if line["step"] > 14}
    assert ("proto_loss" in after[15]) == ("3" not in more)
    cut, whole = (checkpoint.load_newest(tmp_path / name)[1] for name in ("cut", "whole"))
    assert_same_tensors(cut["state_dict"], whole["state_dict"])
    assert_same_tensors(cut["protoclip"]["heads"], whole["protoclip"]["heads"])
    for parameter, moments in whole["optimizer"]["state"].items():
        assert_same_tensors(cut["optimizer"]["state"][parameter], moments)
    assert_same_tensors(*(end["protoclip"]["training"]["features"] for end in (cut, whole)))


def untimed_lines(run):
    """The metrics of a run, those of its episodes too, without times."""
    return [
        {k: v for k, v in line.items() if "second" not in k and k != "time"}
        for line in metrics(run)
    ]


def test_a_stop_at_an_episodes_last_step_has_stored_the_episode(tmp_path, flags, monkeypatch):
    """Steps 7 and 8 have pictures of NaN; the second one ends an episode and the run."""
    step = Stepper.step

    def poisoned(self, number, batches, *rest, **options):
        if number in (6, 7):
            batches[0].image[3] = float("nan")
        return step(self, number, batches, *rest, **options)

    monkeypatch.setattr(Stepper, "step", poisoned)
    flags = [*flags, "--logs", str(tmp_path), "--val-frequency", "0"]
    assert main([*flags, "--name", "whole"]) == 0
    assert main([*flags, "--name", "cut", "--max-bad-steps", "2"]) == 2
    stopped = checkpoint.load_newest(tmp_path / "cut")[1]["protoclip"]
    features = stopped["training"]["features"]
    assert stopped["step"] == 8 and len(features["index"]) == 0
    # Both episodes are of 64 distinct samples; the rows of the two bad steps do not count.
    assert torch.bincount(features["written"] + 1).tolist() == [150 - 96, 64, 32]
    assert main([*flags, "--resume", str(tmp_path / "cut"), "--max-bad-steps", "9"]) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    cut, whole = (checkpoint.load_newest(tmp_path / name)[1] for name in ("cut", "whole"))
    assert_same_tensors(*(end["protoclip"]["training"]["features"] for end in (cut, whole)))


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_run_goes_on_on_another_number_of_ranks(tmp_path):
    """Within an episode, whose labels are of features that other ranks have computed: 64 pairs are
    three steps a pass, an episode as well."""
    folder = tmp_path
    more = "--lr-scheduler", "const", "--warmup", "2", "--epochs", "100"
    more += ("--episode-features", "reuse")  # five steps alone are too few for "auto"

    def run(name, ranks, steps, *resume):
        size = "--batch-size", str(24 // ranks), "--max-steps", str(steps)
        argv = [*tiny_run(folder, name, *more, *size), *resume]
        assert ended(start_command(folder, argv, ranks, bare=True)) == [0] * ranks, said(folder)

    run("whole", 1, 10)
    whole = dict(losses(folder / "logs" / "whole"))
    for before, after in ((1, 2), (2, 1), (2, 4)):
        name = f"{before}-{after}"
        run(name, before, 5)
        run(name, after, 10, "--resume", f"logs/{name}")
        moved = dict(losses(folder / "logs" / name))
        assert list(moved) == list(range(1, 11))
        assert "number of ranks or passes" not in said(folder)[0]
        for step, loss in whole.items():
            assert moved[step] == pytest.approx(loss, rel=3e-4), (name, step)


def test_dropout_and_another_number_of_passes_get_a_note(tmp_path, capsys):
    model = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "patch_dropout": 0.5}}
    argv = tiny_run(
        tmp_path, "run", "--logs", str(tmp_path), "--warmup", "2", "--val-frequency", "0"
    )
    path = tmp_path / "drop.json"
    path.write_text(json.dumps(model))
    argv += ["--model", str(path)]
    assert main([*argv, "--max-steps", "2"]) == 0
    again = [*argv, "--max-steps", "4", "--resume", str(tmp_path / "run")]
    assert main([*again, "--batch-size", "5"]) == 2
    assert "was 12 and is 5" in capsys.readouterr().err
    assert main([*again, "--batch-size", "6", "--accum-freq", "2"]) == 0
    assert "number of ranks or passes" in capsys.readouterr().err


def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, flags, caplog):
    flags = [*flags, "--logs", str(tmp_path), "--name", "run", "--max-steps", "8"]
    assert main([*flags, "--save-every", "3steps"]) == 0
    whole = losses(tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / checkpoint.LATEST
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 1  # one bit
    latest.write_bytes(data)
    assert main([*flags, "--resume", str(tmp_path / "run")]) == 0
    assert "checksum is wrong" in caplog.text and "the one before" in caplog.text
    assert "after step 6" in (tmp_path / "run" / "out.log").read_text()
    assert losses(tmp_path / "run") == whole


def test_auto_starts_a_named_run_and_goes_on_with_it(tmp_path, flags, capsys):
    flags = [*flags, "--logs", str(tmp_path), "--resume", "auto"]
    assert main([*flags, "--name", ""]) == 2
    assert "--resume auto: expected --name" in capsys.readouterr().err and not any(
        tmp_path.iterdir()
    )
    for steps in (2, 4):
        assert main([*flags, "--name", "run", "--max-steps", str(steps)]) == 0
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
