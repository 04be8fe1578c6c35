"""What k-means returns follows from its inputs, not from torch.set_default_dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import assert_same_bits, usable
from op_table import Draw
from torch import Tensor

import protoclip


def clustered(backend: str, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    points = Draw(0).unit(12, 8).to(dtype)
    clusters = protoclip.kmeans(points, 3, tol=1e-3, backend=backend, **options)
    return {"centroids": clusters.centroids, "labels": clusters.labels}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["random", "k-means++"])
@pytest.mark.parametrize(
    "backend, dtype",
    [
        *((name, torch.float32) for name in usable("kmeans_assign") if name != "triton"),
        ("reference", torch.float64),
    ],
)
def test_dtypes_and_bits_are_the_same_under_any_default(
    backend: str, dtype: torch.dtype, init: str, default: torch.dtype
) -> None:
    weights = Draw(1).uniform(12)
    expected = clustered(backend, dtype, init=init, weights=weights)
    torch.set_default_dtype(default)
    try:
        got = clustered(backend, dtype, init=init, weights=weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(got, expected)
    assert got["centroids"].dtype == dtype
