"""The run folder: logs/NAME/{config.json, out.log, metrics.jsonl, tensorboard/, checkpoints/}."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from protoclip import checkpoint
from protoclip.config import TrainConfig, to_dict
from protoclip.data.files import write_atomic
from protoclip.training.append_log import AppendLog, cut_back
from protoclip.training.boards import check_boards, open_boards

LOGGER = logging.getLogger("protoclip.run")


class _AboveTheBar(logging.Handler):
    """Prints a record on stderr without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a file on a full disk
            tqdm.write(self.format(record), file=sys.stderr)


class _QuietFile(logging.FileHandler):
    """A log file whose disk may be full: the screen still has the message."""

    def handleError(self, record: logging.LogRecord) -> None:
        return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def choose_folder(config: TrainConfig) -> Path:
    """Where a new run will go; not made yet. Under --resume auto a run of that name that has no
    checkpoint yet is begun again.

    Raises:
        ValueError: something is there already, or the name would leave --logs.
    """
    check_boards(config)
    name = config.run.name or time.strftime(
        f"%Y_%m_%d-%H_%M_%S-{config.method}-seed_{config.run.seed}"
    )
    check_name(name)
    path = Path(config.run.logs) / name
    if path.exists() and not (config.run.resume == "auto" and (path / "config.json").exists()):
        raise ValueError(
            f"--name: expected a new run folder, but {path} exists; go on with it by --resume "
            f"{path}, choose another --name, or remove it"
        )
    return path


def check_name(name: str) -> None:
    """Raise ValueError where --name would leave --logs."""
    if name in (".", "..") or Path(name).name != name:
        raise ValueError(f"--name: expected a plain folder name, got {name!r}")


class FolderLock:
    """Keeps a second process out of a run folder; the system releases it when this one ends.

    Raises:
        ValueError: another process holds it; which one, as far as it said.
    """

    def __init__(self, path: Path) -> None:
        name = path / ".lock"
        try:
            self._file = open(name, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"--logs: cannot write to {path}: {error.strerror}; a run needs a folder it can "
                "write to"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"--name: {path} is in use by {holder}; wait for it, stop it, or choose another "
                "--name"
            ) from error
        except OSError:  # a file system without locks: nothing to hold
            return
        with contextlib.suppress(OSError):
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def release(self) -> None:
        self._file.close()


def is_locked(path: Path) -> bool:
    """Whether a run is going on in a folder."""
    try:
        FolderLock(path).release()
    except ValueError:
        return True
    return False


class RunFolder:
    """Writes what a run leaves behind; made once data, model and teacher are known to be good.

    Args:
        path: of the folder; made, unless ``resume_step`` is given.
        config: of the run.
        resume_step: step to go on after: what was logged later is removed; None: a new run.
    Raises:
        ValueError: the folder cannot be made or written, or a run is going on in it.
    """

    def __init__(self, path: Path, config: TrainConfig, resume_step: int | None = None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._keeps_one = config.run.delete_previous_checkpoint
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=resume_step is not None)
            self._lock = FolderLock(path)
            self.checkpoints.mkdir(exist_ok=True)
            self._open(config, resume_step)
        except FileExistsError as error:
            if not path.parent.is_dir():
                raise ValueError(f"--logs: expected a folder, {path.parent} is none") from error
            raise ValueError(f"--name: {path} exists; choose another --name") from error
        except OSError as error:
            raise ValueError(
                f"--logs: cannot write {error.filename or path}: {error.strerror}; a run needs a "
                "folder it can write to, on a disk with room"
            ) from error
        self._screen = _AboveTheBar()
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False
        LOGGER.addHandler(self._log)
        LOGGER.addHandler(self._screen)
        self._boards = open_boards(path, config, resume_step)
        self._given_up: set[str] = set()

    def _open(self, config: TrainConfig, resume_step: int | None) -> None:
        for rest in self.checkpoints.glob("*.tmp"):  # of a write that was killed
            rest.unlink(missing_ok=True)
        metrics = self.path / "metrics.jsonl"
        cut_back(metrics, resume_step or 0)
        write_atomic(self.path / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
        self._metrics = AppendLog(metrics, self.say)
        self._log = _QuietFile(self.path / "out.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def say(self, text: str) -> None:
        """One message, on the screen and in out.log."""
        LOGGER.info(text)

    def note(self, text: str) -> None:
        """One message in out.log only."""
        for line in text.splitlines():
            self._log.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, line, (), None))

    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same scalars for the boards."""
        record = {"step": step, "samples": samples, **scalars}
        self._metrics.write(json.dumps(record))
        for name in self._boards.keys() - self._given_up:
            try:
                self._boards[name].add(step, scalars)
            except OSError as error:
                self._given_up.add(name)
                self.say(f"{name}: {error.strerror}; no more curves there")

    def checkpoint(self, payload: Mapping[str, Any], epoch: int | None) -> None:
        """Write epoch_latest.pt, or with ``epoch`` a numbered one that is kept.

        The latest one before becomes epoch_previous.pt. Metrics reach the disk first, so that
        every step of a checkpoint has its line.
        """
        self._metrics.sync()
        if epoch is None:
            latest = self.checkpoints / checkpoint.LATEST
            previous = self.checkpoints / checkpoint.PREVIOUS
            checkpoint.save(latest, payload, previous=previous)
        else:
            checkpoint.save(self.checkpoints / f"epoch_{epoch}.pt", payload)
            if self._keeps_one:
                for path in self.checkpoints.glob("epoch_*.pt"):
                    number = path.stem.removeprefix("epoch_")
                    if number.isdigit() and int(number) < epoch:
                        path.unlink()

    def close(self) -> None:
        """Flush and close every file; the folder can be closed twice."""
        self._metrics.close()
        while self._boards:
            name, board = self._boards.popitem()
            try:
                board.close()
            except OSError as error:  # a full disk
                if name not in self._given_up:
                    self.say(f"{name}: {error.strerror}; its last points are missing")
        for handler in (self._log, self._screen):
            LOGGER.removeHandler(handler)
            handler.close()
        self._lock.release()
