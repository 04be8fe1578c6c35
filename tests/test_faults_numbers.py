"""Losses and gradients that are not finite: skipped, counted, and explained when they go on."""

import json

import pytest
import torch
from fault_runs import prepare
from torch import nn

from protoclip import checkpoint
from protoclip.config import OptimConfig
from protoclip.model import ProtoModel
from protoclip.train import main
from protoclip.training.engine import Optimiser
from protoclip.training.loop import Trainer

POISONED = "00001.tar/7"  # a sample whose picture becomes NaN


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("protoclip.train.draw_plots", lambda *_: None)


@pytest.fixture
def flags(tmp_path):
    return [*prepare(tmp_path), "--max-steps", "12", "--k", "4", "--name", "run"]


def poison(monkeypatch, steps):
    """Let the batches of some steps hold one picture of NaN."""
    train_step = Trainer._train_step

    def poisoned(self, parts, *rest):
        if self.step in steps:
            parts[0].image[3] = float("nan")
        return train_step(self, parts, *rest)

    monkeypatch.setattr(Trainer, "_train_step", poisoned)


@pytest.mark.parametrize("features", ["extract", "reuse"])
def test_a_bad_step_is_skipped_and_counted(tmp_path, flags, monkeypatch, features):
    poison(monkeypatch, {2, 6})  # warm-up, and with prototypes
    assert main([*flags, "--episode-features", features]) == 0
    lines = (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, lines)}
    assert sorted(records) == list(range(1, 13))
    assert [s for s in records if "loss" not in records[s]] == [3, 7]
    assert records[12]["bad_steps"] == 2
    state = checkpoint.load_newest(tmp_path / "logs" / "run")[1]
    tensors = [*state["state_dict"].values(), *state["protoclip"]["heads"].values()]
    assert all(t.isfinite().all() for t in tensors if t.is_floating_point())
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "step 3 skipped" in log and ".tar/" in log


def test_too_many_in_a_row_stop_save_and_name_the_culprit(tmp_path, flags, monkeypatch, capsys):
    poison(monkeypatch, set(range(4, 99)))
    assert main([*flags, "--max-bad-steps", "3"]) == 2
    message = capsys.readouterr().err
    assert "3 steps in a row, the last one step 7; first bad: the pictures of the batch" in message
    assert "and 8 more" in message and ".tar/" in message and "Traceback" not in message
    state = checkpoint.load_newest(tmp_path / "logs" / "run")[1]
    assert state["protoclip"]["step"] == 7
    assert state["protoclip"]["training"]["stateful"]["guard"] == {"total": 3, "in_a_row": 3}


def test_the_first_bad_tensor_is_named(tmp_path, flags, monkeypatch, capsys):
    """An infinity made inside the image tower, by a layer whose weights and inputs are fine."""
    project = ProtoModel.encode

    def overflowing(self, image, tokens):
        handle = self.clip.visual.ln_post.register_forward_hook(lambda m, i, o: o * float("inf"))
        try:
            return project(self, image, tokens)
        finally:
            handle.remove()

    monkeypatch.setattr(ProtoModel, "encode", overflowing)
    assert main([*flags, "--max-bad-steps", "1", "--method", "clip"]) == 2
    assert "first bad: the output of clip.visual" in capsys.readouterr().err


def test_the_fused_optimiser_skips_by_itself():
    """What a GPU relies on, tried on the CPU's fused AdamW."""
    weight = nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.full((3,), float("nan"))
    adamw.found_inf = torch.tensor(1.0)
    adamw.step()
    assert torch.equal(weight.detach(), torch.ones(3)) and adamw.state[weight]["step"] == 0
    weight.grad = torch.ones(3)
    adamw.found_inf = torch.tensor(0.0)
    adamw.step()
    assert (weight < 1).all() and adamw.state[weight]["step"] == 1


def test_a_skipped_step_leaves_optimiser_and_weights_alone():
    class Tiny(nn.Module):
        image_head = text_head = None

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def clamp_scales(self):
            pass

    model = Tiny()
    optimiser = Optimiser(model, OptimConfig(), "fp32")
    _, finite = optimiser.step((model.weight * float("nan")).sum())
    assert not finite and torch.equal(model.weight.detach(), torch.ones(2, 2))
    assert not optimiser.adamw.state
    _, finite = optimiser.step(model.weight.sum())
    assert finite and (model.weight < 1).all()
