"""``python -m protoclip.report RUN [RUN ...]``: one HTML page about some runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from protoclip.config import Parser
from protoclip.distributed import run_command
from protoclip.report.page import write_report

PROG = "python -m protoclip.report"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake ends it with one line and status 2."""
    parser = Parser(
        PROG,
        description="Write one self-contained HTML page about runs: numbers, curves, prototypes, "
        "a map, examples, cost and settings. Several runs stand side by side; one of --method "
        "clip is the baseline.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder of protoclip.train")
    parser.add_argument(
        "--output", default="", metavar="PATH", help="the file (default: report.html in the run)"
    )

    def work() -> None:
        args = parser.parse_args(argv)
        print(f"report: {write_report(args.runs, args.output)}")

    return run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
