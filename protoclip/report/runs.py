"""What a report reads of a run folder, and which run it is compared with."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from protoclip.config import TrainConfig, flag_of
from protoclip.data import DataError, PairDataset, open_dataset
from protoclip.evaluate import Results, read_results
from protoclip.evaluate.results import results_from_plain, results_to_plain
from protoclip.report.curves import read_series
from protoclip.report.snapshot import Snapshot, load_snapshot

RECORDED = "clip_baseline.json"  # the plain baseline of the default run, as once recorded
HEADS = ("add_projection_head", "projection_hidden_dim", "projection_dim")


@dataclass(frozen=True)
class Run:
    """One run folder, read."""

    name: str
    path: Path | None
    config: Mapping[str, Any]
    after: Results | None = None
    before: Results | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    series: Mapping[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    remark: str = ""

    @property
    def method(self) -> str:
        return str(self.config.get("method", ""))


def read_run(path: str | os.PathLike[str]) -> Run:
    """A run folder as training left it; what is missing stays empty.

    Raises:
        ValueError: the folder is none, or holds no config.json.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"report: expected a run folder of protoclip.train, found no {path / 'config.json'}"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path / 'config.json'} is no JSON: {error}") from error
    results: dict[str, Any] = {}
    if (path / "results.json").is_file():
        results = read_results(path / "results.json")
    metrics = path / "metrics.jsonl"
    return Run(
        path.resolve().name,
        path,
        config,
        results.get("trained"),
        results.get("untrained"),
        results.get("seconds") or {},
        results.get("peak_memory_bytes"),
        read_series(metrics) if metrics.is_file() else {},
        load_snapshot(path),
    )


def datasets(run: Run) -> tuple[PairDataset | None, PairDataset | None, str]:
    """Training and evaluation data of a run for its pictures, and what is missing in words."""
    missing: list[str] = []

    def opened(spec: str, split: str) -> PairDataset | None:
        if not spec:
            return None
        try:
            if not spec.startswith("builtin:") and Path(spec).is_dir():
                from protoclip.evaluate.layouts import open_layout

                return open_layout(spec).test
            return open_dataset(spec, split, seed=seed, **columns)
        except (DataError, OSError) as error:
            missing.append(f"No pictures of {spec}: {error}")
            return None

    data = run.config.get("data", {})
    seed = run.config.get("run", {}).get("seed", 0)
    columns = {k: v for k, v in data.items() if k.startswith("csv_") and "label" not in k}
    train_spec, judged_spec = data.get("train_data", ""), data.get("val_data", "")
    built_in = train_spec.startswith("builtin:")
    train = opened(train_spec, "train" if built_in else "all")
    judged_spec = judged_spec or (train_spec if built_in else "")
    split = "heldout" if judged_spec.startswith("builtin:") else "all"
    return train, opened(judged_spec, split), " ".join(missing)


def comparable(config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs differ in nothing but the method: same data, encoder, steps and seed."""

    def common(one: Mapping[str, Any]) -> Any:
        model = {k: v for k, v in one.get("model", {}).items() if k not in HEADS}
        data = {
            k: v for k, v in one.get("data", {}).items() if k not in ("workers", "imagenet_val")
        }
        return data, model, one.get("optim"), one.get("run", {}).get("seed")

    return common(config) == common(other)


def find_baseline(runs: Sequence[Run]) -> Run | None:
    """The plain CLIP to compare with: among ``runs``, beside the last one, or as recorded."""
    given = next((run for run in runs if run.method == "clip"), None)
    if given is not None:
        return given
    run = runs[-1]
    for folder in sorted(run.path.resolve().parent.iterdir()) if run.path else ():
        if (folder / "config.json").is_file() and (folder / "results.json").is_file():
            try:
                other = read_run(folder)
            except (ValueError, OSError):
                continue
            if other.method == "clip" and comparable(run.config, other.config):
                return other
    return recorded_baseline(run)


def recorded_baseline(run: Run) -> Run | None:
    """The baseline that ships with protoclip, where the run is the default one."""
    file = resources.files("protoclip.report").joinpath(RECORDED)
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if not comparable(run.config, content["config"]):
        return None
    return Run(
        "CLIP (recorded)",
        None,
        content["config"],
        results_from_plain(content["trained"]),
        remark=content["remark"],
    )


def record_baseline(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Keep a plain run's numbers as the baseline that ships with protoclip.

    After a change of the defaults: train with ``--method clip``, then call this with the run
    folder and ``protoclip/report/clip_baseline.json``.
    """
    run = read_run(folder)
    if run.method != "clip" or run.after is None or run.snapshot is None:
        raise ValueError(f"record_baseline: expected a whole run of --method clip, got {run.name}")
    facts = run.snapshot.facts
    config = {**run.config, "run": {"seed": run.config["run"]["seed"]}}
    remark = (
        f"Baseline: plain CLIP, same data, encoder, steps and seed, recorded "
        f"{time.strftime('%Y-%m-%d')} ({facts['cpu']}, torch {facts['torch']}, commit "
        f"{facts['commit']}). For your own: --method clip, then protoclip.report RUN CLIP_RUN."
    )
    content = {"remark": remark, "config": config, "trained": results_to_plain(run.after)}
    text = json.dumps(content, indent=1, allow_nan=False)
    Path(output).write_text(text + "\n", encoding="utf-8")


def defaults_changed(config: Mapping[str, Any]) -> list[str]:
    """The flags that make this config out of the default one, as words of a command line."""
    words: list[str] = []

    def walk(default: Any, values: Mapping[str, Any]) -> None:
        for item in dataclasses.fields(default):
            own, value = getattr(default, item.name), values.get(item.name)
            if dataclasses.is_dataclass(own):
                walk(own, value or {})
            elif item.name in values and item.name not in ("name", "logs"):
                flag = flag_of(item)
                value = tuple(value) if isinstance(value, list) else value
                if value == own:
                    continue
                if isinstance(value, tuple):
                    words.extend((flag, *map(str, value)))
                elif isinstance(value, bool):
                    words.append(flag if value else "--no-" + flag[2:])
                else:
                    words.extend((flag, str(value)))

    walk(TrainConfig(), config)
    return words
