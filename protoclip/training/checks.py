"""What can be said against a run's settings before anything is made: no folder, no work lost."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from protoclip.config import TrainConfig
from protoclip.distributed import world_size
from protoclip.kmeans import load_faiss
from protoclip.model import check_model
from protoclip.ops.backends import why_not
from protoclip.prototypes import check_clusters
from protoclip.training.inputs import teacher_spec, uses_prototypes
from protoclip.training.plan import Plan, draw


def check_settings(config: TrainConfig, device: torch.device) -> None:
    """What needs neither data nor model.

    Raises:
        ValueError: no such model, a step without a loss, or k-means that cannot run.
    """
    check_model(config.model)
    _check_terms(config)
    if uses_prototypes(config):
        _check_kmeans(config, device)
    _check_environment(config, device)


def _check_terms(config: TrainConfig) -> None:
    """Each step of the run needs a loss."""
    weights, episode = config.loss, config.episode
    teacher = bool(teacher_spec(config)[0])
    if weights.w_clip > 0 or (teacher and weights.w_distill > 0):
        return
    internal = config.method == "protoclip" and weights.w_proto > 0
    if not internal and not (teacher and weights.w_proto_external > 0):
        what = f"--method {config.method}" + ("" if teacher else ", no external teacher")
        raise ValueError(
            f"--w-clip 0: expected another loss with a weight, got none ({what}); use --w-clip 1, "
            "or give --w-proto, or a teacher and --w-proto-external, a weight"
        )
    if episode.infonce_warmup or episode.lit_start:
        flag = "infonce-warmup-epoch" if episode.infonce_warmup else "lit-start"
        value = episode.infonce_warmup or episode.lit_start
        raise ValueError(
            f"--w-clip 0: expected prototypes in every step, got --{flag} {value}, whose episodes "
            f"have InfoNCE only; use --{flag} 0, or --w-clip 1"
        )


def _check_kmeans(config: TrainConfig, device: torch.device) -> None:
    episode, reason = config.episode, None
    if episode.kmeans_backend == "faiss":
        load_faiss()
        if world_size() > 1:
            reason = "it runs in one process only"
    elif episode.kmeans_backend != "auto":
        for op in ("kmeans_assign", "segment_mean"):
            reason = reason or why_not(op, episode.kmeans_backend, device.type, torch.float32)
    if reason:
        raise ValueError(
            f"--kmeans-backend: expected one that can run here, got {episode.kmeans_backend}: "
            f"{reason}; use --kmeans-backend auto"
        )


def _check_environment(config: TrainConfig, device: torch.device) -> None:
    """PROTOCLIP_BACKEND stands in for every backend that is not named."""
    backend = os.environ.get("PROTOCLIP_BACKEND", "") or "auto"
    ops = ["info_nce"] if config.loss.w_clip > 0 else []
    if uses_prototypes(config):
        ops += ["prototype_cross_entropy", "soft_targets"]
        ops += ["kmeans_assign", "segment_mean"] * (config.episode.kmeans_backend == "auto")
    for op in ops if backend != "auto" else ():
        if reason := why_not(op, backend, device.type, torch.float32):
            raise ValueError(
                f"PROTOCLIP_BACKEND: expected one that can run all of this, got {backend}: "
                f"{reason}; unset it, or see protoclip.backends({op!r})"
            )


def check_episodes(
    config: TrainConfig, plan: Plan, samples: int, order: Callable[[torch.Generator], Tensor]
) -> None:
    """Whether each episode that is clustered has a sample for each cluster.

    Args:
        config, plan: of the run.
        samples: of the data set.
        order: makes an epoch, as ``draw`` takes it.
    Raises:
        ValueError: one has not: a run may end early in it, or draw samples several times.
    """
    check_clusters(config.episode, min(samples, plan.steps_per_episode * plan.batch_size))
    first, last = config.episode.infonce_warmup, plan.episodes
    if config.episode.lit_start:
        last = min(last, config.episode.lit_start)
    if config.episode.reuses:  # what the episode before has trained on
        first, last = first - 1, last - 1
    num_clusters = config.episode.num_clusters
    if not num_clusters or first >= last:
        return

    def check(number: int) -> int:
        again, seed = config.episode.replacement, config.run.seed
        draws = draw(plan, seed, plan.steps_of(number), replacement=again, order=order)
        distinct = len(draws.unique())
        check_clusters(config.episode, distinct, f"episode {number + 1}")
        return distinct

    check(last - 1)  # it may be a short one
    if 2 * num_clusters > check(first):  # the others are like the first, within chance
        for number in range(first + 1, last - 1):
            check(number)
