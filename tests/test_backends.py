"""Choosing an implementation: named ones never fall back, auto does, the environment stands in."""

import numpy as np
import pytest
import torch

import protoclip
from protoclip.ops import info_nce, sigmoid_loss
from protoclip.ops import prototype_cross_entropy as cross_entropy
from protoclip.ops.dispatch import TABLE, resolve

OPS = sorted(TABLE)


def test_unknown_op_and_backend_are_refused():
    with pytest.raises(ValueError, match="expected one of"):
        protoclip.backends("no_such_op")
    assert protoclip.backends("sup_con") == protoclip.backends("contrastive")
    with pytest.raises(ValueError, match="info_nce has only cpu, reference, triton"):
        resolve("info_nce", "fastest", "cpu", torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_runs_or_says_why_not(op, monkeypatch):
    assert protoclip.backends(op)["reference"] is None
    for name, reason in protoclip.backends(op).items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: .{{10}}"):
                resolve(op, name, "cpu", torch.float32)
        elif "cpu" in (TABLE[op][name].device_types or ("cpu",)):
            assert resolve(op, name, "cpu", torch.float32) == name
    monkeypatch.delenv("PROTOCLIP_BACKEND", raising=False)
    assert resolve(op, "auto", "cpu", torch.float64) == "reference"


def test_environment_stands_in_for_auto(monkeypatch):
    monkeypatch.setenv("PROTOCLIP_BACKEND", "reference")
    assert resolve("info_nce", "auto", "cpu", torch.float32) == "reference"
    monkeypatch.setenv("PROTOCLIP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        resolve("info_nce", "auto", "cpu", torch.float32)


X, Y, S = torch.randn(4, 8), torch.randn(4, 8), torch.tensor(10.0)
LABELS = torch.tensor([0, 1, 2, 3])
BAD = {  # the call, and what is wrong in words
    "rank": (lambda: info_nce(X[0], Y, S), r"image_features of shape \[N, D\]"),
    "rows": (lambda: info_nce(X[:3], Y, S), "one text per image"),
    "columns": (lambda: info_nce(X[:, :3], Y, S), "share D"),
    "integers": (lambda: info_nce(X.long(), Y.long(), S), "cast it"),
    "list": (lambda: info_nce([1.0], Y, S), "as a Tensor, got list"),
    "scale": (lambda: info_nce(X, Y, X), r"shape \[\] or \[1\]"),
    "scale's text": (lambda: info_nce(X, Y, "10"), "as a number or a Tensor"),
    "no scale": (lambda: info_nce(X, Y, None), "as a number or a Tensor"),
    "scales": (lambda: info_nce(X, Y, np.ones(2)), "as a number or a Tensor"),
    "a truth": (lambda: info_nce(X, Y, torch.tensor(True)), "float tensor"),
    "two devices": (lambda: info_nce(X, Y.to("meta"), S), "on one device, got meta and cpu"),
    "reduction": (lambda: info_nce(X, Y, S, reduction="avg"), "reduction in"),
    "label dtype": (
        lambda: cross_entropy(X, Y, LABELS.int(), S),
        r"int64, got torch.int32; use labels.long\(\)",
    ),
    "label shape": (lambda: cross_entropy(X, Y, LABELS[:2], S), "labels of shape"),
    "no prototypes": (lambda: cross_entropy(X, Y[:0], LABELS, S), "K >= 1 prototypes"),
    "target shape": (
        lambda: cross_entropy(X, Y, LABELS, S, targets=Y[:2]),
        "targets of the prototypes' shape",
    ),
    "target grad": (
        lambda: cross_entropy(X, Y, LABELS, S, targets=Y.clone().requires_grad_()),
        "detach it",
    ),
    "no banks": (lambda: protoclip.prototype_losses(X, [], S), "at least one bank"),
    "a tensor's temperature": (lambda: protoclip.soft_targets(X, Y, S), "as a Python number"),
    "soft rows": (lambda: protoclip.soft_targets(X, Y[:2], 0.1), "one prototype per"),
    "no centroids": (lambda: protoclip.kmeans_assign(X, Y[:0]), "K >= 1 centroids"),
    "segments": (lambda: protoclip.segment_mean(X, LABELS, -1), "num_segments"),
    "label range": (lambda: protoclip.segment_mean(X, LABELS, 2), "below num_segments"),
}
TYPE_ERRORS = {
    "integers", "list", "scale's text", "no scale", "scales", "a truth", "label dtype",
    "a tensor's temperature",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_words(case):
    call, words = BAD[case]
    with pytest.raises(TypeError if case in TYPE_ERRORS else ValueError, match=words):
        call()


SCALES = [10, 10.0, np.float32(10), np.float64(10), np.int64(10), np.array(10), np.array([10.0])]


@pytest.mark.parametrize("scale", [*SCALES, torch.tensor(10), torch.tensor([10.0])], ids=repr)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_scale_is_any_number(backend, scale):
    for loss in (
        lambda s: info_nce(X, Y, s, backend=backend),
        lambda s: sigmoid_loss(X, Y, s, s, backend=backend),
        lambda s: cross_entropy(X, Y, LABELS, s, backend=backend),
        lambda s: protoclip.ProtoClipLoss().eval()(X, Y, s).squeeze(),
    ):
        assert torch.equal(loss(scale), loss(S))


B, H = torch.bfloat16, torch.float16
PAIRS = {
    "info_nce": lambda x, y, b: info_nce(x, y, S, backend=b),
    "sigmoid_loss": lambda x, y, b: sigmoid_loss(x, y, S, S, backend=b),
    "prototype_cross_entropy": lambda x, y, b: cross_entropy(x, y, LABELS, S, backend=b),
    "its targets": lambda x, y, b: cross_entropy(x, x.flip(0), LABELS, S, targets=y, backend=b),
    "soft_targets": lambda x, y, b: protoclip.soft_targets(x, y, 0.1, backend=b),
    "kmeans_assign": lambda x, y, b: protoclip.kmeans_assign(x, y, backend=b)[1],
}


@pytest.mark.parametrize("op", PAIRS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_mixed_dtypes_are_promoted(backend, op):
    """As torch does it for operands; gradients come back in each tensor's own dtype."""
    for x, y in ((X.to(B), Y), (X, Y.to(H)), (X.to(B), Y.to(H))):
        got = PAIRS[op](x, y, backend)
        assert torch.equal(got, PAIRS[op](x.float(), y.float(), backend))
    if got.ndim == 0:
        x, y = (t.clone().requires_grad_() for t in (X.to(B), Y.to(H)))
        PAIRS[op](x, y if op != "its targets" else y.detach(), backend).backward()
        assert x.grad.dtype == B and (op == "its targets" or y.grad.dtype == H)


def test_meta_tensors_give_shapes():
    x, y, labels = (t.to("meta") for t in (X, Y, LABELS))
    for loss in (
        protoclip.ClipLoss()(x, y, torch.ones((), device="meta")),
        info_nce(x, y, 3.0),
        sigmoid_loss(x, y, 3.0, 1),
        cross_entropy(x, y, labels, 2.0),
    ):
        assert loss.is_meta and loss.shape == ()
    assert protoclip.soft_targets(x, y, 0.1).shape == (4, 8)
    assert [t.shape for t in protoclip.kmeans_assign(x, y)] == [(4,), (4,)]
    assert [t.shape for t in protoclip.segment_mean(x, labels, 3)] == [(3, 8), (3,)]
    with pytest.raises(ValueError, match="it runs on cpu, the tensors are on meta"):
        protoclip.info_nce(x, y, 3.0, backend="cpu")
