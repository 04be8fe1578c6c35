"""The plan beside processes that take real steps: memory, flop, seconds; its sums by hand."""

import gc
import itertools
import os
import time

import pytest
import torch
from ranks import on_ranks
from torch.utils.flop_counter import FlopCounterMode

from protoclip import distributed
from protoclip.distributed import find_rank

CLUSTERS, SAMPLES, TEACHER = 2000, 100_000, 32


def peak_of_steps(batch_size):
    """Bytes of all tensors at the worst moment of building a model and taking two steps, counted
    by the allocator: what is resident also depends on the kernel and on what ran before."""
    distributed.start(find_rank(), torch.device("cpu"), 60)
    steps(4)  # fills caches, which are no part of the model
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        steps(batch_size)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    distributed.barrier()
    distributed.stop()
    return max(itertools.accumulate(event.nbytes() for event in events))


def steps(batch_size, count=2):
    """Build a model and an episode's tensors, and take steps; CPU seconds of each."""
    from protoclip.config import LossConfig, ModelConfig, OptimConfig
    from protoclip.data import Batch
    from protoclip.losses import ProtoLoss
    from protoclip.model import build_model
    from protoclip.prototypes import Clustering, Episode, PrototypeSet
    from protoclip.step import Stepper

    model = build_model(ModelConfig())
    stepper = Stepper(model, ProtoLoss(LossConfig()), OptimConfig())
    dim = model.image_head[-1].out_features
    tables = {name: torch.randint(CLUSTERS, (SAMPLES,)) for name in ("image", "text", "teacher")}
    held = [torch.randn(SAMPLES, TEACHER)]
    held.append(torch.randn(SAMPLES // distributed.world_size(), 2 * dim + 2))
    counts = torch.ones(CLUSTERS, dtype=torch.int64)
    clusterings = {
        name: Clustering(torch.randn(CLUSTERS, dim), labels, counts)
        for name, labels in tables.items()
    }
    pairs = [("text", "image"), ("image", "text"), ("teacher", "image"), ("teacher", "text")]
    sets = [
        PrototypeSet(
            source, student, clusterings[source], torch.randn(CLUSTERS, dim),
            torch.randn(CLUSTERS, dim), False,
        )
        for source, student in pairs
    ]  # fmt: skip
    episode = Episode(tuple(sets))
    took = []
    for _ in range(count):
        index = torch.randint(SAMPLES, (batch_size,))
        pixels = torch.randn(batch_size, 3, model.image_size, model.image_size)
        tokens = torch.randint(1, 49000, (batch_size, model.clip.context_length))
        tokens[:, -1] = 49407  # captions that fill the context, as the plan assumes
        began = time.process_time()
        stepper.step(0, [Batch(index, pixels, tokens)], episode, project=True, lr=1e-3)
        took.append(time.process_time() - began)
    assert len(held) == 2  # until here
    return took


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


def test_bytes_flop_and_seconds_by_hand():
    import dataclasses

    from protoclip.cost import CARDS, Run, Shape, flop, seconds, wire

    shape = Shape(
        weights=1000, embed_dim=8, projection_dim=4, hidden_dim=16, buffers_bytes=32,
        batch_bytes=10, saved_bytes=100, saved_fixed_bytes=0, forward_flop=5000, largest_weight=9,
    )  # fmt: skip
    run = Run(6, 1, 4, samples=1000, episode=240, clusters=10, teacher_dim=5, amp=False)
    assert (run.global_batch, run.steps, run.prototype_sets) == (24, 10, 4)
    step, episode = flop(shape, run)
    assert list(step.values()) == [
        3 * 6 * 5000,  # forward, and twice that backwards
        4 * (2 * 6 * 24 * 8),  # logits twice, and a gradient on either side
        4 * 2 * (2 * 6 * 10 * 4),  # of each set logits, and the gradient that they weigh
    ]
    assert episode == {
        "k-means": 2 * 60 * 10 * (4 + 4 + 5) * 21,
        "soft targets": 4 * 2 * 10 * 10 * (5 + 4),
        "feature extraction": 60 * 5000,
    }
    on_wire, _ = wire(shape, run)
    assert list(on_wire.values()) == [6000, 576, 576, 288, 72, 32, 768]
    card = dataclasses.replace(
        CARDS["cpu"], matmul_flops=1e6, towers_share=0.5, kernels_share=0.25, near_bandwidth=1e5
    )
    took = seconds(shape, run, card)
    assert took["towers and heads"] == pytest.approx(10 * 90000 / 5e5)
    assert took["InfoNCE, 4 products"] == pytest.approx(10 * 9216 / 2.5e5)
    # All of the gradients' 0.06 s hide behind two thirds of the towers' 0.18 s.
    assert took["waiting for the wire, in steps"] == pytest.approx(
        10 * (sum(on_wire.values()) - 6000) / 1e5
    )
    slow = seconds(shape, run, dataclasses.replace(card, near_bandwidth=1e4))
    exposed = sum(on_wire.values()) / 1e4 - 2 / 3 * 0.18
    assert slow["waiting for the wire, in steps"] == pytest.approx(10 * exposed)


def flop_of_steps(batch_size):
    """Flop of a step, as torch counts its own operators: the reference's products. More than one
    rank pass through the towers once more before the first step."""
    os.environ["PROTOCLIP_BACKEND"] = "reference"
    distributed.start(find_rank(), torch.device("cpu"), 60)
    counted = []
    for count in (1, 2):
        with FlopCounterMode(display=False) as counter:
            steps(batch_size, count)
        counted.append(counter.get_total_flops())
    distributed.barrier()
    distributed.stop()
    return counted[1] - counted[0]


@pytest.mark.parametrize(("ranks", "batch"), [(1, 128), (2, 64)])
def test_flop_are_those_of_a_step(ranks, batch):
    from protoclip.config import ModelConfig
    from protoclip.cost import Run, flop, measure_shape

    run = Run(batch, 1, ranks, SAMPLES, batch * ranks, CLUSTERS, teacher_dim=TEACHER, amp=False)
    parts = flop(measure_shape(ModelConfig(), False), run)[0]
    # The reference keeps the logits: three products instead of four.
    parts["InfoNCE, 4 products"] *= 3 / 4
    for counted in on_ranks(ranks, flop_of_steps, batch):
        print(f"{ranks} ranks: predicted {sum(parts.values()):.4g} flop, counted {counted:.4g}")
        assert sum(parts.values()) == pytest.approx(counted, rel=0.03), parts


def step_seconds(batch_size):
    """CPU seconds of a step, and flop a second of this core's matrix products."""
    distributed.start(find_rank(), torch.device("cpu"), 60)
    clock = time.process_time
    a = torch.randn(1024, 1024)
    a @ a
    began = clock()
    for _ in range(4):
        a @ a
    rate = 4 * 2 * 1024**3 / (clock() - began)
    took = []
    for _ in range(2):
        took.append(min(steps(batch_size)))
    distributed.barrier()
    distributed.stop()
    return min(took), rate


@pytest.mark.parametrize(("ranks", "batch"), [(1, 128), (2, 64), (4, 32)])
def test_seconds_are_of_the_right_size(ranks, batch):
    """Beside a core of the speed that is found here; CPU time, as ranks may share cores."""
    import dataclasses

    from protoclip.config import ModelConfig
    from protoclip.cost import CARDS, Run, flop, measure_shape, seconds

    run = Run(
        batch,
        1,
        ranks,
        SAMPLES,
        batch * ranks,
        CLUSTERS,
        teacher_dim=TEACHER,
        amp=False,
        reuse=True,
    )
    shape = measure_shape(ModelConfig(), False)
    for measured, rate in on_ranks(ranks, step_seconds, batch):
        card = dataclasses.replace(CARDS["cpu"], matmul_flops=rate)
        parts = seconds(shape, run, card)
        predicted = sum(parts[name] for name in flop(shape, run)[0])
        print(f"{ranks} ranks: predicted {predicted:.3f} s, measured {measured:.3f}")
        assert predicted / 2.5 < measured < 2.5 * predicted, parts
