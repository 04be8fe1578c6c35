"""The state of training in a checkpoint: named values.

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


class Stored(NamedTuple):
    """A value in a checkpoint, the same for any number of ranks."""

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


def restore(resume: Resume, table: Mapping[str, Stored]) -> dict[str, Any]:
    """Let the table's rows take their values from a checkpoint; returns the values.

    Raises:
        ValueError: a value is missing, or not what its row can take.
    """
    of_protoclip = resume.payload["protoclip"]
    values = {"own_terms": {}, **resume.payload, **of_protoclip, **of_protoclip["training"]}
    for name in table:
        if name not in values:
            raise _unfit(f"it lacks {name}")
    for name, row in table.items():
        try:
            if row.take is not None:
                row.take(values[name])
        except (AttributeError, LookupError, TypeError) as error:
            raise _unfit(f"{name}: {error!r}") from error
    return values


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
