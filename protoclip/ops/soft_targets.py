"""Soft targets, collapsed to one vector per cluster: contract and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from protoclip.ops import checks, reference
from protoclip.ops.backends import implementation, resolve, without_autocast

COLDEST = 1e-30


@torch.no_grad()
def soft_targets(
    source_centroids: Tensor, prototypes: Tensor, temperature: float, *, backend: str = "auto"
) -> Tensor:
    """The expected prototype of each cluster under its soft target: m_y = sum_k t(y)_k C_k.

    t(y) = softmax_k(S_y.S_k / temperature) over the source's own centroids. One pass of K x K x D
    work per episode, streamed: the fused backends never hold K x K.

    Args:
        source_centroids: [K, Ds], where the clusters were found; any float dtype.
        prototypes: [K, D], the same clusters in the student's space (back translation); different
            dtypes are promoted.
        temperature: tau; <= 0 means hard targets, m = prototypes; taken as 1e-30 below that, where
            fp32 logits would overflow.
        backend: "auto" or a row of ``protoclip.backends("soft_targets")``.
    Returns:
        [K, D] float32 (float64 for float64 input), a constant: no gradient.
    Raises:
        ValueError, TypeError: shapes or devices disagree, or the named backend cannot run.
    Source:
        ProtoCLIP (arXiv 2206.10996), soft targets; linearity of cross-entropy in the target.
    """
    op = "soft_targets"
    checks.matrix(op, "source_centroids", source_centroids, "[K, Ds]")
    checks.matrix(op, "prototypes", prototypes, "[K, D]")
    if len(source_centroids) != len(prototypes):
        raise ValueError(
            f"{op}: expected one prototype per source centroid, got source_centroids "
            f"{tuple(source_centroids.shape)} and prototypes {tuple(prototypes.shape)}"
        )
    if source_centroids.device != prototypes.device:
        raise ValueError(
            f"{op}: expected source_centroids and prototypes on one device, got "
            f"{source_centroids.device} and {prototypes.device}; move one with .to()"
        )
    if not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{op}: expected temperature as a Python number, got {type(temperature).__name__}; "
            "a tensor's is .item()"
        )
    if temperature <= 0:
        return (prototypes if prototypes.dtype == torch.float64 else prototypes.float()).clone()
    source_centroids, prototypes = checks.promoted(source_centroids, prototypes)
    name = resolve(op, backend, prototypes.device.type, prototypes.dtype)
    with without_autocast(prototypes.device.type):
        run = reference.soft_targets if name == "reference" else implementation(op, name, op)
        return run(source_centroids, prototypes, max(float(temperature), COLDEST))
