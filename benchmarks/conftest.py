"""Options and the printed table of the benchmarks."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--sizes",
        choices=("quick", "full"),
        default="quick",
        help="quick: minutes on two cores; full: the sizes of a record",
    )


@pytest.fixture(scope="session")
def sizes(request) -> str:
    return request.config.getoption("--sizes")


def pytest_terminal_summary(terminalreporter):
    from harness import LINES

    for line in LINES:
        terminalreporter.write_line(line)
