"""The run folder: logs/NAME/{config.json, out.log, metrics.jsonl, tensorboard/, checkpoints/}."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from protoclip import checkpoint
from protoclip.config import TrainConfig, from_dict, to_dict
from protoclip.data.files import whole_file, write_atomic


def choose_folder(config: TrainConfig) -> Path:
    """Where a new run will go; not made yet. Under --resume auto a run of that name that has no
    checkpoint yet starts again.

    Raises:
        ValueError: the folder exists, or the name would leave --logs.
    """
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


def _lock(path: Path) -> FileLock | None:
    """Keep a second process out of a run folder; the system releases the lock with this process.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"--name: {path} is in use by another process; wait for it, stop it, or choose "
            "another --name"
        ) from error
    except NotImplementedError:  # a file system without locks
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Whether a run is going on in a folder."""
    try:
        lock = _lock(path)
    except (ValueError, OSError):
        return True
    if lock:
        lock.release()
    return False


class NullRunFolder:
    """The run folder as ranks other than 0 see it: they write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None: ...
    def checkpoint(self, payload: Mapping[str, Any], epoch: int | None) -> None: ...
    def close(self) -> None: ...


class RunFolder(NullRunFolder):
    """Writes what a run leaves behind; made once data, model and teacher are known to be good.

    Args:
        path: of the folder; made, unless ``resume_step`` is given.
        config: of the run.
        resume_step: step to go on after: what was logged later is removed; None: a new run.
    Raises:
        ValueError: the folder cannot be made or written, or a run is going on in it.
    """

    def __init__(self, path: Path, config: TrainConfig, resume_step: int | None = None) -> None:
        super().__init__(path)
        self._checkpoints = path / "checkpoints"
        self._keeps_one = config.run.delete_previous_checkpoint
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=resume_step is not None)
            self._lock = _lock(path)
            self._checkpoints.mkdir(exist_ok=True)
            for rest in self._checkpoints.glob("*.tmp"):  # of a write that was killed
                rest.unlink(missing_ok=True)
            _cut_back(path / "metrics.jsonl", resume_step or 0)
            write_atomic(path / "config.json", json.dumps(to_dict(config), indent=2) + "\n")
            self._metrics = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            self._log = open(path / "out.log", "a", encoding="utf-8")  # noqa: SIM115
        except FileExistsError as error:
            if not path.parent.is_dir():
                raise ValueError(f"--logs: expected a folder, got {path.parent}") from error
            raise ValueError(f"--name: {path} exists; choose another --name") from error
        except OSError as error:
            raise ValueError(
                f"--logs: cannot write {error.filename or path}: {error.strerror}; a run needs a "
                "folder it can write to, on a disk with room"
            ) from error
        boards = config.run.report_to.split(",")
        self._tensorboard = _open_tensorboard(path, resume_step, "tensorboard" in boards)
        self._wandb = _open_wandb(path, config) if "wandb" in boards else None

    def say(self, text: str) -> None:
        """One message, on the screen and in out.log."""
        tqdm.write(text, file=sys.stderr)  # without tearing the progress bar
        self.note(text)

    def note(self, text: str) -> None:
        """One message in out.log only."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._write(self._log, "".join(f"{stamp} {line}\n" for line in text.splitlines()))

    def metrics(self, step: int, samples: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same scalars for the boards: those of validation data
        under val/, the others under train/."""
        self._write(self._metrics, json.dumps({"step": step, "samples": samples, **scalars}) + "\n")
        shown = {
            f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}": x
            for name, x in scalars.items()
        }
        if self._tensorboard is not None:
            for name, value in shown.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(shown, step=step)

    def _write(self, file: Any, text: str) -> None:
        try:
            file.write(text)
            file.flush()
        except OSError as error:  # a full disk: say which file
            raise OSError(error.errno, error.strerror, file.name) from error

    def checkpoint(self, payload: Mapping[str, Any], epoch: int | None) -> None:
        """Write epoch_latest.pt, or with ``epoch`` a numbered one that is kept.

        The latest one before becomes epoch_previous.pt. Metrics reach the disk first, so that
        every step of a checkpoint has its line.
        """
        os.fsync(self._metrics.fileno())
        if epoch is None:
            latest = self._checkpoints / checkpoint.LATEST
            checkpoint.save(latest, payload, previous=self._checkpoints / checkpoint.PREVIOUS)
        else:
            path = self._checkpoints / f"epoch_{epoch}.pt"
            checkpoint.save(path, payload)
            for other in checkpoint.numbered(self._checkpoints) if self._keeps_one else ():
                if other != path:
                    other.unlink()

    def close(self) -> None:
        """Flush and close every file; the folder can be closed twice."""
        with contextlib.suppress(OSError):  # a full disk, which ended the run
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()
            self._tensorboard = self._wandb = None
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError):
                file.close()
        if self._lock:
            self._lock.release()


def write_clusters(path: Path, keys: Sequence[str], clusters: Mapping[str, Tensor]) -> None:
    """Which sample is in which cluster: a line a sample, a column a source, empty where unknown.

    Args:
        path: the .csv.
        keys: of the N samples.
        clusters: source -> int64 [N], negative: in no cluster.
    """
    columns = [["" if k < 0 else k for k in labels.tolist()] for labels in clusters.values()]
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", *clusters])
        writer.writerows(zip(keys, *columns, strict=True))


def _cut_back(path: Path, step: int) -> None:
    """Remove the records after ``step``, and a torn one, from a metrics.jsonl."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomic(path, "".join(kept))


def _open_tensorboard(path: Path, resume_step: int | None, wanted: bool) -> Any:
    """tensorboard/ in the run folder; points after ``resume_step`` are purged."""
    if not wanted:
        return None
    from torch.utils.tensorboard import SummaryWriter

    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(path / "tensorboard"), purge_step=purge)


def _open_wandb(path: Path, config: TrainConfig) -> Any:
    """A run of --wandb-project-name, under the run folder's name; a resumed run goes on in it.

    WANDB_MODE=offline keeps it in the folder's wandb/.
    """
    import wandb

    known = path / "wandb_id"
    if not known.exists():
        write_atomic(known, secrets.token_hex(4))
    return wandb.init(
        project=config.run.wandb_project_name,
        name=path.name,
        id=known.read_text(),
        resume="allow",
        dir=str(path),
        config=to_dict(config),
    )


@dataclass(frozen=True)
class Resume:
    """A run to go on with."""

    folder: Path
    file: Path
    payload: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.payload["protoclip"]["step"])


def find_resume(config: TrainConfig) -> Resume | None:
    """The run that ``--resume`` means; None: start a new one.

    "auto" takes logs/NAME, or without --name the newest unfinished run of the same settings under
    --logs, if it has a checkpoint that can be read.

    Raises:
        ValueError: the named run has no checkpoint that can be read, or no state to go on from.
    """
    wish = config.run.resume
    if not wish:
        return None
    check_name(config.run.name)
    path = Path(wish)
    if wish == "auto":
        named = Path(config.run.logs) / config.run.name if config.run.name else None
        folder = named or _newest_unfinished(config)
        if folder is None or not checkpoint.candidates(folder):
            return None
        file, payload = checkpoint.load_newest(folder)
    elif path.is_file():
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        file, payload = path, checkpoint.load(path)
    elif path.is_dir():
        folder, (file, payload) = path, checkpoint.load_newest(path)
    else:
        raise ValueError(
            f"--resume: expected a run folder, a checkpoint or auto, found nothing at {path}"
        )
    if not isinstance(payload.get("protoclip", {}).get("training"), dict):
        raise ValueError(
            f"--resume: {file} has weights but no state of a run (no 'protoclip' entry that "
            "protoclip.train wrote); start from its weights by --pretrained"
        )
    checkpoint.check_form(file, payload, complete=True)
    return Resume(folder, file, payload)


def _newest_unfinished(config: TrainConfig) -> Path | None:
    """The run under --logs that was written last and has the same settings and no results yet."""
    found: list[tuple[float, Path]] = []
    for path in Path(config.run.logs).glob("*/config.json"):
        folder, files = path.parent, checkpoint.candidates(path.parent)
        if not files or (folder / "results.json").exists() or is_locked(folder):
            continue
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            from_dict(TrainConfig, saved)
        except (OSError, ValueError, TypeError):
            continue
        changed = [key for key, _, _ in changes(saved, to_dict(config))]
        if all(key.startswith("run.") for key in changed):
            found.append((files[0].stat().st_mtime, folder))
    return max(found)[1] if found else None


def changes(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names, old and new values of the settings that differ."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield prefix + key, old, new
