"""The state of training in a checkpoint: a value, checked as it is read.

What a checkpoint holds besides is OpenCLIP's: weights and optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from protoclip.model import ProtoModel
from protoclip.runs import checkpoint
from protoclip.settings.config import TrainConfig, to_dict

ENTRIES = {  # of the nested entries
    "optimizer": {"state", "param_groups"},
    "episode": {"positions", "labels", "centroids", "sets", "metrics"},
    "watch": {"first_inertia", "first_labelled", "hits"},
    "features": {"index", "buffer", "table", "written"},
}


@dataclass(frozen=True)
class TrainingState:
    """Training between two steps; the same for any number of ranks."""

    global_batch_size: int  # of a step, over all ranks and passes
    passes: list  # [ranks, forward passes of each]
    precision: str
    terms: dict  # name -> whether it is trained
    scaler: dict  # empty unless fp16 gradients are scaled
    episode: dict | None  # prototypes and labels, if the episode has any
    watch: dict  # what tells a collapse
    features: dict | None  # stored features; empty on ranks other than 0; None: none are stored
    skipped: list  # [all skipped steps, those in a row]
    faults: list  # positions of the samples that could not be read, int
    seconds: dict  # phase -> float
    data: str  # fingerprint of the training data


def payload(
    state: TrainingState,
    *,
    step: int,
    epoch: int,
    name: str,
    config: TrainConfig,
    model: ProtoModel,
    optimizer: Mapping[str, Any],
    own_terms: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a checkpoint that OpenCLIP can read."""
    of_protoclip = {
        **model.extra_state(),
        "format": checkpoint.FORMAT,
        "config": to_dict(config),
        "step": step,
        "training": vars(state),
    }
    if own_terms:
        of_protoclip["own_terms"] = dict(own_terms)
    return {
        "epoch": epoch,
        "name": name,
        "state_dict": model.clip.state_dict(),
        "optimizer": dict(optimizer),
        "protoclip": of_protoclip,
    }


def read_state(payload: Mapping[str, Any]) -> TrainingState:
    """The state of training in a checkpoint's content.

    Raises:
        ValueError: an entry is missing or has another type.
    """
    training = payload["protoclip"]["training"]
    _check_type("step", payload["protoclip"]["step"], "int")
    _check_type("optimizer", payload.get("optimizer"), "dict")
    for field in fields(TrainingState):
        if field.name not in training:
            raise _unfit(f"it lacks {field.name}")
        _check_type(field.name, training[field.name], str(field.type))
    for number in (*training["passes"], *training["skipped"], *training["faults"]):
        _check_type("a count", number, "int")
    for name in ("passes", "skipped"):
        if len(training[name]) != 2:
            raise _unfit(f"{name}: expected 2 numbers, got {len(training[name])}")
    for name, expected in ENTRIES.items():
        entries = payload[name] if name == "optimizer" else training[name]
        if entries and (missing := sorted(expected - entries.keys())):
            raise _unfit(f"{name} lacks {', '.join(missing)}")
    return TrainingState(**{field.name: training[field.name] for field in fields(TrainingState)})


def _check_type(name: str, value: Any, expected: str) -> None:
    allowed = expected.split(" | ")
    if type(value).__name__.replace("NoneType", "None") not in allowed:
        raise _unfit(f"{name}: expected {expected}, got {type(value).__name__}")


def _unfit(reason: str) -> ValueError:
    return ValueError(
        f"--resume: the checkpoint does not hold the state of this run ({reason}); use an older "
        "checkpoint"
    )


def differences(
    saved: TrainingState, *, passes: list[int], precision: str, trained: str, trains: str
) -> list[str]:
    """Notes on why a resumed run's losses will not be those of an uninterrupted run.

    ``passes`` and ``precision`` are those of this run; ``trained`` and ``trains`` say which terms
    the run had, and has from here on.
    """
    differ = "so the losses differ from those of an uninterrupted run"
    notes = []
    if passes != saved.passes:
        notes.append(
            "note: the number of ranks or passes has changed; this model has dropout or batch "
            f"norm by rank or pass, {differ}"
        )
    if precision != saved.precision:
        notes.append(
            f"note: until now the run computed in {saved.precision}, and --precision auto means "
            f"{precision} here, {differ}; --precision {saved.precision} avoids this"
        )
    if trains != trained:
        notes.append(
            f"note: until now the run trained {trained}, and from here on {trains}, {differ}"
        )
    return notes
