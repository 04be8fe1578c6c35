"""The plan beside processes that take real steps, and its sums by hand."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import in_group
from steps import trainer_of

import protoclip
from protoclip import distributed
from protoclip.model import processor_multiplies_bf16
from protoclip.plan import build_run, cpu_scratch, main, measure_shape, memory

CLUSTERS = 2000
SAMPLES = 100_000
TEACHER_DIM = 32
LATE = 6  # steps


def peak_of_steps(batch_size: int) -> int:
    """Bytes of all tensors at the worst moment of a model's step, counted by the allocator: what is
    resident also depends on the kernel and on what ran before. DDP replaces its buckets in the
    second step, so it is the least of the steps after it. The profiler does not see what a thread
    of gloo frees: that is left in the end, when all tensors are gone."""
    steps(4)  # fills caches, which are no part of the model
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        steps(batch_size)
        gc.collect()  # the trainer is in a circle
    events = profile.profiler.kineto_results.events()
    late = [event for event in events if event.name() == "late step"]
    allocations = [event for event in events if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    held = [*itertools.accumulate(event.nbytes() for event in allocations)]
    distributed.sum_over_ranks(torch.zeros(1))  # all have come as far
    assert len(late) == LATE
    gone_unseen = held[-1]
    least = min(
        max(
            size
            for size, event in zip(held, allocations, strict=True)
            if step.start_ns() <= event.start_ns() <= step.start_ns() + step.duration_ns()
        )
        for step in late
    )
    return least - gone_unseen


def steps(batch_size: int) -> None:
    """Build a model and an episode's tensors, and take two steps and the late ones."""
    from protoclip.data import Batch
    from protoclip.episodes.prototypes import Episode, PrototypeSet
    from protoclip.model import build_model
    from protoclip.settings.config import ModelConfig

    model = build_model(ModelConfig())
    dim = model.image_head[-1].out_features
    held = [torch.randn(SAMPLES, TEACHER_DIM)]
    rows = SAMPLES // distributed.world_size()
    for _ in range(2):  # the rows of the episode, which is an epoch, and those of the data
        held.append(torch.zeros(rows, 2 * dim + 2, dtype=torch.bfloat16))
    pairs = [("text", "image"), ("image", "text"), ("external", "image"), ("external", "text")]
    sets = [
        PrototypeSet(source, student, torch.randn(CLUSTERS, dim), torch.randn(CLUSTERS, dim))
        for source, student in pairs
    ]
    sources = {source for source, _ in pairs}
    episode = Episode(
        positions=torch.arange(SAMPLES),
        labels={name: torch.randint(CLUSTERS, (SAMPLES,), dtype=torch.int32) for name in sources},
        centroids={name: torch.randn(CLUSTERS, dim) for name in sources},
        sets=tuple(sets),
    )
    trainer = trainer_of(model, episode, "--w-proto", "1")
    for step in range(2 + LATE):
        index = torch.randint(SAMPLES, (batch_size,))
        pixels = torch.randn(batch_size, 3, model.image_size, model.image_size)
        tokens = torch.randint(1, 49000, (batch_size, model.clip.context_length))
        tokens[:, -1] = 49407  # captions that fill the context, as the plan assumes
        distributed.sum_over_ranks(torch.zeros(1))
        with torch.profiler.record_function("late step" if step >= 2 else "step"):
            trainer.take_step(0, [Batch(index, pixels, tokens)])
    assert len(held) == 3  # until here


def run_of(*flags: object) -> Any:
    run, *_ = build_run([str(flag) for flag in flags])
    return run


@pytest.mark.parametrize(("ranks", "batch"), [(1, 64), (2, 32)])
def test_memory_is_within_15_percent(ranks: int, batch: int) -> None:
    run = run_of(
        "--device", "cpu", "--precision", "fp32",
        "--batch-size", batch, "--ranks", ranks, "--samples", SAMPLES,
        "--k", CLUSTERS, "--external-teacher", "f.npy", "--external-teacher-dim", TEACHER_DIM,
        "--w-proto", "1",
    )  # fmt: skip
    parts = memory(measure_shape(run), run)
    predicted = sum(parts.values())
    for measured in in_group(ranks, peak_of_steps, batch):
        assert predicted == pytest.approx(measured, rel=0.15), parts


def saved_for_backward(*flags: str, precision: str = "fp32") -> int:
    """Bytes, of a model with several blocks in each tower."""
    flags = ("--precision", precision, *flags)
    run = run_of("--device", "cpu", "--method", "clip", "--model", "protoclip-tiny", *flags)
    return memory(measure_shape(run), run)["saved for backward"]


def test_settings_of_the_towers_count() -> None:
    plain = saved_for_backward()
    assert saved_for_backward("--grad-checkpointing") < 0.6 * plain
    assert 0.4 * plain < saved_for_backward(precision="amp_bf16") < 0.7 * plain
    assert saved_for_backward("--lock-image") < plain


def parts_of(*flags: object) -> dict[str, float]:
    run = run_of("--precision", "fp32", *flags)
    return memory(measure_shape(run), run)


def parts_of_clip(*flags: object, device: str = "cpu") -> dict[str, float]:
    return parts_of("--device", device, "--method", "clip", *flags)


def test_logits_that_the_loss_keeps_count() -> None:
    """On one CPU process up to 64 MiB; SigLIP's loss and those over ranks keep none."""
    assert parts_of_clip("--batch-size", 1024)["kept logits"] == 4 * 1024**2
    assert "kept logits" not in parts_of_clip("--batch-size", 8192)
    assert "kept logits" not in parts_of_clip("--batch-size", 1024, "--siglip")
    over_ranks = parts_of_clip("--batch-size", 512, "--ranks", 2)
    assert over_ranks["kept logits"] == 4 * 512 * 1024
    assert "kept logits" not in parts_of_clip(device="cuda")


@pytest.mark.skipif(
    bool(protoclip.backends("info_nce")["cpu"]), reason="the C++ backend is not here"
)
@pytest.mark.parametrize(
    ("n", "m", "d", "dtype", "rounding"),
    [
        (256, 256, 512, torch.float32, 1 << 19),  # small blocks are whole pages of 4 KiB
        (256, 256, 512, torch.bfloat16, 1 << 19),
        # More than a block of G, in 2 MiB pages; then four more buffers.
        (1100, 4500, 256, torch.float32, 2 << 20),
        (1100, 4500, 2048, torch.bfloat16, 10 << 20),
    ],
)
def test_scratch_of_a_cpu_is_what_its_kernels_take(
    n: int, m: int, d: int, dtype: torch.dtype, rounding: int
) -> None:
    """What a gradient pass has taken it leaves to the next one, which takes no more."""
    native = torch.ops.protoclip_native
    x = torch.randn(n, d, dtype=dtype)
    y = torch.randn(m, d, dtype=dtype)
    scale = torch.tensor(0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        native.release_memory()
        for _ in range(2):
            native.sigmoid_loss(x, y, scale, scale, 0, None, None, False, True)
            taken = native.idle_memory()
            tile = d * 64 * x.element_size() + (1 << 17)  # of a thread
            bf16 = dtype == torch.bfloat16 and processor_multiplies_bf16()
            planned = cpu_scratch(n, m, d, bf16)
            assert planned <= taken <= planned + tile + rounding
    finally:
        torch.set_num_threads(threads)
        native.release_memory()


def test_scratch_of_a_gpu_is_bounded_for_each_loss() -> None:
    shape_and_scratch = {}
    for batch in (256, 65536):
        parts = parts_of(
            "--device", "cuda", "--batch-size", batch, "--w-proto", 1, "--k", 5000,
            "--episode-size", 100_000,
        )  # fmt: skip
        shape_and_scratch[batch] = parts["InfoNCE scratch"], parts["prototype scratch"]
    info_nce, prototypes = shape_and_scratch[256]
    assert 4 * 256**2 < info_nce < 8 << 20 and prototypes == 4 * 256 * 5000
    info_nce, prototypes = shape_and_scratch[65536]
    assert info_nce > 128 << 20 and prototypes == 256 << 20


@pytest.mark.smoke
def test_the_command_takes_trains_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "paper-cc3m-8gpu", "--ranks", "8", "--samples", "2500000"]) == 0
    text = capsys.readouterr().out
    assert "64 x 1 passes x 8 ranks; 391 steps per episode of 200,000" in text


def test_the_command_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--episode-size", "512", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["global_batch"] == 256 and sizes["memory_bytes"]["weights"] > 1e6


def test_an_episode_is_no_larger_than_the_data() -> None:
    small = parts_of("--device", "cpu", "--samples", 10_000)
    assert parts_of("--device", "cpu", "--train-num-samples", 10_000) == small
    assert parts_of("--device", "cpu", "--samples", 10_000, "--episode-size", 1_000_000) == small


def test_the_matrices_of_distillation_count() -> None:
    flags = ("--device", "cpu", "--external-teacher", "builtin:minilm", "--batch-size", 4096)
    plain = parts_of(*flags)
    assert parts_of(*flags, "--w-distill", 1) == plain | {"distillation": 15 * 4096**2 * 4}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k", "600", "--episode-size", "512"], "got k=600 for the 512 samples"),
        (["--batch-size", "512", "--samples", "500"], "expected at most 500 pairs in all, got 512"),
        (["--model", "no-such"], "--model: OpenCLIP knows no model 'no-such'"),
    ],
)
def test_mistakes_are_refused_in_words(
    error_of: Callable[..., str], flags: list[str], words: str
) -> None:
    assert words in error_of(main, flags)
