"""Options, fixtures and printed lines of the benchmarks."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

REHEARSAL = os.environ.get("PROTOCLIP_REHEARSE") == "1" and not torch.cuda.is_available()
if REHEARSAL:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import harness, machine  # noqa: E402
from benchmarks.report import summary  # noqa: E402

SESSION = pytest.StashKey[harness.Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=("tiny", "quick", "full"),
        default="tiny" if REHEARSAL else "quick",
        help="tiny: seconds, proves that it runs; quick: minutes on two cores; full: wide sweeps",
    )
    parser.addoption(
        "--record",
        type=Path,
        help="write a JSON record, case by case: a file, or a folder to hold MACHINE-SIZES.json",
    )
    parser.addoption(
        "--note", default="", help="kept in the record, e.g. that others used the machine"
    )
    parser.addoption("--headline", action="store_true", help="one case of each op, all variants")
    parser.addoption("--budget", type=float, help="seconds after which cases are skipped")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # the lines printed here say more than its table
    path = config.getoption("--record")
    if path is not None and path.suffix != ".json":
        path = path / f"{machine.slug()}-{config.getoption('--sizes')}.json"
    budget = config.getoption("--budget")
    deadline = None if budget is None else time.monotonic() + budget
    config.stash[SESSION] = harness.Session(
        config.getoption("--sizes"), path, config.getoption("--note"), deadline
    )


# What a reader asks first, where the sizes hold it; else an op's first case in bf16, or its first.
HEADLINES = (
    "[info_nce-both-N32768-D512-bf16",
    "[contrastive,_one_way-both-N32768-D512-bf16",
    "[contrastive,_two_ways,_ids_excluded-both-N32768-D512-bf16",
    "[contrastive,_two_ways,_ids_positive-both-N32768-D512-bf16",
    "[contrastive,_sigmoid,_ids-both-N32768-D512-bf16",
    "[N4096-K20000-D128-bf16",
    "[200000x20000x128-bf16",
    "[200000x20000x128-fp32",
)
VARIANT = ("variant", "name")  # the parameters that say whose
OURS, PEER, LATER = range(3)  # the order of the run: headline cases, then all others


class _Timed(NamedTuple):
    """What the order of the run depends on."""

    item: pytest.Item
    op: tuple[str, str]  # the test, and which loss of it
    case: dict[str, Any]  # its parameters without the variant
    is_compared: bool  # with other variants
    is_ours: bool
    is_named: bool  # by HEADLINES


def _timed(item: Any) -> _Timed:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = {key: value for key, value in parameters.items() if key not in VARIANT}
    variants = [str(parameters[key]) for key in VARIANT if key in parameters]
    return _Timed(
        item=item,
        op=(item.originalname, str(parameters.get("case")).split(",")[0]),
        case=case,
        is_compared=bool(variants),
        is_ours=any(variant.startswith(harness.OURS) for variant in variants),
        is_named=any(headline in item.name for headline in HEADLINES),
    )


def _rank(timed: _Timed, others: list[_Timed]) -> tuple[int, bool]:
    """Where an item stands in the order, fp32 behind bf16 in the headlines; ``others``: all items
    of its op."""
    if any(other.is_named for other in others):
        is_headline = timed.is_named
    else:
        in_bf16 = (other.case for other in others if other.case.get("dtype") == "bf16")
        is_headline = timed.case == next(in_bf16, others[0].case)
    if not (is_headline and timed.is_compared):
        return LATER, False
    return OURS if timed.is_ours else PEER, timed.case.get("dtype") == "fp32"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By value: a headline case of each op, ours and then its peers; the rest."""
    by_op: dict[tuple[str, str], list[_Timed]] = {}
    for item in items:
        timed = _timed(item)
        by_op.setdefault(timed.op, []).append(timed)
    ranks = {timed.item: _rank(timed, group) for group in by_op.values() for timed in group}
    items.sort(key=ranks.__getitem__)
    if config.getoption("--headline"):
        items[:] = [item for item in items if ranks[item] < (LATER, False)]


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> harness.Session:
    manager = request.config.pluginmanager
    terminal = manager.get_plugin("terminalreporter")
    capture = manager.get_plugin("capturemanager")

    def say(text: str) -> None:  # at once, past pytest's capture
        if terminal is None:  # a worker of pytest-xdist
            return
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(text)

    running = request.config.stash[SESSION]
    running.say = say
    running.start()
    return running


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table that a newcomer reads, and how to run the rest."""
    running = config.stash[SESSION]
    record = getattr(running, "record", None)  # none where nothing was timed
    if record is None:
        return
    newest = len(record.runs) - 1
    table = summary(row for row in record.rows if row["run"] == newest)
    if not table:
        return
    terminalreporter.section("speed")
    terminalreporter.write_line(table)
    terminalreporter.write_line(
        "\n× is the peer's median time as a multiple of ours, on the same inputs, in turn."
    )
    if running.sizes != "full":
        terminalreporter.write_line(
            "More sizes: python -m pytest benchmarks/ --benchmark-only --sizes full "
            "(make bench-full keeps a record)."
        )


@pytest.fixture
def bench(session: harness.Session, benchmark: Callable) -> harness.Bench:
    return harness.Bench(session, benchmark)


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--sizes")


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if report.passed and report.when == "call":
        return "passed", "", "PASSED"  # its line is the sign of life
    return None
