"""Our numbers beside those of other people's definitions, on the same features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from protoclip import metrics
from protoclip.config import ModelConfig
from protoclip.evaluate import Encoder, EvalSet, evaluate_features
from protoclip.evaluate.layouts import read_templates
from protoclip.evaluate.sets import class_features, class_prompts
from protoclip.model import build_model


def features(n, m, d=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(n, d, generator=g)
    owner = torch.cat([torch.arange(n), torch.randint(n, (m - n,), generator=g)])
    return image, image[owner] + 2.0 * torch.randn(m, d, generator=g), owner


def recall_as_clip_benchmark_defines_it(scores, positive, k):
    """Share of the queries with at least one positive among the k best items."""
    best = scores.topk(k, dim=1).indices
    return float(positive.gather(1, best).any(1).double().mean())


def test_retrieval_is_clip_benchmarks():
    image, text, owner = features(70, 230)
    scores = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T  # [M, N]
    positive = owner[:, None] == torch.arange(70)
    got = evaluate_features({"A": EvalSet(image, text, owner)}).metrics["A"]
    for k in (1, 5, 10):
        want = recall_as_clip_benchmark_defines_it(scores, positive, k)
        assert got[f"image_retrieval_recall@{k}"] == pytest.approx(want, abs=1e-6)
        want = recall_as_clip_benchmark_defines_it(scores.T, positive.T, k)
        assert got[f"text_retrieval_recall@{k}"] == pytest.approx(want, abs=1e-6)


def test_retrieval_is_openclips():
    theirs = pytest.importorskip("open_clip_train.train").get_clip_metrics
    image, text, _ = features(90, 90)
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    want = theirs(image, text, torch.tensor(100.0))
    got = evaluate_features({"A": EvalSet(image, text)}, tasks=("retrieval",)).metrics["A"]
    for k in (1, 5, 10):
        ours = got[f"text_retrieval_recall@{k}"], got[f"image_retrieval_recall@{k}"]
        assert ours[0] == pytest.approx(want[f"image_to_text_R@{k}"], abs=1e-6)
        assert ours[1] == pytest.approx(want[f"text_to_image_R@{k}"], abs=1e-6)


def test_classification_is_clip_benchmarks():
    """Top-k by topk, mean per class recall by scikit-learn's balanced accuracy."""
    scores = pytest.importorskip("sklearn.metrics")
    image, text, _ = features(300, 300)
    classes = text[:12]
    ids = torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(1))  # 11 is absent
    logits = 100 * F.normalize(image, dim=1) @ F.normalize(classes, dim=1).T
    got = metrics.classify(image, ids, 12, lambda x: metrics.zero_shot_logits(x, classes))
    best = logits.topk(5, dim=1).indices == ids[:, None]
    assert got.acc1 == pytest.approx(float(best[:, :1].any(1).double().mean()), abs=1e-6)
    assert got.acc5 == pytest.approx(float(best.any(1).double().mean()), abs=1e-6)
    assert torch.equal(got.guesses, logits.argmax(1))
    want = scores.balanced_accuracy_score(ids.numpy(), logits.argmax(1).numpy())
    assert got.mean_per_class_recall == pytest.approx(want, abs=1e-6)


def test_multilabel_is_clip_benchmarks():
    """Its average precision is scikit-learn's where scores differ; a class in no sample: 0."""
    scores = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 6, generator=g)
    targets = torch.rand(200, 6, generator=g) < 0.2
    targets[:, 5] = False
    got = metrics.mean_average_precision(logits, targets, lambda x: x)
    each = [
        scores.average_precision_score(targets[:, k].numpy(), logits[:, k].numpy())
        for k in range(5)
    ]
    assert got == pytest.approx(sum(each) / 6, abs=1e-6)
    with pytest.raises(ValueError, match="expected targets"):
        metrics.mean_average_precision(logits[:3], targets, lambda x: x)


def test_zero_shot_classifier_is_openclips():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = build_model(ModelConfig(add_projection_head=False)).eval()
    names = ["tench", "great white shark", "toilet paper"]
    theirs = open_clip.build_zero_shot_classifier(
        model.clip, model.tokenizer, names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    templates = read_templates("openai")
    ours = class_features(
        Encoder(model, torch.device("cpu")), class_prompts("class", names, templates)
    )
    torch.testing.assert_close(ours, theirs.T, atol=1e-6, rtol=0)


def test_blocks_change_nothing(monkeypatch):
    image, text, owner = features(50, 90)
    ids = torch.arange(50) % 7
    whole = metrics.fit_linear_probe(image, ids, 7, penalties=(0.1,))
    recall = metrics.retrieval(image, text, owner).summary()
    scored = metrics.classify(image, ids, 7, whole.logits)
    monkeypatch.setattr(metrics._common, "BLOCK_ELEMENTS", 64)
    blocks = metrics.fit_linear_probe(image, ids, 7, penalties=(0.1,))
    torch.testing.assert_close(blocks.weight, whole.weight, atol=1e-3, rtol=1e-3)
    assert metrics.retrieval(image, text, owner).summary() == recall
    assert torch.equal(metrics.classify(image, ids, 7, whole.logits).guesses, scored.guesses)


def test_paper_probe_is_plain_sgd_and_takes_the_best_epoch():
    """Two epochs by hand: torch's SGD on batches in order, the better epoch counts."""
    image, _, _ = features(60, 60)
    ids = (image[:, 0] > 0).long()
    got, epoch = metrics.paper_linear_probe(
        image, ids, image, ids, 2, epochs=2, batch_size=40, seed=3
    )
    layer = torch.nn.Linear(16, 2)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(2, 16, generator=torch.Generator().manual_seed(3)))
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
    assert got.acc1 == pytest.approx(max(shares), abs=1e-6)
    assert epoch == int(np.argmax(shares)) + 1


def on_a_rank():
    """Slices and flags on one of the ranks."""
    from protoclip import distributed
    from protoclip.evaluate.ranks import all_ranks, sharded
    from protoclip.launchers import find_place

    cpu = torch.device("cpu")
    place = find_place()
    distributed.start(place, cpu, 60.0)
    table = torch.arange(14.0).reshape(7, 2)
    same = all(
        torch.equal(sharded(lambda rows: table[rows.start : rows.stop], n), table[:n])
        for n in (1, 2, 3, 7)
    )
    flags = all_ranks(True, cpu), all_ranks(place.rank == 0, cpu)
    told = []
    model = build_model(ModelConfig(add_projection_head=False))
    encoder = Encoder(model, cpu, batch_size=2, progress=told.append, sharded=True)
    encoder.texts([f"text {i}" for i in range(7)])
    distributed.stop()
    return same, flags, sum(told)


def test_ranks_encode_slices_and_share_the_rows():
    """All have all rows, and each one's progress reaches their number."""
    assert on_ranks(2, on_a_rank) == [(True, (True, False), 7)] * 2
