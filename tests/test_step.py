"""One training step: what moves, what is skipped, and where its time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import bare_run, metrics

from protoclip.data import Batch
from protoclip.losses import Losses
from protoclip.model import build_model
from protoclip.runs import checkpoint
from protoclip.settings.config import LossConfig, ModelConfig, OptimConfig
from protoclip.train import main
from protoclip.training.optimiser import parameter_groups
from protoclip.training.step import Stepper


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_page: None) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return bare_run(tmp_path, "--max-steps", "12")


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the batches of some steps hold one picture of NaN."""
    original_step = Stepper.step

    def poisoned(
        stepper: Stepper, step_number: int, batches: Any, *arguments: Any, **options: Any
    ) -> Any:
        if step_number in steps:
            batches[0].image[3] = float("nan")
        return original_step(stepper, step_number, batches, *arguments, **options)

    monkeypatch.setattr(Stepper, "step", poisoned)


def newest_checkpoint(run: Path) -> dict[str, Any]:
    _, payload = checkpoint.load_newest(run)
    return payload


@pytest.mark.parametrize("features", ["extract", "reuse"])
def test_a_bad_step_is_skipped_and_counted(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    poison(monkeypatch, {2, 6})  # warm-up, and with prototypes
    assert main([*flags, "--episode-features", features]) == 0
    run = tmp_path / "logs" / "run"
    records = {line["step"]: line for line in metrics(run)}
    assert sorted(records) == list(range(1, 13))
    assert [step for step in records if "loss" not in records[step]] == [3, 7]
    assert records[12]["bad_steps"] == 2 and "bad_steps" not in records[2]
    payload = newest_checkpoint(run)
    tensors = [*payload["state_dict"].values(), *payload["protoclip"]["heads"].values()]
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())
    log = (run / "out.log").read_text()
    assert "step 3 skipped" in log and ".tar/" in log


@pytest.mark.parametrize("log_every", ["1", "50"])
def test_too_many_bad_steps_in_a_row_save_and_stop(
    tmp_path: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    log_every: str,
) -> None:
    poison(monkeypatch, set(range(4, 99)))
    assert main([*flags, "--max-bad-steps", "3", "--log-every-n-steps", log_every]) == 2
    message = capsys.readouterr().err
    assert "not finite in 3 steps in a row, up to step 7" in message
    assert "detect_anomaly" in message and ".tar/" in message and "Traceback" not in message
    state = newest_checkpoint(tmp_path / "logs" / "run")["protoclip"]
    assert state["step"] == 7
    assert state["training"]["skipped"] == [3, 3]


def test_vectors_scalars_and_heads_do_not_decay() -> None:
    model = build_model(ModelConfig())
    groups = parameter_groups(model, 0.5)
    decaying = [p for group in groups if group["weight_decay"] == 0.5 for p in group["params"]]
    constant = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert all(parameter.ndim >= 2 for parameter in decaying)
    assert {id(parameter) for parameter in model.text_head.parameters()} <= constant
    assert id(model.logit_scale_proto) in constant and id(model.clip.logit_scale) in constant
    assert len(decaying) + len(constant) == len(list(model.parameters()))


def test_gradients_are_clipped_and_scales_clamped() -> None:
    model = build_model(ModelConfig())

    def steep_loss(*_: Any, **options: Any) -> Losses:
        total = 1e3 * model.clip.text_projection.sum() - 1e6 * model.logit_scale_proto
        return Losses(total, {}, {})

    steep_loss.config = LossConfig()
    stepper = Stepper(model, steep_loss, OptimConfig(grad_clip_norm=0.5))
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)
    batch = Batch(torch.arange(2), pixels, model.tokenizer(["a", "b"]))
    result = stepper.step(0, [batch], None, project=False, lr=1e-3)
    assert result.finite and result.norm > 1e6
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(0.5, rel=1e-4)
    assert (
        1 <= model.proto_logit_scale <= 100.0001
        and stepper.skipped_steps == stepper.consecutive_skips == 0
    )
