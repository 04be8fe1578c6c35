"""Write a frozen model's features of every sample, for ``--external-teacher``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from protoclip.distributed import run_command
from protoclip.episodes.teacher import PROG, write_features
from protoclip.settings.commands import teacher_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 for a user's mistake, 130 after Ctrl-C."""
    args = teacher_parser().parse_args(argv)
    return run_command(lambda: write_features(args), PROG)


if __name__ == "__main__":
    sys.exit(main())
