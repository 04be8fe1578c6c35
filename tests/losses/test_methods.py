"""Every switch of the method: what it changes, on tiny runs and on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import config_of, metrics
from torch import Tensor

from protoclip.common.phases import Phases
from protoclip.data import open_dataset
from protoclip.data.loader import EpochOrder
from protoclip.model import build_model
from protoclip.runs import checkpoint
from protoclip.runs.run_folder import RunFolder
from protoclip.training.loop import Trainer
from protoclip.training.run import Run
from protoclip.training.schedule import make_plan

DATASET = open_dataset("builtin:shapes:84")
TEACHER = torch.randn(84, 8, generator=torch.Generator().manual_seed(0))


Lines = list[dict[str, Any]]  # of metrics.jsonl
Train = Callable[..., Lines]


@pytest.fixture
def train(tmp_path: Path, nano: Path) -> Train:
    """Trains two episodes of three steps with the flags given."""

    def train(flags: list[str], teacher: Tensor | None = None) -> Lines:
        config = config_of(
            "--model", str(nano), "--batch-size", "32", "--report-to", "none",
            "--max-steps", "6", "--infonce-warmup-epoch", "1", *flags,
        )  # fmt: skip
        folder = RunFolder(tmp_path / "run", config)
        folder.open()
        torch.manual_seed(0)
        device = torch.device("cpu")
        run = Run(
            config=config,
            plan=make_plan(config, len(DATASET)),
            dataset=DATASET,
            order=EpochOrder(DATASET),
            model=build_model(config.model),
            device=device,
            precision="fp32",
            folder=folder,
            phases=Phases(device),
            teacher=teacher,
        )
        Trainer(run).train()
        folder.close()
        return metrics(tmp_path / "run")

    return train


def last_values(lines: Lines) -> dict[str, Any]:
    """The newest value of each name."""
    return {name: value for line in lines for name, value in line.items()}


SWITCHES = [
    "--episode-features reuse", "--episode-features reuse --episode-size 32", "--paper",
    "--target-temperature 0", "--no-PBT", "--no-add-projection-head",
]  # fmt: skip


@pytest.mark.parametrize("flags", SWITCHES)
def test_a_switch_trains_with_prototypes(train: Train, flags: str) -> None:
    lines = train(flags.split())
    assert "image_inertia" in last_values(lines) and "proto_loss" in lines[-1]


class Sources(NamedTuple):
    """Flags, whether there is a teacher, and whose prototypes train."""

    flags: str
    teacher: bool
    internal: bool
    external: bool


SOURCES = [
    Sources("", teacher=False, internal=True, external=False),
    Sources("", teacher=True, internal=False, external=True),
    Sources("--w-proto 1", teacher=True, internal=True, external=True),
    Sources("--w-proto 0", teacher=True, internal=False, external=True),
    Sources("--w-proto-external 0", teacher=True, internal=True, external=False),
]


@pytest.mark.parametrize("case", SOURCES, ids=str)
def test_internal_prototypes_stand_in_for_external_ones(train: Train, case: Sources) -> None:
    values = last_values(train(case.flags.split(), teacher=TEACHER if case.teacher else None))
    assert ("proto_loss" in values) == ("image_inertia" in values) == case.internal
    assert ("external_loss" in values) == ("external_inertia" in values) == case.external


def test_the_control_does_without_prototypes(train: Train) -> None:
    flags = ["--w-proto", "0", "--w-proto-external", "0", "--w-distill", "1"]
    values = last_values(train(flags, teacher=TEACHER))
    assert values["distill_loss"] > 0
    assert not any("proto_loss" in name or "inertia" in name for name in values)


@pytest.mark.parametrize("flags", [["--lock-image"], ["--lit-start", "1"]], ids=" ".join)
def test_a_locked_image_tower_does_not_move(train: Train, tmp_path: Path, flags: list[str]) -> None:
    """Locked from the start, or from the end of the first of two episodes."""
    train([*flags, "--save-frequency", "1"])
    checkpoints = tmp_path / "run" / "checkpoints"
    first = checkpoint.load(checkpoints / "epoch_1.pt")["state_dict"]
    last = checkpoint.load(checkpoints / "epoch_2.pt")["state_dict"]
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


class Rates(NamedTuple):
    """Learning rates of a step."""

    image: float
    text: float


def test_the_image_towers_rate_ends_where_it_is_locked(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cosine is at nothing there, the text tower's is not: docs/algorithm.md §3.3."""
    rates: list[Rates] = []
    original_step = Trainer.take_step

    def noted_step(trainer: Trainer, *arguments: Any) -> Any:
        result = original_step(trainer, *arguments)
        groups = trainer.update.adamw.param_groups
        (image,) = {group["lr"] for group in groups if group["image"]}
        (text,) = {group["lr"] for group in groups if not group["image"]}
        rates.append(Rates(image, text))
        return result

    monkeypatch.setattr(Trainer, "take_step", noted_step)
    train(["--lit-start", "1", "--warmup", "1", "--lr", "1"])
    half = [0.5 * (1 + math.cos(math.pi * step / 2)) for step in range(2)]
    five_sixths = [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert [step.image for step in rates] == pytest.approx([1, *half, 0, 0, 0], abs=1e-9)
    assert [step.text for step in rates] == pytest.approx([1, *five_sixths], abs=1e-9)


def test_an_episode_reports_its_clusters_and_times(train: Train) -> None:
    values = last_values(train(["--grad-clip-norm", "0.01", "--w-proto", "1"], teacher=TEACHER))
    for source in ("image", "text", "external"):
        sizes = [values[f"{source}_size_{name}"] for name in ("min", "median", "max")]
        assert sizes == sorted(sizes) and values[f"{source}_empty"] == 0
        assert 0 < values[f"{source}_purity_group"] <= 1
        assert values[f"{source}_imbalance"] >= 1 and values[f"{source}_inertia"] > 0
        assert 1 <= values[f"{source}_iterations"] < 20  # so few samples come to rest
    assert {"logit_scale", "proto_logit_scale", "grad_norm"} <= set(values)
    assert {"seconds_features", "seconds_clusters", "seconds_backward"} <= set(values)
