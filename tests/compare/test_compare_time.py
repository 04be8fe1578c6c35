"""What the methods of a comparison are timed by."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Event

import pytest
import torch

from protoclip.common import phases
from protoclip.common.phases import Phases, work_seconds

CPU = torch.device("cpu")


def test_training_is_what_is_no_teacher_evaluation_checkpoint_or_plot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(phases, "work_seconds", lambda device: now)
    run = Phases(CPU)
    with run.measure("teacher"):
        now += 5
    with run.measure("evaluation"):  # before training
        now += 7
    with run.measure("data"):
        now += 1
    now += 2  # between the phases
    with run.measure("forward"):
        now += 3
    with run.measure("evaluation"):
        now += 11
    with run.measure("checkpoint"):
        now += 13
        saved = run.saved()
    now += 4  # loaders that end after the last step
    assert run.work() == {"teacher": 5, "evaluation": 18, "checkpoint": 13, "training": 10}
    assert saved["training"] == 6 and "training" not in run.seconds()
    resumed = Phases(CPU)
    resumed.add(saved)
    with resumed.measure("forward"):
        now += 2
    assert resumed.work()["training"] == saved["training"] + 2
    assert resumed.seconds().keys() >= {"data", "forward"}


def burn(done: Event) -> None:
    while time.process_time() < 0.3:
        pass
    done.set()
    time.sleep(600)


def test_loaders_count_while_they_live_and_afterwards() -> None:
    context = multiprocessing.get_context("fork")
    done = context.Event()
    before = work_seconds(CPU)
    loader = context.Process(target=burn, args=(done,), daemon=True)
    loader.start()
    assert done.wait(120)
    living = work_seconds(CPU) - before
    loader.terminate()
    loader.join()
    assert living >= 0.25 and work_seconds(CPU) - before >= 0.25
