"""Captions without their padding give OpenCLIP's own features and gradients."""

import copy
import pickle

import open_clip
import pytest
import torch

from protoclip.config import ModelConfig
from protoclip.model import ShortTokenizer, _split, build_model, can_shorten

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


def test_padding_is_not_computed(model):
    seen = []
    hook = model.clip.transformer.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape[:2]))
    )
    try:
        model.encode_text(model.short_tokenizer(SHORT))
        model.encode_text(model.short_tokenizer([*SHORT * 9, LONG]))
    finally:
        hook.remove()
    assert seen == [(4, 8), (36, 8), (1, 24)]


def test_autocast(model):
    tokens = model.tokenizer(SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model.encode_text(tokens), model.clip.encode_text(tokens), atol=0.06, rtol=0.02
        )


def test_a_tower_that_looks_ahead_keeps_its_padding():
    config = {**open_clip.get_model_config("ViT-B-32")}
    config["vision_cfg"] = {**config["vision_cfg"], "layers": 1, "width": 64}
    config["text_cfg"] = {**config["text_cfg"], "layers": 1, "width": 64, "no_causal_mask": True}
    clip = open_clip.CLIP(
        embed_dim=32, vision_cfg=config["vision_cfg"], text_cfg=config["text_cfg"]
    )
    assert not can_shorten(clip)


def test_pools_at_a_token_of_its_own():
    tokenizer = ShortTokenizer(lambda texts: torch.tensor([[5, 9, 2, 9, 0, 0, 0, 0, 0, 0]]), 2)
    assert tokenizer(["x"]).shape == (1, 8)


def test_tokenizer_pickles_and_takes_nothing(model):
    tokenizer = pickle.loads(pickle.dumps(model.short_tokenizer))
    assert torch.equal(tokenizer(SHORT), model.short_tokenizer(SHORT))


@pytest.mark.parametrize(
    "lengths, few",
    [([8], 0), ([8] * 5, 0), ([8] * 9 + [24], 9), ([8, 24, 24], 1), ([16] * 20 + [24], 20)],
)
def test_split(lengths, few):
    assert _split(torch.tensor(lengths)) == few
