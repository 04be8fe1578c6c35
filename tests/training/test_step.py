"""One training step: what moves, what is skipped, and where its time goes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import bare_run, config_of, metrics
from steps import poison, steps_on, trainer_of
from torch import nn

import protoclip
from protoclip.data import Batch
from protoclip.losses.objective import Losses
from protoclip.model import build_model
from protoclip.report import page
from protoclip.runs import checkpoint
from protoclip.settings.config import LossConfig, ModelConfig, OptimConfig
from protoclip.train import main
from protoclip.training import log, update
from protoclip.training.optimiser import load_optimiser, parameter_groups
from protoclip.training.schedule import Plan


@pytest.fixture
def flags(workdir: Path) -> list[str]:
    return bare_run(workdir, "--max-steps", "12")


@pytest.mark.parametrize("features", ["extract", "reuse"])
def test_a_bad_step_is_skipped_and_counted(
    tmp_path: Path,
    no_page: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    features: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    poison(monkeypatch, {2, 6})  # warm-up, and with prototypes
    assert main(bare_run(tmp_path, "--max-steps", "12", "--episode-features", features)) == 0
    assert "warning: 2 of 12 steps were skipped, because" in capsys.readouterr().err
    run = tmp_path / "logs" / "run"
    results = json.loads((run / "results.json").read_text())
    assert (results["steps"], results["skipped_steps"]) == (12, 2)
    assert "run: 2 of 12 steps were skipped" in page.render([page.read_run(run)])
    records = {line["step"]: line for line in metrics(run)}
    assert sorted(records) == list(range(1, 13))
    assert [step for step in records if "loss" not in records[step]] == [3, 7]
    assert [records[step]["episode"] for step in (1, 4, 5, 8, 9, 12)] == [0, 0, 1, 1, 2, 2]
    assert records[12]["bad_steps"] == 2 and "bad_steps" not in records[2]
    _, payload = checkpoint.load_newest(run)
    tensors = [*payload["state_dict"].values(), *payload["protoclip"]["heads"].values()]
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())
    log = (run / "out.log").read_text()
    assert "step 3 skipped: contrastive_loss, loss, grad_norm not finite, 1 so far" in log
    assert ".tar/" in log


@pytest.mark.parametrize("log_every", ["1", "50"])
def test_too_many_bad_steps_in_a_row_save_and_stop(
    tmp_path: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error_of: Callable[..., str],
    log_every: str,
) -> None:
    poison(monkeypatch, set(range(4, 99)))
    more = ["--max-bad-steps", "3", "--log-every-n-steps", log_every]
    message = error_of(main, [*flags, *more], among_others=True)
    assert "not finite in 3 steps in a row, up to step 7" in message
    assert "detect_anomaly" in message and ".tar/" in message
    run = tmp_path / "logs" / "run"
    assert ", loss, grad_norm not finite, 1 so far; samples: [" in (run / "out.log").read_text()
    state = checkpoint.load_newest(run)[1]["protoclip"]
    assert state["step"] == 7
    assert state["training"]["skipped"] == [3, 3]


def test_a_run_that_took_hardly_a_step_ends_with_an_error(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    """Never so many in a row that it would have ended before."""
    poison(monkeypatch, set(range(12)) - {5})
    message = error_of(main, flags, among_others=True)
    assert "training: 11 of 12 steps were skipped, as loss or gradient was not finite" in message
    assert "so the model has not been trained; lower --lr" in message
    run = tmp_path / "logs" / "run"
    assert not (run / "results.json").exists()
    assert main(["--resume", str(run)]) == 2  # nothing is left to do, and it is no better


def test_vectors_scalars_and_heads_do_not_decay() -> None:
    model = build_model(ModelConfig())
    groups = parameter_groups(model, 0.5)
    decaying = [p for group in groups if group["weight_decay"] == 0.5 for p in group["params"]]
    constant = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert all(parameter.ndim >= 2 for parameter in decaying)
    assert {id(parameter) for parameter in model.text_head.parameters()} <= constant
    assert id(model.proto_log_scale) in constant and id(model.clip.logit_scale) in constant
    assert len(decaying) + len(constant) == len(list(model.parameters()))


def test_a_resumed_run_keeps_its_own_rate_and_decay() -> None:
    """Whatever the saved optimiser had."""
    weight = nn.Parameter(torch.ones(2, 2))

    def adamw(lr: float, weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW([weight], lr=lr, weight_decay=weight_decay)

    saved, resumed = adamw(1.0, 0.5), adamw(0.1, 0.2)
    weight.grad = torch.ones(2, 2)
    saved.step()
    load_optimiser(resumed, saved.state_dict())
    group = resumed.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.2)
    assert resumed.state[weight]["step"] == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_and_scales_clamped(scaled: bool) -> None:
    """Also those of a loss that is scaled for fp16."""
    model = build_model(ModelConfig())

    def steep_loss(*_: Any, **options: Any) -> Losses:
        total = 1e3 * model.clip.text_projection.sum() - 1e6 * model.proto_log_scale
        return Losses(total, {}, {})

    steep_loss.config = LossConfig()
    steep_loss.trains_heads = lambda episode: False
    trainer = trainer_of(model, None, "--grad-clip-norm", "0.5")
    trainer.loss = steep_loss
    if scaled:
        trainer.update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)
    batch = Batch(torch.arange(2), pixels, model.tokenizer(["a", "b"]))
    result = trainer.take_step(0, [batch])
    assert result.finite and 1e6 < result.norm < 1e8
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(0.5, rel=1e-4)
    assert 1 <= model.proto_logit_scale <= 100.0001


def test_each_batch_of_a_step_is_counted_once_by_batch_norm() -> None:
    """Although the backward pass encodes it again; weights stay, so that a copy of the model may
    encode the same batches later, in one graph."""
    model = build_model(ModelConfig())
    plain = copy.deepcopy(model)
    trainer = trainer_of(model, None, "--wd", "0", "--grad-clip-norm", "0", "--lr", "0")
    tokens = model.short_tokenizer(["a red circle", "a blue square", "a star", "a green line"])
    pixels = torch.randn(5, 2, 4, 3, model.image_size, model.image_size)
    for number, of_step in enumerate(pixels):
        batches = [
            Batch(torch.arange(4) + 4 * part, images, tokens.roll(part, 0))
            for part, images in enumerate(of_step)
        ]
        trainer.take_step(number, batches)
        parts = [plain.encode(batch.image, batch.tokens) for batch in batches]
        image = torch.cat([part.image for part in parts])
        text = torch.cat([part.text for part in parts])
        plain.zero_grad()
        protoclip.info_nce(F.normalize(image), F.normalize(text), plain.logit_scale).backward()
    expected = {name: value for name, value in plain.named_buffers() if "running" in name}
    got = {name: value for name, value in model.named_buffers() if "running" in name}
    assert got and all(torch.equal(got[name], expected[name]) for name in expected)
    counts = [m.num_batches_tracked for m in model.clip.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts and set(map(int, counts)) == {10}
    gradients = {name: p.grad for name, p in model.clip.named_parameters()}
    expected_gradients = {name: p.grad for name, p in plain.clip.named_parameters()}
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


CASES = ["clip", "prototypes", "siglip", "accumulation", "dedup"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_nothing(case: str, nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: a read raises."""

    class Unfused(torch.optim.AdamW):  # meta has no fused one, which reads found_inf itself
        def step(self, closure: Any = None) -> Any:
            assert self.found_inf.device.type == "meta"
            del self.found_inf
            return super().step(closure)

    def unfused(model: Any, config: OptimConfig, others: Any) -> torch.optim.AdamW:
        return Unfused(parameter_groups(model, config.wd, others), lr=config.lr)

    monkeypatch.setattr(update, "build_optimiser", unfused)
    trainer, take = steps_on("meta", nano, case)
    outcome = take()
    scalars = log.scalars_of(outcome, trainer.run.model, _NoFaults())
    run_log = log.Log(run_on("meta", "--log-every-n-steps", "5"), _NoFaults())
    for step_number in range(1, 5):
        run_log.after(step_number, outcome)  # counts the step, and begins no line
    assert outcome.finite.device.type == "meta"
    assert {value.device.type for value in scalars.values()} == {"meta"}
    expected = {"contrastive_loss"}
    if case == "prototypes":
        expected |= {"proto_loss", "external_loss"}
    assert set(outcome.losses.terms) == expected
    with pytest.raises(RuntimeError, match="meta"):
        outcome.losses.total.item()


def run_on(device: str, *flags: str) -> Any:
    """What a log reads of a run before its first line."""
    plan = Plan(100, 10, steps_per_epoch=10, steps_per_episode=10, total_steps=10)
    return SimpleNamespace(device=torch.device(device), config=config_of(*flags), plan=plan)


class _NoFaults:
    positions: tuple[int, ...] = ()
    known = 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_card_does_not_wait(case: str, nano: Path) -> None:
    trainer, take = steps_on("cuda", nano, case)
    take()  # kernels are compiled and memory is reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome = take()
        scalars = log.scalars_of(outcome, trainer.run.model, _NoFaults())
        read = log.start_copy_to_host(torch.stack([x.detach().float() for x in scalars.values()]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(read()) == len(scalars)


def read_late(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Let a CPU stand in for a card, whose numbers are on their way until they are read; returns
    what happens, in order: ("begun" or "read", number of the line)."""
    events: list[tuple[str, int]] = []
    original_init = log.Log.__init__
    original_copy = log.start_copy_to_host

    def init(self: log.Log, *arguments: Any) -> None:
        original_init(self, *arguments)
        self.reads_freely = False

    def start(values: torch.Tensor) -> Any:
        number = sum(what == "begun" for what, _ in events)
        events.append(("begun", number))
        read = original_copy(values.clone())

        def late() -> list[float]:
            events.append(("read", number))
            return read()

        return late

    monkeypatch.setattr(log.Log, "__init__", init)
    monkeypatch.setattr(log, "start_copy_to_host", start)
    return events


def numbers(run: Path) -> list[dict[str, Any]]:
    """The lines of a run without its times."""
    return [
        {name: value for name, value in line.items() if "second" not in name}
        for line in metrics(run)
    ]


def test_numbers_are_read_when_the_next_line_is_due(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags += ["--log-every-n-steps", "3", "--val-frequency", "0"]
    assert main([*flags, "--name", "at-once"]) == 0
    events = read_late(monkeypatch)
    assert main([*flags, "--name", "late"]) == 0
    assert events[:5] == [("begun", 0), ("read", 0), ("begun", 1), ("read", 1), ("begun", 2)]
    late = numbers(tmp_path / "logs" / "late")
    assert [line["step"] for line in late] == [3, 6, 9, 12]
    assert late == numbers(tmp_path / "logs" / "at-once")


def test_lines_that_are_begun_are_written_before_a_checkpoint(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_late(monkeypatch)
    lines_at: dict[int, int] = {}  # step of a checkpoint -> lines written by then
    original = checkpoint.save

    def save(path: Path, payload: Any, **options: Any) -> Any:
        lines_at[payload["protoclip"]["step"]] = len(metrics(path.parent.parent))
        return original(path, payload, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    assert main([*flags, "--log-every-n-steps", "2", "--save-every", "4steps"]) == 0
    assert {4: 2, 8: 4, 12: 6}.items() <= lines_at.items()
    assert all(lines == step // 2 for step, lines in lines_at.items())


def test_skipped_steps_are_seen_when_the_line_is_read(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., str]
) -> None:
    read_late(monkeypatch)
    poison(monkeypatch, set(range(4, 99)))
    error = error_of(
        main, [*flags, "--max-bad-steps", "3", "--log-every-n-steps", "4"], among_others=True
    )
    assert "not finite in 4 steps in a row, up to step 8" in error
    run = tmp_path / "logs" / "run"
    state = checkpoint.load_newest(run)[1]["protoclip"]
    assert state["step"] == 12 and state["training"]["skipped"] == [8, 8]
    assert metrics(run)[1]["bad_steps"] == 4


def test_a_skipped_step_between_two_lines_is_not_given_the_samples_of_another(
    tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_late(monkeypatch)
    poison(monkeypatch, {4})
    assert main([*flags, "--log-every-n-steps", "4"]) == 0
    text = (tmp_path / "logs" / "run" / "out.log").read_text()
    assert "1 step before step 8 skipped: loss or gradient not finite, 1 so far; --log-e" in text
    assert "samples:" not in text


def test_a_card_logs_every_tenth_step_by_default() -> None:
    def every(device: str, *flags: str) -> int:
        return log.Log(run_on(device, *flags), _NoFaults()).every

    assert [every("cpu"), every("meta")] == [1, 10]
    assert every("meta", "--log-every-n-steps", "3") == 3
