"""Checkpoints both ways: ours in OpenCLIP, OpenCLIP's in ours, and the exported folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from ranks import bare_run, metrics, without_page
from torch import Tensor

from protoclip import export
from protoclip.evaluate.__main__ import load_model
from protoclip.evaluate.tasks import eval_transform
from protoclip.model import build_model, register_configs
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig, TrainConfig, to_dict
from protoclip.train import main as train


class Features(NamedTuple):
    """Of three random pictures and three texts."""

    image: Tensor
    text: Tensor


def features(model: Any, tokenizer: Any) -> Features:
    model.eval()
    torch.manual_seed(0)
    image = torch.randn(3, 3, *model.visual.image_size)
    tokens = tokenizer(["a", "red square", "né"])
    with torch.no_grad():
        return Features(model.encode_image(image), model.encode_text(tokens))


def assert_same(got: Features, expected: Features) -> None:
    assert torch.equal(got.image, expected.image)
    assert torch.equal(got.text, expected.text)


def loaded_by_us(run: Path, config: ModelConfig) -> Features:
    model = build_model(config)
    model.load_state(checkpoint.load(checkpoint.candidates(run)[0]))
    return features(model.clip, model.tokenizer)


def loaded_by_open_clip(folder: Path) -> Features:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return features(model, open_clip.get_tokenizer(f"local-dir:{folder}"))


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "exported"
    assert export.main([str(trained), "--out", str(out)]) == 0
    return out


@pytest.mark.smoke
def test_the_exported_folder_gives_the_same_bits(trained: Path, nano: Path, exported: Path) -> None:
    config = ModelConfig(model=str(nano), projection_hidden_dim=512)
    assert_same(loaded_by_open_clip(exported), loaded_by_us(trained, config))


def test_the_exported_folder_holds_what_open_clip_reads(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "open_clip_config.json", "open_clip_model.safetensors"
    ]  # fmt: skip
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    assert "Resize(size=16" in str(preprocess)


def test_a_context_of_another_length_is_exported(workdir: Path) -> None:
    flags = bare_run(workdir, "--force-context-length", "9", "--max-steps", "1")
    assert train(flags) == 0 and export.main(["logs/run", "--out", "exported"]) == 0
    assert open_clip.get_tokenizer("local-dir:exported")(["a"]).shape == (1, 9)


def test_the_model_card_has_the_results(exported: Path) -> None:
    """As HfApi().upload_folder takes it."""
    data = ModelCard.load(exported / "README.md").data
    assert data.library_name == "open_clip" and data.model_name == "r"
    metric_types = {result.metric_type for result in data.eval_results}
    assert {"text_retrieval_recall@5", "group/acc1"} <= metric_types
    text = (exported / "README.md").read_text()
    for words in ("builtin:shapes:64", "| steps | 5 |", "image -> text R@1", "local-dir"):
        assert words in text


def test_the_model_card_has_no_results_of_another_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 4}))
    assert export.main([str(run), "--out", str(tmp_path / "exported")]) == 0
    card = ModelCard.load(tmp_path / "exported" / "README.md")
    assert "| steps | 5 |" in card.text and "Results" not in card.text
    assert card.data.eval_results is None


def test_the_command_says_how_to_load_it_and_overwrites_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], error_of: Callable[..., str]
) -> None:
    out = tmp_path / "exported"
    assert export.main([str(trained), "--out", str(out)]) == 0
    assert f"local-dir:{out}" in capsys.readouterr().out
    assert "in use" in error_of(export.main, [trained, "--out", out])


@pytest.fixture(scope="module")
def siglip_run(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, from OpenCLIP's first values on."""
    logs = tmp_path_factory.mktemp("logs")
    flags = [
        "--train-data", "builtin:shapes:64", "--batch-size", "16", "--max-steps", "2",
        "--siglip", "--method", "clip", "--report-to", "none", "--model", str(nano),
        "--logs", str(logs), "--name", "s", "--lr", "0.01",
    ]  # fmt: skip
    with without_page():
        assert train(flags) == 0
    return logs / "s"


def test_siglip_begins_with_open_clips_bias_and_scale(siglip_run: Path) -> None:
    first = metrics(siglip_run)[0]
    assert first["logit_bias"] == pytest.approx(-10, abs=0.02)
    assert first["logit_scale"] == pytest.approx(10, rel=0.02)


def test_the_bias_of_siglip_is_trained_evaluated_and_exported(
    siglip_run: Path, tmp_path: Path
) -> None:
    export.export(siglip_run, tmp_path / "out")
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    _, payload = checkpoint.load_newest(siglip_run)
    bias = payload["state_dict"]["logit_bias"]
    assert torch.equal(model.logit_bias, bias) and bias != -10
    ours = load_model(str(siglip_run)).model
    assert_same(features(model, ours.tokenizer), features(ours.clip, ours.tokenizer))


def test_our_checkpoint_loads_in_open_clip(trained: Path, nano: Path) -> None:
    register_configs(str(nano))
    path = str(trained / "checkpoints" / checkpoint.LATEST)
    model, _, _ = open_clip.create_model_and_transforms("nano", pretrained=path)
    got = features(model, open_clip.get_tokenizer("nano"))
    assert_same(got, loaded_by_us(trained, ModelConfig(model=str(nano))))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_open_clips_checkpoint_loads_in_ours(
    nano: Path, tmp_path: Path, error_of: Callable[..., str], prefix: str, wrapped: bool
) -> None:
    """As open_clip_train writes it, under DDP too, and a bare state dict."""
    register_configs(str(nano))
    torch.manual_seed(7)
    theirs = open_clip.create_model("nano")
    weights = {prefix + key: value for key, value in theirs.state_dict().items()}
    path = tmp_path / "epoch_2.pt"
    torch.save({"epoch": 2, "name": "x", "state_dict": weights} if wrapped else weights, path)
    expected = features(theirs, open_clip.get_tokenizer("nano"))

    ours = build_model(ModelConfig(model=str(nano), pretrained=str(path)))
    assert_same(features(ours.clip, ours.tokenizer), expected)

    out = tmp_path / "out"
    assert export.main([str(path), "--out", str(out), "--model", str(nano)]) == 0
    assert_same(loaded_by_open_clip(out), expected)
    assert "--model" in error_of(export.main, [path, "--out", tmp_path / "no"])


def test_a_checkpoint_keeps_how_pictures_are_prepared(nano: Path, tmp_path: Path) -> None:
    """What a --pretrained tag brought along is not in the model's config."""
    model = build_model(ModelConfig(model=str(nano)))
    model.mean = (0.5, 0.4, 0.3)
    model.std = (0.2, 0.2, 0.2)
    model.clip.visual.preprocess_cfg |= {
        "mean": model.mean, "std": model.std, "resize_mode": "squash"
    }  # fmt: skip
    config = TrainConfig(model=ModelConfig(model=str(nano)))
    path = tmp_path / "epoch_1.pt"
    torch.save(
        {
            "epoch": 1,
            "state_dict": model.clip.state_dict(),
            "optimizer": {},
            "protoclip": model.extra_state() | {"config": to_dict(config), "step": 1},
        },
        path,
    )
    loaded = load_model(str(path)).model
    assert loaded.preprocess() == model.preprocess() != build_model(config.model).preprocess()
    picture = Image.new("RGB", (20, 40), (10, 200, 30))
    pixels = eval_transform(loaded)(picture)
    assert torch.equal(pixels, eval_transform(model)(picture))
    export.export(path, tmp_path / "out")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    torch.testing.assert_close(theirs(picture), pixels)


def assert_not_exported(
    tmp_path: Path, error_of: Callable[..., str], flags: list[str], words: str
) -> None:
    assert words in error_of(export.main, [*flags, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model, words", [("nano", "does not fit"), ("no-such", "no-such")])
def test_weights_of_another_model_are_not_exported(
    tmp_path: Path, nano: Path, error_of: Callable[..., str], model: str, words: str
) -> None:
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    model = str(nano) if model == "nano" else model
    assert_not_exported(tmp_path, error_of, [str(path), "--model", model], words)


def test_a_run_knows_its_model(trained: Path, tmp_path: Path, error_of: Callable[..., str]) -> None:
    flags = [str(trained), "--model", "ViT-B-32"]
    assert_not_exported(tmp_path, error_of, flags, "leave the flag out")


def test_nothing_is_not_exported(tmp_path: Path, error_of: Callable[..., str]) -> None:
    assert_not_exported(tmp_path, error_of, [str(tmp_path / "nothing")], "found nothing")
