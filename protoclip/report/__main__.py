"""``protoclip report RUN [RUN ...]``: one HTML page about one or several runs."""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("report", sys.argv[1:])

from collections.abc import Sequence

from protoclip.common.files import printable_lines
from protoclip.distributed import run_command
from protoclip.report.page import summary, write_report
from protoclip.settings.commands import report_parser

PROG = "protoclip report"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake prints one line and gives status 2."""

    def work() -> None:
        args = report_parser().parse_args(argv)
        path = write_report(args.runs, args.out)
        print(printable_lines("\n".join(summary(args.runs))), file=sys.stderr)
        print(f"report: {path}")

    return run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
