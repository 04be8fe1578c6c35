"""Plan the memory of a run: ``protoclip plan`` with the flags of train and ``--ranks 8``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from protoclip.distributed import run_command
from protoclip.training.memory_plan import build_run, measure_shape, memory, text

PROG = "protoclip plan"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for a user's mistake (one message on stderr)."""

    def work() -> None:
        run, as_json = build_run(argv)
        shape = measure_shape(run)
        parts = memory(shape, run)
        sizes = {"weights": shape.weights, "global_batch": run.global_batch, "memory_bytes": parts}
        print(json.dumps(sizes, indent=1) if as_json else text(shape, run, parts))

    return run_command(work, PROG)


if __name__ == "__main__":
    sys.exit(main())
