"""The plan's memory against processes that take real steps; its bytes and flop by hand."""

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from protoclip import distributed
from protoclip.launchers import find_place

CLUSTERS, SAMPLES, TEACHER = 2000, 100_000, 32


def peak_of_steps(batch_size):
    """Bytes by which the process grows in two training steps with prototypes."""
    # Freed memory goes back at once, so that the process is as large as what lives in it.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    distributed.start(find_place(), torch.device("cpu"), 60)
    steps(4)  # loads code and fills caches, which are no part of the model
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    steps(batch_size)
    peak = resident("VmHWM") - before
    distributed.barrier()
    distributed.stop()
    return peak


def steps(batch_size):
    """Build a model and an episode's tensors, and take two steps."""
    from protoclip.config import LossConfig, ModelConfig, OptimConfig
    from protoclip.data import Batch
    from protoclip.device import autocast_for
    from protoclip.episode import Episode, PrototypeSet
    from protoclip.losses import ProtoLoss
    from protoclip.model import build_model
    from protoclip.training.engine import Optimiser
    from protoclip.training.phases import Phases
    from protoclip.training.stepper import Stepper

    cpu = torch.device("cpu")
    model = build_model(ModelConfig())
    optimiser = Optimiser(model, OptimConfig(), "fp32")
    stepper = Stepper(
        model, ProtoLoss(LossConfig()), optimiser, autocast_for("fp32", cpu), Phases(cpu), cpu
    )
    dim = model.image_head[-1].out_features
    tables = {name: torch.randint(CLUSTERS, (SAMPLES,)) for name in ("image", "text", "teacher")}
    held = [torch.randn(SAMPLES, TEACHER), *(torch.randn(CLUSTERS, dim) for _ in range(3))]
    held.append(torch.randn(SAMPLES // distributed.world_size(), 2 * dim + 2))
    pairs = [("text", "image"), ("image", "text"), ("teacher", "image"), ("teacher", "text")]
    sets = [
        PrototypeSet(
            source, student, torch.randn(CLUSTERS, dim), torch.randn(CLUSTERS, dim),
            tables[source], torch.ones(CLUSTERS, dtype=torch.int64),
        )
        for source, student in pairs
    ]  # fmt: skip
    episode = Episode(tuple(sets[:2]), tuple(sets[2:]))
    for _ in range(2):
        index = torch.randint(SAMPLES, (batch_size,))
        pixels = torch.randn(batch_size, 3, model.image_size, model.image_size)
        tokens = torch.randint(1, 49000, (batch_size, model.clip.context_length))
        tokens[:, -1] = 49407  # captions that fill the context, as the plan assumes
        stepper.step([Batch(index, pixels, tokens)], episode, True)
    assert len(held) == 5  # until here


def resident(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize(("ranks", "batch"), [(1, 64), (2, 32), (4, 16)])
def test_memory_is_within_15_percent(ranks, batch):
    from protoclip.config import ModelConfig
    from protoclip.cost import CARDS, Run, measure_shape, memory

    run = Run(
        batch, 1, ranks, SAMPLES, SAMPLES, CLUSTERS, sources=3, teacher_dim=TEACHER, amp=False
    )
    parts = memory(measure_shape(ModelConfig(), False), run, CARDS["cpu"])
    predicted = sum(parts.values())
    for measured in on_ranks(ranks, peak_of_steps, batch):
        print(
            f"{ranks} ranks: predicted {predicted / 2**20:.1f} MiB, measured {measured / 2**20:.1f}"
        )
        assert predicted == pytest.approx(measured, rel=0.15), parts
