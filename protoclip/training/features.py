"""The features that an episode's prototypes are made of: stored from training's own steps, or from
a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from protoclip.distributed import world_size
from protoclip.episodes.feature_store import (
    Features,
    FeatureSource,
    FeatureStore,
    choose_features,
    stored_bytes,
)
from protoclip.training.log import Step
from protoclip.training.run import Run

Extract = Callable[[int, Tensor], Features]  # episode, int64 [M] sorted positions


class ExtractedFeatures:
    """Features of a forward pass over an episode's samples; nothing is kept of the steps."""

    def __init__(self, source: FeatureSource, extract: Extract) -> None:
        self.source = source
        self.extract = extract

    def of(self, number: int, samples: Tensor) -> tuple[Features, Features | None]:
        """Those of an episode's ``samples``, int64 [M] sorted positions, and where they are stored
        also those that the episode before has left."""
        return self.extract(number, samples), None

    def keep(self, step: int, outcome: Step) -> None:
        """Take a step's projections; those of a skipped step belong to no sample."""

    def state(self) -> dict[str, Any] | None:
        """What is stored; a collective call."""
        return None

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from what was stored."""


class StoredFeatures(ExtractedFeatures):
    """Training's own projections, kept from one visit of a sample to the next."""

    def __init__(self, source: FeatureSource, extract: Extract, run: Run) -> None:
        super().__init__(source, extract)
        self.plan = run.plan
        self.has_teacher = run.active.external
        self.files = run.folder.path / "checkpoints"  # for temporary ones
        self.store = FeatureStore(
            len(run.dataset),
            run.plan.steps_per_episode,
            run.plan.global_batch_size,
            run.device,
            source.table_device,
        )

    def of(self, number: int, samples: Tensor) -> tuple[Features, Features | None]:
        recent = self.store.of_episode(number - 1) if self.has_teacher else None
        return self.store.of_positions(samples), recent

    def keep(self, step: int, outcome: Step) -> None:
        if outcome.projected is None:
            return
        number = self.plan.episode_of(step)
        steps = self.plan.steps_of(number)
        positions = outcome.index.where(outcome.finite, -1)
        rows = outcome.projected
        self.store.put(step - steps.start, positions, rows.image, rows.text)
        if step == steps[-1]:  # before anything can save
            self.store.end_episode(number)

    def state(self) -> dict[str, Any] | None:
        return self.store.state_dict(self.files)

    def load_state(self, state: dict[str, Any] | None) -> None:
        self.store.load_state_dict(state or {})


def open_features(run: Run, extract: Extract) -> ExtractedFeatures:
    """Decide where a run's features come from. A collective call."""
    if not run.active.prototypes:
        return ExtractedFeatures(FeatureSource(False, "none"), extract)
    config = run.config.episode
    if run.resume is not None:  # as before, whatever "auto" would choose now
        stores = run.resume.training["features"] is not None
        config = replace(config, features="reuse" if stores else "extract")
    bytes_of_rank = bytes_of_features(run, world_size())
    source = choose_features(config, run.plan.epochs, bytes_of_rank, run.device)
    return (
        StoredFeatures(source, extract, run)
        if source.reuses
        else ExtractedFeatures(source, extract)
    )


def bytes_of_features(run: Run, ranks: int) -> int:
    """Bytes that each of ``ranks`` stores, or would."""
    drawn = run.plan.steps_per_episode * run.plan.global_batch_size
    return stored_bytes(len(run.dataset), drawn, ranks, run.model.projection_dim)
