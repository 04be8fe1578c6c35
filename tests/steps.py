"""A trainer of a given model, for tests of single steps."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import config_of

from protoclip.common.phases import Phases
from protoclip.data import Batch, PairDataset, open_dataset
from protoclip.data.loader import EpochOrder
from protoclip.episodes.prototypes import EXTERNAL, Episode, PrototypeSet
from protoclip.model import ProtoModel, build_model
from protoclip.runs.run_folder import NullRunFolder
from protoclip.settings.config import LossConfig, ModelConfig
from protoclip.training.loop import Trainer
from protoclip.training.run import Run
from protoclip.training.schedule import make_plan

PAIRS = 6


def trainer_of(
    model: ProtoModel,
    episode: Episode | None = None,
    *flags: str,
    loss: LossConfig | None = None,
    dataset: PairDataset | None = None,
    folder: Path | None = None,
    teacher: torch.Tensor | None = None,
) -> Trainer:
    """Trains ``model`` where it is, with the episode's prototypes, at a learning rate of 1e-3, and
    writes nothing but checkpoints' temporary files.

    Args:
        flags: of ``protoclip train``.
        loss: the weights; default: the flags'.
    """
    method = "clip" if episode is None else "protoclip"
    constant = ("--lr", "1e-3", "--warmup", "0", "--lr-scheduler", "const")
    features = ("--episode-features", "extract")
    config = config_of("--method", method, "--batch-size", str(PAIRS), *constant, *features, *flags)
    dataset = dataset or open_dataset("builtin:shapes:64")
    device = next(model.parameters()).device
    run = Run(
        config=replace(config, loss=loss or config.loss),
        plan=make_plan(config, len(dataset)),
        dataset=dataset,
        order=EpochOrder(dataset),
        model=model,
        device=device,
        precision="fp32",
        folder=NullRunFolder(folder or Path(tempfile.gettempdir())),
        phases=Phases(device),
        teacher=teacher,
    )
    trainer = Trainer(run)
    trainer.episode = episode
    return trainer


def episode_on(device: str, projection_dim: int) -> Episode:
    """Four prototypes of each source, internal ones with soft targets."""
    with torch.device(device):
        prototypes = torch.ones(4, projection_dim)
        sets = [PrototypeSet("image", "text", prototypes, targets=prototypes)]
        sets += [PrototypeSet(EXTERNAL, student, prototypes, None) for student in ("image", "text")]
        labels = {source: torch.zeros(PAIRS, dtype=torch.int32) for source in ("image", EXTERNAL)}
        return Episode(torch.arange(PAIRS), labels, {}, tuple(sets))


def steps_on(device: str, nano: Path, case: str) -> tuple[Trainer, Any]:
    """A trainer on the device and a function that takes a step."""
    siglip = case == "siglip"
    with torch.device(device):
        model = build_model(ModelConfig(model=str(nano), siglip=siglip), device)
    weights = LossConfig(w_proto=1.0, dedup="caption" if case == "dedup" else "off")
    episode = episode_on(device, model.projection_dim) if case == "prototypes" else None
    trainer = trainer_of(model, episode, loss=weights)
    size = PAIRS // 2 if case == "accumulation" else PAIRS
    pixels = torch.randn(size, 3, model.image_size, model.image_size)
    tokens = model.short_tokenizer(["a red circle"] * size)
    batches = [
        Batch(torch.arange(first, first + size), pixels, tokens) for first in range(0, PAIRS, size)
    ]
    return trainer, lambda: trainer.take_step(0, batches)


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the batches of some steps hold one picture of NaN."""
    original_step = Trainer.take_step

    def poisoned(trainer: Trainer, step: int, batches: Any) -> Any:
        if step in steps:
            batches[0].image[3] = float("nan")
        return original_step(trainer, step, batches)

    monkeypatch.setattr(Trainer, "take_step", poisoned)
