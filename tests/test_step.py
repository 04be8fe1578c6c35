"""One training step: what moves, what is skipped, and where its time goes."""

import pytest
import torch
from ranks import bare_run, metrics

from protoclip import checkpoint
from protoclip.config import LossConfig, ModelConfig, OptimConfig
from protoclip.data import Batch
from protoclip.losses import Losses
from protoclip.model import build_model
from protoclip.step import Stepper, parameter_groups
from protoclip.train import main


@pytest.fixture
def flags(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)
    return bare_run(tmp_path, "--max-steps", "12")


def poison(monkeypatch, steps):
    """Let the batches of some steps hold one picture of NaN."""
    step = Stepper.step

    def poisoned(self, number, batches, *rest, **options):
        if number in steps:
            batches[0].image[3] = float("nan")
        return step(self, number, batches, *rest, **options)

    monkeypatch.setattr(Stepper, "step", poisoned)


@pytest.mark.parametrize("features", ["extract", "reuse"])
def test_a_bad_step_is_skipped_and_counted(tmp_path, flags, monkeypatch, features):
    poison(monkeypatch, {2, 6})  # warm-up, and with prototypes
    assert main([*flags, "--episode-features", features]) == 0
    records = {line["step"]: line for line in metrics(tmp_path / "logs" / "run")}
    assert sorted(records) == list(range(1, 13))
    assert [s for s in records if "loss" not in records[s]] == [3, 7]
    assert records[12]["bad_steps"] == 2 and "bad_steps" not in records[2]
    state = checkpoint.load_newest(tmp_path / "logs" / "run")[1]
    tensors = [*state["state_dict"].values(), *state["protoclip"]["heads"].values()]
    assert all(t.isfinite().all() for t in tensors if t.is_floating_point())
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "step 3 skipped" in log and ".tar/" in log


@pytest.mark.parametrize("log_every", ["1", "50"])
def test_too_many_in_a_row_save_and_stop(tmp_path, flags, monkeypatch, capsys, log_every):
    poison(monkeypatch, set(range(4, 99)))
    assert main([*flags, "--max-bad-steps", "3", "--log-every-n-steps", log_every]) == 2
    message = capsys.readouterr().err
    assert "not finite in 3 steps in a row, up to step 7" in message
    assert "detect_anomaly" in message and ".tar/" in message and "Traceback" not in message
    state = checkpoint.load_newest(tmp_path / "logs" / "run")[1]
    assert state["protoclip"]["step"] == 7
    assert state["protoclip"]["training"]["skipped"] == [3, 3]


def test_vectors_scalars_and_heads_do_not_decay():
    model = build_model(ModelConfig())
    groups = parameter_groups(model, 0.5)
    decaying = [p for group in groups if group["weight_decay"] == 0.5 for p in group["params"]]
    kept = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert all(p.ndim >= 2 for p in decaying)
    assert {id(p) for p in model.text_head.parameters()} <= kept
    assert id(model.logit_scale_proto) in kept and id(model.clip.logit_scale) in kept
    assert len(decaying) + len(kept) == len(list(model.parameters()))


def test_gradients_are_clipped_and_scales_clamped():
    model = build_model(ModelConfig())

    def steep(*_, **scales):
        total = 1e3 * model.clip.text_projection.sum() - 1e6 * model.logit_scale_proto
        return Losses(total, {}, {})

    steep.config = LossConfig()
    stepper = Stepper(model, steep, OptimConfig(grad_clip_norm=0.5))
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)
    batch = Batch(torch.arange(2), pixels, model.tokenizer(["a", "b"]))
    taken = stepper.step(0, [batch], None, project=False, lr=1e-3)
    after = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert taken.finite and taken.norm > 1e6 and after == pytest.approx(0.5, rel=1e-4)
    assert 1 <= model.proto_scale <= 100.0001 and stepper.bad.tolist() == [0, 0]
