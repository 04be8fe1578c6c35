"""What ``protoclip compare`` is asked for, and what its folder keeps: nothing that follows from the
runs in it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from protoclip.common.files import LOCK, write_atomic
from protoclip.common.json_text import parse_json
from protoclip.common.paths import check_above
from protoclip.settings.commands import compare_parser, train_parser
from protoclip.settings.config import TABLE, TrainConfig, flat, from_dict, to_dict
from protoclip.settings.flags import checked_config

FILE = "comparison.json"
PAGE = "report.html"
SETTINGS = "settings.json"  # of a row, in its folder
RESULTS = "results.json"  # of a run
ROWS = {"CLIP": "--method clip", "ProtoCLIP": ""}  # without --row; the first is the baseline
# The command gives each run its own.
SET_BY_COMPARE = ("run.name", "run.logs", "run.resume", "run.seed")
# Variables of a process that torchrun or mpirun has started.
LAUNCHED = ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "OMPI_COMM_WORLD_SIZE")
# Settings in which all rows agree: what a run is trained and judged on, and where.
SHARED = [f"data.{name}" for name in TABLE] + [
    "data.train_data", "data.val_data", "data.val_fraction", "data.val_seed",
    "data.train_num_samples", "run.device",
]  # fmt: skip
MATTER = ("run.device", "run.precision")  # of the settings of a run, in a comparison


class Shown(NamedTuple):
    """A pair that a table has shown."""

    row: str
    baseline: str
    starred: Sequence[tuple[str, str]]  # evaluation set, metric


@dataclass(frozen=True)
class Record:
    """A comparison: what is asked for, and what its folder has shown until now."""

    rows: Mapping[str, TrainConfig]  # the first is the baseline
    seeds: tuple[int, ...]
    out: Path
    nproc_per_run: int = 1
    words: tuple[str, ...] = ()  # of the command line; none from Python
    primary: Sequence[tuple[str, str]] = ()  # evaluation set, metric
    shown_seeds: Sequence[int] = ()  # of the first table
    shown: Sequence[Shown] = ()  # of all tables, in this order
    result: Mapping[str, Any] = field(default_factory=dict)  # for programs

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Every run, (row, seed), in the order in which they start."""
        return [(row, seed) for seed in self.seeds for row in self.rows]

    @property
    def added(self) -> list[int]:
        """Seeds that came after a result was shown."""
        return [seed for seed in self.seeds if self.shown_seeds and seed not in self.shown_seeds]

    def folder(self, row: str, seed: int) -> Path:
        return self.out / folder_name(row) / f"seed-{seed}"

    def write(self) -> None:
        """Write ``comparison.json`` and the settings of each row."""
        for name, config in self.rows.items():
            clean = replace(config, run=replace(config.run, name="", resume=""))
            settings = json.dumps(to_dict(clean), indent=2) + "\n"
            write_atomic(self.out / folder_name(name) / SETTINGS, settings)
        content = {**vars(self), "rows": list(self.rows)}
        del content["out"]
        # NaN and infinity are not JSON.
        strict = json.loads(json.dumps(content), parse_constant=lambda name: None)
        write_atomic(self.out / FILE, json.dumps(strict, indent=1) + "\n")


def folder_name(row: str) -> str:
    """The folder of a row's runs."""
    return re.sub(r"[^\w.+=-]+", "-", row).strip("-.") or "row"


def settings_of(config: TrainConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a row what it is, by dotted name."""
    values = flat(to_dict(config) if isinstance(config, TrainConfig) else config)
    return {
        name: value
        for name, value in values.items()
        if name in MATTER or not name.startswith(("run.", "data.workers", "data.prefetch"))
    }


def check_rows(record: Record) -> None:
    """Raise ValueError for a comparison without seeds or of rows that cannot be compared."""
    if not record.seeds:
        raise ValueError("--seeds: expected at least one seed, got none")
    if len(record.rows) < 2:
        raise ValueError(
            f"--row: expected a baseline and at least one other row, got {len(record.rows)}; the "
            "first row is the baseline"
        )
    folders: dict[str, str] = {}
    shared = flat(to_dict(record.rows[record.baseline]))
    for name, config in record.rows.items():
        folder = folder_name(name).lower()
        if folder in folders:
            raise ValueError(
                f"--row: {name!r} and {folders[folder]!r} would have the same folder; rename one"
            )
        folders[folder] = name
        settings = flat(to_dict(config))
        for setting in SHARED:
            if settings[setting] != shared[setting]:
                raise ValueError(
                    f"--row {name}: expected the data and device of {record.baseline}, but "
                    f"{setting} is {settings[setting]!r} and not {shared[setting]!r}; give it "
                    "outside of the rows"
                )
    check_above(record.out / FILE, "--out")


def parse_record(argv: Sequence[str]) -> tuple[Record, Any]:
    """The comparison that a command line asks for, and its flags. Opens no folder and no data.

    Raises:
        ValueError: what is wrong, in a sentence.
    """
    parser = compare_parser()
    parser.raises = True
    flags = parser.parse_args(argv)
    for name in LAUNCHED:
        if name in os.environ:
            raise ValueError(
                f"expected to be started without a launcher, found {name}; use --nproc-per-run N, "
                "which starts torchrun for each run"
            )
    settings = {
        name: value
        for name, value in vars(flags).items()
        if "." in name or name in ("method", "preset", "dataset_type") or name.startswith("--")
    }
    _refuse_own(settings)
    if not flags.row and "method" in settings:
        raise ValueError(
            "--method: the rows CLIP and ProtoCLIP set it; leave it out, or name rows with --row"
        )
    rows: dict[str, TrainConfig] = {}
    row_parser = train_parser()
    row_parser.raises = True
    for name, words in _row_flags(flags.row):
        if name in rows:
            raise ValueError(f"--row: {name!r} is named twice; rename one")
        try:
            of_row = row_parser.parse_args(shlex.split(words), argparse.Namespace(**settings))
            _refuse_own(vars(of_row))
            rows[name] = checked_config(vars(of_row))[0]
        except ValueError as error:
            if not flags.row:
                raise
            raise ValueError(f"--row {name}: {str(error).removeprefix('--row ')}") from error
    seeds = tuple(sorted(set(flags.seeds)))
    record = Record(rows, seeds, Path(flags.out), flags.nproc_per_run, tuple(argv))
    check_rows(record)
    return record, flags


def _row_flags(texts: Sequence[str]) -> list[tuple[str, str]]:
    if not texts:
        return list(ROWS.items())
    rows = []
    for text in texts:
        name, colon, words = text.partition(":")
        if not colon or not name.strip() or name.strip().startswith("-"):
            raise ValueError(f"--row: expected 'NAME: flags of protoclip train', got {text!r}")
        rows.append((name.strip(), words.strip()))
    return rows


def _refuse_own(flags: Mapping[str, Any]) -> None:
    for name in SET_BY_COMPARE:
        if name in flags:
            flag = "--" + name.partition(".")[2]
            remedy = "--seeds" if flag == "--seed" else "--out"
            raise ValueError(
                f"{flag}: protoclip compare gives each run its own; leave it out, or use {remedy}"
            )


class Longer(NamedTuple):
    """A baseline that trains as long as a row does."""

    name: str
    config: TrainConfig
    command: str  # that compares the two; "" for a comparison from Python


def longer_baseline(record: Record, row: str, ratio: float) -> Longer:
    """The baseline of a comparison, trained ``ratio`` times as long, in place of it."""
    config = record.rows[record.baseline]
    epochs = float(f"{config.optim.epochs * ratio:.3g}")
    changes: dict[str, Any] = {"epochs": epochs}
    length = f"{epochs:g} epochs"
    if config.optim.max_steps:
        changes["max_steps"] = max(1, round(config.optim.max_steps * ratio))
        length = f"{changes['max_steps']} steps"
    if config.optim.warmup >= 1:  # a number of steps
        changes["warmup"] = float(max(1, round(config.optim.warmup * ratio)))
    name = re.sub(r", [\d.]+ (epochs|steps)$", "", record.baseline) + f", {length}"
    longer = replace(config, optim=replace(config.optim, **changes))
    if not record.words:
        return Longer(name, longer, "")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--row", action="append", default=[])
    own.add_argument("--seeds")
    own.add_argument("--jobs")
    flags, shared = own.parse_known_args(record.words)
    words_of = dict(_row_flags(flags.row))
    added = [f"--{flag.replace('_', '-')} {value:.10g}" for flag, value in changes.items()]
    rows = {name: " ".join([words_of[record.baseline], *added]), row: words_of[row]}
    command = ["protoclip", "compare"]
    for row_name, words in rows.items():
        command += ["--row", f"{row_name}: {words}".rstrip()]
    command += ["--seeds", ",".join(map(str, record.seeds)), *shared]
    return Longer(name, longer, shlex.join(command))


def read_record(folder: Path) -> Record:
    """The comparison in a folder; ValueError if its file is damaged or of an older version."""
    file = folder / FILE
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        rows = {name: read_settings(folder, name) for name in content.pop("rows")}
        content["seeds"] = tuple(content["seeds"])
        content["shown"] = [Shown(*pair) for pair in content["shown"]]
        return Record(rows, out=folder, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--out: {file} is damaged or of an older version ({error}); delete it, and the same "
            "command finds the finished runs again"
        ) from error


def read_settings(out: Path, row: str) -> TrainConfig:
    """The settings with which a row's runs were started."""
    text = (out / folder_name(row) / SETTINGS).read_text(encoding="utf-8")
    return from_dict(TrainConfig, parse_json(text))


def open_record(asked: Record) -> Record:
    """A comparison with what its folder has shown, and with the seeds of before: a seed that was
    planned once stays in the result.

    Raises:
        ValueError: the folder holds something else, or runs with other settings.
    """
    out = asked.out
    is_ours = (out / FILE).exists() or any(out.glob(f"*/{SETTINGS}"))
    if not is_ours and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise ValueError(
            f"--out: expected a new folder or that of a comparison, but {out} holds other files; "
            "choose another --out"
        )
    runs = list(out.glob("*/seed-*"))
    if not runs:  # or the first one was refused
        return asked
    before = Record({}, (), out, asked.nproc_per_run)
    if (out / FILE).exists():
        before = read_record(out)
    elif (out / PAGE).exists():
        finished = {run.name.removeprefix("seed-") for run in runs if (run / RESULTS).exists()}
        before = replace(before, shown_seeds=sorted(map(int, finished)))
    if before.nproc_per_run != asked.nproc_per_run:
        raise ValueError(
            f"--nproc-per-run: the comparison in {out} has {before.nproc_per_run}, got "
            f"{asked.nproc_per_run}; choose another --out"
        )
    for name, config in asked.rows.items():
        if not any((out / folder_name(name)).glob("seed-*")):
            continue
        settings = settings_of(read_settings(out, name))
        for setting, value in settings_of(config).items():
            if settings[setting] != value:
                raise ValueError(
                    f"--out: in {out} the row {name} has {setting} {settings[setting]!r}, got "
                    f"{value!r}; choose another --out, or give the row another name"
                )
    seeds = {*asked.seeds, *before.seeds, *before.shown_seeds}
    return replace(
        before, rows=asked.rows, seeds=tuple(sorted(seeds)), words=asked.words, result={}
    )
