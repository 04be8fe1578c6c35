"""What a training run is made of, and how its parts are opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from protoclip.common.phases import Phases
from protoclip.data import PairDataset
from protoclip.data.loader import EpochOrder, Faults, Loader
from protoclip.distributed import world_size
from protoclip.episodes.prototypes import EpisodeBuilder
from protoclip.evaluate.during import Evaluation
from protoclip.losses.objective import Term
from protoclip.model import ProtoModel
from protoclip.runs.resume import Resume
from protoclip.runs.run_folder import NullRunFolder
from protoclip.settings.config import TrainConfig
from protoclip.training.checks import ActiveLosses, active_losses
from protoclip.training.schedule import Plan


@dataclass(frozen=True)
class Run:
    """Everything that is open before the first step. The loop trains ``model`` and writes to
    ``folder``; the rest stays as it is."""

    config: TrainConfig
    plan: Plan
    dataset: PairDataset
    order: EpochOrder
    model: ProtoModel
    device: torch.device
    precision: str  # "fp32", "amp_bf16" or "amp"
    folder: NullRunFolder
    phases: Phases
    teacher: Tensor | None = None  # [dataset, d] fp32, on the device
    teacher_remark: str = ""  # for the log
    workers: int = 0  # processes that read images
    terms: Mapping[str, Term] = field(default_factory=dict)  # losses of the user's own, by name
    evaluation: Evaluation | None = None
    resume: Resume | None = None  # the checkpoint to continue from
    data_fingerprint: str = ""  # what a resumed run must find again

    @cached_property
    def active(self) -> ActiveLosses:
        """The losses that are trained besides InfoNCE."""
        return active_losses(self.config, has_teacher=self.teacher is not None)

    @property
    def passes(self) -> list[int]:
        """How a step's batch is split: ranks, and forward passes of each."""
        return [world_size(), self.config.optim.accum_freq]

    def open_loader(self, faults: Faults) -> Loader:
        """What loads the batches of training and of extraction."""
        data = self.config.data
        return Loader(
            self.dataset,
            self.config.optim.batch_size,
            self.model.transform(data.augmentation),
            self.model.short_tokenizer,
            workers=self.workers,
            prefetch_factor=data.prefetch_factor,
            captions=data.captions,
            faults=faults,
            pin_memory=self.device.type == "cuda",
        )

    def episode_builder(self) -> EpisodeBuilder:
        """What makes the prototypes of every episode."""
        classes = {
            name: labels.ids.to(self.device)
            for name, labels in self.dataset.labels.items()
            if bool((labels.ids >= 0).all())  # known of every sample
        }
        return EpisodeBuilder(
            self.config.episode,
            teacher=self.teacher if self.active.external else None,
            internal=self.active.internal,
            classes=classes,
        )
