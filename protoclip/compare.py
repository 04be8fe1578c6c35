"""Does it help on my data? ``protoclip compare`` trains rows over seeds and says what differs.

Each run is an ordinary run folder, OUT/ROW/seed-N, made by ``protoclip train`` in a process of its
own. Read from ``compare`` down.
"""

from __future__ import annotations

import sys

from protoclip.settings.commands import show_help

if __name__ == "__main__":  # answered before the imports below, which take seconds
    show_help("compare", sys.argv[1:])

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from protoclip.common.files import LOCK, locked_folder, plural, printable_lines
from protoclip.common.host import usable_cores
from protoclip.common.phases import SHARED_MACHINE
from protoclip.common.signals import StopSignals, end_with_parent, stop_if_asked
from protoclip.common.waits import Wait
from protoclip.data.settings import open_run_data
from protoclip.distributed import run_command
from protoclip.evaluate.datasets import Layout
from protoclip.evaluate.during import evaluation_data, open_run_layout
from protoclip.evaluate.results import TRAIN, Outcome, Score, read_results
from protoclip.model import choose_device
from protoclip.report.comparison import (
    RECALLS,
    Comparison,
    compare_rows,
    format_comparison,
    primary_of,
    rows_of,
    with_shown,
)
from protoclip.report.page import NAME, write_comparison
from protoclip.runs.checkpoint import fingerprint, is_same
from protoclip.settings.comparison import (
    RESULTS,
    SETTINGS,
    Record,
    check_rows,
    open_record,
    parse_record,
)
from protoclip.settings.config import TrainConfig, to_dict
from protoclip.training.checks import check_settings

__all__ = ["Comparison", "compare", "main"]
PROG = "protoclip compare"
TASK_OF = {"acc1": "zeroshot", "nn_acc1": "knn", "ami": "grouping"}
POLL_SECONDS = 0.02
STOP_SECONDS = 120.0  # for a run of an earlier command to save and stop
Outcomes = dict[str, dict[int, Outcome]]  # of the finished runs, by row and seed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 if a run failed, 2 for a user's mistake, or that of a
    signal."""

    def say(text: str) -> None:
        print(printable_lines(text), flush=True)

    def work() -> int:
        asked, flags = parse_record(sys.argv[1:] if argv is None else argv)
        if flags.print_config:
            print(json.dumps({n: to_dict(c) for n, c in asked.rows.items()}, indent=2))
            return 0
        if flags.dry_run:
            say(announcement(*opened(asked)))
            return 0
        comparison = run(asked, flags.jobs, say)
        say(f"\n{format_comparison(comparison)}\n\npage: {asked.out / NAME}")
        return int(bool(comparison.failed))

    return run_command(work, PROG)


def compare(
    config: TrainConfig,
    *,
    rows: Mapping[str, TrainConfig] | None = None,
    seeds: int | Sequence[int] = 5,
    out: str | os.PathLike[str] = "logs/compare",
    jobs: int = 1,
    nproc_per_run: int = 1,
) -> Comparison:
    """Train rows over seeds, or continue, and compare them; ``protoclip compare`` in Python.

    Args:
        config: the settings of ProtoCLIP, such as ``make_config`` of protoclip.train gives.
        rows: name -> settings, the first is the baseline; None: CLIP and ProtoCLIP of ``config``.
        seeds: how many, from 0 on, or which.
        out: folder of the comparison; a run is OUT/ROW/seed-N.
        jobs: runs at the same time. With more than one, training times are not compared.
        nproc_per_run: processes of a run.
    Returns:
        The differences. Where a row and the baseline take different times, ``longer`` of their
        contrast holds the settings of a baseline that trains as long as the row.
    Raises:
        ValueError: rows that cannot be compared, or a folder that holds something else or to
            which another process writes.
    """
    if rows is None:
        rows = {"CLIP": replace(config, method="clip"), "ProtoCLIP": config}
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    asked = Record(dict(rows), tuple(sorted(set(chosen))), Path(out), nproc_per_run)
    check_rows(asked)
    return run(asked, jobs)


def opened(asked: Record) -> tuple[Record, Outcomes]:
    """The comparison with what its folder holds and its primary scores, and the finished runs.
    Checks what needs torch and the data.

    Raises:
        ValueError: settings that contradict each other, a folder of something else, or a finished
            run of other data.
    """
    record = open_record(asked)
    outcomes = outcomes_of(record)
    for name, config in record.rows.items():
        try:
            check_settings(config, choose_device(config.run.device))
        except ValueError as error:
            raise ValueError(f"row {name}: {error}") from error
        now = ""
        for seed, outcome in outcomes[name].items():
            if not outcome.training_data:  # of an older version
                continue
            now = now or fingerprint(open_run_data(config).training, outcome.training_data)
            if not is_same(outcome.training_data, now):
                raise ValueError(
                    f"--out: {record.folder(name, seed)} was trained on other data than "
                    f"{config.data.train_data} is now; restore the data, or choose another --out"
                )
    if not record.primary:
        metrics = expected_metrics(record.rows[record.baseline])
        record = replace(record, primary=primary_of(metrics))
    return record, outcomes


def expected_metrics(config: TrainConfig) -> dict[str, list[str]]:
    """The scores that a run will have and that may be primary, by evaluation set."""
    if data := evaluation_data(config):
        layout = open_run_layout(config, data)
    else:
        run_data = open_run_data(config)
        layout = Layout(run_data.training, key=TRAIN, class_rows=run_data.class_rows)
        if run_data.held_out is not None:
            layout = replace(layout, test=run_data.held_out, key="HO")
    metrics: dict[str, list[str]] = {}
    for key, of_set in layout.sets.items():
        metrics[key] = [] if of_set.captions == 0 else list(RECALLS)
        for label, classes in of_set.test.labels.items():
            skip = {task for skipped, task in of_set.skip if skipped == label}
            if not of_set.names_classes(label):
                skip.add("zeroshot")
            if bool((classes.ids >= 0).any()):
                metrics[key] += [f"{label}/{m}" for m, task in TASK_OF.items() if task not in skip]
    return metrics


def announcement(record: Record, outcomes: Outcomes) -> str:
    """The rows, the primary scores and the number of runs."""
    scores = [Score(*place) for place in record.primary]
    done = [run for of_row in outcomes.values() for run in of_row.values()]
    text = (
        f"rows: {'; '.join(record.rows)} (the baseline is {record.baseline})\n"
        f"primary scores: {', '.join(f'{score.words} ({score.key})' for score in scores)}\n"
        f"runs: {len(record.runs)}, {len(record.rows)} for each of the seeds "
        f"{', '.join(map(str, record.seeds))}; {len(done)} finished"
    )
    if unknown := sum(not outcome.training_data for outcome in done):
        text += (
            f"\nnote: {plural(unknown, 'finished run')} of an older version: whether the data is "
            "still the same was not checked"
        )
    return text


def outcomes_of(record: Record) -> Outcomes:
    """The results of the finished runs."""
    outcomes: Outcomes = {name: {} for name in record.rows}
    for name, seed in record.runs:
        if outcome := finished(record.folder(name, seed)):
            outcomes[name][seed] = outcome
    return outcomes


def finished(folder: Path) -> Outcome | None:
    """The results of a run that has come to its end."""
    if not (folder / RESULTS).exists():
        return None
    outcome = read_results(folder / RESULTS)
    return outcome if outcome.trained else None


def run(asked: Record, jobs: int = 1, say: Callable[[str], None] = lambda text: None) -> Comparison:
    """Train what is missing, compare, and write comparison.json and the page."""
    with locked_folder(asked.out, "--out"):
        record, done = opened(asked)
        say(announcement(record, done))
        record.write()
        missing = [(row, seed) for row, seed in record.runs if seed not in done[row]]
        runs = Runs(record, min(jobs, max(1, len(missing))), missing)
        runs.train()
        rows = rows_of(record, outcomes_of(record))
        comparison = compare_rows(rows, record.primary, record, runs.failed)
        with_shown(record, comparison).write()
        write_comparison(comparison, asked.out / NAME)
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
    """Trains the missing runs of a comparison, each in a process of its own."""

    record: Record
    jobs: int
    missing: list[tuple[str, int]] = field(default_factory=list)  # row, seed
    failed: dict[str, str] = field(default_factory=dict)  # run -> why
    running: list[Started] = field(default_factory=list)

    def train(self) -> None:
        """Train them, ``jobs`` at once.

        Raises:
            Stopped: a signal asked the command to stop; its runs have saved and stopped.
        """
        total = len(self.record.runs)
        wait = Wait("comparison", total, "runs", done=total - len(self.missing))
        with StopSignals() as signals, wait:
            try:
                while self.missing or self.running:
                    stop_if_asked(signals, f"after {wait.done} runs; the same command continues")
                    while self.missing and len(self.running) < self.jobs:
                        self._start(*self.missing.pop(0))
                    wait.note = "; ".join(run_name(run.row, run.seed) for run in self.running)
                    time.sleep(POLL_SECONDS)
                    for run in [run for run in self.running if run.process.poll() is not None]:
                        self.running.remove(run)
                        self._note(run)
                        wait.update()
            finally:
                for run in self.running:
                    run.process.terminate()
                for run in self.running:
                    run.process.wait()

    def _start(self, row: str, seed: int) -> None:
        record = self.record
        folder = record.folder(row, seed)
        if folder.exists():  # a run that an earlier, killed command has left behind saves and stops
            try:
                with FileLock(folder / LOCK, timeout=STOP_SECONDS):
                    pass
            except Timeout as error:
                raise ValueError(f"{folder} is in use by another process; stop it") from error
        slot = min(set(range(self.jobs)) - {other.slot for other in self.running})
        command = [*train_command(record.nproc_per_run), "--preset", str(folder.parent / SETTINGS)]
        command += ["--seed", str(seed), "--logs", str(folder.parent), "--name", folder.name]
        command += ["--resume", "auto"]
        stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        process = subprocess.Popen(
            command,
            env=os.environ | self._share(slot, record.rows[row].run.device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=end_with_parent,
        )
        self.running.append(Started(row, seed, process, stderr, slot))

    def _share(self, slot: int, device: str) -> dict[str, str]:
        """Variables of a run: its threads on a CPU, its GPUs. Threads that spin while they wait
        would count as work."""
        processes = self.jobs * self.record.nproc_per_run
        variables = {"OMP_WAIT_POLICY": "passive", SHARED_MACHINE: str(int(self.jobs > 1))}
        if choose_device(device).type == "cpu":
            if processes > 1:
                variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))
        elif self.jobs > 1:
            count = self.record.nproc_per_run
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

    def _note(self, run: Started) -> None:
        folder = self.record.folder(run.row, run.seed)
        run.stderr.seek(0)
        text = run.stderr.read()
        run.stderr.close()
        if finished(folder):
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


def train_command(processes: int) -> list[str]:
    """The command that starts a run."""
    command = [sys.executable, "-m"]
    if processes > 1:  # after "--", or torchrun would take --logs for its own --logs-specs
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += ["-m", "--"]
    return [*command, "protoclip", "train"]


def run_name(row: str, seed: int) -> str:
    return f"{row}, seed {seed}"


if __name__ == "__main__":
    sys.exit(main())
