"""--dedup: pairs that share a caption are no negatives of one another, in both trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from pairs import picture, write_table
from ranks import metrics
from torch import Tensor, nn

import protoclip
from protoclip import openclip as command
from protoclip.losses.objective import ProtoLoss, caption_ids, repeated
from protoclip.model import Encoded, register_configs
from protoclip.settings.config import LossConfig
from protoclip.train import main


def test_captions_are_told_apart_by_their_tokens() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(49408, (500, 12))
    tokens[100:130] = tokens[:30]
    tokens[7] = tokens[8]
    ids = caption_ids(tokens)
    same = (tokens[:, None] == tokens).all(dim=2)
    assert torch.equal(ids[:, None] == ids, same)


def test_repeated_captions_are_counted() -> None:
    ids = torch.tensor([5, 3, 5, 8, 3, 5])
    assert repeated(ids) == 5
    assert repeated(ids[:0]) == repeated(ids[:1]) == 0


class Batch:
    """Twenty pairs, of which some share an id, as ``ProtoLoss`` takes them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoded = Encoded(torch.randn(20, 8), torch.randn(20, 8))
        self.image = F.normalize(self.encoded.image, dim=1)
        self.text = F.normalize(self.encoded.text, dim=1)
        self.ids = torch.arange(20) % 6
        self.logit_scale = torch.tensor(9.0)

    def loss(self, ids: Tensor | None, logit_bias: Tensor | None = None) -> Tensor:
        loss = ProtoLoss(LossConfig(dedup="caption"))
        scale = self.logit_scale
        index = torch.arange(20)
        return loss(self.encoded, None, index, scale, scale, None, ids, logit_bias).total


def test_the_training_loss_takes_ids() -> None:
    batch = Batch()
    loss = batch.loss(batch.ids)
    expected = protoclip.info_nce(batch.image, batch.text, batch.logit_scale, ids=batch.ids)
    torch.testing.assert_close(loss, expected)
    without_ids = protoclip.info_nce(batch.image, batch.text, batch.logit_scale)
    assert not torch.allclose(loss, without_ids)


def test_the_training_loss_of_siglip_takes_ids() -> None:
    batch = Batch()
    arguments = {
        "image_features": batch.image,
        "text_features": batch.text,
        "logit_scale": batch.logit_scale,
        "logit_bias": torch.tensor(-3.0),
    }
    bias = arguments["logit_bias"]
    without_ids = open_clip.loss.SigLipLoss()(**arguments)
    torch.testing.assert_close(batch.loss(None, bias), without_ids)
    with_ids = protoclip.SigLipLoss()(**arguments, ids=batch.ids)
    torch.testing.assert_close(batch.loss(batch.ids, bias), with_ids)


def test_train_counts_shared_captions_where_it_leaves_them_out(
    tmp_path: Path, nano: Path, no_evaluation: None
) -> None:
    """With a seed the first batch is the same. Captions are hashed only where --dedup wants it."""
    rows = []
    for number in range(64):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append([f"{number}.png", f"a picture of kind {number % 48}"])
    table = write_table(tmp_path, rows)
    first_record = {}
    log = {}
    for dedup in ("off", "caption", "id"):
        assert main([
            "--train-data", table, "--batch-size", "32", "--report-to", "none",
            "--method", "clip", "--max-steps", "2", "--val-frequency", "0",
            "--model", str(nano), "--dedup", dedup,
            "--logs", str(tmp_path), "--name", dedup,
        ]) == 0  # fmt: skip
        first_record[dedup] = metrics(tmp_path / dedup)[0]
        log[dedup] = (tmp_path / dedup / "out.log").read_text()
    shared = first_record["caption"]["same_caption"]
    assert shared > 0
    words = f"--dedup caption: in a batch of 32 pairs, {shared:g} share their caption"
    assert words in log["caption"]
    for dedup in ("off", "id"):
        assert "same_caption" not in first_record[dedup]
        assert "share their caption" not in log[dedup]
    loss = {dedup: record["loss"] for dedup, record in first_record.items()}
    assert loss["id"] == pytest.approx(loss["off"], rel=1e-5)
    assert loss["caption"] < loss["off"] - 0.001


class CLIPTask(nn.Module):
    """As OpenCLIP 4's: it holds model and loss, and calls both by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trainable_module = model
        self.loss = ClipLoss()

    def training_forward(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        features = self.trainable_module(image=batch["image"], text=batch["text"])
        return self.loss(**features, output_dict=True), features


MODEL = "protoclip-tiny"
LOSS_ARGUMENTS = SimpleNamespace(
    distill=False,
    siglip=False,
    local_loss=False,
    gather_with_grad=False,
    rank=0,
    world_size=1,
    horovod=False,
    loss_dist_impl=None,
    accum_freq=1,
)


@pytest.mark.parametrize("factory", ["create_loss", "create_task"])
def test_open_clips_loops_show_the_tokens(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.3 calls the model by position and the loss apart from it; 4 has tasks."""
    name = register_configs(MODEL)
    model = open_clip.create_model(name, output_dict=True)
    tokens = open_clip.get_tokenizer(name)(["a cat", "two dogs", "a cat", "a bird"])
    image = torch.randn(4, 3, 48, 48)
    monkeypatch.setattr(
        open_clip, "create_task", lambda args, model, **more: CLIPTask(model), raising=False
    )
    arguments = SimpleNamespace(**vars(LOSS_ARGUMENTS), model=name)
    trainer = type("trainer", (), {factory: None})
    with command.patched(trainer, None, dedup=True):
        if factory == "create_loss":
            loss = trainer.create_loss(arguments)
            features = model(image, tokens)
            terms = loss(**features, output_dict=True)
        else:
            task = trainer.create_task(arguments, model=model)
            terms, features = task.training_forward({"image": image, "text": tokens})
            loss = task.loss
        with pytest.raises(ValueError, match="--dedup caption: expected a loop that gives"):
            loss(**features)

    def info_nce(ids: Tensor | None) -> Tensor:
        return protoclip.info_nce(
            features["image_features"],
            features["text_features"],
            features["logit_scale"],
            ids=ids,
        )

    expected = info_nce(ids=torch.tensor([0, 1, 0, 2]))
    torch.testing.assert_close(terms["contrastive_loss"], expected)
    assert not torch.allclose(expected, info_nce(ids=None))


@pytest.mark.parametrize("flags", [["--accum-freq", "2"], ["--torchcompile"]])
def test_loops_that_do_not_show_the_tokens_are_refused(
    error_of: Callable[..., str], flags: list[str]
) -> None:
    pytest.importorskip("open_clip_train.main")
    data = ["--model", "ViT-B-32", "--train-data", "x"]
    error = error_of(command.main, [*data, "--dedup", "caption", *flags])
    assert f"--dedup caption cannot be combined with {flags[0]}" in error
