"""A trainer's state as a checkpoint, and back; when to write one, and when to end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from protoclip.config import to_dict
from protoclip.data import Batch
from protoclip.distributed import gather_objects, rank
from protoclip.prototypes import IGNORE, Clustering, Episode, PrototypeSet
from protoclip.training.guard import describe, first_not_finite
from protoclip.training.saving import Stopped
from protoclip.training.state import fingerprint, pack, random_states, set_random_state, unpack

if TYPE_CHECKING:
    from protoclip.training.loop import Trainer

PER_RANK = ("faults",)  # what each rank knows of its own samples; the rest is common
PACKED = {cls.__name__: cls for cls in (Episode, Clustering, PrototypeSet)}


class Stateful(Protocol):
    """A part of a run with a state of its own; tensors, numbers, strings and containers of them."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> None: ...


def capture(trainer: Trainer, epoch: int | None) -> dict[str, Any]:
    """A checkpoint that OpenCLIP reads too; a collective call. ``epoch`` None: the newest."""
    states = {name: part.state_dict() for name, part in trainer.stateful.items()}
    of_ranks = gather_objects({name: states[name] for name in PER_RANK if name in states})
    return {
        "epoch": epoch or math.ceil(trainer.step / trainer.plan.steps_per_epoch),
        "name": trainer.folder.path.name,
        "state_dict": trainer.model.clip.state_dict(),
        "optimizer": trainer.optimiser.adamw.state_dict(),
        "protoclip": {
            **trainer.model.extra_state(),
            "config": to_dict(trainer.config),
            "step": trainer.step,
            "training": {
                "scaler": trainer.optimiser.scaler.state_dict(),
                "random": random_states(trainer.device),
                "episode": pack(trainer.episode),
                "seconds": trainer.phases.seconds(),
                "data": fingerprint(trainer.dataset.keys),
                "stateful": states,
                "stateful_of_other_ranks": of_ranks[1:],
            },
        },
    }


def restore(trainer: Trainer, payload: Mapping[str, Any]) -> None:
    """Let a new trainer go on from a checkpoint of the same run.

    Raises:
        ValueError: it is of another model, version or number of ranks, or lacks something.
    """
    try:
        _restore(trainer, payload)
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"--resume: the checkpoint does not hold the state of this run ({reason}); use an "
            "older checkpoint, or start a new run with --pretrained"
        ) from error


def _restore(trainer: Trainer, payload: Mapping[str, Any]) -> None:
    training = payload["protoclip"]["training"]
    if set(training["stateful"]) != set(trainer.stateful):
        raise ValueError(
            f"--resume: expected the state of {sorted(trainer.stateful)}, got that of "
            f"{sorted(training['stateful'])}; resume with the settings of the run"
        )
    trainer.model.load_state(dict(payload))
    trainer.optimiser.load_state(payload["optimizer"], training["scaler"])
    trainer.episode = unpack(training["episode"], PACKED, trainer.device)
    _check_episode(trainer.episode, len(trainer.dataset))
    others = training["stateful_of_other_ranks"]
    own = others[rank() - 1] if 0 < rank() <= len(others) else {}
    for name, part in trainer.stateful.items():
        part.load_state_dict(own.get(name, training["stateful"][name]))
    trainer.phases.restore(training["seconds"])
    trainer.step = payload["protoclip"]["step"]
    set_random_state(training["random"], trainer.device)


def _check_episode(episode: Episode | None, samples: int) -> None:
    """Labels that lead outside of the prototypes would end in an IndexError, or worse on a GPU."""
    if episode is None:
        return
    for one in episode.sets:
        labels = one.clustering.labels
        known = labels[labels != IGNORE]
        shapes = {
            one.prototypes.shape,
            (one.prototypes if one.targets is None else one.targets).shape,
        }
        if (
            labels.shape != (samples,)
            or ((known < 0) | (known >= len(one.prototypes))).any()
            or len(shapes) != 1
        ):
            raise ValueError(
                f"--resume: expected the prototypes of {samples} samples, got labels "
                f"{list(labels.shape)} and prototypes {list(one.prototypes.shape)} that do not "
                "belong together; use an older checkpoint"
            )


def save_or_stop(trainer: Trainer) -> None:
    """Write the newest state where it is due, and end where a signal asks for it."""
    timed, stop = trainer.agreement.ask(trainer.schedule.by_clock(), trainer.signals.level)
    if stop or timed or trainer.schedule.at(trainer.step):
        save_if_room(trainer, None, must=stop > 0)
    if stop:
        asked = trainer.signals.asked or "a signal to another rank"
        asked = "Ctrl-C" if asked == "SIGINT" else asked
        raise Stopped(
            f"stopped by {asked} after step {trainer.step}; go on with "
            f"--resume {trainer.folder.path}",
            130 if stop > 1 else 0,
        )


def save_if_room(trainer: Trainer, epoch: int | None, must: bool = False) -> None:
    """Save; a disk that refuses costs a warning, unless the run ``must``."""
    try:
        trainer.save(epoch)
    except OSError as error:
        if must:
            raise
        trainer.folder.say(
            f"checkpoint after step {trainer.step} not written: {error.strerror}; the last one is "
            "untouched, training goes on, make room on the disk"
        )


def report_bad_step(trainer: Trainer, step: int, parts: Sequence[Batch]) -> None:
    """Report a step that was skipped; after --max-bad-steps in a row save, explain and stop."""
    keys = [trainer.dataset.keys[i] for part in parts for i in part.index.tolist()]
    trainer.folder.note(f"step {step} skipped, loss or gradient not finite; samples: {keys}")
    limit = trainer.config.run.max_bad_steps
    if trainer.guard.in_a_row < limit:
        return
    trainer.guard.before()

    def terms(batch: Batch) -> dict[str, Tensor]:
        losses = trainer.forward(batch)[1]
        return {**losses.terms, "total": losses.total}

    culprits = [first_not_finite(trainer.model, part, terms) for part in parts]
    culprit = next((c for c in culprits if not c.startswith("nothing")), culprits[0])
    trainer.guard.undo()
    trainer.save(None)
    raise ValueError(
        f"training: loss or gradient was not finite in {limit} steps in a row, the last one "
        f"step {step}; first bad: {culprit}; samples: {describe(keys)} (all in out.log). The "
        f"weights are those before, saved in {trainer.folder.checkpoints}. Lower --lr, lengthen "
        "--warmup, use --precision fp32, or look at these samples"
    )
