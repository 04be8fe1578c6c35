"""Plan a run: ``protoclip plan`` with the flags of train and ``--ranks 8``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from protoclip.distributed import run_command
from protoclip.training import memory_plan, time_plan
from protoclip.training.time_plan import Prediction, Rates

PROG = "protoclip plan"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, or 2 for a user's mistake (one message on stderr)."""

    def work() -> None:
        run, flags = memory_plan.build_run(argv)
        rates = rates_of(flags)
        shape = memory_plan.measure_shape(run)
        parts = memory_plan.memory(shape, run)
        predictions: list[Prediction] = []
        if not run.on_cpu:
            predictions = time_plan.predict_all(time_plan.measure_work(run), run, rates)
        if flags["json"]:
            plan = {
                "weights": shape.weights,
                "global_batch": run.global_batch,
                "memory_bytes": parts,
                "predicted": [as_json(prediction) for prediction in predictions],
            }
            print(json.dumps(plan, indent=1))
            return
        print(memory_plan.text(shape, run, parts))
        if predictions:
            print(f"\n{time_plan.text(predictions, rates)}")

    return run_command(work, PROG)


def rates_of(flags: Mapping[str, Any]) -> Rates:
    """The rates that flags name."""
    return Rates(
        flops=1e12 * flags["tflops"],
        nvlink=1e9 * flags["nvlink"],
        infiniband=1e9 * flags["infiniband"],
        latency=1e-6 * flags["latency"],
        gpus_per_machine=flags["gpus_per_machine"],
        pairs_per_worker=flags["pairs_per_worker"],
    )


def as_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction and what follows from it."""
    return asdict(prediction) | {
        "seconds": prediction.seconds,
        "pairs_per_second": prediction.pairs_per_second,
        "bound": prediction.bound,
    }


if __name__ == "__main__":
    sys.exit(main())
