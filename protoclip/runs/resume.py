"""``--resume``: the run to continue, and which of its settings must stay the same.

A setting marked ``fixed`` in ``settings.config`` must stay. Other settings of training may change
with a note, because the run is then no longer the same; the rest may change without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from protoclip import distributed
from protoclip.common.paths import run_of
from protoclip.runs import checkpoint
from protoclip.runs.run_folder import choose_folder
from protoclip.settings.config import TrainConfig, flat, to_dict

# How the names of other settings begin that change training too.
NOTED = ("episode.", "loss.", "optim.", "data.class_template", "data.csv_")
# These two and the number of ranks are compared as their product, the global batch.
GLOBAL_BATCH = ("optim.batch_size", "optim.accum_freq")


@dataclass(frozen=True)
class Resume:
    """A run to continue."""

    folder: Path
    file: Path
    payload: Mapping[str, Any]
    step: int

    @property
    def training(self) -> dict[str, Any]:
        """The state of training in the checkpoint."""
        return self.payload["protoclip"]["training"]


def find_resume(config: TrainConfig) -> Resume | None:
    """The run that ``--resume`` names; None: start a new one, as "auto" does without a checkpoint.

    Raises:
        ValueError: the named run has no readable checkpoint, or no state to continue from.
    """
    wanted = config.run.resume
    path = choose_folder(config) if wanted == "auto" else Path(wanted)
    if not wanted or (wanted == "auto" and not checkpoint.candidates(path)):
        return None
    if (path / "config.json").is_file() and not checkpoint.candidates(path):
        raise ValueError(
            f"--resume: {path} has no checkpoint to continue from, as its run ended before its "
            f"first save; start it again with --resume auto --logs {path.parent} --name {path.name}"
        )
    if not path.exists():
        raise ValueError(
            f"--resume: found nothing at {path}; check the path, or use --resume auto, which "
            "starts where there is none"
        )
    file, payload = checkpoint.load_newest(path)
    saved = payload.get("protoclip", {})
    if not {"training", "config", "step"} <= saved.keys():
        raise ValueError(
            f"--resume: checkpoint {file} has no state of a run; load its weights with --pretrained"
        )
    return Resume(run_of(path), file, payload, saved["step"])


def open_resume(config: TrainConfig) -> Resume | None:
    """The run that --resume names, on every rank; its stored features on rank 0 only."""
    stored: dict[str, Tensor] = {}

    def find() -> Resume | None:
        resume = find_resume(config)
        if resume is not None and resume.training.get("features"):
            stored.update(resume.training["features"])
            resume.training["features"] = {}  # not sent to the other ranks
        return resume

    resume = distributed.from_main(find)
    if resume is not None and stored:
        resume.training["features"] = stored
    return resume


def fixed_settings(config: Any = TrainConfig, prefix: str = "") -> Iterator[str]:
    """The dotted names of the settings that a resumed run must keep."""
    defaults = config()
    for item in fields(config):
        value = getattr(defaults, item.name)
        if is_dataclass(value):
            yield from fixed_settings(type(value), f"{prefix}{item.name}.")
        elif item.metadata["fixed"]:
            yield prefix + item.name


def changes_since(resume: Resume, config: TrainConfig) -> tuple[list[str], list[str]]:
    """Settings that differ from the resumed run's, a sentence each: those that must not, and others
    that matter."""
    # A setting that the run did not have yet was at its default.
    before = flat(to_dict(TrainConfig())) | flat(resume.payload["protoclip"]["config"])
    now = flat(to_dict(config))
    fixed = set(fixed_settings())
    forbidden: list[str] = []
    noted: list[str] = []
    for name in sorted({*before, *now}):
        if before.get(name) == now.get(name):
            continue
        change = f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        if name in fixed:
            forbidden.append(change)
        elif name.startswith(NOTED) and name not in GLOBAL_BATCH:
            noted.append(change)
    return forbidden, noted


def refuse_other_terms(resume: Resume, weights: Mapping[str, float]) -> None:
    """ValueError, by name, for a loss of the user's own that the resumed run did not have, or had
    with another weight, or lacks now. ``weights``: name -> weight of this run's."""
    saved = resume.payload["protoclip"].get("own_terms", {})
    before = {name: entry["weight"] for name, entry in saved.items()}
    wrong = [f"{name!r} is missing" for name in before if name not in weights]
    wrong += [f"{name!r} is new" for name in weights if name not in before]
    wrong += [
        f"{name!r} had the weight {before[name]:g} and has {weights[name]:g}"
        for name in before.keys() & weights.keys()
        if before[name] != weights[name]
    ]
    if wrong:
        raise ValueError(
            f"--resume: {resume.file} cannot be resumed with other terms: "
            f"{'; '.join(sorted(wrong))}; give train(terms=) those of the run, or start a new run "
            "with --pretrained"
        )


def refuse_changes(resume: Resume, config: TrainConfig) -> None:
    """ValueError for other settings of training where no step is left that would use them."""
    forbidden, noted = changes_since(resume, config)
    if forbidden or noted:
        raise ValueError(
            f"--resume: {resume.folder} has done all of its steps, so nothing would be trained "
            f"with other settings: {'; '.join(forbidden + noted)}; leave them out, add --epochs or "
            f"--max-steps for more steps, or start a new run with --pretrained {resume.file}"
        )


def check_resume(
    resume: Resume, config: TrainConfig, global_batch_size: int, data: str
) -> list[str]:
    """Notes on settings that differ from the resumed run; ValueError for those that must not.

    ``data``: the fingerprint of the training data.
    """
    wrong, noted = changes_since(resume, config)
    size_before = resume.training.get("global_batch_size")
    if size_before != global_batch_size:
        size = "the global batch_size (all ranks and passes)"
        wrong.append(f"{size} was {size_before} and is {global_batch_size}")
    data_before = resume.training.get("data")
    if not checkpoint.is_same(str(data_before), data):
        wrong.append(f"the training data was {data_before} and is {data}")
    if wrong:
        raise ValueError(
            f"--resume: {resume.file} cannot be resumed with other settings: "
            f"{'; '.join(wrong)}; use the run's own settings, or start a new run with --pretrained"
        )
    notes = [f"since the checkpoint, {note}: this is no longer the same run" for note in noted]
    if config.model.image_width and checkpoint.is_of_before(data):
        before = "made before version 0.2: of stored features only a sample of rows is compared"
        notes.append(f"{resume.file} was {before}")
    return notes
