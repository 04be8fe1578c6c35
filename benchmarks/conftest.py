"""Options, fixtures and printed lines of the benchmarks."""

import os
import time
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("PROTOCLIP_REHEARSE") == "1" and not torch.cuda.is_available()
if REHEARSAL:  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import harness, machine  # noqa: E402

SESSION = pytest.StashKey[harness.Session]()


def pytest_addoption(parser):
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
def pytest_configure(config):
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


def _params(item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(config, items):
    """By value: a headline case of each op, ours and then its peers; the rest."""
    rank = {}
    ops = [(item.originalname, str(_params(item).get("case")).split(",")[0]) for item in items]
    for op in dict.fromkeys(ops):
        group = [item for item, own in zip(items, ops, strict=True) if own == op]
        cases = [{k: v for k, v in _params(item).items() if k not in VARIANT} for item in group]
        first = next((case for case in cases if case.get("dtype") == "bf16"), cases[0])
        named = [any(h in item.name for h in HEADLINES) for item in group]
        for item, case, is_named in zip(group, cases, named, strict=True):
            compared = case.keys() != _params(item).keys()  # with others
            headline = compared and (is_named if any(named) else case == first)
            ours = any(str(v).startswith(harness.OURS) for v in _params(item).values())
            rank[item] = (1 - ours) if headline else 2
    items.sort(key=rank.__getitem__)
    if config.getoption("--headline"):
        items[:] = [item for item in items if rank[item] < 2]


@pytest.fixture(scope="session")
def session(request):
    manager = request.config.pluginmanager
    terminal, capture = manager.get_plugin("terminalreporter"), manager.get_plugin("capturemanager")

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


@pytest.fixture
def bench(session, benchmark):
    return harness.Bench(session, benchmark)


@pytest.fixture(scope="session")
def sizes(request) -> str:
    return request.config.getoption("--sizes")


def pytest_report_teststatus(report):
    if report.passed and report.when == "call":
        return "passed", "", "PASSED"  # its line is the sign of life
