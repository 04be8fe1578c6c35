"""The run folder: logs/NAME/{config.json, out.log, metrics.jsonl, tensorboard/, checkpoints/}."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from protoclip.common.files import lines_of, printable, printable_lines, sole_writer, write_atomic
from protoclip.common.json_text import parse_json
from protoclip.common.paths import check_above
from protoclip.runs import checkpoint
from protoclip.settings.config import TrainConfig, flat, to_dict

OWN_TERMS = "own_terms.json"  # name -> weight


def choose_folder(config: TrainConfig) -> Path:
    """The folder that a run will write to, not created yet. Under --resume auto it may exist, if a
    run has begun in it or it is empty.

    Raises:
        ValueError: the folder exists, cannot be created, would lie outside --logs, or has a name
            that torch and TensorBoard cannot open.
    """
    run = config.run
    if run.resume == "auto" and not run.name:
        raise ValueError("--resume auto: expected --name, the run to start or continue")
    started = time.strftime("%Y_%m_%d-%H_%M_%S")
    name = run.name or f"{started}-{config.method}-seed_{run.seed}"
    if name in (".", "..") or Path(name).name != name:
        raise ValueError(f"--name: expected a plain folder name, got {name!r}")
    path = Path(run.logs) / name
    check_above(path, "--logs")
    if printable(str(path)) != str(path):
        raise ValueError(
            f"--name: expected a run folder with a name in UTF-8, got {printable(str(path))}; "
            "choose another --logs or --name"
        )
    if path.exists() and not (run.resume == "auto" and _can_begin(path)):
        remedy = f"continue it with --resume {path}, choose"
        if not checkpoint.candidates(path):
            again = "start it again with --resume auto, " if _can_begin(path) else ""
            remedy = f"{again}choose"
        raise ValueError(
            f"--name: expected a new run folder, but {path} exists; {remedy} another --name, or "
            "remove it"
        )
    return path


def _can_begin(path: Path) -> bool:
    """Whether a path is the folder of a run, maybe one that could not write a file, or empty."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or not names.isdisjoint({".lock", "config.json"})


class NullRunFolder:
    """The run folder on ranks other than 0, which write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, resume_step: int | None = None, resume_file: Path | None = None) -> None: ...
    def say(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None: ...
    def checkpoint(self, payload: Mapping[str, Any], epoch: int | None) -> None: ...
    def close(self) -> None: ...


class RunFolder(NullRunFolder):
    """Writes a run's files, from ``open`` on.

    Args:
        own_terms: name -> weight of the losses that a user added, for the page.
    """

    def __init__(
        self, path: Path, config: TrainConfig, own_terms: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(path)
        self._config = config
        self._own_terms = own_terms
        self._checkpoints = path / "checkpoints"
        self._open = contextlib.ExitStack()

    def open(self, resume_step: int | None = None, resume_file: Path | None = None) -> None:
        """Create the folder and its files, once data, model and teacher are known to be valid.

        Args:
            resume_step: continue after this step and remove later log lines; 0: begin again and
                keep the old lines in a file next to the new ones; None: a new run, in a new folder.
            resume_file: the checkpoint to continue from.
        """
        self.path.mkdir(parents=True, exist_ok=resume_step is not None)
        self._open.enter_context(sole_writer(self.path / ".lock", "--name"))
        try:
            self._begin(resume_step, resume_file)
        except BaseException:
            self.close()  # a notebook may try again
            raise

    def _begin(self, resume_step: int | None, resume_file: Path | None) -> None:
        """Clear up what an earlier process left, and open the files; the folder is ours."""
        path = self.path
        config = self._config
        self._checkpoints.mkdir(exist_ok=True)
        for torn in self._checkpoints.glob("*.tmp"):  # left by a write that was killed
            torn.unlink()
        if resume_file is not None:  # before the lines of later steps go
            checkpoint.make_latest(resume_file, self._checkpoints)
        if resume_step == 0:
            _set_aside(path / "metrics.jsonl")
        _cut_back(path / "metrics.jsonl", resume_step or 0)
        # As a preset of another run it must not lead back to this one.
        settings = to_dict(replace(config, run=replace(config.run, resume="")))
        write_atomic(path / "config.json", json.dumps(settings, indent=2) + "\n")
        if self._own_terms:
            write_atomic(path / OWN_TERMS, json.dumps(self._own_terms) + "\n")
        self._metrics = self._append_to("metrics.jsonl")
        self._log = self._append_to("out.log")
        boards = config.run.report_to.split(",")
        self._tensorboard = self._wandb = None
        if "tensorboard" in boards:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=purge)
            self._open.callback(self._tensorboard.close)
        if "wandb" in boards:
            self._wandb = _open_wandb(path, config)
            self._open.callback(self._wandb.finish)

    def _append_to(self, name: str) -> TextIO:
        file = (self.path / name).open("a", encoding="utf-8", buffering=1)
        return self._open.enter_context(file)

    def say(self, text: str) -> None:
        """Write a message to the screen and to out.log."""
        text = printable_lines(text)  # it may name files of others
        tqdm.write(text, file=sys.stderr)  # without tearing the progress bar
        self.note(text)

    def note(self, text: str) -> None:
        """Write a message to out.log only."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write("".join(f"{stamp} {line}\n" for line in lines_of(text)))

    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl, and the same scalars to the boards: those of validation
        data under val/, the others under train/."""
        self._metrics.write(json.dumps({"step": step, "samples": samples, **scalars}) + "\n")
        by_title = {}
        for name, value in scalars.items():
            by_title[f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}"] = value
        if self._tensorboard is not None:
            for title, value in by_title.items():
                self._tensorboard.add_scalar(title, value, step)
        if self._wandb is not None:
            self._wandb.log(by_title, step=step)

    def checkpoint(self, payload: Mapping[str, Any], epoch: int | None) -> None:
        """Write epoch_latest.pt; with ``epoch`` it is kept under a number too.

        The old epoch_latest.pt becomes epoch_previous.pt. Metrics are synced first, so every step
        of a checkpoint has its line.
        """
        os.fsync(self._metrics.fileno())
        latest = self._checkpoints / checkpoint.LATEST
        checkpoint.save(latest, payload, previous=self._checkpoints / checkpoint.PREVIOUS)
        if epoch is None:
            return
        file = self._checkpoints / f"epoch_{epoch}.pt"
        checkpoint.link(latest, file)
        if self._config.run.delete_previous_checkpoint:
            for other in checkpoint.numbered(self._checkpoints):
                if other != file:
                    other.unlink()

    def close(self) -> None:
        """Flush and close every file."""
        with contextlib.suppress(OSError):  # the disk is full, which ended the run
            self._open.close()


def sum_up(
    folder: Path, config: TrainConfig, sheet: np.ndarray | None, scores: Mapping[str, float]
) -> None:
    """Add to TensorBoard a contact sheet of the clusters, uint8 [H, W, 3], and the settings as
    hparams with the final scores."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as board:
        if sheet is not None:
            board.add_image("clusters", sheet, dataformats="HWC")
        settings = {
            name: printable(value) if isinstance(value, str) else value
            for name, value in flat(to_dict(config)).items()
        }
        board.add_hparams(settings, dict(scores), run_name=".")


def _set_aside(path: Path) -> None:
    """Rename a metrics.jsonl that has records to metrics.1.jsonl, or to the next free number."""
    if path.exists() and path.stat().st_size:
        numbers = itertools.count(1)
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in numbers)
        path.rename(next(name for name in names if not name.exists()))


def _cut_back(path: Path, step: int) -> None:
    """Remove records after ``step``, and any torn record, from a metrics.jsonl."""
    lines = []
    for line in lines_of(path.read_text(encoding="utf-8")) if path.exists() else ():
        with contextlib.suppress(ValueError):
            if parse_json(line)["step"] <= step:
                lines.append(line + "\n")
    write_atomic(path, "".join(lines))


def _open_wandb(path: Path, config: TrainConfig) -> Any:
    """Open a wandb run with the run folder's name; a resumed run continues the same one.

    With WANDB_MODE=offline it stays in the folder's wandb/.
    """
    import wandb

    id_file = path / "wandb_id"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4))
    return wandb.init(
        project=config.run.wandb_project_name,
        name=path.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(path),
        config=to_dict(config),
    )
