"""What happens between two episodes: features of the coming samples, clusters, prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from protoclip.data import batches
from protoclip.distributed import broadcast, generator, own_slice, world_size
from protoclip.prototypes import Episode, EpisodeBuilder, Features, extract
from protoclip.training.capture import save_or_stop
from protoclip.training.plan import EPISODES

if TYPE_CHECKING:
    from protoclip.training.loop import Trainer


def episode_seed(seed: int, number: int, purpose: int) -> int:
    """Of one purpose (0 training, 1 features) in episode ``number``."""
    random = generator(seed, EPISODES, number, purpose)
    return int(torch.randint(2**31, (), generator=random))


def rebuild_episode(trainer: Trainer, number: int, draws: Tensor, bar: tqdm, head: str) -> Episode:
    """The prototypes of episode ``number``, whose samples are ``draws``."""
    indices = draws.unique()
    # A run that began elsewhere (adopt.py) has trained on nothing yet.
    reused = trainer.store if trainer.store is not None and not trainer.store.is_empty else None
    with trainer.phases.measure("features"):
        if reused is not None:
            features = reused.features()
        else:
            features = _extract(trainer, indices, number, bar, head)
    bar.set_description(f"{head} clusters")
    with trainer.phases.measure("clusters"):
        builder = EpisodeBuilder(
            trainer.config.episode,
            trainer.dataset.keys,
            teacher=trainer.teacher,
            internal=trainer.internal,
            classes={
                name: known.ids.to(trainer.device) for name, known in trainer.dataset.labels.items()
            },
        )
        return builder.build(
            features,
            generator(trainer.config.run.seed, EPISODES, number, 2),
            trainer.episode,
            coming=None if reused is None else indices,
        )


def _extract(trainer: Trainer, indices: Tensor, number: int, bar: tqdm, head: str) -> Features:
    """A forward pass over this rank's slice of the episode's samples."""
    model = trainer.model
    broadcast(*model.buffers())  # running statistics, where each rank has its own
    numbers = torch.arange(len(indices))[own_slice(len(indices))]
    indices = indices[numbers]
    done = 0

    def show(rows: int) -> None:
        nonlocal done
        done += rows
        if trainer.signals.asked and world_size() == 1:
            save_or_stop(trainer)  # nothing has changed since the last step
        bar.set_description(f"{head} features {100 * done // len(indices)}%")

    show(0)
    stream = batches(
        trainer.dataset,
        indices,
        trainer.config.optim.batch_size,
        trainer.transform,
        model.short_tokenizer,
        seed=episode_seed(trainer.config.run.seed, number, 1),
        workers=trainer.config.data.workers,
        captions=trainer.config.data.captions,
        numbers=numbers,
        faults=trainer.faults,
    )
    return extract(model, stream, device=trainer.device, autocast=trainer.autocast, progress=show)
