"""A trainer of a given model, for tests of single steps."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from ranks import config_of

from protoclip.common.phases import Phases
from protoclip.data import PairDataset, open_dataset
from protoclip.data.loader import EpochOrder
from protoclip.episodes.prototypes import Episode
from protoclip.model import ProtoModel
from protoclip.runs.run_folder import NullRunFolder
from protoclip.settings.config import LossConfig
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
