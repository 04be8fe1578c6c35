"""One evaluation from a loaded model to its results: caching, ranks, precision, progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from protoclip.distributed import world_size
from protoclip.evaluate.cache import FeatureCache
from protoclip.evaluate.encode import encode_sets
from protoclip.evaluate.layouts import Layout, open_layout
from protoclip.evaluate.models import Loaded
from protoclip.evaluate.results import Results
from protoclip.evaluate.scores import evaluate_features
from protoclip.evaluate.sets import Encoder
from protoclip.evaluate.tasks import TASKS, impossible
from protoclip.model import autocast_for


@dataclass(frozen=True)
class Settings:
    """What ``python -m protoclip.evaluate`` was asked for."""

    data: str
    tasks: tuple[str, ...] | None = None  # None: what the data allows
    split: str = "auto"
    captions: str = "first"
    protocol: str = "heldout"
    seed: int = 0
    batch_size: int = 256
    workers: int = 0
    cached: bool = True
    csv: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)


def evaluate_loaded(
    loaded: Loaded, settings: Settings, device: torch.device, precision: str, bar: Any = None
) -> tuple[Results, list[str]]:
    """Results, and remarks for the reader; to be called by all ranks.

    Args:
        loaded: its model is on ``device``.
        settings: what to do.
        precision: "fp32", "amp_bf16" or "amp".
        bar: a tqdm whose total grows as work becomes known; None: silence.
    Raises:
        ValueError: the data cannot be opened, or does not allow a task that was asked for.
    """
    prepared = f"{precision} {loaded.model.preprocess()}"
    cache = FeatureCache(loaded.model.clip, prepared) if settings.cached else None
    encoder = Encoder(
        loaded.model,
        device,
        settings.batch_size,
        settings.workers,
        autocast_for(precision, device),
        progress=None if bar is None else bar.update,
        expect=None if bar is None else lambda rows: _grow(bar, rows),
        cache=cache,
        sharded=world_size() > 1,
    )
    tasks = settings.tasks or TASKS
    opened: str | Layout = settings.data
    refused: dict[str, str] = {}
    if not settings.data.startswith("builtin:"):
        opened = open_layout(settings.data, split=settings.split, **settings.layout, **settings.csv)
        refused = impossible(tasks, opened)
    if settings.tasks and refused:
        task, reason = next(iter(refused.items()))
        raise ValueError(f"--tasks {task}: {reason} ({settings.data}); leave that task out")
    sets, train = encode_sets(
        encoder,
        opened,
        split=settings.split,
        seed=settings.seed,
        captions=settings.captions,
        tasks=tasks,
        open_kwargs=settings.csv,
    )
    results = evaluate_features(sets, train, tasks=tasks, protocol=settings.protocol)
    remarks = [f"Without {task}: {reason}." for task, reason in refused.items()]
    if cache is not None and cache.rows_found:
        remarks.append(f"{cache.rows_found:,} rows of features came from {cache.folder}.")
    return results, remarks


def _grow(bar: Any, rows: int) -> None:
    bar.total = (bar.total or 0) + rows
    bar.refresh()
