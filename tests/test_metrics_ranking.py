"""Retrieval, zero-shot, geometry and bootstrap against hand-computed cases and definitions."""

import math
import warnings

import pytest
import torch

from protoclip import metrics
from protoclip.metrics import _common, bootstrap


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_recall(image, text, caption_image, k):
    """CLIP_benchmark's definition on the full matrix: a positive among the top k."""
    scores = torch.nn.functional.normalize(text) @ torch.nn.functional.normalize(image).T  # [M, N]
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), caption_image] = True

    def share(scores, positive):
        top = scores.topk(min(k, scores.shape[1]), dim=1).indices
        return positive.gather(1, top).any(1).double().mean().item()

    return share(scores.T, positive.T), share(scores, positive)


def test_retrieval_by_hand():
    image = torch.eye(3)
    # Caption 0 and 1 belong to image 0; 2 belongs to image 1 but looks like 2; 3 belongs to 2.
    text = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]])
    got = metrics.retrieval(image, text, torch.tensor([0, 0, 1, 2]))
    assert got.image_to_text.tolist() == [1, 2, 1]  # image 1: caption 0 stands before its own
    assert got.text_to_image.tolist() == [2.5, 1, 2, 1]  # caption 0: image 1, then a tie 0 = 2
    summary = got.summary(ks=(1, 2))
    assert summary["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert summary["image_retrieval_recall@1"] == pytest.approx(2 / 4)
    assert summary["image_retrieval_recall@2"] == pytest.approx(3 / 4)
    assert summary["text_retrieval_mean_rank"] == pytest.approx(4 / 3)
    assert summary["text_retrieval_median_rank"] == 1


@pytest.mark.parametrize("k", [1, 5, 10, 100])  # 100: more than there are images
@pytest.mark.parametrize("block", [1, 64, 1 << 24])  # one query at a time, ragged, all at once
def test_retrieval_equals_definition(monkeypatch, k, block):
    monkeypatch.setattr(_common, "BLOCK_ELEMENTS", block)
    g = generator()
    image = torch.randn(37, 8, generator=g)
    owner = torch.cat([torch.arange(37), torch.randint(37, (50,), generator=g)])
    text = image[owner] + 0.8 * torch.randn(87, 8, generator=g)
    ranks = metrics.retrieval(image, text, owner)
    got = ranks.summary(ks=(k,))
    want = plain_recall(image, text, owner, k)
    assert got[f"text_retrieval_recall@{k}"] == pytest.approx(want[0], abs=1e-6)
    assert got[f"image_retrieval_recall@{k}"] == pytest.approx(want[1], abs=1e-6)
    hits = ranks.hits(k)
    assert hits[0].mean().item() == pytest.approx(want[0], abs=1e-6)
    assert hits[1].mean().item() == pytest.approx(want[1], abs=1e-6)


def test_retrieval_of_one_point_is_chance():
    ranks = metrics.retrieval(torch.ones(100, 4), torch.ones(100, 4))
    assert ranks.summary()["text_retrieval_recall@10"] == 0
    assert ranks.summary()["text_retrieval_median_rank"] == pytest.approx(50.5)


def test_retrieval_edges():
    empty = metrics.retrieval(torch.zeros(0, 4), torch.zeros(0, 4)).summary()
    assert all(math.isnan(x) for x in empty.values())
    one = metrics.retrieval(torch.ones(1, 4), torch.ones(1, 4)).summary()
    assert one["text_retrieval_recall@1"] == one["image_retrieval_recall@1"] == 1
    # Image 1 has no caption: found by none.
    lonely = metrics.retrieval(torch.eye(2), torch.eye(2)[:1], torch.tensor([0]))
    assert lonely.image_to_text.tolist() == [1, math.inf]
    broken = torch.eye(2)
    broken[0] = torch.nan
    assert metrics.retrieval(broken, torch.eye(2)).image_to_text[0] == math.inf


@pytest.mark.parametrize(
    ("image", "text", "owner", "words"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), None, "expected shape"),
        (torch.ones(3, 4), torch.ones(6, 4), None, "pass caption_image"),
        (torch.ones(3, 4), torch.ones(2, 4), torch.tensor([0, 3]), "0..2"),
        (torch.ones(3, 4), torch.ones(2, 4), torch.tensor([0]), "one label per row"),
        (torch.ones(3, 4).long(), torch.ones(3, 4), None, "floating-point"),
    ],
)
def test_retrieval_refuses(image, text, owner, words):
    with pytest.raises(ValueError, match=words):
        metrics.retrieval(image, text, owner)


def test_class_vectors_are_the_renormalised_mean():
    prompts = torch.tensor([[[2.0, 0], [0, 5.0]], [[0, 1.0], [0, 3.0]]])
    got = metrics.class_vectors(prompts)
    root = 0.5**0.5
    torch.testing.assert_close(got, torch.tensor([[root, root], [0, 1.0]]))
    with pytest.raises(ValueError, match="at least one prompt"):
        metrics.class_vectors(torch.zeros(2, 0, 4))


def test_zero_shot_matches_open_clips_classifier():
    open_clip = pytest.importorskip("open_clip")
    g = generator(1)
    prompts = torch.randn(7, 3, 8, generator=g)

    class Model(torch.nn.Module):
        def encode_text(self, tokens, normalize=False):
            out = prompts.reshape(-1, 8)[tokens[:, 0]]
            return torch.nn.functional.normalize(out, dim=-1) if normalize else out

    classifier = open_clip.build_zero_shot_classifier(
        Model(),
        tokenizer=lambda texts: torch.tensor([[int(t)] for t in texts]),
        classnames=list(range(7)),
        templates=[lambda c, j=j: str(3 * c + j) for j in range(3)],
    )  # [D, C]
    image = torch.randn(20, 8, generator=g)
    got = metrics.zero_shot_logits(image, metrics.class_vectors(prompts))
    torch.testing.assert_close(got, torch.nn.functional.normalize(image) @ classifier)


def test_accuracy_against_sklearn():
    sk = pytest.importorskip("sklearn.metrics")
    g = generator(2)
    logits = torch.randn(300, 12, generator=g)
    labels = torch.randint(0, 11, (300,), generator=g)  # class 11 does not occur
    got = metrics.accuracy(logits, labels)
    guess = logits.argmax(1)
    assert got.acc1 == pytest.approx(sk.accuracy_score(labels, guess))
    top5 = sk.top_k_accuracy_score(labels, logits, k=5, labels=range(12))
    assert got.acc5 == pytest.approx(top5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn notes that class 11 is guessed, never true
        want = sk.balanced_accuracy_score(labels, guess)
    assert got.mean_per_class_recall == pytest.approx(want)
    assert got.hits.tolist() == (guess == labels).float().tolist()


def test_accuracy_edges():
    flat = metrics.accuracy(torch.zeros(4, 9), torch.tensor([0, 1, 2, 3]))
    assert flat.acc1 == 0  # a classifier that cannot tell scores no point for class 0
    assert math.isnan(metrics.accuracy(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)).acc1)
    assert math.isnan(metrics.accuracy(torch.eye(3), torch.arange(3)).acc5)
    nan = torch.full((1, 6), torch.nan)
    assert metrics.accuracy(nan, torch.tensor([0])).acc5 == 0
    with pytest.raises(ValueError, match=r"0..2, found 0..3"):
        metrics.accuracy(torch.eye(3), torch.tensor([0, 1, 3]))


def test_geometry_by_hand():
    image = torch.tensor([[2.0, 0], [0, 3.0]])
    text = torch.tensor([[0, 1.0], [0, 1.0]])
    # means (.5, .5) and (0, 1); distances sqrt(2) and 0
    assert metrics.modality_gap(image, text) == pytest.approx(0.5**0.5)
    assert metrics.alignment(image, text) == pytest.approx(1.0)
    assert metrics.uniformity(image) == pytest.approx(-4.0)  # |x - y|^2 = 2, t = 2
    assert metrics.uniformity(text) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(metrics.uniformity(text[:1]))


def test_uniformity_by_blocks(monkeypatch):
    x = torch.randn(53, 6, generator=generator(3), dtype=torch.float64)
    z = torch.nn.functional.normalize(x)
    want = torch.nn.functional.pdist(z).square().mul(-2).exp().mean().log()
    assert metrics.uniformity(x) == pytest.approx(float(want), abs=1e-12)
    monkeypatch.setattr(_common, "BLOCK_ELEMENTS", 53 * 7)  # 7 rows at a time, 53 = 7 * 7 + 4
    assert metrics.uniformity(x) == pytest.approx(float(want), abs=1e-12)


def test_bootstrap_of_a_mean_per_class_recall(monkeypatch):
    """Against scikit-learn on each resample; in blocks of resamples as at once."""
    from sklearn.metrics import recall_score

    g = generator(6)
    labels = torch.randint(0, 7, (60,), generator=g)
    labels[labels == 6] = 5  # a class that does not occur, and a rare one
    labels[:2] = 6
    guesses = torch.where(torch.rand(60, generator=g) < 0.6, labels, (labels + 1) % 7)
    hits = (guesses == labels).float()
    samples = {"recall": metrics.Sampled(hits, labels), "acc": metrics.Sampled(hits)}
    got = metrics.bootstrap_intervals(samples, resamples=40, seed=3)
    draws = torch.randint(60, (40, 60), generator=generator(3))

    def recall(rows):
        y = labels[rows]
        return recall_score(y, guesses[rows], labels=y.unique(), average="macro")

    means = torch.tensor([recall(rows) for rows in draws])
    ends = means.double().quantile(torch.tensor([0.025, 0.975]).double())
    assert (got["recall"].low, got["recall"].high) == pytest.approx(ends.tolist())
    assert got["recall"].mean == pytest.approx(recall(torch.arange(60)))
    assert got["acc"] == metrics.bootstrap_mean(hits, resamples=40, seed=3)
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 60 * 7)
    again = metrics.bootstrap_intervals(samples, resamples=40, seed=3)["recall"]
    assert (again.low, again.high) == pytest.approx((got["recall"].low, got["recall"].high))


def test_bootstrap():
    g = generator(4)
    x = (torch.rand(400, generator=g) < 0.3).float()
    got = metrics.bootstrap_mean(x)
    assert got == metrics.bootstrap_mean(x)
    assert got.mean == pytest.approx(x.mean().item())
    spread = 1.96 * (x.var() / 400).sqrt().item()  # what the normal approximation says
    assert got.mean - got.low == pytest.approx(spread, rel=0.15)
    assert got.high - got.mean == pytest.approx(spread, rel=0.15)
    # The same samples, a few of them better: pairing sees it, separate intervals would not.
    y = torch.maximum(x, (torch.rand(400, generator=g) < 0.05).float())
    paired = metrics.bootstrap_mean(y, x)
    assert paired.mean == pytest.approx((y.mean() - x.mean()).item(), abs=1e-7)
    assert paired.low > 0
    assert paired.high - paired.low < (got.high - got.low) / 2
    assert math.isnan(metrics.bootstrap_mean(torch.zeros(0)).mean)
    with pytest.raises(ValueError, match="same length"):
        metrics.bootstrap_mean(x, x[:-1])
    with pytest.raises(ValueError, match="confidence"):
        metrics.bootstrap_mean(x, confidence=1.0)
