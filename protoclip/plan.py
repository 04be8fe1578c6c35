"""``protoclip plan``: does a run fit? The memory of each process, by part, before the run starts.

Shapes are exact: the model's forward pass runs on tensors without data, which shows what autograd
keeps. The estimate leaves out losses of a user's own.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("plan", sys.argv[1:])

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from protoclip.common.files import mebibytes
from protoclip.data import data_kind
from protoclip.data.settings import open_run_data, with_widths
from protoclip.distributed import run_command
from protoclip.episodes.feature_store import stored_bytes, wants_to_reuse
from protoclip.episodes.prototypes import check_clusters
from protoclip.episodes.teacher import teacher_spec
from protoclip.model import ProtoModel, build_model, processor_multiplies_bf16
from protoclip.ops import scratch
from protoclip.ops.stash import stash_bytes
from protoclip.settings.commands import plan_parser
from protoclip.settings.config import TrainConfig
from protoclip.settings.flags import parse_more
from protoclip.training.checks import active_losses

# Bytes of a number.
FP32 = 4
BF16 = 2
INT32 = 4
INT64 = 8
# Of the logits' gradient in csrc/strip_gradient.h.
CPU_BLOCK_ROWS = 1024
CPU_BLOCK_COLUMNS = 4096
BATCH = 8  # pairs of the smaller of two passes, whose difference is what a pair takes
DISTILLED_MATRICES = 15  # fp32 [batch, global batch] at the peak of distillation, measured
MINILM_DIM = 384  # width of MiniLM's features without reduction
PROG = "protoclip plan"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for a user's mistake (one message on stderr)."""

    def work() -> None:
        run, flags = build_run(argv)
        shape = measure_shape(run)
        parts = memory(shape, run)
        if not flags["json"]:
            print(text(shape, run, parts))
            return
        plan = {
            "weights": shape.weights,
            "global_batch": run.global_batch,
            "memory_bytes": parts,
        }
        print(json.dumps(plan, indent=1))

    return run_command(work, PROG)


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a run, and what else its memory depends on."""

    config: TrainConfig
    ranks: int = 1
    samples: int = 3_000_000  # of the dataset

    @property
    def on_cpu(self) -> bool:
        return self.config.run.device == "cpu"

    @property
    def amp(self) -> bool:
        precision = self.config.run.precision
        if self.on_cpu:
            return precision == "amp_bf16" or (precision == "auto" and processor_multiplies_bf16())
        return precision != "fp32"

    @property
    def local_batch(self) -> int:
        return self.config.optim.batch_size * self.config.optim.accum_freq

    @property
    def global_batch(self) -> int:
        return self.local_batch * self.ranks

    @property
    def episode(self) -> int:
        """Samples per episode."""
        return min(self.config.episode.size or self.samples, self.samples)

    @property
    def reuses(self) -> bool:
        """Whether features are stored from training, if memory allows."""
        optim = self.config.optim
        passes = optim.epochs
        if optim.max_steps:
            passes = min(passes, optim.max_steps * self.global_batch / self.samples)
        return wants_to_reuse(self.config.episode, passes)

    @property
    def teacher_dim(self) -> int:
        """Width of the external teacher's features; 0 without a teacher."""
        spec, _ = teacher_spec(self.config)
        return (self.config.episode.external_teacher_dim or MINILM_DIM) if spec else 0


@dataclass(frozen=True)
class Shape:
    """Sizes of one pass of the model over a batch."""

    weights: int  # parameters
    trained: int  # of them, those with a gradient
    embed_dim: int
    projection_dim: int
    buffers_bytes: int
    batch_bytes: int  # pixels and tokens, per sample
    saved_bytes: float  # kept for the backward pass, per sample
    saved_fixed_bytes: float  # the same, for any batch: the weights' copies under autocast


def measure_shape(run: PlannedRun) -> Shape:
    """Run the forward pass at two batch sizes, without data.

    Raises:
        ValueError: no such model.
    """
    with torch.device("meta"):
        model = build_model(run.config.model, "meta")
    small = _forward(model, run.amp, BATCH)
    large = _forward(model, run.amp, 2 * BATCH)
    per_sample = (large.saved_bytes - small.saved_bytes) / BATCH
    # The next batch of stored features is read during a step.
    batches = 2 if run.config.model.image_width else 1
    sizes = [p.numel() for p in model.parameters()]
    return Shape(
        weights=sum(sizes),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embed_dim=small.embed_dim,
        projection_dim=small.projection_dim,
        buffers_bytes=sum(b.nbytes for b in model.buffers()),
        batch_bytes=batches * sum(x.nbytes for x in model.example(1)),
        saved_bytes=per_sample,
        saved_fixed_bytes=small.saved_bytes - per_sample * BATCH,
    )


def cpu_scratch(n: int, m: int, d: int, bf16: bool) -> int:
    """Bytes that InfoNCE's C++ gradient of [N, D] against [M, D] needs besides its results: a block
    of the logits' gradient; for bf16 features also the block's rows again and fp32 sums
    (csrc/strip_gradient.h)."""
    rows = min(n, CPU_BLOCK_ROWS)
    columns = min(m, CPU_BLOCK_COLUMNS)
    if not bf16:
        return rows * columns * FP32
    return (rows * columns + (rows + columns) * d) * BF16 + (rows + m) * d * FP32


class _Forward(NamedTuple):
    """What a forward pass leaves."""

    saved_bytes: float  # that autograd keeps besides the weights
    embed_dim: int
    projection_dim: int


def _forward(model: ProtoModel, amp: bool, batch: int) -> _Forward:
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage._cdata] = storage
        return x

    with FakeTensorMode():
        weights = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in [*model.named_parameters(), *model.named_buffers()]
        }
        of_weights = {weight.untyped_storage()._cdata for weight in weights.values()}
        image, tokens = model.example(batch)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            encoded, projected = functional_call(model, weights, (image, tokens))
        total = sum(storage.nbytes() for key, storage in saved.items() if key not in of_weights)
    return _Forward(float(total), encoded.image.shape[1], projected.image.shape[1])


def memory(shape: Shape, run: PlannedRun) -> dict[str, float]:
    """Bytes of a rank at the peak of a training step, by part, without the process itself.

    Raises:
        ValueError: more clusters than samples in an episode.
    """
    rows = run.global_batch
    d = shape.embed_dim
    dh = shape.projection_dim
    bytes_of_feature = 2 if run.amp else FP32
    saved = run.config.optim.batch_size * shape.saved_bytes + shape.saved_fixed_bytes
    parts = {
        "weights": shape.weights * FP32 + shape.buffers_bytes,
        # On one process they replace the saved activations during backward; DDP holds both.
        "gradients": max(0.0, shape.trained * FP32 - (saved if run.ranks == 1 else 0)),
        "optimiser (AdamW)": 2 * shape.trained * FP32,
        "saved for backward": saved,
        "batch": run.local_batch * shape.batch_bytes,
    }
    if run.config.optim.accum_freq > 1:
        parts["features of the step"] = 4 * run.local_batch * d * FP32
    if run.ranks > 1:
        # The gathered texts, and their gradient in fp32 before it is scattered.
        parts["gathered features"] = rows * d * (bytes_of_feature + FP32)
    if run.on_cpu:
        gradients = (run.local_batch + rows) * d * bytes_of_feature
        parts["InfoNCE scratch"] = gradients + cpu_scratch(run.local_batch, rows, d, run.amp)
        if not run.config.model.siglip:
            dtype = torch.bfloat16 if run.amp else torch.float32
            parts["kept logits"] = stash_bytes(run.local_batch, rows, d, dtype)
    else:  # a chunk of the gradient of the logits, and both features' gradients in fp32
        chunk = min(run.local_batch * rows * bytes_of_feature, scratch.GRADIENT_BYTES)
        parts["InfoNCE scratch"] = chunk + (run.local_batch + rows) * d * FP32
    active = active_losses(run.config, has_teacher=run.teacher_dim > 0)
    if active.prototypes:
        widths = []  # of the sources
        sets = 0
        if active.internal:  # image and text each teach the other
            widths += [dh, dh]
            sets += 2
        if active.external:  # a teacher teaches both
            widths.append(run.teacher_dim)
            sets += 2
        num_clusters = check_clusters(run.config.episode, run.episode)
        parts["prototypes and targets"] = num_clusters * (2 * sets * dh + sum(widths)) * FP32
        parts["prototype gradients"] = sets * run.local_batch * dh * FP32
        if not run.on_cpu:  # projections are fp32 rows
            weights = run.local_batch * num_clusters * FP32
            parts["prototype scratch"] = min(weights, scratch.PROTOTYPE_BYTES)
        parts["labels"] = run.episode * (len(widths) * INT32 + INT64)
        if run.reuses:
            parts["stored features (host if the GPU is full)"] = stored_bytes(
                run.samples, run.episode, run.ranks, dh
            )
        else:
            parts["features of the episode"] = math.ceil(run.episode / run.ranks) * 2 * dh * FP32
    if active.distillation:
        parts["distillation"] = DISTILLED_MATRICES * run.local_batch * rows * FP32
    parts["teacher"] = run.samples * run.teacher_dim * FP32
    return {name: float(size) for name, size in parts.items() if size}


def text(shape: Shape, run: PlannedRun, parts: dict[str, float]) -> str:
    """The plan as text."""
    optim = run.config.optim
    lines = [
        f"{run.config.model.name}, {shape.weights / 1e6:,.1f} M weights; {run.ranks:,} ranks; "
        f"batch {run.global_batch:,}",
        f"= {optim.batch_size:,} x {optim.accum_freq} passes x {run.ranks:,} ranks; "
        f"{math.ceil(run.episode / run.global_batch):,} steps per episode of {run.episode:,}",
        "",
        f"Memory per rank at the peak of a step: {mebibytes(sum(parts.values()))}",
    ]
    lines += [f"  {name:<42}{mebibytes(size):>14}" for name, size in parts.items()]
    lines.append("  (without losses of your own: 16 bytes per weight, and what they keep)")
    return "\n".join(lines)


def build_run(argv: Sequence[str] | None) -> tuple[PlannedRun, Mapping[str, Any]]:
    """The run that a command line describes, and the values of the command's own flags.

    Raises:
        ValueError: settings that no run can have.
    """
    config, flags = parse_more(plan_parser(), argv)
    samples = min(flags["samples"], config.data.train_num_samples or flags["samples"])
    if data_kind(config.data.train_data) == "features":
        dataset = open_run_data(config).training
        config = with_widths(config, dataset)
        samples = len(dataset)
    run = PlannedRun(config, flags["ranks"], samples)
    if run.global_batch > samples:
        raise ValueError(
            f"--batch-size: expected at most {samples:,} pairs in all, got {run.global_batch:,} a "
            "step; see --samples"
        )
    return run, flags


if __name__ == "__main__":
    sys.exit(main())
