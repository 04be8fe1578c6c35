"""--dedup: pairs that share a caption are no negatives of one another, in both trainers."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from pairs import picture, write_table
from ranks import metrics

import protoclip
from protoclip import openclip as command
from protoclip.config import LossConfig
from protoclip.losses import ProtoLoss, caption_ids
from protoclip.model import Encoded, register_configs
from protoclip.step import repeated
from protoclip.train import main


def test_captions_are_told_apart_by_their_tokens():
    torch.manual_seed(0)
    tokens = torch.randint(49408, (500, 12))
    tokens[100:130], tokens[7] = tokens[:30], tokens[8]
    ids = caption_ids(tokens)
    same = (tokens[:, None] == tokens).all(dim=2)
    assert torch.equal(ids[:, None] == ids, same)
    assert repeated(ids) == (same.sum(dim=1) > 1).sum() == 59
    assert repeated(ids[:0]) == repeated(ids[:1]) == 0


def test_the_training_loss_takes_ids():
    x, y = torch.randn(20, 8), torch.randn(20, 8)
    ids, index, scale = torch.arange(20) % 6, torch.arange(20), torch.tensor(9.0)
    loss = ProtoLoss(LossConfig(dedup="caption"))
    got = loss(Encoded(x, y), None, index, scale, scale, None, ids).total
    unit = F.normalize(x, dim=1), F.normalize(y, dim=1)
    torch.testing.assert_close(got, protoclip.info_nce(*unit, scale, ids=ids))
    assert not torch.allclose(got, protoclip.info_nce(*unit, scale))
    bias, theirs = torch.tensor(-3.0), open_clip.loss.SigLipLoss()
    for same, want in (
        (None, theirs(*unit, scale, bias)),
        (ids, protoclip.SigLipLoss()(*unit, scale, bias, ids=ids)),
    ):
        got = loss(Encoded(x, y), None, index, scale, scale, None, same, bias).total
        torch.testing.assert_close(got, want)


def test_train_counts_shared_captions_where_it_leaves_them_out(tmp_path):
    """With a seed the first batch is the same. Captions are hashed only where --dedup wants it."""
    first_record, rows = {}, []
    for number in range(64):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append([f"{number}.png", f"a picture of kind {number % 48}"])
    table = write_table(tmp_path, rows)
    for choice in ("off", "caption", "id"):
        flags = ["--train-data", table, "--batch-size", "32", "--report-to", "none"]
        flags += ["--method", "clip", "--max-steps", "2", "--val-frequency", "0"]
        flags += ["--model", "protoclip-tiny"]
        where = ["--logs", str(tmp_path), "--name", choice, "--dedup", choice]
        assert main([*where, *flags]) == 0
        record = metrics(tmp_path / choice)[0]
        log = (tmp_path / choice / "out.log").read_text()
        if choice == "caption":
            shared = record["same_caption"]
            words = f"--dedup caption: in a batch of 32 pairs, {shared:g} share their caption"
            assert shared > 0 and words in log
        else:
            assert "same_caption" not in record and "share their caption" not in log
        first_record[choice] = record
    assert first_record["id"]["loss"] == pytest.approx(first_record["off"]["loss"], rel=1e-5)
    assert first_record["caption"]["loss"] < first_record["off"]["loss"] - 0.01


class CLIPTask(torch.nn.Module):
    """As OpenCLIP 4's: it holds model and loss, and calls both by name."""

    def __init__(self, model):
        super().__init__()
        self.trainable_module, self.loss = model, ClipLoss()

    def training_forward(self, batch):
        out = self.trainable_module(image=batch["image"], text=batch["text"])
        return self.loss(**out, output_dict=True), out


@pytest.mark.parametrize("factory", ["create_loss", "create_task"])
def test_open_clips_loops_show_the_tokens(factory, monkeypatch):
    """3.3 calls the model by position and the loss apart from it; 4 has tasks."""
    name = register_configs("protoclip-tiny")
    model = open_clip.create_model(name, output_dict=True)
    texts = open_clip.get_tokenizer(name)(["a cat", "two dogs", "a cat", "a bird"])
    args = dict(distill=False, model=name, siglip=False, local_loss=False, gather_with_grad=False)
    args |= dict(rank=0, world_size=1, horovod=False, loss_dist_impl=None, accum_freq=1)
    given, image = type("args", (), args), torch.randn(4, 3, 48, 48)
    monkeypatch.setattr(
        open_clip, "create_task", lambda args, model, **more: CLIPTask(model), raising=False
    )
    trainer = type("trainer", (), {factory: None})
    with command.patched(trainer, None, dedup=True):
        if factory == "create_loss":
            loss = trainer.create_loss(given)
            out = model(image, texts)
            terms = loss(**out, output_dict=True)
        else:
            task = trainer.create_task(given, model=model)
            terms, out = task.training_forward({"image": image, "text": texts})
            loss = task.loss
        with pytest.raises(ValueError, match="--dedup caption: expected a loop that gives"):
            loss(**out)
    features = out["image_features"], out["text_features"], out["logit_scale"]
    want = protoclip.info_nce(*features, ids=torch.tensor([0, 1, 0, 2]))
    torch.testing.assert_close(terms["contrastive_loss"], want)
    assert not torch.allclose(want, protoclip.info_nce(*features))


@pytest.mark.parametrize("flags", [["--accum-freq", "2"], ["--torchcompile"]])
def test_what_does_not_show_them_is_refused(capsys, flags):
    pytest.importorskip("open_clip_train.main")
    given = ["--model", "ViT-B-32", "--train-data", "x", "--dedup", "caption", *flags]
    assert command.main(given) == 2
    assert f"--dedup caption does not go with {flags[0]}" in capsys.readouterr().err
