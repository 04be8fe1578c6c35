"""The stopwatch of a run."""

import time

import pytest
import torch

from protoclip.training.phases import Phases


def test_a_phase_inside_another_is_counted_once():
    phases = Phases(torch.device("cpu"))
    began = time.perf_counter()
    with phases.measure("forward"):
        time.sleep(0.02)
        with phases.measure("prototypes"):
            time.sleep(0.04)
            with phases.measure("prototypes"):
                time.sleep(0.01)
    elapsed = time.perf_counter() - began
    seconds = phases.seconds()
    assert seconds["prototypes"] >= 0.05 and seconds["forward"] >= 0.02
    assert sum(seconds.values()) == pytest.approx(elapsed, abs=0.01)
