"""The model beside OpenCLIP's own: its state, its heads, captions without their padding."""

from __future__ import annotations

import copy
import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor

from protoclip.model import (
    ProtoModel,
    ShortTokenizer,
    build_model,
    can_shorten,
    choose_device,
    choose_precision,
    match_layout,
    put_channels_last,
    register_configs,
)
from protoclip.runs import checkpoint
from protoclip.settings.config import ModelConfig

SHORT = ["a cat", "", "red square on a blue one", "né"]
LONG = " ".join(["far too many words"] * 12)


@pytest.fixture(scope="module")
def model() -> ProtoModel:
    torch.manual_seed(0)
    return build_model(ModelConfig(model="protoclip-tiny"))


def test_without_a_network_the_hub_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """huggingface_hub alone tries each file six times, with pauses."""
    from huggingface_hub import constants

    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        host, port = nobody_listens.getsockname()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{host}:{port}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda _: pytest.fail("a pause before another attempt"))
        with pytest.raises(ValueError, match=f"{port} cannot be reached .*; give a weights file"):
            build_model(ModelConfig(model="RN50", pretrained="openai"))
        assert not constants.HF_HUB_OFFLINE


def gradients(
    model: ProtoModel, encode: Callable[[Tensor], Tensor], tokens: Tensor
) -> dict[str, Tensor]:
    """By parameter, of a weighted sum of the features."""
    model.zero_grad()
    (encode(tokens) * torch.linspace(-1, 1, 128, dtype=torch.float64)).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.clip.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("texts", [SHORT, [LONG], [*SHORT, LONG], ["x"], SHORT * 9 + [LONG]])
def test_text_features_and_gradients_are_open_clips(model: ProtoModel, texts: list[str]) -> None:
    model = copy.deepcopy(model).double()
    padded = model.tokenizer(texts)
    short = model.short_tokenizer(texts)
    length = short.shape[1]
    assert length <= padded.shape[1] and torch.equal(padded[:, :length], short)
    expected = model.clip.encode_text(padded)
    for tokens in (padded, short):
        torch.testing.assert_close(model.encode_text(tokens), expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(
        gradients(model, model.encode_text, short),
        gradients(model, model.clip.encode_text, padded),
        atol=1e-10,
        rtol=1e-10,
    )


def test_a_tower_that_looks_ahead_keeps_its_padding() -> None:
    config = open_clip.get_model_config(register_configs("protoclip-tiny"))
    config["text_cfg"]["no_causal_mask"] = True
    assert not can_shorten(open_clip.CLIP(**config))


def test_tokenizers_pickle(model: ProtoModel) -> None:
    tokenizer = pickle.loads(pickle.dumps(model.short_tokenizer))
    assert torch.equal(tokenizer(SHORT), model.short_tokenizer(SHORT))


def test_tokenizers_cut_after_the_end_token() -> None:
    tokens = torch.tensor([[5, 9, 2, 9, 0, 0, 0, 0, 0, 0]])
    tokenizer = ShortTokenizer(lambda texts: tokens, end_id=2)
    assert tokenizer(["x"]).shape == (1, 8)  # in steps of eight


def test_captions_that_come_again_are_not_split_again(monkeypatch):
    monkeypatch.setattr("protoclip.model.MOST_REMEMBERED", 3)
    calls = []

    def split(texts):
        calls.append(list(texts))
        return torch.tensor([[len(text), 9, 0, 0, 0, 0, 0, 0] for text in texts])

    tokenizer = ShortTokenizer(split, 9)
    assert tokenizer(["a", "bb", "a"])[:, 0].tolist() == [1, 2, 1]
    assert tokenizer(["bb", "ccc"])[:, 0].tolist() == [2, 3]
    assert tokenizer(["dddd", "a"])[:, 0].tolist() == [4, 1]  # a fourth caption: all are forgotten
    assert calls == [["a", "bb"], ["ccc"], ["dddd", "a"]]


def test_a_tokenizer_that_drops_words_at_random_is_called_each_time():
    class Dropping:
        reduction_fn = staticmethod(lambda: None)
        calls = 0

        def __call__(self, texts):
            self.calls += 1
            return torch.tensor([[self.calls, 9, 0, 0, 0, 0, 0, 0]] * len(texts))

    tokenizer = ShortTokenizer(Dropping(), 9)
    assert [int(tokenizer(["a"])[0, 0]) for _ in range(3)] == [1, 2, 3]


def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch):
    cpu = torch.device("cpu")
    for unit in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, unit, lambda: False, raising=False)
    assert choose_precision("auto", cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert choose_precision("auto", cpu) == "amp_bf16"
    assert choose_precision("fp32", cpu) == "fp32"


def test_auto_is_not_bf16_on_a_gpu_that_emulates_it(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.update(how))
    assert choose_precision("auto", torch.device("cuda")) == "fp32"
    assert asked == {"including_emulation": False}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.device]]:
    """A machine with GPUs, seen by a process; returns those that become torch's current one."""

    def machine(count: int, **environment: str) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return current

    return machine


RANK_3 = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "3"}


def test_each_process_of_a_machine_takes_its_own_gpu(gpus):
    current = gpus(4, **RANK_3)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:3")
    assert current == [torch.device("cuda:3")] * 2
    current = gpus(1, **RANK_3, CUDA_VISIBLE_DEVICES="0")  # srun --gpus-per-task=1
    assert choose_device("auto") == torch.device("cuda:0")
    gpus(2, **RANK_3)
    with pytest.raises(ValueError, match=r"2 CUDA devices.*cuda:3; start no more processes"):
        choose_device("auto")
    gpus(0, **RANK_3)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"0 CUDA devices.*got cuda; use --device auto"):
        choose_device("cuda")


def test_the_gpu_of_a_flag_becomes_the_current_one(gpus):
    """Events, names of cards and Triton's launches ask the current one."""
    current = gpus(2)
    assert choose_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu") and len(current) == 1
    with pytest.raises(ValueError, match="expected cpu or one of the 2 CUDA devices"):
        choose_device("cuda:2")


CONVOLUTIONS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture
def convolutions(tmp_path: Path) -> ProtoModel:
    path = tmp_path / "convolutions.json"
    path.write_text(json.dumps(CONVOLUTIONS))
    torch.manual_seed(0)
    return build_model(ModelConfig(model=str(path))).double().eval()


def channels_last(model: ProtoModel) -> ProtoModel:
    """A copy."""
    other = copy.deepcopy(model)
    put_channels_last(other, torch.device("cpu"))
    return other


def random_images() -> Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # the layout is chosen, nothing is moved
def test_channels_last_is_for_convolutions_and_changes_no_number(
    device: str, convolutions: ProtoModel, model: ProtoModel
) -> None:
    image = random_images()
    expected = convolutions.clip.encode_image(image)
    assert convolutions.clip.visual.conv2.weight.is_contiguous()
    put_channels_last(convolutions, torch.device(device))
    assert not convolutions.clip.visual.conv2.weight.is_contiguous()
    got = convolutions.clip.encode_image(image)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    assert channels_last(model).clip.visual.conv1.weight.is_contiguous()  # a ViT's


def test_a_checkpoint_continues_in_the_other_layout(convolutions: ProtoModel) -> None:
    """Moments included."""
    image = random_images()

    def optimizer_after_a_step(model: ProtoModel) -> torch.optim.AdamW:
        optimizer = torch.optim.AdamW(model.clip.visual.parameters(), 1e-3, fused=True)
        model.clip.encode_image(image).square().sum().backward()
        optimizer.step()
        return optimizer

    other = channels_last(convolutions)
    optimizer = optimizer_after_a_step(convolutions)
    other_optimizer = optimizer_after_a_step(other)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    match_layout(other_optimizer)
    other.load_state_dict(convolutions.state_dict())
    optimizer.step()
    other_optimizer.step()
    got = dict(other.named_parameters())
    expected = dict(convolutions.named_parameters())
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


def test_multipliers_stay_between_1_and_100(model: ProtoModel) -> None:
    scales = {"contrastive": model.clip.logit_scale, "prototypes": model.proto_log_scale}
    before = {name: scale.detach().clone() for name, scale in scales.items()}
    for log_scale, expected in ((-1.0, 1.0), (9.0, 100.0)):
        for scale in scales.values():
            scale.data.fill_(log_scale)
        model.clamp_scales()
        got = {name: scale.exp().item() for name, scale in scales.items()}
        assert got == pytest.approx(dict.fromkeys(scales, expected))
    for name, scale in scales.items():
        scale.data.copy_(before[name])


def test_the_heads_start_equal() -> None:
    model = build_model(ModelConfig())
    for of_image, of_text in zip(
        model.image_head.parameters(), model.text_head.parameters(), strict=True
    ):
        assert torch.equal(of_image, of_text) and of_image is not of_text


def test_a_checkpoint_is_read_by_us_and_by_open_clip(tmp_path: Path) -> None:
    model = build_model(ModelConfig())
    path = tmp_path / "x.pt"
    payload = {"state_dict": model.clip.state_dict(), "protoclip": model.extra_state()}
    checkpoint.save(path, payload)
    loaded = build_model(ModelConfig())
    loaded.load_state(checkpoint.load(path))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    clip = open_clip.create_model(ModelConfig().model, pretrained=str(path))
    assert torch.equal(clip.logit_scale, model.clip.logit_scale)
    clip.load_state_dict(model.clip.state_dict(), strict=True)


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(ValueError, match="ViT-B-32"):
        build_model(ModelConfig(model="ViT-B32"))
