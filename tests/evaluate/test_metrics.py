"""Metrics against hand-computed cases, scikit-learn, OpenCLIP, CLIP_benchmark.

CLIP_benchmark's modules need torch, scikit-learn and tqdm only: pip install --no-deps
clip-benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from protoclip.data import Labels
from protoclip.evaluate import metrics
from protoclip.evaluate.datasets import class_prompts, read_templates
from protoclip.evaluate.tasks import Encoder, EvalSet, class_features, evaluate_features
from protoclip.model import build_model
from protoclip.settings.config import ModelConfig

linear_model = pytest.importorskip("sklearn.linear_model")
# To CLIP_benchmark's code "pictures" and "tokens" are features already, of any length.
FEATURES = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Blobs(NamedTuple):
    features: Tensor  # [N, D]
    labels: Tensor  # int64 [N]


def blobs(n: int = 400, d: int = 16, num_classes: int = 6, spread: float = 1.5) -> Blobs:
    draw = generator()
    centres = torch.randn(num_classes, d, generator=draw)
    labels = torch.randint(0, num_classes, (n,), generator=draw)
    features = centres[labels] + spread * torch.randn(n, d, generator=draw)
    return Blobs(features * torch.logspace(-3, 3, d), labels)  # standardising matters


def recalls(
    places: tuple[metrics.Places, metrics.Places], ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    return {name: float(hits.mean()) for name, hits in metrics.recalls(places, ks).items()}


@pytest.mark.smoke
def test_retrieval_by_hand() -> None:
    image = torch.eye(3)
    # Caption 0 and 1 belong to image 0; 2 belongs to image 1 but looks like 2; 3 belongs to 2.
    text = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]])
    of_images, of_captions = metrics.retrieval(image, text, torch.tensor([0, 0, 1, 2]))
    # Image 1: caption 0 stands before its own. Caption 0: image 1, then a tie of 0 and 2.
    assert of_images.rank.tolist() == [1, 2, 1]
    assert of_captions.rank.tolist() == [2.5, 1, 2, 1]
    assert recalls((of_images, of_captions), ks=(1, 2)) == pytest.approx({
        "text_retrieval_recall@1": 2 / 3, "text_retrieval_recall@2": 1,
        "image_retrieval_recall@1": 2 / 4, "image_retrieval_recall@2": 3.5 / 4,
    })  # fmt: skip


def test_retrieval_among_equal_features_is_chance() -> None:
    places = metrics.retrieval(torch.ones(100, 4), torch.ones(100, 4))
    of_images, _ = places
    assert list(recalls(places).values()) == pytest.approx([0.01, 0.05, 0.1] * 2)
    assert of_images.rank.tolist() == [50.5] * 100


@pytest.mark.parametrize("copies", [2, 12])
def test_ties_count_their_expected_hits(copies: int) -> None:
    perfect = torch.eye(10).repeat_interleave(copies, 0)
    expected = [min(1, k / copies) for k in (1, 5, 10)]
    assert list(recalls(metrics.retrieval(perfect, perfect)).values()) == pytest.approx(
        expected * 2
    )


@pytest.mark.parametrize("copies", [2, 12])
def test_pictures_that_share_a_caption_find_it_by_its_text(copies: int) -> None:
    ids = torch.arange(10).repeat_interleave(copies)
    perfect = torch.eye(10)[ids]
    scores = recalls(metrics.retrieval(perfect, perfect, caption_ids=ids))
    assert set(scores.values()) == {1}
    # Equal texts are known by their numbers, not by their features: here rounding tells them apart.
    rounded = perfect + 1e-6 * torch.randn(perfect.shape, generator=generator())
    assert recalls(metrics.retrieval(perfect, rounded, caption_ids=ids)) == scores
    # One of ``copies`` right answers among 10 * copies equal ones.
    blind = metrics.retrieval(torch.ones_like(perfect), torch.ones_like(perfect), caption_ids=ids)
    assert recalls(blind, (1,)) == pytest.approx(
        {"text_retrieval_recall@1": 0.1, "image_retrieval_recall@1": 0.1}
    )


def test_several_captions_of_a_picture_may_be_those_of_others() -> None:
    # Pictures 0 and 1 share text 0; picture 1 also has text 1, picture 2 text 2.
    image = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    text = torch.tensor([[0.6, 0.8, 0], [0.6, 0.8, 0], [0, 1.0, 0], [1.0, 0, 0]])
    owner = torch.tensor([0, 1, 1, 2])
    of_images, of_captions = metrics.retrieval(image, text, owner, torch.tensor([0, 0, 1, 2]))
    assert of_images.rank.tolist() == [2, 1, 2.5]  # picture 2: all four captions tie
    assert of_captions.rank.tolist() == [1, 1, 1, 3]


def test_retrieval_of_nothing_is_nan_and_of_one_pair_right() -> None:
    empty = recalls(metrics.retrieval(torch.zeros(0, 4), torch.zeros(0, 4)))
    assert all(math.isnan(value) for value in empty.values())
    one_pair = recalls(metrics.retrieval(torch.ones(1, 4), torch.ones(1, 4)))
    assert set(one_pair.values()) == {1}


def test_an_image_without_a_caption_is_not_found() -> None:
    of_images, _ = metrics.retrieval(torch.eye(2), torch.eye(2)[:1], torch.tensor([0]))
    assert of_images.rank.tolist() == [1, math.inf]


def test_an_image_of_nan_is_not_found() -> None:
    image = torch.eye(2)
    image[0] = torch.nan
    of_images, _ = metrics.retrieval(image, torch.eye(2))
    assert of_images.rank[0] == math.inf


@pytest.mark.parametrize("block", [1, 64, 1 << 24])  # one query at a time, ragged, all at once
def test_retrieval_is_clip_benchmarks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").evaluate
    draw = generator(3)
    image = 3 * torch.randn(230, 24, generator=draw)
    num_captions = torch.randint(1, 4, (230,), generator=draw)
    owner = torch.arange(230).repeat_interleave(num_captions)
    text = F.normalize(image)[owner] + 0.4 * torch.randn(len(owner), 24, generator=draw)
    captions = torch.arange(len(owner))
    batches = [
        (image[part], [captions[owner == i].tolist() for i in part])
        for part in torch.arange(230).split(64)
    ]
    expected = theirs(FEATURES, batches, lambda part: text[part], "cpu", False, [1, 5, 10])
    assert len(expected) == 6 and 0.1 < expected["text_retrieval_recall@1"] < 0.9
    assert recalls(metrics.retrieval(image, text, owner)) == pytest.approx(expected, abs=1e-6)


# Under five classes there is no top-5.
@pytest.mark.parametrize(("num_classes", "block"), [(4, 1 << 24), (12, 64), (12, 1 << 24)])
def test_zero_shot_is_clip_benchmarks(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, block: int
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # numpy 2.4 refuses float() of an array of one element, which their accuracy relies on.
    monkeypatch.setattr(theirs, "float", lambda x: float(np.asarray(x).item()), raising=False)
    draw = generator(1)
    image = 3 * torch.randn(230, 24, generator=draw)
    classes = [f"c{number}" for number in range(num_classes)]
    templates = ["a {c}", "some {c}", "{c}"]
    features_of_text = {
        template.format(c=name): torch.randn(24, generator=draw)
        for name in classes
        for template in templates
    }
    # The last class does not occur: it does not count in the recall.
    ids = torch.randint(0, num_classes - 1, (230,), generator=draw)

    def tokenize(texts: list[str]) -> Tensor:
        return torch.stack([features_of_text[text] for text in texts])

    dataset = TensorDataset(image, ids)
    dataset.classes = classes
    expected = theirs.evaluate(
        FEATURES, DataLoader(dataset, 64), tokenize, classes, templates, "cpu", False
    )
    of_templates = torch.stack(list(features_of_text.values())).reshape(num_classes, 3, 24)
    pairs = EvalSet(
        image,
        image[:0],
        labels={"class": Labels(ids, tuple(classes))},
        class_vectors={"class": metrics.class_vectors(of_templates)},
    )
    got = evaluate_features({"A": pairs}, tasks=("zeroshot",))["A"].metrics
    assert len(expected) == 3
    expected = {f"class/{name}": value for name, value in expected.items()}
    assert got == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_zero_shot_classifier_is_openclips() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(add_projection_head=False)).eval()
    names = ["tench", "great white shark", "toilet paper"]
    theirs = open_clip.build_zero_shot_classifier(
        model.clip, model.tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )  # [D, C]
    ours = class_features(
        Encoder(model, torch.device("cpu")), class_prompts("class", names, read_templates("openai"))
    )
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=0)
    image = torch.randn(20, len(theirs), generator=generator(1))
    torch.testing.assert_close(metrics.zero_shot_logits(image, ours), F.normalize(image) @ theirs)


def accuracy(
    features: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    score: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, float]:
    hits = metrics.classify(features, labels, num_classes or features.shape[1], score)
    return {name: float(values.mean()) for name, values in hits.items()}


def test_a_classifier_that_cannot_tell_scores_at_chance() -> None:
    """Class 0 has no advantage."""
    for labels in (torch.arange(4), torch.zeros(4, dtype=torch.int64)):
        scores = accuracy(torch.zeros(4, 9), labels)
        assert (scores["acc1"], scores["acc5"]) == pytest.approx((1 / 9, 5 / 9))
    assert accuracy(torch.full((1, 6), torch.nan), torch.tensor([0]))["acc5"] == 0


def test_accuracy_of_nothing_is_nan() -> None:
    of_no_rows = accuracy(torch.zeros(0, 9), torch.zeros(0).long())
    assert all(math.isnan(value) for value in of_no_rows.values())
    of_three_classes = accuracy(torch.eye(3), torch.arange(3))
    assert math.isnan(of_three_classes["acc5"])


@pytest.mark.parametrize("penalty", [1.0, 0.03])
@pytest.mark.parametrize("block", [64, 1 << 24])
def test_linear_probe_is_sklearns_minimum(
    monkeypatch: pytest.MonkeyPatch, penalty: float, block: int
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    features, labels = blobs()
    logits, chosen_penalty = metrics.fit_linear_probe(features, labels, 6, penalties=(penalty,))
    assert chosen_penalty == penalty
    scaled = (features - features.mean(0)) / features.std(0, correction=0)
    scaled = scaled.double().numpy()
    theirs = linear_model.LogisticRegression(
        C=1 / (penalty * len(features)), tol=1e-10, max_iter=5000
    )
    theirs.fit(scaled, labels.numpy())
    got = torch.softmax(logits(features), dim=1)
    expected = torch.from_numpy(theirs.predict_proba(scaled))
    torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=0)
    assert (got.argmax(1).numpy() == theirs.predict(scaled)).mean() > 0.995


def test_linear_probe_is_judged_on_a_fifth_that_it_is_not_fitted_to() -> None:
    features, labels = blobs(n=100, d=24, spread=2.0)
    penalties = (10.0, 1.0, 0.1, 0.01)
    order = torch.randperm(100, generator=generator())
    judge, train = order[:20], order[20:]
    scaled = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    losses = {}
    for penalty in penalties:
        theirs = linear_model.LogisticRegression(C=1 / (penalty * 80), tol=1e-8, max_iter=5000)
        theirs.fit(scaled[train], labels[train].numpy())
        known = torch.from_numpy(theirs.predict_log_proba(scaled[judge]))
        losses[penalty] = float(F.nll_loss(known, labels[judge]))
    expected = min(losses, key=losses.__getitem__)
    assert metrics.fit_linear_probe(features, labels, 6, penalties=penalties)[1] == expected


def test_classes_that_no_sample_has_do_not_lower_the_mean_recall() -> None:
    features = torch.eye(4)[[0, 0, 1, 3]]  # the second sample of class 0 and that of 3 are right
    of_classes = accuracy(features, torch.tensor([0, 0, 3, 3]))
    assert of_classes[metrics.MEAN_PER_CLASS] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("block", [7, 1 << 24])
def test_no_row_is_a_pair_with_itself(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    rows = torch.randn(6, 3, generator=generator())
    squared = torch.pdist(F.normalize(rows)).double().square()
    expected = math.log(float(torch.exp(-2 * squared).mean()))
    assert metrics.uniformity(rows) == pytest.approx(expected, abs=1e-5)


def test_linear_probe_chooses_a_penalty_that_generalises() -> None:
    features, labels = blobs(n=300, d=64, spread=4.0)  # nearly noise: a weak penalty overfits
    train = Blobs(features[:200], labels[:200])
    test = Blobs(features[200:], labels[200:])
    logits, penalty = metrics.fit_linear_probe(train.features, train.labels, 6)
    weakest, _ = metrics.fit_linear_probe(train.features, train.labels, 6, penalties=(1e-4,))
    assert penalty >= 0.1
    chosen_loss = F.cross_entropy(logits(test.features), test.labels)
    assert chosen_loss < F.cross_entropy(weakest(test.features), test.labels)
    again, _ = metrics.fit_linear_probe(train.features, train.labels, 6)
    assert torch.equal(logits(test.features), again(test.features))


def test_linear_probe_stands_constant_features_and_classes_that_do_not_occur() -> None:
    features, labels = blobs()
    constant = torch.full((len(features), 1), 1e6)
    features = torch.cat([features, constant], dim=1)
    logits, _ = metrics.fit_linear_probe(features, labels, 8)  # classes 6 and 7 do not occur
    assert accuracy(features, labels, 8, logits)["acc1"] > 0.8
    assert torch.isfinite(logits(features + 1.0)).all()


def test_linear_probe_refuses_nan() -> None:
    features, labels = blobs()
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.fit_linear_probe(features.masked_fill(features > 0, torch.nan), labels, 6)


def test_paper_probe_is_plain_sgd_and_takes_the_best_epoch() -> None:
    """Two epochs by hand: torch's SGD on batches in order, the better epoch counts."""
    image = torch.randn(60, 16, generator=generator())
    ids = (image[:, 0] > 0).long()
    data = (image, ids)
    scores, epoch = metrics.paper_linear_probe(data, data, 2, epochs=2, batch_size=40, seed=3)
    layer = torch.nn.Linear(16, 2)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(2, 16, generator=generator(3)))
        layer.bias.zero_()
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-6)
    shares = []
    for lr in (0.1, 0.05):  # half a cosine over two epochs
        sgd.param_groups[0]["lr"] = lr
        for rows in torch.arange(60).split(40):
            sgd.zero_grad()
            F.cross_entropy(layer(image[rows]), ids[rows]).backward()
            sgd.step()
        shares.append(float((layer(image).argmax(1) == ids).double().mean()))
    assert float(scores["acc1"].mean()) == pytest.approx(max(shares), abs=1e-6)
    assert epoch == int(np.argmax(shares)) + 1


def test_knn_is_the_weighted_vote_by_cosine() -> None:
    features, labels = blobs(n=330, spread=0.7)
    features = features / torch.logspace(-3, 3, 16)
    train = features[:300]
    query = features[300:]
    fitted = metrics.fit_knn(train, labels[:300], 7, k=7, temperature=0.1)
    cosine, nearest = (F.normalize(query) @ F.normalize(train).T).topk(7, dim=1)
    votes = torch.softmax(cosine / 0.1, dim=1)
    expected = torch.zeros(30, 7).scatter_add_(1, labels[nearest], votes)  # no class 6
    torch.testing.assert_close(fitted(query).float(), expected, atol=1e-5, rtol=0)


def test_knn_takes_fewer_samples_than_neighbours() -> None:
    fitted = metrics.fit_knn(torch.eye(3), torch.arange(3), 4, k=50)
    assert fitted(torch.eye(3)).argmax(1).tolist() == [0, 1, 2]


def test_groups_that_directions_tell_apart_score_one() -> None:
    labels = torch.arange(120) % 3
    length = torch.logspace(-2, 2, 120)[:, None]
    noise = 0.05 * torch.randn(120, 8, generator=generator(5))
    features = length * (torch.eye(8)[labels] + noise)
    expected = {"ari": 1, "ami": 1, "nmi": 1}
    assert metrics.group_scores(features, labels + 4) == pytest.approx(expected)


def test_group_scores_are_means_over_seeds() -> None:
    labels = torch.arange(120) % 3
    noise = torch.randn(120, 8, generator=generator(5))
    scores = metrics.group_scores(noise, labels)
    of_seeds = [metrics.group_scores(noise, labels, seeds=(seed,)) for seed in (0, 1, 2)]
    means = {name: sum(of_seed[name] for of_seed in of_seeds) / 3 for name in scores}
    assert scores == pytest.approx(means)
    assert abs(scores["ari"]) < 0.1 and abs(scores["ami"]) < 0.1


def test_geometry_by_hand() -> None:
    image = torch.tensor([[2.0, 0], [0, 3.0]])
    text = torch.tensor([[0, 1.0], [0, 1.0]])
    # means (.5, .5) and (0, 1); distances sqrt(2) and 0
    assert metrics.modality_gap(image, text) == pytest.approx(0.5**0.5)
    assert metrics.alignment(image, text) == pytest.approx(1.0)
    assert metrics.uniformity(image) == pytest.approx(-4.0)  # |x - y|^2 = 2, t = 2
    assert metrics.uniformity(text) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(metrics.uniformity(text[:1]))


def test_bootstrap_intervals_are_those_of_the_normal_approximation() -> None:
    hits = (torch.rand(400, generator=generator(4)) < 0.3).float()
    low, high = metrics.bootstrap_intervals({"hits": hits})["hits"]
    spread = 1.96 * (hits.var() / 400).sqrt().item()
    assert hits.mean().item() - low == pytest.approx(spread, rel=0.15)
    assert high - hits.mean().item() == pytest.approx(spread, rel=0.15)


def test_bootstrap_intervals_are_quantiles_of_drawn_means() -> None:
    values = torch.rand(40, generator=generator(4))
    draws = torch.randint(40, (30, 40), generator=generator(3))
    means = values[draws].double().mean(1)
    expected = means.quantile(torch.tensor([0.025, 0.975]).double())
    got = metrics.bootstrap_intervals({"x": values}, resamples=30, seed=3)["x"]
    assert got == pytest.approx(expected.tolist())
    assert got != metrics.bootstrap_intervals({"x": values})["x"]


def test_bootstrap_intervals_are_of_all_metrics_that_have_samples() -> None:
    values = torch.rand(400, generator=generator(4))
    samples = {"x": values, "y": values.flip(0), "short": values[:40], "none": values[:0]}
    assert set(metrics.bootstrap_intervals(samples)) == {"x", "y", "short"}
