"""The time of a step on many GPUs, predicted: what it multiplies, what its ranks send, what bounds
it. Nothing here is measured; the rates are the caller's.

Bytes are those of the collective calls of ``Stepper.step``, with the fused losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from protoclip.common.host import MOST_WORKERS
from protoclip.distributed import GlobalBatchNorm1d
from protoclip.episodes.prototypes import check_clusters
from protoclip.model import ProtoModel, build_model
from protoclip.training.checks import ActiveLosses, active_losses
from protoclip.training.memory_plan import FP32, INT64, PlannedRun

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH = 4  # pairs that are counted; FLOPs grow in proportion
PRODUCTS_OF_LOSS = 4  # logits, logits again in the backward pass, and both gradients
PRODUCTS_OF_PROTOTYPES = 2  # logits, and the gradient of the features
# The share of a buffer that passes a rank's link in a ring, in units of (ranks - 1) / ranks.
IN_RING = {"gather": 1, "scatter": 1, "reduce": 2}


@dataclass(frozen=True)
class Rates:
    """What a machine is assumed to do."""

    flops: float  # FLOP/s of a GPU, over towers and losses
    nvlink: float  # bytes/s of a GPU, each way, to others of its machine
    infiniband: float  # bytes/s of a GPU, each way, to other machines
    latency: float  # seconds of a collective call on one machine, and again when machines double
    gpus_per_machine: int
    pairs_per_worker: float  # pairs/s that a worker process reads


@dataclass(frozen=True)
class Work:
    """What a model does and sends in a step, for any number of pairs and ranks."""

    flops: float  # of a pair, forward and backward
    forward_flops: float
    embed_dim: int
    projection_dim: int
    trained_weights: int  # of the towers and scales that OpenCLIP has
    head_weights: int  # of the heads, and the prototypes' scale
    global_norms: tuple[int, ...]  # widths of the heads' batch norms that are over all ranks
    statistics_bytes: tuple[int, ...]  # of batch norm's buffers, by dtype


def measure_work(run: PlannedRun) -> Work:
    """Count the products of a forward and backward pass, without data.

    Raises:
        ValueError: no such model.
    """
    with torch.device("meta"):
        model = build_model(run.config.model, "meta")
    clip_trained = sum(p.numel() for p in model.clip.parameters() if p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    by_dtype: dict[torch.dtype, int] = {}
    for buffer in (buffer for norm in norms for buffer in norm.buffers()):
        by_dtype[buffer.dtype] = by_dtype.get(buffer.dtype, 0) + buffer.nbytes
    passes = _count_flops(model)
    return Work(
        flops=passes.forward_and_backward / BATCH,
        forward_flops=passes.forward / BATCH,
        embed_dim=passes.embed_dim,
        projection_dim=passes.projection_dim,
        trained_weights=clip_trained,
        head_weights=trained - clip_trained,
        global_norms=tuple(
            norm.num_features for norm in norms if isinstance(norm, GlobalBatchNorm1d)
        ),
        statistics_bytes=tuple(by_dtype.values()),
    )


@dataclass(frozen=True)
class _Flops:
    forward: int
    forward_and_backward: int
    embed_dim: int
    projection_dim: int


def _count_flops(model: ProtoModel) -> _Flops:
    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in [*model.named_parameters(), *model.named_buffers()]
        }
        image = torch.empty(BATCH, 3, model.image_size, model.image_size)
        tokens = torch.zeros(BATCH, model.clip.context_length, dtype=torch.int64)
        # Of attention's forms, the counter knows the products of this one on every device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            encoded, projected = functional_call(model, weights, (image, tokens))
            forward = counter.get_total_flops()
            outputs = (encoded.image, encoded.text, projected.image, projected.text)
            sum(x.sum() for x in outputs if x.requires_grad).backward()
        forward_and_backward = counter.get_total_flops()
    return _Flops(
        forward=forward,
        forward_and_backward=forward_and_backward,
        embed_dim=encoded.image.shape[1],
        projection_dim=projected.image.shape[1],
    )


@dataclass(frozen=True)
class Collective:
    """A collective call of each rank."""

    name: str
    kind: str  # "gather", "scatter", "reduce", "broadcast" or "send"
    bytes: int  # gathered: the result; scattered, reduced: what each rank adds to the sum


def collectives(work: Work, run: PlannedRun) -> list[Collective]:
    """What a step with prototypes calls, if the run has any; the gradient counts as one call."""
    if run.ranks == 1:
        return []
    active = active_losses(run.config, has_teacher=run.teacher_dim > 0)
    heads_train = active.prototypes or active.distillation
    calls = [*_of_contrastive_loss(work, run), *_of_prototypes(active)]
    if active.projects and run.config.model.add_projection_head:
        for width in work.global_norms:
            calls += 2 * [Collective("batch norm of the heads", "gather", run.ranks * width * FP32)]
            if heads_train:
                gradient = run.ranks * width * FP32
                calls += 2 * [Collective("batch norm of the heads", "scatter", gradient)]
    if active.distillation:
        calls += _of_distillation(work, run)
    weights = work.trained_weights + (work.head_weights if heads_train else 0)
    calls.append(Collective("gradient", "reduce", weights * FP32))
    calls += [Collective("statistics", "broadcast", size) for size in work.statistics_bytes]
    return calls


def _of_contrastive_loss(work: Work, run: PlannedRun) -> list[Collective]:
    rows = run.global_batch
    features = work.embed_dim * (2 if run.amp else FP32)
    gradient = work.embed_dim * FP32
    calls: list[Collective] = []
    if run.config.loss.w_clip == 0:
        return calls
    if run.config.loss.dedup != "off":
        calls.append(Collective("ids", "gather", rows * INT64))
    if run.config.model.siglip:  # round a ring
        texts = Collective("texts", "send", run.local_batch * features)
        gradients = Collective("gradient of the texts", "send", run.local_batch * gradient)
        return calls + (run.ranks - 1) * [texts] + run.ranks * [gradients]
    sums = 1 if run.config.loss.dedup == "off" else 3  # see ``contrastive_gaps``
    return [
        *calls,
        Collective("texts", "gather", rows * features),
        Collective("maxima of columns", "reduce", rows * FP32),
        Collective("sums of columns", "reduce", sums * rows * FP32),
        Collective("gradient of columns", "gather", rows * FP32),
        Collective("gradient of the texts", "scatter", rows * gradient),
    ]


def _of_prototypes(active: ActiveLosses) -> list[Collective]:
    """Each kind of prototypes counts the labelled samples of both students."""
    num_kinds = int(active.internal) + int(active.external)
    return 2 * num_kinds * [Collective("labelled", "reduce", FP32)]


def _of_distillation(work: Work, run: PlannedRun) -> list[Collective]:
    projections = run.global_batch * work.projection_dim * FP32
    return [
        Collective("teacher", "gather", run.global_batch * run.teacher_dim * FP32),
        *2 * [Collective("projections", "gather", projections)],
        *2 * [Collective("gradient of projections", "scatter", projections)],
    ]


@dataclass(frozen=True)
class Prediction:
    """A step's time, in seconds, and its parts."""

    ranks: int
    global_batch: int
    gathered_bytes: int  # by each rank: gathered, sent and broadcast
    reduced_bytes: int  # by each rank: reduced and scattered
    towers: float
    losses: float
    network: float  # for which the GPU waits
    data: float

    @property
    def seconds(self) -> float:
        """Data are loaded during the step before."""
        return max(self.towers + self.losses + self.network, self.data)

    @property
    def pairs_per_second(self) -> float:
        return self.global_batch / self.seconds

    @property
    def bound(self) -> str:
        """What takes longest."""
        parts = {
            "towers": self.towers,
            "losses": self.losses,
            "network": self.network,
            "data": self.data,
        }
        return max(parts, key=lambda name: parts[name])


def predict(work: Work, run: PlannedRun, rates: Rates) -> Prediction:
    """The time of a step of a run on GPUs."""
    pair_flops = work.flops
    if run.config.optim.accum_freq > 1:  # the towers encode twice
        pair_flops += work.forward_flops
    towers = run.local_batch * pair_flops / rates.flops
    calls = collectives(work, run)
    gradient = [call for call in calls if call.name == "gradient"]
    others = [call for call in calls if call.name != "gradient"]
    # The gradient is reduced during the backward pass; the losses wait for everything else.
    backward = towers * (1 - work.forward_flops / pair_flops)
    hidden = min(backward, _seconds(gradient, run.ranks, rates))
    workers = run.config.data.workers
    readers = MOST_WORKERS if workers < 0 else max(1, workers)
    return Prediction(
        ranks=run.ranks,
        global_batch=run.global_batch,
        gathered_bytes=sum(call.bytes for call in calls if call.kind not in ("reduce", "scatter")),
        reduced_bytes=sum(call.bytes for call in calls if call.kind in ("reduce", "scatter")),
        towers=towers,
        losses=_flops_of_losses(work, run) / rates.flops,
        network=_seconds(others, run.ranks, rates) + _seconds(gradient, run.ranks, rates) - hidden,
        data=run.local_batch / (readers * rates.pairs_per_worker),
    )


def _flops_of_losses(work: Work, run: PlannedRun) -> float:
    active = active_losses(run.config, has_teacher=run.teacher_dim > 0)
    pairs = run.local_batch * run.global_batch
    flops = 0.0
    if run.config.loss.w_clip > 0:
        flops += 2 * PRODUCTS_OF_LOSS * pairs * work.embed_dim
    if active.prototypes:
        clusters = check_clusters(run.config.episode, run.episode)
        sets = 2 * (int(active.internal) + int(active.external))
        product = 2 * run.local_batch * clusters * work.projection_dim
        flops += sets * PRODUCTS_OF_PROTOTYPES * product
    if active.distillation:  # the teacher's similarities; those of two students, with gradients
        flops += 2 * pairs * (run.teacher_dim + 2 * 3 * work.projection_dim)
    return flops


def _seconds(calls: Sequence[Collective], ranks: int, rates: Rates) -> float:
    """The time of calls one after the other; the slowest link of a ring decides."""
    machines = math.ceil(ranks / rates.gpus_per_machine)
    rate = rates.nvlink if machines == 1 else rates.infiniband
    seconds = 0.0
    for call in calls:
        share = IN_RING[call.kind] * (ranks - 1) / ranks if call.kind in IN_RING else 1.0
        seconds += share * call.bytes / rate + rates.latency * (1 + math.log2(machines))
    return seconds


def predict_all(work: Work, run: PlannedRun, rates: Rates) -> list[Prediction]:
    """Predictions for 8 to 1,024 ranks and for the run's own number, with its batch on each."""
    several = sorted({*RANKS, run.ranks})
    return [predict(work, replace(run, ranks=ranks), rates) for ranks in several]


def text(predictions: Sequence[Prediction], rates: Rates) -> str:
    """The predictions as a table."""
    lines = [
        "Predicted time of a step (not measured), with",
        f"  {rates.flops / 1e12:g} TFLOP/s, NVLink {rates.nvlink / 1e9:g} GB/s, InfiniBand "
        f"{rates.infiniband / 1e9:g} GB/s, {rates.gpus_per_machine} GPUs a machine,",
        f"  {rates.latency * 1e6:g} us a call, {rates.pairs_per_worker:g} pairs/s a worker",
        "",
        "  GPUs     batch  gathered   reduced  towers  losses  network    data    step     pairs/s",
        "                       MiB       MiB      ms      ms       ms      ms      ms",
    ]
    for p in predictions:
        milliseconds = [1e3 * x for x in (p.towers, p.losses, p.network, p.data, p.seconds)]
        towers, losses, network, data, step = (f"{ms:,.1f}" for ms in milliseconds)
        lines.append(
            f"{p.ranks:>6,}{p.global_batch:>10,}{p.gathered_bytes / 2**20:>10,.1f}"
            f"{p.reduced_bytes / 2**20:>10,.1f}{towers:>8}{losses:>8}{network:>9}{data:>8}"
            f"{step:>8}{p.pairs_per_second:>12,.0f}  bound by {p.bound}"
        )
    return "\n".join(lines)
