"""Does it help on my data? ``protoclip compare`` trains rows over seeds and says what differs.

Each run is an ordinary run folder, OUT/ROW/seed-N, made by ``protoclip train`` in a process of its
own. Some seeds are timed: whether a row needs a baseline that trains for as long, and for how long,
follows from them. Read from ``compare`` down.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("compare", sys.argv[1:])

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from protoclip.common.files import plural, printable_lines, sole_writer, write_atomic
from protoclip.common.host import usable_cores
from protoclip.common.signals import Signals
from protoclip.data.settings import open_run_data
from protoclip.distributed import run_command
from protoclip.evaluate.datasets import Layout, Part
from protoclip.evaluate.during import evaluation_data, open_run_layout
from protoclip.evaluate.results import Outcome, read_results
from protoclip.model import choose_device
from protoclip.report.comparison import (
    RECALLS,
    Comparison,
    Score,
    cost_of,
    format_comparison,
    of_record,
    primary_of,
    values_of,
)
from protoclip.report.page import NAME, write_comparison
from protoclip.report.statistics import LEAST_SEEDS
from protoclip.settings.comparison import (
    FILE,
    LOCK,
    SETTINGS,
    Cost,
    Plan,
    Record,
    check_ratio,
    check_rows,
    open_record,
    parse_record,
)
from protoclip.settings.config import TrainConfig, to_dict
from protoclip.training.checks import check_settings

__all__ = ["Comparison", "compare", "main"]
PROG = "protoclip compare"
TASK_OF = {"acc1": "zeroshot", "nn_acc1": "knn", "ami": "grouping"}
STOP_SECONDS = 120.0  # for a run of an earlier command to save and stop
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 if a run failed, 2 for a user's mistake, or that of a
    signal."""

    def work() -> int:
        record, args = parse_record(argv)
        if args.print_config:
            print(json.dumps({n: to_dict(c) for n, c in record.plan.rows.items()}, indent=2))
            return 0
        prepare(record)
        print(printable_lines(announcement(record)), flush=True)
        if args.dry_run:
            return 0
        comparison = run(record, jobs=args.jobs)
        print("\n" + printable_lines(format_comparison(comparison)))
        print(f"page: {record.plan.out / NAME}")
        return int(bool(comparison.failed))

    return run_command(work, PROG)


def compare(
    config: TrainConfig,
    *,
    rows: Mapping[str, TrainConfig] | None = None,
    seeds: int | Sequence[int] = 5,
    out: str | os.PathLike[str] = "logs/compare",
    equal_steps: bool = False,
    count_teacher: bool = False,
    jobs: int = 1,
    nproc_per_run: int = 1,
) -> Comparison:
    """Train rows over seeds, or continue, and compare them; ``protoclip compare`` in Python.

    Args:
        config: the settings of ProtoCLIP, such as ``make_config`` of protoclip.train gives.
        rows: name -> settings, the first is the baseline; None: CLIP and ProtoCLIP of ``config``.
        seeds: how many, from 0 on, or which.
        out: folder of the comparison; a run is OUT/ROW/seed-N.
        equal_steps: compare at equal steps, not at equal time.
        count_teacher: count the teacher's time as training time.
        jobs: runs at the same time, after three seeds that are timed.
        nproc_per_run: processes of a run.
    Raises:
        ValueError: rows that cannot be compared, or a folder that holds something else or to
            which another process writes.
    """
    if rows is None:
        rows = {"CLIP": replace(config, method="clip"), "ProtoCLIP": config}
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    plan = Plan(
        dict(rows), tuple(sorted(set(chosen))), Path(out), equal_steps, count_teacher, nproc_per_run
    )
    check_rows(plan)
    record = open_record(plan)
    prepare(record)
    return run(record, jobs=jobs)


def prepare(record: Record) -> None:
    """Check what needs torch and the data, and choose the primary scores."""
    plan = record.plan
    for name, config in plan.rows.items():
        try:
            check_settings(config, choose_device(config.run.device))
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error
    if not record.primary:
        record.primary = primary_of(expected_metrics(plan.rows[plan.baseline]))


def expected_metrics(config: TrainConfig) -> dict[str, list[str]]:
    """The scores that a run will have and that may be primary, by evaluation set."""
    if data := evaluation_data(config):
        layout = open_run_layout(config, data)
    else:
        run_data = open_run_data(config)
        class_rows = run_data.class_rows
        layout = Layout(run_data.training, captions=1, key="TRAIN", class_rows=class_rows)
        if run_data.held_out is not None:
            layout = Layout(run_data.held_out, key="HO", class_rows=class_rows)
    captions = 1 if layout.captions is None else layout.captions
    parts = layout.parts or {layout.key: Part(layout.test, layout.title, captions)}
    metrics: dict[str, list[str]] = {}
    for key, part in parts.items():
        metrics[key] = list(RECALLS) if part.captions else []
        for label, classes in part.test.labels.items():
            skip = set(part.skip)
            if not layout.names_classes(label):
                skip.add((label, "zeroshot"))
            if bool((classes.ids >= 0).any()):
                metrics[key] += [
                    f"{label}/{metric}"
                    for metric, task in TASK_OF.items()
                    if (label, task) not in skip
                ]
    return metrics


def announcement(record: Record) -> str:
    """The rows, the primary scores and the number of runs."""
    plan = record.plan
    lines = []
    if record.rebuilt:
        lines.append(f"{plan.out / FILE} was damaged; it was rebuilt from the runs in {plan.out}")
    lines.append(f"rows: {'; '.join(record.rows)} (the baseline is {plan.baseline})")
    scores = [Score(key, metric) for key, metric in record.primary]
    lines.append("primary scores: " + ", ".join(f"{score.words} ({score.key})" for score in scores))
    runs = runs_of(record)
    done = sum(finished(plan.folder(row, seed)) is not None for row, seed in runs)
    lines.append(
        f"runs: {len(runs)}, {len(record.rows)} for each of the seeds "
        f"{', '.join(map(str, plan.seeds))}; {done} finished"
    )
    if not plan.equal_steps and not record.costs:
        lines.append(f"then {plan.baseline} for as long as each row that takes another time")
    return "\n".join(lines)


def runs_of(record: Record) -> list[tuple[str, int]]:
    """Every run, (row, seed), that is known to be needed."""
    return [(row, seed) for seed in record.plan.seeds for row in record.rows]


def finished(folder: Path) -> Outcome | None:
    """The results of a run that has come to its end: its page is written last."""
    if not (folder / NAME).exists() or not (folder / "results.json").exists():
        return None
    outcome = read_results(folder / "results.json")
    return outcome if outcome.trained else None


def run(record: Record, jobs: int = 1) -> Comparison:
    """Train what is missing, compare, and write comparison.json and the page."""
    out = record.plan.out
    out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out / LOCK, "--out"):
        # Another process may have written since.
        record = replace(open_record(record.plan), primary=record.primary)
        record.write()
        trainer = Runs(record, jobs)
        with trainer.stopped_with_us():
            trainer.train_all()
        outcomes = {name: trainer.outcomes(name, record.plan.seeds) for name in record.rows}
        comparison = of_record(record, outcomes, trainer.failed)
        record.shown = record.shown or list(record.plan.seeds)
        record.result = values_of(comparison)
        record.write()
        write_comparison(comparison, out / NAME)
    return comparison


class Started(NamedTuple):
    """A run in progress."""

    row: str
    seed: int
    process: subprocess.Popen
    stderr: Any  # a temporary file
    slot: int  # which share of the machine it has


@dataclass
class Runs:
    """Trains the runs of a comparison, each in a process of its own."""

    record: Record
    jobs: int
    failed: dict[str, str] = field(default_factory=dict)  # run -> why
    running: list[Started] = field(default_factory=list)
    _done_here: int = 0
    _began: float = field(default_factory=time.monotonic)

    def train_all(self) -> None:
        """The timed seeds one run at a time, those of the baselines at equal time after the
        others'; then the other seeds, ``jobs`` at once."""
        record = self.record
        plan = record.plan
        if not record.costs:
            record.timed = list(plan.seeds if self.jobs == 1 else plan.seeds[:LEAST_SEEDS])
        self._train([(row, seed) for seed in record.timed for row in plan.rows], jobs=1)
        for name in plan.others:
            self._measure(name, plan.baseline)
            if not plan.equal_steps:
                self._decide(name)
        record.write()
        self._train([(row, seed) for seed in record.timed for row in record.rows], jobs=1)
        for name in record.ratios:
            self._measure(name, plan.equal_time_rows[name])
        record.write()
        self._train(runs_of(record), self.jobs)

    def _train(self, runs: Sequence[tuple[str, int]], jobs: int) -> None:
        """Train those runs that are missing."""
        waiting = [(row, seed) for row, seed in runs if self._is_missing(row, seed)]
        while waiting or self.running:
            while waiting and len(self.running) < jobs:
                row, seed = waiting.pop(0)
                self._start(row, seed)
            self._wait()

    def _measure(self, name: str, baseline: str) -> None:
        """Freeze how long a row trains compared with a baseline. What is not known may be measured
        again, as runs that failed may have finished since."""
        record = self.record
        if not record.costs.get((name, baseline), Cost()).is_known:
            record.costs[name, baseline] = cost_of(
                self.outcomes(name, record.timed),
                self.outcomes(baseline, record.timed),
                record.plan.count_teacher,
            )

    def _decide(self, name: str) -> None:
        """Freeze whether a row needs a baseline at equal time, and by what that trains longer."""
        cost = self.record.costs[name, self.record.plan.baseline]
        if name not in self.record.ratios and cost.is_known and not cost.is_equal:
            ratio = math.exp(cost.log_ratio)
            check_ratio(name, ratio)
            self.record.ratios[name] = ratio

    def outcomes(self, row: str, seeds: Sequence[int]) -> dict[int, Outcome]:
        """The results of a row's finished runs, by seed."""
        outcomes = {seed: finished(self.record.plan.folder(row, seed)) for seed in seeds}
        return {seed: outcome for seed, outcome in outcomes.items() if outcome}

    def _is_missing(self, row: str, seed: int) -> bool:
        failed = run_name(row, seed) in self.failed
        return not failed and finished(self.record.plan.folder(row, seed)) is None

    def _start(self, row: str, seed: int) -> None:
        plan = self.record.plan
        folder = plan.folder(row, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            self._wait_for_other(folder)
        config = self.record.rows[row]
        clean = replace(config, run=replace(config.run, name="", resume=""))
        settings = folder.parent / SETTINGS
        write_atomic(settings, json.dumps(to_dict(clean), indent=2) + "\n")
        slot = min(set(range(self.jobs)) - {other.slot for other in self.running})
        command = [*train_command(plan.nproc_per_run), "--preset", str(settings)]
        command += ["--seed", str(seed), "--logs", str(folder.parent), "--name", folder.name]
        command += ["--resume", "auto"]
        stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        process = subprocess.Popen(
            command,
            env=os.environ | self._share(slot, config.run.device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        self.running.append(Started(row, seed, process, stderr, slot))
        self._show()

    def _share(self, slot: int, device: str) -> dict[str, str]:
        """Variables of a run: its threads on a CPU, its GPUs. Threads that spin while they wait
        would count as work."""
        processes = self.jobs * self.record.plan.nproc_per_run
        variables = {"OMP_WAIT_POLICY": "passive"}
        if choose_device(device).type == "cpu":
            if processes > 1:
                variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))
        elif self.jobs > 1:
            count = self.record.plan.nproc_per_run
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = [str(gpu) for gpu in range(torch.cuda.device_count())]
            if visible:
                names = visible.split(",")
            gpus = names[slot * count : (slot + 1) * count]
            if len(gpus) < count:
                raise ValueError(
                    f"--jobs {self.jobs}: expected {processes} GPUs, found {len(names)}; use "
                    "fewer jobs"
                )
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return variables

    def _wait_for_other(self, folder: Path) -> None:
        """Wait for a run that an earlier, killed command has left behind: it saves and stops."""
        try:
            with FileLock(folder / ".lock", timeout=STOP_SECONDS):
                pass
        except Timeout as error:
            raise ValueError(f"{folder} is in use by another process; stop it") from error

    def _wait(self) -> None:
        """Wait until one of the runs ends."""
        ended = [run for run in self.running if run.process.poll() is not None]
        while not ended:
            time.sleep(0.02)
            ended = [run for run in self.running if run.process.poll() is not None]
        for run in ended:
            self.running.remove(run)
            self._note(run)
        self._show()

    def _note(self, run: Started) -> None:
        plan = self.record.plan
        folder = plan.folder(run.row, run.seed)
        run.stderr.seek(0)
        text = run.stderr.read()
        run.stderr.close()
        if run.process.returncode == 130:
            raise KeyboardInterrupt
        if run.process.returncode == 0 and finished(folder):
            self._done_here += 1
            return
        lines = [line for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "error: " in line]
        reason = (errors or lines or [f"exit code {run.process.returncode}"])[-1]
        reason = reason.partition("error: ")[2] or reason
        if run.process.returncode == 2 and not (folder / "config.json").exists():
            raise ValueError(f"row {run.row}: {reason}")  # refused before training
        if run.process.returncode == 0:
            reason = "too few pictures could be read to evaluate it"
        self.failed[run_name(run.row, run.seed)] = reason

    def _show(self) -> None:
        """One line of progress: over a terminal's last line, else when a run starts."""
        runs = runs_of(self.record)
        total = len(runs)
        done = sum(finished(self.record.plan.folder(row, seed)) is not None for row, seed in runs)
        now = "; ".join(run_name(run.row, run.seed) for run in self.running)
        text = f"{done} of {total} runs"
        if self.failed:
            text += f", {len(self.failed)} failed"
        if done >= len(self.record.rows) and self._done_here and now:
            seconds_per_run = (time.monotonic() - self._began) / self._done_here
            left = (total - done - len(self.failed)) * seconds_per_run
            text += f", {plural(max(1, round(left / 60)), 'minute')} left"
        text = printable_lines(f"{text}{': ' if now else ''}{now}")
        if sys.stderr.isatty():
            end = "" if self.running else "\n" if done + len(self.failed) >= total else ""
            print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
        elif now:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stopped_with_us(self) -> Iterator[None]:
        """Have the runs save and stop, and wait for them, if this command is stopped."""

        try:
            with Signals():
                yield
        except BaseException:
            for run in self.running:
                if run.process.poll() is None:
                    run.process.send_signal(signal.SIGTERM)
            for run in self.running:
                run.process.wait()
            raise


def train_command(processes: int) -> list[str]:
    """The command that starts a run."""
    command = [sys.executable, "-m"]
    if processes > 1:  # after "--", or torchrun would take --logs for its own --logs-specs
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "--"]
    return [*command, "protoclip", "train"]


def run_name(row: str, seed: int) -> str:
    return f"{row}, seed {seed}"


def _end_with_parent() -> None:
    """In a new process: have Linux send SIGTERM if the command that started it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
