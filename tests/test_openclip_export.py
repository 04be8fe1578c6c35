"""Checkpoints both ways: ours in OpenCLIP, OpenCLIP's in ours, and the exported folder."""

import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from ranks import metrics

from protoclip import checkpoint, export
from protoclip.config import ModelConfig, TrainConfig, to_dict
from protoclip.evaluate.__main__ import load_model
from protoclip.evaluate.tasks import eval_transform
from protoclip.model import build_model, register_configs
from protoclip.train import main as train


def features(model, tokenizer):
    model.eval()
    torch.manual_seed(0)
    image = torch.randn(3, 3, *model.visual.image_size)
    with torch.no_grad():
        return model.encode_image(image), model.encode_text(tokenizer(["a", "red square", "né"]))


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def ours_of(run, config):
    """The model as protoclip itself loads it."""
    model = build_model(config)
    model.load_state(checkpoint.load(checkpoint.candidates(run)[0]))
    return features(model.clip, model.tokenizer)


def test_the_exported_folder_gives_the_same_bits(trained, nano, tmp_path, capsys):
    out = tmp_path / "exported"
    assert export.main([str(trained), "--out", str(out)]) == 0
    assert f"local-dir:{out}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "open_clip_config.json", "open_clip_model.safetensors"
    ]  # fmt: skip
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    got = features(model, open_clip.get_tokenizer(f"local-dir:{out}"))
    assert same(got, ours_of(trained, ModelConfig(model=str(nano), projection_hidden_dim=512)))
    assert "Resize(size=16" in str(preprocess)
    held = ModelCard.load(out / "README.md").data  # as HfApi().upload_folder takes it
    assert held.library_name == "open_clip" and held.model_name == "r"
    assert {"text_retrieval_recall@5", "group/acc1"} <= {
        one.metric_type for one in held.eval_results
    }
    card = (out / "README.md").read_text()
    for words in ("builtin:shapes:64", "| steps | 5 |", "image -> text R@1", "local-dir"):
        assert words in card
    assert export.main([str(trained), "--out", str(out)]) == 2
    assert "in use" in capsys.readouterr().err


def test_the_bias_of_siglip_is_trained_evaluated_and_exported(nano, tmp_path):
    """From OpenCLIP's first values on."""
    flags = ["--train-data", "builtin:shapes:64", "--batch-size", "16", "--max-steps", "2"]
    flags += ["--siglip", "--method", "clip", "--report-to", "none", "--model", str(nano)]
    assert train([*flags, "--logs", str(tmp_path), "--name", "s", "--lr", "0.01"]) == 0
    run = tmp_path / "s"
    first = metrics(run)[0]
    assert first["logit_bias"] == pytest.approx(-10, abs=0.02)
    assert first["logit_scale"] == pytest.approx(10, rel=0.02)
    export.export(run, tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    bias = checkpoint.load_newest(run)[1]["state_dict"]["logit_bias"]
    assert torch.equal(model.logit_bias, bias) and bias != -10
    ours = load_model(str(run)).model
    assert same(features(ours.clip, ours.tokenizer), features(model, ours.tokenizer))


def test_our_checkpoint_loads_in_open_clip(trained, nano):
    register_configs(str(nano))
    path = str(trained / "checkpoints" / checkpoint.LATEST)
    model, _, _ = open_clip.create_model_and_transforms("nano", pretrained=path)
    got = features(model, open_clip.get_tokenizer("nano"))
    assert same(got, ours_of(trained, ModelConfig(model=str(nano))))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_open_clips_checkpoint_loads_in_ours(nano, tmp_path, capsys, prefix, wrapped):
    """As open_clip_train writes it, under DDP too, and a bare state dict."""
    register_configs(str(nano))
    torch.manual_seed(7)
    theirs = open_clip.create_model("nano")
    weights = {prefix + key: value for key, value in theirs.state_dict().items()}
    path = tmp_path / "epoch_2.pt"
    torch.save({"epoch": 2, "name": "x", "state_dict": weights} if wrapped else weights, path)
    want = features(theirs, open_clip.get_tokenizer("nano"))

    ours = build_model(ModelConfig(model=str(nano), pretrained=str(path)))
    assert same(features(ours.clip, ours.tokenizer), want)

    out = tmp_path / "out"
    assert export.main([str(path), "--out", str(out), "--model", str(nano)]) == 0
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert same(features(model, open_clip.get_tokenizer(f"local-dir:{out}")), want)
    assert export.main([str(path), "--out", str(tmp_path / "no")]) == 2
    assert "--model" in capsys.readouterr().err


def test_a_checkpoint_keeps_how_pictures_are_prepared(nano, tmp_path):
    """What a --pretrained tag brought along is not in the model's config."""
    first = build_model(ModelConfig(model=str(nano)))
    first.mean, first.std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    first.clip.visual.preprocess_cfg |= {
        "mean": first.mean, "std": first.std, "resize_mode": "squash"
    }  # fmt: skip
    config = TrainConfig(model=ModelConfig(model=str(nano)))
    payload = {
        "epoch": 1,
        "state_dict": first.clip.state_dict(),
        "optimizer": {},
        "protoclip": {**first.extra_state(), "config": to_dict(config), "step": 1},
    }
    path = tmp_path / "epoch_1.pt"
    torch.save(payload, path)
    again = load_model(str(path)).model
    assert again.preprocess() == first.preprocess() != build_model(config.model).preprocess()
    picture = Image.new("RGB", (20, 40), (10, 200, 30))
    ours = eval_transform(again)(picture)
    assert torch.equal(ours, eval_transform(first)(picture))
    export.export(path, tmp_path / "out")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    torch.testing.assert_close(theirs(picture), ours)


def test_export_refuses_what_does_not_fit(trained, tmp_path, nano, capsys):
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    for flags, words in (
        ([str(path), "--model", str(nano)], "does not fit"),
        ([str(path), "--model", "no-such"], "no-such"),
        ([str(trained), "--model", "ViT-B-32"], "leave the flag out"),
        ([str(tmp_path / "nothing")], "found nothing"),
    ):
        assert export.main([*flags, "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
