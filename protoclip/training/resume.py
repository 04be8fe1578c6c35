"""Which run ``--resume`` means, and whether it can go on under today's settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protoclip import checkpoint
from protoclip.config import TrainConfig, from_dict, to_dict
from protoclip.training.adopt import OpenClipRun, is_openclips
from protoclip.training.run_folder import check_name, is_locked
from protoclip.training.state import fingerprint

# What decides which sample comes when, or which tensors there are: it must not change.
FIXED = (
    "method", "data.train_num_samples", "data.captions", "data.augmentation", "model.",
    "data.dataset_resampled", "data.train_data_upsampling_factors", "data.shuffle_buffer",
    "episode.size", "episode.replacement", "optim.batch_size", "optim.accum_freq", "run.seed",
    "run.precision",
)  # fmt: skip
# What changes nothing about the training itself.
FREE = (
    "data.workers", "data.val_data", "data.train_data", "data.csv_", "model.pretrained",
    "run.name", "run.logs", "run.device", "run.log_every_n_steps", "run.val_frequency",
    "run.save_frequency", "run.delete_previous_checkpoint", "run.save_every", "run.report_to",
    "run.wandb_project_name", "run.resume", "run.max_bad_steps", "run.dist_",
    "data.max_bad_fraction", "data.check_data", "model.grad_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Resume:
    """A run to go on with."""

    folder: Path
    file: Path
    payload: Mapping[str, Any]

    @property
    def training(self) -> Mapping[str, Any]:
        """What ``Trainer.state`` wrote."""
        return self.payload["protoclip"]["training"]

    @property
    def step(self) -> int:
        return int(self.payload["protoclip"]["step"])


def find_resume(config: TrainConfig) -> Resume | OpenClipRun | None:
    """The run that ``--resume`` means, ours or OpenCLIP's; None: start a new one.

    "auto" takes logs/NAME, or without --name the newest unfinished run of the same settings under
    --logs, if it has a checkpoint that can be read.

    Raises:
        ValueError: the named run has no checkpoint that can be read, or no state to go on from.
    """
    wish = config.run.resume
    if not wish:
        return None
    check_name(config.run.name)
    if wish == "auto":
        named = Path(config.run.logs) / config.run.name if config.run.name else None
        folder = named if named is not None else _newest_unfinished(config)
        if folder is None or not checkpoint.candidates(folder):
            return None
        return _read(folder, *checkpoint.load_newest(folder))
    path = Path(wish)
    if path.is_file():
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return _read(folder, path, checkpoint.load(path))
    if not path.is_dir():
        raise ValueError(
            f"--resume: expected a run folder, a checkpoint or auto, found nothing at {path}"
        )
    return _read(path, *checkpoint.load_newest(path))


def _read(folder: Path, file: Path, payload: dict[str, Any]) -> Resume | OpenClipRun:
    if is_openclips(payload):
        return OpenClipRun(file, int(payload["epoch"]))
    if not isinstance(payload.get("protoclip", {}).get("training"), dict):
        raise ValueError(
            f"--resume: {file} has weights but no state of a run (no 'protoclip' entry that "
            "protoclip.train wrote); start from its weights by --pretrained"
        )
    checkpoint.check_form(file, payload, complete=True)
    return Resume(folder, file, payload)


def _newest_unfinished(config: TrainConfig) -> Path | None:
    """The run under --logs that was written last and has the same settings and no results yet."""
    runs = [path.parent for path in Path(config.run.logs).glob("*/config.json")]
    for folder in sorted(filter(checkpoint.candidates, runs), key=_age):
        if (folder / "results.json").exists() or is_locked(folder):
            continue
        try:
            saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            from_dict(TrainConfig, saved)
        except (OSError, ValueError, TypeError):
            continue
        changed = [key for key, _, _ in _changes(saved, to_dict(config))]
        if not [key for key in changed if not key.startswith("run.")]:
            return folder
    return None


def _age(folder: Path) -> float:
    return -checkpoint.candidates(folder)[0].stat().st_mtime


def check_resume(resume: Resume, config: TrainConfig, keys: Any) -> list[str]:
    """Notes on settings that differ from the run's.

    Raises:
        ValueError: a setting, or the data, that the run cannot go on with.
    """
    notes: list[str] = []
    wrong: list[str] = []
    for key, before, now in _changes(resume.payload["protoclip"]["config"], to_dict(config)):
        if any(key.startswith(name) for name in FREE):
            continue
        change = f"{key} was {before!r} and is {now!r}"
        (wrong if any(key.startswith(name) for name in FIXED) else notes).append(change)
    if wrong:
        raise ValueError(
            f"--resume: {resume.file} cannot go on with other settings: {'; '.join(wrong)}; give "
            "the run's own, or start a new run with --pretrained"
        )
    if (now := fingerprint(keys)) != resume.training.get("data"):
        raise ValueError(
            f"--resume: the training data are not those of {resume.file} ({now} instead of "
            f"{resume.training.get('data')}: size and digest of the keys); give the same data, or "
            "start a new run with --pretrained"
        )
    return [f"since the checkpoint, {note}: not the same run any more" for note in notes]


def _changes(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names, old and new values of the settings that differ."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new and not (
            isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and [*old] == [*new]
        ):
            yield prefix + key, old, new
