"""Metrics against hand-computed cases, scikit-learn, OpenCLIP, CLIP_benchmark.

CLIP_benchmark's modules need torch, scikit-learn and tqdm only: pip install --no-deps
clip-benchmark.
"""

import math
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from protoclip.config import ModelConfig
from protoclip.data import Labels
from protoclip.evaluate import metrics
from protoclip.evaluate.datasets import class_prompts, read_templates
from protoclip.evaluate.tasks import Encoder, EvalSet, class_features, evaluate_features
from protoclip.model import build_model

linear_model = pytest.importorskip("sklearn.linear_model")
# To CLIP_benchmark's code "pictures" and "tokens" are features already, of any length.
FEATURES = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=400, d=16, c=6, spread=1.5, seed=0):
    g = generator(seed)
    centre = torch.randn(c, d, generator=g)
    labels = torch.randint(0, c, (n,), generator=g)
    scale = torch.logspace(-3, 3, d)  # standardising matters
    return (centre[labels] + spread * torch.randn(n, d, generator=g)) * scale, labels


def test_retrieval_by_hand():
    image = torch.eye(3)
    # Caption 0 and 1 belong to image 0; 2 belongs to image 1 but looks like 2; 3 belongs to 2.
    text = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]])
    found = metrics.retrieval(image, text, torch.tensor([0, 0, 1, 2]))
    # Image 1: caption 0 stands before its own. Caption 0: image 1, then a tie of 0 and 2.
    assert [ranks.tolist() for ranks in found] == [[1, 2, 1], [2.5, 1, 2, 1]]
    assert recalls(found, ks=(1, 2)) == pytest.approx({
        "text_retrieval_recall@1": 2 / 3, "text_retrieval_recall@2": 1,
        "image_retrieval_recall@1": 2 / 4, "image_retrieval_recall@2": 3 / 4,
    })  # fmt: skip


def recalls(ranks, ks=(1, 5, 10)):
    return {name: float(hits.mean()) for name, hits in metrics.recalls(ranks, ks).items()}


def test_retrieval_edges():
    same = metrics.retrieval(torch.ones(100, 4), torch.ones(100, 4))  # one point is chance
    assert recalls(same)["text_retrieval_recall@10"] == 0 and same[0].tolist() == [50.5] * 100
    empty = recalls(metrics.retrieval(torch.zeros(0, 4), torch.zeros(0, 4)))
    assert all(math.isnan(x) for x in empty.values())
    assert set(recalls(metrics.retrieval(torch.ones(1, 4), torch.ones(1, 4))).values()) == {1}
    # Image 1 has no caption: found by none.
    lonely = metrics.retrieval(torch.eye(2), torch.eye(2)[:1], torch.tensor([0]))
    assert lonely[0].tolist() == [1, math.inf]
    broken = torch.eye(2)
    broken[0] = torch.nan
    assert metrics.retrieval(broken, torch.eye(2))[0][0] == math.inf


@pytest.mark.parametrize("block", [1, 64, 1 << 24])  # one query at a time, ragged, all at once
def test_retrieval_is_clip_benchmarks(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").evaluate
    g, count = generator(3), 230
    image = 3 * torch.randn(count, 24, generator=g)
    owner = torch.arange(count).repeat_interleave(torch.randint(1, 4, (count,), generator=g))
    text = F.normalize(image)[owner] + 0.4 * torch.randn(len(owner), 24, generator=g)
    rows = torch.arange(len(owner))
    batches = [
        (image[part], [rows[owner == i].tolist() for i in part])
        for part in torch.arange(count).split(64)
    ]
    want = theirs(FEATURES, batches, lambda part: text[part], "cpu", False, [1, 5, 10])
    assert len(want) == 6 and 0.1 < want["text_retrieval_recall@1"] < 0.9
    assert recalls(metrics.retrieval(image, text, owner)) == pytest.approx(want, abs=1e-6)


# Under five classes there is no top-5.
@pytest.mark.parametrize(("classes", "block"), [(4, 1 << 24), (12, 64), (12, 1 << 24)])
def test_zero_shot_is_clip_benchmarks(monkeypatch, classes, block):
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # numpy 2.4 refuses float() of an array of one element, which their accuracy relies on.
    item = lambda x: float(np.asarray(x).item())  # noqa: E731
    monkeypatch.setattr(theirs, "float", item, raising=False)
    g = generator(1)
    image = 3 * torch.randn(230, 24, generator=g)
    names, words = [f"c{i}" for i in range(classes)], ["a {c}", "some {c}", "{c}"]
    rows = {w.format(c=c): torch.randn(24, generator=g) for c in names for w in words}
    # The last class does not occur: it does not count in the recall.
    ids = torch.randint(0, classes - 1, (230,), generator=g)
    pairs = TensorDataset(image, ids)
    pairs.classes = names
    tokenizer = lambda texts: torch.stack([rows[text] for text in texts])  # noqa: E731
    loader = DataLoader(pairs, 64)
    want = theirs.evaluate(FEATURES, loader, tokenizer, names, words, "cpu", False)
    vectors = metrics.class_vectors(torch.stack(list(rows.values())).reshape(classes, 3, 24))
    labels = {"class": Labels(ids, tuple(names))}
    one = EvalSet(image, image[:0], labels=labels, class_vectors={"class": vectors})
    got = evaluate_features({"A": one}, tasks=("zeroshot",))["A"].metrics
    want = {f"class/{name}": value for name, value in want.items()}
    assert got == pytest.approx(want, abs=1e-6, nan_ok=True) and len(want) == 3


def test_zero_shot_classifier_is_openclips():
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


def accuracy(features, labels, num_classes=None, score=lambda rows: rows):
    got = metrics.classify(features, labels, num_classes or features.shape[1], score)
    return {name: float(values.mean()) for name, values in got.items()}


def test_accuracy_edges():
    flat = accuracy(torch.zeros(4, 9), torch.tensor([0, 1, 2, 3]))
    assert flat["acc1"] == 0  # a classifier that cannot tell scores no point for class 0
    assert all(map(math.isnan, accuracy(torch.zeros(0, 9), torch.zeros(0).long()).values()))
    assert math.isnan(accuracy(torch.eye(3), torch.arange(3))["acc5"])
    assert accuracy(torch.full((1, 6), torch.nan), torch.tensor([0]))["acc5"] == 0


@pytest.mark.parametrize("penalty", [1.0, 0.03])
@pytest.mark.parametrize("block", [64, 1 << 24])
def test_linear_probe_is_sklearns_minimum(monkeypatch, penalty, block):
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", block)
    x, y = blobs()
    logits, chosen = metrics.fit_linear_probe(x, y, 6, penalties=(penalty,))
    assert chosen == penalty
    scaled = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    want = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=5000)
    want.fit(scaled, y.numpy())
    got = torch.softmax(logits(x), dim=1)
    torch.testing.assert_close(
        got.double(), torch.from_numpy(want.predict_proba(scaled)), atol=2e-3, rtol=0
    )
    assert (got.argmax(1).numpy() == want.predict(scaled)).mean() > 0.995


def test_linear_probe_chooses_lambda():
    x, y = blobs(n=300, d=64, spread=4.0)  # nearly noise: a weak penalty overfits
    test_x, test_y = x[200:], y[200:]
    x, y = x[:200], y[:200]
    chosen, penalty = metrics.fit_linear_probe(x, y, 6)
    weakest, _ = metrics.fit_linear_probe(x, y, 6, penalties=(1e-4,))
    assert penalty >= 0.1
    assert F.cross_entropy(chosen(test_x), test_y) < F.cross_entropy(weakest(test_x), test_y)
    again, _ = metrics.fit_linear_probe(x, y, 6)
    assert torch.equal(chosen(test_x), again(test_x))


def test_linear_probe_edges():
    x, y = blobs()
    x = torch.cat([x, torch.full((len(x), 1), 1e6)], dim=1)
    logits, _ = metrics.fit_linear_probe(x, y, 8)  # classes 6 and 7 do not occur
    assert accuracy(x, y, 8, logits)["acc1"] > 0.8
    assert torch.isfinite(logits(x + 1.0)).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.fit_linear_probe(x.masked_fill(x > 0, torch.nan), y, 6)


def test_paper_probe_is_plain_sgd_and_takes_the_best_epoch():
    """Two epochs by hand: torch's SGD on batches in order, the better epoch counts."""
    image = torch.randn(60, 16, generator=generator())
    ids = (image[:, 0] > 0).long()
    data = image, ids
    got, epoch = metrics.paper_linear_probe(data, data, 2, epochs=2, batch_size=40, seed=3)
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
    assert float(got["acc1"].mean()) == pytest.approx(max(shares), abs=1e-6)
    assert epoch == int(np.argmax(shares)) + 1


def test_knn_is_the_weighted_vote_by_cosine():
    x, y = blobs(n=330, spread=0.7)
    x = x / torch.logspace(-3, 3, 16)
    train, query = x[:300], x[300:]
    got = metrics.fit_knn(train, y[:300], 7, k=7, temperature=0.1)(query)  # class 6 does not occur
    cosine, nearest = (F.normalize(query) @ F.normalize(train).T).topk(7, dim=1)
    want = torch.zeros(30, 7).scatter_add_(1, y[nearest], torch.softmax(cosine / 0.1, dim=1))
    torch.testing.assert_close(got.float(), want, atol=1e-5, rtol=0)
    few = metrics.fit_knn(torch.eye(3), torch.arange(3), 4, k=50)  # fewer samples than neighbours
    assert few(torch.eye(3)).argmax(1).tolist() == [0, 1, 2]


def test_group_scores_are_means_over_seeds_on_the_sphere():
    g = generator(5)
    labels = torch.arange(120) % 3
    length = torch.logspace(-2, 2, 120)[:, None]  # only directions tell the groups apart
    x = length * (torch.eye(8)[labels] + 0.05 * torch.randn(120, 8, generator=g))
    assert metrics.group_scores(x, labels + 4) == pytest.approx(dict(ari=1, ami=1, nmi=1))
    noise = torch.randn(120, 8, generator=g)
    each = [metrics.group_scores(noise, labels, seeds=(seed,)) for seed in (0, 1, 2)]
    mean = {name: sum(one[name] for one in each) / 3 for name in each[0]}
    got = metrics.group_scores(noise, labels)
    assert got == pytest.approx(mean) and abs(got["ari"]) < 0.1 and abs(got["ami"]) < 0.1


def test_geometry_by_hand():
    image = torch.tensor([[2.0, 0], [0, 3.0]])
    text = torch.tensor([[0, 1.0], [0, 1.0]])
    # means (.5, .5) and (0, 1); distances sqrt(2) and 0
    assert metrics.modality_gap(image, text) == pytest.approx(0.5**0.5)
    assert metrics.alignment(image, text) == pytest.approx(1.0)
    assert metrics.uniformity(image) == pytest.approx(-4.0)  # |x - y|^2 = 2, t = 2
    assert metrics.uniformity(text) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(metrics.uniformity(text[:1]))


def test_bootstrap():
    g = generator(4)
    x = (torch.rand(400, generator=g) < 0.3).float()
    samples = {"x": x, "y": torch.rand(400, generator=g), "z": x[:40], "none": x[:0]}
    found = metrics.bootstrap_intervals(samples)
    (low, high), z = found["x"], found["z"]
    spread = 1.96 * (x.var() / 400).sqrt().item()  # what the normal approximation says
    assert x.mean().item() - low == pytest.approx(spread, rel=0.15)
    assert high - x.mean().item() == pytest.approx(spread, rel=0.15)
    assert set(found) == {"x", "y", "z"}
    draws = torch.randint(40, (30, 40), generator=generator(3))  # the samples themselves
    ends = x[:40][draws].double().mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    got = metrics.bootstrap_intervals({"z": x[:40]}, resamples=30, seed=3)["z"]
    assert got == pytest.approx(ends.tolist()) and got != z
