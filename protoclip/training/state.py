"""The state of training in a checkpoint: named values, checked as they are read.

``Trainer.stored`` is the table of them. What a checkpoint holds besides is OpenCLIP's: weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from protoclip.runs import checkpoint
from protoclip.runs.resume import Resume
from protoclip.settings.config import to_dict
from protoclip.training.checks import ActiveLosses, depends_on_split
from protoclip.training.run import Run

PAIRS = ("passes", "skipped")  # lists of two numbers
ENTRIES = {  # of the dicts that are not empty
    "optimizer": {"state", "param_groups"},
    "episode": {"positions", "labels", "centroids", "sets", "metrics"},
    "watch": {"first_inertia", "first_labelled", "hits"},
    "features": {"index", "buffer", "table", "written"},
}


class Stored(NamedTuple):
    """A value in a checkpoint, the same for any number of ranks."""

    kind: str  # its type; a list holds whole numbers
    give: Callable[[], Any]  # a collective call
    take: Callable[[Any], object] | None = None  # continues with it; None: it is only compared


def payload(values: Mapping[str, Any], step: int, run: Run) -> dict[str, Any]:
    """The content of a checkpoint that OpenCLIP can read. ``values``: of the table's rows."""
    training = dict(values)
    optimizer = training.pop("optimizer")  # where OpenCLIP has it
    own_terms = training.pop("own_terms")
    of_protoclip = {
        **run.model.extra_state(),
        "format": checkpoint.FORMAT,
        "config": to_dict(run.config),
        "step": step,
        "training": training,
    }
    if own_terms:
        of_protoclip["own_terms"] = own_terms
    return {
        "epoch": math.ceil(step / run.plan.steps_per_epoch),
        "name": run.folder.path.name,
        "state_dict": run.model.clip.state_dict(),
        "optimizer": optimizer,
        "protoclip": of_protoclip,
    }


def read(resume: Resume, table: Mapping[str, Stored]) -> dict[str, Any]:
    """The values of the table's rows in a checkpoint.

    Raises:
        ValueError: an entry is missing or has another type.
    """
    of_protoclip = resume.payload["protoclip"]
    _check_type("step", of_protoclip["step"], "int")
    values = {
        "optimizer": resume.payload.get("optimizer"),
        "own_terms": of_protoclip.get("own_terms", {}),
        **of_protoclip["training"],
    }
    for name, row in table.items():
        if name not in values:
            raise _unfit(f"it lacks {name}")
        _check(name, values[name], row.kind)
    return {name: values[name] for name in table}


def _check(name: str, value: Any, kind: str) -> None:
    _check_type(name, value, kind)
    if isinstance(value, list):
        for number in value:
            _check_type("a count", number, "int")
        if name in PAIRS and len(value) != 2:
            raise _unfit(f"{name}: expected 2 numbers, got {len(value)}")
    if isinstance(value, dict) and value:
        missing = sorted(ENTRIES.get(name, set()) - value.keys())
        if missing:
            raise _unfit(f"{name} lacks {', '.join(missing)}")


def _check_type(name: str, value: Any, expected: str) -> None:
    allowed = expected.split(" | ")
    if type(value).__name__.replace("NoneType", "None") not in allowed:
        raise _unfit(f"{name}: expected {expected}, got {type(value).__name__}")


def _unfit(reason: str) -> ValueError:
    return ValueError(
        f"--resume: the checkpoint does not hold the state of this run ({reason}); use an older "
        "checkpoint"
    )


def differences(run: Run, saved: Mapping[str, Any]) -> list[str]:
    """Notes on why a resumed run's losses will not be those of an uninterrupted run."""
    differ = "so the losses differ from those of an uninterrupted run"
    notes = []
    if depends_on_split(run.model) and run.passes != saved["passes"]:
        notes.append(
            "note: the number of ranks or passes has changed; this model has dropout or batch "
            f"norm by rank or pass, {differ}"
        )
    if run.precision != saved["precision"]:
        notes.append(
            f"note: until now the run computed in {saved['precision']}, and --precision auto means "
            f"{run.precision} here, {differ}; --precision {saved['precision']} avoids this"
        )
    trained = ActiveLosses(**saved["terms"]).words()
    if run.active.words() != trained:
        notes.append(
            f"note: until now the run trained {trained}, and from here on {run.active.words()}, "
            f"{differ}"
        )
    return notes
