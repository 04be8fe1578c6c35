"""The model beside OpenCLIP's own: its state, its heads, captions without their padding."""

import copy
import json
import pickle

import open_clip
import pytest
import torch

from protoclip import checkpoint
from protoclip.config import ModelConfig
from protoclip.model import (
    ShortTokenizer,
    build_model,
    can_shorten,
    choose_precision,
    match_layout,
    put_channels_last,
    register_configs,
)

SHORT = ["a cat", "", "red square on a blue one", "né"]
LONG = " ".join(["far too many words"] * 12)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelConfig(model="protoclip-tiny"))


def gradients(model, encode, tokens):
    model.zero_grad()
    (encode(tokens) * torch.linspace(-1, 1, 128, dtype=torch.float64)).sum().backward()
    return {n: p.grad.clone() for n, p in model.clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("texts", [SHORT, [LONG], [*SHORT, LONG], ["x"], SHORT * 9 + [LONG]])
def test_features_and_gradients_are_open_clips(model, texts):
    model = copy.deepcopy(model).double()
    whole, short = model.tokenizer(texts), model.short_tokenizer(texts)
    assert short.shape[1] <= whole.shape[1] and bool((whole[:, : short.shape[1]] == short).all())
    want = model.clip.encode_text(whole)
    for tokens in (whole, short):
        torch.testing.assert_close(model.encode_text(tokens), want, atol=1e-11, rtol=0)
    want = gradients(model, model.clip.encode_text, whole)
    got = gradients(model, model.encode_text, short)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-10, rtol=1e-10)


def test_a_tower_that_looks_ahead_keeps_its_padding():
    config = open_clip.get_model_config(register_configs("protoclip-tiny"))
    config["text_cfg"]["no_causal_mask"] = True
    assert not can_shorten(open_clip.CLIP(**config))


def test_tokenizers_pickle_and_know_the_end(model):
    tokenizer = pickle.loads(pickle.dumps(model.short_tokenizer))
    assert torch.equal(tokenizer(SHORT), model.short_tokenizer(SHORT))
    tokenizer = ShortTokenizer(lambda texts: torch.tensor([[5, 9, 2, 9, 0, 0, 0, 0, 0, 0]]), 2)
    assert tokenizer(["x"]).shape == (1, 8)


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


CONVOLUTIONS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def test_channels_last_changes_the_layout_and_no_number(tmp_path, model):
    path = tmp_path / "convolutions.json"
    path.write_text(json.dumps(CONVOLUTIONS))
    torch.manual_seed(0)
    plain = build_model(ModelConfig(model=str(path))).double().eval()
    own = copy.deepcopy(plain)
    put_channels_last(own, torch.device("cuda"))  # measured on CPUs only
    assert own.clip.visual.conv2.weight.is_contiguous()
    put_channels_last(own, torch.device("cpu"))
    assert not own.clip.visual.conv2.weight.is_contiguous()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    want, got = (one.clip.encode_image(image) for one in (plain, own))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)

    # A checkpoint of the one continues the other, moments included.
    adam = {}
    for name, one in (("plain", plain), ("own", own)):
        adam[name] = torch.optim.AdamW(one.clip.visual.parameters(), 1e-3, fused=True)
        one.clip.encode_image(image).square().sum().backward()
        adam[name].step()
    adam["own"].load_state_dict(copy.deepcopy(adam["plain"].state_dict()))
    match_layout(adam["own"])
    own.load_state_dict(plain.state_dict())
    for optimizer in adam.values():
        optimizer.step()
    for a, b in zip(plain.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-9, rtol=1e-7)

    vit = copy.deepcopy(model)
    put_channels_last(vit, torch.device("cpu"))
    assert vit.clip.visual.conv1.weight.is_contiguous()


def test_a_round_trip_through_a_checkpoint_that_open_clip_reads(tmp_path):
    model, other = build_model(ModelConfig()), build_model(ModelConfig())
    for a, b in zip(model.image_head.parameters(), model.text_head.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b  # the heads start equal
    payload = {"state_dict": model.clip.state_dict(), "protoclip": model.extra_state()}
    checkpoint.save(tmp_path / "x.pt", payload)
    other.load_state(checkpoint.load(tmp_path / "x.pt"))
    states = model.state_dict().values(), other.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    clip = open_clip.create_model(ModelConfig().model, pretrained=str(tmp_path / "x.pt"))
    assert torch.equal(clip.logit_scale, model.clip.logit_scale)
    clip.load_state_dict(model.clip.state_dict(), strict=True)


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(ValueError, match="ViT-B-32"):
        build_model(ModelConfig(model="ViT-B32"))
