"""The command's own part: flags, help, and the factories for those who patch by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch

import protoclip
from protoclip import losses
from protoclip import openclip as command
from protoclip.model import register_configs


def args(**changes):
    plain = dict(
        distill=False, model="ViT-B-32", siglip=False, local_loss=True, gather_with_grad=True,
        rank=0, world_size=1, horovod=False, loss_dist_impl=None, accum_freq=2, batch_size=8,
        resume=None, coca_caption_loss_weight=2.0, coca_contrastive_loss_weight=1.0,
    )  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def test_our_flags_are_popped_and_theirs_stay() -> None:
    proto, dedup, rest = command.split_flags(
        ["--model", "x", "--proto-k", "7", "--local-loss", "--proto-weight=0.5", "--no-proto-PBT"]
    )
    assert rest == ["--local-loss", "--model", "x"] and not dedup
    assert proto == protoclip.ProtoConfig(k=7, weight=0.5, pbt=False)
    assert command.split_flags(["--lr", "1e-3"]) == (None, False, ["--lr", "1e-3"])


def test_a_config_with_an_audio_tower_is_open_clip_4s(tmp_path: Path) -> None:
    path = tmp_path / "clap.json"
    path.write_text(json.dumps({"embed_dim": 16, "audio_cfg": {}, "text_cfg": {}}))
    words = ["--model", str(path)]
    if hasattr(open_clip, "create_task"):
        assert command.split_flags(words)[2] == ["--model", "clap"]
    else:
        with pytest.raises(ValueError, match="clap.json lacks vision_cfg"):
            command.split_flags(words)
    assert register_configs(str(path), audio=True) == "clap"
    with pytest.raises(ValueError, match="clap.json lacks vision_cfg"):  # no trainer of ours
        register_configs(str(path))


def test_create_loss_gives_ours(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plain = protoclip.create_loss(args())
    assert type(plain) is protoclip.ClipLoss and plain.local_loss and plain.gather_with_grad
    assert type(protoclip.create_loss(args(siglip=True))) is protoclip.SigLipLoss
    with_prototypes = protoclip.create_loss(args(), proto=protoclip.ProtoConfig(queue=64))
    assert type(with_prototypes) is protoclip.ProtoClipLoss
    assert "InfoNCE alone for 4 steps" in caplog.text  # 64 pairs, 2 x 8 a step
    caplog.clear()
    assert type(protoclip.create_loss(args(distill=True))) is losses.DistillClipLoss
    assert type(protoclip.create_loss(args(model="coca_ViT-B-32"))) is losses.CoCaLoss
    with pytest.raises(ValueError, match="--proto"):
        protoclip.create_loss(args(distill=True), proto=protoclip.ProtoConfig())


class GenLipLoss(torch.nn.Module):
    """Stands for a loss of OpenCLIP's that compares no pairs."""


@pytest.mark.parametrize("kept", ["GenLipLoss", "ClipLoss"])
def test_losses_without_a_replacement_and_horovod_keep_openclips(
    kept: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    if kept == "GenLipLoss":
        monkeypatch.setattr(open_clip, "create_loss", lambda args: GenLipLoss())
    horovod = args(horovod=kept == "ClipLoss")
    loss = protoclip.create_loss(horovod)
    assert type(loss) is (GenLipLoss if kept == "GenLipLoss" else open_clip.loss.ClipLoss)
    assert f"OpenCLIP's own {kept} is used: protoclip has no replacement" in caplog.text
    with pytest.raises(ValueError, match="expected the plain contrastive loss"):
        protoclip.create_loss(horovod, proto=protoclip.ProtoConfig())


def test_create_task() -> None:
    if not hasattr(open_clip, "create_task"):
        with pytest.raises(ValueError, match=r"use protoclip\.create_loss"):
            protoclip.create_task(args(), torch.nn.Linear(2, 2))
        return
    model = torch.nn.Linear(2, 2)
    assert type(protoclip.create_task(args(), model).loss) is protoclip.ClipLoss
    assert type(protoclip.create_task(args(siglip=True), model).loss) is protoclip.SigLipLoss
    task = protoclip.create_task(args(), model, proto=protoclip.ProtoConfig(queue=64))
    assert type(task.loss) is protoclip.ProtoClipLoss
    assert type(protoclip.create_task(args(model="coca"), model).loss) is losses.CoCaLoss


@pytest.mark.parametrize(
    ("saved", "steps", "warned"),
    [
        ({"optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": []}}, 5, False),
        ({"optimizer": {"state": {0: {}}, "param_groups": [{"step": 7}]}}, 7, False),  # timm's LAMB
        ({"optimizer": {"state": {}, "param_groups": [{}]}, "global_step": 9}, 9, False),
        ({"optimizer": {"state": {0: {}}, "param_groups": [{"lr": 1.0}]}}, 0, True),  # SGD
        ({"state_dict": {}}, 0, True),
    ],
    ids=["AdamW", "LAMB", "counted", "SGD", "weights only"],
)
def test_the_warmup_goes_on_after_the_steps_that_a_checkpoint_has(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    saved: dict[str, Any],
    steps: int,
    warned: bool,
) -> None:
    torch.save(saved, tmp_path / "c.pt")
    assert command._steps_done(str(tmp_path / "c.pt")) == steps
    assert ("--proto-warmup begins again" in caplog.text) == warned
