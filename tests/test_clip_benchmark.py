"""Our numbers are those of CLIP_benchmark's own code, run on the same features.

Its metric modules need torch, scikit-learn and tqdm only: ``pip install --no-deps clip-benchmark``.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from protoclip.data import Labels
from protoclip.evaluate import EvalSet, evaluate_features
from protoclip.evaluate.metrics import class_vectors

zeroshot = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

N, D = 230, 24
# To their code "pictures" and "tokens" are features already, of any length.
MODEL = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)


@pytest.fixture
def image():
    return 3 * torch.randn(N, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def numpy_lets_them(monkeypatch):
    """numpy 2.4 refuses float() of an array of one element, which their accuracy relies on."""
    item = lambda x: float(np.asarray(x).item())  # noqa: E731
    monkeypatch.setattr(zeroshot, "float", item, raising=False)


def prompts_of(classes, g):
    """Features of three prompts a class, by what ``template.format(c=name)`` gives."""
    words = ("a {c}", "some {c}", "{c}")
    rows = {w.format(c=c): torch.randn(D, generator=g) for c in classes for w in words}
    return list(words), rows, lambda texts: torch.stack([rows[text] for text in texts])


@pytest.mark.parametrize("classes", [4, 12])  # under five classes there is no top-5
def test_zero_shot(image, classes):
    g = torch.Generator().manual_seed(1)
    names = [f"c{i}" for i in range(classes)]
    words, rows, tokenizer = prompts_of(names, g)
    # The last class does not occur: it does not count in the recall.
    ids = torch.randint(0, classes - 1, (N,), generator=g)
    pairs = TensorDataset(image, ids)
    pairs.classes = names
    theirs = zeroshot.evaluate(MODEL, DataLoader(pairs, 64), tokenizer, names, words, "cpu", False)
    vectors = class_vectors(torch.stack(list(rows.values())).reshape(classes, len(words), D))
    one = EvalSet(
        image,
        image[:0],
        labels={"class": Labels(ids, tuple(names))},
        class_vectors={"class": vectors},
    )
    ours = evaluate_features({"A": one}, tasks=("zeroshot",)).metrics["A"]
    assert set(theirs) == {"acc1", "acc5", "mean_per_class_recall"}
    for name, value in theirs.items():
        assert ours[f"class/{name}"] == pytest.approx(value, abs=1e-6, nan_ok=True)


def test_retrieval_with_one_to_three_captions(image):
    g = torch.Generator().manual_seed(3)
    owner = torch.arange(N).repeat_interleave(torch.randint(1, 4, (N,), generator=g))
    text = F.normalize(image)[owner] + 0.4 * torch.randn(len(owner), D, generator=g)
    rows = torch.arange(len(owner))
    batches = [
        (image[part], [rows[owner == i].tolist() for i in part])
        for part in torch.arange(N).split(64)
    ]
    theirs = retrieval.evaluate(MODEL, batches, lambda part: text[part], "cpu", False, [1, 5, 10])
    ours = evaluate_features({"A": EvalSet(image, text, owner)}, tasks=("retrieval",)).metrics["A"]
    assert len(theirs) == 6 and 0.1 < theirs["text_retrieval_recall@1"] < 0.9
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6)
