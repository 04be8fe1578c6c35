"""The features that an episode's prototypes are made of: stored from training's own steps, or from
a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
from protoclip.training.run import Run
from protoclip.training.step import Step


class EpisodeFeatures:
    """Decides where features come from, and gives those of an episode.

    Args:
        extract: from the number of an episode and int64 [M] sorted positions, a forward pass over
            this rank's share of them.
    """

    def __init__(self, run: Run, extract: Callable[[int, Tensor], Features]) -> None:
        self.plan = run.plan
        self.samples = len(run.dataset)
        self.dim = run.model.projection_dim
        self.extract = extract
        self.store: FeatureStore | None = None
        self.source = FeatureSource(False, "none")
        if not run.active.prototypes:
            return
        config = run.config.episode
        if run.resume is not None:  # as before, whatever "auto" would choose now
            stores = run.resume.training["features"] is not None
            config = replace(config, features="reuse" if stores else "extract")
        stored = self.stored_bytes(world_size())
        self.source = choose_features(config, self.plan.epochs, stored, run.device)
        if self.source.reuses:
            self.store = FeatureStore(
                self.samples,
                self.plan.steps_per_episode,
                self.plan.global_batch_size,
                run.device,
                self.source.table_device,
            )

    def stored_bytes(self, ranks: int) -> int:
        """Bytes that each of ``ranks`` stores, or would."""
        drawn = self.plan.steps_per_episode * self.plan.global_batch_size
        return stored_bytes(self.samples, drawn, ranks, self.dim)

    def checkpoint_bytes(self) -> int:
        """Bytes of stored features in a checkpoint."""
        return 0 if self.store is None else self.stored_bytes(1)

    def of_samples(self, episode_number: int, samples: Tensor) -> Features:
        """Those of ``samples``, int64 [M] sorted positions, before the episode's first step."""
        if self.store is None:
            return self.extract(episode_number, samples)
        return self.store.of_positions(samples)

    def of_episode(self, episode_number: int) -> Features | None:
        """Those that the steps of an episode left, where they are stored."""
        return None if self.store is None else self.store.of_episode(episode_number)

    def put(self, step: int, outcome: Step) -> None:
        """Put a step's projections into the buffer, which moves to the table after the episode's
        last step; those of a skipped step belong to no sample."""
        if self.store is None or outcome.projected is None:
            return
        positions = outcome.index.where(outcome.finite, -1)
        episode_number = self.plan.episode_of(step)
        steps = self.plan.steps_of(episode_number)
        projected = outcome.projected
        self.store.put(step - steps.start, positions, projected.image, projected.text)
        if step == steps[-1]:  # before anything can save
            self.store.end_episode(episode_number)

    def state_dict(self, folder: Path) -> dict[str, Any] | None:
        """What is stored; a collective call. ``folder``: for temporary files."""
        return None if self.store is None else self.store.state_dict(folder)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from what was stored."""
        if self.store is not None:
            self.store.load_state_dict(state or {})
