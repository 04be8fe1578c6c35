"""What a training step does on a card, counted without one: ``python -m benchmarks.step_table``.

The real ``Stepper.step`` runs on the meta device, where nothing can be read: PyTorch's operations
(each is a kernel, those over lists of tensors some) and the bytes that come from the host are
counted there. What our losses launch is counted on the CPU, with Triton's interpreter that is given
nothing to run: Triton's kernels, products, and PyTorch's operations inside our ops. A machine with
a card has the profiler instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():  # before the table of backends is read
    os.environ.setdefault("TRITON_INTERPRET", "1")

from protoclip.data import Batch
from protoclip.episodes.prototypes import EXTERNAL, Episode, PrototypeSet
from protoclip.losses import ProtoLoss, caption_ids
from protoclip.model import Encoded, build_model, put_channels_last
from protoclip.settings.config import LossConfig, ModelConfig, OptimConfig
from protoclip.training import log, step
from protoclip.training.optimiser import parameter_groups

CLUSTERS = 1000
DIM = 512  # of the features whose kernels are counted
PROJECTION_DIM = 64
CASES = ("CLIP", "CLIP, equal captions", "CLIP, two passes", "ProtoCLIP, a teacher's prototypes",
         "ProtoCLIP, both kinds", "SigLIP")  # fmt: skip


class Count(TorchDispatchMode):
    """Counts operations that compute, and bytes that come from the host.

    ``device``: what stands for the card. On the CPU our ops are looked into; meta runs nothing
    inside them.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations: Counter[str] = Counter()
        self.copied_bytes = 0
        self.phase = "other"

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        name = op._schema.name
        if name.startswith("protoclip::") and self.device == "cpu":
            return self._inside(op, arguments, options or {})
        result = op(*arguments, **(options or {}))
        if name.startswith("protoclip::"):
            return result
        if name == "aten::_to_copy" and arguments[0].device.type != result.device.type:
            self.copied_bytes += result.nbytes
        elif self.phase == "ours" and name == "aten::_to_copy":
            pass  # a CPU widens the factors of a product; a card does not
        elif not (op.is_view or name.startswith(FREE)) and self._on_card(arguments, result):
            self.operations[self.phase] += 1
        return result

    def _inside(self, op: Any, arguments: Any, options: Any) -> Any:
        outside = self.phase
        self.phase = "ours"
        try:
            with self:
                key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return op.redispatch(key, *arguments, **options)
        finally:
            self.phase = outside

    def _on_card(self, arguments: Any, result: Any) -> bool:
        tensors = tree_leaves((arguments, result))
        return any(isinstance(x, Tensor) and x.device.type == self.device for x in tensors)


FREE = ("aten::empty", "aten::new_empty", "aten::_reshape_alias", "aten::_unsafe_view", "aten::sym",
        "aten::detach", "aten::lift", "aten::alias", "profiler::")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A step of one case."""

    case: str
    forward: int  # operations of PyTorch
    backward: int
    update: int  # and what is put back after a skipped step; the fused update counts one a group
    ours: int  # kernels
    copied_bytes: int  # from the host, in a step
    read_bytes: int  # by the host, when a line of metrics is due


class CountedPhases:
    """Stands for ``Phases``: tells the counter which phase runs."""

    def __init__(self, count: Count) -> None:
        self.count = count

    @contextlib.contextmanager
    def measure(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        before = self.count.phase
        self.count.phase = name
        yield
        self.count.phase = before


class Update(torch.optim.AdamW):
    """The fused update, which the meta device does not have: an operation a group."""

    count: Count

    def step(self, closure: Any = None) -> Any:
        del self.found_inf
        self.count.operations["update"] += len(self.param_groups)


def weights_of(case: str) -> LossConfig:
    weights = LossConfig(dedup="caption" if "captions" in case else "off")
    return replace(weights, w_proto=1.0 if "both" in case else 0.0)


def episode_of(case: str, pairs: int, dim: int) -> Episode | None:
    if "ProtoCLIP" not in case:
        return None
    students = [("text", "image"), ("image", "text")] if "both" in case else []
    students += [(EXTERNAL, "image"), (EXTERNAL, "text")]
    rows = torch.ones(CLUSTERS, dim)
    sets = tuple(
        PrototypeSet(source, student, rows, None if source == EXTERNAL else rows)
        for source, student in students
    )
    labels = {source: torch.zeros(pairs, dtype=torch.int32) for source, _ in students}
    return Episode(torch.arange(pairs), labels, {}, sets)


def count_step(case: str, model_name: str, pairs: int, our_kernels: int) -> Row:
    """A step with ``pairs`` pairs in all, on the meta device under bf16 autocast."""
    count = Count("meta")
    Update.count = count

    def build(model: Any, config: OptimConfig, others: Any) -> torch.optim.AdamW:
        return Update(parameter_groups(model, config.wd, others), lr=config.lr)

    with torch.device("meta"):
        model = build_model(ModelConfig(model=model_name, siglip=case == "SigLIP"), "meta")
        episode = episode_of(case, pairs, model.projection_dim)
    put_channels_last(model, torch.device("cuda"))
    phases: Any = CountedPhases(count)
    with mock.patch.object(step, "build_optimiser", build):
        loss = ProtoLoss(weights_of(case), None, phases.measure)
        stepper = step.Stepper(model, loss, OptimConfig(), phases=phases)
    passes = 2 if "passes" in case else 1
    size = pairs // passes
    pixels = torch.zeros(size, 3, model.image_size, model.image_size)
    tokens = torch.zeros(size, model.clip.context_length, dtype=torch.int64)
    batch = Batch(torch.arange(size), pixels, tokens)
    stepper.autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # meta has none
    with count:
        outcome = stepper.step(0, [batch] * passes, episode, project=episode is not None, lr=1e-3)
        scalars = log.scalars_of(outcome, model, NoFaults())  # type: ignore[arg-type]
    line = [*scalars, "bad_steps", "in_a_row"]
    return Row(
        case=case,
        forward=count.operations["forward"] + count.operations["prototypes"],
        backward=count.operations["backward"],
        update=count.operations["update"] + count.operations["other"],
        ours=our_kernels,
        copied_bytes=count.copied_bytes,
        read_bytes=4 * len(line),
    )


class NoFaults:
    positions: tuple[int, ...] = ()
    known = 0


def count_our_kernels(case: str, pairs: int) -> int:
    """What our ops launch, forward and backward: Triton's kernels, products, and operations."""
    features = [torch.zeros(pairs, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in "xy"]
    rows = [torch.zeros(pairs, PROJECTION_DIM, requires_grad=True) for _ in "xy"]
    scale = torch.tensor(14.3, requires_grad=True)
    bias = torch.tensor(-10.0, requires_grad=True) if case == "SigLIP" else None
    tokens = torch.zeros(pairs, 77, dtype=torch.int64)
    loss = ProtoLoss(weights_of(case))
    episode = episode_of(case, pairs, PROJECTION_DIM)

    def run() -> None:
        loss(
            Encoded(features[0], features[1]),
            Encoded(rows[0], rows[1]) if episode else None,
            torch.arange(pairs),
            scale,
            scale,
            episode,
            ids=caption_ids(tokens) if "captions" in case else None,
            logit_bias=bias,
        ).total.backward()

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.__name__)

    launched: list[str] = []
    from protoclip.kernels.info_nce import info_nce_forward_kernel

    with (
        mock.patch.dict(os.environ, PROTOCLIP_BACKEND="triton"),
        mock.patch.object(type(info_nce_forward_kernel), "run", launch),
        Count("cpu") as count,
    ):
        run()
    return len(launched) + count.operations["ours"]


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| step | forward | backward | update | our kernels | MiB to the card | bytes read |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.forward} | {row.backward} | {row.update} | {row.ours} "
            f"| {row.copied_bytes / 2**20:.1f} | {row.read_bytes} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--pairs", type=int, default=256)
    arguments = parser.parse_args(argv)
    rows = []
    for case in CASES:
        ours = count_our_kernels(case, arguments.pairs)
        rows.append(count_step(case, arguments.model, arguments.pairs, ours))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
