"""What the benchmark files share: a case, how it is timed, and the line it prints.

A benchmark asserts parity, then hands its variant to ``Bench.time``. The rounds of a peer alternate
with rounds of our own op, so that their ratio survives a machine that others use too.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.machine import DEVICE, DTYPES, card_state, ceilings, describe, sync
from benchmarks.report import OURS, Row, identity, share_in_words
from benchmarks.roofline import Work

# Of a variant, within 3 and 30 rounds; plain runs are to take five minutes together.
SECONDS = {"tiny": 0.1, "quick": 0.3, "full": 1.0}
SLOW = 5.0  # seconds; beyond, one round is timed


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    shape: dict[str, int]
    dtype: str
    work: Work
    phase: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}={size}" for letter, size in self.shape.items())
        return " ".join(filter(None, (self.op, self.phase, sizes, self.dtype)))


class Record:
    """One JSON file, rewritten whole after each case, so a cut-off loses nothing.

    ``runs`` holds machine, versions, commit, date and ceilings of each run; ``rows`` one measured
    case each, with the index of its run. A run into an existing file replaces the rows it measures
    again and keeps the others. Without a path it is only kept in memory.
    """

    def __init__(self, path: Path | None, run: dict[str, Any]):
        earlier: dict[str, Any] = {"runs": [], "rows": []}
        if path is not None and path.exists():
            earlier = json.loads(path.read_text())
        self.path = path
        self.runs: list[dict[str, Any]] = [*earlier["runs"], run]
        self.rows: list[Row] = earlier["rows"]

    def add(self, row: Row) -> None:
        """Take a row in, and drop runs none of whose rows are left."""
        self.rows = [old for old in self.rows if identity(old) != identity(row)]
        self.rows.append(row | {"run": len(self.runs) - 1})
        used = sorted({row["run"] for row in self.rows})
        self.runs = [self.runs[old] for old in used]
        self.rows = [row | {"run": used.index(row["run"])} for row in self.rows]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n")
            os.replace(partial, self.path)


@dataclass
class Session:
    """One run of the benchmarks: its ceilings, its record, and when it must end."""

    sizes: str
    record_path: Path | None = None
    note: str = ""
    deadline: float | None = None
    say: Callable[[str], None] = print
    record: Record = field(init=False)
    ceilings: dict[str, float] = field(init=False)

    def start(self) -> None:
        self.ceilings = ceilings(tiny=self.sizes == "tiny")
        run = describe() | {"sizes": self.sizes, "note": self.note, "ceilings": self.ceilings}
        self.record = Record(self.record_path, run)
        gemm = {name: rate for name, rate in self.ceilings.items() if name in DTYPES}
        rates = ", ".join(f"{name} GEMM {rate:.3g} TFLOP/s" for name, rate in gemm.items())
        self.say(
            f"\n{run['machine']}, {run['threads']} threads, torch {torch.__version__}, commit "
            f"{run['commit']}\nceilings of this run: {rates}, copy {self.ceilings['copy']:.3g} GB/s"
        )


class Bench:
    """Times one variant of one case; what the fixture ``bench`` gives to a test."""

    def __init__(self, session: Session, benchmark: Any):
        self.session = session
        self.benchmark = benchmark  # pytest-benchmark's fixture

    @property
    def sizes(self) -> str:
        return self.session.sizes

    def time(
        self,
        case: Case,
        variant: str,
        run: Callable[[], object],
        *,
        prepare: Callable[[], object] = lambda: None,
        rival: Callable[[], object] | None = None,
        note: str = "",
        inertia: float | None = None,
    ) -> None:
        """Rounds of ``run()`` for ``SECONDS``, ``prepare()`` before each off the clock.

        Args:
            rival: our own op on the same inputs, timed in the same rounds (for a peer's row).
            note: what the reader must know, e.g. that a peer starts elsewhere.
            inertia: of what a k-means found; the row then stands in the page's table of k-means.
        """
        if not self.benchmark.enabled:
            prepare()
            self.benchmark(run)
            return
        if self.session.deadline is not None and time.monotonic() > self.session.deadline:
            pytest.skip("the run's time is used up (--budget)")
        prepare()
        first = _Clock(run)
        first()
        clock = _Clock(run)
        rival_clock = _Clock(rival) if rival is not None else None

        def before_each_round() -> None:
            if rival_clock is not None:
                _flush_cache()
                rival_clock()
            prepare()
            _flush_cache()

        pedantic = self.benchmark.pedantic
        if first.times[0] > 1e3 * SLOW:
            before_each_round()
            memory = peak_mib(partial(pedantic, clock, rounds=1))  # not the rival's
        else:
            prepare()
            memory = peak_mib(run)
            wanted = min(max(1e3 * SECONDS[self.sizes] / first.times[0], 3), 30)
            pedantic(clock, setup=before_each_round, rounds=int(wanted), warmup_rounds=1)
        rounds = len(self.benchmark.stats.stats.data)
        times = clock.times[-rounds:]
        median = float(np.median(times))
        ratio = None
        if rival_clock is not None:
            ratio = median / float(np.median(rival_clock.times[-rounds:]))
        row: dict[str, Any] = {
            "op": case.op,
            "phase": case.phase,
            "variant": variant,
            "shape": case.shape,
            "dtype": case.dtype,
            "rounds": rounds,
            "note": note,
            "median_ms": median,
            "p20_ms": float(np.percentile(times, 20)),
            "p80_ms": float(np.percentile(times, 80)),
            "min_ms": min(times),
        }
        row |= asdict(case.work)
        row["rate"] = case.work.rate_numerator / min(times)
        ceiling = self.session.ceilings["copy" if case.work.bound == "copy" else case.dtype]
        row["share"] = row["rate"] / ceiling
        row["peak_mib"] = None if math.isnan(memory) else memory
        row["ratio"] = ratio
        if inertia is not None:
            row["inertia"] = inertia
        row["card"] = card_state()
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = float(f"{value:.5g}")
        self.session.record.add(row)
        self.session.say(line(row, case))
        self.benchmark.extra_info.update(row)


def line(row: dict[str, Any], case: Case) -> str:
    """What a reader sees of a row."""
    unit = "TFLOP/s" if row["bound"] == "gemm" else "GB/s"
    memory = "memory unknown" if row["peak_mib"] is None else f"+{row['peak_mib']:.0f} MiB"
    ratio = "" if row["ratio"] is None else f" | {row['ratio']:.2f}x the time of {OURS}"
    note = f" | {row['note']}" if row["note"] else ""
    note += "".join(f" | {value}" for value in row.get("card", {}).values())
    return (
        f"{str(case):46s} {row['variant']:21s} | {row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, "
        f"{row['p80_ms']:.3f}] min {row['min_ms']:.3f} | {row['rate']:.3f} {unit} "
        f"({share_in_words(row)}) | {memory}{ratio}{note}"
    )


class _Clock:
    """Calls and times a variant, in milliseconds; on a card by its events."""

    def __init__(self, run: Callable[[], object]):
        self.run = run
        self.times: list[float] = []

    def __call__(self) -> None:
        if DEVICE == "cpu":
            began = time.perf_counter()
            self.run()
            self.times.append(1e3 * (time.perf_counter() - began))
            return
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        self.run()
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end))


def _flush_cache() -> None:
    """A training step finds the L2 of a card cold; a CPU's cache is as the last round left it."""
    if DEVICE == "cuda":
        torch.empty(256 << 20, dtype=torch.int8, device=DEVICE).zero_()


def peak_mib(run: Callable[[], object]) -> float:
    """Memory added at the highest point of one run; on the CPU resident memory, NaN if unknown."""
    if DEVICE == "cuda":
        sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # What malloc, or our pool, kept of an earlier run would be handed out again unseen.
        if hasattr(torch.ops.protoclip_native, "release_memory"):
            torch.ops.protoclip_native.release_memory()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return math.nan
    before = _high_water_mib()
    run()
    return _high_water_mib() - before


def _high_water_mib() -> float:
    kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kib[1]) / 1024 if kib else math.nan
