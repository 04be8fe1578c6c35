"""What an op returns follows from its inputs, not from torch.set_default_dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from budget import usable
from torch import Tensor

import protoclip
from protoclip import ops

N = 12
K = 5
D = 8


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [N, D]
    y: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]
    ids: Tensor  # int64 [N], below K
    weights: Tensor  # fp32 [N]
    key_bias: Tensor  # fp32 [N]
    rows: Tensor  # 0 ... N - 1
    next_rows: Tensor


def inputs_of(dtype: torch.dtype) -> Inputs:
    draw = torch.Generator().manual_seed(0)

    def features(rows: int) -> Tensor:
        exact = torch.randn(rows, D, generator=draw, dtype=torch.float64)
        return F.normalize(exact, dim=1).to(dtype)

    return Inputs(
        x=features(N).requires_grad_(),
        y=features(N),
        prototypes=features(K),
        ids=torch.randint(K, (N,), generator=draw),
        weights=torch.rand(N, generator=draw, dtype=torch.float32),
        key_bias=torch.randn(N, generator=draw, dtype=torch.float32),
        rows=torch.arange(N),
        next_rows=torch.arange(N).roll(1),
    )


def loss_values(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """The value of each loss, differentiable in x."""
    x = inputs.x
    y = inputs.y
    ids = inputs.ids
    weights = inputs.weights
    log_sum_exp, mean_positive = protoclip.contrastive_parts(
        x,
        y,
        14.3,
        positives=inputs.rows,
        exclude=inputs.next_rows,
        key_bias=inputs.key_bias,
        backend=backend,
    )
    return {
        "info_nce": protoclip.info_nce(x, y, 14.3, backend=backend),
        "info_nce, ids": protoclip.info_nce(x, y, 14.3, ids=ids, backend=backend),
        "info_nce, rows": protoclip.info_nce(x, y, 14.3, reduction="none", backend=backend),
        "info_nce, smoothed": protoclip.info_nce(
            x, y, 14.3, weights=weights, label_smoothing=0.1, backend=backend
        ),
        "contrastive": protoclip.contrastive(x, y, 14.3, backend=backend),
        "contrastive, weights": protoclip.contrastive(x, y, 14.3, weights=weights, backend=backend),
        "contrastive, positions": protoclip.contrastive(
            x,
            y,
            14.3,
            positives=inputs.rows,
            exclude=inputs.next_rows,
            key_bias=inputs.key_bias,
            backend=backend,
        ),
        "contrastive, several positives": protoclip.contrastive(
            x,
            y,
            14.3,
            positives=torch.stack([inputs.rows, inputs.next_rows], dim=1),
            key_ids=ids,
            negatives=torch.stack([y, y.flip(0)], dim=1),
            label_smoothing=0.1,
            backend=backend,
        ),
        "parts, log-sum-exp": log_sum_exp,
        "parts, mean positive": mean_positive,
        "nt_xent": protoclip.nt_xent(x, y, 14.3, backend=backend),
        "nt_xent, ids": protoclip.nt_xent(x, y, 14.3, ids=ids, backend=backend),
        "sup_con": protoclip.sup_con(x, ids, 14.3, backend=backend),
        "sigmoid_loss": ops.sigmoid_loss(x, y, 14.3, -9.7, backend=backend),
        "prototypes": protoclip.prototype_cross_entropy(
            x, inputs.prototypes, ids, 14.3, backend=backend
        ),
        "prototypes, smoothed": protoclip.prototype_cross_entropy(
            x, inputs.prototypes, ids, 14.3, weights=weights, label_smoothing=0.1, backend=backend
        ),
    }


def of_clusters(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    points = inputs.x.detach()
    prototypes = inputs.prototypes
    _, squared_distances = protoclip.kmeans_assign(points, prototypes, backend=backend)
    means, _ = protoclip.segment_mean(points, inputs.ids, K, backend=backend)
    kmeans = protoclip.kmeans(points, 3, tol=1e-3, weights=inputs.weights, backend=backend)
    plus_plus = protoclip.kmeans(points, 3, init="k-means++", backend=backend)
    return {
        "soft_targets": protoclip.soft_targets(prototypes, prototypes, 0.07, backend=backend),
        "squared distances": squared_distances,
        "segment_mean": means,
        "kmeans": kmeans.centroids,
        "k-means++": plus_plus.centroids,
    }


def results(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What each function gives for features of ``dtype``, and the gradient of the first ones."""
    inputs = inputs_of(dtype)
    values = loss_values(inputs, backend)
    gradients = {
        f"gradient of {name}": torch.autograd.grad(value.sum(), inputs.x, retain_graph=True)[0]
        for name, value in values.items()
    }
    return values | gradients | of_clusters(inputs, backend)


@pytest.fixture
def set_default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


CASES = [(name, torch.float32) for name in usable("contrastive") if name != "triton"]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend, dtype", [*CASES, ("reference", torch.float64)])
def test_dtypes_and_bits_are_the_same_under_any_default(
    set_default_dtype: Callable[[torch.dtype], None],
    backend: str,
    dtype: torch.dtype,
    default: torch.dtype,
) -> None:
    expected = results(backend, dtype)
    set_default_dtype(default)
    for name, value in results(backend, dtype).items():
        expected_dtype = torch.float32 if name == "squared distances" else dtype
        assert value.dtype == expected[name].dtype == expected_dtype, name
        assert torch.equal(value, expected[name]), name
