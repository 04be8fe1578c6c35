"""A command on the processes that torchrun or srun started: join, watch, end together."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO, cast

from protoclip import distributed, heartbeat
from protoclip.launchers import Place
from protoclip.model import choose_device

GRACE = 60.0  # seconds by which a collective outlives the watch, whose message is the better one


class Screen:
    """A stderr that may lie on a full disk: what cannot be written is lost, the run is not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quietly(place: Place) -> contextlib.AbstractContextManager:
    """For what every process would say the same: only the first is heard."""
    if place.rank == 0:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
    stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
    return stack


def on_all_ranks(
    work: Callable[[], object],
    place: Place,
    device: str,
    timeout: float,
    backend: str,
    name: str,
    remedy: str,
) -> int:
    """Run ``work`` on every rank; the exit code is 0, or 2 for a user's mistake, said once.

    A rank that fails, dies or hangs ends the others; it is named, with its phase.

    Args:
        work: raises ValueError or OSError for a user's mistake.
        device: as the flag says it.
        timeout: seconds to wait for a rank.
        backend: "auto", "nccl" or "gloo".
        name: of the command.
        remedy: what the user can do when a rank is lost.
    """
    screen = cast(TextIO, Screen(sys.stderr))
    with (
        contextlib.redirect_stderr(screen),
        heartbeat.watched(place, timeout, name, remedy) as watch,
    ):
        try:
            distributed.start(place, choose_device(device), timeout + GRACE, backend)
            work()
        except (ValueError, OSError) as error:
            watch.fail(str(error), 2)
            return 2
        except KeyboardInterrupt:
            watch.say("interrupted")
            return 130
        except Exception as error:
            # The launcher ends the others too; what is known is said first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            trace = traceback.format_exc()
            # A collective fails where another rank is missing, and then that is the news.
            missing = watch.explain() if isinstance(error, RuntimeError) else None
            if missing is None:
                watch.fail(f"{type(error).__name__}: {error}; all ranks end", 1, trace)
                os._exit(1)
            watch.say(missing)
            os._exit(heartbeat.EXIT_CODE)
        distributed.stop()
    return 0
