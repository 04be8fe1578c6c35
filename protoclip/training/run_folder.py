"""The run folder: logs/NAME/{config.json, out.log, metrics.jsonl, tensorboard/, checkpoints/}."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from protoclip import checkpoint
from protoclip.config import TrainConfig, to_dict

LOGGER = logging.getLogger("protoclip.run")


class _AboveTheBar(logging.Handler):
    """Prints a record on stderr without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def choose_folder(config: TrainConfig) -> Path:
    """Where the run will go; not made yet.

    Raises:
        ValueError: something is there already, or the name would leave --logs.
    """
    name = config.run.name or time.strftime(
        f"%Y_%m_%d-%H_%M_%S-{config.method}-seed_{config.run.seed}"
    )
    if name in (".", "..") or Path(name).name != name:
        raise ValueError(f"--name: expected a plain folder name, got {name!r}")
    path = Path(config.run.logs) / name
    if path.exists():
        raise ValueError(
            f"--name: expected a new run folder, but {path} exists; choose another --name, or "
            "remove it"
        )
    return path


class RunFolder:
    """Writes what a run leaves behind; made once data, model and teacher are known to be good."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError as error:
            raise ValueError(f"--name: {path} exists; choose another --name") from error
        except OSError as error:
            raise ValueError(f"--logs: cannot make {path}: {error.strerror}") from error
        self.checkpoints.mkdir()
        (path / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        self._metrics = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._log = logging.FileHandler(path / "out.log", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._screen = _AboveTheBar()
        LOGGER.setLevel(logging.INFO)
        LOGGER.propagate = False
        LOGGER.addHandler(self._log)
        LOGGER.addHandler(self._screen)
        self._board = None
        if config.run.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path / "tensorboard"))

    def say(self, text: str) -> None:
        """One message, on the screen and in out.log."""
        LOGGER.info(text)

    def note(self, text: str) -> None:
        """One message in out.log only."""
        for line in text.splitlines():
            self._log.handle(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, line, (), None))

    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same scalars as TensorBoard's train/*."""
        record = {"step": step, "samples": samples, **scalars}
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def checkpoint(self, payload: Mapping[str, Any], epoch: int | None) -> None:
        """Write epoch_latest.pt, or with ``epoch`` a numbered one that is kept."""
        name = checkpoint.LATEST if epoch is None else f"epoch_{epoch}.pt"
        checkpoint.save(self.checkpoints / name, payload)

    def close(self) -> None:
        """Flush and close every file; the folder can be closed twice."""
        self._metrics.close()
        for handler in (self._log, self._screen):
            LOGGER.removeHandler(handler)
            handler.close()
        if self._board is not None:
            self._board.close()
            self._board = None
