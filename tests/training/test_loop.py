"""The training loop: its size, the same losses as a loop in plain PyTorch, what is changed in it by
one line, and a checkpoint of an older version."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import bare_run, config_of, metrics
from steps import episode_on, trainer_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path

from protoclip import train
from protoclip.data import Batch, open_dataset
from protoclip.episodes.prototypes import EXTERNAL
from protoclip.losses.objective import Losses
from protoclip.model import build_model
from protoclip.runs import checkpoint
from protoclip.settings.config import LossConfig, ModelConfig
from protoclip.settings.flags import with_saved_config
from protoclip.training import loop
from protoclip.training.loop import Trainer
from protoclip.training.optimiser import parameter_groups
from protoclip.training.state import Stored

OLD = Path(__file__).with_name("checkpoint_of_0_1.pt")  # written by version 0.1.0


def test_the_loop_is_read_at_one_sitting() -> None:
    text = Path(loop.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    assert not re.search(r"--[a-z]", text), "it reads a config, and names no flag"


def plain_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def plain_prototypes(student: Tensor, prototypes: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy with the targets' softmax, as docs/algorithm.md has it."""
    logits = scale * student @ prototypes.T
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


@pytest.mark.parametrize("case", ["clip", "prototypes"])
def test_three_steps_are_those_of_a_loop_in_plain_pytorch(case: str, nano: Path) -> None:
    torch.manual_seed(0)
    models = [build_model(ModelConfig(model=str(nano))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mine, plain = models
    episode = None
    if case == "prototypes":
        torch.manual_seed(1)
        whole = episode_on("cpu", mine.projection_dim)
        sets = tuple(
            replace(item, prototypes=F.normalize(torch.randn_like(item.prototypes)), targets=None)
            for item in whole.sets
            if item.source != EXTERNAL
        )
        episode = replace(
            whole, sets=sets, labels={"image": torch.arange(6, dtype=torch.int32) % 4}
        )
    loss = LossConfig(w_proto=1.0)
    trainer = trainer_of(mine, episode, "--grad-clip-norm", "0.5", loss=loss)
    optim = trainer.run.config.optim
    adamw = torch.optim.AdamW(
        parameter_groups(plain, optim.wd), 1e-3, (optim.beta1, optim.beta2), optim.eps
    )
    for step in range(3):
        pixels = torch.randn(6, 3, mine.image_size, mine.image_size)
        tokens = mine.short_tokenizer(["a red circle", "a blue square", "a star"] * 2)
        outcome = trainer.take_step(step, [Batch(torch.arange(6), pixels, tokens)])

        plain.train()
        adamw.zero_grad()
        encoded = plain.encode(pixels, tokens)
        image, text = F.normalize(encoded.image, dim=1), F.normalize(encoded.text, dim=1)
        total = plain_loss(image, text, plain.logit_scale)
        if episode is not None:
            projected = plain.project(encoded)
            for item in episode.sets:
                targets = F.one_hot(episode.labels[item.source].long(), 4).float()
                student = getattr(projected, item.student)
                total = total + plain_prototypes(
                    student, item.prototypes, targets, plain.proto_logit_scale
                )
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adamw.step()
        plain.clamp_scales()
        torch.testing.assert_close(outcome.losses.total, total, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outcome.norm, norm, rtol=1e-4, atol=1e-6)
    for (name, got), expected in zip(mine.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=name)


def rows(name: str, width: int, factor: int) -> None:
    """48 rows that need no generator of random numbers."""
    values = np.arange(48 * width, dtype=np.int64).reshape(48, width) * factor % 251
    np.save(name, ((values - 125) / 64).astype(np.float32))


class NothingIsRead(TorchDispatchMode):
    """The host must not wait for a number of the device."""

    def __torch_dispatch__(
        self, op: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        assert op is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return op(*arguments, **(options or {}))


class PlainLoss:
    """In place of the ops, which on a CPU do read their scales (on a GPU: test_step.py)."""

    config = LossConfig()

    def __call__(self, encoded: Any, *_: Any, logit_scale: Tensor, **options: Any) -> Losses:
        image, text = F.normalize(encoded.image, dim=1), F.normalize(encoded.text, dim=1)
        return Losses(plain_loss(image, text, logit_scale), {}, {})

    def trains_heads(self, episode: Any) -> bool:
        return False


def test_the_step_of_a_gpu_reads_no_number(workdir: Path) -> None:
    """Of heads, as a text tower reads the lengths of captions where they are on the CPU."""
    model = build_model(ModelConfig(image_width=8, text_width=6, embed_dim=4))
    rows("images.npy", 8, 37)
    rows("texts.npy", 6, 101)
    files = ("--image-features", "images.npy", "--text-features", "texts.npy")
    dataset = open_dataset(config_of(*files).data.train_data)
    trainer = trainer_of(model, dataset=dataset)
    trainer.loss = PlainLoss()
    trainer.update.on_host = False  # the GPU's way, in which AdamW skips a step by itself
    before = [parameter.clone() for parameter in model.parameters()]
    images, texts = torch.randn(6, 8), torch.randn(6, 6)

    def step_with(images: Tensor) -> None:
        batch = Batch(torch.arange(6), images, texts)
        with NothingIsRead():
            trainer.take_step(0, [batch])

    step_with(images * float("nan"))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)  # skipped
    step_with(images)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# One line each.
class Shuffled(Trainer):
    def draw(self, steps: range) -> Tensor:
        return super().draw(steps).flip(0)


class Rising(Trainer):
    def loss_weights(self, step: int) -> LossConfig:
        return replace(self.loss.config, w_clip=1 + step)


class Remembering(Trainer):
    largest = 0.0

    def take_step(self, *arguments: Any) -> Any:
        outcome = super().take_step(*arguments)
        self.largest = max(self.largest, float(outcome.norm))
        return outcome

    def remember(self, saved: dict[str, float]) -> None:
        self.largest = saved["largest"]

    def stored(self) -> dict[str, Stored]:
        mine = Stored(lambda: {"largest": self.largest}, self.remember)
        return super().stored() | {"remembered": mine}


@pytest.fixture
def run(workdir: Path, no_page: None) -> Callable[..., list[dict[str, Any]]]:
    def run(name: str, trainer: type[Trainer], *flags: str) -> list[dict[str, Any]]:
        config = config_of(*bare_run(workdir, "--max-steps", "6", "--name", name, *flags))
        return metrics(train.train(config, trainer=trainer).folder)

    return run


def test_the_sampling_of_an_episode_is_one_function(run: Any) -> None:
    usual, other = run("usual", Trainer), run("other", Shuffled)
    assert [line["loss"] for line in usual] != [line["loss"] for line in other]


def test_the_weights_over_time_are_one_function(run: Any) -> None:
    for step, line in enumerate(run("rising", Rising, "--method", "clip")):
        assert line["loss"] == pytest.approx((1 + step) * line["contrastive_loss"], rel=1e-5)


def test_what_is_saved_is_one_table(run: Any, workdir: Path) -> None:
    run("remembering", Remembering)
    folder = workdir / "logs" / "remembering"
    _, payload = checkpoint.load_newest(folder)
    largest = payload["protoclip"]["training"]["remembered"]["largest"]
    assert largest == pytest.approx(max(line["grad_norm"] for line in metrics(folder)), rel=1e-5)
    trainers: list[Remembering] = []

    class Resumed(Remembering):
        def restore(self, resume: Any) -> list[str]:
            notes = super().restore(resume)
            trainers.append(self)
            assert self.largest == largest
            return notes

    flags = with_saved_config(["--resume", str(folder), "--max-steps", "7"])
    train.train(train.parse(train.train_parser(), flags), trainer=Resumed)
    assert len(trainers) == 1


def tensors_and_numbers(value: Any) -> dict[str, Any]:
    """Every leaf of nested dicts and lists, by its path."""
    leaves, _ = tree_flatten_with_path(value)
    return {"/".join(str(key)[1:-1].strip("'") for key in path): leaf for path, leaf in leaves}


def test_a_checkpoint_of_an_older_version_is_restored_whole(
    workdir: Path, no_page: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor and number of the file is what the restored trainer would save again."""
    rows("images.npy", 8, 37)
    rows("texts.npy", 6, 101)
    folder = workdir / "logs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD, folder / "checkpoints" / checkpoint.LATEST)
    settings = checkpoint.load(OLD)["protoclip"]["config"]
    (folder / "config.json").write_text(json.dumps(settings))
    restored: list[dict[str, Any]] = []
    original = Trainer.restore

    def restore(trainer: Trainer, resume: Any) -> list[str]:
        notes = original(trainer, resume)
        values = {name: row.give() for name, row in trainer.stored().items()}
        restored.append(deepcopy(loop.state.payload(values, trainer.step, trainer.run)))
        return notes

    monkeypatch.setattr(Trainer, "restore", restore)
    assert train.main(["--resume", "logs/run", "--max-steps", "12"]) == 0
    expected = tensors_and_numbers(checkpoint.load(OLD))
    (payload,) = restored
    got = tensors_and_numbers(payload)
    free = ("protoclip/config", "protoclip/training/seconds", "protoclip/training/data")
    for name, value in expected.items():
        if not name.startswith(free) and not name.endswith("/lr"):  # set before each step
            if isinstance(value, Tensor):
                assert torch.equal(got[name], value), name
            else:
                assert got[name] == value, name
    assert sum(isinstance(value, Tensor) for value in expected.values()) > 40
    assert [line["step"] for line in metrics(folder)] == [11, 12]
