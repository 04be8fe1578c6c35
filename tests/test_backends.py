"""Choosing an implementation: named ones never fall back, auto does, the environment stands in."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import protoclip
from protoclip.kernels.results import InfoNceForward, SampleLosses
from protoclip.ops import dispatch, info_nce, sigmoid_loss
from protoclip.ops import prototype_cross_entropy as cross_entropy
from protoclip.ops.dispatch import TABLE, function, resolve

OPS = sorted(TABLE)


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        protoclip.backends("no_such_op")


def test_forms_of_an_op_have_its_backends() -> None:
    assert protoclip.backends("sup_con") == protoclip.backends("contrastive")
    assert protoclip.backends("SigLipLoss") == protoclip.backends("sigmoid_loss")
    assert protoclip.backends("ClipLoss") == protoclip.backends("info_nce")
    assert protoclip.backends("kmeans") == protoclip.backends("kmeans_assign")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="info_nce has only cpu, reference, triton"):
        resolve("info_nce", "fastest", "cpu", torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_a_named_backend_runs_or_says_why_not(op: str) -> None:
    assert protoclip.backends(op)["reference"] is None
    for name, reason in protoclip.backends(op).items():
        if reason is not None:
            with pytest.raises(ValueError, match=f"backend '{name}' cannot run: .{{10}}"):
                resolve(op, name, "cpu", torch.float32)
        elif "cpu" in (TABLE[op][name].device_types or ("cpu",)):
            assert resolve(op, name, "cpu", torch.float32) == name


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_reference_for_fp64(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROTOCLIP_BACKEND", raising=False)
    assert resolve(op, "auto", "cpu", torch.float64) == "reference"


def test_the_environment_stands_in_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTOCLIP_BACKEND", "reference")
    assert resolve("info_nce", "auto", "cpu", torch.float32) == "reference"
    monkeypatch.setenv("PROTOCLIP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        resolve("info_nce", "auto", "cpu", torch.float32)


CONTRACTS = {
    "info_nce": ("info_nce_fwd", "info_nce_bwd"),
    "contrastive": ("contrastive_fwd", "contrastive_bwd"),
    "sigmoid_loss": ("sigmoid_loss", "sigmoid_loss_bwd"),
    "prototype_cross_entropy": (
        "prototype_cross_entropy_fwd",
        "prototype_cross_entropy_scale",
        "prototype_cross_entropy_bwd",
    ),
    "soft_targets": ("soft_targets",),
    "kmeans_assign": ("kmeans_assign", "kmeans_encode", "kmeans_assign_coded"),
    "segment_mean": ("segment_mean",),
}


def arguments_of(implementation: Callable[..., Any]) -> list[str]:
    if isinstance(implementation, torch._ops.OpOverload):
        return [argument.name for argument in implementation._schema.arguments]
    return list(inspect.signature(implementation).parameters)


@pytest.mark.parametrize("op", OPS)
def test_fused_backends_take_the_same_arguments(op: str) -> None:
    for name in CONTRACTS[op]:
        by_backend = {}
        for backend, reason in protoclip.backends(op).items():
            if reason is None and backend != "reference":
                by_backend[backend] = arguments_of(function(op, backend, name))
        assert len(set(map(tuple, by_backend.values()))) <= 1, (name, by_backend)


def schemas(file: str) -> dict[str, str]:
    """Of the ops that a C++ file registers: name -> the rest of the schema."""
    path = Path(dispatch.__file__).parents[2] / "csrc" / file
    strings = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)', path.read_text())
    joined = ["".join(re.findall(r'"([^"]*)"', string)) for string in strings]
    return {name: rest for name, _, rest in (schema.partition("(") for schema in joined)}


def test_clusters_have_one_schema_in_cuda_and_on_a_cpu() -> None:
    """As text: without a card nothing loads those of CUDA."""
    of_cuda = schemas("cuda_bindings.cpp")
    assert len(of_cuda) == 4
    of_cpu = schemas("bindings.cpp")
    assert of_cuda == {
        f"{name}_cuda": of_cpu[name]
        for op in ("kmeans_assign", "segment_mean")
        for name in CONTRACTS[op]
    }


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_launcher_multiplies_the_weights_it_is_given(backend: str) -> None:
    """Even one that no caller needs: 3 N instead of 1 / N."""
    if reason := protoclip.backends("info_nce")[backend]:
        pytest.skip(reason)
    strip = {"x": X, "y": Y, "logit_scale": S, "offset": 0}
    run = function("info_nce", backend, "info_nce_fwd")
    forward = InfoNceForward._make(run(**strip, both_directions=True, pair_weight=3.0, summed=True))
    torch.testing.assert_close(forward.loss, 6 * info_nce(X, Y, S, reduction="sum"))
    weight = torch.ones(4)
    gradients = {}
    for pair_weight in (1.0, 3.0):
        gradients[pair_weight] = function("info_nce", backend, "info_nce_bwd")(
            **strip,
            row_reference=forward.row_reference,
            row_sum=forward.row_sum,
            column_reference=forward.column_reference,
            column_sum=forward.column_sum,
            row_weight=weight,
            column_weight=weight,
            pair_weight=pair_weight,
        )
    for plain, weighted in zip(gradients[1.0], gradients[3.0], strict=True):
        torch.testing.assert_close(weighted, 3 * plain)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_gradient_of_the_scale_is_there_if_it_was_asked_for(backend: str) -> None:
    if reason := protoclip.backends("prototype_cross_entropy")[backend]:
        pytest.skip(reason)
    run = function("prototype_cross_entropy", backend, "prototype_cross_entropy_fwd")
    results = {}
    for asked in (True, False):
        arrays = {"features": X, "prototypes": Y, "targets": Y[:0], "labels": LABELS}
        results[asked] = SampleLosses._make(
            run(
                **arrays,
                logit_scale=S,
                need_grad=True,
                need_nearest=False,
                need_scale_gradient=asked,
                reduction="none",
            )
        )
    assert results[True].scale_gradient.shape == (4,)
    assert results[False].scale_gradient.shape == (0,)
    assert torch.equal(results[True].gradient, results[False].gradient)


RANDOM = torch.Generator().manual_seed(0)
X = F.normalize(torch.randn(4, 8, generator=RANDOM), dim=1)
Y = F.normalize(torch.randn(4, 8, generator=RANDOM), dim=1)
S = torch.tensor(10.0)
LABELS = torch.tensor([0, 1, 2, 3])
BAD: dict[str, tuple[Callable[[], Any], str]] = {  # the call, and what is wrong in words
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
    "two devices": (lambda: info_nce(X, Y.to("meta"), S), "on one device, got cpu and meta"),
    "reduction": (lambda: info_nce(X, Y, S, reduction="avg"), "reduction in"),
    "label dtype": (
        lambda: cross_entropy(X, Y, LABELS.float(), S),
        r"int64, got torch.float32; use labels.long\(\)",
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
def test_bad_input_is_refused_in_words(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(TypeError if case in TYPE_ERRORS else ValueError, match=words):
        call()


LOSSES: dict[str, Callable[[Any, str], Tensor]] = {
    "info_nce": lambda scale, backend: info_nce(X, Y, scale, backend=backend),
    "sigmoid_loss": lambda scale, backend: sigmoid_loss(X, Y, scale, scale, backend=backend),
    "prototype_cross_entropy": lambda scale, backend: cross_entropy(
        X, Y, LABELS, scale, backend=backend
    ),
    "ProtoClipLoss": lambda scale, backend: protoclip.ProtoClipLoss().eval()(X, Y, scale).squeeze(),
}


# Each kind of number once: all losses share one conversion. Each loss once: that it is called.
ANY_SCALE = [
    ("info_nce", "auto", 10),
    ("info_nce", "auto", np.float32(10)),
    ("info_nce", "auto", np.array(10)),
    ("info_nce", "reference", torch.tensor(10)),
    ("info_nce", "reference", torch.tensor([10.0])),
    ("sigmoid_loss", "auto", np.int64(10)),
    ("prototype_cross_entropy", "auto", np.float64(10)),
    ("ProtoClipLoss", "auto", np.array([10.0])),
]


@pytest.mark.parametrize("loss, backend, scale", ANY_SCALE, ids=repr)
def test_a_scale_is_any_number(loss: str, backend: str, scale: Any) -> None:
    assert torch.equal(LOSSES[loss](scale, backend), LOSSES[loss](S, backend))


def squared_distances(points: Tensor, centroids: Tensor, backend: str) -> Tensor:
    _, squared = protoclip.kmeans_assign(points, centroids, backend=backend)
    return squared


OF_TWO_TENSORS: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "info_nce": lambda x, y, backend: info_nce(x, y, S, backend=backend),
    "sigmoid_loss": lambda x, y, backend: sigmoid_loss(x, y, S, S, backend=backend),
    "prototype_cross_entropy": lambda x, y, backend: cross_entropy(
        x, y, LABELS, S, backend=backend
    ),
    "its targets": lambda x, y, backend: cross_entropy(
        x, x.flip(0), LABELS, S, targets=y.detach(), backend=backend
    ),
    "soft_targets": lambda x, y, backend: protoclip.soft_targets(x, y, 0.1, backend=backend),
    "kmeans_assign": squared_distances,
}
HALF = [torch.bfloat16, torch.float16]


# Each op once; each pair of dtypes (promoted to fp32 from either side) and both backends.
MIXED = [
    ("info_nce", "auto", HALF[0], torch.float32),
    ("sigmoid_loss", "auto", torch.float32, HALF[1]),
    ("prototype_cross_entropy", "auto", HALF[0], HALF[1]),
    ("its targets", "auto", torch.float32, HALF[0]),
    ("soft_targets", "reference", HALF[1], torch.float32),
    ("kmeans_assign", "reference", HALF[0], HALF[1]),
]


@pytest.mark.parametrize("op, backend, x_dtype, y_dtype", MIXED)
def test_mixed_dtypes_are_promoted(
    op: str, backend: str, x_dtype: torch.dtype, y_dtype: torch.dtype
) -> None:
    """As torch does it for operands."""
    run = OF_TWO_TENSORS[op]
    x = X.to(x_dtype)
    y = Y.to(y_dtype)
    assert torch.equal(run(x, y, backend), run(x.float(), y.float(), backend))


@pytest.mark.parametrize("op", ["info_nce", "sigmoid_loss", "prototype_cross_entropy"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_come_back_in_the_dtype_of_each_tensor(backend: str, op: str) -> None:
    x = X.to(torch.bfloat16).requires_grad_()
    y = Y.to(torch.float16).requires_grad_()
    OF_TWO_TENSORS[op](x, y, backend).backward()
    assert x.grad.dtype == torch.bfloat16 and y.grad.dtype == torch.float16


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_beside_targets_of_another_dtype_are_the_features(backend: str) -> None:
    x = X.to(torch.bfloat16).requires_grad_()
    OF_TWO_TENSORS["its targets"](x, Y.to(torch.float16), backend).backward()
    assert x.grad.dtype == torch.bfloat16


META_X = X.to("meta")
META_Y = Y.to("meta")
META_LABELS = LABELS.to("meta")
ON_META: dict[str, Callable[[], Tensor]] = {
    "ClipLoss": lambda: protoclip.ClipLoss()(META_X, META_Y, torch.ones((), device="meta")),
    "info_nce": lambda: info_nce(META_X, META_Y, 3.0),
    "sigmoid_loss": lambda: sigmoid_loss(META_X, META_Y, 3.0, 1),
    "prototype_cross_entropy": lambda: cross_entropy(META_X, META_Y, META_LABELS, 2.0),
}


@pytest.mark.parametrize("loss", ON_META)
def test_meta_tensors_give_a_meta_loss(loss: str) -> None:
    value = ON_META[loss]()
    assert value.is_meta and value.shape == ()


def test_meta_tensors_give_shapes() -> None:
    assert protoclip.soft_targets(META_X, META_Y, 0.1).shape == (4, 8)
    labels, squared = protoclip.kmeans_assign(META_X, META_Y)
    assert labels.shape == squared.shape == (4,)
    means, counts = protoclip.segment_mean(META_X, META_LABELS, 3)
    assert means.shape == (3, 8) and counts.shape == (3,)


@pytest.mark.parametrize("device_type", ["xpu", "mps"])
def test_a_gpu_without_kernels_is_told_once(device_type: str) -> None:
    dispatch._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match=f"none runs on {device_type}"):
        assert dispatch.resolve("info_nce", "auto", device_type, torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.resolve("info_nce", "auto", device_type, torch.float32)


def test_a_named_backend_refuses_meta_tensors() -> None:
    with pytest.raises(ValueError, match="it runs on cpu, the tensors are on meta"):
        protoclip.info_nce(META_X, META_Y, 3.0, backend="cpu")
