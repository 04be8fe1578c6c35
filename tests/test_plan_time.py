"""The predicted time of a step: its bytes beside those that ranks send, its sums by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from protoclip import distributed
from protoclip.distributed import find_rank
from protoclip.plan import main, rates_of
from protoclip.training.memory_plan import PlannedRun, build_run
from protoclip.training.time_plan import (
    Rates,
    Work,
    collectives,
    measure_work,
    predict,
    predict_all,
)

PAIRS = 6
TEACHER_DIM = 5
KINDS = {  # of torch.distributed's operators
    "allreduce_": "reduce",
    "_allgather_base_": "gather",
    "_reduce_scatter_base_": "scatter",
    "broadcast_": "broadcast",
    "send": "send",
}
CASES = {
    "clip": ["--method", "clip"],
    "prototypes": ["--w-proto", "1"],
    "a teacher's prototypes, batch norm by rank": ["--no-use-bn-sync"],
    "distillation": ["--w-distill", "1", "--w-proto-external", "0", "--w-proto", "0"],
    "siglip": ["--method", "clip", "--siglip"],
    "captions": ["--method", "clip", "--dedup", "caption"],
    "accumulation in bf16": ["--accum-freq", "2", "--precision", "amp_bf16"],
    "locked": ["--method", "clip", "--lock-image"],
}


def planned(nano: str, *flags: object) -> PlannedRun:
    words = [
        "--device", "cpu", "--precision", "fp32", "--model", nano, "--batch-size", PAIRS,
        "--samples", 500, "--k", 4, "--external-teacher", "f.npy",
        "--external-teacher-dim", TEACHER_DIM, *flags,
    ]  # fmt: skip
    run, _ = build_run([str(word) for word in words])
    return run


class Sent(TorchDispatchMode):
    """Adds up the bytes of collective calls, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if op.namespace == "c10d":
            name = op._opname
            if name in KINDS:
                # A gather is counted by its result, the first argument; a scatter by its input.
                tensors = arguments[1] if name == "_reduce_scatter_base_" else arguments[0]
                tensors = tensors if isinstance(tensors, list) else [tensors]
                self.bytes[KINDS[name]] += sum(tensor.nbytes for tensor in tensors)
                self.calls[KINDS[name]] += 1
            else:
                assert name == "recv_", name
        return op(*arguments, **(options or {}))


def sent_in_a_step(run: PlannedRun) -> dict[str, int]:
    """Bytes by kind of this rank's calls in its second step: the first orders DDP's buckets."""
    from protoclip.data import Batch
    from protoclip.episodes.prototypes import EXTERNAL, Episode, PrototypeSet
    from protoclip.losses import ProtoLoss
    from protoclip.model import build_model
    from protoclip.training.checks import active_losses, loss_weights
    from protoclip.training.step import Stepper

    distributed.start(find_rank(), torch.device("cpu"), 60)
    config = run.config
    active = active_losses(config, has_teacher=True)
    model = build_model(config.model)
    teacher = torch.randn(100, TEACHER_DIM)
    loss = ProtoLoss(loss_weights(config, has_teacher=True), teacher)
    stepper = Stepper(model, loss, config.optim, config.run.precision)
    pairs = [("image", "text"), ("text", "image")] if active.internal else []
    pairs += [(EXTERNAL, "image"), (EXTERNAL, "text")] if active.external else []
    prototypes = torch.ones(4, model.projection_dim)
    sets = tuple(PrototypeSet(source, student, prototypes, None) for source, student in pairs)
    labels = {source: torch.zeros(100, dtype=torch.int32) for source, _ in pairs}
    episode = Episode(torch.arange(100), labels, {}, sets) if sets else None
    pixels = torch.randn(PAIRS, 3, model.image_size, model.image_size)
    tokens = model.short_tokenizer(["a red circle"] * PAIRS)
    batch = Batch(torch.arange(PAIRS), pixels, tokens)
    batches = [batch] * config.optim.accum_freq
    stepper.step(0, batches, episode, project=active.projects, lr=1e-3)
    with Sent() as sent:
        stepper.step(1, batches, episode, project=active.projects, lr=1e-3)
    distributed.stop()
    return dict(sent.bytes)


@pytest.mark.parametrize(
    ("case", "ranks"), [*((case, 2) for case in CASES), ("prototypes", 4), ("siglip", 4)]
)
def test_predicted_bytes_are_those_that_ranks_send(case: str, ranks: int, nano: Path) -> None:
    run = planned(str(nano), "--ranks", ranks, *CASES[case])
    predicted: Counter[str] = Counter()
    for call in collectives(measure_work(run), run):
        predicted[call.kind] += call.bytes
    for counted in on_ranks(ranks, sent_in_a_step, run):
        assert counted == dict(predicted)


def test_one_process_sends_nothing(nano: Path) -> None:
    run = planned(str(nano))
    assert collectives(measure_work(run), run) == []


WORK = Work(
    flops=3e9,
    forward_flops=1e9,
    embed_dim=512,
    projection_dim=128,
    trained_weights=10_000_000,
    head_weights=0,
    global_norms=(),
    statistics_bytes=(),
)
RATES = Rates(
    flops=1e12,
    nvlink=100e9,
    infiniband=10e9,
    latency=0,
    gpus_per_machine=8,
    pairs_per_worker=1e9,
)


def clip_of(ranks: int, *flags: object) -> PlannedRun:
    words = ["--method", "clip", "--batch-size", 100, "--ranks", ranks, *flags]
    return build_run([str(word) for word in words])[0]


def test_sums_by_hand() -> None:
    prediction = predict(WORK, clip_of(8), RATES)
    rows = 800
    assert prediction.towers == pytest.approx(100 * 3e9 / 1e12)
    assert prediction.losses == pytest.approx(8 * 100 * rows * 512 / 1e12)
    assert prediction.gathered_bytes == rows * 512 * 2 + rows * 4
    assert prediction.reduced_bytes == rows * 512 * 4 + 2 * rows * 4 + 4 * 10_000_000
    # The gradient, 0.7 ms, is hidden behind 200 ms of backward pass.
    in_ring = 7 / 8 * (rows * 512 * 2 + rows * 4 + rows * 512 * 4 + 2 * 2 * rows * 4)
    assert prediction.network == pytest.approx(in_ring / 100e9)
    assert prediction.bound == "towers"


def test_the_slowest_link_and_the_latency_count() -> None:
    one = predict(WORK, clip_of(8), replace(RATES, latency=1e-3))
    # Six calls but the gradient's, whose own is hidden.
    assert one.network - predict(WORK, clip_of(8), RATES).network == pytest.approx(5e-3)
    two = predict(WORK, clip_of(16), RATES)
    assert two.network > 10 * predict(WORK, clip_of(8), RATES).network
    slow = replace(RATES, infiniband=1e8)
    exposed = predict(WORK, clip_of(16), slow)
    gradient = 2 * 15 / 16 * 4e7 / 1e8
    assert exposed.network > gradient - 0.2 > 0
    assert exposed.bound == "network"


def test_what_bounds_a_step() -> None:
    slow_data = replace(RATES, pairs_per_worker=10.0)
    prediction = predict(WORK, clip_of(8), slow_data)
    assert prediction.bound == "data" and prediction.seconds == 100 / (8 * 10)
    assert predict(WORK, clip_of(8, "--workers", 2), slow_data).seconds == 100 / (2 * 10)
    assert predict(WORK, clip_of(8, "--workers", 0), slow_data).seconds == 100 / 10
    no_towers = replace(WORK, flops=3e3, forward_flops=1e3)
    assert predict(no_towers, clip_of(8), RATES).bound == "network"
    assert predict(no_towers, clip_of(8), replace(RATES, nvlink=1e15)).bound == "losses"


def test_passes_prototypes_and_heads_count(nano: Path) -> None:
    twice = predict(WORK, clip_of(8, "--accum-freq", 2), RATES)
    assert twice.towers == pytest.approx(200 * 4e9 / 1e12)
    more = clip_of(8, "--method", "protoclip", "--w-proto", 1, "--k", 1000, "--samples", 100_000)
    extra = predict(WORK, more, RATES).losses - predict(WORK, clip_of(8), RATES).losses
    assert extra == pytest.approx(4 * 2 * 2 * 100 * 1000 * 128 / 1e12)  # both kinds, two students


def test_flops_of_towers_are_counted() -> None:
    """OpenCLIP's table of models says 14.78 GFLOPs for a pair of ViT-B-32."""
    work = measure_work(clip_of(8, "--model", "ViT-B-32"))
    assert work.forward_flops == pytest.approx(14.78e9, rel=0.02)
    assert work.flops == pytest.approx(3 * work.forward_flops, rel=0.02)
    locked = measure_work(clip_of(8, "--model", "ViT-B-32", "--lock-image"))
    assert locked.forward_flops < locked.flops < 0.7 * work.flops


def test_the_command_predicts_for_8_to_1024_gpus(
    nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(nano), "--ranks", "24", "--tflops", "100"]
    assert main([*flags, "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]
    run, values = build_run(flags)
    expected = predict_all(measure_work(run), run, rates_of(values))
    assert [row["ranks"] for row in predicted] == [8, 16, 24, 32, 64, 128, 256, 512, 1024]
    assert [row["seconds"] for row in predicted] == [row.seconds for row in expected]
    assert main(flags) == 0
    text = capsys.readouterr().out
    assert "Predicted time of a step (not measured)" in text and "100 TFLOP/s" in text
    assert "losses of your own are not counted" in text
    assert main([*flags, "--device", "cpu"]) == 0
    assert "Predicted" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--tflops", "--infiniband", "--gpus-per-machine"])
def test_rates_of_nothing_are_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag, "0"]) == 2
    assert f"{flag}: expected" in capsys.readouterr().err


def test_calls_do_not_end_before_they_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--latency=-5000"]) == 2
    assert "--latency: expected a number of at least 0, got -5000" in capsys.readouterr().err
