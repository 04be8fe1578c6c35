"""What the benchmark files share: a case, how it is timed, and the line it prints.

A benchmark asserts parity, then hands its variant to ``Bench.time``. The rounds of a peer alternate
with rounds of our own op, so that their ratio survives a machine that others use too.
"""

from __future__ import annotations

import ctypes
import json
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
from benchmarks.report import OURS, Row, identity
from benchmarks.roofline import Work

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
        found: dict[str, Any] = {"runs": [], "rows": []}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
        self.path, self.runs, self.rows = path, [*found["runs"], run], found["rows"]

    def add(self, row: Row) -> None:
        """Take a row in, and drop runs none of whose rows are left."""
        kept = [old for old in self.rows if identity(old) != identity(row)]
        self.rows = [*kept, row | {"run": len(self.runs) - 1}]
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
        self.session, self.benchmark = session, benchmark

    @property
    def sizes(self) -> str:
        return self.session.sizes

    def time(
        self,
        case: Case,
        variant: str,
        run: Callable[..., object],
        *,
        prepare: Callable[[], tuple] = tuple,
        rival: Callable[[], object] | None = None,
        seconds: float = 1.0,
        note: str = "",
    ) -> None:
        """Rounds of ``run(*prepare())`` until ``seconds`` are full, ``prepare`` off the clock.

        Args:
            rival: our own op on the same inputs, timed in the same rounds (for a peer's row).
            note: what the reader must know, e.g. that a peer starts elsewhere.
        """
        if not self.benchmark.enabled:
            self.benchmark(lambda: run(*prepare()))
            return
        if self.session.deadline is not None and time.monotonic() > self.session.deadline:
            pytest.skip("the run's time is used up (--budget)")
        first = _Clock(run)
        first(*prepare())
        clock, ours = _Clock(run), _Clock(rival)

        def ready() -> tuple[tuple, dict]:
            if rival is not None:
                _flush_cache()
                ours()
            arguments = prepare()
            _flush_cache()
            return arguments, {}

        pedantic = partial(self.benchmark.pedantic, clock, setup=ready)
        if first.times[0] > 1e3 * SLOW:
            memory = peak_mib(partial(pedantic, rounds=1))
        else:
            memory = peak_mib(partial(run, *prepare()))
            rounds = min(max(1e3 * seconds / first.times[0], 3), 30)
            pedantic(rounds=int(rounds), warmup_rounds=1)
        rounds = len(self.benchmark.stats.stats.data)
        self._add(case, variant, clock.times[-rounds:], memory, ours.times[-rounds:], note)

    def _add(self, case, variant, times, memory, ours, note) -> None:
        row: dict[str, Any] = {
            "op": case.op, "phase": case.phase, "variant": variant, "shape": case.shape,
            "dtype": case.dtype, "rounds": len(times), "note": note,
        }  # fmt: skip
        low, middle, high = np.percentile(times, (20, 50, 80))
        row |= {"median_ms": middle, "p20_ms": low, "p80_ms": high, "min_ms": min(times)}
        row |= asdict(case.work)
        rate = case.work.flop * 1e-9 if case.work.bound == "gemm" else case.work.bytes * 1e-6
        ceiling = self.session.ceilings["copy" if case.work.bound == "copy" else case.dtype]
        row |= {"rate": rate / min(times), "share": rate / min(times) / ceiling}
        row["peak_mib"] = None if memory != memory else memory
        row["ratio"] = float(middle / np.median(ours)) if ours else None
        row |= {"card": card_state()}
        row = {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in row.items()}
        self.session.record.add(row)
        self.session.say(line(row, case))
        self.benchmark.extra_info.update(row)


def line(row: dict[str, Any], case: Case) -> str:
    """What a reader sees of a row."""
    unit, of = ("TFLOP/s", "GEMM") if row["bound"] == "gemm" else ("GB/s", "copy")
    memory = "memory unknown" if row["peak_mib"] is None else f"+{row['peak_mib']:.0f} MiB"
    ratio = "" if row["ratio"] is None else f" | {row['ratio']:.2f}x the time of {OURS}"
    note = f" | {row['note']}" if row["note"] else ""
    note += "".join(f" | {value}" for value in row.get("card", {}).values())
    return (
        f"{str(case):46s} {row['variant']:21s} | {row['median_ms']:9.3f} ms [{row['p20_ms']:.3f}, "
        f"{row['p80_ms']:.3f}] min {row['min_ms']:.3f} | {row['rate']:.3f} {unit} "
        f"({row['share']:.0%} of {of}) | {memory}{ratio}{note}"
    )


class _Clock:
    """Calls and times a variant, in milliseconds; on a card by its events."""

    def __init__(self, run: Callable[..., object] | None):
        self.run, self.times = run, []

    def __call__(self, *arguments: object) -> None:
        assert self.run is not None
        if DEVICE == "cpu":
            start = time.perf_counter()
            self.run(*arguments)
            self.times.append(1e3 * (time.perf_counter() - start))
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run(*arguments)
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
        return float("nan")
    before = _high_water_mib()
    run()
    return _high_water_mib() - before


def _high_water_mib() -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")
