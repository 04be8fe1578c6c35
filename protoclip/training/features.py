"""The features that an episode's prototypes are made of: stored from training's own steps, or from
a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protoclip.distributed import world_size
from protoclip.episodes.feature_store import (
    Features,
    FeatureSource,
    FeatureStore,
    choose_features,
    stored_bytes,
)
from protoclip.settings.config import EpisodeConfig
from protoclip.training.schedule import Plan
from protoclip.training.step import Step


class EpisodeFeatures:
    """Decides where features come from, and gives those of an episode.

    Args:
        samples: of the data set.
        dim: of the projections.
        device: where the model is.
        needed: whether the run trains prototypes.
        reuses: whether a resumed run stores features, whatever "auto" would choose.
        extract: from the number of an episode and int64 [M] sorted positions, a forward pass over
            this rank's share of them.
    """

    def __init__(
        self,
        config: EpisodeConfig,
        plan: Plan,
        *,
        samples: int,
        dim: int,
        device: torch.device,
        needed: bool,
        reuses: bool | None,
        extract: Callable[[int, Tensor], Features],
    ) -> None:
        self.plan = plan
        self.samples = samples
        self.dim = dim
        self.extract = extract
        self.store: FeatureStore | None = None
        self.source = FeatureSource(False, "none")
        if not needed:
            return
        if reuses is not None:
            config = replace(config, features="reuse" if reuses else "extract")
        self.source = choose_features(config, plan.epochs, self.stored_bytes(world_size()), device)
        if self.source.reuses:
            self.store = FeatureStore(
                samples,
                plan.steps_per_episode,
                plan.global_batch_size,
                device,
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

    def put(self, step_number: int, episode_number: int, outcome: Step) -> None:
        """Put a step's projections into the buffer, which moves to the table after the episode's
        last step; those of a skipped step belong to no sample."""
        if self.store is None or outcome.projected is None:
            return
        positions = outcome.index.where(outcome.finite, -1)
        steps = self.plan.steps_of(episode_number)
        projected = outcome.projected
        self.store.put(step_number - steps.start, positions, projected.image, projected.text)
        if step_number == steps[-1]:  # before anything can save
            self.store.end_episode(episode_number)

    def state_dict(self, folder: Path) -> dict[str, Any] | None:
        """What is stored; a collective call. ``folder``: for temporary files."""
        return None if self.store is None else self.store.state_dict(folder)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from what was stored."""
        if self.store is not None:
            self.store.load_state_dict(state or {})
