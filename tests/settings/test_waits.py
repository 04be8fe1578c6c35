"""Who waits is told for what, how far it is and how long still."""

from __future__ import annotations

import subprocess
import sys

import pytest

from protoclip.common import waits
from protoclip.common.waits import Speaker, Wait, each, in_words, speaking


class Process:
    """A command's waits on a clock; lines by the second at which they were said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.is_quiet = False
        self.speaker = Speaker("protoclip cluster", lambda: self.now, lambda: self.is_quiet)
        self.capsys = capsys
        monkeypatch.setattr(waits, "_speaker", self.speaker)

    def pass_seconds(self, seconds: int) -> dict[int, str]:
        """Let time pass, second by second: what was said, by the seconds since the beginning."""
        said = {}
        for _ in range(seconds):
            self.now += 1
            self.speaker.look()
            if text := self.capsys.readouterr().err:
                said[round(self.now) - 1000] = text
        return said


@pytest.fixture
def process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Process:
    return Process(capsys, monkeypatch)


def test_lines_come_after_5_10_20_and_40_seconds_then_every_minute(process: Process) -> None:
    with Wait("k-means", total=60, unit="iterations"):
        assert list(process.pass_seconds(300)) == [5, 10, 20, 40, 100, 160, 220, 280]


@pytest.mark.parametrize(
    ("wait", "done", "note", "line"),
    [
        (Wait("encoding", 5000, "rows", done=1000), 0, None, "1,000 of 5,000 rows, 5 s so far"),
        (
            Wait("encoding", 5000, "rows", done=1000), 1000, "loss 0.5",
            "2,000 of 5,000 rows, loss 0.5, 5 s so far, about 15 s left",
        ),
        (
            Wait("k-means", 300, "iterations", at_most=True), 100, None,
            "100 of at most 300 iterations, 5 s so far, at most 10 s left",
        ),
        (Wait("compiling the cpu kernels"), 0, None, "5 s so far"),
    ],
    ids=["at first", "after some", "may end early", "counts nothing"],
)  # fmt: skip
def test_a_line_says_for_what_how_far_and_how_long_still(
    process: Process, wait: Wait, done: int, note: str | None, line: str
) -> None:
    with wait:
        wait.update(done, note)
        assert process.pass_seconds(5) == {5: f"{wait.what}: {line}\n"}


def test_an_inner_wait_adds_its_words_to_the_lines_of_the_outer_one(process: Process) -> None:
    with Wait("levels", total=3, unit="k-means") as levels:
        levels.update(2)
        process.pass_seconds(38)
        with Wait("k-means", total=10, unit="iterations"):
            assert process.pass_seconds(10) == {
                40: "levels: 2 of 3 k-means, 40 s so far, about 20 s left; "
                "k-means: 0 of 10 iterations, 2 s so far\n"
            }


def test_many_short_waits_say_a_line_each_minute(process: Process) -> None:
    said: dict[int, str] = {}
    for number in range(50):
        with Wait(f"shard {number}"):
            said |= process.pass_seconds(4)
    assert list(said) == [60, 120, 180]
    assert said[60] == "shard 14: 4 s so far\n"


def test_a_later_wait_speaks_after_5_seconds(process: Process) -> None:
    with Wait("reading"):
        process.pass_seconds(50)
    with Wait("writing"):
        assert process.pass_seconds(25) == {
            55: "writing: 5 s so far\n",
            60: "writing: 10 s so far\n",
            70: "writing: 20 s so far\n",
        }


def test_a_command_between_its_waits_speaks_too(process: Process) -> None:
    assert process.pass_seconds(5) == {5: "protoclip cluster: working, 5 s so far\n"}


def test_a_look_that_comes_late_says_one_line(process: Process) -> None:
    """The interpreter's lock may have been held."""
    with Wait("drawing"):
        process.now += 33
        assert process.pass_seconds(10) == {
            34: "drawing: 34 s so far\n",
            40: "drawing: 40 s so far\n",
        }


def test_a_quiet_rank_says_nothing(process: Process) -> None:
    process.is_quiet = True
    with Wait("k-means"):
        assert process.pass_seconds(100) == {}


def test_a_terminal_has_a_bar_and_no_lines(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none for the first half second."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Wait("k-means", total=60, unit="iterations") as wait:
        process.now += 0.5
        process.speaker.look()
        assert process.capsys.readouterr().err == ""
        assert process.pass_seconds(1) != {}
        wait.update(6, "inertia 12")
        shown = "".join(process.pass_seconds(100).values())
        assert "k-means:  10%" in shown and "6.00/60.0 " in shown and "inertia 12" in shown
        assert "so far" not in shown
    assert "k-means" not in "".join(process.pass_seconds(3).values())


def test_each_counts_its_items(process: Process) -> None:
    items = each(["a", "b", "c"], "reading the shards", "shards")
    assert next(items) == "a" and next(items) == "b"
    assert process.pass_seconds(5) == {
        5: "reading the shards: 1 of 3 shards, 5 s so far, about 10 s left\n"
    }
    assert list(items) == ["c"]


def test_durations_are_short() -> None:
    seconds = (0.2, 99, 100, 5900, 9000)
    assert [in_words(s) for s in seconds] == ["0 s", "99 s", "2 min", "98 min", "2.5 h"]


SCRIPT = """
import sys, time
from protoclip.common import waits
waits.LOOK_EVERY = 0.01
waits.FIRST_LINES = (0.05,)
def work():
    with waits.Wait("drawing", 3, "icons"):
        time.sleep(2)
work()
print("library", file=sys.stderr)
with waits.speaking("protoclip train"):
    work()
"""


def test_a_thread_speaks_while_a_command_works_and_none_in_a_library_call() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    lines = ended.stderr.splitlines()
    assert lines[0] == "library" and lines[1] == "drawing: 0 of 3 icons, 0 s so far"


def test_within_speaking_no_other_begins() -> None:
    with speaking("outer"):
        first = waits._speaker
        with speaking("inner"):
            assert waits._speaker is first
        assert waits._speaker is first
    assert waits._speaker is None
