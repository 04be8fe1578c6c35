"""Where a run's scalars go besides metrics.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from protoclip.config import TrainConfig, to_dict
from protoclip.data.files import write_atomic


class Board(Protocol):
    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Scalars of one step, by ``board_name``; OSError where it cannot be written."""

    def close(self) -> None: ...


def board_name(name: str) -> str:
    """Under ``val/`` what was measured on validation data, under ``train/`` the rest."""
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def check_boards(config: TrainConfig) -> None:
    """Raise ValueError where --report-to names what is not installed."""
    if "wandb" in config.run.report_to and importlib.util.find_spec("wandb") is None:
        raise ValueError("--report-to wandb: wandb is not installed; pip install wandb")


def open_boards(path: Path, config: TrainConfig, resume_step: int | None) -> dict[str, Board]:
    """The boards that --report-to names, writing into the run folder ``path``."""
    makers: dict[str, Callable[[], Board]] = {
        "tensorboard": lambda: TensorBoard(path, resume_step),
        "wandb": lambda: Wandb(path, config),
    }
    return {name: make() for name, make in makers.items() if name in config.run.report_to}


class TensorBoard:
    """tensorboard/ in the run folder; points after ``resume_step`` are purged."""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._before = threading.excepthook
        threading.excepthook = self._hook
        self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=purge)

    def _hook(self, args: threading.ExceptHookArgs) -> None:
        """Keeps the writer thread's traceback off the screen: a full disk is said in words."""
        writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (writer and isinstance(args.exc_value, OSError)):
            self._before(args)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(board_name(name), value, step)

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._before


class Wandb:
    """A run of --wandb-project-name, under the run folder's name; a resumed run goes on in it.

    WANDB_MODE=offline keeps it in the folder's wandb/.
    """

    def __init__(self, path: Path, config: TrainConfig) -> None:
        import wandb

        known = path / "wandb_id"
        if not known.exists():
            write_atomic(known, secrets.token_hex(4))
        self._run: Any = wandb.init(
            project=config.run.wandb_project_name,
            name=path.name,
            id=known.read_text(),
            resume="allow",
            dir=str(path),
            config=to_dict(config),
        )

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({board_name(name): value for name, value in scalars.items()}, step=step)

    def close(self) -> None:
        self._run.finish()
