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


class EpisodeFeatures:
    """Training's own projections, kept from one visit of a sample to the next, or features of a
    forward pass over an episode's samples; then nothing is kept of the steps. Its methods are
    collective calls.

    Attributes:
        source: which of the two, and why.
    """

    def __init__(self, run: Run, extract: Extract) -> None:
        self.source = _choose(run)
        self.extract = extract
        self.run = run
        self.store: FeatureStore | None = None
        if self.source.reuses:
            self.store = FeatureStore(
                len(run.dataset),
                run.plan.steps_per_episode,
                run.plan.global_batch_size,
                run.device,
                self.source.table_device,
            )

    def of(self, number: int, samples: Tensor) -> tuple[Features, Features | None]:
        """Those of an episode's ``samples``, int64 [M] sorted positions, and where they are stored
        for a teacher also those that the episode before has left."""
        if self.store is None:
            return self.extract(number, samples), None
        recent = self.store.of_episode(number - 1) if self.run.active.external else None
        return self.store.of_positions(samples), recent

    def keep(self, step: int, outcome: Step) -> None:
        """Take a step's projections; those of a skipped step belong to no sample."""
        if self.store is None or outcome.projected is None:
            return
        number = self.run.plan.episode_of(step)
        steps = self.run.plan.steps_of(number)
        positions = outcome.index.where(outcome.finite, -1)
        rows = outcome.projected
        self.store.put(step - steps.start, positions, rows.image, rows.text)
        if step == steps[-1]:  # before anything can save
            self.store.end_episode(number)

    def state(self) -> dict[str, Any] | None:
        """What is stored."""
        temporary = self.run.folder.path / "checkpoints"
        return None if self.store is None else self.store.state_dict(temporary)

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Continue from what was stored."""
        if self.store is not None:
            self.store.load_state_dict(state or {})


def _choose(run: Run) -> FeatureSource:
    if not run.active.prototypes:
        return FeatureSource(False, "none")
    config = run.config.episode
    if run.resume is not None:  # as before, whatever "auto" would choose now
        stores = run.resume.training.get("features") is not None
        config = replace(config, features="reuse" if stores else "extract")
    size = bytes_of_features(run, world_size())
    return choose_features(config, run.plan.epochs, size, run.device)


def bytes_of_features(run: Run, ranks: int) -> int:
    """Bytes that each of ``ranks`` stores, or would."""
    drawn = run.plan.steps_per_episode * run.plan.global_batch_size
    return stored_bytes(len(run.dataset), drawn, ranks, run.model.projection_dim)
