"""The JSON that CLIP_benchmark writes, so that its tools read our numbers beside its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protoclip.evaluate.results import Results

CLASSIFIERS = {  # CLIP_benchmark's task -> the names of its metrics
    "zeroshot_classification": ("acc1", "acc5", "mean_per_class_recall"),
    "linear_probe": ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
}
MAP = "mean_average_precision"


def records(results: Results, data: str, model: str, pretrained: str) -> list[dict[str, Any]]:
    """One record per set, label and task, as ``clip_benchmark eval --output`` writes it.

    The data set is "DATA/SET/LABEL", without the parts that tell nothing (ALL, class).
    """
    out: list[dict[str, Any]] = []

    def add(task: str, key: str, label: str, values: Mapping[str, Any]) -> None:
        parts = [data, "" if key == "ALL" else key, "" if label == "class" else label]
        out.append(
            {
                "dataset": "/".join(part for part in parts if part),
                "model": model,
                "pretrained": pretrained,
                "task": task,
                "metrics": dict(values),
                "language": "en",
            }
        )

    for key, one in results.sets.items():
        plain = {name: v for name, v in one.metrics.items() if "_retrieval_recall@" in name}
        if plain:
            add("zeroshot_retrieval", key, "", plain)
        for label in dict.fromkeys(name.split("/")[0] for name in one.metrics if "/" in name):
            own = {
                name.split("/", 1)[1]: value
                for name, value in one.metrics.items()
                if name.startswith(f"{label}/")
            }
            if MAP in own:
                add("zeroshot_classification", key, label, {MAP: own[MAP]})
            for task, names in CLASSIFIERS.items():
                found = {name: own[name] for name in names if name in own}
                if found and task == "linear_probe":
                    found |= _probe_settings(own)
                if found:
                    add(task, key, label, found)
    return out


def _probe_settings(own: Mapping[str, float]) -> dict[str, Any]:
    """What CLIP_benchmark says about its linear probe; ours uses all samples, as they are."""
    return {
        "weight_decay": own.get("lp_weight_decay", math.nan),
        "epochs": int(own.get("lp_epochs", 0)),
        "seed": 0,
        "fewshot_k": -1,
        "normalized": False,
    }


def write_records(folder: str | os.PathLike[str], content: list[dict[str, Any]]) -> list[Path]:
    """One file per record, named as CLIP_benchmark names them; ``clip_benchmark build`` reads them.

    Like CLIP_benchmark, values that do not exist (top-5 of four classes) are written as NaN.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for record in content:
        pretrained = record["pretrained"]
        name = "_".join(
            (
                record["dataset"],
                os.path.basename(pretrained) if os.path.isfile(pretrained) else pretrained,
                record["model"],
                record["language"],
                record["task"],
            )
        )
        path = folder / (name.replace("/", "_").strip("_") + ".json")
        path.write_text(json.dumps(record), encoding="utf-8")
        paths.append(path)
    return paths


def finite(record: Any) -> Any:
    """The same with None for numbers that strict JSON does not have."""
    if isinstance(record, dict):
        return {key: finite(value) for key, value in record.items()}
    return finite_number(record) if isinstance(record, float) else record


def finite_number(value: float) -> float | None:
    """The number, or None for NaN and infinity."""
    return value if math.isfinite(value) else None
