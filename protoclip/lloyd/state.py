"""Files of state: where a call is, so that the same call continues there with the same bits."""

from __future__ import annotations

import contextlib
import glob
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from protoclip.common.digest import Digest
from protoclip.common.files import printable, remove_leftovers, sole_writer
from protoclip.lloyd.slices import PointSlice

FORMAT = 1
SAME_BITS = 1e-12  # the relative difference of an inertia that the same machine computes again
OTHER_MACHINE = 1e-5  # and another one


class State(NamedTuple):
    """Centroids, and what belongs to them."""

    centroids: Tensor  # [K, D]
    inertia: float
    labels: Tensor | None  # int64 [N]; None if they come from a file: an assignment gives them


class Outcome(NamedTuple):
    """The best state, the inertia before each update, and whether the last one moved too little to
    go on."""

    state: State
    history: list[float]
    converged: bool


class RunState(NamedTuple):
    """Where a run of k-means is: what the rest of it takes, besides its arguments. K x D numbers,
    up to three times; labels and distances follow from centroids."""

    restart: int = 0  # the number of restarts, once all have ended
    earlier: Outcome | None = None  # the best of the restarts before
    centroids: Tensor | None = None  # [K, D], before an update; in a start, those drawn until now
    history: Sequence[float] = ()  # the inertia of each iteration; the last is of ``centroids``
    best: State | None = None  # of this restart, if it is better than ``centroids``
    repeated: Sequence[str] = ()  # digests of centroids whose inertia was there before
    drawn: Sequence[int] = ()  # in a start: the centroids that each pass has drawn
    generator: Tensor | None = None  # in a start: of its next draws

    @property
    def iterations(self) -> int:
        """Those of this restart that have ended."""
        return max(0, len(self.history) - 1)


class OtherCallError(ValueError):
    """A state is of a call with other arguments, whose names are in ``different``."""

    def __init__(self, op: str, path: str, different: Sequence[str]) -> None:
        super().__init__(op, path, different)
        self.different = different

    def __str__(self) -> str:
        op, path, different = self.args
        return (
            f"{op}: the state {path} is of a call with other {', '.join(different)}; use another "
            "file, or remove it"
        )


ERRORS = {kind.__name__: kind for kind in (OtherCallError, OSError, ValueError)}


def _packed(value: Any) -> tuple[str, list[Tensor]]:
    """A value as JSON, in which a tensor is its place in a list."""
    tensors: list[Tensor] = []

    def place(x: Tensor) -> dict[str, int]:
        tensors.append(x)
        return {"tensor": len(tensors) - 1}

    return json.dumps(value, default=place), tensors


def _unpacked(text: str, tensors: Sequence[Tensor]) -> Any:
    return json.loads(text, object_hook=lambda x: tensors[x["tensor"]] if "tensor" in x else x)


@dataclass
class StateFile:
    """The file of one call, which holds numbers, texts and tensors in lists and dicts. The first
    rank of a group reads and writes it; the others hear what it holds, or what is wrong with it."""

    op: str  # the function, named in errors
    path: Path
    call: Mapping[str, Any]  # its arguments, as JSON holds them, which a file must have
    group: dist.ProcessGroup | None
    device: torch.device
    read_old: Callable[[Path], Any] | None = None  # reads earlier versions' files, or ValueError
    _has_warned: bool = field(default=False, init=False)

    @property
    def is_first(self) -> bool:
        return self.group is None or dist.get_rank(self.group) == 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Hold the file, which is written at once, so that a full disk is noticed now; its content
        until now, on all ranks; None of a new one.

        Raises:
            ValueError: another process has it, or it is not a state of this call.
            OSError: it cannot be read or written.
        """
        with contextlib.ExitStack() as stack:
            content: Any = None
            error: Exception | None = None
            if self.is_first:
                try:
                    content = self._open(stack)
                except (ValueError, OSError) as caught:
                    error = caught
            if self.group is not None:
                content, error = self._of_first_rank(content, error)
            if error is not None:
                raise error
            yield content

    def _open(self, stack: contextlib.ExitStack) -> Any:
        try:
            tempfile.TemporaryFile(dir=self.path.parent).close()
        except OSError as error:
            reason = f"cannot write: {error.strerror}"
            raise OSError(error.errno, reason, str(self.path)) from error
        stack.enter_context(sole_writer(_lock_of(self.path), self.op, self.path))
        remove_leftovers(self.path.parent, glob.escape(self.path.name))
        content = self._read() if self.path.exists() else None
        self._save(content)
        return content

    def _read(self) -> Any:
        from protoclip.common import sealed  # late: calls without a file need none of it

        shown = printable(str(self.path))
        try:
            if not sealed.is_sealed(self.path) and self.read_old is not None:
                return self.read_old(self.path)
            payload = sealed.load(self.path, must_be_sealed=True)
            op, written, text = payload["op"], payload["format"], payload["text"]
        except OtherCallError:
            raise
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.op}: expected a state that it wrote, got {shown} ({error}); it is torn, or "
                "another file: use another path, or remove it to begin again"
            ) from error
        if (op, written) != (self.op, FORMAT):
            raise ValueError(
                f"{self.op}: expected a state of {self.op} in format {FORMAT}, got one of {op} in "
                f"format {written} at {shown}; use another path, or the version that wrote it"
            )
        tensors = [x.to(self.device) for x in payload["tensors"]]
        call, content = _unpacked(text, tensors)
        asked = json.loads(json.dumps(self.call))
        if names := [name for name in asked if call.get(name) != asked[name]]:
            raise OtherCallError(self.op, shown, names)
        return content

    def _of_first_rank(self, content: Any, error: Exception | None) -> tuple[Any, Exception | None]:
        """JSON and tensors as a .safetensors file, not pickles."""
        from safetensors.torch import load, save

        failure: list[Any] = []
        if isinstance(error, OSError):
            failure = ["OSError", error.errno, error.strerror, error.filename]
        elif error is not None:
            failure = [type(error).__name__, *error.args]
        text, tensors = _packed([failure, content])
        letters = torch.tensor(list(text.encode()), dtype=torch.uint8)
        named = {str(i): x.cpu().contiguous() for i, x in enumerate([letters, *tensors])}
        written = torch.frombuffer(bytearray(save(named)), dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(written)], device=self.device)
        dist.broadcast(size, group=self.group, group_src=0)
        if not self.is_first:
            written = written.new_empty(int(size))
        dist.broadcast(written, group=self.group, group_src=0)
        named = load(written.cpu().numpy().tobytes())
        letters, *tensors = [named[str(i)].to(self.device) for i in range(len(named))]
        failure, content = _unpacked(bytes(letters.tolist()).decode(), tensors)
        return content, ERRORS[failure[0]](*failure[1:]) if failure else None

    def _save(self, content: Any) -> None:
        from protoclip.common import sealed

        text, tensors = _packed([self.call, content])
        payload = {"op": self.op, "format": FORMAT, "text": text}
        sealed.save(self.path, payload | {"tensors": [_own_bytes(x) for x in tensors]})

    def write(self, content: Any) -> None:
        """Replace the file. A disk that has become full ends no run: the first time, it warns."""
        if not self.is_first:
            return
        try:
            self._save(content)
        except OSError as error:
            if not self._has_warned:
                warnings.warn(
                    f"{self.op}: the state could not be written ({error}); the file stays as it "
                    "was, and the run continues",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._has_warned = True


def _own_bytes(x: Tensor) -> Tensor:
    """On the CPU; of a part of a larger tensor a copy, because a file would hold all of it."""
    x = x.detach().cpu()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def remove_state(path: Path) -> None:
    """Remove a file of state that nobody needs, and its lock."""
    path.unlink(missing_ok=True)
    _lock_of(path).unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def place_of(path: Path) -> tuple[int, int]:
    """The restart of a run of k-means and its iterations until now, from its file; 0, 0 of what is
    not such a file."""
    from protoclip.common import sealed

    try:
        _, (_, run) = json.loads(sealed.load(path, must_be_sealed=True)["text"])
        run = RunState(*run)
        return run.restart, run.iterations
    except (OSError, ValueError, LookupError, TypeError):
        return 0, 0


def identity(
    rows: str, weights: Sequence[Tensor], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, list[str]]:
    """The checksums of all ranks' rows, of which this one's is given, and of their weights."""
    of_rows, of_weights = Digest(), Digest()
    of_rows.update(np.frombuffer(rows.encode(), np.uint8))
    for x in weights:
        of_weights.update(x)
    digests = [bytes.fromhex(digest.hexdigest()) for digest in (of_rows, of_weights)]
    mine = torch.tensor([list(digest) for digest in digests], device=device)
    of_ranks = mine[:, None]  # [2, ranks, bytes]
    if group is not None:
        of_ranks = mine.new_zeros(2, dist.get_world_size(group), mine.shape[1])
        of_ranks[:, dist.get_rank(group)] = mine
        dist.all_reduce(of_ranks, group=group)
    names = ("rows", "weights")
    return {
        name: [bytes(digest).hex() for digest in of_name]
        for name, of_name in zip(names, of_ranks.tolist(), strict=True)
    }


class RunFile:
    """The file of a run of k-means: reads its ``RunState``, and writes it every so many seconds and
    where the run is stopped."""

    def __init__(self, file: StateFile, rows: PointSlice, backend: str, seconds: float) -> None:
        self.file = file
        self.rows = rows
        self.seconds = seconds
        device = rows.points.device
        self.machine: list[Any] = [
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            platform.machine(), torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(), torch.__version__, backend,
        ]  # fmt: skip
        self._tolerance = SAME_BITS
        self._expected: float | None = None  # inertia of the first assignment
        self._newest: RunState | None = None  # not written yet
        self._written_at = 0.0

    @contextlib.contextmanager
    def opened(self) -> Iterator[RunState]:
        """Hold the file; where the run is. Whatever stops it, what it has come to is written."""
        with self.file.opened() as content:
            self._written_at = time.monotonic()
            begun = RunState() if content is None else self._run_state(*content)
            try:
                yield begun
            except BaseException:
                self._write()
                raise

    def _run_state(self, machine: list[Any], values: Any) -> RunState:
        is_other = float(machine != self.machine)
        if self.rows.sum(torch.tensor(is_other, device=self.rows.points.device)):
            self._tolerance = OTHER_MACHINE
            self.machine = ["several"]
            if self.file.is_first:
                warnings.warn(
                    f"kmeans: {self.file.path} was written by another processor, number of "
                    "threads, backend or version of torch; the result may differ in its last bits",
                    RuntimeWarning,
                    stacklevel=2,
                )
        run = RunState(*values)
        self._expected = run.history[-1] if run.history else None
        if run.earlier is not None:
            state, history, converged = run.earlier
            run = run._replace(earlier=Outcome(State(*state), history, converged))
        if run.best is not None:
            run = run._replace(best=State(*run.best))
        return run

    @property
    def age(self) -> float:
        """Seconds since the file was written."""
        return time.monotonic() - self._written_at

    def note(self, run: RunState, at_once: bool = False) -> None:
        """Where the run is now. A clock decides only when that is written.

        Raises:
            ValueError: the first assignment does not give the inertia that the file has.
        """
        if self._expected is not None and run.history:
            self.check(self._expected, run.history[-1])
            self._expected = None
        self._newest = run
        if at_once or self.age >= self.seconds:
            self._write()

    def check(self, expected: float, inertia: float) -> None:
        """Whether the centroids of the file have the inertia that they had."""
        if inertia != expected and not (abs(inertia - expected) <= self._tolerance * abs(expected)):
            raise ValueError(
                f"kmeans: the centroids of {self.file.path} have the inertia {inertia:.17g}, not "
                f"{expected:.17g} as when they were written: the rows or weights are not the same; "
                "use another file, or remove it"
            )

    def _write(self) -> None:
        run, self._newest = self._newest, None
        if run is None:
            return
        earlier, best = run.earlier, run.best
        if earlier is not None:
            earlier = earlier._replace(state=earlier.state._replace(labels=None))
        if best is not None:
            best = best._replace(labels=None)
        self.file.write([self.machine, run._replace(earlier=earlier, best=best)])
        self._written_at = time.monotonic()
