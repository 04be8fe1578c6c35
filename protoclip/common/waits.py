"""What a command waits for, how far it is and how long still: bars on a terminal, elsewhere a plain
line after 5, 10, 20 and 40 seconds, then every 60.

``Wait`` is opened by whoever does the work, and only counts. A ``Speaker`` shows the open waits
from a thread of its own, so that one that never counts speaks too. Commands have one; a library
call in somebody's own process has none, and is silent.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

FIRST_LINES = (5.0, 10.0, 20.0, 40.0)  # seconds after the start of a wait
BETWEEN_LINES = 60.0  # seconds between the others
BAR_AFTER = 1.0  # seconds of a wait without a bar
LOOK_EVERY = 0.5  # seconds

Item = TypeVar("Item")


class Wait:
    """A piece of work that may take long; a context manager.

    Args:
        what: what is waited for, as a line begins: "k-means".
        total: how much there is to do; None: not known.
        unit: of what is counted, in the plural: "rows".
        done: how much of it was done before.
        at_most: whether less than ``total`` may be enough.

    Attributes:
        note: what else there is to say, such as a loss.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        *,
        done: int = 0,
        at_most: bool = False,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = done
        self.at_most = at_most
        self.note = ""
        self._speaker: Speaker | None = None
        self._began = 0.0
        self._done_before = done
        self._bar: Any = None  # a tqdm, on a terminal

    def __enter__(self) -> Wait:
        # Only the main thread waits; the others read ahead.
        if threading.current_thread() is threading.main_thread():
            self._speaker = _speaker
        if self._speaker is not None:
            self._speaker._open(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._speaker is not None:
            self._speaker._close(self)

    def update(self, count: int = 1, note: str | None = None) -> None:
        """Count what was done, and replace the note."""
        self.done += count
        if note is not None:
            self.note = note

    def restart(self, total: int, note: str) -> None:
        """Begin the next part, which is counted from 0."""
        self.total, self.note = total, note
        self.done = self._done_before = 0
        if self._speaker is not None:
            self._began = self._speaker.clock()

    def words(self, now: float) -> str:
        """A line without its end, at a time on the speaker's clock."""
        parts = []
        limit = "at most " if self.at_most else ""
        if self.total is not None:
            parts.append(f"{self.done:,} of {limit}{self.total:,} {self.unit}".rstrip())
        elif self.done:
            parts.append(f"{self.done:,} {self.unit}".rstrip())
        if self.note:
            parts.append(self.note)
        seconds = now - self._began
        parts.append(f"{in_words(seconds)} so far")
        done_here = self.done - self._done_before
        if self.total is not None and done_here:
            left = seconds / done_here * max(0, self.total - self.done)
            parts.append(f"{limit or 'about '}{in_words(left)} left")
        return f"{self.what}: {', '.join(parts)}"

    def _show_bar(self, now: float) -> None:
        if self._bar is None:
            if now - self._began < BAR_AFTER:
                return
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.what,
                total=self.total,
                initial=self._done_before,
                unit=f" {self.unit}" if self.unit else "it",
                unit_scale=True,
                leave=False,
                mininterval=0.0,
            )
            self._bar.start_t -= now - self._began
        self._bar.set_description_str(f"{self.what}: ", refresh=False)
        self._bar.total = self.total
        self._bar.n = self.done
        self._bar.set_postfix_str(self.note, refresh=False)
        self._bar.refresh()


def each(items: Sequence[Item], what: str, unit: str = "") -> Iterator[Item]:
    """The items one by one, as a wait."""
    with Wait(what, len(items), unit) as wait:
        for item in items:
            yield item
            wait.update()


class Speaker:
    """Shows the open waits of a process on its stderr.

    Lines follow the outermost open wait, or where none is open the command itself; inner waits add
    their words. A command of many short waits says a line each minute too.

    Args:
        name: of the command.
        clock: the time in seconds, rising.
        quiet: whether nothing is to be shown, as on all ranks but one.
    """

    def __init__(
        self,
        name: str,
        clock: Callable[[], float] = time.monotonic,
        quiet: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.clock = clock
        self._quiet = quiet
        self._waits: list[Wait] = []
        self._lock = threading.RLock()
        self._began = self._last_line = self._since = clock()

    def look(self) -> None:
        """Show bars, or say a line if one is due."""
        with self._lock:
            if self._quiet():
                return
            now = self.clock()
            if sys.stderr.isatty():
                for wait in self._waits:
                    wait._show_bar(now)
            elif now >= self._next_line():
                self._last_line = now
                words = "; ".join(wait.words(now) for wait in self._waits)
                working = f"{self.name}: working, {in_words(now - self._began)} so far"
                print(words or working, file=sys.stderr, flush=True)

    def _next_line(self) -> float:
        """When a line is due: by the age of the outermost wait, and a minute after the last one."""
        due = [self._since + seconds for seconds in FIRST_LINES]
        due = [moment for moment in due if moment > self._last_line]
        return min([*due, self._last_line + BETWEEN_LINES])

    def _open(self, wait: Wait) -> None:
        with self._lock:
            wait._began = self.clock()
            if not self._waits:
                self._since = wait._began
            self._waits.append(wait)

    def _close(self, wait: Wait) -> None:
        with self._lock:
            self._waits.remove(wait)
            if wait._bar is not None:
                wait._bar.close()
            if not self._waits:
                self._since = self.clock()


_speaker: Speaker | None = None


@contextlib.contextmanager
def speaking(name: str, quiet: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Show the waits inside; does nothing within another ``speaking``."""
    if _speaker is not None:
        yield
        return
    speaker = Speaker(name, quiet=quiet)
    ended = threading.Event()

    def look_again() -> None:
        while not ended.wait(LOOK_EVERY):
            with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
                speaker.look()

    thread = threading.Thread(target=look_again, name="waits", daemon=True)
    _use(speaker)
    thread.start()
    try:
        yield
    finally:
        _use(None)
        ended.set()
        thread.join()


def _use(speaker: Speaker | None) -> None:
    global _speaker
    _speaker = speaker


os.register_at_fork(after_in_child=lambda: _use(None))  # it has no thread, and maybe a held lock


def in_words(seconds: float) -> str:
    """A duration: "40 s", "3 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
