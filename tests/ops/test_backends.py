"""Choosing an implementation: named ones never fall back, auto does, the environment stands in."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_table import Draw

import protoclip
from protoclip.ops import dispatch
from protoclip.ops.dispatch import TABLE, function

OPS = sorted(TABLE)


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        protoclip.backends("no_such_op")


def test_forms_of_an_op_have_its_backends() -> None:
    assert protoclip.backends("sup_con") == protoclip.backends("contrastive")
    assert protoclip.backends("SigLipLoss") == protoclip.backends("sigmoid_loss")
    assert protoclip.backends("ClipLoss") == protoclip.backends("info_nce")
    assert protoclip.backends("kmeans") == protoclip.backends("kmeans_assign")


CONTRACTS = {
    "info_nce": ("contrastive_fwd", "contrastive_bwd"),
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


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_beside_targets_of_another_dtype_are_the_features(backend: str) -> None:
    draw = Draw(0)
    features = draw.unit(4, 8).bfloat16().requires_grad_()
    prototypes = draw.unit(4, 8)
    loss = protoclip.prototype_cross_entropy(
        features, prototypes, torch.arange(4), 10.0, targets=prototypes.half(), backend=backend
    )
    loss.backward()
    assert features.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("device_type", ["xpu", "mps"])
def test_a_gpu_without_kernels_is_told_once(device_type: str) -> None:
    dispatch._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match=f"none runs on {device_type}"):
        assert dispatch.resolve("info_nce", "auto", device_type, torch.float32) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.resolve("info_nce", "auto", device_type, torch.float32)
