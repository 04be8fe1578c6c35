"""The stopwatch of a run."""

import torch

from protoclip.training import phases as module
from protoclip.training.phases import Phases


def test_a_phase_inside_another_is_counted_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    phases = Phases(torch.device("cpu"))
    with phases.measure("forward"):
        now[0] += 2
        with phases.measure("prototypes"):
            now[0] += 4
            with phases.measure("prototypes"):
                now[0] += 1
        now[0] += 8
    assert phases.seconds() == {"prototypes": 5, "forward": 10}
