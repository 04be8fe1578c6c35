"""Heads on stored features: a whole training step, what gathers its rows, and the trainer's own.

A step is the forward pass of both heads, the loss, its gradient, and AdamW. Gradients are held
against those of OpenCLIP's loss before anything is timed, where its logits fit in memory.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from benchmarks import peers
from benchmarks.harness import OURS, Bench, Case
from benchmarks.machine import DEVICE
from benchmarks.roofline import Work, info_nce
from protoclip.common.phases import Phases
from protoclip.data import Draws, open_dataset
from protoclip.data.feature_pairs import mean_rows
from protoclip.data.loader import EpochOrder, Loader
from protoclip.data.settings import with_widths
from protoclip.heads import Heads
from protoclip.model import build_model
from protoclip.runs.run_folder import NullRunFolder
from protoclip.train import make_config
from protoclip.training.loop import Trainer
from protoclip.training.run import Run
from protoclip.training.schedule import make_plan

IMAGE_WIDTH = 768
TEXT_WIDTH = 1024
COMPARED = 16_384  # pairs, beyond which OpenCLIP's logits are not formed for the comparison
AT_ONCE = 4  # steps of a round of the trainer


@dataclass(frozen=True)
class Shape:
    n: int
    d: int
    head: str = "linear"


CASES = {
    "tiny": [Shape(64, 16), Shape(64, 16, "mlp")],
    "quick": [Shape(1024, 512), Shape(4096, 512)],
    "full": [
        Shape(1024, 512), Shape(8192, 512), Shape(16_384, 512), Shape(32_768, 512),
        Shape(32_768, 1024), Shape(8192, 512, "mlp"), Shape(16_384, 512, "mlp"),
    ],
}  # fmt: skip
PAIRS = {"tiny": 256, "quick": 65_536, "full": 262_144}  # on disk, of which batches are gathered
TRAINED = {"tiny": 64, "quick": 4096, "full": 16_384}  # batch of the trainer's steps


def _step_of(variant: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss of a variant: of unit rows [N, D] of both sides and the scale."""
    if variant == "no loss":  # a gradient for each output, with no product of pairs
        return lambda image, text, scale: (image * text).sum() * scale
    if variant == OURS:
        return protoclip.info_nce
    from open_clip.loss import ClipLoss

    return ClipLoss() if variant == "open_clip" else peers.compiled(ClipLoss())


VARIANTS = (OURS, "open_clip", "torch.compile", "no loss")


class Step:
    """One step on given rows, in bf16 under autocast."""

    def __init__(self, shape: Shape, variant: str) -> None:
        torch.manual_seed(0)
        self.heads = Heads(IMAGE_WIDTH, TEXT_WIDTH, shape.d, shape.head).to(DEVICE)
        self.loss = _step_of(variant)
        self.adamw = torch.optim.AdamW(self.heads.parameters(), lr=1e-3, fused=True)
        self.image, self.text = _rows(shape.n)

    def gradient(self) -> list[Tensor]:
        self.adamw.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            image = self.heads.encode_image(self.image)
            text = self.heads.encode_text(self.text)
            unit = [F.normalize(rows.float(), dim=1).to(rows.dtype) for rows in (image, text)]
            loss = self.loss(*unit, self.heads.logit_scale.exp())
        loss.backward()
        return [p.grad for p in self.heads.parameters() if p.grad is not None]

    def __call__(self) -> None:
        self.gradient()
        self.adamw.step()


@cache
def _rows(n: int) -> tuple[Tensor, Tensor]:
    """Rows that share a few dimensions, as those of a picture and its caption do."""
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(n, 24, generator=random)
    sides = []
    for width in (IMAGE_WIDTH, TEXT_WIDTH):
        rows = shared @ torch.randn(24, width, generator=random)
        sides.append((rows + torch.randn(n, width, generator=random)).half().to(DEVICE))
    return sides[0], sides[1]


def _work(shape: Shape) -> Work:
    heads = Heads(IMAGE_WIDTH, TEXT_WIDTH, shape.d, shape.head)
    weights = sum(p.numel() for p in heads.parameters())
    loss = info_nce(shape.n, shape.d, "bf16")
    return Work(loss.flop + 6.0 * shape.n * weights, loss.bytes)


def _sizes(shape: Shape) -> dict[str, int]:
    return {"N": shape.n, "D": shape.d}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("number", range(max(map(len, CASES.values()))))
def test_step(bench: Bench, number: int, variant: str) -> None:
    if number >= len(CASES[bench.sizes]):
        pytest.skip("these sizes have fewer cases")
    shape = CASES[bench.sizes][number]
    if variant in ("open_clip", "torch.compile") and (shape.n > COMPARED or shape.head != "linear"):
        pytest.skip("one matrix of its logits has 4 GB, or the heads are the step")
    step = Step(shape, variant)
    if variant in ("open_clip", "torch.compile"):
        _assert_same_direction(step.gradient(), Step(shape, OURS).gradient())
    rival = None if variant == OURS else Step(shape, OURS)
    case = Case(f"align, {shape.head} heads", _sizes(shape), "bf16", _work(shape), "step")
    bench.time(case, variant, step, rival=rival)


def _assert_same_direction(got: list[Tensor], expected: list[Tensor]) -> None:
    """OpenCLIP rounds its logits to bf16: gradients of weights agree in most digits, while those of
    biases are small sums of large numbers."""
    for gradient, other in zip(got, expected, strict=True):
        if gradient.ndim < 2:
            continue
        cosine = F.cosine_similarity(gradient.flatten(), other.flatten(), dim=0)
        assert cosine > 0.99, f"gradients {list(gradient.shape)} differ: cosine {cosine:.4f}"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> str:
    """The name of pairs on disk, in fp16."""
    folder = tmp_path_factory.mktemp("rows")
    count = PAIRS[request.config.getoption("--sizes")]
    image, text = _rows(count)
    np.save(folder / "image.npy", image.cpu().numpy())
    np.save(folder / "text.npy", text.cpu().numpy())
    return f"features:{folder}/image.npy::{folder}/text.npy"


def test_gathering(bench: Bench, files: str) -> None:
    """The rows of a batch from disk, by the loader's thread; the ratio is its share of a step."""
    shape = max(
        (s for s in CASES[bench.sizes] if s.head == "linear" and s.d <= 512), key=lambda s: s.n
    )
    pairs = open_dataset(files)
    order = torch.randperm(len(pairs))
    starts = itertools.cycle(range(0, len(pairs) - shape.n + 1, shape.n))
    source = Loader(pairs, shape.n, None, None)._source
    batch = source.load(Draws(order, seed=0), next(starts))
    position = int(order[3])
    assert torch.equal(batch.image[3], torch.from_numpy(pairs.images.take([position]))[0])
    bytes_read = float(shape.n * 2 * (IMAGE_WIDTH + TEXT_WIDTH))
    case = Case("align, gathering", _sizes(shape), "fp16", Work(0.0, bytes_read, "copy"))

    def gather() -> None:
        source.load(Draws(order, seed=0), next(starts))

    bench.time(case, "share of a step", gather, rival=Step(shape, OURS))


def _trainer(files: str, batch: int) -> Trainer:
    """The trainer of a run that writes nothing."""
    dataset = open_dataset(files)
    config = with_widths(
        make_config(
            train_data=files, method="clip", embed_dim=512, batch_size=batch, epochs=10_000,
            precision="amp_bf16", save_every="0", report_to="none", add_projection_head=False,
        ),
        dataset,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(config.model)
    model.centre(mean_rows(dataset))
    device = torch.device(DEVICE)
    trainer = Trainer(
        Run(
            config=config,
            plan=make_plan(config, len(dataset)),
            dataset=dataset,
            order=EpochOrder(dataset),
            model=model.to(device),
            device=device,
            precision="amp_bf16",
            folder=NullRunFolder(Path(tempfile.gettempdir())),
            phases=Phases(device),
        )
    )
    trainer.log.start(0)
    return trainer


def _bare_loop(files: str, batch: int) -> Iterator[float]:
    """The same training in twenty lines, with all rows in memory."""
    pairs = open_dataset(files)
    image = torch.from_numpy(pairs.images.rows(0, len(pairs))).to(DEVICE)
    text = torch.from_numpy(pairs.texts[0].rows(0, len(pairs))).to(DEVICE)
    heads = Heads(IMAGE_WIDTH, TEXT_WIDTH, 512).to(DEVICE)
    heads.visual.mean.copy_(image.float().mean(0))
    heads.text.mean.copy_(text.float().mean(0))
    adamw = torch.optim.AdamW(heads.parameters(), lr=1e-3, fused=True)
    while True:
        order = torch.randperm(len(pairs))
        for chosen in order.to(DEVICE).split(batch):
            with torch.autocast(DEVICE, torch.bfloat16):
                u, v = heads.encode_image(image[chosen]), heads.encode_text(text[chosen])
            u = F.normalize(u.float(), dim=1).to(u.dtype)
            v = F.normalize(v.float(), dim=1).to(v.dtype)
            loss = protoclip.info_nce(u, v, heads.logit_scale.exp())
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 10.0)
            adamw.step()
            yield loss.item()


def test_trainer(bench: Bench, files: str) -> None:
    """Steps of ``protoclip train``, log lines and the reading of rows included."""
    batch = TRAINED[bench.sizes]
    trainer = _trainer(files, batch)
    losses = _bare_loop(files, batch)
    shape = Shape(batch, 512)
    work = _work(shape)
    case = Case(
        f"align, {AT_ONCE} steps", _sizes(shape), "bf16", Work(AT_ONCE * work.flop, 0.0), "run"
    )

    def train() -> None:
        trainer.train_until(trainer.step + AT_ONCE)

    def bare_loop() -> None:
        for _ in itertools.islice(losses, AT_ONCE):
            pass

    train()
    assert trainer.step == AT_ONCE
    note = "the ratio is to a bare loop with all rows in memory"
    bench.time(case, "protoclip train", train, rival=bare_loop, note=note)
