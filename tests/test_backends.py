"""Choosing an implementation: named ones never fall back, auto does, the environment stands in."""

import pytest
import torch

import protoclip
from protoclip.ops.backends import TABLE, resolve

OPS = sorted(TABLE)


@pytest.mark.parametrize("op", OPS)
def test_every_backend_says_usable_or_why_not(op):
    rows = protoclip.backends(op)
    assert rows["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in rows.values())


def test_unknown_op_and_backend_are_refused():
    with pytest.raises(ValueError, match="expected one of"):
        protoclip.backends("no_such_op")
    with pytest.raises(ValueError, match="expected backend 'auto' or one of"):
        resolve("info_nce", "fastest", "cpu", torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_never_falls_back(op):
    for name, reason in protoclip.backends(op).items():
        if reason is None:
            device_types = TABLE[op][name].device_types or ("cpu",)
            if "cpu" in device_types:
                assert resolve(op, name, "cpu", torch.float32) == name
        else:
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run"):
                resolve(op, name, "cpu", torch.float32)


def test_environment_stands_in_for_auto(monkeypatch):
    monkeypatch.setenv("PROTOCLIP_BACKEND", "reference")
    assert resolve("info_nce", "auto", "cpu", torch.float32) == "reference"
    monkeypatch.setenv("PROTOCLIP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        resolve("info_nce", "auto", "cpu", torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_auto_gives_fp64_to_the_reference(op, monkeypatch):
    monkeypatch.delenv("PROTOCLIP_BACKEND", raising=False)
    assert resolve(op, "auto", "cpu", torch.float64) == "reference"


X, Y, S = torch.randn(4, 8), torch.randn(4, 8), torch.tensor(10.0)
LABELS = torch.tensor([0, 1, 2, 3])
BAD = {
    "rank": (
        lambda: protoclip.info_nce(X[0], Y, S),
        ValueError,
        r"image_features of shape \[N, D\]",
    ),
    "rows": (lambda: protoclip.info_nce(X[:3], Y, S), ValueError, "one text per image"),
    "columns": (lambda: protoclip.info_nce(X[:, :3], Y, S), ValueError, "share D"),
    "dtype": (lambda: protoclip.info_nce(X.half(), Y, S), TypeError, "one dtype"),
    "integers": (lambda: protoclip.info_nce(X.long(), Y.long(), S), TypeError, "cast it"),
    "list": (lambda: protoclip.info_nce([1.0], Y, S), TypeError, "as a Tensor, got list"),
    "scale": (lambda: protoclip.info_nce(X, Y, X), ValueError, r"shape \[\] or \[1\]"),
    "reduction": (lambda: protoclip.info_nce(X, Y, S, reduction="avg"), ValueError, "reduction in"),
    "label dtype": (
        lambda: protoclip.prototype_cross_entropy(X, Y, LABELS.int(), S),
        TypeError,
        r"int64, got torch.int32; use labels.long\(\)",
    ),
    "label shape": (
        lambda: protoclip.prototype_cross_entropy(X, Y, LABELS[:2], S),
        ValueError,
        "labels of shape",
    ),
    "no prototypes": (
        lambda: protoclip.prototype_cross_entropy(X, Y[:0], LABELS, S),
        ValueError,
        "K >= 1 prototypes",
    ),
    "target shape": (
        lambda: protoclip.prototype_cross_entropy(X, Y, LABELS, S, targets=Y[:2]),
        ValueError,
        "targets of the prototypes' shape",
    ),
    "target grad": (
        lambda: protoclip.prototype_cross_entropy(
            X, Y, LABELS, S, targets=Y.clone().requires_grad_()
        ),
        ValueError,
        "detach it",
    ),
    "no banks": (lambda: protoclip.prototype_losses(X, [], S), ValueError, "at least one bank"),
    "soft rows": (lambda: protoclip.soft_targets(X, Y[:2], 0.1), ValueError, "one prototype per"),
    "soft dtypes": (lambda: protoclip.soft_targets(X.half(), Y, 0.1), ValueError, "one dtype"),
    "no centroids": (lambda: protoclip.kmeans_assign(X, Y[:0]), ValueError, "K >= 1 centroids"),
    "segments": (lambda: protoclip.segment_mean(X, LABELS, -1), ValueError, "num_segments"),
    "label range": (lambda: protoclip.segment_mean(X, LABELS, 2), ValueError, "below num_segments"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
