"""Every switch of the method: what it changes, on tiny runs and on numbers."""

import math

import pytest
import torch
from ranks import config_of, metrics

from protoclip import checkpoint
from protoclip.data import open_dataset
from protoclip.data.loader import EpochOrder
from protoclip.model import build_model
from protoclip.run_folder import RunFolder
from protoclip.schedule import make_plan
from protoclip.step import Stepper
from protoclip.train import Setup, Trainer

DATASET = open_dataset("builtin:shapes:84")
TEACHER = torch.randn(84, 8)


@pytest.fixture
def run(tmp_path, nano):
    """Trains two episodes of three steps; returns the lines of metrics.jsonl."""

    def run(*flags, teacher=None):
        head = ["--model", str(nano), "--batch-size", "32", "--report-to", "none"]
        config = config_of(*head, "--max-steps", "6", "--infonce-warmup-epoch", "1", *flags)
        folder = RunFolder(tmp_path / "run", config)
        plan, order = make_plan(config, len(DATASET)), EpochOrder(DATASET)
        torch.manual_seed(0)
        setup = Setup(config, plan, DATASET, order, torch.device("cpu"), "fp32", teacher)
        Trainer(setup, build_model(config.model), folder).run()
        folder.close()
        return metrics(tmp_path / "run")

    return run


def scalars(lines):
    return {name: value for line in lines for name, value in line.items()}


SWITCHES = [
    "--episode-features reuse", "--episode-features reuse --episode-size 32", "--paper",
    "--target-temperature 0", "--no-PBT", "--no-add-projection-head",
]  # fmt: skip


@pytest.mark.parametrize("flags", SWITCHES)
def test_a_switch_trains_and_shows(run, flags):
    lines = run(*flags.split())
    assert "image_inertia" in scalars(lines) and "proto_loss" in lines[-1]


def test_the_control_does_without_prototypes(run):
    flags = ["--w-proto", "0", "--w-proto-external", "0", "--w-distill", "1"]
    control = scalars(run(*flags, teacher=TEACHER))
    assert control["distill_loss"] > 0
    assert not any("proto_loss" in name or "inertia" in name for name in control)


@pytest.mark.parametrize("flags", [["--lock-image"], ["--lit-start", "1"]], ids=" ".join)
def test_a_locked_image_tower_does_not_move(run, tmp_path, flags):
    """Locked from the start, or from the end of the first of two episodes."""
    run(*flags, "--save-frequency", "1")
    folder = tmp_path / "run" / "checkpoints"
    first, last = (checkpoint.load(folder / f"epoch_{n}.pt")["state_dict"] for n in (1, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


def test_the_image_towers_rate_ends_where_it_is_locked(run, monkeypatch):
    """Its cosine is at nothing there, the text tower's is not: docs/algorithm.md §3.3."""
    rates = []
    step = Stepper.step

    def seen(self, *rest, lr, image_lr, **options):
        taken = step(self, *rest, lr=lr, image_lr=image_lr, **options)
        groups = self.adamw.param_groups
        rates.append([{g["lr"] for g in groups if g["image"] is own} for own in (True, False)])
        return taken

    monkeypatch.setattr(Stepper, "step", seen)
    run("--lit-start", "1", "--warmup", "1", "--lr", "1")
    half = [0.5 * (1 + math.cos(math.pi * n / 2)) for n in range(3)]
    fifth = [0.5 * (1 + math.cos(math.pi * n / 5)) for n in range(5)]
    assert [image for (image,), _ in rates] == pytest.approx([1, *half[:2], *[0] * 3], abs=1e-9)
    assert [text for _, (text,) in rates] == pytest.approx([1, *fifth], abs=1e-9)


def test_an_episode_says_how_it_went(run):
    told = scalars(run("--grad-clip-norm", "0.01", teacher=TEACHER))
    for source in ("image", "text", "external"):
        sizes = [told[f"{source}_size_{name}"] for name in ("min", "median", "max")]
        assert sizes == sorted(sizes) and told[f"{source}_empty"] == 0
        assert 0 < told[f"{source}_purity_group"] <= 1
        assert told[f"{source}_imbalance"] >= 1 and told[f"{source}_inertia"] > 0
        assert 1 <= told[f"{source}_iterations"] < 20  # so few samples come to rest
    assert {"logit_scale", "logit_scale_proto", "grad_norm"} <= set(told)
    assert {"seconds_features", "seconds_clusters", "seconds_backward"} <= set(told)
