"""What ``protoclip compare`` is asked for: its rows and seeds, and what its folder has frozen."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from protoclip.common.files import write_atomic
from protoclip.common.json_text import parse_json
from protoclip.common.paths import check_above
from protoclip.settings.commands import compare_parser, train_parser
from protoclip.settings.config import TABLE, TrainConfig, flat, from_dict, to_dict
from protoclip.settings.flags import checked_config

FILE = "comparison.json"
PAGE = "report.html"
SETTINGS = "settings.json"  # of a row, in its folder
LOCK = ".lock"  # of the process that writes to the folder
FORM = {  # what comparison.json holds
    "rows": dict, "seeds": list, "equal_steps": bool, "count_teacher": bool, "nproc_per_run": int,
    "primary": list, "timed": list, "costs": list, "ratios": dict, "shown": list,
    "rebuilt": bool, "result": dict,
}  # fmt: skip
TOLERANCE = math.log1p(0.05)  # of the log ratio of training times that are called the same
LARGEST_RATIO = 1000.0  # of the training times of two rows, for a baseline at equal time
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


@dataclass(frozen=True)
class Plan:
    """A comparison: rows, and seeds on which each is trained."""

    rows: Mapping[str, TrainConfig]  # the first is the baseline
    seeds: tuple[int, ...]
    out: Path
    equal_steps: bool = False  # without the baseline at equal time
    count_teacher: bool = False
    nproc_per_run: int = 1

    @property
    def baseline(self) -> str:
        return next(iter(self.rows))

    @property
    def others(self) -> list[str]:
        return list(self.rows)[1:]

    @property
    def equal_time_rows(self) -> dict[str, str]:
        """Each other row -> the baseline that trains for as long."""
        if self.equal_steps:
            return {}
        return {name: f"{self.baseline}, time of {name}" for name in self.others}

    @property
    def all_rows(self) -> list[str]:
        return [*self.rows, *self.equal_time_rows.values()]

    def folder(self, row: str, seed: int) -> Path:
        return self.out / folder_name(row) / f"seed-{seed}"


@dataclass(frozen=True)
class Cost:
    """The training time of a row over its baseline's, on seeds whose runs trained alone.

    The properties work on arrays, too.
    """

    log_ratio: float = math.nan  # mean over the seeds; NaN: not known
    half: float = math.inf  # of its 95 % interval; infinite below three seeds

    @property
    def is_known(self) -> bool:
        return self.half <= TOLERANCE

    @property
    def is_equal(self) -> bool:
        """Whether the row costs what its baseline costs, as far as can be seen."""
        return self.is_known & (abs(self.log_ratio) <= self.half)

    @property
    def is_close(self) -> bool:
        """Whether a baseline that was to train for as long did so."""
        return abs(self.log_ratio) <= TOLERANCE


@dataclass
class Record:
    """What ``comparison.json`` holds; written after each change."""

    plan: Plan
    primary: list[tuple[str, str]] = field(default_factory=list)  # evaluation set, metric
    timed: list[int] = field(default_factory=list)  # seeds whose runs train alone
    costs: dict[tuple[str, str], Cost] = field(default_factory=dict)  # of (row, its baseline)
    # Row -> by what its baseline at equal time trains longer; rows without one are not here.
    ratios: dict[str, float] = field(default_factory=dict)
    shown: list[int] = field(default_factory=list)  # seeds of the first result that was shown
    rebuilt: bool = False  # from the runs, as the file was damaged
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def added(self) -> list[int]:
        """Seeds that came after a result was shown."""
        return [seed for seed in self.plan.seeds if seed not in self.shown] if self.shown else []

    @property
    def rows(self) -> dict[str, TrainConfig]:
        """The settings of all rows: the plan's, and the baselines at equal time that it needs."""
        plan = self.plan
        rows = dict(plan.rows)
        baseline = plan.rows[plan.baseline]
        steps = baseline.optim.max_steps
        for name, longer in plan.equal_time_rows.items():
            if ratio := self.ratios.get(name):
                optim = replace(
                    baseline.optim,
                    epochs=baseline.optim.epochs * ratio,
                    max_steps=max(1, round(steps * ratio)) if steps else 0,
                )
                rows[longer] = replace(baseline, optim=optim)
        return rows

    def write(self) -> None:
        plan = self.plan
        content = {
            "rows": {name: to_dict(config) for name, config in plan.rows.items()},
            "seeds": list(plan.seeds),
            "equal_steps": plan.equal_steps,
            "count_teacher": plan.count_teacher,
            "nproc_per_run": plan.nproc_per_run,
            "primary": self.primary,
            "timed": self.timed,
            "costs": [
                {"row": row, "baseline": baseline, **numbers_or_null(asdict(cost))}
                for (row, baseline), cost in self.costs.items()
            ],
            "ratios": self.ratios,
            "shown": self.shown,
            "rebuilt": self.rebuilt,
            "result": self.result,
        }
        plan.out.mkdir(parents=True, exist_ok=True)
        write_atomic(plan.out / FILE, json.dumps(content, indent=1) + "\n")


def numbers_or_null(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which has no NaN and no infinity."""
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


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


def check_rows(plan: Plan) -> None:
    """Raise ValueError for a plan without seeds or of rows that cannot be compared."""
    if not plan.seeds:
        raise ValueError("--seeds: expected at least one seed, got none")
    if len(plan.rows) < 2:
        raise ValueError(
            f"--row: expected a baseline and at least one other row, got {len(plan.rows)}; the "
            "first row is the baseline"
        )
    folders: dict[str, str] = {}
    for name in plan.all_rows:
        folder = folder_name(name).lower()
        if folder in folders:
            raise ValueError(
                f"--row: {name!r} and {folders[folder]!r} would have the same folder; rename one"
            )
        folders[folder] = name
    shared = flat(to_dict(plan.rows[plan.baseline]))
    for name in plan.others:
        settings = flat(to_dict(plan.rows[name]))
        for setting in SHARED:
            if settings[setting] != shared[setting]:
                raise ValueError(
                    f"--row {name}: expected the data and device of {plan.baseline}, but "
                    f"{setting} is {settings[setting]!r} and not {shared[setting]!r}; give it "
                    "outside of the rows"
                )
    check_above(plan.out / FILE, "--out")


def plan_of_flags(flags: Mapping[str, Any]) -> Plan:
    """The plan of a parsed command line.

    Raises:
        ValueError: what is wrong, in a sentence.
    """
    texts: Sequence[str] = flags["row"]
    settings = {
        name: value
        for name, value in flags.items()
        if "." in name or name in ("method", "preset", "dataset_type") or name.startswith("--")
    }
    _refuse_own(settings)
    if not texts and "method" in settings:
        raise ValueError(
            "--method: the rows CLIP and ProtoCLIP set it; leave it out, or name rows with --row"
        )
    rows: dict[str, TrainConfig] = {}
    for name, words in _row_flags(texts):
        if name in rows:
            raise ValueError(f"--row: {name!r} is named twice; rename one")
        try:
            parser = train_parser()
            parser.raises = True
            of_row = vars(parser.parse_args(shlex.split(words)))
            _refuse_own(of_row)
            if of_row["preset"] == "default":
                of_row["preset"] = settings["preset"]
            if of_row["dataset_type"] == "auto":
                of_row["dataset_type"] = settings["dataset_type"]
            rows[name] = checked_config({**settings, **of_row})[0]
        except ValueError as error:
            if not texts:
                raise
            raise ValueError(f"--row {name}: {str(error).removeprefix('--row ')}") from error
    plan = Plan(
        rows,
        tuple(sorted(set(flags["seeds"]))),
        Path(flags["out"]),
        flags["equal_steps"],
        flags["count_teacher"],
        flags["nproc_per_run"],
    )
    check_rows(plan)
    return plan


def _row_flags(texts: Sequence[str]) -> list[tuple[str, str]]:
    if not texts:
        return list(ROWS.items())
    rows = []
    for text in texts:
        name, colon, words = text.partition(":")
        if not colon or not name.strip() or name.strip().startswith("-"):
            raise ValueError(f"--row: expected 'NAME: flags of protoclip train', got {text!r}")
        rows.append((name.strip(), words))
    return rows


def _refuse_own(flags: Mapping[str, Any]) -> None:
    for name in SET_BY_COMPARE:
        if name in flags:
            flag = "--" + name.partition(".")[2]
            remedy = "--seeds" if flag == "--seed" else "--out"
            raise ValueError(
                f"{flag}: protoclip compare gives each run its own; leave it out, or use {remedy}"
            )


def parse_record(argv: Sequence[str] | None) -> tuple[Record, Any]:
    """The comparison that a command line asks for, joined with what its folder holds, and the
    flags. Reads no data.

    Raises:
        ValueError: what is wrong, in a sentence.
    """
    parser = compare_parser()
    parser.raises = True
    args = parser.parse_args(argv)
    for name in LAUNCHED:
        if name in os.environ:
            raise ValueError(
                f"expected to be started without a launcher, found {name}; use --nproc-per-run N, "
                "which starts torchrun for each run"
            )
    return open_record(plan_of_flags(vars(args))), args


def read_record(folder: Path) -> Record:
    """The comparison in a folder; ValueError if its file is damaged."""
    file = folder / FILE
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        for name, kind in FORM.items():
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        plan = Plan(
            {name: from_dict(TrainConfig, row) for name, row in content["rows"].items()},
            tuple(map(int, content["seeds"])),
            folder,
            content["equal_steps"],
            content["count_teacher"],
            content["nproc_per_run"],
        )
        for name, ratio in content["ratios"].items():
            check_ratio(name, ratio)
        return Record(
            plan,
            primary=[(key, metric) for key, metric in content["primary"]],
            timed=[int(seed) for seed in content["timed"]],
            costs={(cost["row"], cost["baseline"]): _read_cost(cost) for cost in content["costs"]},
            ratios=content["ratios"],
            shown=[int(seed) for seed in content["shown"]],
            rebuilt=content["rebuilt"],
            result=content["result"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"--out: {file} is damaged ({reason}); `protoclip compare` with the flags of before "
            "rebuilds it from the finished runs"
        ) from error


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError if a baseline at equal time cannot train this much longer."""
    if not 1 / LARGEST_RATIO <= ratio <= LARGEST_RATIO:
        raise ValueError(
            f"row {name}: expected a training time of at most {LARGEST_RATIO:,.0f} times the "
            f"baseline's, or the other way round, got {ratio:.3g}; use --equal-steps in a new --out"
        )


def _read_cost(numbers: Mapping[str, float | None]) -> Cost:
    log_ratio = numbers["log_ratio"]
    half = numbers["half"]
    cost = Cost(math.nan if log_ratio is None else log_ratio, math.inf if half is None else half)
    if not all(x is None or math.isfinite(x) for x in (log_ratio, half)) or cost.half < 0:
        raise ValueError(f"costs: expected finite numbers, got {log_ratio} and {half}")
    return cost


def rebuild_record(plan: Plan) -> Record:
    """The comparison of a folder whose file is damaged, from its runs: the plan's rows, with all
    seeds that are there.

    Raises:
        ValueError: runs of a row that the plan does not have, or has with other settings.
    """
    rows = {folder_name(name): name for name in plan.all_rows}
    settings: dict[str, Mapping[str, Any]] = {}
    seeds: set[int] = set()
    for folder in sorted(plan.out.glob("*/seed-*")):
        name = rows.get(folder.parent.name)
        if name is None:
            raise ValueError(
                f"--out: {plan.out / FILE} is damaged, and {folder.parent} is of no row of this "
                "command; give all flags of before, or choose another --out"
            )
        seeds.add(int(folder.name.removeprefix("seed-")))
        if name not in settings:
            settings[name] = parse_json((folder.parent / SETTINGS).read_text(encoding="utf-8"))
    for name in plan.rows:
        if name in settings:
            _check_same(plan, name, settings[name])
    baseline = plan.rows[plan.baseline]
    ratios = {
        name: settings[longer]["optim"]["epochs"] / baseline.optim.epochs
        for name, longer in plan.equal_time_rows.items()
        if longer in settings
    }
    shown = sorted(seeds) if (plan.out / PAGE).exists() else []
    merged = replace(plan, seeds=tuple(sorted({*seeds, *plan.seeds})))
    return Record(merged, ratios=ratios, shown=shown, rebuilt=bool(seeds))


def _check_same(plan: Plan, name: str, before: TrainConfig | Mapping[str, Any]) -> None:
    """Raise ValueError if a row has other settings than ``before``."""
    settings = settings_of(before)
    for setting, value in settings_of(plan.rows[name]).items():
        if settings.get(setting) != value:
            raise ValueError(
                f"--out: in {plan.out} the row {name} has {setting} {settings.get(setting)!r}, "
                f"got {value!r}; choose another --out, or give the row another name"
            )


def open_record(plan: Plan) -> Record:
    """The comparison in the plan's folder, with the rows and seeds of both: a row or seed that
    was planned once stays in the result.

    Raises:
        ValueError: the folder holds something else, or a comparison with other settings.
    """
    if not (plan.out / FILE).exists():
        if plan.out.is_dir() and any(path.name != LOCK for path in plan.out.iterdir()):
            raise ValueError(
                f"--out: expected a new folder or that of a comparison, but {plan.out} holds other "
                "files; choose another --out"
            )
        return Record(plan)
    try:
        record = read_record(plan.out)
    except ValueError:
        return rebuild_record(plan)
    before = record.plan
    begun = {name for name in before.all_rows if any(before.folder(name, 0).parent.glob("seed-*"))}
    if not begun:  # the first run was refused
        return Record(plan)
    for name in ("equal_steps", "count_teacher", "nproc_per_run"):
        if getattr(before, name) != getattr(plan, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: the comparison in {plan.out} has "
                f"{getattr(before, name)}, got {getattr(plan, name)}; choose another --out"
            )
    if before.baseline != plan.baseline:
        raise ValueError(
            f"--out: the baseline in {plan.out} is {before.baseline}, got {plan.baseline}; name "
            "the rows in the same order, or choose another --out"
        )
    for name in plan.rows:
        if name not in begun:
            continue
        _check_same(plan, name, before.rows[name])
    rows = {**before.rows, **plan.rows}
    merged = replace(plan, rows=rows, seeds=tuple(sorted({*before.seeds, *plan.seeds})))
    check_rows(merged)
    return replace(record, plan=merged)
