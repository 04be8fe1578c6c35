"""What a run takes: memory per rank, bytes on the wire, flop, and seconds under stated assumptions.

Shapes are exact: the model's forward pass is walked on tensors without data, which yields its
flop and what autograd keeps. Seconds are a prediction: flop over a rate, bytes over a bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from protoclip.config import ModelConfig
from protoclip.model import ProtoModel, build_model

FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Card:
    """A processor and its network; what is not measured is an assumption."""

    name: str
    matmul_flops: float  # dense bf16 products per second
    towers_share: float  # of that, which the towers reach
    kernels_share: float  # of that, which losses and k-means reach
    memory_bytes: float
    near_bandwidth: float  # bytes per second and rank, within a machine
    far_bandwidth: float  # between machines
    ranks_per_machine: int
    scratch_bytes: int  # of the fused kernels, at most
    source: str


CARDS = {
    "h100": Card(
        "H100 SXM", 790e12, 0.40, 0.60, 80e9, 360e9, 45e9, 8, 256 << 20,
        "790 TFLOP/s is a measured GEMM rate; the rest assumed: towers at 40 % and kernels at 60 % "
        "of it, 80 % of NVLink 4 and 90 % of one 400 Gb/s port a GPU",
    ),
    "a100": Card(
        "A100 SXM", 250e12, 0.40, 0.60, 80e9, 240e9, 22e9, 8, 256 << 20,
        "assumed: 80 % of 312 TFLOP/s, towers at 40 % and kernels at 60 % of it, 80 % of NVLink 3 "
        "and 90 % of one 200 Gb/s port a GPU",
    ),
    "cpu": Card(
        "one CPU core", 0.10e12, 0.40, 0.60, 16e9, 1e9, 1e9, 64, 64 << 20,
        "assumed: 100 GFLOP/s fp32 a core, towers at 40 % and kernels at 60 % of it, 1 GB/s gloo",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One pass of the model over a batch, by its shapes."""

    weights: int  # parameters
    embed_dim: int
    projection_dim: int
    hidden_dim: int
    buffers_bytes: int
    batch_bytes: int  # pixels and tokens of a sample
    saved_bytes: float  # kept for the backward pass, a sample
    saved_fixed_bytes: float  # the same, whatever the batch: under autocast the weights' copies
    forward_flop: float  # a sample
    largest_weight: int


@dataclass(frozen=True)
class Run:
    """The settings that a cost depends on."""

    batch_size: int  # of a forward pass of a rank
    accum_freq: int = 1
    ranks: int = 1
    samples: int = 3_000_000  # of the dataset
    episode: int = 200_000
    clusters: int = 20_000  # K of each source
    sources: int = 3  # image, text, and external teachers
    teacher_dim: int = 64
    iterations: int = 20
    restarts: int = 1
    amp: bool = True
    reuse: bool = False  # features of the training pass instead of an extra one

    @property
    def local_batch(self) -> int:
        return self.batch_size * self.accum_freq

    @property
    def global_batch(self) -> int:
        return self.local_batch * self.ranks

    @property
    def steps(self) -> int:
        """Of an episode."""
        return math.ceil(self.episode / self.global_batch)

    @property
    def prototype_sets(self) -> int:
        """Image and text each teach the other; a teacher teaches both."""
        return 2 + 2 * max(0, self.sources - 2) if self.sources else 0


def measure_shape(config: ModelConfig, amp: bool, batch: int = 8) -> Shape:
    """Walk the forward pass of a model with heads at two batch sizes, without data."""
    with torch.device("meta"):
        model = build_model(config, "meta")
    saved, flop = zip(*(_walk(model, amp, size) for size in (batch, 2 * batch)), strict=True)
    per_sample = (saved[1] - saved[0]) / batch
    first, last = (model.text_head[0], model.text_head[-1]) if model.text_head else (None, None)
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return Shape(
        weights=sum(p.numel() for p in model.parameters()),
        embed_dim=first.in_features,
        projection_dim=last.out_features,
        hidden_dim=first.out_features,
        buffers_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        batch_bytes=3 * model.image_size**2 * FP32 + context_length(model) * INT64,
        saved_bytes=per_sample,
        saved_fixed_bytes=max(0.0, saved[0] - per_sample * batch),
        forward_flop=(flop[1] - flop[0]) / batch,
        largest_weight=max(p.numel() for p in model.parameters()),
    )


def context_length(model: ProtoModel) -> int:
    return getattr(model.clip, "context_length", 77)


def _walk(model: ProtoModel, amp: bool, batch: int) -> tuple[float, float]:
    """Bytes that autograd keeps beside the weights, and flop, of a forward pass."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    with FakeTensorMode():
        own = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in [*model.named_parameters(), *model.named_buffers()]
        }
        known = {p.untyped_storage()._cdata for p in own.values()}
        image = torch.empty(batch, 3, model.image_size, model.image_size)
        tokens = torch.zeros(batch, context_length(model), dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, counter, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            functional_call(model, own, (image, tokens))
        total = sum(s.nbytes() for cdata, s in kept.items() if cdata not in known)
    return float(total), float(counter.get_total_flops())


def memory(shape: Shape, run: Run, card: Card) -> dict[str, float]:
    """Bytes per rank at the peak of a training step, by part; the process itself is not counted."""
    wire = 2 if run.amp else FP32  # bytes of a feature
    rows, d, dh = run.global_batch, shape.embed_dim, shape.projection_dim
    saved = run.batch_size * shape.saved_bytes + shape.saved_fixed_bytes
    # Alone, gradients come while what was saved goes; DDP keeps room for them throughout.
    gradients = shape.weights * FP32 - (saved if run.ranks == 1 else 0)
    parts = {
        "weights": shape.weights * FP32 + shape.buffers_bytes,
        "gradients": max(0.0, gradients),
        "optimiser (AdamW)": 2 * shape.weights * FP32,
        "saved for backward": saved,
        "batch": run.local_batch * shape.batch_bytes,
    }
    if run.accum_freq > 1:
        parts["features of the step"] = 4 * run.local_batch * d * FP32
    if run.ranks > 1:
        if card == CARDS["cpu"]:  # gloo reduces a bucket of DDP in a buffer of its own
            parts["all-reduce buffer"] = max(25 << 20, shape.largest_weight * FP32)
        # The gathered texts, and their gradient in fp32 before it is scattered.
        parts["gathered features"] = rows * d * (wire + FP32)
    scratch = max(run.local_batch, rows) * d * FP32 + min(8192 * d * FP32, card.scratch_bytes)
    parts["InfoNCE scratch"] = scratch if card == CARDS["cpu"] else card.scratch_bytes
    if run.prototype_sets:
        source_dims = 2 * dh + max(0, run.sources - 2) * run.teacher_dim
        parts["prototypes and targets"] = (
            run.clusters * (2 * run.prototype_sets * dh + source_dims) * FP32
        )
        parts["prototype gradients"] = run.prototype_sets * run.local_batch * dh * FP32
        parts["labels"] = run.sources * run.samples * INT64
        parts["teacher"] = max(0, run.sources - 2) * run.samples * run.teacher_dim * FP32
        parts["feature store"] = math.ceil(run.episode / run.ranks) * (2 * dh * FP32 + INT64)
    return {name: float(size) for name, size in parts.items() if size}


def wire(shape: Shape, run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a rank sends, by part: of a step, and of an episode beside its steps."""
    if run.ranks == 1:
        return {}, {}
    share = (run.ranks - 1) / run.ranks  # of a ring's gather or reduce-scatter
    rows, d, dh = run.global_batch, shape.embed_dim, shape.projection_dim
    step = {
        "gradients, all-reduce": 2 * share * shape.weights * FP32,
        "texts, gather": share * rows * d * (2 if run.amp else FP32),
        "text gradients, reduce-scatter": share * rows * d * FP32,
        "column sums, all-reduce": 2 * 2 * share * rows * FP32,
        "column weights, gather": share * rows * FP32,
        "buffers, broadcast": run.accum_freq * shape.buffers_bytes,
    }
    if shape.hidden_dim:  # two heads; mean and variance, forwards and backwards
        step["batch norm of the heads, all-reduce"] = 2 * 4 * 2 * share * shape.hidden_dim * FP32
    if not run.prototype_sets:
        return step, {}
    dims = [dh, dh, *[run.teacher_dim] * max(0, run.sources - 2)][: run.sources]
    sums = sum(run.clusters * (ds + 1) * INT64 for ds in dims)  # in fp64, and int64 counts
    episode = {
        "k-means sums, all-reduce": 2 * share * sums * run.iterations * run.restarts,
        "labels, all-reduce": 2 * share * run.sources * run.samples * INT64,
        "prototype sums, all-reduce": 2
        * share
        * run.prototype_sets
        * run.clusters
        * (dh + 1)
        * INT64,
        "prototypes and targets, broadcast": 2 * run.prototype_sets * run.clusters * dh * FP32,
    }
    return step, episode


def flop(shape: Shape, run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Of a rank, by part: of a step, and of an episode beside its steps."""
    b, rows = run.local_batch, run.global_batch
    passes = 3 if run.accum_freq == 1 else 4  # the cache encodes twice
    step = {
        "towers and heads": passes * b * shape.forward_flop,
        "InfoNCE, 4 products": 4 * 2 * b * rows * shape.embed_dim,
    }
    if not run.prototype_sets:
        return step, {}
    dh, share = shape.projection_dim, math.ceil(run.episode / run.ranks)
    step["prototype losses, 2 products a set"] = run.prototype_sets * 2 * 2 * b * run.clusters * dh
    dims = [dh, dh, *[run.teacher_dim] * max(0, run.sources - 2)][: run.sources]
    episode = {
        "k-means": 2.0 * share * run.clusters * sum(dims) * (run.iterations + 1) * run.restarts,
        "soft targets": run.prototype_sets * 2.0 * run.clusters**2 * (max(dims) + dh),
    }
    if not run.reuse:
        episode["feature extraction"] = share * shape.forward_flop
    return step, episode


TOWERS = ("towers and heads", "feature extraction")


def seconds(shape: Shape, run: Run, card: Card) -> dict[str, float]:
    """Of an episode, by part. The gradients' all-reduce hides behind the backward pass as far as
    that is long enough; nothing else overlaps."""

    def compute(parts: dict[str, float]) -> dict[str, float]:
        shares = {name: card.towers_share if name in TOWERS else card.kernels_share
                  for name in parts}  # fmt: skip
        return {name: f / (card.matmul_flops * shares[name]) for name, f in parts.items()}

    far = run.ranks > card.ranks_per_machine
    # A rank's ring crosses machines: its slowest link decides.
    bandwidth = card.far_bandwidth if far else card.near_bandwidth
    step_flop, episode_flop = (compute(parts) for parts in flop(shape, run))
    step_wire, episode_wire = wire(shape, run)
    gradients = step_wire.get("gradients, all-reduce", 0.0) / bandwidth
    hidden = min(gradients, step_flop["towers and heads"] * 2 / 3)
    exposed = sum(step_wire.values()) / bandwidth - hidden
    parts = {name: run.steps * s for name, s in step_flop.items()}
    if exposed > 0:
        parts["waiting for the wire, in steps"] = run.steps * exposed
    parts |= episode_flop
    if episode_wire:
        parts["waiting for the wire, in the episode"] = sum(episode_wire.values()) / bandwidth
    return parts
